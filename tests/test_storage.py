"""The contract of a store, on every store; then what only files can suffer."""

from __future__ import annotations

import os
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from renderfarm.errors import AlreadyExists, Fatal, InvalidJob
from renderfarm.storage import TEMPORARY, LocalStore, MemoryStore, Store, open_store, probe


@pytest.fixture(params=["local", "memory", "s3", "azure"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param in ("s3", "azure"):
        return open_store(f"{request.getfixturevalue(request.param)}/some/out")
    return open_store(f"memory://{uuid.uuid4().hex}" if request.param == "memory" else str(tmp_path / "out"))


def test_what_was_put_is_read_back(store: Store) -> None:
    for data in (b"", b"x", bytes(range(256)) * 1000):
        store.put("a/b/c.bin", data)
        assert store.read("a/b/c.bin") == data
    assert store.exists("a/b/c.bin")


def test_a_missing_key_is_a_key_error_and_does_not_exist(store: Store) -> None:
    assert not store.exists("a/b")
    with pytest.raises(KeyError):
        store.read("a/b")


def test_put_replaces_and_put_if_absent_does_not(store: Store) -> None:
    store.put_if_absent("a/k", b"first")
    with pytest.raises(AlreadyExists, match="a/k exists in"):
        store.put_if_absent("a/k", b"second")
    assert store.read("a/k") == b"first"
    store.put("a/k", b"third")
    assert store.read("a/k") == b"third"
    with pytest.raises(AlreadyExists):
        store.put_if_absent("a/k", b"third")


def test_a_list_holds_every_key_below_a_folder_sorted_and_nothing_else(store: Store) -> None:
    for key in ("data/part-1/b.png", "data/part-1/a.png", "data/part-0/a.png", "database/x", "data2", "errors/e"):
        store.put(key, b"1")
    assert store.list("data") == ["data/part-0/a.png", "data/part-1/a.png", "data/part-1/b.png"]
    assert store.list("data/part-1") == ["data/part-1/a.png", "data/part-1/b.png"]
    assert store.list("nothing") == []
    assert {"data2", "database/x", "errors/e"} < set(store.list(""))


def test_a_file_on_disk_is_put_as_bytes_are_and_left_where_it_is(store: Store, tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(bytes(range(256)) * 10_000)
    store.put_if_absent("a/k", tmp_path / "big")
    with pytest.raises(AlreadyExists):
        store.put_if_absent("a/k", tmp_path / "big")
    assert store.read("a/k") == (tmp_path / "big").read_bytes()
    (tmp_path / "big").write_bytes(b"other")
    store.put("a/k", tmp_path / "big")
    assert store.read("a/k") == b"other"


def test_an_opened_key_is_a_file_that_seeks(store: Store) -> None:
    store.put("a/k", bytes(range(256)) * 1000)
    with store.open("a/k") as file:
        file.seek(256_000 - 3)
        assert file.read() == bytes([253, 254, 255])
        file.seek(2)
        assert file.read(2) == bytes([2, 3])
    with pytest.raises(KeyError):
        store.open("a/none")


def test_a_deleted_key_is_gone_and_one_that_never_was_is_no_error(store: Store) -> None:
    store.put("a/k", b"1")
    store.put("a/l", b"2")
    store.delete("a/k")
    store.delete("a/k")
    assert store.list("a") == ["a/l"]
    store.put_if_absent("a/k", b"3")


def test_sizes_and_dates_are_those_of_the_last_put(store: Store) -> None:
    before = time.time()
    store.put("a/b/k", b"123")
    store.put("a/l", b"")
    found = {stored.key: stored for stored in store.stored("a")}
    assert {key: stored.size for key, stored in found.items()} == {"a/b/k": 3, "a/l": 0}
    assert all(before - 2 <= stored.modified <= time.time() + 2 for stored in found.values())


def test_two_outputs_do_not_see_each_others_keys(store: Store) -> None:
    other = open_store(f"{store.url}2")
    store.put("a/k", b"1")
    assert not other.exists("a/k")
    assert other.list("a") == []


def test_of_thirty_two_racing_creates_exactly_one_wins_and_its_bytes_stay(store: Store) -> None:
    """Ten times, on clients of their own where the store has some."""
    stores = [open_store(store.url) for _ in range(8)]
    with ThreadPoolExecutor(32) as pool:
        for round_ in range(10):
            key, start = f"race/{round_}", threading.Barrier(32)

            def create(writer: int, key: str = key, start: threading.Barrier = start) -> bytes | None:
                data = f"{writer:02d}".encode() * 500
                start.wait()
                try:
                    stores[writer % 8].put_if_absent(key, data)
                except AlreadyExists:
                    return None
                return data

            winners = [data for data in pool.map(create, range(32)) if data is not None]
            assert len(winners) == 1
            assert store.read(key) == winners[0]


def test_a_reader_beside_replacing_writers_never_sees_a_mix(store: Store) -> None:
    values = {bytes([letter]) * 20_000 for letter in b"abcd"}
    store.put("k/k", b"a" * 20_000)
    with ThreadPoolExecutor(4) as pool:
        writers = [pool.submit(lambda value=value: [store.put("k/k", value) for _ in range(10)]) for value in values]
        seen = [store.read("k/k") for _ in range(100)]
        for writer in writers:
            writer.result()
    assert set(seen) <= values


def test_probing_a_good_store_leaves_nothing_that_a_reader_sees(store: Store) -> None:
    probe(store)
    probe(store)
    assert [key for key in store.list("") if not key.startswith(TEMPORARY)] == []


class Overwriting(MemoryStore):
    """A store whose create replaces, as some S3 look-alikes do."""

    def put_if_absent(self, key: str, data: bytes) -> None:
        self.put(key, data)


def test_a_store_that_overwrites_on_create_is_refused() -> None:
    with pytest.raises(Fatal, match=r"memory://.* does not honour create-if-absent"):
        probe(Overwriting(f"memory://{uuid.uuid4().hex}"))


def test_opening_creates_nothing(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "out"))
    store.exists("a")
    store.list("")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("url", ["https://host/out", "ftp://host/x", "hf://datasets/org/name"])
def test_a_store_that_cannot_be_written_is_refused_by_name(url: str) -> None:
    with pytest.raises(InvalidJob, match=rf"{url}: .* cannot be written; give a folder, or s3://"):
        open_store(url)


def test_a_file_url_and_a_path_are_one_place(tmp_path: Path) -> None:
    open_store(f"file://{tmp_path}/out").put("a/k", b"1")
    assert open_store(str(tmp_path / "out")).read("a/k") == b"1"


def test_no_temporary_file_is_left_by_any_put(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path / "out"))
    store.put("a/k", b"1")
    store.put("a/k", b"2")
    with pytest.raises(AlreadyExists):
        store.put_if_absent("a/k", b"3")
    probe(store)
    assert [path.relative_to(store.root).as_posix() for path in store.root.rglob("*") if path.is_file()] == ["a/k"]


def test_a_put_that_fails_leaves_the_old_bytes_and_no_temporary_file(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path / "out"))
    store.put("a/k/inside", b"1")
    with pytest.raises(InvalidJob, match="cannot write a/k in"):
        store.put("a/k", b"2")  # a folder has that name
    assert store.list("a") == ["a/k/inside"]
    assert store.list(TEMPORARY) == []


