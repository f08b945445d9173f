"""The model of a job, and what is used beside it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from renderfarm.config.base import Strict

BUILTIN_MODELS = {
    "builtin:shapes": "drawn shapes, 64 px: real and tiny, for demos and tests",
    "builtin:fake": "random pixels without torch, for fault drills and load measurements",
}


class Source(Strict):
    """Where a model, or a part of one, comes from."""

    id: Annotated[str, Field(min_length=1)]
    """A folder in diffusers' format, relative to the job file, a hub id `org/name`, or a store's URL (`s3://bucket/model`)."""
    revision: str | None = None
    """A full commit hash; required for a hub id, so that the weights cannot change under the job."""


def _by_id(value: Any) -> Any:
    return {"id": value} if isinstance(value, str) else value


class ComponentSpec(Source):
    """For a denoiser the id may also be that of a `.gguf` file (renderfarm[gguf])."""

    subfolder: str | None = None
    """Where the component lies in a whole model, e.g. `vae`."""


class Checkpoint(Source):
    """A pipeline, or a ControlNet, with its weights."""

    variant: Annotated[str, Field(pattern=r"^\w[\w.-]{0,31}$")] | None = None
    """Which weights to load where a model has several: `fp16` takes `*.fp16.safetensors` of the components that have them.
    Independent of `workers.dtype`, to which they are converted."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    """What `renderfarm models --model … --fetch` prints for a pipeline: one with another byte stops the job before it renders,
    and the message says the hash that was found."""


class Quantization(Strict):
    """Weights quantised while they are loaded, by diffusers and one of the packages that it knows for that."""

    backend: Literal["torchao", "quanto", "bitsandbytes"]
    """torchao is compared with diffusers' own pixels here (renderfarm[torchao]); the others are passed on as they are."""
    components: Annotated[tuple[str, ...], Field(min_length=1)]
    """Which parts of the model: `[transformer]`, `[unet, text_encoder]`."""
    arguments: dict[str, Any] = {}
    """Of the backend's configuration in diffusers and transformers: `{load_in_4bit: true}`. For torchao, `quant_type` names one
    of its configuration classes (`Int8WeightOnlyConfig`), and the others are that one's (`granularity: PerRow`). What scales
    activations by the whole batch is refused: a sample's pixels would depend on its mates."""


class SuperResolution(Checkpoint):
    """A stage that enlarges the pictures of the stage before; its settings are the job's, not a row's."""

    num_inference_steps: Annotated[int, Field(ge=1, le=998)] | None = None
    """None: 50, for inpainting 100."""
    guidance_scale: Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)] = 4.0
    noise_level: Annotated[int, Field(ge=0, le=999)] | None = None
    """How much noise the small picture gets before it is enlarged. None: 250, for inpainting 0."""
    strength: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 0.8
    """Where rows give an image: how much of it this stage paints anew. About that share of its steps runs."""

    @model_validator(mode="after")
    def _runs(self) -> SuperResolution:
        if int((steps := self.num_inference_steps or 50) * self.strength) < 1:
            raise ValueError(f"strength {self.strength} of {steps} steps runs none of them; give more of either")
        return self


class Upscaler(Checkpoint):
    """Stable Diffusion's ×4 upscaler, for the pictures of the stages before; its settings are the job's, not a row's."""

    num_inference_steps: Annotated[int, Field(ge=1, le=998)] = 75
    guidance_scale: Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)] = 9.0
    noise_level: Annotated[int, Field(ge=0, le=350)] = 20
    """How much noise the small picture gets before it is enlarged."""


class Adapter(Strict):
    weights: Annotated[str, Field(min_length=1)]
    """A `.safetensors` file, relative to the job file, or in a store by its URL."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    """Of that file: another one stops the job before it renders."""


def _by_weights(value: Any) -> Any:
    return {"weights": value} if isinstance(value, str) else value


class ModelSpec(Checkpoint):
    """`id` may also be `builtin:shapes`."""

    components: dict[str, Annotated[ComponentSpec, BeforeValidator(_by_id, json_schema_input_type=ComponentSpec | str)]] = {}
    """Parts of the model (`vae`, `text_encoder`, `unet`, `scheduler` …) that others take the place of: a folder, or
    `{id: org/name, revision: <commit>, subfolder: vae}`."""
    quantization: Quantization | None = None
    """`{backend: torchao, components: [transformer], arguments: {quant_type: Int8WeightOnlyConfig}}`. None: weights as they are."""
    adapters: dict[
        Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")],
        Annotated[Adapter, BeforeValidator(_by_weights, json_schema_input_type=Adapter | str)],
    ] = {}
    """LoRA adapters by a name of your own: each a `.safetensors` file, relative to the job file, or `{weights: FILE, sha256: …}`.
    Rows and `render.adapters` say which are on, and how strongly. DeepFloyd IF's are its first stage's. Needs renderfarm[lora]."""
    controlnet: Annotated[Checkpoint, BeforeValidator(_by_id, json_schema_input_type=Checkpoint | str)] | None = None
    """A ControlNet for Stable Diffusion or SDXL, in diffusers' format; each row gives its `control_image`."""
    refiner: Annotated[Checkpoint, BeforeValidator(_by_id, json_schema_input_type=Checkpoint | str)] | None = None
    """SDXL's refiner: it takes over where `denoising_end` says, with the noise that is left."""
    super_resolution: Annotated[SuperResolution, BeforeValidator(_by_id, json_schema_input_type=SuperResolution | str)] | None = None
    """DeepFloyd IF's second stage. Heights and widths are then those of its pictures."""
    upscaler: Annotated[Upscaler, BeforeValidator(_by_id, json_schema_input_type=Upscaler | str)] | None = None
    """DeepFloyd IF's third stage (a `StableDiffusionUpscalePipeline`); it may follow the first one, too. Heights and widths are
    then those of its pictures."""
    safety_checker: bool = False
    """Run the model's own safety checker, if it has one; an image that it refuses ends as an error row."""


STAGES = ("super_resolution", "upscaler")


COMPANIONS = ("controlnet", "refiner", *STAGES)
