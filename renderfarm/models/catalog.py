"""What a model is, read from its folder's JSON files; torch is not needed."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from renderfarm.config import COMPANIONS, STAGES, Checkpoint, ModelSpec, expand_env
from renderfarm.errors import Fatal, InvalidJob, Transient
from renderfarm.models.families import (
    ALWAYS,
    CONTROL,
    DISPATCHED,
    FAMILIES,
    GENERIC,
    IMAGES_OF,
    LCM,
    NEGATIVE,
    PLAIN,
    SHIFTED,
    Config,
    Family,
    Sizes,
    Task,
    vae_scale,
)
from renderfarm.models.files import components
from renderfarm.models.sources import find_beside, find_model, read_index, read_json
from renderfarm.samplers import GLOBAL_STATE, Kind, own_sampler, trained_for, without_zero_snr


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
    variant: str | None = None
    """Of the weights: `fp16` for `*.fp16.safetensors`; None: those without one."""
    sha256: str | None = None
    """What the model's files must be, if the job says so (`fingerprint.model_sha256`)."""
    adapters: Mapping[str, str] = field(default_factory=dict)
    """LoRA adapters: their files, by name."""
    adapter_sha256: Mapping[str, str] = field(default_factory=dict)
    """What those files must be, as the driver has read them."""
    pipeline_class: str = ""
    attention_backends: bool = False
    """Whether `workers.attention_backend` means anything to it, as far as is known before it is loaded."""
    task: Task = "text-to-image"
    strength: float | None = None
    """The task's default, where it begins with an image."""
    companions: Mapping[str, str] = field(default_factory=dict)
    """The folders of models that are used beside this one, by their names in `config.COMPANIONS`."""
    stages: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Of those that enlarge its pictures (`config.STAGES`), the arguments of their calls; None: the call's own default."""
    least_strength: Literal["floor", "ceil", "lcm"] = "floor"
    """How strength and steps must fit (`ImageTask`)."""
    source: ModelSpec | None = None
    """Where its files are to be had, on whatever machine."""
    prompt_weighting: Literal["a1111"] | None = None
    """How weights are written in texts; None: not at all."""
    warnings: tuple[str, ...] = ()
    """What a user of the dataset should know of the model's rendering."""

    @property
    def images(self) -> tuple[str, ...]:
        """The images that every row must give."""
        return IMAGES_OF[self.task]

    def variant_of(self, companion: str) -> str | None:
        """As `variant`, of a model that is used beside this one."""
        given = self.source and getattr(self.source, companion)
        return given.variant if given else None

    @property
    def name(self) -> str:
        """The id as tables and profile show it: a local folder by its name, since its place decides no pixel."""
        return shown_name(self.id)

    @property
    def components(self) -> dict[str, dict[str, str | None]] | None:
        """Where parts of it come from that took others' place, as job.json has it; None: it is as it was published."""
        others = self.source.components if self.source else {}
        return {name: {**given.model_dump(), "id": shown_name(given.id)} for name, given in others.items()} or None


def shown_name(model_id: str) -> str:
    return os.path.basename(model_id) if os.path.isabs(model_id) else model_id


def describe(spec: ModelSpec) -> ModelInfo:
    """Find the model (fetching its configurations if it is a hub model that is not in the cache) and read what it is."""
    try:
        return _described(spec)
    except Transient as error:  # nothing is left to try it again
        raise Fatal(str(error)) from error


