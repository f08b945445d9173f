"""Image-to-image, inpainting and ControlNets of the families whose text-to-image is rendered in slots: diffusers' own calls."""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from diffusers import ControlNetModel

from renderfarm.config import Workers
from renderfarm.models.base import Counted
from renderfarm.models.calls import State, WholeCall
from renderfarm.models.catalog import ModelInfo
from renderfarm.models.common import count_texts
from renderfarm.models.torch_setup import translated
from renderfarm.models.weighted import PaddedText
from renderfarm.records import Sample

TEXTS = ("negative_prompt", "prompt_2", "prompt_3", "negative_prompt_2", "negative_prompt_3")


class WithImages(WholeCall):
    def __init__(self, info: ModelInfo, workers: Workers) -> None:
        super().__init__(info, workers)
        t5 = 256 if info.pipeline_class.startswith("StableDiffusion3") else 512
        encoders = [(getattr(self.pipe, f"tokenizer{k}", None), getattr(self.pipe, f"text_encoder{k}", None)) for k in ("", "_2", "_3")]
        self.readers = [
            (tokenizer, t5 if "T5" in type(encoder).__name__ else 77) for tokenizer, encoder in encoders if tokenizer is not None
        ]
        self.text_length = max(length for _, length in self.readers)

    def _load_arguments(self) -> dict[str, Any]:
        arguments: dict[str, Any] = {"safety_checker": None} if "safety_checker" in self.pipeline._optional_components else {}
        if "add_watermarker" in inspect.signature(self.pipeline.__init__).parameters:  # else it is, where a package for it happens to be
            arguments["add_watermarker"] = False
        if "controlnet" in self.info.companions:
            arguments["controlnet"] = self._load_companion(ControlNetModel, "controlnet")
        return arguments

    def texts(self, sample: Sample) -> tuple[Hashable, ...]:
        """None, but where they are weighted: (adapters, text) each, as a LoRA may change text encoders, too."""
        return tuple((sample.adapters, text) for text in self._weighted_texts(sample))

    def _weighted_texts(self, sample: Sample) -> tuple[PaddedText, ...]:
        if self.weighted is None:
            return ()
        texts: list[Hashable] = [(sample.prompt, sample.prompt_2 or sample.prompt)]
        if self._guided(sample) and not (sample.negative_prompt is None and self.pipe.config.get("force_zeros_for_empty_prompt")):
            first = sample.negative_prompt or ""
            texts.append((first, sample.negative_prompt_2 or first))
        return self.weighted.padded(texts)

    @translated
    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[Any]) -> list[Any]:
        assert self.weighted is not None
        found = []
        for adapters, text in texts:
            self.use(adapters)
            found += self.weighted.encode([text])
        return found

    def count_tokens(self, sample: Sample) -> Counted:
        if self.weighted is not None:
            return Counted(self.weighted.count(sample.prompt))
        tokens, cut_off = count_texts([sample.prompt, sample.prompt_2 or sample.prompt, sample.prompt_3 or sample.prompt], self.readers)
        first = sample.negative_prompt
        if not self._guided(sample) or first is None:
            return Counted(tokens, cut_off)
        negatives = [first, sample.negative_prompt_2 or first, sample.negative_prompt_3 or first]
        return Counted(tokens, cut_off, count_texts(negatives, self.readers)[1])

    def _guided(self, sample: Sample) -> bool:
        if "true_cfg_scale" in self.taken:  # FLUX
            return (sample.true_cfg_scale or 1.0) > 1 and sample.negative_prompt is not None
        return sample.guidance_scale > 1 and "negative_prompt" in self.taken

    def _group_of_texts(self, sample: Sample) -> Hashable:
        """Which texts are given: a call takes each for all its rows, or for none."""
        given = (getattr(sample, name) is None for name in TEXTS)
        return *given, *(text.chunks for text in self._weighted_texts(sample)[:1])

    def _arguments(self, states: Sequence[State]) -> dict[str, Any]:
        arguments, samples = super()._arguments(states), [state.sample for state in states]
        arguments.pop("negative_prompt", None)
        if self.weighted is not None:
            del arguments["prompt"]
            return arguments | _embeddings([state.texts for state in states])
        given = {name: [getattr(sample, name) for sample in samples] for name in TEXTS if name in self.taken}
        arguments |= {name: texts for name, texts in given.items() if texts[0] is not None}
        return arguments | ({"true_cfg_scale": samples[0].true_cfg_scale or 1.0} if "true_cfg_scale" in self.taken else {})


def _embeddings(texts: Sequence[Sequence[tuple[torch.Tensor, ...]]]) -> dict[str, torch.Tensor]:
    """The call's arguments, from each state's embedding of its prompt, and of its negative prompt if it has one."""
    names = (("prompt_embeds", "pooled_prompt_embeds"), ("negative_prompt_embeds", "negative_pooled_prompt_embeds"))
    found: dict[str, torch.Tensor] = {}
    for of_text, of_states in zip(names, zip(*texts, strict=True), strict=False):
        found |= zip(of_text, map(torch.stack, zip(*of_states, strict=True)), strict=False)
    return found
