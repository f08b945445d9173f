"""One loop over leases: hand them out, take receipts, decide what a failure means. No engine's name appears here.

a lease fails with     then
WorkerLost             it goes to another worker, alone; after two losses row by row, announced, so that the next
                       death names the row, which becomes an error; a node that loses several workers gets no more
DeviceLost             as above; a device whose context breaks again gets no more work
NodeLost               it goes to another worker; no row is suspected of what takes a node away
silence                a worker that finishes nothing for too long is killed, and lost as above
Transient              again after a jittered pause, eight times; while the driver does not reach the store either, it counts for nothing
ProfileMismatch        that worker is benched; the job stops if none is left
Fatal, anything else   the job stops with the reason; what is committed stays, and `run` continues

The driver asks the store a little at a time (`outage`): while it is away, what needs it waits, and everything else goes on.
At the end a worker without work gets a copy of a slow one's lease. Workers come and go with their nodes; a run waits
for the first, and for new ones when fewer than `workers.min` are left, as long as `workers.wait_s` says.
"""

from __future__ import annotations

import json
import random
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from renderfarm import commit, control
from renderfarm.account import Account
from renderfarm.blame import Blame
from renderfarm.engines.base import Done, Engine, Event, Failed, Leaving, Ready
from renderfarm.errors import (
    EXIT_INTERRUPTED,
    CutOff,
    DeviceLost,
    Fatal,
    Interrupted,
    InvalidJob,
    NodeLost,
    ProfileMismatch,
    RenderfarmError,
    Transient,
    WorkerLost,
)
from renderfarm.heartbeat import STALE_S, Heartbeat, is_alive, run_key
from renderfarm.outage import ASKED_S, Outage, given_up, is_given_up
from renderfarm.plan import Grid, choose_part_rows, leases, retry_leases
from renderfarm.pool import DEVICE_LOSSES, NODE_LOSSES, Pool
from renderfarm.preparation import Prepared
from renderfarm.progress import Progress
from renderfarm.records import Lease, PartId, WorkerReady
from renderfarm.repair import Repaired, refuse_if_alive, repair
from renderfarm.storage import Store, open_store, probe
from renderfarm.summary import RunSummary, end_of, summarise
from renderfarm.worker import LEASES_IN_FLIGHT, leases_held

GRACE_S = 30.0
TRANSIENT_ATTEMPTS = 8
START_ATTEMPTS = 3
PAUSED_S = 0.5
AWAY_S = 5.0  # before a worker is started again whose node went away, or that did not reach the store
UNMEASURED_S = 1.0  # an image, where the first worker could not measure one
LAST_S = 10.0  # for a store that is away when a run is to end

Observer = Callable[[Progress], None]
T = TypeVar("T")


