"""Where a model's files come from: the package, a folder, the hub. They are fetched once per node, and then found there.

The driver needs the configurations only; whoever loads a model gets its weights, too, where it runs.
"""

from __future__ import annotations

import glob
import json
import os
import platform
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from renderfarm.config import ModelSpec, expand_env
from renderfarm.errors import Fatal, InvalidJob, RenderfarmError, Transient
from renderfarm.models.files import INDEX, check_configuration, check_index, check_weights, components, listed, read_files

CONFIGURATIONS = [INDEX, "*config.json"]
RESTARTS = 2  # of one file from its beginning


def find_model(spec: ModelSpec, *, weights: bool) -> Path:
    """The folder of the model on this machine, fetched if need be; with `weights` False, its configurations may be all of it.

    Raises InvalidJob for a model that cannot be rendered as given, Fatal for one that is not to be had, and Transient
    for one that may be had later.
    """
    model = expand_env(spec.id)
    if model == "builtin:shapes":
        return Path(__file__).parent.parent / "shapes" / "model"
    if model.startswith("builtin:"):
        raise InvalidJob(f"model {model}: there is no such builtin; builtin:shapes is")
    if os.path.isabs(model):
        folder = _local(model)
        _check(folder, listed(folder, read_index(folder, model)), spec, model)
        return folder
    _check_hub_name(model, spec.revision)
    return _from_hub(model, str(spec.revision), spec, weights=weights)


def read_index(folder: Path, model: str) -> dict[str, Any]:
    return read_json(folder / INDEX, f"model {model}: {folder} is not a model in diffusers' format")


def read_json(path: Path, problem: str) -> dict[str, Any]:
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(data, dict):
            return data
    except (OSError, ValueError):
        pass
    raise InvalidJob(f"{problem} ({path.name})")


def _local(model: str) -> Path:
    if os.path.isfile(model):
        raise InvalidJob(
            f"model {model}: is one file; give a folder in diffusers' format (diffusers' from_single_file and save_pretrained make one)"
        )
    if not os.path.isdir(model):
        raise InvalidJob(f"model {model}: no such folder on {platform.node()}; every node must find it under this path")
    return Path(model)


def _check(folder: Path, files: list[str], spec: ModelSpec, model: str) -> None:
    """What can be refused before anything large is fetched; `folder` has the configurations at least."""
    index = read_index(folder, model)
    check_index(index, model)
    for name in components(index):
        for file in ("config.json", "tokenizer_config.json"):
            if (path := folder / name / file).is_file():
                check_configuration(read_json(path, f"model {model}: {name}/{file} is damaged"), f"{name}/{file}", model)
    check_weights(files, index, spec.variant, model, safety_checker=spec.safety_checker)


# ---------------------------------------------------------------------------------------------- the hub


def _check_hub_name(model: str, revision: str | None) -> None:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        raise InvalidJob(f"model {model!r}: give builtin:shapes, a folder (./path or /path), or a hub id org/name with its revision")
    if not re.fullmatch(r"[0-9a-f]{40}", revision or ""):
        raise InvalidJob(
            f"model {model}: a hub model needs its full commit, so that it cannot change: model: {{id: {model}, revision: <40 hex digits>}}"
        )


def _from_hub(model: str, commit: str, spec: ModelSpec, *, weights: bool) -> Path:
    folder = _snapshot(model, commit, CONFIGURATIONS)
    index = read_index(folder, model)
    files = _repository_files(model, commit) or listed(folder, index)
    _check(folder, files, spec, model)
    if not weights:
        return folder
    # a checker that is not asked for is not fetched, but the pipeline loads what is beside it
    wanted = [file for file in read_files(files, index, spec.variant, safety_checker=True) if not file.startswith("safety_checker/")]
    if spec.safety_checker:
        wanted = read_files(files, index, spec.variant, safety_checker=True)
    return _snapshot(model, commit, map(glob.escape, wanted))


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
    lines = str(error.__cause__ or error).strip().splitlines()
    return Transient(f"model {model}: cannot be fetched at {commit}: {lines[0] if lines else type(error).__name__}; run again to go on")


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
                    raise TimeoutError(f"the connection was cut in the middle of a file {self.restarts} times")

    return NoProgressBar
