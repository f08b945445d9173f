"""What is rendered: arguments that hold for all rows, images that rows give, what is done to pictures afterwards."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from renderfarm.config.base import Strict

# what other tools call diffusers' arguments
LOOKALIKES = {
    **dict.fromkeys(("steps", "step", "num_steps", "inference_steps"), "num_inference_steps"),
    **dict.fromkeys(("cfg", "cfg_scale", "guidance", "scale"), "guidance_scale"),
    **dict.fromkeys(("negative", "neg_prompt", "uc"), "negative_prompt"),
    **dict.fromkeys(("n", "n_images", "num_images", "n_iter", "batch_count"), "num_images_per_prompt"),
    **dict.fromkeys(("sampler_name", "scheduler", "sampling_method"), "sampler"),
    **dict.fromkeys(("caption", "text"), "prompt"),
}


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
