"""The commit: one atomic create per part, whoever comes second adopts, every view can be mended."""

from __future__ import annotations

import datetime as dt
import hashlib
import io
import itertools
import json
import re
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from renderfarm import commit
from renderfarm.errors import InvalidJob, ProfileMismatch
from renderfarm.jobfile import load_job
from renderfarm.layouts import LAYOUTS, base
from renderfarm.layouts.base import Layout
from renderfarm.preparation import prepare
from renderfarm.records import Part, PartId, PartReceipt
from renderfarm.schema import ERROR_COLUMNS, ERRORS_KEY, IMAGE_COLUMNS, errors_from_json, errors_to_json, output_name
from renderfarm.storage import LocalStore, Store, open_store

PART = Part(7, 21, 24)
ENTRIES = "_renderfarm/parts"


def indexed(store: Store) -> dict[PartId, tuple[int, int, int]]:
    """Images, errors and bytes of each part, as the index says."""
    return {part: entry[1:] for part, entry in commit.index_entries(store).items()}


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return open_store(f"memory://{uuid.uuid4().hex}" if request.param == "memory" else str(tmp_path / "out"))


@pytest.fixture(params=list(LAYOUTS))
def layout(request: pytest.FixtureRequest) -> Layout:
    return LAYOUTS[request.param]


def images(*rows: int, size: int = 100) -> pa.Table:
    filled = {"row_id": "p", "prompt": "a", "sampler": "euler", "model": "m", "format": "png"}
    filled |= {"profile_sha256": "0", "file_sha256": "0", "pixel_sha256": "0", "guidance_scale": 5.0}
    numbers = {"image_index": 0, "seed": 1, "height": 64, "width": 64, "num_inference_steps": 3, "bytes": size}
    return pa.Table.from_pylist([{**filled, **numbers, "row": row, "file_name": f"{row}.png"} for row in rows], IMAGE_COLUMNS)


def errors(*rows: int, message: str = "prompt is empty", kind: str = "InvalidInput") -> pa.Table:
    filled = {"row_id": "p", "image_index": 0, "error_class": kind, "error_message": message, "retryable": False}
    return pa.Table.from_pylist([{**filled, "row": row, "prompt_sha256": None} for row in rows], ERROR_COLUMNS)


def publish(store: Store, layout: Layout, part: Part, images: pa.Table, errors: pa.Table) -> PartReceipt:
    """Commit a part as a worker does."""
    with layout.writer(store, part) as writer:
        for name, size in zip(images.column("file_name").to_pylist(), images.column("bytes").to_pylist(), strict=True):
            writer.add(name, b"." * size)
        return commit.publish(store, layout, part, writer, images, errors)


def error_view(store: Store) -> pa.Table:
    return pq.read_table(io.BytesIO(store.read("errors/part-00000007.parquet")))


# -------------------------------------------------------------------------------------------------- the frozen job


FROZEN = {"model": {"id": "m", "revision": None}, "seed": 0, "manifest": {"files": [{"path": "a", "rows": 3}], "where": None}}


def test_the_first_run_freezes_the_job_and_the_next_finds_it(store: Store) -> None:
    first = commit.freeze_job(store, FROZEN)
    assert first == {"format_version": 1, **FROZEN} == commit.read_json(store, commit.JOB)
    stored = store.read(commit.JOB)
    assert commit.freeze_job(store, FROZEN) == first
    assert store.read(commit.JOB) == stored


def test_every_difference_is_printed_with_what_is_there_and_what_is_now(store: Store) -> None:
    commit.freeze_job(store, FROZEN)
    changed = {
        "model": {"id": "n", "revision": None},
        "seed": 1,
        "manifest": {"files": [{"path": "a", "rows": 4}], "where": {"row": "0-1"}},
    }
    with pytest.raises(InvalidJob) as caught:
        commit.freeze_job(store, changed)
    assert str(caught.value).splitlines() == [
        f"{store.url} was begun with other settings, and these decide pixels or layout:",
        "  manifest.files[0].rows: 3 there, 4 now",
        '  manifest.where: null there, {"row": "0-1"} now',
        '  model.id: "m" there, "n" now',
        "  seed: 0 there, 1 now",
        "restore them to continue, or give another output (--out); "
        f"nothing is rendered yet, so you may also remove {store.url}/_renderfarm/job.json",
    ]
    assert commit.read_json(store, commit.JOB)["seed"] == 0


