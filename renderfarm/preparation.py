"""From a job to everything that is known before a worker starts; shared by run, plan, validate and preview."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import pyarrow as pa

from renderfarm import after, commit, jxl, signing, weighting
from renderfarm.adapters import parse, read_files, sha256, written
from renderfarm.config import COMPANIONS, C2pa, Checkpoint, Job, check_credentials, expand_env, is_path, several_devices
from renderfarm.errors import InvalidInput, InvalidJob
from renderfarm.frozen_rows import Rows, open_rows
from renderfarm.manifest import Manifest
from renderfarm.models.catalog import ModelInfo, describe, for_task, shown_name, with_weights
from renderfarm.models.families import DISPATCHED
from renderfarm.models.networks import MAX_PIXELS
from renderfarm.plan import Grid, where_row
from renderfarm.samplers import find_sampler
from renderfarm.samples import Usual, check_side, given_names, instead, usual
from renderfarm.schema import image_columns, output_name
from renderfarm.storage import Store, is_store, open_store

USUAL_ROWS = 32
# datasets 5.2: in folders it goes by the names of files; elsewhere, told by schema or card, by what Pillow opens
UNKNOWN_TO_DATASETS = {"files": ("avif", "jxl"), "parquet": ("jxl",), "webdataset": ("jxl",)}
CONTROL = ("controlnet_conditioning_scale", "control_guidance_start", "control_guidance_end", "denoising_end")
RUN_KEY = "RENDERFARM_RUN_KEY"  # the variable in which `submit` says the key of a job whose paths are other ones where it runs
TAKEN_BY_SOME = ("negative_prompt", "guidance_scale", "true_cfg_scale", *CONTROL)


@dataclass(frozen=True)
class Prepared:
    """A job whose model, manifest and output were looked at; nothing was written."""

    job: Job
    model: ModelInfo
    manifest: Manifest
    store: Store
    rows: Rows
    """The same rows, and where they come from."""
    after_files: dict[str, bytes] = field(default_factory=dict)
    """Weights that the steps of `after` need, by SHA-256."""
    adapter_files: dict[str, bytes] = field(default_factory=dict)
    """LoRA adapters, by name."""
    key: str = ""
    """`Job.key` of the job as somebody wrote it: the same tick has the same, whoever runs it, and however often."""

    @cached_property
    def warnings(self) -> tuple[str, ...]:
        """What a user should know before a long run; none of it stops the job."""
        found = [*self.model.warnings, *self.column_hints()]
        if "seed" not in self.manifest.columns and (again := self.manifest.repeated_ids()):
            found.append(
                f"{again:,} rows have the id of another row, and get its noise; `renderfarm validate` names them: give each its own"
            )
        output = self.job.output
        if output.format in UNKNOWN_TO_DATASETS[output.layout]:
            found.append(
                f"output.format {output.format}: Hugging Face's `datasets` takes no such file for a picture in layout {output.layout}, so "
                "load_dataset gives none; renderfarm.open reads them, and png, webp and jpeg are known to both"
            )
        return tuple(found)

    def column_hints(self) -> list[str]:
        """Columns that may not be what they look like."""
        return self.manifest.hints() + [
            f"column {name!r} is the argument {argument}, which {self.model.pipeline_class or self.model.name} does not take in "
            f"{self.model.task}{instead(argument, self.model)}: rows that give one end as errors; to keep it as a plain column: "
            f"manifest: {{columns: {{{argument}: null}}}}"
            for argument, name in self.manifest.columns.items()
            if argument not in self.model.arguments
        ]

    def grid(self) -> Grid | None:
        """None: `part_rows: auto`, and no worker has measured yet."""
        return commit.frozen_grid(self.store, self.frozen())

    @cached_property
    def usual(self) -> Usual:
        """What workers measure with, from the first rows that are wanted."""
        first = next(iter(self.grid_of(USUAL_ROWS)))
        return usual(next(iter(self.manifest.stream([(first.start, first.stop)]))), self.job, self.model)

    def grid_of(self, part_rows: int) -> Grid:
        return Grid(self.manifest.rows, part_rows, where_row(self.job.manifest.where))

    def columns(self) -> pa.Schema:
        """Of the image table."""
        own = [pa.field(output_name(field.name), field.type) for field in self.manifest.extras]
        return pa.schema([*image_columns(given_names(self.job, self.model, self.manifest.columns)), *own])

    def frozen(self) -> dict[str, Any]:
        """What decides pixels or layout, for job.json. How many workers render may change freely."""
        job = self.job
        return {
            "manifest": {
                "files": self.manifest.fingerprint(),
                "columns": self.manifest.columns,
                "where": job.manifest.model_dump(mode="json")["where"],  # YAML knows dates, JSON does not
            }
            | ({} if self.rows.said is None else {"made": self.rows.said}),
            "model": {
                "id": self.model.name,
                "revision": self.model.revision,
                "variant": self.model.variant,
                "components": self.model.components,
                "quantization": job.model.quantization and job.model.quantization.model_dump(mode="json"),
                "safety_checker": job.model.safety_checker,
                "adapters": dict(self.model.adapter_sha256),
                **{name: _frozen(given) for name in COMPANIONS if (given := getattr(job.model, name))},
            },
            "task": self.model.task,
            "render": self._render_defaults(),
            "inputs": {"resize": job.inputs.resize},
            "seed": job.seed,
            "seed_policy": job.seed_policy,
            # as absent where there is none, so that an output that was begun before they were known goes on
            "after": after.frozen(job.after) or None,
            "workers": {
                "batch_size": job.workers.batch_size,
                "dtype": job.workers.dtype,
                "attention_backend": job.workers.attention_backend,
                "devices_per_worker": several_devices(job.workers),
            },
            "output": {"layout": job.output.layout, "format": job.output.format, "part_rows": job.output.part_rows}
            | {
                "encoding": job.output.encoding.settled(job.output.format).model_dump(exclude_none=True),
                "metadata": job.output.metadata.model_dump(),
                "signed": job.output.c2pa is not None or None,  # by whom may change: certificates expire
                "keep_originals": job.output.keep_originals or None,
            },
        }

    def _render_defaults(self) -> dict[str, Any]:
        """What a row that says nothing gets, resolved: a default that changes later must not slip into this output."""
        given = self.job.render
        names = ("height", "width", "num_inference_steps", "guidance_scale")
        defaults: dict[str, Any] = {name: getattr(given, name) or getattr(self.model, name) for name in names}
        if given.guidance_scale is not None:  # 0 is a value
            defaults["guidance_scale"] = given.guidance_scale
        return defaults | {
            "sampler": find_sampler(given.sampler or self.model.sampler, self.model.kind, self.model.refused_samplers).name,
            "negative_prompt": given.negative_prompt,
            **{name: getattr(given, name) for name in ("true_cfg_scale", *CONTROL)},
            "strength": given.strength,
            "adapters": written(parse(given.adapters, self.model.adapters)),
            "on_truncation": given.on_truncation,
            "prompt_weighting": given.prompt_weighting,
            "num_images_per_prompt": given.num_images_per_prompt or 1,
            "override": sorted(given.override),
        }


def _frozen(companion: Checkpoint) -> dict[str, Any]:
    """A local folder by its name, as a model's."""
    return companion.model_dump(exclude={"sha256"}) | {"id": shown_name(expand_env(companion.id))}


