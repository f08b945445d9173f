"""Layout `files`: data/part-…/IMAGE.png beside data/part-…/metadata.parquet, as Hugging Face's imagefolder reads it.

The commit of a part is its metadata.parquet. Images are put before it; one that no table names belongs to an attempt that
lost, and no reader sees it.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import pyarrow as pa

from renderfarm.layouts.base import NOWHERE, Committed, Place, damage_named, read_table, table_bytes
from renderfarm.records import Part
from renderfarm.storage import Store

TABLES = "data/*/metadata.parquet"


def commit_key(part: Part) -> str:
    return f"data/{part.name}/metadata.parquet"


@contextlib.contextmanager
def writer(store: Store, part: Part) -> Iterator[_Writer]:
    made = _Writer(store, f"data/{part.name}")
    try:
        yield made
    finally:
        made.over = True


@dataclass
class _Writer:
    store: Store
    folder: str
    over: bool = False
    """The part has ended, or failed: what its threads still bring is for nobody, and a store that is away would hold them for hours."""

    def add(self, name: str, data: bytes) -> None:
        if not self.over:
            self.store.put(f"{self.folder}/{name}", data)

    def commit_object(self, images: pa.Table, errors: pa.Table) -> bytes:
        return table_bytes(images, errors)


def read(file: BinaryIO) -> Committed:
    with damage_named():
        data = file.read()
    images, errors = read_table(data)
    names = ["" if name is None else name for name in images.column("file_name").to_pylist()]
    return Committed(images, errors, names, [NOWHERE] * len(names), hashlib.sha256(data).hexdigest())


@dataclass(frozen=True)
class _Pictures:
    store: Store

    def read(self, key: str, name: str, place: Place) -> bytes:
        return self.store.read(picture_key(key, name))


def pictures(store: Store) -> _Pictures:
    return _Pictures(store)


def picture_key(key: str, name: str) -> str:
    return f"{key.rpartition('/')[0]}/{name}"


def views(part: Part, images: pa.Table, errors: pa.Table) -> dict[str, bytes]:
    return {}


def problems(file: BinaryIO, committed: Committed) -> Iterator[str]:
    return iter(())
