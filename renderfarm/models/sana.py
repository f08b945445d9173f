"""Sana: a linear transformer over deeply compressed latents, with Gemma."""

from __future__ import annotations

from renderfarm.models.calls import WholeCall


class Sana(WholeCall):
    text_length = 300
