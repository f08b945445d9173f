"""An independent check of an output: it reads files with pyarrow and Pillow alone and imports nothing of the package."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def tables(out: Path) -> list[Path]:
    return sorted(out.glob("data/*/metadata.parquet"))


def image_rows(out: Path) -> list[dict[str, Any]]:
    """All image rows, after checking size, hashes, dimensions and pixels of every file."""
    rows = []
    for table in tables(out):
        for row in pq.read_table(table).to_pylist():
            check_file(table.parent / row["file_name"], (row.get("file_width", row["width"]), row.get("file_height", row["height"])), row)
            assert row["pixel_sha256"][:8] in row["file_name"]
            if "original_file" in row:
                said = {name: row[f"original_{name}"] for name in ("bytes", "file_sha256", "pixel_sha256")}
                check_file(out / row["original_file"], (row["width"], row["height"]), said)
            rows.append(row)
    return rows


def check_file(path: Path, size: tuple[int, int], said: dict[str, Any]) -> None:
    data = path.read_bytes()
    assert len(data) == said["bytes"], path
    assert hashlib.sha256(data).hexdigest() == said["file_sha256"], path
    with Image.open(path) as image:
        assert image.size == size, path
        assert image.mode == "RGB", path
        assert hashlib.sha256(np.asarray(image).tobytes()).hexdigest() == said["pixel_sha256"], path


def error_rows(out: Path) -> list[dict[str, Any]]:
    files = sorted(out.glob("errors/*.parquet"))
    return pa.concat_tables([pq.read_table(file) for file in files]).to_pylist() if files else []


def check_complete(out: Path, planned: set[tuple[int, int]]) -> None:
    """Every planned (row, image index) ended exactly once, as an image or as an error."""
    ended = Counter((row["row"], row["image_index"]) for row in (*image_rows(out), *error_rows(out)))
    assert set(ended) == planned, {"missing": sorted(planned - set(ended))[:5], "unplanned": sorted(set(ended) - planned)[:5]}
    assert max(ended.values(), default=1) == 1, [key for key, count in ended.items() if count > 1][:5]


def pixels(out: Path) -> dict[tuple[int, int], str]:
    return {(row["row"], row["image_index"]): row["pixel_sha256"] for row in image_rows(out)}
