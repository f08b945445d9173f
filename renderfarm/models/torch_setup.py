"""Torch, set up for exactness, and described: the flags, the render profile, the translation of torch's errors."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import diffusers
import torch
import transformers

from renderfarm.config import Workers
from renderfarm.errors import OutOfMemory
from renderfarm.models.catalog import ModelInfo
from renderfarm.models.fingerprint import weight_hashes

P = ParamSpec("P")
R = TypeVar("R")


def translated(function: Callable[P, R]) -> Callable[P, R]:
    """Turn torch's out-of-memory error into ours, with advice; B never changes silently."""

    @wraps(function)
    def inner(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(
                "the device has too little memory for this size at the job's batch size; lower workers.batch_size "
                "(in a new output: it decides pixels), height or width, or use workers.dtype: bfloat16"
            ) from error

    return inner


def prepare_torch(workers: Workers) -> str:
    """Set every flag that exactness needs, one by one, and return the device ("cpu" or "cuda")."""
    device = workers.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(workers.threads)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return device


def describe_profile(info: ModelInfo, workers: Workers, device: str) -> dict[str, Any]:
    """The part of the profile that all families share."""
    on_cpu = device == "cpu"
    return {
        "model": info.name,
        "model_revision": info.revision,
        "weights": weight_hashes(Path(info.folder)) if info.folder else {},
        "dtype": workers.dtype,
        "device": device,
        "device_model": platform.machine() if on_cpu else torch.cuda.get_device_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability() if on_cpu else None,
        "threads": workers.threads if on_cpu else None,
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
    }
