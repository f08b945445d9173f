"""The job file as a whole."""

from __future__ import annotations

import hashlib
import json
import os
import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from renderfarm.config.base import Strict, check_credentials
from renderfarm.config.model import COMPANIONS, ModelSpec, _by_id
from renderfarm.config.output import Output
from renderfarm.config.render import STEP_FILES, Inputs, Render, Step
from renderfarm.config.rows import ManifestSpec, Params, Prompts, Sweep
from renderfarm.config.workers import Workers
from renderfarm.errors import InvalidJob
from renderfarm.seeds import MAX_SEED


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
    """`https://…`; `${NAME}` stands for an environment variable, as which a URL that is a secret belongs: what it holds is never stored or
    printed. A job that is sent to a cluster wants it so."""
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


class Wandb(Strict):
    """Weights & Biases (`pip install 'renderfarm[wandb]'`). The environment says who asks (WANDB_API_KEY) and how it is kept
    (WANDB_MODE=offline, WANDB_DIR)."""

    project: Annotated[str, Field(min_length=1, max_length=128)]
    entity: str | None = None
    """A user or a team. None: whose key it is."""
    tags: tuple[Annotated[str, Field(min_length=1, max_length=64)], ...] = ()


class Mlflow(Strict):
    """MLflow (`pip install 'renderfarm[mlflow]'`). The environment says who asks (MLFLOW_TRACKING_TOKEN, or _USERNAME and _PASSWORD)."""

    experiment: Annotated[str, Field(min_length=1, max_length=256)]
    """Made if there is none of this name."""
    tracking_uri: Annotated[str, Field(min_length=1)] | None = None
    """A server, `https://…`, or what else MLflow takes; a path begins with `./` or `/` (MLflow 3.17 wants MLFLOW_ALLOW_FILE_STORE=true for
    folders). None: MLFLOW_TRACKING_URI."""


class Track(Strict):
    """Who else keeps a run's settings, its counts every half minute, and its end. Never a prompt, and of `params` no free text, which may
    be one. May change freely; what fails there is a warning."""

    wandb: Wandb | None = None
    mlflow: Mlflow | None = None


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


WRITTEN_IN = "RENDERFARM_WRITTEN_IN"
"""A variable: the folder of a copy of the job file, a colon, and the folder in which it was written."""


def _moved(value: Any, folder: str, to: str) -> Any:
    """With all paths below a folder below another one."""
    if isinstance(value, dict):
        return {name: _moved(of, folder, to) for name, of in value.items()}
    if isinstance(value, list):
        return [_moved(one, folder, to) for one in value]
    if isinstance(value, str) and (value == folder or value.startswith(f"{folder}/")):
        return to + value[len(folder) :]
    return value


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
    track: Track | None = None
    """`{wandb: {project: renders}}` or `{mlflow: {experiment: renders}}`: who else keeps what each run did; None: nobody."""
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
        """Of the run that this job is: hash of all that it says, parameters and logical date among it. The same tick has the same. What is
        as nothing were said is not in it, so that a field that comes later changes no key. A copy of the job file, as in a scheduler's pod,
        has the key of the first one, if the environment says where both lie (WRITTEN_IN)."""
        said = self.model_dump(mode="json", exclude_defaults=True)
        folder, _, first = os.environ.get(WRITTEN_IN, "").partition(":")
        if first:
            said = _moved(said, folder, first)
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:12]

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
        if self.track is not None and self.track.mlflow is not None and self.track.mlflow.tracking_uri is not None:
            found.append(("track.mlflow.tracking_uri", self.track.mlflow.tracking_uri))
        if link := self.output.card.license_link:
            found.append(("output.card.license_link", link))
        return [*found, *([("inputs.folder", self.inputs.folder)] if self.inputs.folder else [])]
