"""Runs of one output in a simulated world: a clock that jumps, a store in memory, machines that die, one at a time.

The driver, the worker and the commit are the package's own; what is put in their place is the clock, the store, the engine and
the slots' thread. Every request to the store and every rendered sample is a point where another actor may go on, where a fault may
strike, and where a machine may die. Who goes on is drawn from a seed, so a schedule is its seed and its list of faults.
"""

from __future__ import annotations

import io
import random
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO
from unittest.mock import patch

from greenlet import getcurrent, greenlet

from renderfarm import commit, control, driver, garbage, heartbeat, journal, outage, progress, reading, requests, worker
from renderfarm.driver import Driver
from renderfarm.engines.base import Done, Event, Failed, Leaving, Ready
from renderfarm.errors import AlreadyExists, Fatal, Interrupted, NodeLost, NonFiniteOutput, RenderfarmError, Transient, WorkerLost
from renderfarm.layouts import LAYOUTS
from renderfarm.models.base import Counted
from renderfarm.models.fake import State
from renderfarm.preparation import Prepared
from renderfarm.records import Lease, PartId, Retry, Sample
from renderfarm.slots import Counters, Rendered
from renderfarm.storage import Stored
from renderfarm.summary import RunSummary
from renderfarm.worker import Worker, WorkerSpec

LATENCY_S = 0.05  # of a request, at most
SAMPLE_S = 0.5
GC_AGE_S = 20_000.0  # older than any attempt lives
MOST_STEPS = 200_000  # three drivers that wait for the deadline of a worker that hangs take more than 60,000


class Killed(BaseException):
    """The actor's process is gone: nothing of it runs any more."""


@dataclass(frozen=True)
class Fault:
    """`kind`, one of FAULTS, when the world has made so many steps."""

    at: int
    kind: str


FAULTS = (
    "kill worker",
    "kill driver",
    "zombie",  # the driver is told that a worker died, and it goes on
    "hang",
    "lose node",
    "drain node",
    "lose reply",
    "store busy",
    "store away",  # for minutes, whoever asks
    "stop",
    "pause",
    "cancel",
    "second driver",
    "gc",
    "retry",
)


@dataclass(frozen=True)
class Schedule:
    seed: int
    faults: tuple[Fault, ...]
    workers: int = 2
    killers: frozenset[int] = frozenset()
    """Rows that kill the worker that renders them."""
    bad: frozenset[int] = frozenset()
    """Rows whose picture is not finite."""
    healing: frozenset[int] = frozenset()
    """Rows whose picture is not finite the first time."""
    die_at: tuple[str, int] | None = None
    """The process dies that comes to this point of `World.points` for the n-th time."""
    away_s: float | None = None
    """For how long a store is away; None: drawn."""
    slow: str = ""
    """A worker that takes thirty times as long as the others."""


@dataclass(eq=False)
class Actor:
    name: str
    turns: greenlet
    wake: float = 0.0
    killed: bool = False
    done: bool = False


