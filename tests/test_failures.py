"""`errors`, `retry`, `waive`: a person sees what failed, and says what is to be done, from the output alone."""

from __future__ import annotations

import itertools
import json
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from checker import check_complete
from test_retries import fail_on
from typer.testing import CliRunner

import renderfarm
from renderfarm import commit, requests
from renderfarm.cli import app
from renderfarm.errors import InvalidJob
from renderfarm.failures import Choice, retry, waive
from renderfarm.records import PartId, SampleKey
from renderfarm.storage import open_store

# rows 1 and 4 cannot be rendered, 2 and 6 fail once
PROMPTS = ["a", "", "b", "c", "", "d", "e", "f"]
PLANNED = {(row, 0) for row in range(8)}
Say = Callable[..., Any]


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("failures")
    ids = [f"p{k}\x1b[31m" for k in range(8)]
    pq.write_table(pa.table({"prompt": PROMPTS, "id": ids}), folder / "m.parquet")
    job = {
        "name": "t", "manifest": "m.parquet", "model": "builtin:fake", "render": {"num_inference_steps": 2},
        "workers": {"batch_size": 4}, "output": {"path": "out", "part_rows": 3},
    }  # fmt: skip
    (folder / "job.yaml").write_text(json.dumps(job))
    with pytest.MonkeyPatch.context() as patch:
        fail_on(patch)({(2, 0), (6, 0)})
        assert renderfarm.run(folder / "job.yaml", engine="inline").exit_code == 3
    return folder


@pytest.fixture
def folder(rendered: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(rendered, tmp_path / "copy"))


@pytest.fixture
def out(folder: Path) -> str:
    return str(folder / "out")


@pytest.fixture
def say(folder: Path, out: str) -> Say:
    """Runs a command on the output; its JSON."""

    def said(command: str, *options: str, code: int = 0) -> Any:
        result = CliRunner().invoke(app, [command, out, *options, "--json"], catch_exceptions=False)
        assert result.exit_code == code, result.output
        return json.loads(result.stdout.splitlines()[-1])

    return said


def text(*command: str) -> str:
    result = CliRunner().invoke(app, list(command), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def run(folder: Path) -> Any:
    return renderfarm.run(folder / "job.yaml", engine="inline")


def asked(out: str) -> dict[PartId, set[int]]:
    store = open_store(out)
    return {part: {sample.row for sample in requests.read(store, part).samples} for part in requests.asked(store)}


def test_errors_lists_each_sample_with_its_reason(say: Say, out: str) -> None:
    found = say("errors")
    assert found["errors"] == 4
    assert [(one["row"], one["error_class"], one["retryable"], one["waived"]) for one in found["failures"]] == [
        (1, "InvalidInput", False, False),
        (2, "OutOfMemory", True, False),
        (4, "InvalidInput", False, False),
        (6, "OutOfMemory", True, False),
    ]
    assert len(say("errors", "--limit", "2")["failures"]) == 2
    shown = text("errors", out, "--limit", "3")
    assert "scripted: out of memory" in shown
    assert "… 4 in all" in shown
    assert "\x1b" not in shown, "what a terminal obeys is not printed"


def test_errors_are_counted_by_what_they_have_in_common(say: Say, out: str) -> None:
    def counted(by: str) -> dict[str, int]:
        return {group["value"]: group["count"] for group in say("errors", "--group-by", by)["groups"]}

    assert counted("class") == {"InvalidInput": 2, "OutOfMemory": 2}
    assert sorted(counted("message").values()) == [2, 2]
    ((worker, count),) = counted("worker").items()
    run_id = commit.read_progress(open_store(out))["run_id"]
    assert worker.startswith("w0 on ")
    assert worker.endswith(f" in run {run_id}")
    assert count == 4
    (path,) = Path(out).glob("_renderfarm/parts/part-00000000.*")
    path.write_text("{}")
    assert counted("worker") == {worker: 2, "unknown": 2}


def test_retry_takes_what_may_succeed_and_the_next_run_renders_it(folder: Path, say: Say, out: str) -> None:
    found = say("retry")
    assert (found["samples"], found["parts"], found["not_retryable"]) == (2, ["part-00000000.r1", "part-00000002.r1"], 2)
    again = say("retry")
    assert (again["samples"], again["already"]) == (0, 2)
    assert say("status")["errors to be rendered again"] == 2
    assert {one["row"]: one["asked_again"] for one in say("errors")["failures"]} == {1: False, 2: True, 4: False, 6: True}
    groups = say("errors", "--group-by", "class")["groups"]
    assert {group["value"]: group["asked_again"] for group in groups} == {"InvalidInput": 0, "OutOfMemory": 2}
    assert "a run renders: " in (shown := text("errors", out))
    assert " retry " not in shown, "what is asked for need not be asked for again"
    summary = run(folder)
    assert (summary.new_images, summary.images, summary.errors, summary.exit_code) == (2, 6, 2, 3)
    check_complete(Path(out), PLANNED)
    assert say("retry")["samples"] == 0
    assert "nothing to retry" in text("retry", out)
    assert [one["row"] for one in say("errors")["failures"]] == [1, 4]


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        (["--class", "InvalidInput"], {1, 4}),
        (["--class", "InvalidInput", "--class", "OutOfMemory"], {1, 2, 4, 6}),
        (["--rows", "0-2,6"], {1, 2, 6}),
        (["--rows", "0-2", "--class", "OutOfMemory"], {2}),
        (["--all"], {1, 2, 4, 6}),
        (["--class", "Filtered"], set()),
    ],
)
def test_retry_takes_exactly_what_is_named(options: list[str], rows: set[int], say: Say, out: str) -> None:
    assert say("retry", *options)["samples"] == len(rows)
    assert set().union(*asked(out).values()) == rows


