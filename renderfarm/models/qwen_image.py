"""Qwen-Image: texts of any length, here padded to a constant one; guided by a second call over a negative prompt."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from renderfarm.models.calls import State, WholeCall
from renderfarm.models.torch_setup import translated
from renderfarm.records import Sample

PADDED_TO = 64  # tokens; a multiple of it that leaves room for at least one that is only padding


class QwenImage(WholeCall):
    @property
    def text_length(self) -> int:  # type: ignore[override]
        # diffusers reads 1024 tokens, and gives the transformer the first 512 of them
        return int(512 + self.pipe.prompt_template_encode_start_idx)

    def _guided(self, sample: Sample) -> bool:
        return self._scale(sample) > 1 and sample.negative_prompt is not None

    @staticmethod
    def _scale(sample: Sample) -> float:
        return 4.0 if sample.true_cfg_scale is None else sample.true_cfg_scale  # the pipeline's own default

    def texts(self, sample: Sample) -> tuple[Hashable, ...]:
        return (sample.prompt, sample.negative_prompt) if self._guided(sample) else (sample.prompt,)

    @translated
    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[Any]) -> list[torch.Tensor]:
        """L×D each. B copies of a text at a time: beside a longer one it would be computed in another shape."""
        return [self.pipe.encode_prompt([text] * self.batch_size, self.device, max_sequence_length=512)[0][0] for text in texts]

    def _group_of_texts(self, sample: Sample) -> Hashable:
        return tuple(_padded(self._length(str(text))) for text in self.texts(sample))

    def _length(self, text: str) -> int:
        drop = self.pipe.prompt_template_encode_start_idx
        return len(self.pipe.tokenizer(self._template()(text), truncation=True, max_length=self.text_length).input_ids) - int(drop)

    def _arguments(self, states: Sequence[State]) -> dict[str, Any]:
        arguments = super()._arguments(states)
        for name in ("prompt", "negative_prompt"):
            arguments.pop(name, None)
        if not self.pipe.transformer.config.guidance_embeds:
            del arguments["guidance_scale"]
        for name, texts in zip(("", "negative_"), zip(*(state.texts for state in states), strict=True), strict=False):
            embeds, mask = padded(texts)
            arguments |= {f"{name}prompt_embeds": embeds, f"{name}prompt_embeds_mask": mask}
        return arguments | {"true_cfg_scale": self._scale(states[0].sample)}

    def _template(self) -> Callable[[str], str]:
        return lambda prompt: self.pipe.prompt_template_encode.format(prompt)


def _padded(length: int) -> int:
    return (length // PADDED_TO + 1) * PADDED_TO


def padded(texts_LD: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """B×L'×D with zeros behind each text, and the mask B×L' of what is text.

    Never without padding: where a mask hides nothing the pipeline leaves it out, and attention runs another way.
    """
    length = _padded(max(len(text) for text in texts_LD))
    embeds = torch.stack([F.pad(text, (0, 0, 0, length - len(text))) for text in texts_LD])
    mask = torch.stack([(torch.arange(length) < len(text)).long() for text in texts_LD])
    return embeds, mask.to(embeds.device)
