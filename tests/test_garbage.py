"""`gc` removes what nobody names and nothing else, whatever else happens to the output meanwhile."""

from __future__ import annotations

import json
import os
import random
import re
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from covering import covering
from test_cli import cli, refused

import renderfarm
from renderfarm import commit, garbage
from renderfarm.garbage import KEPT_LOGS, Collected, collect
from renderfarm.journal import LOGS
from renderfarm.storage import LocalStore, Store, Stored, open_store
from renderfarm.verification import Choice, verify

Write = Callable[..., Path]
LAYOUTS = ("files", "parquet", "webdataset")
DAY = 86_400.0


@pytest.fixture
def write(write_manifest: Write, write_job: Write, tmp_path: Path) -> Callable[..., Path]:
    """Two images of row 1, an error row, a part of errors alone; originals kept."""
    columns = {"prompt": ["a", "b", "", "", "c", "d"], "num_images_per_prompt": [1, 2, 1, 1, 1, 1]}
    after = [{"colour": {"saturation": 1.2}}]

    def job(layout: str, url: str) -> Path:
        output = {"path": url, "layout": layout, "part_rows": 2, "keep_originals": True}
        return write_job(write_manifest(columns), f"{layout}.yaml", output=output, after=after)

    return job


@pytest.fixture
def out(write: Callable[..., Path], tmp_path: Path) -> Path:
    renderfarm.run(write("files", str(tmp_path / "out")), engine="inline")
    return tmp_path / "out"


def contents(store: Store) -> dict[str, bytes]:
    return {key: store.read(key) for key in store.list("")}


def seen(url: str) -> list[Any]:
    """What readers get, and what `verify --all` says."""
    rows = [(picture.tobytes(), record, sample.original().tobytes()) for (picture, record), sample in _both(renderfarm.open(url))]  # type: ignore[union-attr]
    return [rows, renderfarm.open(url).errors().to_pylist(), verify(url, Choice(all=True))]


def _both(output: Any) -> Iterator[Any]:
    return zip(output, output.samples(), strict=True)


def totals(found: Collected) -> dict[str, int]:
    return {kind: count.files for kind, count in found.removed.items() if count.files}


def ages(out: Path, days: float = 2) -> None:
    """Make everything there so old."""
    for path in out.rglob("*"):
        os.utime(path, (time.time() - days * DAY,) * 2)


def orphan(out: Path, part: int = 0, top: str = "data", row: int = 0) -> Path:
    """A picture that another attempt left."""
    path = out / f"{top}/part-{part:08d}/{row:010d}-0000-{uuid.uuid4().hex[:8]}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"another attempt's")
    return path


def lost_commit(out: Path, part: int = 2) -> list[Path]:
    """What a death before a part's commit leaves; its pictures."""
    (out / f"data/part-{part:08d}/metadata.parquet").unlink()
    for path in [*out.glob(f"_renderfarm/parts/part-{part:08d}.*"), *out.glob(f"errors/part-{part:08d}.parquet")]:
        path.unlink()
    return [*out.glob(f"data/part-{part:08d}/*"), *out.glob(f"originals/part-{part:08d}/*")]


def lives(out: Path, *, updated: float = 0, started: float = 60) -> None:
    """A run's sign of life, so many seconds ago."""
    now = time.time()
    (out / commit.PROGRESS).write_text(json.dumps({"state": "RUNNING", "updated": now - updated, "started": now - started}))


