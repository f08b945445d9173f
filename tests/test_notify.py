"""A job's `notify`: somebody is told of each run's end, once, and a secret goes nowhere else."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import renderfarm
from renderfarm import notify
from renderfarm.cli import app
from renderfarm.config import Notify
from renderfarm.errors import Fatal, Interrupted, InvalidJob
from renderfarm.jobfile import load_job

Write = Callable[..., Path]
SECRET = "hush-7c1f"  # noqa: S105 - made up


class Hook(ThreadingHTTPServer):
    """Keeps what it is told; answers with each of `answers` once, then 204."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.told: list[tuple[str, dict[str, str], Any]] = []
        self.answers: list[int] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Hook

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.told.append((self.path, dict(self.headers), json.loads(body)))
        code = self.server.answers.pop(0) if self.server.answers else 204
        self.send_response(code)
        if code == 302:
            self.send_header("Location", f"{self.server.url}/elsewhere")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_POST

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hook]:
    monkeypatch.setattr(notify, "PAUSE_S", 0.01)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Hook()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    monkeypatch.setenv("HOOK", f"{server.url}/{SECRET}")
    monkeypatch.setenv("TOKEN", SECRET)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def job(write_manifest: Write, write_job: Write) -> Path:
    return write_job(write_manifest(), notify={"url": "${HOOK}", "headers": {"Authorization": "Bearer ${TOKEN}", "X-From": "tests"}})


def test_the_end_of_a_run_is_told_once_with_its_summary(hook: Hook, job: Path, tmp_path: Path) -> None:
    summary = renderfarm.run(job, engine="inline")
    ((path, headers, body),) = hook.told
    assert path == f"/{SECRET}"
    assert (headers["Content-Type"], headers["Authorization"], headers["X-From"]) == ("application/json", f"Bearer {SECRET}", "tests")
    assert body == json.loads(json.dumps(summary.to_dict()))
    assert summary.warnings == ()
    for kept in (path for path in (tmp_path / "out").rglob("*") if path.is_file()):
        assert SECRET.encode() not in kept.read_bytes()


@pytest.mark.parametrize(("answers", "times"), [([500], 2), ([503, 429], 2), ([404], 1), ([302], 1)])
def test_what_the_other_side_answers_is_never_the_runs_failure(answers: list[int], times: int, hook: Hook, job: Path) -> None:
    hook.answers = answers[:]
    said = CliRunner().invoke(app, ["run", str(job), "--engine", "inline"], catch_exceptions=False)
    assert said.exit_code == 0
    assert [path for path, _, _ in hook.told] == [f"/{SECRET}"] * times
    warned = f"warning: notify: 127.0.0.1 was not told of the run's end: it answered {answers[-1]}"
    assert (warned in said.stdout) == (answers != [500]), "the second time it was taken"
    assert SECRET not in said.output


def test_where_nobody_listens_the_run_says_so(hook: Hook, job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from servers import free_port

    monkeypatch.setenv("HOOK", f"http://127.0.0.1:{free_port()}/{SECRET}")
    (warning,) = renderfarm.run(job, engine="inline").warnings
    assert warning == "notify: 127.0.0.1 was not told of the run's end: it cannot be reached (Connection refused)"


def test_a_failed_run_is_told_with_its_error(hook: Hook, job: Path, tmp_path: Path) -> None:
    renderfarm.run(job, engine="inline")
    with pytest.raises(InvalidJob, match="was begun with other settings") as caught:
        renderfarm.run(load_job(job, ["seed=5"]), engine="inline")
    body = hook.told[1][2]
    assert (body["state"], body["exit_code"], body["error_class"], body["error"]) == ("FAILED", 2, "InvalidJob", str(caught.value))
    assert (body["job"], body["out"]) == ("test", str(tmp_path / "out"))


def test_an_interrupted_run_is_told(hook: Hook, job: Path) -> None:
    stop = threading.Event()
    stop.set()
    assert renderfarm.run(job, engine="inline", stop=stop).exit_code == 75
    with pytest.raises(Interrupted):
        renderfarm.run(job, engine="inline", stop=stop, stop_now=stop)
    assert [(body["state"], body["exit_code"]) for _, _, body in hook.told] == [("INTERRUPTED", 75)] * 2


def test_a_warning_beside_an_error_is_printed(hook: Hook, job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hook.answers = [404]
    monkeypatch.setattr(renderfarm.api.Driver, "begin", _stopped)
    with pytest.raises(Fatal) as caught:
        renderfarm.run(job, engine="inline")
    assert caught.value.__notes__ == ["notify: 127.0.0.1 was not told of the run's end: it answered 404"]


def _stopped(driver: Any) -> None:
    raise Fatal("the store is full")


@pytest.mark.parametrize("url", ["ftp://h/x", "h/x", "https:///x", "http://h:x/", "https://h/a b", "https://h/\nx", "http://[::1/"])
def test_a_url_that_takes_no_post_is_refused_before_the_run(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOOK", url)
    with pytest.raises(InvalidJob, match=r"notify\.url: it .*; give the https:// or http:// URL that takes a POST") as caught:
        notify.check(Notify(url="${HOOK}"))
    assert url not in str(caught.value)


def test_a_variable_that_is_not_set_is_named_before_the_run(job: Path, hook: Hook, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HOOK")
    with pytest.raises(InvalidJob, match=r"the job uses \$\{HOOK\}, but that environment variable is not set"):
        renderfarm.run(job, engine="inline")
    assert not (tmp_path / "out/_renderfarm").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"url": "https://u:p@h/"}, "the URL in notify.url holds credentials"),
        ({"url": ""}, "at least 1 character"),
        (
            {"url": "https://h/", "headers": {"Authorization": "Bearer abc"}},
            "Authorization is a secret; put it into an",
        ),
        ({"url": "https://h/", "headers": {"a b": "c"}}, "'a b' is no header"),
        ({"url": "https://h/", "headers": {"A": "c\nd"}}, "'A' is no header"),
        ({"to": "https://h/"}, "notify"),
    ],
)
def test_what_a_job_must_not_say(given: dict[str, Any], message: str, write_manifest: Write, write_job: Write) -> None:
    with pytest.raises(InvalidJob) as caught:
        load_job(write_job(write_manifest(), notify=given))
    assert message in str(caught.value)
