"""The manifest: Parquet files in, rows with canonical column names out, in bounded memory.

`open_manifest` reads footers only and checks everything a footer can show; `Manifest.stream` yields the wanted row
ranges in order. In the tables it yields, the ordinal is `row`, an argument has diffusers' name, and a column of the
user's own is prefixed (`EXTRA`), so that no name of his can be taken for one of ours.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from renderfarm.arguments import ARGUMENTS, IMAGE, OUR_OWN, PRESETS, accepts
from renderfarm.config import ManifestSpec, expand_env
from renderfarm.config.render import LOOKALIKES
from renderfarm.errors import Fatal, InvalidJob, Transient
from renderfarm.schema import OUR_COLUMNS, output_name
from renderfarm.storage import PATIENCE_S, find_files, open_file

ROW = "row"
EXTRA = "input:"
BATCH_ROWS = 4096
BATCH_BYTES = 32 << 20  # about: by what its row groups hold on the average
IDS_LOOKED_AT = 1_000_000
MAX_ORDINAL = 2**62


@dataclass(frozen=True)
class ManifestFile:
    """One file's place and identity. `footer_sha256` covers schema, row groups and statistics."""

    path: str
    bytes: int
    rows: int
    footer_sha256: str


@dataclass(frozen=True)
class Manifest:
    """Files in order, the column read for each argument, and the user's own columns."""

    files: tuple[ManifestFile, ...]
    columns: dict[str, str]
    extras: pa.Schema
    where: dict[str, Any] | None = None
    patience_s: float = PATIENCE_S
    """With the store of files that are streamed."""
    place: Callable[[int], str] | None = dataclasses.field(default=None, compare=False)
    """Where a row comes from, if these files were made of something else."""

    @property
    def rows(self) -> int:
        return sum(file.rows for file in self.files)

    def fingerprint(self) -> list[dict[str, Any]]:
        """What must not change under a job: names (without folders), sizes, row counts, footers' hashes."""
        return [{**vars(file), "path": file.path.rsplit("/", 1)[-1]} for file in self.files]

    def where_is(self, ordinal: int) -> str:
        """`FILE, row N` (N counts from 0 in that file) for messages."""
        if self.place is not None:
            return self.place(ordinal)
        for file in self.files:
            if ordinal < file.rows:
                return f"{file.path.rsplit('/', 1)[-1]}, row {ordinal}"
            ordinal -= file.rows
        return f"row {ordinal}"

    def hints(self) -> list[str]:
        """Columns that travel as the user's own although their names look like arguments'."""
        found = []
        for name in self.extras.names:
            bare = name.lower().replace(" ", "_")
            near = LOOKALIKES.get(bare) or next(iter(difflib.get_close_matches(bare, list(ARGUMENTS), n=1, cutoff=0.85)), None)
            if near and near not in self.columns:
                found.append(
                    f"column {name!r} is not read as an argument; if it is {near}, say so in the job: "
                    f"manifest: {{path: …, columns: {{{near}: {name}}}}}"
                )
        return found

    def repeated_ids(self) -> int:
        """Rows whose id an earlier row has. Reads that column alone; where `where` or millions of rows make it dear, says 0."""
        if "id" not in self.columns or self.where is not None or self.rows > IDS_LOOKED_AT:
            return 0
        alone = replace(self, columns={"id": self.columns["id"]}, extras=pa.schema([]))
        ids = pa.concat_tables(alone.stream([(0, self.rows)]), promote_options="permissive").column("id")
        distinct: int = pc.count_distinct(ids).as_py()
        return len(ids) - int(ids.null_count) - distinct

    def stream(self, ranges: Iterable[tuple[int, int]]) -> Iterator[pa.Table]:
        """One table per `[start, stop)` range of ordinals; ranges ascend and do not overlap. `where` is applied."""
        source = _Cursor(self)
        for start, stop in ranges:
            yield self._select(source.take(start, stop))

    def _select(self, table: pa.Table) -> pa.Table:
        if self.where is None:
            return table
        keep = pa.array(np.ones(len(table), dtype=bool))
        for name, wanted in self.where.items():
            column = table.column(_find_column(name, table))
            test = pa.array(_in_ranges(column.to_numpy(), str(wanted))) if name == ROW else _is_one_of(column, name, wanted)
            keep = pc.and_(keep, test)
        return table.filter(keep)


