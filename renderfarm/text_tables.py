"""Prompts that people keep as text: CSV, JSON Lines, one prompt a line, or rows in the job itself. They become one Parquet file.

A column's type is what all its values are: whole numbers, numbers, true and false, else text. Of a CSV, what is to be text stays text
(`007`, too), and an empty cell says nothing (null). A file is read twice, some thousand rows at a time: for its types, and for its
rows. Every mistake is named with its line.
"""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from renderfarm.errors import Fatal, InvalidJob, Transient
from renderfarm.storage import open_file

KINDS = {".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".ndjson": "json", ".txt": "lines"}
ROWS_AT_A_TIME = 8192
EXACT = 2**53  # whole numbers up to it are floats, too
TRUTH = {"true": True, "false": False}


class Line(NamedTuple):
    place: str  # `prompts.csv, line 3`
    cells: dict[str, Any]


Lines = Callable[[], Iterator[Line]]


@dataclass(frozen=True)
class TextFile:
    path: str
    bytes: int
    sha256: str


def kind_of(path: str) -> str | None:
    """`csv`, `json` or `lines`; None for what is no text."""
    return KINDS.get(Path(path).suffix.lower())


def describe(path: str) -> TextFile:
    """Raises InvalidJob for a file that is gone or cannot be read."""
    digest, size = hashlib.sha256(), 0
    with _open(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
            size += len(block)
    return TextFile(path, size, digest.hexdigest())


def convert(paths: list[str], target: Path, texts: Collection[str]) -> None:
    """Write the rows of all files, in order, as one Parquet file. `texts`: columns of a CSV that are text whatever is in them.

    Raises InvalidJob that names file and line.
    """
    kind = kind_of(paths[0]) or ""
    if other := next((path for path in paths if kind_of(path) != kind), None):
        raise InvalidJob(f"manifest {other}: files of one manifest are of one kind; {_name(paths[0])} is of another")
    if kind == "csv":
        _check_columns(paths)
    _write(lambda: itertools.chain.from_iterable(map(_READERS[kind], paths)), target, texts, paths[0])


def convert_rows(rows: list[str | dict[str, Any]], target: Path) -> None:
    """The same for rows that a job itself holds: each a prompt, or its columns."""
    cells = [{"prompt": row} if isinstance(row, str) else row for row in rows]
    _write(lambda: (Line(f"manifest.rows[{number}]", of) for number, of in enumerate(cells)), target, (), "manifest.rows")


def place_of(paths: list[str], row: int) -> str:
    """Where the `row`-th row (from 0) of these files is; of a row in several lines, where it ends."""
    lines = itertools.chain.from_iterable(map(_READERS[kind_of(paths[0]) or ""], paths))
    return next((line.place for line in itertools.islice(lines, row, None)), _name(paths[0]))


# ------------------------------------------------------------------------------------------------ reading


def _open(path: str) -> BinaryIO:
    try:
        return open_file(path)
    except KeyError:
        raise InvalidJob(f"manifest {path}: the file is gone") from None
    except OSError as error:
        raise InvalidJob(f"manifest {path}: {error.strerror}; give files that you may read") from None
    except (Fatal, Transient) as error:
        raise type(error)(f"manifest {path}: {error}") from error


def _text_lines(path: str) -> Iterator[str]:
    """With their ends, as csv wants them. Raises InvalidJob for what is not UTF-8."""
    with _open(path) as file:
        for number, line in enumerate(io.BufferedReader(file) if isinstance(file, io.RawIOBase) else file, 1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                raise InvalidJob(f"{_name(path)}, line {number}: not UTF-8; save the file as UTF-8") from None


def _csv_lines(path: str) -> Iterator[Line]:
    name = _name(path)
    reader = csv.reader(_text_lines(path), delimiter="\t" if path.lower().endswith(".tsv") else ",", strict=True)
    try:
        header = next((cells for cells in reader if cells), [])
        _check_header(header, f"{name}, line {max(1, reader.line_num)}")
        for cells in reader:
            if len(cells) == len(header):
                yield Line(f"{name}, line {reader.line_num}", {column: cell or None for column, cell in zip(header, cells, strict=True)})
            elif cells:
                raise InvalidJob(
                    f"{name}, line {reader.line_num}: {len(cells)} cells, and the first line names {len(header)} columns; "
                    "put a cell that holds commas or line breaks into double quotes"
                )
    except csv.Error as error:
        raise InvalidJob(f"{name}, line {reader.line_num}: not valid CSV: {error}; a quote within a quoted cell is written twice") from None


def _check_columns(paths: list[str]) -> None:
    firsts = [next(_csv_lines(path), None) for path in paths]
    columns = [first.cells.keys() for first in firsts if first is not None]
    for path, first in zip(paths, firsts, strict=True):
        if first is not None and first.cells.keys() != columns[0]:
            odd = ", ".join(map(repr, sorted(first.cells.keys() ^ columns[0])))
            raise InvalidJob(f"{_name(path)}: other columns than in {_name(paths[0])} ({odd}); files of one manifest share their columns")


def _check_header(header: list[str], place: str) -> None:
    if not header:
        raise InvalidJob(f"{place}: the file is empty; its first line names the columns, one of them `prompt`")
    if "" in header:
        raise InvalidJob(f"{place}: column {header.index('') + 1} has no name; give it one (pandas: to_csv(…, index=False))")
    if twice := [name for name in header if header.count(name) > 1]:
        raise InvalidJob(f"{place}: two columns have the name {twice[0]!r}; rename one")
    if len(header) == 1 and any(sign in header[0] for sign in ";\t"):
        raise InvalidJob(f"{place}: {header[0]!r} is taken for one column; separate cells by commas, or name the file .tsv for tabs")


def _json_lines(path: str) -> Iterator[Line]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) < len(pairs):
            raise ValueError("a name is given twice")
        return found

    for number, text in enumerate(_text_lines(path), 1):
        if not text.strip():
            continue
        place = f"{_name(path)}, line {number}"
        try:
            cells = json.loads(text, object_pairs_hook=once)
        except (ValueError, RecursionError) as error:
            raise InvalidJob(f"{place}: not valid JSON: {error}; write one object a line") from None
        if not isinstance(cells, dict):
            raise InvalidJob(f'{place}: not an object; write one a line, such as {{"prompt": "a red circle"}}')
        yield Line(place, cells)


def _prompt_lines(path: str) -> Iterator[Line]:
    for number, text in enumerate(_text_lines(path), 1):
        if prompt := text.strip():
            yield Line(f"{_name(path)}, line {number}", {"prompt": prompt})


_READERS: dict[str, Callable[[str], Iterator[Line]]] = {"csv": _csv_lines, "json": _json_lines, "lines": _prompt_lines}


def _name(path: str) -> str:
    return path.rsplit("/", 1)[-1]


# ------------------------------------------------------------------------------------------------ types, and writing


def _write(lines: Lines, target: Path, texts: Collection[str], name: str) -> None:
    is_csv = kind_of(name) == "csv"
    types: dict[str, pa.DataType] = {}
    for batch in _batches(lines()):
        for column in dict.fromkeys(column for line in batch for column in line.cells):
            values = [line.cells.get(column) for line in batch]
            if not is_csv:
                types[column] = _type_of(values, types.get(column, pa.null()), column, batch)
            elif column in texts:
                types[column] = pa.string()
            else:
                types[column] = _type_of_texts(pa.array(values, pa.string()), types.get(column, pa.null()))
    if not types:
        raise InvalidJob(f"{_name(name)}: no rows; write at least one prompt")
    schema = pa.schema(list(types.items()))
    with pq.ParquetWriter(target, schema, compression="zstd") as writer:
        for batch in _batches(lines()):
            columns = ([line.cells.get(name) for line in batch] for name in types)
            arrays = [_array(values, type_, is_csv) for values, type_ in zip(columns, types.values(), strict=True)]
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))


