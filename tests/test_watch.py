"""`watch`: a run as the output shows it, a line for each change, until it ends; who stops watching stops nothing."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from own_time import own_time
from typer.testing import CliRunner

import renderfarm
from renderfarm import commit
from renderfarm.cli import app
from renderfarm.errors import InvalidJob
from renderfarm.storage import Store, open_store
from renderfarm.waiting import last_run

JOB = {"manifest": {"where": None, "files": [{"rows": 24}]}, "output": {"part_rows": 3, "layout": "files"}, "model": {}, "render": {}}
WORKER = {"device": "cpu", "node": "n", "images": 9, "leases": 3, "state": "ready", "reason": ""}


@pytest.fixture
def store() -> Store:
    store = open_store(f"memory://{uuid.uuid4().hex}")
    store.put(commit.JOB, commit.to_json(JOB))
    return store


def heart(store: Store, state: str = "RUNNING", **said: Any) -> None:
    now = time.time()
    known = {"run_id": "r1", "parts": 8, "parts_done": 2, "images": 5, "errors": 1, "workers": {"w0": WORKER}, "images_per_second": 2.0}
    known |= {"error_classes": {"InvalidInput": 1}, "rows_by_state": {"done": 6, "in flight": 3, "left": 15}, "eta_seconds": 9.0}
    store.put(commit.PROGRESS, commit.to_json(known | {"state": state, "updated": now, "first_ready": now - 4} | said))


def steps(store: Store, monkeypatch: pytest.MonkeyPatch, *states: tuple[str, dict[str, Any]]) -> None:
    """What the run says between two looks."""
    left = list(states)

    def sleep(seconds: float) -> None:
        state, said = left.pop(0)
        heart(store, state, **said)

    own_time(monkeypatch, "renderfarm.waiting", sleep=sleep)


def test_a_line_for_each_change_and_the_runs_exit_code(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    heart(store)
    steps(
        store,
        monkeypatch,
        ("RUNNING", {"eta_seconds": 8.0, "images_per_second": 2.1}),  # time alone tells nothing
        ("RUNNING", {"parts_done": 3, "images": 8}),
        ("RUNNING", {"parts_done": 3, "images": 8, "trouble": "the store is away"}),
        ("PARTIAL", {"parts_done": 8, "images": 23}),
    )
    result = CliRunner().invoke(app, ["watch", store.url], catch_exceptions=False)
    assert result.exit_code == 3
    lines = result.stdout.splitlines()
    assert [line.split(",")[0] for line in lines[:-2]] == [
        "running: part 2 of 8", "running: part 3 of 8", "running: part 3 of 8", "partial: part 8 of 8",
    ]  # fmt: skip
    assert "5 images, 1 errors, 2.0 images/s, 0:09 left, 1 workers" in lines[0]
    assert lines[2].endswith("; waiting: the store is away")
    assert lines[3].endswith("images/s")  # nothing is left of what has ended
    assert lines[4] == f"partial: 23 images, 1 errors in {store.url}"
    assert lines[5].endswith(f" errors {store.url}")


def test_json_is_an_object_a_line_and_the_last_one_has_the_exit_code(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    heart(store)
    steps(store, monkeypatch, ("RUNNING", {}), ("RUNNING", {"parts_done": 3}), ("SUCCEEDED", {"parts_done": 8}))
    result = CliRunner().invoke(app, ["watch", store.url, "--json", "--interval", "1m"], catch_exceptions=False)
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(said["state"], said["parts_done"], said["exit_code"]) for said in found] == [
        ("RUNNING", 2, None), ("RUNNING", 3, None), ("SUCCEEDED", 8, 0),
    ]  # fmt: skip
    assert found[0]["rows_by_state"] == {"done": 6, "in flight": 3, "left": 15}
    assert found[0]["workers"]["w0"]["state"] == "ready"
    assert result.exit_code == 0


def test_a_run_that_has_ended_or_died_is_shown_once(store: Store) -> None:
    for state, said, code, shown, then in (
        ("SUCCEEDED", {"errors": 1, "waived": 0}, 0, "succeeded: part 2", f" errors {store.url}"),
        ("CANCELLED", {}, 5, "cancelled: part 2", "`renderfarm run JOB`, which continues"),
        # what a dead run had not said is counted, and here is nothing
        ("RUNNING", {"updated": time.time() - 1e6}, 75, "interrupted: part 0 of 8, 0 images", "`renderfarm run JOB`, which continues"),
    ):
        heart(store, state, **said)
        result = CliRunner().invoke(app, ["watch", store.url], catch_exceptions=False)
        assert (result.exit_code, len(result.stdout.splitlines())) == (code, 3)
        assert result.stdout.startswith(shown)
        assert result.stdout.endswith(f"{then}\n")
    with pytest.raises(InvalidJob, match="--interval '2': give a number with its unit"):
        CliRunner().invoke(app, ["watch", store.url, "--interval", "2"], catch_exceptions=False)


def comes_late(monkeypatch: pytest.MonkeyPatch, step_s: float, begins_s: float) -> tuple[Store, list[float]]:
    """A store in which a run begins, and has ended, so long after the clock was at 0; each pause takes `step_s`."""
    store, clock = open_store(f"memory://{uuid.uuid4().hex}"), [0.0]

    def sleep(seconds: float) -> None:
        clock[0] += step_s
        if clock[0] == begins_s:
            store.put(commit.JOB, commit.to_json(JOB))
            heart(store, "SUCCEEDED")

    own_time(monkeypatch, "renderfarm.waiting", monotonic=lambda: clock[0], sleep=sleep)
    return store, clock


def test_a_run_that_was_submitted_may_come_a_little_later(monkeypatch: pytest.MonkeyPatch) -> None:
    store, clock = comes_late(monkeypatch, 31.0, 31.0)
    result = CliRunner().invoke(app, ["watch", store.url], catch_exceptions=False)
    assert (result.exit_code, len(result.stdout.splitlines())) == (0, 4)
    assert "waiting: nothing is there yet" in result.stdout
    clock[0] = 100.0
    with pytest.raises(InvalidJob, match="not an output of renderfarm"):
        CliRunner().invoke(app, ["watch", f"memory://{uuid.uuid4().hex}"], catch_exceptions=False)


def test_of_an_output_whose_last_run_has_ended_the_next_run_is_meant(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    heart(store, "PARTIAL", run_id="r0")
    assert last_run(store.url) == "r0"
    looks = list[str]()

    def sleep(seconds: float) -> None:
        looks.append("")
        if len(looks) == 2:
            heart(store, "SUCCEEDED", run_id="r1")

    own_time(monkeypatch, "renderfarm.waiting", sleep=sleep)
    result = CliRunner().invoke(app, ["watch", store.url, "--after", "r0"], catch_exceptions=False)
    assert (result.exit_code, len(looks)) == (0, 2)
    heart(store, "PARTIAL", run_id="r0")
    looks.clear()
    assert (renderfarm.open(store.url).wait(after="r0").run_id, len(looks)) == ("r1", 2)
    assert CliRunner().invoke(app, ["wait", store.url, "--after", "r1", "--begins-within", "0s"]).exit_code == 75
    assert last_run(f"memory://{uuid.uuid4().hex}") is None


def test_where_the_run_before_lives_on_both_are_watched(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    heart(store, "RUNNING", run_id="r0")
    steps(store, monkeypatch, ("RUNNING", {"run_id": "r0+a"}), ("RUNNING", {"run_id": "r0"}), ("SUCCEEDED", {"run_id": "r0+a"}))
    states = [(seen.state, seen.progress.get("run_id")) for seen in renderfarm.open(store.url).watch(after="r0", begins_within_s=60.0)]
    assert states == [("STARTING", None), ("RUNNING", "r0+a"), ("RUNNING", "r0"), ("SUCCEEDED", "r0+a")]


def test_who_waits_for_less_time_than_a_run_has_to_begin_is_told_so() -> None:
    url = f"memory://{uuid.uuid4().hex}"
    result = CliRunner().invoke(app, ["wait", url, "--timeout", "0s", "--begins-within", "30m"], catch_exceptions=False)
    assert result.exit_code == 6
    assert "starting (still; --timeout has passed)" in result.stdout


def test_machines_may_take_their_time_to_come(monkeypatch: pytest.MonkeyPatch) -> None:
    store, clock = comes_late(monkeypatch, 300.0, 1500.0)
    for command in ("watch", "wait"):
        clock[0] = 0.0
        result = CliRunner().invoke(app, [command, store.url, "--begins-within", "30m"], catch_exceptions=False)
        assert (result.exit_code, clock[0]) == (0, 1500.0)
        store.delete(commit.JOB)
        store.delete(commit.PROGRESS)
    clock[0] = 0.0
    with pytest.raises(InvalidJob, match="not an output of renderfarm"):
        CliRunner().invoke(app, ["wait", store.url, "--begins-within", "10m"], catch_exceptions=False)
    assert clock[0] == 600.0
    store.put(commit.JOB, commit.to_json(JOB))
    heart(store, "SUCCEEDED", run_id="r0")
    result = CliRunner().invoke(app, ["watch", store.url, "--after", "r0", "--begins-within", "10m"], catch_exceptions=False)
    assert result.exit_code == 75
    assert "no run began within 600 s; what was to start it may say why" in result.stdout
    assert result.stdout.endswith("(`renderfarm submit JOB … --logs`), says why none came\n")


def watching(out: Path, **options: Any) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "110"}
    command = [sys.executable, "-m", "renderfarm", "watch", str(out), "--interval", "0.2s"]
    # whoever began these tests in the background of a shell has Ctrl-C ignored by all that they start
    return subprocess.Popen(command, env=environment, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **options)


def test_ctrl_c_ends_the_watching_quietly_and_touches_nothing(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "out"))
    store.put(commit.JOB, commit.to_json(JOB))
    heart(store, updated=time.time() + 1e6)  # alive, whatever this machine does
    before = store.list("")
    process = watching(tmp_path / "out", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline().startswith(b"running: part 2 of 8")
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert (process.returncode, said) == (130, b"")
    assert store.list("") == before


def test_a_terminal_shows_rows_rates_failures_and_workers_of_a_real_run(
    write_manifest: Callable[..., Path], write_job: Callable[..., Path], tmp_path: Path
) -> None:
    renderfarm.run(write_job(write_manifest({"prompt": ["a", "", "b", "c"]})), engine="inline")
    master, terminal = pty.openpty()
    with os.fdopen(master, "rb", buffering=0) as seen:
        process = watching(tmp_path / "out", stdout=terminal)
        os.close(terminal)
        shown = b""
        while process.poll() is None or not shown.endswith(b"\n"):
            try:
                shown += seen.read(1 << 16)
            except OSError:  # the other end is closed
                break
        process.wait(timeout=120)
    assert process.returncode == 3
    text = shown.decode()
    for word in ("partial: part 2 of 2, 3 images, 1 errors", "rows: 4 done, 0 in flight, 0 left", "w0", "cpu", "errors: InvalidInput 1"):
        assert word in text
