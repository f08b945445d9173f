"""What a model is, read from its folder's JSON files; nothing here imports torch.

Adding a family: one module beside this one, one line in FAMILIES.
"""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from renderfarm.config import ModelSpec, expand_env
from renderfarm.errors import Fatal, InvalidJob
from renderfarm.samplers import SAMPLERS, Kind

_ALWAYS = frozenset(
    [
        *("id", "prompt", "seed", "num_images_per_prompt", "seed_b", "blend"),
        *("height", "width", "num_inference_steps", "guidance_scale", "sampler"),
    ]
)


@dataclass(frozen=True)
class Family:
    """A pipeline class: who renders it (`module:class` in this package), what rows may say, and the pipeline's own defaults."""

    adapter: str
    kind: Kind
    arguments: frozenset[str]
    num_inference_steps: int
    guidance_scale: float


# by `_class_name` in model_index.json
FAMILIES = {
    "StableDiffusionPipeline": Family("stable_diffusion:StableDiffusion", "diffusion", _ALWAYS | {"negative_prompt"}, 50, 7.5),
}


@dataclass(frozen=True)
class ModelInfo:
    """A model's identity, defaults and limits. Sizes in pixels; a size must be a multiple of `factor`."""

    id: str
    adapter: str
    kind: Kind
    folder: str | None
    revision: str | None
    factor: int
    height: int
    width: int
    max_side: int
    num_inference_steps: int
    guidance_scale: float
    sampler: str
    arguments: frozenset[str]
    safety_checker: bool = False

    @property
    def name(self) -> str:
        """The id as tables and profile show it: a local folder by its name, since its place decides no pixel."""
        return os.path.basename(self.id) if os.path.isabs(self.id) else self.id


def describe(spec: ModelSpec) -> ModelInfo:
    """Find the model (downloading a pinned hub model if it is not in the cache) and read what it is."""
    model_id = expand_env(spec.id)
    if model_id == "builtin:fake":
        arguments = _ALWAYS | {"negative_prompt"}
        return ModelInfo(model_id, "fake:Fake", "diffusion", None, None, 8, 64, 64, 4096, 20, 5.0, "euler", arguments)
    folder = _find_folder(model_id, spec.revision)
    index = _read_json(folder / "model_index.json", f"model {model_id}: {folder} is not a model in diffusers' format")
    class_name = index.get("_class_name", "")
    family = FAMILIES.get(class_name)
    if family is None:
        raise InvalidJob(f"model {model_id}: {class_name or 'its pipeline'} is not supported yet; supported: {', '.join(FAMILIES)}")
    unet = _read_json(folder / "unet/config.json", f"model {model_id}: unet/config.json is missing or damaged")
    vae = _read_json(folder / "vae/config.json", f"model {model_id}: vae/config.json is missing or damaged")
    if unet.get("time_cond_proj_dim") is not None:
        raise InvalidJob(f"model {model_id}: its UNet takes the guidance scale as an embedding (LCM), which is not supported yet")
    scale = 2 ** (len(vae["block_out_channels"]) - 1)
    side = int(unet["sample_size"]) * scale
    builtin = model_id == "builtin:shapes"
    return ModelInfo(
        id=model_id,
        adapter=family.adapter,
        kind=family.kind,
        folder=str(folder),
        revision=spec.revision,
        factor=math.lcm(8, scale),  # StableDiffusionPipeline.check_inputs wants multiples of 8
        height=side,
        width=side,
        max_side=4 * side,
        num_inference_steps=20 if builtin else family.num_inference_steps,
        guidance_scale=5.0 if builtin else family.guidance_scale,
        sampler=_default_sampler(index, family.kind),
        arguments=family.arguments,
        safety_checker=spec.safety_checker,
    )


def _find_folder(model_id: str, revision: str | None) -> Path:
    if model_id == "builtin:shapes":
        return Path(__file__).parent.parent / "shapes" / "model"
    if model_id.startswith("builtin:"):
        raise InvalidJob(f"model {model_id}: there is no such builtin; builtin:shapes is")
    if os.path.isabs(model_id):
        if not os.path.isdir(model_id):
            raise InvalidJob(f"model {model_id}: no such folder")
        return Path(model_id)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model_id):
        raise InvalidJob(f"model {model_id!r}: give builtin:shapes, a folder (./path or /path), or a hub id org/name with its revision")
    if not re.fullmatch(r"[0-9a-f]{40}", revision or ""):
        raise InvalidJob(
            f"model {model_id}: a hub model needs its full commit, so that it cannot change: "
            f"model: {{id: {model_id}, revision: <40 hex digits>}}"
        )
    return _from_hub(model_id, revision)


def _from_hub(model_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    wanted: dict[str, Any] = {
        "revision": revision,
        # the components' folders only: single-file checkpoints beside them hold the same weights once more
        "allow_patterns": ["model_index.json", "*/*.json", "*/*.txt", "*/*.model", "*/*.safetensors"],
        "ignore_patterns": ["safety_checker/*", "*.fp16.safetensors", "*.non_ema.safetensors"],
    }
    try:
        return Path(snapshot_download(model_id, local_files_only=True, **wanted))
    except LocalEntryNotFoundError:
        pass
    try:
        return Path(snapshot_download(model_id, **wanted))
    except Exception as error:  # the hub client raises dozens of kinds; each means that the model is not to be had
        raise Fatal(f"model {model_id}: cannot be downloaded at {revision}: {error}") from error


def _read_json(path: Path, problem: str) -> dict[str, Any]:
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return data
    except (OSError, ValueError):
        raise InvalidJob(f"{problem} ({path.name})") from None


def _default_sampler(index: dict[str, Any], kind: Kind) -> str:
    """The table's name for the scheduler that the model comes with; a plain one of its kind if the table has it not."""
    class_name = index.get("scheduler", [None, None])[1]
    kin = [sampler for sampler in SAMPLERS.values() if sampler.scheduler == class_name and sampler.kind == kind]
    return min(kin, key=lambda sampler: len(sampler.overrides)).name if kin else {"diffusion": "ddim", "flow": "flow-euler"}[kind]
