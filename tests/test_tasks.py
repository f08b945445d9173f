"""Image-to-image and inpainting: the pixels of diffusers' own pipelines, from files, bytes and URLs that are checked first."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import socket
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from struct import pack
from threading import Event
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
from servers import answering

import renderfarm
from renderfarm.config import Inputs, Job, ManifestSpec, ModelSpec, Workers
from renderfarm.errors import Fatal, InvalidInput, InvalidJob, Transient
from renderfarm.inputs import FETCHED_AT_A_TIME, Fetcher, is_public
from renderfarm.jobfile import load_job
from renderfarm.models.catalog import describe, for_task
from renderfarm.models.families import FAMILIES
from renderfarm.models.load import load_model
from renderfarm.pictures import decode
from renderfarm.preparation import prepare
from renderfarm.records import InputImage, Sample
from renderfarm.slots import SlotLoop
from renderfarm.storage import open_store
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


class Site(BaseHTTPRequestHandler):
    image = encoded(picture(5))

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        status = {"/pub/gone": 404, "/pub/busy": 503, "/pub/nowhere": 302, "/pub/away": 302, "/pub/loop": 302, "/pub/inside": 302}.get(
            path, 200
        )
        self.send_response(status)
        if status == 302:
            self.send_header(
                "Location",
                {"/pub/away": "/secret/x", "/pub/loop": "/pub/loop", "/pub/inside": "/pub/ok.png", "/pub/nowhere": "http://["}[path],
            )
        self.end_headers()
        if path == "/pub/slow":
            for _ in range(200):
                with contextlib.suppress(ConnectionError):
                    self.wfile.write(b"x")
                time.sleep(0.05)
        elif status == 200:
            with contextlib.suppress(ConnectionError):  # who has read enough hangs up
                self.wfile.write(b"text" if path == "/pub/text" else self.image * (100_000 if path == "/pub/huge" else 1))

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def site() -> Iterator[str]:
    with answering(Site) as url:
        yield url


def fetch(tmp_path: Path, url: str, **inputs: Any) -> Any:
    allowed = Inputs.model_construct(**{**Inputs().model_dump(), "folder": str(tmp_path), "max_mebibytes": 1, **inputs})
    model = for_task(describe(ModelSpec(id="builtin:shapes")), ("image",))
    wanted = row(sampler="euler", strength=0.5, height=0, width=0, image=InputImage(url))
    (found,) = Fetcher(allowed, model, open_store(str(tmp_path / "o"))).fetch([wanted])
    return found


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


@pytest.mark.parametrize("sign", ["\t", "\n", "\r", "\x7f"])
def test_a_url_with_a_control_character_is_no_url(sign: str, site: str, tmp_path: Path) -> None:
    """Some of them are dropped by whoever parses it later, so that `\\t..` becomes a step up."""
    found = fetch(tmp_path, f"{site}/pub/{sign}../secret/x", urls=[f"{site}/pub/"], private_addresses=True)
    assert isinstance(found, InvalidInput)
    assert "is no URL" in str(found)


def test_a_row_s_copies_share_one_decoded_image(tmp_path: Path) -> None:
    fetcher, copies, other = copies_of_an_image(tmp_path)
    found: list[Any] = fetcher.fetch([*copies, other])
    first, second, third = found
    assert first.image.picture is second.image.picture
    assert (first.seed, second.seed) == (1, 2)
    assert third.image.picture.size == (64, 32)


def test_images_beyond_a_part_s_memory_stop_the_job_with_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetcher, copies, other = copies_of_an_image(tmp_path)
    monkeypatch.setattr("renderfarm.inputs.MAX_HELD_BYTES", 32 * 32 * 3 + len(Site.image))
    assert all(isinstance(found, Sample) for found in fetcher.fetch(copies))
    with pytest.raises(Fatal, match=r"lower output\.part_rows"):
        fetcher.fetch([*copies, other])


def test_files_are_let_go_as_soon_as_their_pictures_are_made_and_shared_ones_are_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part's photographs may be many times what is left of them at the rows' size."""
    fetcher, _, wanted = copies_of_an_image(tmp_path)
    (tmp_path / "mask.png").write_bytes(encoded(mask((64, 64))))
    sizes = []
    for number in range(40):
        noise = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        (tmp_path / f"{number}.png").write_bytes(encoded(Image.fromarray(noise)))
        sizes.append((tmp_path / f"{number}.png").stat().st_size)
    made, shared = 40 * 32 * 64 * 4, (tmp_path / "mask.png").stat().st_size
    limit = made + shared + FETCHED_AT_A_TIME * max(sizes)
    assert limit < sum(sizes)
    monkeypatch.setattr("renderfarm.inputs.MAX_HELD_BYTES", limit)
    read, asked = Fetcher._read, []
    monkeypatch.setattr(Fetcher, "_read", lambda self, source: asked.append(source) or read(self, source))
    samples = [replace(wanted, image=InputImage(f"{k}.png"), mask_image=InputImage("mask.png")) for k in range(40)]
    found: list[Any] = fetcher.fetch(samples)
    assert sorted(asked) == sorted(["mask.png", *(f"{k}.png" for k in range(40))])
    assert {one.image.data for one in found} == {one.mask_image.data for one in found} == {None}
    for number, one in enumerate(found):
        data = (tmp_path / f"{number}.png").read_bytes()
        assert one.image.sha256 == hashlib.sha256(data).hexdigest()
        assert (tmp_path / f"o/_renderfarm/inputs/{one.image.sha256}").read_bytes() == data


