"""`renderfarm doctor`: each line on a machine that is as it should be, and on one that is not."""

from __future__ import annotations

import importlib.metadata
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from typer.testing import CliRunner

from renderfarm import doctor
from renderfarm.cli import app
from renderfarm.doctor import Finding, examine
from renderfarm.jobfile import load_job

Write = Callable[..., Path]


def lines(job: Path | None = None, address: str | None = None) -> dict[str, Finding]:
    return {found.what: found for found in examine(load_job(job) if job else None, address)}


def test_a_machine_that_renders_is_said_to_be_ready_and_nothing_is_left_behind(
    write_manifest: Write, write_job: Write, tmp_path: Path
) -> None:
    job = write_job(write_manifest({"prompt": ["a"]}), output={"path": str(tmp_path / "new/deep/out")})
    ended = CliRunner().invoke(app, ["doctor", str(job)])
    assert ended.exit_code == 0, ended.output
    assert ended.output.splitlines()[-1] == "ready"
    assert "OK    output: " in ended.output
    assert not (tmp_path / "new").exists()


def test_an_output_that_is_there_stays_as_it_is(write_manifest: Write, write_job: Write, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    found = lines(write_job(write_manifest({"prompt": ["a"]})))
    assert found["output"].state == "ok"
    assert (tmp_path / "out/mine.txt").read_text() == "mine"


def test_the_weights_are_held_against_the_memory(write_manifest: Write, write_job: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    job = write_job(write_manifest({"prompt": ["a"]}), model="builtin:shapes")
    assert lines(job)["memory"].state == "ok"
    monkeypatch.setattr("renderfarm.models.torch_setup.free_memory", lambda workers: ("cpu", 1000))
    assert lines(job)["memory"].state == "wrong"


WRONG: dict[str, tuple[dict[str, Any], str, str]] = {
    # the job, the line, what it says
    "device": ({"workers": {"device": "cuda"}}, "accelerator", "workers.device is cuda, but torch finds no GPU here"),
    "store": ({"output": {"path": "s3://bucket/out"}}, "output", "set the store's usual variables or profile"),
    "model": ({"model": "no/such/folder"}, "model", "no/such/folder"),
    "file": ({"output": {"path": "/dev/null/out"}}, "output", "choose a folder that you may write"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_with_what_a_job_names_is_said_and_exits_with_2(
    name: str, write_manifest: Write, write_job: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    changes, what, said = WRONG[name]
    job = write_job(write_manifest({"prompt": ["a"]}), **changes)
    ended = CliRunner().invoke(app, ["doctor", str(job), "--json"])
    assert ended.exit_code == 2
    found = {one["what"]: one for one in json.loads(ended.stdout)["findings"]}
    assert found[what]["state"] == "wrong"
    assert said in found[what]["said"]


class Usage(NamedTuple):
    free: int


def test_a_machine_without_room_is_told_where(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(1 << 20))
    found = lines()
    assert (found["/dev/shm"].state, found["temporary folder"].state) == ("note", "wrong")
    assert "--shm-size" in found["/dev/shm"].fix
    assert "TMPDIR" in found["temporary folder"].fix


def test_a_temporary_folder_too_deep_for_sockets_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/" + "long/" * 20)
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(1 << 40))
    assert "too long a name for Ray's sockets" in lines()["temporary folder"].said


def test_packages_outside_the_ranges_and_missing_ones_give_the_command_that_mends_them(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "pyarrow":
            return "1.0"
        if name == "rich":
            raise importlib.metadata.PackageNotFoundError
        return real(name)

    monkeypatch.setattr(doctor.importlib.metadata, "version", version)
    found = lines()["packages"]
    assert (found.state, found.said) == ("wrong", "pyarrow is 1.0, rich is missing")
    assert "-m pip install 'pyarrow>=21' 'rich>=13.9'" in found.fix


def test_versions_that_were_not_compared_are_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("renderfarm.models.families.compared", lambda: [{"torch": "9", "diffusers": "9", "transformers": "9"}])
    found = lines()["packages"]
    assert (found.state, found.fix) == ("note", "to have what was compared: torch 9, diffusers 9, transformers 9")


def test_a_cluster_that_does_not_answer_is_said(free_tcp_port: int) -> None:
    found = lines(address=f"http://127.0.0.1:{free_tcp_port}")["Ray"]
    assert found.state == "wrong"
    assert f"nobody answers at 127.0.0.1:{free_tcp_port}" in found.said
    assert lines(address="auto")["Ray"].state == "note"


def test_options_of_a_job_without_one_are_refused() -> None:
    ended = CliRunner().invoke(app, ["doctor", "--set", "seed=1"])
    assert "name it, or leave them out" in str(ended.exception)