@pytest.mark.parametrize("below", ["file", "file/deeper", "file/deep/er"])
def test_an_output_at_or_below_a_regular_file_is_refused_with_advice(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("here first")
    with pytest.raises(InvalidJob) as caught:
        probe(open_store(str(tmp_path / below)))
    assert str(tmp_path / below) in str(caught.value)
    assert "choose a folder that you may write" in str(caught.value)
    assert (tmp_path / "file").read_text() == "here first"


@pytest.mark.parametrize(
    ("blocked", "key"),
    [
        ("data", "data/part-00000000/metadata.parquet"),
        ("data/part-00000000", "data/part-00000000/metadata.parquet"),
        ("_renderfarm/parts", "_renderfarm/parts/part-00000000.json"),
        ("_renderfarm", "data/part-00000000/metadata.parquet"),
    ],
)
def test_a_file_where_a_folder_must_be_stops_the_job_instead_of_being_retried(tmp_path: Path, blocked: str, key: str) -> None:
    (tmp_path / blocked).parent.mkdir(exist_ok=True)
    (tmp_path / blocked).write_text("")
    for put in (open_store(str(tmp_path)).put, open_store(str(tmp_path)).put_if_absent):
        with pytest.raises(InvalidJob, match="choose a folder"):
            put(key, b"1")


def test_a_name_too_long_for_the_file_system_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidJob, match="File name too long"):
        open_store(str(tmp_path / ("x" * 300))).put("a/k", b"1")


def test_a_full_disk_stops_the_job_and_says_that_nothing_is_lost() -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    from renderfarm.storage.local import _translated

    with pytest.raises(Fatal, match=r"cannot write k: No space left on device; free some space and run again"), _translated("write k"):  # noqa: SIM117
        with open("/dev/full", "wb", buffering=0) as file:
            file.write(b"1")


def test_reading_a_folder_as_a_file_is_refused(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    store.put("a/k", b"1")
    with pytest.raises(InvalidJob, match="cannot read a in"):
        store.read("a")
