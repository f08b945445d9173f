"""Is what a part's keys hold what was committed? Asked by `verify`, which says so, and by `run --repair`, which mends it."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np

from renderfarm import commit
from renderfarm.commit import Ended, ended
from renderfarm.encode import FORMATS, UNDECODABLE, Written, decode, pixel_sha256, written
from renderfarm.errors import Fatal, RenderfarmError, Transient
from renderfarm.layouts.base import name_of
from renderfarm.manifest import ROW, parse_ranges
from renderfarm.reading import Output, StoredPart, StoredSample
from renderfarm.records import Part, PartId, SampleKey

REPAIR = "`renderfarm run JOB --repair`"

Kind = Literal["damage", "derived", "unread"]


@dataclass(frozen=True)
class Problem:
    """One line for a person, and what mends it: of `damage`, rendering the part again; what is `derived` is rebuilt from the commit
    object; what is `unread` may be well, and its store is away. `key`: the picture's file that is not what its table says."""

    text: str
    kind: Kind
    key: str | None = None


@dataclass(frozen=True)
class CheckedPart:
    """`entries`: the part's keys in the index. `readable`: whether there is a commit object, and `stored` says what it holds."""

    part: Part
    stored: StoredPart
    entries: Sequence[str]
    readable: bool
    problems: list[Problem] = field(default_factory=list)

    @property
    def damaged(self) -> bool:
        return any(problem.kind == "damage" for problem in self.problems)


class Checker:
    """Checks one part after the other; `readers` read its files side by side."""

    def __init__(self, output: Output, readers: ThreadPoolExecutor) -> None:
        self.output, self.readers = output, readers
        self.how = written(output.job["output"])
        self.entries = commit.entries_by_part(output.store)  # listed first: whatever they name has been committed by then
        self.parts = sorted({*output.committed(), *self.entries})

    def check(self, id_: PartId) -> CheckedPart:
        part, entries = self.output.grid.part(id_.index, id_.retry), self.entries.get(id_, [])
        try:
            stored = self.output.part(id_.index, id_.retry)
        except Fatal as error:
            return CheckedPart(part, StoredPart(), entries, False, [Problem(f"part {id_}: {error}", "damage")])
        if stored.committed is None:  # at most a view of what is gone
            gone = Problem(f"part {id_}: was committed, and its table is missing; restore it from a copy, or {REPAIR} mends it", "damage")
            return CheckedPart(part, stored, entries, False, [gone] if entries else [])
        try:
            before = ended(self.output.store, self.output.layout, part.index, part.retry) if part.retry else None
        except RenderfarmError as error:
            what = Problem(f"part {id_}: what it was rendered again for cannot be read: {error}", _kind(error))
            return CheckedPart(part, stored, entries, True, [what])
        found = [*self._rows(part, stored, before), *self._object(part, stored), *self._views(part, stored)]
        found += filter(None, self.readers.map(partial(file_problem, how=self.how), stored.samples))
        superseded = {} if before is None else commit.superseded(before, stored.committed)
        return CheckedPart(part, stored, entries, True, [*found, *self._index(part, stored, entries, superseded)])

    def _rows(self, part: Part, stored: StoredPart, before: Ended | None) -> Iterator[Problem]:
        """Every row of the part ended, each sample exactly once."""
        found = Counter((row["row"], row["image_index"]) for row in (*(sample.record for sample in stored.samples), *stored.errors))
        if before is not None:
            yield from self._retried(part, found, before)
            return
        images: dict[int, set[int]] = {}
        for row, k in found:
            images.setdefault(row, set()).add(k)
        planned = set(range(part.start, part.stop))
        lines = [f"row {row}, image {k} ended {count} times" for (row, k), count in found.items() if count > 1]
        lines += [f"row {row} does not belong to it" for row in sorted(images.keys() - planned)]
        for row, there in sorted(images.items()):
            lines += [f"row {row}, image {k} is missing" for k in sorted(set(range(len(there))) - there)]
        lines += [f"row {row} is missing" for row in sorted(_expected(self.output, planned) - images.keys())]
        yield from (Problem(f"{part.name}: {line}", "damage") for line in lines)

    def _retried(self, part: Part, found: Counter[tuple[int, int]], before: Ended) -> Iterator[Problem]:
        """Of a retry: samples that were errors until then, each once."""
        lines = [f"row {row}, image {k} ended {count} times" for (row, k), count in found.items() if count > 1]
        for key in sorted(SampleKey(*pair) for pair in found):
            if key in before.images:
                lines.append(f"row {key.row}, image {key.image_index} has an image in a rendering before it")
            elif key not in before.errors:
                lines.append(f"row {key.row}, image {key.image_index} does not belong to it")
        yield from (Problem(f"{part.name}: {line}", "damage") for line in lines)

    def _object(self, part: Part, stored: StoredPart) -> Iterator[Problem]:
        """What else is wrong with a commit object that has pictures."""
        try:
            for line in self.output.problems(stored) if stored.samples else ():
                yield Problem(line, "damage")
        except (KeyError, RenderfarmError) as error:
            yield Problem(f"{stored.key}: {error}", _kind(error))

    def _views(self, part: Part, stored: StoredPart) -> Iterator[Problem]:
        """Whether the part's views say what its commit object says."""
        view = f"errors/{part.name}.parquet"
        try:
            if stored.samples and stored.errors != self.output.errors_of(part):
                yield Problem(f"{part.name}: {view} is not what the part's table says of its errors; {REPAIR} rebuilds it", "derived")
        except RenderfarmError as error:
            yield Problem(f"{view}: {error}", _kind(error, "derived"))
        try:
            for line in self.output.untrue_views(part, stored):
                yield Problem(f"{line}; {REPAIR} rebuilds it", "derived")
        except RenderfarmError as error:
            yield Problem(f"{part.name}: {error}", _kind(error, "derived"))

    def _index(self, part: Part, stored: StoredPart, entries: Sequence[str], superseded: dict[str, int]) -> Iterator[Problem]:
        """What the index says was committed must be there, to the byte. Where an entry is whole and says another hash, nobody can
        tell which of the two has changed: the part is rendered again."""
        if not entries:
            return
        assert stored.committed is not None
        advice = f"restore it from a copy, or {REPAIR} mends it"
        entry = commit.entry_that_counts(entries)
        try:
            if not commit.is_as_committed(self.output.store, entry.key, stored.committed.sha256):
                line = f"part {part.id}: its table is not the one that was committed (SHA-256 differs); {advice}"
                if (entry.images, entry.errors) != (len(stored.samples), len(stored.errors)):
                    line = (
                        f"part {part.id}: was committed with {entry.images} images and {entry.errors} errors, "
                        f"and its table has {len(stored.samples)} and {len(stored.errors)}; {advice}"
                    )
                yield Problem(line, "damage")
                return
            if list(entries) != [commit.entry_key(part, stored.committed)]:
                yield Problem(f"part {part.id}: its index entries count otherwise than its table; {REPAIR} mends them", "derived")
            elif not commit.counts_errors(self.output.store, entry.key, part, stored.committed, superseded):
                yield Problem(f"part {part.id}: {entry.key} counts other errors than its table; {REPAIR} mends it", "derived")
        except (KeyError, RenderfarmError) as error:
            yield Problem(f"part {part.id}: {error}", _kind(error, "derived"))


