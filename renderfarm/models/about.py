"""What `renderfarm models --model` says of one model, without loading it: from its configurations, and from its files where it
has been fetched."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from renderfarm.config import ModelSpec
from renderfarm.errors import Fatal, Transient
from renderfarm.models.catalog import describe
from renderfarm.models.families import FAMILIES, GENERIC
from renderfarm.models.files import SAFETY
from renderfarm.models.fingerprint import model_sha256, weight_bytes, weight_hashes
from renderfarm.models.load import prepare_libraries
from renderfarm.models.sources import find_configurations, find_model

if TYPE_CHECKING:
    from renderfarm.models.sizes import Weights


def about(spec: ModelSpec, *, fetch: bool = False) -> dict[str, Any]:
    """Class, tasks, defaults, sizes, the memory of its weights; its hash, if its files are on this machine, which `fetch` sees to.
    Raises InvalidJob as `describe` does."""
    prepare_libraries()
    info = describe(spec)
    family = FAMILIES.get(info.pipeline_class, GENERIC)
    found: dict[str, Any] = {
        "model": info.name,
        "class": info.pipeline_class or None,
        "rendered by": family.batching,
        "tasks": ", ".join(["text-to-image", *family.tasks]),
        "columns": ", ".join(sorted(info.arguments)),
        "default size": f"{info.height} high, {info.width} wide; multiples of {info.factor}, at most {info.max_side}",
        "default steps": info.num_inference_steps,
        **({"default guidance_scale": info.guidance_scale} if "guidance_scale" in info.arguments else {}),
        "default sampler": info.sampler,
        **{f"warning {number}": text for number, text in enumerate(info.warnings, 1)},
    }
    if info.folder is None:
        return found
    try:
        if fetch:
            find_model(spec, weights=True)
        folder, missing = find_configurations(spec)
    except Transient as error:
        raise Fatal(str(error)) from error
    return found | _sizes(folder, spec.variant) | (_hash_unknown(missing) if missing else _of_files(folder, spec.variant))


def _sizes(folder: Path, variant: str | None) -> dict[str, Any]:
    from renderfarm.models.sizes import pipeline_weights

    every = pipeline_weights(folder, variant, SAFETY)
    parts = {name: weights for name, weights in every.items() if weights is not None}
    unknown = ", ".join(name for name in every if name not in parts)
    found: dict[str, Any] = {
        "parameters": ", ".join(f"{name} {weights.numbers / 1e6:,.1f} million" for name, weights in parts.items() if weights.numbers),
        "weights in memory": _in_memory(parts, sum),
        "with workers.offload: model": f"{_in_memory(parts, max)} on the device",
    }
    if unknown:
        found["not counted"] = f"{unknown}: neither configurations nor files on this machine say how large they are"
    return found


def _in_memory(parts: Mapping[str, Weights], of_all: Any) -> str:
    """By dtype. What a batch needs beside them depends on its size, and only rendering tells."""
    from renderfarm.models.sizes import DTYPES

    sizes = {dtype: of_all(weights.memory[dtype] for weights in parts.values()) for dtype in DTYPES if parts}
    return ", ".join(f"{dtype} {size / 2**20:,.0f} MiB" for dtype, size in sizes.items())


def _of_files(folder: Path, variant: str | None) -> dict[str, Any]:
    stored = sorted(weight_bytes(folder, variant).items(), key=lambda part: -part[1])
    return {
        "weights on disk": ", ".join(f"{name} {size / 2**20:,.0f} MiB" for name, size in stored),
        "sha256": model_sha256(weight_hashes(folder, variant, safety_checker=False)),
    }


def _hash_unknown(missing: list[str]) -> dict[str, Any]:
    return {"sha256": None, "for sha256": f"{len(missing)} of its files are needed that are not on this machine; --fetch fetches them"}
