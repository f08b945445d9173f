"""Kubernetes' objects, as values and as YAML: the pods of a Ray cluster that renders a job, and the files that they are given.

Secrets are named and never held: pods take what `Pods.secrets` hold into their environment (`envFrom`); Ray's token KubeRay makes.
"""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import yaml

from renderfarm.config import Job, Workers
from renderfarm.errors import InvalidJob

MOUNT = "/jobs"
MAX_FILES_BYTES = 700_000  # a ConfigMap ends at 1 MiB, and what is no text grows by a third
# by the client, kubectl would keep a copy of each object in one of its annotations, which may hold 256 KiB
APPLY = ("apply", "--server-side")
CLUSTER_VARIABLE = "RENDERFARM_RAY_CLUSTER"  # the RayCluster's name: KubeRay makes it of the RayJob's, and that of a RayCronJob's tick
TOKEN = {"name": "RAY_AUTH_MODE", "value": "token"}
MAX_NAME = 47  # of a RayJob: KubeRay adds six characters, and services more
GPU = "nvidia.com/gpu"
# Taints by which nodes say that they may be taken away, or have GPUs; a toleration asks for neither
SPOT_TAINTS = (("cloud.google.com/gke-spot", "true"), ("kubernetes.azure.com/scalesetpriority", "spot"))


@dataclass(frozen=True)
class Pods:
    """What the pods are made of. `image`: with renderfarm and Ray in it; `secrets`: whose keys become variables of their environment."""

    image: str
    namespace: str | None = None
    secrets: tuple[str, ...] = ()

    def metadata(self, name: str) -> dict[str, Any]:
        return {"name": name, **({"namespace": self.namespace} if self.namespace else {})}

    def environment(self, *variables: dict[str, Any]) -> dict[str, Any]:
        """Of a container: its fields `env` and `envFrom`."""
        references = [{"secretRef": {"name": secret}} for secret in self.secrets]
        return {**({"env": list(variables)} if variables else {}), **({"envFrom": references} if references else {})}


def checked(pods: Pods) -> Pods:
    """Raises InvalidJob for names that Kubernetes would not take, before anything is sent there."""
    for option, names in (("--namespace", (pods.namespace,) if pods.namespace else ()), ("--secret", pods.secrets)):
        for name in names:
            if not re.fullmatch(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?", name):
                raise InvalidJob(
                    f"{option} {name!r} is no name of Kubernetes: lower-case letters, digits and dashes; never a secret's value"
                )
    if not pods.image.strip() or any(sign.isspace() for sign in pods.image):
        raise InvalidJob(f"--image {pods.image!r}: give an image with renderfarm in it, for example registry.example.org/renderfarm:1")
    return pods


def kubernetes_name(text: str, room: int) -> str:
    """`renderfarm-` and what is left of a text, so long at most: a DNS label that begins with a letter."""
    return f"renderfarm-{re.sub(r'[^a-z0-9]+', '-', text.lower()).strip('-')}"[:room].rstrip("-")


# ------------------------------------------------------------------------------------------------ files


@dataclass(frozen=True)
class Files:
    """Files that pods find below MOUNT, by their paths there, in a ConfigMap of that name."""

    name: str
    data: Mapping[str, bytes]

    @property
    def keys(self) -> dict[str, str]:
        """A ConfigMap knows no folders, so what lies in one gets a number for a name."""
        return {path: path if re.fullmatch(r"[\w.-]+", path) else f"file-{number}" for number, path in enumerate(self.data)}

    def config_map(self, pods: Pods) -> dict[str, Any]:
        """Raises InvalidJob for more than it may hold."""
        if (size := sum(map(len, self.data.values()))) > MAX_FILES_BYTES:
            raise InvalidJob(
                f"the job's files have {size:,} bytes, and a ConfigMap holds {MAX_FILES_BYTES:,}: put the manifest into a store (s3://…)"
            )
        texts, others = {}, {}
        for path, key in self.keys.items():
            try:
                texts[key] = self.data[path].decode()
            except UnicodeDecodeError:
                others[key] = base64.b64encode(self.data[path]).decode()
        binary = {"binaryData": others} if others else {}
        return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": pods.metadata(self.name), "data": texts, **binary}

    def volume(self) -> dict[str, Any]:
        items = [{"key": key, "path": path} for path, key in self.keys.items()]
        named = any(item["key"] != item["path"] for item in items)
        return {"name": "job", "configMap": {"name": self.name, **({"items": items} if named else {})}}


# ------------------------------------------------------------------------------------------------ a Ray cluster of its own


def ray_job(job: Job, pods: Pods, files: Files, entrypoint: str, variables: Mapping[str, str] | None = None) -> dict[str, Any]:
    """A RayJob's spec: a cluster that comes for the job, grows with it to `workers.max`, and goes with it.

    `entrypoint`: plain words, which two shells read. `variables`: of the driver's environment.
    """
    given = [{"name": name, "value": value} for name, value in (variables or {}).items()]
    cluster_name = {"name": CLUSTER_VARIABLE, "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['ray.io/cluster']"}}}
    head = _pod(pods, files, "ray-head", {"cpu": "2", "memory": "8Gi"}, [TOKEN, cluster_name, *given])
    return {
        "entrypoint": entrypoint,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": 600,  # for who wants to look
        "backoffLimit": 2,  # a cluster whose head was lost: the next one goes on with the output
        "rayClusterSpec": {
            "rayVersion": version("ray"),  # without it, KubeRay turns no tokens on
            "authOptions": {"mode": "token"},
            "enableInTreeAutoscaling": True,
            # the head is the driver's: no worker there, and on no node that may be taken away
            "headGroupSpec": {"rayStartParams": {"num-cpus": "0"}, "template": head},
            "workerGroupSpecs": [_worker_group(job.workers, pods, files)],
        },
    }


