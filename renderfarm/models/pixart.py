"""PixArt: a transformer with T5 under diffusion samplers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from renderfarm.models.calls import State, WholeCall


class PixArtSigma(WholeCall):
    text_length = 300

    def _arguments(self, states: Sequence[State]) -> dict[str, Any]:
        # a size is rendered as asked, not at the nearest trained one and resized; a prompt is read as it is
        return super()._arguments(states) | {"use_resolution_binning": False, "clean_caption": False}
