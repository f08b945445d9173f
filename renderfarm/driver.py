"""One loop over leases: hand them out, take receipts, decide what a failure means. No engine's name appears here.

a lease fails with     then
WorkerLost             it goes to another worker, alone; after two losses row by row, announced, so that the next
                       death names the row, which becomes an error
Transient              again after a jittered pause, eight times
ProfileMismatch        that worker is benched; the job stops if none is left
Fatal, anything else   the job stops with the reason; what is committed stays, and `run` continues
"""

from __future__ import annotations

import json
import random
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from renderfarm import commit
from renderfarm.engines.base import Done, Engine, Failed, Ready
from renderfarm.errors import (
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_ROWS_FAILED,
    Fatal,
    Interrupted,
    InvalidJob,
    ProfileMismatch,
    RenderfarmError,
    Transient,
    WorkerLost,
)
from renderfarm.heartbeat import Heartbeat
from renderfarm.plan import Grid, choose_part_rows, leases
from renderfarm.preparation import Prepared
from renderfarm.progress import Progress, WorkerProgress
from renderfarm.records import Lease, WorkerReady
from renderfarm.repair import Repaired, refuse_if_alive, repair
from renderfarm.storage import probe
from renderfarm.worker import LEASES_IN_FLIGHT, leases_held

TRANSIENT_ATTEMPTS = 8
LOSSES_BEFORE_ANNOUNCING = 2
START_ATTEMPTS = 3
UNMEASURED_S = 1.0  # an image, where the first worker could not measure one

Observer = Callable[[Progress], None]