def test_a_field_that_came_or_went_and_a_longer_list_are_differences(store: Store) -> None:
    commit.freeze_job(store, {"a": 1, "list": [1]})
    with pytest.raises(InvalidJob) as caught:
        commit.freeze_job(store, {"b": 2, "list": [1, 2]})
    assert "  a: 1 there, null now\n  b: null there, 2 now\n  list: [1] there, [1, 2] now\n" in str(caught.value)


def test_of_sixteen_drivers_that_start_at_once_all_agree_on_one_job(store: Store) -> None:
    start = threading.Barrier(16)

    def freeze(number: int) -> int | None:
        start.wait()
        try:
            return int(commit.freeze_job(store, {"seed": number // 4})["seed"])
        except InvalidJob:
            return None

    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(freeze, range(16)))
    assert [seed for seed in found if seed is not None] == [commit.read_json(store, commit.JOB)["seed"]] * 4


def test_what_may_change_freely_is_not_frozen_and_what_decides_pixels_is(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["a"], "day": [dt.date(2024, 2, 29)]}), tmp_path / "m.parquet")
    base = {
        "name": "t",
        "manifest": {"path": "m.parquet", "where": {"day": dt.date(2024, 2, 29)}},
        "model": "builtin:fake",
        "output": {"path": "out"},
    }

    def frozen(**changes: Any) -> Any:
        (tmp_path / "job.yaml").write_text(yaml.safe_dump({**base, **changes}))
        return prepare(load_job(tmp_path / "job.yaml")).frozen()

    store = open_store(str(tmp_path / "out"))
    commit.freeze_job(store, frozen())
    assert commit.read_json(store, commit.JOB)["manifest"]["where"] == {"day": "2024-02-29"}
    for free in ({"name": "other"}, {"workers": {"max": 9, "device": "cpu"}}, {"failure": {"tolerate": 0.5}}):
        commit.freeze_job(store, frozen(**free))
    deciding = [
        {"seed": 1},
        {"seed_policy": "same"},
        {"render": {"height": 128}},
        {"workers": {"batch_size": 4}},
        {"workers": {"dtype": "bfloat16"}},
        {"output": {"path": "out", "part_rows": 5}},
        {"manifest": "m.parquet"},
    ]
    for change in deciding:
        with pytest.raises(InvalidJob, match="decide pixels or layout"):
            commit.freeze_job(store, frozen(**change))


# --------------------------------------------------------------------------------------------------------- profile


def test_the_first_worker_publishes_the_profile_and_an_equal_one_matches(store: Store) -> None:
    profile = {"torch": "2.10", "batch_size": 8, "flags": [True, None]}
    first = commit.publish_profile(store, profile)
    assert first == commit.publish_profile(store, dict(reversed(profile.items()))) == commit.profile_sha256(profile)
    assert len(first) == 64


def test_a_worker_that_would_paint_other_pixels_is_told_each_difference(store: Store) -> None:
    commit.publish_profile(store, {"torch": "2.10", "device": "cpu", "threads": 1})
    with pytest.raises(ProfileMismatch) as caught:
        commit.publish_profile(store, {"torch": "2.11", "device": "cpu", "threads": 2})
    assert '  threads: 1 there, 2 now\n  torch: "2.10" there, "2.11" now\n' in str(caught.value)
    assert "run where these are equal, give another output (--out), or let rows name" in str(caught.value)


def test_other_profiles_are_recorded_where_the_job_allows_them(store: Store) -> None:
    own, other = {"torch": "2.10"}, {"torch": "2.11"}
    assert commit.publish_profile(store, own, record_others=True) == commit.profile_sha256(own)
    assert commit.publish_profile(store, other, record_others=True) == commit.profile_sha256(other)
    assert commit.publish_profile(store, own, record_others=True) == commit.profile_sha256(own)
    assert commit.read_profile(store) == own
    assert commit.read_profiles(store) == {commit.profile_sha256(profile): profile for profile in (own, other)}
    with pytest.raises(ProfileMismatch):
        commit.publish_profile(store, other)


# ---------------------------------------------------------------------------------------------------- publish, adopt


