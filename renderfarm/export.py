"""`renderfarm export`: an output once more, as few large files, each picture held against its hash on the way.

    DEST/data/train-00000-of-00012.parquet   as layout `parquet` has a part; or train-00000-of-00012.tar, as `webdataset` has one, with
                                             metadata/train-00000-of-00012.parquet; or folders data/part-00000000/, as `files` has one
    DEST/README.md                           the dataset card, last; until then a page that says so, and that `datasets` refuses
    DEST/_renderfarm/export.json             what is exported and how, first

What is exported are the parts that are committed when an export begins. Which row goes where follows from their tables and the options
alone, so that a file that is there is never made again, whoever made it. Tables are read a part at a time, first all of them for
the plan, which keeps four numbers of each image, then for each file those that it takes rows of.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from renderfarm import commit
from renderfarm.errors import AlreadyExists, Fatal, InvalidJob
from renderfarm.layouts import LAYOUTS, webdataset
from renderfarm.layouts.base import Committed, Place, table_bytes
from renderfarm.reading import Output
from renderfarm.reading import open as open_output
from renderfarm.records import Part, PartId
from renderfarm.report.card import KEY as CARD
from renderfarm.report.card import given, write_card
from renderfarm.report.contact_sheet import KEY as SHEET
from renderfarm.report.figures import figures
from renderfarm.schema import ERROR_COLUMNS
from renderfarm.shown import Shown
from renderfarm.storage import Store, open_store

PLAN = "_renderfarm/export.json"
EXPORTED_SHEET = "contact_sheet.png"
FOLDER_IMAGES = 5_000
"""In a folder of `files`: the Hub wants fewer than 10,000 files there, and fewer than 100,000 in a repository."""
READERS = 8
NO_ERRORS = ERROR_COLUMNS.empty_table()
UNFINISHED = b"""\
---
configs:
- config_name: default
  data_files:
  - {split: train, path: "data/this-export-is-not-finished"}
---
# Not finished

This export is being written, or was interrupted. The same `renderfarm export` goes on with it and puts the dataset card here.
"""
_OURS = re.compile(
    r"(?:data|metadata)/train-\d{5,}-of-\d{5,}\.(?:parquet|tar)|data/part-\d{8,}/(?:metadata\.parquet|\d{10,}-\d{4,}-\w{8}\.[a-z]+)"
)

Format = Literal["parquet", "webdataset", "files"]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """What decides an export's files. `max_file_size`: in bytes, as the rows are before compression; of `files` it says nothing.
    `shuffle`: the seed of the rows' order; None: the manifest's."""

    to: Format
    max_file_size: int = 10**9
    shuffle: int | None = None


@dataclass
class Exported(Shown):
    """`new_files`: made now; the others were there. Of `files`, a file is a folder."""

    out: str
    dest: str
    to: str
    files: int
    new_files: int
    images: int
    errors_left_out: int


def size_in_bytes(given: int | str) -> int:
    """1GB, 500 MB, 2.5GiB, or a number of bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kMGT]?)(i?)B", given.strip().replace("K", "k")) if isinstance(given, str) else None
    size = int(float(match[1]) * (1024 if match[3] else 1000) ** " kMGT".index(match[2] or " ")) if match else given
    if not isinstance(size, int) or size < 1:
        raise InvalidJob(f"--max-file-size {given!r}: give a number with its unit, for example 500MB or 2GB")
    return size


def export(
    out: str, dest: str, options: Options, *, restart: bool = False, read_as: str | None = None, say: Say = lambda text: None
) -> Exported:
    """Write what `dest` does not hold yet of an export; run it again and it continues.

    `restart`: remove what another export left there. `read_as`: where readers will find it, for the card. `say`: is told how far it is.
    Raises InvalidJob for what is no output or holds no image, and where another export or something else lies; Fatal for a damaged
    picture or table.
    """
    output, store = open_output(out), open_store(dest)
    _check_apart(output.store.url, store.url)
    source = _survey(output, options, say)
    _claim(store, source.plan(output, options), restart=restart)
    writer = _Writer(output, store, source, options)
    missing = writer.missing()
    if missing:
        store.put(CARD, UNFINISHED)
    with ThreadPoolExecutor(READERS) as writer.readers:
        for done, number in enumerate(missing):
            say(f"file {done + 1:,} of {len(missing):,}, with {len(writer.rows(number)):,} images")
            writer.write(number)
    if missing or not store.exists(CARD) or store.read(CARD) == UNFINISHED:  # else it may have been edited
        _write_card(output, store, source, options, read_as)
    return Exported(output.store.url, store.url, options.to, writer.files, len(missing), len(source.weight), source.errors)


