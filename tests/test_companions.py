"""A second model beside the job's: ControlNets, SDXL's refiner, DeepFloyd's later stages, each with diffusers' own pixels."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from checker import check_complete, error_rows, image_rows
from covering import covering, only
from oracle import DTYPES, LEGAL, REFERENCE, B, pixels, plain_pipeline, reference, row
from pictures_given import encoded, mask, picture
from PIL import Image

import renderfarm
from renderfarm.config import COMPANIONS, STAGES, ModelSpec, Workers
from renderfarm.errors import Fatal, InvalidInput, InvalidJob
from renderfarm.models.catalog import ModelInfo, describe, for_task
from renderfarm.models.families import FAMILIES, IMAGES_OF
from renderfarm.models.load import load_model
from renderfarm.records import InputImage, Sample
from renderfarm.slots import SlotLoop
from renderfarm.verification import Choice, verify

Tiny = Callable[[str], Path]
Job = Callable[..., Path]
Compared = Callable[[str, str], None]

CONTROLLED: dict[tuple[str, str], Any] = {
    ("sd", "controlled text-to-image"): diffusers.StableDiffusionControlNetPipeline,
    ("sd", "controlled image-to-image"): diffusers.StableDiffusionControlNetImg2ImgPipeline,
    ("sd", "controlled inpainting"): diffusers.StableDiffusionControlNetInpaintPipeline,
    ("sdxl", "controlled text-to-image"): diffusers.StableDiffusionXLControlNetPipeline,
    ("sdxl", "controlled image-to-image"): diffusers.StableDiffusionXLControlNetImg2ImgPipeline,
    ("sdxl", "controlled inpainting"): diffusers.StableDiffusionXLControlNetInpaintPipeline,
}


def render(info: ModelInfo, dtype: str, rows: list[Sample]) -> list[np.ndarray]:
    loop = SlotLoop(lambda: load_model(info, Workers(batch_size=B, dtype=dtype)))  # type: ignore[arg-type]
    try:
        return pixels(loop.submit(rows))
    finally:
        loop.close()


FOLDERS = {
    "controlnet": "sd-controlnet",
    "refiner": "sdxl-refiner",
    "super_resolution": "deepfloyd-second",
    "upscaler": "deepfloyd-third",
}
FEW_STEPS: dict[str, Any] = {stage: {"num_inference_steps": 3} for stage in STAGES}


def with_companions(tiny_model: Tiny, name: str, companions: dict[str, str]) -> dict[str, Any]:
    beside = {kind: {"id": str(tiny_model(folder)), **FEW_STEPS.get(kind, {})} for kind, folder in companions.items()}
    return {"id": str(tiny_model(name)), **beside}


def described(tiny_model: Tiny, name: str, **companions: str) -> ModelInfo:
    return describe(ModelSpec.model_validate(with_companions(tiny_model, name, companions)))


def test_the_controlled_classes_compared_here_are_those_of_the_table() -> None:
    offered = {
        how.pipeline_class for family in FAMILIES.values() for task, how in family.tasks.items() if "control_image" in IMAGES_OF[task]
    }
    assert offered == {kind.__name__ for kind in CONTROLLED.values()}


@pytest.mark.parametrize(("name", "task", "dtype"), covering([(*key, dtype) for key in CONTROLLED for dtype in DTYPES], together=2))
def test_a_controlled_row_gets_the_pixels_that_diffusers_gives_it_alone(
    name: str, task: str, dtype: str, tiny_model: Tiny, record_property: Compared
) -> None:
    record_property("compared", CONTROLLED[name, task].__name__)
    info = for_task(described(tiny_model, name, controlnet=f"{name}-controlnet"), IMAGES_OF[task])  # type: ignore[index]
    assert (info.task, info.pipeline_class) == (task, CONTROLLED[name, task].__name__)
    rows = []
    for number in range(8):
        values: dict[str, Any] = {"prompt": f"star {number}" + " and so on" * (number % 3 * 5), "num_inference_steps": 4}
        values |= {"guidance_scale": (4.0, 1.0)[number % 2], "sampler": LEGAL[name][number * 3]}
        values |= {"controlnet_conditioning_scale": (1.0, 0.5)[number // 2 % 2], "control_guidance_start": (0.0, 0.4)[number // 4]}
        values |= {"control_guidance_end": (1.0, 0.6)[number % 3 // 2]}
        if "image" in info.images:
            values["strength"] = (0.5, 0.8, 1.0)[number % 3]
        if number % 4 == 0:
            values["negative_prompt"] = "a square"
        size = (32, 40) if number > 5 else (32, 32)
        all_images = {"image": picture(number, size), "mask_image": mask(size), "control_image": picture(number + 50, size)}
        images = {kind: all_images[kind] for kind in info.images}
        given = {kind: InputImage(None, encoded(image)) for kind, image in images.items()}
        rows.append((row(number, height=size[1], width=size[0], **values, **given), images))
    ours = render(info, dtype, [wanted for wanted, _ in rows])
    net = diffusers.ControlNetModel.from_pretrained(tiny_model(f"{name}-controlnet"), dtype=getattr(torch, dtype))
    absent = {"safety_checker": None} if name == "sd" else {}
    pipe = plain_pipeline(CONTROLLED[name, task], tiny_model(name), dtype, controlnet=net, **absent)
    for (wanted, images), made in zip(rows, ours, strict=True):
        if "image" not in images:  # its call has one image only
            images = {"image": images["control_image"]}
        np.testing.assert_array_equal(made, reference(pipe, wanted, **images), err_msg=str(wanted))
    assert len({made.tobytes() for made in ours}) == len(rows)


def test_the_control_image_its_scale_and_its_share_of_the_steps_show_in_the_pixels(tiny_model: Tiny) -> None:
    info = for_task(described(tiny_model, "sd", controlnet="sd-controlnet"), ["control_image"])

    def one(number: int, scale: float = 1.0, start: float = 0.0, end: float = 1.0) -> Sample:
        image = InputImage(None, encoded(picture(number)))
        shares = {"controlnet_conditioning_scale": scale, "control_guidance_start": start, "control_guidance_end": end}
        return row(0, sampler="euler", num_inference_steps=4, control_image=image, **shares)

    made = render(info, "float32", [one(1), one(2), one(1, 0.5), one(1, start=0.5), one(1, end=0.5), one(1, 0.0), one(2, 0.0)])
    assert len({image.tobytes() for image in made}) == 6
    np.testing.assert_array_equal(made[5], made[6])  # at scale 0 nobody looks at it
    (plain,) = render(describe(ModelSpec(id=str(tiny_model("sd")))), "float32", [row(0, sampler="euler", num_inference_steps=4)])
    assert (plain != made[0]).mean() > 0.3


@pytest.mark.parametrize("dtype", only(["bfloat16"], DTYPES))
def test_a_refiner_takes_over_where_diffusers_own_pair_hands_over(dtype: str, tiny_model: Tiny, record_property: Compared) -> None:
    info = described(tiny_model, "sdxl", refiner="sdxl-refiner")
    offered = [name for name in LEGAL["sdxl"] if name not in info.refused_samplers]
    rows = []
    for number, sampler in enumerate(offered):
        values: dict[str, Any] = {"prompt": f"star {number}", "num_inference_steps": 8 + number % 2, "sampler": sampler}
        values |= {"guidance_scale": (4.0, 1.0)[number % 2], "denoising_end": (0.6, 0.5)[number % 3 // 2]}
        if number % 3 == 0:
            values |= {"negative_prompt": "a square", "prompt_2": "grey"}
        rows.append(row(number, height=(32, 40)[number > 5], **values))
    base = plain_pipeline(diffusers.StableDiffusionXLPipeline, tiny_model("sdxl"), dtype)
    refiner = plain_pipeline(diffusers.StableDiffusionXLImg2ImgPipeline, tiny_model("sdxl-refiner"), dtype)
    for wanted, made in zip(rows, render(info, dtype, rows), strict=True):
        np.testing.assert_array_equal(made, of_the_pair(base, refiner, wanted), err_msg=str(wanted))


@pytest.mark.parametrize(
    ("steps", "end", "sampler", "found"),
    [(4, 0.8, "dpm++2m", "leaves 4 to the model and 0"), (40, 0.9999, "dpm++2m", "and 0 to its refiner"), (1, 0.8, "euler", "leaves 0")],
)
def test_a_hand_over_that_leaves_one_of_the_pair_without_a_step_is_an_error(
    steps: int, end: float, sampler: str, found: str, tiny_model: Tiny
) -> None:
    info = described(tiny_model, "sdxl", refiner="sdxl-refiner")
    with pytest.raises(InvalidInput, match=found):
        render(info, "float32", [row(sampler=sampler, num_inference_steps=steps, denoising_end=end)])


@pytest.mark.parametrize(
    ("name", "kind", "folder"),
    [
        ("sdxl", "refiner", "sdxl-refiner"),
        ("deepfloyd", "super_resolution", "deepfloyd-second"),
        ("deepfloyd", "upscaler", "deepfloyd-third"),
    ],
)
def test_places_of_the_second_model_are_compared_too(name: str, kind: str, folder: str, tiny_model: Tiny) -> None:
    torch.set_num_threads(1)
    model: Any = load_model(described(tiny_model, name, **{kind: folder}), Workers(batch_size=B))
    wanted = row(sampler="ddpm", height=64, width=64, num_inference_steps=4, denoising_end=0.8 if kind == "refiner" else None)
    assert not model.places_that_differ(wanted)

    def disturb(_: Any, __: Any, outputs: Any) -> None:
        outputs[0][-1] += 1e-3

    second = model.refiner if kind == "refiner" else model.stages[kind]
    handle = second.unet.register_forward_hook(disturb, prepend=True)
    try:
        assert model.places_that_differ(wanted) == [B - 1]
    finally:
        handle.remove()


def test_a_second_model_with_another_byte_than_the_job_says_stops_the_job(job: Job, tiny_model: Tiny) -> None:
    image = {"control_image": [encoded(picture())]}
    path = job(columns(1, **image), beside={"controlnet": "sd-controlnet"})
    asked = {"id": str(tiny_model("sd-controlnet")), "sha256": "0" * 64}
    reason = r"have the hash ([0-9a-f]{64}), and the job asks for 0{64} \(model.controlnet.sha256\)"
    with pytest.raises(Fatal, match=reason) as caught:
        renderfarm.run(renderfarm.jobfile.load_job(path, [f"model.controlnet={json.dumps(asked)}"]), engine="inline")
    asked["sha256"] = str(caught.value).partition("the hash ")[2][:64]
    assert renderfarm.run(renderfarm.jobfile.load_job(path, [f"model.controlnet={json.dumps(asked)}"]), engine="inline").images == 1


def of_the_pair(base: Any, refiner: Any, wanted: Sample) -> np.ndarray:
    """As diffusers' documentation has an ensemble of experts, with B copies and generators."""
    kind, changes = REFERENCE[wanted.sampler]
    for pipe in (base, refiner):
        pipe.scheduler = kind.from_config(pipe.original_config, **changes)
    texts = {name: getattr(wanted, name) for name in ("prompt", "prompt_2", "negative_prompt")}
    arguments: dict[str, Any] = {name: [text] * B for name, text in texts.items() if text is not None}
    arguments |= {"num_inference_steps": wanted.num_inference_steps, "guidance_scale": wanted.guidance_scale}
    arguments["generator"] = [torch.Generator().manual_seed(wanted.seed) for _ in range(B)]
    size = {"height": wanted.height, "width": wanted.width}
    latents = base(**arguments, **size, denoising_end=wanted.denoising_end, output_type="latent").images
    return np.asarray(refiner(**arguments, image=latents, denoising_start=wanted.denoising_end).images[0])


