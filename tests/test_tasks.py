"""Image-to-image and inpainting: the pixels of diffusers' own pipelines, from files, bytes and URLs that are checked first."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from struct import pack
from typing import Any

import diffusers
import families
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from checker import check_complete, error_rows, image_rows
from covering import covering, only
from oracle import DTYPES, LEGAL, B, pixels, plain_pipeline, reference, row
from pictures_given import encoded, mask, picture
from PIL import Image

import renderfarm
from renderfarm.config import Inputs, ManifestSpec, ModelSpec, Workers
from renderfarm.errors import InvalidInput, InvalidJob
from renderfarm.inputs import Fetcher
from renderfarm.jobfile import load_job
from renderfarm.models.catalog import describe, for_task
from renderfarm.models.families import FAMILIES
from renderfarm.models.load import load_model
from renderfarm.pictures import decode
from renderfarm.preparation import prepare
from renderfarm.records import InputImage
from renderfarm.slots import SlotLoop
from renderfarm.validation import validate_rows
from renderfarm.verification import Choice, verify

Write = Callable[..., Path]

TASKS = ("image-to-image", "inpainting")
CLASSES: dict[tuple[str, str], Any] = {
    ("sd", "image-to-image"): diffusers.StableDiffusionImg2ImgPipeline,
    ("sd", "inpainting"): diffusers.StableDiffusionInpaintPipeline,
    ("lcm", "image-to-image"): diffusers.LatentConsistencyModelImg2ImgPipeline,
    ("sdxl", "image-to-image"): diffusers.StableDiffusionXLImg2ImgPipeline,
    ("sdxl", "inpainting"): diffusers.StableDiffusionXLInpaintPipeline,
    ("sd3", "image-to-image"): diffusers.StableDiffusion3Img2ImgPipeline,
    ("sd3", "inpainting"): diffusers.StableDiffusion3InpaintPipeline,
    ("flux-dev", "image-to-image"): diffusers.FluxImg2ImgPipeline,
    ("flux-dev", "inpainting"): diffusers.FluxInpaintPipeline,
    ("flux2-klein", "inpainting"): diffusers.Flux2KleinInpaintPipeline,
    ("qwen-image", "image-to-image"): diffusers.QwenImageImg2ImgPipeline,
    ("qwen-image", "inpainting"): diffusers.QwenImageInpaintPipeline,
    ("z-image", "image-to-image"): diffusers.ZImageImg2ImgPipeline,
    ("z-image", "inpainting"): diffusers.ZImageInpaintPipeline,
    ("deepfloyd", "image-to-image"): diffusers.IFImg2ImgPipeline,
    ("deepfloyd", "inpainting"): diffusers.IFInpaintingPipeline,
}


@pytest.mark.parametrize(("name", "task", "dtype"), covering([(*key, dtype) for key in CLASSES for dtype in DTYPES], together=2))
def test_each_row_gets_the_pixels_that_diffusers_gives_it_alone(
    name: str, task: str, dtype: str, tiny_model: Callable[[str], Path], record_property: Callable[[str, str], None]
) -> None:
    record_property("compared", CLASSES[name, task].__name__)
    folder, inpaint = tiny_model(name), task == "inpainting"
    info = for_task(describe(ModelSpec(id=str(folder))), ("image", "mask_image") if inpaint else ("image",))
    assert (info.task, info.pipeline_class) == (task, CLASSES[name, task].__name__)
    rows = []
    samplers = [sampler for sampler in LEGAL[name] if sampler not in info.refused_samplers]
    for number in range(10):
        kind = number % 8  # the last two are mates of the first two, in calls that they share
        values: dict[str, Any] = {"prompt": f"star {number}" + " and so on" * (kind % 3 * 5), "strength": (0.5, 0.8, 1.0)[kind % 3]}
        values |= {"num_inference_steps": 4, "guidance_scale": (4.0, 1.0)[kind % 2], "sampler": samplers[kind * 3 % len(samplers)]}
        if name != "lcm" and kind % 4 == 0:
            values["negative_prompt"] = "a square"
        if name in ("flux-dev", "qwen-image"):
            values["true_cfg_scale"] = (2.0, 1.0)[kind % 3 % 2]
        size = (32, 40) if kind > 5 else (32, 32)
        images = {"image": picture(number, size), **({"mask_image": mask(size, inverted=number > 7)} if inpaint else {})}
        given = {argument: InputImage(None, encoded(image)) for argument, image in images.items()}
        rows.append((row(number, height=size[1], width=size[0], **values, **given), images))
    loop = SlotLoop(lambda: load_model(info, Workers(batch_size=B, dtype=dtype)))  # type: ignore[arg-type]
    try:
        ours = pixels(loop.submit([wanted for wanted, _ in rows]))
    finally:
        loop.close()
    absent = {"safety_checker": None} if name in ("sd", "lcm", "deepfloyd") else {}
    pipe = plain_pipeline(CLASSES[name, task], folder, dtype, **absent)
    for (wanted, images), made in zip(rows, ours, strict=True):
        np.testing.assert_array_equal(made, reference(pipe, wanted, **images), err_msg=str(wanted))
    assert len({made.tobytes() for made in ours}) == len(rows)


def test_deepfloyd_paints_the_size_that_is_asked_for_and_not_the_one_that_its_call_would_make_of_the_image(
    tiny_model: Callable[[str], Path],
) -> None:
    """Its calls make Pillow's images smaller, and take arrays as they are."""
    folder = tiny_model("deepfloyd")
    info = for_task(describe(ModelSpec(id=str(folder))), ("image", "mask_image"))
    images = {"image": picture(1, (64, 48)), "mask_image": mask((64, 48))}
    given: dict[str, Any] = {name: InputImage(None, encoded(image)) for name, image in images.items()}
    wanted = row(1, sampler="ddpm", height=48, width=64, strength=0.7, **given)
    loop = SlotLoop(lambda: load_model(info, Workers(batch_size=B)))
    try:
        (made,) = pixels(loop.submit([wanted]))
    finally:
        loop.close()
    pipe = plain_pipeline(diffusers.IFInpaintingPipeline, folder, safety_checker=None)
    arrays = {
        "image": np.asarray(images["image"], np.float32) / 127.5 - 1,
        "mask_image": np.asarray(images["mask_image"], np.float32) / 255,
    }
    assert made.shape == (48, 64, 3)
    np.testing.assert_array_equal(made, reference(pipe, wanted, **arrays))
    assert reference(pipe, wanted, **images).shape == (32, 40, 3)