class World:
    """Who is there, what time it is, and what is stored."""

    def __init__(self, schedule: Schedule, prepared: Prepared) -> None:
        self.schedule, self.random = schedule, random.Random(schedule.seed)
        self.now, self.steps = 1_000_000.0, 0
        self.faults = sorted(schedule.faults, key=lambda fault: fault.at, reverse=True)
        self.keys: dict[str, tuple[bytes, float]] = {}
        self.rendered: Counter[tuple[int, int]] = Counter()
        self.died_at: Counter[str] = Counter()
        """Before or after which request processes died."""
        self.points: Counter[str] = Counter()
        """How often each of these points was reached."""
        self.struck: Counter[str] = Counter()
        self.armed: set[str] = set()  # what the next request to the store suffers
        self.away_until = 0.0
        self.dies_next = ""
        """The process dies that comes to this point first."""
        self.store = SimStore(self)
        self.prepared = replace(prepared, store=self.store)
        self.engines: list[SimEngine] = []
        self.stops: list[threading.Event] = []
        self._actors: list[Actor] = []
        self._back = getcurrent()  # to whom an actor's turn returns
        self._current: Actor | None = None
        self.failure: BaseException | None = None
        self.summaries: list[RunSummary] = []

    # ------------------------------------------------------------------------------------------ actors

    def spawn(self, name: str, do: Callable[[], None]) -> Actor:
        def run() -> None:
            try:
                if not actor.killed:
                    do()
            except Killed:
                pass
            except BaseException as error:  # a bug of the world or of the code: the schedule fails with it
                self.failure = self.failure or error
            actor.done = True

        actor = Actor(name, greenlet(run, self._back), wake=self.now)
        self._actors.append(actor)
        return actor

    def pause(self, seconds: float = 0.0) -> None:
        """Let the others go on; back in so many seconds of the world's."""
        actor = self.me()
        actor.wake = self.now + seconds
        self._back.switch()
        if actor.killed:
            raise Killed

    def me(self) -> Actor:
        assert self._current is not None
        return self._current

    def run(self, until: Actor) -> None:
        """One actor at a time, drawn by the seed, until that one has ended; then let the others die."""
        while not until.done and self.failure is None:
            self._step()
        died = self.died_at.copy()
        for actor in self._actors:
            actor.killed = True
        while any(not actor.done for actor in self._actors):
            self._step()
        self.died_at = died
        if self.failure is not None:
            raise self.failure

    def let(self, steps: int, until: Actor) -> None:
        """So many steps of the world's, if there is so much left to do."""
        for _ in range(steps):
            if until.done or self.failure is not None:
                return
            self._step()

    def _step(self) -> None:
        self.steps += 1
        if self.steps > MOST_STEPS and self.failure is None:
            self.failure = AssertionError(f"the run does not end: {[(actor.name, actor.wake) for actor in self._actors if not actor.done]}")
        living = [actor for actor in self._actors if not actor.done]
        self.now = max(self.now, min(actor.wake for actor in living) if not any(actor.killed for actor in living) else 0.0)
        self._current = self.random.choice([actor for actor in living if actor.killed or actor.wake <= self.now])
        self._current.turns.switch()
        self._actors = [actor for actor in self._actors if not actor.done]
        while self.faults and self.faults[-1].at <= self.steps and self.failure is None:
            self.strike(self.faults.pop().kind)

    def strike(self, kind: str) -> None:
        """Does nothing where there is nobody to suffer it."""
        engines = [engine for engine in self.engines if engine.open]
        engine = self.random.choice(engines) if engines else None
        match kind:
            case "lose reply" | "store busy":
                self.armed.add(kind)
            case "store away":
                self.away_until = self.now + (self.schedule.away_s or self.random.choice([5, 60, 600]))
            case "second driver" if engines and len(engines) < 3:
                self.spawn("second driver", self.second_driver)
            case "gc":
                self.spawn("gc", lambda: _tried(self._collect))
            case "retry":
                self.spawn("retry", lambda: _tried(self._ask_again))
            case "pause" | "cancel":
                self.spawn(kind, lambda: _tried(lambda: self._ask(kind)))
            case "stop" if self.stops:
                self.random.choice(self.stops).set()
            case "kill driver" if engine is not None:
                engine.die()
            case "kill worker" | "zombie" | "hang" | "lose node" | "drain node" if engine is not None and engine.workers:
                engine.strike(kind, self.random.choice(sorted(engine.workers)))
            case _:
                return
        self.struck[kind] += 1

    def come_to(self, point: str) -> None:
        if not re.match(r"driver|w\d", self.me().name):  # a person's commands are tried again
            return
        self.points[point] += 1
        if self.schedule.die_at == (point, self.points[point]) or self.dies_next == point:
            self.dies_next = ""
            self.struck["death at a point"] += 1
            self.die()

    def die(self) -> None:
        """The process that this actor belongs to is gone: a worker, or a driver with all of its own."""
        me = self.me()
        for engine in self.engines:
            if engine.driver is me:
                engine.die()
            for name, one in list(engine.workers.items()):
                if me in one.actors:
                    engine.lose(name, WorkerLost("died"))
        me.killed = True
        raise Killed

    def _ask(self, wanted: str) -> None:
        run_id = commit.read_progress(self.store).get("run_id")
        _until_done(lambda: self.store.put(control.CONTROL, commit.to_json({"run_id": run_id, "wanted": wanted})))
        if wanted == "pause":
            self.pause(self.random.uniform(5, 60))
            _until_done(lambda: self.store.put(control.CONTROL, commit.to_json({"run_id": run_id, "wanted": "run"})))

    def _ask_again(self) -> None:
        """For what has failed in some part, which may be asked for already."""
        parts = sorted({part.index for part in commit.index_entries(self.store)})
        if not parts:
            return
        index = self.random.choice(parts)
        layout, job = LAYOUTS["files"], self.prepared.job
        asked = [part.retry for part in requests.asked(self.store) if part.index == index]
        failed = commit.ended(self.store, layout, index, max(asked, default=0) + 1).errors
        if failed and job.output.layout == "files":
            with suppress(AlreadyExists):
                requests.ask(self.store, Retry(PartId(index, max(asked, default=0) + 1), frozenset(failed)))

    def _collect(self) -> None:
        if self.store.exists(commit.JOB):
            garbage.collect("world://", GC_AGE_S)

    # -------------------------------------------------------------------------------------------- runs

    def drive(self) -> RunSummary | RenderfarmError | None:
        """One run, from its start to its end or its death (None)."""
        stop, outcome = threading.Event(), list[Any]()

        def do() -> None:
            try:
                one = Driver(self.prepared, stop, lambda progress: None)
                one.begin()
                outcome.append(one.run(lambda: SimEngine(self, actor)))
                self.summaries.append(outcome[0])
            except (Fatal, Interrupted, Transient) as error:
                outcome.append(error)

        self.stops.append(stop)
        actor = self.spawn("driver", do)
        while not actor.done:
            self.pause(1.0)
        self.stops.remove(stop)
        return outcome[0] if outcome else None

    def second_driver(self) -> None:
        ended = self.drive()
        assert ended is None or isinstance(ended, RunSummary) or _is_expected(ended), ended

    def person(self) -> None:
        """Runs the job again until it says that all is done, as the README tells people to."""
        while True:
            ended = self.drive()
            if isinstance(ended, RunSummary) and ended.state in ("SUCCEEDED", "PARTIAL"):
                self.faults.clear()
                self.pause(100)  # what others are at ends
                if not any(actor.name in ("retry", "second driver") for actor in self._actors) and not _open(self):
                    break
                continue
            assert ended is None or isinstance(ended, RunSummary) or _is_expected(ended), ended
            self.pause(self.random.choice([0.0, 1.0, 100.0]))
        self.armed.clear()
        self.pause(2 * GC_AGE_S)  # zombies end
        self._collect()