@pytest.mark.parametrize(
    ("layout", "kind"), covering([(layout, kind) for layout in LAYOUTS for kind in ("local", "memory", "s3", "azure")])
)
def test_orphans_go_and_everything_else_is_as_before(
    layout: str, kind: str, write: Callable[..., Path], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    url = {"local": str(tmp_path / layout), "memory": f"memory://{uuid.uuid4().hex}"}.get(kind) or f"{request.getfixturevalue(kind)}/out"
    renderfarm.run(write(layout, url), engine="inline")
    store = open_store(url)
    before, was = contents(store), seen(url)
    assert was[2].ok
    assert len(was[0]) == 5
    orphans = {
        **{f"data/part-0000000{part}/000000000{part}-0000-{part:08x}.png": "images" for part in (0, 1, 2, 7)},
        **{f"originals/part-0000000{part}/000000000{part}-0000-0000000{part}.png": "originals" for part in (0, 7)},
        "_renderfarm/announced/part-00000001.json": "announcements",
        "_renderfarm/tmp/probe-1": "unfinished",
    }
    theirs = {"data/part-00000000/notes.txt", "originals/mine.png", "_renderfarm/announced/why.txt", "elsewhere/part-00000000.png"}
    for key in {*orphans, *theirs}:
        store.put(key, b"12345")
    time.sleep(1.1)  # S3 counts in seconds
    young = collect(url, DAY)
    assert totals(young) == {}
    would = collect(url, 0, dry_run=True)
    assert contents(store).keys() == {*before, *orphans, *theirs}
    found = collect(url, 0)
    assert totals(found) == totals(would) == {"images": 4, "originals": 2, "unfinished": 1, "announcements": 1}
    assert sum(count.bytes for count in found.removed.values()) == 5 * len(orphans)
    assert (found.notes, found.left_to_runs) == ([], 0)
    assert contents(store) == before | dict.fromkeys(theirs, b"12345")
    assert seen(url) == was
    assert totals(collect(url, 0)) == {}


def test_of_what_runs_said_the_last_hundred_stay(out: Path) -> None:
    logs = sorted((out / LOGS).iterdir())
    old = [out / LOGS / f"20261101T0000{number // 60:02}-{number:06}.jsonl" for number in range(KEPT_LOGS + 4)]
    for age, path in enumerate(reversed(old)):
        path.write_text("{}")
        os.utime(path, (time.time() - 2 * DAY - age,) * 2)
    assert totals(collect(str(out), DAY)) == {"logs": 4 + len(logs)}
    assert sorted((out / LOGS).iterdir()) == sorted([*old[4 + len(logs) :], *logs])
    for path in old[50:]:
        path.unlink()
    assert totals(collect(str(out), 0)) == {}


@pytest.mark.parametrize("seed", range(5))
def test_whatever_is_there_only_old_orphans_of_parts_that_are_known_go(seed: int, out: Path) -> None:
    dice, was = random.Random(seed), seen(str(out))
    ages(out)
    before = contents(LocalStore(str(out)))
    old, young = set(), set()
    for _ in range(40):
        path = orphan(out, dice.randrange(5), dice.choice(["data", "originals"]), dice.randrange(9))
        age = dice.choice([0.0, 0.5, 1.5, 30]) * DAY
        os.utime(path, (time.time() - age,) * 2)
        (old if age > DAY else young).add(path)
    assert old
    assert young
    assert sum(totals(collect(str(out), DAY)).values()) == len(old)
    assert {*contents(LocalStore(str(out)))} == {*before, *(path.relative_to(out).as_posix() for path in young)}
    assert seen(str(out)) == was


def test_what_a_death_before_the_commit_left_goes_and_the_next_run_makes_it_again(
    out: Path, write: Callable[..., Path], tmp_path: Path
) -> None:
    was = seen(str(out))
    assert len(lost := lost_commit(out)) == 4
    ages(out)
    assert totals(collect(str(out), DAY)) == {"images": 2, "originals": 2}
    assert not any(path.exists() for path in lost)
    renderfarm.run(write("files", str(out)), engine="inline")
    assert seen(str(out)) == was


@pytest.mark.parametrize(
    ("updated", "state", "alive"), [(10, "RUNNING", True), (10, "STARTING", True), (90, "RUNNING", False), (10, "FAILED", False)]
)
def test_parts_that_a_live_run_may_render_are_left_to_it(updated: float, state: str, alive: bool, out: Path) -> None:
    lost = lost_commit(out)
    committed, errors_alone = orphan(out, 0), orphan(out, 1)
    (out / "_renderfarm/tmp/a").write_bytes(b"of a writer that died")
    ages(out)
    (out / "_renderfarm/tmp/b").write_bytes(b"being written")
    os.utime(out / "_renderfarm/tmp/b", (time.time() - 30,) * 2)
    lives(out, updated=updated)
    (out / commit.PROGRESS).write_text((out / commit.PROGRESS).read_text().replace("RUNNING", state))
    found = collect(str(out), 5)
    assert not committed.exists()  # its table is there, and no other one can come
    assert errors_alone.exists() == alive  # a worker that has images for it would win
    assert [path.exists() for path in lost] == [alive] * 4
    assert found.left_to_runs == (5 if alive else 0)
    assert sorted(path.name for path in out.glob("_renderfarm/tmp/*")) == (["b"] if alive else [])


def test_a_run_that_begins_after_the_listing_is_seen(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lost, listed = lost_commit(out), LocalStore.stored
    ages(out)

    def then_a_run_begins(self: LocalStore, prefix: str) -> Iterator[Stored]:
        yield from list(listed(self, prefix))
        if prefix == "originals":
            lives(out, started=0)

    monkeypatch.setattr(LocalStore, "stored", then_a_run_begins)
    assert collect(str(out), DAY).left_to_runs == 4
    assert all(path.exists() for path in lost)


@pytest.mark.parametrize("commits", [True, False])
def test_a_name_that_is_written_again_between_listing_and_removal_stays(commits: bool, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a driver whose heartbeat does not arrive; it may even commit the part meanwhile."""
    was, table = seen(str(out)), (out / "data/part-00000002/metadata.parquet").read_bytes()
    lost, listed = lost_commit(out), LocalStore.stored
    files = {path: path.read_bytes() for path in lost}
    ages(out)
    again = iter([True])

    def then_they_come(self: LocalStore, prefix: str) -> Iterator[Stored]:
        yield from list(listed(self, prefix))
        if prefix == "originals" and next(again, False):
            for path, data in files.items():
                self.put(path.relative_to(out).as_posix(), data)
            if commits:
                self.put("data/part-00000002/metadata.parquet", table)

    monkeypatch.setattr(LocalStore, "stored", then_they_come)
    assert totals(collect(str(out), DAY)) == {}
    assert {path: path.read_bytes() for path in lost} == files
    if commits:
        assert seen(str(out))[:2] == was[:2]


def test_a_part_whose_table_is_damaged_changed_or_lost_keeps_everything(out: Path) -> None:
    orphans = [orphan(out, part) for part in (0, 2, 1)]
    table = out / "data/part-00000000/metadata.parquet"
    table.write_bytes(table.read_bytes()[:-20])
    (out / "data/part-00000002/metadata.parquet").unlink()
    ages(out)
    pictures = [path for path in out.rglob("*.png") if path != orphans[2]]
    found = collect(str(out), DAY)
    assert totals(found) == {"images": 1}
    assert [path.exists() for path in orphans] == [True, True, False]
    assert all(path.exists() for path in pictures)
    first, second = found.notes
    assert re.match(r"part 0: a committed table is damaged .*; none of its files was removed$", first)
    assert re.match(r"part 2: was committed, and its table or index entry is missing; .* none of its files was removed$", second)


def test_another_table_than_was_committed_says_nothing_of_what_belongs_to_a_part(out: Path) -> None:
    import pyarrow.parquet as pq

    path = out / "data/part-00000002/metadata.parquet"
    kept = pq.read_table(path)
    pq.write_table(kept.slice(0, 1), path)
    ages(out)
    found = collect(str(out), DAY)
    assert totals(found) == {}
    assert "part 2: its table is not the one that was committed" in found.notes[0]


def test_stale_multipart_uploads_go(s3: str, write: Callable[..., Path]) -> None:
    import boto3

    url = f"{s3}/some/out"
    renderfarm.run(write("parquet", url), engine="inline")
    client, bucket = boto3.client("s3"), s3.removeprefix("s3://")
    for key in ("some/out/data/part-00000000.parquet", "some/other/data/part-00000000.parquet"):
        client.create_multipart_upload(Bucket=bucket, Key=key)
    was = seen(url)
    assert totals(collect(url, 365 * 30 * DAY)) == {}
    time.sleep(1.1)  # S3 counts in seconds
    assert totals(collect(url, 0)) == {"unfinished": 1}
    left = client.list_multipart_uploads(Bucket=bucket)["Uploads"]
    assert [upload["Key"] for upload in left] == ["some/other/data/part-00000000.parquet"]
    assert seen(url) == was


def test_the_command_prints_what_goes_and_takes_an_age(out: Path, tmp_path: Path) -> None:
    path = orphan(out)
    ages(out)
    dry = cli("gc", out, "--dry-run")
    assert dry.returncode == 0
    assert re.search(r"would be removed +files +bytes", dry.stdout)
    assert re.search(r"images +1 +17 *\n", dry.stdout)
    assert path.exists()
    assert json.loads(cli("gc", out, "--older-than", "3d", "--json").stdout)["removed"]["images"] == {"files": 0, "bytes": 0}
    assert json.loads(cli("gc", out, "--json").stdout)["removed"]["images"] == {"files": 1, "bytes": 17}
    assert not path.exists()
    assert "give a number with its unit, for example 12h or 1d" in refused("gc", out, "--older-than", "soon")
    assert "not an output of renderfarm" in refused("gc", tmp_path)
    assert tuple(json.loads(cli("gc", out, "--json").stdout)["removed"]) == garbage.KINDS
