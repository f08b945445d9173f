"""`batch_size: auto` and `part_rows: auto`: measured once, frozen, the same for every worker and on resume."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Barrier, Event
from typing import Any

import pytest
import torch
from checker import check_complete
from oracle import LEGAL, Model, row

import renderfarm
from renderfarm import commit
from renderfarm.config import ModelSpec, Workers
from renderfarm.errors import Fatal, InvalidJob, OutOfMemory
from renderfarm.estimate import estimate
from renderfarm.jobfile import load_job
from renderfarm.models.catalog import describe
from renderfarm.models.fake import Fake, State
from renderfarm.models.measure import best_batch_size, check_places, seconds_per_image
from renderfarm.plan import Grid
from renderfarm.preparation import prepare
from renderfarm.progress import Progress
from renderfarm.records import Sample
from renderfarm.status import read_status
from renderfarm.storage import open_store
from renderfarm.verification import Choice, inspect, verify
from renderfarm.worker import Worker, WorkerSpec

Write = Callable[..., Path]
FAKE = describe(ModelSpec(id="builtin:fake"))


class Device(Fake):
    """A denoiser call of n slots takes fixed + each · n**power milliseconds; more slots than `room` do not fit."""

    def __init__(self, fixed: float, each: float, room: int = 1000, power: float = 1.0) -> None:
        super().__init__(FAKE, Workers(batch_size="auto"))
        self.fixed, self.each, self.room, self.power = fixed, each, room, power

    def step(self, states: Sequence[State]) -> list[bool]:
        if len(states) > self.room:
            raise OutOfMemory("too many")
        time.sleep((self.fixed + self.each * len(states) ** self.power) / 1000)
        return super().step(states)


@pytest.mark.parametrize(
    ("device", "best"),
    [
        (Device(fixed=0, each=10, power=1.5), {1}),  # a busy clock must not decide
        (Device(fixed=200, each=0), {64}),
        (Device(fixed=100, each=0, room=8), {8}),
        (Device(fixed=20, each=20), {4, 8, 16, 32}),  # ×1.33, 1.2, 1.11, 1.06, 1.03: which still pays is for the clock to say
    ],
)
def test_the_largest_batch_that_pays_and_fits_is_chosen(device: Device, best: set[int], write_manifest: Write, write_job: Write) -> None:
    job = load_job(write_job(write_manifest(), workers={"batch_size": "auto"}))
    found = best_batch_size(device, prepare(job).usual.sample)
    assert found in best
    assert device.batch_size == found


def test_what_the_first_worker_measured_holds_for_all_and_on_resume(
    write_manifest: Write, write_job: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_job(write_manifest(), workers={"batch_size": "auto"})
    prepared = prepare(load_job(path))
    spec = [WorkerSpec(f"w{k}", prepared.job, prepared.model, prepared.usual) for k in range(2)]
    both, sizes = Barrier(2), [5, 9]

    def measure(model: Fake, sample: Sample) -> None:
        both.wait(timeout=120)  # none has published yet
        model.batch_size = sizes.pop(0)

    monkeypatch.setattr("renderfarm.worker.best_batch_size", measure)
    monkeypatch.setattr("renderfarm.slots._TURNS", contextlib.nullcontext())  # which would let one publish first
    first, second = Worker(spec[0]), Worker(spec[1])
    assert first.ready().profile_sha256 == second.ready().profile_sha256
    chosen = first.slots.ready.result().batch_size
    assert chosen in (5, 9)
    assert second.slots.ready.result().batch_size == chosen
    monkeypatch.undo()
    late = Worker(spec[0])
    late.ready()
    assert late.slots.ready.result().batch_size == chosen
    for worker in (first, second, late):
        worker.close()

    assert renderfarm.run(path, engine="inline").state == "SUCCEEDED"
    assert json.loads((tmp_path / "out/_renderfarm/profile.json").read_text())["batch_size"] == chosen
    check_complete(tmp_path / "out", {(row, 0) for row in range(8)})
    assert renderfarm.run(path, engine="inline").new_images == 0


def test_the_time_of_an_image_is_its_share_of_its_calls(write_manifest: Write, write_job: Write) -> None:
    wanted = prepare(load_job(write_job(write_manifest(), render={"num_inference_steps": 20}))).usual.sample
    device = Device(fixed=20, each=0)
    found = {}
    for device.batch_size in (1, 16):
        found[device.batch_size] = seconds_per_image(device, wanted)
    assert found[1] >= 20 * 0.02, "a sleep is never shorter"
    assert found[16] < found[1] / 2, "sixteen share a call"
    device.batch_size = 1
    assert seconds_per_image(device, replace(wanted, num_inference_steps=2)) < found[1] / 2, "two calls instead of twenty"


def test_what_cannot_be_shown_or_does_not_fit_is_no_failure(write_manifest: Write, write_job: Write) -> None:
    wanted = prepare(load_job(write_job(write_manifest()))).usual.sample
    device = Device(fixed=1, each=0, room=2)
    device.batch_size = 2
    assert seconds_per_image(device, replace(wanted, prompt="[nan]"))
    device.batch_size = 4
    assert seconds_per_image(device, wanted) is None


def test_every_worker_tries_its_places_with_the_batch_that_it_will_render(
    write_manifest: Write, write_job: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []

    def places(model: Fake, sample: Sample) -> list[int]:
        tried.append(model.batch_size)
        return []

    monkeypatch.setattr(Fake, "places_that_differ", places)
    job = write_job(write_manifest(), workers={"batch_size": "auto"})
    first = renderfarm.run(load_job(job, ["manifest.where.row=0-3"]), engine="inline")
    assert first.images == 4
    profile = json.loads((Path(first.out) / "_renderfarm/profile.json").read_text())
    measured, tried[:] = list(tried), []
    assert measured[-1] == profile["batch_size"] > 1
    worker = Worker(WorkerSpec("again", *_prepared(job)))
    try:
        assert worker.ready().batch_size == profile["batch_size"]
    finally:
        worker.close()
    assert tried == [profile["batch_size"]]


def _prepared(job: Path) -> tuple[Any, Any, Any]:
    prepared = prepare(load_job(job))
    return prepared.job, prepared.model, prepared.usual


def test_a_worker_on_whose_device_places_differ_renders_nothing(
    write_manifest: Write, write_job: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Fake, "places_that_differ", lambda model, sample: [2, 3])
    with pytest.raises(Fatal, match=r"other bits at 2 of \d+ places of its batch \(at 64×64 pixels on this device\)"):
        renderfarm.run(write_job(write_manifest()), engine="inline")
    assert not list(tmp_path.glob("out/**/*.png"))


@pytest.mark.parametrize("name", ["sd", "pixart-sigma"])
def test_a_trial_that_fails_for_another_reason_than_memory_stops_the_worker(name: str, fresh: Callable[[str], Any]) -> None:
    """In slots and by whole calls. Too much for the device is left to the rows, which say so themselves."""
    one, wanted = fresh(name), row(sampler=LEGAL[name][0], num_inference_steps=2)
    check_places(one.adapter, wanted)
    called = one.denoiser.forward
    one.denoiser.forward = lambda *args, **kwargs: torch.empty(1 << 50)
    check_places(one.adapter, wanted)
    assert seconds_per_image(one.adapter, wanted) is None
    one.denoiser.forward = lambda *args, **kwargs: called(args[0][:, :3], *args[1:], **kwargs)
    with pytest.raises(Fatal, match=r"cannot render a trial sample of 32×32 pixels here: RuntimeError: .* to have 4 channels, but got 3"):
        check_places(one.adapter, wanted)
    with pytest.raises(RuntimeError, match="to have 4 channels, but got 3"):
        seconds_per_image(one.adapter, wanted)


@pytest.fixture
def fresh(tiny_model: Callable[[str], Path]) -> Iterator[Callable[[str], Any]]:
    """Models that a test may break."""
    made: list[Model] = []

    def make(name: str) -> Model:
        made.append(Model(name, tiny_model(name)))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_a_job_whose_trial_fails_says_why_and_renders_nothing(
    write_manifest: Write, write_job: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(model: Fake, sample: Sample) -> list[int]:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device")

    monkeypatch.setattr(Fake, "places_that_differ", broken)
    with pytest.raises(Fatal, match="a trial sample of 64×64 pixels here: RuntimeError: CUDA error: no kernel image is available"):
        renderfarm.run(write_job(write_manifest()), engine="inline")
    assert not list(tmp_path.glob("out/**/*.png"))


@pytest.mark.parametrize(
    ("columns", "render", "expected"),
    [
        ({"height": [32, 64, 128, 64, 64]}, {}, {"height": 64}),
        ({"num_inference_steps": [5, 9, 7, 6, 8]}, {"sampler": "lcm", "num_inference_steps": 60}, {"num_inference_steps": 7}),
        ({"prompt": [None, "", "", "", "b"]}, {}, {"prompt": "b"}),
        ({"prompt": [""] * 5}, {"sampler": "lcm", "num_inference_steps": 60}, {"num_inference_steps": 20, "sampler": "euler"}),
        ({"seed": [2**63 - 1] * 5}, {"num_images_per_prompt": 2}, {}),  # no row can be rendered, and that is the rows' affair
    ],
)
def test_it_is_measured_with_what_the_rows_ask_for(
    columns: dict[str, list[Any]], render: dict[str, Any], expected: dict[str, Any], write_manifest: Write, write_job: Write
) -> None:
    prepared = prepare(load_job(write_job(write_manifest({"prompt": list("abcde"), **columns}), render=render)))
    found = vars(prepared.usual.sample)
    assert {name: found[name] for name in expected} == expected


def test_images_per_row_are_those_of_the_first_rows(write_manifest: Write, write_job: Write) -> None:
    path = write_job(write_manifest({"prompt": list("abcd"), "num_images_per_prompt": [1, 2, 3, None]}))
    assert prepare(load_job(path)).usual.images_per_row == 1.75


def automatic(write_job: Write, manifest: Path, **changes: object) -> Path:
    return write_job(manifest, output={"part_rows": "auto"}, **changes)


def grid(out: Path) -> dict[str, float]:
    found: dict[str, float] = json.loads((out / "_renderfarm/grid.json").read_text())
    return found


def test_the_first_worker_measures_how_many_rows_a_part_has(engine: str, write_manifest: Write, write_job: Write, tmp_path: Path) -> None:
    path = automatic(write_job, write_manifest({"prompt": [f"p{k}" for k in range(40)]}), workers={"max": 2})
    assert estimate(prepare(load_job(path)))["rows per part"] == "auto: measured by the first worker"
    summary = renderfarm.run(path, engine=engine)
    assert (summary.state, summary.images) == ("SUCCEEDED", 40)
    rows = grid(tmp_path / "out")["part_rows"]
    assert rows == (20 if engine == "inline" else 10)  # the fake model is quick: two parts for each worker
    check_complete(tmp_path / "out", {(row, 0) for row in range(40)})
    assert len(list((tmp_path / "out/data").iterdir())) == 40 // rows
    assert estimate(prepare(load_job(path)))["rows per part"] == rows
    assert verify(str(tmp_path / "out"), Choice(all=True)).ok


def test_a_run_that_goes_on_keeps_the_measured_grid(
    write_manifest: Write, write_job: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = automatic(write_job, write_manifest({"prompt": [f"p{k}" for k in range(6)]}), render={"num_images_per_prompt": 300})
    out, stop = tmp_path / "out", Event()

    def stop_soon(progress: Progress) -> None:
        if progress.parts_done:
            stop.set()

    assert renderfarm.run(path, engine="inline", stop=stop, observe=stop_soon).state == "INTERRUPTED"
    begun = grid(out)
    assert begun["part_rows"] == 1
    monkeypatch.setenv("RENDERFARM_FAKE_STEP_S", "60")  # a worker that measured would take for ever
    prepared = prepare(load_job(path))
    worker = Worker(WorkerSpec("w0", prepared.job, prepared.model, prepared.usual))
    assert worker.ready().seconds_per_image is None
    worker.close()
    monkeypatch.setenv("RENDERFARM_FAKE_STEP_S", "0")
    assert renderfarm.run(path, engine="inline").state == "SUCCEEDED"
    assert grid(out) == begun
    check_complete(out, {(row, k) for row in range(6) for k in range(300)})


def test_a_run_stopped_before_a_worker_is_ready_can_go_on(write_manifest: Write, write_job: Write, tmp_path: Path) -> None:
    path, stop = automatic(write_job, write_manifest()), Event()
    stop.set()
    assert renderfarm.run(path, engine="inline", stop=stop).state == "INTERRUPTED"
    out = str(tmp_path / "out")
    assert read_status(out)["parts"] is None
    assert list(renderfarm.open(out)) == []
    for look in (lambda: verify(out, Choice()), lambda: inspect(out, 0, 0)):
        with pytest.raises(InvalidJob, match="nothing was rendered yet; run its job first"):
            look()
    assert renderfarm.run(path, engine="inline").images == 8


@pytest.mark.parametrize("written", [None, b"{", b"{}", b'{"part_rows": 0}', b'{"part_rows": "9"}'])
def test_a_grid_that_is_lost_or_damaged_is_never_measured_again(
    written: bytes | None, write_manifest: Write, write_job: Write, tmp_path: Path
) -> None:
    path, file = automatic(write_job, write_manifest()), tmp_path / "out/_renderfarm/grid.json"
    renderfarm.run(path, engine="inline")
    file.unlink() if written is None else file.write_bytes(written)
    with pytest.raises(Fatal, match=r"grid\.json .*restore it from a copy"):
        renderfarm.run(path, engine="inline")
    with pytest.raises(Fatal, match=r"grid\.json .*restore it from a copy"):
        verify(str(tmp_path / "out"), Choice())


def test_of_two_drivers_that_measured_the_first_ones_grid_holds() -> None:
    store = open_store("memory://two-drivers-measured")
    assert commit.freeze_part_rows(store, 7, 0.5) == 7
    assert commit.freeze_part_rows(store, 9, 0.4) == 7
    job = {"manifest": {"files": [{"rows": 20}], "where": None}, "output": {"part_rows": "auto"}}
    assert commit.frozen_grid(store, job) == Grid(20, 7)
