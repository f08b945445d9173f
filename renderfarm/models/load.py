"""From a model's description to the loaded model. The family's module is imported only here."""

from __future__ import annotations

import os

from renderfarm.config import Workers
from renderfarm.models.base import SlotModel
from renderfarm.models.catalog import ModelInfo


def load_model(info: ModelInfo, workers: Workers) -> SlotModel:
    """Load the pipeline onto its device. Raises Fatal when it cannot be loaded."""
    if info.family == "fake":
        from renderfarm.models.fake import Fake

        return Fake(info, workers)
    # transformers speaks while it is imported, of image processors that nothing here uses
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ["DIFFUSERS_DISABLE_REMOTE_CODE"] = "1"  # read when diffusers is imported: a model is data, never code
    from renderfarm.models.stable_diffusion import StableDiffusion

    return StableDiffusion(info, workers)
