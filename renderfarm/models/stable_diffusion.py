"""Stable Diffusion 1/2: the denoising loop of StableDiffusionPipeline, opened up to one step for B slots.

Every statement follows diffusers' `StableDiffusionPipeline.__call__` (0.42), so that a sample's pixels equal those
of that pipeline called with B copies of its row: latents drawn from the sample's own generator, scheduler calls on
(1, 4, h, w) tensors, the unconditional half before the conditional one, guidance as a Python float.
"""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline

from renderfarm.config import Workers
from renderfarm.errors import Fatal
from renderfarm.models.catalog import ModelInfo
from renderfarm.models.common import count_tokens, finite_pixels, initial_noise
from renderfarm.models.torch_setup import describe_profile, prepare_torch, translated
from renderfarm.records import Sample
from renderfarm.samplers import make_scheduler


@dataclass
class State:
    """One sample on its way. `latents_1Chw` live on the device; `embeddings`: (prompt, negative or None), each L×D."""

    sample: Sample
    scheduler: Any
    generator: torch.Generator
    timesteps: list[torch.Tensor]
    latents_1Chw: torch.Tensor
    step_arguments: dict[str, Any]
    prompt_LD: torch.Tensor
    negative_LD: torch.Tensor | None
    next_step: int = 0


class StableDiffusion:
    """A loaded pipeline behind the `SlotModel` protocol."""

    def __init__(self, info: ModelInfo, workers: Workers) -> None:
        self.info, self.batch_size = info, workers.batch_size
        self.device = prepare_torch(workers)
        self.dtype = getattr(torch, workers.dtype)
        assert info.folder is not None
        try:
            self.pipe = StableDiffusionPipeline.from_pretrained(
                info.folder, dtype=self.dtype, use_safetensors=True, local_files_only=True, safety_checker=None
            ).to(self.device)
        except Exception as error:  # damaged weights raise many kinds; none of them is the row's fault
            raise Fatal(f"model {info.id}: cannot be loaded from {info.folder}: {error}") from error
        self.workers = workers
        self.text_length = self.pipe.tokenizer.model_max_length

    def profile(self) -> dict[str, Any]:
        # names with `_` are diffusers' own notes, one of them a list in hash order
        scheduler = {key: value for key, value in self.pipe.scheduler.config.items() if not key.startswith("_")}
        own = {"text_length": self.text_length, "vae_slicing": True, "scheduler": scheduler}
        return describe_profile(self.info, self.workers, self.device) | own

    def slot_group(self, sample: Sample) -> Hashable:
        return sample.height, sample.width, self._guided(sample)

    def _guided(self, sample: Sample) -> bool:
        return sample.guidance_scale > 1

    def texts(self, sample: Sample) -> tuple[str, ...]:
        return (sample.prompt, sample.negative_prompt or "") if self._guided(sample) else (sample.prompt,)

    @translated
    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str]) -> list[torch.Tensor]:
        padded = [*texts, *[""] * (self.batch_size - len(texts))]
        embeddings_BLD, _ = self.pipe.encode_prompt(padded, self.device, 1, do_classifier_free_guidance=False)
        return list(embeddings_BLD[: len(texts)])

    def count_tokens(self, prompt: str) -> tuple[int, str | None]:
        return count_tokens(self.pipe.tokenizer, prompt, self.text_length)

    @torch.inference_mode()
    def start(self, sample: Sample, embeddings: Sequence[torch.Tensor]) -> State:
        scheduler = make_scheduler(sample.sampler, self.pipe.scheduler.config)
        scheduler.set_timesteps(sample.num_inference_steps, device=self.device)
        scale = self.pipe.vae_scale_factor
        shape = (1, self.pipe.unet.config.in_channels, sample.height // scale, sample.width // scale)
        latents, generator = initial_noise(sample, shape, self.device, self.dtype)
        accepted = inspect.signature(scheduler.step).parameters
        arguments: dict[str, Any] = {"eta": 0.0} if "eta" in accepted else {}
        if "generator" in accepted:
            arguments["generator"] = generator
        return State(
            sample=sample,
            scheduler=scheduler,
            generator=generator,
            timesteps=list(scheduler.timesteps),
            latents_1Chw=latents * scheduler.init_noise_sigma,
            step_arguments=arguments,
            prompt_LD=embeddings[0],
            negative_LD=embeddings[1] if len(embeddings) > 1 else None,
        )

    @translated
    @torch.inference_mode()
    def step(self, states: Sequence[State]) -> list[bool]:
        guided = states[0].negative_LD is not None
        # empty slots repeat the first state: any finite filler will do, its result is thrown away
        slots = [*states, *[states[0]] * (self.batch_size - len(states))]
        inputs = [s.scheduler.scale_model_input(s.latents_1Chw, s.timesteps[s.next_step]) for s in slots]
        times = [s.timesteps[s.next_step].float() for s in slots]
        texts: list[Any] = [s.prompt_LD for s in slots]
        if guided:
            inputs, times = inputs * 2, times * 2
            texts = [s.negative_LD for s in slots] + texts
        predicted = self.pipe.unet(
            torch.cat(inputs), torch.stack(times).to(self.device), encoder_hidden_states=torch.stack(texts), return_dict=False
        )[0]
        half = self.batch_size if guided else 0
        for k, state in enumerate(states):
            noise = predicted[half + k : half + k + 1]
            if guided:
                unconditional = predicted[k : k + 1]
                noise = unconditional + state.sample.guidance_scale * (noise - unconditional)
            t = state.timesteps[state.next_step]
            state.latents_1Chw = state.scheduler.step(noise, t, state.latents_1Chw, **state.step_arguments, return_dict=False)[0]
            state.next_step += 1
        return [state.next_step == len(state.timesteps) for state in states]

    @translated
    @torch.inference_mode()
    def decode(self, state: State) -> np.ndarray:
        vae = self.pipe.vae
        # one image at a time, as vae.enable_slicing() does: a batched VAE in bf16 gives other pixels
        image = vae.decode(state.latents_1Chw / vae.config.scaling_factor, return_dict=False)[0]
        return finite_pixels(image, self.pipe.image_processor)