def _check_apart(out: str, dest: str) -> None:
    if f"{dest}/".startswith(f"{out}/"):
        raise InvalidJob(f"{dest} lies in the output itself, whose readers would see both; give a place beside it")


# ----------------------------------------------------------------------------------------------------------- plan


@dataclass(frozen=True)
class _Source:
    """What an output holds. Of each image, in the order in which they are exported: its part (as its place among `parts`), its place in the
    part's table, and about how many bytes it will take. `parts`: the SHA-256 of each commit object. `columns`: of the image table.
    `errors`: samples without an image."""

    part: np.ndarray
    place: np.ndarray
    weight: np.ndarray
    parts: dict[PartId, str]
    columns: pa.Schema
    errors: int

    def plan(self, output: Output, options: Options) -> dict[str, Any]:
        job = hashlib.sha256(output.store.read(commit.JOB)).hexdigest()
        return {"options": asdict(options), "job_sha256": job, "parts": {str(part): sha256 for part, sha256 in self.parts.items()}}


def _survey(output: Output, options: Options, say: Say) -> _Source:
    part, place, weight, keys = [np.empty(0, np.int32)], [np.empty(0, np.int32)], [np.empty(0, np.int64)], [np.empty((0, 2), np.uint64)]
    parts: dict[PartId, str] = {}
    columns, errors = None, 0
    for index, renderings in itertools.groupby(_committed(output), lambda found: found[0].index):
        say(f"reading tables: part {index:,}")
        tables = []
        for id_, committed in renderings:
            count = len(committed.images)
            errors += -count if id_.retry else len(committed.errors)
            if count:
                columns = columns or committed.images.schema
                part.append(np.full(count, len(parts), np.int32))
                place.append(np.arange(count, dtype=np.int32))
                weight.append(_weights(committed, options.to))
                tables.append(committed.images.select(["row", "image_index"]))
            parts[id_] = committed.sha256
        if tables and options.shuffle is not None:
            keys.append(_shuffle_keys(pa.concat_tables(tables), options.shuffle))
        if len(tables) > 1:  # the images of retries stand where their rows do
            order = pc.sort_indices(pa.concat_tables(tables), [("row", "ascending"), ("image_index", "ascending")]).to_numpy()
            for column in (part, place, weight):
                column[-len(tables) :] = [np.concatenate(column[-len(tables) :])[order]]
            if options.shuffle is not None:
                keys[-1] = keys[-1][order]
    if columns is None:
        raise InvalidJob(f"{output.store.url}: no image is committed yet, so there is nothing to export; run its job first")
    shuffled: Any = slice(None)
    if options.shuffle is not None:
        low, high = np.concatenate(keys).T
        shuffled = np.lexsort((high, low))
    images = [np.concatenate(column)[shuffled] for column in (part, place, weight)]
    return _Source(images[0], images[1], images[2], parts, columns, errors)


def _committed(output: Output) -> Iterator[tuple[PartId, Committed]]:
    """Every committed part, ascending. Raises Fatal for one that is not what the index says, or is gone."""
    entries = commit.index_entries(output.store)  # first: what it names is committed
    for part in sorted({*output.committed(), *entries}):
        if (found := output.as_committed(part, entries)) is not None:
            yield part, found[1]


