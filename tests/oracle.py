"""The reference for exactness: diffusers' own pipeline called with B copies of a row, as a user of diffusers would write it.

Its tables of classes and samplers are written apart from the package's.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch

from renderfarm.config import ModelSpec, Workers
from renderfarm.models.catalog import ModelInfo, describe
from renderfarm.models.load import load_model
from renderfarm.records import Sample, SampleKey
from renderfarm.slots import Rendered, SlotLoop

B = 3
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}

# Written apart from the package's table, as a user of diffusers would write it.
REFERENCE = {
    "ddpm": (diffusers.DDPMScheduler, {}),
    "ddim": (diffusers.DDIMScheduler, {}),
    "pndm": (diffusers.PNDMScheduler, {"skip_prk_steps": True}),
    "dpm": (diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}),
    "dpm++2m": (diffusers.DPMSolverMultistepScheduler, {}),
    "dpm++2m-karras": (diffusers.DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "dpm++2m-sde": (diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "dpm++2m-sde-karras": (diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True}),
    "dpm++2s": (diffusers.DPMSolverSinglestepScheduler, {}),
    "dpm++sde": (diffusers.DPMSolverSinglestepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "dpm++sde-karras": (
        diffusers.DPMSolverSinglestepScheduler,
        {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
    ),
    "euler": (diffusers.EulerDiscreteScheduler, {}),
    "euler-karras": (diffusers.EulerDiscreteScheduler, {"use_karras_sigmas": True}),
    "euler-a": (diffusers.EulerAncestralDiscreteScheduler, {}),
    "heun": (diffusers.HeunDiscreteScheduler, {}),
    "heun-karras": (diffusers.HeunDiscreteScheduler, {"use_karras_sigmas": True}),
    "dpm2": (diffusers.KDPM2DiscreteScheduler, {}),
    "dpm2-karras": (diffusers.KDPM2DiscreteScheduler, {"use_karras_sigmas": True}),
    "dpm2-a": (diffusers.KDPM2AncestralDiscreteScheduler, {}),
    "dpm2-a-karras": (diffusers.KDPM2AncestralDiscreteScheduler, {"use_karras_sigmas": True}),
    "lms": (diffusers.LMSDiscreteScheduler, {}),
    "lms-karras": (diffusers.LMSDiscreteScheduler, {"use_karras_sigmas": True}),
    "unipc": (diffusers.UniPCMultistepScheduler, {}),
    "deis": (diffusers.DEISMultistepScheduler, {}),
    "lcm": (diffusers.LCMScheduler, {}),
    "tcd": (diffusers.TCDScheduler, {}),
}

CLASSES = {
    "sd": diffusers.StableDiffusionPipeline,
    "sd-odd-width": diffusers.StableDiffusionPipeline,
    "sd-guidance-embedded": diffusers.StableDiffusionPipeline,
    "lcm": diffusers.LatentConsistencyModelPipeline,
    "sdxl": diffusers.StableDiffusionXLPipeline,
    "sdxl-plain": diffusers.StableDiffusionXLPipeline,
    "sd3": diffusers.StableDiffusion3Pipeline,
    "sd3-dynamic": diffusers.StableDiffusion3Pipeline,
    "flux-dev": diffusers.FluxPipeline,
    "flux-schnell": diffusers.FluxPipeline,
    "flux2-dev": diffusers.Flux2Pipeline,
    "flux2-klein": diffusers.Flux2KleinPipeline,
    "flux2-klein-distilled": diffusers.Flux2KleinPipeline,
    "qwen-image": diffusers.QwenImagePipeline,
    "z-image": diffusers.ZImagePipeline,
    "pixart-sigma": diffusers.PixArtSigmaPipeline,
    "sana": diffusers.SanaPipeline,
    "deepfloyd": diffusers.IFPipeline,
}
# Arguments of the call that a user who wants the prompt read as it is, and the size painted as it is, gives as well.
AS_ASKED: dict[Any, dict[str, Any]] = {
    diffusers.PixArtSigmaPipeline: {"use_resolution_binning": False, "clean_caption": False},
    diffusers.SanaPipeline: {"use_resolution_binning": False, "clean_caption": False, "complex_human_instruction": None},
    diffusers.IFPipeline: {"clean_caption": False},
    diffusers.IFImg2ImgPipeline: {"clean_caption": False},
    diffusers.IFInpaintingPipeline: {"clean_caption": False},
}
NUMBERS = (
    *("height", "width", "guidance_scale", "true_cfg_scale", "strength"),
    *("controlnet_conditioning_scale", "control_guidance_start", "control_guidance_end"),
)
BY_IMAGE = ("height", "width")  # which some calls take from the image that they are given
FLOW_REFERENCE: dict[str, tuple[Any, dict[str, Any]]] = {
    "flow-euler": (diffusers.FlowMatchEulerDiscreteScheduler, {}),
    "flow-dpm++2m": (diffusers.DPMSolverMultistepScheduler, {**FLOW, "algorithm_type": "dpmsolver++"}),
    "flow-unipc": (diffusers.UniPCMultistepScheduler, FLOW),
}
LEGAL: dict[str, list[str]] = {
    "sd": list(REFERENCE),
    "sd-odd-width": ["euler", "euler-a"],
    "sd-guidance-embedded": list(REFERENCE),
    "lcm": ["lcm"],
    "sdxl": list(REFERENCE),
    "sdxl-plain": ["euler"],
    "sd3": list(FLOW_REFERENCE),
    "sd3-dynamic": list(FLOW_REFERENCE),
    "flux-dev": list(FLOW_REFERENCE),
    "flux-schnell": ["flow-euler", "flow-unipc"],
    "flux2-dev": list(FLOW_REFERENCE),
    "flux2-klein": list(FLOW_REFERENCE),
    "flux2-klein-distilled": list(FLOW_REFERENCE),
    "qwen-image": ["flow-euler", "flow-unipc"],
    "z-image": ["flow-euler"],
    "pixart-sigma": list(REFERENCE),
    "sana": list(FLOW_REFERENCE),
    "deepfloyd": [
        name for name, (kind, _) in REFERENCE.items() if kind is diffusers.DDPMScheduler or (name.startswith("dpm") and "dpm2" not in name)
    ],
}
SLOT_FAMILIES = list(LEGAL)[:10]
CALL_FAMILIES = list(LEGAL)[10:]
DTYPES = ("float32", "bfloat16")


@dataclass
class Model:
    """One family at one dtype: ours behind a slot loop, and diffusers' own pipeline, both loaded on first use."""

    name: str
    folder: Path
    dtype: str = "float32"
    threads: int = 1
    batch_size: int = B

    @cached_property
    def info(self) -> ModelInfo:
        return describe(ModelSpec(id=str(self.folder)))

    @property
    def workers(self) -> Workers:
        return Workers(batch_size=self.batch_size, dtype=self.dtype, threads=self.threads)  # type: ignore[arg-type]

    @cached_property
    def loop(self) -> SlotLoop:
        loop = SlotLoop(lambda: load_model(self.info, self.workers))
        loop.ready.result()
        return loop

    @property
    def adapter(self) -> Any:
        return self.loop.ready.result()

    @property
    def denoiser(self) -> torch.nn.Module:
        found: torch.nn.Module = getattr(self.adapter.pipe, "unet", None) or self.adapter.pipe.transformer
        return found

    @cached_property
    def pipe(self) -> Any:
        absent = {"sd3-dynamic": {"text_encoder_3": None, "tokenizer_3": None}, "deepfloyd": {"safety_checker": None}}.get(self.name, {})
        return plain_pipeline(CLASSES[self.name], self.folder, self.dtype, self.threads, **absent)

    def close(self) -> None:
        if "loop" in vars(self):
            self.loop.close()

    def render(self, rows: Sequence[Sample]) -> list[np.ndarray]:
        return pixels(self.loop.submit(rows))

    @cached_property
    def known(self) -> dict[Sample, np.ndarray]:
        return {}

    def reference(self, wanted: Sample) -> np.ndarray:
        """Image 0 of diffusers' pipeline called with B copies of the row."""
        if wanted not in self.known:
            self.known[wanted] = reference(self.pipe, wanted, self.batch_size)
        return self.known[wanted]


