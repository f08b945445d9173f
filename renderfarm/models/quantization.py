"""Weights of fewer bits, by diffusers' own loaders."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import diffusers
import torch

from renderfarm.errors import Fatal
from renderfarm.models.catalog import ModelInfo
from renderfarm.models.files import QUANTISED, components
from renderfarm.models.sources import is_quantised, read_index


def from_gguf(info: ModelInfo, dtype: torch.dtype) -> dict[str, Any]:
    """Components whose weights are a .gguf file, loaded, by name. They are dequantised for each call, and compute in `dtype`."""
    folder, found = Path(str(info.folder)), {}
    for name in quantised_names(info):
        if importlib.util.find_spec("gguf") is None:
            raise Fatal(f"model.components.{name}: a .gguf file needs the package gguf: pip install 'renderfarm[gguf]'")
        _, kind = components(read_index(folder, info.id))[name]
        (file,) = (folder / name).glob(f"*{QUANTISED}")
        try:
            found[name] = getattr(diffusers, kind).from_single_file(
                str(file),
                quantization_config=diffusers.GGUFQuantizationConfig(compute_dtype=dtype),
                config=str(folder),
                subfolder=name,
                dtype=dtype,
                local_files_only=True,
            )
        except Exception as error:  # classes without such a loader, damaged files, other models' tensors: all their own kinds
            raise Fatal(f"model.components.{name}: {file.name} cannot be loaded as {kind}: {error}") from error
    return found


def quantised_names(info: ModelInfo) -> list[str]:
    return [name for name, given in (info.source.components if info.source else {}).items() if is_quantised(given)]