def _open(world: World) -> bool:
    world.armed.clear()
    world.away_until = 0.0
    return bool(commit.open_retries(world.store))


def _tried(do: Callable[[], None]) -> None:
    """A command of somebody's; where the store is away it says so, and has done nothing, or not all."""
    with suppress(Transient):
        do()


def _until_done(do: Callable[[], None]) -> None:
    while True:
        with suppress(Transient):
            do()
            return


def _is_expected(error: RenderfarmError) -> bool:
    """Random deaths may look like a row's doing, and like a worker that cannot start; a run says so, and the next one goes on."""
    return isinstance(error, Interrupted | Transient) or "no row could be named" in str(error) or "no worker could be started" in str(error)


# ------------------------------------------------------------------------------------------------------ the store


class SimStore:
    """Keys of the world. Each request may be the last of its actor's, before or after it is done."""

    url = "world://"

    def __init__(self, world: World) -> None:
        self.world = world

    def _request(self, what: str, key: str, do: Callable[[], Any], *, writes: bool = False) -> Any:
        world, actor = self.world, self.world.me()
        if actor.killed:
            raise Killed
        where = f"{what} {_kind_of(key)}"
        try:
            world.pause(world.random.uniform(0, LATENCY_S))
            world.come_to(f"before {where}")
        except Killed:
            world.died_at[f"before {where}"] += 1
            raise
        if world.now < world.away_until:
            raise Transient("the store is away")
        if "store busy" in world.armed:
            world.armed.discard("store busy")
            raise Transient("the store is busy")
        result = do()
        if writes and "lose reply" in world.armed:
            world.armed.discard("lose reply")
            if what == "create":  # the client asks again, and meets its own bytes
                raise AlreadyExists(key)
            raise Transient("the reply was lost")
        try:
            world.come_to(f"after {where}")
            world.pause(world.random.uniform(0, LATENCY_S))
        except Killed:
            world.died_at[f"after {where}"] += 1
            raise
        return result

    def put(self, key: str, data: bytes | Path) -> None:
        self._request("put", key, lambda: self._set(key, data), writes=True)

    def put_if_absent(self, key: str, data: bytes | Path) -> None:
        def create() -> None:
            if key in self.world.keys:
                raise AlreadyExists(key)
            self._set(key, data)

        self._request("create", key, create, writes=True)

    def _set(self, key: str, data: bytes | Path) -> None:
        self.world.keys[key] = data if isinstance(data, bytes) else data.read_bytes(), self.world.now

    def read(self, key: str) -> bytes:
        return bytes(self._request("read", key, lambda: self.world.keys[key][0]))

    def open(self, key: str) -> BinaryIO:
        return io.BytesIO(self.read(key))

    def exists(self, key: str) -> bool:
        return bool(self._request("exists", key, lambda: key in self.world.keys))

    def delete(self, key: str) -> None:
        self._request("delete", key, lambda: self.world.keys.pop(key, None), writes=True)

    def names(self) -> list[str]:
        return sorted({key.partition("/")[0] for key in self.list("")})

    def list(self, prefix: str) -> list[str]:
        return sorted(stored.key for stored in self.stored(prefix))

    def stored(self, prefix: str) -> Iterator[Stored]:
        start = f"{prefix.rstrip('/')}/" if prefix else ""
        keys = self.world.keys
        found = self._request("list", prefix, lambda: [(key, *value) for key, value in keys.items() if key.startswith(start)])
        return (Stored(key, len(data), modified) for key, data, modified in found)

    def unfinished(self) -> Iterator[Stored]:
        return iter(())

    def discard(self, unfinished: Stored) -> None:
        raise AssertionError("nothing is unfinished here")