def _weights(committed: Committed, to: Format) -> np.ndarray:
    """About how many bytes each image takes in a file: what tables and their compression take is shared among its rows."""
    images = committed.images
    sizes: np.ndarray[Any, Any] = images.column("bytes").to_numpy()
    table: int = images.nbytes // len(images)
    if to != "webdataset":
        return sizes + table
    records = (webdataset.to_json(record) for record in webdataset.json_ready(images))
    members = [webdataset.member_size(int(size)) + webdataset.member_size(len(record)) for size, record in zip(sizes, records, strict=True)]
    return np.array(members, np.int64) + table


def _shuffle_keys(images: pa.Table, seed: int) -> np.ndarray:
    """The beginning of SHA-256(seed:row:image_index): an order that neither layout nor parts decide."""
    samples = zip(images.column("row").to_pylist(), images.column("image_index").to_pylist(), strict=True)
    digests = b"".join(hashlib.sha256(b"%d:%d:%d" % (seed, row, k)).digest()[:16] for row, k in samples)
    keys: np.ndarray[Any, Any] = np.frombuffer(digests, ">u8").astype(np.uint64)
    return keys.reshape(-1, 2)


def _claim(store: Store, plan: dict[str, Any], *, restart: bool) -> None:
    """Make the place this export's, or find that it is. Raises InvalidJob where it is something else's."""
    if store.exists(commit.JOB):
        raise InvalidJob(f"{store.url} is an output of `renderfarm run`; give another place")
    if not store.exists(PLAN) and (other := commit.not_ours(store)) is not None:
        raise InvalidJob(f"{store.url} is no export, and not empty (it holds {other}); give another place")
    try:
        store.put_if_absent(PLAN, commit.to_json(plan))
        return
    except AlreadyExists:
        if restart:
            _clear(store)
            store.put(PLAN, commit.to_json(plan))  # last, so that one who stops in between can do it again
            return
        there = commit.read_json(store, PLAN)
    reasons = [f"  {line}" for line in commit.differences(there.get("options"), plan["options"])]
    if there.get("job_sha256") != plan["job_sha256"]:
        reasons.append("  it is of another output")
    elif there.get("parts") != plan["parts"]:
        before = there.get("parts") or {}
        changed = sum(plan["parts"].get(index) != sha256 for index, sha256 in before.items())
        reasons.append(f"  the output has other parts: {len(before):,} there, {len(plan['parts']):,} now, {changed:,} changed or gone")
    if reasons:
        raise InvalidJob(
            f"{store.url} holds another export:\n"
            + "\n".join(reasons)
            + "\ngive another place, or --restart, which removes that export and begins anew"
        )


def _clear(store: Store) -> None:
    """Remove an export's files."""
    store.put(CARD, UNFINISHED)
    store.delete(EXPORTED_SHEET)
    for key in (key for folder in ("data", "metadata") for key in store.list(folder)):
        if _OURS.fullmatch(key):
            store.delete(key)


# ---------------------------------------------------------------------------------------------------------- files