STAGES_OF: dict[str, tuple[Any, Any]] = {
    "text-to-image": (diffusers.IFPipeline, diffusers.IFSuperResolutionPipeline),
    "image-to-image": (diffusers.IFImg2ImgPipeline, diffusers.IFImg2ImgSuperResolutionPipeline),
    "inpainting": (diffusers.IFInpaintingPipeline, diffusers.IFInpaintingSuperResolutionPipeline),
}
SECOND = {"num_inference_steps": 3, "guidance_scale": 3.0, "noise_level": 100}
THIRD = {"num_inference_steps": 2, "guidance_scale": 2.0, "noise_level": 50}


STAGED = [*((task, ("super_resolution",)) for task in STAGES_OF), ("text-to-image", ("upscaler",)), ("inpainting", STAGES)]


@pytest.mark.parametrize(("staged", "dtype"), covering([(case, dtype) for case in STAGED for dtype in DTYPES]))
def test_a_stage_enlarges_the_pictures_of_the_stage_before_as_in_diffusers(
    staged: tuple[str, tuple[str, ...]], dtype: str, tiny_model: Tiny, record_property: Compared
) -> None:
    task, stages = staged
    needed: tuple[str, ...] = IMAGES_OF[task]  # type: ignore[index]
    settings = {"super_resolution": SECOND | ({"strength": 0.7} if needed else {}), "upscaler": THIRD}
    spec = {name: {"id": str(tiny_model(FOLDERS[name])), **settings[name]} for name in stages}
    info = for_task(describe(ModelSpec.model_validate({"id": str(tiny_model("deepfloyd")), **spec})), needed)
    ratio = 2 ** len(stages)
    assert (info.task, info.height, info.width, info.factor) == (task, 32 * ratio, 32 * ratio, 8 * ratio)
    rows = []
    for number, sampler in enumerate([*LEGAL["deepfloyd"][:5], "ddpm"] if ratio == 2 else ["dpm++2m", "ddpm", "ddpm"]):
        kind = number % 5  # where there are six rows, the last shares its call with the first
        values: dict[str, Any] = {"prompt": f"star {number}", "sampler": sampler, "guidance_scale": (4.0, 1.0)[kind % 2]}
        if kind % 3 == 0:
            values["negative_prompt"] = "a square"
        size = (32 * ratio, (32, 40)[kind > 2] * ratio)
        images = {name: image for name, image in {"image": picture(number, size), "mask_image": mask(size)}.items() if name in needed}
        values |= {name: InputImage(None, encoded(image)) for name, image in images.items()} | ({"strength": 0.7} if needed else {})
        rows.append((row(number, height=size[1], width=size[0], **values), images))
    reference = of_the_stages(task, {name: settings[name] for name in stages}, dtype, tiny_model, record_property)
    ours = render(info, dtype, [wanted for wanted, _ in rows])
    for (wanted, images), made in zip(rows, ours, strict=True):
        np.testing.assert_array_equal(made, reference(wanted, images), err_msg=str(wanted))
    assert len({made.tobytes() for made in ours}) == len(rows)


