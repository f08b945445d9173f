"""Models on the Hugging Face hub, through its own client and in its cache."""

from __future__ import annotations

import glob
import platform
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from renderfarm.errors import CutOff, Fatal, InvalidJob, RenderfarmError, Transient
from renderfarm.models.files import INDEX, Place, local

RESTARTS = 2  # of one file from its beginning


def on_hub(model: str, revision: str | None, what: str) -> Place:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        raise InvalidJob(f"{what}: give builtin:shapes, a folder (./path or /path), a hub id org/name with its revision, or a URL")
    if not re.fullmatch(r"[0-9a-f]{40}", revision or ""):
        raise InvalidJob(f"{what}: a hub model needs its full commit, so that it cannot change: {{id: {model}, revision: <40 hex digits>}}")
    folder = _snapshot(model, str(revision), ["*config.json", INDEX])
    files = _repository_files(model, str(revision)) or local(folder).files
    return Place(files, lambda wanted: _snapshot(model, str(revision), map(glob.escape, wanted)))


def _repository_files(model: str, commit: str) -> list[str]:
    """What the hub has at a commit, remembered by its client; empty for a cache that an older client filled."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        return [file.path for file in get_cached_repo_tree(model, revision=commit)]
    except CachedRepoTreeNotFoundError:
        return []


def _snapshot(model: str, commit: str, patterns: Iterable[str]) -> Path:
    """The hub's files in its client's cache, where workers of one node wait for each other file by file."""
    from huggingface_hub import snapshot_download

    try:  # asks nobody where all is there
        return Path(snapshot_download(model, revision=commit, allow_patterns=list(patterns), tqdm_class=_no_progress_bar()))
    except Exception as error:  # the hub's client raises dozens of kinds, and lets its HTTP library's through
        raise _translated(error, model, commit) from error


def _translated(error: Exception, model: str, commit: str) -> RenderfarmError:
    """The hub client's error as ours, most specific first."""
    from huggingface_hub import errors

    causes = [error, error.__cause__]
    status = next((cause.response.status_code for cause in causes if isinstance(cause, errors.HfHubHTTPError)), 0)
    if isinstance(error, errors.RevisionNotFoundError):
        return InvalidJob(f"model {model}: the hub has no commit {commit} of it; copy the commit from the model's page")
    if status == 404:
        return InvalidJob(f"model {model}: the hub has no such model; check the id")
    if status in (401, 403):
        return Fatal(
            f"model {model}: the hub does not show it to everybody, or has no such model; check the id, accept the model's terms on its "
            "page, and set HF_TOKEN to a token that may read it, on every node"
        )
    if any(isinstance(cause, errors.OfflineModeIsEnabled) for cause in causes):
        return Fatal(f"model {model}: is not wholly on {platform.node()} at {commit}, and HF_HUB_OFFLINE forbids to fetch it; unset that")
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
        return Fatal(f"model {model}: cannot be stored in the hub's cache: {error.strerror}; HF_HOME names another place for it")
    # RemoteProtocolError: of the HTTP library that the hub's client uses, which is the client's own affair
    cut_off = any(isinstance(cause, _TooManyRestarts) or type(cause).__name__ == "RemoteProtocolError" for cause in causes)
    kind = CutOff if cut_off else Transient
    lines = str(error.__cause__ or error).strip().splitlines()
    return kind(f"model {model}: cannot be fetched at {commit}: {lines[0] if lines else type(error).__name__}; run again to go on")


class _TooManyRestarts(TimeoutError):
    """A file was begun anew too often."""


@cache
def _no_progress_bar() -> Any:
    from tqdm import tqdm

    class NoProgressBar(tqdm):  # type: ignore[misc]
        """Prints nothing, and ends what the client would try for ever: a server that cuts each answer off and cannot go on."""

        restarts = 0

        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> None:
            if n is not None and n < 0:
                self.restarts += 1
                if self.restarts > RESTARTS:
                    raise _TooManyRestarts(f"the connection was cut in the middle of a file {self.restarts} times")

    return NoProgressBar
