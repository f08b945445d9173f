"""DeepFloyd IF: draws pixels, no latents; by itself its first stage (64×64 in the published one), or with stages behind it that
enlarge its pictures: its own second one, and Stable Diffusion's ×4 upscaler."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import (
    IFImg2ImgSuperResolutionPipeline,
    IFInpaintingSuperResolutionPipeline,
    IFSuperResolutionPipeline,
    StableDiffusionUpscalePipeline,
)
from PIL import Image

from renderfarm.config import Workers
from renderfarm.models.calls import State, WholeCall
from renderfarm.models.catalog import ModelInfo
from renderfarm.models.families import Task
from renderfarm.models.loaded import described, only_finite
from renderfarm.records import Sample

NO_CHECKER: dict[str, Any] = {"safety_checker": None, "watermarker": None}
SECOND_STAGES: dict[Task, Any] = {
    "text-to-image": IFSuperResolutionPipeline,
    "image-to-image": IFImg2ImgSuperResolutionPipeline,
    "inpainting": IFInpaintingSuperResolutionPipeline,
}


class DeepFloyd(WholeCall):
    text_length = 77
    draws_with = "prepare_intermediate_images"

    def __init__(self, info: ModelInfo, workers: Workers) -> None:
        super().__init__(info, workers)
        self.stages: dict[str, Any] = {}
        self.ratios = {"first": 1, "second": 1}
        """How many times smaller than the row's size each stage works."""
        if "super_resolution" in info.stages:
            # the first stage reads the texts for both
            absent = {"text_encoder": None, "tokenizer": None, **NO_CHECKER}
            second = self._load_companion(SECOND_STAGES[info.task], "super_resolution", **absent)
            self.stages["super_resolution"] = second
            self.ratios["first"] = second.unet.config.sample_size // self.pipe.unet.config.sample_size
        if "upscaler" in info.stages:
            third = self._load_companion(StableDiffusionUpscalePipeline, "upscaler", **NO_CHECKER)
            self.stages["upscaler"] = third
            self.ratios = {stage: ratio * third.vae_scale_factor for stage, ratio in self.ratios.items()}
        self.settings = {name: _settings(stage, info.stages[name]) for name, stage in self.stages.items()}

    def _load_arguments(self) -> dict[str, Any]:
        return NO_CHECKER

    def _compared(self) -> list[torch.nn.Module]:
        return [*super()._compared(), *(stage.unet for stage in self.stages.values())]

    def _arguments(self, states: Sequence[State]) -> dict[str, Any]:
        """The first stage's."""
        arguments = super()._arguments(states)
        return arguments | {side: arguments[side] // self.ratios["first"] for side in ("height", "width") if side in arguments}

    def _images(self, samples: Sequence[Sample]) -> dict[str, Any]:
        return _arrays(super()._images(samples), self.ratios["first"])

    def _render(self, slots: Sequence[State], generators: list[torch.Generator]) -> np.ndarray:
        samples = [slot.sample for slot in slots]
        pictures = self.pipe(**self._arguments(slots), generator=generators, output_type="pt").images
        if "super_resolution" in self.stages:
            pictures = self._enlarged(pictures, samples, generators)
        # what these calls do with `output_type="np"`, but NaN where a picture is not finite, which they would clip
        pictures = (only_finite(pictures) / 2 + 0.5).clamp(0, 1)
        if "upscaler" in self.stages:
            pictures = self._upscaled(pictures, samples, generators)
        found: np.ndarray = pictures.cpu().permute(0, 2, 3, 1).float().numpy()
        return found

    def _enlarged(self, small_B3hw: torch.Tensor, samples: Sequence[Sample], generators: list[torch.Generator]) -> torch.Tensor:
        prompts, negatives = _texts(samples)
        texts = self.pipe.encode_prompt(prompts, negative_prompt=negatives, device=self.device)
        self.pipe.maybe_free_model_hooks()  # with `offload: model`, its text encoder would stay beside the second stage
        ratio = self.ratios["second"]
        if images := _arrays(super()._images(samples), ratio):  # and the row's strength, which is the first stage's
            names = {"image": "original_image", "mask_image": "mask_image"}
            asked = {names[name]: pictures for name, pictures in images.items() if name in names}
        else:
            asked = {side: getattr(samples[0], side) // ratio for side in ("height", "width")}
        asked |= {"prompt_embeds": texts[0], "negative_prompt_embeds": texts[1]}
        return self._called("super_resolution", image=small_B3hw, **asked, generator=generators)

    def _upscaled(self, small_B3hw: torch.Tensor, samples: Sequence[Sample], generators: list[torch.Generator]) -> torch.Tensor:
        """From and to 0..1: given -1..1, this call would look at the darkest pixel of the batch to tell which it is."""
        prompts, negatives = _texts(samples)
        return self._called("upscaler", image=small_B3hw, prompt=prompts, negative_prompt=negatives, generator=generators)

    def _called(self, stage: str, **arguments: Any) -> torch.Tensor:
        pipe = self.stages[stage]
        pipe.scheduler = type(pipe.own_scheduler).from_config(pipe.own_scheduler.config)
        found: torch.Tensor = pipe(**arguments, **self.settings[stage], output_type="pt").images
        return found

    def places_that_differ(self, sample: Sample) -> list[int]:
        """A few steps of the later stages will do, as of the first."""
        settings, self.settings = self.settings, {name: _few_steps(one) for name, one in self.settings.items()}
        try:
            return super().places_that_differ(sample)
        finally:
            self.settings = settings

    def profile(self) -> dict[str, Any]:
        schedulers = {name: {"scheduler": described(stage.own_scheduler.config)} for name, stage in self.stages.items()}
        return super().profile() | {name: self.settings[name] | scheduler for name, scheduler in schedulers.items()}


def _settings(stage: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of its call, as the job says or else the call; not all of them are every task's."""
    taken = inspect.signature(stage.__call__).parameters
    return {name: taken[name].default if value is None else value for name, value in given.items() if name in taken}


def _few_steps(settings: dict[str, Any]) -> dict[str, Any]:
    few = {"num_inference_steps": min(4, settings["num_inference_steps"]), "strength": 1.0}
    return settings | {name: value for name, value in few.items() if name in settings}


def _texts(samples: Sequence[Sample]) -> tuple[list[str], list[str]]:
    """Prompts and negative prompts."""
    return [sample.prompt for sample in samples], [sample.negative_prompt or "" for sample in samples]


def _arrays(arguments: dict[str, Any], ratio: int) -> dict[str, Any]:
    """Pictures as arrays, H×W×3 from -1 to 1 and masks H×W from 0 to 1: what these calls make of Pillow's, but in the row's
    size (over `ratio`), and not in the one that the stage was trained on."""

    def array(picture: Image.Image) -> np.ndarray:
        smaller = picture.resize((picture.width // ratio, picture.height // ratio), Image.Resampling.BICUBIC)
        pixels = np.asarray(smaller, np.float32)
        return pixels / 255 if picture.mode == "L" else pixels / 127.5 - 1

    return {name: list(map(array, value)) if isinstance(value, list) else value for name, value in arguments.items()}
