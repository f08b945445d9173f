"""An export holds every committed row with its picture, opens by its card's own lines, and is whole or says that it is not."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import signal
import subprocess
import sys
import tarfile
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from checker import image_rows
from hypothesis import given
from hypothesis import strategies as st
from test_cli import cli, refused
from test_garbage import contents, lost_commit
from test_readers import TO_ROWS, check, picture_of, run_card

import renderfarm
from renderfarm import export as export_module
from renderfarm.errors import Fatal, InvalidJob
from renderfarm.export import UNFINISHED, Exported, Options, _bounds, export
from renderfarm.storage import LocalStore, open_store

Write = Callable[..., Path]
LAYOUTS = ("files", "parquet", "webdataset")
SMALL = {"files": 10**9, "parquet": 6_000, "webdataset": 30_000}  # what makes a few files of the pictures below
COLUMNS = {
    "id": [f"p{k}" for k in range(12)],
    "prompt": ["a", "b", "", "d", "e", "f", "", "", "", "g", "h", "i"],
    "num_images_per_prompt": [1, 3, 1, 2, 1, 2, 1, 1, 1, 1, 2, 1],
    "challenge": [None] * 11 + ["x"],
}


@pytest.fixture
def write(write_manifest: Write, write_job: Write, tmp_path: Path) -> Callable[..., Path]:
    """A job of mixed rows: several images in some, errors among them, a part of errors alone."""

    def job(layout: str, url: str | None = None, **changes: Any) -> Path:
        output = {"path": url or str(tmp_path / "out"), "layout": layout, **changes.pop("output", {})}
        return write_job(write_manifest(COLUMNS), f"{layout}.yaml", output=output, **changes)

    return job


@pytest.fixture
def out(request: pytest.FixtureRequest, write: Callable[..., Path], tmp_path: Path) -> Path:
    renderfarm.run(write(getattr(request, "param", "files")), engine="inline")
    return tmp_path / "out"


@pytest.fixture(params=LAYOUTS)
def to(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(autouse=True)
def small_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_module, "FOLDER_IMAGES", 5)


def files(dest: Path) -> list[Path]:
    """Those of the rows, in their order."""
    return sorted([*dest.glob("data/train-*"), *dest.glob("data/*/metadata.parquet")])


def tables(dest: Path) -> list[list[dict[str, Any]]]:
    """Each file's rows, in their order, each with its picture under `picture`."""
    found = []
    for path in sorted([*dest.glob("metadata/*.parquet"), *dest.glob("data/*.parquet"), *dest.glob("data/*/metadata.parquet")]):
        rows = pq.read_table(path).to_pylist()
        found.append([{**row, "picture": picture_of({**row, "table_file": str(path)})} for row in rows])
    return found


def rows(dest: Path) -> list[dict[str, Any]]:
    return [row for table in tables(dest) for row in table]


def in_order(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda row: (row["row"], row["image_index"]))


def opened(dest: Path, to: str, cache: Path) -> list[dict[str, Any]]:
    """By `datasets`, as the card says."""
    dataset = run_card(dest, "datasets", cache / "cache")["dataset"]
    return in_order({**row["json"], "picture": row["png"]} if to == "webdataset" else {**row, "picture": row["image"]} for row in dataset)


# ------------------------------------------------------------------------------------------------- what it holds


@pytest.mark.parametrize("out", LAYOUTS, indirect=True)
@pytest.mark.parametrize("shuffle", [None, 3])
def test_every_row_is_there_and_opens_by_the_cards_lines(out: Path, to: Any, shuffle: int | None, tmp_path: Path) -> None:
    dest = tmp_path / "it's exported"
    found = export(str(out), str(dest), Options(to, SMALL[to], shuffle))
    assert found == Exported(str(out), str(dest), to, len(files(dest)), len(files(dest)), 13, 4)
    assert found.files > 1
    expected = {(row["row"], row["image_index"]): row for row in image_rows(out)}
    assert len(expected) == 13
    for row in rows(dest):
        picture, told = row.pop("picture"), expected.pop((row["row"], row["image_index"]))
        assert hashlib.sha256(picture).hexdigest() == row["file_sha256"]
        image = row.pop("image", None)
        name = image["path"] if image else row["file_name"]
        assert re.fullmatch(rf"0*{row['row']}-0*{row['image_index']}-{row['file_sha256'][:8]}\.png", name)
        assert row | {"file_name": None} == told | {"file_name": None}
    assert expected == {}
    check(opened(dest, to, tmp_path), out)
    for library, to_rows in TO_ROWS.items():
        read = to_rows(run_card(dest, library, tmp_path)["table"])
        check(in_order({**row, "picture": picture_of(row)} for row in read), out)
    if to == "webdataset":
        check(in_order({**row, "picture": picture} for picture, row in run_card(dest, "webdataset", tmp_path)["dataset"]), out)


