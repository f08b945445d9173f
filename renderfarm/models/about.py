"""What `renderfarm models --model` says of one model, without loading it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from renderfarm.config import ModelSpec
from renderfarm.errors import InvalidJob
from renderfarm.models.catalog import describe
from renderfarm.models.families import FAMILIES, GENERIC
from renderfarm.models.fingerprint import model_sha256, weight_bytes, weight_hashes

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
    folder = Path(info.folder)
    digest = model_sha256(weight_hashes(folder, safety_checker=False))
    parts = {name: size for name, size in weight_bytes(folder).items() if name != "safety_checker"}
    stored, largest = sum(parts.values()), max(parts, key=lambda name: parts[name])
    return found | {
        "weights on disk": ", ".join(f"{name} {size / 2**20:,.0f} MiB" for name, size in sorted(parts.items(), key=lambda p: -p[1])),
        "weights in memory": _in_memory(folder / largest, stored),
        "with workers.offload: model": f"{_in_memory(folder / largest, parts[largest])} on the device",
        "sha256": digest,
    }


def _in_memory(denoiser: Path, stored: int) -> str:
    """By dtype; what a batch needs beside them depends on its size, and only rendering tells."""
    width = _stored_width(denoiser)
    return ", ".join(f"{dtype} {stored / width * size / 2**20:,.0f} MiB" for dtype, size in BYTES.items())


def _stored_width(folder: Path) -> int:
    """Bytes of a number, as the largest weight file has it."""
    from safetensors import safe_open

    file = max(folder.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    try:
        with safe_open(file, framework="np") as opened:
            return {"F32": 4, "F64": 8, "F8_E4M3": 1, "I8": 1}.get(opened.get_slice(next(iter(opened.keys()))).get_dtype(), 2)
    except Exception as error:  # safetensors has an error of its own, and lets others through
        raise InvalidJob(f"{file}: is damaged ({error}); fetch the model again") from None
