"""The report's pictures: which of an output's, what their rows say, and their thumbnails, many in one sheet."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from PIL import Image

from renderfarm import commit
from renderfarm.config import Metadata
from renderfarm.encode import UNDECODABLE
from renderfarm.layouts.webdataset import json_ready
from renderfarm.marks import marks
from renderfarm.reading import Output, StoredSample
from renderfarm.records import PartId
from renderfarm.report.columnar import column, columns_of
from renderfarm.report.gone import left_out

SIDES = ((150, 448), (600, 320), (2500, 208))  # of a thumbnail in pixels, by how many there are; more than that: SMALL
SMALL = 144
SHEET_PX = 1024  # what a search finds lies in many sheets, and each of them must be decoded
DECODERS = 4
UNREAD_SHOWN = 20
_PARAMETERS = Metadata(provenance=False, row=False)

Say = Callable[[str], None]


@dataclass(frozen=True)
class Bounds:
    """How much a report may take. `images`: so many at most, spread over the output. `seconds`: no thumbnail is begun after that;
    None: however long it takes."""

    images: int
    seconds: float | None = None


@dataclass(frozen=True)
class Gallery:
    """`pictures`: JSON for the page. `sheets`: base64 of WebP files. `images`: whose rows are in it; `thumbnails`: of how many.
    `unread_parts`: whose table is gone or damaged."""

    pictures: dict[str, Any]
    sheets: list[str]
    images: int
    thumbnails: int
    unread_parts: int = 0


def gallery(output: Output, entries: commit.Entries, bounds: Bounds, say: Say = lambda text: None) -> Gallery:
    deadline = None if bounds.seconds is None else time.monotonic() + bounds.seconds
    unread = list[PartId]()
    found = _samples(output, entries, bounds.images, unread)
    samples = sorted(found, key=lambda sample: (sample.record["row"], sample.record["image_index"]))
    side = next((side for count, side in SIDES if len(samples) <= count), SMALL)
    side = min(side, max((_longest_side(sample.record) for sample in samples), default=side))
    across = max(1, SHEET_PX // side)
    sheets, sizes = list[str](), list[tuple[int, int] | None]()
    with ThreadPoolExecutor(DECODERS, thread_name_prefix="thumbnail") as pool:
        for start in range(0, len(samples), across * across):
            if deadline is not None and time.monotonic() > deadline:
                break
            say(f"thumbnails: {start:,} of {len(samples):,}")
            thumbnails = list(pool.map(lambda sample: thumbnail(sample, side, deadline), samples[start : start + across * across]))
            sheets.append(_sheet(thumbnails, side, across))
            sizes += [None if small is None else small.size for small in thumbnails]
    sizes += [None] * (len(samples) - len(sizes))
    pictures = {
        "count": len(samples),
        "columns": columns_of([sample.record for sample in samples]),
        "files": column([sample.key for sample in samples]),
        "parameters": column([_parameters(sample.record) for sample in samples]),
        "side": side,
        "across": across,
        "width": column([size and size[0] for size in sizes]),
        "height": column([size and size[1] for size in sizes]),
        "unread": [str(part) for part in unread[:UNREAD_SHOWN]],
        "unread_count": len(unread),
    }
    return Gallery(pictures, sheets, len(samples), sum(size is not None for size in sizes), len(unread))


def _samples(output: Output, entries: commit.Entries, limit: int, unread: list[PartId]) -> list[StoredSample]:
    found = []
    for key, committed, rows in output.spread_over_parts(limit, entries, unread):
        table = committed.images.take(pa.array(rows, pa.int64()))
        found += [output.stored(key, committed, row, record) for row, record in zip(rows, _records(table), strict=True)]
    return found


def _records(table: pa.Table) -> list[dict[str, Any]]:
    """The rows. A column that Python has no values for (a date beyond its own) is as Arrow writes it, or only named."""
    try:
        return list(json_ready(table))
    except (pa.ArrowException, ValueError, OverflowError):
        records: list[dict[str, Any]] = [{} for _ in range(len(table))]
    for name in table.column_names:
        try:
            values = [record[name] for record in json_ready(table.select([name]))]
        except (pa.ArrowException, ValueError, OverflowError):
            values = _printed(table.column(name))
        for record, value in zip(records, values, strict=True):
            record[name] = value
    return records


def _printed(column: pa.ChunkedArray) -> list[str | None]:
    try:
        found: list[str | None] = column.cast(pa.string()).to_pylist()
        return found
    except pa.ArrowException:
        return [f"({column.type})"] * len(column)


def _longest_side(record: dict[str, Any]) -> int:
    return int(max(record.get("file_width") or record["width"], record.get("file_height") or record["height"]))


def thumbnail(sample: StoredSample, side: int, deadline: float | None) -> Image.Image | None:
    """None for a picture that is gone, damaged, or too late: a view must not fail for it."""
    if deadline is not None and time.monotonic() > deadline:
        return None
    with left_out(*UNDECODABLE):
        picture = sample.image().convert("RGB")
        picture.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=2.0)
        return picture
    return None


def _sheet(thumbnails: Sequence[Image.Image | None], side: int, across: int) -> str:
    """Thumbnail k begins `k % across` cells from the left and `k // across` from the top."""
    columns, rows = min(across, len(thumbnails)), -(-len(thumbnails) // across)
    sheet = Image.new("RGB", (columns * side, rows * side), (128, 128, 128))
    for place, thumbnail in enumerate(thumbnails):
        if thumbnail is not None:
            sheet.paste(thumbnail, (place % across * side, place // across * side))
    file = io.BytesIO()
    sheet.save(file, "WEBP", quality=82, method=2)
    return base64.b64encode(file.getvalue()).decode()


def _parameters(record: dict[str, Any]) -> str | None:
    """A1111's text, as far as the row has what it needs."""
    try:
        return marks(record, _PARAMETERS).parameters
    except KeyError:  # a sampler of a later version
        return None
