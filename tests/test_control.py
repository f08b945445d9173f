"""`pause`, `resume`, `cancel` and `wait`: through the output alone, and to the run that is at work only."""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import renderfarm
from renderfarm import commit, control, heartbeat, waiting
from renderfarm.cli import app
from renderfarm.errors import InvalidJob
from renderfarm.heartbeat import STALE_S
from renderfarm.storage import Store, open_store
from renderfarm.waiting import wait

JOB = {"manifest": {"where": None, "files": [{"rows": 24}]}, "output": {"part_rows": 3, "layout": "files"}, "model": {}, "render": {}}


@pytest.fixture
def store() -> Store:
    store = open_store(f"memory://{uuid.uuid4().hex}")
    store.put(commit.JOB, commit.to_json(JOB))
    return store


def heart(store: Store, state: str, age_s: float = 0.0, run_id: str = "r1") -> None:
    said = {"run_id": run_id, "state": state, "updated": time.time() - age_s, "images": 5, "errors": 1, "parts": 8, "parts_done": 2}
    store.put(commit.PROGRESS, commit.to_json(said))


def test_a_run_reads_what_is_wanted_of_it_and_of_no_other(store: Store) -> None:
    heart(store, "RUNNING")
    assert control.read(store, "r1") == "run", "nothing was said"
    for wanted in ("pause", "run", "cancel"):
        assert control.ask(store, wanted).wanted == control.read(store, "r1") == wanted  # type: ignore[arg-type]
    assert control.read(store, "r2") == "run"
    for damaged in (b"", b"{", b"[]", b'{"run_id": "r1", "wanted": "explode"}', b'{"run_id": "r1"}'):
        store.put(control.CONTROL, damaged)
        assert control.read(store, "r1") == "run"


@pytest.mark.parametrize("state", ["STARTING", "REPAIRING", "RUNNING", "PAUSING", "PAUSED"])
def test_whoever_is_alive_can_be_told(state: str, store: Store) -> None:
    heart(store, state)
    told = control.ask(store, "pause")
    assert (told.run_id, told.before, told.state) == ("r1", "run", state)
    assert control.ask(store, "pause").before == "pause"
    assert 0 <= time.time() - json.loads(store.read(control.CONTROL))["at"] + 0.001 < 60


@pytest.mark.parametrize(("state", "age_s"), [("SUCCEEDED", 0), ("FAILED", 0), ("CANCELLED", 0), ("RUNNING", STALE_S + 1)])
def test_where_no_run_is_at_work_nobody_can_be_told(state: str, age_s: float, store: Store) -> None:
    with pytest.raises(InvalidJob, match="no run has begun here, so there is nothing to pause"):
        control.ask(store, "pause")
    heart(store, state, age_s)
    with pytest.raises(
        InvalidJob, match=rf"no run is at work \(the last one, r1, said {state} and nothing since\), so .* nothing to resume"
    ):
        control.ask(store, "run")
    assert not store.exists(control.CONTROL)


def test_what_is_cancelled_stays_so(store: Store) -> None:
    heart(store, "RUNNING")
    control.ask(store, "cancel")
    for wanted in ("pause", "run"):
        with pytest.raises(InvalidJob, match="is being cancelled; when it has ended, `renderfarm run JOB` continues"):
            control.ask(store, wanted)  # type: ignore[arg-type]
    assert control.ask(store, "cancel").before == "cancel"
    heart(store, "RUNNING", run_id="r2")
    assert control.ask(store, "pause").before == "run", "the next run was told nothing"


@pytest.mark.parametrize(
    ("command", "first", "second"),
    [
        ("pause", "r1 is paused when the parts in flight are finished", "r1 was told to pause before; it says running"),
        ("resume", "r1 is not paused; it says running", "r1 is not paused; it says running"),
        ("cancel", "r1 ends when the parts in flight are finished", "r1 was told to end before; it says running"),
    ],
)
def test_the_commands_say_what_will_happen(command: str, first: str, second: str, store: Store) -> None:
    heart(store, "RUNNING")
    for expected in (first, second):
        assert expected in CliRunner().invoke(app, [command, store.url], catch_exceptions=False).stdout
    said = json.loads(CliRunner().invoke(app, [command, store.url, "--json"], catch_exceptions=False).stdout)
    assert (said["run_id"], said["wanted"]) == ("r1", {"resume": "run"}.get(command, command))


# ------------------------------------------------------------------------------------------------------------- wait


@pytest.mark.parametrize(
    ("state", "age_s", "code", "ended"),
    [
        ("SUCCEEDED", 1e6, 0, "SUCCEEDED"),
        ("PARTIAL", 1e6, 3, "PARTIAL"),
        ("FAILED", 1e6, 4, "FAILED"),
        ("CANCELLED", 1e6, 5, "CANCELLED"),
        ("PAUSED", 1, 5, "PAUSED"),
        ("PAUSED", STALE_S + 1, 75, "INTERRUPTED"),
        ("INTERRUPTED", 1e6, 75, "INTERRUPTED"),
        ("RUNNING", STALE_S + 1, 75, "INTERRUPTED"),
        ("STARTING", STALE_S + 1, 75, "INTERRUPTED"),
    ],
)
def test_wait_exits_as_the_run_did(state: str, age_s: float, code: int, ended: str, store: Store) -> None:
    heart(store, state, age_s)
    counts = (5, 1) if state == ended else (0, 0)  # of a run that died, the index has the last word
    result = CliRunner().invoke(app, ["wait", store.url, "--timeout", "1m", "--json"], catch_exceptions=False)
    said = json.loads(result.stdout)
    assert (result.exit_code, said["exit_code"], said["state"], said["images"], said["errors"]) == (code, code, ended, *counts)


