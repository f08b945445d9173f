"""The job file: one YAML, frozen pydantic models, every field explained.

`${ENV}` stays as written in what is stored and is expanded only where a value is used (`expand_env`).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from renderfarm.errors import InvalidJob
from renderfarm.seeds import MAX_SEED

BUILTIN_MODELS = {
    "builtin:shapes": "drawn shapes, 64 px: real and tiny, for demos and tests",
    "builtin:fake": "random pixels without torch, for fault drills and load measurements",
}


class Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ManifestSpec(Strict):
    path: Annotated[str, Field(min_length=1)] | Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)] | None = None
    """Parquet file, directory, glob, or a list of these; relative to the job file. Or files of text (`.csv`, `.tsv`, `.jsonl`,
    `.txt` with one prompt a line), which are converted once and kept in the output."""
    rows: Annotated[tuple[Annotated[str, Field(min_length=1)] | dict[str, Any], ...], Field(min_length=1)] | None = None
    """Instead of a path: the rows themselves, each a prompt or its columns: `[a red circle, {prompt: a cat, seed: 5}]`."""
    columns: str | dict[str, str | None] | None = None
    """A preset (`diffusiondb`; `renderfarm` for the tables of an output), or a map from renderfarm's column name to the
    manifest's own: `{prompt: caption}`. A null (`{image: null}`) makes a column that has an argument's name an ordinary one."""
    where: dict[str, Any] | None = None
    """Render only rows whose columns have these values (a value or a list); `row` takes ranges: `{row: "0-199,300"}`. With a
    `sweep` or `prompts`, these are the rows that are multiplied."""

    @model_validator(mode="after")
    def _one_kind(self) -> ManifestSpec:
        if (self.path is None) == (self.rows is None):
            raise ValueError("give either path or rows")
        return self

    @property
    def paths(self) -> list[str]:
        return self.path if isinstance(self.path, list) else [] if self.path is None else [self.path]


Scalar = str | int | float | bool | None
Axis = Annotated[list[Scalar], Field(min_length=1)] | str
"""The values of one axis: a list, or a range `1..10`, `0.5..1:0.1`, both ends in it."""


class Param(Strict):
    """A value that `${params.NAME}` stands for, wherever a job's field has one."""

    type: Literal["int", "float", "str", "bool"] | None = None
    """None: that of the default."""
    default: Scalar = None
    """None: whoever runs the job must give it (`--set params.NAME=VALUE`)."""
    choices: Annotated[tuple[Scalar, ...], Field(min_length=1)] | None = None
    """The only values that it may have."""
    min: float | None = None
    max: float | None = None
    description: str | None = None
    """For whoever is to choose a value."""
    value: Scalar = None
    """What `--set params.NAME=VALUE` writes. None: the default."""

    @property
    def kind(self) -> str:
        return self.type or type(self.default).__name__

    @model_validator(mode="after")
    def _typed(self) -> Param:
        if self.type is None and self.default is None:
            raise ValueError("give a type (int, float, str, bool) or a default")
        if self.kind in ("str", "bool") and (self.min is not None or self.max is not None):
            raise ValueError(f"min and max are for numbers, and this is {self.kind}; use choices")
        return self


def _by_default(value: Any) -> Any:
    return value if isinstance(value, dict | Param) else {"default": value}


Params = dict[
    Annotated[str, Field(pattern=r"^[A-Za-z_]\w{0,63}$")],
    Annotated[Param, BeforeValidator(_by_default, json_schema_input_type=Param | str | int | float | bool)],
]


class Sweep(Strict):
    """Each row of the manifest once for every combination of these values. Names are arguments that a row may give, or columns."""

    product: dict[str, Axis] = {}
    """Every value with every other: `{guidance_scale: [3, 5, 7], num_inference_steps: "10..30:10"}` makes nine rows of one; the last
    axis changes first."""
    zip: dict[str, Axis] = {}
    """Values that go together, the first with the first: lists of one length. With `product`, one more axis, behind those."""
    noise: Literal["shared", "own"] = "shared"
    """shared: the rows that one row and text became begin with the same noise, so that pictures show what an axis changes. own:
    each with its own. A row's `seed`, or an axis `seed`, wins over both."""
    max_rows: Annotated[int, Field(ge=1, le=1_000_000_000)] = 100_000
    """More rows than this, counted before any is made, are refused; also those that `prompts` makes."""

    @model_validator(mode="after")
    def _one_axis_each(self) -> Sweep:
        if twice := self.product.keys() & self.zip.keys():
            raise ValueError(f"{min(twice)} is an axis of product and of zip; name it once")
        return self


