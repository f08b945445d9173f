"""Identity and order of the values that travel; the grid of parts; leases that carry just their own rows."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from renderfarm import records
from renderfarm.config import ManifestSpec, ModelSpec
from renderfarm.errors import Fatal
from renderfarm.manifest import EXTRA, ROW, Manifest, open_manifest
from renderfarm.models.catalog import describe
from renderfarm.plan import MAX_PART_IMAGES, Grid, choose_part_rows, leases, retry_leases
from renderfarm.records import InputImage, Lease, Part, PartId, PartReceipt, Receipt, Retry, RowError, Sample, SampleKey, WorkerReady

Write = Callable[..., Path]
VALUES = [
    SampleKey(3, 1),
    InputImage("a/b.png", b"bytes"),
    Sample(SampleKey(3, 1), "p3", "a cat", None, 7, 64, 64, 20, 5.0, "euler"),
    RowError(SampleKey(3, 1), "p3", "InvalidInput", "prompt is empty", False, None),
    Part(3, 9, 12),
    PartId(3, 1),
    Retry(PartId(3, 1), frozenset({SampleKey(9, 0)})),
    PartReceipt(3, 2, 1, 999, error_classes={"InvalidInput": 1}),
    Receipt(3, (PartReceipt(3, 2, 1, 999),), 0.5),
    WorkerReady("w0", "ab" * 32, "cpu", 1.5, 8, 0.25),
]


def opened(path: Path, **spec: Any) -> Manifest:
    return open_manifest(ManifestSpec(path=str(path), **spec), describe(ModelSpec(id="builtin:fake")).arguments)


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_every_value_is_frozen_and_travels_between_processes(value: Any) -> None:
    field = dataclasses.fields(value)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, field, None)
    assert pickle.loads(pickle.dumps(value)) == value  # noqa: S301  our own bytes
    assert copy.deepcopy(value) == value


def test_every_record_of_the_module_is_among_those_tested() -> None:
    kinds = {kind for kind in vars(records).values() if isinstance(kind, type) and dataclasses.is_dataclass(kind)}
    assert kinds - {type(value) for value in VALUES} == {Lease}


@given(st.lists(st.tuples(st.integers(0, 10**12), st.integers(0, 9999)), unique=True))
def test_sample_keys_order_by_row_then_image_and_are_good_dictionary_keys(pairs: list[tuple[int, int]]) -> None:
    keys = [SampleKey(*pair) for pair in pairs]
    assert [(key.row, key.image_index) for key in sorted(keys)] == sorted(pairs)
    assert len({*keys, *(SampleKey(*pair) for pair in pairs)}) == len(pairs)


def test_part_names_sort_as_their_numbers() -> None:
    names = [Part(index, 0, 1).name for index in (0, 9, 10, 99_999_999)]
    assert names == ["part-00000000", "part-00000009", "part-00000010", "part-99999999"] == sorted(names)


def test_a_retry_is_a_part_of_its_own_that_comes_after_its_first_rendering() -> None:
    parts = [PartId(3), PartId(3, 1), PartId(3, 2), PartId(3, 10), PartId(4)]
    assert parts == sorted(set(parts))
    assert [part.name for part in parts[:2]] == ["part-00000003", "part-00000003.r1"] == [Part(3, 9, 12, retry).name for retry in (0, 1)]
    assert [str(part) for part in parts] == ["3", "3.r1", "3.r2", "3.r10", "4"]


@given(st.integers(1, 5000), st.integers(1, 700))
def test_the_grid_covers_every_row_once_in_order(rows: int, part_rows: int) -> None:
    grid = Grid(rows, part_rows)
    parts = [grid.part(index) for index in range(grid.count)]
    assert [row for part in parts for row in range(part.start, part.stop)] == list(range(rows))
    assert [part.index for part in parts] == list(range(grid.count))
    assert all(part.stop - part.start == part_rows for part in parts[:-1])
    assert 1 <= parts[-1].stop - parts[-1].start <= part_rows


@given(st.integers(1, 10**9), st.integers(1, 1000), st.integers(1, 10**6))
def test_appending_rows_moves_no_part_but_the_last(rows: int, part_rows: int, more: int) -> None:
    grid, longer = Grid(rows, part_rows), Grid(rows + more, part_rows)
    last = grid.count - 1
    assert longer.part(0) == grid.part(0) or last == 0
    assert (longer.part(last).index, longer.part(last).start) == (grid.part(last).index, grid.part(last).start)


def test_a_manifest_of_a_billion_rows_is_planned_without_walking_it() -> None:
    grid = Grid(1_000_000_000, 64)
    assert grid.count == 15_625_000
    assert grid.part(15_624_999) == Part(15_624_999, 999_999_936, 1_000_000_000)


@pytest.mark.parametrize(
    ("rows", "images_per_row", "seconds_per_image", "batch_size", "workers", "expected"),
    [
        (100_000, 1, 0.25, 8, 4, 120),  # half a minute's work
        (100_000, 4, 0.25, 8, 4, 30),
        (100_000, 2.5, 0.25, 8, 4, 48),
        (100_000, 1, 0.0001, 8, 4, MAX_PART_IMAGES),
        (100_000, 1, 0.0, 8, 4, MAX_PART_IMAGES),
        (100_000, 1, 600.0, 1, 4, 1),
        (100_000, 1, 600.0, 8, 4, 8),  # slots are filled, however long it takes
        (100_000, 10_000, 0.25, 8, 4, 1),  # a row is never divided
        (100, 1, 0.25, 8, 8, 6),  # two parts for each worker
        (3, 1, 0.25, 8, 8, 1),
    ],
)
def test_automatic_parts_take_half_a_minute_within_reason(
    rows: int, images_per_row: float, seconds_per_image: float, batch_size: int, workers: int, expected: int
) -> None:
    assert choose_part_rows(rows, images_per_row, seconds_per_image, batch_size, workers) == expected


def test_one_lease_per_part_that_is_not_done_with_just_its_rows(write_manifest: Write) -> None:
    manifest = opened(write_manifest({"prompt": [f"p{k}" for k in range(10)], "mood": list("abcdefghij")}, row_group_size=4))
    found = list(leases(manifest, Grid(10, 3), {1}.__contains__))
    assert [(lease.number, lease.parts) for lease in found] == [(0, (Part(0, 0, 3),)), (2, (Part(2, 6, 9),)), (3, (Part(3, 9, 10),))]
    assert [lease.rows.to_pydict() for lease in found[1:]] == [
        {ROW: [6, 7, 8], "prompt": ["p6", "p7", "p8"], EXTRA + "mood": ["g", "h", "i"]},
        {ROW: [9], "prompt": ["p9"], EXTRA + "mood": ["j"]},
    ]
    assert list(leases(manifest, Grid(10, 3), lambda index: True)) == []


def test_a_lease_of_a_retry_carries_the_rows_that_are_asked_for_and_no_others(write_manifest: Write) -> None:
    manifest = opened(write_manifest({"prompt": [f"p{k}" for k in range(12)]}, row_group_size=5))
    asked = [
        Retry(PartId(3, 1), frozenset({SampleKey(11, 0)})),
        Retry(PartId(1, 2), frozenset({SampleKey(5, 1), SampleKey(3, 0), SampleKey(5, 0)})),
    ]
    first, second = retry_leases(manifest, Grid(12, 3), asked)
    assert [first.parts, second.parts] == [(Part(1, 3, 6, 2),), (Part(3, 9, 12, 1),)]
    assert [lease.rows.to_pydict() for lease in (first, second)] == [
        {ROW: [3, 5], "prompt": ["p3", "p5"]},
        {ROW: [11], "prompt": ["p11"]},
    ]
    assert [lease.only for lease in (first, second)] == [asked[1].samples, asked[0].samples]
    numbers = {lease.number for lease in (first, second)} | {lease.number for lease in leases(manifest, Grid(12, 3), lambda index: False)}
    assert len(numbers) == 6, "no two leases have one number"
    assert list(retry_leases(manifest, Grid(12, 3), [])) == []


@pytest.mark.parametrize("samples", [[], [SampleKey(2, 0)], [SampleKey(3, 0), SampleKey(6, 0)]])
def test_a_request_for_samples_of_another_part_says_what_to_do(samples: list[SampleKey], write_manifest: Write) -> None:
    manifest = opened(write_manifest({"prompt": [f"p{k}" for k in range(12)]}))
    with pytest.raises(Fatal, match=r"part-00000001\.r1 asks for samples that its part does not have; remove it from _renderfarm/retries/"):
        list(retry_leases(manifest, Grid(12, 3), [Retry(PartId(1, 1), frozenset(samples))]))


def test_a_lease_whose_rows_are_all_left_out_still_ends_its_part(write_manifest: Write) -> None:
    manifest = opened(write_manifest({"prompt": list("abcd")}), where={"row": "0"})
    assert [lease.rows.column(ROW).to_pylist() for lease in leases(manifest, Grid(4, 2), lambda index: False)] == [[0], []]


@given(st.integers(1, 300), st.integers(1, 40), st.lists(st.tuples(st.integers(0, 350), st.integers(0, 60), st.integers(1, 5)), min_size=1))
def test_only_parts_within_the_named_spans_are_leased(rows: int, part_rows: int, spans: list[tuple[int, int, int]]) -> None:
    grid = Grid(rows, part_rows, ",".join(f"{first}-{first + length}:{stride}" for first, length, stride in spans))
    named = {row for first, length, stride in spans for row in range(first, first + length + 1, stride) if row < rows}
    found = [part.index for part in grid]
    assert len(found) == grid.count
    assert found == sorted(set(found))
    assert set(found) <= set(range(grid.total))
    assert set(found) >= {row // part_rows for row in named}
    near = {index for first, length, _ in spans for index in range(first // part_rows, (first + length) // part_rows + 1)}
    assert set(found) <= near


def test_a_lease_is_sent_with_its_own_rows_and_not_with_its_whole_batch(write_manifest: Write) -> None:
    manifest = opened(write_manifest({"prompt": [f"{k:01000d}" for k in range(2000)]}))
    first = next(leases(manifest, Grid(2000, 2), lambda index: False))
    assert len(pickle.dumps(first)) < 20_000
    there = pickle.loads(pickle.dumps(first))  # noqa: S301  our own bytes
    assert there == first
    assert isinstance(there.rows, pa.Table)


def test_leases_are_read_only_as_far_as_they_are_asked_for(write_manifest: Write) -> None:
    path = write_manifest({"prompt": [f"p{k}" for k in range(8)]})
    asked: list[int] = []
    found = leases(opened(path), Grid(8, 2), lambda index: bool(asked.append(index)))  # type: ignore[func-returns-value]
    next(found)
    assert asked == [0]
