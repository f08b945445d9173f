"""Rows → parts → leases. Pure: a grid of parts, and which of them are still to do."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pyarrow as pa

from renderfarm.config import Job
from renderfarm.manifest import Manifest
from renderfarm.records import Lease, Part

AUTO_PART_IMAGES = 64


@dataclass(frozen=True)
class Grid:
    """The fixed grid of parts over a manifest, frozen in job.json."""

    rows: int
    part_rows: int

    def __len__(self) -> int:
        return -(-self.rows // self.part_rows)

    def part(self, index: int) -> Part:
        return Part(index, index * self.part_rows, min(self.rows, (index + 1) * self.part_rows))


def choose_part_rows(job: Job) -> int:
    """`auto`: so many rows that a part has about AUTO_PART_IMAGES images."""
    if job.output.part_rows != "auto":
        return job.output.part_rows
    return max(1, AUTO_PART_IMAGES // (job.render.num_images_per_prompt or 1))


def leases(manifest: Manifest, grid: Grid, is_done: Callable[[int], bool]) -> Iterator[Lease]:
    """One lease per part that is not done, in order, with its rows read as it is asked for."""
    left, ahead = itertools.tee(grid.part(index) for index in range(len(grid)) if not is_done(index))
    tables = manifest.stream((part.start, part.stop) for part in ahead)
    for part, rows in zip(left, tables, strict=True):
        # a slice pickles with all of its batch's buffers; a copy holds the lease's own rows
        yield Lease(number=part.index, parts=(part,), rows=rows.take(pa.array(range(len(rows)), pa.int64())))