class Prompts(Strict):
    """Prompts are templates, as dynamicprompts has them: `{a|b}`, `{0.5::x|y}`, `{2$$a|b|c}`, `__colours__`, and `${column}`."""

    templates: Literal["combinatorial", "random"]
    """combinatorial: a row becomes as many rows as its prompt has texts. random: as many as `samples` says."""
    samples: Annotated[int, Field(ge=1, le=100_000)] = 1
    """random: texts drawn for each row; the same may be drawn twice."""
    prompt_seed: Annotated[int, Field(ge=0, le=MAX_SEED)] = 0
    """random: decides what is drawn. The noise of the images has its own, the job's `seed`."""
    wildcards: str = "wildcards"
    """The folder, beside the job file, with `colours.txt` for `__colours__`: one choice a line."""
    arguments: Annotated[tuple[Literal["prompt", "prompt_2", "prompt_3", "negative_prompt"], ...], Field(min_length=1)] = ("prompt",)
    """Which texts are templates."""

    @model_validator(mode="after")
    def _drawn(self) -> Prompts:
        if self.templates == "combinatorial" and self.samples != 1:
            raise ValueError("prompts.samples is for templates: random; combinatorial makes every text")
        return self


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


class Render(Strict):
    """Defaults for every row; a row's own column wins. None: the model family's default."""

    negative_prompt: str | None = None
    num_images_per_prompt: Annotated[int, Field(ge=1, le=10_000)] | None = None
    """Images per row; image k has seed + k."""
    height: Annotated[int, Field(ge=1, le=8192)] | None = None
    """Pixels; a multiple of the model's factor."""
    width: Annotated[int, Field(ge=1, le=8192)] | None = None
    """Pixels; a multiple of the model's factor."""
    num_inference_steps: Annotated[int, Field(ge=1, le=1000)] | None = None
    guidance_scale: Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)] | None = None
    sampler: str | None = None
    """One of `renderfarm samplers`."""
    true_cfg_scale: Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)] | None = None
    """FLUX: guidance with a second pass over a negative prompt; on above 1, for rows that have a negative prompt."""
    adapters: str | None = None
    """Which of `model.adapters` are on for a row that says nothing, e.g. `detail:0.8, style`; a row's `none` turns them off."""
    strength: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    """How much of an input image is painted anew: 1 all of it. About that share of the steps runs."""
    controlnet_conditioning_scale: Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)] | None = None
    """How strongly a ControlNet steers; 1 if nothing says."""
    control_guidance_start: Annotated[float, Field(ge=0, lt=1)] | None = None
    """The share of the steps before a ControlNet begins to steer; 0 if nothing says."""
    control_guidance_end: Annotated[float, Field(gt=0, le=1)] | None = None
    """The share of the steps after which it steers no more; 1 if nothing says."""
    denoising_end: Annotated[float, Field(gt=0, lt=1)] | None = None
    """The share of the noise that SDXL removes before its refiner takes over; 0.8 if nothing says."""
    on_truncation: Literal["record", "error"] = "record"
    """What to do with a prompt that the model reads only a beginning of. record: render it, and say in the table what
    was cut off. error: the row ends as an error."""
    prompt_weighting: Literal["a1111"] | None = None
    """None: prompts are read as they are, up to the length that the model reads. a1111: weights as in A1111's web UI,
    `(word:1.3)`, `((word))`, `[word]`, `BREAK`, and a long prompt is read whole, in chunks. For Stable Diffusion 1 and 2,
    SDXL and latent consistency models. Needs renderfarm[weights]."""
    override: tuple[Literal["height", "width", "num_inference_steps", "guidance_scale", "sampler"], ...] = ()
    """Arguments for which the job's value wins over the row's column, e.g. `[height, width]`."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_seed(cls, data: Any) -> Any:
        if isinstance(data, dict) and "seed" in data:
            raise ValueError(
                "render.seed would give every row the same noise; use the top-level `seed` (different noise per row), "
                "or `seed_policy: same` if the same noise is what you want"
            )
        return data

    @model_validator(mode="after")
    def _override_needs_value(self) -> Render:
        for name in self.override:
            if getattr(self, name) is None:
                raise ValueError(f"render.override names {name}, but render.{name} is not given")
        return self


class Upscale(Strict):
    """A network of Real-ESRGAN's kinds (RRDBNet, SRVGGNetCompact), in `workers.dtype`; by how much is in its weights."""

    weights: Annotated[str, Field(min_length=1)]
    """A `.safetensors` file, relative to the job file."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    """Of that file: another one stops the job before it renders."""
    tile: Annotated[int, Field(ge=64, le=4096, multiple_of=8)] | None = 512
    """Side in pixels of the overlapping squares in which the network sees a picture, so that a large one fits the device's
    memory. null: the whole picture at once, without the faint differences at the edges of tiles."""


class RestoreFaces(Strict):
    """Each face is found by YuNet (on the CPU), painted anew by GFPGAN in float32, and put back where it was. A picture without a
    face stays as it is. Needs renderfarm[faces]."""

    weights: Annotated[str, Field(min_length=1)]
    """GFPGAN's, version 1.3 or 1.4, as a `.safetensors` file, relative to the job file."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    """Of that file: another one stops the job before it renders."""
    detector: Annotated[str, Field(min_length=1)]
    """YuNet, the `.onnx` file that OpenCV publishes (`face_detection_yunet_2023mar.onnx`), relative to the job file."""
    detector_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    """As `sha256`, of the detector."""
    strength: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 1.0
    """How much of the restored face is seen: 1 all of it, 0.5 half of it over half of what was rendered."""


