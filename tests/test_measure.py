"""`batch_size: auto`: measured once, frozen in the profile, the same for every worker and on resume."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from checker import check_complete

import renderfarm
from renderfarm.config import ModelSpec, Workers, load_job
from renderfarm.errors import OutOfMemory
from renderfarm.models.catalog import describe
from renderfarm.models.fake import Fake, State
from renderfarm.models.measure import best_batch_size
from renderfarm.preparation import prepare
from renderfarm.samples import usual_sample
from renderfarm.worker import Worker, WorkerSpec

Write = Callable[..., Path]
FAKE = describe(ModelSpec(id="builtin:fake"))


class Device(Fake):
    """A denoiser call costs `fixed` milliseconds and `each` more per slot; more slots than `room` do not fit."""

    def __init__(self, fixed: float, each: float, room: int = 1000) -> None:
        super().__init__(FAKE, Workers(batch_size="auto"))
        self.fixed, self.each, self.room = fixed, each, room

    def step(self, states: Sequence[State]) -> list[bool]:
        if len(states) > self.room:
            raise OutOfMemory("too many")
        time.sleep((self.fixed + self.each * len(states)) / 1000)
        return super().step(states)


@pytest.mark.parametrize(
    ("device", "best"),
    [
        (Device(fixed=0, each=10), {1}),
        (Device(fixed=200, each=0), {64}),
        (Device(fixed=100, each=0, room=8), {8}),
        (Device(fixed=20, each=20), {4, 8, 16, 32}),  # ×1.33, 1.2, 1.11, 1.06, 1.03: which still pays is for the clock to say
    ],
)
def test_the_largest_batch_that_pays_and_fits_is_chosen(device: Device, best: set[int], write_manifest: Write, write_job: Write) -> None:
    job = load_job(write_job(write_manifest(), workers={"batch_size": "auto"}))
    found = best_batch_size(device, usual_sample(job, FAKE))
    assert found in best
    assert device.batch_size == found


def test_what_the_first_worker_measured_holds_for_all_and_on_resume(write_manifest: Write, write_job: Write, tmp_path: Path) -> None:
    path = write_job(write_manifest(), workers={"batch_size": "auto"})
    prepared = prepare(load_job(path))
    spec = [WorkerSpec(f"w{k}", prepared.job, prepared.model) for k in range(2)]
    first, second = Worker(spec[0]), Worker(spec[1])  # both measure: none has published yet
    first.slots.ready.result().batch_size = 5
    second.slots.ready.result().batch_size = 9
    assert first.ready().profile_sha256 == second.ready().profile_sha256
    assert second.slots.ready.result().batch_size == 5
    late = Worker(spec[0])
    late.ready()
    assert late.slots.ready.result().batch_size == 5
    for worker in (first, second, late):
        worker.close()

    assert renderfarm.run(path, engine="inline").state == "SUCCEEDED"
    assert json.loads((tmp_path / "out/_renderfarm/profile.json").read_text())["batch_size"] == 5
    check_complete(tmp_path / "out", {(row, 0) for row in range(8)})
    assert renderfarm.run(path, engine="inline").new_images == 0
