"""Submission through Ray Jobs to a real head that the test starts."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from checker import check_complete
from typer.testing import CliRunner

from renderfarm.cli import app
from renderfarm.errors import InvalidJob
from renderfarm.jobfile import load_job
from renderfarm.status import read_status
from renderfarm.submit import submit_job

Write = Callable[..., Path]
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a-token-of-the-tests-0123456789abcdef"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def head() -> Iterator[str]:
    """A Ray head with a dashboard on loopback, stopped by the process group that was started."""
    folder, dashboard = tempfile.mkdtemp(prefix="rfh-"), free_port()
    command = [
        Path(sys.executable).with_name("ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.1",
        f"--port={free_port()}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
        f"--temp-dir={folder}", "--num-cpus=3", "--disable-usage-stats", f"--object-store-memory={200 << 20}",
        f"--dashboard-agent-listen-port={free_port()}", f"--ray-client-server-port={free_port()}",
    ]  # fmt: skip
    environment = {**os.environ, **TOKEN, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    address = f"http://127.0.0.1:{dashboard}"
    try:
        wait_until_up(address, process)
        yield address
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        finally:
            subprocess.run(["pkill", "-KILL", "-s", str(process.pid)], check=False)
            shutil.rmtree(folder, ignore_errors=True)


def wait_until_up(address: str, process: subprocess.Popen[bytes]) -> None:
    for _ in range(240):
        assert process.poll() is None, "ray start ended"
        try:
            urllib.request.urlopen(f"{address}/api/jobs/", timeout=2)
            return
        except urllib.error.HTTPError:  # it wants its token
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise AssertionError("the head did not come up in two minutes")


def submit(job: Path, address: str, *options: str, token: dict[str, str] = TOKEN) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "renderfarm", "submit", str(job), "--address", address, "--json", *options]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **token}, timeout=300)


def test_a_submitted_job_renders_on_the_cluster_and_the_same_job_is_one_submission(
    head: str, write_manifest: Write, write_job: Write, tmp_path: Path
) -> None:
    manifest = write_manifest({"prompt": [f"{{red|blue}} __shape__ {k}" for k in range(3)]})
    (tmp_path / "wildcards").mkdir()
    (tmp_path / "wildcards/shape.txt").write_text("circle\nsquare\n")
    prompts = {"templates": "combinatorial"}
    job = write_job(manifest, workers={"max": 2}, prompts=prompts, output={"path": str(tmp_path / "runs/{{ ds }}")})
    first = submit(job, head, "--logical-date", "2026-11-21")
    assert first.returncode == 0, first.stderr
    script = f"import renderfarm; print(renderfarm.Job.load({str(job)!r}, logical_date='2026-11-21').submit({head!r}))"
    command = [sys.executable, "-c", script]  # Ray reads a token once a process
    from_python = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **TOKEN}, check=True).stdout.split()[-1]
    for sent in (manifest, tmp_path / "wildcards"):  # the driver is still to start
        sent.rename(tmp_path / f"{sent.name}.gone")
    one = json.loads(first.stdout.splitlines()[-1])
    assert (one["new"], one["submission_id"], from_python) == (
        True,
        from_python,
        f"renderfarm-test-{load_job(job, None, None, '2026-11-21').key}",
    )
    assert one["notes"] == [f"output.path: {tmp_path}/runs/2026-11-21 must be under this path on every node, or in a store"]
    again = submit(job, head, "--logical-date", "2026-11-21", "--wait")
    assert again.returncode == 0, again.stdout + again.stderr
    two = json.loads(again.stdout.splitlines()[-1])
    assert (two["submission_id"], two["status"]) == (one["submission_id"], "SUCCEEDED")
    check_complete(tmp_path / "runs/2026-11-21", {(row, 0) for row in range(12)})
    said = read_status(str(tmp_path / "runs/2026-11-21"))
    assert (said["run key"], said["logical date"]) == (one["submission_id"].rpartition("-")[2], "2026-11-21")

    status, logs = (submit(job, head, "--logical-date", "2026-11-21", option) for option in ("--status", "--logs"))
    assert json.loads(status.stdout)["status"] == "SUCCEEDED"
    assert "succeeded: 12 images, 0 errors" in json.loads(logs.stdout)["logs"]
    ended = submit(job, head, "--logical-date", "2026-11-21", "--stop")
    assert ended.returncode == 2
    assert "has ended (succeeded), so there is nothing to stop" in ended.stderr
    other_day = submit(job, head, "--logical-date", "2026-11-22", "--status")
    assert other_day.returncode == 2
    assert "the job, its parameters or its date were others" in other_day.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("failure", "code"), [({}, 3), ({"stop_after": 1}, 4)])
def test_the_waiting_command_exits_as_the_run_on_the_cluster_did(
    failure: dict[str, int], code: int, head: str, write_manifest: Write, write_job: Write
) -> None:
    done = submit(write_job(write_manifest({"prompt": ["", "x"]}), name="bad.yaml", failure=failure), head, "--wait")
    assert done.returncode == code, done.stdout + done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert (said["status"], said["exit_code"]) == ("FAILED", code)


@pytest.mark.slow
def test_a_submission_that_somebody_stops_is_to_be_run_again(head: str, write_manifest: Write, write_job: Write, tmp_path: Path) -> None:
    manifest, long = write_manifest({"prompt": ["a red circle"] * 200}), {"num_inference_steps": 500}
    job = write_job(manifest, name="stopped.yaml", model="builtin:shapes", render=long)
    id_ = json.loads(submit(job, head).stdout.splitlines()[-1])["submission_id"]
    # it looks, and the other one's submission comes in between
    blind = f"""