class Colour(Strict):
    """Pillow's enhancers, in this order; 1 changes nothing."""

    saturation: Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)] = 1.0
    """0: grey."""
    contrast: Annotated[float, Field(gt=0, le=10, allow_inf_nan=False)] = 1.0
    """Towards the picture's own mean, or away from it."""
    brightness: Annotated[float, Field(gt=0, le=10, allow_inf_nan=False)] = 1.0

    @model_validator(mode="after")
    def _changes_something(self) -> Colour:
        if self.saturation == self.contrast == self.brightness == 1:
            raise ValueError("changes nothing; give saturation, contrast or brightness, or leave the step out")
        return self


class Watermark(Strict):
    """Exactly one of `text` and `hook`."""

    text: Annotated[str, Field(pattern=r"^[ -~©]*[!-~©][ -~©]*$", max_length=200)] | None = None
    """White, outlined letters at the bottom right, in Pillow's own font: ASCII and ©."""
    opacity: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Of the text."""
    hook: Annotated[str, Field(min_length=1)] | None = None
    """Name of an entry point in the group `renderfarm.watermarks` of a package that is installed on every worker: a function
    that gives an H×W×3 uint8 array of the same shape for one, always the same. A job can name no other code."""

    @model_validator(mode="after")
    def _one_kind(self) -> Watermark:
        if (self.text is None) == (self.hook is None):
            raise ValueError("give either text or hook")
        return self


class Step(Strict):
    """One of these."""

    upscale: Upscale | None = None
    restore_faces: RestoreFaces | None = None
    colour: Colour | None = None
    watermark: Watermark | None = None

    @property
    def kind(self) -> str:
        return next(name for name, value in self if value is not None)

    @model_validator(mode="after")
    def _one_kind(self) -> Step:
        if sum(value is not None for _, value in self) != 1:
            raise ValueError(f"a step is one of {', '.join(Step.model_fields)}; write each as an item of its own")
        return self


# The steps that are networks: their fields that name a file, and beside each the field of that file's SHA-256
STEP_FILES = {"upscale": {"weights": "sha256"}, "restore_faces": {"weights": "sha256", "detector": "detector_sha256"}}


class Inputs(Strict):
    """The images that rows give: `image`, `mask_image`, `control_image`."""

    folder: str | None = None
    """Where relative paths start: a folder, or a store's URL; no path may lead out of it. Default: the manifest's folder."""
    urls: tuple[str, ...] = ()
    """Beginnings of URLs that rows may name, e.g. `https://images.example.org/set1/` or `s3://bucket/set1/`. None: no URL is
    fetched."""
    private_addresses: bool = False
    """Whether such a URL may lead into a private network, or to this machine."""
    resize: Literal["crop", "stretch"] | None = None
    """What to do with an image of another size than the row's. Nothing given: the row ends as an error."""
    max_mebibytes: Annotated[float, Field(gt=0, le=1024)] = 64
    """The largest file."""
    timeout_s: Annotated[float, Field(gt=0, le=600)] = 30
    """For one URL of the web, from beginning to end; a store is waited for as an output's is."""

    @field_validator("urls")
    @classmethod
    def _beginnings(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        for url in urls:
            if not re.match(r"(https?|s3a?|gs|gcs|az|abfss?)://[^/@?#]+/", url):
                raise ValueError(f"{url}: write it as https://HOST/, https://HOST/FOLDER/ or s3://BUCKET/FOLDER/, without a password")
        return urls


Offload = Literal["none", "model", "sequential"]
# diffusers' AttentionBackendName, without those that fetch their code while they run
AttentionBackend = Literal[
    "native",
    "_native_math",
    "_native_flash",
    "_native_efficient",
    "_native_cudnn",
    "_native_npu",
    "_native_xla",
    "flash",
    "flash_varlen",
    "_flash_3",
    "_flash_varlen_3",
    "flex",
    "xformers",
    "sage",
    "sage_varlen",
    "_sage_qk_int8_pv_fp8_cuda",
    "_sage_qk_int8_pv_fp8_cuda_sm90",
    "_sage_qk_int8_pv_fp16_cuda",
    "_sage_qk_int8_pv_fp16_triton",
]


class Workers(Strict):
    min: Annotated[int, Field(ge=1)] = 1
    """A run begins with the first worker ready. Where fewer than `min` have been ready for `wait_s` (or fewer than there are parts left, if
    that is less), it finishes what is in flight and ends with exit code 75, to be run again when there are nodes."""
    max: Annotated[int, Field(ge=1)] = 1
    """Never more workers than this."""
    batch_size: Annotated[int, Field(ge=1, le=512)] | Literal["auto"] = 8
    """B: samples per denoiser call. Constant; part of the render profile, because it decides pixels. auto: the first
    worker measures what is fastest on its device, and the output keeps that."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: cuda where there is one, else mps (Apple's GPUs; written for them, never run on one), else cpu."""
    devices_per_worker: Annotated[float, Field(gt=0, le=64)] = 1
    """Accelerators (GPUs) of each worker. A fraction shares one: 0.5 puts two workers on each, whose memory must hold both.
    Ray shares them out; the inline engine's one worker has what it sees. A whole number above 1 spreads the pipeline's
    components over so many (diffusers' `device_map: balanced`); no single component is split. That was never run on
    several devices, so it is part of the render profile. Without a GPU, up to 1 means nothing."""
    offload: Offload = "none"
    """For models larger than the device's memory: where components are while they wait. none: on the device. model: in the
    machine's memory; text encoders, denoiser and autoencoder take turns on the device. sequential: the same layer by
    layer, for the smallest devices, and very slow. The same kernels compute the same numbers wherever
    weights have waited, so it decides no pixel and may change from run to run. Its hooks were compared on a CPU only."""
    attention_backend: AttentionBackend | None = None
    """Who computes the denoiser's attention: one of diffusers' backends; those of other packages need the package. It decides
    pixels, so it is part of the render profile. FLUX.1, FLUX.2, Qwen-Image and Z-Image take one; the other families call
    torch's attention themselves. None: diffusers' default, native. Only native and _native_math were compared."""
    threads: Annotated[int, Field(ge=1, le=2)] = 1
    """Torch threads per worker on the CPU, 1 or 2; part of the render profile, even where a GPU renders. 2 need a batch_size
    of 1, 2 or a multiple of 4: with others the threads' shares end in mid-sample or in mid-vector, from 3 threads on they do
    with any. Then a sample's pixels would depend on its slot: use more workers instead."""

    wait_s: Annotated[float, Field(gt=0)] = 3600
    """Seconds that a run waits while fewer than `min` workers are ready (nodes that are to come or were taken away, a model that loads)
    before it ends with exit code 75."""
    other_profiles: Literal["refuse", "record"] = "refuse"
    """A worker whose render profile is not the output's (another CPU, another version) would render other bits. refuse:
    it is benched. record: it renders, and its rows name its own profile; the same row on another worker may differ."""

    @model_validator(mode="after")
    def _ordered(self) -> Workers:
        if self.min > self.max:
            raise ValueError(f"workers.min ({self.min}) is larger than workers.max ({self.max})")
        return self

    @field_validator("attention_backend", mode="before")
    @classmethod
    def _pinned_code(cls, name: Any) -> Any:
        if isinstance(name, str) and name.endswith("_hub"):
            raise ValueError(f"{name} fetches code from the hub and runs it, whichever is there that day; give a backend that is installed")
        return name

    @model_validator(mode="after")
    def _whole_devices(self) -> Workers:
        devices = self.devices_per_worker
        if devices > 1 and not devices.is_integer():
            raise ValueError(f"workers.devices_per_worker is {devices:g}; above 1 give a whole number, below 1 a share of one device")
        if devices != 1 and self.device in ("cpu", "mps"):
            raise ValueError(f"workers.devices_per_worker is {devices:g}, but {self.device} has nothing to share or add; leave it out")
        if devices < 1 and self.batch_size == "auto":
            raise ValueError("workers.batch_size auto measures as if the device were one worker's; with a share of it give a number")
        return self

    @model_validator(mode="after")
    def _somewhere_to_offload_from(self) -> Workers:
        if self.offload != "none" and self.device == "cpu":
            raise ValueError(f"workers.offload {self.offload} saves an accelerator's memory, and device cpu has none; leave it out")
        if self.offload != "none" and self.devices_per_worker > 1:
            raise ValueError(f"workers.offload {self.offload} is for one device; leave it out, or give devices_per_worker 1")
        return self

    @model_validator(mode="after")
    def _no_sample_is_cut(self) -> Workers:
        if not shared_evenly(size := fixed_batch_size(self), self.threads):
            raise ValueError(
                f"workers.threads {self.threads} cannot share a batch_size of {size} evenly: a sample cut in two gets pixels "
                f"that depend on its slot; use batch_size {size + -size % 4}, or threads 1 and more workers"
            )
        return self


def several_devices(workers: Workers) -> int | None:
    """How many devices a worker's pipeline is spread over; None: it is on one, or shares one."""
    return int(workers.devices_per_worker) if workers.devices_per_worker > 1 else None


def shared_evenly(batch_size: int, threads: int) -> bool:
    """Whether torch's threads share a batch without cutting a sample in two, or a vector of several samples' numbers."""
    return threads == 1 or batch_size <= threads or batch_size % 4 == 0


def fixed_batch_size(workers: Workers) -> int:
    """The job's B; 1 where it is still to be measured."""
    return 1 if workers.batch_size == "auto" else workers.batch_size


# What each format takes, and its defaults. WebP's are those of its lossless kind; the other has LOSSY_WEBP.
ENCODINGS: dict[str, dict[str, Any]] = {
    "png": {"lossless": True, "compression_level": 1},  # level 1: a third of Pillow's own level's time for 7 % more bytes
    "webp": {"lossless": True},
    "jpeg": {"lossless": False, "quality": 95, "subsampling": "4:4:4"},
    "avif": {"lossless": False, "quality": 75, "subsampling": "4:2:0"},  # Pillow's own
    "jxl": {"lossless": True},
}
LOSSY_WEBP: dict[str, Any] = {"lossless": False, "quality": 90}


class Encoding(Strict):
    """How pictures are written in `output.format`. None: the format's own default."""

    lossless: bool | None = None
    """For webp: true, or with a quality false. PNG and JPEG XL are always lossless, JPEG and AVIF never."""
    quality: Annotated[int, Field(ge=1, le=100)] | None = None
    """jpeg: 95. avif: 75. webp that is not lossless: 90."""
    compression_level: Annotated[int, Field(ge=0, le=9)] | None = None
    """png: 1. 9 takes seven times as long and saves a twelfth of the bytes."""
    subsampling: Literal["4:4:4", "4:2:2", "4:2:0"] | None = None
    """Of colours. jpeg: 4:4:4, none of it. avif: 4:2:0."""

    def settled(self, format_: str) -> Encoding:
        """Every setting that the format takes, with its defaults. Raises ValueError for what it does not take."""
        defaults = ENCODINGS[format_]
        if format_ == "webp" and (self.lossless is False or (self.lossless is None and self.quality is not None)):
            defaults = LOSSY_WEBP
        given = self.model_dump(exclude_none=True)
        for name in given.keys() - defaults.keys():
            why = "lossless WebP" if defaults is ENCODINGS["webp"] else format_
            raise ValueError(f"encoding.{name}: {why} has none; it takes {', '.join(defaults)}")
        if given.get("lossless", defaults["lossless"]) != defaults["lossless"]:
            always, others = ("always", "webp, jpeg or avif") if defaults["lossless"] else ("never", "png, webp or jxl")
            raise ValueError(f"encoding.lossless: {format_} is {always} lossless; leave it out, or use format {others}")
        return Encoding(**{**defaults, **given})


class Metadata(Strict):
    """What each image file says of itself."""

    provenance: bool = True
    """That a model painted it, and which one, for machines to read: IPTC's digital source type, in an XMP packet."""
    parameters: bool = True
    """A1111's text: prompts, steps, sampler, seed, so that its users' tools read the file. Where A1111 has it."""
    row: bool = True
    """JSON: the row's identity and every argument, with the hashes of profile and pixels."""
    prompts: bool = True
    """Whether any of these hold the prompts, which may be personal data. The tables hold them in any case."""


def is_path(text: str) -> bool:
    """Whether a text may be the path of a PEM file, and is not what such a file holds."""
    return "-----" not in text and "\n" not in text and len(text) < 4096


class C2pa(Strict):
    """Content Credentials: each file is signed when it is finished; originals are not. Needs renderfarm[c2pa]. Each signature is
    another one, so files of the same pixels differ."""

    certificate: Annotated[str, Field(min_length=1)]
    """PEM file on every worker: the signing certificate first, then those up to its root; relative to the job file."""
    private_key: Annotated[str, Field(min_length=1)]
    """PEM file on every worker, relative to the job file; `${C2PA_KEY}` keeps its place out of the job."""
    algorithm: Literal["es256", "es384", "es512", "ps256", "ps384", "ps512", "ed25519"] = "es256"
    """That of the key."""

    @field_validator("certificate", "private_key")
    @classmethod
    def _is_a_path(cls, value: str) -> str:
        if not is_path(value):
            raise ValueError("give the path of a PEM file; a job file is no place for the key itself: it is copied and shown")
        return value


Line = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029]*$")]
"""Text in one line."""


