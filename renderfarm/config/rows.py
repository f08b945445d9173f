"""Where a job's rows come from: a manifest, sweeps and templates over it, parameters."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from renderfarm.config.base import Strict
from renderfarm.seeds import MAX_SEED


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
