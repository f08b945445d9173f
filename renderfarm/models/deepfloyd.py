"""DeepFloyd IF: draws pixels, no latents; by itself its first stage (64×64 in the published one), or with the second one, which
enlarges its pictures."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import IFImg2ImgSuperResolutionPipeline, IFInpaintingSuperResolutionPipeline, IFSuperResolutionPipeline
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
        self.second: Any = None
        self.ratio = 1
        if "super_resolution" in info.companions:
            # the first stage reads the texts for both
            absent = {"text_encoder": None, "tokenizer": None, **NO_CHECKER}
            self.second = self._load_companion(SECOND_STAGES[info.task], "super_resolution", **absent)
            self.ratio = self.second.unet.config.sample_size // self.pipe.unet.config.sample_size
            self.settings = _settings(self.second, info)

    def _load_arguments(self) -> dict[str, Any]:
        return NO_CHECKER

    def _compared(self) -> list[torch.nn.Module]:
        return super()._compared() if self.second is None else [*super()._compared(), self.second.unet]

    def _arguments(self, states: Sequence[State]) -> dict[str, Any]:
        """The first stage's, whose pictures are smaller than the rows' where there is a second one."""
        arguments = super()._arguments(states)
        return arguments | {side: arguments[side] // self.ratio for side in ("height", "width") if side in arguments}

    def _images(self, samples: Sequence[Sample]) -> dict[str, Any]:
        return _arrays(super()._images(samples), self.ratio)

    def _render(self, slots: Sequence[State], generators: list[torch.Generator]) -> np.ndarray:
        pictures = self.pipe(**self._arguments(slots), generator=generators, output_type="pt").images
        if self.second is not None:
            pictures = self._enlarged(pictures, [slot.sample for slot in slots], generators)
        # what these calls do with `output_type="np"`, but NaN where a picture is not finite, which they would clip
        found: np.ndarray = (only_finite(pictures) / 2 + 0.5).clamp(0, 1).cpu().permute(0, 2, 3, 1).float().numpy()
        return found

    def _enlarged(self, small_B3hw: torch.Tensor, samples: Sequence[Sample], generators: list[torch.Generator]) -> torch.Tensor:
        negatives = [sample.negative_prompt or "" for sample in samples]
        texts = self.pipe.encode_prompt([sample.prompt for sample in samples], negative_prompt=negatives, device=self.device)
        self.second.scheduler = type(self.second.own_scheduler).from_config(self.second.own_scheduler.config)
        if images := _arrays(super()._images(samples)):
            asked = {"original_image": images["image"]} | {name: images[name] for name in ("mask_image",) if name in images}
        else:
            asked = {side: getattr(samples[0], side) for side in ("height", "width")}
        large: torch.Tensor = self.second(
            image=small_B3hw,
            prompt_embeds=texts[0],
            negative_prompt_embeds=texts[1],
            **asked,
            **self.settings,
            generator=generators,
            output_type="pt",
        ).images
        return large

    def profile(self) -> dict[str, Any]:
        if self.second is None:
            return super().profile()
        scheduler = described(self.second.own_scheduler.config)
        return super().profile() | {"super_resolution": self.settings | {"scheduler": scheduler}}


def _settings(second: Any, info: ModelInfo) -> dict[str, Any]:
    """The second stage's arguments, as the job says or else its call; not all of them are every task's."""
    taken = inspect.signature(second.__call__).parameters
    given = info.super_resolution.items()
    return {name: taken[name].default if value is None else value for name, value in given if name in taken}


def _arrays(arguments: dict[str, Any], ratio: int = 1) -> dict[str, Any]:
    """Pictures as arrays, H×W×3 from -1 to 1 and masks H×W from 0 to 1: what these calls make of Pillow's, but in the row's
    size (over `ratio`), and not in the one that the stage was trained on."""

    def array(picture: Image.Image) -> np.ndarray:
        smaller = picture.resize((picture.width // ratio, picture.height // ratio), Image.Resampling.BICUBIC)
        pixels = np.asarray(smaller, np.float32)
        return pixels / 255 if picture.mode == "L" else pixels / 127.5 - 1

    return {name: list(map(array, value)) if isinstance(value, list) else value for name, value in arguments.items()}
