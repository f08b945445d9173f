"""The command line: what a person types and sees. No traceback, one message, an exit code."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import pytest
import yaml

import renderfarm
from renderfarm.cli import main
from renderfarm.errors import EXIT_USAGE

Write = Callable[..., Path]
ROOT = Path(__file__).parent.parent


def cli(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "renderfarm", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=300)


def here(*arguments: object) -> subprocess.CompletedProcess[str]:
    """As `cli`, in this process, where what it imports has been imported; for whatever does not `run`."""
    out, error = io.StringIO(), io.StringIO()
    line = ["renderfarm", *map(str, arguments)]
    with patch.object(sys, "argv", line), redirect_stdout(out), redirect_stderr(error), pytest.raises(SystemExit) as end:
        main()
    return subprocess.CompletedProcess(arguments, int(end.value.code or 0), out.getvalue(), error.getvalue())


def refused(*arguments: object, code: int = 2, **environment: str) -> str:
    """Run a command that must fail with one message and no traceback; returns the message."""
    done = cli(*arguments, **environment) if environment or code != EXIT_USAGE else here(*arguments)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    return " ".join(done.stderr.split())


def test_help_and_light_commands_import_nothing_heavy() -> None:
    script = (
        "import sys\n"
        "from renderfarm.cli import app\n"
        "for words in (['--help'], ['run', '--help'], ['samplers'], ['models'], ['schema', 'job']):\n"
        "    try: app(words, standalone_mode=False)\n"
        "    except SystemExit: pass\n"
        "print('HEAVY', sorted({'torch', 'ray', 'diffusers', 'transformers', 'pyarrow', 'datasets'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "HEAVY []"


def test_every_command_is_in_the_readme() -> None:
    commands = re.findall(r"^│ (\w+) ", cli("--help", COLUMNS="100", TERM="dumb").stdout, re.MULTILINE)
    assert {"run", "validate", "plan", "status", "models", "samplers", "schema", "submit"} <= set(commands)
    readme = (ROOT / "README.md").read_text()
    assert [command for command in commands if f"renderfarm {command}" not in readme] == []


def test_run_status_plan_and_validate_speak_json(write_manifest: Write, write_job: Write, tmp_path: Path) -> None:
    job = write_job(write_manifest())
    plan = json.loads(here("plan", job, "--json").stdout)
    assert (plan["rows"], plan["parts left"], plan["images left"]) == (8, 3, 8)
    done = cli("run", job, "--engine", "inline", "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert (summary["images"], summary["state"]) == (8, "SUCCEEDED")
    status = json.loads(here("status", tmp_path / "out", "--json").stdout)
    assert (status["images"], status["parts done"], status["state"]) == (8, 3, "SUCCEEDED")
    assert json.loads(here("validate", job, "--json").stdout)["ok"] is True
    assert json.loads(here("plan", job, "--json").stdout)["parts left"] == 0


def test_verify_shows_on_a_terminal_how_far_it_is_and_nowhere_else(write_manifest: Write, write_job: Write, tmp_path: Path) -> None:
    assert cli("run", write_job(write_manifest()), "--engine", "inline", "--json").returncode == 0
    assert cli("verify", tmp_path / "out", "--all").stderr == ""
    master, terminal = pty.openpty()
    command = [sys.executable, "-m", "renderfarm", "verify", str(tmp_path / "out"), "--all"]
    with os.fdopen(master, "rb", buffering=0) as seen:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=terminal, timeout=300, check=True, env={**os.environ, "TERM": "xterm", "COLUMNS": "100"}
        )
        os.close(terminal)
        shown = seen.read(1 << 16).decode()
    assert re.search(r"files: part \d of 3, \d images checked|loading the model|rendered again: \d of 8 images", shown), shown
    assert done.stdout.decode().splitlines()[-1] == "rendered again: 8 of 8 identical, bit for bit"


@pytest.mark.parametrize("command", ["--version", "version"])
def test_the_version_is_that_of_the_package(command: str) -> None:
    done = cli(command)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{renderfarm.__version__}\n", "")


def test_verify_and_inspect_say_what_is_right_and_exit_3_where_it_is_not(write_manifest: Write, write_job: Write, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "nothing was rendered yet" in refused("verify", prepared_only(write_job(write_manifest()), out))
    assert cli("run", tmp_path / "job.yaml", "--engine", "inline").returncode == 0
    done = cli("verify", out)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 images and 0 error rows in 3 of 3 parts; each one is what its table says" in done.stdout
    assert "rendered again: 8 of 8 identical, bit for bit" in done.stdout
    assert json.loads(here("verify", out, "--sample", "0", "--json").stdout)["again"] == []
    assert len(json.loads(here("verify", out, "--all", "--json").stdout)["again"]) == 8
    assert "'3-' is not a range" in refused("verify", out, "--rows", "3-")
    assert "give one of them" in refused("verify", out, "--rows", "3", "--all")

    shown = here("inspect", out, "4", "--render", tmp_path / "alone.png")
    assert "a large orange circle on a white background" in shown.stdout
    assert f"rendered again into {tmp_path / 'alone.png'}: identical" in shown.stdout
    assert json.loads(here("inspect", out, "4:0", "--json").stdout)["record"]["row"] == 4
    assert "rows 0 to 7" in refused("inspect", out, "8")
    assert "not ROW or ROW:K" in refused("inspect", out, "four")
    assert "cannot be written" in refused("inspect", out, "4", "--render", tmp_path / "no/such/folder.png")

    next((out / "_renderfarm/parts").glob("part-00000002.*")).unlink()
    assert "no index entry for 1 of 3 parts" in " ".join(here("verify", out, "--sample", "0").stdout.split())
    sorted(out.glob("data/*/*.png"))[0].unlink()
    done = here("verify", out, "--sample", "0")
    assert done.returncode == 3
    assert "1 problems" in done.stdout
    assert "the file is missing" in done.stdout


def prepared_only(job: Path, out: Path) -> Path:
    """An output that `run` began and that no worker has touched."""
    from renderfarm.driver import Driver
    from renderfarm.jobfile import load_job
    from renderfarm.preparation import prepare

    Driver(prepare(load_job(job)), threading.Event(), lambda progress: None).begin()
    return out


@pytest.mark.parametrize("command", [["models"], ["samplers"], ["schema", "job"], ["schema", "images"], ["schema", "errors"]])
def test_listing_commands_print_for_people_and_as_json(command: list[str]) -> None:
    assert here(*command).stdout.strip()
    assert json.loads(here(*command, "--json").stdout)


def test_samplers_of_a_model_are_those_that_it_can_use_and_the_others_have_a_reason() -> None:
    rows = json.loads(here("samplers", "--model", "builtin:shapes", "--json").stdout)["samplers"]
    assert {row["name"] for row in rows if not row["refused"]} == {row["name"] for row in rows if row["kind"] == "diffusion"}
    shown = here("samplers", "--model", "builtin:shapes").stdout
    assert "refused: sampler flow-euler is for flow models, and this is a diffusion model" in shown
    assert "no such folder" in refused("samplers", "--model", "./nowhere")
    assert "needs its full commit" in refused("samplers", "--model", "org/name@main")


def test_without_a_terminal_progress_is_lines_not_control_codes(write_manifest: Write, write_job: Write) -> None:
    done = cli("run", write_job(write_manifest()), "--engine", "inline")
    assert done.stderr.startswith("running: part ")
    assert "\x1b" not in done.stdout + done.stderr
    assert "8 images" in done.stdout


def test_set_and_out_change_the_job(write_manifest: Write, write_job: Write, tmp_path: Path) -> None:
    job = write_job(write_manifest())
    done = cli("run", job, "--engine", "inline", "--out", tmp_path / "other", "--set", "render.num_images_per_prompt=2", "--json")
    summary = json.loads(done.stdout.splitlines()[-1])
    assert (summary["images"], summary["out"]) == (16, str(tmp_path / "other"))


def test_a_logical_date_fills_the_paths(write_manifest: Write, write_job: Write, tmp_path: Path) -> None:
    job = write_job(write_manifest(), output={"path": str(tmp_path / "runs/{{ ds }}")})
    assert "--logical-date" in refused("run", job)
    done = cli("run", job, "--engine", "inline", "--logical-date", "2026-11-21")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/2026-11-21/data").is_dir()


def test_failed_rows_exit_3_and_say_where_the_reasons_are(write_manifest: Write, write_job: Write) -> None:
    done = cli("run", write_job(write_manifest({"prompt": ["good", ""]})), "--engine", "inline")
    assert done.returncode == 3
    assert "InvalidInput: 1" in done.stdout
    assert "renderfarm errors /" in done.stdout


def test_validate_names_file_row_and_column(write_manifest: Write, write_job: Write) -> None:
    manifest = write_manifest({"id": ["a", "b", "a"], "prompt": ["x", None, "z"], "height": [64, 64, 70]})
    done = here("validate", write_job(manifest))
    assert done.returncode == 3
    assert "prompts.parquet, row 1: prompt is null" in done.stdout
    assert "prompts.parquet, row 2: height is 70; it must be a multiple of 8 for this model: 64 or 72" in done.stdout
    assert "1 duplicate ids" in done.stdout


def test_bad_input_gets_one_message_that_says_what_to_do(write_manifest: Write, write_job: Write, tmp_path: Path) -> None:
    manifest = write_manifest()
    assert "no such job file" in refused("run", tmp_path / "none.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("name: [")
    assert "broken.yaml, line 1: not valid YAML" in refused("run", broken)
    assert "no such file; paths are relative to the job file" in refused("run", write_job(tmp_path / "none.parquet"))
    (tmp_path / "corrupt.parquet").write_bytes(manifest.read_bytes()[:-20])
    assert "corrupt.parquet: not a readable Parquet file" in refused("validate", write_job(tmp_path / "corrupt.parquet"))
    no_prompt = write_manifest({"caption": ["x"]}, "caption.parquet")
    assert "columns: {prompt: caption}" in refused("run", write_job(no_prompt))
    numbers = write_manifest({"prompt": [1, 2]}, "numbers.parquet")
    assert "column 'prompt' has type int64, but prompt must be text" in refused("plan", write_job(numbers))
    job = write_job(manifest)
    assert "did you mean 'euler'" in refused("run", job, "--set", "render.sampler=eulr")
    assert "render: height is 60; it must be a multiple of 8 for this model: 56 or 64" in refused("run", job, "--set", "render.height=60")
    assert "did you mean 'num_inference_steps'" in refused("run", job, "--set", "render.num_inference_step=4")
    assert "render.seed would give every row the same noise" in refused("run", job, "--set", "render.seed=4")
    assert "no such builtin" in refused("run", job, "--set", "model=builtin:nothing")
    assert "full commit" in refused("run", job, "--set", "model=org/name")
    assert "not a model in diffusers' format" in refused("run", job, "--set", f"model={tmp_path}")
    assert "choose a folder that you may write" in refused("run", job, "--engine", "inline", "--out", manifest / "below")
    assert "ftp:// cannot be written; give a folder, or s3://" in refused("run", job, "--out", "ftp://host/x")
    assert "not an output of renderfarm" in refused("status", tmp_path)


def test_a_field_that_only_model_or_manifest_prove_wrong_is_told_with_its_line(write_manifest: Write, write_job: Write) -> None:
    job = write_job(write_manifest())
    job.write_text(job.read_text() + "sweep:\n  product:\n    guidence_scale: [1]\n")
    lines = job.read_text().splitlines()
    told = f"job.yaml, line {lines.index('    guidence_scale: [1]') + 1}: sweep.product.guidence_scale: no argument or column"
    assert told in refused("plan", job)
    assert told in refused("run", job, "--engine", "inline")
    text = refused("preview", job, "--set", "sweep=null", "--set", "render.height=60")
    assert f"job.yaml, line {lines.index('render:') + 1}: render: height is 60" in text


def test_init_preview_schedule_and_backfill_speak_to_people_and_as_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    written = json.loads(cli("init", "j.yaml", "--template", "sweep", "--json").stdout)["written"]
    assert written == ["j.yaml", "job.schema.json"]
    assert "exists, and is left as it is" in refused("init", "j.yaml")
    assert cli("validate", "j.yaml", "--set", "seed=3").stdout.endswith(" plan j.yaml --set seed=3\n")
    planned = cli("plan", "j.yaml", "--out", "o", "--set", "seed=3")
    assert [line.partition("renderfarm ")[2] for line in planned.stdout.splitlines()[-2:]] == [
        "preview j.yaml --set seed=3", "run j.yaml --set seed=3 --out o",
    ]  # fmt: skip
    done = cli("preview", "j.yaml", "--rows", "2", "--set", "model=builtin:fake")
    assert done.returncode == 0, done.stderr
    assert "2 images of 2 rows" in done.stdout
    assert "contact sheet: j-preview.png" in done.stdout
    assert done.stdout.endswith(" run j.yaml --set model=builtin:fake\n")
    assert (tmp_path / "j-preview.png").exists()
    assert len(json.loads(cli("preview", "j.yaml", "--rows", "2", "--set", "model=builtin:fake", "--json").stdout)["pixels"]) == 2
    assert "put {{ ds }} into output.path" in refused("schedule", "j.yaml", "--kind", "cron")

    (tmp_path / "j.yaml").write_text(
        (tmp_path / "j.yaml").read_text().replace("out/j", '"out/{{ ds }}"').replace("builtin:shapes", "builtin:fake")
    )
    assert "--logical-date" in cli("schedule", "j.yaml", "--kind", "cron").stdout
    made = cli("schedule", "j.yaml", "--kind", "systemd", "--write", "units", "--json")
    assert sorted(json.loads(made.stdout)["files"]) == sorted(path.name for path in (tmp_path / "units").iterdir())
    written_there = cli("schedule", "j.yaml", "--kind", "cron", "--write", "here")
    assert "wrote here/renderfarm-j.cron" in written_there.stderr
    assert "to install, in that folder: " in written_there.stderr
    assert "to install (with --write FOLDER, then in that folder): " in cli("schedule", "j.yaml", "--kind", "cron").stderr
    days = ["--from", "2024-11-27", "--to", "2024-11-28", "--engine", "inline"]
    planned = cli("backfill", "j.yaml", *days, "--every", "2", "--set", "seed=1", "--dry-run")
    again = "backfill j.yaml --from 2024-11-27 --to 2024-11-28 --reprocess missing --every 2 --set seed=1 --engine inline"
    assert planned.stdout.splitlines()[-1].endswith(again), "what was typed, without --dry-run"
    assert not (tmp_path / "out").exists()
    ended = json.loads(cli("backfill", "j.yaml", *days, "--json").stdout)
    assert [(day["date"], day["action"]) for day in ended["days"]] == [("2024-11-27", "render"), ("2024-11-28", "render")]
    assert [(run["date"], run["images"]) for run in ended["runs"]] == [("2024-11-27", 27), ("2024-11-28", 27)]
    done = cli("run", "j.yaml", "--logical-date", "2024-11-28", "--engine", "inline")
    assert done.stdout.endswith(" export out/2024-11-28 out/2024-11-28-export\n"), "its rows say their steps: the job's change nothing"
    assert json.loads(cli("backfill", "j.yaml", *days, "--json").stdout)["runs"] == []


def test_every_shipped_job_file_is_valid() -> None:
    from renderfarm.jobfile import load_job

    jobs = sorted((ROOT / "jobs").glob("*.yaml"))
    assert len(jobs) >= 4
    for job in jobs:
        assert load_job(job, logical_date="2026-11-21").name
        assert "yaml-language-server: $schema=job.schema.json" in job.read_text().splitlines()[0]


def test_the_published_schema_is_that_of_the_code_and_accepts_the_shipped_jobs() -> None:
    import jsonschema

    from renderfarm.config import Job

    published = json.loads((ROOT / "jobs/job.schema.json").read_text())
    assert published == Job.model_json_schema(), "run `make schema`"
    for job in (ROOT / "jobs").glob("*.yaml"):
        jsonschema.validate(yaml.safe_load(job.read_text()), published)


def test_json_is_printed_for_an_error_too(write_manifest: Write, write_job: Write) -> None:
    done = cli("run", write_job(write_manifest()), "--json", "--set", "render.height=60")
    assert done.returncode == 2
    last = json.loads(done.stdout.splitlines()[-1])
    assert (last["error_class"], last["exit_code"]) == ("InvalidJob", 2)


def test_a_file_that_is_named_twice_an_empty_out_and_an_open_range_are_refused(write_manifest: Write, write_job: Write) -> None:
    manifest = write_manifest()
    job = write_job(manifest)
    assert "is named twice" in refused("plan", job, "--set", f"manifest.path=[{manifest}, '{manifest.parent}/*.parquet']")
    assert "--out is empty" in refused("run", job, "--out", "")
    assert "'5-' is not a range" in refused("plan", job, "--set", 'manifest.where={row: "5-"}')
    assert "S3:// cannot be written; give a folder, or s3://" in refused("run", job, "--out", "S3://bucket/x")


@pytest.mark.parametrize(("error", "code"), [("Fatal", 4), ("Interrupted", 75)])
def test_a_run_that_ends_with_an_error_waits_for_no_thread_that_still_renders(error: str, code: int) -> None:
    script = f"""
import threading, time
from renderfarm import cli, errors
threading.Thread(target=time.sleep, args=(600,)).start()  # Python waits for it when it ends by itself
def app(): raise errors.{error}("what to do")
cli.app = app
cli.main()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (code, "error: what to do\n")


def test_plan_refuses_other_settings_than_the_output_was_begun_with(write_manifest: Write, write_job: Write) -> None:
    job = write_job(write_manifest())
    assert cli("run", job, "--engine", "inline").returncode == 0
    assert "output.part_rows: 3 there, 12 now" in refused("plan", job, "--set", "output.part_rows=12")
