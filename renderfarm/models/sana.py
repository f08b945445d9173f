"""Sana: a linear transformer over deeply compressed latents, with Gemma."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from renderfarm.models.calls import State, WholeCall


class Sana(WholeCall):
    text_length = 300

    def _arguments(self, states: Sequence[State]) -> dict[str, Any]:
        # as in PixArt; and no instruction to Gemma to write the prompt anew, which the call would give by default
        as_asked = {"use_resolution_binning": False, "clean_caption": False, "complex_human_instruction": None}
        return super()._arguments(states) | as_asked