def _kind_of(key: str) -> str:
    key = re.sub(r"part-\d+[^/]*?(?=\.parquet|\.json|/|$)", "part", key)
    return re.sub(r"\d{4,}.*(?=\.png)|(?<=probe-).*|(?<=runs/).*|(?<=logs/).*", "*", key)


# ----------------------------------------------------------------------------------------------------- the engine


@dataclass(eq=False)
class SimWorker:
    node: str
    made: Worker | None = None
    actors: list[Actor] = field(default_factory=list)
    calls: list[Lease | None] = field(default_factory=list)
    """What the driver waits for: leases, or None for the start."""


class SimEngine:
    """Workers on two nodes; each lease is an actor. A dead driver's workers die with it, or go on a little, as Ray's may."""

    def __init__(self, world: World, driver: Actor) -> None:
        self.world, self.driver, self.max_workers, self.open = world, driver, world.schedule.workers, True
        self.workers: dict[str, SimWorker] = {}
        self.events: list[Event] = []
        world.engines.append(self)

    def start_worker(self, name: str, avoid: frozenset[str] = frozenset()) -> None:
        nodes = [node for node in ("n0", "n1") if node not in avoid]
        one = self.workers[name] = SimWorker(self.world.random.choice(nodes), calls=[None])

        def start() -> None:
            self.world.pause(self.world.random.uniform(1, 10))
            spec = WorkerSpec(name, self.world.prepared.job, self.world.prepared.model, self.world.prepared.usual)
            try:
                one.made = Worker(spec)
                ready = replace(one.made.ready(), node=one.node)
            except RenderfarmError as error:
                self._answer(name, None, Failed(name, None, error))
                return
            self._answer(name, None, Ready(name, ready))

        one.actors.append(self.world.spawn(f"{name} starts", start))

    def submit(self, worker: str, lease: Lease) -> None:
        one = self.workers.get(worker)
        if one is None:  # it has died, and the driver has not heard of it yet
            self.events.append(Failed(worker, lease, WorkerLost("gone")))
            return
        one.calls.append(lease)

        def render() -> None:
            assert one.made is not None
            try:
                receipt = one.made.render(lease)
            except RenderfarmError as error:
                self._answer(worker, lease, Failed(worker, lease, error))
                return
            self._answer(worker, lease, Done(worker, lease, receipt))

        one.actors.append(self.world.spawn(f"{worker} renders {lease.number}", render))

    def _answer(self, name: str, call: Lease | None, event: Event) -> None:
        one = self.workers.get(name)
        if one is not None and any(waiting is call for waiting in one.calls):  # else nobody waits for it any more
            one.calls = [waiting for waiting in one.calls if waiting is not call]
            self.events.append(event)

    def next_events(self, timeout_s: float) -> list[Event]:
        self.world.pause(0 if self.events else self.world.random.uniform(0, timeout_s))
        return [self.events.pop(0)] if self.events else []

    def stop_worker(self, worker: str) -> None:
        if (one := self.workers.pop(worker, None)) is not None:
            self.events = [event for event in self.events if getattr(event, "worker", None) != worker]
            for actor in one.actors:
                actor.killed = True

    def shutdown(self) -> None:
        if not self.world.me().killed:
            self._end()

    def _end(self) -> None:
        self.open = False
        for name in list(self.workers):
            self.stop_worker(name)

    def die(self) -> None:
        """The driver's process, and its workers with it: at once, or a little later."""
        self.driver.killed = True
        if self.world.random.random() < 0.5:
            self._end()
            return
        self.open = False
        left, self.workers = self.workers, {}
        actors = [actor for one in left.values() for actor in one.actors]

        def later() -> None:
            self.world.pause(self.world.random.uniform(0, 5))
            for actor in actors:
                actor.killed = True

        self.world.spawn("the end of orphans", later)

    def strike(self, kind: str, name: str) -> None:
        one = self.workers[name]
        if kind == "drain node":
            self.events += [Leaving(other) for other, worker in self.workers.items() if worker.node == one.node]
            return
        if kind == "hang":
            for actor in one.actors:
                actor.wake = self.world.now + 1e6
            return
        dead = [other for other, worker in self.workers.items() if worker.node == one.node] if kind == "lose node" else [name]
        for other in dead:
            self.lose(other, NodeLost("its node has died") if kind == "lose node" else WorkerLost("died"), dies=kind != "zombie")

    def lose(self, name: str, error: WorkerLost, *, dies: bool = True) -> None:
        one = self.workers.pop(name)
        self.events += [Failed(name, call, error) for call in one.calls]
        for actor in one.actors if dies else ():
            actor.killed = True


