"""Reading an output back, finished or not: only committed parts are seen."""

from __future__ import annotations

import heapq
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pyarrow as pa
from PIL import Image

from renderfarm import commit, requests
from renderfarm.config import expand_env
from renderfarm.encode import decode
from renderfarm.errors import Fatal, InvalidJob
from renderfarm.layouts import LAYOUTS
from renderfarm.layouts.base import Committed, damage_named, errors_key, part_of, read_errors, read_table, table_bytes
from renderfarm.plan import Grid
from renderfarm.records import Part, PartId, SampleKey
from renderfarm.schema import ERROR_COLUMNS, IMAGE_COLUMNS
from renderfarm.storage import PATIENCE_S, Store, open_store


@dataclass(frozen=True)
class StoredSample:
    """A committed image: its table row, and where it is. `key`: its file, or the commit object that holds it, and `name` in it."""

    record: dict[str, Any]
    key: str
    store: Store
    name: str
    data: Callable[[], bytes]
    """The file's bytes. Raises KeyError for what is gone, Fatal for what cannot be read, or lies outside of the output."""

    def image(self) -> Image.Image:
        """Decoded on first use, as PIL does. Raises as `data` does, and one of `encode.UNDECODABLE` for a damaged file."""
        return decode(self.data())

    def original(self) -> Image.Image | None:
        """The picture before the job's `after`, where the output keeps it. Raises as `image` does."""
        key = self.record.get("original_file")
        return None if key is None else decode(self.store.read(key))


@dataclass(frozen=True)
class StoredPart:
    """What a part's commit object holds, by its key; nothing where the part is not committed."""

    samples: list[StoredSample] = field(default_factory=list)
    errors: list[dict[str, Any]] = field(default_factory=list)
    key: str = ""
    committed: Committed | None = None


