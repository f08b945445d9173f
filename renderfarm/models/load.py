"""From a model's description to the loaded model. The family's module is imported only here."""

from __future__ import annotations

import importlib
import os

from renderfarm.config import Workers
from renderfarm.models.base import SlotModel
from renderfarm.models.catalog import ModelInfo


def load_model(info: ModelInfo, workers: Workers) -> SlotModel:
    """Load the pipeline onto its device. Raises Fatal when it cannot be loaded.

    Nothing else may use torch in this process meanwhile (a `SlotLoop` sees to it): until diffusers has loaded, every
    torch module that is made has no data.
    """
    # transformers speaks while it is imported, of image processors that nothing here uses
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ["DIFFUSERS_DISABLE_REMOTE_CODE"] = "1"  # read when diffusers is imported: a model is data, never code
    module, _, name = info.adapter.partition(":")
    model: SlotModel = getattr(importlib.import_module(f"renderfarm.models.{module}"), name)(info, workers)
    return model