def _find_column(name: str, table: pa.Table) -> str:
    for candidate in (name, EXTRA + name):
        if candidate in table.column_names:
            return candidate
    known = [column.removeprefix(EXTRA) for column in table.column_names]
    raise InvalidJob(f"manifest.where: no column {name!r}{_did_you_mean(name, known)}")


def _is_one_of(column: pa.ChunkedArray, name: str, wanted: Any) -> pa.Array:
    values = wanted if isinstance(wanted, list) else [wanted]
    if pa.types.is_null(column.type):  # a file in which the column is all gaps; no value can be cast to that
        return pa.array(np.full(len(column), None in values))
    try:
        return pc.fill_null(pc.is_in(column, value_set=pa.array(values).cast(column.type)), False)
    except (pa.ArrowException, OverflowError, TypeError):
        raise InvalidJob(
            f"manifest.where: {name} has type {column.type}, which {wanted!r} does not fit; give values of that type"
        ) from None


def parse_ranges(text: str, name: str = "manifest.where.row") -> list[range]:
    """`1-3,5,7-20:2` as OpenJD writes it: both ends belong to a range, `:2` is the stride."""
    found = []
    for piece in text.split(","):
        try:
            span, _, stride = piece.strip().partition(":")
            first, dash, last = span.partition("-")
            start, end, step = int(first), int(last if dash else first), int(stride or 1)
            if step < 1 or end < start:
                raise ValueError
        except ValueError:
            raise InvalidJob(f"{name}: {piece.strip()!r} is not a range; write rows as 0-199,300,400-500:2") from None
        found.append(range(start, end + 1, step))
    return found


def _in_ranges(ordinals: np.ndarray, text: str) -> np.ndarray:
    keep = np.zeros(len(ordinals), dtype=bool)
    for wanted in parse_ranges(text):
        if wanted.start > MAX_ORDINAL:
            continue
        wanted = range(wanted.start, min(wanted.stop, MAX_ORDINAL), wanted.step)
        keep |= (ordinals >= wanted.start) & (ordinals < wanted.stop) & ((ordinals - wanted.start) % wanted.step == 0)
    return keep