def copies_of_an_image(tmp_path: Path) -> tuple[Fetcher, list[Sample], Sample]:
    (tmp_path / "a.png").write_bytes(Site.image)
    model = for_task(describe(ModelSpec(id="builtin:shapes")), ("image",))
    inputs = Inputs.model_construct(**{**Inputs().model_dump(), "folder": str(tmp_path)})
    wanted = row(sampler="euler", strength=0.5, height=0, width=0, image=InputImage("a.png"))
    copies = [replace(wanted, seed=seed) for seed in (1, 2)]
    return (Fetcher(inputs, model, open_store(str(tmp_path / "o"))), copies, replace(wanted, height=32, width=64, resize="stretch"))


@pytest.mark.parametrize("page", ["/pub/ok.png", "/pub/inside", "/pub/ok.png?signature=abc"])
def test_a_url_that_the_job_allows_is_fetched(page: str, site: str, tmp_path: Path) -> None:
    found = fetch(tmp_path, site + page, urls=[f"{site}/pub/"], private_addresses=True)
    assert isinstance(found, Sample)
    assert found.image is not None
    assert (tmp_path / f"o/_renderfarm/inputs/{found.image.sha256}").read_bytes() == Site.image
    assert (found.height, found.width) == (32, 32)


@pytest.mark.parametrize(
    ("page", "reason"),
    [
        ("/secret/x", "is not a URL that the job allows"),
        ("/pub/../secret/x", "is not a URL that the job allows"),
        ("/pub/away", "/secret/x is not a URL that the job allows"),
        ("/pub/loop", "redirects more than 5 times"),
        ("/pub/gone", "answered 404 Not Found; correct the URL"),
        ("/pub/huge", "larger than 1 MiB"),
    ],
)
def test_a_url_that_leads_elsewhere_is_its_rows_error(page: str, reason: str, site: str, tmp_path: Path) -> None:
    found = fetch(tmp_path, site + page, urls=[f"{site}/pub/"], private_addresses=True)
    assert isinstance(found, InvalidInput)
    assert reason in str(found)


def test_a_private_address_is_refused_unless_the_job_says_so(site: str, tmp_path: Path) -> None:
    found = fetch(tmp_path, f"{site}/pub/ok.png", urls=[f"{site}/pub/"])
    assert "leads to a private address; give public URLs, or inputs.private_addresses: true" in str(found)


