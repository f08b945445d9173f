"""What `renderfarm models --model` says of one model, without loading it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from renderfarm.config import ModelSpec
from renderfarm.errors import Fatal, InvalidJob, Transient
from renderfarm.models.catalog import describe
from renderfarm.models.families import FAMILIES, GENERIC
from renderfarm.models.files import read_of_component
from renderfarm.models.fingerprint import model_sha256, weight_bytes, weight_hashes
from renderfarm.models.sources import find_model

BYTES = {"float32": 4, "bfloat16 or float16": 2}


def about(spec: ModelSpec) -> dict[str, Any]:
    """Class, tasks, defaults, sizes, the memory of its weights, and its hash. Raises InvalidJob as `describe` does."""
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
        "default guidance_scale": info.guidance_scale,
        "default sampler": info.sampler,
        **{f"warning {number}": text for number, text in enumerate(info.warnings, 1)},
    }
    if info.folder is None:
        return found
    try:
        folder = find_model(spec, weights=True)
    except Transient as error:
        raise Fatal(str(error)) from error
    digest = model_sha256(weight_hashes(folder, spec.variant, safety_checker=False))
    parts = weight_bytes(folder, spec.variant)
    largest = max(parts, key=lambda name: parts[name])
    if not any((folder / largest).glob("*.gguf")):  # which keep their few bits
        in_memory = _in_memory(folder / largest, spec.variant, sum(parts.values()))
        alone = _in_memory(folder / largest, spec.variant, parts[largest])
        found |= {"weights in memory": in_memory, "with workers.offload: model": f"{alone} on the device"}
    return found | {
        "weights on disk": ", ".join(f"{name} {size / 2**20:,.0f} MiB" for name, size in sorted(parts.items(), key=lambda p: -p[1])),
        "sha256": digest,
    }


def _in_memory(denoiser: Path, variant: str | None, stored: int) -> str:
    """By dtype; what a batch needs beside them depends on its size, and only rendering tells."""
    width = _stored_width(denoiser, variant)
    return ", ".join(f"{dtype} {stored / width * size / 2**20:,.0f} MiB" for dtype, size in BYTES.items())


def _stored_width(folder: Path, variant: str | None) -> int:
    """Bytes of a number, as the largest weight file has it."""
    from safetensors import safe_open

    names = read_of_component([path.name for path in folder.glob("*.safetensors")], variant)
    file = max((folder / name for name in names), key=lambda path: path.stat().st_size)
    try:
        with safe_open(file, framework="np") as opened:
            return {"F32": 4, "F64": 8, "F8_E4M3": 1, "I8": 1}.get(opened.get_slice(next(iter(opened.keys()))).get_dtype(), 2)
    except Exception as error:  # safetensors has an error of its own, and lets others through
        raise InvalidJob(f"{file}: is damaged ({error}); fetch the model again") from None
