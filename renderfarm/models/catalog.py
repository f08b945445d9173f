"""What a model is, read from its folder's JSON files; torch is not needed."""

from __future__ import annotations

import inspect
import json
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from renderfarm.config import ModelSpec, expand_env
from renderfarm.errors import Fatal, InvalidJob
from renderfarm.models.families import ALWAYS, DISPATCHED, FAMILIES, GENERIC, LCM, NEGATIVE, PLAIN, SHIFTED, Config, Family, Sizes
from renderfarm.samplers import GLOBAL_STATE, SAMPLERS, Kind

Task = Literal["text-to-image", "image-to-image", "inpainting"]
IMAGES_OF: dict[Task, tuple[str, ...]] = {"text-to-image": (), "image-to-image": ("image",), "inpainting": ("image", "mask_image")}


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
    refused_samplers: Mapping[str, str] = field(default_factory=dict)
    sha256: str | None = None
    """What the model's files must be, if the job says so (`fingerprint.model_sha256`)."""
    adapters: Mapping[str, str] = field(default_factory=dict)
    """LoRA adapters: their files, by name."""
    pipeline_class: str = ""
    attention_backends: bool = False
    """Whether `workers.attention_backend` means anything to it, as far as is known before it is loaded."""
    task: Task = "text-to-image"
    strength: float | None = None
    """The task's default, where it begins with an image."""
    least_strength: Literal["floor", "ceil", "lcm"] = "floor"
    """How strength and steps must fit (`ImageTask`)."""
    warnings: tuple[str, ...] = ()
    """What a user of the dataset should know of the model's rendering."""

    @property
    def name(self) -> str:
        """The id as tables and profile show it: a local folder by its name, since its place decides no pixel."""
        return os.path.basename(self.id) if os.path.isabs(self.id) else self.id


def describe(spec: ModelSpec) -> ModelInfo:
    """Find the model (downloading a pinned hub model if it is not in the cache) and read what it is."""
    model_id = expand_env(spec.id)
    if model_id == "builtin:fake":
        if spec.safety_checker:
            raise InvalidJob(f"model {model_id}: it has no safety checker; leave model.safety_checker out")
        return ModelInfo(model_id, "fake:Fake", "diffusion", None, None, 8, 64, 64, 4096, 20, 5.0, "euler", PLAIN)
    folder = _find_folder(model_id, spec)
    index = _read_json(folder / "model_index.json", f"model {model_id}: {folder} is not a model in diffusers' format")
    class_name = index.get("_class_name", "")
    family = FAMILIES.get(str(class_name)) or _generic(class_name, folder, model_id)
    _check_safety_checker(spec, family, index, folder)

    def configuration(file: str) -> Config:
        return _read_json(folder / file, f"model {model_id}: {file} is missing or damaged")

    denoiser, scheduler = configuration(f"{family.denoiser}/config.json"), configuration("scheduler/scheduler_config.json")
    vae = configuration("vae/config.json") if family.vae else {}
    if class_name == LCM and denoiser.get("time_cond_proj_dim") is None:
        raise InvalidJob(f"model {model_id}: its UNet takes no guidance embedding (time_cond_proj_dim), so {LCM} cannot run it")
    builtin = model_id == "builtin:shapes"
    return ModelInfo(
        id=model_id,
        adapter=family.adapter,
        kind=family.kind,
        folder=str(folder),
        revision=spec.revision,
        **asdict(_sizes(family, denoiser, vae, model_id)),
        num_inference_steps=20 if builtin else family.num_inference_steps,
        guidance_scale=5.0 if builtin else family.guidance_scale,
        sampler=_default_sampler(index, family.kind),
        arguments=(family.arguments | _of_tasks(family)) - _unread(denoiser, index),
        safety_checker=spec.safety_checker,
        refused_samplers={**family.refused_samplers, **refused_by_configuration(class_name, scheduler)},
        sha256=spec.sha256,
        adapters=_adapters(spec, family),
        pipeline_class=class_name,
        attention_backends=class_name in DISPATCHED or class_name not in FAMILIES,
        warnings=()
        if class_name in FAMILIES
        else (f"{class_name} was not compared with diffusers' own pixels here: exactness is not promised",),
    )


