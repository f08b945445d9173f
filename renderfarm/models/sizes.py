"""How much memory a model's weights take, counted from its configurations: a component is built by the class that would load it
on torch's `meta` device, where tensors have shapes and no data. Files of weights are asked where that says nothing: about
quantised ones, adapters, and components whose class or configuration is not understood."""

from __future__ import annotations

import importlib
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from safetensors import safe_open

from renderfarm.models.files import QUANTISED, components, holds_weights, read_of_component
from renderfarm.models.sources import read_index, read_json

DTYPES = ("float32", "bfloat16", "float16")
FLOATS = {"F64", "F32", "F16", "BF16"}  # as safetensors names what a loader converts to the job's dtype
NEVER_LOADED = {"watermarker"}  # of DeepFloyd's


@dataclass(frozen=True)
class Weights:
    """Of one component. `numbers`: how many; None where a file does not say. Bytes by dtype: of all (`memory`), and of the layer
    that has most (`layer`). `linear`: how many numbers are in the layers that a quantisation shrinks."""

    numbers: int | None
    memory: Mapping[str, int]
    layer: Mapping[str, int]
    linear: int = 0

    def quantised(self, bits: int) -> Weights:
        """With its linear layers of so many bits, without the scales that come with them."""

        def shrunk(dtype: str) -> int:
            return self.memory[dtype] - self.linear * width(dtype) + math.ceil(self.linear * bits / 8)

        return Weights(self.numbers, {dtype: shrunk(dtype) for dtype in DTYPES}, self.layer, self.linear)


def pipeline_weights(folder: Path, variant: str | None = None, left_out: Collection[str] = ()) -> dict[str, Weights | None]:
    """Of each component of a model's folder, but those that are `left_out`; None: neither configuration nor files say."""
    index = components(read_index(folder, folder.name))
    return {
        name: component_weights(folder / name, library, kind, variant)
        for name, (library, kind) in index.items()
        if name not in {*left_out, *NEVER_LOADED} and holds_weights(kind) and (folder / name / "config.json").is_file()
    }


def component_weights(folder: Path, library: str, kind: str, variant: str | None = None) -> Weights | None:
    config = read_json(folder / "config.json", f"{folder}: config.json is damaged")
    if not any(folder.glob(f"*{QUANTISED}")) and "quantization_config" not in config:  # which keep their few bits
        try:
            return _counted(_without_data(folder, config, library, kind))
        except Exception:  # noqa: S110 - a class too new for these libraries, a value that it does not know: each fails in its own way
            pass
    return _of_files(folder, variant)


def _without_data(folder: Path, config: dict[str, Any], library: str, kind: str) -> torch.nn.Module:
    """The component as its library builds it before its weights are read. A class is one of the libraries' own."""
    place = {"diffusers": diffusers, "transformers": transformers}.get(library) or importlib.import_module(f"diffusers.pipelines.{library}")
    class_ = getattr(place, kind)
    with torch.device("meta"):
        if issubclass(class_, transformers.PreTrainedModel):
            built: torch.nn.Module = class_(class_.config_class.from_pretrained(folder, local_files_only=True))
        else:
            built = class_.from_config(config)
    return built


@dataclass
class _Count:
    """What `_counted` adds up."""

    numbers: int = 0
    linear: int = 0
    memory: dict[str, int] = field(default_factory=lambda: dict.fromkeys(DTYPES, 0))
    layer: dict[str, int] = field(default_factory=lambda: dict.fromkeys(DTYPES, 0))


def _counted(model: torch.nn.Module) -> Weights:
    """Tensors that two layers share once; buffers take memory, too."""
    count, seen = _Count(), set[int]()
    last = model.get_output_embeddings() if isinstance(model, transformers.PreTrainedModel) else None  # which no backend shrinks there
    wide = {dtype: _kept_in_float32(model, dtype) for dtype in DTYPES}
    for place, module in model.named_modules():
        own = dict.fromkeys(DTYPES, 0)
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            steps = {*place.split("."), name}
            # what is in no file is never converted
            as_built = not tensor.is_floating_point() or name in module._non_persistent_buffers_set
            if isinstance(tensor, torch.nn.Parameter):
                count.numbers += tensor.numel()
                if isinstance(module, torch.nn.Linear) and module is not last and name == "weight":
                    count.linear += tensor.numel()
            for dtype in DTYPES:
                size = tensor.element_size() if as_built or steps & wide[dtype] else width(dtype)
                own[dtype] += tensor.numel() * size
        for dtype in DTYPES:
            count.memory[dtype] += own[dtype]
            count.layer[dtype] = max(count.layer[dtype], own[dtype])
    return Weights(count.numbers, count.memory, count.layer, count.linear)


def _kept_in_float32(model: torch.nn.Module, dtype: str) -> set[str]:
    """Names of layers that their library loads in float32 whatever dtype is asked for."""
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    if isinstance(model, transformers.PreTrainedModel):  # there they are about float16, and others about both
        always = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
        return always | kept if dtype == "float16" else always
    return kept


def width(dtype: str) -> int:
    size: int = getattr(torch, dtype).itemsize
    return size


# ---------------------------------------------------------------------------------------------- what files say


def _of_files(folder: Path, variant: str | None) -> Weights | None:
    names = read_of_component([path.name for path in folder.iterdir()], variant)
    if quantised := [name for name in names if name.endswith(QUANTISED)]:
        return _as_stored(sum((folder / name).stat().st_size for name in quantised))
    found = [file_weights(folder / name) for name in names if name.endswith(".safetensors")]
    return _together(one for one in found if one is not None) if found and None not in found else None


def file_weights(file: Path) -> Weights | None:
    """Of a safetensors file, by its header; None for one that is damaged."""
    numbers, memory, layer = 0, dict.fromkeys(DTYPES, 0), dict.fromkeys(DTYPES, 0)
    try:
        with safe_open(file, framework="np") as opened:
            for name in opened.keys():  # noqa: SIM118 - it is no dict
                tensor = opened.get_slice(name)
                count, stored = math.prod(tensor.get_shape()), tensor.get_dtype()
                numbers += count
                for dtype in DTYPES:
                    size = count * width(dtype) if stored in FLOATS else math.ceil(count * _bits(stored) / 8)
                    memory[dtype] += size
                    layer[dtype] = max(layer[dtype], size)
    except Exception:  # safetensors has an error of its own, and lets others through
        return None
    return Weights(numbers, memory, layer)


def _bits(stored: str) -> int:
    """Of one number, by safetensors' name for its type: `I8`, `U16`, `F8_E4M3`, `BOOL`."""
    digits = "".join(letter for letter in stored.partition("_")[0] if letter.isdigit())
    return int(digits) if digits else 8


def _as_stored(size: int) -> Weights:
    return Weights(None, dict.fromkeys(DTYPES, size), dict.fromkeys(DTYPES, size))


def _together(parts: Iterable[Weights]) -> Weights:
    parts = list(parts)
    return Weights(
        sum(part.numbers or 0 for part in parts),
        {dtype: sum(part.memory[dtype] for part in parts) for dtype in DTYPES},
        {dtype: max(part.layer[dtype] for part in parts) for dtype in DTYPES},
    )
