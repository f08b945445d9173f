"""What the driver needs of an engine. Calls come from the driver's thread only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from renderfarm.errors import RenderfarmError
from renderfarm.records import Lease, Receipt, WorkerReady


@dataclass(frozen=True)
class Ready:
    worker: str
    info: WorkerReady


@dataclass(frozen=True)
class Done:
    worker: str
    lease: Lease
    receipt: Receipt


@dataclass(frozen=True)
class Failed:
    """A lease failed (or, with no lease, the worker's start-up did). WorkerLost: the worker is gone as well."""

    worker: str
    lease: Lease | None
    error: RenderfarmError


@dataclass(frozen=True)
class Leaving:
    """A worker's node will go away: it can finish what it holds. None: that of the driver."""

    worker: str | None


Event = Ready | Done | Failed | Leaving


class Engine(Protocol):
    max_workers: int

    def start_worker(self, name: str, avoid: frozenset[str] = frozenset()) -> None:
        """Begin to start a worker, not on the nodes `avoid`; a Ready or a Failed event follows, once there is room for it."""

    def submit(self, worker: str, lease: Lease) -> None:
        """Hand a lease to a ready worker; one Done or Failed event follows."""

    def stop_worker(self, worker: str) -> None:
        """End a worker now, whatever it does. No event of it follows."""

    def next_events(self, timeout_s: float) -> list[Event]:
        """Wait for events; an empty list after the timeout."""

    def shutdown(self) -> None:
        """Stop every worker."""