@dataclass(frozen=True)
class RunSummary:
    """How a run ended. Counts are of the whole output; `new_*` of this run."""

    run_id: str
    job: str
    out: str
    state: str
    exit_code: int
    rows: int
    images: int
    errors: int
    new_images: int
    new_errors: int
    error_classes: dict[str, int]
    workers_left_out: dict[str, int]
    """Why workers took no part (they have another render profile, or could not be started), and how many."""
    seconds: float
    images_per_second: float
    useful_slots: float | None
    bytes: int
    warnings: tuple[str, ...] = ()
    """What a user of the dataset should know of the model's rendering."""
    repaired: tuple[Repaired, ...] = ()
    """With `--repair`: the parts that were not as they had been committed."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Driver:
    """One run of one job."""

    def __init__(
        self,
        prepared: Prepared,
        stop: threading.Event,
        observe: Observer,
        grace_s: float = 30.0,
        stop_now: threading.Event | None = None,
        repair: bool = False,
    ) -> None:
        """`repair`: check what is committed and mend it first."""
        self.repair, self.repaired = repair, list[Repaired]()
        self.stop_now = stop_now or threading.Event()
        self.prepared, self.job, self.store = prepared, prepared.job, prepared.store
        self.stop, self.observe, self.grace_s = stop, observe, grace_s
        self.progress = Progress(
            run_id=time.strftime("%Y%m%dT%H%M%SZ", time.gmtime()) + "-" + uuid.uuid4().hex[:6],
            job=self.job.name,
            rows=prepared.manifest.rows,
        )
        self.grid: Grid | None = None
        self.held = LEASES_IN_FLIGHT
        self.batch_size = self.slot_groups = 1  # until workers say theirs
        self.is_done = bytearray()  # by part
        self.free: dict[str, list[Lease]] = {}  # ready workers, and the leases each holds
        self.starting: set[str] = set()
        self.again: deque[tuple[float, Lease]] = deque()  # (not before, lease)
        self.restarts: list[float] = []  # when to try again to start a worker
        self.start_failures = self.worker_number = 0
        self.heartbeat = Heartbeat(self.store.url)

    def begin(self) -> None:
        """Check that the output can be written and belongs to this job; the first time, freeze the job in it."""
        if not self._rows_wanted():
            raise InvalidJob("manifest.where selects no row: its `row` lies outside the manifest; correct it")
        if not self.store.exists(commit.JOB) and (theirs := commit.not_ours(self.store)):
            raise InvalidJob(
                f"{self.store.url} is no output of renderfarm, and not empty (it holds {theirs}); give an empty folder, or a new one"
            )
        if self.repair:
            refuse_if_alive(self.store)
        if not self.job.output.single_writer:
            probe(self.store)
        commit.freeze_job(self.store, self.prepared.frozen())
        self.progress.rate_before = float(commit.read_progress(self.store).get("images_per_second") or 0.0)
        for data in (*self.prepared.adapter_files.values(), *self.prepared.after_files.values()):
            commit.keep(self.store, data)

    def run(self, make_engine: Callable[[], Engine]) -> RunSummary:
        """Render what is not done. Starts no worker when all is."""
        if (grid := self.prepared.grid()) is not None:
            if self.repair:
                self._repair()
            self._use(grid)
        if self.grid is None or self.progress.parts_done < self.progress.parts:
            engine = make_engine()
            try:
                self._loop(engine)
            except BaseException as error:
                self.progress.state = "INTERRUPTED" if isinstance(error, Interrupted) else "FAILED"
                self.heartbeat.close(self.progress.snapshot())
                raise
            finally:
                engine.shutdown()
        return self._finish()

    def _repair(self) -> None:
        """Others see that somebody is at it, and do not begin the same."""
        self.progress.state = "REPAIRING"

        def each(number: int, of: int, repaired: Repaired | None) -> None:
            self.repaired += [repaired] if repaired else []
            self.progress.parts_done, self.progress.parts = number, of
            self.observe(self.progress)
            if self.heartbeat.is_due():
                self.heartbeat.beat(self.progress.snapshot())
            if self.stop.is_set():
                raise Interrupted("stopped while parts were being checked; run the same command again to continue")

        self.heartbeat.beat(self.progress.snapshot())
        try:
            repair(self.store, self.job.output.layout, self.progress.run_id, each)
        except BaseException as error:
            self.progress.state = "INTERRUPTED" if isinstance(error, Interrupted) else "FAILED"
            self.heartbeat.close(self.progress.snapshot())
            raise
        self.progress.state, self.progress.parts_done = "STARTING", 0

    def _use(self, grid: Grid) -> None:
        """Take over what is committed of it."""
        self.grid, self.is_done, self.progress.parts = grid, bytearray(grid.total), grid.count
        for index, receipt in self.prepared.committed().items():
            self.is_done[index] = 1
            self.progress.add_committed(receipt)
        self.progress.error_classes.update(commit.error_classes(self.store) if self.progress.errors else {})

    # ------------------------------------------------------------------------------------------ the loop

    def _loop(self, engine: Engine) -> None:
        left = self.progress.parts - self.progress.parts_done if self.grid is not None else self._rows_wanted()
        for _ in range(min(engine.max_workers, left)):
            self._start_worker(engine)
        source = self._leases()
        stop_at: float | None = None
        exhausted = False
        while True:
            for due in [at for at in self.restarts if at <= time.monotonic()]:
                self.restarts.remove(due)
                self._start_worker(engine)
            if self.stop_now.is_set():
                raise Interrupted("stopped at once: run the same command again to continue")
            if self.stop.is_set():
                stop_at = stop_at or time.monotonic() + self.grace_s
                if not self._in_flight() or time.monotonic() > stop_at:
                    return
            else:
                exhausted = self._hand_out(engine, source, exhausted)
                if exhausted and not self.again and not self._in_flight():
                    return
            for event in engine.next_events(timeout_s=0.5):
                if isinstance(event, Ready):
                    self._ready(engine, event)
                elif isinstance(event, Done):
                    self._done(event)
                else:
                    self._failed(engine, event)
            self.progress.trouble = self.heartbeat.beat(self.progress.snapshot()) if self.heartbeat.is_due() else self.progress.trouble
            self.observe(self.progress)

    def _leases(self) -> Iterator[Lease]:
        """Asked for once a worker is ready; by then the grid is known."""
        assert self.grid is not None
        yield from leases(self.prepared.manifest, self.grid, lambda index: bool(self.is_done[index]))

    def _in_flight(self) -> int:
        return sum(len(held) for held in self.free.values())

    def _hand_out(self, engine: Engine, source: Iterator[Lease], exhausted: bool) -> bool:
        """Fill ready workers up to their share; returns whether the source has no more."""
        while True:
            worker = min(self.free, key=lambda name: len(self.free[name]), default=None)
            if worker is None or len(self.free[worker]) >= self._share():
                return exhausted
            lease = self._due()
            if lease is None and not exhausted:
                lease = next(source, None)
                exhausted = lease is None
            if lease is None:
                return exhausted
            if lease.losses and self.free[worker]:  # a suspect runs alone, so that it takes no mates with it
                self.again.append((0.0, lease))
                return exhausted
            if any(held.losses for held in self.free[worker]):
                self.again.append((0.0, lease))
                return exhausted
            self.free[worker].append(lease)
            engine.submit(worker, lease)

    def _share(self) -> int:
        """Leases a worker may hold: enough to keep its slots full, few enough to leave work for the others at the end."""
        left = self.progress.parts - self.progress.parts_done
        workers = len(self.free) + len(self.starting)
        return max(1, min(self.held, -(-left // workers)))

    def _due(self) -> Lease | None:
        for _ in range(len(self.again)):
            not_before, lease = self.again.popleft()
            if not_before <= time.monotonic():
                return lease
            self.again.append((not_before, lease))
        return None

    # ------------------------------------------------------------------------------------------ events

    def _start_worker(self, engine: Engine) -> None:
        if self.stop.is_set():  # it would only have to be stopped again
            return
        name = f"w{self.worker_number}"
        self.worker_number += 1
        self.starting.add(name)
        self.progress.workers[name] = WorkerProgress()
        engine.start_worker(name)

    def _ready(self, engine: Engine, event: Ready) -> None:
        if self.grid is None:
            grid = self.prepared.grid()
            self._use(self._measured_grid(engine, event.info) if grid is None else grid)
        assert self.grid is not None
        self.batch_size = event.info.batch_size
        self._hold()
        self.starting.discard(event.worker)
        self.free[event.worker] = []
        self.start_failures = 0
        self.progress.workers[event.worker].state = "ready"
        self.progress.workers[event.worker].device = event.info.device
        self.progress.first_ready = self.progress.first_ready or time.time()
        self.progress.state = "RUNNING"

    def _hold(self) -> None:
        assert self.grid is not None
        self.held = leases_held(self.batch_size, self.grid.part_rows * self.prepared.usual.images_per_row, self.slot_groups)

    def _measured_grid(self, engine: Engine, info: WorkerReady) -> Grid:
        seconds = info.seconds_per_image or UNMEASURED_S
        images_per_row = self.prepared.usual.images_per_row
        part_rows = choose_part_rows(self._rows_wanted(), images_per_row, seconds, info.batch_size, engine.max_workers)
        return self.prepared.grid_of(commit.freeze_part_rows(self.store, part_rows, seconds))

    def _rows_wanted(self) -> int:
        return self.prepared.grid_of(1).count

    def _done(self, event: Done) -> None:
        """A worker may answer and die: its leases went elsewhere then, and what it committed is adopted there."""
        if event.worker in self.free:
            self.free[event.worker].remove(event.lease)
            self.progress.add(event.worker, event.receipt)
            if event.receipt.slot_groups > self.slot_groups:
                self.slot_groups = event.receipt.slot_groups
                self._hold()

    def _failed(self, engine: Engine, event: Failed) -> None:
        if isinstance(event.error, WorkerLost):
            self._lost(engine, event)
        elif event.lease is None:
            self._start_failed(event.worker, event.error)
        elif event.worker in self.free:
            self.free[event.worker].remove(event.lease)
            self._retry(event.lease, event.error)

    def _lost(self, engine: Engine, event: Failed) -> None:
        """The worker is gone; each of its leases arrives here once."""
        if event.worker in self.starting:
            self._start_failed(event.worker, event.error)
            return
        if event.worker in self.free:
            self.progress.lost_workers += 1
            self.progress.workers[event.worker].state = "lost"
            for lease in self.free.pop(event.worker):
                self.again.append((0.0, self._suspect(lease)))
            self._start_worker(engine)

    def _suspect(self, lease: Lease) -> Lease:
        if token := lease.announce_as:
            rows = {row for part in lease.parts if (row := commit.announced_row(self.store, part, token)) is not None}
            lease = replace(lease, killers=lease.killers | rows)
        losses = lease.losses + 1
        if losses > self.job.failure.attempts + len(lease.killers):
            rows_text = f"rows {lease.parts[0].start} to {lease.parts[-1].stop - 1}"
            raise Fatal(
                f"{losses} workers died on {rows_text} and no row could be named; look at the workers' memory and logs, then run again"
            )
        announce_as = f"{self.progress.run_id}.{losses}" if losses >= LOSSES_BEFORE_ANNOUNCING else None
        return replace(lease, losses=losses, announce_as=announce_as)

    def _start_failed(self, worker: str, error: RenderfarmError) -> None:
        self.starting.discard(worker)
        self.progress.workers[worker].state, self.progress.workers[worker].reason = "failed to start", str(error)
        if isinstance(error, ProfileMismatch):
            self.progress.workers[worker].state = "benched"
            if not self.free and not self.starting:
                raise error
            return
        self.start_failures += 1
        alone = not self.free and not self.starting
        if alone and (isinstance(error, Fatal) or self.start_failures >= START_ATTEMPTS):
            raise error if isinstance(error, Fatal) else Fatal(f"no worker could be started: {error}")
        if not isinstance(error, Fatal):
            pause = 0.0 if alone else min(60.0, 2.0**self.start_failures)
            self.restarts.append(time.monotonic() + pause)

    def _retry(self, lease: Lease, error: RenderfarmError) -> None:
        failures = lease.transient_failures + 1
        if not isinstance(error, Transient) or failures >= TRANSIENT_ATTEMPTS:
            raise error if isinstance(error, Fatal) else Fatal(f"part {lease.number}: {error}")
        pause = min(30.0, 0.5 * 2**failures) * random.uniform(0.5, 1.0)
        self.again.append((time.monotonic() + pause, replace(lease, transient_failures=failures)))

    # ------------------------------------------------------------------------------------------ records of the run

    def _check_that_all_is_here(self) -> None:
        """What workers say they committed must be in the store that this process sees."""
        if self.grid is None or self.progress.parts_done < self.progress.parts:
            return
        here = len(self.prepared.committed())
        if here < self.progress.parts:
            raise Fatal(
                f"the workers committed {self.progress.parts} parts, but {self.store.url} holds {here}: "
                "it is not the same place for every node; give a shared folder and run again"
            )
        if not self.progress.images and not self.progress.errors:
            raise InvalidJob("manifest.where selects no row: nothing was rendered; correct it and give another output (--out)")

    def _finish(self) -> RunSummary:
        progress = self.progress
        if self.stop.is_set():  # the grace may have ended before an answer came
            progress.recount(self.prepared.committed().values(), commit.error_classes(self.store))
        self._check_that_all_is_here()
        failed = progress.errors / max(1, progress.errors + progress.images)
        if self.grid is None or progress.parts_done < progress.parts:
            progress.state, code = "INTERRUPTED", EXIT_INTERRUPTED
        elif failed > self.job.failure.tolerate:
            progress.state, code = "PARTIAL", EXIT_ROWS_FAILED
        else:
            progress.state, code = "SUCCEEDED", EXIT_OK
        summary = RunSummary(
            run_id=progress.run_id,
            job=progress.job,
            out=self.store.url,
            state=progress.state,
            exit_code=code,
            rows=progress.rows,
            images=progress.images,
            errors=progress.errors,
            new_images=progress.new_images,
            new_errors=progress.new_errors,
            error_classes=dict(progress.error_classes),
            workers_left_out=progress.left_out,
            seconds=round(progress.seconds, 2),
            images_per_second=round(progress.images_per_second, 3),
            useful_slots=progress.useful_slots,
            bytes=progress.bytes,
            warnings=self.prepared.warnings,
            repaired=tuple(self.repaired),
        )
        self.heartbeat.close(progress.snapshot())
        self.store.put(f"{commit.RUNS}/{progress.run_id}.json", json.dumps(summary.to_dict(), indent=1).encode())
        return summary
