"""SDXL and its refiner: the model removes the first share of the noise, the refiner what is left (`denoising_end`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline

from renderfarm.config import Workers
from renderfarm.models.calls import State
from renderfarm.models.catalog import ModelInfo
from renderfarm.models.tasks import WithImages


class WithRefiner(WithImages):
    def __init__(self, info: ModelInfo, workers: Workers) -> None:
        super().__init__(info, workers)
        self.refiner = self._load_companion(StableDiffusionXLImg2ImgPipeline, "refiner", add_watermarker=False)

    def _render(self, slots: Sequence[State], generators: list[torch.Generator]) -> np.ndarray:
        sample, arguments = slots[0].sample, self._arguments(slots)
        self.refiner.scheduler = self._scheduler(sample, self.refiner.own_scheduler)
        hand_over = sample.denoising_end
        latents = self.pipe(**arguments, denoising_end=hand_over, generator=generators, output_type="latent").images
        theirs = {name: value for name, value in arguments.items() if name not in ("height", "width")}  # the latents have them
        pictures: np.ndarray = self.refiner(
            **theirs, image=latents, denoising_start=hand_over, generator=generators, output_type="np"
        ).images
        return pictures

    def profile(self) -> dict[str, Any]:
        config = self.refiner.own_scheduler.config
        return super().profile() | {"refiner_scheduler": {name: value for name, value in config.items() if not name.startswith("_")}}
