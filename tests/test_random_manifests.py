"""Promise 1, tried at random: small manifests under random worker counts, part sizes and orders, and with rows removed.

Every slot family, in fp32 and bf16, on one thread and on two; the reference is diffusers' own pipeline, called with B
copies of each row.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import tempfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from checker import image_rows
from covering import covering
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from oracle import DTYPES, LEGAL, Model

import renderfarm
from renderfarm import commit
from renderfarm.config import Job, ModelSpec
from renderfarm.models.catalog import describe
from renderfarm.plan import leases
from renderfarm.preparation import prepare
from renderfarm.records import Lease, SampleKey
from renderfarm.rerender import sample_of
from renderfarm.samplers import SAMPLERS
from renderfarm.worker import LEASES_IN_FLIGHT, Worker, WorkerSpec

FAMILIES = ("sd", "lcm", "sdxl", "sd3", "flux-dev")
OTHERS = os.environ.get("RENDERFARM_TEST_SEED", "")  # for manifests that nobody has seen yet
Row = dict[str, Any]
Images = dict[tuple[str, int], Row]

TEXTS = ("prompt_2", "prompt_3", "negative_prompt_2", "negative_prompt_3")
TYPES = {
    "seed": pa.int64(),
    "seed_b": pa.int64(),
    "blend": pa.float64(),
    "num_images_per_prompt": pa.int32(),
    "guidance_scale": pa.float64(),
    "true_cfg_scale": pa.float64(),
    **{name: pa.string() for name in ("negative_prompt", *TEXTS)},
}


@st.composite
def rows_of(draw: st.DrawFn, one: Model) -> dict[str, Row]:
    """Rows by id, each argument that the family takes sometimes null. Of the first four, two are guided and two are not, and
    each two share their denoiser calls, with other seeds and samplers."""
    optional: dict[str, list[Any]] = {
        "negative_prompt": [None, "a square"],
        "true_cfg_scale": [None, 1.0, 2.0],
        **{name: [None, "a second text"] for name in TEXTS},
    }
    row = st.fixed_dictionaries(
        {
            "prompt": st.sampled_from(["a large red circle on a blue background", "a small star", "two words"]),
            "seed": st.sampled_from([None, 0, 1]),
            "seed_b": st.none(),
            "blend": st.none(),
            "num_images_per_prompt": st.sampled_from([None, 2]),
            "height": st.sampled_from([32, 40]),
            "width": st.just(32),
            "num_inference_steps": st.integers(2, 4),
            "guidance_scale": st.sampled_from([0.0, 1.0, 3.0, 7.5]),
            "sampler": st.sampled_from(usual_samplers(one)),
            **{name: st.sampled_from(values) for name, values in optional.items() if name in one.info.arguments},
        }
    )
    found = draw(st.lists(row, min_size=4, max_size=7))
    for k, (guided, sampler) in enumerate(itertools.product((True, False), (0, -1))):
        scale = {"guidance_scale": 4.0 if guided else 1.0, "true_cfg_scale": 2.0 if guided else None, "negative_prompt": "a square"}
        fixed = {"height": 32, "seed": k, "sampler": usual_samplers(one)[sampler], **scale}
        found[k] |= {name: value for name, value in fixed.items() if name in found[k]}
    found[0] |= {"seed_b": 9, "blend": draw(st.sampled_from([0.0, 0.3, 1.0]))}
    return {f"id-{k}": values for k, values in enumerate(found)}


def usual_samplers(one: Model) -> list[str]:
    return [name for name in LEGAL[one.name] if SAMPLERS[name].min_steps <= 2]


def render(one: Model, rows: dict[str, Row], workers: int, part_rows: int, order: Random | None) -> Images:
    """Render rows with so many workers in this process, leases in this order; None: by Ray. The image table by (id, index)."""
    with tempfile.TemporaryDirectory() as folder:
        columns = {name: pa.array([row[name] for row in rows.values()], TYPES.get(name)) for name in next(iter(rows.values()))}
        pq.write_table(pa.table({"id": list(rows), **columns}), f"{folder}/m.parquet")
        job = {
            "name": "t", "manifest": f"{folder}/m.parquet", "model": str(one.folder), "seed": 5,
            "workers": {"max": workers, "batch_size": one.batch_size, "dtype": one.dtype, "threads": one.threads},
            "output": {"path": f"{folder}/out", "part_rows": part_rows},
        }  # fmt: skip
        if order is None:
            renderfarm.run(Job.model_validate(job), engine="ray")
        else:
            work_in_order(Job.model_validate(job), order)
        return {(record["row_id"], record["image_index"]): record for record in image_rows(Path(folder) / "out")}


def work_in_order(job: Job, order: Random) -> None:
    """The job's leases, dealt to its workers and worked off in an order that no engine would choose."""
    prepared = prepare(job)
    assert isinstance(job.output.part_rows, int)
    commit.freeze_job(prepared.store, prepared.frozen())
    handed_out = list(leases(prepared.manifest, prepared.grid_of(job.output.part_rows), lambda index: False))
    order.shuffle(handed_out)
    shares: list[list[Lease]] = [[] for _ in range(job.workers.max)]
    for lease in handed_out:
        order.choice(shares).append(lease)
    with ThreadPoolExecutor(job.workers.max) as pool:
        specs = [WorkerSpec(f"w{k}", prepared.job, prepared.model, prepared.usual) for k in range(job.workers.max)]
        list(pool.map(work, specs, shares))