@pytest.mark.parametrize("state", ["STARTING", "RUNNING", "PAUSING", "CANCELLING", None])
def test_wait_ends_at_its_timeout(state: str | None, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "POLL_S", 0.01)
    if state:
        heart(store, state)
    result = CliRunner().invoke(app, ["wait", store.url, "--timeout", "0.1s"], catch_exceptions=False)
    assert result.exit_code == 6
    assert "still; --timeout has passed" in result.stdout
    with pytest.raises(InvalidJob, match="--timeout 'soon': give a number with its unit"):
        CliRunner().invoke(app, ["wait", store.url, "--timeout", "soon"], catch_exceptions=False)


def test_wait_sees_a_real_run_to_its_end(
    write_manifest: Callable[..., Path], write_job: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "POLL_S", 0.05)
    monkeypatch.setenv("RENDERFARM_FAKE_STEP_S", "0.05")
    begun, summaries = threading.Event(), list[Any]()

    def run() -> None:
        summaries.append(renderfarm.run(write_job(write_manifest()), engine="inline", observe=lambda progress: begun.set()))

    runner = threading.Thread(target=run)
    runner.start()
    assert begun.wait(60)
    states = list[str]()
    found = wait(str(tmp_path / "out"), 120, states.append)
    runner.join()
    assert states, "it was at work"
    assert (found.state, found.exit_code, found.images) == ("SUCCEEDED", 0, summaries[0].images)
    assert found.run_id == summaries[0].run_id


class Running:
    """A run in a thread, whose heart beats often."""

    def __init__(self, job: Path, out: Path) -> None:
        self.store, self.ended = open_store(str(out)), list[Any]()
        self.stop, self.before = threading.Event(), set(threading.enumerate())
        self.thread = threading.Thread(target=lambda: self.ended.append(renderfarm.run(job, engine="inline", stop=self.stop)))
        self.thread.start()

    def wait_for(self, state: str) -> dict[str, Any]:
        deadline = time.monotonic() + 30
        while (said := commit.read_progress(self.store)).get("state") != state or (state == "RUNNING" and not said["parts_done"]):
            assert time.monotonic() < deadline, said
            time.sleep(0.02)
        return said

    def workers(self) -> list[str]:
        """The threads of workers that began with this run; other tests' may still be ending."""
        began = set(threading.enumerate()) - self.before
        return [thread.name for thread in began if thread.name in ("render", "lease")]

    def end(self) -> Any:
        self.thread.join(60)
        return self.ended[0]


@pytest.fixture
def running(
    write_manifest: Callable[..., Path], write_job: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Running:
    monkeypatch.setattr(heartbeat, "EVERY_S", 0.05)
    monkeypatch.setenv("RENDERFARM_FAKE_STEP_S", "0.03")
    one = Running(write_job(write_manifest({"prompt": [f"row {k}" for k in range(60)]})), tmp_path / "out")
    one.wait_for("RUNNING")
    return one


def test_a_paused_run_finishes_what_is_in_flight_lets_its_workers_go_and_goes_on(running: Running) -> None:
    assert "render" in running.workers()
    control.ask(running.store, "pause")
    done = running.wait_for("PAUSED")["parts_done"]
    assert running.workers() == []
    time.sleep(0.3)
    assert commit.counts(commit.index_entries(running.store)).parts_done == done < 20, "nothing more is rendered"
    assert wait(running.store.url).state == "PAUSED"
    control.ask(running.store, "run")
    running.wait_for("RUNNING")
    summary = running.end()
    assert (summary.state, summary.images, summary.new_images) == ("SUCCEEDED", 60, 60)


def test_a_paused_run_that_is_stopped_was_interrupted_and_the_next_one_is_not_paused(running: Running, tmp_path: Path) -> None:
    control.ask(running.store, "pause")
    running.wait_for("PAUSED")
    running.stop.set()
    summary = running.end()
    assert (summary.state, summary.exit_code) == ("INTERRUPTED", 75)
    assert renderfarm.run(tmp_path / "job.yaml", engine="inline").images == 60


@pytest.mark.parametrize("paused", [False, True])
def test_a_cancelled_run_ends_with_5_and_the_next_one_goes_on(paused: bool, running: Running, tmp_path: Path) -> None:
    if paused:
        control.ask(running.store, "pause")
        running.wait_for("PAUSED")
    control.ask(running.store, "cancel")
    summary = running.end()
    assert (summary.state, summary.exit_code) == ("CANCELLED", 5)
    assert 0 < summary.images < 60
    assert renderfarm.run(tmp_path / "job.yaml", engine="inline").images == 60
