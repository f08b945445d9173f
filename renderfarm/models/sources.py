"""Where a model's files come from: the package, a folder, the hub, a store. They are fetched once per node, and then found there.

The driver needs the configurations only; whoever loads a model gets its weights, too, where it runs.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import tempfile
from pathlib import Path
from typing import Any

from renderfarm.config import Checkpoint, ComponentSpec, ModelSpec, expand_env, is_url
from renderfarm.errors import Fatal, InvalidJob
from renderfarm.models.files import (
    INDEX,
    QUANTISED,
    Place,
    check_arguments,
    check_component,
    check_configuration,
    check_index,
    check_name,
    check_variant,
    check_weights,
    components,
    holds_weights,
    local,
    read_files,
    read_of_component,
    variants,
)
from renderfarm.models.fingerprint import cache_folder
from renderfarm.models.hub import on_hub
from renderfarm.models.stores import in_store


def find_model(spec: ModelSpec, *, weights: bool) -> Path:
    """The folder of the model on this machine, fetched if need be; with `weights` False, its configurations may be all of it.

    Raises InvalidJob for a model that cannot be rendered as given, Fatal for one that is not to be had, and Transient
    for one that may be had later.
    """
    return _found(spec, weights=weights)[0]


def find_configurations(spec: ModelSpec) -> tuple[Path, list[str]]:
    """The same without weights, and the names of the files that whoever loads the model has still to fetch."""
    return _found(spec, weights=False)


def _found(spec: ModelSpec, *, weights: bool) -> tuple[Path, list[str]]:
    model, pinned = expand_env(spec.id), spec.sha256 is not None
    places = {"": _place(model, spec.revision, f"model {model}", pinned=pinned)}
    index = read_index(places[""].get(filter(_is_configuration, places[""].files)), model)
    check_index(index, model)
    check_quantization(spec, index, model)
    for name, given in spec.components.items():
        check_name(name, index, model, "model.components")
        where = f"model.components.{name}"
        place = _quantised(given, where, components(index)[name]) if is_quantised(given) else _component(given, where, pinned=pinned)
        places[name] = place
    files = {name: list(place.files) for name, place in places.items()}
    files[""] = [file for file in files[""] if not _is_replaced(file, spec)]
    of_all = [f"{name}/{file}".removeprefix("/") for name, of_place in files.items() for file in of_place]
    check_weights(of_all, index, spec.variant, model, safety_checker=spec.safety_checker)
    loaded = _fetched(of_all, index, spec)
    wanted = loaded if weights else list(filter(_is_configuration, of_all))
    folders, missing = {}, []
    for name, place in places.items():
        here = {f"{name}/{file}".removeprefix("/"): file for file in files[name]}
        folders[name] = place.get([here[file] for file in wanted if file in here])
        missing += [file for file in loaded if file in here and not (folders[name] / here[file]).is_file()]
    folder = folders.pop("")
    if folders:
        folder = _assembled(folder, index, folders, spec)
    _check_configurations(folder, index, model)
    return folder, missing


def find_beside(given: Checkpoint, what: str, *, weights: bool) -> Path:
    """The same of a model that is used beside another: a whole pipeline, or one component. `what`: the field of the job."""
    place = _place(expand_env(given.id), given.revision, what, pinned=given.sha256 is not None)
    if INDEX in place.files:
        return find_model(ModelSpec.model_validate(given.model_dump(include=set(Checkpoint.model_fields))), weights=weights)
    files = [file for file in place.files if "/" not in file]
    check_component(files, given.variant, what)
    check_variant(variants(files), given.variant, what)
    folder = place.get(read_of_component(files, given.variant) if weights else filter(_is_configuration, files))
    if (config := folder / "config.json").is_file():
        check_configuration(read_json(config, f"{what}: config.json is damaged"), "config.json", given.id)
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


def check_quantization(spec: ModelSpec, index: dict[str, Any], model: str) -> None:
    if spec.quantization is None:
        return
    check_arguments(spec.quantization.backend, spec.quantization.arguments, "model.quantization")
    for name in spec.quantization.components:
        check_name(name, index, model, "model.quantization.components")
        if not holds_weights(components(index)[name][1]):
            raise InvalidJob(f"model.quantization.components: {name} has no weights; leave it out")
        if name in spec.components and is_quantised(spec.components[name]):
            raise InvalidJob(f"model.quantization.components: {name} comes from a .gguf file, which is quantised; leave it out")


def _is_replaced(file: str, spec: ModelSpec) -> bool:
    """Whether another component's files stand for this one; a quantised file needs the model's own configuration."""
    given = spec.components.get(file.partition("/")[0])
    return given is not None and not (is_quantised(given) and _is_configuration(file))


def _fetched(files: list[str], index: dict[str, Any], spec: ModelSpec) -> list[str]:
    """A checker that is not asked for is not fetched, but the pipeline loads what is beside it."""
    found = read_files(files, index, spec.variant, safety_checker=True)
    return [file for file in found if spec.safety_checker or not file.startswith("safety_checker/")]


def _check_configurations(folder: Path, index: dict[str, Any], model: str) -> None:
    for name in components(index):
        for file in ("config.json", "tokenizer_config.json"):
            if (path := folder / name / file).is_file():
                check_configuration(read_json(path, f"model {model}: {name}/{file} is damaged"), f"{name}/{file}", model)


def _place(id_: str, revision: str | None, what: str, *, pinned: bool) -> Place:
    """`what`: the field of the job, to begin a message with. `pinned`: a hash will tell whether the files are the right ones."""
    if id_ == "builtin:shapes":
        return local(Path(__file__).parent.parent / "shapes" / "model")
    if id_.startswith("builtin:"):
        raise InvalidJob(f"{what}: there is no such builtin; builtin:shapes is")
    if is_url(id_):
        return in_store(id_, what, offline=pinned)
    if not os.path.isabs(id_):
        return on_hub(id_, revision, what)
    if os.path.isfile(id_):
        raise InvalidJob(
            f"{what}: {id_} is one file; give a folder in diffusers' format (diffusers' from_single_file and save_pretrained make one)"
        )
    if not os.path.isdir(id_):
        raise InvalidJob(f"{what}: no such folder on {platform.node()}: {id_}; every node must find it under this path")
    return local(Path(id_))


# ---------------------------------------------------------------------------------------------- components from elsewhere


def _component(given: ComponentSpec, what: str, *, pinned: bool) -> Place:
    """A component's own files, without what lies in folders below."""
    place = _place(expand_env(given.id), given.revision, what, pinned=pinned)
    folder = (given.subfolder or "").strip("/")
    start = f"{folder}/" if folder else ""
    files = [file.removeprefix(start) for file in place.files if file.startswith(start)]
    files = [file for file in files if "/" not in file]
    if not any(map(_is_configuration, files)):
        raise InvalidJob(f"{what}: {'/'.join(filter(None, [given.id, folder]))} is no component in diffusers' format (no config.json)")
    return Place(files, lambda wanted: place.get([start + file for file in wanted]) / folder)


