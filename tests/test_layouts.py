"""One contract for every layout, on every store and engine: the same rows, the same pixels, one commit, nothing lost, damage named."""

from __future__ import annotations

import base64
import datetime as dt
import decimal
import errno
import hashlib
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from checker import check_complete, error_rows, image_rows, lasting
from covering import covering
from PIL import Image
from test_commit import errors, images
from test_commit import publish as publish_part
from test_readers import run_card

import renderfarm
from renderfarm import commit
from renderfarm.errors import AlreadyExists, Fatal
from renderfarm.jobfile import load_job
from renderfarm.layouts import LAYOUTS, base, parquet
from renderfarm.layouts.base import Layout
from renderfarm.preparation import prepare
from renderfarm.reading import Output
from renderfarm.records import Part, PartId
from renderfarm.storage import LocalStore, Store, open_store
from renderfarm.verification import Choice, verify

Write = Callable[..., Path]
FILES_ONLY = Choice(sample=0)
MENDED = "restore it from a copy, or `renderfarm run JOB --repair` mends it"
PART = Part(7, 21, 24)
PROMPTS = {"prompt": ["a", "b", "", "", "", "", "c", "d"], "num_images_per_prompt": [1, 3, 1, 1, 1, 1, 2, 1], "mood": [None] * 7 + ["x"]}