class _Cursor:
    """Reads forward through the files and hands out row ranges; skips row groups that nobody wants."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.file_index, self.file_start = 0, 0
        self.parquet: pq.ParquetFile | None = None
        self.group_starts: list[int] = []
        self.batches: Iterator[pa.RecordBatch] | None = None
        self.position = 0  # ordinal of the next row that `batches` yields
        self.left: pa.Table | None = None  # rows read beyond the last range

    def take(self, start: int, stop: int) -> pa.Table:
        pieces, need = [], start
        while need < stop:
            table, first = self._next_rows(need)
            inside = table.slice(need - first, min(stop, first + len(table)) - need)
            pieces.append(inside)
            need += len(inside)
            rest = first + len(table) - need
            self.left = table.slice(len(table) - rest) if rest else None
        # an argument's type may be wider in one file than in another (int32 and int64, all null)
        return pa.concat_tables(pieces, promote_options="permissive")

    def _next_rows(self, need: int) -> tuple[pa.Table, int]:
        """A table that holds row `need`, and the ordinal of its first row."""
        if self.left is not None:
            first = self.position - len(self.left)
            if need < self.position:
                return self.left, first
            self.left = None
        while True:
            self._seek(need)
            assert self.batches is not None
            file = self.manifest.files[self.file_index]
            try:
                batch = next(self.batches)
            except StopIteration:
                raise Fatal(f"{file.path} ends before its footer says; it was changed or damaged: restore it and run again") from None
            except (pa.ArrowException, OSError, ValueError) as error:
                raise Fatal(
                    f"{file.path}: damaged near row {self.position - self.file_start}: {_one_line(error)}; restore the file and run again"
                ) from None
            first, self.position = self.position, self.position + len(batch)
            if need < self.position:
                return _canonical(pa.Table.from_batches([batch]), first, self.manifest), first

    def _seek(self, need: int) -> None:
        """Open the file with row `need`, at the row group with it, unless reading on gets there."""
        files = self.manifest.files
        while need >= self.file_start + files[self.file_index].rows:
            self.file_start += files[self.file_index].rows
            self.file_index += 1
            self.parquet = self.batches = None
        if self.parquet is None:
            self.parquet = _open_parquet(files[self.file_index].path, self.manifest.patience_s)
            metadata = self.parquet.metadata
            self.group_starts = [0]
            for group in range(metadata.num_row_groups):
                self.group_starts.append(self.group_starts[-1] + metadata.row_group(group).num_rows)
        group = int(np.searchsorted(self.group_starts, need - self.file_start, side="right")) - 1
        group_start = self.file_start + self.group_starts[group]
        if self.batches is None or self.position < group_start:
            groups = list(range(group, self.parquet.metadata.num_row_groups))
            columns = [*self.manifest.columns.values(), *self.manifest.extras.names]
            self.batches = self.parquet.iter_batches(_batch_rows(self.parquet), row_groups=groups, columns=columns, use_threads=False)
            self.position = group_start


def _batch_rows(parquet: pq.ParquetFile) -> int:
    """Rows to read at a time: a row may hold a photograph."""
    groups = map(parquet.metadata.row_group, range(parquet.metadata.num_row_groups))
    largest = max((group.total_byte_size // group.num_rows for group in groups if group.num_rows), default=0)
    return max(1, min(BATCH_ROWS, BATCH_BYTES // max(1, largest)))


def _canonical(table: pa.Table, first: int, manifest: Manifest) -> pa.Table:
    # safe=False: no value changes here, and text that is not UTF-8 passes, to cost its own row only (see samples)
    columns = {ROW: pa.array(np.arange(first, first + len(table), dtype=np.int64))}
    for argument, name in manifest.columns.items():
        column = table.column(name)
        columns[argument] = column.cast(_plain(column.type), safe=False)
    for field in manifest.extras:
        columns[EXTRA + field.name] = table.column(field.name).cast(field.type, safe=False)
    return pa.table(columns)


def open_manifest(spec: ManifestSpec, supported: frozenset[str]) -> Manifest:
    """Find the files, read their footers, map their columns. `supported`: the arguments the model takes.

    Raises InvalidJob for whatever can be known without reading a row.
    """
    paths = manifest_files(spec)
    files, schema = [], None
    types: dict[str, pa.DataType] = {}
    for path in paths:
        parquet = _open_parquet(path)
        found = parquet.schema_arrow
        if len(set(found.names)) != len(found.names):
            raise InvalidJob(f"{path}: two columns have the same name; rename one")
        if schema is None:
            schema, columns = found, _map_columns(spec, found, path, supported)
            not_extra = {*columns.values(), *(OUR_COLUMNS if spec.columns == OUR_OWN else ())}
        _check_columns(found, schema, path)
        _check_arguments(found, columns, types, path)
        _check_extras(found, schema, not_extra, path)
        files.append(_describe(path, parquet))
    assert schema is not None
    if sum(file.rows for file in files) == 0:
        raise InvalidJob(f"{files[0].path}: the manifest has no rows; write at least one prompt")
    extras = pa.schema([pa.field(field.name, _plain(field.type)) for field in schema if field.name not in not_extra])
    manifest = Manifest(tuple(files), columns, extras, spec.where)
    if spec.where is not None:  # a mistake in it shows here, before anything is written
        empty = pa.schema([pa.field(field.name, _plain(field.type)) for field in schema]).empty_table()
        manifest._select(_canonical(empty, 0, manifest))
    return manifest


def _plain(type_: pa.DataType) -> pa.DataType:
    """Extension types travel as what they store; dictionary-encoded text, and views of it, as text."""
    if isinstance(type_, pa.BaseExtensionType):
        type_ = type_.storage_type
    if pa.types.is_dictionary(type_):
        type_ = type_.value_type
    return pa.string() if pa.types.is_string_view(type_) else pa.binary() if pa.types.is_binary_view(type_) else type_


def column_types(manifest: Manifest) -> dict[str, pa.DataType]:
    """Of all files' columns together, by their own names."""
    schemas = [_open_parquet(file.path).schema_arrow for file in manifest.files]
    plain = [pa.schema([pa.field(field.name, _plain(field.type)) for field in schema]) for schema in schemas]
    return {field.name: field.type for field in pa.unify_schemas(plain, promote_options="permissive")}