def test_rows_are_in_the_manifests_order_or_in_the_seeds(out: Path, to: Any, tmp_path: Path) -> None:
    def order(shuffle: int | None) -> list[tuple[int, int]]:
        dest = tmp_path / f"{to}-{shuffle}"
        export(str(out), str(dest), Options(to, SMALL[to], shuffle))
        return [(row["row"], row["image_index"]) for row in rows(dest)]

    def place(seed: int) -> Callable[[tuple[int, int]], bytes]:
        return lambda sample: hashlib.sha256(f"{seed}:{sample[0]}:{sample[1]}".encode()).digest()

    plain = order(None)
    assert plain == sorted(plain)
    assert order(7) == sorted(plain, key=place(7)) != plain
    assert order(-8) == sorted(plain, key=place(-8))


def test_the_same_export_has_the_same_bytes(out: Path, to: Any, tmp_path: Path) -> None:
    found = []
    for name in ("one", "two"):
        export(str(out), str(tmp_path / name), Options(to, SMALL[to], 1))
        found.append({key: data for key, data in contents(LocalStore(str(tmp_path / name))).items() if key != "README.md"})
    assert found[0] == found[1]


def test_files_are_named_as_the_hub_names_them_and_are_about_as_large_as_was_asked(out: Path, tmp_path: Path) -> None:
    for to, ending in (("parquet", "parquet"), ("webdataset", "tar")):
        for limit in (SMALL[to], 2 * SMALL[to], 10**9):
            dest = tmp_path / f"{to}-{limit}"
            count = export(str(out), str(dest), Options(to, limit)).files  # type: ignore[arg-type]
            assert [path.name for path in files(dest)] == [f"train-{k:05d}-of-{count:05d}.{ending}" for k in range(count)]
            assert all(path.stat().st_size <= limit + 20_000 for path in files(dest))  # Parquet's footer, the end of a tar
            assert count > 1 if limit == SMALL[to] else count == 1 or limit < 10**9
            if to == "webdataset":
                for path in files(dest):
                    with tarfile.open(path) as tar:
                        assert tar.getnames()[0] == f"__part-{int(path.name[6:11]):08d}__"
                    assert (dest / "metadata" / f"{path.stem}.parquet").exists()


@given(st.lists(st.integers(1, 50), min_size=1), st.integers(1, 120))
def test_files_take_as_many_rows_as_fit(weights: list[int], limit: int) -> None:
    bounds = list(_bounds(np.array(weights, np.int64), limit))
    assert bounds[0] == 0
    assert bounds[-1] == len(weights)
    for start, stop in itertools.pairwise(bounds):
        assert stop > start
        assert stop == start + 1 or sum(weights[start:stop]) <= limit
        assert stop == len(weights) or sum(weights[start : stop + 1]) > limit


def test_folders_stay_below_what_the_hub_allows(out: Path, tmp_path: Path) -> None:
    export(str(out), str(tmp_path / "files"), Options("files"))
    assert [len(list(folder.glob("*.png"))) for folder in sorted((tmp_path / "files/data").iterdir())] == [5, 5, 3]


def test_of_an_output_that_is_not_finished_what_is_committed_is_exported(out: Path, to: Any, tmp_path: Path) -> None:
    assert lost_commit(out, 3)
    found = export(str(out), str(tmp_path / "dest"), Options(to, SMALL[to]))
    assert {row["row"] for row in rows(tmp_path / "dest")} == {0, 1, 3, 4, 5}
    assert (found.images, found.errors_left_out) == (9, 4)
    assert "that was not finished: 9 images, 4 errors, 12 manifest rows" in (tmp_path / "dest/README.md").read_text()
    check(opened(tmp_path / "dest", to, tmp_path), out)


