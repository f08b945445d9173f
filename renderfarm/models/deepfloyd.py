"""DeepFloyd IF: draws pixels, no latents; by itself its first stage (64×64 in the published one), or with the second one, which
enlarges its pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import IFSuperResolutionPipeline

from renderfarm.config import Workers
from renderfarm.models.calls import State, WholeCall
from renderfarm.models.catalog import ModelInfo
from renderfarm.models.loaded import described, only_finite

NO_CHECKER: dict[str, Any] = {"safety_checker": None, "watermarker": None}


class DeepFloyd(WholeCall):
    text_length = 77
    draws_with = "prepare_intermediate_images"

    def __init__(self, info: ModelInfo, workers: Workers) -> None:
        super().__init__(info, workers)
        self.second = None
        if "super_resolution" in info.companions:
            # the first stage reads the texts for both
            absent = {"text_encoder": None, "tokenizer": None, **NO_CHECKER}
            self.second = self._load_companion(IFSuperResolutionPipeline, "super_resolution", **absent)
            self.ratio = self.second.unet.config.sample_size // self.pipe.unet.config.sample_size

    def _load_arguments(self) -> dict[str, Any]:
        return NO_CHECKER

    def _compared(self) -> list[torch.nn.Module]:
        return super()._compared() if self.second is None else [*super()._compared(), self.second.unet]

    def _render(self, slots: Sequence[State], generators: list[torch.Generator]) -> np.ndarray:
        if self.second is None:
            return _finished(self.pipe(**self._arguments(slots), generator=generators, output_type="pt").images)
        samples, settings = [slot.sample for slot in slots], self.info.super_resolution
        first = self._arguments(slots) | {side: getattr(samples[0], side) // self.ratio for side in ("height", "width")}
        small = self.pipe(**first, generator=generators, output_type="pt").images
        negatives = [sample.negative_prompt or "" for sample in samples]
        texts = self.pipe.encode_prompt([sample.prompt for sample in samples], negative_prompt=negatives, device=self.device)
        self.pipe.maybe_free_model_hooks()  # with `offload: model`, its text encoder would stay beside the second stage
        self.second.scheduler = type(self.second.own_scheduler).from_config(self.second.own_scheduler.config)
        large = self.second(
            image=small,
            prompt_embeds=texts[0],
            negative_prompt_embeds=texts[1],
            height=samples[0].height,
            width=samples[0].width,
            **settings,
            generator=generators,
            output_type="pt",
        ).images
        return _finished(large)

    def profile(self) -> dict[str, Any]:
        if self.second is None:
            return super().profile()
        scheduler = described(self.second.own_scheduler.config)
        return super().profile() | {"super_resolution": dict(self.info.super_resolution) | {"scheduler": scheduler}}


def _finished(pictures_B3HW: torch.Tensor) -> np.ndarray:
    """What these calls do with `output_type="np"`, but NaN where a picture is not finite, which they would clip."""
    found: np.ndarray = (only_finite(pictures_B3HW) / 2 + 0.5).clamp(0, 1).cpu().permute(0, 2, 3, 1).float().numpy()
    return found
