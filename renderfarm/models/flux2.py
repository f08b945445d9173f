"""FLUX.2 dev (guidance as an embedding, no negative prompt) and FLUX.2 klein (guided by a second pass unless distilled)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from diffusers.pipelines.flux2.pipeline_flux2 import format_input

from renderfarm.errors import InvalidInput
from renderfarm.models.calls import State, WholeCall
from renderfarm.records import Sample

INPAINTED_PIXELS = 1024 * 1024  # at most: a larger image is made smaller by the call


class Flux2(WholeCall):
    text_length = 512  # the pipeline's default max_sequence_length, template included

    def _guided(self, sample: Sample) -> bool:
        return False

    def _tokenizer(self) -> Any:
        return self.pipe.tokenizer.tokenizer

    def _template(self) -> Callable[[str], str]:
        def template(prompt: str) -> str:
            messages = format_input(prompts=[prompt], system_message=self.pipe.system_message)
            text: str = self.pipe.tokenizer.apply_chat_template(messages, add_generation_prompt=False, tokenize=False)[0]
            return text

        return template


class Flux2Klein(WholeCall):
    text_length = 512  # as above

    def start(self, sample: Sample, embeddings: Sequence[Any]) -> State:
        if sample.image is not None and sample.height * sample.width > INPAINTED_PIXELS:
            raise InvalidInput(
                f"the row asks for {sample.width}×{sample.height} pixels, and this model's inpainting paints {INPAINTED_PIXELS:,} at "
                "most; give a smaller height and width, and inputs.resize"
            )
        return super().start(sample, embeddings)

    def _guided(self, sample: Sample) -> bool:
        return sample.guidance_scale > 1 and not self.pipe.config.is_distilled

    def _arguments(self, states: Sequence[State]) -> dict[str, Any]:
        arguments = super()._arguments(states)
        if (negatives := arguments.pop("negative_prompt", None)) is not None:  # the call takes it as embeddings only
            arguments["negative_prompt_embeds"] = self.pipe.encode_prompt(negatives, device=self.device)[0]
        return arguments

    def _template(self) -> Callable[[str], str]:
        return lambda prompt: self.pipe.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