def plain_pipeline(class_: Any, folder: Any, dtype: str = "float32", threads: int = 1, **parts: Any) -> Any:
    """diffusers' own pipeline, as a user would load it; slicing decodes image by image."""
    torch.set_num_threads(threads)
    pipe = class_.from_pretrained(folder, dtype=getattr(torch, dtype), **parts)
    pipe.set_progress_bar_config(disable=True)
    if hasattr(pipe, "vae"):
        pipe.vae.enable_slicing()
    pipe.original_config = dict(pipe.scheduler.config)
    return pipe


def reference(
    pipe: Any, wanted: Sample, batch_size: int = B, embeddings: dict[str, torch.Tensor] | None = None, **images: Any
) -> np.ndarray:
    """Image 0 of diffusers' pipeline called with B copies of the row. `embeddings`: given to the call instead of its texts;
    `images`: Pillow images by the call's argument names."""
    kind, changes = (REFERENCE | FLOW_REFERENCE)[wanted.sampler]
    if changes.get("use_flow_sigmas") and "shift" in pipe.original_config:
        changes = {**changes, "flow_shift": pipe.original_config["shift"]}
    pipe.scheduler = kind.from_config(pipe.original_config, **changes)
    texts = ("prompt", "negative_prompt", "prompt_2", "negative_prompt_2", "prompt_3", "negative_prompt_3")
    arguments: dict[str, Any] = {name: [getattr(wanted, name)] * batch_size for name in texts if getattr(wanted, name) is not None}
    arguments = arguments if embeddings is None else dict(embeddings)
    arguments |= {name: getattr(wanted, name) for name in NUMBERS if getattr(wanted, name) is not None}
    arguments |= AS_ASKED.get(type(pipe), {})
    arguments |= {name: [image] * batch_size for name, image in images.items()}
    if "negative_prompt" in arguments and isinstance(pipe, diffusers.Flux2KleinPipeline | diffusers.Flux2KleinInpaintPipeline):
        arguments["negative_prompt_embeds"] = pipe.encode_prompt(arguments.pop("negative_prompt"))[0]
    if type(pipe).__name__.startswith("QwenImage"):
        arguments |= padded_texts(pipe, {name: arguments.pop(name) for name in ("prompt", "negative_prompt") if name in arguments})
        del arguments["guidance_scale"]  # of another model of this class
    made = pipe(
        **{name: value for name, value in arguments.items() if name not in BY_IMAGE or name in inspect.signature(pipe.__call__).parameters},
        num_inference_steps=wanted.num_inference_steps,
        generator=[torch.Generator("cpu").manual_seed(wanted.seed) for _ in range(batch_size)],
    ).images
    return np.asarray(made[0])


def padded_texts(pipe: Any, texts: dict[str, list[str]]) -> dict[str, torch.Tensor]:
    """Embeddings with at least one and at most 64 rows of zeros behind them, a multiple of 64 in all, and masks."""
    found = {}
    for name, copies in texts.items():
        embeds, _ = pipe.encode_prompt(copies)
        more = 64 - embeds.shape[1] % 64
        found[f"{name}_embeds"] = torch.cat([embeds, embeds.new_zeros(len(embeds), more, embeds.shape[2])], dim=1)
        found[f"{name}_embeds_mask"] = torch.cat([torch.ones(embeds.shape[:2]), torch.zeros(len(embeds), more)], dim=1).long()
    return found


def pixels(futures: list[Future[Rendered]]) -> list[np.ndarray]:
    return [future.result(timeout=300).pixels for future in futures]


def row(number: int = 0, **values: Any) -> Sample:
    usual: dict[str, Any] = {
        "prompt": "a red circle",
        "negative_prompt": None,
        "seed": 7 + number,
        "height": 32,
        "width": 32,
        "num_inference_steps": 3,
        "guidance_scale": 4.5,
    }
    return Sample(key=SampleKey(number, 0), row_id=str(number), **usual | values)
