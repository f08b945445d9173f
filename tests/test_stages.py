"""How long each stage of a part took, as its index entry says."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from own_time import own_time

import renderfarm
from renderfarm import commit
from renderfarm.models.base import Counted
from renderfarm.slots import Rendered
from renderfarm.stages import STAGES, Stopwatch
from renderfarm.storage import open_store

Write = Callable[..., Path]


def entries(out: Path) -> list[dict[str, Any]]:
    store = open_store(str(out))
    return [commit.committed_by(store, entry.key) for entry in commit.index_entries(store).values()]


def test_an_entry_says_when_its_part_began_and_where_the_time_went(
    write_manifest: Write, write_job: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8 rows in parts of 3 at 3 steps of 20 ms, 4 at a time: the third part has no slot before the first one is rendered."""
    monkeypatch.setenv("RENDERFARM_FAKE_STEP_S", "0.02")
    before = time.time()
    renderfarm.run(write_job(write_manifest(), render={"num_inference_steps": 3}), engine="inline")
    first, second, third = entries(tmp_path / "out")
    for said in (first, second, third):
        assert (said["worker"], set(said["seconds"])) == ("w0", set(STAGES))
        assert before <= said["began"] <= time.time()
        assert min(said["seconds"].values()) >= 0
        assert said["seconds"]["render"] >= 0.06
    entered = [said["began"] + said["seconds"]["prepare"] + said["seconds"]["wait"] for said in (first, third)]
    assert entered[1] - entered[0] >= 0.05, "its slots were taken by the first part, for three steps"


def test_a_part_without_any_sample_to_render_has_only_been_prepared_and_put(
    write_manifest: Write, write_job: Write, tmp_path: Path
) -> None:
    renderfarm.run(write_job(write_manifest({"prompt": ["", "", ""]})), engine="inline")
    (said,) = entries(tmp_path / "out")
    assert said["seconds"]["wait"] == said["seconds"]["render"] == 0
    assert said["seconds"]["put"] > 0


def test_stages_follow_one_another_also_where_the_last_picture_was_prepared_after_others_were_rendered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = iter([10.0, 12.0, 15.0, 16.0, 18.0])
    own_time(monkeypatch, "renderfarm.stages", monotonic=lambda: next(clock))
    watch = Stopwatch()
    watch.prepared()
    for entered in (11.0, 14.0):
        sample: Future[Rendered] = Future()
        sample.set_result(Rendered(None, Counted(0, None, None), None, entered))  # type: ignore[arg-type]
        watch.rendered(sample)
    watch.encoded()
    own_time(monkeypatch, "renderfarm.stages", monotonic=lambda: 19.5)
    assert watch.entry()["seconds"] == {"prepare": 2, "wait": 0, "render": 4, "encode": 2, "put": 1.5}