def manifest_files(spec: ManifestSpec) -> list[str]:
    """The paths or URLs that a job's manifest names. Raises InvalidJob where there are none."""
    found: list[str] = []
    for given in spec.paths:
        path = expand_env(given)
        if re.match("https?://.*[?#]", path):  # not in stores, where `?` is a pattern
            raise InvalidJob(f"manifest {re.split('[?#]', path)[0]}: leave the URL's query out; it would be written into the output")
        try:
            matches, is_folder = find_files(path)
        except Transient as error:
            raise type(error)(f"manifest {path}: {error}") from error
        except Fatal as error:
            raise InvalidJob(f"manifest {path}: {error}") from error
        if is_folder:
            matches = [name for name in matches if name.endswith(".parquet")]
            if not matches:
                raise InvalidJob(f"manifest {path}: the folder holds no .parquet file; give the folder that does")
        elif not matches and any(sign in path for sign in "*?["):
            raise InvalidJob(f"manifest {path}: no file matches; patterns are relative to the job file")
        elif not matches:
            raise InvalidJob(f"manifest {path}: no such file; paths are relative to the job file")
        found += matches
    if twice := [name for name, count in Counter(found).items() if count > 1]:
        raise InvalidJob(f"manifest: {twice[0]} is named twice, so its rows would be rendered twice; name it once")
    return found


def _open_parquet(path: str, patience_s: float = PATIENCE_S) -> pq.ParquetFile:
    try:
        file = open_file(path, patience_s)
        # streaming settings: a row group of millions of rows must not be buffered whole
        parquet = pq.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20, page_checksum_verification=True)
    except KeyError:
        raise InvalidJob(f"manifest {path}: the file is gone") from None
    except (pa.ArrowException, ValueError) as error:
        raise InvalidJob(f"manifest {path}: not a readable Parquet file ({_one_line(error)}); write it again") from None
    except OSError as error:
        if error.strerror is None:  # pyarrow reports damaged thrift as a bare OSError
            raise InvalidJob(f"manifest {path}: not a readable Parquet file ({_one_line(error)}); write it again") from None
        if isinstance(error, IsADirectoryError | NotADirectoryError | PermissionError):
            raise InvalidJob(f"manifest {path}: {error.strerror}; give Parquet files that you may read") from None
        raise Transient(f"manifest {path}: {error.strerror}") from error
    metadata = parquet.metadata
    if metadata.num_rows != sum(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)):
        raise InvalidJob(f"manifest {path}: not a readable Parquet file (its row counts disagree); write it again")
    return parquet


def _describe(path: str, parquet: pq.ParquetFile) -> ManifestFile:
    with open_file(path) as file:
        size = file.seek(-8, os.SEEK_END) + 8
        file.seek(-8 - int.from_bytes(file.read(4), "little"), os.SEEK_END)
        footer = file.read()
    return ManifestFile(path, size, parquet.metadata.num_rows, hashlib.sha256(footer).hexdigest())


