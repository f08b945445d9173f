"""`renderfarm submit`: a job handed to a running Ray cluster through its Jobs API."""

from __future__ import annotations

import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from ray.exceptions import AuthenticationError, RayError

from renderfarm.config import Job
from renderfarm.errors import EXIT_INTERRUPTED, EXIT_OK, Fatal, InvalidJob

LOG_LINES = 20
SIGNALLED = 128  # shells' exit codes from here on mean a signal


def submission_id(job: Job) -> str:
    """The same job value is the same submission, so that a tick that fires twice attaches to the first."""
    return f"renderfarm-{job.name}-{job.key}"


def submit_job(job: Job, address: str) -> tuple[str, bool]:
    """Send the job, with its paths resolved, and start `renderfarm run` on the cluster.

    Returns the submission id and whether it was new. A submission that is queued or running is attached to; one that
    has ended is replaced, which continues its output. Manifest and output must be reachable from the cluster.
    """
    from ray.job_submission import JobStatus

    id_ = submission_id(job)
    folder = Path(tempfile.mkdtemp(prefix="rf-submit-"))
    try:
        client = _client(address)
        if any(known.submission_id == id_ for known in client.list_jobs()):
            if client.get_job_status(id_) in (JobStatus.PENDING, JobStatus.RUNNING):
                return id_, False
            client.delete_job(id_)
        (folder / "job.yaml").write_text(yaml.safe_dump(job.model_dump(mode="json"), sort_keys=False))
        client.submit_job(
            submission_id=id_,
            entrypoint="python -m renderfarm run job.yaml --address auto",
            runtime_env={"working_dir": str(folder)},
            metadata={"renderfarm_job": job.name, "out": job.output.path},
        )
    except (RayError, ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise Fatal(f"cannot submit to {address}: {_reason(error)}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return id_, True


def check_address(address: str) -> None:
    """Raises Fatal where no head answers there, or it does not take this environment's token."""
    try:
        _client(address).list_jobs()
    except (RayError, ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise Fatal(f"cannot use {address}: {_reason(error)}") from error


def _client(address: str) -> Any:
    from ray.job_submission import JobSubmissionClient

    if not address.startswith(("http://", "https://")):  # Ray would take it for a cluster's own port, and wait
        raise InvalidJob(f"--address {address}: give the head's dashboard, http://HOST:8265")
    return JobSubmissionClient(address)


def _reason(error: Exception) -> str:
    text = str(error).strip()
    first = text.splitlines()[0] if text else type(error).__name__
    if isinstance(error, AuthenticationError):
        return f"{first}; the head wants its token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, as on the head"
    return f"{first}; is a Ray head with its dashboard running there?"


@dataclass(frozen=True)
class Ended:
    """How a submission has ended. `status`: Ray's word (SUCCEEDED, FAILED, STOPPED); `exit_code`: of its `renderfarm run`, 75 where
    something killed it; `log_tail`: the last lines that it wrote."""

    status: str
    exit_code: int
    log_tail: str


def wait_for(id_: str, address: str, poll_s: float = 1.0) -> Ended:
    """Wait until the submission has ended. Raises Fatal where the head is lost sight of."""
    try:
        client = _client(address)
        while not (status := client.get_job_status(id_)).is_terminal():
            time.sleep(poll_s)
        tail = "\n".join(client.get_job_logs(id_).splitlines()[-LOG_LINES:])
        code = client.get_job_info(id_).driver_exit_code
    except (RayError, ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise Fatal(f"lost sight of {id_} at {address}: {_reason(error)}; the same command attaches to it again") from error
    if status.value == "SUCCEEDED":
        return Ended(status.value, EXIT_OK, tail)
    # none, or a signal's number: what would have gone on was ended from outside
    return Ended(str(status.value), code if code and 0 < code < SIGNALLED else EXIT_INTERRUPTED, tail)