import ray.job_submission as jobs, renderfarm
look, looks = jobs.JobSubmissionClient.list_jobs, []
jobs.JobSubmissionClient.list_jobs = lambda self: looks.append(0) or (look(self) if len(looks) > 1 else [])
print(renderfarm.Job.load({str(job)!r}).submit({head!r}), len(looks))
"""
    twice = subprocess.run([sys.executable, "-c", blind], capture_output=True, text=True, env={**os.environ, **TOKEN}, timeout=300)
    assert twice.stdout.split() == [id_, "2"], twice.stdout + twice.stderr
    assert json.loads(submit(job, head, "--stop").stdout) == {"submission_id": id_, "stop": "told", "out": str(tmp_path / "out")}
    waiting = [sys.executable, "-c", f"from renderfarm.submit import wait_for; print(vars(wait_for({id_!r}, {head!r})))"]
    ended = subprocess.run(waiting, capture_output=True, text=True, env={**os.environ, **TOKEN}, timeout=120)
    assert "'status': 'STOPPED', 'exit_code': 75" in ended.stdout, ended.stdout + ended.stderr


def test_a_dry_run_prints_the_job_that_would_be_sent_and_names_the_rest(write_manifest: Write, write_job: Write, tmp_path: Path) -> None:
    manifest = write_manifest()
    path = write_job(manifest, model="./model")
    result = CliRunner().invoke(app, ["submit", str(path), "--dry-run", "--set", "seed=3"], catch_exceptions=False)
    job = load_job(path, ["seed=3"])
    assert f"# submission_id: renderfarm-test-{job.key}" in result.stdout
    assert str({"manifest/0/prompts.parquet": str(manifest)}) in result.stdout
    sent = yaml.safe_load(result.stdout)
    assert (sent["seed"], sent["manifest"]["path"], sent["model"]["id"]) == (3, "manifest/0/prompts.parquet", str(tmp_path / "model"))
    for place, local in (("model.id", tmp_path / "model"), ("output.path", tmp_path / "out")):
        assert f"note: {place}: {local} must be under this path on every node, or in a store" in result.stderr
    said = json.loads(CliRunner().invoke(app, ["submit", str(path), "--dry-run", "--json"], catch_exceptions=False).stdout)
    assert (said["files"], said["env_vars"]) == (
        {"manifest/0/prompts.parquet": str(manifest)},
        {"RENDERFARM_RUN_KEY": load_job(path).key},
    )


def test_an_address_where_nobody_answers_is_one_message(write_manifest: Write, write_job: Write) -> None:
    done = submit(write_job(write_manifest()), f"http://127.0.0.1:{free_port()}")
    assert done.returncode == 4
    assert "Traceback" not in done.stderr
    assert "is a Ray head with its dashboard running there?" in done.stderr


@pytest.mark.slow
def test_a_head_whose_token_nobody_gave_says_what_to_set(head: str, write_manifest: Write, write_job: Write) -> None:
    found = submit(write_job(write_manifest()), head, token={"RAY_AUTH_MODE": "disabled"})
    assert found.returncode == 4
    assert "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, as on the head" in found.stderr
    assert "Traceback" not in found.stderr


def test_an_address_that_is_no_dashboard_is_refused_at_once(write_manifest: Write, write_job: Write) -> None:
    with pytest.raises(InvalidJob, match="give the head's dashboard, http://HOST:8265"):
        submit_job(load_job(write_job(write_manifest())), "127.0.0.1:8265")
