"""Weights of fewer bits, by diffusers' own loaders."""

from __future__ import annotations

import importlib
import importlib.util
from importlib.metadata import version
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


PACKAGES = {"torchao": "torchao", "quanto": "optimum-quanto", "bitsandbytes": "bitsandbytes"}


GRANULARITIES = ("PerRow", "PerTensor")  # torchao's classes that a job can name


def load_arguments(info: ModelInfo) -> dict[str, Any]:
    """What makes `from_pretrained` quantise the components that the job names."""
    given = info.source.quantization if info.source else None
    if given is None:
        return {}
    if not _is_installed(given.backend):
        package = PACKAGES[given.backend]
        advice = "'renderfarm[torchao]'" if package == "torchao" else package
        raise Fatal(f"model.quantization: {given.backend} needs the package {package}: pip install {advice}")
    index = components(read_index(Path(str(info.folder)), info.id))
    try:
        # one configuration for each component: diffusers' and transformers' take other arguments
        mapping = {name: _configuration(given.backend, index[name][0], dict(given.arguments)) for name in given.components}
        return {"quantization_config": diffusers.PipelineQuantizationConfig(quant_mapping=mapping)}
    except Exception as error:  # wrong arguments raise whatever the backend makes of them
        raise Fatal(f"model.quantization: {given.backend} does not take these arguments: {error}") from error


def quantization_profile(info: ModelInfo) -> dict[str, Any]:
    """The part of the render profile that is about it."""
    found = {"gguf": version("gguf")} if quantised_names(info) else {}
    if info.source is None or info.source.quantization is None:
        return found
    given = info.source.quantization
    return found | {"quantization": given.model_dump(mode="json") | {"version": version(PACKAGES[given.backend])}}


def _configuration(backend: str, library: str, arguments: dict[str, Any]) -> Any:
    module = importlib.import_module("transformers" if library == "transformers" else "diffusers")
    if backend == "torchao":
        torchao = importlib.import_module("torchao.quantization")
        kind = getattr(torchao, str(arguments.pop("quant_type", None)))
        if (granularity := arguments.get("granularity")) in GRANULARITIES:
            arguments["granularity"] = getattr(torchao, str(granularity))()
        return module.TorchAoConfig(kind(**arguments))
    return getattr(module, {"quanto": "QuantoConfig", "bitsandbytes": "BitsAndBytesConfig"}[backend])(**arguments)


def _is_installed(backend: str) -> bool:
    names = ["optimum", "optimum.quanto"] if backend == "quanto" else [backend]
    return all(importlib.util.find_spec(name) is not None for name in names)