def _described(spec: ModelSpec) -> ModelInfo:
    model_id = expand_env(spec.id)
    if model_id == "builtin:fake":
        if spec.components:
            raise InvalidJob(f"model {model_id}: it has no components; leave model.components out")
        if spec.safety_checker:
            raise InvalidJob(f"model {model_id}: it has no safety checker; leave model.safety_checker out")
        if spec.adapters:
            raise InvalidJob(f"model {model_id}: it takes no LoRA adapters; leave model.adapters out")
        return ModelInfo(model_id, "fake:Fake", "diffusion", None, None, 8, 64, 64, 4096, 20, 5.0, "euler", PLAIN)
    folder = find_model(spec, weights=False)
    index = read_index(folder, model_id)
    class_name = index.get("_class_name", "")
    family = FAMILIES.get(str(class_name)) or _generic(class_name, folder, model_id)
    _check_safety_checker(spec, family, index, folder)

    def configuration(file: str) -> Config:
        return read_json(folder / file, f"model {model_id}: {file} is missing or damaged")

    denoiser, scheduler = configuration(f"{family.denoiser}/config.json"), configuration("scheduler/scheduler_config.json")
    _check_scheduler(index, scheduler, family.kind, model_id)
    vae = configuration("vae/config.json") if family.vae else {}
    if class_name == LCM and denoiser.get("time_cond_proj_dim") is None:
        raise InvalidJob(f"model {model_id}: its UNet takes no guidance embedding (time_cond_proj_dim), so {LCM} cannot run it")
    builtin = model_id == "builtin:shapes"
    companions = _companions(spec, class_name, denoiser)
    return ModelInfo(
        id=model_id,
        adapter="refiner:WithRefiner" if "refiner" in companions else family.adapter,
        kind=family.kind,
        folder=str(folder),
        source=_expanded(spec),
        revision=spec.revision,
        **asdict(_sizes(family, denoiser, vae, model_id).times(_enlarged(companions, denoiser))),
        num_inference_steps=20 if builtin else family.num_inference_steps,
        guidance_scale=5.0 if builtin else family.guidance_scale,
        sampler=_default_sampler(index, scheduler, family.kind),
        arguments=(family.arguments | _of_tasks(family, spec)) - _unread(denoiser, index),
        safety_checker=spec.safety_checker,
        refused_samplers={**family.refused_samplers, **refused_by_configuration(class_name, scheduler)},
        variant=spec.variant,
        sha256=spec.sha256,
        adapters=_adapters(spec, family),
        pipeline_class=class_name,
        companions=companions,
        stages={name: given.model_dump(exclude=set(Checkpoint.model_fields)) for name in STAGES if (given := getattr(spec, name))},
        attention_backends=class_name in DISPATCHED or class_name not in FAMILIES,
        warnings=()
        if class_name in FAMILIES
        else (f"{class_name} was not compared with diffusers' own pixels here: exactness is not promised",),
    )


def _expanded(spec: ModelSpec) -> ModelSpec:
    """The driver's environment decides, not a worker's."""

    def expanded(given: Any) -> Any:
        return given and given.model_copy(update={"id": expand_env(given.id)})

    beside = {name: expanded(getattr(spec, name)) for name in COMPANIONS}
    others = {name: expanded(given) for name, given in spec.components.items()}
    return spec.model_copy(update={"id": expand_env(spec.id), "components": others, **beside})


def _adapters(spec: ModelSpec, family: Family) -> dict[str, str]:
    if spec.adapters and "adapters" not in family.arguments:
        raise InvalidJob(f"model {spec.id}: this class takes no LoRA adapters; leave model.adapters out")
    return {name: expand_env(given.weights) for name, given in spec.adapters.items()}


def _of_tasks(family: Family, spec: ModelSpec) -> frozenset[str]:
    taken = {image for task in family.tasks for image in IMAGES_OF[task]} | ({"strength"} if family.tasks else set())
    found = frozenset(taken - CONTROL | (CONTROL if spec.controlnet else frozenset()))
    return found | {"denoising_end"} if spec.refiner else found


@dataclass(frozen=True)
class _CompanionOf:
    """Which pipeline classes take a companion, the file that names its class, and the class that it must be."""

    classes: tuple[str, ...]
    file: str
    class_name: str


_COMPANIONS = {
    "controlnet": _CompanionOf(
        tuple(name for name, family in FAMILIES.items() if "controlled text-to-image" in family.tasks), "config.json", "ControlNetModel"
    ),
    "refiner": _CompanionOf(("StableDiffusionXLPipeline",), "model_index.json", "StableDiffusionXLImg2ImgPipeline"),
    "super_resolution": _CompanionOf(("IFPipeline",), "model_index.json", "IFSuperResolutionPipeline"),
    "upscaler": _CompanionOf(("IFPipeline",), "model_index.json", "StableDiffusionUpscalePipeline"),
}


