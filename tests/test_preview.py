"""`renderfarm preview` and what `plan` says: before anything is spent."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import renderfarm
from renderfarm import commit
from renderfarm.errors import Fatal, InvalidJob, ProfileMismatch
from renderfarm.estimate import estimate
from renderfarm.jobfile import load_job
from renderfarm.preparation import prepare
from renderfarm.preview import preview, spread
from renderfarm.storage import open_store

Write = Callable[..., Path]


def pixels(out: Path) -> dict[str, str]:
    return {f"{record['row']}:{record['image_index']}": record["pixel_sha256"] for _, record in renderfarm.open(out)}


@pytest.mark.parametrize("model", ["builtin:fake", "builtin:shapes"])
def test_a_preview_has_the_pixels_of_the_later_run_and_leaves_a_sheet(
    model: str, write_manifest: Write, write_job: Write, tmp_path: Path
) -> None:
    job = load_job(
        write_job(
            write_manifest(),
            model=model,
            render={"num_images_per_prompt": 2},
            sweep={"product": {"guidance_scale": [1, 4], "sampler": ["ddim", "euler"]}},
        )
    )
    before = set(os.listdir(tmp_path))
    found = preview(job, tmp_path / "sheets/sheet.png", 5)
    assert set(os.listdir(tmp_path)) - before == {"sheets"}
    assert (len(found.rows), found.images, found.errors, found.exit_code) == (5, 10, 0, 0)
    with Image.open(tmp_path / "sheets/sheet.png") as sheet:
        assert sheet.width > 500
    renderfarm.run(job, engine="inline")
    later = pixels(tmp_path / "out")
    assert len(later) == 64
    assert found.pixels == {place: later[place] for place in found.pixels}
    assert len(found.pixels) == 10


def test_rows_are_spread_over_the_manifest_and_do_not_keep_step_with_an_axis(write_manifest: Write, write_job: Write) -> None:
    manifest = write_manifest({"prompt": [f"p{k}" for k in range(100)], "kind": ["a", "b"] * 50})

    def chosen(rows: int, **changes: Any) -> list[int]:
        return spread(prepare(load_job(write_job(changes.pop("manifest", manifest), **changes))), rows)

    places = chosen(10)
    assert [place // 10 for place in places] == list(range(10))
    assert chosen(500) == list(range(100))
    swept = chosen(40, sweep={"product": {"guidance_scale": [1, 2, 3, 4]}})
    assert {place % 4 for place in swept} == {0, 1, 2, 3}
    three_by_three = {"product": {"guidance_scale": [1, 2, 3], "num_inference_steps": "1..3"}}
    four = write_manifest({"prompt": [f"p{k}" for k in range(4)]}, name="four.parquet")
    few = chosen(9, manifest=four, sweep=three_by_three)
    assert ({place % 9 for place in few}, {place // 9 for place in few}) == (set(range(9)), set(range(4)))
    assert chosen(99, manifest=four, sweep=three_by_three) == list(range(36))
    drawn = chosen(8, manifest=four, sweep={"product": {"guidance_scale": [1, 2]}}, prompts={"templates": "random", "samples": 4})
    assert {place % 8 for place in drawn} == set(range(8))
    assert chosen(3, manifest={"path": str(manifest), "where": {"row": "5-6,90-99"}})[0] == 5
    assert all(place % 2 for place in chosen(9, manifest={"path": str(manifest), "where": {"kind": "b"}}))
    with pytest.raises(InvalidJob, match="selects no row"):
        chosen(9, manifest={"path": str(manifest), "where": {"kind": "c"}})
    with pytest.raises(InvalidJob, match="give 1 to 1000"):
        preview(load_job(write_job(manifest)), Path("unused.png"), 0)


def test_rows_without_an_image_are_told_and_decide_the_exit_code(write_manifest: Write, write_job: Write, tmp_path: Path) -> None:
    job = load_job(write_job(write_manifest({"prompt": ["", ""]})))
    found = preview(job, tmp_path / "sheet.png")
    assert (found.file, found.errors, found.exit_code) == (None, 2, 3)
    assert found.reasons[0].startswith("row 0: prompt is empty")
    assert not (tmp_path / "sheet.png").exists()


def test_a_preview_keeps_to_the_profile_of_its_output(write_manifest: Write, write_job: Write, tmp_path: Path) -> None:
    job = load_job(write_job(write_manifest(), workers={"batch_size": "auto"}))
    renderfarm.run(job, engine="inline")
    found = preview(job, tmp_path / "sheet.png", 2)
    later = pixels(tmp_path / "out")
    assert found.pixels == {place: later[place] for place in found.pixels}
    store = open_store(str(tmp_path / "out"))
    store.put(commit.PROFILE, commit.to_json({**commit.read_profile(store), "torch": "another"}))
    with pytest.raises((ProfileMismatch, Fatal), match="other pixels than the output's profile promises"):
        preview(job, tmp_path / "sheet.png", 2)


# ------------------------------------------------------------------------------------------- plan


def test_plan_names_where_its_rate_is_from_and_says_hours_and_money(write_manifest: Write, write_job: Write, tmp_path: Path) -> None:
    job = write_job(write_manifest(), cost={"per_hour": 3.6}, workers={"max": 2, "batch_size": 3})
    plan = estimate(prepare(load_job(job)))
    assert plan["rate"].startswith("unknown: nothing was rendered yet")
    assert (plan["rows done"], plan["rows left"], plan["cost left (estimate)"]) == (0, 8, None)
    assert plan["slots that are filler"] == "11.1%"
    assert "the last batch of 3" in plan["of which is known"]

    stated = estimate(prepare(load_job(job, ["cost.images_per_second=0.002"])))
    assert stated["rate"] == "0.002 images/s and worker, stated in the job (cost.images_per_second)"
    assert stated["accelerator hours left (estimate)"] == pytest.approx(8 / 0.002 / 3600, abs=1e-3)
    assert stated["cost left (estimate)"] == "4.00 USD"

    renderfarm.run(load_job(job, ["manifest.where={row: 0-2}", f"output.path={tmp_path}/other"]), engine="inline")
    renderfarm.run(load_job(job, [f"output.path={tmp_path}/done"]), engine="inline")
    done = estimate(prepare(load_job(job, [f"output.path={tmp_path}/done", "cost.images_per_second=0.002"])))
    assert "measured by the last run (1 workers)" in done["rate"]
    assert (done["rows done"], done["rows left"], done["cost left (estimate)"]) == (8, 0, "0.00 USD")
    assert done["of which is known"] == "the last run"


def test_plan_takes_the_first_workers_measurement_before_any_image_is_there(write_manifest: Write, write_job: Write) -> None:
    prepared = prepare(load_job(write_job(write_manifest(), output={"part_rows": "auto"}, cost={"per_hour": 1})))
    commit.freeze_job(prepared.store, prepared.frozen())
    commit.freeze_part_rows(prepared.store, 4, 900.0)
    plan = estimate(prepared)
    assert "measured by the first worker" in plan["rate"]
    assert (plan["accelerator hours left (estimate)"], plan["cost left (estimate)"]) == (2.0, "2.00 USD")
