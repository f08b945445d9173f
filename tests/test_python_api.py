"""`renderfarm.Job` and `renderfarm.open(OUT)`: what the commands do, from Python and in a notebook."""

from __future__ import annotations

import ast
import asyncio
import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pyarrow as pa
import pytest
from test_cli import here

import renderfarm
from renderfarm import config, jobs, stopping
from renderfarm.errors import InvalidJob
from renderfarm.progress import Progress
from renderfarm.report import notebook

Write = Callable[..., Path]
EVIL = "</figcaption><script>alert(1)</script><img src=x onerror=alert(1)>"


@pytest.fixture
def fields(write_manifest: Write, tmp_path: Path) -> dict[str, Any]:
    return {
        "name": "test",
        "manifest": write_manifest(),
        "model": "builtin:fake",
        "render": {"num_inference_steps": 3},
        "workers": {"batch_size": 4},
        "output": {"path": tmp_path / "out", "part_rows": 3},
    }


# ------------------------------------------------------------------------------------------------- what one has


def test_importing_it_imports_nothing_heavy_and_what_it_has_is_there() -> None:
    script = (
        "import sys, renderfarm\n"
        "renderfarm.errors.InvalidJob\n"
        "heavy = {'torch', 'ray', 'diffusers', 'transformers', 'pyarrow', 'pydantic', 'PIL', 'numpy'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "renderfarm.Job, renderfarm.open, renderfarm.Output, renderfarm.run\n"
        "assert set(renderfarm.__all__) <= set(dir(renderfarm))\n"
        "assert not {'torch', 'ray', 'diffusers', 'transformers', 'wandb', 'mlflow', 'IPython'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_job_takes_the_fields_of_a_job_file() -> None:
    assert get_type_hints(jobs.Fields).keys() == config.Job.model_fields.keys()


def test_each_method_is_in_the_readme_and_says_what_it_does() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    (said,) = re.findall(r"^## From Python.*?(?=^## )", readme, re.MULTILINE | re.DOTALL)
    own = [(name, method) for kind in (renderfarm.Job, renderfarm.Output) for name, method in vars(kind).items() if name[0] != "_"]
    methods = {name: method for name, method in own if callable(getattr(method, "__func__", method))}
    assert {"load", "run", "status", "export"} <= methods.keys()
    assert [name for name in methods if not re.search(rf"\b{name}\b", said)] == []
    assert [name for name, method in methods.items() if len(method.__doc__ or "") < 20] == []


def test_types_are_published() -> None:
    assert (Path(renderfarm.__file__).parent / "py.typed").exists()


def test_a_job_is_the_same_from_a_file_a_dict_and_arguments(fields: dict[str, Any], write_job: Write, write_manifest: Write) -> None:
    loaded = renderfarm.Job.load(write_job(write_manifest()))
    assert renderfarm.Job(fields).spec == renderfarm.Job(**fields).spec == loaded.spec
    assert renderfarm.Job(fields, seed=5).spec.seed == 5
    assert renderfarm.Job({**fields, "seed": np.int64(5), "workers": config.Workers(batch_size=4)}).spec.seed == 5
    assert re.fullmatch(r"<renderfarm\.Job test: \S+prompts\.parquet × builtin:fake → \S+/out>", repr(loaded))


def test_set_changes_fields_and_parameters_by_their_values(write_job: Write, write_manifest: Write, tmp_path: Path) -> None:
    file = write_job(write_manifest(), params={"steps": 20}, render={"num_inference_steps": "${params.steps}"})
    job = renderfarm.Job.load(file, set={"params.steps": 8, "seed": 3, "workers.batch_size": np.int32(2)}, out=tmp_path / "other")
    assert (job.spec.render.num_inference_steps, job.spec.seed, job.spec.workers.batch_size) == (8, 3, 2)
    assert job.out == str(tmp_path / "other")
    with pytest.raises(InvalidJob, match=r"--set render\.num_inference_stepz: .*did you mean 'num_inference_steps'"):
        renderfarm.Job.load(file, set={"render.num_inference_stepz": 8})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rendr": {}}, r"job: rendr: unknown field; did you mean 'render'\?"),
        ({"seed": "a"}, "job: seed: .*integer"),
        ({"output": {"path": "{{ ds }}"}}, "job: uses {{ ds }}; give --logical-date"),
        ({"render": {"num_inference_steps": "${params.n}"}}, "no such parameter in params"),
    ],
)
def test_mistakes_are_errors_of_the_package_and_name_the_field(change: dict[str, Any], said: str, fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidJob, match=said):
        renderfarm.Job(fields, **change)


