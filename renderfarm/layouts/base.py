"""What a layout is, and what all of them share: names, the tables' bytes, the spool.

A layout says how a part's pictures and table become keys in a store. Its commit object is one key, created if absent; it names
every image of the part, carries the part's error rows, and can be read without its pictures. A part without any image has
no such object: its error table is the commit, in every layout.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import re
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from renderfarm.errors import Fatal
from renderfarm.records import Part, PartId, SampleKey
from renderfarm.schema import ARGUMENT_COLUMNS, ERROR_COLUMNS, ERRORS_KEY, GIVEN_BY, IMAGE_COLUMNS, errors_from_json, errors_to_json
from renderfarm.storage import Store
from renderfarm.storage.local import LocalStore, start_writing

Place = tuple[int, int]
"""Where in a commit object a picture lies. What the numbers mean, only its layout knows."""
NOWHERE = (0, 0)
_VIEW = {b"renderfarm.view": b"1"}


@dataclass(frozen=True)
class Committed:
    """A commit object without its pictures. `names`, `places`: of each row's picture.

    `sha256`: of the object's bytes that are no picture; the table has the pictures' own.
    """

    images: pa.Table
    errors: pa.Table
    names: Sequence[str]
    places: Sequence[Place]
    sha256: str


class PartWriter(Protocol):
    """Takes a part's encoded pictures as they come, in any order and from any thread."""

    def add(self, name: str, data: bytes) -> None: ...

    def commit_object(self, images: pa.Table, errors: pa.Table) -> bytes | Path:
        """`images`: sorted by sample, each one's `file_name` having been added. Same tables and pictures, same bytes."""


class Pictures(Protocol):
    """Reads pictures out of commit objects."""

    def read(self, key: str, name: str, place: Place) -> bytes:
        """`key`: of the commit object. Raises KeyError for what is gone, Fatal for what cannot be read."""


class Layout(Protocol):
    """A module of this package. `TABLES`: glob of the tables that other people's readers open."""

    TABLES: str

    def commit_key(self, part: Part) -> str: ...

    def writer(self, store: Store, part: Part) -> AbstractContextManager[PartWriter]: ...

    def read(self, file: BinaryIO) -> Committed:
        """Raises Fatal for a commit object that is damaged: it was whole when it was created."""

    def pictures(self, store: Store) -> Pictures: ...

    def picture_key(self, key: str, name: str) -> str:
        """Where a picture of the commit object `key` is, for people."""

    def views(self, part: Part, images: pa.Table, errors: pa.Table) -> dict[str, bytes]:
        """What is derived from a commit object for readers, beside the error view."""

    def problems(self, file: BinaryIO, committed: Committed) -> Iterator[str]:
        """What else is wrong with a commit object, pictures' own bytes aside."""


# ---------------------------------------------------------------------------------------------------------- names


def part_of(key: str) -> PartId | None:
    """The part that a table's key names."""
    match = re.match(r"(?:data|errors)/part-(\d+)(?:\.r([1-9]\d*))?(?:/|\.(?!r\d))", key)
    return PartId(int(match[1]), int(match[2] or 0)) if match else None


def name_of(key: SampleKey, file_sha256: str, extension: str) -> str:
    """Names come from the ordinal and the file's bytes, never from user ids: what another attempt writes overwrites nothing, even where the
    same pixels became other bytes (another encoder's version, another profile's name in them, a signature)."""
    return f"{key.row:010d}-{key.image_index:04d}-{file_sha256[:8]}.{extension}"


def original_key(part: Part, file_name: str) -> str:
    """Not in `data`, where readers take every image for one of the dataset."""
    return f"originals/{part.name}/{file_name}"


def errors_key(part: Part) -> str:
    return f"errors/{part.name}.parquet"


# --------------------------------------------------------------------------------------------------------- tables


def table_bytes(images: pa.Table, errors: pa.Table) -> bytes:
    """A part's whole table; its footer carries the part's error rows. Same tables, same bytes."""
    return parquet_bytes(images.replace_schema_metadata(footer(errors)))


def footer(errors: pa.Table) -> dict[bytes, bytes] | None:
    return {ERRORS_KEY: errors_to_json(errors)} if len(errors) else None


def errors_bytes(errors: pa.Table) -> bytes:
    """The commit of a part without any image."""
    return parquet_bytes(errors)


def error_view_bytes(errors: pa.Table) -> bytes:
    """The same under the same key for a part that has images, and no commit: it must not pass for one when they are lost."""
    return parquet_bytes(errors.replace_schema_metadata(_VIEW))


