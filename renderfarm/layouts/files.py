"""Layout `files`: data/part-…/IMAGE.png beside data/part-…/metadata.parquet, as Hugging Face's imagefolder reads it.

The commit of a part is its metadata.parquet: it names every image of the part, and its footer carries the part's
error rows. Images are put before it; one that no table names belongs to an attempt that lost, and no reader sees it.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterable, Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from renderfarm.encode import EncodedImage
from renderfarm.errors import Fatal
from renderfarm.records import Part, SampleKey
from renderfarm.schema import ARGUMENT_COLUMNS, ERROR_COLUMNS, ERRORS_KEY, GIVEN_BY, IMAGE_COLUMNS, errors_from_json, errors_to_json

TABLES = "data/*/metadata.parquet"


def commit_key(part: Part) -> str:
    return f"data/{part.name}/metadata.parquet"


def part_of(key: str) -> int | None:
    """The index of the part that a table's key names."""
    match = re.match(r"(?:data|errors)/part-(\d+)[/.]", key)
    return int(match[1]) if match else None


def image_name(key: SampleKey, image: EncodedImage, format_: str) -> str:
    """Names come from the ordinal and the pixels, never from user ids; another attempt's pixels get another name."""
    return name_of(key, image.pixel_sha256, format_)


def name_of(key: SampleKey, pixel_sha256: str, format_: str) -> str:
    return f"{key.row:010d}-{key.image_index:04d}-{pixel_sha256[:8]}.{format_}"


def image_key(part: Part, file_name: str) -> str:
    return f"data/{part.name}/{file_name}"


def original_key(part: Part, file_name: str) -> str:
    """Not in `data`, where readers take every image for one of the dataset."""
    return f"originals/{part.name}/{file_name}"


def table_bytes(images: pa.Table, errors: pa.Table) -> bytes:
    """The commit object. Same tables, same bytes."""
    if len(errors):
        images = images.replace_schema_metadata({ERRORS_KEY: errors_to_json(errors)})
    return _parquet(images)


def errors_key(part: Part) -> str:
    return f"errors/{part.name}.parquet"


def errors_bytes(errors: pa.Table) -> bytes:
    return _parquet(errors)


def _parquet(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def read_table(data: bytes) -> tuple[pa.Table, pa.Table]:
    """A commit object's (images, errors). Raises Fatal for one that is damaged: it was whole when it was committed."""
    with damage_named():
        table = _read_parquet(data)
        given = {GIVEN_BY.get(name, name) for name in ARGUMENT_COLUMNS.names if name in table.column_names}
        _check_columns(table, [*IMAGE_COLUMNS, *(field for field in ARGUMENT_COLUMNS if GIVEN_BY.get(field.name, field.name) in given)])
        packed = (table.schema.metadata or {}).get(ERRORS_KEY)
        errors = errors_from_json(packed) if packed else ERROR_COLUMNS.empty_table()
        _check_columns(errors, ERROR_COLUMNS)
    return table.replace_schema_metadata(None), errors


def read_errors(data: bytes) -> pa.Table:
    """Raises Fatal for a damaged one."""
    with damage_named():
        errors = _read_parquet(data)
        _check_columns(errors, ERROR_COLUMNS)
    return errors


@contextlib.contextmanager
def damage_named() -> Iterator[None]:
    """Turns what Arrow and JSON raise for damaged data into one Fatal."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, TypeError, AttributeError, OverflowError) as error:
        raise Fatal(f"a committed table is damaged ({str(error).splitlines()[0]}); restore the output from a copy") from error


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


def _read_parquet(data: bytes) -> pa.Table:
    """In this thread and from Arrow's own buffer: read_table's threads may still let go of a Python file object while
    the interpreter ends, which aborts the process."""
    return pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False)
