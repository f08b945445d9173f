"""progress.json, put beside the driver's loop: a store that is away must not keep the loop from its workers."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from renderfarm import commit
from renderfarm.errors import RenderfarmError, Transient
from renderfarm.storage import Store, open_store

EVERY_S = 5.0
LAST_S = 10.0
STALE_S = 60.0  # twelve missed ones
ALIVE = ("STARTING", "REPAIRING", "RUNNING", "PAUSING", "PAUSED", "CANCELLING")


def is_alive(progress: dict[str, Any]) -> bool:
    """Whether the run that wrote this is at work, as far as another machine can tell."""
    return progress.get("state") in ALIVE and time.time() - progress.get("updated", 0) <= STALE_S


class Heartbeat:
    """Says every EVERY_S how far a run is, and hears what is wanted of it. Each time is tried once: the next one says more than a
    repetition."""

    def __init__(self, url: str, hear: Callable[[Store], str]) -> None:
        """`hear`: reads what is wanted. Raises Transient where it cannot, and then the same is wanted as before."""
        self.hear, self.wanted = hear, "run"
        self.store = open_store(url, patience_s=0)
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="heartbeat")
        self.last, self.put = 0.0, Future[None]()
        self.put.set_result(None)

    def is_due(self) -> bool:
        return self.put.done() and time.monotonic() >= self.last + EVERY_S

    def beat(self, snapshot: dict[str, Any]) -> str | None:
        """Why the store could not be written the last time, if it could not. Raises what no time will mend."""
        trouble = self._trouble()
        self.last = time.monotonic()
        self.put = self.thread.submit(self._say_and_hear, commit.to_json(snapshot))
        return trouble

    def _say_and_hear(self, snapshot: bytes) -> None:
        self.store.put(commit.PROGRESS, snapshot)
        self.wanted = self.hear(self.store)

    def close(self, snapshot: dict[str, Any]) -> None:
        """The last one, whatever came before. A store that is away now neither undoes a run nor keeps it from ending."""
        last = self.thread.submit(self.store.put, commit.PROGRESS, commit.to_json(snapshot))
        self.thread.shutdown(wait=False)
        with contextlib.suppress(RenderfarmError, TimeoutError):
            last.result(LAST_S)

    def _trouble(self) -> str | None:
        try:
            self.put.result()
        except Transient as error:
            return str(error)
        return None
