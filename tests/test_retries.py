"""Failed samples rendered again: each retry is a part of its own, every sample ends exactly once, and no earlier commit is touched."""

from __future__ import annotations

import json
import shutil
import threading
import uuid
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from checker import check_complete, error_rows, image_rows
from test_commit import errors, images, publish

import renderfarm
from renderfarm import commit, requests
from renderfarm.errors import AlreadyExists, Fatal, OutOfMemory
from renderfarm.export import Options, export
from renderfarm.garbage import collect
from renderfarm.layouts import LAYOUTS
from renderfarm.layouts.base import Layout, part_of
from renderfarm.models.fake import Fake, State
from renderfarm.reading import Output
from renderfarm.records import Part, PartId, Retry, SampleKey
from renderfarm.storage import Store, open_store
from renderfarm.summary import RunSummary
from renderfarm.verification import Choice, inspect, verify

FILES_ONLY = Choice(sample=0)


def keys(*rows: int) -> frozenset[SampleKey]:
    return frozenset(SampleKey(row, 0) for row in rows)


# ------------------------------------------------------------------------------------------------------- the commit


@pytest.fixture
def store() -> Store:
    return open_store(f"memory://{uuid.uuid4().hex}")


@pytest.fixture(params=list(LAYOUTS))
def layout(request: pytest.FixtureRequest, store: Store) -> Layout:
    job = {"manifest": {"where": None, "files": [{"rows": 24}]}, "output": {"part_rows": 3, "layout": request.param}}
    store.put(commit.JOB, commit.to_json({"model": {}, "render": {}, **job}))
    return LAYOUTS[request.param]


def part(retry: int = 0) -> Part:
    return Part(7, 21, 24, retry)


def ask(store: Store, retry: int, *rows: int) -> None:
    requests.ask(store, Retry(PartId(7, retry), keys(*rows)))


def test_a_retry_is_counted_by_the_index_and_changes_nothing_that_was_committed(store: Store, layout: Layout) -> None:
    publish(store, layout, part(), images(21), pa.concat_tables([errors(22), errors(23, kind="OutOfMemory")]))
    before = {key: store.read(key) for key in store.list("")}
    assert commit.totals(store, commit.index_entries(store)) == commit.Totals(1, 1, 2, 100, {"InvalidInput": 1, "OutOfMemory": 1}, 0)
    ask(store, 1, 22, 23)
    assert commit.open_retries(store) == [Retry(PartId(7, 1), keys(22, 23))]
    assert publish(store, layout, part(1), images(23), errors(22, kind="RenderFailed")).superseded == {"InvalidInput": 1, "OutOfMemory": 1}
    assert commit.totals(store, commit.index_entries(store)) == commit.Totals(1, 2, 1, 200, {"RenderFailed": 1}, 0)
    assert commit.parts_of_the_grid(commit.index_entries(store)) == [7]
    assert commit.open_retries(store) == []
    ask(store, 2, 22)
    publish(store, layout, part(2), images(22), errors())
    assert commit.totals(store, commit.index_entries(store)) == commit.Totals(1, 3, 0, 300, {}, 0)
    assert {key: store.read(key) for key in before} == before


def test_an_image_beats_any_error_and_of_errors_the_last_one_counts(store: Store, layout: Layout) -> None:
    publish(store, layout, part(), images(), errors(21, 22, 23, message="first"))
    publish(store, layout, part(1), images(21), errors(22, message="second"))
    publish(store, layout, part(2), images(), errors(23, message="third"))
    ended = commit.ended(store, layout, 7, 3)
    assert ended.images == keys(21)
    assert {key.row: error["error_message"] for key, error in ended.errors.items()} == {22: "second", 23: "third"}
    assert {key.row: by for key, by in ended.by.items()} == {22: PartId(7, 1), 23: PartId(7, 2)}
    first = commit.ended(store, layout, 7, 1)
    assert (first.images, first.errors.keys()) == (set(), keys(21, 22, 23))


