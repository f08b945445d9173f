"""FLUX.1: a transformer over packed latents, guidance as an embedding, and true guidance as a second call."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from renderfarm.models.pipeline import SlotPipeline, State, scale_and_shift
from renderfarm.records import Sample


class Flux(SlotPipeline):
    pipeline = FluxPipeline
    cached_texts = 256  # 4 MB each in bfloat16
    text_length = 512  # T5's, and the pipeline's default max_sequence_length; CLIP gives a pooled embedding only

    def _guided(self, sample: Sample) -> bool:
        return self._guidance(sample) > 1 and sample.negative_prompt is not None

    def _guidance(self, sample: Sample) -> float:
        return 1.0 if sample.true_cfg_scale is None else sample.true_cfg_scale

    def _positive(self, sample: Sample) -> Hashable:
        return sample.prompt, sample.prompt if sample.prompt_2 is None else sample.prompt_2

    def _negative(self, sample: Sample) -> Hashable | None:
        first = sample.negative_prompt or ""
        return first, first if sample.negative_prompt_2 is None else sample.negative_prompt_2

    def _encode(self, texts: Sequence[tuple[str, str]]) -> tuple[torch.Tensor, ...]:
        first, second = (list(column) for column in zip(*texts, strict=True))
        prompts_BLD, pooled_BD, _ = self.pipe.encode_prompt(first, second, self.device, 1, max_sequence_length=self.text_length)
        return prompts_BLD, pooled_BD

    def _readers(self) -> Sequence[tuple[Any, int]]:
        return (self.pipe.tokenizer, self.pipe.tokenizer_max_length), (self.pipe.tokenizer_2, self.text_length)

    def _patches(self, sample: Sample) -> tuple[int, int]:
        """Rows and columns of 2×2 patches."""
        side = 2 * self.pipe.vae_scale_factor
        return sample.height // side, sample.width // side

    def _noise_shape(self, sample: Sample) -> tuple[int, ...]:
        rows, columns = self._patches(sample)
        return 1, self.pipe.transformer.config.in_channels // 4, 2 * rows, 2 * columns

    def _begin(self, scheduler: Any, sample: Sample, noise_1Chw: torch.Tensor) -> torch.Tensor:
        latents: torch.Tensor = self.pipe._pack_latents(noise_1Chw, *noise_1Chw.shape)
        steps, config = sample.num_inference_steps, scheduler.config
        mu = calculate_shift(
            latents.shape[1],
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.15),
        )
        if config.get("use_flow_sigmas"):
            scheduler.set_timesteps(steps, device=self.device, mu=mu)
        else:
            scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), device=self.device, mu=mu)
        scheduler.set_begin_index(0)
        return latents

    def _denoise(self, slots: Sequence[State]) -> tuple[torch.Tensor, torch.Tensor | None]:
        conditional = self._transformer(slots, [s.prompt for s in slots])
        negatives = [s.negative for s in slots if s.negative is not None]
        return conditional, self._transformer(slots, negatives) if negatives else None

    def _transformer(self, slots: Sequence[State], embeddings: Sequence[tuple[torch.Tensor, ...]]) -> torch.Tensor:
        transformer = self.pipe.transformer
        guidance = torch.tensor([s.sample.guidance_scale for s in slots], dtype=torch.float32, device=self.device)
        prompts_BLD = torch.stack([prompt_LD for prompt_LD, _ in embeddings])
        predicted: torch.Tensor = transformer(
            hidden_states=torch.cat([s.latents for s in slots]),
            timestep=torch.stack([s.timesteps[s.next_step].to(self.dtype) for s in slots]) / 1000,
            guidance=guidance if transformer.config.guidance_embeds else None,
            pooled_projections=torch.stack([pooled_D for _, pooled_D in embeddings]),
            encoder_hidden_states=prompts_BLD,
            txt_ids=torch.zeros(prompts_BLD.shape[1], 3).to(device=self.device, dtype=self.dtype),
            img_ids=self.pipe._prepare_latent_image_ids(len(slots), *self._patches(slots[0].sample), self.device, self.dtype),
            joint_attention_kwargs={},
            return_dict=False,
        )[0]
        return predicted

    def _unscaled(self, latents: torch.Tensor, sample: Sample) -> torch.Tensor:
        unpacked = self.pipe._unpack_latents(latents, sample.height, sample.width, self.pipe.vae_scale_factor)
        return scale_and_shift(unpacked, self.pipe.vae.config)