def parquet_bytes(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def read_table(data: bytes) -> tuple[pa.Table, pa.Table]:
    """(images, errors) of `table_bytes`. Raises Fatal for damaged ones."""
    with damage_named():
        return checked(read_parquet(data))


def checked(table: pa.Table) -> tuple[pa.Table, pa.Table]:
    """(images, errors) of a table with `footer` as its metadata. Raises ValueError and its kin where readers could not rely on it."""
    given = {GIVEN_BY.get(name, name) for name in ARGUMENT_COLUMNS.names if name in table.column_names}
    _check_columns(table, [*IMAGE_COLUMNS, *(field for field in ARGUMENT_COLUMNS if GIVEN_BY.get(field.name, field.name) in given)])
    packed = (table.schema.metadata or {}).get(ERRORS_KEY)
    errors = errors_from_json(packed) if packed else ERROR_COLUMNS.empty_table()
    _check_columns(errors, ERROR_COLUMNS)
    return table.replace_schema_metadata(None), errors


def read_errors(data: bytes) -> pa.Table:
    """Raises Fatal for a damaged one."""
    with damage_named():
        errors = read_parquet(data)
        _check_columns(errors, ERROR_COLUMNS)
    return errors


def read_errors_only(file: BinaryIO) -> Committed:
    """The commit of a part without any image. Raises KeyError for a view."""
    with damage_named():
        data = file.read()
    errors = read_errors(data)
    if _VIEW.items() <= (errors.schema.metadata or {}).items():
        raise KeyError("a view")
    return Committed(IMAGE_COLUMNS.empty_table(), errors, (), (), hashlib.sha256(data).hexdigest())


@contextlib.contextmanager
def damage_named() -> Iterator[None]:
    """Turns what Arrow, JSON and our own look-ups raise for damaged data into one Fatal."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, TypeError, AttributeError, OverflowError, LookupError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise Fatal(
            f"a committed table is damaged ({reason}); restore it from a copy, or `renderfarm run JOB --repair` mends it"
        ) from error


def _check_columns(table: pa.Table, wanted: Iterable[pa.Field]) -> None:
    """Raises ValueError where the table lacks a column that every reader relies on, or has it otherwise."""
    for field in wanted:
        index = table.schema.get_field_index(field.name)
        if index < 0:
            raise ValueError(f"no column {field.name}")
        column = table.column(index)
        if column.type != field.type:
            raise ValueError(f"column {field.name} is {column.type}, not {field.type}")
        if column.null_count and not field.nullable:
            raise ValueError(f"column {field.name} has gaps")
    table.validate(full=True)


def read_parquet(data: bytes) -> pa.Table:
    """In this thread and from Arrow's own buffer: read_table's threads may still let go of a Python file object while
    the interpreter ends, which aborts the process."""
    return pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False)


# ---------------------------------------------------------------------------------------------------------- spool


class Spool:
    """A part's pictures until its commit object is made of them: in memory as far as MEMORY goes, the others in a file on this machine's
    disk, since a few parts of them may be more than memory holds.

    The file has no name, so that nothing is left of it however the process ends.
    """

    MEMORY = 128 << 20

    def __init__(self, store: Store) -> None:
        self._store, self._lock, self._closed = store, threading.Lock(), False
        self._held: dict[str, bytes] = {}
        self._room = self.MEMORY
        self._file: IO[bytes] | None = None
        self._at: dict[str, Place] = {}
        self._object: Path | None = None
        self._begun = 0

    def add(self, name: str, data: bytes) -> None:
        with self._lock:
            if self._closed:  # the part has failed; what its threads still bring is for nobody
                return
            if len(data) <= self._room:
                self._room -= len(data)
                self._held[name] = data
                return
            with local_disk():
                self._file = self._file or tempfile.TemporaryFile()  # noqa: SIM115 - closed by `close`
                self._at[name] = self._file.seek(0, io.SEEK_END), len(data)
                self._file.write(data)

    def size(self, name: str) -> int:
        return len(self._held[name]) if name in self._held else self._at[name][1]

    def read(self, name: str) -> bytes:
        if name in self._held:
            return self._held[name]
        offset, size = self._at[name]
        assert self._file is not None
        with self._lock, local_disk():
            self._file.seek(offset)
            return self._file.read(size)

    def commit_object(self, suffix: str) -> Path:
        """A file for the part's commit object, gone when the spool is closed."""
        self._remove_object()
        with local_disk():
            self._object, self._begun = self._store.scratch(suffix), 0
        return self._object

    def underway(self) -> None:
        """More of the commit object is written. In a folder its create waits until the disk has all of it, which may begin now."""
        if isinstance(self._store, LocalStore) and self._object is not None:
            self._begun = start_writing(self._object, self._begun)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._held.clear()
            if self._file is not None:
                with contextlib.suppress(OSError):  # of what a full disk did not take: nobody wants it any more
                    self._file.close()
            self._remove_object()

    def _remove_object(self) -> None:
        if self._object is not None:
            self._object.unlink(missing_ok=True)


@contextlib.contextmanager
def local_disk(path: Path | None = None) -> Iterator[None]:
    """`path`: what is written; None: the spool."""
    try:
        yield
    except OSError as error:
        temporary = Path(tempfile.gettempdir())
        folder = temporary if path is None else path.parent
        another = ", or name another folder by TMPDIR," if folder == temporary else ""
        raise Fatal(
            f"cannot keep a part's pictures in {folder} until it is committed: {error.strerror or error}; free some "
            f"space there{another} and run again (nothing committed is lost)"
        ) from error
