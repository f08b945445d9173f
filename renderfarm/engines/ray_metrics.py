"""What a run on Ray says to Prometheus, through the endpoint that each node of a Ray has: Ray puts `ray_` before these names.

The driver's process says it, when a worker answers: nothing of it is between two steps of a denoiser. Labels are few and bounded: a job's
name, error classes, stages. Ray sends what was said every ten seconds, so the last of it may be missing when a run has ended; the output
has all of it. Of a histogram Ray sends buckets, and makes the sum from their middles. `jobs/grafana/renderfarm.json` is a dashboard.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ray.util.metrics import Counter, Gauge, Histogram

from renderfarm import errors
from renderfarm.errors import DeviceLost, NodeLost, WorkerLost
from renderfarm.records import Lease, Receipt, WorkerReady

_SECONDS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600]
JOB = "render_job"  # `job` is Prometheus' own word for what it scrapes
COUNTERS = {
    "renderfarm_images_total": ("Images that were committed.", ()),
    "renderfarm_image_bytes_total": ("Bytes of their files.", ()),
    "renderfarm_errors_total": ("Samples that ended as an error, by its class.", ("error_class",)),
    "renderfarm_parts_total": ("Parts that were committed.", ()),
    "renderfarm_leases_lost_total": ("Leases whose worker died, hung or went away with its node.", ("reason",)),
    "renderfarm_denoiser_calls_total": ("Calls of the denoiser, one for each step of a batch.", ()),
    "renderfarm_slots_total": ("Places in those batches.", ()),
    "renderfarm_useful_slots_total": ("Places that held a sample and no filler.", ()),
}
GAUGES = {
    "renderfarm_workers_ready": ("Workers whose model is loaded.", ()),
    "renderfarm_samples_in_flight": ("Samples of the leases that workers hold, as many as rows usually have.", ()),
}
HISTOGRAMS = {
    "renderfarm_denoiser_step_seconds": ("A worker's time from one answer to the next, by its denoiser calls meanwhile.", ()),
    "renderfarm_stage_seconds": ("How long a part took in a stage: prepare, wait, render, encode, put.", ("stage",)),
}
_CLASSES = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, errors.RenderfarmError)}


@dataclass
class _Worker:
    """`since`: when it last answered, or got a lease with none in hand; `slots`: what it had counted then."""

    batch_size: int = 1
    leases: int = 0
    since: float = 0.0
    slots: int = 0
    useful: int = 0


class RayMetrics:
    """Of one run. Called from the driver's thread only, as an engine is."""

    def __init__(self, job: str, images_per_row: float, now: Callable[[], float] = time.monotonic) -> None:
        self._now, self._images_per_row = now, images_per_row
        self._workers: dict[str, _Worker] = {}
        self._samples = 0
        made: dict[str, Any] = {}
        for name, (about, labels) in COUNTERS.items():
            made[name] = Counter(name, about, (JOB, *labels))
        for name, (about, labels) in GAUGES.items():
            made[name] = Gauge(name, about, (JOB, *labels))
        for name, (about, labels) in HISTOGRAMS.items():
            made[name] = Histogram(name, about, _SECONDS, (JOB, *labels))
        for metric in made.values():
            metric.set_default_tags({JOB: job})
        self._made = made

    def ready(self, worker: str, info: WorkerReady) -> None:
        self._workers[worker] = _Worker(info.batch_size)
        self._say_gauges()

    def given(self, worker: str, lease: Lease) -> None:
        known = self._workers[worker]
        if not known.leases:
            known.since = self._now()
        known.leases += 1
        self._in_flight(lease, 1)

    def answered(self, worker: str, lease: Lease, receipt: Receipt) -> None:
        self._ended(worker, lease)
        for part in receipt.parts:
            if part.adopted:
                continue
            self._count("renderfarm_parts_total", 1)
            self._count("renderfarm_images_total", part.images)
            self._count("renderfarm_image_bytes_total", part.bytes)
            for name, count in part.error_classes.items():
                self._count("renderfarm_errors_total", count, error_class=name if name in _CLASSES else "other")
            for stage, seconds in part.seconds.items():
                self._made["renderfarm_stage_seconds"].observe(seconds, {"stage": stage})
        if (known := self._workers.get(worker)) is not None:
            self._rendered(known, receipt)

    def _rendered(self, known: _Worker, receipt: Receipt) -> None:
        """A worker's slots are counted since it began; leases overlap, so that an older answer may come later."""
        now, slots = self._now(), receipt.total_slots - known.slots
        if slots > 0:
            calls = slots // known.batch_size
            self._count("renderfarm_denoiser_calls_total", calls)
            self._count("renderfarm_slots_total", slots)
            self._count("renderfarm_useful_slots_total", receipt.useful_slots - known.useful)
            if calls:
                self._made["renderfarm_denoiser_step_seconds"].observe((now - known.since) / calls)
            known.slots, known.useful = receipt.total_slots, receipt.useful_slots
        known.since = now

    def failed(self, worker: str, lease: Lease, error: Exception) -> None:
        self._ended(worker, lease)
        if isinstance(error, WorkerLost):
            self._lost("node" if isinstance(error, NodeLost) else "device" if isinstance(error, DeviceLost) else "worker")

    def stopped(self, worker: str, leases: list[Lease]) -> None:
        """It was killed with these leases, or let go without any."""
        for lease in leases:
            self._ended(worker, lease)
            self._lost("silence")

    def gone(self, worker: str) -> None:
        if self._workers.pop(worker, None) is not None:
            self._say_gauges()

    def close(self) -> None:
        """Ray keeps the last value of a gauge for as long as this process lives."""
        self._workers.clear()
        self._samples = 0
        self._say_gauges()

    def _ended(self, worker: str, lease: Lease) -> None:
        if (known := self._workers.get(worker)) is not None:
            known.leases -= 1
        self._in_flight(lease, -1)

    def _in_flight(self, lease: Lease, sign: int) -> None:
        self._samples += sign * (len(lease.only) if lease.only is not None else round(lease.rows.num_rows * self._images_per_row))
        self._say_gauges()

    def _say_gauges(self) -> None:
        self._made["renderfarm_workers_ready"].set(len(self._workers))
        self._made["renderfarm_samples_in_flight"].set(max(0, self._samples))

    def _lost(self, reason: str) -> None:
        self._count("renderfarm_leases_lost_total", 1, reason=reason)

    def _count(self, name: str, by: int, **labels: str) -> None:
        if by > 0:
            self._made[name].inc(by, labels)
