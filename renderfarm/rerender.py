"""Render committed samples again, from the output alone: a table's row says everything about its sample, the render
profile everything else."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from renderfarm import adapters, commit
from renderfarm.after import Chain, thawed
from renderfarm.config import COMPANIONS, STAGES, ModelSpec, Offload, Workers, is_url
from renderfarm.errors import Fatal, InvalidJob
from renderfarm.jobfile import model_spec
from renderfarm.models.base import SlotModel
from renderfarm.models.catalog import describe, for_task, with_weights
from renderfarm.models.families import IMAGES_OF
from renderfarm.models.load import load_model
from renderfarm.reading import Output
from renderfarm.records import IMAGE_ARGUMENTS, InputImage, Sample, SampleKey
from renderfarm.slots import Rendered, SlotLoop
from renderfarm.storage import Store


class Renderer:
    """The output's model, set up as a profile says that its rows name. `differences`: where this machine does not match it."""

    def __init__(
        self, output: Output, profile: dict[str, Any], model: str | None, beside: Mapping[str, str], offload: Offload = "none"
    ) -> None:
        """`model`: where a model lies that the job knew by a folder; `beside`: the same of a component from elsewhere, or of a
        ControlNet and its kin; `offload`: as a job's. Raises InvalidJob if one cannot be found."""
        rendered = _model(output, profile)
        info = with_weights(describe(_model_spec(rendered, model, beside)), (profile.get("prompt_weighting") or {}).get("syntax"))
        info = for_task(info, IMAGES_OF[output.job["task"]])
        self._store = output.store
        self._adapters = tempfile.TemporaryDirectory(prefix="renderfarm-")
        info = dataclasses.replace(info, adapters=_written(output, rendered["adapters"], Path(self._adapters.name)))
        # the name that the output has for the model: whether it is the same one, the weights' hashes say
        info = dataclasses.replace(info, id=rendered["id"], revision=rendered["revision"])
        workers, chain = _workers(profile, offload), Chain(thawed(profile.get("after") or ()))

        def load() -> SlotModel:
            model = load_model(info, workers)
            chain.load(partial(commit.kept, output.store), model.device, workers.dtype)
            return model

        self._slots = SlotLoop(load, after=lambda pixels: chain.beside(chain.in_render_thread(pixels)))
        mine = json.loads(commit.to_json(self._slots.ready.result().profile() | chain.profile()))
        self.differences = commit.differences(profile, mine)
        self.profile_sha256 = commit.profile_sha256(mine)

    def render(self, records: Iterable[dict[str, Any]]) -> list[Future[Rendered]]:
        """Submit table rows; the slots that they leave free hold filler."""
        return self._slots.submit([sample_of(record, self._store) for record in records])

    def promises(self, record: dict[str, Any]) -> bool:
        """Whether the row was rendered with this very profile, so that the same bits must come out."""
        return bool(record["profile_sha256"] == self.profile_sha256)

    def close(self) -> None:
        self._slots.close()
        self._adapters.cleanup()


def sample_of(record: dict[str, Any], store: Store | None = None) -> Sample:
    """The sample that a row of the image table is about; its images are those that the output's `store` keeps."""
    names = {field.name for field in dataclasses.fields(Sample)} - {"key", *IMAGE_ARGUMENTS}
    images: dict[str, Any] = {
        name: InputImage(record[f"init_{name}"], commit.kept(store, record[f"init_{name}_sha256"]))
        for name in IMAGE_ARGUMENTS
        if store is not None and record.get(f"init_{name}_sha256") is not None
    }
    given = {name: record[name] for name in names if name in record}
    if given.get("adapters") == adapters.OFF:
        given["adapters"] = None
    return Sample(key=SampleKey(record["row"], record["image_index"]), **given, **images)


def _written(output: Output, adapters: Mapping[str, str], folder: Path) -> dict[str, str]:
    """The adapters that the output keeps, as files; their names are somebody else's and lead nowhere."""
    files = {name: folder / f"{number}.safetensors" for number, name in enumerate(adapters)}
    for name, file in files.items():
        file.write_bytes(commit.kept(output.store, adapters[name]))
    return {name: str(file) for name, file in files.items()}


def _model(output: Output, profile: dict[str, Any]) -> dict[str, Any]:
    """job.json's `model`, but what the profile holds is the profile's: its hash is in every row, job.json's is nowhere."""
    if not isinstance(profile.get("model"), str) or output.job.get("task") not in IMAGES_OF:
        raise Fatal(f"{output.store.url}: job.json or a render profile is damaged (no known model or task); restore them from a copy")
    known = {
        "id": profile["model"],
        "revision": profile.get("model_revision"),
        "safety_checker": profile.get("safety_checker", False),
        "adapters": profile.get("adapters") or {},
        "quantization": _without(profile.get("quantization"), "version"),
    }
    for name in STAGES:
        if (stage := profile.get(name)) is not None:
            known[name] = (output.job["model"].get(name) or {}) | _without(stage, "scheduler")
    return {**output.job["model"], **known}


def _without(described: dict[str, Any] | None, name: str) -> Any:
    """Settings as a job has them, without what the profile adds."""
    return described and {key: value for key, value in described.items() if key != name}


def _model_spec(stored: dict[str, Any], model: str | None, beside: Mapping[str, str]) -> ModelSpec:
    if model is None and _was_a_folder(stored):
        raise InvalidJob(f"the output was rendered with a model in a folder named {stored['id']!r}; say where it is: --model FOLDER")
    spec = model_spec(model) if model else ModelSpec(id=stored["id"], revision=stored["revision"])
    parts = {name: stored[name] for name in COMPANIONS if name in stored} | (stored.get("components") or {})
    if unknown := beside.keys() - parts.keys():
        raise InvalidJob(f"--model {min(unknown)}=…: the output was rendered with no such part from elsewhere; leave it out")
    for name, one in parts.items():
        if name not in beside and _was_a_folder(one):
            raise InvalidJob(
                f"the output was rendered with a {name} in a folder named {one['id']!r}; say where it is: --model {name}=FOLDER"
            )
    parts |= {name: one | {"id": os.path.abspath(beside[name])} for name, one in parts.items() if name in beside}
    stated: dict[str, Any] = {name: stored.get(name) for name in ("safety_checker", "variant", "quantization")}
    stated |= {"components": {name: parts.pop(name) for name in stored.get("components") or {}}}
    return ModelSpec.model_validate(spec.model_dump() | stated | parts)


def _was_a_folder(stored: dict[str, Any]) -> bool:
    return stored["revision"] is None and not stored["id"].startswith("builtin:") and not is_url(stored["id"])


def _workers(profile: dict[str, Any], offload: Offload) -> Workers:
    try:
        return Workers(
            batch_size=profile.get("batch_size", 0),
            dtype=profile.get("dtype", "float32"),  # builtin:fake has none
            device="cpu" if profile.get("device") == "cpu" else "auto",
            offload=offload,
            threads=profile.get("threads") or 1,
            attention_backend=profile.get("attention_backend"),
            devices_per_worker=profile.get("devices") or 1,
        )
    except ValidationError as error:  # the profile's values were valid once; what was asked for does not go with them
        raise InvalidJob(f"cannot render it again so: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None
