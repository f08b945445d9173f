"""SDXL and its refiner: the model removes the first share of the noise, the refiner what is left (`denoising_end`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline

from renderfarm.config import Workers
from renderfarm.errors import InvalidInput
from renderfarm.models.calls import State
from renderfarm.models.catalog import ModelInfo
from renderfarm.models.loaded import described
from renderfarm.models.tasks import WithImages
from renderfarm.records import Sample


class WithRefiner(WithImages):
    def __init__(self, info: ModelInfo, workers: Workers) -> None:
        super().__init__(info, workers)
        self.refiner = self._load_companion(StableDiffusionXLImg2ImgPipeline, "refiner", add_watermarker=False)

    def start(self, sample: Sample, embeddings: Sequence[Any]) -> State:
        """Raises InvalidInput where one of the two would have nothing to do: diffusers would paint what is there."""
        of_each = []
        for pipe, is_first in ((self.pipe, True), (self.refiner, False)):
            scheduler, end = self._scheduler(sample, pipe.own_scheduler), sample.denoising_end or 0.0
            scheduler.set_timesteps(sample.num_inference_steps)
            trained = scheduler.config.num_train_timesteps
            cutoff = round(trained - end * trained)  # as both calls do
            of_each.append(sum(bool(t >= cutoff) == is_first for t in scheduler.timesteps))
        if not all(of_each):
            raise InvalidInput(
                f"denoising_end {sample.denoising_end} of {sample.num_inference_steps} steps leaves {of_each[0]} to the model and "
                f"{of_each[1]} to its refiner; give more steps, or a denoising_end nearer to the middle"
            )
        return super().start(sample, embeddings)

    def _compared(self) -> list[torch.nn.Module]:
        return [*super()._compared(), self.refiner.unet]

    def _short(self, sample: Sample) -> Sample:
        return replace(super()._short(sample), denoising_end=0.5)

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
        return super().profile() | {"refiner_scheduler": described(self.refiner.own_scheduler.config)}