def _worker_group(workers: Workers, pods: Pods, files: Files) -> dict[str, Any]:
    """One worker a pod; of those that share a GPU, so many as share it."""
    on_cpu, devices = workers.device == "cpu", workers.devices_per_worker
    a_pod = 1 if on_cpu or devices >= 1 else int(1 / devices)
    cpus = workers.threads if on_cpu else a_pod
    limits = {"cpu": str(cpus + 1 if on_cpu else max(4, cpus)), "memory": "16Gi", **({} if on_cpu else {GPU: str(math.ceil(devices))})}
    least, most = (math.ceil(number / a_pod) for number in (workers.min, workers.max))
    template = _pod(pods, files, "ray-worker", limits, [TOKEN])
    spot = [{"key": key, "operator": "Equal", "value": value, "effect": "NoSchedule"} for key, value in SPOT_TAINTS]
    with_gpu = [] if on_cpu else [{"key": GPU, "operator": "Exists", "effect": "NoSchedule"}]
    template["spec"]["tolerations"] = [*with_gpu, *spot]
    params = {"num-cpus": str(cpus)} if on_cpu else {}  # what encodes beside it is none of Ray's
    replicas = {"replicas": least, "minReplicas": least, "maxReplicas": most}
    return {"groupName": "cpu" if on_cpu else "gpu", **replicas, "rayStartParams": params, "template": template}


def _pod(pods: Pods, files: Files, name: str, limits: dict[str, str], variables: list[dict[str, Any]]) -> dict[str, Any]:
    container = {
        "name": name,
        "image": pods.image,
        "resources": {"limits": limits, "requests": limits},
        **pods.environment(*variables),
        "volumeMounts": [{"name": "job", "mountPath": MOUNT}],
    }
    return {"spec": {"containers": [container], "volumes": [files.volume()]}}


# ------------------------------------------------------------------------------------------------ YAML


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as they are, and no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    style = '"' if "\x85" in text else "|" if "\n" in text else None  # to a reader of YAML a bare NEL is a line's end
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def to_yaml(*documents: dict[str, Any]) -> str:
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)


def remarks(*lines: str) -> str:
    """Of each text a line, whatever is in it."""
    return "".join(f"# {' '.join(line.splitlines())}\n" for line in lines)
