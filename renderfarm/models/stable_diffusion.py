"""Stable Diffusion 1/2 and latent consistency models: a UNet, one CLIP, the unconditional half before the conditional."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from diffusers import LatentConsistencyModelPipeline, StableDiffusionPipeline

from renderfarm.config import Workers
from renderfarm.models.catalog import ModelInfo
from renderfarm.models.pipeline import SlotPipeline, State, halves, stacked
from renderfarm.records import Sample


@functools.cache
def _accepted(scheduler: type) -> frozenset[str]:
    """The arguments of its step."""
    return frozenset(inspect.signature(scheduler.step).parameters)  # type: ignore[attr-defined]


class UNetPipeline(SlotPipeline):
    """What Stable Diffusion 1/2 and XL share."""

    def _guided(self, sample: Sample) -> bool:
        # a UNet with `time_cond_proj_dim` was distilled with guidance in it, and takes its scale as an embedding
        return sample.guidance_scale > 1 and self.pipe.unet.config.time_cond_proj_dim is None

    def _noise_shape(self, sample: Sample) -> tuple[int, ...]:
        scale = self.pipe.vae_scale_factor
        return 1, self.pipe.unet.config.in_channels, sample.height // scale, sample.width // scale

    def _begin(self, scheduler: Any, sample: Sample, noise_1Chw: torch.Tensor) -> torch.Tensor:
        scheduler.set_timesteps(sample.num_inference_steps, device=self.device)
        latents: torch.Tensor = noise_1Chw * scheduler.init_noise_sigma
        return latents

    def _step_arguments(self, scheduler: Any, generator: torch.Generator) -> dict[str, Any]:
        accepted = _accepted(type(scheduler))  # type: ignore[arg-type]  # classes can be hashed, whatever mypy takes Any for
        arguments: dict[str, Any] = {"eta": 0.0} if "eta" in accepted else {}
        return arguments | {"generator": generator} if "generator" in accepted else arguments

    def _guidance_embedding(self, sample: Sample) -> torch.Tensor | None:
        width = self.pipe.unet.config.time_cond_proj_dim
        if width is None:
            return None
        # for B copies, as the pipeline does: which lane of a vector unit computes a sine depends on its place
        scales = torch.tensor(sample.guidance_scale - 1).repeat(self.batch_size)
        embedding: torch.Tensor = self.pipe.get_guidance_scale_embedding(scales, embedding_dim=width)[0]
        return embedding.to(device=self.device, dtype=self.dtype)

    def _denoise(self, slots: Sequence[State]) -> tuple[torch.Tensor, torch.Tensor | None]:
        guided = slots[0].negative is not None
        inputs = [s.scheduler.scale_model_input(s.latents, s.timesteps[s.next_step]) for s in slots]
        times = [s.timesteps[s.next_step].float() for s in slots]
        if guided:
            inputs, times = inputs * 2, times * 2
        embeddings = [s.guidance_embedding for s in slots if s.guidance_embedding is not None]
        predicted = self.pipe.unet(
            torch.cat(inputs),
            torch.stack(times).to(self.device),
            encoder_hidden_states=stacked(slots, 0, negative=guided),
            timestep_cond=torch.stack(embeddings) if embeddings else None,
            added_cond_kwargs=self._added_conditions(slots),
            return_dict=False,
        )[0]
        return halves(predicted, guided=guided)

    def _added_conditions(self, slots: Sequence[State]) -> dict[str, torch.Tensor] | None:
        return None

    def _unscaled(self, latents: torch.Tensor, sample: Sample) -> torch.Tensor:
        unscaled: torch.Tensor = latents / self.pipe.vae.config.scaling_factor
        return unscaled


class StableDiffusion(UNetPipeline):
    pipeline = StableDiffusionPipeline

    def __init__(self, info: ModelInfo, workers: Workers) -> None:
        super().__init__(info, workers)
        self.text_length = self.pipe.tokenizer.model_max_length

    def _load_arguments(self) -> dict[str, Any]:
        return {} if self.info.safety_checker else {"safety_checker": None}

    def _positive(self, sample: Sample) -> Hashable:
        return sample.prompt

    def _negative(self, sample: Sample) -> Hashable | None:
        return sample.negative_prompt or ""

    def _encode(self, texts: Sequence[str]) -> tuple[torch.Tensor, ...]:
        return (self.pipe.encode_prompt(list(texts), self.device, 1, do_classifier_free_guidance=False)[0],)

    def _readers(self) -> Sequence[tuple[Any, int]]:
        return ((self.pipe.tokenizer, self.text_length),)


class LatentConsistency(StableDiffusion):
    """Never guided by a second prediction: its UNet takes the scale as an embedding, and there is no negative prompt."""

    pipeline = LatentConsistencyModelPipeline
