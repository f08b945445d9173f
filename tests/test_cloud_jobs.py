"""Whole jobs whose output lies in a store: what comes out is what a folder would hold, whatever the store does meanwhile."""

from __future__ import annotations

import asyncio
import io
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from aiohttp import web
from checker import lasting
from covering import covering
from servers import FaultProxy, lose_reply, s3_error

import renderfarm
from renderfarm.errors import InvalidJob
from renderfarm.progress import Progress
from renderfarm.report import views
from renderfarm.status import read_status
from renderfarm.storage import Store, cloud, open_store
from renderfarm.summary import RunSummary
from renderfarm.verification import Choice, verify

Forward = Callable[[], Awaitable[web.Response]]
VOLATILE = (
    "_renderfarm/runs/",
    "_renderfarm/logs/",
    "_renderfarm/progress.json",
    "_renderfarm/report/report.html",
    "README.md",
)  # times, run ids, URLs


@pytest.fixture(params=["s3", "azure"])
def bucket(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(request.param))


def contents(store: Store) -> dict[str, bytes]:
    return {key: lasting(key, store.read(key)) for key in store.list("") if not key.startswith(VOLATILE)}


def run(job: Path, **options: object) -> RunSummary:
    return renderfarm.run(job, engine="inline", **options)


def test_a_store_ends_up_with_the_bytes_that_a_folder_gets(bucket: str, write_manifest, write_job, tmp_path: Path) -> None:
    job = write_job(write_manifest(), output={"path": f"{bucket}/some/out"})
    there = run(job)
    assert there.images == 8
    here = run(write_job(write_manifest(), output={"path": str(tmp_path / "here")}))
    assert contents(open_store(there.out)) == contents(open_store(here.out))
    again = run(job)
    assert (again.images, again.new_images) == (8, 0)
    assert verify(there.out, Choice(all=True)).ok
    status = read_status(there.out)
    assert (status["state"], status["images"], status["waiting for"]) == ("SUCCEEDED", 8, None)
    assert [record["prompt"] for _, record in renderfarm.open(there.out)] == [record["prompt"] for _, record in renderfarm.open(here.out)]


def test_a_place_that_holds_something_else_is_not_written_to(s3: str, write_manifest, write_job) -> None:
    open_store(f"{s3}/theirs").put("notes.txt", b"mine")
    with pytest.raises(InvalidJob, match=r"no output of renderfarm, and not empty \(it holds notes.txt\)"):
        run(write_job(write_manifest(), output={"path": f"{s3}/theirs"}))
    assert open_store(f"{s3}/theirs").list("") == ["notes.txt"]


def test_another_job_is_refused_and_the_differences_are_printed(s3: str, write_manifest, write_job) -> None:
    run(write_job(write_manifest(), output={"path": f"{s3}/out"}))
    with pytest.raises(InvalidJob, match=r"render.num_inference_steps: 3 there, 4 now"):
        run(write_job(write_manifest(), render={"num_inference_steps": 4}, output={"path": f"{s3}/out"}))


