"""`run --repair`: whatever of an output is damaged, it becomes the bytes that it was, and nothing that was there is lost."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from checker import lasting
from covering import covering
from typer.testing import CliRunner

import renderfarm
from renderfarm import commit
from renderfarm.cli import app
from renderfarm.errors import InvalidJob, Transient
from renderfarm.layouts import LAYOUTS
from renderfarm.reading import Output
from renderfarm.repair import DAMAGED, repair
from renderfarm.storage import LocalStore, open_store
from renderfarm.summary import RunSummary
from renderfarm.verification import Choice, verify

FILES_ONLY = Choice(sample=0)
VOLATILE = (
    "_renderfarm/runs/",
    "_renderfarm/logs/",
    "_renderfarm/progress.json",
    "_renderfarm/report/",
    "README.md",
    DAMAGED,
)  # times, run ids; the output's own path
# part 0: two images and an error; part 1: errors alone; part 2: two images
PROMPTS = {"prompt": ["a", "b", "", "", "", "", "c", "d"], "mood": [None] * 7 + ["x"]}


@pytest.fixture(scope="module", params=list(LAYOUTS))
def rendered(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with job.yaml and its undamaged output."""
    folder = tmp_path_factory.mktemp(request.param)
    pq.write_table(pa.table(PROMPTS), folder / "m.parquet")
    job = {
        "name": "t", "manifest": "m.parquet", "model": "builtin:fake", "render": {"num_inference_steps": 2},
        "workers": {"batch_size": 4}, "after": [{"colour": {"saturation": 0.5}}], "failure": {"tolerate": 1.0},
        "output": {"path": "out", "part_rows": 3, "layout": request.param, "keep_originals": True},
    }  # fmt: skip
    (folder / "job.yaml").write_text(json.dumps(job))
    assert renderfarm.run(folder / "job.yaml", engine="inline").images == 4
    return folder


@pytest.fixture
def folder(rendered: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(rendered, tmp_path / "copy"))


@pytest.fixture
def out(folder: Path) -> Path:
    return folder / "out"


def run(folder: Path, **options: Any) -> RunSummary:
    return renderfarm.run(folder / "job.yaml", engine="inline", **options)


def contents(out: Path) -> dict[str, bytes]:
    store = LocalStore(str(out))
    return {key: lasting(key, store.read(key)) for key in store.list("") if not key.startswith(VOLATILE)}


def set_aside(out: Path) -> dict[str, bytes]:
    store = LocalStore(str(out))
    return {(own := key.split("/", 3)[3]): lasting(own, store.read(key)) for key in store.list(DAMAGED)}


# ------------------------------------------------------------------------------------------------------------- damage


def object_of(out: Path, index: int) -> Path:
    return out / Output(str(out)).part(index).key


def picture(out: Path) -> Path | None:
    """The file of row 0's picture, where it has one of its own."""
    return next(iter(sorted(out.glob("data/part-00000000/*.png"))), None)


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)


def inside(out: Path) -> tuple[Path, int, int]:
    """The file that holds row 0's picture, and which of its bytes are the picture's; of layout `parquet`, those of a few pictures."""
    path = picture(out) or object_of(out, 0)
    if path.suffix == ".parquet":
        column = pq.read_metadata(path).row_group(0).column(0)
        assert column.path_in_schema == "image.bytes"
        return path, column.data_page_offset + 40, column.data_page_offset + column.total_compressed_size
    data = next(renderfarm.open(out).samples()).data()
    start = path.read_bytes().index(data)
    return path, start, start + len(data)


def image_deleted(out: Path) -> None:
    path, start, stop = inside(out)
    data = path.read_bytes()
    path.write_bytes(data[:start] + data[stop:])
    if not path.stat().st_size:
        path.unlink()


