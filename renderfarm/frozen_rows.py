"""Rows that are not in a Parquet file of the user's: converted, multiplied, drawn by chance. They are made once.

    _renderfarm/rows/rows-HASH.parquet      the rows, as `plan` or `run` made them (create-if-absent); HASH is that of all that decided them

job.json names the file, and holds what the job said. A run that goes on reads the file: it draws nothing again and reads no list of
words; a job that says something else is refused with the differences, as for all that is frozen. Until job.json is there, nothing is
promised: an edited job makes another file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from renderfarm import commit, text_tables
from renderfarm.arguments import ARGUMENTS, PRESETS, TEXT, TEXT_OR_INTEGER
from renderfarm.config import Job, ManifestSpec
from renderfarm.errors import AlreadyExists, Fatal, InvalidJob
from renderfarm.manifest import Manifest, column_types, manifest_files, open_manifest
from renderfarm.storage import Store, open_file
from renderfarm.sweep import Expansion

FOLDER = "_renderfarm/rows"
COLUMNS = b"renderfarm.columns"  # footer metadata: `manifest.columns` with which the rows are read


class Scratch:
    """A file of this machine that goes when nobody has it any more."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="renderfarm-rows-")) / "rows.parquet"
        self._removed = weakref.finalize(self, shutil.rmtree, self.path.parent, ignore_errors=True)

    def rename(self, key: str) -> None:
        """To its name in the output, by which job.json knows it."""
        self.path = self.path.rename(self.path.with_name(key.rpartition("/")[2]))


@dataclass(frozen=True)
class Rows:
    """A job's rows. `spec`: how `manifest` was opened; `said`: what made them, for job.json (None: they are the user's own files)."""

    manifest: Manifest
    spec: ManifestSpec
    paths: tuple[str, ...]
    """The files that the job names, in whose folder rows' pictures lie."""
    said: dict[str, Any] | None = None
    key: str | None = None
    scratch: Scratch | None = None
    """Where the rows are that the output may not hold yet."""
    warnings: tuple[str, ...] = ()

    def keep(self, store: Store) -> None:
        """Put them into the output, if they are not there."""
        if self.scratch is not None and self.key is not None and not store.exists(self.key):
            with contextlib.suppress(AlreadyExists):
                store.put_if_absent(self.key, self.scratch.path)


def open_rows(job: Job, supported: frozenset[str], store: Store) -> Rows:
    """The rows that a job is about: those in the output, if it was begun before. `supported`: the arguments the model takes.

    Raises InvalidJob for everything that can be known without rendering.
    """
    try:
        frozen = commit.read_job(store)["manifest"]
    except KeyError:
        frozen = {}
    paths = _paths(job, may_be_gone="made" in frozen)
    if frozen.get("made") and (_is_multiplied(job) or job.manifest.rows or not paths or _is_text(paths)):
        return _again(job, supported, store, frozen, paths)
    if not (_is_multiplied(job) or job.manifest.rows or _is_text(paths)):
        return Rows(open_manifest(job.manifest, supported), job.manifest, tuple(paths))
    return _made(job, supported, store, paths)


def _is_multiplied(job: Job) -> bool:
    return job.sweep is not None or job.prompts is not None


def _is_text(paths: list[str]) -> bool:
    return text_tables.kind_of(paths[0]) is not None


def _paths(job: Job, *, may_be_gone: bool) -> list[str]:
    try:
        return manifest_files(job.manifest)
    except InvalidJob:
        if may_be_gone:
            return []
        raise


def _again(job: Job, supported: frozenset[str], store: Store, frozen: dict[str, Any], paths: list[str]) -> Rows:
    """Those that the output holds."""
    stored = frozen["made"]
    said = _said(job, _fingerprint(paths, job, supported) if paths else stored["from"])
    commit.refuse_differences(store, commit.differences(stored, json.loads(_json(said)), "manifest.made"))
    name = frozen["files"][0]["path"]
    key = f"{FOLDER}/{name}"
    if "/" in name or not store.exists(key):
        raise Fatal(f"{store.url}/{key} is missing, and holds the rows of this output; restore it from a copy")
    return _kept(store, job, supported, paths, said, key)


def _kept(store: Store, job: Job, supported: frozenset[str], paths: list[str], said: dict[str, Any], key: str) -> Rows:
    """Those that are in the output. Only this object reads what is in this process's memory, so of that a copy is opened."""
    if not store.url.startswith("memory://"):
        return _opened(f"{store.url}/{key}", job, supported, paths, said, key)
    scratch = Scratch()
    scratch.path.write_bytes(store.read(key))
    scratch.rename(key)
    return replace(_opened(str(scratch.path), job, supported, paths, said, key), scratch=scratch)


