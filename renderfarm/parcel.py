"""What a job needs beside its file, where it is submitted to another machine: what is sent with it, and what must be there.

    job.yaml                    the job, with its parameters, date and --set in it; what is sent it names beside itself
    manifest/0/prompts.parquet  files of this machine that only the driver reads: manifests, lists of words, networks of `after`
    wildcards/…
    after/0/…

Pictures, models, LoRA adapters and keys are read by every worker, and the output is written by every worker: those must be in a store, or
under the same path on each node. `Parcel.there` names them; nobody here can look whether they are.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from renderfarm.arguments import PRESETS
from renderfarm.config import STEP_FILES, Job, ManifestSpec, is_url
from renderfarm.errors import InvalidJob
from renderfarm.manifest import manifest_files
from renderfarm.records import IMAGE_ARGUMENTS
from renderfarm.text_tables import kind_of

JOB_FILE = "job.yaml"
LOOKED_AT = 64 << 10  # bytes of a text manifest


@dataclass
class Parcel:
    """`files`: by their names beside the job file. `there`: places of the job that name a path of this machine, and that path.
    `variables`: of the environment, that the job uses."""

    job: dict[str, Any]
    room: int
    files: dict[str, Path] = field(default_factory=dict)
    there: dict[str, str] = field(default_factory=dict)
    variables: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """Of the job file."""
        given = Job.model_validate(self.job).model_dump(mode="json", exclude_defaults=True)
        said = {"version": self.job["version"], **given}
        text = yaml.safe_dump(said, sort_keys=False, allow_unicode=True)
        # to a reader of YAML a bare NEL is a line's end
        return text if "\x85" not in text else yaml.safe_dump(said, sort_keys=False)

    def notes(self) -> list[str]:
        """What somebody must have seen to, a line each."""
        found = [f"{place}: {path} must be under this path on every node, or in a store" for place, path in self.there.items()]
        return found + ([f"the job's environment variables must be set there: {', '.join(self.variables)}"] if self.variables else [])

    def take(self, name: str, path: Path) -> bool:
        """Whether there is room for it."""
        size = path.stat().st_size
        if size > self.room:
            return False
        self.room -= size
        self.files[name] = path
        return True


def pack(job: Job, most_bytes: int) -> Parcel:
    """`job`: with absolute paths, as `load_job` gives it. `most_bytes`: of all files that are sent; what has no room must be there.

    Raises InvalidJob for lists of words that are too many, and for a hook that is written out. A manifest that is not on this machine
    may be on that one.
    """
    if job.notify is not None and "${" not in job.notify.url:
        raise InvalidJob(
            "notify.url is written out, so that it would be kept in the cluster for all who may read the job there: put it into an "
            "environment variable there, and write `url: ${NAME}` here"
        )
    parcel = Parcel(job.model_dump(mode="json"), most_bytes)
    _take_wildcards(parcel, job)
    _take_manifest(parcel, job)
    _take_networks(parcel, job)
    sent = {str(path) for path in parcel.files.values()}
    named = parcel.job["manifest"]["path"] or []
    kept = set(named if isinstance(named, list) else [named])
    for place, path in job.places():
        if path.startswith("/") and path not in sent and (place != "manifest.path" or path in kept):
            parcel.there[place] = path
    parcel.there.pop("inputs.folder", None)
    if (folder := parcel.job["inputs"]["folder"] or "").startswith("/") and _may_give_images(job):
        parcel.there["inputs.folder"] = folder
    parcel.variables = tuple(sorted(set(re.findall(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}", _texts(job)))))
    return parcel


def _texts(job: Job) -> str:
    """In which a variable is filled in where the job runs."""
    headers = list(job.notify.headers.values()) if job.notify else []
    return "\n".join([*(text for _, text in job.places()), *headers])


def _take_wildcards(parcel: Parcel, job: Job) -> None:
    if job.prompts is None or is_url(job.prompts.wildcards) or not (folder := Path(job.prompts.wildcards)).is_dir():
        return
    inside = folder.resolve()  # a list that is a link out of it is none (`templates`)
    for path in sorted(path for path in folder.rglob("*.txt") if path.is_file() and path.resolve().is_relative_to(inside)):
        if not parcel.take(f"wildcards/{path.relative_to(folder).as_posix()}", path):
            raise InvalidJob(f"prompts.wildcards: {folder} holds more than can be sent with a job; leave only the lists that it needs")
    parcel.job["prompts"]["wildcards"] = "wildcards"


def _take_manifest(parcel: Parcel, job: Job) -> None:
    """Files in their order and under their own names, by which an output knows them."""
    named: list[str] = []
    for given in job.manifest.paths:
        files = [Path(path) for path in _files_of(given)]
        names = {f"manifest/{len(named) + number}/{path.name}": path for number, path in enumerate(files)}
        if files and sum(path.stat().st_size for path in files) <= parcel.room:
            named += [name for name, path in names.items() if parcel.take(name, path)]
        else:
            named.append(given)
    if any(name.startswith("manifest/") for name in parcel.files) and job.inputs.folder is None:
        parcel.job["inputs"]["folder"] = _folder_of(job)  # where rows' pictures were beside it
    if named:
        parcel.job["manifest"]["path"] = named if len(named) > 1 else named[0]


def _folder_of(job: Job) -> str | None:
    """As a run here would take it (`preparation`)."""
    given = job.manifest.path
    if isinstance(given, str) and Path(given).is_dir():
        return given
    folders = {str(Path(path).parent) for path in _local(job.manifest)}
    return folders.pop() if len(folders) == 1 else None


def _may_give_images(job: Job) -> bool:
    """Whether rows may name pictures; of a manifest that is not on this machine nobody knows, and the job names their folder or not."""
    spec = job.manifest
    if spec.rows is not None:
        return any(isinstance(row, dict) and row.keys() & set(IMAGE_ARGUMENTS) for row in spec.rows)
    renamed = PRESETS.get(spec.columns, {}) if isinstance(spec.columns, str) else spec.columns or {}
    wanted = {name for argument in IMAGE_ARGUMENTS if (name := renamed.get(argument, argument)) is not None}
    unknown = job.inputs.folder is not None and not all(map(_files_of, spec.paths))
    return unknown or any(wanted & _columns(path, wanted) for path in _local(spec))


def _local(spec: ManifestSpec) -> Iterator[str]:
    for given in spec.paths:
        yield from _files_of(given)


def _files_of(given: str) -> list[str]:
    """Those of this machine that a manifest's path names; none where it is another's, or nothing is there."""
    if is_url(given) or "${" in given:
        return []
    with contextlib.suppress(InvalidJob):
        return manifest_files(ManifestSpec(path=given))
    return []


def _columns(path: str, wanted: set[str]) -> set[str]:
    """Of `wanted`, those that a file has, or that its beginning names."""
    try:
        if kind_of(path) is None:
            return set(pq.read_schema(path).names)
        with open(path, "rb") as file:
            head = file.read(LOOKED_AT).decode("utf-8", "replace")
        return {name for name in wanted if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", head)} if kind_of(path) != "lines" else set()
    except (OSError, pa.ArrowException):
        return set()


def _take_networks(parcel: Parcel, job: Job) -> None:
    for number, step in enumerate(job.after):
        for name in STEP_FILES.get(step.kind, ()):
            path = Path(getattr(getattr(step, step.kind), name))
            if path.is_absolute() and path.is_file() and parcel.take(f"after/{number}/{path.name}", path):
                parcel.job["after"][number][step.kind][name] = f"after/{number}/{path.name}"
