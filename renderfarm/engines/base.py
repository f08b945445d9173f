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


Event = Ready | Done | Failed


class Engine(Protocol):
    max_workers: int

    def start_worker(self, name: str) -> None:
        """Begin to start a worker; a Ready or a Failed event follows."""

    def submit(self, worker: str, lease: Lease) -> None:
        """Hand a lease to a ready worker; one Done or Failed event follows."""

    def next_events(self, timeout_s: float) -> list[Event]:
        """Wait for events; an empty list after the timeout."""

    def shutdown(self) -> None:
        """Stop every worker."""
