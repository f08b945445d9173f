"""progress.json, put beside the driver's loop: a store that is away must not keep the loop from its workers.

Runs that share an output write it in turns, so each of them sees the others there. One that ends while another lives leaves the file to
that one: its own end is in `_renderfarm/runs/ID.json`, which is written before, so that of two that end together one sees the other's.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from renderfarm import commit
from renderfarm.errors import RenderfarmError, Transient
from renderfarm.journal import Journal, log_key
from renderfarm.storage import Store, open_store

EVERY_S = 5.0
LAST_S = 10.0
LOOK_S = 0.5
QUIET_S = 8.0  # a run that lives has said something by then
STALE_S = 60.0  # twelve missed ones
ALIVE = ("STARTING", "REPAIRING", "RUNNING", "PAUSING", "PAUSED", "CANCELLING")


def is_alive(progress: dict[str, Any]) -> bool:
    """Whether the run that wrote this is at work, as far as another machine can tell."""
    return progress.get("state") in ALIVE and time.time() - progress.get("updated", 0) <= STALE_S


def run_key(run_id: str) -> str:
    """Where a run that has ended says how."""
    return f"{commit.RUNS}/{run_id}.json"


def state_of(progress: dict[str, Any], *, unfinished: bool) -> str:
    """The run's state, as far as another machine can tell; PLANNED where there was none. `unfinished`: not every part is in the index."""
    state = str(progress.get("state", "PLANNED"))
    # it may have ended, and the index has lost entries since: a run finds or renders those parts
    gone = unfinished if state in ("SUCCEEDED", "PARTIAL") else state in ALIVE and not is_alive(progress)
    return "INTERRUPTED" if gone else state


class Heartbeat:
    """Says every EVERY_S how far a run is, and hears what is wanted of it. Each time is tried once: the next one says more than a
    repetition."""

    def __init__(self, url: str, hear: Callable[[Store], str], journal: Journal | None = None) -> None:
        """`hear`: reads what is wanted. Raises Transient where it cannot, and then the same is wanted as before. `journal`: is put, too."""
        self.hear, self.wanted, self.journal = hear, "run", journal or Journal()
        self.store = open_store(url, patience_s=0)
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="heartbeat")
        self.last, self.put = 0.0, Future[None]()
        self.put.set_result(None)
        self.away_since: float | None = None
        """When the store was first away, of late."""
        self.other: dict[str, Any] | None = None
        """What another run said here last, if it was at work then."""
        self.heard, self.moves = 0.0, False
        """When it was found here, by this process's clock; and whether it had said something else before."""

    def is_due(self) -> bool:
        return self.put.done() and time.monotonic() >= self.last + EVERY_S

    def beat(self, snapshot: dict[str, Any]) -> str | None:
        """Why the store could not be written the last time, if it could not. Raises what no time will mend."""
        trouble = self._trouble()
        self.away_since = (self.away_since or self.last) if trouble else None
        self.last = time.monotonic()
        self.put = self.thread.submit(self._say_and_hear, snapshot, self.journal.due(anyway=trouble is not None))
        return trouble

    def _say_and_hear(self, snapshot: dict[str, Any], log: bytes | None) -> None:
        self._see_others(snapshot["run_id"])
        self.store.put(commit.PROGRESS, commit.to_json(snapshot))
        self.wanted = self.hear(self.store)
        if log is not None:
            self.store.put(log_key(snapshot["run_id"]), log)

    def _see_others(self, own: str) -> None:
        there = commit.read_progress(self.store)
        if there.get("run_id") not in (own, None):
            before, self.other = self.other, there if is_alive(there) else None
            if before is None or before.get("updated") != there.get("updated"):
                self.heard, self.moves = time.monotonic(), before is not None

    def _living(self, own: str) -> dict[str, Any] | None:
        """What the other run said, if it is at work. One that was killed a moment ago seems so, until it has been quiet for a while."""
        self._see_others(own)
        while (other := self.other) is not None and is_alive(other) and not self.store.exists(run_key(other["run_id"])):
            if time.monotonic() >= self.heard + QUIET_S * (2 if self.moves else 1):
                return None
            if self.moves:
                return other
            time.sleep(LOOK_S)
            self._see_others(own)
        return None

    def close(self, snapshot: dict[str, Any], record: dict[str, Any] | None = None) -> None:
        """The last one, whatever came before. A store that is away now neither undoes a run nor keeps it from ending. `record`: for
        `runs/`, where that does not say yet how the run ended."""
        last = self.thread.submit(self._end, snapshot, record, self.journal.due(anyway=True))
        self.thread.shutdown(wait=False)
        with contextlib.suppress(RenderfarmError, TimeoutError):
            last.result(LAST_S)

    def _end(self, snapshot: dict[str, Any], record: dict[str, Any] | None, log: bytes | None) -> None:
        own = snapshot["run_id"]
        if record is not None:
            self.store.put(run_key(own), commit.to_json(record))
        if log is not None:  # before it is known that the run has ended: then nobody waits for more of it
            self.store.put(log_key(own), log)
        if (other := self._living(own)) is None:
            self.store.put(commit.PROGRESS, commit.to_json(snapshot))
        elif commit.read_progress(self.store).get("run_id") in (own, None):
            self.store.put(commit.PROGRESS, commit.to_json(other))  # until it says more

    def _trouble(self) -> str | None:
        try:
            self.put.result()
        except Transient as error:
            return str(error)
        return None
