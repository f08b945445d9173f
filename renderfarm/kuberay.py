"""`renderfarm submit --to kuberay`: a RayJob, which KubeRay gives a cluster of its own, and what becomes of it, through kubectl.

Its name ends in the hash of the job, its parameters and its date: the same tick is one RayJob. One that has ended is replaced, which goes
on with its output.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import time
from dataclasses import dataclass

from renderfarm.config import Job
from renderfarm.errors import EXIT_INTERRUPTED, EXIT_OK, Fatal, InvalidJob
from renderfarm.kubernetes import (
    APPLY,
    MAX_FILES_BYTES,
    MAX_NAME,
    MOUNT,
    Files,
    Pods,
    checked,
    kubernetes_name,
    ray_job,
    remarks,
    to_yaml,
)
from renderfarm.parcel import JOB_FILE, Parcel, pack
from renderfarm.preparation import RUN_KEY
from renderfarm.submit import Ended, last_lines, submission_id
from renderfarm.waiting import Begins, look

KUBECTL_S = 60
POLLS = 5  # without an answer, one after the other
ENDED = ("Complete", "Failed", "ValidationFailed")


@dataclass(frozen=True)
class Manifest:
    """`text`: YAML of a ConfigMap and a RayJob of that name. `notes`: what somebody must have seen to."""

    name: str
    namespace: str | None
    text: str
    parcel: Parcel

    @property
    def notes(self) -> list[str]:
        of_pods = {
            "on every node": f"in the pods (a volume, the image; {MOUNT} is the job's)",
            "must be set there": "must be in the pods' environment (--secret)",
        }
        notes = self.parcel.notes()
        for words, here in of_pods.items():
            notes = [note.replace(words, here) for note in notes]
        return notes


def manifest(job: Job, pods: Pods) -> Manifest:
    """Raises InvalidJob for what pods cannot be given."""
    parcel, name = pack(job, MAX_FILES_BYTES - len(job.model_dump_json().encode())), name_of(job)
    files = Files(name, {JOB_FILE: parcel.text.encode(), **{name: path.read_bytes() for name, path in parcel.files.items()}})
    entrypoint = f"renderfarm run {MOUNT}/{JOB_FILE} --address auto"
    spec = {"jobId": submission_id(job), **ray_job(job, checked(pods), files, entrypoint, {RUN_KEY: job.key})}
    document = {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": pods.metadata(name), "spec": spec}
    made = Manifest(name, pods.namespace, to_yaml(files.config_map(pods), document), parcel)
    date = f" of {job.logical_date}" if job.logical_date else ""
    how = " ".join(("kubectl", *APPLY, "-f", "THIS FILE"))
    heading = remarks(f"renderfarm job {job.name}{date}, for KubeRay 1.5 or later: {how}", *made.notes)
    return Manifest(name, pods.namespace, heading + made.text, parcel)


def name_of(job: Job) -> str:
    """As KubeRay takes it, and another for each job, parameters and date."""
    return f"{kubernetes_name(job.name, MAX_NAME - len(job.key) - 1)}-{job.key}"


def apply(made: Manifest) -> bool:
    """Whether it is new; one that is at work is left alone. Raises InvalidJob for an output that no pod could write, Fatal where kubectl
    fails."""
    if (out := made.parcel.there.get("output.path")) is not None:
        raise InvalidJob(
            f"output.path: {out} is a folder of this machine, and pods do not see it: give a store (--out s3://bucket/folder); or "
            "print the manifest with --dry-run, and put a volume that has it into that"
        )
    ended = _status(made.name, made.namespace)
    if ended is not None and ended not in ENDED:
        return False
    if ended is not None:
        _kubectl("delete", "rayjob", made.name, "--wait", namespace=made.namespace)
    _kubectl(*APPLY, "-f", "-", namespace=made.namespace, given=made.text)
    return True


def wait_for(job: Job, namespace: str | None, after: str | None, poll_s: float = 5.0) -> Ended:
    """Wait until KubeRay says that it has ended, with the pods that it makes anew. `after`: the output's run before it. The exit code is
    the one that its run left in the output; 75 where that cannot be read, or says nothing of it."""
    name = name_of(job)
    failed = 0
    while True:
        try:
            if (status := _status(name, namespace)) is None or status in ENDED:
                break
            failed = 0
        except Fatal as error:  # an API server may be away for a moment
            failed += 1
            if failed == POLLS:
                raise Fatal(f"lost sight of {name}; the same command attaches to it again: {error}") from error
        time.sleep(poll_s)
    if status is None:
        return Ended("DELETED", EXIT_INTERRUPTED, "")
    said = ""
    with contextlib.suppress(Fatal):  # its pod may be gone
        said = last_lines(_kubectl("logs", f"job/{name}", namespace=namespace))
    code = EXIT_OK if status == "Complete" else look(job.output.path, Begins(after)).exit_code or EXIT_INTERRUPTED
    return Ended(status.upper(), code, said)


def status(job: Job, namespace: str | None) -> str:
    """KubeRay's words for how far it is. Raises InvalidJob where there is none."""
    found = _status(name_of(job), namespace)
    if found is None:
        raise InvalidJob(f"no RayJob {name_of(job)}: nothing was submitted there, or the job, its parameters or its date were others")
    return found


def logs(job: Job, namespace: str | None) -> str:
    """What its driver wrote; the submitter, a Job of the same name, has it."""
    status(job, namespace)
    return _kubectl("logs", f"job/{name_of(job)}", namespace=namespace)


def stop(job: Job, namespace: str | None) -> None:
    """Its cluster and its files there go with it; what is committed stays."""
    status(job, namespace)
    _kubectl("delete", f"rayjob/{name_of(job)}", f"configmap/{name_of(job)}", "--ignore-not-found", "--wait=false", namespace=namespace)


def _status(name: str, namespace: str | None) -> str | None:
    """None: there is no such RayJob."""
    text = _kubectl("get", "rayjob", name, "--ignore-not-found", "-o", "json", namespace=namespace)
    if not text.strip():
        return None
    try:
        return str(json.loads(text).get("status", {}).get("jobDeploymentStatus") or "New")
    except (ValueError, AttributeError) as error:
        raise Fatal(f"kubectl get rayjob {name}: its answer is no object of Kubernetes") from error


def _kubectl(*words: str, namespace: str | None, given: str | None = None) -> str:
    """What it prints. Raises Fatal with what it says."""
    if (program := shutil.which("kubectl")) is None:
        raise InvalidJob(
            "kubectl is not on this machine: print the manifest (--dry-run > rayjob.yaml), and apply it where kubectl is: kubectl "
            f"{' '.join(APPLY)} -f rayjob.yaml"
        )
    command = [program, *words, *(["--namespace", namespace] if namespace else [])]
    try:
        done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=KUBECTL_S)  # noqa: S603 - words of ours
    except subprocess.TimeoutExpired:
        raise Fatal(f"kubectl {words[0]}: no answer in {KUBECTL_S} s; does `kubectl cluster-info` reach the cluster?") from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip()
        raise Fatal(f"kubectl {words[0]}: {said.splitlines()[-1] if said else 'failed'}; does `kubectl get rayjobs` work here?")
    return done.stdout
