"""Layout `webdataset`: data/part-00000012.tar, whose members are a picture and its row as JSON, side by side:

    __part-00000012__                  the part's table as Parquet: readers of this format pass over such names
                                       (of a retry `__part-00000012-r1__`: `datasets` would take what has a dot for a sample)
    0000000095-0000-64929915.png       a picture
    0000000095-0000-64929915.json      its row, as far as JSON goes
    …

The tar is the commit. The table is at its start, so that one read tells all but the pictures; it holds the rows with their exact
types, its footer the part's error rows and where in the tar each picture lies. `file_name` is the member's name.
`metadata/part-00000012.parquet` is a copy for readers of tables, and never beside the tars: `datasets` would read it instead of them.
"""

from __future__ import annotations

import base64
import contextlib
import datetime as dt
import hashlib
import itertools
import json
import math
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.types as types

from renderfarm.layouts.base import (
    Committed,
    Place,
    Spool,
    checked,
    damage_named,
    footer,
    local_disk,
    parquet_bytes,
    read_parquet,
    table_bytes,
)
from renderfarm.records import Part
from renderfarm.storage import Store

TABLES = "metadata/*.parquet"
PLACES_KEY = b"renderfarm.places"
"""In the table's footer: for each row the picture's first byte, counted from the first member after the table, and its length."""
_TABLE_NAME = re.compile(r"__part-\d{8,}(-r[1-9]\d*)?__")


def commit_key(part: Part) -> str:
    return f"data/{part.name}.tar"


def view_key(part: Part) -> str:
    return f"metadata/{part.name}.parquet"


def views(part: Part, images: pa.Table, errors: pa.Table) -> dict[str, bytes]:
    return {view_key(part): table_bytes(images, errors)}


# ---------------------------------------------------------------------------------------------------------- write


@contextlib.contextmanager
def writer(store: Store, part: Part) -> Iterator[_Writer]:
    with contextlib.closing(Spool(store)) as spool:
        yield _Writer(part, spool)


class _Writer:
    def __init__(self, part: Part, spool: Spool) -> None:
        self._part, self._spool = part, spool
        self.add = spool.add

    def commit_object(self, images: pa.Table, errors: pa.Table) -> Path:
        rows = [(record["file_name"], to_json(record)) for record in json_ready(images)]
        places, end = [], 0
        for name, record in rows:
            places.append((end + tarfile.BLOCKSIZE, size := self._spool.size(name)))
            end += member_size(size) + member_size(len(record))
        metadata = (footer(errors) or {}) | {PLACES_KEY: json.dumps(places, separators=(",", ":")).encode()}
        path = self._spool.commit_object(".tar")
        with local_disk(path), path.open("r+b") as file:
            file.write(_member(_table_name(self._part), parquet_bytes(images.replace_schema_metadata(metadata))))
            for name, record in rows:
                file.writelines(_pieces(name, self._spool.read(name)))
                file.write(_member(_json_name(name), record))
                self._spool.underway()
            file.write(bytes(_zeros(file.tell())))
        return path


def _table_name(part: Part) -> str:
    return f"__{part.name.replace('.', '-')}__"


def _pieces(name: str, data: bytes) -> tuple[bytes, bytes, bytes]:
    """A member of the tar, its data uncopied. `tarfile` would write the same, and takes twice the time for these small headers."""
    member = tarfile.TarInfo(name)  # no owner, no date
    member.size, member.mode = len(data), 0o644
    return member.tobuf(tarfile.USTAR_FORMAT), data, bytes(-len(data) % tarfile.BLOCKSIZE)


def _member(name: str, data: bytes) -> bytes:
    return b"".join(_pieces(name, data))


def member_size(size: int) -> int:
    return tarfile.BLOCKSIZE * (1 + math.ceil(size / tarfile.BLOCKSIZE))


def _json_name(name: str) -> str:
    return f"{name.rpartition('.')[0]}.json"


# ----------------------------------------------------------------------------------------------------------- read


def read(file: BinaryIO) -> Committed:
    """Reads the tar's first member alone."""
    with damage_named():
        data, start = _table(file)
        table = read_parquet(data)
        places = [(start + int(offset), int(size)) for offset, size in json.loads((table.schema.metadata or {})[PLACES_KEY])]
        images, errors = checked(table)
        names = ["" if name is None else name for name in images.column("file_name").to_pylist()]
        if len(places) != len(names):
            raise ValueError("not a place for each row")
    return Committed(images, errors, names, places, hashlib.sha256(data).hexdigest())


def _table(file: BinaryIO) -> tuple[bytes, int]:
    """The first member's bytes, and where the next one begins. Raises ValueError where there is no such table."""
    try:
        member = tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), "utf-8", "strict")
    except tarfile.HeaderError as error:
        raise ValueError(f"not a tar: {error}") from None
    if not _TABLE_NAME.fullmatch(member.name):
        raise ValueError(f"the tar begins with {member.name!r}, not with its table")
    data = file.read(member.size)
    if len(data) != member.size:
        raise ValueError("the tar ends within its table")
    return data, member_size(member.size)


