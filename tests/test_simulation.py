"""Thousands of lives of one output, each drawn from a seed: whoever dies whenever, the output is that of an undisturbed run.

RENDERFARM_TEST_SCHEDULES=300 runs fewer of them, RENDERFARM_TEST_FIRST_SCHEDULE=5000 others. A schedule that fails is in the failure's
note; the same seed and faults fail again.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import uuid
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from checker import check_complete
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from simulation import FAULTS, Fault, Schedule, SimStore, World, simulate, world_of

from renderfarm import blame, commit, garbage, pool
from renderfarm.errors import RenderfarmError
from renderfarm.jobfile import load_job
from renderfarm.preparation import Prepared, prepare

Write = Callable[..., Path]

FIRST, SCHEDULES = (int(os.environ.get(f"RENDERFARM_TEST_{name}", given)) for name, given in (("FIRST_SCHEDULE", 0), ("SCHEDULES", 3000)))
EXAMPLES = 200
GROUP = 100  # schedules a test, so that processes share them
ROWS, PART_ROWS = 11, 2
IMAGES = [1, 2, 1, 1, 2, 1, 1, 2, 1, 1, 1]
EMPTY = 4  # the row whose prompt is empty
PLANNED = {(row, k) for row, count in enumerate(IMAGES) for k in range(count)}
LENGTH = 400  # steps: an undisturbed run makes 230
MOST_IN_FLIGHT = 3 * 3 * PART_ROWS * 2  # images: workers, leases, rows, images
COSTS_WORK = (
    "kill worker",
    "kill driver",
    "zombie",
    "hang",
    "lose node",
    "stop",
    "pause",
    "cancel",
    "second driver",
    "store busy",
    "store away",
    "lose reply",
)
POINTS = ("put data/part/*.png", "create data/part/metadata.parquet", "put errors/part.parquet", "put _renderfarm/parts/part.json")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    import yaml

    folder = tmp_path_factory.mktemp("job")
    prompts = [f"row {row}" if row != EMPTY else "" for row in range(ROWS)]
    pq.write_table(pa.table({"prompt": prompts, "num_images_per_prompt": IMAGES}), folder / "prompts.parquet")
    job = {
        "name": "simulated",
        "manifest": str(folder / "prompts.parquet"),
        "model": "builtin:fake",
        "render": {"height": 8, "width": 8, "num_inference_steps": 1},
        "workers": {"max": 3, "batch_size": 1},
        "failure": {"deadline_s": 100},
        "output": {"path": str(folder / "out"), "part_rows": PART_ROWS},
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(job))
    return prepare(load_job(folder / "job.yaml"))


@pytest.fixture(scope="module")
def undisturbed(prepared: Prepared) -> dict[str, bytes]:
    return files_of(simulate(Schedule(0, ()), prepared))


def drawn(seed: int) -> Schedule:
    random_ = random.Random(seed)
    faults = tuple(Fault(random_.randrange(LENGTH), random_.choice(FAULTS)) for _ in range(random_.choice([1, 2, 4, 8, 16])))
    rows = random_.sample(range(ROWS), 3)
    killers, bad = frozenset(rows[: random_.choice([0, 0, 0, 1])]), frozenset(rows[1 : random_.choice([1, 2])])
    healing, slow = frozenset(rows[2 : random_.choice([2, 3])]), random_.choice(["", "", "w0", "w1"])
    return Schedule(seed, faults, random_.choice([1, 2, 3]), killers, bad, healing, slow)


def files_of(world: World) -> dict[str, bytes]:
    """What readers see."""
    return {key: data for key, (data, _) in world.keys.items() if key.startswith(("data/", "errors/"))}


def live(schedule: Schedule, prepared: Prepared, undisturbed: dict[str, bytes], folder: Path) -> World:
    """One life, and all that must be true of what it leaves."""
    try:
        world = simulate(schedule, prepared)
        judge(world, undisturbed, folder)
    except BaseException as error:
        error.add_note(repr(schedule))
        raise
    return world


def judge(world: World, undisturbed: dict[str, bytes], folder: Path) -> None:
    """All that must be true of what a life leaves."""
    schedule, files = world.schedule, files_of(world)
    for key, data in files.items():
        (folder / key).parent.mkdir(parents=True, exist_ok=True)
        (folder / key).write_bytes(data)
    images, errors = check_complete(folder, PLANNED)  # nothing is lost, nothing is there twice
    assert len(list(folder.glob("data/*/*.png"))) == len(images), "gc has removed what no table names"
    for summary in world.summaries:
        if summary.state in ("SUCCEEDED", "PARTIAL"):
            assert summary.images + summary.errors == len(PLANNED), "who says that all is done has counted right"
    last = world.summaries[-1]
    assert last.state not in ("SUCCEEDED", "PARTIAL") or (last.images, last.errors) == (len(images), len(errors))
    failed = {row["row"]: row["error_class"] for row in errors}
    assert failed.keys() >= {EMPTY, *schedule.bad, *schedule.killers}
    assert all(failed[row] == "WorkerCrashed" for row in schedule.killers - {EMPTY})
    innocent = failed.keys() - {EMPTY, *schedule.bad, *schedule.killers, *schedule.healing}
    deaths = sum(world.struck[kind] for kind in ("kill worker", "zombie", "hang", "death at a point"))
    suspects = {row // PART_ROWS for row in schedule.killers}  # two workers have died on these parts for good reasons
    must = sum(1 if row // PART_ROWS in suspects else 3 for row in innocent)
    assert must <= deaths, "three workers must die on a part before any of its rows is blamed"
    for key, data in undisturbed.items():
        part = int(re.findall(r"part-(\d+)", key)[0])
        if not ({*failed, *schedule.healing} - {EMPTY}) & {part * PART_ROWS, part * PART_ROWS + 1}:
            assert files[key] == data, "the same bytes as without any fault"
    again = world.rendered.total() - sum(k < IMAGES[row] for row, k in PLANNED)
    deaths = sum(world.struck[kind] for kind in COSTS_WORK) + world.struck["death at a point"]
    may = MOST_IN_FLIGHT * deaths + 3 * MOST_IN_FLIGHT * len(schedule.killers)
    assert again <= may, "what was in flight is rendered again, and no more"


@pytest.mark.parametrize("first", range(FIRST, FIRST + SCHEDULES, GROUP))
def test_whatever_happens_the_output_is_that_of_an_undisturbed_run(
    first: int, prepared: Prepared, undisturbed: dict[str, bytes], tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    struck: Counter[str] = Counter()
    for seed in range(first, min(first + GROUP, FIRST + SCHEDULES)):
        world = live(drawn(seed), prepared, undisturbed, tmp_path / str(seed))
        struck += world.struck
        struck["copies"] += sum(summary.copies for summary in world.summaries)
    record_property("schedules", {"schedules": GROUP, **struck})
    assert set(struck) == {*FAULTS, "copies"}, "each kind of fault has struck somebody"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(
    seed=st.integers(0, 1000),
    faults=st.lists(st.builds(Fault, st.integers(0, LENGTH), st.sampled_from(FAULTS)), max_size=6),
    workers=st.integers(1, 3),
    killers=st.frozensets(st.integers(0, ROWS - 1), max_size=2),
)
def test_schedules_that_hypothesis_draws(
    seed: int,
    faults: list[Fault],
    workers: int,
    killers: frozenset[int],
    prepared: Prepared,
    undisturbed: dict[str, bytes],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """The same; what fails is made small."""
    live(Schedule(seed, tuple(faults), workers, killers), prepared, undisturbed, tmp_path_factory.mktemp("life"))


class Life(RuleBasedStateMachine):
    """The same life as moves that hypothesis chooses one after the other, looking at what is published after each."""

    def __init__(self, prepared: Prepared, undisturbed: dict[str, bytes], folder: Path) -> None:
        super().__init__()
        self.prepared, self.undisturbed, self.folder = prepared, undisturbed, folder
        self.around, self.published = ExitStack(), dict[str, bytes]()
        self.where = dict[tuple[int, int], str]()

    @initialize(
        seed=st.integers(0, 1000),
        workers=st.integers(1, 3),
        killers=st.frozensets(st.integers(0, ROWS - 1), max_size=1),
        healing=st.frozensets(st.integers(0, ROWS - 1), max_size=2),
    )
    def somebody_runs_the_job(self, seed: int, workers: int, killers: frozenset[int], healing: frozenset[int]) -> None:
        schedule = Schedule(seed, (), workers, killers, healing=healing - killers)
        self.world = self.around.enter_context(world_of(schedule, self.prepared))
        self.person = self.world.spawn("person", self.world.person)

    @rule(steps=st.integers(1, 80))
    def time_passes(self, steps: int) -> None:
        self.world.let(steps, self.person)

    @rule(kind=st.sampled_from(FAULTS))
    def something_strikes(self, kind: str) -> None:
        self.world.strike(kind)

    @rule(when=st.sampled_from(["before", "after"]), what=st.sampled_from(POINTS))
    def the_next_process_dies_at(self, when: str, what: str) -> None:
        self.world.dies_next = f"{when} {what}"

    @invariant()
    def what_is_published_stays_and_no_image_is_there_twice(self) -> None:
        if not hasattr(self, "world"):
            return
        tables = {key: data for key, data in files_of(self.world).items() if key.endswith("/metadata.parquet")}
        for key in self.published:
            assert tables.get(key) == self.published[key], key
        for key in tables.keys() - self.published.keys():
            for row in pq.read_table(pa.BufferReader(tables[key])).to_pylist():
                sample = row["row"], row["image_index"]
                assert sample not in self.where, (key, self.where[sample])
                self.where[sample] = key
                assert f"{key.rpartition('/')[0]}/{row['file_name']}" in self.world.keys, "a table names what is there"
        self.published = tables

    def teardown(self) -> None:
        with self.around:
            if hasattr(self, "world"):
                self.world.dies_next = ""
                self.world.run(self.person)
                self.what_is_published_stays_and_no_image_is_there_twice()
                self.folder.mkdir()
                judge(self.world, self.undisturbed, self.folder)
                shutil.rmtree(self.folder)


@pytest.mark.slow
def test_moves_that_hypothesis_chooses(prepared: Prepared, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    chosen = settings(
        max_examples=EXAMPLES, stateful_step_count=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    run_state_machine_as_test(lambda: Life(prepared, undisturbed, tmp_path / uuid.uuid4().hex), settings=chosen)


@pytest.mark.parametrize("seed", range(20))
def test_a_killer_that_is_alone_costs_three_workers(seed: int, prepared: Prepared, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    killer = (seed * 3) % ROWS
    world = live(Schedule(seed, (), workers=1 + seed % 3, killers=frozenset({killer} - {EMPTY})), prepared, undisturbed, tmp_path)
    assert [summary.lost_workers for summary in world.summaries] == [0 if killer == EMPTY else 3]


def test_a_process_may_die_before_and_after_each_of_its_requests(
    prepared: Prepared, undisturbed: dict[str, bytes], tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """The named points are all requests that a run makes, each kind the first time and the second."""
    quiet = Schedule(0, (), bad=frozenset({7}), healing=frozenset({9}))
    points = [(point, time) for point, times in simulate(quiet, prepared).points.items() for time in (1, 2)[:times]]
    assert {f"{when} {what}" for when in ("before", "after") for what in POINTS} <= {point for point, _ in points}
    for number, point in enumerate(points):
        world = live(replace(quiet, die_at=point), prepared, undisturbed, tmp_path / str(number))
        assert world.died_at[point[0]] >= 1, point
    record_property("schedules", {"deaths at a named point": len(points)})


@pytest.mark.parametrize("at", range(60, 220, 10))
def test_a_run_outlives_a_store_that_is_away_for_ten_minutes(
    at: int, prepared: Prepared, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    """In whatever it is doing then; also where a row kills its workers, so that somebody must read what was announced."""
    schedule = Schedule(at, (Fault(at, "store away"),), killers=frozenset({9}), away_s=600)
    world = live(schedule, prepared, undisturbed, tmp_path)
    assert [summary.state for summary in world.summaries] == ["PARTIAL"], "one run, which nobody had to start again"
    assert world.struck["store away"] == 1


BROKEN = {
    "create is no longer if-absent": (SimStore, "put_if_absent", SimStore.put),
    "nothing is read back": (commit, "find_commit", lambda *_: None),
    "no row is announced": (blame, "LOSSES_BEFORE_ANNOUNCING", 10**9),
    "nobody reads what was announced": (commit, "announced_row", lambda *_: None),
    "nobody looks for workers that hang": (pool.Pool, "hung", lambda *_: []),
    "gc knows no table": (garbage, "_named", lambda *_: set()),
    "a lost worker's leases are forgotten": (pool.Pool, "remove", lambda self, name: self.members.pop(name).held[:0]),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_guarantee_is_seen(broken: str, prepared: Prepared, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    """The suite can fail: without each of these some schedule among the first does."""

    def live_many() -> None:
        for seed in range(GROUP):
            live(drawn(seed), prepared, undisturbed, tmp_path / str(seed))

    with patch.object(*BROKEN[broken]), pytest.raises((AssertionError, OSError, RenderfarmError)):
        live_many()


def test_a_schedule_is_its_seed(prepared: Prepared) -> None:
    one, other = (simulate(drawn(12), prepared) for _ in range(2))
    assert (one.steps, one.struck, one.rendered) == (other.steps, other.struck, other.rendered)
