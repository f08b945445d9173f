"""Stable Diffusion XL: two CLIPs of which the second gives a pooled embedding too, and sizes as a condition."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline

from renderfarm.config import Workers
from renderfarm.models.catalog import ModelInfo
from renderfarm.models.pipeline import State, stacked
from renderfarm.models.stable_diffusion import UNetPipeline
from renderfarm.records import Sample


class StableDiffusionXL(UNetPipeline):
    pipeline = StableDiffusionXLPipeline

    def __init__(self, info: ModelInfo, workers: Workers) -> None:
        super().__init__(info, workers)
        self.text_length = self.pipe.tokenizer.model_max_length

    def _load(self, folder: str) -> Any:
        pipe = super()._load(folder)
        if self.dtype == torch.float16 and pipe.vae.config.force_upcast:
            pipe.vae.to(torch.float32)  # the pipeline does so for each call: in float16 this autoencoder overflows
        return pipe

    def _load_arguments(self) -> dict[str, Any]:
        # the pipeline marks its pictures where a package for that happens to be installed; pixels must not depend on it
        return {"add_watermarker": False}

    def _positive(self, sample: Sample) -> Hashable:
        return sample.prompt, sample.prompt if sample.prompt_2 is None else sample.prompt_2

    def _negative(self, sample: Sample) -> Hashable | None:
        if sample.negative_prompt is None and self.pipe.config.force_zeros_for_empty_prompt:
            return None
        first = sample.negative_prompt or ""
        return first, first if sample.negative_prompt_2 is None else sample.negative_prompt_2

    def _encode(self, texts: Sequence[tuple[str, str]]) -> tuple[torch.Tensor, ...]:
        first, second = (list(column) for column in zip(*texts, strict=True))
        prompts_BLD, _, pooled_BD, _ = self.pipe.encode_prompt(first, second, self.device, 1, do_classifier_free_guidance=False)
        return prompts_BLD, pooled_BD

    def _readers(self) -> Sequence[tuple[Any, int]]:
        return (self.pipe.tokenizer, self.text_length), (self.pipe.tokenizer_2, self.text_length)

    def _begin(self, scheduler: Any, sample: Sample, noise_1Chw: torch.Tensor) -> torch.Tensor:
        latents = super()._begin(scheduler, sample, noise_1Chw)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)
        return latents

    def _added_conditions(self, slots: Sequence[State]) -> dict[str, torch.Tensor] | None:
        guided = slots[0].negative is not None
        size = (slots[0].sample.height, slots[0].sample.width)  # one size in a slot group
        width = self.pipe.text_encoder_2.config.projection_dim
        ids = self.pipe._get_add_time_ids(size, (0, 0), size, dtype=self.dtype, text_encoder_projection_dim=width)
        ids_B6 = ids.to(self.device).repeat(len(slots) * (2 if guided else 1), 1)
        return {"text_embeds": stacked(slots, 1, negative=guided), "time_ids": ids_B6}

    def _unscaled(self, latents: torch.Tensor, sample: Sample) -> torch.Tensor:
        config = self.pipe.vae.config
        mean, deviation = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
        if mean is None or deviation is None:
            return super()._unscaled(latents, sample)
        mean_1C11, deviation_1C11 = (
            torch.tensor(values).view(1, 4, 1, 1).to(latents.device, latents.dtype) for values in (mean, deviation)
        )
        unscaled: torch.Tensor = latents * deviation_1C11 / config.scaling_factor + mean_1C11
        return unscaled
