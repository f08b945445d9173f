"""Real Ray, several nodes: nodes join, leave, are drained and die while a run goes on; workers hang, fault and lose their device."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from checker import check_complete, error_rows, tables

import renderfarm
from renderfarm.heartbeat import is_alive

Write = Callable[..., Path]
pytestmark = pytest.mark.chaos


class Nodes:
    """A cluster in a process of its own; the head has no room for workers, each other node for one."""

    def __init__(self, nodes: int) -> None:
        self.folder = tempfile.mkdtemp(prefix="rfc-")
        command = [sys.executable, str(Path(__file__).with_name("cluster_run.py")), self.folder, str(nodes)]
        # workers have the environment of their node, not that of the run
        own = {"env": os.environ | {"RAY_TMPDIR": self.folder, "RENDERFARM_FAKE_STEP_S": "0.2"}, "start_new_session": True}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **own)  # type: ignore[call-overload]
        self.address = self._answer()["address"]

    def ask(self, line: str) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        for line in self.process.stdout:  # Ray may say something, too
            if line.startswith(("{", "[", '"')):
                return json.loads(line)
        raise AssertionError("the cluster has ended")

    def close(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture
def nodes(request: pytest.FixtureRequest) -> Iterator[Nodes]:
    cluster = Nodes(request.param)
    yield cluster
    cluster.close()


class Run:
    """`renderfarm run` in a process of its own."""

    def __init__(self, job: Path, out: Path, *options: str, **environment: str) -> None:
        self.job, self.out = job, out
        command = [sys.executable, "-m", "renderfarm", "run", str(job), "--json", *options]
        self.process = subprocess.Popen(command, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def progress(self) -> dict[str, Any]:
        try:
            return dict(json.loads((self.out / "_renderfarm/progress.json").read_bytes()))
        except (FileNotFoundError, ValueError):
            return {}

    def wait_for(self, what: Callable[[], bool], seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not what():
            assert self.process.poll() is None, self.process.stdout.read().decode()  # type: ignore[union-attr]
            assert time.monotonic() < deadline, (self.progress(), len(tables(self.out)))
            time.sleep(0.1)

    def wait_for_parts(self, count: int) -> None:
        self.wait_for(lambda: len(tables(self.out)) >= count)

    def states(self) -> list[str]:
        return [worker["state"] for worker in self.progress().get("workers", {}).values()]

    def end(self, seconds: float = 240) -> dict[str, Any]:
        text = self.process.communicate(timeout=seconds)[0].decode()
        return dict(json.loads(text.splitlines()[-1]))

    def finish_inline(self) -> dict[str, Any]:
        """What the run says when it is told to stop; the rest is rendered here."""
        self.process.send_signal(signal.SIGTERM)
        summary = self.end()
        assert renderfarm.run(self.job, engine="inline").state == "SUCCEEDED"
        return summary


@pytest.fixture
def begin(write_manifest: Write, write_job: Write, tmp_path: Path) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def start(prompts: list[str], *options: str, step_s: str = "0.05", workers: int = 2, **changes: Any) -> Run:
        job = write_job(
            write_manifest({"prompt": prompts}),
            render={"num_inference_steps": 4, "height": 8, "width": 8},
            workers={"max": workers, "batch_size": 2},
            **changes,
        )
        runs.append(Run(job, tmp_path / "out", *options, RENDERFARM_FAKE_STEP_S=step_s))
        return runs[-1]

    yield start
    for run in runs:
        if run.process.poll() is None:
            run.process.kill()
            run.process.wait()


def every(rows: int) -> set[tuple[int, int]]:
    return {(row, 0) for row in range(rows)}


@pytest.mark.slow  # nodes join in the next test, too
@pytest.mark.parametrize("nodes", [0], indirect=True)
def test_a_run_waits_for_its_first_node_and_grows_when_another_joins(nodes: Nodes, begin: Callable[..., Run]) -> None:
    run = begin([f"row {k}" for k in range(900)], "--address", nodes.address, step_s="0.2")
    run.wait_for(lambda: run.states() == ["starting", "starting"])
    nodes.ask("add")
    run.wait_for_parts(2)
    run.wait_for(lambda: run.states().count("ready") == 1)
    nodes.ask("add")
    run.wait_for(lambda: run.states().count("ready") == 2)
    summary = run.finish_inline()
    assert (summary["state"], summary["lost_workers"]) == ("INTERRUPTED", 0)
    check_complete(run.out, every(900))


@pytest.mark.parametrize("nodes", [2], indirect=True)
def test_workers_of_a_node_that_is_drained_finish_and_go_to_another(nodes: Nodes, begin: Callable[..., Run]) -> None:
    run = begin([f"row {k}" for k in range(900)], "--address", nodes.address, step_s="0.2")
    run.wait_for(lambda: run.states().count("ready") == 2)
    run.wait_for_parts(2)
    drained, accepted, *_ = nodes.ask("drain 0")
    assert accepted
    run.wait_for(lambda: "let go" in run.states())
    workers = run.progress()["workers"].values()
    assert [worker["node"] for worker in workers if worker["state"] == "let go"] == [drained]
    assert "starting" in run.states(), "another one is asked for, and waits for a node"
    nodes.ask("remove 0")
    nodes.ask("add")
    run.wait_for(lambda: run.states().count("ready") == 2)
    summary = run.finish_inline()
    assert (summary["state"], summary["lost_workers"]) == ("INTERRUPTED", 0)
    assert summary["new_images"] == summary["images"], "nothing was lost, and nothing rendered again"
    check_complete(run.out, every(900))


@pytest.mark.slow  # nodes that are lost are simulated, too
@pytest.mark.parametrize("nodes", [1], indirect=True)
def test_a_run_outlives_the_loss_of_all_its_nodes(nodes: Nodes, begin: Callable[..., Run]) -> None:
    run = begin([f"row {k}" for k in range(60)], "--address", nodes.address, step_s="0.1", workers=1)
    run.wait_for_parts(2)
    nodes.ask("remove 0")
    run.wait_for(lambda: run.states() == ["lost", "starting"])
    time.sleep(2)
    nodes.ask("add")
    summary = run.end()
    assert (summary["state"], summary["images"], summary["errors"]) == ("SUCCEEDED", 60, 0)
    assert summary["lost_workers"] == 1
    check_complete(run.out, every(60))


@pytest.mark.parametrize("nodes", [3], indirect=True)
def test_of_three_nodes_one_dies_one_is_drained_and_every_row_is_rendered(nodes: Nodes, begin: Callable[..., Run]) -> None:
    run = begin([f"row {k}" for k in range(300)], "--address", nodes.address, step_s="0.1", workers=3)
    run.wait_for(lambda: run.states().count("ready") == 3)
    run.wait_for_parts(3)
    nodes.ask("remove 0")
    run.wait_for(lambda: "lost" in run.states())
    drained, accepted, *_ = nodes.ask("drain 1")
    assert accepted
    run.wait_for(lambda: "let go" in run.states())
    assert [worker["node"] for worker in run.progress()["workers"].values() if worker["state"] == "let go"] == [drained]
    summary = run.end()
    assert (summary["state"], summary["images"], summary["errors"], summary["lost_workers"]) == ("SUCCEEDED", 300, 0, 1)
    check_complete(run.out, every(300))


@pytest.mark.parametrize("nodes", [2], indirect=True)
def test_when_the_head_dies_the_run_says_so_and_a_fresh_cluster_goes_on(nodes: Nodes, begin: Callable[..., Run], tmp_path: Path) -> None:
    run = begin([f"row {k}" for k in range(300)], "--address", nodes.address, step_s="0.2")
    run.wait_for_parts(2)
    nodes.ask("head")
    answer = run.end(120)
    assert (answer["exit_code"], run.process.returncode) == (75, 75), answer
    assert "head" in answer["error"]
    other = Nodes(1)
    try:
        again = Run(tmp_path / "job.yaml", run.out, "--address", other.address, RENDERFARM_FAKE_STEP_S="0")
        again.wait_for(lambda: again.states().count("ready") == 1)
        again.process.send_signal(signal.SIGTERM)
        assert again.end()["new_images"] > 0
    finally:
        other.close()
    assert renderfarm.run(tmp_path / "job.yaml", engine="inline").images == 300
    check_complete(run.out, every(300))


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [1], indirect=True)
def test_when_no_node_comes_the_run_says_so_and_can_be_run_again(nodes: Nodes, begin: Callable[..., Run], tmp_path: Path) -> None:
    run = begin(["a"] * 30, "--address", nodes.address, "--set", "workers.wait_s=12", step_s="0.2", workers=1)
    run.wait_for_parts(1)
    nodes.ask("remove 0")
    answer = run.end()
    assert (answer["exit_code"], run.process.returncode) == (75, 75)
    assert "workers.wait_s" in answer["error"]
    assert renderfarm.run(tmp_path / "job.yaml", engine="inline").images == 30


@pytest.mark.slow  # test_run.py has a row that ends its worker, the simulation those that hang
@pytest.mark.parametrize("word", ["segv", "hang", "cuda"])
def test_one_killer_among_many_rows_costs_itself_and_three_workers(word: str, begin: Callable[..., Run]) -> None:
    rows = 300
    prompts = [f"row {k}" if k != 130 else f"[{word}]" for k in range(rows)]
    run = begin(prompts, step_s="0", failure={"deadline_s": 20} if word == "hang" else {}, output={"part_rows": 20})
    summary = run.end()
    assert summary["exit_code"] == 3, summary
    check_complete(run.out, every(rows))
    assert [(row["row"], row["error_class"]) for row in error_rows(run.out)] == [(130, "WorkerCrashed")]
    assert (summary["images"], summary["lost_workers"]) == (rows - 1, 3)


@pytest.mark.slow  # simulated, too
def test_two_runs_of_one_output_share_the_work(begin: Callable[..., Run], tmp_path: Path) -> None:
    one = begin([f"row {k}" for k in range(900)], step_s="0.1", workers=1)
    one.wait_for(lambda: bool(one.progress()))
    other = Run(tmp_path / "job.yaml", one.out, RENDERFARM_FAKE_STEP_S="0.1")
    entries = one.out / "_renderfarm/parts"
    other.wait_for(lambda: len({json.loads(entry.read_bytes())["run"] for entry in entries.glob("*.json")}) == 2)
    other.process.send_signal(signal.SIGTERM)
    ended = other.end()
    assert one.progress()["run_id"] != ended["run_id"], "who ends does not hide who is at work"
    assert is_alive(one.progress())
    summaries = [one.finish_inline(), ended]
    assert [summary["state"] for summary in summaries] == ["INTERRUPTED"] * 2
    check_complete(one.out, every(900))


def test_a_run_that_is_not_to_share_says_who_is_at_work_and_leaves(begin: Callable[..., Run], tmp_path: Path) -> None:
    one = begin([f"row {k}" for k in range(30)], "--engine", "inline", step_s="0.2", if_running="exit")
    one.wait_for_parts(1)
    answer = Run(tmp_path / "job.yaml", one.out, "--engine", "inline").end()
    assert answer["exit_code"] == 75
    assert one.progress()["run_id"] in answer["error"]
    assert one.end()["state"] == "SUCCEEDED"


@pytest.mark.slow  # simulated, too
def test_a_slow_worker_at_the_end_is_overtaken(begin: Callable[..., Run]) -> None:
    """SIGSTOP makes a worker slow without killing it; another one gets a copy of its lease."""
    run = begin([f"row {k}" for k in range(300)], step_s="0.05")
    run.wait_for(lambda: run.states().count("ready") == 2)
    run.wait_for_parts(4)
    stopped = next(pid for pid, name in _processes() if name.startswith("ray::_Actor") and _descends(pid, run.process.pid))
    os.kill(stopped, signal.SIGSTOP)
    summary = run.end()
    assert (summary["state"], summary["images"], summary["lost_workers"]) == ("SUCCEEDED", 300, 0)
    assert summary["copies"] >= 1
    check_complete(run.out, every(300))


def _processes() -> list[tuple[int, str]]:
    lines = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True).stdout.splitlines()[1:]
    return [(int(pid), name) for pid, name in (line.strip().split(" ", 1) for line in lines if " " in line.strip())]


def _descends(pid: int, ancestor: int) -> bool:
    while pid > 1:
        if pid == ancestor:
            return True
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except FileNotFoundError:
            return False
    return False