def _batches(lines: Iterator[Line]) -> Iterator[list[Line]]:
    while batch := list(itertools.islice(lines, ROWS_AT_A_TIME)):
        yield batch


def _type_of(values: list[Any], before: pa.DataType, column: str, batch: list[Line]) -> pa.DataType:
    """Of JSON's values, together with those of the rows before."""
    try:
        return _joined(before, pa.array(values).type, column)
    except (pa.ArrowException, OverflowError, TypeError):
        for line, value in zip(batch, values, strict=True):
            try:
                before = _joined(before, pa.array([value]).type, column)
            except (pa.ArrowException, OverflowError, TypeError) as error:
                shown = json.dumps(value, ensure_ascii=False, default=str)[:60]
                said = f"; before it are values of type {before}" if not pa.types.is_null(before) else f" ({error})"
                raise InvalidJob(f"{line.place}: {column} is {shown}{said}; a column has one type") from None
        raise InvalidJob(f"{batch[0].place}: {column} holds numbers beyond 2^53 beside fractions; write them as text") from None


def _joined(one: pa.DataType, other: pa.DataType, column: str) -> pa.DataType:
    kinds = [pa.schema([(column, type_)]) for type_ in (one, other)]
    return pa.unify_schemas(kinds, promote_options="permissive").field(0).type


def _type_of_texts(cells: pa.Array, before: pa.DataType) -> pa.DataType:
    """Of a CSV's cells, together with those of the rows before: a type that loses nothing of what is written."""
    if cells.null_count == len(cells) or pa.types.is_string(before):
        return before
    found = next(type_ for type_, is_it in _TEXT_TYPES if is_it(cells))
    numbers = {before, found} == {pa.int64(), pa.float64()}
    return found if before in (pa.null(), found) else pa.float64() if numbers else pa.string()


def _are_whole(cells: pa.Array) -> bool:
    try:
        return bool(pc.all(pc.equal(cells.cast(pa.int64()).cast(pa.string()), cells)).as_py())
    except pa.ArrowInvalid:
        return False


def _are_numbers(cells: pa.Array) -> bool:
    try:
        cells.cast(pa.float64())
    except pa.ArrowInvalid:
        return False
    digits = pc.match_substring_regex(cells, r"^[+-]?(0[0-9]|[0-9]{16})")  # not 007, and nothing that a float would round
    return not pc.any(digits).as_py()


def _are_truths(cells: pa.Array) -> bool:
    return bool(pc.all(pc.is_in(pc.utf8_lower(cells.drop_null()), pa.array(list(TRUTH)))).as_py())


_TEXT_TYPES: tuple[tuple[pa.DataType, Callable[[pa.Array], bool]], ...] = (
    (pa.int64(), _are_whole),
    (pa.float64(), _are_numbers),
    (pa.bool_(), _are_truths),
    (pa.string(), lambda cells: True),
)


def _array(values: list[Any], type_: pa.DataType, is_csv: bool) -> pa.Array:
    if not is_csv or pa.types.is_null(type_):
        return pa.array(values, type_)
    if pa.types.is_boolean(type_):
        return pa.array([None if value is None else TRUTH[value.lower()] for value in values], type_)
    return pa.array(values, pa.string()).cast(type_)
