"""`renderfarm preview`: some rows, spread over the manifest, rendered as the run will render them, and nothing left but a sheet of them."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from renderfarm import commit
from renderfarm.api import run
from renderfarm.config import Job, Output
from renderfarm.driver import Observer
from renderfarm.errors import InvalidJob
from renderfarm.manifest import ROW, parse_ranges
from renderfarm.preparation import Prepared, prepare
from renderfarm.reading import open as open_output
from renderfarm.report.contact_sheet import KEY, write_contact_sheet
from renderfarm.report.notebook import small_sheet
from renderfarm.shown import Shown
from renderfarm.storage import open_store
from renderfarm.sweep import axes

MAX_ROWS = 1000
MAX_CELLS = 240
ROWS_AT_A_TIME = 4096
GOLDEN = 0.6180339887498949


@dataclass(frozen=True)
class Preview(Shown):
    """`pixels`: SHA-256 by `ROW:K`, as the run's table will have it. `reasons`: of rows without an image. `sheet`: the contact sheet, a
    PNG, which `file` holds if one was named."""

    file: str | None
    rows: list[int]
    images: int
    errors: int
    pixels: dict[str, str]
    reasons: list[str]
    seconds: float
    images_per_second: float
    exit_code: int
    sheet: bytes | None = field(default=None, repr=False)

    unshown = frozenset({"sheet", "pixels"})

    def to_dict(self) -> dict[str, Any]:
        """JSON values; of the sheet, where it is."""
        return {name: value for name, value in vars(self).items() if name != "sheet"}

    def _repr_html_(self) -> str:
        return super()._repr_html_() + (small_sheet(self.sheet) if self.sheet else "")


def preview(job: Job, file: Path | None, rows: int = 9, observe: Observer = lambda progress: None) -> Preview:
    """Render `rows` rows in this process, into a folder that is gone afterwards, and make a contact sheet of them, in `file`
    if one is named.

    The pixels are those of the later run on such a device, and if the output has a render profile, of that one: a device that does not
    match it is refused. Raises InvalidJob for a job that cannot run.
    """
    if not 1 <= rows <= MAX_ROWS:
        raise InvalidJob(f"--rows {rows}: give 1 to {MAX_ROWS}")
    prepared, started = prepare(job), time.monotonic()
    chosen = spread(prepared, rows)
    with tempfile.TemporaryDirectory(prefix="renderfarm-preview-") as folder:
        summary = run(_elsewhere(prepared, chosen, folder), engine="inline", observe=observe)
        output = open_output(folder)
        swept = [*job.sweep.product, *job.sweep.zip] if job.sweep else []
        written = write_contact_sheet(output, min(MAX_CELLS, max(1, summary.images)), lambda record: _caption(record, swept))
        sheet = output.store.read(KEY) if written is not None else None
        if sheet is not None and file is not None:
            _write(file, sheet)
        pixels = {f"{sample.record['row']}:{sample.record['image_index']}": sample.record["pixel_sha256"] for sample in output.samples()}
        reasons = [f"row {error['row']}: {error['error_message']}" for error in output.errors().to_pylist()]
    return Preview(
        file=str(file) if sheet and file else None,
        rows=chosen,
        images=summary.images,
        errors=summary.errors,
        pixels=pixels,
        reasons=reasons,
        seconds=round(time.monotonic() - started, 1),
        images_per_second=summary.images_per_second,
        exit_code=summary.exit_code,
        sheet=sheet,
    )


def _elsewhere(prepared: Prepared, rows: list[int], folder: str) -> Prepared:
    """The same rows under the same ordinals, so that seeds and ids are those of the run."""
    where = {ROW: ",".join(map(str, rows))}
    store = open_store(folder)
    with suppress(InvalidJob):  # no worker has measured anything yet
        commit.first_profile(store, commit.read_profile(prepared.store))
    job, manifest = prepared.job, prepared.manifest
    changes = {
        "manifest": job.manifest.model_copy(update={"where": where}),
        "output": Output(path=folder, layout="files", format="png", part_rows=1),
        "notify": None,
        "failure": job.failure.model_copy(update={"stop_after": None}),
    }
    others = replace(prepared.rows, said=None, scratch=None)
    return replace(prepared, job=job.model_copy(update=changes), manifest=replace(manifest, where=where), store=store, rows=others)


def spread(prepared: Prepared, rows: int) -> list[int]:
    """Ordinals of rows that the job wants, one from each of `rows` equal stretches, not always at its beginning: in a sweep, rows at
    equal distances could all have the same value of an axis. Of a sweep, each combination comes once before any comes twice."""
    where = prepared.job.manifest.where
    if where is None:
        total, block = prepared.manifest.rows, _rows_of_each(prepared.job)
        return sorted(set(_across(total, block, rows) if total % block == 0 else _places(total, rows)))
    if where.keys() == {ROW}:
        wanted = np.unique(np.concatenate([np.arange(*_within(of, prepared.manifest.rows)) for of in parse_ranges(str(where[ROW]))]))
    else:
        wanted = np.concatenate([np.empty(0, np.int64), *_selected(prepared)])
    if not len(wanted):
        raise InvalidJob("manifest.where selects no row; correct it")
    return [int(wanted[place]) for place in sorted(set(_places(len(wanted), rows)))]


def _within(rows: range, total: int) -> tuple[int, int, int]:
    return rows.start, min(rows.stop, total), rows.step


def _selected(prepared: Prepared) -> Iterator[np.ndarray]:
    parts = prepared.grid_of(ROWS_AT_A_TIME)
    return (table.column(ROW).to_numpy() for table in prepared.manifest.stream((part.start, part.stop) for part in parts))


def _rows_of_each(job: Job) -> int:
    """The rows that a sweep makes of each of the manifest's, where that is the same number for all; else 1."""
    if job.sweep is None or (job.prompts is not None and job.prompts.templates == "combinatorial"):
        return 1
    return axes(job.sweep).combinations * (job.prompts.samples if job.prompts else 1)


def _across(total: int, block: int, some: int) -> Iterator[int]:
    """As `_places`, of blocks that are alike: places within them follow each other at a distance that meets each before one comes back."""
    if block == 1:
        return _places(total, some)
    some, blocks = min(total, some), total // block
    stride = next(step for step in range(max(1, round(block * GOLDEN)), 2 * block) if math.gcd(step, block) == 1)
    return (k * blocks // some * block + k * stride % block for k in range(some))


def _places(total: int, some: int) -> Iterator[int]:
    some = min(total, some)
    return (int((k + k * GOLDEN % 1) * total / some) for k in range(some))


def _caption(record: dict[str, Any], axes: list[str]) -> str:
    said = [f"{name} {record[name]:g}" if isinstance(record[name], float) else f"{name} {record[name]}" for name in axes if name in record]
    return ", ".join([*(text for text in said if not text.startswith("prompt ")), record["prompt"]])


def _write(file: Path, data: bytes) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    except OSError as error:
        raise InvalidJob(f"{file}: cannot be written: {error.strerror}; name another file (--file)") from None
