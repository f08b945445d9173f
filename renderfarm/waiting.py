"""`renderfarm wait` and `renderfarm watch`: how the run of an output goes on, and that it has ended, seen from the store alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from renderfarm import commit, control
from renderfarm.config import expand_env
from renderfarm.errors import (
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_ROWS_FAILED,
    EXIT_STOPPED,
    EXIT_STOPPED_BY_USER,
    EXIT_TIMED_OUT,
    InvalidJob,
    RenderfarmError,
    Transient,
)
from renderfarm.heartbeat import STALE_S, is_alive
from renderfarm.reading import open as open_output
from renderfarm.shown import Shown
from renderfarm.storage import Store, open_store

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
class Seen:
    """How far a run was when somebody looked. `progress`: what it had said last, with the `state` that follows from it; `trouble`: why
    the store could not be read, and then the state is UNKNOWN."""

    state: str
    progress: dict[str, Any]
    trouble: str = ""

    @property
    def exit_code(self) -> int | None:
        """Of the run; None while it is at work."""
        return ENDED.get(self.state)


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


@dataclass(frozen=True)
class Begins:
    """The run that is meant. `after`: the run before it, by its id, which is none of it; `within_s`: how long it may take to begin."""

    after: str | None = None
    within_s: float = STALE_S


def last_run(out: str) -> str | None:
    """The id of an output's last run, which may be at work, have ended or be dead; None where there was none, or it cannot be read."""
    try:
        progress = commit.read_progress(open_store(expand_env(out), patience_s=0))
    except RenderfarmError:
        return None
    return str(progress["run_id"]) if "run_id" in progress else None


def look(out: str, begins: Begins = Begins()) -> Seen:
    """Once. UNKNOWN for what cannot be read here."""
    try:
        return _look(open_output(out).store, begins.within_s, begins)
    except RenderfarmError as error:
        return Seen("UNKNOWN", {}, str(error))


def watch(out: str, every_s: float = POLL_S, begins: Begins = Begins()) -> Iterator[Seen]:
    """How far it is, again and again, until no run is at work, or one is paused: the last one has an exit code. A run that says nothing
    for a minute is dead: INTERRUPTED, as is one that does not begin in time. Raises InvalidJob for what is no output then.
    """
    for seen, _ in _looks(out, begins, begins.within_s):
        yield seen
        if seen.exit_code is not None:
            return
        time.sleep(every_s)


def wait(out: str, timeout_s: float | None = None, say: Callable[[str], None] = lambda text: None, begins: Begins | None = None) -> Waited:
    """Until no run is at work, or one is paused. A run that says nothing for a minute is dead: INTERRUPTED.

    `say`: is told how far it is. `begins`: None for one that has begun: what is no output then raises InvalidJob at once.
    """
    for seen, waited in _looks(out, begins or Begins(), begins.within_s if begins else 0.0):
        if seen.exit_code is not None or (timeout_s is not None and waited >= timeout_s):
            break
        parts = f"part {seen.progress.get('parts_done', 0)} of {seen.progress.get('parts') or '?'}"
        say(seen.trouble or f"{seen.state.lower()}: {parts}")
        time.sleep(POLL_S if timeout_s is None else max(0.0, min(POLL_S, timeout_s - waited)))
    return Waited(
        out=open_store(expand_env(out)).url,
        run_id=seen.progress.get("run_id"),
        state=seen.state,
        exit_code=EXIT_TIMED_OUT if seen.exit_code is None else seen.exit_code,
        images=int(seen.progress.get("images", 0)),
        errors=int(seen.progress.get("errors", 0)),
        seconds=round(waited, 1),
    )


def _looks(out: str, begins: Begins, patience_s: float) -> Iterator[tuple[Seen, float]]:
    """What is to be seen, each time that somebody asks, and for how long it has been waited. Raises InvalidJob for what is still no output
    after `patience_s`."""
    store, began = None, time.monotonic()
    while True:
        waited = time.monotonic() - began
        try:
            store = store or open_output(out).store
        except InvalidJob:
            if waited >= patience_s:
                raise
        early = Seen("STARTING", {}, f"nothing is there yet; {patience_s:.0f} s are given to it")
        seen = _look(store, waited, begins) if store else early
        yield seen, waited
        begins = _begun(seen, begins)


def _begun(seen: Seen, begins: Begins) -> Begins:
    """Once the run is there, the one before it is looked at, too: it may share the work, and then both say in turns how far they are."""
    return replace(begins, after=None) if "run_id" in seen.progress else begins


def _look(store: Store, waited_s: float, begins: Begins) -> Seen:
    try:
        progress = commit.read_progress(store)
        if begins.after is not None and progress.get("run_id") == begins.after:
            progress = {}
        if progress.get("state") == "PAUSED" and control.said(store, str(progress.get("run_id"))) == "run":
            progress["state"] = "RUNNING"  # it has been told to go on, and has not said so yet
    except Transient as error:
        return Seen("UNKNOWN", {}, str(error))
    state = _state(progress, waited_s, begins.within_s)
    died = state == "INTERRUPTED" != progress.get("state")
    late = "" if progress or not died else f"no run began within {begins.within_s:.0f} s; what was to start it may say why"
    return Seen(state, progress | {"state": state} | (_counted(store) if died else {}), late)


def _counted(store: Store) -> dict[str, Any]:
    """What a run that died had not said of itself any more: the index knows. Nothing of a store that is away."""
    try:
        totals = commit.totals(store, commit.index_entries(store))
    except Transient:
        return {}
    counts = {"parts_done": totals.parts_done, "images": totals.images, "errors": totals.errors, "waived": totals.waived}
    return counts | {"error_classes": totals.classes, "rows_by_state": {}}


def _state(progress: dict[str, Any], waited_s: float, begins_within_s: float) -> str:
    """As the run's heart says; who has begun may not have said so yet."""
    if not progress:
        return "STARTING" if waited_s < begins_within_s else "INTERRUPTED"
    state = str(progress.get("state"))
    if state in ENDED and state != "PAUSED":
        return state
    return state if is_alive(progress) else "INTERRUPTED"