def is_quantised(given: ComponentSpec) -> bool:
    return given.id.endswith(QUANTISED)


def _quantised(given: ComponentSpec, what: str, of: tuple[str, str]) -> Place:
    file = expand_env(given.id)
    if of[0] != "diffusers":
        raise InvalidJob(f"{what}: a .gguf file can take the place of a denoiser of diffusers, not of {of[1]}")
    if not os.path.isabs(file) or not os.path.isfile(file):
        raise InvalidJob(f"{what}: no such file on {platform.node()}: {file}; write it as ./x.gguf, relative to the job file")
    return Place([os.path.basename(file)], lambda _: Path(file).parent)


def _assembled(base: Path, index: dict[str, Any], others: dict[str, Path], spec: ModelSpec) -> Path:
    """A folder that links to the model's own components and to those that take their place, for whoever reads a model."""
    links = {name: base / name for name in components(index) if (base / name).is_dir()}
    entries = {}
    for name, folder in others.items():
        if is_quantised(spec.components[name]):  # weights only, in a file that may lie beside others
            file = folder / os.path.basename(spec.components[name].id)
            # its own name decides no pixel
            links |= {f"{name}/config.json": links.pop(name) / "config.json", f"{name}/diffusion_pytorch_model{QUANTISED}": file}
        else:
            links[name] = folder
            entries[name] = _entry(name, base, folder, index, spec.id)
    targets = {name: str(target.resolve()) for name, target in links.items()}
    text = json.dumps(index | entries, indent=1, sort_keys=True)
    return _folder_of_links(
        cache_folder("assembled") / hashlib.sha256(json.dumps([text, targets]).encode()).hexdigest()[:32], text, targets
    )


def _folder_of_links(folder: Path, index: str, targets: dict[str, str]) -> Path:
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent))
        try:
            (temporary / INDEX).write_text(index)
            for name, target in targets.items():
                (temporary / name).parent.mkdir(exist_ok=True)
                (temporary / name).symlink_to(target)
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        if not folder.is_dir():  # else another worker of this node was faster, with the same
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
                given = str(config.get("_class_name", kind))
                if (role := _role(given)) != _role(kind):
                    raise InvalidJob(
                        f"model.components.{name}: it is a {given}, {role}, and the model's own is a {kind}; give another of that kind"
                    )
                return [library, given]
            own = read_json(base / name / file, f"model {model}: {name}/{file} is missing or damaged")
            if config.get("model_type") != own.get("model_type"):
                raise InvalidJob(
                    f"model.components.{name}: it is a {config.get('model_type')}, and the model needs a {own.get('model_type')} ({kind})"
                )
    return [library, kind]


def _role(class_name: str) -> str:
    """By the words that diffusers' classes are named with."""
    words = {"Scheduler": "a scheduler", "Autoencoder": "an autoencoder", "VAE": "an autoencoder", "ControlNet": "a ControlNet"}
    roles = words | dict.fromkeys(("UNet", "Transformer", "DiT2D", "UVit"), "a denoiser") | {"VQModel": "an autoencoder"}
    return next((role for word, role in roles.items() if word.lower() in class_name.lower()), "another part")