def test_what_the_job_says_of_its_dataset_is_in_the_exports_card(write: Callable[..., Path], tmp_path: Path) -> None:
    said = {"license": "cc-by-nc-4.0", "description": "Drawn circles.", "language": ["en"]}
    renderfarm.run(write("parquet", output={"card": said}), engine="inline")
    export(str(tmp_path / "out"), str(tmp_path / "dest"), Options("parquet", SMALL["parquet"]))
    card = (tmp_path / "dest/README.md").read_text()
    assert "license: cc-by-nc-4.0\nlanguage:\n- en\n" in card
    assert "Drawn circles." in card
    assert "| samplers |" in card


def test_what_was_done_to_pictures_and_their_originals_stay_named(write: Callable[..., Path], to: Any, tmp_path: Path) -> None:
    renderfarm.run(write("parquet", after=[{"colour": {"saturation": 1.2}}], output={"keep_originals": True}), engine="inline")
    export(str(tmp_path / "out"), str(tmp_path / "dest"), Options(to, SMALL[to]))
    for row in rows(tmp_path / "dest"):
        assert (tmp_path / "out" / row["original_file"]).exists()
    card = (tmp_path / "dest/README.md").read_text()
    assert "`original_file` names a picture of the output that this was exported from." in card
    assert "renderfarm.open" not in card


@pytest.mark.parametrize("kind", ["s3", "azure", "memory"])
def test_stores_give_and_take_exports(
    kind: str, to: Any, write: Callable[..., Path], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    bucket = f"memory://{uuid.uuid4().hex}" if kind == "memory" else request.getfixturevalue(kind)
    renderfarm.run(write(to, f"{bucket}/out"), engine="inline")
    renderfarm.run(write(to), engine="inline")
    there = export(f"{bucket}/out", f"{bucket}/dest", Options(to, SMALL[to], 2))
    here = export(str(tmp_path / "out"), str(tmp_path / "dest"), Options(to, SMALL[to], 2))
    assert (there.files, there.new_files, there.images) == (here.files, here.files, 13)
    found, expected = (
        {key: data for key, data in contents(open_store(url)).items() if key.startswith(("data/", "metadata/", "contact"))}
        for url in (f"{bucket}/dest", str(tmp_path / "dest"))
    )
    assert found == expected
    card = open_store(f"{bucket}/dest").read("README.md").decode()
    assert f"{bucket}/dest/" in card
    assert "renderfarm.open" not in card, "an export is no output"
    assert export(f"{bucket}/out", f"{bucket}/dest", Options(to, SMALL[to], 2)).new_files == 0


# ------------------------------------------------------------------------------------------------ damage and resume


KILLED = """\
import os, signal, sys
from renderfarm.export import Options, export
from renderfarm import export as module
from renderfarm.storage import LocalStore
module.FOLDER_IMAGES = 5
put, left = LocalStore.put_if_absent, [int(sys.argv[4])]
def dying(self, key, data):
    if key.startswith("data/") and not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= key.startswith("data/")
    put(self, key, data)
LocalStore.put_if_absent = dying
export(sys.argv[1], sys.argv[2], Options(sys.argv[3], int(sys.argv[5]), 4))
"""


def test_a_killed_export_says_so_and_goes_on_to_the_same_bytes(out: Path, to: Any, tmp_path: Path) -> None:
    dest, whole = tmp_path / "dest", tmp_path / "whole"
    count = export(str(out), str(whole), Options(to, SMALL[to], 4)).files
    assert count >= 3
    for done in range(2):
        ended = subprocess.run([sys.executable, "-c", KILLED, str(out), str(dest), to, "1", str(SMALL[to])], capture_output=True, text=True)
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        assert len(files(dest)) == done + 1
        assert {path.name for path in files(dest)} <= {path.name for path in files(whole)}
        with pytest.raises(FileNotFoundError):
            datasets.load_dataset(str(dest), split="train", cache_dir=str(tmp_path / "cache"))
        assert (dest / "README.md").read_bytes() == UNFINISHED
    assert export(str(out), str(dest), Options(to, SMALL[to], 4)).new_files == count - 2
    left = {key: data for key, data in contents(LocalStore(str(dest))).items() if not key.startswith("_renderfarm/tmp/")}
    assert left | {"README.md": b""} == contents(LocalStore(str(whole))) | {"README.md": b""}
    check(opened(dest, to, tmp_path), out)
    edited = (dest / "README.md").read_text() + "\nWith thanks to nobody.\n"
    (dest / "README.md").write_text(edited)
    assert export(str(out), str(dest), Options(to, SMALL[to], 4)).new_files == 0
    assert (dest / "README.md").read_text() == edited


def damage(out: Path, layout: str) -> None:
    """One byte of a picture in part 3."""
    sample = next(sample for sample in renderfarm.open(out).samples() if sample.record["row"] == 11)
    path = next(out.glob(f"data/part-00000003/{sample.name}" if layout == "files" else "data/part-00000003.*"))
    data, picture = path.read_bytes(), sample.data()
    if layout == "parquet":  # there it is compressed
        chunk = pq.read_metadata(path).row_group(0).column(0)
        place = chunk.data_page_offset + chunk.total_compressed_size // 2
    else:
        place = data.index(picture) + len(picture) // 2
    path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])