class Card(Strict):
    """What `README.md` says of the dataset, to people and to the Hub's search, beside the figures. May change from run to run."""

    pretty_name: Line | None = None
    """Its title. None: the job's name."""
    description: Annotated[str, Field(min_length=1, max_length=20_000, pattern=r"^[^\x00-\x08\x0b-\x1f\x7f]*$")] | None = None
    """Plain text, shown as it is written; an empty line begins a paragraph."""
    license: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.+-]{0,99}$")] | None = None
    """Of the dataset, by the Hub's name: `cc-by-4.0`, `apache-2.0`, `openrail++`, or `other`, which needs the next two."""
    license_name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.+-]{0,99}$")] | None = None
    """For license other: `my-license-1.0`."""
    license_link: Annotated[str, Field(pattern=r"^(https?://[^\s\x00-\x1f]+|LICENSE(\.md|\.txt)?)$", max_length=2000)] | None = None
    """For license other: a URL, or `LICENSE`, a file that you put beside the card."""
    language: tuple[Annotated[str, Field(pattern=r"^[a-z]{2,3}(-[A-Za-z0-9]{2,8})*$")], ...] = ()
    """Of the prompts, as ISO 639 has it: `[en, de]`. In YAML write Norwegian as `"no"`."""
    tags: tuple[Line, ...] = ()
    """`[logos, texture]`, beside `renderfarm` and `synthetic`."""

    @model_validator(mode="after")
    def _another_license_is_named(self) -> Card:
        named = [name for name in ("license_name", "license_link") if getattr(self, name)]
        if self.license == "other" and len(named) < 2:
            raise ValueError("card.license: other says nothing by itself; give license_name and license_link, too")
        if self.license != "other" and named:
            raise ValueError(f"card.{named[0]}: the Hub takes it with license other only; leave it out, or give license: other")
        return self