class _Pictures:
    def __init__(self, store: Store) -> None:
        self._store = store

    def read(self, key: str, name: str, place: Place) -> bytes:
        offset, size = place
        with self._store.open(key) as file, damage_named():
            file.seek(offset)
            return file.read(size)


def pictures(store: Store) -> _Pictures:
    return _Pictures(store)


def picture_key(key: str, name: str) -> str:
    return f"{key}/{name}"


def problems(file: BinaryIO, committed: Committed) -> Iterator[str]:
    """Members that the table does not name, members that are not where it says, and rows that JSON gives otherwise."""
    named = {*committed.names, *map(_json_name, committed.names)}
    left = _expected(committed)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in itertools.islice(tar, 1, None):
                tar.members.clear()  # type: ignore[attr-defined]  # it would keep all of them
                if member.name not in named:
                    yield f"holds {member.name!r}, which its table does not name"
                    continue
                name, offset, record = next(left, ("nothing more", None, None))
                if member.name != name or offset not in (None, member.offset_data):
                    yield f"holds {member.name!r} where its table says {name!r}"
                    return
                if record is not None and _bytes(tar, member) != record:
                    yield f"{name} is not what the table says of that image"
            end = tar.offset  # of the members
    except (tarfile.TarError, OSError, ValueError) as error:
        yield f"cannot be read to its end ({error})"
        return
    if (missing := next(left, None)) is not None:
        yield f"ends before {missing[0]!r}, which its table names"
    elif file.seek(end) == end and file.read(3 * tarfile.RECORDSIZE) != b"\0" * _zeros(end):
        yield "does not end as a tar does"


def _zeros(end: int) -> int:
    """How many follow a tar's last member: two blocks, and what makes its records whole."""
    return math.ceil((end + 2 * tarfile.BLOCKSIZE) / tarfile.RECORDSIZE) * tarfile.RECORDSIZE - end


def _bytes(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    return b"" if file is None else file.read()  # None: of a folder or a link


def _expected(committed: Committed) -> Iterator[tuple[str, int | None, bytes | None]]:
    """Each member's name after the table's, where it lies (a picture), what it holds (a row)."""
    for name, (offset, _), record in zip(committed.names, committed.places, json_ready(committed.images), strict=True):
        yield name, offset, None
        yield _json_name(name), None, to_json(record)


# ---------------------------------------------------------------------------------------------------------- JSON


def to_json(record: dict[str, Any]) -> bytes:
    return json.dumps(_plain(record), ensure_ascii=False, allow_nan=False).encode()


def json_ready(table: pa.Table) -> Iterator[dict[str, Any]]:
    """The rows. Nanoseconds, which Python's dates do not have, are cut off."""
    fields = [field.with_type(_without_nanoseconds(field.type)) for field in table.schema]
    for batch in table.cast(pa.schema(fields), safe=False).to_batches(max_chunksize=256):
        yield from batch.to_pylist()


def _without_nanoseconds(type_: pa.DataType) -> pa.DataType:
    if types.is_timestamp(type_):
        return pa.timestamp("us" if type_.unit == "ns" else type_.unit, type_.tz)
    return {pa.time64("ns"): pa.time64("us"), pa.duration("ns"): pa.duration("us")}.get(type_, type_)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, tuple):  # of a map
        return {"key": _plain(value[0]), "value": _plain(value[1])}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return value.isoformat() if isinstance(value, dt.date | dt.time) else str(value)


def features(schema: pa.Schema, extension: str) -> list[dict[str, Any]]:
    """A sample as `datasets` describes it in a card: it would guess from the first five rows, of which a column may be all gaps."""
    row = {"name": "json", "struct": [{"name": field.name, **_feature(field.type)} for field in schema]}
    return [{"name": extension, "dtype": "image"}, row, *({"name": name, "dtype": "string"} for name in ("__key__", "__url__"))]


def _feature(type_: pa.DataType) -> dict[str, Any]:
    """Of what `_plain` makes of such values."""
    if types.is_boolean(type_) or types.is_integer(type_) or types.is_floating(type_) or types.is_null(type_):
        return {"dtype": {"halffloat": "float16", "float": "float32", "double": "float64"}.get(str(type_), str(type_))}
    if types.is_struct(type_):
        return {"struct": [{"name": field.name, **_feature(field.type)} for field in type_]}
    if types.is_map(type_):
        return {"list": [{"name": "key", **_feature(type_.key_type)}, {"name": "value", **_feature(type_.item_type)}]}
    if types.is_list(type_) or types.is_large_list(type_) or types.is_fixed_size_list(type_):
        item = _feature(type_.value_type)
        return {"list": item.get("dtype") or item.get("struct") or item}
    return {"dtype": "string"}