def of_the_stages(
    task: str, settings: dict[str, Any], dtype: str, tiny_model: Tiny, record_property: Compared
) -> Callable[[Sample, dict[str, Any]], np.ndarray]:
    """As diffusers' documentation has them one after another, with B copies and generators."""
    classes = STAGES_OF[task]
    first = plain_pipeline(classes[0], tiny_model("deepfloyd"), dtype, safety_checker=None)
    absent = dict.fromkeys(("safety_checker", "text_encoder", "watermarker"))
    later: dict[str, Any] = {}
    if "super_resolution" in settings:
        later["super_resolution"] = plain_pipeline(classes[1], tiny_model("deepfloyd-second"), dtype, **absent)
    if "upscaler" in settings:
        later["upscaler"] = plain_pipeline(diffusers.StableDiffusionUpscalePipeline, tiny_model("deepfloyd-third"), dtype)
    for pipe in later.values():
        record_property("compared", type(pipe).__name__)

    def reference(wanted: Sample, given: dict[str, Any]) -> np.ndarray:
        scheduler, changes = REFERENCE[wanted.sampler]
        first.scheduler = scheduler.from_config(first.original_config, **changes)
        for pipe in later.values():
            pipe.scheduler = type(pipe.scheduler).from_config(pipe.original_config)
        images = {name: [image] * B for name, image in given.items()}
        generators = {"generator": [torch.Generator().manual_seed(wanted.seed) for _ in range(B)]}
        prompts, negatives = [wanted.prompt] * B, [wanted.negative_prompt or ""] * B
        positive, negative = first.encode_prompt(prompts, negative_prompt=negatives)
        texts = {"prompt_embeds": positive, "negative_prompt_embeds": negative, **generators}
        ratio = 2 ** len(later)
        asked: dict[str, Any] = {"strength": 0.7} if images else {"height": wanted.height // ratio, "width": wanted.width // ratio}
        scale = wanted.guidance_scale
        made = first(**texts, **images, **asked, num_inference_steps=3, guidance_scale=scale, output_type="pt").images
        if "super_resolution" in later:
            asked = {"original_image": images.pop("image")} if images else {name: 2 * side for name, side in asked.items()}
            made = later["super_resolution"](
                image=made, **texts, **images, **asked, **settings["super_resolution"], output_type="pt"
            ).images
        made = (made / 2 + 0.5).clamp(0, 1)
        if "upscaler" in later:
            texts = {"prompt": prompts, "negative_prompt": negatives, **generators}
            return np.asarray(later["upscaler"](image=made, **texts, **settings["upscaler"]).images[0])
        pictures: np.ndarray = made[0].permute(1, 2, 0).float().numpy()
        return (pictures * 255).round().astype(np.uint8)

    return reference


@pytest.mark.parametrize(("task", "steps", "noise"), [("text-to-image", 50, 250), ("image-to-image", 50, 250), ("inpainting", 100, 0)])
def test_a_second_stage_that_the_job_says_nothing_of_has_its_calls_own_settings(
    task: str, steps: int, noise: int, tiny_model: Tiny
) -> None:
    spec = {"id": str(tiny_model("deepfloyd")), "super_resolution": str(tiny_model("deepfloyd-second"))}
    info = for_task(describe(ModelSpec.model_validate(spec)), IMAGES_OF[task])  # type: ignore[index]
    found = load_model(info, Workers(batch_size=B)).profile()["super_resolution"]
    assert (found["num_inference_steps"], found["noise_level"], found["guidance_scale"]) == (steps, noise, 4.0)
    assert found.get("strength") == (None if task == "text-to-image" else 0.8)


def test_a_stage_whose_configuration_does_not_say_its_size_is_refused(tiny_model: Tiny, tmp_path: Path) -> None:
    for name, file, key in (("super_resolution", "unet/config.json", "sample_size"), ("upscaler", "vae/config.json", "block_out_channels")):
        shutil.copytree(tiny_model(FOLDERS[name]), tmp_path / name)
        config = json.loads((tmp_path / name / file).read_text())
        del config[key]
        (tmp_path / name / file).write_text(json.dumps(config))
        with pytest.raises(InvalidJob, match=rf"model\.{name}: {file} is missing, damaged, or does not say how large its pictures are"):
            describe(ModelSpec.model_validate({"id": str(tiny_model("deepfloyd")), name: str(tmp_path / name)}))


def test_a_second_stage_without_a_step_is_refused() -> None:
    with pytest.raises(ValueError, match=r"strength 0\.1 of 9 steps runs none of them"):
        ModelSpec.model_validate({"id": "m", "super_resolution": {"id": "s", "num_inference_steps": 9, "strength": 0.1}})


def columns(count: int, **more: Any) -> dict[str, Any]:
    return {"prompt": [f"number {k}" for k in range(count)], "seed": list(range(count)), **more}


@pytest.fixture
def job(write_job: Job, tiny_model: Tiny, tmp_path: Path) -> Job:
    def write(values: dict[str, Any], name: str = "sd", beside: dict[str, str] | None = None, **changes: Any) -> Path:
        pq.write_table(pa.table(values), tmp_path / "m.parquet")
        model = with_companions(tiny_model, name, beside or {})
        return write_job(tmp_path / "m.parquet", model=model, workers={"batch_size": B}, **changes)

    return write


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "controlnet": ("sd", {"control_image": [encoded(picture(k)) for k in range(3)], "controlnet_conditioning_scale": [0.5, None, 1.0]}),
    "refiner": ("sdxl", {"denoising_end": [0.5, None, 0.9], "num_inference_steps": [5, 20, 20]}),
    "super_resolution": ("deepfloyd", {"negative_prompt": ["x", None, None]}),
    "upscaler": ("deepfloyd", {"negative_prompt": ["x", None, None]}),
}


