"""A job's `track`: what a run was and did, in somebody else's store; never a prompt, and never the run's failure."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

import renderfarm
from renderfarm import tracking
from renderfarm.errors import Fatal, InvalidJob

Write = Callable[..., Path]
PERSONAL = "a prompt of a person"


class Kept:
    """A sink that keeps what it is told; `fails`: in which of its ways of being told something."""

    def __init__(self, fails: str = "") -> None:
        self.fails, self.runs = fails, list[str]()
        self.logged: list[tuple[int, Mapping[str, float]]] = []
        self.ended: list[tuple[Mapping[str, float], Mapping[str, str], int]] = []
        self.hang = threading.Event()

    def __call__(self, settings: Any, prepared: Any, run_id: str) -> Kept:
        self._may_fail("make")
        self.runs.append(run_id)
        return self

    def log(self, figures: Mapping[str, float], step: int) -> None:
        self._may_fail("log")
        self.logged.append((step, figures))

    def end(self, figures: Mapping[str, float], said: Mapping[str, str], exit_code: int) -> None:
        self._may_fail("end")
        self.ended.append((figures, said, exit_code))

    def _may_fail(self, what: str) -> None:
        if self.fails == f"hang in {what}":
            self.hang.wait(300)
        if self.fails == what:
            raise SystemExit(f"scripted failure to {what}")


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package may be slow on a busy machine."""
    monkeypatch.setattr(tracking, "END_S", 300.0)


@pytest.fixture
def sink(monkeypatch: pytest.MonkeyPatch) -> Kept:
    """In the place of W&B's, of which nothing need be installed."""
    kept = Kept()
    monkeypatch.setattr(tracking, "WandbRun", kept)
    monkeypatch.setitem(tracking.PACKAGES, "wandb", "json")
    return kept


def job(write_manifest: Write, write_job: Write, track: dict[str, Any], **changes: Any) -> Path:
    manifest = write_manifest({"prompt": ["a", "", "b", PERSONAL]})
    return write_job(
        manifest,
        track=track,
        params={"mood": {"default": "warm", "choices": ["warm", "cold"]}, "style": PERSONAL, "n": 5},
        render={"negative_prompt": PERSONAL},
        **changes,
    )


WANDB = {"wandb": {"project": "renders"}}


def test_a_run_is_told_once_with_its_counts_and_its_end(sink: Kept, write_manifest: Write, write_job: Write) -> None:
    file = job(write_manifest, write_job, WANDB)
    summary = renderfarm.run(file, engine="inline")
    assert (sink.runs, summary.warnings) == ([summary.run_id], ())
    assert [step for step, _ in sink.logged] == list(range(len(sink.logged)))
    assert {"images", "parts_done", "images_per_second", "workers_ready", "seconds"} <= sink.logged[0][1].keys()
    ((figures, said, code),) = sink.ended
    assert (figures["images"], figures["errors"], figures["errors_InvalidInput"], code) == (3, 1, 1, 3)
    assert said == {"state": "PARTIAL", "out": summary.out}
    renderfarm.run(file, engine="inline")
    assert len(sink.runs) == 1, "a run that has nothing to do is none of anybody's"


def test_a_run_that_an_error_ends_is_told_with_the_error(sink: Kept, write_manifest: Write, write_job: Write) -> None:
    with pytest.raises(Fatal, match="stop_after"):
        renderfarm.run(job(write_manifest, write_job, WANDB, failure={"stop_after": 1}), engine="inline")
    ((_, said, code),) = sink.ended
    assert (said["state"], said["error_class"], code) == ("FAILED", "Fatal", 4)