def _made(job: Job, supported: frozenset[str], store: Store, paths: list[str]) -> Rows:
    """New ones, in a file of this machine until they are kept."""
    source, spec = None, job.manifest
    if job.manifest.rows is not None or _is_text(paths):
        source = _converted(job, paths)
        spec = ManifestSpec(path=str(source.path), columns=spec.columns, where=spec.where)
    with _named(source, paths):
        manifest = open_manifest(spec, supported)
    said = _said(job, _fingerprint(paths, job, supported, manifest))
    if not _is_multiplied(job):
        assert source is not None
        source.rename(key := _key(said, text_tables.describe(str(source.path)).sha256))
        return replace(_opened(str(source.path), job, supported, paths, said, key), scratch=source)
    expansion = Expansion(replace(manifest, place=partial(_place, job, paths) if source else None), column_types(manifest), job)
    total = expansion.count()
    key = _key(said, expansion.wildcards.sha256, job.seed, job.seed_policy)
    if store.exists(key):
        return _kept(store, job, supported, paths, said, key)
    scratch = Scratch()
    _write(expansion, scratch.path, total)
    scratch.rename(key)
    return replace(_opened(str(scratch.path), job, supported, paths, said, key), scratch=scratch)


def _converted(job: Job, paths: list[str]) -> Scratch:
    scratch = Scratch()
    if job.manifest.rows is not None:
        text_tables.convert_rows(list(job.manifest.rows), scratch.path)
        return scratch
    columns = job.manifest.columns
    mapped = PRESETS.get(columns, {}) if isinstance(columns, str) else columns or {}
    texts = {mapped.get(name) or name for name, kind in ARGUMENTS.items() if kind in (TEXT, TEXT_OR_INTEGER) and name != "sampler"}
    text_tables.convert(paths, scratch.path, texts)  # a sampler may be DiffusionDB's code
    return scratch


def _write(expansion: Expansion, path: Path, total: int) -> None:
    writer, written = None, 0
    try:
        for table in expansion.tables():
            if writer is None:
                said = {COLUMNS: json.dumps(expansion.mapping()).encode()}
                writer = pq.ParquetWriter(path, table.schema.with_metadata(said), compression="zstd")
            writer.write_table(table)
            written += len(table)
    finally:
        if writer is not None:
            writer.close()
    if written != total:
        raise Fatal(f"{written:,} rows came out, and {total:,} were counted: the manifest was changed meanwhile; run again")


def _opened(url: str, job: Job, supported: frozenset[str], paths: list[str], said: dict[str, Any], key: str) -> Rows:
    """Rows in a file of ours. Multiplied ones have all of the job's `columns` and `where` in them."""
    spec = ManifestSpec(path=url, columns=job.manifest.columns, where=job.manifest.where)
    if _is_multiplied(job):
        with open_file(url) as file:
            columns = json.loads((pq.read_schema(file).metadata or {}).get(COLUMNS, b"null"))
        spec = ManifestSpec(path=url, columns=columns)
    manifest = open_manifest(spec, supported)
    place = partial(_swept_place, manifest) if _is_multiplied(job) else partial(_place, job, paths)
    return Rows(replace(manifest, place=place), spec, tuple(paths), said, key)


def _swept_place(manifest: Manifest, row: int) -> str:
    (table,) = manifest.stream([(row, row + 1)])
    return f"row {row} of the sweep (id {table.column('id')[0].as_py()})"


def _place(job: Job, paths: list[str], row: int) -> str:
    if job.manifest.rows is not None:
        return f"manifest.rows[{row}]"
    return text_tables.place_of(paths, row) if paths else f"row {row}"


def _said(job: Job, files: list[dict[str, Any]]) -> dict[str, Any]:
    """What decides the rows, but for the lists of words, which may change once the rows are made."""
    prompts = job.prompts and job.prompts.model_dump(mode="json", exclude={"wildcards"})
    return {
        "from": files,
        "rows": job.manifest.rows and hashlib.sha256(_json(job.manifest.rows)).hexdigest(),
        "columns": job.manifest.columns,
        "where": job.manifest.model_dump(mode="json")["where"],
        "sweep": job.sweep and job.sweep.model_dump(mode="json", exclude={"max_rows"}),
        "prompts": prompts,
    }


def _fingerprint(paths: list[str], job: Job, supported: frozenset[str], manifest: Manifest | None = None) -> list[dict[str, Any]]:
    """Of the files that the job names."""
    if paths and _is_text(paths):
        return [{**vars(file), "path": file.path.rsplit("/", 1)[-1]} for file in map(text_tables.describe, paths)]
    return (manifest or open_manifest(job.manifest, supported)).fingerprint() if paths else []


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str).encode()


def _key(*decides: Any) -> str:
    return f"{FOLDER}/rows-{hashlib.sha256(_json(decides)).hexdigest()[:16]}.parquet"


@contextlib.contextmanager
def _named(scratch: Scratch | None, paths: list[str]) -> Iterator[None]:
    """Messages about a file of ours are about the user's."""
    try:
        yield
    except InvalidJob as error:
        if scratch is None:
            raise
        raise InvalidJob(str(error).replace(str(scratch.path), paths[0] if paths else "manifest.rows")) from None
