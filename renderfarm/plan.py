"""Rows → parts → leases. Pure: a grid of parts, and which of them are still to do."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa

from renderfarm.config import Job
from renderfarm.manifest import ROW, Manifest, parse_ranges
from renderfarm.records import Lease, Part

AUTO_PART_IMAGES = 64


@dataclass(frozen=True)
class Grid:
    """The fixed grid of parts over a manifest, frozen in job.json. `where_row`: the only rows wanted, as ranges."""

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

    def __len__(self) -> int:
        return sum(len(span) for span in self.wanted)

    def __iter__(self) -> Iterator[Part]:
        return (self.part(index) for span in self.wanted for index in span)

    def part(self, index: int) -> Part:
        return Part(index, index * self.part_rows, min(self.rows, (index + 1) * self.part_rows))


def frozen_grid(job: dict[str, Any]) -> Grid:
    """The grid of an output, from its job.json."""
    rows = sum(file["rows"] for file in job["manifest"]["files"])
    return Grid(rows, job["output"]["part_rows"], where_row(job["manifest"]["where"]))


def where_row(where: dict[str, Any] | None) -> str | None:
    return str(where[ROW]) if where and ROW in where else None


def choose_part_rows(job: Job) -> int:
    """`auto`: so many rows that a part has about AUTO_PART_IMAGES images."""
    if job.output.part_rows != "auto":
        return job.output.part_rows
    return max(1, AUTO_PART_IMAGES // (job.render.num_images_per_prompt or 1))


def leases(manifest: Manifest, grid: Grid, is_done: Callable[[int], bool]) -> Iterator[Lease]:
    """One lease per part that is not done, in order, with its rows read as it is asked for."""
    left, ahead = itertools.tee(part for part in grid if not is_done(part.index))
    tables = manifest.stream((part.start, part.stop) for part in ahead)
    for part, rows in zip(left, tables, strict=True):
        # a slice pickles with all of its batch's buffers; a copy holds the lease's own rows
        yield Lease(number=part.index, parts=(part,), rows=rows.take(pa.array(range(len(rows)), pa.int64())))
