"""Rows → parts → leases. Pure: a grid of parts, and which of them are still to do."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from renderfarm.errors import Fatal
from renderfarm.manifest import ROW, Manifest, parse_ranges
from renderfarm.records import Lease, Part, Retry

# `part_rows: auto`. A part is what a crash costs, and what the others wait for at the end; but each is a commit, and the
# few that a worker holds must fill its slots.
PART_SECONDS = 30.0
MAX_PART_IMAGES = 512
PARTS_PER_WORKER = 2  # at least, so that a short job has work for all


@dataclass(frozen=True)
class Grid:
    """The fixed grid of parts over a manifest, frozen in the output. `where_row`: the only rows wanted, as ranges."""

    rows: int
    part_rows: int
    where_row: str | None = None

    @property
    def total(self) -> int:
        """Parts of the whole grid; their indices are below it."""
        return -(-self.rows // self.part_rows)

    @cached_property
    def wanted(self) -> tuple[range, ...]:
        """Indices of the parts to render, ascending: all, or those within the spans of `where_row` (a stride
        may leave some of these without a row)."""
        if self.where_row is None:
            return (range(self.total),)
        spans: list[range] = []
        for rows in sorted(parse_ranges(self.where_row), key=lambda rows: rows.start):
            first, stop = rows.start // self.part_rows, min(self.total, rows[-1] // self.part_rows + 1)
            if spans and first <= spans[-1].stop:
                spans[-1] = range(spans[-1].start, max(stop, spans[-1].stop))
            elif first < stop:
                spans.append(range(first, stop))
        return tuple(spans)

    @property
    def count(self) -> int:
        """Parts to render."""
        return sum(len(span) for span in self.wanted)

    def rows_in(self, parts: int, *, last: bool) -> int:
        """Rows of so many parts. `last`: the grid's last one, which may be a short one, is among them."""
        return parts * self.part_rows - (self.total * self.part_rows - self.rows) * last

    def __iter__(self) -> Iterator[Part]:
        return (self.part(index) for span in self.wanted for index in span)

    def part(self, index: int, retry: int = 0) -> Part:
        return Part(index, index * self.part_rows, min(self.rows, (index + 1) * self.part_rows), retry)


def where_row(where: dict[str, Any] | None) -> str | None:
    return str(where[ROW]) if where and ROW in where else None


def choose_part_rows(rows: int, images_per_row: float, seconds_per_image: float, batch_size: int, workers: int) -> int:
    """`part_rows: auto`: rows that take one worker PART_SECONDS, within what its slots, memory and the other workers ask for."""
    images = max(batch_size, min(MAX_PART_IMAGES, PART_SECONDS / max(seconds_per_image, 1e-6)))
    return max(1, min(int(images / images_per_row), rows // (PARTS_PER_WORKER * workers)))


def leases(manifest: Manifest, grid: Grid, is_done: Callable[[int], bool], begin_at: int = 0) -> Iterator[Lease]:
    """One lease per part that is not done, with its rows read as it is asked for: in order from part `begin_at` on, then those before."""
    yield from _ascending(manifest, (part for part in grid if part.index >= begin_at and not is_done(part.index)))
    yield from _ascending(manifest, (part for part in grid if part.index < begin_at and not is_done(part.index)))


def _ascending(manifest: Manifest, parts: Iterator[Part]) -> Iterator[Lease]:
    left, ahead = itertools.tee(parts)
    tables = manifest.stream((part.start, part.stop) for part in ahead)
    for part, rows in zip(left, tables, strict=True):
        # a slice pickles with all of its batch's buffers; a copy holds the lease's own rows
        yield Lease(number=part.index, parts=(part,), rows=rows.take(pa.array(range(len(rows)), pa.int64())))


def retry_leases(manifest: Manifest, grid: Grid, retries: Iterable[Retry]) -> Iterator[Lease]:
    """One lease per retry, in the parts' order, with the rows that it is about. Of one part there is one retry at most.

    Raises Fatal for samples that the part does not have.
    """
    wanted = sorted(retries, key=lambda retry: retry.part)
    for retry in wanted:
        part = grid.part(retry.part.index, retry.part.retry)
        if not retry.samples or any(not part.start <= sample.row < part.stop for sample in retry.samples):
            raise Fatal(
                f"the request {retry.part.name} asks for samples that its part does not have; remove it from _renderfarm/retries/, "
                "and `renderfarm retry` asks again for what failed"
            )
    rows = [sorted({sample.row for sample in retry.samples}) for retry in wanted]
    for retry, ordinals, table in zip(wanted, rows, manifest.stream((span[0], span[-1] + 1) for span in rows), strict=True):
        # numbers of their own: a part's first rendering has its index
        number = grid.total * retry.part.retry + retry.part.index
        asked = table.filter(pc.is_in(table.column(ROW), pa.array(ordinals, pa.int64())))
        yield Lease(number=number, parts=(grid.part(retry.part.index, retry.part.retry),), rows=asked, only=retry.samples)
