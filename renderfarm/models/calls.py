"""Families whose denoising loop is not opened up: one *step* is diffusers' whole `__call__` on B rows with equal arguments.

A family's module says only what is its own: the arguments of the call, and what its text encoder reads. The slot group
is what a call takes once for all its rows (size, steps, guidance, sampler), so a row's pixels equal those of the
pipeline called with B copies of it.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import diffusers
import numpy as np
import torch

from renderfarm.config import Workers
from renderfarm.errors import NonFiniteOutput, RenderFailed
from renderfarm.models.base import Counted
from renderfarm.models.catalog import ModelInfo
from renderfarm.models.common import NOT_FINITE, count_in_template, count_tokens, generator_of, slerp, to_uint8
from renderfarm.models.loaded import LoadedPipeline, set_up
from renderfarm.models.places import differing, mate_of, mates
from renderfarm.models.torch_setup import translated
from renderfarm.pictures import decode, sized
from renderfarm.records import IMAGE_ARGUMENTS, Sample
from renderfarm.samplers import SAMPLERS, make_scheduler

# Of the calls that would otherwise do more than they are asked: a size is rendered as it is, not at the nearest trained one and
# resized, and a prompt is read as it is, neither cleaned nor written anew.
AS_ASKED: dict[str, Any] = {
    "use_resolution_binning": False,
    "clean_caption": False,
    "complex_human_instruction": None,
    "enable_prompt_rewrite": False,
    "use_pe": False,  # of classes that have a language model write the prompt anew
}
CONTROL = ("controlnet_conditioning_scale", "control_guidance_start", "control_guidance_end")
# What a call takes once for all its rows.
TAKEN_ONCE = (
    *("height", "width", "num_inference_steps", "guidance_scale", "true_cfg_scale", "sampler", "strength", "adapters"),
    *(*CONTROL, "denoising_end"),
)


@dataclass
class State:
    """A sample and what its texts are to `_arguments`; then its picture, H×W×3 floats 0..1."""

    sample: Sample
    texts: Sequence[Any]
    picture: np.ndarray | None = None


class WholeCall(LoadedPipeline):
    """A loaded diffusers pipeline behind the `SlotModel` protocol, one whole rendering a step."""

    cached_texts = 256
    draws_with = "prepare_latents"
    """The pipeline's method that draws the first noise."""

    def __init__(self, info: ModelInfo, workers: Workers) -> None:
        self.pipeline = getattr(diffusers, info.pipeline_class)
        super().__init__(info, workers)
        self.taken = inspect.signature(self.pipe.__call__).parameters
        set_up(self.pipe)

    # What a family says.

    def _guided(self, sample: Sample) -> bool:
        """Whether a second, unconditional prediction is made."""
        return sample.guidance_scale > 1

    def _arguments(self, states: Sequence[State]) -> dict[str, Any]:
        """Keyword arguments of the call, for B states of one slot group."""
        samples = [state.sample for state in states]
        arguments = {
            "prompt": [sample.prompt for sample in samples],
            "height": samples[0].height,
            "width": samples[0].width,
            "num_inference_steps": samples[0].num_inference_steps,
            "guidance_scale": samples[0].guidance_scale,
        }
        if self._guided(samples[0]) and "negative_prompt" in self.info.arguments:
            arguments["negative_prompt"] = [sample.negative_prompt or "" for sample in samples]
        arguments |= self._images(samples)
        arguments |= AS_ASKED
        # not all calls take all of these; some that take an image take its size from it
        optional = {"height", "width", *AS_ASKED}
        return {name: value for name, value in arguments.items() if name in self.taken or name not in optional}

    def _images(self, samples: Sequence[Sample]) -> dict[str, Any]:
        found: dict[str, Any] = {name: pictures for name in IMAGE_ARGUMENTS if (pictures := _pictures(samples, name))}
        if samples[0].strength is not None:
            found["strength"] = samples[0].strength
        if "control_image" in found:
            found |= {name: getattr(samples[0], name) for name in CONTROL}
            if "control_image" not in self.taken:  # where it is the only image, the call names it so
                found["image"] = found.pop("control_image")
        return found

    def _group_of_texts(self, sample: Sample) -> Hashable:
        """What of its texts decides the shape of a denoiser call."""
        return None

    def _tokenizer(self) -> Any:
        return self.pipe.tokenizer

    def _template(self) -> Callable[[str], str] | None:
        """Puts a prompt into the text that the encoder reads; None: it reads the prompt."""
        return None

    # The protocol.

    def slot_group(self, sample: Sample) -> Hashable:
        return *(getattr(sample, name) for name in TAKEN_ONCE), self._guided(sample), self._group_of_texts(sample)

    def shape(self, sample: Sample) -> Hashable | None:
        if self.keeps_places:
            return None
        return sample.height, sample.width, sample.adapters, self._guided(sample), self._group_of_texts(sample)

    def texts(self, sample: Sample) -> tuple[Hashable, ...]:
        return ()

    def encode_texts(self, texts: Sequence[Any]) -> list[Any]:
        """Of none: the call encodes its rows' texts itself, unless a family's `texts` says otherwise."""
        return []

    def count_tokens(self, sample: Sample) -> Counted:
        tokens, cut_off = self._count(sample.prompt)
        negative = sample.negative_prompt if self._guided(sample) else None
        return Counted(tokens, cut_off, None if negative is None else self._count(negative)[1])

    def _count(self, text: str) -> tuple[int, str | None]:
        if (template := self._template()) is not None:
            return count_in_template(self._tokenizer(), template, text, self.text_length)
        return count_tokens(self._tokenizer(), text, self.text_length)

    def start(self, sample: Sample, embeddings: Sequence[Any]) -> State:
        return State(sample, embeddings)

    def calls(self, state: State) -> int:
        return 1

    def step(self, states: Sequence[State]) -> list[bool]:
        for state, picture in zip(states, self._call(states), strict=False):
            state.picture = picture
        return [True] * len(states)

    def places_that_differ(self, sample: Sample) -> list[int]:
        short = self._short(sample)
        embeddings = [self.encode_texts([text])[0] for text in self.texts(short)]
        state, mate = (self.start(one, embeddings) for one in (short, mate_of(short)))
        alike, mixed = (self._seen(slots) for slots in ([state] * self.batch_size, mates(state, mate, self.batch_size)))
        return differing(zip(alike, mixed, strict=True), self.batch_size)

    def _seen(self, slots: Sequence[State]) -> list[Any]:
        """What the denoisers give in one call: rows of B, or 2B with guidance, each time."""
        outputs: list[Any] = []
        # a copy: some pipelines write into what their denoiser gives
        handles = [
            part.register_forward_hook(lambda _, __, given: outputs.append([row.clone() for row in given[0]])) for part in self._compared()
        ]
        try:
            self._call(slots)
        finally:
            for handle in handles:
                handle.remove()
        return outputs

    def _compared(self) -> list[torch.nn.Module]:
        """Whose outputs are looked at."""
        return [self.denoiser]

    def _short(self, sample: Sample) -> Sample:
        """With few steps; some schedules have no single one, and of an image's only a part is run."""
        steps = min(sample.num_inference_steps, max(4, SAMPLERS[sample.sampler].min_steps))
        return replace(sample, num_inference_steps=steps, strength=None if sample.strength is None else 1.0)

    def decode(self, state: State) -> np.ndarray:
        if state.picture is None:
            raise RenderFailed("decoded before it was rendered")
        if not np.isfinite(state.picture).all():
            raise NonFiniteOutput(NOT_FINITE)
        return to_uint8(state.picture)

    @translated
    @torch.inference_mode()
    def _call(self, states: Sequence[State]) -> np.ndarray:
        """B×H×W×3 floats 0..1 of 1 to B states; empty slots repeat the first."""
        slots = [*states, *[states[0]] * (self.batch_size - len(states))]
        self.use(slots[0].sample.adapters)
        self.pipe.scheduler = self._scheduler(slots[0].sample, self.pipe.own_scheduler)
        with self._first_noise([slot.sample for slot in slots]) as generators:
            return self._render(slots, generators)

    def _scheduler(self, sample: Sample, own: Any) -> Any:
        return type(own).from_config(own.config) if sample.sampler == "default" else make_scheduler(sample.sampler, own.config)

    def _render(self, slots: Sequence[State], generators: list[torch.Generator]) -> np.ndarray:
        pictures: np.ndarray = self.pipe(**self._arguments(slots), generator=generators, output_type="np").images
        return pictures

    @contextlib.contextmanager
    def _first_noise(self, samples: Sequence[Sample]) -> Iterator[list[torch.Generator]]:
        """A generator for each sample; while it lasts, the pipeline's first noise is that of `seed` and `seed_b`."""
        if all(sample.blend is None for sample in samples):
            yield [generator_of(sample.seed) for sample in samples]
            return
        ends = [[generator_of(s.seed) for s in samples], [generator_of(s.seed if s.seed_b is None else s.seed_b) for s in samples]]
        draw = getattr(self.pipe, self.draws_with)
        signature = inspect.signature(draw)

        def blended(*args: Any, **kwargs: Any) -> Any:
            bound, drawn = signature.bind(*args, **kwargs), []
            for generators in ends:
                bound.arguments["generator"] = generators
                drawn.append(draw(*bound.args, **bound.kwargs))
            first, second = (both[0] if isinstance(both, tuple) else both for both in drawn)
            noise = torch.stack([slerp(a, b, s.blend or 0.0) for a, b, s in zip(first, second, samples, strict=True)])
            return (noise, *drawn[0][1:]) if isinstance(drawn[0], tuple) else noise

        setattr(self.pipe, self.draws_with, blended)
        try:
            yield [a if (s.blend or 0.0) < 0.5 else b for a, b, s in zip(*ends, samples, strict=True)]
        finally:
            delattr(self.pipe, self.draws_with)


def _pictures(samples: Sequence[Sample], name: str) -> list[Any]:
    given = [(sample, getattr(sample, name)) for sample in samples]
    return [image.picture or sized(decode(image, name), sample) for sample, image in given if image is not None]
