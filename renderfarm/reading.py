"""Reading an output back, finished or not: only committed parts are seen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
from PIL import Image

from renderfarm import commit
from renderfarm.config import expand_env
from renderfarm.encode import decode
from renderfarm.errors import InvalidJob
from renderfarm.layouts import files
from renderfarm.plan import Grid
from renderfarm.schema import ERROR_COLUMNS, IMAGE_COLUMNS
from renderfarm.storage import Store, open_store


@dataclass(frozen=True)
class StoredSample:
    """A committed image: its table row, and where its file is."""

    record: dict[str, Any]
    key: str
    store: Store

    def image(self) -> Image.Image:
        """Decoded on first use, as PIL does. Raises KeyError for a file that is gone, one of `encode.UNDECODABLE` for a damaged one, Fatal
        where the table names one outside of the output."""
        return decode(self.store.read(self.key))

    def original(self) -> Image.Image | None:
        """The picture before the job's `after`, where the output keeps it. Raises as `image` does."""
        key = self.record.get("original_file")
        return None if key is None else decode(self.store.read(key))


class Output:
    """An output of `renderfarm run`. Iterates (PIL image, record) in manifest order; a record is the table's row."""

    def __init__(self, url: str) -> None:
        self.store = open_store(url)
        try:
            self.job = commit.read_job(self.store)
        except KeyError:
            raise InvalidJob(f"{url}: not an output of renderfarm (it has no {commit.JOB}); give the folder that `run` printed") from None

    @cached_property
    def grid(self) -> Grid:
        """Raises InvalidJob where it was left to the first worker, and none has been ready yet."""
        grid = commit.frozen_grid(self.store, self.job)
        if grid is None:
            raise InvalidJob(f"{self.store.url}: nothing was rendered yet; run its job first")
        return grid

    def __iter__(self) -> Iterator[tuple[Image.Image, dict[str, Any]]]:
        return ((sample.image(), sample.record) for sample in self.samples())

    def samples(self) -> Iterator[StoredSample]:
        """Every committed sample in manifest order; its image is read only when asked for."""
        for key in self._tables():
            yield from self._stored(key, files.read_table(self.store.read(key))[0])

    def __len__(self) -> int:
        return sum(receipt.images for receipt in commit.committed_parts(self.store).values())

    def spread(self, limit: int) -> list[StoredSample]:
        """About `limit` samples spread over the output, from at most `limit` parts."""
        keys = self._tables()
        keys = keys[:: -(-len(keys) // limit)] if keys else []
        chosen: list[StoredSample] = []
        for index, key in enumerate(keys):
            images = files.read_table(self.store.read(key))[0]
            take = (limit - len(chosen)) // (len(keys) - index)
            for k in range(min(take, len(images))):
                record = images.select(IMAGE_COLUMNS.names).slice(k * len(images) // min(take, len(images)), 1).to_pylist()[0]
                chosen.append(StoredSample(record, f"{key.rpartition('/')[0]}/{record['file_name']}", self.store))
        return chosen

    def errors(self) -> pa.Table:
        """The error table of all committed parts."""
        tables = [files.read_errors(self.store.read(key)) for key in self.store.list("errors")]
        return pa.concat_tables([ERROR_COLUMNS.empty_table(), *tables])

    def committed(self) -> list[int]:
        """Indices of the parts that have a commit object, ascending; not taken from the index of parts."""
        named = (files.part_of(key) for key in (*self._tables(), *self.store.list("errors")))
        return sorted({index for index in named if index is not None})

    def part(self, index: int) -> tuple[list[StoredSample], list[dict[str, Any]]]:
        """A part's samples and error rows; both are empty for one that is not committed. Raises Fatal for a damaged one."""
        part = self.grid.part(index)
        try:
            key = files.commit_key(part)
            images, errors = files.read_table(self.store.read(key))
            with files.damage_named():
                return list(self._stored(key, images)), errors.to_pylist()
        except KeyError:
            return [], self.errors_of(index)

    def errors_of(self, index: int) -> list[dict[str, Any]]:
        """What the error view has for a part; its table's footer says the same, or the view is damaged."""
        try:
            return list(files.read_errors(self.store.read(files.errors_key(self.grid.part(index)))).to_pylist())
        except KeyError:
            return []

    def _stored(self, key: str, images: pa.Table) -> Iterator[StoredSample]:
        folder = key.rpartition("/")[0]
        return (StoredSample(record, f"{folder}/{record['file_name']}", self.store) for record in images.to_pylist())

    def _tables(self) -> list[str]:
        return [key for key in self.store.list("data") if key.endswith("/metadata.parquet")]


def open(out: str | Path) -> Output:
    """Open an output folder or URL. Raises InvalidJob if it is none."""
    return Output(expand_env(str(out)))
