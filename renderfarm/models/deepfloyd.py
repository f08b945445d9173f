"""DeepFloyd IF, first stage: a UNet over pixels, with T5."""

from __future__ import annotations

from typing import Any

from renderfarm.models.calls import WholeCall


class DeepFloyd(WholeCall):
    text_length = 77
    draws_with = "prepare_intermediate_images"

    def _load_arguments(self) -> dict[str, Any]:
        return {"safety_checker": None, "watermarker": None}