class Output(Strict):
    path: Annotated[str, Field(min_length=1)]
    """Folder or URL of the dataset; relative to the job file. `{{ ds }}` becomes the logical date."""
    layout: Literal["files", "parquet", "webdataset"] = "files"
    """files: one folder per part, images beside a metadata.parquet (Hugging Face imagefolder). parquet: one file per part, images in
    it (Hugging Face's column `image`). webdataset: one tar per part, each image beside its row as JSON, and the tables in `metadata`.
    The last two keep a part's images in memory and TMPDIR until it is committed."""
    format: Literal["png", "webp", "jpeg", "avif", "jxl"] = "png"
    """Of the image files. jxl (JPEG XL, lossless) needs renderfarm[codecs]."""
    encoding: Encoding = Encoding()
    """`{quality: 90}`. What a format does not take is refused."""
    metadata: Metadata = Metadata()
    """What is written into each file beside its pixels: `{prompts: false}`."""
    c2pa: C2pa | None = None
    """Sign each file: `{certificate: ./chain.pem, private_key: "${C2PA_KEY}"}`. None: not signed."""
    part_rows: Annotated[int, Field(ge=1, le=100_000)] | Literal["auto"] = "auto"
    """Manifest rows per part (the unit of commit). auto: about half a minute of rendering, measured once by the first worker."""
    single_writer: bool = False
    """Write to a store that has no create-if-absent. Only where nothing else ever writes to this output at the same time: two runs
    would overwrite each other's parts, and nobody would notice."""
    keep_originals: bool = False
    """Keep each picture as it was before the steps of `after`, too: a PNG in `originals/`, which the table names."""

    card: Card = Card()
    """What the dataset card says beside the figures: `{license: cc-by-4.0, language: [en], description: Drawn shapes.}`."""

    @model_validator(mode="after")
    def _format_takes_it(self) -> Output:
        self.encoding.settled(self.format)
        return self