def with_half(of: Path, folder: Path) -> tuple[Path, Path]:
    """A copy of `of` with its denoiser's weights halved, in half precision; and one that has these beside its own, as a variant."""
    alone, beside = folder / "alone", folder / "beside"
    for copy in (alone, beside):
        shutil.copytree(of, copy)
    part = "unet" if (of / "unet").is_dir() else ""
    net = (diffusers.UNet2DConditionModel if part else diffusers.ControlNetModel).from_pretrained(of / part)
    with torch.no_grad():
        for weights in net.parameters():
            weights *= 0.5
    net.half().save_pretrained(alone / part)
    net.save_pretrained(beside / part, variant="fp16")
    return alone, beside


@pytest.mark.parametrize("kind", COMPANIONS)
def test_a_variant_of_a_second_model_is_loaded_and_hashed_instead_of_its_own_weights(kind: str, tiny_model: Tiny, tmp_path: Path) -> None:
    name = CASES[kind][0]
    alone, beside = with_half(tiny_model(FOLDERS[kind]), tmp_path)
    given = [{"id": str(beside)}, {"id": str(beside), "variant": "fp16"}, {"id": str(alone)}]
    settings = FEW_STEPS.get(kind, {})
    infos = [describe(ModelSpec.model_validate({"id": str(tiny_model(name)), kind: one | settings})) for one in given]
    values: dict[str, Any] = {"sampler": "ddpm", "height": 64, "width": 64, "num_inference_steps": 4}
    if kind == "controlnet":
        infos = [for_task(info, ["control_image"]) for info in infos]
        shares = {"controlnet_conditioning_scale": 1.0, "control_guidance_start": 0.0, "control_guidance_end": 1.0}
        values |= {"control_image": InputImage(None, encoded(picture(1, (64, 64)))), **shares}
    values |= {"denoising_end": 0.5} if kind == "refiner" else {}
    own, half, same = (render(info, "float32", [row(**values)])[0] for info in infos)
    np.testing.assert_array_equal(half, same)
    assert (own != half).mean() > 0.3
    weights = load_model(infos[1], Workers(batch_size=B)).profile()["weights"]
    assert [file for file in weights if file.startswith(f"{kind}/") and "fp16" in file]
    assert f"{kind}/{'' if kind == 'controlnet' else 'unet/'}diffusion_pytorch_model.safetensors" not in weights


