"""What `schedule` prints, held against those who read it: cron, systemd, Kubernetes' and KubeRay's schemas, Python."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import jsonschema
import pytest
import yaml
from cronsim import CronSim

import renderfarm
from renderfarm import commit
from renderfarm.backfill import backfill, days, survey
from renderfarm.errors import InvalidJob
from renderfarm.jobfile import load_job
from renderfarm.report.contents import runs
from renderfarm.schedule import KINDS, OVERLAPS, Kind, Tick, check_cron, on_calendar, schedule
from renderfarm.status import read_status
from renderfarm.storage import open_store

Write = Callable[..., Path]
HEAD = "http://ray-head:8265"
KUBERAY = next((folder for parent in Path(__file__).parents if (folder := parent / "shared/data/kuberay").is_dir()), None)


@pytest.fixture
def nightly(write_manifest: Write, write_job: Write, tmp_path: Path) -> Path:
    """A job whose name, path and settings hold what shells, cron and systemd read as their own."""
    job = write_job(write_manifest(), '50% of $HOME\'s "jobs".yaml', output={"path": str(tmp_path / "out/{{ ds }}")})
    job.write_text(job.read_text().replace("name: test", "name: Night.ly_1") + "# an 'odd' \"remark\" with {{ braces }}\n")
    return job


def tick(job: Path, **changes: Any) -> Tick:
    sets = tuple(changes.get("sets", ('render.negative_prompt=50% of $HOME\'s "words" \\ `id`',)))
    return Tick(load_job(job, list(sets), None, "2026-11-28"), job, **{**changes, "sets": sets})


def argv(command: str, folder: Path) -> list[str]:
    """What a shell starts for a line, with a `renderfarm` that only says what it was called with."""
    fake = folder / "bin/renderfarm"
    fake.parent.mkdir(exist_ok=True)
    fake.write_text('#!/bin/sh\nfor word in "$@"; do printf "%s\\0" "$word"; done > "$OUT"\n')
    fake.chmod(0o755)
    environment = {"PATH": f"{fake.parent}:{os.environ['PATH']}", "OUT": str(folder / "argv"), "HOME": "/nowhere"}
    subprocess.run(["/bin/sh", "-c", command], check=True, env=environment, timeout=120)
    return (folder / "argv").read_text().split("\0")[:-1]


def today() -> str:
    return datetime.now().astimezone().date().isoformat()


@pytest.fixture(autouse=True)
def _program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("renderfarm.schedule._program", lambda: ["renderfarm"])


def expected(file: str, date: str, *address: str) -> list[str]:
    return ["run", file, "--set", 'render.negative_prompt=50% of $HOME\'s "words" \\ `id`', *address, "--logical-date", date]


@pytest.mark.parametrize("overlap", OVERLAPS["cron"])
def test_a_cron_line_is_read_by_cron_and_starts_the_job_under_its_date(nightly: Path, tmp_path: Path, overlap: Any) -> None:
    text = next(iter(schedule(tick(nightly, at="*/20 6-18 * * 1-5"), "cron", overlap).files.values()))
    *remarks, line = text.splitlines()
    assert all(remark.startswith("#") for remark in remarks)
    times = CronSim(" ".join(line.split()[:5]), datetime(2026, 11, 27, 18, 30))
    assert [next(times).isoformat() for _ in range(2)] == ["2026-11-27T18:40:00", "2026-11-30T06:00:00"]
    command = line.split(maxsplit=5)[5]
    assert "%" not in command.replace("\\%", ""), "cron takes a bare % for the end of the line"
    assert argv(command.replace("\\%", "%"), tmp_path) == expected(str(nightly), today())
    assert ("flock -n" in command, "flock " in command) == {"skip": (True, True), "wait": (False, True), "allow": (False, False)}[overlap]
    if shutil.which("crontab"):
        (tmp_path / "crontab").write_text(text)
        subprocess.run(["crontab", "-T", str(tmp_path / "crontab")], check=True, timeout=120)


def test_a_tick_of_cron_that_is_to_skip_does_nothing_while_the_other_is_at_work(nightly: Path, tmp_path: Path) -> None:
    line = next(iter(schedule(tick(nightly), "cron", "skip").files.values())).splitlines()[-1]
    command = line.split(maxsplit=5)[5].replace("\\%", "%")
    held = subprocess.Popen(["flock", str(nightly.with_name(".renderfarm-night-ly-1.lock")), "sleep", "60"])
    try:
        for _ in range(100):
            done = subprocess.run(["/bin/sh", "-c", command.replace("renderfarm run", "true run", 1)], timeout=120)
            if done.returncode == 75:
                break
        assert done.returncode == 75
    finally:
        held.terminate()
        held.wait()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_takes_service_and_timer_as_they_are(nightly: Path, tmp_path: Path) -> None:
    made = schedule(tick(nightly), "systemd")
    for name, text in made.files.items():
        (tmp_path / name).write_text(text)
    units = [str(tmp_path / name) for name in made.files]
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", *units], capture_output=True, text=True, timeout=120)
    said = [line for line in done.stderr.splitlines() if "renderfarm" in line]
    assert (done.returncode, said) == (0, []), done.stderr
    service = next(text for name, text in made.files.items() if name.endswith(".service"))
    line = next(line for line in service.splitlines() if line.startswith("ExecStart="))
    words = shlex.split(line.removeprefix("ExecStart="))  # in double quotes both read \\ and \" alike
    assert words[:2] == ["/bin/sh", "-c"]
    assert argv(words[2].replace("%%", "%").replace("$$", "$"), tmp_path) == expected(str(nightly), today())


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
@pytest.mark.parametrize("at", ["15 2 * * *", "*/20 6-18 * * 1-5", "0 0 1,15 * *", "5 4 * 1-3 *", "0 12 * * 0,6", "30 */6 * * 7"])
def test_systemd_ticks_when_cron_would(at: str) -> None:
    begin = datetime(2026, 11, 27, 18, 30)
    cron = CronSim(at, begin)
    command = ["systemd-analyze", "calendar", "--iterations=5", "--base-time=2026-11-27 18:30:00 UTC", f"{on_calendar(at)} UTC"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120, env={**os.environ, "TZ": "UTC"}).stdout
    lines = [line.split(": ", 1)[1] for line in shown.splitlines() if "elapse:" in line or re.search(r"Iter\S* #", line)]
    assert [line[4:23] for line in lines] == [next(cron).strftime("%Y-%m-%d %H:%M:%S") for _ in range(5)]


# ------------------------------------------------------------------------------------------- Kubernetes


def documents(job: Path, kind: Kind, **changes: Any) -> list[dict[str, Any]]:
    text = next(iter(schedule(tick(job, image="registry/renderfarm:1", **changes), kind).files.values()))
    return list(yaml.safe_load_all(text))


def closed(schema: Any) -> Any:
    """A schema of a CRD, in which a field that is not named is an error, as for an API server that validates strictly."""
    if isinstance(schema, list):
        return [closed(inner) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: closed(value) for key, value in schema.items() if key not in ("x-kubernetes-validations",)}
    if found.pop("x-kubernetes-int-or-string", False):
        return {"type": ["integer", "string"]}
    if (
        isinstance(found.get("properties"), dict)
        and "additionalProperties" not in found
        and not found.get("x-kubernetes-preserve-unknown-fields")
    ):
        found["additionalProperties"] = False
    return found


def crd(name: str) -> dict[str, Any]:
    if KUBERAY is None:
        pytest.skip("no shared/data/kuberay beside this checkout: KubeRay's published schemas are not at hand")
    return dict(closed(json.loads((KUBERAY / f"{name}.v1.schema.json").read_text())["openAPIV3Schema"]))


def test_a_ray_cron_job_is_what_kuberay_publishes_and_gets_the_date_of_its_tick(nightly: Path, tmp_path: Path) -> None:
    config, manifest = documents(nightly, "raycronjob")
    schema = crd("raycronjobs")
    schema["properties"]["metadata"] = {"type": "object"}
    jsonschema.validate(manifest, schema)
    assert config["data"]["job.yaml"] == nightly.read_text()
    template = manifest["spec"]["jobTemplate"]
    assert template["entrypoint"] == "sh /jobs/run.sh"
    head = template["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    variable = next(one for one in head["env"] if one["name"] == "RENDERFARM_RAY_CLUSTER")
    assert variable["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.labels['ray.io/cluster']"
    name = manifest["metadata"]["name"]
    assert len(name) + len("-29772135-xxxxx") <= 53, "a RayCluster's name"
    minutes = int(datetime.fromisoformat("2026-11-28T23:59:00+00:00").timestamp()) // 60
    now = datetime.now(UTC).date().isoformat()
    for cluster, date in ((f"{name}-{minutes}-x2v5k", "2026-11-28"), (f"{name}-24567-x2v5k", now), ("", now)):
        words = argv(f"RENDERFARM_RAY_CLUSTER={cluster}\n{config['data']['run.sh']}", tmp_path)
        assert words == expected("/jobs/job.yaml", date, "--address", "auto")
    broken = {**manifest, "spec": {**manifest["spec"], "concurrencyPolicy": "Forbid"}}
    with pytest.raises(jsonschema.ValidationError, match="concurrencyPolicy"):
        jsonschema.validate(broken, schema)


def test_what_lies_beside_a_job_goes_with_it_and_secrets_are_named(nightly: Path) -> None:
    (nightly.parent / "wildcards").mkdir()
    (nightly.parent / "wildcards/colours.txt").write_text("red\n")
    nightly.write_text(nightly.read_text() + "prompts: {templates: combinatorial}\n")
    made = {"namespace": "renders", "secrets": ("store", "hub")}
    for kind, more in (("raycronjob", {}), ("cronjob", {"address": HEAD})):
        config, manifest = documents(nightly, kind, **made, **more)  # type: ignore[arg-type]
        assert {config["metadata"]["namespace"], manifest["metadata"]["namespace"]} == {"renders"}
        paths = re.findall(r"'path': '([^']+)'", str(manifest))
        assert {"job.yaml", "wildcards/colours.txt", "prompts.parquet"} <= set(paths)
        assert "{'secretRef': {'name': 'store'}}, {'secretRef': {'name': 'hub'}}" in str(manifest)


def test_a_tick_in_a_pod_is_the_run_that_the_same_job_is_where_it_was_written(
    nightly: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (nightly.parent / "wildcards").mkdir()
    nightly.write_text(nightly.read_text().replace(str(nightly.parent), ".") + "prompts: {templates: combinatorial}\n")
    here = load_job(nightly, None, None, "2026-11-28")
    assert here.output.path.startswith(str(nightly.parent))
    pod = tmp_path / "pod/jobs"
    pod.mkdir(parents=True)
    for kind, more in (("raycronjob", {}), ("cronjob", {"address": HEAD})):
        config, manifest = documents(nightly, kind, sets=(), **more)  # type: ignore[arg-type]
        (pod / "job.yaml").write_text(config["data"]["job.yaml"])
        (value,) = set(re.findall(r"'name': 'RENDERFARM_WRITTEN_IN', 'value': ('.*?'|\".*?\")\}", str(manifest)))
        there = load_job(pod / "job.yaml", None, None, "2026-11-28")
        assert there.key != here.key
        mounted, _, written = ast.literal_eval(value).partition(":")
        assert (mounted, written) == ("/jobs", str(nightly.parent))
        monkeypatch.setenv("RENDERFARM_WRITTEN_IN", f"{pod}:{written}")
        assert there.key == here.key != load_job(pod / "job.yaml", None, None, "2026-11-27").key
        monkeypatch.delenv("RENDERFARM_WRITTEN_IN")


def test_a_cron_jobs_pod_is_one_and_gets_the_date_of_its_tick(nightly: Path, tmp_path: Path) -> None:
    config, manifest = documents(nightly, "cronjob", address=HEAD)
    spec = manifest["spec"]
    assert (manifest["apiVersion"], manifest["kind"]) == ("batch/v1", "CronJob")
    assert (spec["concurrencyPolicy"], spec["schedule"], spec["timeZone"]) == ("Forbid", "15 2 * * *", "Etc/UTC")
    pod = spec["jobTemplate"]["spec"]["template"]
    jsonschema.validate(pod, crd("rayjobs")["properties"]["spec"]["properties"]["submitterPodTemplate"])  # a pod's template, whosever
    assert config["metadata"]["name"] == pod["spec"]["volumes"][0]["configMap"]["name"]
    shell, flag, script = pod["spec"]["containers"][0]["command"]
    assert (shell, flag) == ("sh", "-c")
    minutes = int(datetime.fromisoformat("2026-11-28T02:15:00+00:00").timestamp()) // 60
    words = argv(f"JOB_NAME=renderfarm-night-ly-1-{minutes}; {script}", tmp_path)
    assert words == [
        "submit", "/jobs/job.yaml", "--wait", *expected("", "2026-11-28")[2:4], "--address", HEAD, "--logical-date", "2026-11-28",
    ]  # fmt: skip
    by_hand = argv(f"JOB_NAME=by-hand; {script}", tmp_path)  # kubectl create job --from=cronjob/… by-hand
    assert by_hand[-1] == datetime.now(UTC).date().isoformat()


@pytest.mark.parametrize("kind", ["cronjob", "raycronjob"])
@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_kubectl_reads_the_manifests(kind: Kind, nightly: Path, tmp_path: Path) -> None:
    text = next(iter(schedule(tick(nightly, image="i", address=HEAD if kind == "cronjob" else None), kind).files.values()))
    (tmp_path / "manifest.yaml").write_text(text)
    command = ["kubectl", "patch", "--local", "-f", str(tmp_path / "manifest.yaml"), "--type=merge", "-p", "{}", "-o", "name"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 2


# ------------------------------------------------------------------------------------------- Airflow


def test_an_airflow_file_is_python_and_hands_over_airflows_date(nightly: Path, tmp_path: Path) -> None:
    sets = ('render.negative_prompt=50% of $HOME\'s "words" \\ `id` {% raw %} {# \U0001f600',)
    ((name, text),) = schedule(tick(nightly, sets=sets), "airflow").files.items()
    tree = ast.parse(text, name)
    call = next(node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "BashOperator")
    command = ast.literal_eval(next(keyword.value for keyword in call.keywords if keyword.arg == "bash_command"))
    as_airflow_does = jinja2.Template(command).render(ds="2026-11-28")
    assert argv(as_airflow_does, tmp_path) == ["run", str(nightly), "--set", *sets, "--logical-date", "2026-11-28"]
    assert name.isascii()
    assert name.removesuffix(".py").isidentifier()
    compile(tree, name, "exec")


# ------------------------------------------------------------------------------------------- what cannot be


@pytest.mark.parametrize(
    "at", ["15 2 * *", "61 * * * *", "* * * * mon", "5-1 * * * *", "*/0 * * * *", "3/2 * * * *", "@daily", "", "a b c d e"]
)
def test_a_time_that_cron_would_not_take_is_refused(at: str) -> None:
    with pytest.raises(InvalidJob, match="--at"):
        check_cron(at)


def test_what_a_scheduler_cannot_do_is_refused_with_what_it_can(nightly: Path) -> None:
    for kind in KINDS:
        for overlap in {"skip", "wait", "allow"} - set(OVERLAPS[kind]):
            with pytest.raises(InvalidJob, match=f"for {kind} give {' or '.join(OVERLAPS[kind])}"):
                schedule(tick(nightly), kind, overlap)  # type: ignore[arg-type]
    with pytest.raises(InvalidJob, match="give --image"):
        schedule(tick(nightly), "cronjob")
    with pytest.raises(InvalidJob, match="each tick has a cluster of its own"):
        schedule(tick(nightly, image="i", address=HEAD), "raycronjob")
    for kind in ("cron", "systemd"):
        with pytest.raises(InvalidJob, match="holds a line break"):
            schedule(tick(nightly, sets=('render.negative_prompt="a\n\nb"',)), kind)
    with pytest.raises(InvalidJob, match="either of the two days"):
        schedule(tick(nightly, at="0 0 1 * 1"), "systemd")


# ------------------------------------------------------------------------------------------- backfill, and what a tick is


def test_the_same_tick_is_one_run_and_another_date_or_parameter_another(nightly: Path) -> None:
    keys = {date: load_job(nightly, None, None, date).key for date in ("2026-11-27", "2026-11-28")}
    assert keys["2026-11-27"] != keys["2026-11-28"] == load_job(nightly, None, None, "2026-11-28").key
    assert load_job(nightly, ["seed=1"], None, "2026-11-28").key != keys["2026-11-28"]
    first = renderfarm.run(load_job(nightly, None, None, "2026-11-28"), engine="inline")
    again = renderfarm.run(load_job(nightly, None, None, "2026-11-28"), engine="inline")
    assert (first.new_images, again.new_images, again.out) == (8, 0, first.out)
    store, of_the_tick = open_store(first.out), (keys["2026-11-28"], "2026-11-28")
    ended = [commit.read_json(store, key) for key in store.list(commit.RUNS)]
    assert [(run["key"], run["logical_date"]) for run in ended] == [of_the_tick] * 2, "two goes at one run"
    assert [(run["key"], run["logical_date"]) for run in runs(renderfarm.open(first.out))] == [of_the_tick] * 2
    said = read_status(first.out)
    assert (said["run"], said["run key"], said["logical date"]) == (again.run_id, *of_the_tick)


def states(job: Path, dates: list[str], reprocess: Any = "missing") -> list[tuple[str, str | None]]:
    return [(day.state, day.action) for day in survey(job, dates, reprocess)]


def test_a_backfill_renders_what_is_missing_and_goes_on_with_what_was_begun(
    write_manifest: Write, write_job: Write, tmp_path: Path
) -> None:
    manifest = write_manifest({"prompt": ["good", "", "good"]})
    job = write_job(manifest, output={"path": str(tmp_path / "out/{{ ds }}"), "part_rows": 1})
    dates = days("2024-11-27", "2024-12-01", 2)
    assert dates == ["2024-11-27", "2024-11-29", "2024-12-01"]
    renderfarm.run(load_job(job, None, None, dates[0]), engine="inline")
    renderfarm.run(load_job(job, None, None, dates[1]), engine="inline")
    for lost in ("parts/part-00000002.*", "../data/part-00000002/metadata.parquet"):
        next((tmp_path / "out" / dates[1] / "_renderfarm").glob(lost)).unlink()
    assert states(job, dates) == [("failed", None), ("unfinished", "go on"), ("missing", "render")]
    assert states(job, dates, "failed")[0] == ("failed", "render what failed again")

    planned = survey(job, dates, "missing")
    assert [(done.date, done.summary.new_images) for done in backfill(job, planned, engine="inline")] == [(dates[1], 1), (dates[2], 2)]
    assert [state for state, _ in states(job, dates)] == ["failed"] * 3
    assert list(backfill(job, survey(job, dates, "missing"), engine="inline")) == []


def test_a_backfill_tries_again_what_failed(write_manifest: Write, write_job: Write, tmp_path: Path) -> None:
    manifest = write_manifest({"prompt": ["good", "[error] may succeed", ""]})
    job = write_job(manifest, output={"path": str(tmp_path / "out/{{ ds }}"), "part_rows": 1})
    dates = days("2024-11-28", "2024-11-28")
    renderfarm.run(load_job(job, None, None, dates[0]), engine="inline")

    def retried(reprocess: Any) -> list[str]:
        (done,) = backfill(job, survey(job, dates, reprocess), reprocess, engine="inline")
        assert done.summary.exit_code == 3
        return sorted(path.name for path in (tmp_path / "out" / dates[0] / "errors").glob("*.r*"))

    assert retried("failed") == ["part-00000001.r1.parquet"]
    assert retried("all") == ["part-00000001.r1.parquet", "part-00000001.r2.parquet", "part-00000002.r1.parquet"]


def test_a_backfill_of_all_mends_what_is_damaged_in_days_that_are_done(write_manifest: Write, write_job: Write, tmp_path: Path) -> None:
    job = write_job(write_manifest(), output={"path": str(tmp_path / "out/{{ ds }}")})
    dates = days("2024-11-28", "2024-11-28")
    renderfarm.run(load_job(job, None, None, dates[0]), engine="inline")
    picture = next((tmp_path / "out" / dates[0]).glob("data/part-00000000/*.png"))
    before = picture.read_bytes()
    picture.write_bytes(b"damaged")
    assert states(job, dates) == [("done", None)]
    assert states(job, dates, "all") == [("done", "check, and render again what is damaged")]
    (done,) = backfill(job, survey(job, dates, "all"), "all", engine="inline")
    assert (done.summary.exit_code, done.summary.new_images) == (0, 3)
    assert picture.read_bytes() == before


def test_days_that_are_no_days_and_days_that_share_an_output_are_refused(write_manifest: Write, write_job: Write) -> None:
    with pytest.raises(InvalidJob, match="write dates as YYYY-MM-DD"):
        days("2024-11-31", "2024-12-01")
    with pytest.raises(InvalidJob, match="the first day is behind the last one"):
        days("2024-12-02", "2024-12-01")
    with pytest.raises(InvalidJob, match="the limit is 10,000"):
        days("1900-01-01", "2024-12-01")
    with pytest.raises(InvalidJob, match=r"--to 9999-12-01: that day is yet to come; give 20\S+ at most"):
        days("2024-12-01", "9999-12-01")
    with pytest.raises(InvalidJob, match=r"put \{\{ ds \}\} into output\.path"):
        survey(write_job(write_manifest()), days("2024-11-27", "2024-11-28"), "missing")