def _adapters(spec: ModelSpec, family: Family) -> dict[str, str]:
    if spec.adapters and "adapters" not in family.arguments:
        raise InvalidJob(f"model {spec.id}: this class takes no LoRA adapters; leave model.adapters out")
    return {name: expand_env(path) for name, path in spec.adapters.items()}


def _of_tasks(family: Family) -> frozenset[str]:
    taken = {"image", "strength"} if family.image_to_image else set()
    return frozenset(taken | ({"mask_image"} if family.inpainting else set()))


def for_task(info: ModelInfo, given: Collection[str]) -> ModelInfo:
    """The model as it renders rows with these arguments: with an image it is image-to-image, with a mask inpainting."""
    if "image" not in given and "mask_image" not in given:
        return replace(info, arguments=info.arguments - {"image", "mask_image", "strength"})
    if "image" not in given:
        raise InvalidJob("manifest: mask_image needs an image beside it; give both columns")
    name: Task = "inpainting" if "mask_image" in given else "image-to-image"
    family = FAMILIES.get(info.pipeline_class)
    task = None if family is None else family.inpainting if name == "inpainting" else family.image_to_image
    if task is None:
        raise InvalidJob(f"model {info.id}: {info.pipeline_class or 'it'} has no {name} here; drop the columns, or choose another model")
    if info.safety_checker:
        raise InvalidJob(f"model {info.id}: its safety checker is not run for {name} here; leave model.safety_checker out")
    flows = ("flow-dpm++2m", "flow-unipc") if info.kind == "flow" else ()
    reason = f"diffusers' {name} starts with a mixture of picture and noise that this scheduler does not make"
    return replace(
        info,
        adapter=task.adapter,
        pipeline_class=task.pipeline_class,
        task=name,
        strength=task.strength,
        least_strength=task.least_strength,
        arguments=info.arguments - {"seed_b", "blend"},
        refused_samplers={**info.refused_samplers, **dict.fromkeys(flows, reason)},
    )


def _generic(class_name: Any, folder: Path, model_id: str) -> Family:
    """The family of a class that is not in the table, from what diffusers says of it."""
    import diffusers

    known = getattr(diffusers, class_name, None) if isinstance(class_name, str) and class_name.endswith("Pipeline") else None
    taken = inspect.signature(known.__call__).parameters if known is not None else {}
    needed = {name for name, p in taken.items() if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)} - {"self"}
    others = {"image", "images", "control_image", "video", "num_frames", "video_length", "audio_length_in_s"} & taken.keys()
    if known is None or not {"prompt", "generator", "height", "width"} <= taken.keys() or others or needed - {"prompt"}:
        raise InvalidJob(
            f"model {model_id}: {class_name or 'its pipeline'} is no text-to-image class of diffusers {diffusers.__version__} that a "
            f"prompt alone can call; supported and compared: {', '.join(FAMILIES)}"
        )
    denoiser = next((name for name in ("transformer", "unet") if (folder / name / "config.json").is_file()), "transformer")
    arguments = (ALWAYS - {"seed_b", "blend"}) | (PLAIN - ALWAYS) & taken.keys()
    steps, guidance = (taken[name].default if name in taken else None for name in ("num_inference_steps", "guidance_scale"))
    return replace(
        GENERIC,
        arguments=arguments,
        num_inference_steps=steps if isinstance(steps, int) else GENERIC.num_inference_steps,
        guidance_scale=guidance if isinstance(guidance, int | float) else GENERIC.guidance_scale,
        denoiser=denoiser,
        vae=(folder / "vae" / "config.json").is_file(),
    )


def _sizes(family: Family, denoiser: Config, vae: Config, model_id: str) -> Sizes:
    try:
        return family.sizes(denoiser, vae)
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidJob(f"model {model_id}: its {family.denoiser} or vae configuration does not say its sizes ({error!r})") from None