class Driver:
    """One run of one job."""

    def __init__(
        self,
        prepared: Prepared,
        stop: threading.Event,
        observe: Observer,
        grace_s: float = GRACE_S,
        stop_now: threading.Event | None = None,
        repair: bool = False,
    ) -> None:
        """`repair`: check what is committed and mend it first."""
        self.repair, self.repaired = repair, list[Repaired]()
        self.stop_now = stop_now or threading.Event()
        self.prepared, self.job, self.store = prepared, prepared.job, prepared.store
        # for the loop, which goes on while the store is away
        self.quick = open_store(self.store.url, single_writer=self.job.output.single_writer, patience_s=ASKED_S)
        self.manifest = replace(prepared.manifest, patience_s=ASKED_S)
        self.outage, self.manifest_outage = Outage(), Outage()
        self.stop, self.observe, self.grace_s = stop, observe, grace_s
        self.progress = Progress(
            run_id=time.strftime("%Y%m%dT%H%M%SZ", time.gmtime()) + "-" + uuid.uuid4().hex[:6],
            job=self.job.name,
            rows=prepared.manifest.rows,
            key=prepared.key,
            logical_date=self.job.logical_date,
        )
        self.account = Account(self.progress)
        self.grid: Grid | None = None
        self.held = LEASES_IN_FLIGHT
        self.batch_size = self.slot_groups = 1  # until workers say theirs
        self.stop_at: float | None = None
        self.paused = False
        self.source: Iterator[Lease] | None = None  # None: to be begun anew, with what nobody has
        self.exhausted = False
        self.is_done = bytearray()  # by part of the grid
        self.retries_done: set[PartId] = set()
        self.retries_open = 0  # when they were last taken up
        self.asked_before: dict[str, Any] | None = None
        self.shares, self.begin_at = False, 0
        """The part to begin with: another one than a run that is already at work began with."""
        self.pool = Pool()
        self.parked = dict[str, Ready]()
        """Workers on benched devices, which nobody else is given for as long as they hold them."""
        self.warnings = list(prepared.warnings)
        self.again: deque[tuple[float, Lease]] = deque()  # (not before, lease)
        self.untaken: list[Event] = []  # until the store can be asked
        self.restarts: list[float] = []  # when to try again to start a worker
        self.start_failures = self.worker_number = 0
        self.heartbeat = Heartbeat(self.store.url, self._wanted, self.account.journal)

    def _wanted(self, store: Store) -> str:
        """What is asked of this run; what was asked before it began was asked of another."""
        return control.read(store, self.progress.run_id, but=self.asked_before)

    def begin(self) -> None:
        """Check that the output can be written and belongs to this job; the first time, freeze the job in it."""
        if not self._rows_wanted():
            raise InvalidJob("manifest.where selects no row: its `row` lies outside the manifest; correct it")
        if not self.store.exists(commit.JOB) and self.store.list(commit.PARTS):
            raise InvalidJob(
                f"{self.store.url}/{commit.JOB} is missing, and parts are committed: restore it from a copy, or give a new folder"
            )
        if not self.store.exists(commit.JOB) and (theirs := commit.not_ours(self.store)):
            raise InvalidJob(
                f"{self.store.url} is no output of renderfarm, and not empty (it holds {theirs}); give an empty folder, or a new one"
            )
        if self.repair:
            refuse_if_alive(self.store)
        self._meet_the_other_run()
        if not self.job.output.single_writer:
            probe(self.store)
        self.prepared.rows.keep(self.store)
        commit.freeze_job(self.store, self.prepared.frozen())
        self.progress.rate_before = float(commit.read_progress(self.store).get("images_per_second") or 0.0)
        for data in (*self.prepared.adapter_files.values(), *self.prepared.after_files.values()):
            commit.keep(self.store, data)
        self.account.began(shares=self.shares)
        self.heartbeat.beat(self._snapshot())  # from now on others see that somebody is at it

    def _meet_the_other_run(self) -> None:
        """Two runs of one output are harmless: what both render, the first commits. They share the work, or this one leaves."""
        other = commit.read_progress(self.store)
        if not is_alive(other):
            return
        age = time.time() - other["updated"]
        if self.job.if_running == "exit":
            raise Interrupted(
                f"run {other['run_id']} of this output is at work (last sign of life {age:.0f} s ago; without one for {STALE_S:.0f} s it "
                "counts as dead); run again when it has ended, or share its work: if_running: share"
            )
        # what is asked of one of them (`renderfarm pause`) is asked of both
        self.progress.run_id = f"{control.family(other['run_id'])}+{uuid.uuid4().hex[:6]}"
        self.asked_before = control.asked(self.store)
        self.shares = True

    def run(self, make_engine: Callable[[], Engine]) -> RunSummary:
        """Render what is not done. Starts no worker when all is."""
        self.blame = Blame(self.progress.run_id, self.job.failure.attempts)
        try:
            if (grid := self.prepared.grid()) is not None:
                if self.repair:
                    self._repair()
                self._surely(lambda: self._use(grid))
            while self._has_work():
                engine = make_engine()
                try:
                    self._loop(engine)
                finally:
                    engine.shutdown()
                if not self._resumed():
                    break
            return self._finish()
        except BaseException as error:
            if isinstance(error, Transient):  # in the driver's own hands: the store was away for too long
                error.exit_code = EXIT_INTERRUPTED
            self.progress.state = "INTERRUPTED" if isinstance(error, Interrupted | Transient) else "FAILED"
            self.heartbeat.close(self._snapshot(), self.account.ended_by(error))
            raise

    def _resumed(self) -> bool:
        """Wait, without any worker, while the run is paused; whether it goes on then."""
        if not self.paused or not self._has_work():
            return False
        self.account.all_let_go()
        while self.heartbeat.wanted == "pause" and not self.stop.is_set() and not self.stop_now.is_set():
            self.progress.state = "PAUSED"
            self.account.note_changes()
            if self.heartbeat.is_due():
                self.account.is_away(self.heartbeat.beat(self._snapshot()))
            self.observe(self.progress)
            time.sleep(PAUSED_S)
        return not self._is_to_end()

    def _has_work(self) -> bool:
        return self.grid is None or self._left() > 0 or self._open_retries()

    def _open_retries(self, entries: commit.Entries | None = None) -> bool:
        return bool(self._surely(lambda: commit.open_retries(self.quick, entries)))

    def _surely(self, do: Callable[[], T]) -> T:
        """What `do` asks of the store, where there is nothing else to do until it answers."""
        while True:
            try:
                return self.outage.ask(do)
            except Transient:
                if self.stop_now.is_set() or (self._is_to_end() and time.monotonic() - self.outage.since > LAST_S):
                    raise
            self._beat()
            self.observe(self.progress)
            time.sleep(PAUSED_S)

    def _repair(self) -> None:
        """Others see that somebody is at it, and do not begin the same."""
        self.progress.state = "REPAIRING"

        def each(number: int, of: int, repaired: Repaired | None) -> None:
            self.repaired += [repaired] if repaired else []
            self.progress.parts_done, self.progress.parts = number, of
            self.observe(self.progress)
            if self.heartbeat.is_due():
                self.heartbeat.beat(self._snapshot())
            if self.stop.is_set():
                raise Interrupted("stopped while parts were being checked; run the same command again to continue")

        self.heartbeat.beat(self._snapshot())
        repair(self.store, self.job.output.layout, self.progress.run_id, each)
        self.progress.state, self.progress.parts_done = "STARTING", 0

    def _use(self, grid: Grid) -> None:
        """Take over what is committed of it. Raises Transient, and then nothing has changed."""
        entries = commit.index_entries(self.quick)
        totals = commit.totals(self.quick, entries)
        self.grid, self.is_done = grid, bytearray(grid.total)
        self.begin_at = random.randrange(grid.total) if self.shares else 0
        for index in commit.parts_of_the_grid(entries):
            self.is_done[index] = 1
        self.account.planned(grid, totals)

    # ------------------------------------------------------------------------------------------ the loop

    def _loop(self, engine: Engine) -> None:
        """Until every part is done, or the run is to end and what is in flight has ended."""
        self.pool.members.clear()
        self.pool.starting.clear()
        self.parked.clear()
        self.again.clear()
        self.restarts.clear()
        self.untaken.clear()
        for _ in range(min(engine.max_workers, self._left() or len(commit.open_retries(self.store)))):
            self._start_worker(engine)
        self.source, self.exhausted, self.stop_at = None, False, None
        self.alone_since = time.monotonic()
        while not self._is_over(engine):
            events = engine.next_events(timeout_s=0.5)
            self._take_all(engine, self.untaken + events)
            while events := engine.next_events(timeout_s=0.0):  # all that is known, before anybody is judged by their silence
                self._take_all(engine, self.untaken + events)
            self._part_with_workers(engine)
            self._beat()
            self.observe(self.progress)

    def _is_over(self, engine: Engine) -> bool:
        """Hands out what there is to do; whether nothing is left, or the run is to end and nothing is in flight any more."""
        now = time.monotonic()
        if self.stop_now.is_set():
            raise Interrupted("stopped at once: run the same command again to continue")
        if self._is_to_end():
            self.stop_at = self.stop_at or now + self.grace_s
            self.paused = self.heartbeat.wanted == "pause"
            return not self._open_leases() or now > self.stop_at
        self.stop_at = None
        for due in [at for at in self.restarts if at <= now]:
            self.restarts.remove(due)
            self._start_worker(engine)
        self._hand_out(engine)
        if self.exhausted and not self.again:
            if not self._open_leases():
                return not self._take_up_retries(engine)
            self._copy_what_is_late(engine)
        return False

    def _is_to_end(self) -> bool:
        return self.stop.is_set() or self.heartbeat.wanted != "run"

    def _left(self) -> int:
        return self.progress.parts - self.progress.parts_done if self.grid is not None else self._rows_wanted()

    def _next_lease(self) -> Lease | None:
        """None: there is none, and the source is exhausted, or the manifest's store is away."""
        if self.exhausted:
            return None
        source = self.source = self.source or self._leases()
        try:
            lease = self.manifest_outage.ask(lambda: next(source, None))
        except Transient:
            self.source = None  # a generator that has raised gives nothing more
            return None
        self.exhausted = lease is None
        return lease

    def _leases(self) -> Iterator[Lease]:
        """What nobody has. Asked for once a worker is ready; by then the grid is known."""
        assert self.grid is not None
        out = {part.index for lease in (*self.pool.in_flight(), *(lease for _, lease in self.again)) for part in lease.parts}
        return leases(self.manifest, self.grid, lambda index: bool(self.is_done[index] or index in out), self.begin_at)

    def _take_up_retries(self, engine: Engine) -> bool:
        """What somebody has asked for since (`renderfarm retry`); whether there is any."""
        assert self.grid is not None
        try:
            retries = self.outage.ask(lambda: commit.open_retries(self.quick))
        except Transient:
            return True  # for all that is known
        if retries:
            self.source, self.exhausted = retry_leases(self.manifest, self.grid, retries), False
            self.retries_open = len(retries)
            self.account.retries([retry.part for retry in retries])
            for _ in range(min(engine.max_workers, len(retries)) - len(self.pool)):
                self._start_worker(engine)
        return bool(retries)

    def _is_done(self, lease: Lease) -> bool:
        return all(part.id in self.retries_done if part.retry else self.is_done[part.index] for part in lease.parts)

    def _open_leases(self) -> list[Lease]:
        """In flight, and not already rendered by another worker's copy."""
        return [lease for lease in self.pool.in_flight() if not self._is_done(lease)]

    def _hand_out(self, engine: Engine) -> None:
        """Fill ready workers up to their share."""
        while (worker := self.pool.next_to_fill(self._share())) is not None:
            if (lease := self._due() or self._next_lease()) is None:
                return
            others = [held.lease for held in self.pool.members[worker].held]
            if others and (lease.losses or any(other.losses for other in others)):
                self.again.append((0.0, lease))  # a suspect runs alone, so that it takes no mates with it
                return
            self._submit(engine, worker, lease)

    def _submit(self, engine: Engine, worker: str, lease: Lease, *, copy: bool = False) -> None:
        self.pool.take(worker, lease, time.monotonic())
        self.account.leased(worker, lease, copy=copy)
        engine.submit(worker, lease)

    def _copy_what_is_late(self, engine: Engine) -> None:
        """The first of the two to publish wins; what the other one has put is for `gc`."""
        if (found := self.pool.late(time.monotonic(), self._is_done)) is not None:
            self._submit(engine, *found, copy=True)

    def _share(self) -> int:
        """Leases a worker may hold: enough to keep its slots full, few enough to leave work for the others at the end."""
        left = (self.progress.parts - self.progress.parts_done) or self.retries_open
        return max(1, min(self.held, -(-left // max(1, len(self.pool)))))

    def _due(self) -> Lease | None:
        for _ in range(len(self.again)):
            not_before, lease = self.again.popleft()
            if not_before <= time.monotonic():
                return lease
            self.again.append((not_before, lease))
        return None

    def _part_with_workers(self, engine: Engine) -> None:
        """Kill those that hang, let those go whose nodes do, and end the run if nobody has been there for too long."""
        now = time.monotonic()
        for worker in self.pool.hung(now, self.job.failure.deadline_s):
            try:
                announced = self._announced(worker)
            except Transient:
                self.pool.excuse(now)
                break
            if self.pool.is_further(worker, announced, now):
                continue
            engine.stop_worker(worker)
            error = WorkerLost("it had finished nothing for too long (failure.deadline_s), and was killed")
            self._lost(engine, worker, error, announced)
        for worker in self.pool.empty_handed():
            engine.stop_worker(worker)
            self.pool.remove(worker)
            self.account.let_go(worker, "its node goes away")
            self._start_worker(engine)
        self._see_who_is_there(engine, now)

    def _see_who_is_there(self, engine: Engine, now: float) -> None:
        """End a run that has had too few workers for too long; what is in flight is finished first."""
        workers = self.job.workers
        wanted = max(1, min(workers.min, engine.max_workers, self._left() or self.retries_open))
        if len(self.pool.members) >= wanted or (self.pool.members and self._is_to_end()):
            self.alone_since = now
        elif now - self.alone_since > workers.wait_s:
            few = "no worker was" if wanted == 1 else f"fewer than {wanted} workers were"
            why = f"{few} ready for {workers.wait_s:g} s (workers.wait_s); run the same command again when there are nodes"
            if not self.pool.members:
                raise Interrupted(why)
            self.warnings.append(why)
            self.stop.set()

    def _announced(self, worker: str) -> frozenset[int]:
        """The rows that a worker says it is at, where it renders row by row. Raises Transient."""
        leases = [held.lease for held in self.pool.members[worker].held]
        asked = [(part, token) for lease in leases if (token := lease.announce_as) for part in lease.parts]
        rows = [self.outage.ask(partial(commit.announced_row, self.quick, part, token)) for part, token in asked]
        return frozenset(row for row in rows if row is not None)

    def _snapshot(self) -> dict[str, Any]:
        return self.account.snapshot(self.grid, self.is_done, self._open_leases())

    def _beat(self) -> None:
        if self.heartbeat.is_due():
            trouble = self.heartbeat.beat(self._snapshot())
            if trouble:
                self.pool.excuse(time.monotonic())
            away = trouble or self.outage.trouble or self.manifest_outage.trouble
            self.account.is_away(str(away) if away else self._waiting_for())
            self.progress.state = self._state()
        self.account.note_changes()

    def _waiting_for(self) -> str | None:
        if self.pool.members or self.heartbeat.wanted != "run":
            return None
        return f"a worker ({len(self.pool.starting)} are asked for)" if self.progress.first_ready else None

    def _state(self) -> str:
        if self.progress.first_ready is None:
            return self.progress.state
        return {"pause": "PAUSING", "cancel": "CANCELLING"}.get(self.heartbeat.wanted, "RUNNING")

    # ------------------------------------------------------------------------------------------ events

    def _take_all(self, engine: Engine, events: list[Event]) -> None:
        """What needs a store that is away waits, and so does what the same worker says later."""
        self.untaken = []
        for event in events:
            if any(event.worker == other.worker for other in self.untaken):
                self.untaken.append(event)
                continue
            try:
                self._take(engine, event)
            except Transient:
                self.untaken.append(event)

    def _take(self, engine: Engine, event: Event) -> None:
        """Raises Transient where the store is away, and then nothing has changed."""
        match event:
            case Ready():
                self._ready(engine, event)
            case Done():
                self._done(event)
            case Leaving(worker=None):
                self.stop.set()
            case Leaving(worker=str(worker)):
                if worker in self.pool.members:
                    self.pool.members[worker].leaving = True
                    self.account.leaving(worker)
            case Failed():
                self._failed(engine, event)

    def _start_worker(self, engine: Engine) -> None:
        if self._is_to_end():  # it would only have to be stopped again, unless a pause is over before it was one
            self.restarts.append(time.monotonic())
            return
        name = f"w{self.worker_number}"
        self.worker_number += 1
        self.pool.starting.add(name)
        self.account.asked_for(name)
        engine.start_worker(name, frozenset(self.pool.benched))

    def _ready(self, engine: Engine, event: Ready) -> None:
        if self.grid is None:
            self.outage.ask(lambda: self._use(self._measured_grid(engine, event.info)))
        if self._is_turned_away(engine, event):
            return
        self.batch_size = event.info.batch_size
        self._hold()
        self.pool.join(event.worker, event.info, time.monotonic())
        self.start_failures = 0
        self.account.ready(event.info)

    def _is_turned_away(self, engine: Engine, event: Ready) -> bool:
        """A worker that was asked for before its node was benched, or that was given a benched device; unless nobody else works."""
        if not self.pool.members:
            self.pool.pardon()
        if not self.pool.is_benched(event.info):
            return False
        self.pool.starting.discard(event.worker)
        if self.pool.is_on_benched_device(event.info):
            self.parked[event.worker] = event
            self.account.parked(event.worker)
        else:
            self.account.let_go(event.worker, "it came up on a benched node")
            engine.stop_worker(event.worker)
        self._start_worker(engine)
        return True

    def _hold(self) -> None:
        assert self.grid is not None
        self.held = leases_held(self.batch_size, self.grid.part_rows * self.prepared.usual.images_per_row, self.slot_groups)

    def _measured_grid(self, engine: Engine, info: WorkerReady) -> Grid:
        """Where another run has not frozen one meanwhile."""
        if (grid := commit.frozen_grid(self.quick, self.prepared.frozen())) is not None:
            return grid
        seconds = info.seconds_per_image or UNMEASURED_S
        images_per_row = self.prepared.usual.images_per_row
        part_rows = choose_part_rows(self._rows_wanted(), images_per_row, seconds, info.batch_size, engine.max_workers)
        return self.prepared.grid_of(commit.freeze_part_rows(self.quick, part_rows, seconds))

    def _rows_wanted(self) -> int:
        return self.prepared.grid_of(1).count

    def _done(self, event: Done) -> None:
        """A worker may answer and die, or come second with a copy: what is done is counted once."""
        silent = self.pool.give_back(event.worker, event.lease, time.monotonic())
        if silent is not None and any(part.images and not part.adopted for part in event.receipt.parts):
            self.pool.rendered(event.worker, silent)  # what was there already says nothing of how long a lease takes
        if silent is None or self._is_done(event.lease):
            return
        for part in event.lease.parts:
            if part.retry:
                self.retries_done.add(part.id)
            else:
                self.is_done[part.index] = 1
        self.account.committed(event)
        if event.receipt.slot_groups > self.slot_groups:
            self.slot_groups = event.receipt.slot_groups
            self._hold()
        limit = self.job.failure.stop_after
        if limit is not None and self.progress.new_errors >= limit:
            raise Fatal(
                f"{self.progress.new_errors} images of this run failed (failure.stop_after: {limit}); `renderfarm errors {self.store.url}` "
                "says why, and the same command goes on with the others"
            )

    def _failed(self, engine: Engine, event: Failed) -> None:
        if event.worker in self.pool.starting:
            self._start_failed(event.worker, event.error)
        elif isinstance(event.error, WorkerLost):
            self._lost(engine, event.worker, event.error)
        elif event.lease is not None and self.pool.give_back(event.worker, event.lease, time.monotonic()) is not None:
            self.account.retried(event)
            self._retry(event.lease, event.error)

    def _lost(self, engine: Engine, worker: str, error: WorkerLost, announced: frozenset[int] | None = None) -> None:
        """The worker is gone; the first of its leases to say so speaks for all. `announced`: the rows that it was at, if somebody has
        looked. Raises Transient where nobody can, and then nothing has changed."""
        if worker not in self.pool.members:
            return
        announced = self._announced(worker) if announced is None else announced
        node, devices = self.pool.members[worker].place
        held = self.pool.remove(worker)
        self.account.lost(worker, error, held, announced)
        for lease in held:
            if self._is_done(lease):
                continue
            if self.pool.holders(lease):
                self.blame.remember(lease, error)
            else:
                self.again.append((0.0, self.blame.suspect(lease, error, announced)))
        if not isinstance(error, NodeLost) and self.pool.lost_on(node):
            self.account.benched(worker, f"{NODE_LOSSES} workers died on node {node}, which gets no more of them: {error}")
        if isinstance(error, DeviceLost) and self.pool.broke_on(node, devices):
            where = f"device {', '.join(devices)} of node {node}"
            self.account.benched(worker, f"{DEVICE_LOSSES} contexts broke on {where}, which gets no more work: {error}")
        if not self.pool.members:
            self.pool.pardon()
            parked, self.parked = self.parked, {}
            for event in parked.values():
                self._ready(engine, event)
        if len(self.pool) < engine.max_workers:
            self._start_worker(engine)

    def _start_failed(self, worker: str, error: RenderfarmError) -> None:
        self.pool.starting.discard(worker)
        if isinstance(error, NodeLost | Transient) and not isinstance(error, CutOff):
            # says nothing of the worker; another one is waited for as long as for the first
            self.account.away(worker, error)
            self.restarts.append(time.monotonic() + AWAY_S)
            return
        self.account.failed_to_start(worker, error, "benched" if isinstance(error, ProfileMismatch) else "failed to start")
        alone = not len(self.pool)
        self.start_failures += 1
        # those that were asked for may wait for nodes that never come
        tried_enough = not self.pool.members and self.start_failures >= START_ATTEMPTS
        if tried_enough or (alone and isinstance(error, Fatal)):
            raise error if isinstance(error, Fatal) else Fatal(f"no worker could be started: {error}")
        if not isinstance(error, Fatal):
            pause = 0.0 if alone else min(60.0, 2.0**self.start_failures)
            self.restarts.append(time.monotonic() + pause)

    def _retry(self, lease: Lease, error: RenderfarmError) -> None:
        away_since = self.heartbeat.away_since if isinstance(error, Transient) else None
        if isinstance(error, Transient) and away_since is not None and is_given_up(error, away_since):
            raise given_up(error, away_since) from error
        failures = lease.transient_failures + (away_since is None)
        if not isinstance(error, Transient) or failures >= TRANSIENT_ATTEMPTS:
            raise error if isinstance(error, Fatal) else Fatal(f"{lease.parts[0].name}: {error}")
        if self.pool.holders(lease) or self._is_done(lease):  # a copy of it is on its way, or was faster
            return
        pause = (min(30.0, 0.5 * 2**failures) if away_since is None else 30.0) * random.uniform(0.5, 1.0)
        self.again.append((time.monotonic() + pause, self.blame.anew(replace(lease, transient_failures=failures))))

    # ------------------------------------------------------------------------------------------ records of the run

    def _check_that_all_is_here(self, entries: commit.Entries) -> None:
        """What workers say they committed must be in the store that this process sees."""
        if self.grid is None or self.progress.parts_done < self.progress.parts:
            return
        here = len(commit.parts_of_the_grid(entries))
        if here < self.progress.parts:
            raise Fatal(
                f"the workers committed {self.progress.parts} parts, but {self.store.url} holds {here}: "
                "it is not the same place for every node; give a shared folder and run again"
            )
        if not self.progress.images and not self.progress.errors:
            raise InvalidJob("manifest.where selects no row: nothing was rendered; correct it and give another output (--out)")

    def _is_counted_otherwise(self, entries: commit.Entries) -> bool:
        here = commit.counts(entries)
        return (here.images, here.errors) != (self.progress.images, self.progress.errors)

    def _finish(self) -> RunSummary:
        progress, entries = self.progress, self._surely(lambda: commit.index_entries(self.quick))
        self._check_that_all_is_here(entries)
        # the grace may have ended before an answer came, and another run may have committed images where this one saw errors
        if progress.waived or self._is_counted_otherwise(entries):
            progress.recount(self._surely(lambda: commit.totals(self.quick, entries)))
        unfinished = self.grid is None or self._left() > 0 or (self._is_to_end() and self._open_retries(entries))
        # who ends a paused run has interrupted it: the next one goes on
        ends = {"unfinished": unfinished, "cancelled": self.heartbeat.wanted == "cancel"}
        progress.state, code = end_of(progress, **ends, tolerate=self.job.failure.tolerate)
        summary = summarise(progress, self.store.url, code, self.warnings, self.repaired)
        self.account.ended(summary)
        self._surely(lambda: self.quick.put(run_key(progress.run_id), json.dumps(summary.to_dict(), indent=1).encode()))
        self.heartbeat.close(self._snapshot())
        return summary
