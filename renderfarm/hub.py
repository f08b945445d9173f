"""`renderfarm export --to hub`: the Parquet export in a folder of this machine, and from there to the Hugging Face hub."""

from __future__ import annotations

import os
import re
import shlex
from dataclasses import replace
from pathlib import Path

from renderfarm.errors import Fatal, InvalidJob, RenderfarmError, Transient
from renderfarm.export import Exported, Options, Say, export

TOKEN = "HF_TOKEN"  # noqa: S105 - the variable's name
LARGEST_FILE = 20 * 10**9
"""The hub takes no larger ones."""
NEVER = ["_renderfarm*"]  # our own notes
REPLACED = ["data/train-*-of-*.parquet"]  # of an export before, if this one has other files


def check_repository(name: str, max_file_size: int) -> None:
    """Before anything is written. Raises InvalidJob."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise InvalidJob(f"{name!r} is no repository of the hub; give it as org/name")
    if max_file_size >= LARGEST_FILE:
        raise InvalidJob(f"--max-file-size: the hub takes files below {LARGEST_FILE // 10**9} GB; give a smaller one")


def export_to_hub(
    out: str, repository: str, staging: Path, options: Options, *, public: bool, restart: bool = False, say: Say = lambda text: None
) -> Exported:
    """Export into the folder `staging`, then upload what the hub does not hold yet: a repository of datasets, made if it is missing,
    private unless `public`. Run it again and both continue.

    Raises what `export` does, and Fatal or Transient where the hub cannot be written; the folder stays as it is.
    """
    check_repository(repository, options.max_file_size)
    found = export(out, str(staging), options, restart=restart, read_as=f"hf://datasets/{repository}", say=say)
    token = os.environ.get(TOKEN)
    if not token:
        left = _left(repository, staging)
        raise Fatal(f"not uploaded: the environment has no {TOKEN}; set it to a token that may write {repository}.{left}")
    say(f"uploading to {repository}")
    try:
        upload(repository, staging, token, public=public)
    except Exception as error:  # the hub's client raises dozens of kinds, and lets its HTTP library's through
        raise _translated(error, repository, staging) from error
    return replace(found, dest=f"hf://datasets/{repository}")


def upload(repository: str, folder: Path, token: str, *, public: bool) -> None:
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    api.create_repo(repository, repo_type="dataset", private=not public, exist_ok=True)
    # large folders in several commits; what was uploaded before is found and not sent again
    api.upload_folder(
        repo_id=repository,
        repo_type="dataset",
        folder_path=folder,
        commit_message="Export by renderfarm",
        ignore_patterns=list(NEVER),
        delete_patterns=list(REPLACED),
    )


def _translated(error: Exception, repository: str, staging: Path) -> RenderfarmError:
    from huggingface_hub import errors

    causes = [error, error.__cause__]
    status = next((cause.response.status_code for cause in causes if isinstance(cause, errors.HfHubHTTPError)), 0)
    left = _left(repository, staging)
    if status in (401, 403):
        return Fatal(f"not uploaded: the hub does not let this {TOKEN} write {repository}; set it to one that may.{left}")
    if any(isinstance(cause, errors.OfflineModeIsEnabled) for cause in causes):
        return Fatal(f"not uploaded: HF_HUB_OFFLINE forbids it; unset that.{left}")
    lines = str(error.__cause__ or error).strip().splitlines()
    return Transient(f"not uploaded: {lines[0] if lines else type(error).__name__}.{left}")


def _left(repository: str, staging: Path) -> str:
    exclude = " ".join(f"--exclude {shlex.quote(pattern)}" for pattern in NEVER)
    delete = " ".join(f"--delete {shlex.quote(pattern)}" for pattern in REPLACED)
    command = f"hf upload {repository} {shlex.quote(str(staging))} . --repo-type dataset {exclude} {delete}"
    return f" The files are in {staging}: run the same command again, or upload them by hand:\n  {command}"