@pytest.mark.parametrize("out", LAYOUTS, indirect=True)
def test_a_damaged_picture_stops_it_and_is_not_published(out: Path, to: Any, tmp_path: Path) -> None:
    layout = json.loads((out / "_renderfarm/job.json").read_text())["output"]["layout"]
    damage(out, layout)
    with pytest.raises(Fatal) as caught:
        export(str(out), str(tmp_path / "dest"), Options(to, SMALL[to]))
    pattern = rf"{out}/data/part-00000003.*/00000000(09|10|11)-.*\.png: .*(\(SHA-256 differs\)|damaged).*restore"
    assert re.match(pattern, str(caught.value)), str(caught.value)
    assert layout == "parquet" or "/0000000011-0000-" in str(caught.value)
    assert (tmp_path / "dest/README.md").read_bytes() == UNFINISHED
    published = rows(tmp_path / "dest")
    assert 0 < len(published) < 13
    assert all(hashlib.sha256(row["picture"]).hexdigest() == row["file_sha256"] for row in published)


def test_a_missing_picture_and_a_table_that_is_not_the_committed_one_stop_it(out: Path, tmp_path: Path) -> None:
    table = out / "data/part-00000003/metadata.parquet"
    data, dest = table.read_bytes(), str(tmp_path / "dest")
    picture = next(out.glob("data/part-00000003/*.png"))
    kept = picture.read_bytes()
    picture.unlink()
    with pytest.raises(Fatal, match=rf"{picture.name}: the picture is missing; restore it"):
        export(str(out), dest, Options("parquet"))
    picture.write_bytes(kept)
    pq.write_table(pq.read_table(table).slice(1), table)
    with pytest.raises(Fatal, match=r"part 3: its table is not the one that was committed \(SHA-256 differs\)"):
        export(str(out), dest, Options("parquet"))
    table.write_bytes(data[:-9])
    with pytest.raises(Fatal, match=r"part 3: a committed table is damaged"):
        export(str(out), dest, Options("parquet"))
    table.unlink()
    with pytest.raises(Fatal, match=r"part 3: was committed, and its table or index entry is missing"):
        export(str(out), dest, Options("parquet"))
    table.write_bytes(data)
    assert export(str(out), dest, Options("parquet")).images == 13