def test_a_files_name_is_not_taken_for_fields_and_no_output_for_one(tmp_path: Path) -> None:
    with pytest.raises(InvalidJob, match=r"Job\.load\(FILE\)"):
        renderfarm.Job("job.yaml")  # type: ignore[arg-type]
    with pytest.raises(InvalidJob, match="not an output of renderfarm"):
        renderfarm.open(tmp_path)


def test_what_only_the_manifest_shows_is_told_with_its_line(write_manifest: Write, write_job: Write) -> None:
    file = write_job(write_manifest(), render={"sampler": "no-such"})
    with pytest.raises(InvalidJob, match=r"job\.yaml, line \d+: render: unknown sampler"):
        renderfarm.Job.load(file).plan()


# ------------------------------------------------------------------------------------------------- what it does


def test_each_method_says_what_its_command_says(
    fields: dict[str, Any], write_manifest: Write, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fields["manifest"] = write_manifest({"prompt": ["a red circle", "", "a blue one [nan]", "a green one"]})
    job = renderfarm.Job(fields)
    assert job.validate().bad_rows == 1
    assert job.plan()["images left"] == 4
    with pytest.raises(InvalidJob):
        job.output()
    summary = job.run(engine="inline")
    assert (summary.state, summary.images, summary.errors, summary.exit_code) == ("PARTIAL", 2, 2, 3)
    assert renderfarm.run(job, engine="inline").new_images == 0
    output = job.output()
    assert repr(output) == f"<renderfarm.Output {tmp_path / 'out'}: files, png>"
    assert [record["row"] for _, record in output] == [0, 3]
    assert capfd.readouterr() == ("", ""), "nothing is printed unless one asks"

    def said(*arguments: object) -> Any:
        return json.loads(here(*arguments, "--json").stdout)

    def but(found: dict[str, Any], *names: str) -> dict[str, Any]:
        return {name: value for name, value in found.items() if name not in names}

    age = "last sign of life (s ago)"
    assert but(output.status(), age) == but(said("status", output.url), age)
    assert output.errors().to_pylist() == said("errors", output.url)["failures"]
    assert output.errors(group_by="class").to_pylist() == said("errors", output.url, "--group-by", "class")["groups"]
    assert but(vars(output.wait()), "seconds") == but(said("wait", output.url), "seconds")
    assert [(seen.state, seen.exit_code) for seen in output.watch()] == [("PARTIAL", 3)]
    assert list(output.logs(rows=[1])) == [
        json.loads(line) for line in here("logs", output.url, "--rows", "1", "--json").stdout.splitlines()
    ]
    assert output.inspect(3).record["pixel_sha256"] == said("inspect", output.url, "3")["record"]["pixel_sha256"]
    assert output.waive(rows=1, reason="as it should be").samples == 1
    assert output.errors().column("waived").to_pylist() == [True, False]
    assert output.retry(rows=[2]).parts == ["part-00000000.r1"]
    assert output.status()["errors to be rendered again"] == 1
    assert output.errors().column("asked_again").to_pylist() == [False, True]
    verified = output.verify(sample=2)
    assert (verified.ok, [again.result for again in verified.again]) == (True, ["identical", "identical"])
    assert output.render(0, file=tmp_path / "again.png").ok
    assert output.gc().left_to_runs == 0
    report = output.report(tmp_path / "mine.html")
    assert (report.images, Path(report.place).stat().st_size) == (2, report.bytes)
    assert output.export(tmp_path / "exported", max_file_size="1MB").images == 2
    for refused in (lambda: output.cancel(), lambda: output.pause(), lambda: output.resume()):
        with pytest.raises(InvalidJob, match="no run"):
            refused()
    with pytest.raises(InvalidJob, match="give one of them"):
        output.verify(all=True, rows="0")


def test_of_no_errors_the_columns_are_there_all_the_same(fields: dict[str, Any]) -> None:
    job = renderfarm.Job(fields)
    job.run(engine="inline")
    errors = job.output().errors()
    assert (len(errors), errors.column_names[:2], errors.schema.field("waived").type) == (0, ["row", "row_id"], pa.bool_())
    assert job.output().errors(group_by="worker").column_names == [
        *("value", "count", "waived", "retryable", "asked_again", "retry_takes", "example")
    ]


def test_progress_is_printed_or_told_where_one_asks(fields: dict[str, Any], capfd: pytest.CaptureFixture[str]) -> None:
    seen: list[Progress] = []
    renderfarm.Job(fields).run(engine="inline", progress=seen.append)
    assert seen[-1].parts_done == 3
    assert capfd.readouterr() == ("", "")
    fields["seed"], fields["output"]["path"] = 1, f"{fields['output']['path']}-2"
    renderfarm.Job(fields).run(engine="inline", progress=True)
    out, told = capfd.readouterr()
    assert (out, "part 0 of 3" in told) == ("", True), told


def test_preview_shows_a_sheet_and_writes_it_only_where_one_says(
    fields: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = {*tmp_path.iterdir()}
    found = renderfarm.Job(fields).preview(2)
    assert (found.images, found.file, {*tmp_path.iterdir()} - before) == (2, None, set())
    assert len(Html(found._repr_html_()).pictures) == 1
    assert renderfarm.Job(fields).preview(2, tmp_path / "sheet.png").file == str(tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").read_bytes() == found.sheet


# ------------------------------------------------------------------------------------------------- where it runs


def test_where_ray_is_initialised_and_an_event_loop_runs_both_go_on(local_ray: None, fields: dict[str, Any]) -> None:
    import ray

    async def cell() -> tuple[Any, str]:
        ticks = asyncio.create_task(asyncio.sleep(0, "still going"))
        return renderfarm.Job(fields).run(), await ticks

    summary, still = asyncio.run(cell())
    assert (summary.state, summary.images, still) == ("SUCCEEDED", 8, "still going")
    assert ray.is_initialized()
    assert ray.get(ray.put(1)) == 1


def test_an_interrupt_lets_what_is_in_flight_finish_and_the_next_run_goes_on(fields: dict[str, Any], write_manifest: Write) -> None:
    """As the command's first Ctrl-C does; what comes of Ctrl-C afterwards is what it was before."""
    before, asked = signal.getsignal(signal.SIGINT), []
    fields["manifest"], fields["output"]["part_rows"] = write_manifest({"prompt": [f"circle {k}" for k in range(60)]}), 1

    def interrupt(progress: Progress) -> None:
        if progress.parts_done and not asked:
            asked.append(progress.parts_done)
            signal.raise_signal(signal.SIGINT)

    job = renderfarm.Job(fields)
    summary = job.run(engine="inline", progress=interrupt)
    assert (summary.state, summary.exit_code, len(asked)) == ("INTERRUPTED", 75, 1)
    assert 0 < summary.images < 60
    assert signal.getsignal(signal.SIGINT) is before
    again = job.run(engine="inline")
    assert (again.state, again.new_images) == ("SUCCEEDED", 60 - summary.images)


def test_the_second_interrupt_ends_at_once_and_the_third_is_what_it_was_before(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    with stopping.on_interrupt(said.append) as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert (stop.wanted.is_set(), len(said)) == (True, 1)
        assert not stop.at_once.is_set(), "one stop may arrive twice"
        monkeypatch.setattr(stopping, "SAME_SIGNAL_S", -1.0)
        signal.raise_signal(signal.SIGINT)
        assert stop.at_once.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_in_another_thread_it_runs_and_listens_to_nobody(fields: dict[str, Any]) -> None:
    before, found = signal.getsignal(signal.SIGINT), []
    thread = threading.Thread(target=lambda: found.append(renderfarm.Job(fields).run(engine="inline")))
    thread.start()
    thread.join(300)
    assert (found[0].state, signal.getsignal(signal.SIGINT)) == ("SUCCEEDED", before)


# ------------------------------------------------------------------------------------------------- what a notebook shows


class Html(HTMLParser):
    """What a browser would make of a fragment: its tags, the pictures in it, its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.pictures: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert not [name for name, _ in attributes if name.startswith("on")]
        self.pictures += [str(value) for name, value in attributes if name == "src"]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_an_output_is_shown_with_its_pictures_in_the_page_and_texts_as_texts(fields: dict[str, Any], write_manifest: Write) -> None:
    fields["manifest"] = write_manifest({"prompt": [EVIL, "a cat"]})
    job = renderfarm.Job(fields)
    job.run(engine="inline")
    shown = Html(job.output()._repr_html_())
    assert len(shown.pictures) == 2
    assert all(picture.startswith("data:image/webp;base64,") for picture in shown.pictures)
    assert {*shown.tags} <= {"p", "div", "figure", "img", "figcaption"}
    assert EVIL in shown.text
    assert "2 images, 0 errors" in shown.text


def test_what_an_output_shows_is_bounded_whatever_it_holds(fields: dict[str, Any], write_manifest: Write, tmp_path: Path) -> None:
    fields["manifest"] = write_manifest({"prompt": ["word " * 2000] * 40})
    fields["render"] = {"num_inference_steps": 1, "height": 256, "width": 256}
    job = renderfarm.Job(fields)
    job.run(engine="inline")
    output = job.output()
    html = output._repr_html_()
    assert len(html) < notebook.MOST_BYTES * 1.5
    assert 0 < html.count("<img") <= notebook.IMAGES
    next(tmp_path.glob("out/data/*/*.png")).unlink()
    assert "(cannot be read)" in output._repr_html_()
    (tmp_path / "out/_renderfarm/job.json").unlink()
    assert "not an output of renderfarm" in output._repr_html_(), "a notebook could do nothing with an error"


def test_plans_summaries_and_findings_are_short_tables(fields: dict[str, Any]) -> None:
    job = renderfarm.Job(fields, cost={"currency": "<b>"})
    summary = job.run(engine="inline")
    for value, word in ((job, "builtin:fake"), (job.plan(), "images left"), (job.validate(), "bad rows"), (summary, "SUCCEEDED")):
        shown = Html(value._repr_html_())  # type: ignore[attr-defined]
        assert word in shown.text
        assert {*shown.tags} <= {"table", "caption", "tr", "th", "td"}
        assert len(value._repr_html_()) < 20_000  # type: ignore[attr-defined]
        assert "\n" not in repr(value)
    verified = job.output().verify(sample=2)
    assert "identical" in Html(verified._repr_html_()).text


def test_the_example_of_the_readme_does_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(import renderfarm\n.*?)```", readme, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    said: dict[str, Any] = {}
    for number, line in enumerate(ast.parse(code).body):  # as a notebook does it, the value of the last one of a cell included
        compiled = ast.Expression(line.value) if isinstance(line, ast.Expr) else ast.Module([line], [])
        value = eval(compile(compiled, "README.md", "eval" if isinstance(line, ast.Expr) else "exec"), said)  # noqa: S307 - ours
        said[f"line {number}"] = value
    assert said["line 2"] == (True, 4)
    assert said["line 3"].images == 2
    assert (said["summary"].state, sorted(said["pictures"])) == ("SUCCEEDED", [0, 1, 2, 3])
    errors, verified, images = said["line 7"]
    assert (len(errors), verified, images, Path("circles.html").exists()) == (0, True, 4, True)
    assert capfd.readouterr().out == ""


NOTEBOOK = """
import renderfarm
job = renderfarm.Job.load("job.yaml", set={"seed": 3})
job.plan()
---
import asyncio
assert asyncio.get_running_loop().is_running()
summary = job.run(engine="inline")
summary
---
output = renderfarm.open(summary.out)
output
---
import signal
again = renderfarm.Job.load("job.yaml", set={"output.path": "again", "output.part_rows": 1})
asked = []
def once(progress):
    if progress.parts_done and not asked:
        asked.append(signal.raise_signal(signal.SIGINT))
print(again.run(engine="inline", progress=once).state)
"""


def test_a_real_notebook_shows_what_it_should(write_manifest: Write, write_job: Write, tmp_path: Path) -> None:
    """Executed by a kernel of its own: its event loop runs, its Interrupt is a SIGINT."""
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed: pip install 'renderfarm[dev]'")
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed: pip install 'renderfarm[dev]'")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed: pip install 'renderfarm[dev]'")
    write_job(write_manifest({"prompt": [f"circle {k}" for k in range(60)]}), output={"part_rows": 30})
    cells = [nbformat.v4.new_code_cell(text.strip()) for text in NOTEBOOK.split("---")]
    book = nbformat.v4.new_notebook(cells=cells)
    nbclient.NotebookClient(
        book, timeout=300, startup_timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    plan, summary, output, interrupted = (cell.outputs for cell in book.cells)
    shown = [next(one for one in outputs if one.output_type == "execute_result").data for outputs in (plan, summary, output)]
    assert "images left" in shown[0]["text/html"]
    assert "SUCCEEDED" in shown[1]["text/html"]
    assert len(Html(shown[2]["text/html"]).pictures) == notebook.IMAGES
    assert shown[2]["text/plain"] == f"<renderfarm.Output {tmp_path / 'out'}: files, png>"
    assert interrupted[-1].text.strip() == "INTERRUPTED"
