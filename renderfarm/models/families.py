"""The table of model families: a pipeline class, who renders it, what its rows may say, which sizes it paints.

Adding a family: one module beside this one, one line in FAMILIES. Nothing here imports torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from renderfarm.samplers import NOTHING, SAMPLERS, Kind

Config = dict[str, Any]  # a component's JSON file

ALWAYS = frozenset(
    [
        *("id", "prompt", "seed", "num_images_per_prompt", "seed_b", "blend"),
        *("height", "width", "num_inference_steps", "guidance_scale", "sampler"),
    ]
)


@dataclass(frozen=True)
class Sizes:
    """In pixels: the default height and width, what both must be a multiple of, and the largest."""

    height: int
    width: int
    factor: int
    max_side: int

    def times(self, ratio: int) -> Sizes:
        return Sizes(self.height * ratio, self.width * ratio, self.factor * ratio, self.max_side * ratio)


def _of_unet(unet: Config, vae: Config) -> Sizes:
    scale = vae_scale(vae)
    side = unet["sample_size"]
    height, width = (side, side) if isinstance(side, int) else side
    # StableDiffusionPipeline.check_inputs wants multiples of 8
    return Sizes(height * scale, width * scale, math.lcm(8, scale), 4 * max(height, width) * scale)


def _of_sd3(transformer: Config, vae: Config) -> Sizes:
    side, factor = transformer["sample_size"] * vae_scale(vae), transformer["patch_size"] * vae_scale(vae)
    # a table of positions, of which the transformer takes the middle
    return Sizes(side, side, factor, min(4 * side, transformer["pos_embed_max_size"] * factor))


def _of_flux(transformer: Config, vae: Config) -> Sizes:
    side = 128 * vae_scale(vae)  # FluxPipeline.default_sample_size; the configuration names none
    return Sizes(side, side, 2 * vae_scale(vae), 4 * side)


def _of_patches(denoiser: Config, vae: Config) -> Sizes:
    """Transformers over 2×2 patches whose pipelines have 1024 pixels as their default: FLUX.2, Z-Image."""
    factor = 2 * vae_scale(vae)
    return Sizes(1024, 1024, factor, 4096)


def _of_qwen_image(denoiser: Config, vae: Config) -> Sizes:
    scale = 2 ** len(vae["temperal_downsample"])
    return Sizes(128 * scale, 128 * scale, 2 * scale, 4 * 128 * scale)  # QwenImagePipeline.default_sample_size


def _of_pixart(transformer: Config, vae: Config) -> Sizes:
    side = transformer["sample_size"] * vae_scale(vae)
    return Sizes(side, side, math.lcm(8, transformer["patch_size"] * vae_scale(vae)), 4 * side)


def _of_sana(transformer: Config, vae: Config) -> Sizes:
    side = transformer["sample_size"] * 2 ** (len(vae["encoder_block_out_channels"]) - 1)
    return Sizes(side, side, 32, 4 * side)  # SanaPipeline.check_inputs wants multiples of 32


def _of_pixels(unet: Config, vae: Config) -> Sizes:
    return Sizes(unet["sample_size"], unet["sample_size"], 8, 4 * unet["sample_size"])


def _of_any(denoiser: Config, vae: Config) -> Sizes:
    """A guess: what most classes have in their configurations; else 1024 pixels."""
    scale = vae_scale(vae) if "block_out_channels" in vae else 1
    side = denoiser.get("sample_size")
    side = side * scale if isinstance(side, int) else 1024
    return Sizes(side, side, math.lcm(8, scale), 4 * side)


def vae_scale(vae: Config) -> int:
    """How many times larger its pictures are than its latents."""
    scale: int = 2 ** (len(vae["block_out_channels"]) - 1)
    return scale


Task = Literal[
    "text-to-image",
    "image-to-image",
    "inpainting",
    "controlled text-to-image",
    "controlled image-to-image",
    "controlled inpainting",
]
IMAGES_OF: dict[Task, tuple[str, ...]] = {
    "text-to-image": (),
    "image-to-image": ("image",),
    "inpainting": ("image", "mask_image"),
    "controlled text-to-image": ("control_image",),
    "controlled image-to-image": ("image", "control_image"),
    "controlled inpainting": ("image", "mask_image", "control_image"),
}
CONTROL = frozenset({"control_image", "controlnet_conditioning_scale", "control_guidance_start", "control_guidance_end"})


@dataclass(frozen=True)
class ImageTask:
    """diffusers' class for a task that takes images, who renders it, and that class's default strength; None: it has none.

    `least_strength`: how many of n steps run at strength s, by that class's `get_timesteps`: `int(n·s)`, of which one at
    least must be left (floor); `n·s` rounded up (ceil); or all, of the `int(50·s)` that a consistency model was distilled
    on, which must be enough (lcm).
    """

    pipeline_class: str
    strength: float | None
    adapter: str = "tasks:WithImages"
    least_strength: Literal["floor", "ceil", "lcm"] = "floor"


@dataclass(frozen=True)
class Family:
    """A pipeline class: who renders it (`module:class` in this package), what rows may say, and the pipeline's own defaults.

    `refused_samplers`: of its kind, and yet not to be used, with the reason. `batching`: what rows must share to be
    rendered together: slots, little; calls, all that diffusers' `__call__` takes once. `prompt_weighting`: whether its texts
    may be weighted and long (`models.weighted`).
    """

    adapter: str
    kind: Kind
    arguments: frozenset[str]
    num_inference_steps: int
    guidance_scale: float
    denoiser: str
    sizes: Callable[[Config, Config], Sizes]
    refused_samplers: Mapping[str, str] = field(default_factory=dict)
    safety_checker: bool = False
    batching: Literal["slots", "calls"] = "slots"
    vae: bool = True
    tasks: Mapping[Task, ImageTask] = field(default_factory=dict)
    """Besides text-to-image."""
    prompt_weighting: bool = False


NEGATIVE = frozenset({"negative_prompt", "negative_prompt_2", "negative_prompt_3"})
PLAIN = ALWAYS | {"negative_prompt"}
SD = PLAIN | {"adapters"}
_SDXL = SD | {"prompt_2", "negative_prompt_2"}
_SD3 = _SDXL | {"prompt_3", "negative_prompt_3"}
_FLUX = _SDXL | {"true_cfg_scale"}
_LCM_ONLY = {
    name: "a latent consistency model jumps to the picture at each step, which only its own sampler follows"
    for name, sampler in SAMPLERS.items()
    if sampler.kind == "diffusion" and name != "lcm"
}
LCM = "LatentConsistencyModelPipeline"
_READ_VARIANCE = ("DDPMScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler")
_NO_VARIANCE = {
    name: "DeepFloyd IF predicts its variance as well, which this scheduler does not read"
    for name, sampler in SAMPLERS.items()
    if sampler.kind == "diffusion" and sampler.scheduler not in _READ_VARIANCE
}
_NO_SIGMAS = "this pipeline says its own noise levels, which diffusers' scheduler does not take"
_EULER_ONLY = dict.fromkeys(("flow-dpm++2m", "flow-unipc"), _NO_SIGMAS)
_NO_DPM = {"flow-dpm++2m": _NO_SIGMAS}


def _called(
    adapter: str,
    kind: Kind,
    arguments: frozenset[str],
    steps: int,
    guidance_scale: float,
    sizes: Callable[[Config, Config], Sizes],
    refused: Mapping[str, str] = NOTHING,
) -> Family:
    return Family(adapter, kind, arguments, steps, guidance_scale, "transformer", sizes, refused, False, "calls")


# by `_class_name` in model_index.json
FAMILIES = {
    "StableDiffusionPipeline": Family("stable_diffusion:StableDiffusion", "diffusion", SD, 50, 7.5, "unet", _of_unet, {}, True),
    LCM: Family("stable_diffusion:LatentConsistency", "diffusion", ALWAYS | {"adapters"}, 4, 8.5, "unet", _of_unet, _LCM_ONLY, True),
    "StableDiffusionXLPipeline": Family("stable_diffusion_xl:StableDiffusionXL", "diffusion", _SDXL, 50, 5.0, "unet", _of_unet),
    "StableDiffusion3Pipeline": Family("stable_diffusion_3:StableDiffusion3", "flow", _SD3, 28, 7.0, "transformer", _of_sd3),
    "FluxPipeline": Family("flux:Flux", "flow", _FLUX, 28, 3.5, "transformer", _of_flux),
    "Flux2Pipeline": _called("flux2:Flux2", "flow", ALWAYS | {"adapters"}, 50, 4.0, _of_patches),
    "Flux2KleinPipeline": _called("flux2:Flux2Klein", "flow", SD, 50, 4.0, _of_patches),
    "QwenImagePipeline": _called("qwen_image:QwenImage", "flow", SD | {"true_cfg_scale"}, 50, 1.0, _of_qwen_image, _NO_DPM),
    "ZImagePipeline": _called("z_image:ZImage", "flow", SD, 50, 5.0, _of_patches, _EULER_ONLY),
    "PixArtSigmaPipeline": _called("pixart:PixArtSigma", "diffusion", PLAIN, 20, 4.5, _of_pixart),
    "SanaPipeline": _called("sana:Sana", "flow", SD, 20, 4.5, _of_sana),
    "IFPipeline": Family("deepfloyd:DeepFloyd", "diffusion", SD, 100, 7.0, "unet", _of_pixels, _NO_VARIANCE, False, "calls", False),
}
SHIFTED = ("FluxPipeline", "Flux2Pipeline", "Flux2KleinPipeline", "QwenImagePipeline")  # whether the configuration says so or not
# whose denoisers ask diffusers' dispatcher for attention; the others' call torch's, and setting a backend changes nothing
DISPATCHED = ("FluxPipeline", "Flux2Pipeline", "Flux2KleinPipeline", "QwenImagePipeline", "ZImagePipeline")
_TASKS: dict[str, dict[Task, ImageTask]] = {
    "StableDiffusionPipeline": {
        "image-to-image": ImageTask("StableDiffusionImg2ImgPipeline", 0.8),
        "inpainting": ImageTask("StableDiffusionInpaintPipeline", 1.0),
        "controlled text-to-image": ImageTask("StableDiffusionControlNetPipeline", None),
        "controlled image-to-image": ImageTask("StableDiffusionControlNetImg2ImgPipeline", 0.8),
        "controlled inpainting": ImageTask("StableDiffusionControlNetInpaintPipeline", 1.0),
    },
    LCM: {"image-to-image": ImageTask("LatentConsistencyModelImg2ImgPipeline", 0.8, least_strength="lcm")},
    "StableDiffusionXLPipeline": {
        "image-to-image": ImageTask("StableDiffusionXLImg2ImgPipeline", 0.3),
        "inpainting": ImageTask("StableDiffusionXLInpaintPipeline", 0.9999),
        "controlled text-to-image": ImageTask("StableDiffusionXLControlNetPipeline", None),
        "controlled image-to-image": ImageTask("StableDiffusionXLControlNetImg2ImgPipeline", 0.8),
        "controlled inpainting": ImageTask("StableDiffusionXLControlNetInpaintPipeline", 0.9999),
    },
    "StableDiffusion3Pipeline": {
        "image-to-image": ImageTask("StableDiffusion3Img2ImgPipeline", 0.6, least_strength="ceil"),
        "inpainting": ImageTask("StableDiffusion3InpaintPipeline", 0.6, least_strength="ceil"),
    },
    "FluxPipeline": {
        "image-to-image": ImageTask("FluxImg2ImgPipeline", 0.6, least_strength="ceil"),
        "inpainting": ImageTask("FluxInpaintPipeline", 0.6, least_strength="ceil"),
    },
    "Flux2KleinPipeline": {"inpainting": ImageTask("Flux2KleinInpaintPipeline", 0.8, "flux2:Flux2Klein", "ceil")},
    "QwenImagePipeline": {
        "image-to-image": ImageTask("QwenImageImg2ImgPipeline", 0.6, "qwen_image:QwenImage", "ceil"),
        "inpainting": ImageTask("QwenImageInpaintPipeline", 0.6, "qwen_image:QwenImage", "ceil"),
    },
    "ZImagePipeline": {
        "image-to-image": ImageTask("ZImageImg2ImgPipeline", 0.6, "z_image:ZImage", "ceil"),
        "inpainting": ImageTask("ZImageInpaintPipeline", 1.0, "z_image:ZImage", "ceil"),
    },
    "IFPipeline": {
        "image-to-image": ImageTask("IFImg2ImgPipeline", 0.7, "deepfloyd:DeepFloyd"),
        "inpainting": ImageTask("IFInpaintingPipeline", 1.0, "deepfloyd:DeepFloyd"),
    },
}
_WEIGHTED = ("StableDiffusionPipeline", LCM, "StableDiffusionXLPipeline")  # all their texts are CLIP's
FAMILIES = {name: replace(family, tasks=_TASKS.get(name, {}), prompt_weighting=name in _WEIGHTED) for name, family in FAMILIES.items()}
GENERIC = Family("generic:Generic", "own", PLAIN, 50, 5.0, "", _of_any, {}, False, "calls", False)


def compared() -> list[dict[str, Any]]:
    """Which classes gave diffusers' own pixels in every comparison of the tests, by device and versions: what `pytest --record` wrote."""
    found: list[dict[str, Any]] = json.loads(Path(__file__).with_name("compared.json").read_text(encoding="utf-8"))
    return found


def families_markdown() -> str:
    """FAMILIES as a table for people. Tests compare it with the file, and the families with those that they measured."""
    lines = [
        "| pipeline class | batching | tasks | arguments besides the common ones | prompt weights | legal samplers | exact on |",
        "|---|---|---|---|---|---|---|",
    ]
    records = compared()
    for name, family in FAMILIES.items():
        more = ", ".join(f"`{argument}`" for argument in sorted(family.arguments - ALWAYS)) or "none"
        legal = [s.name for s in SAMPLERS.values() if s.kind == family.kind and s.name not in family.refused_samplers]
        samplers = ", ".join(f"`{sampler}`" for sampler in legal) if len(legal) < 5 else f"all {len(legal)} of kind {family.kind}"
        tasks = {"text-to-image": name} | {task: how.pipeline_class for task, how in family.tasks.items()}
        exact = ", ".join(record["device"] for record in records if set(tasks.values()) <= set(record["comparisons"])) or "nothing yet"
        weights = "yes" if family.prompt_weighting else "no"
        lines.append(f"| `{name}` | {family.batching} | {', '.join(tasks)} | {more} | {weights} | {samplers} | {exact} |")
    return "\n".join(lines) + "\n"
