"""Stable Diffusion 3 and 3.5: a transformer trained for a flow; two CLIPs with pooled embeddings, and T5 if the folder has it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

from renderfarm.config import Workers
from renderfarm.models.catalog import ModelInfo
from renderfarm.models.pipeline import SlotPipeline, State, halves, scale_and_shift, stacked
from renderfarm.records import Sample

T5_LENGTH = 256  # the pipeline's default max_sequence_length


class StableDiffusion3(SlotPipeline):
    pipeline = StableDiffusion3Pipeline
    cached_texts = 256  # 3 MB each in bfloat16

    def __init__(self, info: ModelInfo, workers: Workers) -> None:
        super().__init__(info, workers)
        self.text_length = self.pipe.tokenizer_max_length if self.pipe.tokenizer_3 is None else T5_LENGTH

    def _load_arguments(self) -> dict[str, Any]:
        # the largest part is often left out; diffusers takes that as given only when it is said
        has_t5 = (Path(str(self.info.folder)) / "text_encoder_3").is_dir()
        return {} if has_t5 else {"text_encoder_3": None, "tokenizer_3": None}

    def _guided(self, sample: Sample) -> bool:
        return sample.guidance_scale > 1

    def _positive(self, sample: Sample) -> Hashable:
        return _three(sample.prompt, sample.prompt_2, sample.prompt_3)

    def _negative(self, sample: Sample) -> Hashable | None:
        return _three(sample.negative_prompt or "", sample.negative_prompt_2, sample.negative_prompt_3)

    def _encode(self, texts: Sequence[tuple[str, str, str]]) -> tuple[torch.Tensor, ...]:
        one, two, three = (list(column) for column in zip(*texts, strict=True))
        prompts_BLD, _, pooled_BD, _ = self.pipe.encode_prompt(
            one, two, three, self.device, 1, do_classifier_free_guidance=False, max_sequence_length=T5_LENGTH
        )
        return prompts_BLD, pooled_BD

    def _readers(self) -> Sequence[tuple[Any, int]]:
        clip = self.pipe.tokenizer_max_length
        readers = [(self.pipe.tokenizer, clip), (self.pipe.tokenizer_2, clip), (self.pipe.tokenizer_3, T5_LENGTH)]
        return [reader for reader in readers if reader[0] is not None]

    def _noise_shape(self, sample: Sample) -> tuple[int, ...]:
        scale = self.pipe.vae_scale_factor
        return 1, self.pipe.transformer.config.in_channels, sample.height // scale, sample.width // scale

    def _begin(self, scheduler: Any, sample: Sample, noise_1Chw: torch.Tensor) -> torch.Tensor:
        arguments = {}
        config = scheduler.config
        if config.get("use_dynamic_shifting", None):
            patch, (height, width) = self.pipe.transformer.config.patch_size, noise_1Chw.shape[2:]
            arguments["mu"] = calculate_shift(
                (height // patch) * (width // patch),
                config.get("base_image_seq_len", 256),
                config.get("max_image_seq_len", 4096),
                config.get("base_shift", 0.5),
                config.get("max_shift", 1.16),
            )
        scheduler.set_timesteps(sample.num_inference_steps, device=self.device, **arguments)
        # the pipeline leaves this out: where the first two timesteps are equal as integers (from about 500 steps), its
        # solvers begin at the second and fail at the end
        scheduler.set_begin_index(0)
        return noise_1Chw

    def _denoise(self, slots: Sequence[State]) -> tuple[torch.Tensor, torch.Tensor | None]:
        guided = slots[0].negative is not None
        latents = [s.latents for s in slots]
        times = [s.timesteps[s.next_step].float() for s in slots]
        predicted = self.pipe.transformer(
            hidden_states=torch.cat(latents * 2 if guided else latents),
            timestep=torch.stack(times * 2 if guided else times),
            encoder_hidden_states=stacked(slots, 0, negative=guided),
            pooled_projections=stacked(slots, 1, negative=guided),
            return_dict=False,
        )[0]
        return halves(predicted, guided=guided)

    def _unscaled(self, latents: torch.Tensor, sample: Sample) -> torch.Tensor:
        return scale_and_shift(latents, self.pipe.vae.config)


def _three(first: str, second: str | None, third: str | None) -> tuple[str, str, str]:
    return first, first if second is None else second, first if third is None else third
