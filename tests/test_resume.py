"""Kill the driver in mid-run: the next run finishes the rest, re-renders nothing committed, and no pixel differs."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checker import check_complete, pixels, tables
from covering import only

import renderfarm
from renderfarm import commit, control
from renderfarm.storage import open_store

Write = Callable[..., Path]


def start(job: Path, *options: str, **environment: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "renderfarm", "run", str(job), *options]
    return subprocess.Popen(
        command, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )


def wait_for_parts(out: Path, count: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while len(tables(out)) < count:
        assert process.poll() is None, process.stdout.read().decode()  # type: ignore[union-attr]
        assert time.monotonic() < deadline, "no part was committed in two minutes"
        time.sleep(0.02)


def command_line(pid: str | int) -> str:
    """Of a process that lives, else nothing."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def processes_of(run_marker: str) -> list[str]:
    """Command lines of living processes that mention the marker."""
    lines = [command_line(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return [line for line in lines if run_marker in line]


@pytest.mark.chaos
@pytest.mark.parametrize("engine", ["inline", "ray"])
def test_after_sigkill_of_the_driver_the_next_run_finishes_the_rest(
    engine: str, write_manifest: Write, write_job: Write, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    manifest = write_manifest({"prompt": [f"a small red star number {k}" for k in range(24)]})
    real = {"model": "builtin:shapes", "render": {"num_inference_steps": 4}}
    job = write_job(manifest, workers={"max": 2}, **real)
    undisturbed = write_job(manifest, "undisturbed.yaml", output={"path": str(tmp_path / "whole"), "part_rows": 3}, **real)
    renderfarm.run(undisturbed, engine="inline")

    process = start(job, "--engine", engine, OMP_NUM_THREADS="1")
    wait_for_parts(out, 2, process)
    process.kill()
    process.wait()
    kept = {table: (table.read_bytes(), table.stat().st_mtime_ns) for table in tables(out)}
    assert 2 <= len(kept) < 8, "the run was to be killed in its middle"

    summary = renderfarm.run(job, engine="inline")
    assert summary.state == "SUCCEEDED"
    assert summary.new_images <= 24 - 3 * len(kept), "a committed row was rendered again"
    for table, state in kept.items():
        assert (table.read_bytes(), table.stat().st_mtime_ns) == state
    check_complete(out, {(row, 0) for row in range(24)})
    assert pixels(out) == pixels(tmp_path / "whole")


@pytest.mark.chaos
def test_a_killed_driver_leaves_no_ray_process_behind(write_manifest: Write, write_job: Write, tmp_path: Path) -> None:
    manifest = write_manifest({"prompt": [f"row {k}" for k in range(90)]})
    process = start(write_job(manifest), "--engine", "ray", RENDERFARM_FAKE_STEP_S="0.05")
    wait_for_parts(tmp_path / "out", 1, process)
    assert processes_of(str(tmp_path)), "the marker finds the run's own processes"
    process.kill()
    process.wait()
    deadline = time.monotonic() + 30
    while processes_of(str(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert processes_of(str(tmp_path)) == []


@pytest.mark.chaos
@pytest.mark.parametrize("engine", only(["ray"], ["inline", "ray"]))
def test_a_second_sigterm_ends_at_once_with_75(engine: str, write_manifest: Write, write_job: Write, tmp_path: Path) -> None:
    manifest = write_manifest({"prompt": [f"row {k}" for k in range(400)]})
    job = write_job(manifest, output={"part_rows": 100}, render={"num_inference_steps": 20})
    rendered = tmp_path / "rendered"
    process = start(job, "--engine", engine, RENDERFARM_FAKE_STEP_S="0.2", RENDERFARM_FAKE_LOG=str(rendered))
    deadline = time.monotonic() + 150
    while not rendered.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    assert rendered.exists(), "before there are leases, there is nothing to finish"
    process.send_signal(signal.SIGTERM)
    time.sleep(0.05)
    process.send_signal(signal.SIGTERM)  # `timeout` signals a process and its group: one stop, not two
    time.sleep(3)
    assert process.poll() is None, "the parts in flight take minutes"
    process.send_signal(signal.SIGTERM)
    text = process.communicate(timeout=150)[0].decode()
    assert process.returncode == 75, text
    assert "Traceback" not in text
    assert '"state": "INTERRUPTED"' in (tmp_path / "out/_renderfarm/progress.json").read_text()


@pytest.mark.chaos
def test_sigterm_is_heard_after_ray_has_been_left(write_manifest: Write, write_job: Write, tmp_path: Path) -> None:
    """A paused run has let its Ray go; so has one that writes its views. Ray's own end leaves the system's handler of SIGTERM behind."""
    job = write_job(write_manifest({"prompt": [f"row {k}" for k in range(400)]}))
    process = start(job, "--engine", "ray", RENDERFARM_FAKE_STEP_S="0.1")
    wait_for_parts(tmp_path / "out", 1, process)
    store = open_store(str(tmp_path / "out"))
    control.ask(store, "pause")
    deadline = time.monotonic() + 120
    while commit.read_progress(store).get("state") != "PAUSED":
        assert process.poll() is None
        assert time.monotonic() < deadline, commit.read_progress(store)
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    text = process.communicate(timeout=150)[0].decode()
    assert process.returncode == 75, text
    assert commit.read_progress(store)["state"] == "INTERRUPTED"
    assert processes_of(str(tmp_path)) == []


@pytest.mark.chaos
def test_sigterm_is_heard_while_ray_starts(write_manifest: Write, write_job: Write, tmp_path: Path) -> None:
    job = write_job(write_manifest({"prompt": [f"row {k}" for k in range(400)]}))
    process = start(job, "--engine", "ray", RENDERFARM_FAKE_STEP_S="0.1")
    deadline = time.monotonic() + 120
    while not any("gcs_server" in command_line(pid) for pid in family(process.pid)):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    text = process.communicate(timeout=150)[0].decode()
    assert process.returncode == 75, text
    assert commit.read_progress(open_store(str(tmp_path / "out")))["state"] == "INTERRUPTED"


EMBEDDED = """
import os, signal, sys, threading, time
import ray, renderfarm
from renderfarm.errors import Fatal

heard = []
signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
try:
    renderfarm.run(renderfarm.Job.load(sys.argv[1], set={"workers.device": "cuda"}).spec, engine="ray")
except Fatal as error:
    print(error)
assert not ray.is_initialized(), "the next run would take it for its user's"
thread = threading.Thread(target=lambda: print(renderfarm.run(sys.argv[1], engine="ray").state))
thread.start()
thread.join()
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(0.1)
print(heard)
"""


@pytest.mark.chaos
def test_a_process_that_renders_in_a_thread_keeps_its_own_handlers_and_no_ray_of_a_refused_job(
    write_manifest: Write, write_job: Write
) -> None:
    job = write_job(write_manifest())
    as_text: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run([sys.executable, "-c", EMBEDDED, str(job)], env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, **as_text)
    assert done.returncode == 0, done.stderr
    refused, state, heard = done.stdout.splitlines()
    assert "no node of this Ray has a GPU" in refused
    assert (state, heard) == ("SUCCEEDED", "[15]")


def family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    lines = [line.split() for line in subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True).stdout.splitlines()[1:]]
    children = [int(child) for child, parent in lines if int(parent) == pid]
    return [pid, *(below for child in children for below in family(child))]


def is_blocked(pid: int, number: signal.Signals) -> bool:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:  # gone meanwhile: it hears nothing
        return True
    return bool(int(status.partition("SigBlk:")[2].split()[0], 16) >> (number - 1) & 1)


@pytest.mark.chaos
@pytest.mark.parametrize("engine", only(["ray"], ["inline", "ray"]))
def test_sigterm_to_every_process_of_a_run_finishes_the_parts_in_flight_and_exits_75(
    engine: str, write_manifest: Write, write_job: Write, tmp_path: Path
) -> None:
    """As a service manager stops a control group, and more than `timeout` does, which signals a process group."""
    manifest = write_manifest({"prompt": [f"row {k}" for k in range(90)]})
    job = write_job(manifest, workers={"max": 1, "batch_size": 3}, render={"num_inference_steps": 20})
    process = start(job, "--engine", engine, "--json", RENDERFARM_FAKE_STEP_S="0.1")
    wait_for_parts(tmp_path / "out", 1, process)
    of_the_run = family(process.pid)
    # what a raylet or its agents do with the signal depends on the moment, so that nothing else would show that they hear it
    assert [pid for pid in of_the_run[1:] if not is_blocked(pid, signal.SIGTERM)] == []
    for pid in of_the_run:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    text = process.communicate(timeout=150)[0].decode()
    assert process.returncode == 75, text
    summary = json.loads(text.splitlines()[-1])
    assert (summary["state"], summary["images"]) == ("INTERRUPTED", 3 * len(tables(tmp_path / "out"))), "every part is counted"
    assert summary["images"] >= 3 * 3, "one was committed, and at least two were in flight"
    assert processes_of(str(tmp_path)) == []
    assert renderfarm.run(job, engine="inline").state == "SUCCEEDED"
    check_complete(tmp_path / "out", {(row, 0) for row in range(90)})
