"""An independent check of an output: it reads files with pyarrow and Pillow alone and imports nothing of the package."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image


def read(file: Path) -> list[dict[str, Any]]:
    """A table's rows. In this thread: for tables of a few rows, more of them take longer."""
    rows: list[dict[str, Any]] = pq.ParquetFile(file).read(use_threads=False).to_pylist()
    return rows


def tables(out: Path) -> list[Path]:
    """Of layout `files`."""
    return sorted(out.glob("data/*/metadata.parquet"))


def image_rows(out: Path) -> list[dict[str, Any]]:
    """All image rows, after checking names, sizes, hashes, dimensions and pixels of every picture. Any layout."""
    rows = []
    for row, name, data in _pictures(out):
        check_picture(data, (row.get("file_width", row["width"]), row.get("file_height", row["height"])), row)
        assert name.startswith(f"{row['row']:010d}-{row['image_index']:04d}-{row['file_sha256'][:8]}.")
        if "original_file" in row:
            said = {name: row[f"original_{name}"] for name in ("bytes", "file_sha256", "pixel_sha256")}
            check_picture((out / row["original_file"]).read_bytes(), (row["width"], row["height"]), said)
        rows.append(row)
    return rows


def _pictures(out: Path, *, retries_only: bool = False) -> Iterator[tuple[dict[str, Any], str, bytes]]:
    """(row, the picture's name, its bytes)."""
    only = ".r" if retries_only else ""
    for table in (table for table in tables(out) if only in table.parent.name):
        for row in read(table):
            yield row, row["file_name"], (table.parent / row["file_name"]).read_bytes()
    for file in (file for file in sorted(out.glob("data/*.parquet")) if only in file.stem):
        for row in read(file):
            assert row["file_name"] is None
            image = row.pop("image")
            yield row, image["path"], image["bytes"]
    for file in (file for file in sorted(out.glob("data/*.tar")) if only in file.stem):
        rows = read(out / "metadata" / f"{file.stem}.parquet")
        with tarfile.open(file) as tar:
            first, *names = tar.getnames()
            assert first.startswith("__")
            assert names == [name for row in rows for name in (row["file_name"], row["file_name"].rpartition(".")[0] + ".json")]
            for row in rows:
                yield row, row["file_name"], tar.extractfile(row["file_name"]).read()  # type: ignore[union-attr]


def check_picture(data: bytes, size: tuple[int, int], said: dict[str, Any]) -> None:
    assert len(data) == said["bytes"]
    assert hashlib.sha256(data).hexdigest() == said["file_sha256"]
    with Image.open(io.BytesIO(data)) as image:
        assert image.size == size
        assert image.mode == "RGB"
        assert hashlib.sha256(np.asarray(image).tobytes()).hexdigest() == said["pixel_sha256"]


def rendering(file: Path) -> tuple[str, int]:
    """`part-00000012.r1.parquet`: of part-00000012, the first retry."""
    part, *retry = file.name.removesuffix(".parquet").split(".r")
    return part, int(*retry or [0])


def error_rows(out: Path, images: list[dict[str, Any]] | None = None) -> list[dict[str, Any]]:
    """How the samples ended that have no image. What was retried is in several tables, of which the last one counts.
    `images`: of the same output, for who has read them."""
    pictured = {(row["row"], row["image_index"]) for row in ([row for row, *_ in _pictures(out)] if images is None else images)}
    last: dict[tuple[int, int], dict[str, Any]] = {}
    for file in sorted(out.glob("errors/*.parquet"), key=rendering):
        rows = {(row["row"], row["image_index"]): row for row in read(file)}
        if rendering(file)[1]:
            assert rows.keys() <= last.keys(), "what is rendered again was an error before"
        else:
            assert not rows.keys() & last.keys()
        last |= rows
    return [row for key, row in sorted(last.items()) if key not in pictured]


def check_complete(out: Path, planned: set[tuple[int, int]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Every planned (row, image index) ended exactly once, as an image or as an error, and only what failed was rendered again.
    The rows of the images, and of the errors."""
    firsts = [file for file in out.glob("errors/*.parquet") if not rendering(file)[1]]
    failed = {(row["row"], row["image_index"]) for file in firsts for row in read(file)}
    assert {(row["row"], row["image_index"]) for row, *_ in _pictures(out, retries_only=True)} <= failed
    images = image_rows(out)
    errors = error_rows(out, images)
    ended = Counter((row["row"], row["image_index"]) for row in (*images, *errors))
    assert set(ended) == planned, {"missing": sorted(planned - set(ended))[:5], "unplanned": sorted(set(ended) - planned)[:5]}
    assert max(ended.values(), default=1) == 1, [key for key, count in ended.items() if count > 1][:5]
    return images, errors


VOLATILE = ("run", "worker", "host", "began", "seconds")


def lasting(key: str, data: bytes) -> bytes:
    """A file of an output without what is another one each time: an index entry says who committed its part, and when."""
    entry = json.loads(data) if key.startswith("_renderfarm/parts/") and data.startswith(b"{") and data.endswith(b"}\n") else None
    return data if entry is None else json.dumps({name: entry[name] for name in entry if name not in VOLATILE}).encode()


def pixels(out: Path) -> dict[tuple[int, int], str]:
    return {(row["row"], row["image_index"]): row["pixel_sha256"] for row in image_rows(out)}
