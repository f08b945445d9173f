"""`renderfarm validate`: look at every row without rendering one."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from renderfarm.errors import InvalidJob
from renderfarm.inputs import Fetcher
from renderfarm.preparation import Prepared
from renderfarm.records import RowError
from renderfarm.samples import ExpandedRow, expand_rows, row_error
from renderfarm.shown import Shown

KEPT_PROBLEMS = 100
ROWS_AT_A_TIME = 1000
ROWS_WITH_IMAGES_AT_A_TIME = 32  # which may lie in the rows


@dataclass
class Validation(Shown):
    """`problems`: the first messages, each with file, row and column. Counts cover all rows."""

    rows: int = 0
    images: int = 0
    bad_rows: int = 0
    duplicate_ids: int = 0
    problems: list[str] = field(default_factory=list)
    hints: list[str] = field(default_factory=list)
    classes: Counter[str] = field(default_factory=Counter)

    @property
    def ok(self) -> bool:
        return not self.bad_rows and not self.duplicate_ids


def validate_rows(prepared: Prepared) -> Validation:
    """Stream the manifest through the very checks that a worker makes, but that URLs are not fetched. Memory: 8 bytes a row for
    duplicate ids."""
    manifest, with_images = prepared.manifest, bool(prepared.model.images)
    found, ids = Validation(hints=[*prepared.column_hints(), *prepared.model.warnings]), array("Q")
    fetcher = Fetcher(prepared.job.inputs, prepared.model, prepared.store)
    ranges = ((part.start, part.stop) for part in prepared.grid_of(ROWS_WITH_IMAGES_AT_A_TIME if with_images else ROWS_AT_A_TIME))
    for table in manifest.stream(ranges):
        rows = list(expand_rows(table, prepared.job, prepared.model))
        of_images = _problems_of_images(fetcher, rows) if with_images else {}
        for row in rows:
            found.rows += 1
            ids.append(int.from_bytes(hashlib.blake2b(row.row_id.encode(), digest_size=8).digest(), "big"))
            if (problem := of_images.get(row.ordinal) or (row.errors[0] if row.errors else None)) is None:
                found.images += len(row.samples)
                continue
            found.bad_rows += 1
            found.classes[problem.error_class] += 1
            _keep(found, f"{manifest.where_is(row.ordinal)}: {problem.error_message}")
    if not found.rows:
        raise InvalidJob("manifest.where selects no row; correct it")
    _count_duplicates(prepared, found, np.frombuffer(ids, dtype=np.uint64))
    return found


def _problems_of_images(fetcher: Fetcher, rows: Iterable[ExpandedRow]) -> dict[int, RowError]:
    """By ordinal. A row's samples have the same images."""
    firsts = [row.samples[0] for row in rows if row.samples]
    problems = zip(firsts, fetcher.problems(firsts), strict=True)
    return {first.key.row: row_error(first.key, first.row_id, first.prompt, error) for first, error in problems if error is not None}


def _count_duplicates(prepared: Prepared, found: Validation, ids: np.ndarray) -> None:
    if "id" not in prepared.manifest.columns or "seed" in prepared.manifest.columns or len(ids) == 0:
        return  # rows with seeds may share an id: as many images of one prompt
    order = np.argsort(ids, kind="stable")
    again = order[1:][ids[order[1:]] == ids[order[:-1]]]
    found.duplicate_ids = len(again)
    for place in sorted(again)[: KEPT_PROBLEMS - len(found.problems)]:
        first = int(np.argmax(ids == ids[place]))
        _keep(
            found,
            f"{_place(prepared, place)}: its id is that of {_place(prepared, first)}; "
            "without a seed of their own both get the same noise: give each row its own id",
        )


def _place(prepared: Prepared, index: int) -> str:
    """Ordinals are not kept; with `where`, a row is named by its place among the selected ones."""
    return prepared.manifest.where_is(index) if prepared.manifest.where is None else f"row {index} of the selection"


def _keep(found: Validation, problem: str) -> None:
    if len(found.problems) < KEPT_PROBLEMS:
        found.problems.append(problem)