def _map_columns(spec: ManifestSpec, schema: pa.Schema, path: str, supported: frozenset[str]) -> dict[str, str]:
    """Which of the file's columns is read for which argument."""
    names = schema.names
    columns = {name: name for name in names if name in ARGUMENTS}
    if isinstance(spec.columns, str):
        if spec.columns not in PRESETS:
            raise InvalidJob(f"manifest.columns: no preset {spec.columns!r}; known: {', '.join(PRESETS)}")
        columns = {argument: name for argument, name in PRESETS[spec.columns].items() if name in names}
        if spec.columns == OUR_OWN:  # our tables have a column for each that some model takes
            columns = {argument: name for argument, name in columns.items() if argument in supported or ARGUMENTS[argument] == IMAGE}
    asked = spec.columns if isinstance(spec.columns, dict) else {}
    for argument, name in asked.items():
        if argument not in ARGUMENTS:
            raise InvalidJob(f"manifest.columns: {argument!r} is not an argument{_did_you_mean(argument, list(ARGUMENTS))}")
        if name is None:
            columns.pop(argument, None)
        elif name not in names:
            raise InvalidJob(f"{path}: no column {name!r} for {argument}{_did_you_mean(name, names)}")
        else:
            columns = {a: n for a, n in columns.items() if n != name or a in asked} | {argument: name}
    if twice := [name for name, count in Counter(columns.values()).items() if count > 1]:
        raise InvalidJob(f"manifest.columns: column {twice[0]!r} is given to two arguments; copy it in the table under another name")
    if "prompt" not in columns:
        raise InvalidJob(
            f"{path}: no column `prompt` (it has: {', '.join(names)}); "
            "if the prompts are in another one, say so in the job: "
            f"manifest: {{path: …, columns: {{prompt: {names[0] if names else 'caption'}}}}}"
        )
    for argument, name in columns.items():
        if argument not in supported and ARGUMENTS[argument] == IMAGE:  # images decide the task; of the others each row is asked
            raise InvalidJob(
                f"{path}: column {name!r} is the argument `{argument}`, which this model does not take here; "
                f"drop it, or let it travel as a plain column: manifest: {{columns: {{{argument}: null}}}}"
            )
    return columns


def _check_columns(found: pa.Schema, first: pa.Schema, path: str) -> None:
    for name in first.names:
        if name not in found.names:
            raise InvalidJob(f"{path}: column {name!r} is missing, which the first file has; files of one manifest share their columns")
    for name in found.names:
        if name not in first.names:
            raise InvalidJob(f"{path}: column {name!r} is not in the first file; files of one manifest share their columns: add or drop it")


def _check_arguments(found: pa.Schema, columns: dict[str, str], types: dict[str, pa.DataType], path: str) -> None:
    """`types`: what each argument had in the files before; a column of gaps alone fits any."""
    for argument, name in columns.items():
        type_ = _plain(found.field(name).type)
        if not accepts(ARGUMENTS[argument], type_):
            raise InvalidJob(f"{path}: column {name!r} has type {type_}, but {argument} must be {ARGUMENTS[argument]}; cast the column")
        before = types.get(argument, pa.null())
        if pa.types.is_null(before):
            types[argument] = type_
        elif not pa.types.is_null(type_) and _kind(type_) != _kind(before):
            raise InvalidJob(f"{path}: column {name!r} has type {type_}, in a file before it {before}; cast one of them")


def _kind(type_: pa.DataType) -> str:
    """Types of one kind can be joined without changing a value; integers beside floats cannot, beyond 2^53."""
    if pa.types.is_floating(type_):
        return "float"
    if pa.types.is_integer(type_) and type_ != pa.uint64():
        return "integer"
    return "text" if pa.types.is_string(type_) or pa.types.is_large_string(type_) else str(type_)


def _check_extras(found: pa.Schema, first: pa.Schema, not_extra: set[str], path: str) -> None:
    outputs: dict[str, str] = {}
    for field in first:
        if field.name in not_extra:
            continue
        if (other := outputs.setdefault(output_name(field.name), field.name)) != field.name:
            raise InvalidJob(
                f"{path}: columns {other!r} and {field.name!r} would both be {output_name(field.name)!r} in the output; rename one"
            )
        if found.field(field.name).type != field.type:
            raise InvalidJob(
                f"{path}: column {field.name!r} has type {found.field(field.name).type}, in the first file {field.type}; cast one of them"
            )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _did_you_mean(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; there are: {', '.join(known)}"
