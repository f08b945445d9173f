"""`renderfarm doctor`: whether this machine, and what a job names, are as a run needs them. Renders nothing; leaves nothing behind."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from renderfarm.config import Job
from renderfarm.errors import RenderfarmError

SHARED_MEMORY = "/dev/shm"  # noqa: S108 - looked at, not written to
OBJECT_STORE = 256 << 20  # bytes: as much as a run's own Ray asks for in shared memory
LONGEST_TEMPORARY = 60  # characters: Ray's sockets lie below it, and a socket's path has at most 107
ROOM = 1 << 30  # bytes for Ray's logs and for parts until they are committed
ANSWER_S = 5.0


@dataclass(frozen=True)
class Finding:
    """A line. `wrong`: a run would fail; `note`: it would not, and yet somebody should know. Both say what to do,
    in `fix` or, where it is a run's own message, in `said`."""

    what: str
    state: Literal["ok", "note", "wrong"]
    said: str
    fix: str = ""


def examine(job: Job | None = None, address: str | None = None) -> Iterator[Finding]:
    """Each line as soon as it is known. `job`: what it names, too; `address`: of a Ray cluster, as `run` or `submit` take it."""
    yield from _python()
    yield from _packages()
    yield from (devices := list(_trying("accelerator", lambda: _accelerator(job))))
    yield from _shared_memory()
    yield from _temporary_folder()
    if job is not None:
        yield from _trying("model", lambda: _model(job))
        if all(found.state != "wrong" for found in devices):
            yield from _trying("memory", lambda: _memory(job))
        yield from _trying("output", lambda: _output(job))
    if address is not None:
        yield from _trying("Ray", lambda: _ray(address))


def _trying(what: str, check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """What a check raises is what a run would raise, and says what to do."""
    try:
        yield from check()
    except RenderfarmError as error:
        yield Finding(what, "wrong", str(error))


# ------------------------------------------------------------------------------------------------------- this machine


def _python() -> Iterator[Finding]:
    yield Finding("Python", "ok", f"{platform.python_version()}, {platform.platform()}")  # an older one does not install this package


def _packages() -> Iterator[Finding]:
    """Against the ranges that the installed package asks for; extras are asked for by whoever needs them."""
    from packaging.requirements import Requirement

    wrong = []
    needed = [Requirement(line) for line in importlib.metadata.requires("renderfarm") or []]
    for one in (one for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})):
        try:
            version = importlib.metadata.version(one.name)
        except importlib.metadata.PackageNotFoundError:
            version = None
        if version is None or not one.specifier.contains(version, prereleases=True):
            wrong.append((f"{one.name} is {version or 'missing'}", f"'{one.name}{one.specifier}'"))
    if wrong:
        fix = f"{sys.executable} -m pip install {' '.join(ask for _, ask in wrong)}"
        yield Finding("packages", "wrong", ", ".join(said for said, _ in wrong), fix)
        return
    from renderfarm.models.families import compared

    names = ("torch", "diffusers", "transformers")
    here = {name: importlib.metadata.version(name).partition("+")[0] for name in names}
    tested = [{name: record[name] for name in names} for record in compared()]
    shown = ", ".join(f"{name} {version}" for name, version in here.items())
    if here in tested:
        yield Finding("packages", "ok", f"{shown}: the versions whose pixels were compared with diffusers'")
    else:
        known = " or ".join(", ".join(f"{name} {version}" for name, version in one.items()) for one in tested)
        yield Finding("packages", "note", f"{shown}: not compared with diffusers' own pixels", f"to have what was compared: {known}")


def _accelerator(job: Job | None) -> Iterator[Finding]:
    from renderfarm.models.torch_setup import find_device, name_devices

    driver = Path("/proc/driver/nvidia/version")
    names = name_devices()
    if job is not None:
        find_device(job.workers)
    if names:
        said = driver.read_text().splitlines()[0].partition("Kernel Module")[2].split() if driver.exists() else []
        yield Finding("accelerator", "ok", ", ".join(names) + (f"; driver {said[0]}" if said else ""))
    elif driver.exists() or shutil.which("nvidia-smi"):
        fix = "install torch's build for your CUDA (https://pytorch.org/get-started/locally/), or update the driver"
        yield Finding("accelerator", "wrong", "an NVIDIA driver is here, and torch sees no GPU", fix)
    else:
        cores = os.cpu_count() or 1
        yield Finding("accelerator", "note", f"none; jobs render on {cores} CPU cores", "fine for small models; real ones want a GPU")