def _percent(given: Any) -> Any:
    if isinstance(given, str) and (match := re.fullmatch(PERCENT, given.strip())):
        given = float(match[1]) / 100
    if isinstance(given, bool) or not isinstance(given, int | float) or not 0 <= given <= 1:
        raise ValueError(f"write a share of all images as 0.005 or 0.5%, not {given!r}")
    return given


PERCENT = r"(\d+(?:\.\d+)?) ?%"
Share = Annotated[
    float, Field(ge=0, le=1), BeforeValidator(_percent, json_schema_input_type=float | Annotated[str, Field(pattern=f"^{PERCENT}$")])
]


class Failure(Strict):
    tolerate: Share = 0.0
    """Share of failed images with which `run` still exits 0: 0.005 or 0.5%."""
    stop_after: Annotated[int, Field(ge=1)] | None = None
    """Stop the run (exit code 4) when so many of its images have failed. None: render the others, however many fail."""
    attempts: Annotated[int, Field(ge=1, le=20)] = 3
    """How many workers may be lost on one lease before the job stops."""
    deadline_s: Annotated[float, Field(gt=0)] | None = None
    """Seconds in which a worker that has leases must finish one; else it hangs, is killed and replaced. Where a row is suspected of
    killing workers and rows are rendered one by one, it is for each of them. None: twenty times the longest that any worker took so
    far, and at least ten minutes; two hours until the first has finished one."""