def test_a_part_that_changes_while_it_is_exported_stops_it(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    claim, table = export_module._claim, out / "data/part-00000003/metadata.parquet"

    def then_it_changes(*arguments: Any, **options: Any) -> None:
        claim(*arguments, **options)
        pq.write_table(pq.read_table(table).slice(1), table)

    monkeypatch.setattr(export_module, "_claim", then_it_changes)
    with pytest.raises(Fatal, match=r"part 3 of .* was changed or removed meanwhile"):
        export(str(out), str(tmp_path / "dest"), Options("parquet"))


# -------------------------------------------------------------------------------------------------- other exports


def test_another_export_is_refused_and_restart_replaces_it(out: Path, write: Callable[..., Path], tmp_path: Path) -> None:
    dest = tmp_path / "dest"
    lost_commit(out, 3)
    export(str(out), str(dest), Options("parquet", SMALL["parquet"]))
    before = contents(LocalStore(str(dest)))
    with pytest.raises(InvalidJob) as caught:
        export(str(out), str(dest), Options("parquet", SMALL["parquet"], 1))
    assert str(caught.value) == (
        f"{dest} holds another export:\n  shuffle: null there, 1 now\n"
        "give another place, or --restart, which removes that export and begins anew"
    )
    with pytest.raises(InvalidJob, match='to: "parquet" there, "files" now'):
        export(str(out), str(dest), Options("files", SMALL["parquet"]))
    renderfarm.run(write("files"), engine="inline")
    with pytest.raises(InvalidJob, match=r"the output has other parts: 3 there, 4 now, 0 changed or gone"):
        export(str(out), str(dest), Options("parquet", SMALL["parquet"]))
    other = write("files", str(tmp_path / "other"), seed=9)
    renderfarm.run(other, engine="inline")
    with pytest.raises(InvalidJob, match="it is of another output"):
        export(str(tmp_path / "other"), str(dest), Options("parquet", SMALL["parquet"]))
    assert contents(LocalStore(str(dest))) == before
    (dest / "data/mine.txt").write_text("mine")
    for to in ("webdataset", "files", "parquet"):
        found = export(str(out), str(dest), Options(to, SMALL[to]), restart=True)  # type: ignore[arg-type]
        assert (found.images, found.new_files, len(files(dest))) == (13, found.files, found.files)
        assert sorted(row["row"] for row in rows(dest)) == sorted(row["row"] for row in image_rows(out))
    assert (dest / "data/mine.txt").read_text() == "mine"
    assert not list(dest.glob("metadata/*"))


def test_places_that_are_something_else_are_refused(out: Path, write: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/notes.txt").write_text("mine")
    for restart in (False, True):
        with pytest.raises(InvalidJob, match=r"is no export, and not empty \(it holds notes.txt\)"):
            export(str(out), str(tmp_path / "theirs"), Options("parquet"), restart=restart)
        for dest in (out, out / "data/x"):
            with pytest.raises(InvalidJob, match="lies in the output itself"):
                export(str(out), str(dest), Options("parquet"), restart=restart)
    renderfarm.run(write("parquet", str(tmp_path / "second")), engine="inline")
    before = contents(LocalStore(str(tmp_path / "second")))
    with pytest.raises(InvalidJob, match="is an output of `renderfarm run`"):
        export(str(out), str(tmp_path / "second"), Options("parquet"), restart=True)
    assert contents(LocalStore(str(tmp_path / "second"))) == before
    with pytest.raises(InvalidJob, match="not an output of renderfarm"):
        export(str(tmp_path / "theirs"), str(tmp_path / "dest"), Options("parquet"))
    for part in range(4):
        lost_commit(out, part) if (out / f"data/part-{part:08d}").exists() else None
    for path in [*out.glob("errors/*"), *out.glob("_renderfarm/parts/*")]:
        path.unlink()
    with pytest.raises(InvalidJob, match="no image is committed yet"):
        export(str(out), str(tmp_path / "dest"), Options("parquet"))
    assert not (tmp_path / "dest").exists()


def test_the_command_line(out: Path, tmp_path: Path) -> None:
    dest = tmp_path / "dest"
    done = cli("export", out, "--to", "webdataset", dest, "--max-file-size", "30 kB", "--shuffle", 5)
    count = len(files(dest))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[:2] == [f"13 images in {count} files, {count} of them new: {dest}", "4 error rows are not in it"]
    again = json.loads(cli("export", out, "--to", "webdataset", dest, "--max-file-size", "30kB", "--shuffle", 5, "--json").stdout)
    assert (again["files"], again["new_files"], again["images"]) == (count, 0, 13)
    assert "begins anew" in refused("export", out, dest)
    assert cli("export", out, dest, "--restart").returncode == 0
    assert [path.name for path in files(dest)] == ["train-00000-of-00001.parquet"]
    assert "for example 500MB or 2GB" in refused("export", out, tmp_path / "x", "--max-file-size", "big")
    assert "for example 500MB or 2GB" in refused("export", out, tmp_path / "x", "--max-file-size", "0MB")
    assert "leave it out" in refused("export", out, tmp_path / "x", "--to", "files", "--max-file-size", "1GB")
    assert "leave them out" in refused("export", out, tmp_path / "x", "--public")
    assert "holds credentials" in refused("export", out, "s3://me:secret@bucket/x")
    assert not (tmp_path / "x").exists()
