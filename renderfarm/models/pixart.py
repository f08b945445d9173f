"""PixArt: a transformer with T5 under diffusion samplers."""

from __future__ import annotations

from renderfarm.models.calls import WholeCall


class PixArtSigma(WholeCall):
    text_length = 300