class Notify(Strict):
    """Who is told of a run's end, by a POST of JSON: how it ended, and its counts. May change freely."""

    url: Annotated[str, Field(min_length=1)]
    """`https://…`; `${NAME}` stands for an environment variable, as which a URL that is a secret belongs. Never stored or printed."""
    headers: dict[str, str] = {}
    """Further headers, in which `${NAME}` may stand, too: `Authorization: "Bearer ${TOKEN}"`."""

    @field_validator("headers")
    @classmethod
    def _no_secrets(cls, value: dict[str, str]) -> dict[str, str]:
        for name, text in value.items():
            if not re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", name) or not text.isprintable():
                raise ValueError(f"headers: {name!r} is no header with a value of one line")
            if re.search("auth|token|key|secret|cookie", name, re.IGNORECASE) and "${" not in text:
                raise ValueError(f"headers: {name} is a secret; put it into an environment variable, and write ${{NAME}} here")
        return value


_USE_OF_PARAM = {"type": "string", "pattern": r"^\$\{params\.\w+\}$"}


def _or_param(field: dict[str, Any]) -> dict[str, Any]:
    """The JSON Schema of a field that may also be a parameter."""
    members = field.get("anyOf", [field])
    if not any({"enum", "const"} & member.keys() or member.get("type") in ("integer", "number", "boolean") for member in members):
        return field
    said = {key: value for key, value in field.items() if key in ("title", "description", "default")}
    others = [{key: value for key, value in member.items() if key not in said} for member in members]
    return {"anyOf": [*others, _USE_OF_PARAM], **said}


