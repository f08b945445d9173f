"""Manifests as rows: which `where` selects, and streams that equal slices of the whole table."""

from __future__ import annotations

import datetime as dt
import itertools
import tempfile
import threading
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opening import Write, opened, refusal, rows

from renderfarm.manifest import BATCH_ROWS, EXTRA, ROW, _in_ranges

# -------------------------------------------------------------------------------------------------------------- where


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ({"mood": "x"}, [0, 3]),
        ({"mood": ["x", "z"]}, [0, 2, 3]),
        ({"mood": None}, [4]),
        ({"mood": ["y", None]}, [1, 4]),
        ({"mood": []}, []),
        ({"mood": "nobody"}, []),
        ({"seed": 3}, [3]),
        ({"seed": [1, 2], "mood": ["x", "y"]}, [1]),
        ({"day": dt.date(2024, 1, 2)}, [1]),
        ({"flag": True}, [0, 2]),
        ({"cfg": 7.1}, [4]),
        ({"row": "1-3"}, [1, 2, 3]),
        ({"row": 2}, [2]),
        ({"row": "0-4:2"}, [0, 2, 4]),
        ({"row": "1-4:2,0"}, [0, 1, 3]),
        ({"row": " 0 , 4 "}, [0, 4]),
        ({"row": "3-100"}, [3, 4]),
        ({"row": "9"}, []),
        ({"row": "0-3", "mood": "x"}, [0, 3]),
    ],
)
def test_where_selects_by_value_list_and_row_range_and_keeps_ordinals(
    write_manifest: Write, where: dict[str, Any], expected: list[int]
) -> None:
    columns = {
        "prompt": list("abcde"),
        "mood": ["x", "y", "z", "x", None],
        "seed": [0, 1, 2, 3, 4],
        "day": [dt.date(2024, 1, 1 + k) for k in range(5)],
        "flag": [True, False, True, None, False],
        "cfg": pa.array([0, 1, 2, 3, 7.1], pa.float32()),
    }
    found = rows(write_manifest(columns), where=where)
    assert found[ROW] == expected
    assert found["prompt"] == ["abcde"[k] for k in expected]


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ({"moood": "x"}, "manifest.where: no column 'moood'; did you mean 'mood'?"),
        ({"xyz": "x"}, "manifest.where: no column 'xyz'; there are: row, prompt, seed, mood, tags"),
        ({"seed": "many"}, "manifest.where: seed has type int64, which 'many' does not fit"),
        ({"seed": 1.5}, "manifest.where: seed has type int64, which 1.5 does not fit"),
        ({"seed": 10**30}, "manifest.where: seed has type int64, which 1000"),
        ({"seed": [1, "x"]}, "manifest.where: seed has type int64, which [1, 'x'] does not fit"),
        ({"mood": {"a": 1}}, "manifest.where: mood has type string, which {'a': 1} does not fit"),
        ({"tags": "x"}, "manifest.where: tags has type list<"),
        ({"row": "5-1"}, "manifest.where.row: '5-1' is not a range; write rows as 0-199,300,400-500:2"),
        ({"row": "a-b"}, "manifest.where.row: 'a-b' is not a range"),
        ({"row": "0-9:0"}, "manifest.where.row: '0-9:0' is not a range"),
        ({"row": "0-9:-1"}, "manifest.where.row: '0-9:-1' is not a range"),
        ({"row": "-3"}, "manifest.where.row: '-3' is not a range"),
        ({"row": "1,,2"}, "manifest.where.row: '' is not a range"),
        ({"row": ""}, "manifest.where.row: '' is not a range"),
        ({"row": None}, "manifest.where.row: 'None' is not a range"),
    ],
)
def test_a_wrong_where_is_refused_before_any_row_is_read(write_manifest: Write, where: dict[str, Any], expected: str) -> None:
    path = write_manifest({"prompt": ["a"], "seed": [1], "mood": ["x"], "tags": [["x"]]})
    assert expected in refusal(path, where=where)