def _check_safety_checker(spec: ModelSpec, family: Family, index: Config, folder: Path) -> None:
    if not spec.safety_checker:
        return
    parts = ("safety_checker", "feature_extractor")
    if not family.safety_checker or any(index.get(part, [None])[0] is None or not (folder / part).is_dir() for part in parts):
        raise InvalidJob(f"model {spec.id}: it has no safety checker; leave model.safety_checker out, or give a model that has one")


def _unread(denoiser: Config, index: Config) -> frozenset[str]:
    """Arguments of the family that this model's pipeline would ignore: where guidance is an embedding there is no second
    pass for a negative prompt, nor in a distilled klein, and without T5 nobody reads the third prompt."""
    unread = NEGATIVE if denoiser.get("time_cond_proj_dim") is not None or index.get("is_distilled") else frozenset()
    if index.get("text_encoder_3", [None])[0] is None:
        unread |= {"prompt_3", "negative_prompt_3"}
    return unread


def refused_by_configuration(class_name: str, scheduler: Config) -> dict[str, str]:
    """Samplers that the model's scheduler configuration makes inexact or impossible."""
    refused: dict[str, str] = {}
    if scheduler.get("prediction_type") == "sample":
        reason = "its denoiser predicts the picture itself (prediction_type: sample), which diffusers' scheduler does not take"
        refused |= dict.fromkeys(("pndm", "euler-a", "dpm2", "dpm2-karras", "dpm2-a", "dpm2-a-karras"), reason)
    if scheduler.get("stochastic_sampling"):
        refused["flow-euler"] = "its scheduler configuration says stochastic_sampling, which " + GLOBAL_STATE
    dynamic = scheduler.get("use_dynamic_shifting", False)
    exponential = dynamic and scheduler.get("time_shift_type", "exponential") == "exponential"
    if (dynamic or class_name in SHIFTED) and not exponential:
        refused["flow-dpm++2m"] = (
            "the pipeline shifts its timesteps by mu, which diffusers' solver takes from exponential dynamic shifting only"
        )
    return refused


def _find_folder(model_id: str, spec: ModelSpec) -> Path:
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
    if not re.fullmatch(r"[0-9a-f]{40}", spec.revision or ""):
        raise InvalidJob(
            f"model {model_id}: a hub model needs its full commit, so that it cannot change: "
            f"model: {{id: {model_id}, revision: <40 hex digits>}}"
        )
    return _from_hub(model_id, spec)


def _from_hub(model_id: str, spec: ModelSpec) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    unwanted = ["*.fp16.safetensors", "*.fp16-*.safetensors", "*.non_ema.safetensors"]
    wanted: dict[str, Any] = {
        "revision": spec.revision,
        # the components' folders only: single-file checkpoints beside them hold the same weights once more
        "allow_patterns": ["model_index.json", "*/*.json", "*/*.txt", "*/*.model", "*/*.jinja", "*/*.safetensors"],
        "ignore_patterns": unwanted if spec.safety_checker else ["safety_checker/*", *unwanted],
    }
    try:
        return Path(snapshot_download(model_id, local_files_only=True, **wanted))
    except LocalEntryNotFoundError:
        pass
    try:
        return Path(snapshot_download(model_id, **wanted))
    except Exception as error:  # the hub client raises dozens of kinds; each means that the model is not to be had
        raise Fatal(f"model {model_id}: cannot be downloaded at {spec.revision}: {error}") from error


def _read_json(path: Path, problem: str) -> dict[str, Any]:
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(data, dict):
            return data
    except (OSError, ValueError):
        pass
    raise InvalidJob(f"{problem} ({path.name})")


def _default_sampler(index: dict[str, Any], kind: Kind) -> str:
    """The table's name for the scheduler that the model comes with; a plain one of its kind if the table has it not."""
    class_name = index.get("scheduler", [None, None])[1]
    kin = [sampler for sampler in SAMPLERS.values() if sampler.scheduler == class_name and sampler.kind == kind]
    plain = {"diffusion": "ddim", "flow": "flow-euler", "own": "default"}[kind]
    return min(kin, key=lambda sampler: len(sampler.overrides)).name if kin else plain