class SimSlots:
    """In the place of the slots' thread: samples are painted one after the other by whoever submits them."""

    world: World

    def __init__(self, load: Callable[[], Any], on_truncation: str, after: Callable[[Any], Any]) -> None:
        self.counters = Counters()
        self.ready: Future[Any] = Future()
        try:
            self.model = load()
            self.ready.set_result(self.model)
        except RenderfarmError as error:
            self.ready.set_exception(error)

    def submit(self, samples: list[Sample]) -> list[Future[Rendered]]:
        return [self._paint(sample) for sample in samples]

    def _paint(self, sample: Sample) -> Future[Rendered]:
        world, future = self.world, Future[Rendered]()
        slowness = 30 if world.me().name.startswith(f"{world.schedule.slow} ") else 1
        world.pause(world.random.uniform(0, 2 * SAMPLE_S) * slowness)
        key = (sample.key.row, sample.key.image_index)
        world.rendered[key] += 1
        if sample.key.row in world.schedule.killers:
            world.die()
        if sample.key.row in world.schedule.bad or (sample.key.row in world.schedule.healing and world.rendered[key] == 1):
            future.set_exception(NonFiniteOutput("scripted: not a number"))
        else:
            pixels = self.model.decode(State(sample, 0))
            future.set_result(Rendered(pixels, Counted(3, None, None), pixels))
        return future


class Here:
    """A pool of threads that are none: what is submitted is done at once, by whoever submits it."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def submit(self, do: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(do(*arguments))
        except Killed:
            raise
        except Exception as error:
            future.set_exception(error)
        return future

    def map(self, do: Callable[..., Any], *many: Any) -> Iterator[Any]:
        return iter([do(*each) for each in zip(*many, strict=True)])

    def shutdown(self, wait: bool = True) -> None: ...
    def __enter__(self) -> Here:
        return self

    def __exit__(self, *_: Any) -> None: ...


def simulate(schedule: Schedule, prepared: Prepared) -> World:
    """The world after the job's last run."""
    with world_of(schedule, prepared) as world:
        world.run(world.spawn("person", world.person))
    return world


@contextmanager
def world_of(schedule: Schedule, prepared: Prepared) -> Iterator[World]:
    """A world in which nobody lives yet; within it, the package's clock and store are the world's."""
    world = World(schedule, prepared)
    clock = SimpleNamespace(
        time=lambda: world.now,
        monotonic=lambda: world.now,
        sleep=world.pause,
        strftime=lambda *_: f"T{world.now:.0f}",
        gmtime=lambda: None,
    )
    with ExitStack() as stack:
        for module in (driver, heartbeat, journal, outage, progress, worker, garbage):
            stack.enter_context(patch.object(module, "time", clock))
        for module in (heartbeat, worker, garbage):
            stack.enter_context(patch.object(module, "ThreadPoolExecutor", Here))
        for module in (driver, heartbeat, worker, reading):
            stack.enter_context(patch.object(module, "open_store", lambda *_, **__: world.store))
        stack.enter_context(patch.object(worker, "SlotLoop", type("Slots", (SimSlots,), {"world": world})))
        stack.enter_context(patch.object(worker, "wait", lambda _: None))
        stack.enter_context(patch.object(driver, "random", world.random))
        yield world
