"""`renderfarm submit`: a job handed to a running Ray cluster through its Jobs API."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from renderfarm.config import Job
from renderfarm.errors import EXIT_INTERRUPTED, EXIT_OK, Fatal, InvalidJob
from renderfarm.parcel import JOB_FILE, Parcel, pack
from renderfarm.preparation import RUN_KEY

LOG_LINES = 20
SIGNALLED = 128  # shells' exit codes from here on mean a signal
MAX_SENT_BYTES = 256 << 20  # of a job's files; Ray keeps them in the head's memory, and refuses 500 MiB
ENTRYPOINT = f"python -m renderfarm run {JOB_FILE} --address auto"


def submission_id(job: Job) -> str:
    """The same job value is the same submission, so that a tick that fires twice attaches to the first."""
    return f"renderfarm-{job.name}-{job.key}"


def packed(job: Job) -> Parcel:
    """What is sent with it. Raises InvalidJob."""
    return pack(job, MAX_SENT_BYTES)


def environment(job: Job) -> dict[str, str]:
    """Of the driver on the cluster, where the job's paths are other ones, and so its own key is."""
    return {RUN_KEY: job.key}


def submit_job(job: Job, address: str) -> tuple[str, bool]:
    """Send the job with the files that its driver reads, and start `renderfarm run` on the cluster.

    Returns the submission id and whether it was new. A submission that is queued or running is attached to; one that
    has ended is replaced, which continues its output. What `packed(job).there` names must be reachable from the cluster.
    """
    from ray.job_submission import JobStatus

    id_ = submission_id(job)
    parcel = packed(job)
    with _asked(address, "cannot submit to") as client:
        if _is_there(client, id_):
            if client.get_job_status(id_) in (JobStatus.PENDING, JobStatus.RUNNING):
                return id_, False
            client.delete_job(id_)
    folder = Path(tempfile.mkdtemp(prefix="rf-submit-"))
    try:
        (folder / JOB_FILE).write_text(parcel.text, encoding="utf-8")
        for name, path in parcel.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)
        with _asked(address, "cannot submit to") as client:
            try:
                client.submit_job(
                    submission_id=id_,
                    entrypoint=ENTRYPOINT,
                    runtime_env={"working_dir": str(folder), "env_vars": environment(job)},
                    metadata={"renderfarm_job": job.name, "out": job.output.path, "key": job.key},
                )
            except RuntimeError:
                if _is_there(client, id_):  # a tick that fired twice: the other one was faster
                    return id_, False
                raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return id_, True


def _is_there(client: Any, id_: str) -> bool:
    return any(known.submission_id == id_ for known in client.list_jobs())


def check_address(address: str) -> None:
    """Raises Fatal where no head answers there, or it does not take this environment's token."""
    with _asked(address, "cannot use") as client:
        client.list_jobs()


@contextmanager
def _asked(address: str, what: str) -> Iterator[Any]:
    """A client of the head; what Ray says of a failure becomes one Fatal."""
    from ray.exceptions import RayError
    from ray.job_submission import JobSubmissionClient

    if not address.startswith(("http://", "https://")):  # Ray would take it for a cluster's own port, and wait
        raise InvalidJob(f"--address {address}: give the head's dashboard, http://HOST:8265")
    try:
        yield JobSubmissionClient(address)
    except (RayError, ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise Fatal(f"{what} {address}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    from ray.exceptions import AuthenticationError

    text = str(error).strip()
    first = text.splitlines()[0] if text else type(error).__name__
    if isinstance(error, AuthenticationError):
        return f"{first}; the head wants its token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, as on the head"
    return f"{first}; is a Ray head with its dashboard running there?"


# ------------------------------------------------------------------------------------------- of what was submitted


@dataclass(frozen=True)
class Ended:
    """How a submission has ended. `status`: Ray's word (SUCCEEDED, FAILED, STOPPED), or KubeRay's; `exit_code`: of its `renderfarm run`,
    75 where something killed it; `log_tail`: the last lines that it wrote."""

    status: str
    exit_code: int
    log_tail: str


def wait_for(id_: str, address: str, poll_s: float = 1.0) -> Ended:
    """Wait until the submission has ended. Raises Fatal where the head is lost sight of."""
    with _asked(address, f"lost sight of {id_}; the same command attaches to it again:") as client:
        while not (status := client.get_job_status(id_)).is_terminal():
            time.sleep(poll_s)
        tail = last_lines(client.get_job_logs(id_))
        code = client.get_job_info(id_).driver_exit_code
    if status.value == "SUCCEEDED":
        return Ended(status.value, EXIT_OK, tail)
    # none, or a signal's number: what would have gone on was ended from outside
    return Ended(str(status.value), code if code and 0 < code < SIGNALLED else EXIT_INTERRUPTED, tail)


def last_lines(text: str) -> str:
    return "\n".join(text.splitlines()[-LOG_LINES:])


def status(job: Job, address: str) -> str:
    """Ray's word for how far the submission is. Raises InvalidJob where there is none."""
    with _known(job, address) as (client, id_):
        return str(client.get_job_status(id_).value)


def logs(job: Job, address: str) -> str:
    """What its driver wrote so far. Raises InvalidJob where there is none."""
    with _known(job, address) as (client, id_):
        return str(client.get_job_logs(id_))


def stop(job: Job, address: str) -> None:
    """Ray ends the driver within seconds, and the workers with it; what is committed stays. Raises InvalidJob where none is at work."""
    with _known(job, address) as (client, id_):
        if (status := client.get_job_status(id_)).is_terminal():
            said = f"{id_} has ended ({status.value.lower()})"
            raise InvalidJob(f"{said}, so there is nothing to stop; the same submission again continues")
        client.stop_job(id_)


@contextmanager
def _known(job: Job, address: str) -> Iterator[tuple[Any, str]]:
    id_ = submission_id(job)
    with _asked(address, "cannot ask") as client:
        if not _is_there(client, id_):
            raise InvalidJob(
                f"no submission {id_} at {address}: nothing was submitted there, or the job, its parameters or its date were others"
            )
        yield client, id_
