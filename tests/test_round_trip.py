"""An output's tables are a manifest again, and the same pixels come out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from checker import check_complete, error_rows, image_rows, pixels
from PIL import Image

import renderfarm
from renderfarm.arguments import ARGUMENTS, PRESETS
from renderfarm.config import ManifestSpec
from renderfarm.errors import InvalidJob
from renderfarm.manifest import open_manifest
from renderfarm.schema import ARGUMENT_COLUMNS, IMAGE_COLUMNS

Write = Callable[..., Path]


def run(folder: Path, name: str, manifest: Any, **changes: Any) -> Path:
    job = {
        "name": "t", "manifest": manifest, "model": "builtin:shapes", "workers": {"batch_size": 3},
        "output": {"path": str(folder / name), "part_rows": 4}, **changes,
    }  # fmt: skip
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(job))
    renderfarm.run(folder / f"{name}.yaml", engine="inline")
    return folder / name


def by_old_place(out: Path) -> list[tuple[str, int, str]]:
    """Of each image what the row was called, its seed and its pixels."""
    return [(row["row_id"], row["seed"], row["pixel_sha256"]) for row in image_rows(out)]


def test_the_tables_of_an_output_render_the_same_pixels_with_other_defaults_and_parts(tmp_path: Path) -> None:
    columns = {
        "id": ["a", "b", "c", "d", "e"],
        "prompt": ["a red circle", "a blue ring", "", "a green star", "a pink cross"],
        "negative_prompt": ["a square", None, None, None, "a circle"],
        "sampler": ["euler-a", "dpm++2m", "ddim", "lms", "dpm2-a"],
        "num_inference_steps": [3, 4, 3, None, 3],
        "guidance_scale": [1.0, 5.0, 3.0, 2.5, 7.5],
        "seed": [7, None, 1, None, 9],
        "seed_b": [None, 5, None, None, 11],
        "blend": [None, 0.3, None, None, 0.75],
        "num_images_per_prompt": [2, 2, 1, 1, 2],
        "row": [10, 20, 30, 40, 50],  # a user's own, which the table calls input_row
        "mood": ["calm", "loud", "calm", None, "calm"],
    }
    pq.write_table(pa.table(columns), tmp_path / "m.parquet")
    render = {"num_inference_steps": 5, "negative_prompt": "a triangle", "height": 72}
    first = run(
        tmp_path, "first", str(tmp_path / "m.parquet"), render=render, seed=3, output={"path": str(tmp_path / "first"), "part_rows": 2}
    )
    assert len(image_rows(first)) == 7
    again = run(tmp_path, "again", {"path": str(first / "data/*/metadata.parquet"), "columns": "renderfarm"}, seed=99)
    assert by_old_place(again) == by_old_place(first)
    check_complete(again, {(row, 0) for row in range(7)})
    assert error_rows(again) == []
    ours = {*IMAGE_COLUMNS.names, *ARGUMENT_COLUMNS.names}
    old, new = image_rows(first)[0], image_rows(again)[0]
    assert {name: new[name] for name in new if name not in ours} == {name: old[name] for name in old if name not in ours}
    assert (new["input_row"], new["mood"]) == (10, "calm")


def test_without_the_preset_too_and_then_our_other_columns_travel(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["a red circle", "a blue ring"], "num_images_per_prompt": [2, 1]}), tmp_path / "m.parquet")
    render = {"num_inference_steps": 3}
    first = run(tmp_path, "first", str(tmp_path / "m.parquet"), render=render)
    again = run(tmp_path, "again", str(first / "data/part-00000000/metadata.parquet"))
    assert list(pixels(again).values()) == list(pixels(first).values())
    old = image_rows(first)
    assert [(row["input_row"], row["input_image_index"], row["input_file_sha256"]) for row in image_rows(again)] == [
        (row["row"], row["image_index"], row["file_sha256"]) for row in old
    ]


def test_image_to_image_begins_again_from_what_the_output_keeps(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    shades = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    for name in ("one", "two"):
        Image.fromarray(shades).resize((80, 64)).save(tmp_path / f"photos/{name}.png")
    embedded = (tmp_path / "photos/two.png").read_bytes()
    columns = {
        "prompt": ["a red circle", "a blue ring"], "image": pa.array([{"path": "photos/one.png"}, {"bytes": embedded}]),
        "strength": [0.6, 0.9], "num_images_per_prompt": [2, 1],
    }  # fmt: skip
    pq.write_table(pa.table(columns), tmp_path / "m.parquet")
    settings = {"render": {"num_inference_steps": 4, "height": 64, "width": 64}, "inputs": {"resize": "crop"}}
    first = run(tmp_path, "first", str(tmp_path / "m.parquet"), **settings)
    assert len(image_rows(first)) == 3
    for path in (tmp_path / "photos").iterdir():
        path.unlink()
    manifest = {"path": str(first / "data/*/metadata.parquet"), "columns": "renderfarm"}
    again = run(tmp_path, "again", manifest, inputs={"resize": "crop", "folder": str(first / "_renderfarm/inputs")})
    assert by_old_place(again) == by_old_place(first)
    assert [row["init_image_sha256"] for row in image_rows(again)] == [row["init_image_sha256"] for row in image_rows(first)]


def test_a_picture_in_the_table_is_never_taken_for_one_to_begin_with(tmp_path: Path) -> None:
    """Layouts that embed the painted picture call it `image`, as readers do."""
    table = pa.table({"prompt": ["a red circle"], "image": pa.array([{"bytes": b"x", "path": None}]), "row_id": ["a"], "mine": [1]})
    pq.write_table(table, tmp_path / "m.parquet")
    manifest = open_manifest(ManifestSpec(path=str(tmp_path / "m.parquet"), columns="renderfarm"), frozenset(ARGUMENTS))
    assert manifest.columns == {"prompt": "prompt", "id": "row_id"}
    assert manifest.extras.names == ["mine"]


def test_a_column_that_this_model_does_not_take_is_left_alone(tmp_path: Path) -> None:
    """Each of our tables has a guidance_scale, and some models take none."""
    pq.write_table(pa.table({"prompt": ["a red circle"], "guidance_scale": [1.0], "seed": [7]}), tmp_path / "m.parquet")
    manifest = open_manifest(ManifestSpec(path=str(tmp_path / "m.parquet"), columns="renderfarm"), frozenset({"prompt", "seed"}))
    assert manifest.columns == {"prompt": "prompt", "seed": "seed"}
    assert manifest.extras.names == []


def test_the_preset_reads_every_argument_that_a_table_can_hold() -> None:
    preset, table = PRESETS["renderfarm"], {*IMAGE_COLUMNS.names, *ARGUMENT_COLUMNS.names}
    assert set(ARGUMENTS) - preset.keys() == {"num_images_per_prompt"}, "each row of the table is one image"
    assert set(preset.values()) <= table


def test_a_table_that_is_no_outputs_is_refused_by_the_preset(write_manifest: Write) -> None:
    with pytest.raises(InvalidJob, match="no column `prompt`"):
        open_manifest(ManifestSpec(path=str(write_manifest({"caption": ["a"]})), columns="renderfarm"), frozenset(ARGUMENTS))