def test_what_fails_again_can_be_asked_for_again(folder: Path, say: Say, out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_on(monkeypatch)({(6, 0)})
    for number in (1, 2):
        assert f"part-00000002.r{number}" in say("retry")["parts"]
        assert run(folder).errors == 3
    check_complete(Path(out), PLANNED)
    assert asked(out) == {PartId(0, 1): {2}, PartId(2, 1): {6}, PartId(2, 2): {6}}


def test_many_who_ask_at_once_ask_for_each_sample_once(folder: Path, out: str) -> None:
    start = threading.Barrier(8)

    def one(number: int) -> int:
        start.wait()
        return retry(out, Choice(rows="2" if number % 2 else "1-2,6")).samples

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, range(8)))
    run(folder)
    run(folder)
    check_complete(Path(out), PLANNED)
    store = open_store(out)
    assert commit.totals(store, commit.index_entries(store)).classes == {"InvalidInput": 2}


def test_what_is_waived_stays_an_error_that_nobody_counts(folder: Path, say: Say, out: str) -> None:
    assert say("waive", "--class", "InvalidInput", "--reason", "no prompt was meant")["samples"] == 2
    assert say("waive", "--class", "InvalidInput") == {"out": out, "samples": 0, "already": 2}
    found = {one["row"]: one for one in say("errors")["failures"]}
    assert [found[row]["waived"] for row in (1, 2, 4, 6)] == [True, False, True, False]
    assert found[1]["reason"] == "no prompt was meant"
    assert say("status")["errors waived"] == 2
    assert say("retry", "--all")["waived"] == 2
    summary = run(folder)
    assert (summary.errors, summary.waived, summary.exit_code, summary.state) == (2, 2, 0, "SUCCEEDED")
    assert set().union(*asked(out).values()) == {2, 6}
    assert say("retry", "--rows", "1")["samples"] == 1, "named, it is asked for"


def test_an_image_ends_a_waiver(folder: Path, say: Say, out: str) -> None:
    waive(out, Choice(rows="6"), None)
    assert say("retry", "--rows", "6")["samples"] == 1
    summary = run(folder)
    assert (summary.errors, summary.waived) == (3, 0)


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("retry", ["--class", "OutofMemory"], "no error is called that, did you mean OutOfMemory? the output has: InvalidInput (2)"),
        ("retry", ["--rows", "3-1"], "--rows: '3-1' is not a range"),
        ("retry", ["--rows", "500-600"], "--rows 500: there is no such row; the manifest has rows 0 to"),
        ("retry", ["--all", "--rows", "1"], "--all is every failed sample"),
        ("waive", [], "say which failed samples may stay errors: --class, --rows, or --all"),
        ("waive", ["--class", "x"], "no error is called that; the output has:"),
    ],
)
def test_bad_options_say_what_is_wrong_and_change_nothing(command: str, options: list[str], message: str, out: str) -> None:
    classes = tuple(value for name, value in itertools.pairwise(options) if name == "--class")
    rows = options[options.index("--rows") + 1] if "--rows" in options else None

    def act() -> None:
        choice = Choice(classes, rows, "--all" in options)
        retry(out, choice) if command == "retry" else waive(out, choice, None)

    with pytest.raises(InvalidJob) as caught:
        act()
    assert message in str(caught.value)
    assert not list(Path(out).glob("_renderfarm/retries/*"))
    assert not list(Path(out).glob("_renderfarm/waived/*"))


@pytest.mark.parametrize("command", ["errors", "retry", "wait", "pause", "resume", "cancel"])
def test_what_is_no_output_is_refused(command: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidJob, match="not an output of renderfarm"):
        CliRunner().invoke(app, [command, str(tmp_path)], catch_exceptions=False)


def test_a_sample_key_is_what_a_request_names(out: str) -> None:
    retry(out, Choice(rows="2"))
    assert json.loads((Path(out) / "_renderfarm/retries/part-00000000.r1.json").read_text()) == {"samples": [[2, 0]]}
    assert requests.read(open_store(out), PartId(0, 1)).samples == {SampleKey(2, 0)}
