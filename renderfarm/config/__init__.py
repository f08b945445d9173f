"""The job file: one YAML, frozen pydantic models, every field explained.

`${ENV}` stays as written in what is stored and is expanded only where a value is used (`expand_env`).
"""

from __future__ import annotations

from renderfarm.config.base import check_credentials, expand_env, is_path, is_url
from renderfarm.config.job import WRITTEN_IN, Failure, Job, Mlflow, Notify, Track, Wandb
from renderfarm.config.model import BUILTIN_MODELS, COMPANIONS, STAGES, Adapter, Checkpoint, ComponentSpec, ModelSpec, Quantization
from renderfarm.config.output import ENCODINGS, C2pa, Card, Encoding, Metadata, Output
from renderfarm.config.render import STEP_FILES, Colour, Inputs, Render, RestoreFaces, Step, Upscale, Watermark
from renderfarm.config.rows import ManifestSpec, Param, Params, Prompts, Scalar, Sweep
from renderfarm.config.workers import AttentionBackend, Offload, Workers, fixed_batch_size, several_devices

__all__ = [
    "BUILTIN_MODELS",
    "COMPANIONS",
    "ENCODINGS",
    "STAGES",
    "STEP_FILES",
    "WRITTEN_IN",
    "Adapter",
    "AttentionBackend",
    "C2pa",
    "Card",
    "Checkpoint",
    "Colour",
    "ComponentSpec",
    "Encoding",
    "Failure",
    "Inputs",
    "Job",
    "ManifestSpec",
    "Metadata",
    "Mlflow",
    "ModelSpec",
    "Notify",
    "Offload",
    "Output",
    "Param",
    "Params",
    "Prompts",
    "Quantization",
    "Render",
    "RestoreFaces",
    "Scalar",
    "Step",
    "Sweep",
    "Track",
    "Upscale",
    "Wandb",
    "Watermark",
    "Workers",
    "check_credentials",
    "expand_env",
    "fixed_batch_size",
    "is_path",
    "is_url",
    "several_devices",
]