def test_a_part_is_committed_with_its_view_and_its_index_entry(store: Store, layout: Layout) -> None:
    assert commit.find_commit(store, layout, PART) is None
    receipt = publish(store, layout, PART, images(21, 23, size=50), errors(22))
    assert receipt == PartReceipt(7, images=2, errors=1, bytes=100, adopted=False, error_classes={"InvalidInput": 1})
    named = {"data/part-00000007/21.png", "data/part-00000007/23.png"} if layout is LAYOUTS["files"] else set()
    assert set(store.list("data")) - named == {layout.commit_key(PART)}
    assert error_view(store).equals(errors(22))
    assert store.list(ENTRIES) == [entry := f"{ENTRIES}/part-00000007.i2.e1.b100.json"]
    _, committed = commit.read_part(store, layout, PART)
    assert commit.is_as_committed(store, entry, committed.sha256)
    if layout is LAYOUTS["files"]:
        assert committed.sha256 == hashlib.sha256(store.read(layout.commit_key(PART))).hexdigest()
    assert indexed(store) == {PartId(7): (2, 1, 100)}
    assert commit.error_classes(store, commit.index_entries(store)) == {"InvalidInput": 1}


def test_a_part_of_errors_alone_is_committed_by_its_error_table(store: Store, layout: Layout) -> None:
    receipt = publish(store, layout, PART, images(), errors(21, 22, 23))
    assert (receipt.images, receipt.errors, receipt.bytes) == (0, 3, 0)
    assert store.list("data") == []
    found = commit.find_commit(store, layout, PART)
    assert found == PartReceipt(7, 0, 3, 0, adopted=True, error_classes={"InvalidInput": 3})
    (entry,) = store.list(ENTRIES)
    assert commit.is_as_committed(store, entry, commit.read_part(store, layout, PART)[1].sha256)
    store.put("errors/part-00000007.parquet", base.errors_bytes(errors(21, 22, 23, message="another")))
    assert not commit.is_as_committed(store, entry, commit.read_part(store, layout, PART)[1].sha256)


def test_a_part_without_errors_leaves_no_error_file(store: Store, layout: Layout) -> None:
    publish(store, layout, PART, images(21), errors())
    assert store.list("errors") == []


def test_a_part_of_which_nothing_was_wanted_is_done_too(store: Store, layout: Layout) -> None:
    receipt = publish(store, layout, PART, images(), errors())
    assert (receipt.images, receipt.errors) == (0, 0)
    assert commit.find_commit(store, layout, PART) == PartReceipt(7, 0, 0, 0, adopted=True)
    assert PartId(7) in indexed(store)


def test_whoever_comes_second_adopts_what_is_stored_and_changes_no_byte(store: Store, layout: Layout) -> None:
    publish(store, layout, PART, images(21, 22), errors(23, message="first"))
    before = {key: store.read(key) for key in store.list("")}
    second = publish(store, layout, PART, images(21, 22, 23), errors())
    assert second == PartReceipt(7, 2, 1, 200, adopted=True, error_classes={"InvalidInput": 1})
    after = {key: store.read(key) for key in store.list("") if key != "data/part-00000007/23.png"}
    assert after == before, "beside an image that no table names, in the layout where images come first"


def test_a_writer_whose_reply_was_lost_adopts_its_own_part(store: Store, layout: Layout) -> None:
    with layout.writer(store, PART) as writer:
        writer.add("21.png", b"." * 100)
        store.put_if_absent(layout.commit_key(PART), writer.commit_object(images(21), errors(22)))  # and then the connection broke
    assert publish(store, layout, PART, images(21), errors(22)) == PartReceipt(7, 1, 1, 100, True, {"InvalidInput": 1})
    (entry,) = store.list(ENTRIES)
    assert entry == f"{ENTRIES}/part-00000007.i1.e1.b100.json"
    assert commit.is_as_committed(store, entry, commit.read_part(store, layout, PART)[1].sha256)
    assert error_view(store).equals(errors(22))
    assert PartId(7) in indexed(store)


