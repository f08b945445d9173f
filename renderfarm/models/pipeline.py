"""What the adapters of diffusers' pipelines share: a pipeline's denoising loop, opened up to one step for B slots.

    texts ─▶ encode_texts ─▶ start ─▶ [ _denoise for B slots ─▶ guidance ─▶ own scheduler ] × steps ─▶ decode

A family's module says only what is its own: how a text is encoded, how latents begin, how its denoiser is called, how
latents leave for the autoencoder. Each statement there follows that pipeline's `__call__` (diffusers 0.42), so that a
sample's pixels equal those of the pipeline called with B copies of its row: noise from the sample's own generator,
scheduler calls on (1, …) tensors, guidance as a Python float.

Shapes: B slots, H×W pixels, C channels, h×w latents, L text positions, D features.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from renderfarm.config import Workers
from renderfarm.errors import Filtered
from renderfarm.models.base import Counted
from renderfarm.models.catalog import ModelInfo
from renderfarm.models.common import count_texts, fills_vectors, finite_pixels, initial_noise
from renderfarm.models.loaded import LoadedPipeline
from renderfarm.models.places import differing, mate_of, mates
from renderfarm.models.torch_setup import translated
from renderfarm.records import Sample
from renderfarm.samplers import copied, make_scheduler

Embedding = tuple[torch.Tensor, ...]  # of one text, without the batch's axis: L×D, and for some families a pooled D


@dataclass
class State:
    """One sample on its way. `latents`: (1, …) on the device; `negative`: None where no second prediction is made."""

    sample: Sample
    scheduler: Any
    generator: torch.Generator
    latents: torch.Tensor
    timesteps: list[torch.Tensor]
    step_arguments: dict[str, Any]
    prompt: Embedding
    negative: Embedding | None
    guidance_embedding: torch.Tensor | None = None
    next_step: int = 0


class SlotPipeline(LoadedPipeline):
    """A loaded diffusers pipeline behind the `SlotModel` protocol, one denoiser call a step."""

    cached_texts = 2048  # 0.2 MB each for CLIP in float32

    def __init__(self, info: ModelInfo, workers: Workers) -> None:
        super().__init__(info, workers)
        encoders = (getattr(self.pipe, name, None) for name in ("text_encoder", "text_encoder_2", "text_encoder_3"))
        if self.weighted is not None:
            self.cached_texts = 256  # longer ones
        self._count = functools.lru_cache(self.cached_texts)(self._count_anew)  # in the render thread, so a sweep's prompts once
        self.mixes_texts = all(fills_vectors(encoder) for encoder in encoders if encoder is not None)
        self._tried_texts_at = 0
        self._untouched: dict[str, Any] = {}  # a scheduler of each sampler, from which those of samples are copied

    def slot_group(self, sample: Sample) -> Hashable:
        chunks = None if self.weighted is None else self.weighted.padded(self._texts(sample))[0].chunks
        return sample.height, sample.width, self._guided(sample), sample.adapters, chunks

    def shape(self, sample: Sample) -> Hashable | None:
        return None if self.keeps_places else self.slot_group(sample)

    def texts(self, sample: Sample) -> tuple[Hashable, ...]:
        """(adapters, text) each: a LoRA may change text encoders, too."""
        texts = self._texts(sample)
        return tuple((sample.adapters, text) for text in (texts if self.weighted is None else self.weighted.padded(texts)))

    def _texts(self, sample: Sample) -> tuple[Hashable, ...]:
        negative = self._negative(sample) if self._guided(sample) else None
        return (self._positive(sample),) if negative is None else (self._positive(sample), negative)

    @translated
    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[Any]) -> list[Embedding]:
        self.turn_to("texts")
        found: dict[Hashable, Embedding] = {}
        for adapters in dict.fromkeys(adapters for adapters, _ in texts):
            self.use(adapters)
            these = [text for on, text in texts if on == adapters]
            found |= zip(((adapters, text) for text in these), self._encode_alike(these), strict=True)
        return [found[text] for text in texts]

    def _encode_alike(self, texts: Sequence[Any]) -> list[Embedding]:
        if self.weighted is not None:
            return self.weighted.encode(texts)
        if not (self.keeps_places or self._tried_texts_at == self.batch_size):
            self._try_texts(texts[0])
        if not self.mixes_texts:
            return [tuple(part[0] for part in self._encode([text] * self.batch_size)) for text in texts]
        padded = [*texts, *[texts[0]] * (self.batch_size - len(texts))]
        return list(zip(*self._encode(padded), strict=True))[: len(texts)]

    def _try_texts(self, text: Any) -> None:
        """Where a text's place among B decides its embedding, each is encoded alone."""
        parts = self._encode([text] * self.batch_size)
        self.mixes_texts &= all(torch.equal(row, part[0]) for part in parts for row in part)
        self._tried_texts_at = self.batch_size

    def count_tokens(self, sample: Sample) -> Counted:
        tokens, cut_off = self._count(self._positive(sample))
        negative = self._negative(sample) if self._guided(sample) else None
        return Counted(tokens, cut_off, None if negative is None else self._count(negative)[1])

    def _count_anew(self, texts: Hashable) -> tuple[int, str | None]:
        if self.weighted is not None:
            return self.weighted.count(texts), None
        return count_texts(texts if isinstance(texts, tuple) else (texts,), self._readers())

    @translated
    @torch.inference_mode()
    def start(self, sample: Sample, embeddings: Sequence[Embedding]) -> State:
        noise, generator = initial_noise(sample, self._noise_shape(sample), self.device, self.dtype)
        scheduler = self._scheduler(sample.sampler)
        latents = self._begin(scheduler, sample, noise)
        negative = None
        if self._guided(sample):
            negative = embeddings[1] if len(embeddings) > 1 else tuple(torch.zeros_like(part) for part in embeddings[0])
        return State(
            sample=sample,
            scheduler=scheduler,
            generator=generator,
            latents=latents,
            timesteps=list(scheduler.timesteps),
            step_arguments=self._step_arguments(scheduler, generator),
            prompt=embeddings[0],
            negative=negative,
            guidance_embedding=self._guidance_embedding(sample),
        )

    def _scheduler(self, sampler: str) -> Any:
        """One for a sample of its own. To make it of the configuration takes diffusers longer than a step takes a fast device."""
        if sampler not in self._untouched:
            self._untouched[sampler] = make_scheduler(sampler, self.pipe.scheduler.config)
        return copied(self._untouched[sampler])

    def calls(self, state: State) -> int:
        return len(state.timesteps)

    @translated
    @torch.inference_mode()
    def step(self, states: Sequence[State]) -> list[bool]:
        # empty slots repeat the first state: any finite filler will do, its result is thrown away
        slots = [*states, *[states[0]] * (self.batch_size - len(states))]
        for state in states:
            # most schedulers give back the dtype that they were given; after one that does not, diffusers' pipelines
            # either do this, or fail
            state.latents = state.latents.to(self.dtype)
        self.use(states[0].sample.adapters)
        self.turn_to("denoiser")
        conditional, unconditional = self._denoise(slots)
        for k, state in enumerate(states):
            predicted = conditional[k : k + 1]
            if unconditional is not None:
                without = unconditional[k : k + 1]
                predicted = without + self._guidance(state.sample) * (predicted - without)
            t = state.timesteps[state.next_step]
            state.latents = state.scheduler.step(predicted, t, state.latents, **state.step_arguments, return_dict=False)[0]
            state.next_step += 1
        return [state.next_step == len(state.timesteps) for state in states]

    @translated
    @torch.inference_mode()
    def places_that_differ(self, sample: Sample) -> list[int]:
        embeddings = [self.encode_texts([text])[0] for text in self.texts(sample)]
        state, mate = (self.start(one, embeddings) for one in (sample, mate_of(sample)))
        self.use(sample.adapters)
        self.turn_to("denoiser")
        alike, mixed = (self._denoise(slots) for slots in ([state] * self.batch_size, mates(state, mate, self.batch_size)))
        return differing([(a, b) for a, b in zip(alike, mixed, strict=True) if a is not None and b is not None], self.batch_size)

    @translated
    @torch.inference_mode()
    def decode(self, state: State) -> np.ndarray:
        self.turn_to("autoencoder")
        vae = self.pipe.vae
        # one image at a time, as vae.enable_slicing() does: a batched VAE in bf16 gives other pixels
        image = vae.decode(self._unscaled(state.latents.to(vae.dtype), state.sample), return_dict=False)[0]
        pixels = finite_pixels(image, self.pipe.image_processor)
        if self.info.safety_checker:
            self._check_content(image)
        return pixels

    def _check_content(self, image_13HW: torch.Tensor) -> None:
        # the checker blackens the tensor that it is given
        _, flagged = self.pipe.run_safety_checker(image_13HW.clone(), self.device, self.dtype)
        if flagged[0]:
            raise Filtered(
                "the model's safety checker refused this image; give the row another prompt or seed "
                "(model.safety_checker: false, in a new output, renders without the checker)"
            )

    # What a family says of its texts.

    @abstractmethod
    def _guided(self, sample: Sample) -> bool:
        """Whether a second, unconditional prediction is made."""

    def _guidance(self, sample: Sample) -> float:
        return sample.guidance_scale

    @abstractmethod
    def _positive(self, sample: Sample) -> Hashable: ...

    @abstractmethod
    def _negative(self, sample: Sample) -> Hashable | None:
        """The text to be guided away from; None: an embedding of zeros."""

    @abstractmethod
    def _encode(self, texts: Sequence[Any]) -> tuple[torch.Tensor, ...]:
        """Embeddings of B texts, one tensor (B, …) for each part of an `Embedding`."""

    @abstractmethod
    def _readers(self) -> Sequence[tuple[Any, int]]:
        """Tokenizer and length of every text encoder that is there, in the order of the texts."""

    # What a family says of its denoiser.

    @abstractmethod
    def _noise_shape(self, sample: Sample) -> tuple[int, ...]: ...

    @abstractmethod
    def _begin(self, scheduler: Any, sample: Sample, noise_1Chw: torch.Tensor) -> torch.Tensor:
        """Set the scheduler's timesteps; the latents before the first step."""

    def _step_arguments(self, scheduler: Any, generator: torch.Generator) -> dict[str, Any]:
        return {}

    def _guidance_embedding(self, sample: Sample) -> torch.Tensor | None:
        return None

    @abstractmethod
    def _denoise(self, slots: Sequence[State]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The conditional predictions of B states, and the unconditional ones where the slot group is guided."""

    @abstractmethod
    def _unscaled(self, latents: torch.Tensor, sample: Sample) -> torch.Tensor:
        """(1, C, h, w) for the autoencoder."""


def stacked(slots: Sequence[State], part: int, *, negative: bool) -> torch.Tensor:
    """One part of the slots' embeddings as a batch of B; with `negative`, of 2B: the unconditional half comes first."""
    prompts = [state.prompt[part] for state in slots]
    return torch.stack([*(state.negative[part] for state in slots if state.negative is not None), *prompts] if negative else prompts)


def halves(predicted: torch.Tensor, *, guided: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(conditional, unconditional) of one call for B, or for 2B with the unconditional half first."""
    if not guided:
        return predicted, None
    unconditional, conditional = predicted.chunk(2)
    return conditional, unconditional


def scale_and_shift(latents: torch.Tensor, config: Any) -> torch.Tensor:
    """Latents for the autoencoder, as SD3 and FLUX compute them."""
    scaled: torch.Tensor = (latents / config.scaling_factor) + config.shift_factor
    return scaled