def _companions(spec: ModelSpec, class_name: str, denoiser: Config) -> dict[str, str]:
    """The folders of the models beside this one. Raises InvalidJob where one does not fit."""
    found = {}
    for name, rule in _COMPANIONS.items():
        if (given := getattr(spec, name)) is None:
            continue
        if class_name not in rule.classes:
            raise InvalidJob(f"model.{name}: {class_name} takes none here ({', '.join(rule.classes)} does); leave it out")
        companion_id = expand_env(given.id)
        folder = find_beside(given, f"model.{name}", weights=False)
        config = read_json(folder / rule.file, f"model.{name}: {companion_id} is not in diffusers' format")
        if config.get("_class_name") != rule.class_name:
            raise InvalidJob(f"model.{name}: {companion_id} is a {config.get('_class_name')}, and must be a {rule.class_name}")
        if name == "controlnet" and config.get("cross_attention_dim") != denoiser.get("cross_attention_dim"):
            raise InvalidJob(
                f"model.controlnet: {companion_id} was made for another kind of model: its cross_attention_dim is "
                f"{config.get('cross_attention_dim')}, the model's {denoiser.get('cross_attention_dim')}"
            )
        found[name] = str(folder)
    return found


def _enlarged(companions: Mapping[str, str], denoiser: Config) -> int:
    """How many times larger the last stage's pictures are than the model's own."""

    def of(stage: str, file: str, ratio: Callable[[Config], int]) -> int:
        problem = f"model.{stage}: {file} is missing, damaged, or does not say how large its pictures are"
        try:
            return ratio(read_json(Path(companions[stage]) / file, problem)) if stage in companions else 1
        except (KeyError, TypeError):
            raise InvalidJob(problem) from None

    second = of("super_resolution", "unet/config.json", lambda unet: unet["sample_size"] // denoiser["sample_size"])
    return second * of("upscaler", "vae/config.json", vae_scale)


def for_task(info: ModelInfo, given: Collection[str]) -> ModelInfo:
    """The model as it renders rows with these arguments: with an image it is image-to-image, with a mask inpainting, and
    either, or none of them, may be controlled by a third."""
    images = {name for name in IMAGES_OF["controlled inpainting"] if name in given}
    if "mask_image" in images and "image" not in images:
        raise InvalidJob("manifest: mask_image needs an image beside it; give both columns")
    if "controlnet" in info.companions and "control_image" not in images:
        raise InvalidJob("model.controlnet needs an image in each row: give the manifest a column control_image, or leave it out")
    unused = {"image", "mask_image", "strength"} - images - ({"strength"} if "image" in images else set())
    info = replace(info, arguments=info.arguments - unused)
    if not images:
        return info
    name = next(task for task, needed in IMAGES_OF.items() if set(needed) == images)
    task = FAMILIES[info.pipeline_class].tasks.get(name) if info.pipeline_class in FAMILIES else None
    if task is None:
        raise InvalidJob(f"model {info.id}: {info.pipeline_class or 'it'} has no {name} here; drop the columns, or choose another model")
    if "refiner" in info.companions:
        raise InvalidJob(f"model.refiner: is for text-to-image, and the manifest's images make this {name}; leave it out")
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
        arguments=info.arguments - ({"seed_b", "blend"} if "image" in images else set()),
        refused_samplers={**info.refused_samplers, **dict.fromkeys(flows, reason)},
    )


def with_weights(info: ModelInfo, syntax: Literal["a1111"] | None) -> ModelInfo:
    """The model as it reads texts with weights, before it is given a task."""
    family = FAMILIES.get(info.pipeline_class)
    if syntax is not None and (family is None or not family.prompt_weighting):
        having = ", ".join(name for name, family in FAMILIES.items() if family.prompt_weighting)
        raise InvalidJob(f"model {info.id}: render.prompt_weighting is for {having}; leave it out, or choose another model")
    if syntax is not None and "refiner" in info.companions:
        raise InvalidJob("render.prompt_weighting and model.refiner do not go together here; leave one of them out")
    return replace(info, prompt_weighting=syntax)