@pytest.mark.parametrize("fails", ["make", "log", "end", "hang in make", "hang in end"])
def test_whatever_it_does_is_a_warning(
    fails: str, sink: Kept, write_manifest: Write, write_job: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "hang" in fails:
        monkeypatch.setattr(tracking, "END_S", 0.1)
    sink.fails = fails
    summary = renderfarm.run(job(write_manifest, write_job, WANDB), engine="inline")
    sink.hang.set()
    assert (summary.state, summary.exit_code) == ("PARTIAL", 3)
    if fails == "log":
        assert (summary.warnings, len(sink.ended)) == ((), 1), "the end has all the counts"
    elif "hang" in fails:
        assert summary.warnings == ("track: wandb did not take the run's end in time; what it has of the run may be incomplete",)
    else:
        assert summary.warnings == (f"track: wandb was not told of the run's end (SystemExit: scripted failure to {fails})",)


def test_a_package_that_is_missing_and_credentials_are_told_before_anything_is_rendered(
    write_manifest: Write, write_job: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "no_such_package").mkdir()  # W&B leaves a folder of its own name, which is no package
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(tracking.PACKAGES, "wandb", "no_such_package")
    with pytest.raises(InvalidJob, match=r"pip install 'renderfarm\[wandb\]'"):
        renderfarm.run(job(write_manifest, write_job, WANDB), engine="inline")
    assert not (tmp_path / "out").exists()
    given = {"mlflow": {"experiment": "e", "tracking_uri": "https://me:hush@example.org"}}
    with pytest.raises(InvalidJob, match=r"track\.mlflow\.tracking_uri holds credentials"):
        renderfarm.Job.load(job(write_manifest, write_job, given))
    for value, said in (("https://me:hush@example.org", "holds credentials"), (None, "THEIR_URI.*not set")):
        monkeypatch.setenv("THEIR_URI", value) if value else monkeypatch.delenv("THEIR_URI")
        file = job(write_manifest, write_job, {"mlflow": {"experiment": "e", "tracking_uri": "${THEIR_URI}"}})
        with pytest.raises(InvalidJob, match=said):
            renderfarm.Job.load(file).plan()


def test_nothing_that_is_said_holds_a_secret_of_the_environment(
    sink: Kept, write_manifest: Write, write_job: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "canary5d1f")
    told = "GET https://me:hush@example.org/api?sig=canary5d1f failed, key canary5d1f"

    def make_worker(*given: Any, **more: Any) -> Any:
        raise Fatal(told)

    monkeypatch.setattr("renderfarm.engines.inline.Worker", make_worker)
    with pytest.raises(Fatal):
        renderfarm.run(job(write_manifest, write_job, WANDB), engine="inline")
    ((_, said, _),) = sink.ended
    assert said["error"].endswith("GET https://…@example.org/api?… failed, key ${WANDB_API_KEY}")
    sink.fails, sink._may_fail = "end", lambda what: (_ for _ in ()).throw(OSError(told))  # type: ignore[method-assign]
    with pytest.raises(Fatal) as raised:
        renderfarm.run(job(write_manifest, write_job, WANDB), engine="inline")
    (note,) = raised.value.__notes__
    assert "hush" not in note
    assert "canary" not in note


# ------------------------------------------------------------------------------------------------- the real packages


def test_mlflow_keeps_it_in_a_store_of_its_own(
    write_manifest: Write, write_job: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    def log_batch(self: Any, *given: Any, **more: Any) -> None:
        broken.append(0)
        if len(broken) == 1:
            raise OSError("the first counts do not arrive")
        log_it(self, *given, **more)

    broken, log_it = list[int](), MlflowClient.log_batch
    monkeypatch.setattr(MlflowClient, "log_batch", log_batch)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    file = job(write_manifest, write_job, {"mlflow": {"experiment": "renders", "tracking_uri": "./kept"}})
    summary = renderfarm.run(file, engine="inline")
    assert summary.warnings == ()
    client = MlflowClient(str(tmp_path / "kept"))
    experiment = client.get_experiment_by_name("renders")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == (summary.run_id, "FINISHED")
    params = run.data.params
    asked = [params[name] for name in ("model", "render.num_inference_steps", "params.mood", "params.n", "rows")]
    assert asked == ["builtin:fake", "3", "warm", "5", "4"]
    assert (run.data.metrics["final_images"], run.data.metrics["final_errors_InvalidInput"]) == (3, 1)
    assert run.data.tags["renderfarm.out"] == summary.out
    assert run.data.tags["renderfarm.state"] == "PARTIAL"
    assert not holds(tmp_path / "kept", PERSONAL)
    second = renderfarm.run(
        job(
            write_manifest,
            write_job,
            {"mlflow": {"experiment": "renders", "tracking_uri": "./kept"}},
            seed=1,
            output={"path": str(tmp_path / "two")},
        ),
        engine="inline",
    )
    assert second.warnings == ()
    (other,) = [one for one in client.search_runs([experiment.experiment_id]) if one.info.run_id != run.info.run_id]
    assert len(client.get_metric_history(other.info.run_id, "images")) >= 1


def test_an_mlflow_server_that_is_away_is_a_warning(write_manifest: Write, write_job: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    track = {"mlflow": {"experiment": "renders", "tracking_uri": "http://127.0.0.1:9"}}
    summary = renderfarm.run(job(write_manifest, write_job, track), engine="inline")
    assert summary.state == "PARTIAL"
    assert summary.warnings[-1].startswith("track: mlflow ")


def test_wandb_keeps_it_offline(write_manifest: Write, write_job: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed: pip install 'renderfarm[wandb]'")
    kept_in = {"WANDB_DIR": str(tmp_path / "kept"), "WANDB_CACHE_DIR": str(tmp_path / "cache")}
    for name, value in {**kept_in, "WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false"}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "kept").mkdir()
    monkeypatch.chdir(tmp_path)
    summary = renderfarm.run(job(write_manifest, write_job, {"wandb": {"project": "renders", "tags": ["night"]}}), engine="inline")
    assert summary.warnings == ()
    (kept,) = (tmp_path / "kept/wandb").glob("offline-run-*/run-*.wandb")
    words = [summary.run_id, "renders", "night", "builtin:fake", summary.out, "errors_InvalidInput"]
    began = time.monotonic()
    while missing := [word for word in words if word.encode() not in kept.read_bytes()]:  # a process of W&B's writes it
        assert time.monotonic() - began < 120, missing
        time.sleep(0.1)
    assert not holds(tmp_path / "kept", PERSONAL)


def holds(folder: Path, text: str) -> bool:
    return any(text.encode() in path.read_bytes() for path in folder.rglob("*") if path.is_file())