def _kind(error: Exception, otherwise: Kind = "damage") -> Kind:
    return "unread" if isinstance(error, Transient) else otherwise


def _expected(output: Output, planned: set[int]) -> set[int]:
    """Rows of a part that must be there; `where` over a manifest's columns cannot be judged without the manifest."""
    where = output.job["manifest"]["where"]
    if where is None:
        return planned
    if set(where) != {ROW}:
        return set()
    ranges = parse_ranges(str(where[ROW]))
    return {row for row in planned if any(row in wanted for wanted in ranges)}


# ---------------------------------------------------------------------------------------------- one sample's files


def file_problem(sample: StoredSample, how: Written) -> Problem | None:
    """What is wrong with a sample's files, or None."""
    record = sample.record
    if record["format"] != how.format:
        line = f"row {record['row']}, image {record['image_index']}: its format is {record['format']!r}, and the output's {how.format!r}"
        return Problem(line, "damage")
    name = name_of(SampleKey(record["row"], record["image_index"]), record["file_sha256"], FORMATS[how.format].extension)
    if sample.name != name:
        line = f"row {record['row']}, image {record['image_index']}: its file is named {sample.name!r}, and should be {name}"
        return Problem(line, "damage")
    size = (record.get("file_height") or record["height"], record.get("file_width") or record["width"])
    problem = _damage(sample, sample.key, sample.data, size, record, lossless=how.lossless)
    if problem is not None or record.get("original_file") is None:
        return problem
    said = {name: record[f"original_{name}"] for name in ("bytes", "file_sha256", "pixel_sha256")}
    key = record["original_file"]
    return _damage(sample, key, partial(sample.store.read, key), (record["height"], record["width"]), said, lossless=True)


def _damage(
    sample: StoredSample, key: str, read: Callable[[], bytes], size: tuple[int, int], said: dict[str, Any], *, lossless: bool
) -> Problem | None:
    """How the file under `key` is not the one of that height, width, and hashes. Of a lossy one, only rendering tells its pixels."""

    def problem(text: str, kind: Kind = "damage") -> Problem:
        return Problem(f"row {sample.record['row']}, image {sample.record['image_index']} ({key}): {text}", kind, key)

    try:
        data = read()
    except KeyError:
        return problem("the file is missing")
    except RenderfarmError as error:
        return problem(str(error), _kind(error))
    if len(data) != said["bytes"]:
        return problem(f"has {len(data):,} bytes, the table says {said['bytes']}")
    if hashlib.sha256(data).hexdigest() != said["file_sha256"]:
        return problem("its bytes are not those that were written (SHA-256 differs)")
    try:
        with decode(data) as image:
            pixels = np.asarray(image)
    except (RenderfarmError, *UNDECODABLE) as error:
        return problem(f"cannot be decoded: {error}")
    if pixels.shape != (*size, 3):
        return problem(f"is {pixels.shape[1]}×{pixels.shape[0]}, the table says {size[1]}×{size[0]}")
    if lossless and pixel_sha256(pixels) != said["pixel_sha256"]:
        return problem("its pixels are not those that were rendered (pixel SHA-256 differs)")
    return None