def prepare(job: Job) -> Prepared:
    """Raises InvalidJob for everything that can be known now."""
    key = os.environ.get(RUN_KEY) or job.key
    for place, text in job.places():
        if place != "notify.url":  # which is kept nowhere
            check_credentials(place, expand_env(text))  # what the job file holds was checked when it was read
    _check_packages(job)
    model = with_weights(describe(job.model), job.render.prompt_weighting)
    # expanded once and here: a worker's environment and folder may be others
    store = open_store(expand_env(job.output.path), single_writer=job.output.single_writer)
    rows = open_rows(job, model.arguments, store)
    manifest = rows.manifest
    model = for_task(model, manifest.columns)
    _check_render(job, model)
    if model.companions and several_devices(job.workers) is not None:
        raise InvalidJob(
            f"workers.devices_per_worker: model.{next(iter(model.companions))} cannot be spread over several devices here; "
            "use 1, or workers.offload: model"
        )
    adapter_files = read_files(job.model.adapters)
    model = replace(model, adapter_sha256={name: sha256(data) for name, data in adapter_files.items()})
    steps, after_files = after.read_steps(job.after)
    if after_files and model.folder is None:
        raise InvalidJob("after: builtin:fake draws without torch, which networks need; use builtin:shapes, or leave them out")
    _check_enlarged(job, model, after.scale(after_files, steps))
    if job.workers.attention_backend is not None and not model.attention_backends:
        raise InvalidJob(
            f"workers.attention_backend: {model.pipeline_class or model.name} does not ask diffusers for attention, so a backend would "
            f"change nothing; leave it out (those that do: {', '.join(DISPATCHED)})"
        )
    output = job.output.model_copy(update={"path": store.url, "c2pa": _expanded(job.output.c2pa)})
    if model.images:
        job = job.model_copy(update={"inputs": job.inputs.model_copy(update={"folder": _inputs_folder(job, rows.paths)})})
    job = job.model_copy(update={"output": output, "after": steps, "manifest": rows.spec})
    return Prepared(job, model, manifest, store, rows, after_files, adapter_files, key)