@pytest.fixture(params=list(LAYOUTS))
def layout(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def spools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where pictures wait for their commit. Nothing is left there, whatever a test does."""
    folder = tmp_path / "spools"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert list(folder.iterdir()) == []


@pytest.fixture
def write(write_manifest: Write, write_job: Write, tmp_path: Path) -> Callable[..., Path]:
    """A job of mixed rows in a layout: images, rows with several, errors among them and a part of errors alone."""

    def job(layout: str, out: str | None = None, columns: dict[str, Any] | None = None, **changes: Any) -> Path:
        output = {"path": out or str(tmp_path / layout), "layout": layout, **changes.pop("output", {})}
        return write_job(write_manifest(columns or PROMPTS), f"{layout}.yaml", output=output, **changes)

    return job


def rows_of(url: str) -> dict[tuple[int, int], dict[str, Any]]:
    """Every image row of an output, its picture's pixels checked; without what layouts may say otherwise."""
    found = {}
    for picture, record in renderfarm.open(url):
        assert hashlib.sha256(np.asarray(picture).tobytes()).hexdigest() == record["pixel_sha256"]
        found[record["row"], record["image_index"]] = {name: value for name, value in record.items() if name != "file_name"}
    return found


# ------------------------------------------------------------------------------------------------- the same everywhere


@pytest.fixture
def expected(write: Write, tmp_path: Path) -> dict[tuple[int, int], dict[str, Any]]:
    renderfarm.run(write("files", str(tmp_path / "expected")), engine="inline")
    return rows_of(str(tmp_path / "expected"))


@pytest.mark.parametrize(
    ("layout", "kind"), covering([(layout, kind) for layout in LAYOUTS for kind in ("local", "memory", "s3")]), indirect=["layout"]
)
def test_a_job_gives_the_same_rows_and_pixels_in_every_layout_and_store(
    kind: str,
    layout: str,
    expected: dict[tuple[int, int], dict[str, Any]],
    write: Write,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    url = {"local": str(tmp_path / layout), "memory": f"memory://{uuid.uuid4().hex}"}.get(kind) or f"{request.getfixturevalue('s3')}/out"
    summary = renderfarm.run(write(layout, url), engine="inline")
    assert (summary.images, summary.errors, summary.state) == (7, 4, "PARTIAL")
    assert rows_of(url) == expected
    output = renderfarm.open(url)
    assert output.errors().column("row").to_pylist() == [2, 3, 4, 5]
    assert output.committed() == [PartId(0), PartId(1), PartId(2)]
    assert [sample.record["row"] for sample in output.spread(5)] == [0, 1, 6, 6, 7]
    if kind == "local":
        check_complete(Path(url), {*expected, *((row, 0) for row in (2, 3, 4, 5))})
    found = verify(url, Choice(all=True))
    assert (found.ok, found.images, found.errors, len(found.again), found.notes) == (True, 7, 4, 7, [])
    again = renderfarm.run(write(layout, url), engine="inline")
    assert (again.new_images, again.images, again.errors) == (0, 7, 4)


def test_ray_workers_write_every_layout(
    layout: str, expected: dict[tuple[int, int], dict[str, Any]], local_ray: None, write: Write, tmp_path: Path
) -> None:
    summary = renderfarm.run(write(layout, workers={"max": 2}), engine="ray")
    assert (summary.images, summary.errors) == (7, 4)
    assert rows_of(str(tmp_path / layout)) == expected
    assert [row["row"] for row in image_rows(tmp_path / layout)] == [row for row, _ in expected]
    assert [row["row"] for row in error_rows(tmp_path / layout)] == [2, 3, 4, 5]


def test_the_same_job_gives_the_same_bytes(layout: str, write: Write, tmp_path: Path) -> None:
    def data(out: Path) -> dict[str, bytes]:
        return {str(path.relative_to(out)): path.read_bytes() for top in ("data", "metadata") for path in out.glob(f"{top}/**/*.*")}

    renderfarm.run(write(layout), engine="inline")
    renderfarm.run(write(layout, str(tmp_path / "again")), engine="inline")
    assert data(tmp_path / layout) == data(tmp_path / "again") != {}


def test_the_card_knows_a_tables_columns_before_there_is_a_table(write: Write, tmp_path: Path) -> None:
    columns = {
        "prompt": ["a"],
        "seed": [1],
        "id": ["x"],
        "seed_": [2],
        "file_name": ["theirs"],
    }
    options = {"after": [{"colour": {"saturation": 2.0}}], "output": {"keep_originals": True}, "render": {"negative_prompt": "b"}}
    job = write("parquet", columns=columns, **options)
    expected = prepare(load_job(job)).columns()
    renderfarm.run(job, engine="inline")
    table = commit.read_part(open_store(str(tmp_path / "parquet")), parquet, Part(0, 0, 1))[1].images
    assert [(field.name, field.type) for field in table.schema] == [(field.name, field.type) for field in expected]
    assert {"seed_", "input_file_name_", "original_file", "file_width"} <= set(expected.names)


def test_originals_stay_loose_files_in_every_layout(layout: str, write: Write, tmp_path: Path) -> None:
    job = write(layout, after=[{"colour": {"saturation": 2.0}}], output={"keep_originals": True})
    renderfarm.run(job, engine="inline")
    out = tmp_path / layout
    assert len(image_rows(out)) == 7, "originals are checked, too"
    assert len(list(out.glob("originals/*/*.png"))) == 7
    assert verify(str(out), Choice(all=True)).ok
    sample = next(renderfarm.open(out).samples())
    original = sample.original()
    assert original is not None
    assert np.asarray(original).tobytes() != np.asarray(sample.image()).tobytes()
    next(out.glob("originals/*/*.png")).unlink()
    assert [re.search(r"originals/.*: the file is missing", text) is not None for text in verify(str(out), FILES_ONLY).problems] == [True]


def test_the_layout_is_frozen(write: Write, tmp_path: Path) -> None:
    renderfarm.run(write("files", str(tmp_path / "out")), engine="inline")
    with pytest.raises(Fatal, match=r'output\.layout: "files" there, "parquet" now'):
        renderfarm.run(write("parquet", str(tmp_path / "out")), engine="inline")


# --------------------------------------------------------------------------------------------- deaths, races, full disks


class Died(Fatal):
    """Whatever ends a worker between two writes."""


def test_after_a_death_before_or_after_each_write_the_next_run_gives_the_same_output(
    layout: str, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    renderfarm.run(write(layout, str(tmp_path / "whole")), engine="inline")
    whole = what_lasts(tmp_path / "whole")
    for number, late in ((number, late) for number in range(30) for late in (False, True)):
        out = str(tmp_path / f"died-{number}-{late}")
        with monkeypatch.context() as patch:
            left = iter(range(number + 1))
            for name in ("put", "put_if_absent"):
                patch.setattr(LocalStore, name, dying(getattr(LocalStore, name), left, late))
            try:
                renderfarm.run(write(layout, out), engine="inline")
            except Died:
                pass
            else:
                assert number >= 7, "every write was a place to die"
                return
        renderfarm.run(write(layout, out), engine="inline")
        assert what_lasts(Path(out)) == whole, f"died at write {number}"
        assert verify(out, FILES_ONLY).ok
        shutil.rmtree(out)
    pytest.fail("it always died")


def what_lasts(out: Path) -> dict[str, bytes]:
    """Parts and what is derived from them."""
    store = open_store(str(out))
    keys = [key for key in store.list("") if key.partition("/")[0] in ("data", "errors", "metadata") or "/parts/" in key]
    return {key: lasting(key, store.read(key)) for key in keys}


def dying(write: Callable[..., None], left: Iterator[int], late: bool) -> Callable[..., None]:
    """Ends with the write of a part for which `left` has no more: before it, or when it is done."""

    def or_die(store: LocalStore, key: str, data: bytes | Path) -> None:
        dies = (key.startswith(("data", "errors", "metadata")) or "/parts/" in key) and next(left, None) is None
        if dies and not late:
            raise Died("died before a write")
        write(store, key, data)
        if dies:
            raise Died("died after a write")

    return or_die


PACKED = pytest.mark.parametrize("layout", ["parquet", "webdataset"])


@PACKED
def test_a_disk_without_room_for_a_parts_pictures_stops_the_job_with_what_to_do(
    layout: str, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(base.Spool, "MEMORY", 0)
        patch.setattr(base.tempfile, "TemporaryFile", lambda: FullDisk())
        with pytest.raises(Fatal, match=r"cannot keep a part's pictures in .*spools.*: No space left.*TMPDIR"):
            renderfarm.run(write(layout), engine="inline")
    assert set(renderfarm.open(tmp_path / layout).committed()) <= {PartId(1)}, "which has no pictures"
    assert renderfarm.run(write(layout), engine="inline").images == 7


FULL = """
import os, resource, signal, sys
from test_commit import errors, images
from renderfarm import commit
from renderfarm.errors import Fatal
from renderfarm.layouts import LAYOUTS
from renderfarm.layouts.base import Spool
from renderfarm.records import Part
from renderfarm.storage import open_store

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
Spool.MEMORY = int(sys.argv[3])
store, layout, part = open_store(sys.argv[2]), LAYOUTS[sys.argv[1]], Part(0, 0, 4)
for limit in (5_000, 25_000, 42_000, 1_000_000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        with layout.writer(store, part) as writer:
            for k in range(4):
                writer.add(f"{k}.png", os.urandom(10_000))
            print(commit.publish(store, layout, part, writer, images(*range(4), size=10_000), errors()).images)
    except Fatal as error:
        print("File too large" in str(error) and ("TMPDIR" if "TMPDIR" in str(error) else sys.argv[2] in str(error)), store.list(""))
"""


@PACKED
@pytest.mark.parametrize(
    ("url", "memory", "said"), [("memory://full", 0, "TMPDIR"), ("memory://full", 15_000, "TMPDIR"), ("out", 50_000, "True")]
)
def test_wherever_the_disk_becomes_full_nothing_is_stored(layout: str, url: str, memory: int, said: str, tmp_path: Path) -> None:
    """While pictures wait, when they are read again, when the commit object is made: a file may not grow beyond a limit."""
    command = [sys.executable, "-c", FULL, layout, url, str(memory)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == [f"{said} []"] * 3 + ["4"], done.stderr


@PACKED
def test_what_waits_in_memory_and_on_disk_become_the_same_bytes(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for memory in (0, 250, 10_000):
        monkeypatch.setattr(base.Spool, "MEMORY", memory)
        with LAYOUTS[layout].writer(open_store(str(tmp_path / "out")), PART) as writer:
            for name in ("23.png", "21.png", "22.png", "24.png"):
                writer.add(name, name.encode() * 16 + b"....")
            found.append(writer.commit_object(images(21, 22, 23, 24), errors()).read_bytes())
    assert found[0] == found[1] == found[2]
    assert b"22.png22.png" in found[0]


@PACKED
def test_on_a_local_disk_the_commit_object_is_written_once(layout: str, tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "out"))
    with LAYOUTS[layout].writer(store, PART) as writer:
        writer.add("21.png", b"." * 100)
        written = writer.commit_object(images(21), errors())
        store.put_if_absent("data/k", written)
        assert (tmp_path / "out/data/k").samefile(written)
    (tmp_path / "plain").touch()
    assert (tmp_path / "out/data/k").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert store.list("") == ["data/k"]


class FullDisk(io.BytesIO):
    def write(self, data: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_what_threads_still_bring_when_a_part_has_failed_is_dropped() -> None:
    spool = base.Spool(open_store("memory://spool"))
    spool.add("a", b"1")
    spool.close()
    spool.add("b", b"2")
    with pytest.raises(KeyError):
        spool.read("b")


@PACKED
def test_pictures_that_wait_have_no_name_that_a_killed_process_could_leave(
    layout: str, spools: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base.Spool, "MEMORY", 0)
    with LAYOUTS[layout].writer(open_store("memory://nameless"), PART) as writer:
        writer.add("21.png", b"." * 100)
        assert list(spools.iterdir()) == []
        committed = writer.commit_object(images(21), errors())
        assert list(spools.iterdir()) == [committed]
    assert list(spools.iterdir()) == []


def test_two_workers_that_reach_each_commit_together_make_one_output(
    layout: str, expected: dict[tuple[int, int], dict[str, Any]], write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, create = LAYOUTS[layout], LocalStore.put_if_absent
    together = {key: threading.Barrier(2) for index in (0, 2) for key in [module.commit_key(Part(index, 0, 0))]}

    def meet(store: LocalStore, key: str, data: bytes | Path) -> None:
        if key in together:
            together[key].wait(timeout=60)
        create(store, key, data)

    job = write(layout)
    monkeypatch.setattr(LocalStore, "put_if_absent", meet)
    with ThreadPoolExecutor(2) as pool:
        summaries = list(pool.map(lambda _: renderfarm.run(job, engine="inline"), range(2)))
    assert [(summary.images, summary.errors) for summary in summaries] == [(7, 4)] * 2
    assert sum(summary.new_images for summary in summaries) == 7
    assert all(barrier.broken is False for barrier in together.values())
    assert rows_of(str(tmp_path / layout)) == expected
    assert verify(str(tmp_path / layout), FILES_ONLY).ok


def test_a_second_writer_of_a_part_adopts_it_and_stores_nothing(layout: str, tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "out"))
    module = LAYOUTS[layout]
    publish_part(store, module, PART, images(21, 22), errors(23))
    before = (tmp_path / "out" / module.commit_key(PART)).stat()
    with module.writer(store, PART) as writer:
        for name in ("21.png", "22.png"):
            writer.add(name, b"." * 100)
        with pytest.raises(AlreadyExists):
            store.put_if_absent(module.commit_key(PART), writer.commit_object(images(21, 22), errors(23)))
        assert commit.publish(store, module, PART, writer, images(21, 22), errors(23)).adopted
    assert (tmp_path / "out" / module.commit_key(PART)).stat().st_mtime_ns == before.st_mtime_ns


# ------------------------------------------------------------------------------------------------------ what is read


class Counting(LocalStore):
    """Counts the bytes that are read through it."""

    count = 0

    def read(self, key: str) -> bytes:
        data = super().read(key)
        self.count += len(data)
        return data

    def open(self, key: str) -> BinaryIO:
        store, file = self, super().open(key)

        class Counted(io.RawIOBase):
            def readable(self) -> bool:
                return True

            def seekable(self) -> bool:
                return True

            def seek(self, offset: int, whence: int = 0) -> int:
                return file.seek(offset, whence)

            def tell(self) -> int:
                return file.tell()

            def read(self, size: int = -1) -> bytes:
                data = file.read(size)
                store.count += len(data)
                return data

            def close(self) -> None:
                file.close()
                super().close()

        return Counted()  # type: ignore[return-value]


def large_part(store: Store, module: Layout, count: int = 40, size: int = 200_000) -> pa.Table:
    """A part of pictures that do not compress."""
    noise = np.random.default_rng(0).bytes(count * size)
    table = images(*range(count), size=size)
    with module.writer(store, PART) as writer:
        for index in reversed(range(count)):
            writer.add(f"{index}.png", noise[index * size : (index + 1) * size])
        commit.publish(store, module, PART, writer, table, errors(50))
    return table


def test_a_parts_table_is_found_and_read_without_its_pictures(layout: str, tmp_path: Path) -> None:
    store, module = Counting(str(tmp_path / "out")), LAYOUTS[layout]
    table = large_part(store, module)
    store.count = 0
    receipt = commit.find_commit(store, module, PART)
    assert receipt is not None
    assert (receipt.images, receipt.errors, receipt.bytes) == (40, 1, 8_000_000)
    key, committed = commit.read_part(store, module, PART)
    without = [name for name in table.column_names if name != "file_name"]
    assert committed.images.select(without).equals(table.select(without))
    assert store.count < 200_000, "bytes, of 8,000,000 of pictures"
    pictures = module.pictures(store)
    size = sum(len(pictures.read(key, *where)) for where in zip(committed.names, committed.places, strict=True))
    assert size == 8_000_000
    assert store.count < 8_800_000, "each picture is read once"


def test_row_groups_hold_about_as_many_bytes_as_a_reader_should_fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "GROUP_BYTES", 1_000_000)
    store = open_store(str(tmp_path / "out"))
    large_part(store, parquet)
    metadata = pq.read_metadata(tmp_path / "out/data/part-00000007.parquet")
    assert [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)] == [5] * 8
    assert list(parquet._groups([1_500_000, 400_000, 600_000, 1, 2_000_000])) == [(0, 1), (1, 3), (3, 4), (4, 5)]
    pictures = parquet.pictures(store)
    key, committed = commit.read_part(store, parquet, PART)
    for where in zip(committed.names, committed.places, strict=True):
        assert len(pictures.read(key, *where)) == 200_000
    assert len(pictures._held) == parquet.GROUPS_HELD
    assert 4 * parquet.GROUP_BYTES < 100_000_000


def test_hugging_face_knows_the_pictures_by_the_files_own_schema(write: Write, tmp_path: Path) -> None:
    renderfarm.run(write("parquet"), engine="inline")
    file = str(tmp_path / "parquet/data/part-00000000.parquet")
    schema = pq.read_schema(file)
    assert schema.names[0] == "image"
    assert pq.read_table(file, columns=["file_name"]).column(0).null_count == 4
    dataset = datasets.load_dataset("parquet", data_files=file, split="train", cache_dir=str(tmp_path / "cache"))
    assert isinstance(dataset.features["image"], datasets.Image)
    assert isinstance(dataset[0]["image"], Image.Image)


# ------------------------------------------------------------------------------------------------------------- tars


def test_every_reader_of_tars_reads_ours(write: Write, tmp_path: Path) -> None:
    renderfarm.run(write("webdataset"), engine="inline")
    path = tmp_path / "webdataset/data/part-00000000.tar"
    listed = subprocess.run(["tar", "tvf", path], capture_output=True, text=True, check=True)
    assert listed.stderr == ""
    first, *names = [line.split()[-1] for line in listed.stdout.splitlines()]
    assert first == "__part-00000000__"
    assert [name.rpartition(".")[2] for name in names] == ["png", "json"] * 4
    assert sorted({name.partition(".")[0] for name in names}) == [name.partition(".")[0] for name in names[::2]]
    with tarfile.open(path) as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode, m.type) for m in tar} == {(0, 0, 0, "", "", 0o644, tarfile.REGTYPE)}
        table, _ = base.read_table(tar.extractfile(first).read())  # type: ignore[union-attr]
    assert table.column("file_name").to_pylist() == names[::2]
    assert pq.read_table(tmp_path / "webdataset/metadata/part-00000000.parquet").equals(table)


def test_a_table_of_many_long_prompts_disturbs_no_reader(write: Write, tmp_path: Path) -> None:
    """512 rows of 2 kB that do not compress: 1 MB, where some readers of PAX headers end."""
    letters = np.random.default_rng(0).integers(97, 123, (512, 2000), dtype=np.uint8)
    job = write("webdataset", columns={"prompt": ["x"] * 512, "text": [bytes(row).decode() for row in letters]}, output={"part_rows": 512})
    renderfarm.run(job, engine="inline")
    out = tmp_path / "webdataset"
    with tarfile.open(out / "data/part-00000000.tar") as tar:
        assert tar.next().size > 400_000  # type: ignore[union-attr]
    assert len(list(run_card(out, "webdataset", tmp_path)["dataset"])) == 512
    assert run_card(out, "datasets", tmp_path / "cache")["dataset"].num_rows == 512
    assert verify(str(out), FILES_ONLY).ok


OWN = {
    "when": pa.array([dt.datetime(2024, 2, 29, 12, 30, 1, 250)] * 2 + [None], pa.timestamp("ns", "UTC")),
    "day": pa.array([dt.date(2024, 2, 29)] * 3),
    "took": pa.array([1_500_000_001, None, 2], pa.duration("ns")),
    "price": pa.array([decimal.Decimal("1.10")] * 3, pa.decimal128(10, 2)),
    "raw": pa.array([b"\x00\xff", None, b""]),
    "score": pa.array([1.5, math.nan, math.inf]),
    "half": pa.array([np.float16(0.5)] * 3, pa.float16()),
    "big": pa.array([2**62] * 3, pa.uint64()),
    "tags": pa.array([["a", None], [], None], pa.list_(pa.string())),
    "boxes": pa.array([[{"x": 1, "at": [1.0]}], None, []], pa.list_(pa.struct([("x", pa.int32()), ("at", pa.list_(pa.float32()))]))),
    "grid": pa.array([[[1, 2], [3]], None, []], pa.list_(pa.list_(pa.int64()))),
    "pairs": pa.array([[("k", 1)], [], None], pa.map_(pa.string(), pa.int64())),
    "nothing": pa.nulls(3),
    'ü "quoted": yes': pa.array(["ü\u2028", "</s>", None]),
    "kind": pa.array(["a", "b", "a"]).dictionary_encode(),
}


def test_columns_of_every_type_keep_it_in_the_tables_and_reach_json_and_datasets(layout: str, write: Write, tmp_path: Path) -> None:
    own = {name: column for name, column in OWN.items() if name != "pairs" or layout == "webdataset"}  # `datasets` knows no maps
    renderfarm.run(write(layout, columns={"prompt": ["a", "b", "c"], **own}), engine="inline")
    out = tmp_path / layout
    assert verify(str(out), Choice(all=True)).ok
    table = commit.read_part(open_store(str(out)), LAYOUTS[layout], Part(0, 0, 3))[1].images
    for name, column in own.items():
        plain = column.dictionary_decode() if name == "kind" else column
        assert table.column(name).type == plain.type
        assert table.column(name).combine_chunks().equals(plain) or name == "score"
    rows = list(run_card(out, "datasets", tmp_path / "cache")["dataset"])
    assert len(rows) == 3
    if layout != "webdataset":
        return
    with tarfile.open(out / "data/part-00000000.tar") as tar:
        first, second, third = (json.loads(tar.extractfile(name).read()) for name in tar.getnames() if name.endswith("json"))  # type: ignore[union-attr]
    assert first["when"] == "2024-02-29T12:30:01.000250+00:00"
    assert (first["day"], first["price"], first["took"], first["half"]) == ("2024-02-29", "1.10", "0:00:01.500000", 0.5)
    assert base64.b64decode(first["raw"]) == b"\x00\xff"
    assert (second["score"], third["score"], first["big"], first["nothing"]) == (None, None, 2**62, None)
    assert (first["boxes"], first["pairs"]) == ([{"x": 1, "at": [1.0]}], [{"key": "k", "value": 1}])
    for row, member in zip(rows, (first, second, third), strict=True):
        assert {name: value for name, value in row["json"].items() if name not in ("tags", "boxes", "grid", "pairs")} == {
            name: value for name, value in member.items() if name not in ("tags", "boxes", "grid", "pairs")
        }
        assert (row["json"]["grid"] or []) == (member["grid"] or [])


# ------------------------------------------------------------------------------------------------------------ damage


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one output of each layout; copied by each test that damages it."""
    folder = tmp_path_factory.mktemp("layouts")
    pq.write_table(pa.table(PROMPTS), folder / "prompts.parquet")
    for name in LAYOUTS:
        job = {
            "name": "t", "manifest": str(folder / "prompts.parquet"), "model": "builtin:fake", "render": {"num_inference_steps": 3},
            "workers": {"batch_size": 4}, "output": {"path": str(folder / name), "part_rows": 3, "layout": name},
        }  # fmt: skip
        (folder / "job.json").write_text(json.dumps(job))
        renderfarm.run(folder / "job.json", engine="inline")
    return folder


@pytest.fixture
def out(rendered: Path, layout: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(rendered / layout, tmp_path / "out"))


def packed(out: Path) -> Path:
    return next(out.glob("data/part-00000000.*"))


@PACKED
def test_a_bit_that_flips_anywhere_in_a_part_is_named(layout: str, out: Path) -> None:
    path, store = packed(out), str(out)
    whole = path.read_bytes()
    for place in range(0, len(whole), 97 if layout == "parquet" else 211):
        data = bytearray(whole)
        data[place] ^= 1 << place % 8
        path.write_bytes(data)
        found = verify(store, FILES_ONLY)
        if not found.ok:
            assert all(re.search(r"part 0|part-00000000|row \d, image \d", problem) for problem in found.problems), found.problems
        elif layout == "parquet":
            pytest.fail(f"byte {place} of {len(whole)}")
        else:
            assert is_padding(whole, place), f"byte {place}"


def is_padding(tar: bytes, place: int) -> bool:
    """Zeros that fill a member's last block, which no reader sees."""
    with tarfile.open(fileobj=io.BytesIO(tar)) as file:
        return any(m.offset_data + m.size <= place < m.offset_data + math.ceil(m.size / 512) * 512 for m in file)


@PACKED
@pytest.mark.parametrize("size", [0, 100, 600, 5000, -1200])
def test_a_part_that_was_cut_off_is_named_and_hides_no_other(layout: str, size: int, out: Path) -> None:
    data = packed(out).read_bytes()
    packed(out).write_bytes(data[:size])
    (out / "errors/part-00000001.parquet").unlink()  # the commit of a part without images
    problems = verify(str(out), FILES_ONLY).problems
    assert any("part 0" in problem or "part-00000000" in problem for problem in problems), problems
    assert any("part 1: was committed" in problem for problem in problems)


def test_a_part_that_is_gone_is_named_and_rendered_again_with_the_same_bytes(layout: str, out: Path, write: Write) -> None:
    """Its error view is still there, and is not taken for the commit of a part without images."""
    path = out / LAYOUTS[layout].commit_key(Part(0, 0, 3))
    data = path.read_bytes()
    path.unlink()
    assert (out / "errors/part-00000000.parquet").exists()
    assert verify(str(out), FILES_ONLY).problems == [f"part 0: was committed, and its table is missing; {MENDED}"]
    next(out.glob("_renderfarm/parts/part-00000000.*")).unlink()
    assert renderfarm.run(write(layout, str(out)), engine="inline").new_images == 4
    assert path.read_bytes() == data
    assert verify(str(out), FILES_ONLY).ok


@PACKED
def test_a_commit_object_made_anew_is_not_the_one_that_was_committed(layout: str, out: Path) -> None:
    """Another cell in a table, all else made to fit."""
    store, module = open_store(str(out)), LAYOUTS[layout]
    pictures, (key, committed) = module.pictures(store), commit.read_part(store, module, Part(0, 0, 3))
    names = pa.array(committed.names)
    table = committed.images.set_column(3, "file_name", names)
    table = table.set_column(1, table.schema.field("row_id"), pa.array(["another"] * len(table)))
    with module.writer(store, Part(0, 0, 3)) as writer:
        for where in zip(committed.names, committed.places, strict=True):
            writer.add(where[0], pictures.read(key, *where))
        store.put(key, writer.commit_object(table, committed.errors))
    problems = verify(str(out), FILES_ONLY).problems
    assert f"part 0: its table is not the one that was committed (SHA-256 differs); {MENDED}" in problems


@PACKED
def test_a_commit_object_that_lacks_what_every_reader_needs_is_damaged_and_not_absent(layout: str, out: Path) -> None:
    """Else its part would be rendered again, and could not be committed."""
    store, module, part = open_store(str(out)), LAYOUTS[layout], Part(0, 0, 3)
    table = commit.read_part(store, module, part)[1].images
    if layout == "parquet":  # without a column `image`
        pq.write_table(table, packed(out))
    else:  # a table without places
        with tarfile.open(packed(out), "w") as tar:
            add(tar, "__part-00000000__", base.table_bytes(table, errors()))
    with pytest.raises(Fatal, match="a committed table is damaged"):
        commit.find_commit(store, module, part)
    assert any("part 0: a committed table is damaged" in problem for problem in verify(str(out), FILES_ONLY).problems)


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def test_a_tar_is_byte_for_byte_what_tarfile_makes_of_the_same_members(write_manifest: Write, write_job: Write, tmp_path: Path) -> None:
    renderfarm.run(write_job(write_manifest(), output={"layout": "webdataset", "part_rows": 8}), engine="inline")
    written = packed(tmp_path / "out").read_bytes()
    with tarfile.open(fileobj=io.BytesIO(written)) as tar:
        members = [(name, tar.extractfile(name).read()) for name in tar.getnames()]  # type: ignore[union-attr]
    again = io.BytesIO()
    with tarfile.open(fileobj=again, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in members:
            add(tar, name, data)
    assert again.getvalue() == written


def repacked(out: Path, change: Callable[[list[tuple[str, bytes]]], list[tuple[str, bytes]]]) -> None:
    """A tar whose members somebody has changed."""
    with tarfile.open(packed(out)) as tar:
        members = [(name, tar.extractfile(name).read()) for name in tar.getnames()]  # type: ignore[union-attr]
    with tarfile.open(packed(out), "w") as tar:
        for name, data in change(members):
            add(tar, name, data)
    if change(members) == members:
        packed(out).write_bytes(packed(out).read_bytes()[:-512])


TARS: dict[str, tuple[Callable[[list[tuple[str, bytes]]], list[tuple[str, bytes]]], str]] = {
    "a further member": (lambda members: [*members, ("x.png", b"1")], r"holds 'x.png', which its table does not name"),
    "a further member in between": (lambda m: [*m[:3], ("x.png", b"1"), *m[3:]], r"holds 'x.png', which its table does not name"),
    "a member less": (lambda members: members[:-1], r"ends before '0000000001-0002-.*json', which its table names"),
    "samples in another order": (lambda m: [m[0], *m[3:5], *m[1:3], *m[5:]], r"holds '0000000001-.*' where its table says '0000000000-"),
    "a member twice": (lambda members: [*members, members[1]], r"holds '0000000000-.*png' where its table says 'nothing more'"),
    "another row as JSON": (lambda m: [*m[:2], (m[2][0], m[4][1]), *m[3:]], r"0000000000-.*json is not what the table says"),
    "no records": (lambda members: members, r"part-00000000.tar does not end as a tar does"),
    "no table": (lambda members: members[1:], r"part 0: .*\(the tar begins with '0000000000-.*png', not with its table"),
}


@pytest.mark.parametrize("layout", ["webdataset"])
@pytest.mark.parametrize("name", TARS)
def test_a_tar_that_somebody_packed_anew_is_seen(name: str, layout: str, out: Path) -> None:
    change, message = TARS[name]
    repacked(out, change)
    problems = verify(str(out), FILES_ONLY).problems
    assert any(re.search(message, problem) for problem in problems), problems


@pytest.mark.parametrize("layout", ["webdataset"])
def test_a_view_that_is_gone_or_another_is_named_and_mended(layout: str, out: Path, write: Write) -> None:
    view = out / "metadata/part-00000000.parquet"
    data = view.read_bytes()
    shutil.copy(out / "metadata/part-00000002.parquet", view)
    for _ in range(2):
        assert verify(str(out), FILES_ONLY).problems == [
            "metadata/part-00000000.parquet is not what data/part-00000000.tar says; `renderfarm run JOB --repair` rebuilds it"
        ]
        view.unlink(missing_ok=True)
    next(out.glob("_renderfarm/parts/part-00000000.*")).unlink()
    assert renderfarm.run(write(layout, str(out)), engine="inline").new_images == 0
    assert view.read_bytes() == data
    assert verify(str(out), FILES_ONLY).ok


def test_an_output_says_where_each_picture_is(layout: str, out: Path) -> None:
    where = {"files": "data/part-00000000/", "parquet": "data/part-00000000.parquet/", "webdataset": "data/part-00000000.tar/"}
    samples = Output(str(out)).part(0).samples
    assert [sample.key for sample in samples] == [where[layout] + sample.name for sample in samples]