def test_a_server_that_is_busy_slow_or_away_is_tried_again_and_then_costs_its_row(
    site: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("renderfarm.inputs.PAUSE_S", 0.01)
    for url, reason in (
        (f"{site}/pub/busy", "answered 503"),
        ("http://127.0.0.1:9/pub/x", "refused"),
        (f"{site}/pub/slow", "inputs.timeout_s"),
    ):
        started = time.monotonic()
        found = fetch(tmp_path, url, urls=[url.rpartition("/")[0] + "/"], private_addresses=True, timeout_s=0.5)
        assert time.monotonic() - started < 5
        assert isinstance(found, Transient)
        assert found.retryable
        assert reason in str(found)


@pytest.mark.parametrize(
    "url",
    [
        "http://[", "http://[::1", "http://127.0.0.1:x/pub/a", "SITE/pub/%2e%2e/secret/x", "SITE/pub/%252e%252e/secret/x",
        "SITE/pub/..\\secret", "http://u:hunter2@HOST/pub/a", "SITE/pub/gone?signature=hunter2", "SITE/pub/text?signature=hunter2#hunter2",
        "SITE/pub/huge?signature=hunter2", "SITE/pub/nowhere",
    ],
)  # fmt: skip
def test_a_url_of_a_row_never_stops_the_job_and_its_secrets_are_in_no_message(url: str, site: str, tmp_path: Path) -> None:
    url = url.replace("SITE", site).replace("HOST", site.removeprefix("http://"))
    found = fetch(tmp_path, url, urls=[f"{site}/pub/", "http://[", "http://u:hunter2@"], private_addresses=True)
    assert isinstance(found, InvalidInput)
    assert "hunter2" not in str(found)
    assert not list((tmp_path / "o").rglob("inputs/*")), "what is no picture is not kept"


def test_odd_letters_in_a_path_are_sent_as_the_web_writes_them(site: str, tmp_path: Path) -> None:
    found = fetch(tmp_path, f"{site}/pub/an é and a space.png", urls=[f"{site}/pub/"], private_addresses=True)
    assert isinstance(found, Sample)


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True), ("10.0.0.1", False), ("127.0.0.1", False), ("169.254.169.254", False), ("224.0.0.1", False), ("::1", False),
        ("::ffff:10.0.0.1", False), ("64:ff9b::a9fe:a9fe", False), ("2002:7f00:1::", False), ("fec0::1", False), ("fe80::1%eth0", False),
        ("2001:4860:4860::8888", True), ("64:ff9b::808:808", True), ("64:ff9b:1::7f00:1", False), ("64:ff9b:1:a::808:808", False),
        ("::127.0.0.1", False), ("::8.8.8.8", False), ("::ffff:0:127.0.0.1", False), ("::ffff:0:8.8.8.8", False), ("::", False),
        ("::ffff:8.8.8.8", True), ("5f00::1", False), ("3fff::1", False),
    ],
)  # fmt: skip
def test_which_addresses_are_public(address: str, public: bool) -> None:
    assert is_public(address) is public


def test_a_name_that_nobody_resolves_in_time_is_given_up_and_may_be_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, answer = [], Event()

    def waits(*args: Any, **kwargs: Any) -> Any:
        asked.append(args)
        answer.wait(30)
        raise socket.gaierror

    monkeypatch.setattr("renderfarm.inputs.PAUSE_S", 0.01)
    monkeypatch.setattr("renderfarm.inputs.socket.getaddrinfo", waits)
    started = time.monotonic()
    found = fetch(tmp_path, "http://slow.example.org/a.png", urls=["http://slow.example.org/"], timeout_s=0.2)
    answer.set()
    assert time.monotonic() - started < 5
    assert isinstance(found, Transient)
    assert "http://slow.example.org/a.png: the name was not resolved in time (inputs.timeout_s)" in str(found)
    assert len(asked) == 3


def test_a_name_that_nobody_knows_may_be_tried_again_and_one_that_is_none_is_the_rows_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*args: Any, **kwargs: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr("renderfarm.inputs.PAUSE_S", 0.01)
    with monkeypatch.context() as patch:
        patch.setattr("renderfarm.inputs.socket.getaddrinfo", unknown)
        found = fetch(tmp_path, "http://nobody.invalid/a.png", urls=["http://nobody.invalid/"])
    assert isinstance(found, Transient)
    assert "http://nobody.invalid/a.png: Name or service not known" in str(found)
    found = fetch(tmp_path, f"http://{'x' * 70}.invalid/a.png", urls=[f"http://{'x' * 70}.invalid/"])
    assert "is no URL; correct it" in str(found)


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


@pytest.mark.parametrize("url", ["https://u:p@example.org/", "ftp://example.org/", "https://example.org", "example.org/"])
def test_a_beginning_that_allows_too_much_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="write it as https://HOST/"):
        Job.model_validate({"name": "t", "manifest": "m", "model": "m", "output": {"path": "o"}, "inputs": {"urls": [url]}})


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