def image_truncated(out: Path) -> None:
    path, start, stop = inside(out)
    path.write_bytes(path.read_bytes()[: (start + stop) // 2])


def image_flipped(out: Path) -> None:
    path, start, stop = inside(out)
    flip(path, (start + stop) // 2)


def object_flipped(out: Path) -> None:
    path = object_of(out, 2)
    flip(path, path.read_bytes().index(b"mood") - 40)


def object_rewritten(out: Path) -> None:
    """Sound in itself, with another user's id in a row: of that nothing but the index knows."""
    output = Output(str(out))
    part = output.grid.part(2)
    key, committed = commit.read_part(output.store, output.layout, part)
    names = pa.array(committed.names)
    table = committed.images.set_column(committed.images.column_names.index("file_name"), "file_name", names)
    table = table.set_column(table.column_names.index("row_id"), table.schema.field("row_id"), pa.array(["another"] * len(table)))
    with output.layout.writer(output.store, part) as writer:
        for name, place in zip(committed.names, committed.places, strict=True):
            writer.add(name, output.layout.pictures(output.store).read(key, name, place))
        output.store.put(key, writer.commit_object(table, committed.errors))


def object_deleted(out: Path) -> None:
    object_of(out, 0).unlink()


def object_emptied(out: Path) -> None:
    object_of(out, 2).write_bytes(b"")


def errors_flipped(out: Path) -> None:
    path = object_of(out, 1)
    flip(path, len(path.read_bytes()) // 2)


def errors_emptied(out: Path) -> None:
    object_of(out, 1).write_bytes(b"PAR1")


def original_deleted(out: Path) -> None:
    next(out.glob("originals/part-00000000/*")).unlink()


def original_flipped(out: Path) -> None:
    flip(next(out.glob("originals/part-00000000/*")), 200)


def entry(out: Path, index: int = 0) -> Path:
    return next(out.glob(f"_renderfarm/parts/part-{index:08d}.*"))


def entry_of_another_hash(out: Path) -> None:
    said = json.loads(entry(out).read_text())
    entry(out).write_bytes(commit.to_json(said | {"commit_sha256": "0" * 64}))


RENDERED_AGAIN = [
    *(image_deleted, image_truncated, image_flipped, object_flipped, object_rewritten, object_deleted, object_emptied),
    *(errors_flipped, errors_emptied, original_deleted, original_flipped, entry_of_another_hash),
]


def entry_deleted(out: Path) -> None:
    entry(out).unlink()


def entry_emptied(out: Path) -> None:
    entry(out).write_bytes(b"")


def entry_without_hash(out: Path) -> None:
    entry(out).write_bytes(b'{"error_classes": {}}')


def entry_of_other_counts(out: Path) -> None:
    entry(out).rename(entry(out).with_name("part-00000000.i3.e1.b17.json"))


def entry_of_other_errors(out: Path) -> None:
    entry(out).write_bytes(entry(out).read_bytes().replace(b"InvalidInput", b"InvalidInpux"))


def second_entry(out: Path) -> None:
    """Of a worker that lost."""
    shutil.copy(entry(out), entry(out).with_name("part-00000000.i0.e3.b0.json"))


def error_view_deleted(out: Path) -> None:
    (out / "errors/part-00000000.parquet").unlink()


def error_view_damaged(out: Path) -> None:
    path = out / "errors/part-00000000.parquet"
    path.write_bytes(path.read_bytes()[:100])


def error_view_of_another(out: Path) -> None:
    shutil.copy(out / "errors/part-00000001.parquet", out / "errors/part-00000000.parquet")


REBUILT = [
    *(entry_deleted, entry_emptied, entry_without_hash, entry_of_other_counts, entry_of_other_errors, second_entry),
    *(error_view_deleted, error_view_damaged, error_view_of_another),
]

Damage = Callable[[Path], None]


@pytest.fixture(params=[*RENDERED_AGAIN, *REBUILT], ids=lambda damage: damage.__name__)
def damage(request: pytest.FixtureRequest) -> Damage:
    return request.param  # type: ignore[no-any-return]


# --------------------------------------------------------------------------------------------------------- what it does


def test_every_damage_is_mended_to_the_byte(damage: Damage, folder: Path, out: Path) -> None:
    before = contents(out)
    damage(out)
    damaged = contents(out)
    assert damaged != before
    found = verify(str(out), FILES_ONLY)
    assert damage is entry_deleted or not found.ok
    summary = run(folder, repair=True)
    assert contents(out) == before
    assert verify(str(out), Choice(all=True)).ok
    assert len(summary.repaired) == 1
    (repaired,) = summary.repaired
    assert (repaired.kept is not None) == (damage in RENDERED_AGAIN)
    assert bool(summary.new_images + summary.new_errors) == (damage in RENDERED_AGAIN)
    kept = set_aside(out)
    assert bool(kept) == (damage in RENDERED_AGAIN)
    for key, data in damaged.items():  # what differed, or is of the same part, was kept as it was
        if damage in RENDERED_AGAIN and data != before.get(key):
            assert kept[key] == data
    assert run(folder, repair=True).repaired == (), "once is enough"


def test_what_verify_says_names_the_command_that_mends_it(damage: Damage, out: Path) -> None:
    damage(out)
    found = verify(str(out), FILES_ONLY)
    if not any(word in damage.__name__ for word in ("image", "original", "entry_deleted", "object_emptied")):
        assert any("`renderfarm run JOB --repair`" in problem for problem in found.problems), found.problems


def test_without_damage_it_changes_no_byte(folder: Path, out: Path) -> None:
    before = contents(out)
    times = {key: (out / key).stat().st_mtime_ns for key in before if key.startswith(("data", "errors", "originals", "metadata"))}
    summary = run(folder, repair=True)
    assert (summary.repaired, summary.new_images, summary.new_errors) == ((), 0, 0)
    assert contents(out) == before
    assert {key: (out / key).stat().st_mtime_ns for key in times} == times
    assert not (out / DAMAGED).exists()


def test_damage_of_many_parts_is_mended_at_once(folder: Path, out: Path) -> None:
    before = contents(out)
    image_flipped(out)
    errors_flipped(out)
    object_of(out, 2).unlink()
    summary = run(folder, repair=True)
    assert [repaired.part for repaired in summary.repaired] == ["part-00000000", "part-00000001", "part-00000002"]
    assert contents(out) == before
    assert json.loads(json.dumps(summary.to_dict()))["repaired"][0]["part"] == "part-00000000"


def test_entries_of_parts_that_the_job_does_not_have_are_set_aside(folder: Path, out: Path) -> None:
    before = contents(out)
    shutil.copy(entry(out), out / "_renderfarm/parts/part-00000099.i1.e0.b5.json")
    assert not verify(str(out), FILES_ONLY).ok
    run(folder, repair=True)
    assert contents(out) == before
    assert list(set_aside(out)) == ["_renderfarm/parts/part-00000099.i1.e0.b5.json"]


def test_a_table_of_pictures_that_are_gone_does_not_outlive_them(folder: Path, out: Path) -> None:
    """A view of a part that has no image: of a commit object that is lost, and a run that could render none of its rows."""
    if not (out / "metadata").is_dir():
        pytest.skip("a view of layout webdataset")
    before = contents(out)
    shutil.copy(out / "metadata/part-00000000.parquet", out / "metadata/part-00000001.parquet")
    assert "metadata/part-00000001.parquet is of images that" in verify(str(out), FILES_ONLY).problems[0]
    assert run(folder, repair=True).repaired[0].kept is None
    assert contents(out) == before


def test_a_damaged_view_for_readers_is_rebuilt(folder: Path, out: Path) -> None:
    if not (out / "metadata").is_dir():
        pytest.skip("a view of layout webdataset")
    before = contents(out)
    (out / "metadata/part-00000000.parquet").write_bytes((out / "metadata/part-00000002.parquet").read_bytes()[:-9])
    (out / "metadata/part-00000002.parquet").unlink()
    assert [repaired.kept for repaired in run(folder, repair=True).repaired] == [None, None]
    assert contents(out) == before


# --------------------------------------------------------------------------------------------------- deaths, and others


class Killed(BaseException):
    """As sudden as SIGKILL for what repair does: nothing there cleans up."""


@pytest.fixture
def dies_after(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """While a number is in it, a repair dies before it makes one more write or deletion than that."""
    wanted, made = list[int](), list[int]()

    def counted(act: Callable[..., None]) -> Callable[..., None]:
        def wrapper(store: LocalStore, key: str, *rest: Any) -> None:
            if made and key != commit.PROGRESS:
                if wanted and made[0] > wanted[0]:
                    raise Killed
                made[0] += 1
            act(store, key, *rest)

        return wrapper

    def repairing(*given: Any) -> None:
        made[:] = [1]
        try:
            repair(*given)
        finally:
            made.clear()

    for name in ("put", "delete"):
        monkeypatch.setattr(LocalStore, name, counted(getattr(LocalStore, name)))
    monkeypatch.setattr("renderfarm.driver.repair", repairing)
    return wanted


@pytest.mark.parametrize("damage", [image_flipped, object_rewritten, errors_flipped, second_entry])
def test_a_death_at_any_point_hides_no_damage(damage: Damage, folder: Path, out: Path, dies_after: list[int], tmp_path: Path) -> None:
    """Whatever step is the last one, a run without --repair leaves what verify still names, or all as it was; and a repair mends it."""
    before, died = contents(out), 0
    damage(out)
    while True:
        again = Path(shutil.copytree(folder, tmp_path / f"again-{died}"))
        dies_after[:] = [died]
        try:
            run(again, repair=True)
            break
        except Killed:
            died += 1
        dies_after.clear()
        (again / "out/_renderfarm/progress.json").unlink()  # the dead one's, which would be waited for
        plain = Path(shutil.copytree(again, tmp_path / f"plain-{died}"))
        run(plain)
        assert contents(plain / "out") == before or not verify(str(plain / "out"), FILES_ONLY).ok, died
        run(again, repair=True)
        assert contents(again / "out") == before, died
    assert died >= (1 if damage is second_entry else 2)  # of which one is removed, and the other left as it is
    assert contents(again / "out") == before


def test_it_waits_for_no_run_that_is_at_work(folder: Path, out: Path) -> None:
    image_flipped(out)
    damaged = contents(out)
    (out / commit.PROGRESS).write_bytes(commit.to_json({"state": "RUNNING", "updated": time.time() - 20, "run_id": "theirs"}))
    with pytest.raises(InvalidJob, match=r"another run of this output \(theirs\) is at work, or was until less than a minute ago; stop it"):
        run(folder, repair=True)
    assert contents(out) == damaged
    (out / commit.PROGRESS).write_bytes(commit.to_json({"state": "RUNNING", "updated": time.time() - 70, "run_id": "dead"}))
    assert len(run(folder, repair=True).repaired) == 1


def test_a_store_that_is_away_is_no_damage(folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = LocalStore.read

    def away(store: LocalStore, key: str) -> bytes:
        if key.startswith(("data/", "originals/")):
            raise Transient(f"cannot read {key}: the disk is away")
        return read(store, key)

    monkeypatch.setattr(LocalStore, "read", away)

    def files() -> list[Path]:
        return sorted(path for path in out.rglob("*") if path.is_file() and path.parent.name not in ("runs", "logs"))

    before = files()
    with pytest.raises(Transient, match="the disk is away; what cannot be read now cannot be repaired: run again later"):
        run(folder, repair=True)
    assert files() == before


# ------------------------------------------------------------------------------------------------- stores, command line


@pytest.mark.parametrize(("layout", "kind"), covering([(layout, kind) for layout in LAYOUTS for kind in ("s3", "azure")]))
def test_an_output_in_a_store_is_mended_there(kind: str, layout: str, write_manifest, write_job, request: pytest.FixtureRequest) -> None:
    out = f"{request.getfixturevalue(kind)}/out"
    job = write_job(write_manifest(PROMPTS), output={"path": out, "layout": layout})
    renderfarm.run(job, engine="inline")
    store = open_store(out)

    def there() -> dict[str, bytes]:
        return {key: lasting(key, store.read(key)) for key in store.list("") if not key.startswith(VOLATILE)}

    before = there()
    sample = next(renderfarm.open(out).samples())
    key = sample.key if layout == "files" else Output(out).part(0).key
    store.put(key, (damaged := before[key][:-200]))
    store.delete(Output(out).part(2).key)
    store.delete("errors/part-00000000.parquet")
    summary = renderfarm.run(job, engine="inline", repair=True)
    assert [repaired.part for repaired in summary.repaired] == ["part-00000000", "part-00000002"]
    assert there() == before
    assert store.read(f"{summary.repaired[0].kept}/{key}") == damaged
    assert verify(out, Choice(all=True)).ok


@pytest.mark.parametrize("as_json", [False, True])
def test_the_command_says_what_it_mended(as_json: bool, folder: Path, out: Path) -> None:
    image_truncated(out)
    entry(out, 1).write_bytes(b"")
    command = ["run", str(folder / "job.yaml"), "--engine", "inline", "--repair"]
    said = CliRunner().invoke(app, [*command, *(["--json"] if as_json else [])], catch_exceptions=False)
    assert said.exit_code == 0
    if as_json:
        first, second = json.loads(said.stdout.splitlines()[-1])["repaired"]
        assert (first["part"], second["part"], second["kept"]) == ("part-00000000", "part-00000001", None)
        assert first["kept"].startswith(f"{DAMAGED}/")
        assert min(len(first["problems"]), len(second["problems"])) > 0
    else:
        assert re.search(rf"repaired part-00000000: set aside in {DAMAGED}/\S+ and to be rendered again: ", said.stdout)
        assert "repaired part-00000001: views and index entry rebuilt: part 1: " in said.stdout
    again = CliRunner().invoke(app, command, catch_exceptions=False)
    assert "nothing to repair: each committed part is what it was" in again.stdout
