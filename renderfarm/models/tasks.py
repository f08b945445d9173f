"""Image-to-image and inpainting of the families whose text-to-image is rendered in slots: diffusers' own calls."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from renderfarm.config import Workers
from renderfarm.models.calls import State, WholeCall
from renderfarm.models.catalog import ModelInfo
from renderfarm.records import Sample

TEXTS = ("negative_prompt", "prompt_2", "prompt_3", "negative_prompt_2", "negative_prompt_3")
LONGEST = (("tokenizer_3", 256), ("tokenizer_2", 512), ("tokenizer", 77))  # T5's, where there is one


class WithImages(WholeCall):
    def __init__(self, info: ModelInfo, workers: Workers) -> None:
        super().__init__(info, workers)
        self.reader, self.text_length = next(
            (getattr(self.pipe, name), length)
            for name, length in LONGEST
            if getattr(self.pipe, name, None) is not None and (name != "tokenizer_2" or "T5" in type(self.pipe.text_encoder_2).__name__)
        )

    def _load_arguments(self) -> dict[str, Any]:
        return {"safety_checker": None} if "safety_checker" in self.pipeline._optional_components else {}

    def _tokenizer(self) -> Any:
        return self.reader

    def _guided(self, sample: Sample) -> bool:
        if "true_cfg_scale" in self.taken:  # FLUX
            return (sample.true_cfg_scale or 1.0) > 1 and sample.negative_prompt is not None
        return sample.guidance_scale > 1 and "negative_prompt" in self.taken

    def _group_of_texts(self, sample: Sample) -> Hashable:
        """Which texts are given: a call takes each for all its rows, or for none."""
        return tuple(getattr(sample, name) is None for name in TEXTS)

    def _arguments(self, states: Sequence[State]) -> dict[str, Any]:
        arguments, samples = super()._arguments(states), [state.sample for state in states]
        arguments.pop("negative_prompt", None)
        given = {name: [getattr(sample, name) for sample in samples] for name in TEXTS if name in self.taken}
        arguments |= {name: texts for name, texts in given.items() if texts[0] is not None}
        return arguments | ({"true_cfg_scale": samples[0].true_cfg_scale or 1.0} if "true_cfg_scale" in self.taken else {})
