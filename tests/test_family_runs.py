"""Each family the whole way: a manifest with the family's own columns becomes a dataset with the pixels that diffusers paints."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from checker import check_complete, error_rows, image_rows, tables
from covering import only
from oracle import CLASSES, B, Model, plain_pipeline, row
from test_adapters import make_adapter

import renderfarm
from renderfarm.config import ModelSpec
from renderfarm.errors import InvalidJob
from renderfarm.models.catalog import describe

Write = Callable[..., Path]

PAIR = {"prompt_2": [None, "a second text", None, None], "negative_prompt_2": [None, "grey", None, None]}
NEGATIVE = {"negative_prompt": [None, "a square", None, ""]}
COLUMNS: dict[str, dict[str, Any]] = {
    "sd": {**NEGATIVE, "sampler": ["euler", "Euler a", "flow-euler", None]},
    "lcm": {"sampler": ["lcm", None, "euler", None]},
    "sdxl": {**NEGATIVE, **PAIR, "sampler": ["DPM++ 2M Karras", None, "flow-euler", "euler-a"]},
    "sd3": {**NEGATIVE, **PAIR, "prompt_3": ["a third text", None, None, None], "sampler": [None, "flow-unipc", "ddim", "flow-dpm++2m"]},
    "flux-dev": {**NEGATIVE, **PAIR, "true_cfg_scale": [None, 2.0, None, 3.0], "sampler": [None, "flow-unipc", "lcm", "flow-euler"]},
    "flux2-dev": {"sampler": [None, "flow-unipc", "ddim", "flow-euler"]},
    "flux2-klein": {**NEGATIVE, "sampler": [None, "flow-unipc", "ddim", "flow-dpm++2m"]},
    "qwen-image": {**NEGATIVE, "true_cfg_scale": [None, 2.0, None, 3.0], "sampler": [None, "flow-unipc", "flow-dpm++2m", None]},
    "z-image": {**NEGATIVE, "sampler": [None, "flow-euler", "flow-unipc", None]},
    "pixart-sigma": {**NEGATIVE, "sampler": ["euler", "Euler a", "flow-euler", None]},
    "sana": {**NEGATIVE, "sampler": [None, "flow-unipc", "euler", "flow-euler"]},
    "deepfloyd": {**NEGATIVE, "sampler": [None, "DPM++ 2M", "euler", "ddpm"]},
    "flux-schnell": {**PAIR, "sampler": [None, "flow-unipc", "flow-dpm++2m", "flow-euler"]},
}


@pytest.mark.parametrize("name", COLUMNS)
def test_a_job_gives_the_pixels_of_diffusers_and_the_familys_columns(
    name: str, model: Callable[..., Model], write_manifest: Write, write_job: Write, tmp_path: Path
) -> None:
    one, columns = model(name), COLUMNS[name]
    shared = {"prompt": ["a red circle", "two blue squares", "a star", "a sky"], "seed": [3, None, 4, 5], "category": list("abcd")}
    sizes = {"height": [32, 64 if name == "sana" else 40, 32, 32], "width": [32] * 4, "num_inference_steps": [3, 4, 3, 3]}
    manifest = write_manifest({**shared, **sizes, **columns})
    summary = renderfarm.run(write_job(manifest, model=str(one.folder), workers={"batch_size": B}), engine="inline")
    out = tmp_path / "out"
    check_complete(out, {(number, 0) for number in range(4)})
    assert (summary.images, summary.errors, summary.exit_code) == (3, 1, 3)
    (error,) = error_rows(out)
    assert (error["row"], error["error_class"]) == (2, "InvalidInput")
    assert "; use '" in error["error_message"]
    own = [column for column in ("prompt_2", "prompt_3", "negative_prompt_2", "true_cfg_scale") if column in columns]
    assert [column for column in pq.read_schema(tables(out)[0]).names if column in {*own, "category"}] == [*own, "category"]
    for made in image_rows(out):
        number = made["row"]
        given = {column: columns[column][number] for column in (*own, *(["negative_prompt"] if "negative_prompt" in columns else []))}
        assert {column: made[column] for column in given} == given
        arguments = {key: made[key] for key in ("prompt", "seed", "height", "width", "num_inference_steps", "guidance_scale", "sampler")}
        expected = one.reference(row(**arguments, **given))
        assert made["pixel_sha256"] == hashlib.sha256(expected.tobytes()).hexdigest(), made


@pytest.mark.parametrize("name", only(["sd3"], [*(name for name in COLUMNS if name != "flux-schnell"), "generic"]))
def test_twelve_rows_through_ray_have_the_same_pixels_with_one_worker_and_with_two(
    name: str, tiny_model: Callable[[str], Path], local_ray: None, write_manifest: Write, write_job: Write, tmp_path: Path
) -> None:
    columns = {column: values * 3 for column, values in COLUMNS.get(name, NEGATIVE).items() if column != "sampler"}
    made = {
        "prompt": [f"{'a red circle ' * (k % 4)}number {k}" for k in range(12)],
        "num_inference_steps": [2, 3] * 6,
        "guidance_scale": [1.0, 4.0, 2.5, 4.0] * 3,
        "height": [32] * 8 + [64] * 4,
        "width": [32] * 12,
    }
    if name == "qwen-image":
        del made["guidance_scale"]
    rendered_by_one_and_by_two(write_job, write_manifest({**made, **columns}), tmp_path, model=str(tiny_model(name)))


def rendered_by_one_and_by_two(write_job: Write, manifest: Path, tmp_path: Path, **changes: Any) -> list[dict[str, Any]]:
    """The rows of the table, after 12 rows came out of Ray with the same pixels from one worker and from two."""
    found: list[list[dict[str, Any]]] = []
    for workers, part_rows in ((1, 5), (2, 2)):
        out = tmp_path / f"out-{workers}"
        pool = {"min": 1, "max": workers, "batch_size": B}
        job = write_job(manifest, workers=pool, output={"path": str(out), "part_rows": part_rows}, **changes)
        assert renderfarm.run(job, engine="ray").images == 12
        check_complete(out, {(number, 0) for number in range(12)})
        found.append(sorted(image_rows(out), key=lambda record: int(record["row"])))
    one, two = ([record["pixel_sha256"] for record in records] for records in found)
    assert one == two
    assert len(set(one)) == 12
    return found[0]


SHORT = {"height": 32, "width": 32, "num_inference_steps": 2}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sdxl", "qwen-image"])  # slots and calls
def test_twelve_rows_with_adapters_of_their_own_have_the_same_pixels_through_ray(
    name: str, tiny_model: Callable[[str], Path], local_ray: None, write_manifest: Write, write_job: Write, tmp_path: Path
) -> None:
    folder = tiny_model(name)
    files = {one: str(make_adapter(CLASSES[name], folder, tmp_path / f"{one}.safetensors", k)) for k, one in enumerate(("one", "two"))}
    # each seed with every set, so that equal pixels of two sets would show
    rows = {"prompt": ["a red circle"] * 12, "seed": [k // 4 for k in range(12)], "adapters": ["none", None, "two:0.5", "two, one:-1"] * 3}
    model = {"id": str(folder), "adapters": files}
    made = rendered_by_one_and_by_two(write_job, write_manifest(rows), tmp_path, model=model, render={**SHORT, "adapters": "one"})
    assert [record["adapters"] for record in made[:4]] == ["none", "one:1.0", "two:0.5", "one:-1.0,two:1.0"]


@pytest.mark.slow
def test_twelve_rows_with_weighted_and_long_prompts_have_the_same_pixels_through_ray(
    tiny_model: Callable[[str], Path], local_ray: None, write_manifest: Write, write_job: Write, tmp_path: Path
) -> None:
    texts = ["a red circle", "a (red:1.6) circle", "a red ((circle))", "a [red] circle, " + "many blue squares, " * 30]
    rows = {"prompt": texts * 3, "negative_prompt": [None] * 6 + ["(grey:1.4)"] * 6, "seed": [k // 4 for k in range(12)]}
    render = {**SHORT, "prompt_weighting": "a1111"}
    made = rendered_by_one_and_by_two(write_job, write_manifest(rows), tmp_path, model=str(tiny_model("sd")), render=render)
    assert [record["prompt"] for record in made] == rows["prompt"]
    assert not any(record["prompt_truncated"] for record in made)


def test_a_class_that_is_not_in_the_table_is_called_as_it_is_and_said_not_to_be_compared(
    tiny_model: Callable[[str], Path], write_manifest: Write, write_job: Write, tmp_path: Path
) -> None:
    folder = tiny_model("generic")
    columns = {
        "prompt": ["a star", "a sky", "two"],
        "seed": [3, 4, 5],
        "negative_prompt": [None, "grey", None],
        "sampler": [None, None, "euler"],
    }
    path = write_job(
        write_manifest(columns), model=str(folder), workers={"batch_size": B}, render={"height": 32, "width": 32, "num_inference_steps": 3}
    )
    summary = renderfarm.run(path, engine="inline")
    check_complete(tmp_path / "out", {(number, 0) for number in range(3)})
    assert (summary.images, summary.errors) == (2, 1)
    assert "renders with its own scheduler; leave sampler out" in error_rows(tmp_path / "out")[0]["error_message"]
    pipe = plain_pipeline(diffusers.PixArtAlphaPipeline, folder)
    for made in image_rows(tmp_path / "out"):
        images = pipe(
            prompt=[made["prompt"]] * B, negative_prompt=[made["negative_prompt"] or ""] * B, height=32, width=32, num_inference_steps=3,
            guidance_scale=made["guidance_scale"], generator=[torch.Generator().manual_seed(made["seed"]) for _ in range(B)],
            use_resolution_binning=False, clean_caption=False,
        ).images  # fmt: skip
        assert made["pixel_sha256"] == hashlib.sha256(np.asarray(images[0]).tobytes()).hexdigest()
    card = (tmp_path / "out/README.md").read_text()
    assert "PixArtAlphaPipeline was not compared" in card


def test_a_class_that_is_not_in_the_table_blends_seeds_where_its_call_takes_noise(
    tiny_model: Callable[[str], Path], write_manifest: Write, write_job: Write, tmp_path: Path
) -> None:
    folder = tiny_model("generic")
    columns = {"prompt": ["a star"] * 5, "seed": [5, 9, 5, 5, 5], "seed_b": [None, None, 9, 9, 9], "blend": [None, None, 0.0, 0.25, 1.0]}
    job = write_job(write_manifest(columns), model=str(folder), workers={"batch_size": B}, render=SHORT)
    assert renderfarm.run(job, engine="inline").images == 5
    made = [record["pixel_sha256"] for record in sorted(image_rows(tmp_path / "out"), key=lambda record: int(record["row"]))]
    assert (made[2], made[4]) == (made[0], made[1])
    pipe = plain_pipeline(diffusers.PixArtAlphaPipeline, folder)
    side = SHORT["height"] // pipe.vae_scale_factor
    a, b = (torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(seed)).double() for seed in (5, 9))
    angle = torch.arccos((a * b).sum() / (a.norm() * b.norm()))
    between = ((torch.sin(0.75 * angle) * a + torch.sin(0.25 * angle) * b) / torch.sin(angle)).float()
    images = pipe(
        prompt=["a star"] * B, negative_prompt=[""] * B, latents=torch.cat([between] * B), **SHORT, use_resolution_binning=False,
        clean_caption=False, generator=[torch.Generator().manual_seed(5) for _ in range(B)],
    ).images  # fmt: skip
    assert made[3] == hashlib.sha256(np.asarray(images[0]).tobytes()).hexdigest()


@pytest.mark.parametrize("name", ["lcm", "flux2-dev"])
def test_a_negative_prompt_for_a_model_that_has_none_is_an_error_of_its_row(
    name: str, model: Callable[..., Model], write_manifest: Write, write_job: Write, tmp_path: Path
) -> None:
    folder = str(model(name).folder)
    manifest = write_manifest({"prompt": ["a", "b", "c"], "negative_prompt": ["d", None, ""], "seed": [1, 2, 3]})
    size = {"height": 32, "width": 32, "num_inference_steps": 2}
    job = write_job(manifest, model=folder, render=size)
    summary = renderfarm.run(job, engine="inline")
    assert (summary.images, summary.errors) == (2, 1)
    assert "column 'negative_prompt' is the argument negative_prompt, which" in "".join(summary.warnings)
    (error,) = error_rows(tmp_path / "out")
    assert (error["row"], error["error_class"]) == (0, "InvalidInput")
    assert error["error_message"].startswith("negative_prompt is not an argument of ")
    assert ", prompt," in error["error_message"].partition("Legal: ")[2]
    with pytest.raises(InvalidJob, match="negative_prompt is not an argument of this model"):
        renderfarm.run(write_job(manifest, model=folder, render={**size, "negative_prompt": "b"}), engine="inline")


def test_guidance_that_qwen_image_would_ignore_is_an_error_of_its_row_and_says_what_guides_it(
    model: Callable[..., Model], write_manifest: Write, write_job: Write, tmp_path: Path
) -> None:
    one, size = model("qwen-image"), {"height": 32, "width": 32, "num_inference_steps": 2}
    rows = {"prompt": ["a", "b", "c"], "seed": [1, 2, 3], "guidance_scale": [None, 5.0, None], "true_cfg_scale": [None, None, 3.0]}
    manifest = write_manifest({**rows, "negative_prompt": ["d"] * 3})
    summary = renderfarm.run(write_job(manifest, model=str(one.folder), render=size, workers={"batch_size": B}), engine="inline")
    assert (summary.images, summary.errors) == (2, 1)
    assert "guided by true_cfg_scale and a negative_prompt" in "".join(summary.warnings)
    (error,) = error_rows(tmp_path / "out")
    assert (error["row"], error["error_class"]) == (1, "InvalidInput")
    assert error["error_message"].startswith(
        "guidance_scale is not an argument of QwenImagePipeline in text-to-image, which is guided by true_cfg_scale and a negative_prompt: "
    )
    for made in image_rows(tmp_path / "out"):
        arguments = {key: made[key] for key in ("prompt", "negative_prompt", "seed", "true_cfg_scale", "guidance_scale", "sampler", *size)}
        arguments["true_cfg_scale"] = arguments["true_cfg_scale"] or 4.0
        assert made["pixel_sha256"] == hashlib.sha256(one.reference(row(**arguments)).tobytes()).hexdigest()
    with pytest.raises(InvalidJob, match="guidance_scale is not an argument of this model, which is guided by true_cfg_scale"):
        renderfarm.run(write_job(manifest, model=str(one.folder), render={**size, "guidance_scale": 4.0}), engine="inline")


def test_a_qwen_image_that_was_distilled_to_read_its_guidance_takes_it(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model("qwen-image"), tmp_path / "model")
    assert "guidance_scale" not in describe(ModelSpec(id=str(folder))).arguments
    config = folder / "transformer/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"guidance_embeds": True}))
    assert "guidance_scale" in describe(ModelSpec(id=str(folder))).arguments