def work(spec: WorkerSpec, share: list[Lease]) -> None:
    """One worker's leases in their order, as many at a time as an engine lets it hold."""
    worker = Worker(spec)
    try:
        worker.ready()
        with ThreadPoolExecutor(LEASES_IN_FLIGHT) as threads:
            list(threads.map(worker.render, share))
    finally:
        worker.close()


def keeps_their_pixels(one: Model, examples: int, ray: bool = False) -> None:
    """Random, and drawn the same each time (the seed is the case's own, and OTHERS'); which thread is first is left to the machine."""

    @seed(zlib.crc32(f"{one.name} {one.dtype} {one.threads}{OTHERS}".encode()))
    @settings(max_examples=examples, database=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def try_one(data: st.DataObject) -> None:
        def again(rows: dict[str, Row], ray: bool = False) -> Images:
            workers, part_rows, order = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3)), data.draw(st.randoms())
            return render(one, rows, workers, part_rows, None if ray else order)

        rows = data.draw(rows_of(one))
        first = again(rows, ray)
        assert set(first) == {(name, k) for name, row in rows.items() for k in range(row["num_images_per_prompt"] or 1)}
        torch.set_num_threads(one.threads)
        for record in first.values():
            wanted = replace(sample_of(record), key=SampleKey(0, 0), row_id="")  # rows that differ in their number only are one
            if wanted.blend is not None:
                if wanted.blend not in (0.0, 1.0):
                    continue  # diffusers has no word for it; that it stays what it is is seen below
                seed = wanted.seed_b if wanted.blend else wanted.seed
                wanted = replace(wanted, seed=seed, seed_b=None, blend=None)
            assert record["pixel_sha256"] == hashlib.sha256(one.reference(wanted).tobytes()).hexdigest(), record

        kept = data.draw(st.lists(st.sampled_from(sorted(rows)), min_size=1, unique=True))
        fewer = again({name: rows[name] for name in kept})
        assert set(fewer) == {key for key in first if key[0] in kept}
        for key, record in fewer.items():
            for name in ("seed", "profile_sha256", "pixel_sha256"):  # the profile, too, is the same through Ray and in this process
                assert record[name] == first[key][name], (key, name)

    try_one()


def test_rows_of_shapes_keep_their_pixels_whatever_happens_around_them() -> None:
    keeps_their_pixels(Model("sd", Path(str(describe(ModelSpec(id="builtin:shapes")).folder))), examples=6)


CASES = [(name, dtype, threads) for name in FAMILIES for dtype in DTYPES for threads in (1, 2)]


@pytest.mark.parametrize(("name", "dtype", "threads"), covering(CASES))
def test_rows_of_every_family_keep_their_pixels(name: str, dtype: str, threads: int, tiny_model: Callable[[str], Path]) -> None:
    keeps_their_pixels(Model(name, tiny_model(name), dtype, threads, batch_size=2 + threads), examples=2)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype"), [(name, DTYPES[number % 2]) for number, name in enumerate(FAMILIES)])
def test_rows_of_every_family_keep_their_pixels_through_ray(
    name: str, dtype: str, tiny_model: Callable[[str], Path], local_ray: None
) -> None:
    keeps_their_pixels(Model(name, tiny_model(name), dtype, threads=2, batch_size=4), examples=1, ray=True)
