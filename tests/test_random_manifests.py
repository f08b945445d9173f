"""Random small manifests under random workers, parts and orders, and with rows taken out: each row keeps its pixels.

The outside oracle is diffusers' own pipeline, called with B copies of each row and never with its mates.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import diffusers
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from checker import image_rows
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import B, plain_pipeline, reference

from renderfarm import commit
from renderfarm.config import Job, ModelSpec
from renderfarm.models.catalog import describe
from renderfarm.plan import leases
from renderfarm.preparation import prepare
from renderfarm.records import Sample, SampleKey
from renderfarm.rerender import sample_of
from renderfarm.worker import LEASES_IN_FLIGHT, Worker, WorkerSpec

Oracle = Callable[[dict[str, Any]], str]


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    """The pixel hash that diffusers gives a row of the image table; rows that differ in their number only are one."""
    pipe = plain_pipeline(diffusers.StableDiffusionPipeline, describe(ModelSpec(id="builtin:shapes")).folder)

    @cache
    def pixel_sha256(wanted: Sample) -> str:
        return hashlib.sha256(reference(pipe, wanted).tobytes()).hexdigest()

    return lambda record: pixel_sha256(replace(sample_of(record), key=SampleKey(0, 0), row_id=""))


ROW = st.fixed_dictionaries(
    {
        "prompt": st.sampled_from(["a large red circle on a blue background", "a small star", "two words"]),
        "negative_prompt": st.sampled_from([None, "a square"]),
        "seed": st.sampled_from([None, 0, 1]),
        "num_images_per_prompt": st.sampled_from([None, 2]),
        "height": st.sampled_from([None, 72]),
        "num_inference_steps": st.integers(2, 4),
        "guidance_scale": st.sampled_from([0.0, 1.0, 3.0, 7.5]),
        "sampler": st.sampled_from(["euler", "euler-a", "dpm++2m", "dpm++2m-sde", "ddim", "lms", "heun", "dpm2-a"]),
    }
)


def render(rows: dict[str, dict[str, Any]], workers: int, part_rows: int, order: Random) -> dict[tuple[str, int], dict[str, Any]]:
    """Render rows (by id) with so many workers in this process, leases in any order; the image table by (id, index)."""
    with tempfile.TemporaryDirectory() as folder:
        columns = {name: [row[name] for row in rows.values()] for name in next(iter(rows.values()))}
        types = {"negative_prompt": pa.string(), "seed": pa.int64(), "num_images_per_prompt": pa.int32(), "height": pa.int32()}
        arrays = {name: pa.array(values, types.get(name)) for name, values in columns.items()}
        pq.write_table(pa.table({"id": list(rows), **arrays}), f"{folder}/m.parquet")
        job = {
            "name": "t", "manifest": f"{folder}/m.parquet", "model": "builtin:shapes", "seed": 5,
            "workers": {"batch_size": B}, "output": {"path": f"{folder}/out", "part_rows": part_rows},
        }  # fmt: skip
        prepared = prepare(Job.model_validate(job))
        commit.freeze_job(prepared.store, prepared.frozen())
        pool = [Worker(WorkerSpec(f"w{k}", prepared.job, prepared.model)) for k in range(workers)]
        for worker in pool:
            worker.ready()
        todo = [(order.choice(pool), lease) for lease in leases(prepared.manifest, prepared.grid, lambda index: False)]
        order.shuffle(todo)
        with ThreadPoolExecutor(workers * LEASES_IN_FLIGHT) as threads:
            list(threads.map(lambda pair: pair[0].render(pair[1]), todo))
        for worker in pool:
            worker.close()
        return {(record["row_id"], record["image_index"]): record for record in image_rows(Path(folder) / "out")}


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(ROW, min_size=2, max_size=6), st.data())
def test_a_row_keeps_its_pixels_whatever_happens_around_it(oracle: Oracle, found: list[dict[str, Any]], data: st.DataObject) -> None:
    rows = {f"id-{k}": row for k, row in enumerate(found)}
    first = render(rows, data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3)), data.draw(st.randoms()))
    assert set(first) == {(name, k) for name, row in rows.items() for k in range(row["num_images_per_prompt"] or 1)}
    for record in first.values():
        assert record["pixel_sha256"] == oracle(record), record

    kept = data.draw(st.lists(st.sampled_from(sorted(rows)), min_size=1, unique=True))
    fewer = render({name: rows[name] for name in kept}, data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3)), data.draw(st.randoms()))
    assert set(fewer) == {key for key in first if key[0] in kept}
    for key, record in fewer.items():
        assert (record["seed"], record["pixel_sha256"]) == (first[key]["seed"], first[key]["pixel_sha256"]), key
