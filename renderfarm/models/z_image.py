"""Z-Image: texts of any length, each padded to the next multiple of 32 tokens."""

from __future__ import annotations

from collections.abc import Callable, Hashable

from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF

from renderfarm.models.calls import WholeCall
from renderfarm.records import Sample


class ZImage(WholeCall):
    text_length = 512  # the pipeline's default max_sequence_length, template included

    def _guided(self, sample: Sample) -> bool:
        return sample.guidance_scale > 0

    def _group_of_texts(self, sample: Sample) -> Hashable:
        """The padded lengths of both texts: with a longer mate, a text would be padded further and computed in another shape."""
        return self._padded(sample.prompt), self._padded(sample.negative_prompt or "") if self._guided(sample) else 0

    def _padded(self, text: str) -> int:
        length = len(self.pipe.tokenizer(self._template()(text), truncation=True, max_length=self.text_length).input_ids)
        return -(-length // int(SEQ_MULTI_OF)) * int(SEQ_MULTI_OF)

    def _template(self) -> Callable[[str], str]:
        return lambda prompt: self.pipe.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