def _check_packages(job: Job) -> None:
    """What files need beside Pillow; the driver is as well equipped as its workers."""
    if job.output.format == "jxl":
        jxl.codec()
    if job.output.c2pa is not None:
        signing.library()


def _expanded(c2pa: C2pa | None) -> C2pa | None:
    """Raises InvalidJob where a variable holds the key itself: its place would be shown, and written into the output."""
    if c2pa is None:
        return None
    places = {name: expand_env(getattr(c2pa, name)) for name in ("certificate", "private_key")}
    for name, place in places.items():
        if not is_path(place):
            raise InvalidJob(f"output.c2pa.{name}: the environment variable holds no path; write it to a file and give the file's path")
    return c2pa.model_copy(update=places)


def _inputs_folder(job: Job, paths: Sequence[str]) -> str | None:
    """Where rows' paths start: as the job says, else the manifest's folder; None where there is no one such folder or store."""
    given = job.inputs.folder or job.manifest.path
    folder = expand_env(given) if isinstance(given, str) else ""
    if os.path.isdir(folder):
        return os.path.abspath(folder)
    if job.inputs.folder and is_store(folder):
        return open_store(folder).url
    if job.inputs.folder:
        raise InvalidJob(f"inputs.folder: {job.inputs.folder} is no folder here; give the one in which the rows' paths start")
    if is_store(folder) and all(path.startswith(f"{folder.rstrip('/')}/") for path in paths):
        return open_store(folder).url
    first, *others = {os.path.dirname(path.removeprefix("file://")) for path in paths} or {""}
    if others:
        return None
    return open_store(first).url if is_store(first) else os.path.abspath(first) if os.path.isdir(first) else None


def _check_enlarged(job: Job, model: ModelInfo, scale: int) -> None:
    """A size that `after` makes too large for every row that gives none is better known now."""
    height, width = (job.render.height or model.height) * scale, (job.render.width or model.width) * scale
    if height * width > MAX_PIXELS:
        raise InvalidJob(f"after: pictures would become {width}×{height}; the limit is {MAX_PIXELS:,} pixels: upscale less")


def _check_render(job: Job, model: ModelInfo) -> None:
    """The job's own defaults must be renderable, or every row would fail."""
    try:
        find_sampler(job.render.sampler or model.sampler, model.kind, model.refused_samplers)
        for name in TAKEN_BY_SOME:
            if getattr(job.render, name) is not None and name not in model.arguments:
                raise InvalidInput(f"{name} is not an argument of this model{instead(name, model)}; leave it out")
        parse(job.render.adapters, model.adapters)
        if job.render.prompt_weighting and job.render.negative_prompt:
            weighting.parse(job.render.negative_prompt, "negative_prompt")
        if job.render.strength is not None and "image" not in model.images:
            raise InvalidInput("strength is for rows with an image; leave it out, or give the manifest a column image")
        for name in ("height", "width"):
            if (value := getattr(job.render, name)) is not None:
                check_side(value, name, model)
    except InvalidInput as error:
        raise InvalidJob(f"render: {error}") from None
