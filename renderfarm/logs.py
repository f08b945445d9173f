"""`renderfarm logs`: what the runs of an output said (see `journal`), read from the store alone, while they go on and afterwards."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from renderfarm.control import family
from renderfarm.errors import InvalidJob, Transient
from renderfarm.journal import LOGS, log_key
from renderfarm.manifest import parse_ranges
from renderfarm.reading import open as open_output
from renderfarm.storage import Store
from renderfarm.waiting import watch

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

    @cached_property
    def ranges(self) -> Sequence[range]:
        return () if self.rows is None else parse_ranges(self.rows)


def read_logs(out: str, choice: Choice = Choice(), *, follow: bool = False) -> Iterator[Event]:
    """Events, run by run, as they came. `follow`: and those that come, until no run is at work (as `waiting.watch` sees it). Raises
    InvalidJob for what is no output, for rows that are none, and for a run that said nothing."""
    seen, _ = dict[str, int](), choice.ranges  # a mistake in them is better said before anything else
    for store, at_work in _stores(out, choice, follow):
        then = dict(seen)
        try:
            found = list(_new(store, choice, then, at_work))
        except Transient:
            if not follow:
                raise
            continue
        seen = then
        yield from (shown for event in found if (shown := _chosen(event, choice)) is not None)


def _stores(out: str, choice: Choice, follow: bool) -> Iterator[tuple[Store, str | None]]:
    """The output's, each time that somebody is to look into it, and which run is at work, if that was asked. Raises as `read_logs` does."""
    if not follow:
        yield _with_log(open_output(out).store, choice), None
        return
    store: Store | None = None
    for seen in watch(out, FOLLOW_S):
        if not seen.progress:
            continue
        at_work = str(seen.progress.get("run_id"))
        yield (store := store or _with_log(open_output(out).store, choice)), at_work
        if choice.run is not None and family(choice.run) != family(at_work):
            return  # those that share their work say in turns that they are at it


def _with_log(store: Store, choice: Choice) -> Store:
    if choice.run is not None and not store.exists(log_key(choice.run)):
        known = ", ".join(_run_of(key) for key in store.list(LOGS)[-5:]) or "none yet"
        raise InvalidJob(f"--run {choice.run}: {store.url} has no log of such a run; the last ones: {known}")
    return store


def _run_of(key: str) -> str:
    return key.removeprefix(f"{LOGS}/").removesuffix(".jsonl")


def _new(store: Store, choice: Choice, seen: dict[str, int], at_work: str | None) -> Iterator[Event]:
    """What was not seen before; then it is. `at_work`: of other runs what was seen is all that there will be."""
    for key in store.list(LOGS):
        run = _run_of(key)
        if choice.run not in (None, run) or not key.endswith(".jsonl"):
            continue
        if run in seen and at_work is not None and family(run) != family(at_work):
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
            if isinstance(event, dict) and isinstance(event.get("n"), int) and ("event" in event or "left_out" in event):
                yield event


def _chosen(event: Event, choice: Choice) -> Event | None:
    """Of an event about rows, what it says of those; None where nothing."""
    if choice.worker is not None and event.get("worker") != choice.worker:
        return None
    if not (ranges := choice.ranges):
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
