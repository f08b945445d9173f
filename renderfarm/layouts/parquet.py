"""Layout `parquet`: data/part-00000012.parquet, pictures inside, as Hugging Face stores them.

Column `image` is a struct of `bytes` and `path`, and the schema's metadata says that it is a picture, so that `datasets` decodes
it by itself; `file_name` is null. The file is the commit. Its footer carries the part's error rows.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import struct
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from renderfarm.layouts.base import Committed, Place, Spool, checked, damage_named, footer, local_disk
from renderfarm.records import Part
from renderfarm.storage import Store

TABLES = "data/*.parquet"
IMAGE = "image"
TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
HUGGING_FACE = {b"huggingface": json.dumps({"info": {"features": {IMAGE: {"_type": "Image"}}}}).encode()}
GROUP_BYTES = 32 << 20
"""Of pictures in a row group: what a reader fetches for one row, and holds. The Hub's viewer wants them below 100 MB."""
GROUPS_HELD = 2
PIECE = 1 << 20


def commit_key(part: Part) -> str:
    return f"data/{part.name}.parquet"


# ---------------------------------------------------------------------------------------------------------- write


@contextlib.contextmanager
def writer(store: Store, part: Part) -> Iterator[_Writer]:
    with contextlib.closing(Spool(store)) as spool:
        yield _Writer(spool)


class _Writer:
    def __init__(self, spool: Spool) -> None:
        self._spool = spool
        self.add = spool.add

    def commit_object(self, images: pa.Table, errors: pa.Table) -> Path:
        """Written to this machine's disk, since a ParquetWriter on a store publishes what it has when it fails."""
        names = images.column("file_name").to_pylist()
        index = images.schema.get_field_index("file_name")
        table = images.set_column(index, images.schema.field(index), pa.nulls(len(images), pa.string()))
        schema = pa.schema([pa.field(IMAGE, TYPE), *table.schema], HUGGING_FACE | (footer(errors) or {}))
        plain = table.column_names  # a dictionary or statistics of pictures would be a copy of them
        options = {"compression": _codecs(schema), "use_dictionary": plain, "write_statistics": plain}
        options |= {"write_batch_size": 1}  # else a row group's pictures make one page, which is put together in memory once more
        path = self._spool.commit_object(".parquet")
        sizes = [self._spool.size(name) for name in names]
        with local_disk(path), pq.ParquetWriter(path, schema, **options) as file:
            for start, stop in _groups(sizes):
                pictures = pa.chunked_array([_picture(name, self._spool.read(name)) for name in names[start:stop]])
                columns = [pictures, *table.slice(start, stop - start).combine_chunks().columns]
                file.write_table(pa.Table.from_arrays(columns, schema=schema), row_group_size=stop - start)
                self._spool.underway()
        return path


def _picture(name: str, data: bytes) -> pa.Array:
    """One row of column `image`, whose bytes are `data` itself: to gather a row group's would copy them once more."""
    held = pa.Array.from_buffers(pa.binary(), 1, [None, pa.py_buffer(struct.pack("=2i", 0, len(data))), pa.py_buffer(data)])
    return pa.StructArray.from_arrays([held, pa.array([name])], fields=list(TYPE))


def _codecs(schema: pa.Schema) -> dict[str, str]:
    """By leaf column. Pictures are compressed already: zstd would take a tenth of a PNG's own time, for nothing."""
    empty = io.BytesIO()
    pq.write_metadata(schema, empty)
    leaves = pq.ParquetFile(empty).schema
    paths = (leaves.column(index).path for index in range(len(leaves)))
    return {path: "none" if path == f"{IMAGE}.bytes" else "zstd" for path in paths}


def _groups(sizes: list[int]) -> Iterator[tuple[int, int]]:
    """Spans of rows whose pictures make a row group; at least one picture each."""
    start = held = 0
    for index, size in enumerate(sizes):
        if index > start and held + size > GROUP_BYTES:
            yield start, index
            start, held = index, 0
        held += size
    yield start, len(sizes)


# ----------------------------------------------------------------------------------------------------------- read


def read(file: BinaryIO) -> Committed:
    """Reads no picture, however large the file is."""
    with damage_named():
        parquet = _open(file)
        names = [name for name in parquet.schema_arrow.names if name != IMAGE]
        table = parquet.read(columns=[*names, f"{IMAGE}.path"], use_threads=False)
        paths = table.column(IMAGE).combine_chunks().field("path").to_pylist()
        rows = [parquet.metadata.row_group(group).num_rows for group in range(parquet.metadata.num_row_groups)]
        sha256 = _hash(file, _picture_spans(parquet.metadata))
        images, errors = checked(table.drop_columns([IMAGE]))
    places = [(group, index) for group, count in enumerate(rows) for index in range(count)]
    return Committed(images, errors, ["" if path is None else path for path in paths], places, sha256)


def _open(file: BinaryIO) -> pq.ParquetFile:
    return pq.ParquetFile(file, pre_buffer=False)


def _picture_spans(metadata: pq.FileMetaData) -> list[tuple[int, int]]:
    """Where the pictures' bytes begin and end in the file, ascending."""
    spans = []
    for group in range(metadata.num_row_groups):
        chunks = metadata.row_group(group)
        for chunk in (chunks.column(index) for index in range(chunks.num_columns)):
            if chunk.path_in_schema == f"{IMAGE}.bytes":
                spans.append((chunk.data_page_offset, chunk.data_page_offset + chunk.total_compressed_size))
    return sorted(spans)


def _hash(file: BinaryIO, without: list[tuple[int, int]]) -> str:
    sha256 = hashlib.sha256()
    for start, stop in itertools.pairwise([0, *itertools.chain(*without), file.seek(0, 2)]):
        if (start, stop) in without:
            continue
        file.seek(start)
        while start < stop and (piece := file.read(min(PIECE, stop - start))):
            sha256.update(piece)
            start += len(piece)
    return sha256.hexdigest()


class _Pictures:
    """Holds the row groups that were read last, since neighbours are read together."""

    def __init__(self, store: Store) -> None:
        self._store, self._lock = store, threading.Lock()
        self._held: OrderedDict[tuple[str, int], pa.ChunkedArray] = OrderedDict()

    def read(self, key: str, name: str, place: Place) -> bytes:
        group, index = place
        with self._lock:
            if (key, group) not in self._held:
                while len(self._held) >= GROUPS_HELD:
                    self._held.popitem(last=False)
                self._held[key, group] = self._read(key, group)
            self._held.move_to_end((key, group))
            column = self._held[key, group]
        with damage_named():
            data = column[index].as_py()["bytes"]
        if data is None:
            raise KeyError(name)
        return bytes(data)

    def _read(self, key: str, group: int) -> pa.ChunkedArray:
        with self._store.open(key) as file, damage_named():
            return _open(file).read_row_group(group, columns=[IMAGE], use_threads=False).column(IMAGE)


def pictures(store: Store) -> _Pictures:
    return _Pictures(store)


def picture_key(key: str, name: str) -> str:
    return f"{key}/{name}"


def views(part: Part, images: pa.Table, errors: pa.Table) -> dict[str, bytes]:
    return {}


def problems(file: BinaryIO, committed: Committed) -> Iterator[str]:
    return iter(())
