"""The engine without Ray: one worker in this process. For debugging, notebooks, tests, machines without Ray."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import replace

from renderfarm.engines.base import Done, Event, Failed, Ready
from renderfarm.errors import Fatal, RenderFailed, RenderfarmError
from renderfarm.records import Lease
from renderfarm.worker import Worker, WorkerSpec


class InlineEngine:
    max_workers = 1

    def __init__(self, spec: WorkerSpec) -> None:
        self.spec = spec
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.in_flight = 0
        self.worker: Worker | None = None

    def start_worker(self, name: str, avoid: frozenset[str] = frozenset()) -> None:
        self.worker = Worker(replace(self.spec, name=name))
        _start(self._ready, name, self.worker)

    def _ready(self, name: str, worker: Worker) -> None:
        try:
            self.events.put(Ready(name, worker.ready()))
        except Exception as error:  # the boundary: whatever start-up raises becomes an event
            self.events.put(Failed(name, None, _ours(error)))

    def submit(self, worker: str, lease: Lease) -> None:
        assert self.worker is not None
        self.in_flight += 1
        _start(self._render, worker, self.worker, lease)

    def _render(self, name: str, worker: Worker, lease: Lease) -> None:
        try:
            self.events.put(Done(name, lease, worker.render(lease)))
        except Exception as error:  # the lease boundary
            self.events.put(Failed(name, lease, _ours(error)))

    def stop_worker(self, worker: str) -> None:
        raise Fatal("the worker hangs, and its thread cannot be ended; run again, with --engine ray if that happens again")

    def next_events(self, timeout_s: float) -> list[Event]:
        try:
            event = self.events.get(timeout=timeout_s)
        except queue.Empty:
            return []
        if isinstance(event, Done) or (isinstance(event, Failed) and event.lease is not None):
            self.in_flight -= 1
        return [event]

    def shutdown(self) -> None:
        """End the worker; one that is in the middle of leases is abandoned, as a killed process would be."""
        if self.worker is not None and not self.in_flight:
            self.worker.close()


def _start(target: Callable[..., None], *arguments: object) -> None:
    """The driver bounds how many leases are in flight. Daemons: a run that is to end at once does not wait for them."""
    threading.Thread(target=target, args=arguments, name="lease", daemon=True).start()


def _ours(error: Exception) -> RenderfarmError:
    if isinstance(error, RenderfarmError):
        return error
    ours = RenderFailed(f"{type(error).__name__}: {error}")
    ours.__cause__ = error
    return ours
