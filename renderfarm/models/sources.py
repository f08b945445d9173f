"""Where a model's files come from: the package, a folder, the hub. They are fetched once per node, and then found there.

The driver needs the configurations only; whoever loads a model gets its weights, too, where it runs.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import platform
import re
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from renderfarm.config import ComponentSpec, ModelSpec, expand_env
from renderfarm.errors import Fatal, InvalidJob, RenderfarmError, Transient
from renderfarm.models.files import INDEX, check_configuration, check_index, check_name, check_weights, components, read_files
from renderfarm.models.fingerprint import cache_folder

RESTARTS = 2  # of one file from its beginning


@dataclass(frozen=True)
class Place:
    """Where files are to be had. `files`: their names. `get`: brings some of them to this machine; the folder that has them then."""

    files: Sequence[str]
    get: Callable[[Iterable[str]], Path]


def find_model(spec: ModelSpec, *, weights: bool) -> Path:
    """The folder of the model on this machine, fetched if need be; with `weights` False, its configurations may be all of it.

    Raises InvalidJob for a model that cannot be rendered as given, Fatal for one that is not to be had, and Transient
    for one that may be had later.
    """
    model = expand_env(spec.id)
    places = {"": _place(model, spec.revision, f"model {model}")}
    index = read_index(places[""].get(filter(_is_configuration, places[""].files)), model)
    check_index(index, model)
    for name, given in spec.components.items():
        check_name(name, index, model)
        places[name] = _component(given, f"model.components.{name}")
    files = {name: list(place.files) for name, place in places.items()}
    files[""] = [file for file in files[""] if file.partition("/")[0] not in spec.components]
    of_all = [f"{name}/{file}".removeprefix("/") for name, of_place in files.items() for file in of_place]
    check_weights(of_all, index, spec.variant, model, safety_checker=spec.safety_checker)
    wanted = _fetched(of_all, index, spec) if weights else list(filter(_is_configuration, of_all))
    folders = {}
    for name, place in places.items():
        here = {f"{name}/{file}".removeprefix("/"): file for file in files[name]}
        folders[name] = place.get([here[file] for file in wanted if file in here])
    folder = folders.pop("")
    if folders:
        folder = _assembled(folder, index, folders, model)
    _check_configurations(folder, index, model)
    return folder


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


def _is_configuration(file: str) -> bool:
    return file == INDEX or file.endswith("config.json")


def _fetched(files: list[str], index: dict[str, Any], spec: ModelSpec) -> list[str]:
    """A checker that is not asked for is not fetched, but the pipeline loads what is beside it."""
    found = read_files(files, index, spec.variant, safety_checker=True)
    return [file for file in found if spec.safety_checker or not file.startswith("safety_checker/")]


def _check_configurations(folder: Path, index: dict[str, Any], model: str) -> None:
    for name in components(index):
        for file in ("config.json", "tokenizer_config.json"):
            if (path := folder / name / file).is_file():
                check_configuration(read_json(path, f"model {model}: {name}/{file} is damaged"), f"{name}/{file}", model)


def _place(id_: str, revision: str | None, what: str) -> Place:
    """`what`: the field of the job, to begin a message with."""
    if id_ == "builtin:shapes":
        return _local(Path(__file__).parent.parent / "shapes" / "model")
    if id_.startswith("builtin:"):
        raise InvalidJob(f"{what}: there is no such builtin; builtin:shapes is")
    if not os.path.isabs(id_):
        return _on_hub(id_, revision, what)
    if os.path.isfile(id_):
        raise InvalidJob(
            f"{what}: {id_} is one file; give a folder in diffusers' format (diffusers' from_single_file and save_pretrained make one)"
        )
    if not os.path.isdir(id_):
        raise InvalidJob(f"{what}: no such folder on {platform.node()}: {id_}; every node must find it under this path")
    return _local(Path(id_))


def _local(folder: Path) -> Place:
    # not os.walk: links to components are followed, and one that leads back must not be
    files = (path for depth in ("*", "*/*", "*/*/*") for path in folder.glob(depth) if path.is_file())
    return Place([file.relative_to(folder).as_posix() for file in files], lambda _: folder)


# ---------------------------------------------------------------------------------------------- components from elsewhere


def _component(given: ComponentSpec, what: str) -> Place:
    """A component's own files, without what lies in folders below."""
    place, folder = _place(expand_env(given.id), given.revision, what), given.subfolder.strip("/") if given.subfolder else ""
    start = f"{folder}/" if folder else ""
    files = [file.removeprefix(start) for file in place.files if file.startswith(start)]
    files = [file for file in files if "/" not in file]
    if not any(map(_is_configuration, files)):
        raise InvalidJob(f"{what}: {'/'.join(filter(None, [given.id, folder]))} is no component in diffusers' format (no config.json)")
    return Place(files, lambda wanted: place.get([start + file for file in wanted]) / folder)


def _assembled(base: Path, index: dict[str, Any], others: dict[str, Path], model: str) -> Path:
    """A folder that links to the model's own components and to those that take their place, for whoever reads a model."""
    own = {name: base / name for name in components(index) if (base / name).is_dir()}
    links = {name: str(folder.resolve()) for name, folder in (own | others).items()}
    text = json.dumps(index | {name: _entry(name, base, folder, index, model) for name, folder in others.items()}, indent=1, sort_keys=True)
    folder = cache_folder("assembled") / hashlib.sha256(json.dumps([text, links]).encode()).hexdigest()[:32]
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent))
        (temporary / INDEX).write_text(text)
        for name, target in links.items():
            (temporary / name).symlink_to(target)
        with contextlib.suppress(FileExistsError):  # another worker of this node was faster, with the same
            temporary.rename(folder)
    except OSError as error:
        if not folder.is_dir():
            raise Fatal(f"{folder.parent} cannot be written: {error.strerror}; XDG_CACHE_HOME names another place") from error
    return folder


def _entry(name: str, base: Path, folder: Path, index: dict[str, Any], model: str) -> list[str]:
    """What the index says of a component that takes another's place: diffusers' configurations name their class; a class of
    transformers loads its own kind only, and would make up what it does not find."""
    library, kind = components(index)[name]
    for file in ("config.json", "scheduler_config.json"):
        if (folder / file).is_file():
            config = read_json(folder / file, f"model.components.{name}: {file} is damaged")
            check_configuration(config, f"model.components.{name}/{file}", model)
            if library == "diffusers":
                return [library, str(config.get("_class_name", kind))]
            own = read_json(base / name / file, f"model {model}: {name}/{file} is missing or damaged")
            if config.get("model_type") != own.get("model_type"):
                raise InvalidJob(
                    f"model.components.{name}: it is a {config.get('model_type')}, and the model needs a {own.get('model_type')} ({kind})"
                )
    return [library, kind]


# ---------------------------------------------------------------------------------------------- the hub


def _on_hub(model: str, revision: str | None, what: str) -> Place:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        raise InvalidJob(f"{what}: give builtin:shapes, a folder (./path or /path), or a hub id org/name with its revision")
    if not re.fullmatch(r"[0-9a-f]{40}", revision or ""):
        raise InvalidJob(f"{what}: a hub model needs its full commit, so that it cannot change: {{id: {model}, revision: <40 hex digits>}}")
    folder = _snapshot(model, str(revision), ["*config.json", INDEX])
    files = _repository_files(model, str(revision)) or _local(folder).files
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