class Cost(Strict):
    """What rendering costs, for `renderfarm plan`. Decides nothing, and may change freely."""

    per_hour: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """Price of one worker for an hour: its accelerators, and its share of the machine that they are in."""
    currency: Annotated[str, Field(pattern=r"^[^\s\x00-\x1f]{1,8}$")] = "USD"
    images_per_second: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Of one worker, as somebody knows it, until this output has measured its own."""


class Job(Strict):
    """One render job."""

    version: Literal[1] = 1
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
    """Letters, digits, `.`, `_`, `-`."""
    manifest: ManifestSpec
    model: ModelSpec
    sweep: Sweep | None = None
    """Values that every row is rendered with. The rows that come out are made once, and kept in the output."""
    prompts: Prompts | None = None
    """Prompts that are templates. None: they are rendered as they are written."""
    params: Params = {}
    """What of this job others may choose: `{steps: 20}`, or `{steps: {type: int, default: 20, min: 1, max: 50, description: …}}`.
    `${params.steps}` in any field stands for it, `--set params.steps=30` changes it."""
    render: Render = Render()
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] = 0
    """Start of every derived seed."""
    seed_policy: Literal["derive", "same"] = "derive"
    """derive: each row its own noise. same: every row uses the job's seed + k, as benchmark generators do."""
    inputs: Inputs = Inputs()
    after: tuple[Step, ...] = ()
    """What is done to each finished picture, in this order. The files then show what comes out at the end."""
    workers: Workers = Workers()
    output: Output
    failure: Failure = Failure()
    if_running: Literal["share", "exit"] = "share"
    """What a run does when another one of the same output is at work. share: both render, from different ends; each part is committed
    once. exit: it says who runs, and ends with exit code 75."""
    notify: Notify | None = None
    """Who is told of the end of a run; None: nobody."""
    logical_date: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")] | None = None
    """The day that `{{ ds }}` stands for, as `--logical-date` gives it."""
    cost: Cost = Cost()
    """`{per_hour: 2.50}`, for what `plan` says of money."""

    @field_validator("manifest", mode="before", json_schema_input_type=ManifestSpec | str | list[str])
    @classmethod
    def _manifest_path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str | list) else value

    @field_validator("model", mode="before", json_schema_input_type=ModelSpec | str)
    @classmethod
    def _model_id(cls, value: Any) -> Any:
        return _by_id(value)

    @model_validator(mode="after")
    def _originals_differ(self) -> Job:
        if self.output.keep_originals and not self.after:
            raise ValueError("output.keep_originals: without `after`, pictures are kept as they were rendered; leave it out")
        return self

    @model_validator(mode="after")
    def _no_credentials(self) -> Job:
        for place, text in self.places():
            try:
                check_credentials(place, text)
            except InvalidJob as error:
                raise ValueError(str(error)) from None
        return self

    @classmethod
    def model_json_schema(cls, *args: Any, **options: Any) -> dict[str, Any]:
        """With `${params.NAME}` in the place of any number, truth or word."""
        schema = super().model_json_schema(*args, **options)
        for name, model in {"": schema, **schema.get("$defs", {})}.items():
            if name != "Param":
                model["properties"] = {field: _or_param(of) for field, of in model.get("properties", {}).items()}
        return schema

    @property
    def key(self) -> str:
        """Of the run that this job is: hash of all that it says, parameters and logical date among it. The same tick has the same."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()[:12]

    def places(self) -> list[tuple[str, str]]:
        """Every path or URL that the job names, and where it does."""
        found = [*(("manifest.path", path) for path in self.manifest.paths), ("output.path", self.output.path), ("model.id", self.model.id)]
        found += [(f"model.components.{name}", component.id) for name, component in self.model.components.items()]
        found += [(f"model.{name}", given.id) for name in COMPANIONS if (given := getattr(self.model, name))]
        found += [(f"model.adapters.{name}", given.weights) for name, given in self.model.adapters.items()]
        found += [
            (f"after[{number}].{step.kind}.{field}", getattr(getattr(step, step.kind), field))
            for number, step in enumerate(self.after)
            for field in STEP_FILES.get(step.kind, ())
        ]
        if (c2pa := self.output.c2pa) is not None:
            found += [("output.c2pa.certificate", c2pa.certificate), ("output.c2pa.private_key", c2pa.private_key)]
        if self.notify is not None:
            found.append(("notify.url", self.notify.url))
        if link := self.output.card.license_link:
            found.append(("output.card.license_link", link))
        return [*found, *([("inputs.folder", self.inputs.folder)] if self.inputs.folder else [])]


def check_credentials(place: str, text: str) -> None:
    """Raises InvalidJob for a URL with a password, which would be written into the output."""
    # the secret may hold slashes, as AWS keys do; `host:9000/…@…` is a port and a path
    if re.match(r"^[a-z0-9+.-]+://[^/@:]*:(?!\d+/)[^@]*@", text, re.IGNORECASE):
        raise InvalidJob(f"the URL in {place} holds credentials; remove them and use the environment's own credential chain")


def expand_env(text: str) -> str:
    """Replace `${NAME}` by the environment's value; an unset one is an error, never an empty string."""

    def value(match: re.Match[str]) -> str:
        if match[1] not in os.environ:
            raise InvalidJob(f"the job uses ${{{match[1]}}}, but that environment variable is not set; set it and run again")
        return os.environ[match[1]]

    return re.sub(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}", value, text)


def is_url(text: str) -> bool:
    return re.match(r"^[a-z0-9+.-]+://", text, re.IGNORECASE) is not None