def test_where_may_name_a_mapped_argument_and_reads_a_column_of_gaps(write_manifest: Write) -> None:
    paths = [
        write_manifest({"caption": ["a", "b"], "seed": pa.nulls(2)}, "a.parquet"),
        write_manifest({"caption": ["a"], "seed": [5]}, "b.parquet"),
    ]
    assert rows(paths, columns={"prompt": "caption"}, where={"prompt": "a"})[ROW] == [0, 2]
    assert rows(paths, columns={"prompt": "caption"}, where={"seed": 5})[ROW] == [2]
    assert rows(paths, columns={"prompt": "caption"}, where={"seed": None})[ROW] == [0, 1]


@given(st.data())
def test_row_ranges_mean_what_python_ranges_mean(data: st.DataObject) -> None:
    spans = data.draw(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 20), st.integers(1, 7)), min_size=1, max_size=4))
    text = ",".join(f"{start}-{start + length}:{step}" for start, length, step in spans)
    expected = {row for start, length, step in spans for row in range(start, start + length + 1, step)}
    ordinals = np.arange(70)
    assert set(ordinals[_in_ranges(ordinals, text)]) == expected


# ----------------------------------------------------------------------------------------------------------- streaming


@st.composite
def split_tables(draw: st.DrawFn) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Files as (rows, row group size), and ascending ranges over them."""
    files = draw(st.lists(st.tuples(st.integers(0, 25), st.integers(1, 9)), min_size=1, max_size=5).filter(lambda f: sum(n for n, _ in f)))
    total = sum(count for count, _ in files)
    ends = sorted(draw(st.sets(st.integers(0, total), min_size=2, max_size=12)) if total > 1 else {0, 1})
    pairs = list(itertools.pairwise(ends))
    keep = draw(st.lists(st.booleans(), min_size=len(pairs), max_size=len(pairs)))
    return files, [pair for pair, kept in zip(pairs, keep, strict=True) if kept]


@settings(max_examples=150, deadline=None)
@given(split_tables())
def test_any_ascending_ranges_over_any_split_equal_slices_of_the_whole_table(
    case: tuple[list[tuple[int, int]], list[tuple[int, int]]],
) -> None:
    files, ranges = case
    total = sum(count for count, _ in files)
    whole = pa.table(
        {"prompt": [f"p{k}" for k in range(total)], "seed": range(total), "own": [None if k % 3 else k / 2 for k in range(total)]}
    )
    with tempfile.TemporaryDirectory() as folder:
        start = 0
        for number, (count, group) in enumerate(files):
            pq.write_table(whole.slice(start, count), f"{folder}/{number}.parquet", row_group_size=group)
            start += count
        tables = list(opened(folder).stream(ranges))
    expected = whole.rename_columns(["prompt", "seed", EXTRA + "own"])
    assert [found.column(ROW).to_pylist() for found in tables] == [list(range(*pair)) for pair in ranges]
    for found, (first, stop) in zip(tables, ranges, strict=True):
        assert found.drop_columns([ROW]).to_pydict() == expected.slice(first, stop - first).to_pydict()


def test_ranges_that_cross_batches_of_a_large_row_group_lose_nothing(write_manifest: Write) -> None:
    count = 2 * BATCH_ROWS + 37
    manifest = opened(write_manifest({"prompt": [f"p{k}" for k in range(count)]}))
    ranges = [(start, min(count, start + 1000)) for start in range(0, count, 1000)]
    assert [row for found in manifest.stream(ranges) for row in found.column(ROW).to_pylist()] == list(range(count))
    skipping = [(5, 6), (BATCH_ROWS - 1, BATCH_ROWS + 1), (count - 1, count)]
    assert [found.column("prompt").to_pylist() for found in manifest.stream(skipping)] == [["p5"], ["p4095", "p4096"], [f"p{count - 1}"]]


def test_two_streams_of_one_manifest_do_not_disturb_each_other(write_manifest: Write) -> None:
    manifest = opened(write_manifest({"prompt": [f"p{k}" for k in range(100)]}, row_group_size=9))
    found: list[list[str]] = [[] for _ in range(4)]

    def read(place: int) -> None:
        for piece in manifest.stream([(k, k + 5) for k in range(0, 100, 5)]):
            found[place] += piece.column("prompt").to_pylist()

    threads = [threading.Thread(target=read, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[f"p{k}" for k in range(100)]] * 4