def _generic(class_name: Any, folder: Path, model_id: str) -> Family:
    """The family of a class that is not in the table, from what diffusers says of it."""
    import diffusers

    known = getattr(diffusers, class_name, None) if isinstance(class_name, str) and class_name.endswith("Pipeline") else None
    taken = inspect.signature(known.__call__).parameters if known is not None else {}
    needed = {name for name, p in taken.items() if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)} - {"self"}
    others = {"image", "images", "audio_length_in_s"} & taken.keys()
    others |= {name for name in taken if re.search(r"video|frames|^control_|^gligen_", name)}
    others |= {"a prior's embedding"} if str(class_name).endswith("PriorPipeline") else set()
    if known is None or not {"prompt", "generator", "height", "width"} <= taken.keys() or others or needed - {"prompt"}:
        raise InvalidJob(
            f"model {model_id}: {class_name or 'its pipeline'} is no text-to-image class of diffusers {diffusers.__version__} that a "
            f"prompt alone can call; supported and compared: {', '.join(FAMILIES)}"
        )
    denoiser = next((name for name in ("transformer", "unet") if (folder / name / "config.json").is_file()), "transformer")
    drawn = inspect.signature(known.prepare_latents).parameters if hasattr(known, "prepare_latents") else {}
    blended = {"seed_b", "blend"} if "latents" in taken and "generator" in drawn else set()
    arguments = (ALWAYS - {"seed_b", "blend", "guidance_scale"}) | PLAIN & taken.keys() | blended
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
    if not family.safety_checker or any(part not in components(index) or not (folder / part).is_dir() for part in parts):
        raise InvalidJob(f"model {spec.id}: it has no safety checker; leave model.safety_checker out, or give a model that has one")


def _unread(denoiser: Config, index: Config) -> frozenset[str]:
    """Arguments of the family that this model's pipeline would ignore: where guidance is an embedding there is no second
    pass for a negative prompt, nor in a distilled klein; without T5 nobody reads the third prompt; and a Qwen-Image that was
    not distilled to read its guidance is guided by `true_cfg_scale` alone."""
    unread = NEGATIVE if denoiser.get("time_cond_proj_dim") is not None or index.get("is_distilled") else frozenset()
    if "text_encoder_3" not in components(index):
        unread |= {"prompt_3", "negative_prompt_3"}
    if index.get("_class_name") == "QwenImagePipeline" and not denoiser.get("guidance_embeds"):
        unread |= {"guidance_scale"}
    return unread


def _check_scheduler(index: Config, scheduler: Config, kind: Kind, model_id: str) -> None:
    """A model's scheduler says what it was trained for, which its class does not."""
    for class_name in (str(scheduler.get("_class_name")), _scheduler_class(index)):  # two files, one of which may be another model's
        found = trained_for(class_name, scheduler)
        if kind != "own" and found not in (None, kind):
            such = f"a scheduler for {kind} models" + (" (FlowMatchEulerDiscreteScheduler, or use_flow_sigmas)" if kind == "flow" else "")
            raise InvalidJob(
                f"model {model_id}: its scheduler {class_name}, as configured, is for {found} models, and {index['_class_name']} is "
                f"rendered here with samplers for {kind} models, which would paint nonsense; if it was trained as a {kind} model, give its "
                f"folder {such}; otherwise choose another model"
            )


def refused_by_configuration(class_name: str, scheduler: Config) -> dict[str, str]:
    """Samplers that the model's scheduler configuration makes inexact or impossible."""
    refused: dict[str, str] = {}
    if scheduler.get("prediction_type") == "sample":
        reason = "its denoiser predicts the picture itself (prediction_type: sample), which diffusers' scheduler does not take"
        refused |= dict.fromkeys(("pndm", "euler-a", "dpm2", "dpm2-karras", "dpm2-a", "dpm2-a-karras"), reason)
    if scheduler.get("rescale_betas_zero_snr"):
        reason = "its scheduler configuration says rescale_betas_zero_snr, which diffusers' scheduler does not take"
        refused |= dict.fromkeys(without_zero_snr(), reason)
    if scheduler.get("stochastic_sampling"):
        refused["flow-euler"] = "its scheduler configuration says stochastic_sampling, which " + GLOBAL_STATE
    dynamic = scheduler.get("use_dynamic_shifting", False)
    exponential = dynamic and scheduler.get("time_shift_type", "exponential") == "exponential"
    if (dynamic or class_name in SHIFTED) and not exponential:
        refused["flow-dpm++2m"] = (
            "the pipeline shifts its timesteps by mu, which diffusers' solver takes from exponential dynamic shifting only"
        )
    return refused


def _default_sampler(index: Config, scheduler: Config, kind: Kind) -> str:
    """The table's name for the scheduler that the model comes with; a plain one of its kind if the table has it not."""
    own = own_sampler(_scheduler_class(index), scheduler, kind)
    return own.name if own else {"diffusion": "ddim", "flow": "flow-euler", "own": "default"}[kind]


def _scheduler_class(index: Config) -> str:
    return components(index).get("scheduler", ("", ""))[1]