class Output:
    """An output of `renderfarm run`. Iterates (PIL image, record) in manifest order; a record is the table's row."""

    def __init__(self, url: str, patience_s: float = PATIENCE_S) -> None:
        """`patience_s`: with each request of a store that is away."""
        if os.path.isfile(url):
            raise InvalidJob(f"{url}: not an output of renderfarm but a file; give the folder that `run` printed")
        self.store = open_store(url, patience_s=patience_s)
        try:
            self.job = commit.read_job(self.store)
        except KeyError:
            raise InvalidJob(f"{url}: not an output of renderfarm (it has no {commit.JOB}); give the folder that `run` printed") from None
        self.layout = LAYOUTS[self.job["output"]["layout"]]
        self._pictures = self.layout.pictures(self.store)

    @cached_property
    def grid(self) -> Grid:
        """Raises InvalidJob where it was left to the first worker, and none has been ready yet."""
        grid = commit.frozen_grid(self.store, self.job)
        if grid is None:
            raise InvalidJob(f"{self.store.url}: nothing was rendered yet; run its job first")
        return grid

    @property
    def url(self) -> str:
        return self.store.url

    def __iter__(self) -> Iterator[tuple[Image.Image, dict[str, Any]]]:
        return ((sample.image(), sample.record) for sample in self.samples())

    def samples(self) -> Iterator[StoredSample]:
        """Every committed sample in manifest order; its image is read only when asked for."""
        for _, renderings in itertools.groupby(self._with_images(), lambda part: part.index):
            found = [self._samples(part) for part in renderings]
            yield from found[0] if len(found) == 1 else heapq.merge(*found, key=_place)

    def _samples(self, part: Part) -> Iterator[StoredSample]:
        key, committed = commit.read_part(self.store, self.layout, part)
        records = enumerate(committed.images.to_pylist())
        return (self.stored(key, committed, index, record) for index, record in records)

    def __len__(self) -> int:
        return commit.counts(commit.index_entries(self.store)).images

    def spread(self, limit: int) -> list[StoredSample]:
        """About `limit` samples spread over the output, from at most `limit` parts of those that the index lists."""
        chosen: list[StoredSample] = []
        for key, committed, rows in self.spread_over_parts(limit, commit.index_entries(self.store)):
            records = committed.images.select(IMAGE_COLUMNS.names).take(pa.array(rows, pa.int64())).to_pylist()
            chosen += [self.stored(key, committed, row, record) for row, record in zip(rows, records, strict=True)]
        return sorted(chosen, key=_place)

    def spread_over_parts(
        self, limit: int, entries: commit.Entries, unread: list[PartId] | None = None
    ) -> Iterator[tuple[str, Committed, list[int]]]:
        """The same by part: its commit object, by its key, and which rows of its table. Everything, where there is no more than that.
        `unread`: is given those that are lost or damaged."""
        parts = [(part, entry.images) for part, entry in entries.items() if entry.images]
        parts = parts[:: -(-len(parts) // limit)] if parts else []
        total, seen, taken = sum(images for _, images in parts), 0, 0
        for part, images in parts:
            seen += images
            take = min(total, limit) * seen // total - taken
            taken += take
            if not take:
                continue
            try:
                key, committed = commit.read_part(self.store, self.layout, Part(part.index, 0, 0, part.retry))
            except (KeyError, Fatal):  # lost or damaged since; `verify` says how
                if unread is not None:
                    unread.append(part)
                continue
            there = len(committed.images)
            yield key, committed, [k * there // take for k in range(take)] if there >= take else list(range(there))

    def errors(self) -> pa.Table:
        """How the samples ended that have no image by now, sorted by sample."""
        return pa.concat_tables([ERROR_COLUMNS.empty_table(), *(table for _, table, _ in self.errors_by_part())])

    def errors_by_part(self) -> Iterator[tuple[int, pa.Table, list[PartId]]]:
        """The same for each part of the grid that has any, ascending, with the rendering that said so of each."""
        tables = {part: key for key in self.store.list("errors") if (part := part_of(key)) is not None}
        retried = self.renderings(tables)
        for index in sorted({*(part.index for part in tables), *retried}):
            if index in retried:
                ended = commit.ended(self.store, self.layout, index, retried[index])
                keys = sorted(ended.errors)
                table = pa.Table.from_pylist([ended.errors[key] for key in keys], schema=ERROR_COLUMNS)
                by = [ended.by[key] for key in keys]
            else:
                table = read_errors(self.store.read(tables[PartId(index)])).replace_schema_metadata(None)
                by = [PartId(index)] * len(table)
            if len(table):
                yield index, table, by

    def renderings(self, seen: Iterable[PartId] = ()) -> dict[int, int]:
        """How many times parts were rendered, or are asked for, where that is more than once. `seen`: parts that are there, too."""
        found: dict[int, int] = {}
        for part in (*requests.asked(self.store), *commit.index_entries(self.store), *seen):
            if part.retry:
                found[part.index] = max(found.get(part.index, 0), part.retry + 1)
        return found

    def committed(self) -> list[PartId]:
        """The parts that have a commit object or an error view, ascending; not taken from the index of parts."""
        with_errors = (part_of(key) for key in self.store.list("errors"))
        return sorted({*(part.id for part in self._with_images()), *(part for part in with_errors if part is not None)})

    def part(self, index: int, retry: int = 0) -> StoredPart:
        """Empty for a part that is not committed. Raises Fatal for a damaged one."""
        try:
            key, committed = commit.read_part(self.store, self.layout, self.grid.part(index, retry))
        except KeyError:
            return StoredPart()
        with damage_named():
            records = committed.images.to_pylist()
            samples = [self.stored(key, committed, place, record) for place, record in enumerate(records)]
            return StoredPart(samples, committed.errors.to_pylist(), key, committed)

    def as_committed(self, part: PartId, entries: commit.Entries) -> tuple[str, Committed] | None:
        """A part's commit object, by its key, held against the index of parts; None where the part was never committed.

        `entries`: of an index that was read before, so that whatever it names is there. Raises Fatal for a table that is damaged,
        another one than was committed, or gone.
        """
        entry = entries.get(part)
        try:
            key, committed = commit.read_part(self.store, self.layout, Part(part.index, 0, 0, part.retry))
            if entry is None:
                return key, committed
            if commit.is_as_committed(self.store, entry.key, committed.sha256):
                return key, committed
        except KeyError:
            if entry is None:
                return None
            raise Fatal(f"part {part}: was committed, and its table or index entry is missing; restore it from a copy") from None
        except Fatal as error:
            raise Fatal(f"part {part}: {error}") from None
        raise Fatal(f"part {part}: its table is not the one that was committed (SHA-256 differs); restore it from a copy")

    def errors_of(self, part: Part) -> list[dict[str, Any]]:
        """What the error view has for a part; its table's footer says the same, or the view is damaged."""
        try:
            return list(read_errors(self.store.read(errors_key(part))).to_pylist())
        except KeyError:
            return []

    def problems(self, stored: StoredPart) -> Iterator[str]:
        """What is wrong with a part that has images, its table and the pictures' bytes aside."""
        assert stored.committed is not None
        with self.store.open(stored.key) as file:
            yield from (f"{stored.key} {problem}" for problem in self.layout.problems(file, stored.committed))

    def untrue_views(self, part: Part, stored: StoredPart) -> Iterator[str]:
        """Views for readers that do not say what the part's commit object says; the error view aside."""
        assert stored.committed is not None
        for view, data in self.layout.views(part, stored.committed.images, stored.committed.errors).items():
            if not stored.samples:
                if self.store.exists(view):
                    yield f"{view} is of images that {stored.key} does not have"
            elif not self._is(view, data):
                yield f"{view} is not what {stored.key} says"

    def _is(self, view: str, data: bytes) -> bool:
        """Whether a view holds that table; another version of Arrow may have written it in other bytes."""
        try:
            return table_bytes(*read_table(self.store.read(view))) == data
        except (KeyError, Fatal):
            return False

    def stored(self, key: str, committed: Committed, index: int, record: dict[str, Any]) -> StoredSample:
        """The sample of that row of a commit object's table."""
        name, place = committed.names[index], committed.places[index]
        data = partial(self._pictures.read, key, name, place)
        return StoredSample(record, self.layout.picture_key(key, name), self.store, name, data)

    def _with_images(self) -> list[Part]:
        """Parts that have a commit object besides an error table, ascending."""
        named = ((key, part_of(key)) for key in self.store.list("data"))
        parts = ((key, Part(id_.index, 0, 0, id_.retry)) for key, id_ in named if id_ is not None)
        return sorted((part for key, part in parts if key == self.layout.commit_key(part)), key=lambda part: part.id)


def _place(sample: StoredSample) -> SampleKey:
    return SampleKey(sample.record["row"], sample.record["image_index"])


def open(out: str | Path) -> Output:
    """Open an output folder or URL. Raises InvalidJob if it is none."""
    return Output(expand_env(str(out)))
