"""Counting while a run goes on: what is done, how fast, what is left. Plain values for whoever shows them."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from renderfarm.commit import Totals
from renderfarm.records import PartReceipt, Receipt

REMEMBERED = 100


@dataclass
class WorkerProgress:
    device: str = ""
    node: str = ""
    images: int = 0
    leases: int = 0
    state: str = "starting"
    reason: str = ""


@dataclass
class Progress:
    """Totals over the whole output; `new_*` belong to this run. Times in seconds."""

    run_id: str
    job: str
    rows: int
    key: str = ""
    """Of the job, its parameters and its date; `run_id` is this go at it."""
    logical_date: str | None = None
    parts: int = 0
    """0 until a worker has measured how large they should be, where that was left to it."""
    state: str = "STARTING"
    parts_done: int = 0
    rows_by_state: dict[str, int] = field(default_factory=dict)
    """done: all their images have ended; in flight: with a worker; left. Empty until parts are known."""
    images: int = 0
    errors: int = 0
    bytes: int = 0
    new_images: int = 0
    new_errors: int = 0
    error_classes: Counter[str] = field(default_factory=Counter)
    waived: int = 0
    """Of the errors, those that may stay (`renderfarm waive`), when the run began."""
    lost_workers: int = 0
    copies: int = 0
    """Leases given to a second worker, since the first was slow."""
    workers: dict[str, WorkerProgress] = field(default_factory=dict)
    started: float = field(default_factory=time.time)
    first_ready: float | None = None
    rate_before: float = 0.0
    """Images per second of the run before: what a run that has nothing to do leaves for `plan`."""
    trouble: str | None = None
    """What keeps the output from being written, for as long as it does."""
    counters: dict[str, tuple[int, int]] = field(default_factory=dict)

    def add_committed(self, receipt: PartReceipt) -> None:
        self.parts_done += not receipt.retry
        self.images += receipt.images
        self.errors += -receipt.images if receipt.retry else receipt.errors  # a retry's samples were errors before
        self.bytes += receipt.bytes
        self.error_classes = self.error_classes + Counter(receipt.error_classes) - Counter(receipt.superseded)

    def recount(self, totals: Totals) -> None:
        """Count anew what is committed: a part may be there whose worker's answer never came."""
        self.parts_done, self.images, self.errors, self.bytes = totals.parts_done, totals.images, totals.errors, totals.bytes
        self.error_classes, self.waived = Counter(totals.classes), totals.waived

    def add(self, worker: str, receipt: Receipt) -> None:
        for part in receipt.parts:
            self.add_committed(part)
            if not part.adopted:
                self.new_images += part.images
                self.new_errors += part.errors
                self.workers[worker].images += part.images
        self.workers[worker].leases += 1
        self.counters[worker] = (receipt.useful_slots, receipt.total_slots)

    def forget(self) -> None:
        """All but the last of the workers that are gone: on nodes that come and go there may be thousands."""
        gone = [name for name, worker in self.workers.items() if worker.state in ("lost", "let go") and not worker.reason]
        for name in gone[:-REMEMBERED]:
            del self.workers[name]

    @property
    def left_out(self) -> dict[str, int]:
        """Why workers never rendered, and how many."""
        return dict(Counter(worker.reason for worker in self.workers.values() if worker.reason))

    @property
    def seconds(self) -> float:
        return time.time() - self.started

    @property
    def images_per_second(self) -> float:
        """Since the first worker was ready; start-up is not rendering."""
        if self.first_ready is None:
            return 0.0
        return self.new_images / max(1e-9, time.time() - self.first_ready)

    @property
    def eta_seconds(self) -> float | None:
        """None while nothing is known yet."""
        new_parts = sum(worker.leases for worker in self.workers.values())
        if self.first_ready is None or not new_parts:
            return None
        return (time.time() - self.first_ready) / new_parts * (self.parts - self.parts_done)

    @property
    def useful_slots(self) -> float | None:
        """Share of denoiser slots that were no filler."""
        total = sum(pair[1] for pair in self.counters.values())
        return sum(pair[0] for pair in self.counters.values()) / total if total else None

    def snapshot(self) -> dict[str, Any]:
        """JSON values; what progress.json and `status --json` show."""
        return {
            "run_id": self.run_id,
            "job": self.job,
            "key": self.key,
            "logical_date": self.logical_date,
            "state": self.state,
            "rows": self.rows,
            "rows_by_state": self.rows_by_state,
            "parts": self.parts,
            "parts_done": self.parts_done,
            "images": self.images,
            "errors": self.errors,
            "bytes": self.bytes,
            "new_images": self.new_images,
            "new_errors": self.new_errors,
            "error_classes": dict(self.error_classes),
            "waived": self.waived,
            "images_per_second": round(self.images_per_second or self.rate_before, 3),
            "eta_seconds": self.eta_seconds and round(self.eta_seconds, 1),
            "useful_slots": self.useful_slots and round(self.useful_slots, 4),
            "trouble": self.trouble,
            "lost_workers": self.lost_workers,
            "copies": self.copies,
            "workers": {name: vars(worker) for name, worker in self.workers.items()},
            "started": round(self.started, 3),
            "first_ready": self.first_ready and round(self.first_ready, 3),
            "updated": round(time.time(), 3),
        }