def test_an_image_that_klein_would_make_smaller_is_refused(tiny_model: Callable[[str], Path]) -> None:
    info = for_task(describe(ModelSpec(id=str(tiny_model("flux2-klein")))), ("image", "mask_image"))
    model = load_model(info, Workers(batch_size=B))
    image = InputImage(None, encoded(picture()))
    assert model.start(row(sampler="flow-euler", height=1024, width=1024, image=image), [])
    with pytest.raises(InvalidInput, match="asks for 1040×1024 pixels, and this model's inpainting paints 1,048,576 at most"):
        model.start(row(sampler="flow-euler", height=1024, width=1040, image=image), [])


def struct(*values: tuple[bytes | None, str | None]) -> pa.Array:
    return pa.array([{"bytes": data, "path": path} for data, path in values], pa.struct({"bytes": pa.binary(), "path": pa.string()}))


def columns(count: int, **more: Any) -> dict[str, Any]:
    return {"prompt": [f"number {k}" for k in range(count)], "seed": list(range(count)), **more}


@pytest.fixture
def job(write_job: Write, tiny_model: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    def write(values: dict[str, Any], **changes: Any) -> Path:
        (tmp_path / "in").mkdir(exist_ok=True)
        pq.write_table(pa.table(values), tmp_path / "in/m.parquet")
        manifest = changes.pop("manifest", tmp_path / "in/m.parquet")
        return write_job(manifest, **{"model": str(tiny_model("sd")), "workers": {"batch_size": B}, **changes})

    return write


def test_paths_bytes_and_hugging_face_images_give_the_same_pixels_and_verify_needs_the_output_only(
    job: Callable[..., Path], tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    data = encoded(picture(1, (40, 32)))
    (tmp_path / "in/a").mkdir(parents=True)
    (tmp_path / "in/a/one.png").write_bytes(data)
    found = []
    for number, images in enumerate(
        (pa.array(["a/one.png", "a/../a/one.png"]), pa.array([data, data]), struct((data, "any name"), (None, "a/one.png")))
    ):
        out = tmp_path / f"out{number}"
        path = job(columns(2, image=images, strength=[0.5, None]), output={"path": str(out)}, render={"sampler": "euler"})
        assert renderfarm.run(path, engine="inline").exit_code == 0
        check_complete(out, {(0, 0), (1, 0)})
        found.append([(record["pixel_sha256"], record["init_image_sha256"], record["strength"]) for record in image_rows(out)])
        assert [(record["height"], record["width"]) for record in image_rows(out)] == [(32, 40)] * 2
    assert found[0] == found[1] == found[2]
    assert [strength for _, _, strength in found[0]] == [0.5, 0.8]
    assert {digest for _, digest, _ in found[0]} == {hashlib.sha256(data).hexdigest()}
    assert [record["init_image"] for record in image_rows(tmp_path / "out2")] == [None, "a/one.png"]

    (tmp_path / "in/a/one.png").unlink()
    verified = verify(str(tmp_path / "out0"), Choice(rows="0-1"), model=str(tiny_model("sd")))
    assert [again.result for again in verified.again] == ["identical", "identical"]


BAD = {
    "gone.png": r"image 'gone.png' does not exist; paths start at in/",
    "../job.yaml": r"image '../job.yaml' leads out of in/; put the file inside, or give inputs.folder",
    "/etc/hostname": r"leads out of in/",
    "link.png": r"leads out of in/",
    "loop.png": r"'loop.png' (is a link that leads to itself; put the file there|cannot be read: Too many levels)",
    "bomb.png": r"image 'bomb.png' has more than 67,108,864 pixels in all; make it smaller",
    "vast.png": r"image 'vast.png' has 9000×9000 pixels; the limit is 67,108,864 in all: make it smaller",
    "text.png": r"image 'text.png' is no PNG, JPEG, WEBP file; convert it",
    "cut.png": r"image 'cut.png' cannot be decoded \(.*\); it may be cut off",
    "gif.png": r"is no PNG, JPEG, WEBP file",
    "deep.png": r"has pixels of mode I;16; save it with 8 bits a channel",
    "odd.png": r"height \(the image's\) is 36; it must be a multiple of 8 for this model: 32 or 40",
    "": r"image is null; a job for image-to-image needs one in every row",
    "large.png": r"large.png is larger than 0.01 MiB; make it smaller, or raise inputs.max_mebibytes",
    "https://example.org/a.png": r"https://example.org/a.png is not a URL that the job allows; add its beginning to inputs.urls",
    "file:///etc/hostname": r"file:///etc/hostname is not a URL that the job allows",
    "a\x00b": r"cannot be read",
}


def test_an_image_that_cannot_be_used_costs_its_row_and_says_what_to_do(job: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    good = encoded(picture(1))
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8))
    files = {
        "good.png": good, "text.png": b"no image", "cut.png": good[: len(good) // 2], "gif.png": encoded(picture(1), "GIF"),
        "deep.png": encoded(Image.fromarray(np.zeros((32, 32), np.uint16))), "odd.png": encoded(picture(1, (32, 36))),
        "large.png": encoded(noise),
    }  # fmt: skip
    for name, data in files.items():
        (folder / name).write_bytes(data)
    (tmp_path / "outside.png").write_bytes(good)
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    (folder / "loop.png").symlink_to("loop.png")
    for name, side in (("bomb.png", 20_000), ("vast.png", 9_000)):
        (folder / name).write_bytes(vast_png(side))
    path = job(columns(len(BAD) + 1, image=["good.png", *BAD]), inputs={"max_mebibytes": 0.01})
    validated = validate_rows(prepare(load_job(path)))
    assert not (tmp_path / "out").exists()
    summary = renderfarm.run(path, engine="inline")
    assert (summary.images, summary.errors, summary.exit_code) == (1, len(BAD), 3)
    for error, reason in zip(sorted(error_rows(tmp_path / "out"), key=lambda error: error["row"]), BAD.values(), strict=True):
        assert error["error_class"] == "InvalidInput"
        assert re.search(reason, error["error_message"]), error
    assert validated.problems == as_validated(tmp_path / "out")
    assert (validated.rows, validated.images, validated.bad_rows) == (len(BAD) + 1, 1, len(BAD))


def vast_png(side: int) -> bytes:
    """A file that says to be a grey picture of so many pixels, and holds few of them."""
    chunks = (b"IHDR" + pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0), b"IDAT" + zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + b"".join(pack(">I", len(chunk) - 4) + chunk + pack(">I", zlib.crc32(chunk)) for chunk in chunks)


def as_validated(out: Path) -> list[str]:
    """What `validate` is to say before rows end as these errors."""
    return [f"m.parquet, row {error['row']}: {error['error_message']}" for error in sorted(error_rows(out), key=lambda error: error["row"])]


def test_validate_judges_urls_without_fetching_them_and_looks_at_what_lies_beside(job: Callable[..., Path], tmp_path: Path) -> None:
    beginning = "http://127.0.0.1:9/pub/"  # nobody listens there
    images = [f"{beginning}a.png", f"{beginning}../a.png", f"{beginning}\n", "http://127.0.0.1:x/a", f"{beginning}b.png"]
    masks = [encoded(mask()), encoded(mask()), encoded(mask()), encoded(mask()), b"no picture"]
    values = columns(5, image=images, mask_image=masks, height=[32] * 5, width=[32] * 5)
    found = validate_rows(prepare(load_job(job(values, inputs={"urls": [beginning]}, render={"num_images_per_prompt": 3}))))
    assert found.problems == [
        "m.parquet, row 1: image http://127.0.0.1:9/pub/../a.png is not a URL that the job allows; add its beginning to inputs.urls",
        "m.parquet, row 2: image http://127.0.0.1:9/pub/\n is no URL; correct it",
        "m.parquet, row 3: image http://127.0.0.1:x/a is no URL; correct it",
        "m.parquet, row 4: the embedded mask_image is no PNG, JPEG, WEBP file; convert it",
    ]
    assert (found.rows, found.images, dict(found.classes)) == (5, 3, {"InvalidInput": 4})


def test_validate_sees_many_rows_images_a_few_rows_at_a_time(job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    looked = Fetcher.problems
    monkeypatch.setattr(Fetcher, "problems", lambda self, samples: seen.append(len(samples)) or looked(self, samples))
    bad = encoded(picture(1, (36, 36)))
    images = [bad if k % 50 == 7 else encoded(picture(k)) for k in range(150)]
    found = validate_rows(prepare(load_job(job(columns(150, image=images)))))
    assert [problem.partition(":")[0] for problem in found.problems] == [f"m.parquet, row {k}" for k in (7, 57, 107)]
    assert (found.rows, found.images, max(seen)) == (150, 147, 32)


@pytest.mark.parametrize(
    ("more", "render", "reason"),
    [
        ({"strength": [0.2]}, {"num_inference_steps": 4}, "strength 0.2 of 4 steps runs none of them; give at least 0.25"),
        ({"strength": [1.5]}, {}, "strength is 1.5; it must be above 0 and at most 1"),
        ({"strength": [0.0]}, {}, "strength is 0.0"),
        ({"height": [64], "width": [64]}, {}, "image has 32×32 pixels and the row asks for 64×64; leave height and width out, resize it"),
        ({"mask_image": [encoded(mask((40, 32)))]}, {}, "mask_image has 40×32 pixels and image 32×32; make them one size"),
        ({"mask_image": [None]}, {}, "mask_image is null; a job for inpainting needs one"),
    ],
)
def test_arguments_that_do_not_fit_an_image_are_error_rows(
    more: dict[str, Any], render: dict[str, Any], reason: str, job: Callable[..., Path], tmp_path: Path
) -> None:
    if "mask_image" in more:
        more = {"mask_image": pa.array(more["mask_image"], pa.binary())}
    path = job(columns(1, image=[encoded(picture())], **more), render=render)
    validated = validate_rows(prepare(load_job(path)))
    summary = renderfarm.run(path, engine="inline")
    assert (summary.images, summary.errors) == (0, 1)
    assert reason in error_rows(tmp_path / "out")[0]["error_message"]
    assert validated.problems == as_validated(tmp_path / "out")


@pytest.mark.parametrize("name", ["sd3", "flux-dev", "qwen-image", "z-image"])
def test_a_strength_that_runs_no_step_is_an_error_of_its_row_where_calls_round_up(
    name: str, job: Callable[..., Path], tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    values = columns(2, image=[encoded(picture())] * 2, strength=[1e-17, 0.001])
    path = job(values, model=str(tiny_model(name)), render={"num_inference_steps": 4, "height": 32, "width": 32})
    assert renderfarm.run(path, engine="inline").images == 1
    (error,) = error_rows(tmp_path / "out")
    assert (error["row"], error["error_class"]) == (0, "InvalidInput")
    assert error["error_message"] == "strength 1e-17 of 4 steps runs none of them; give at least 0.001"


def with_alpha(picture: Image.Image, lowest: int) -> Image.Image:
    alpha = Image.new("L", picture.size, 255)
    alpha.putpixel((3, 3), lowest)
    picture.putalpha(alpha)
    return picture


def test_a_mask_that_is_transparent_somewhere_is_refused_and_an_opaque_alpha_changes_nothing() -> None:
    palette = mask().convert("P")
    transparent = {
        "RGBA": encoded(with_alpha(mask().convert("RGB"), 254)),
        "LA": encoded(with_alpha(mask(), 0)),
        "P": encoded(palette, transparency=palette.getpixel((0, 0))),
        "L": encoded(mask(), transparency=0),
        "WEBP": encoded(with_alpha(mask().convert("RGB"), 0), "WEBP", lossless=True),
    }
    for data in transparent.values():
        with pytest.raises(InvalidInput, match="the embedded mask_image has transparent pixels; give a mask without alpha"):
            decode(InputImage(None, data), "mask_image")
        assert decode(InputImage(None, data), "image").mode == "RGB"
    for opaque in (with_alpha(mask().convert("RGB"), 255), with_alpha(mask(), 255)):
        np.testing.assert_array_equal(decode(InputImage(None, encoded(opaque)), "mask_image"), mask())


def test_images_are_turned_as_their_files_say_and_resized_as_the_job_says(job: Callable[..., Path], tmp_path: Path) -> None:
    upright = picture(3, (48, 32))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it a quarter clockwise
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    images = [encoded(upright), encoded(turned, exif=exif)]
    assert renderfarm.run(job(columns(2, image=images) | {"seed": [1, 1], "prompt": ["a", "a"]}), engine="inline").images == 2
    first, second = image_rows(tmp_path / "out")
    assert (first["width"], first["height"], first["pixel_sha256"]) == (48, 32, second["pixel_sha256"])
    for resize, expected in (("crop", upright.crop((8, 0, 40, 32))), ("stretch", upright.resize((32, 32), Image.Resampling.LANCZOS))):
        found = []
        for number, data in enumerate((images[0], encoded(expected))):
            out = tmp_path / f"{resize}{number}"
            size, output = {"height": 32, "width": 32}, {"path": str(out)}
            path = job(columns(1, image=[data]), render=size, inputs={"resize": resize}, output=output)
            assert renderfarm.run(path, engine="inline").images == 1
            found.append(image_rows(out)[0]["pixel_sha256"])
        assert found[0] == found[1]


def test_the_classes_compared_here_are_those_of_the_table() -> None:
    offered = {how.pipeline_class for family in FAMILIES.values() for name, how in family.tasks.items() if name in TASKS}
    assert offered == {kind.__name__ for kind in CLASSES.values()}


def test_columns_that_make_no_task_are_refused_before_work_starts(job: Callable[..., Path], tiny_model: Callable[[str], Path]) -> None:
    data = encoded(picture())
    for values, model, reason in (
        (columns(1, mask_image=[data]), "sd", "mask_image needs an image beside it"),
        (columns(1, image=[data]), "pixart-sigma", "`image`, which this model does not take"),
        (columns(1, image=[7]), "sd", "a path or URL, a file's bytes"),
    ):
        with pytest.raises(InvalidJob, match=reason):
            renderfarm.run(job(values, **({} if model == "sd" else {"model": str(tiny_model(model))})), engine="inline")


def test_an_argument_that_is_another_tasks_is_an_error_of_its_row(job: Callable[..., Path], tmp_path: Path) -> None:
    data = [encoded(picture())] * 2
    for number, (values, reason) in enumerate((
        (columns(2, image=data, seed_b=[1, None], blend=[0.5, None]), "seed_b is not an argument of StableDiffusionImg2ImgPipeline"),
        (columns(2, strength=[0.5, None]), "strength is not an argument of StableDiffusionPipeline in text-to-image"),
    )):  # fmt: skip
        out = tmp_path / f"out{number}"
        summary = renderfarm.run(job(values, output={"path": str(out)}), engine="inline")
        assert (summary.images, summary.errors) == (1, 1)
        assert reason in error_rows(out)[0]["error_message"]


def test_paths_of_manifests_in_several_folders_need_a_folder_to_start_from(job: Callable[..., Path], tmp_path: Path) -> None:
    """Each folder has an `x.png`, and none of them may stand for another's."""
    files = []
    for number in range(2):
        folder = tmp_path / f"d{number}"
        folder.mkdir()
        (folder / "x.png").write_bytes(encoded(picture(number)))
        pq.write_table(pa.table({"prompt": ["a", "b"], "image": [f"d{number}/x.png", None]}), folder / "m.parquet")
        files.append(str(folder / "m.parquet"))
    path = job(columns(1, image=["x.png"]), output={"path": str(tmp_path / "o1")})
    for folder, images in ((None, 0), (str(tmp_path), 2)):
        changed = load_job(path, out=str(tmp_path / f"out-{images}"))
        changed = changed.model_copy(update={"manifest": ManifestSpec(path=files), "inputs": Inputs(folder=folder)})
        summary = renderfarm.run(changed, engine="inline")
        assert (summary.images, summary.errors) == (images, 4 - images)
    messages = [record["error_message"] for record in error_rows(tmp_path / "out-0")]
    assert "lie in no one folder here; give inputs.folder" in messages[0]
    assert len({record["pixel_sha256"] for record in image_rows(tmp_path / "out-2")}) == 2


@pytest.mark.parametrize("of", [{"path": pa.string()}, {"bytes": pa.binary()}, {"bytes": pa.binary(), "path": pa.string()}], ids=str)
def test_images_as_structs_may_lack_a_field(of: dict[str, pa.DataType], job: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/x.png").write_bytes(encoded(picture()))
    values = {"bytes": encoded(picture()), "path": "x.png"}
    images = pa.array([{name: values[name] for name in of}, dict.fromkeys(of)], pa.struct(list(of.items())))
    summary = renderfarm.run(job(columns(2, image=images)), engine="inline")
    assert (summary.images, summary.errors) == (1, 1)


@pytest.mark.parametrize("of", [{"bytes": pa.list_(pa.int64())}, {"bytes": pa.int64(), "path": pa.string()}, {"url": pa.string()}], ids=str)
def test_structs_of_other_fields_are_no_images(of: dict[str, pa.DataType], job: Callable[..., Path]) -> None:
    images = pa.array([dict.fromkeys(of)], pa.struct(list(of.items())))
    with pytest.raises(InvalidJob, match="image must be a path or URL, a file's bytes"):
        renderfarm.run(job(columns(1, image=images)), engine="inline")


def test_what_is_in_the_folder_and_no_picture_is_not_copied_into_the_dataset(job: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/.env").write_text("SECRET=hunter2")
    os.mkfifo(tmp_path / "in/pipe")
    damaged = Image.Exif()
    damaged[0x0112] = 6
    file = bytearray(encoded(picture(), "JPEG", exif=damaged))
    scans = encoded(picture(), "JPEG") + b"\xff\xda" * 200
    images = pa.array([{"bytes": None, "path": ".env"}, {"bytes": None, "path": "pipe"}, {"bytes": bytes(scans), "path": None}])
    summary = renderfarm.run(job(columns(3, image=images)), engine="inline")
    assert (summary.images, summary.errors) == (0, 3)
    messages = [error["error_message"] for error in sorted(error_rows(tmp_path / "out"), key=lambda error: error["row"])]
    assert "'.env' is no PNG, JPEG, WEBP file" in messages[0]
    assert "'pipe' is no file" in messages[1]
    assert "more than 100 scans" in messages[2]
    assert not list((tmp_path / "out").rglob("inputs/*"))
    for k in range(20, 60):  # damage in the EXIF part raises many kinds of errors, or none
        broken = bytes(file[:k]) + bytes([file[k] ^ 0xFF]) + bytes(file[k + 1 :])
        with contextlib.suppress(InvalidInput):
            decode(InputImage(None, broken))


def test_the_first_worker_measures_with_images_too(job: Callable[..., Path], tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    for name in ("sd", "z-image"):
        out = tmp_path / name
        size, output = {"height": 32, "width": 32}, {"path": str(out), "part_rows": "auto"}
        path = job(columns(4, image=[encoded(picture())] * 4), model=str(tiny_model(name)), render=size, output=output)
        assert renderfarm.run(path, engine="inline").images == 4
        assert (out / "_renderfarm/grid.json").exists()


def test_a_folder_in_the_environment_a_glob_and_a_folder_that_is_not_there(
    job: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.png").write_bytes(encoded(picture()))
    monkeypatch.setenv("DATA", str(tmp_path / "in"))
    places: list[dict[str, Any]] = [{"manifest": "${DATA}/m.parquet"}, {"manifest": f"{tmp_path}/i*/m.parquet"}]
    for k, changes in enumerate([*places, {"inputs": {"folder": "${DATA}"}}]):
        path = job(columns(1, image=["a.png"]), output={"path": str(tmp_path / f"o{k}")}, **changes)
        assert renderfarm.run(path, engine="inline").images == 1
    with pytest.raises(InvalidJob, match=r"inputs\.folder: .*gone is no folder here"):
        renderfarm.run(job(columns(1, image=["a.png"]), inputs={"folder": "gone"}), engine="inline")


def test_verify_says_which_kept_file_is_missing(job: Callable[..., Path], tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    values = columns(1, image=[encoded(picture())]) | {"photo": ["mine"], "input_image": ["also mine"]}
    assert renderfarm.run(job(values, render={"sampler": "dpm++2m"}), engine="inline").images == 1
    (record,) = image_rows(tmp_path / "out")
    assert (record["photo"], record["input_image"], record["init_image"]) == ("mine", "also mine", None)
    verified = verify(str(tmp_path / "out"), Choice(rows="0"), model=str(tiny_model("sd")))
    assert not verified.profile_differences, "the profile is that of the run, whatever sampler rendered last"
    (kept,) = (tmp_path / "out/_renderfarm/inputs").iterdir()
    kept.write_bytes(b"other")
    with pytest.raises(InvalidJob, match="is missing or damaged, and rows need it"):
        verify(str(tmp_path / "out"), Choice(rows="0"), model=str(tiny_model("sd")))


def test_a_safety_checker_is_not_silently_left_out(job: Callable[..., Path], tmp_path: Path) -> None:
    folder = families.save(families.checked(True), tmp_path / "checked")
    with pytest.raises(InvalidJob, match="its safety checker is not run for image-to-image here"):
        renderfarm.run(job(columns(1, image=[encoded(picture())]), model={"id": str(folder), "safety_checker": True}), engine="inline")


@pytest.mark.parametrize(
    ("name", "task"),
    only([("z-image", "inpainting")],  # test_companions has images in slots
         [key for key in CLASSES if key[0] != "deepfloyd"]),  # in test_companions, with its later stages
)  # fmt: skip
def test_twelve_rows_through_ray_have_the_same_pixels_with_one_worker_and_with_two(
    name: str, task: str, local_ray: None, tiny_model: Callable[[str], Path], job: Callable[..., Path], tmp_path: Path
) -> None:
    masks = {"mask_image": [encoded(mask())] * 12} if task == "inpainting" else {}
    values = columns(12, image=[encoded(picture(k)) for k in range(12)], strength=[0.6, 1.0] * 6, **masks)
    found = []
    for workers, part_rows in ((1, 5), (2, 2)):
        out = tmp_path / f"out-{workers}"
        output = {"path": str(out), "part_rows": part_rows}
        # the size is said, since a worker tries its device with a picture of the model's own, 1024 pixels for Z-Image
        render = {"num_inference_steps": 2, "height": 32, "width": 32} | ({"guidance_scale": 1.0} if name != "qwen-image" else {})
        path = job(values, model=str(tiny_model(name)), render=render, output=output)
        assert renderfarm.run(load_job(path, [f"workers.max={workers}"]), engine="ray").images == 12
        check_complete(out, {(number, 0) for number in range(12)})
        found.append({record["row"]: record["pixel_sha256"] for record in image_rows(out)})
    assert found[0] == found[1]
    assert len(set(found[0].values())) == 12
