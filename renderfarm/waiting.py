"""`renderfarm wait`: until the run of an output has ended, seen from the store alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from renderfarm import commit, control
from renderfarm.errors import (
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_ROWS_FAILED,
    EXIT_STOPPED,
    EXIT_STOPPED_BY_USER,
    EXIT_TIMED_OUT,
    Transient,
)
from renderfarm.heartbeat import STALE_S, is_alive
from renderfarm.reading import open as open_output
from renderfarm.shown import Shown

POLL_S = 2.0
ENDED = {
    "SUCCEEDED": EXIT_OK,
    "PARTIAL": EXIT_ROWS_FAILED,
    "FAILED": EXIT_STOPPED,
    "EXPIRED": EXIT_STOPPED,
    "CANCELLED": EXIT_STOPPED_BY_USER,
    "PAUSED": EXIT_STOPPED_BY_USER,
    "INTERRUPTED": EXIT_INTERRUPTED,
}


@dataclass(frozen=True)
class Waited(Shown):
    """How a run ended, or that it has not: then `exit_code` is EXIT_TIMED_OUT, and `state` the last that was seen."""

    out: str
    run_id: str | None
    state: str
    exit_code: int
    images: int
    errors: int
    seconds: float


def wait(out: str, timeout_s: float | None = None, say: Callable[[str], None] = lambda text: None) -> Waited:
    """Until no run is at work, or one is paused. A run that says nothing for a minute is dead: INTERRUPTED.

    `say`: is told how far it is. Raises InvalidJob for what is no output.
    """
    store, began = open_output(out).store, time.monotonic()
    while True:
        waited, progress, trouble = time.monotonic() - began, dict[str, Any](), ""
        try:
            progress = commit.read_progress(store)
            if progress.get("state") == "PAUSED" and control.said(store, str(progress.get("run_id"))) == "run":
                progress["state"] = "RUNNING"  # it has been told to go on, and has not said so yet
        except Transient as error:
            trouble = str(error)
        state = _state(progress, waited) if not trouble else "UNKNOWN"
        if state in ENDED or (timeout_s is not None and waited >= timeout_s):
            return Waited(
                out=store.url,
                run_id=progress.get("run_id"),
                state=state,
                exit_code=ENDED.get(state, EXIT_TIMED_OUT),
                images=int(progress.get("images", 0)),
                errors=int(progress.get("errors", 0)),
                seconds=round(waited, 1),
            )
        say(trouble or f"{state.lower()}: part {progress.get('parts_done', 0)} of {progress.get('parts') or '?'}")
        time.sleep(POLL_S if timeout_s is None else max(0.0, min(POLL_S, timeout_s - waited)))


def _state(progress: dict[str, Any], waited_s: float) -> str:
    """As the run's heart says; who has begun may not have said so yet."""
    if not progress:
        return "STARTING" if waited_s < STALE_S else "INTERRUPTED"
    state = str(progress.get("state"))
    if state in ENDED and state != "PAUSED":
        return state
    return state if is_alive(progress) else "INTERRUPTED"
