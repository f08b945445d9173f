"""`renderfarm logs`: what the runs of an output said (see `journal`), read from the store alone, while they go on and afterwards."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from renderfarm import commit
from renderfarm.errors import InvalidJob, Transient
from renderfarm.heartbeat import is_alive
from renderfarm.journal import LOGS, log_key
from renderfarm.manifest import parse_ranges
from renderfarm.reading import open as open_output
from renderfarm.storage import Store

FOLLOW_S = 2.0
SAID_APART = ("run", "n", "at", "event", "worker", "part", "rows", "reason", "failed", "failed_unnamed")
Event = dict[str, Any]
"""As the journal has it, with `run`. `{"event": "left out", "count": 3}` stands for lines that the journal dropped."""


@dataclass(frozen=True)
class Choice:
    """Which events. `rows`: ranges as `--rows` has them; of those events that are about rows, the ones about these. None: all."""

    run: str | None = None
    worker: str | None = None
    rows: str | None = None

    @property
    def ranges(self) -> Sequence[range]:
        return () if self.rows is None else parse_ranges(self.rows)


def read_logs(out: str, choice: Choice = Choice(), *, follow: bool = False) -> Iterator[Event]:
    """Events, run by run, as they came. `follow`: and those that come, until no run is at work. Raises InvalidJob for what is no output,
    for rows that are none, and for a run that said nothing."""
    store, ranges = open_output(out).store, choice.ranges
    if choice.run is not None and not store.exists(log_key(choice.run)):
        known = ", ".join(_run_of(key) for key in store.list(LOGS)[-5:]) or "none yet"
        raise InvalidJob(f"--run {choice.run}: {store.url} has no log of such a run; the last ones: {known}")
    seen: dict[str, int] = {}
    while True:
        ended = not follow or not _is_followed(store, choice)  # asked first: what is said after that is said by nobody
        try:
            found = list(_new(store, choice, seen))
        except Transient:
            if not follow:
                raise
            ended, found = False, []
        yield from (shown for event in found if (shown := _chosen(event, choice.worker, ranges)) is not None)
        if ended:
            return
        time.sleep(FOLLOW_S)


def _run_of(key: str) -> str:
    return key.removeprefix(f"{LOGS}/").removesuffix(".jsonl")


def _is_followed(store: Store, choice: Choice) -> bool:
    try:
        progress = commit.read_progress(store)
    except Transient:
        return True
    return is_alive(progress) and choice.run in (None, progress.get("run_id"))


def _new(store: Store, choice: Choice, seen: dict[str, int]) -> Iterator[Event]:
    """What was not seen before; then it is."""
    for key in store.list(LOGS):
        run = _run_of(key)
        if choice.run not in (None, run) or not key.endswith(".jsonl"):
            continue
        with contextlib.suppress(KeyError):
            for event in _events(store.read(key)):
                if not seen.get(run) and event.get("left_out"):
                    yield {"run": run, "event": "left out", "count": event["left_out"]}
                if event.get("event") == "committed" and (more := event.get("errors", 0) - len(event.get("failed", ()))):
                    event["failed_unnamed"] = more
                if event["n"] > seen.get(run, 0):
                    seen[run] = event["n"]
                    yield {"run": run, **event}


def _events(data: bytes) -> Iterator[Event]:
    """Those that can be read; a damaged line says nothing."""
    for line in data.splitlines():
        with contextlib.suppress(ValueError):
            event = json.loads(line)
            if isinstance(event, dict) and isinstance(event.get("n"), int):
                yield event


def _chosen(event: Event, worker: str | None, ranges: Sequence[range]) -> Event | None:
    """Of an event about rows, what it says of those; None where nothing."""
    if worker is not None and event.get("worker") != worker:
        return None
    if not ranges:
        return event
    start, stop = event.get("rows") or (0, 0)
    if not any(_meets(wanted, start, stop) for wanted in ranges):
        return None
    if "failed" in event:
        event = event | {"failed": [one for one in event["failed"] if any(one["row"] in wanted for wanted in ranges)]}
    return event


def _meets(wanted: range, start: int, stop: int) -> bool:
    first = wanted.start + -(-max(0, start - wanted.start) // wanted.step) * wanted.step
    return first in wanted and first < stop


# ------------------------------------------------------------------------------------------------------- for people


def line_of(event: Event) -> str:
    """`2026-11-28T07:51:02Z RUN w0 committed part-00000003 rows 48-63: images 15, errors 1; row 50 (cat-50) image 0: InvalidInput`"""
    if event["event"] == "left out":
        return f"{event['run']}: {event['count']:,} lines were left out"
    at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(event.get("at", 0)))
    rows = f"rows {event['rows'][0]}-{event['rows'][1] - 1}" if event.get("rows") else ""
    head = " ".join(filter(None, (at, event["run"], event.get("worker", "driver"), event["event"], event.get("part"), rows)))
    counts = ", ".join(f"{name} {_shown(value)}" for name, value in event.items() if name not in SAID_APART)
    failed = [f"row {one['row']} ({one['row_id']}) image {one['image_index']}: {one['error_class']}" for one in event.get("failed", ())]
    more = f"{event['failed_unnamed']:,} more: renderfarm errors" if event.get("failed_unnamed", 0) > 0 else ""
    said = "; ".join(filter(None, (counts, *failed, more, event.get("reason"))))
    return f"{head}{': ' if said else ''}{said}"


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