def test_a_missing_view_and_a_missing_index_entry_are_mended_when_the_part_is_found(layout: Layout, tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    publish(store, layout, PART, images(21), errors(22, 23))
    committed = {key: store.read(key) for key in store.list("")}
    for removed in itertools.chain(*(itertools.combinations([key for key in committed if not key.startswith("data")], n) for n in (1, 2))):
        for key in removed:
            (tmp_path / key).unlink()
        assert commit.find_commit(store, layout, PART) == PartReceipt(7, 1, 2, 100, True, {"InvalidInput": 2})
        assert {key: store.read(key) for key in store.list("")} == committed


def test_of_sixteen_workers_with_one_part_one_commits_and_all_report_the_same(store: Store, layout: Layout) -> None:
    with ThreadPoolExecutor(16) as pool:
        for round_ in range(8):
            part, start = Part(round_, 0, 16), threading.Barrier(16)

            def race(worker: int, part: Part = part, start: threading.Barrier = start) -> PartReceipt:
                start.wait()
                return publish(store, layout, part, images(*range(worker + 1)), errors(*range(worker + 1, 16)))

            receipts = list(pool.map(race, range(16)))
            assert sum(not receipt.adopted for receipt in receipts) == 1
            assert len({(receipt.images, receipt.errors) for receipt in receipts}) == 1
            assert indexed(store)[PartId(round_)][0] == receipts[0].images


def stale_errors(store: Store, layout: Layout) -> None:
    """What a worker leaves that saw only errors, just before another one had images."""
    publish(store, layout, PART, images(), errors(21, 22, 23, kind="OutOfMemory"))


def test_an_error_view_whose_images_are_lost_is_no_commit(layout: Layout, tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    publish(store, layout, PART, images(21, 22), errors(23))
    for key in (layout.commit_key(PART), *store.list(ENTRIES)):
        store.delete(key)
    assert commit.find_commit(store, layout, PART) is None
    receipt = publish(store, layout, PART, images(), errors(21, 22, 23))  # rendered again, by a machine that cannot
    assert (receipt.images, receipt.errors, receipt.adopted) == (0, 3, False)
    assert commit.find_commit(store, layout, PART) == PartReceipt(7, 0, 3, 0, True, {"InvalidInput": 3})


def test_images_beat_errors_that_came_first(store: Store, layout: Layout) -> None:
    stale_errors(store, layout)
    receipt = publish(store, layout, PART, images(21, 22), errors(23))
    assert (receipt.images, receipt.errors, receipt.adopted) == (2, 1, False)
    assert commit.find_commit(store, layout, PART) == PartReceipt(7, 2, 1, 200, True, {"InvalidInput": 1})
    assert indexed(store) == {PartId(7): (2, 1, 200)}
    assert commit.error_classes(store, commit.index_entries(store)) == {"InvalidInput": 1}
    assert error_view(store).equals(errors(23))


def test_images_without_any_error_empty_the_error_view_that_came_first(store: Store, layout: Layout) -> None:
    stale_errors(store, layout)
    publish(store, layout, PART, images(21, 22, 23), errors())
    assert len(error_view(store)) == 0
    assert commit.error_classes(store, commit.index_entries(store)) == {}


def test_images_beat_errors_that_come_after(store: Store, layout: Layout) -> None:
    publish(store, layout, PART, images(21, 22, 23), errors())
    receipt = publish(store, layout, PART, images(), errors(21, 22, 23, kind="OutOfMemory"))
    assert receipt == PartReceipt(7, 3, 0, 300, adopted=True)
    assert store.list("errors") == [] or len(error_view(store)) == 0
    assert indexed(store) == {PartId(7): (3, 0, 300)}
    assert commit.error_classes(store, commit.index_entries(store)) == {}


def test_images_and_errors_racing_for_a_part_always_end_as_the_images(store: Store, layout: Layout) -> None:
    with ThreadPoolExecutor(2) as pool:
        for round_ in range(20):
            part, start = Part(round_, 0, 3), threading.Barrier(2)

            def race(good: bool, part: Part = part, start: threading.Barrier = start) -> None:
                start.wait()
                publish(store, layout, part, images(0, 1) if good else images(), errors(2) if good else errors(0, 1, 2))

            list(pool.map(race, (True, False)))
            found = commit.find_commit(store, layout, part)
            assert found is not None
            assert (found.images, found.errors) == (2, 1)
            assert indexed(store)[PartId(round_)][0] == 2
            view = base.read_errors(store.read(base.errors_key(part)))
            assert view.column("row").to_pylist() == [2]


def test_error_classes_are_counted_over_all_parts(store: Store, layout: Layout) -> None:
    publish(store, layout, Part(0, 0, 3), images(0), errors(1, 2))
    publish(store, layout, Part(1, 3, 6), images(), pa.concat_tables([errors(3, 4), errors(5, kind="OutOfMemory")]))
    publish(store, layout, Part(2, 6, 9), images(6, 7, 8), errors())
    assert commit.error_classes(store, commit.index_entries(store)) == {"InvalidInput": 4, "OutOfMemory": 1}
    assert commit.parts_of_the_grid(commit.index_entries(store)) == [0, 1, 2]


def test_foreign_keys_in_the_index_are_passed_over(store: Store) -> None:
    store.put(f"{ENTRIES}/.DS_Store", b"")
    store.put(f"{ENTRIES}/part-1.json", b"{}")
    assert indexed(store) == {}
    assert commit.error_classes(store, commit.index_entries(store)) == {}


def test_the_row_that_is_rendered_next_is_announced_and_read_back(store: Store) -> None:
    assert commit.announced_row(store, PART, "run.2") is None
    for row in (21, 2**40):
        commit.announce(store, PART, row, "run.2")
        assert commit.announced_row(store, PART, "run.2") == row
        assert commit.announced_row(store, PART, "earlier-run.2") is None, "an old announcement blames nobody"


# ---------------------------------------------------------------------------------------------------------- bytes


@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "row": st.integers(0, 2**62),
                "row_id": st.text(),
                "image_index": st.integers(0, 9999),
                "error_class": st.sampled_from(["InvalidInput", "RenderFailed"]),
                "error_message": st.text(),
                "retryable": st.booleans(),
                "prompt_sha256": st.none() | st.text("0123456789abcdef", min_size=64, max_size=64),
            }
        ),
        max_size=5,
    )
)
def test_error_rows_in_the_parquet_footer_are_read_back_whatever_they_say(rows: list[dict[str, Any]]) -> None:
    table = pa.Table.from_pylist(rows, ERROR_COLUMNS)
    found_images, found = base.read_table(base.table_bytes(images(1, 2), table))
    assert found.equals(table)
    assert found_images.equals(images(1, 2))
    assert errors_from_json(errors_to_json(table)).equals(table)