class _Writer:
    """Writes file after file, each from the tables and pictures of the parts that it takes rows of."""

    readers: ThreadPoolExecutor

    def __init__(self, output: Output, store: Store, source: _Source, options: Options) -> None:
        self.output, self.store, self.source, self.to = output, store, source, options.to
        self.layout, self.parts = LAYOUTS[options.to], list(source.parts)
        self.pictures = output.layout.pictures(output.store)
        count = len(source.weight)
        self.bounds = (
            [*range(0, count, FOLDER_IMAGES), count] if options.to == "files" else list(_bounds(source.weight, options.max_file_size))
        )
        self.files = len(self.bounds) - 1

    def rows(self, number: int) -> range:
        return range(self.bounds[number], self.bounds[number + 1])

    def key(self, number: int) -> str:
        if self.to == "files":
            return self.layout.commit_key(Part(number, 0, 0))
        return f"data/{self._name(number)}.{'tar' if self.to == 'webdataset' else 'parquet'}"

    def _name(self, number: int) -> str:
        """As Hugging Face names files."""
        return f"train-{number:05d}-of-{self.files:05d}"

    def missing(self) -> list[int]:
        there = set(self.store.list("data"))
        return [number for number in range(self.files) if self.key(number) not in there]

    def write(self, number: int) -> None:
        span = slice(self.bounds[number], self.bounds[number + 1])
        part, place = self.source.part[span], self.source.place[span]
        order = np.lexsort((place, part))  # parts are read once, and each from its beginning to its end
        firsts = np.flatnonzero(np.diff(part[order], prepend=-1))
        with self.layout.writer(self.store, Part(number, 0, 0)) as writer:
            tables = [
                self._take(self.parts[part[order[start]]], place[order[start:stop]], writer.add)
                for start, stop in itertools.pairwise([*firsts.tolist(), len(order)])
            ]
            images = pa.concat_tables(tables).take(np.argsort(order)).combine_chunks()
            file = writer.commit_object(images, NO_ERRORS)
            if self.to == "webdataset":  # before the tar: where that is, nothing is missing
                self.store.put(f"metadata/{self._name(number)}.parquet", table_bytes(images, NO_ERRORS))
            try:
                self.store.put_if_absent(self.key(number), file)
            except AlreadyExists:  # by another one at the same export, or by us, and the reply was lost: the same bytes
                return

    def _take(self, part: PartId, places: np.ndarray, add: Callable[[str, bytes], None]) -> pa.Table:
        """Those rows of a part; their pictures are added."""
        found = self.output.as_committed(part, {})
        if found is None or found[1].sha256 != self.source.parts[part]:
            raise Fatal(f"part {part} of {self.output.store.url} was changed or removed meanwhile; export it to another place")
        key, committed = found

        def copy(image: tuple[int, str]) -> None:
            place, sha256 = image
            add(committed.names[place], self._read(key, committed.names[place], committed.places[place], sha256))

        images = committed.images.take(places)
        list(self.readers.map(copy, zip(places.tolist(), images.column("file_sha256").to_pylist(), strict=True)))
        names = pa.array([committed.names[place] for place in places], pa.string())  # layout `parquet` has them elsewhere
        column = images.schema.get_field_index("file_name")
        return images.set_column(column, images.schema.field(column), names)

    def _read(self, key: str, name: str, place: Place, sha256: str) -> bytes:
        where = f"{self.output.store.url}/{self.output.layout.picture_key(key, name)}"
        what_to_do = "restore it from a copy, or have its part rendered again, and export again (`renderfarm verify` finds all such)"
        try:
            data = self.pictures.read(key, name, place)
        except KeyError:
            raise Fatal(f"{where}: the picture is missing; {what_to_do}") from None
        except Fatal as error:
            raise Fatal(f"{where}: {error}") from None
        if hashlib.sha256(data).hexdigest() != sha256:
            raise Fatal(f"{where}: its bytes are not those that were written (SHA-256 differs); {what_to_do}")
        return data


def _bounds(weights: np.ndarray, limit: int) -> Iterator[int]:
    """Where files begin and the last one ends: as many rows in each as the limit allows, one at least."""
    ends, start = np.cumsum(weights), 0
    yield start
    while start < len(ends):
        before = int(ends[start - 1]) if start else 0
        start = max(start + 1, int(np.searchsorted(ends, before + limit, side="right")))
        yield start


def _write_card(output: Output, store: Store, source: _Source, options: Options, read_as: str | None) -> None:
    sheet = output.store.exists(SHEET)
    if sheet:
        store.put(EXPORTED_SHEET, output.store.read(SHEET))
    grid = output.grid
    card, warnings = given(output.store)
    write_card(
        store,
        output.job | {"output": output.job["output"] | {"layout": options.to}},
        name=commit.read_progress(output.store).get("job") or output.store.url.rpartition("/")[2],
        rows=grid.rows,
        images=len(source.weight),
        errors=source.errors,
        finished=sum(not part.retry for part in source.parts) == grid.count,
        sheet=EXPORTED_SHEET if sheet else None,
        columns=source.columns,
        warnings=warnings,
        card=card,
        figures=figures(output.store, output.job["output"]["layout"], commit.index_entries(output.store)),
        exported=read_as or store.url,
    )
