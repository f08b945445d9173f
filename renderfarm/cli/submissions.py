"""The command that hands a job to a cluster, and asks what became of it: submit."""

from __future__ import annotations

import logging
import shlex
import threading
from enum import StrEnum
from functools import partial
from typing import Annotated, Any

import typer

from renderfarm.cli.common import (
    AsJson,
    JobFile,
    LogicalDate,
    Out,
    Sets,
    app,
    console,
    out_console,
    print_json,
    print_next,
    shown_path,
    shown_value,
    typed,
)
from renderfarm.errors import InvalidJob

command = partial(app.command, rich_help_panel="Jobs")
LOOK_S = 3.0


class ToChoice(StrEnum):
    ray = "ray"
    kuberay = "kuberay"


@command()
def submit(
    job: JobFile,
    to: Annotated[ToChoice, typer.Option("--to", help="A running Ray cluster; or KubeRay, which makes one for the job.")] = ToChoice.ray,
    address: Annotated[str | None, typer.Option(help="ray: the head's dashboard, http://HOST:8265.", show_default=False)] = None,
    image: Annotated[str | None, typer.Option(help="kuberay: a container image with renderfarm in it.", show_default=False)] = None,
    namespace: Annotated[str | None, typer.Option(help="kuberay: of Kubernetes. [default: kubectl's]", show_default=False)] = None,
    secrets: Annotated[
        list[str] | None, typer.Option("--secret", help="kuberay: a Kubernetes secret, for the pods' environment. May be repeated.")
    ] = None,
    sets: Sets = None,
    out: Out = None,
    logical_date: LogicalDate = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be submitted, and submit nothing.")] = False,
    wait: Annotated[bool, typer.Option(help="Wait for the end, and exit as the job's own `run` did.")] = False,
    status: Annotated[bool, typer.Option("--status", help="Of this job's submission: how far it is.")] = False,
    logs: Annotated[bool, typer.Option("--logs", help="Of this job's submission: what its driver has written.")] = False,
    stop: Annotated[bool, typer.Option("--stop", help="End this job's submission at once; what is committed stays.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run a job on a cluster. The same job, parameters and date are one submission: while it runs it is attached to, then continued."""
    from renderfarm.jobfile import load_job

    _check_options(to, address, image, wait=wait, asked=[dry_run, status, logs, stop], of_kuberay=bool(namespace or secrets))
    loaded = load_job(job, sets, out, logical_date)
    where = _Ray(address or "") if to is ToChoice.ray else _KubeRay(image or "", namespace, tuple(secrets or ()))
    if status or logs or stop:
        _ask(where, loaded, "status" if status else "logs" if logs else "stop", as_json)
        return
    if dry_run:
        found = where.dry_run(loaded)
        if as_json:
            print_json(found)
        else:
            out_console.out(found["text"], highlight=False, end="")
            _print_notes(found["notes"])
        return
    before = _last_run(loaded.output.path)  # which may be all that is to be seen there for a while
    id_, new, notes = where.submit(loaded)
    before = before if new else None
    ended = where.wait(loaded, before) if wait else None
    if as_json:
        how = vars(ended) if ended else {"status": None, "log_tail": None}
        print_json({"submission_id": id_, "new": new, **how, "out": loaded.output.path, "after": before, "notes": notes})
    else:
        out_console.print(f"{'submitted' if new else 'already running, attached'}: {id_}", markup=False)
        _print_notes(notes)
        if ended:
            out_console.print(f"ended: {ended.status}")
            if ended.exit_code:
                out_console.print(shown_value(ended.log_tail), markup=False)
        again = shlex.join(["submit", str(job), *where.options(), *typed(sets, logical_date), *(["--out", out] if out else [])])
        folder = shlex.quote(shown_path(loaded.output.path))
        watch = shlex.join(["watch", shown_path(loaded.output.path), *(["--after", before] if before else []), *where.patience])
        print_next(*([f"status {folder}", f"{again} --logs"] if ended else [watch, f"{again} --logs", f"{again} --stop"]))
    if ended:
        raise typer.Exit(ended.exit_code)


def _last_run(out: str) -> str | None:
    """None where it cannot be known soon, and without a word: this machine need not be one that reads the output."""
    from renderfarm.waiting import last_run

    logging.getLogger("azure").setLevel(logging.CRITICAL)
    found: list[str | None] = []
    looking = threading.Thread(target=lambda: found.append(last_run(out)), daemon=True)
    looking.start()
    looking.join(LOOK_S)
    return found[0] if found else None


def _check_options(to: ToChoice, address: str | None, image: str | None, *, wait: bool, asked: list[bool], of_kuberay: bool) -> None:
    dry_run, *about = asked
    if sum(asked) > 1 or (wait and any(asked)):
        raise InvalidJob("--dry-run, --status, --logs, --stop and --wait: give one of them")
    if to is ToChoice.ray:
        if image or of_kuberay:
            raise InvalidJob("--image, --namespace and --secret are for --to kuberay; leave them out")
        if address is None and not dry_run:
            raise InvalidJob("--address: give the Ray head's dashboard, http://HOST:8265")
        return
    if address is not None:
        raise InvalidJob("--address: KubeRay makes a cluster for the job; leave it out, or give --to ray")
    if image is None and not any(about):
        raise InvalidJob("--image: give a container image with renderfarm in it (jobs/Dockerfile makes one)")


class _Ray:
    """Ray Jobs at one head."""

    patience: tuple[str, ...] = ()

    def __init__(self, address: str) -> None:
        self.address = address

    def options(self) -> list[str]:
        return ["--address", self.address]

    def submit(self, job: Any) -> tuple[str, bool, list[str]]:
        from renderfarm.submit import packed, submit_job

        return (*submit_job(job, self.address), packed(job).notes())

    def wait(self, job: Any, before: str | None) -> Any:
        from renderfarm.submit import submission_id, wait_for

        return wait_for(submission_id(job), self.address)

    def dry_run(self, job: Any) -> dict[str, Any]:
        from renderfarm.submit import ENTRYPOINT, environment, packed, submission_id

        parcel = packed(job)
        sent = {"entrypoint": ENTRYPOINT, "env_vars": environment(job), "files": {name: str(path) for name, path in parcel.files.items()}}
        lines = [f"# {name}: {value}" for name, value in {"submission_id": submission_id(job), **sent}.items()]
        return {"submission_id": submission_id(job), **sent, "text": "\n".join([*lines, parcel.text]), "notes": parcel.notes()}

    def ask(self, job: Any, what: str) -> str | None:
        from renderfarm import submit

        asked: str | None = {"status": submit.status, "logs": submit.logs, "stop": submit.stop}[what](job, self.address)
        return asked

    def name(self, job: Any) -> str:
        from renderfarm.submit import submission_id

        return submission_id(job)


class _KubeRay:
    """KubeRay, by kubectl."""

    patience = ("--begins-within", "30m")  # machines come for the job

    def __init__(self, image: str, namespace: str | None, secrets: tuple[str, ...]) -> None:
        self.image, self.namespace, self.secrets = image, namespace, secrets

    def options(self) -> list[str]:
        return ["--to", "kuberay", *(["--namespace", self.namespace] if self.namespace else [])]

    def submit(self, job: Any) -> tuple[str, bool, list[str]]:
        from renderfarm.kuberay import apply

        made = self._manifest(job)
        return made.name, apply(made), made.notes

    def wait(self, job: Any, before: str | None) -> Any:
        from renderfarm.kuberay import wait_for

        return wait_for(job, self.namespace, before)

    def dry_run(self, job: Any) -> dict[str, Any]:
        made = self._manifest(job)
        return {"submission_id": made.name, "text": made.text, "notes": made.notes}

    def _manifest(self, job: Any) -> Any:
        from renderfarm.kuberay import manifest
        from renderfarm.kubernetes import Pods

        return manifest(job, Pods(self.image, self.namespace, self.secrets))

    def ask(self, job: Any, what: str) -> str | None:
        from renderfarm import kuberay

        asked: str | None = {"status": kuberay.status, "logs": kuberay.logs, "stop": kuberay.stop}[what](job, self.namespace)
        return asked

    def name(self, job: Any) -> str:
        from renderfarm.kuberay import name_of

        return name_of(job)


def _ask(where: _Ray | _KubeRay, job: Any, what: str, as_json: bool) -> None:
    found = where.ask(job, what)
    if as_json:
        print_json({"submission_id": where.name(job), what: "told" if what == "stop" else found, "out": job.output.path})
    elif what == "logs":
        out_console.print(shown_value((found or "").rstrip("\n")), markup=False)
    elif what == "stop":
        out_console.print(f"told to stop: {where.name(job)}; the same submission again continues", markup=False)
    else:
        out_console.print(f"{where.name(job)}: {str(found).lower()}", markup=False)


def _print_notes(notes: list[str]) -> None:
    for note in notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