def test_a_retry_whose_worker_died_before_its_index_entry_is_adopted(store: Store, layout: Layout) -> None:
    publish(store, layout, part(), images(21), errors(22, 23))
    ask(store, 1, 22, 23)
    publish(store, layout, part(1), images(22), errors(23, kind="OutOfMemory"))
    (entry,) = (key for key in store.list(commit.PARTS) if ".r1." in key)
    said = json.loads(store.read(entry))
    store.delete(entry)
    assert [retry.part for retry in commit.open_retries(store)] == [PartId(7, 1)]
    found = commit.find_commit(store, layout, part(1))
    assert found is not None
    assert (found.id, found.images, found.adopted, found.superseded) == (PartId(7, 1), 1, True, {"InvalidInput": 2})
    assert json.loads(store.read(entry)) == said
    assert commit.open_retries(store) == []


def test_images_that_come_when_a_retry_has_begun_are_too_late(store: Store, layout: Layout) -> None:
    """Else an old worker's image and the retry's would be two of one sample."""
    publish(store, layout, part(), images(), errors(21, 22, 23))
    ask(store, 1, 21)
    late = publish(store, layout, part(), images(21, 22), errors(23))
    assert (late.images, late.errors, late.adopted) == (0, 3, True)
    publish(store, layout, part(1), images(21), errors())
    assert not store.exists(layout.commit_key(part()))
    assert commit.totals(store, commit.index_entries(store)).images == 1


def test_an_adopted_part_is_still_said_to_be_whose_it_is(store: Store, layout: Layout) -> None:
    with layout.writer(store, part()) as writer:
        commit.publish(store, layout, part(), writer, images(), errors(21), lambda: {"worker": "w3", "run": "r", "host": "h"})
    (entry,) = store.list(commit.PARTS)
    commit.find_commit(store, layout, part())
    assert commit.committed_by(store, entry) == {"worker": "w3", "run": "r", "host": "h"}
    store.put(entry, b"damaged")
    commit.find_commit(store, layout, part())
    assert commit.committed_by(store, entry) == {}
    assert commit.error_classes(store, commit.index_entries(store)) == {"InvalidInput": 1}


def test_requests_are_open_one_after_the_other_and_once_their_part_is_committed(store: Store, layout: Layout) -> None:
    ask(store, 1, 21)
    ask(store, 2, 22)
    assert commit.open_retries(store) == [], "the part is not rendered yet"
    publish(store, layout, part(), images(23), errors(21, 22))
    assert [retry.part for retry in commit.open_retries(store)] == [PartId(7, 1)]
    publish(store, layout, part(1), images(21), errors())
    assert [retry.part for retry in commit.open_retries(store)] == [PartId(7, 2)]
    publish(store, layout, part(2), images(22), errors())
    assert commit.open_retries(store) == []
    assert requests.asked(store) == [PartId(7, 1), PartId(7, 2)]


def test_of_many_that_ask_for_one_number_exactly_one_has_it(store: Store) -> None:
    start = threading.Barrier(16)

    def one(row: int) -> bool:
        start.wait()
        try:
            ask(store, 1, row)
        except AlreadyExists:
            return False
        return True

    with ThreadPoolExecutor(16) as pool:
        won = [row for row, it in enumerate(pool.map(one, range(16))) if it]
    assert len(won) == 1
    assert requests.read(store, PartId(7, 1)).samples == keys(*won)


