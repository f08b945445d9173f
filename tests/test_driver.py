"""The driver's loop against a scripted engine: what it does when workers fail to start or die."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from covering import covering

import renderfarm
from renderfarm import driver as driver_module
from renderfarm.driver import Driver
from renderfarm.engines.base import Done, Event, Failed, Ready
from renderfarm.errors import CutOff, DeviceLost, Fatal, ProfileMismatch, RenderFailed, RenderfarmError, Transient, WorkerLost
from renderfarm.jobfile import load_job
from renderfarm.models.fake import Fake, State
from renderfarm.preparation import Prepared, prepare
from renderfarm.records import Lease
from renderfarm.status import read_status
from renderfarm.summary import RunSummary
from renderfarm.worker import Worker, WorkerSpec

Write = Callable[..., Path]


class ScriptedEngine:
    """Real workers, run one lease at a time in this thread; starts and leases fail as scripted."""

    def __init__(self, prepared: Prepared, starts: dict[str, RenderfarmError], leases: dict[int, list[RenderfarmError]]) -> None:
        self.prepared, self.starts, self.leases = prepared, starts, leases
        self.max_workers = 2
        self.says: dict[str, Any] = {}  # what workers say of themselves instead of the truth
        self.workers: dict[str, Worker] = {}
        self.events: deque[Event] = deque()
        self.submitted: list[tuple[str, int]] = []

    def start_worker(self, name: str, avoid: frozenset[str] = frozenset()) -> None:
        if error := self.starts.get(name):
            self.events.append(Failed(name, None, error))
            return
        self.workers[name] = Worker(WorkerSpec(name, self.prepared.job, self.prepared.model, self.prepared.usual))
        self.events.append(Ready(name, replace(self.workers[name].ready(), **self.says)))

    def submit(self, worker: str, lease: Lease) -> None:
        self.submitted.append((worker, lease.number))
        if self.leases.get(lease.number):
            self.events.append(Failed(worker, lease, self.leases[lease.number].pop(0)))
        else:
            self.events.append(Done(worker, lease, self.workers[worker].render(lease)))

    def next_events(self, timeout_s: float) -> list[Event]:
        return [self.events.popleft()] if self.events else []

    def stop_worker(self, worker: str) -> None:
        self.workers.pop(worker).close()

    def shutdown(self) -> None:
        for worker in self.workers.values():
            worker.close()


@pytest.fixture
def drive(write_manifest: Write, write_job: Write) -> Callable[..., tuple[RunSummary, ScriptedEngine]]:
    def run(
        starts: dict[str, RenderfarmError] | None = None, leases: dict[int, list[RenderfarmError]] | None = None
    ) -> tuple[RunSummary, ScriptedEngine]:
        prepared = prepare(load_job(write_job(write_manifest())))
        engine = ScriptedEngine(prepared, starts or {}, leases or {})
        driver = Driver(prepared, threading.Event(), lambda progress: None)
        driver.begin()
        return driver.run(lambda: engine), engine

    return run


@pytest.mark.parametrize("error", [RenderFailed("x"), WorkerLost("x"), Fatal("x"), ProfileMismatch("x")])
def test_a_worker_that_cannot_start_does_not_stop_the_one_that_works(
    error: RenderfarmError, drive: Callable[..., tuple[RunSummary, ScriptedEngine]]
) -> None:
    summary, _ = drive(starts={"w1": error, "w2": error, "w3": error})
    assert (summary.state, summary.images) == ("SUCCEEDED", 8)
    assert list(summary.workers_left_out) == ["x"]
    assert read_status(summary.out)["workers left out"] == summary.workers_left_out


def test_a_worker_that_starts_late_is_tried_again_until_the_budget_ends(drive: Callable[..., tuple[RunSummary, ScriptedEngine]]) -> None:
    summary, _ = drive(starts={"w0": WorkerLost("x"), "w1": WorkerLost("x")})
    assert summary.state == "SUCCEEDED"


def test_when_no_worker_can_be_started_the_job_stops_with_the_reason(drive: Callable[..., tuple[RunSummary, ScriptedEngine]]) -> None:
    with pytest.raises(Fatal, match="no worker could be started: no memory"):
        drive(starts={f"w{k}": WorkerLost("no memory") for k in range(20)})


def test_a_lost_workers_leases_go_to_another_worker(drive: Callable[..., tuple[RunSummary, ScriptedEngine]]) -> None:
    summary, engine = drive(leases={1: [WorkerLost("gone")]})
    assert summary.images == 8
    assert len({worker for worker, lease in engine.submitted if lease == 1}) == 2


def test_a_transient_failure_is_tried_again_and_charged_to_no_row(drive: Callable[..., tuple[RunSummary, ScriptedEngine]]) -> None:
    summary, _ = drive(leases={0: [Transient("busy"), Transient("busy")]})
    assert (summary.images, summary.errors) == (8, 0)


def test_workers_that_die_on_a_part_without_naming_a_row_stop_the_job_in_the_end(
    drive: Callable[..., tuple[RunSummary, ScriptedEngine]],
) -> None:
    with pytest.raises(Fatal, match="workers died on rows 3 to 5 and no row could be named"):
        drive(leases={1: [WorkerLost("gone") for _ in range(9)]})


def test_a_worker_that_dies_while_the_run_is_being_stopped_is_not_replaced(write_manifest: Write, write_job: Write) -> None:
    prepared = prepare(load_job(write_job(write_manifest())))
    stop = threading.Event()

    class Stopped(ScriptedEngine):
        def submit(self, worker: str, lease: Lease) -> None:
            super().submit(worker, lease)
            stop.set()

    engine = Stopped(prepared, {}, {lease: [WorkerLost("the node is going away")] for lease in range(3)})
    driver = Driver(prepared, stop, lambda progress: None)
    driver.begin()
    summary = driver.run(lambda: engine)
    assert (summary.state, summary.exit_code, summary.images) == ("INTERRUPTED", 75, 0)
    assert sorted(engine.workers) == ["w0", "w1"], "and no third one"
    assert driver.progress.lost_workers >= 1


class Placed(ScriptedEngine):
    """Workers say where they are; what a lease fails with is scripted by worker."""

    def __init__(self, prepared: Prepared, places: dict[str, tuple[str, str]], fails: dict[str, RenderfarmError]) -> None:
        super().__init__(prepared, {}, {})
        self.places, self.fails, self.stopped = places, fails, list[str]()

    def start_worker(self, name: str, avoid: frozenset[str] = frozenset()) -> None:
        if name in self.places:  # the others wait for room
            node, device = self.places[name]
            self.says = {"node": node, "accelerators": (device,)}
            super().start_worker(name)

    def submit(self, worker: str, lease: Lease) -> None:
        if worker in self.fails:
            self.submitted.append((worker, lease.number))
            self.events.append(Failed(worker, lease, self.fails[worker]))
        else:
            super().submit(worker, lease)

    def stop_worker(self, worker: str) -> None:
        self.stopped.append(worker)
        super().stop_worker(worker)


@pytest.fixture
def drive_placed(write_manifest: Write, write_job: Write) -> Callable[..., tuple[Driver, RunSummary, Placed]]:
    def run(places: dict[str, tuple[str, str]], fails: dict[str, RenderfarmError], **changes: Any) -> tuple[Driver, RunSummary, Placed]:
        prepared = prepare(load_job(write_job(write_manifest({"prompt": [f"row {k}" for k in range(40)]}), **changes)))
        engine = Placed(prepared, places, fails)
        driver = Driver(prepared, threading.Event(), lambda progress: None)
        driver.begin()
        return driver, driver.run(lambda: engine), engine

    return run


def test_a_worker_that_is_given_a_benched_device_holds_it_and_gets_no_work(drive_placed: Any) -> None:
    broken = DeviceLost("CUDA error")
    places = {"w0": ("n0", "0"), "w1": ("n0", "1"), "w2": ("n0", "1"), "w3": ("n0", "1"), "w4": ("n0", "2")}
    driver, summary, engine = drive_placed(places, {"w1": broken, "w2": broken})
    assert (summary.state, summary.images, summary.lost_workers) == ("SUCCEEDED", 40, 2)
    states = {name: worker.state for name, worker in driver.progress.workers.items()}
    assert (states["w3"], states["w4"], engine.stopped) == ("benched", "ready", []), "who let it go would be given it again"
    assert "w3" not in {worker for worker, _ in engine.submitted}
    assert list(summary.workers_left_out) == ["2 contexts broke on device 1 of node n0, which gets no more work: CUDA error"]


def test_where_nobody_else_is_left_a_benched_device_works_again(drive_placed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    broken, fails = DeviceLost("CUDA error"), dict[str, RenderfarmError]()
    places = {"w0": ("n0", "0"), "w1": ("n0", "1"), "w2": ("n0", "1"), "w3": ("n0", "1")}
    start = Placed.start_worker

    def others_die(engine: Placed, name: str, avoid: frozenset[str] = frozenset()) -> None:
        fails.update({"w0": WorkerLost("gone")} if name == "w3" else {"w1": broken, "w2": broken})
        start(engine, name, avoid)

    monkeypatch.setattr(Placed, "start_worker", others_die)
    driver, summary, _ = drive_placed(places, fails)
    assert (summary.state, summary.images) == ("SUCCEEDED", 40)
    assert driver.progress.workers["w3"].state == "ready"


def test_a_worker_that_comes_from_a_benched_node_is_let_go(drive_placed: Any) -> None:
    gone = WorkerLost("gone")
    places = {"w0": ("n1", ""), **{f"w{k}": ("n0", "") for k in range(1, 5)}, "w5": ("n1", "")}
    driver, summary, engine = drive_placed(places, {f"w{k}": gone for k in range(1, 4)})
    assert (summary.state, summary.images, summary.lost_workers) == ("SUCCEEDED", 40, 3)
    assert engine.stopped == ["w4"], "it was asked for where nobody had said where not to"
    assert driver.progress.workers["w5"].state == "ready"


def test_a_run_with_fewer_workers_than_it_wants_ends_in_the_end(drive_placed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Placed, "next_events", lambda self, timeout_s: (time.sleep(0.02), ScriptedEngine.next_events(self, timeout_s))[1])
    _, summary, _ = drive_placed({"w0": ("n0", "")}, {}, workers={"min": 2, "max": 2, "wait_s": 0.05}, output={"part_rows": 1})
    assert (summary.state, summary.exit_code) == ("INTERRUPTED", 75)
    assert 0 < summary.images < 40, "what was in flight is there"
    assert any("fewer than 2 workers were ready for 0.05 s (workers.wait_s)" in warning for warning in summary.warnings)
    _, summary, _ = drive_placed({"w0": ("n0", "")}, {}, workers={"min": 1, "max": 2, "wait_s": 0.05}, output={"part_rows": 1})
    assert summary.state == "SUCCEEDED"


def test_what_the_first_worker_measured_decides_the_grid(write_manifest: Write, write_job: Write) -> None:
    manifest = write_manifest({"prompt": [f"p{k}" for k in range(1000)], "num_images_per_prompt": [2] * 1000})
    prepared = prepare(load_job(write_job(manifest, output={"part_rows": "auto"})))
    stop = threading.Event()

    class Measured(ScriptedEngine):
        def next_events(self, timeout_s: float) -> list[Event]:
            stop.set()
            return super().next_events(timeout_s)

    engine = Measured(prepared, {}, {})
    engine.says = {"seconds_per_image": 0.25}
    driver = Driver(prepared, stop, lambda progress: None)
    driver.begin()
    assert driver.run(lambda: engine).state == "INTERRUPTED"
    grid = prepared.grid()
    assert grid is not None
    assert grid.part_rows == 60, "120 images take half a minute, and a row gives two"


def test_a_part_whose_answer_came_too_late_for_the_stop_is_counted(write_manifest: Write, write_job: Write) -> None:
    prepared = prepare(load_job(write_job(write_manifest({"prompt": ["", *(f"row {k}" for k in range(60))]}))))
    stop = threading.Event()

    class Silent(ScriptedEngine):
        def submit(self, worker: str, lease: Lease) -> None:
            self.workers[worker].render(lease)  # committed, and nobody hears of it
            stop.set()

    driver = Driver(prepared, stop, lambda progress: None, grace_s=0.1)
    driver.begin()
    summary = driver.run(lambda: Silent(prepared, {}, {}))
    assert (summary.state, summary.new_images) == ("INTERRUPTED", 0)
    assert summary.errors == 1
    assert summary.error_classes == read_status(summary.out)["error classes"] == {"InvalidInput": 1}
    assert summary.images == read_status(summary.out)["images"] == len(renderfarm.open(summary.out)) > 0


@pytest.mark.parametrize(
    ("part_rows", "heights"), covering([(rows, heights) for rows in (1, 2, 5, 8) for heights in ((64,), (64, 72, 80, 88))])
)
def test_slots_stay_full_over_parts_that_are_smaller_than_a_batch(
    part_rows: int, heights: tuple[int, ...], write_manifest: Write, write_job: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each height is a slot group, and steps differ, so that a part waits for its last image while others enter."""
    step, useful = Fake.step, list[int]()

    def slow(model: Fake, states: Sequence[State]) -> list[bool]:
        time.sleep(0.02)  # else there is nothing to wait for
        useful.append(len(states))
        return step(model, states)

    monkeypatch.setattr(Fake, "step", slow)
    places = Random(1)
    columns = {
        "prompt": [f"number {k}" for k in range(240)],
        "num_inference_steps": [4 + k % 9 for k in range(240)],
        "height": [places.choice(heights) for _ in range(240)],
    }
    job = write_job(write_manifest(columns), workers={"batch_size": 8}, output={"part_rows": part_rows})
    summary = renderfarm.run(job, engine="inline")
    assert summary.images == 240
    assert summary.useful_slots == sum(useful) / len(useful) / 8 > 0.8  # 1 but for the beginning and the end
    between = useful[len(useful) // 4 : -len(useful) // 4]
    assert sum(between) / len(between) / 8 > 0.9


class Pending(ScriptedEngine):
    """One worker more is asked for than there is ever room for; the others cannot start."""

    def start_worker(self, name: str, avoid: frozenset[str] = frozenset()) -> None:
        if name != "w0":
            self.events.append(Failed(name, None, RenderFailed("no memory")))


def test_a_broken_model_stops_the_job_though_other_workers_wait_for_room(write_manifest: Write, write_job: Write) -> None:
    prepared = prepare(load_job(write_job(write_manifest())))
    driver = Driver(prepared, threading.Event(), lambda progress: None)
    driver.begin()
    with pytest.raises(Fatal, match="no worker could be started: no memory"):
        driver.run(lambda: Pending(prepared, {}, {}))
    assert driver.worker_number < 10
    assert read_status(prepared.store.url)["state"] == "FAILED"


def test_a_worker_that_did_not_reach_the_store_is_started_again_as_often_as_it_takes(
    drive: Callable[..., tuple[RunSummary, ScriptedEngine]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver_module, "AWAY_S", 0.0)
    summary, _ = drive(starts={f"w{k}": Transient("the store is away") for k in range(12)})
    assert (summary.state, summary.workers_left_out) == ("SUCCEEDED", {})


def test_a_server_that_cuts_off_each_answer_is_given_up_after_three_workers(
    drive: Callable[..., tuple[RunSummary, ScriptedEngine]],
) -> None:
    with pytest.raises(Fatal, match="no worker could be started: model org/name: cut off"):
        drive(starts={f"w{k}": CutOff("model org/name: cut off") for k in range(99)})


def test_a_worker_lost_while_a_pause_begins_is_replaced_when_the_run_goes_on(write_manifest: Write, write_job: Write) -> None:
    prepared = prepare(load_job(write_job(write_manifest())))
    driver = Driver(prepared, threading.Event(), lambda progress: None)

    class Paused(ScriptedEngine):
        def submit(self, worker: str, lease: Lease) -> None:
            super().submit(worker, lease)
            if len(self.submitted) == 1:
                driver.heartbeat.wanted = "pause"

        def next_events(self, timeout_s: float) -> list[Event]:
            found = super().next_events(timeout_s)
            if any(isinstance(event, Failed) for event in found):
                driver.heartbeat.wanted = "pause"
            elif not self.events:
                driver.heartbeat.wanted = "run"
            return found

    driver.begin()
    driver.heartbeat.hear = lambda store: driver.heartbeat.wanted
    engine = Paused(prepared, {"w1": Fatal("x")}, {0: [WorkerLost("gone")]})
    summary = driver.run(lambda: engine)
    assert (summary.state, summary.images) == ("SUCCEEDED", 8)