def test_a_job_records_a_second_models_variant_and_refuses_one_that_is_not_there(job: Job, tiny_model: Tiny, tmp_path: Path) -> None:
    _, beside = with_half(tiny_model("sd-controlnet"), tmp_path)
    path = job(columns(1, control_image=[encoded(picture())]))

    def run(**given: str) -> None:
        asked = json.dumps({"id": str(beside), **given})
        assert renderfarm.run(renderfarm.jobfile.load_job(path, [f"model.controlnet={asked}"]), engine="inline").images == 1

    with pytest.raises(InvalidJob, match=r"model\.controlnet: no component has the variant ema .*; variants that there are: fp16"):
        run(variant="ema")
    run(variant="fp16")
    (again,) = verify(str(tmp_path / "out"), Choice(), str(tiny_model("sd")), {"controlnet": str(beside)}).again
    assert again.result == "identical"
    with pytest.raises(InvalidJob, match=r'model\.controlnet\.variant: "fp16" there, null now'):
        run()
    (beside / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(InvalidJob, match=r"model\.controlnet has weights of a variant only: give variant: fp16"):
        run()


@pytest.mark.parametrize("kind", COMPANIONS)
def test_a_job_records_the_second_model_and_verify_renders_with_it_again(kind: str, job: Job, tiny_model: Tiny, tmp_path: Path) -> None:
    name, more = CASES[kind]
    assert renderfarm.run(job(columns(3, **more), name, {kind: FOLDERS[kind]}), engine="inline").exit_code == 0
    check_complete(tmp_path / "out", {(0, 0), (1, 0), (2, 0)})
    rows = image_rows(tmp_path / "out")
    if kind == "controlnet":
        assert [record["controlnet_conditioning_scale"] for record in rows] == [0.5, 1.0, 1.0]
        assert [record["control_guidance_end"] for record in rows] == [1.0] * 3
        assert rows[0]["init_control_image_sha256"] == hashlib.sha256(more["control_image"][0]).hexdigest()
    if kind == "refiner":
        assert [record["denoising_end"] for record in rows] == [0.5, 0.8, 0.9]
    if kind in STAGES:
        assert {(record["height"], record["width"]) for record in rows} == {(64, 64)}
        with Image.open(next((tmp_path / "out").glob("data/*/*.png"))) as opened:
            assert opened.size == (64, 64)
    (tmp_path / "m.parquet").unlink()
    with pytest.raises(InvalidJob, match=rf"rendered with a {kind} in a folder named .*: --model {kind}=FOLDER"):
        verify(str(tmp_path / "out"), Choice(rows="0-2"), str(tiny_model(name)))
    found = verify(str(tmp_path / "out"), Choice(rows="0-2"), str(tiny_model(name)), {kind: str(tiny_model(FOLDERS[kind]))})
    assert not found.profile_differences
    assert [again.result for again in found.again] == ["identical"] * 3


@pytest.mark.parametrize(
    ("name", "beside", "values", "reason"),
    [
        ("sd", {"controlnet": "sd-controlnet"}, {}, "needs an image in each row: give the manifest a column control_image"),
        ("sd", {}, {"control_image": [encoded(picture())]}, "`control_image`, which this model does not take"),
        ("sd", {"controlnet": "sdxl-controlnet"}, {"control_image": [encoded(picture())]}, "made for another kind of model"),
        ("sd", {"controlnet": "sdxl"}, {"control_image": [encoded(picture())]}, r"is not in diffusers' format \(config.json\)"),
        ("sd3", {"controlnet": "sd-controlnet"}, {}, "StableDiffusion3Pipeline takes none here"),
        ("sd", {"refiner": "sdxl-refiner"}, {}, r"takes none here \(StableDiffusionXLPipeline does\)"),
        ("sdxl", {"refiner": "sdxl"}, {}, "is a StableDiffusionXLPipeline, and must be a StableDiffusionXLImg2ImgPipeline"),
        ("sdxl", {"refiner": "sdxl-refiner"}, {"image": [encoded(picture())]}, "is for text-to-image, and the manifest's images make this"),
        ("sd", {"upscaler": "deepfloyd-third"}, {}, r"takes none here \(IFPipeline does\)"),
        ("deepfloyd", {"upscaler": "deepfloyd-second"}, {}, "is a IFSuperResolutionPipeline, and must be a StableDiffusionUpscalePipeline"),
    ],
)
def test_a_second_model_that_does_not_fit_is_refused_before_work_starts(
    name: str, beside: dict[str, str], values: dict[str, Any], reason: str, job: Job
) -> None:
    with pytest.raises(InvalidJob, match=reason):
        renderfarm.run(job(columns(1, **values), name, beside), engine="inline")


def test_numbers_out_of_their_range_are_error_rows(job: Job, tmp_path: Path) -> None:
    control = {"control_image": [encoded(picture())] * 4, "controlnet_conditioning_scale": [11.0, None, None, None]}
    control |= {"control_guidance_start": [None, 0.6, -1.0, None], "control_guidance_end": [None, 0.5, None, None]}
    control |= {"height": [None, None, None, 40]}
    path = job(columns(4, **control), beside={"controlnet": "sd-controlnet"})
    assert renderfarm.run(path, engine="inline").errors == 4
    reasons = ["between 0 and 10", "the start must come before the end", "is a share of the whole", "control_image has 32×32 pixels"]
    for error, reason in zip(sorted(error_rows(tmp_path / "out"), key=lambda error: error["row"]), reasons, strict=True):
        assert reason in error["error_message"]


IMAGES = {"image": [encoded(picture(k, (64, 64))) for k in range(3)], "strength": [0.5, None, 1.0]}
MASKS = {"mask_image": [encoded(mask((64, 64), inverted=k > 1)) for k in range(3)]}
THROUGH_RAY: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    **{kind: ((kind,), CASES[kind][1]) for kind in ("controlnet", "refiner", "super_resolution")},
    "image-to-image in two stages": (("super_resolution",), IMAGES),
    "inpainting in three stages": (STAGES, IMAGES | MASKS),
}


@pytest.mark.slow  # images go through Ray in test_tasks, too
@pytest.mark.parametrize("case", THROUGH_RAY)
def test_rows_through_ray_have_the_same_pixels_with_one_worker_and_with_two(case: str, job: Job, local_ray: None, tmp_path: Path) -> None:
    kinds, more = THROUGH_RAY[case]
    values, found = columns(12, **{column: cells * 4 for column, cells in more.items()}), []
    for workers in (1, 2):
        output = {"path": str(tmp_path / f"out{workers}"), "part_rows": 7 - 2 * workers}
        path = job(values, CASES[kinds[0]][0], {kind: FOLDERS[kind] for kind in kinds}, output=output)
        assert renderfarm.run(renderfarm.jobfile.load_job(path, [f"workers.max={workers}"]), engine="ray").images == 12
        found.append({record["row"]: record["pixel_sha256"] for record in image_rows(tmp_path / f"out{workers}")})
    assert found[0] == found[1]
    assert len(set(found[0].values())) == 12