DAMAGE = ("", "[]", "{}", '{"samples": 1}', '{"samples": [[1]]}', '{"samples": [[1, true]]}', '{"samples": [[-1, 0]]}')


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_request_or_waiver_says_what_to_do(damage: str, store: Store, layout: Layout) -> None:
    publish(store, layout, part(), images(23), errors(21, 22))
    requests.waive(store, 7, keys(21), "known")
    ask(store, 1, 22)
    store.put("_renderfarm/retries/part-00000007.r1.json", damage.encode())
    with pytest.raises(
        Fatal, match=r"part-00000007\.r1\.json is damaged \(.*\); remove it, and `renderfarm retry` asks again for what failed"
    ):
        commit.open_retries(store)
    (waiver,) = store.list(requests.WAIVED)
    store.put(waiver, damage.encode())
    with pytest.raises(Fatal, match=r"waived/part-00000007\..*\.json is damaged \(.*\); remove it, and waive again"):
        commit.totals(store, commit.index_entries(store))


def test_what_is_waived_is_counted_while_it_is_an_error(store: Store, layout: Layout) -> None:
    publish(store, layout, part(), images(23), errors(21, 22))
    for _ in range(2):
        requests.waive(store, 7, keys(21, 22), "these show people")
    requests.waive(store, 7, keys(22, 23), None)  # twice, and one that has an image
    assert len(store.list(requests.WAIVED)) == 2
    assert commit.totals(store, commit.index_entries(store)).waived == 2
    publish(store, layout, part(1), images(21), errors())
    assert commit.totals(store, commit.index_entries(store)).waived == 1
    requests.waive(store, 8, keys(24), "of a part that is not rendered")
    assert commit.totals(store, commit.index_entries(store)).waived == 1


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("data/part-00000012/metadata.parquet", PartId(12)),
        ("data/part-00000012.r3/metadata.parquet", PartId(12, 3)),
        ("data/part-00000012.parquet", PartId(12)),
        ("data/part-00000012.r10.tar", PartId(12, 10)),
        ("errors/part-00000012.r1.parquet", PartId(12, 1)),
        ("errors/part-00000012.r0.parquet", None),
        ("data/part-00000012.r1", None),
        ("data/part-x.parquet", None),
        ("metadata/part-00000012.parquet", None),
    ],
)
def test_a_table_names_its_part(key: str, expected: PartId | None) -> None:
    assert part_of(key) == expected


# ------------------------------------------------------------------------------------------------- of a whole output


ROWS = 8
PLANNED = {(row, k) for row in range(ROWS) for k in range(2)}
FAILED = {(1, 0), (1, 1), (3, 1), (4, 0), (4, 1), (5, 0), (5, 1), (7, 0)}  # part 0: three of six; part 1 (rows 3 to 5): all but one


Samples = Collection[tuple[int, int]]
Faults = Callable[[Samples], None]


def fail_on(patch: pytest.MonkeyPatch) -> Faults:
    """Says which samples the fake model fails on from then on."""
    step = Fake.step

    def set_(failing: Samples) -> None:
        def fail(self: Fake, states: list[State]) -> list[bool]:
            if any((state.sample.key.row, state.sample.key.image_index) in failing for state in states):
                raise OutOfMemory("scripted: out of memory")
            return step(self, states)

        patch.setattr(Fake, "step", fail)

    return set_


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Faults:
    return fail_on(monkeypatch)


def run(folder: Path, **options: Any) -> RunSummary:
    return renderfarm.run(folder / "job.yaml", engine="inline", **options)


def ask_all(out: Path) -> None:
    """For each part its current errors, under the next number."""
    output = Output(str(out))
    renderings = output.renderings()
    for index, table, _ in output.errors_by_part():
        samples = frozenset(SampleKey(row["row"], row["image_index"]) for row in table.to_pylist())
        requests.ask(output.store, Retry(PartId(index, renderings.get(index, 1)), samples))