@pytest.mark.parametrize("seed", range(3))
def test_each_part_commits_once_whatever_the_network_does(
    seed: int, s3: str, faults: FaultProxy, write_manifest, write_job, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A third of all requests fails: refused before, or done and the answer lost, or the connection reset."""
    monkeypatch.setattr(cloud, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(cloud, "LONGEST_PAUSE_S", 0.05)
    dice, done = random.Random(seed), Counter[str]()

    async def fault(request: web.Request, forward: Forward) -> web.Response:
        fate = dice.random()
        done["lost" if fate < 0.12 else "refused" if fate < 0.24 else "reset" if fate < 0.36 else "good"] += 1
        if fate < 0.12:
            await forward()
            return lose_reply(request)
        if fate < 0.24:
            return s3_error(503, "SlowDown")
        return lose_reply(request) if fate < 0.36 else await forward()

    faults.fault = fault
    summary = run(write_job(write_manifest(), output={"path": f"{s3}/out"}))
    faults.fault = None
    assert min(done.values()) > 3, done
    assert (summary.state, summary.images, summary.errors) == ("SUCCEEDED", 8, 0)
    here = run(write_job(write_manifest(), output={"path": str(tmp_path / "here")}))
    assert contents(open_store(summary.out)) == contents(open_store(here.out))


def test_a_job_waits_for_new_credentials_and_charges_no_row(
    s3: str, faults: FaultProxy, write_manifest, write_job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("renderfarm.heartbeat.EVERY_S", 0.1)
    troubles: set[str | None] = set()
    expired = [False]

    async def fault(request: web.Request, forward: Forward) -> web.Response:
        return s3_error(400, "ExpiredToken", "The provided token has expired.") if expired[0] else await forward()

    def observe(progress: Progress) -> None:
        troubles.add(progress.trouble)
        if progress.parts_done and not expired[0] and faults.fault is None:
            faults.fault, expired[0] = fault, True
            threading.Timer(2.0, lambda: expired.__setitem__(0, False)).start()

    summary = run(write_job(write_manifest(), workers={"batch_size": 1}, output={"path": f"{s3}/out", "part_rows": 1}), observe=observe)
    assert (summary.state, summary.images, summary.errors) == ("SUCCEEDED", 8, 0)
    assert any(trouble and "the credentials have expired" in trouble for trouble in troubles)
    assert verify(summary.out, Choice(all=True)).ok


def test_two_runs_of_one_job_at_once_write_it_once(bucket: str, write_manifest, write_job) -> None:
    job = write_job(write_manifest(), output={"path": f"{bucket}/out", "part_rows": 1})
    found: list[RunSummary] = []
    runs = [threading.Thread(target=lambda: found.append(run(job))) for _ in range(2)]
    for one in runs:
        one.start()
    for one in runs:
        one.join()
    assert [summary.images for summary in found] == [8, 8]
    assert sum(summary.new_images for summary in found) == 8
    assert verify(f"{bucket}/out", Choice(all=True)).ok


@pytest.mark.slow
@pytest.mark.chaos
def test_a_run_on_ray_that_is_killed_goes_on_where_it_was(s3: str, write_manifest, write_job) -> None:
    """The driver dies with SIGKILL in mid-run; the next run of the same command ends the job, and nothing is there twice."""
    columns = {"prompt": [f"a red circle {k}" for k in range(40)]}
    job = write_job(write_manifest(columns), output={"path": f"{s3}/out", "part_rows": 2}, workers={"max": 1})
    command = [sys.executable, "-m", "renderfarm", "run", str(job)]
    store = open_store(f"{s3}/out")
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while len(store.list("_renderfarm/parts")) < 3:
            assert first.poll() is None or len(store.list("_renderfarm/parts")) == 20, "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        os.killpg(first.pid, 9)
        first.wait(60)
    second = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert second.returncode == 0, second.stdout + second.stderr
    assert "succeeded: 40 images, 0 errors, 40 rows in s3://" in second.stdout
    assert verify(f"{s3}/out", Choice(all=True)).ok
    assert Counter(record["row"] for _, record in renderfarm.open(f"{s3}/out")) == Counter(range(40))


# ---------------------------------------------------------------------------------------------- what a job reads


def put_manifests(url: str) -> None:
    """Two files of four prompts, and some that are none."""
    store = open_store(url)
    for name in ("a", "b"):
        buffer = io.BytesIO()
        pq.write_table(pa.table({"prompt": [f"{name}{k}" for k in range(4)]}), buffer)
        store.put(f"prompts/{name}.parquet", buffer.getvalue())
    store.put("prompts/_ours/c.parquet", b"hidden")
    store.put("prompts/readme.md", b"no manifest")


MANIFESTS = [
    ("prompts", "a0 a1 a2 a3 b0 b1 b2 b3"),
    ("prompts/b.parquet", "b0 b1 b2 b3"),
    ("prompts/*.parquet", "a0 a1 a2 a3 b0 b1 b2 b3"),
]


@pytest.mark.parametrize(
    ("bucket", "name", "prompts"), covering([(kind, *one) for one in MANIFESTS for kind in ("s3", "azure")]), indirect=["bucket"]
)
def test_a_manifest_is_read_from_a_store(bucket: str, name: str, prompts: str, write_job) -> None:
    put_manifests(bucket)
    summary = run(write_job(f"{bucket}/{name}", output={"path": f"{bucket}/out"}))
    assert " ".join(record["prompt"] for _, record in renderfarm.open(summary.out)) == prompts
    assert run(write_job(f"{bucket}/{name}", output={"path": f"{bucket}/out"})).new_images == 0


@pytest.mark.parametrize("name", ["nothing", "prompts/c.parquet", "prompts/*.csv", "prompts/readme.md"])
def test_a_manifest_that_is_not_in_its_store_is_refused_by_name(s3: str, name: str, write_job) -> None:
    put_manifests(s3)
    with pytest.raises(InvalidJob, match=rf"manifest {re.escape(s3)}/{re.escape(name)}: (no|the folder holds no|not a)"):
        run(write_job(f"{s3}/{name}", output={"path": f"{s3}/out"}))


def test_a_bucket_that_may_not_be_read_says_so_and_not_that_there_is_nothing(s3: str, faults: FaultProxy, write_job) -> None:
    put_manifests(s3)

    async def denied(request: web.Request, forward: Forward) -> web.Response:
        return s3_error(403, "AccessDenied") if "prompts" in str(request.url) else await forward()

    faults.fault = denied
    with pytest.raises(InvalidJob, match=r"manifest s3://.*: cannot read .*: refused with the credentials of this environment"):
        run(write_job(f"{s3}/prompts", output={"path": f"{s3}/out"}))


def test_a_manifest_is_read_on_where_the_connection_breaks(s3: str, faults: FaultProxy, write_job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cloud, "FIRST_PAUSE_S", 0.01)
    columns = {"prompt": [f"{k}" for k in range(200)], "ballast": [random.Random(k).randbytes(20_000) for k in range(200)]}
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, row_group_size=20)
    open_store(s3).put("prompts.parquet", buffer.getvalue())
    asked = [0]

    async def fault(request: web.Request, forward: Forward) -> web.Response:
        if "prompts.parquet" in request.path and request.method == "GET":
            asked[0] += 1
            if asked[0] % 3 == 2:
                return lose_reply(request)
        return await forward()

    faults.fault = fault
    summary = run(write_job(f"{s3}/prompts.parquet", output={"path": "memory://broken", "part_rows": 50}))
    assert summary.images == 200
    assert asked[0] > 9
    faults.fault = None


def test_a_model_is_fetched_from_a_store_once(bucket: str, tiny_model, write_manifest, write_job, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    store, folder = open_store(f"{bucket}/models/tiny"), tiny_model("sd")
    for path in folder.rglob("*"):
        if path.is_file():
            store.put(path.relative_to(folder).as_posix(), path)
    job = {"render": {"num_inference_steps": 2, "height": 32, "width": 32}, "workers": {"batch_size": 2, "dtype": "float32"}}
    there = run(write_job(write_manifest({"prompt": ["a", "b"]}), model=f"{bucket}/models/tiny", output={"path": f"{bucket}/out"}, **job))
    here = run(write_job(write_manifest({"prompt": ["a", "b"]}), model=str(folder), output={"path": str(tmp_path / "here")}, **job))
    pixels = [[record["pixel_sha256"] for _, record in renderfarm.open(summary.out)] for summary in (there, here)]
    assert pixels[0] == pixels[1]


@pytest.mark.chaos
def test_two_interrupts_end_a_run_whose_store_does_not_answer(s3: str, faults: FaultProxy, write_manifest, write_job) -> None:
    columns = {"prompt": [f"a red circle {k}" for k in range(40)]}
    job = write_job(write_manifest(columns), output={"path": f"{s3}/out", "part_rows": 2})
    committed = threading.Event()

    async def silent(request: web.Request, forward: Forward) -> web.Response:
        if "_renderfarm/parts/part" in request.path:
            committed.set()
        if committed.is_set():
            await asyncio.sleep(300)
        return await forward()

    faults.fault = silent
    process = subprocess.Popen(
        [sys.executable, "-m", "renderfarm", "run", str(job), "--engine", "inline"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert committed.wait(120)
        process.send_signal(signal.SIGINT)
        time.sleep(3)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=150)
    finally:
        process.kill()
    assert process.returncode == 75, said
    assert "stopped at once: run the same command again to continue" in said
    faults.fault = None
    assert run(job).images == 40


def test_a_store_that_goes_away_as_a_run_ends_keeps_it_from_nothing_but_its_views(
    s3: str, faults: FaultProxy, write_manifest, write_job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(views, "PATIENCE_S", 1.0)
    asked = Counter[str]()

    async def fault(request: web.Request, forward: Forward) -> web.Response:
        if asked:
            asked[f"{request.method} {request.path}"] += 1
            return s3_error(503, "SlowDown")
        answer = await forward()
        if request.method == "PUT" and "/_renderfarm/runs/" in request.path:
            asked["the end"] = 1
        return answer

    faults.fault = fault
    summary = run(write_job(write_manifest(), output={"path": f"{s3}/out"}))
    assert (summary.state, summary.images, summary.exit_code) == ("SUCCEEDED", 8, 0)
    (warning,) = summary.warnings
    assert warning.startswith("the contact sheet, the dataset card, the report were not written, since the store is away")
    views_of = ("README.md", "_renderfarm/report/", "_renderfarm/parts", "data")
    assert not [key for key in asked if key.partition("/out/")[2].startswith(views_of)], "the first request of the first one was the last"
    faults.fault = None
    again = run(write_job(write_manifest(), output={"path": f"{s3}/out"}))
    assert (again.new_images, again.warnings) == (0, ())
    assert open_store(f"{s3}/out").exists("_renderfarm/report/report.html")