def test_the_error_rows_lie_in_the_footer_and_no_reader_sees_them_in_the_table() -> None:
    data = base.table_bytes(images(1), errors(2))
    assert json.loads(pq.read_metadata(io.BytesIO(data)).metadata[ERRORS_KEY])[0]["row"] == 2
    assert pq.read_table(io.BytesIO(data)).num_rows == 1
    assert ERRORS_KEY not in (pq.read_metadata(io.BytesIO(base.table_bytes(images(1), errors()))).metadata or {})


def test_the_same_tables_give_the_same_bytes_however_they_were_put_together() -> None:
    whole = base.table_bytes(images(1, 2, 3), errors(4, 5))
    pieces = pa.concat_tables([images(1), images(2, 3)]).combine_chunks(), pa.concat_tables([errors(4), errors(5)])
    assert base.table_bytes(*pieces) == whole
    assert base.errors_bytes(pieces[1]) == base.errors_bytes(errors(4, 5))
    assert base.table_bytes(*base.read_table(whole)) == whole


def test_the_same_profile_gives_the_same_json_whatever_the_order_of_its_keys() -> None:
    assert commit.to_json({"b": 1, "a": {"d": "ü", "c": None}}) == commit.to_json({"a": {"c": None, "d": "ü"}, "b": 1})
    assert json.loads(commit.to_json({"a": "ü\u2028"})) == {"a": "ü\u2028"}


# --------------------------------------------------------------------------------------------------------- columns


def test_an_own_column_with_one_of_our_names_gets_a_prefix_and_every_other_keeps_its_own() -> None:
    ours = [name for name in IMAGE_COLUMNS.names if name != "file_name"]
    assert [output_name(name) for name in ours] == [f"input_{name}" for name in ours]
    for name in ("file_name", "source_file_name", "file_names"):  # each of which `datasets` would open
        assert not re.search("file_names?$", output_name(name))
    assert [output_name(name) for name in ("mood", "id", "Prompt", "")] == ["mood", "id", "Prompt", ""]