@pytest.fixture(scope="module", params=list(LAYOUTS))
def rendered(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `once`, rendered once with FAILED errors; `out`, rendered three times: of the failed samples, (4, 0) and (7, 0) fail once
    more, and (7, 0) to the end; and `plain`, rendered at once without a fault but the last."""
    root = tmp_path_factory.mktemp(request.param)
    pq.write_table(pa.table({"prompt": [f"prompt {k}" for k in range(ROWS)], "mood": list("abcdefgh")}), root / "m.parquet")
    job = {
        "name": "t", "manifest": "../m.parquet", "model": "builtin:fake", "workers": {"batch_size": 4}, "failure": {"tolerate": 1.0},
        "render": {"num_inference_steps": 2, "num_images_per_prompt": 2},
        "output": {"path": "out", "part_rows": 3, "layout": request.param},
    }  # fmt: skip
    for name in ("retried", "plain"):
        (root / name).mkdir()
        (root / name / "job.yaml").write_text(json.dumps(job))
    with pytest.MonkeyPatch.context() as patch:
        faults = fail_on(patch)
        faults(FAILED)
        assert run(root / "retried").errors == len(FAILED)
        shutil.copytree(root / "retried", root / "once")
        for failing, errors_left in (({(4, 0), (7, 0)}, 2), ({(7, 0)}, 1)):
            ask_all(root / "retried/out")
            faults(failing)
            assert run(root / "retried").errors == errors_left
        assert run(root / "plain").errors == 1
    return root


@pytest.fixture
def folder(rendered: Path, tmp_path: Path) -> Path:
    """A copy of what was rendered three times."""
    shutil.copy(rendered / "m.parquet", tmp_path)
    return Path(shutil.copytree(rendered / "retried", tmp_path / "retried"))


@pytest.fixture
def out(folder: Path) -> Path:
    return folder / "out"


def records(out: Path) -> list[dict[str, Any]]:
    return [sample.record for sample in renderfarm.open(out).samples()]


def test_every_sample_ends_once_and_readers_see_what_one_rendering_would_have_given(rendered: Path, out: Path) -> None:
    check_complete(out, PLANNED)
    at_once = rendered / "plain/out"
    assert records(out) == records(at_once), "in the manifest's order"
    errors, others = (renderfarm.open(place).errors().drop_columns(["part", "asked_again", "waived", "reason"]) for place in (out, at_once))
    assert errors == others, "but for the rendering that said so last"
    assert len(renderfarm.open(out)) == len(PLANNED) - 1
    assert error_rows(out) == errors.to_pylist()
    found = verify(str(out), FILES_ONLY)
    assert found.ok, found.problems
    assert (found.parts_done, found.parts, found.images, found.errors, found.notes) == (3, 3, 15, 1, [])
    names = [part.name.removeprefix("part-0000000") for part in renderfarm.open(out).committed()]
    assert names == ["0", "0.r1", "1", "1.r1", "1.r2", "2", "2.r1", "2.r2"]


def test_a_run_that_finds_nothing_open_touches_nothing(folder: Path, out: Path) -> None:
    def contents() -> dict[Path, bytes]:
        kept = (path for name in ("data", "errors", "metadata", "_renderfarm/parts") for path in (out / name).rglob("*") if path.is_file())
        return {path: path.read_bytes() for path in kept}

    before = contents()
    summary = run(folder, repair=True)
    assert (summary.new_images, summary.new_errors, summary.repaired, summary.state) == (0, 0, (), "SUCCEEDED")
    assert contents() == before


def test_status_card_and_inspect_know_retries(out: Path) -> None:
    from renderfarm.status import read_status

    status = read_status(str(out))
    assert [status[name] for name in ("parts done", "images", "errors", "error classes")] == [3, 15, 1, {"OutOfMemory": 1}]
    assert "15 images, 1 errors, 8 manifest rows" in (out / "README.md").read_text()
    assert inspect(str(out), 4, 0).part == "part-00000001.r2"
    assert inspect(str(out), 3, 1).part == "part-00000001.r1"
    assert inspect(str(out), 3, 0).part == "part-00000001"
    last = inspect(str(out), 7, 0)
    assert (last.part, last.file, last.record["error_class"]) == ("part-00000002.r2", None, "OutOfMemory")


@pytest.mark.parametrize("shuffle", [None, 7])
@pytest.mark.parametrize("to", list(LAYOUTS))
def test_an_export_has_the_bytes_of_one_that_never_failed(to: Any, shuffle: int | None, rendered: Path, tmp_path: Path) -> None:
    found = []
    for name in ("retried", "plain"):
        dest = tmp_path / name
        exported = export(str(rendered / name / "out"), str(dest), Options(to=to, shuffle=shuffle))
        assert (exported.images, exported.errors_left_out) == (15, 1)
        found.append({path.relative_to(dest): path.read_bytes() for path in dest.rglob("*") if path.is_file() and "data" in path.parts})
    assert found[0] == found[1]


def test_orphans_of_retries_are_collected_and_what_is_committed_stays(folder: Path, out: Path) -> None:
    orphans = [out / f"data/part-00000001.{retry}/0000000004-0000-0123abcd.png" for retry in ("r1", "r2", "r3")]
    for orphan in orphans:
        orphan.parent.mkdir(exist_ok=True)
        orphan.write_bytes(b"of a worker that died")
    assert collect(str(out), -60).removed["images"].files == len(orphans)
    assert not any(orphan.exists() for orphan in orphans)
    check_complete(out, PLANNED)


def commit_object(out: Path, part: PartId) -> Path:
    return out / Output(str(out)).part(part.index, part.retry).key


def lasting(out: Path) -> dict[str, bytes]:
    from test_repair import contents

    return contents(out)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["flipped", "gone"])
def test_a_damaged_retry_is_found_and_rendered_again(how: str, folder: Path, out: Path, faults: Faults) -> None:
    faults({(7, 0)})
    before, path = lasting(out), commit_object(out, PartId(1, 2))
    flip(path) if how == "flipped" else path.unlink()
    assert any("1.r2" in problem for problem in verify(str(out), FILES_ONLY).problems)
    summary = run(folder, repair=True)
    assert [repaired.part for repaired in summary.repaired] == ["part-00000001.r2"]
    assert lasting(out) == before
    assert verify(str(out), FILES_ONLY).ok


def test_with_a_damaged_rendering_its_retries_are_rendered_again(folder: Path, out: Path, faults: Faults) -> None:
    """And what fails no more needs none: each sample still ends once."""
    before = records(out)
    commit_object(out, PartId(1)).unlink()
    faults({(4, 1), (7, 0)})
    summary = run(folder, repair=True)
    assert [repaired.part for repaired in summary.repaired] == ["part-00000001", "part-00000001.r1", "part-00000001.r2"]
    assert (summary.images, summary.errors) == (14, 2)
    check_complete(out, PLANNED)
    assert verify(str(out), FILES_ONLY).ok
    ask_all(out)
    faults({(7, 0)})
    assert run(folder).images == 15
    check_complete(out, PLANNED)
    assert records(out) == before


def test_a_second_image_of_a_sample_is_found_and_mended(folder: Path, out: Path) -> None:
    """As from a worker that slept through everything between its look and its commit."""
    output = Output(str(out))
    committed = commit.read_part(output.store, output.layout, Part(1, 3, 6))[1]
    late = committed.images.take([0])
    again = Part(1, 3, 6, 3)
    with output.layout.writer(output.store, again) as writer:
        writer.add(committed.names[0], output.part(1).samples[0].data())
        named = late.set_column(late.schema.get_field_index("file_name"), "file_name", pa.array([committed.names[0]]))
        commit.publish(output.store, output.layout, again, writer, named, committed.errors.slice(0, 0))
    assert "part-00000001.r3: row 3, image 0 has an image in a rendering before it" in verify(str(out), FILES_ONLY).problems
    summary = run(folder, repair=True)
    assert [repaired.part for repaired in summary.repaired] == ["part-00000001.r3"]
    assert verify(str(out), FILES_ONLY).ok
    check_complete(out, PLANNED)


def test_index_entries_of_retries_are_written_again(folder: Path, out: Path) -> None:
    before = lasting(out)
    for path in (out / "_renderfarm/parts").glob("*.r1.*"):
        path.unlink()
    (entry,) = (out / "_renderfarm/parts").glob("part-00000001.r2.*")
    entry.write_text(entry.read_text().replace("OutOfMemory", "Filtered"))
    assert any("counts other errors than its table" in problem for problem in verify(str(out), FILES_ONLY).problems)
    run(folder, repair=True)
    assert lasting(out) == before


def test_readers_of_others_find_the_rows_of_retries(out: Path) -> None:
    tables = sorted(out.glob(Output(str(out)).layout.TABLES))
    rows = pa.concat_tables([pq.read_table(table, columns=["row", "image_index"]) for table in tables], promote_options="permissive")
    assert sorted(zip(*rows.to_pydict().values(), strict=True)) == sorted(PLANNED - {(7, 0)})


def test_datasets_gives_the_rows_of_retries(out: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    found = datasets.load_dataset(str(out), split="train", cache_dir=str(tmp_path / "cache"))
    rows = [sample.get("json", sample) for sample in found]
    assert sorted((row["row"], row["image_index"]) for row in rows) == sorted(PLANNED - {(7, 0)})
    pictures = [sample.get("png", sample.get("image")) for sample in found]
    assert {picture.size for picture in pictures} == {(row["width"], row["height"]) for row in image_rows(out)}


def test_webdataset_gives_the_rows_of_retries(rendered: Path) -> None:
    import webdataset

    out = rendered / "retried/out"
    if not (shards := sorted(map(str, out.glob("data/*.tar")))):
        assert Output(str(out)).layout is not LAYOUTS["webdataset"]
        return
    found = webdataset.WebDataset(shards, shardshuffle=False).decode("pil").to_tuple("png", "json")
    assert sorted((row["row"], row["image_index"]) for _, row in found) == sorted(PLANNED - {(7, 0)})


def test_a_retry_on_every_engine(engine: Any, write_manifest: Callable[..., Path], write_job: Callable[..., Path], tmp_path: Path) -> None:
    job = write_job(write_manifest({"prompt": ["a", "", "b", "", "c"]}), workers={"max": 2}, output={"part_rows": 2})
    assert renderfarm.run(job, engine=engine).errors == 2
    ask_all(tmp_path / "out")
    summary = renderfarm.run(job, engine=engine)
    assert (summary.new_images, summary.new_errors, summary.images, summary.errors) == (0, 2, 3, 2)
    assert summary.error_classes == {"InvalidInput": 2}
    assert sorted(path.name for path in (tmp_path / "out/errors").iterdir() if ".r1." in path.name) == [
        "part-00000000.r1.parquet",
        "part-00000001.r1.parquet",
    ]
    check_complete(tmp_path / "out", {(row, 0) for row in range(5)})


def test_a_request_that_the_manifest_cannot_fulfil_stops_the_run_with_advice(folder: Path, out: Path) -> None:
    requests.ask(open_store(str(out)), Retry(PartId(2, 3), frozenset({SampleKey(7, 9)})))
    with pytest.raises(
        Fatal, match=r"row 7, image 9 is asked for, and the manifest does not have it; remove _renderfarm/retries/part-00000002\.r3"
    ):
        run(folder)


def test_a_request_is_rendered_in_the_run_that_first_renders_its_part(rendered: Path, tmp_path: Path) -> None:
    shutil.copy(rendered / "m.parquet", tmp_path)
    folder = Path(shutil.copytree(rendered / "once", tmp_path / "once"))
    ask_all(folder / "out")
    shutil.rmtree(folder / "out/_renderfarm/parts")
    for path in (*(folder / "out/data").iterdir(), *(folder / "out/errors").iterdir()):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    summary = run(folder)
    assert (summary.images, summary.errors) == (16, 0)
    assert commit.open_retries(open_store(str(folder / "out"))) == []
    check_complete(folder / "out", PLANNED)