def _shared_memory() -> Iterator[Finding]:
    if not os.path.isdir(SHARED_MEMORY):
        return
    free = shutil.disk_usage(SHARED_MEMORY).free
    if free < OBJECT_STORE:
        fix = "start the container with --shm-size=1g (in Kubernetes: an emptyDir with medium: Memory at /dev/shm)"
        yield Finding(SHARED_MEMORY, "note", f"{_size(free)} free, and Ray wants {_size(OBJECT_STORE)}: it goes on, slower, on disk", fix)
    else:
        yield Finding(SHARED_MEMORY, "ok", f"{_size(free)} free")


def _temporary_folder() -> Iterator[Finding]:
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    if len(folder) > LONGEST_TEMPORARY:
        yield Finding("temporary folder", "wrong", f"{folder} is too long a name for Ray's sockets", "set TMPDIR to a shorter one")
    elif free < ROOM:
        yield Finding("temporary folder", "wrong", f"{folder}: {_size(free)} free", "free some space, or name another folder by TMPDIR")
    else:
        yield Finding("temporary folder", "ok", f"{folder}: {_size(free)} free")


# ---------------------------------------------------------------------------------------------------- what a job names


def _model(job: Job) -> Iterator[Finding]:
    from renderfarm.models.catalog import describe

    info = describe(job.model)
    for warning in info.warnings:
        yield Finding("model", "note", info.name, warning)
    if not info.warnings:
        yield Finding("model", "ok", f"{info.name}: {info.pipeline_class or 'builtin'}")


def _memory(job: Job) -> Iterator[Finding]:
    """Of the weights alone; what a batch needs beside them only rendering tells."""
    from renderfarm.models.torch_setup import free_memory
    from renderfarm.needs import held_at_once, parts_of, workers_of_a_device
    from renderfarm.preparation import prepare

    device, free = free_memory(job.workers)
    prepared = prepare(job)
    if free is None or prepared.model.folder is None:
        return
    each, _ = held_at_once(parts_of(prepared), prepared)
    here = job.workers.max if device == "cpu" else workers_of_a_device(job)
    said = f"{_size(each)} of weights for each of {here} workers on one {device}, {_size(free)} free"
    if each * here > free:
        fix = "fewer workers, workers.dtype: bfloat16, workers.offload on an accelerator, or a larger machine"
        yield Finding("memory", "wrong", said, fix)
    else:
        yield Finding("memory", "ok", said)


def _output(job: Job) -> Iterator[Finding]:
    from renderfarm.storage import LocalStore, open_store, probe

    store = open_store(job.output.path, single_writer=job.output.single_writer, patience_s=ANSWER_S)
    if job.output.single_writer:
        yield Finding("output", "ok", f"{store.url}: not probed, since output.single_writer is set")
        return
    made = _first_new_folder(store.root) if isinstance(store, LocalStore) else None
    try:
        probe(store)
    finally:
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)  # nothing but the probe's own folders
    yield Finding("output", "ok", f"{store.url}: can be written, and creates nothing twice")


def _first_new_folder(folder: Path) -> Path | None:
    """The topmost folder that has to be made for this one."""
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    return missing[-1] if missing else None


def _ray(address: str) -> Iterator[Finding]:
    url = urlsplit(address if "://" in address else f"ray://{address}")
    if address == "auto" or url.hostname is None:
        yield Finding("Ray", "note", address, "only a machine of the cluster can tell; give http://HOST:8265 to look from elsewhere")
        return
    port = url.port or {"http": 8265, "https": 443}.get(url.scheme, 10001)
    try:
        socket.create_connection((url.hostname, port), ANSWER_S).close()
    except OSError as error:
        fix = "start the head (ray start --head), open that port, or correct the address"
        yield Finding("Ray", "wrong", f"nobody answers at {url.hostname}:{port} ({error.strerror or error})", fix)
        return
    if url.scheme in ("http", "https"):
        from renderfarm.submit import check_address

        check_address(address)
    yield Finding("Ray", "ok", f"{url.hostname}:{port} answers" + (", and takes jobs" if url.scheme in ("http", "https") else ""))


def _size(number: float) -> str:
    return f"{number / 2**30:.1f} GiB"
