"""Which files of a model its pipeline reads, and models that are refused because reading them could run code.

A model is known here by its index (`model_index.json`) and its files' names, relative to its folder, so that a repository
or a store can be judged before anything large is fetched.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from renderfarm.errors import InvalidJob

Index = dict[str, Any]

INDEX = "model_index.json"
READ_AS_TEXT = (".json", ".txt", ".model", ".jinja")  # .jinja: chat templates
QUANTISED = ".gguf"
PICKLED = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
SAFETY = {"safety_checker", "feature_extractor"}
_STEMS = ("diffusion_pytorch_model", "model")


@dataclass(frozen=True)
class Place:
    """Where files are to be had. `files`: their names. `get`: brings some of them to this machine; the folder that has them then."""

    files: Sequence[str]
    get: Callable[[Iterable[str]], Path]


def local(folder: Path) -> Place:
    # not os.walk: links to components are followed, and one that leads back must not be
    files = (path for depth in ("*", "*/*", "*/*/*") for path in folder.glob(depth) if path.is_file())
    return Place([file.relative_to(folder).as_posix() for file in files], lambda _: folder)


def components(index: Index) -> dict[str, tuple[str, str]]:
    """Library and class of each component that the pipeline has, by its name, which is its folder's.

    Raises InvalidJob for an entry whose words are no plain names: paths are made of them, and classes are looked up by them.
    """
    found = {}
    for name, value in index.items():
        # the rest are settings, and [null, null] for what the pipeline can do without
        if name.startswith("_") or not (isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)):
            continue
        library, kind = value
        if not (isinstance(kind, str) and name.isidentifier() and library.isidentifier() and kind.isidentifier()):
            raise InvalidJob(f"{INDEX} is damaged: {name!r}: {value} is no component's name, library and class; fetch the model again")
        found[name] = (library, kind)
    return found


def read_files(files: Iterable[str], index: Index, variant: str | None, *, safety_checker: bool) -> list[str]:
    """Those that the pipeline reads, sorted: weights of one variant, where a component has it."""
    files = list(files)
    named = components(index).keys() - (set() if safety_checker else SAFETY)
    found = [file for file in files if file == INDEX]
    for name in named:
        found += read_of_component([file for file in files if file.startswith(f"{name}/")], variant)
    return sorted(found)


def read_of_component(files: Collection[str], variant: str | None) -> list[str]:
    """Of one component's files. As in diffusers, one without the variant is read without."""
    known = variants(files)
    wanted, others = variant if variant in known else None, READ_AS_TEXT if known else (*READ_AS_TEXT, QUANTISED)
    return [file for file in files if (_variant(file) == wanted if _is_weights(file) else file.endswith(others))]


def variants(files: Iterable[str]) -> set[str | None]:
    """The variants that there are of some weights; None: without one."""
    return {_variant(file) for file in files if _is_weights(file) and file.endswith(".safetensors")}


def _is_weights(file: str) -> bool:
    """Weights, or the index of their shards. Nobody loads a file of another name."""
    pieces = os.path.basename(file).split(".")
    return "safetensors" in pieces and file.endswith((".safetensors", ".json"))


def _variant(file: str) -> str | None:
    """`model.fp16-00001-of-00002.safetensors` and `model.safetensors.index.fp16.json` are fp16; another program's weights
    are a variant of their own, which cannot be asked for."""
    stem, *pieces = re.sub(r"-\d{5}-of-\d{5}", "", os.path.basename(file)).split(".")
    rest = [piece for piece in pieces if piece not in ("safetensors", "index", "json")]
    return ".".join(rest) or None if stem in _STEMS else f"{stem}."


def listed(folder: Path, index: Index) -> list[str]:
    """The index and all files of the components, as `read_files` takes them."""
    files = [folder / INDEX]
    for name in components(index):
        for place, _, inside in os.walk(folder / name, followlinks=True):  # a component may be a link to another model's
            files += [Path(place) / file for file in inside]
    return [file.relative_to(folder).as_posix() for file in files]


# ---------------------------------------------------------------------------------------------- what is refused


def check_index(index: Index, model: str) -> None:
    """Raise InvalidJob for a pipeline, or a component, whose class is code that comes with the model."""
    if isinstance(index.get("_class_name"), list) or "custom_pipeline" in index:
        raise InvalidJob(f"model {model}: it is a custom pipeline, whose code comes with it and is never run; give one of diffusers' own")
    try:
        named = components(index)
    except InvalidJob as error:
        raise InvalidJob(f"model {model}: its {error}") from None
    for name, (library, kind) in named.items():
        if library not in ("diffusers", "transformers") and not _has_pipelines(library):
            raise InvalidJob(
                f"model {model}: its {name} is {kind} of {library}, which is neither diffusers' nor transformers'; code that comes with a "
                "model is never run"
            )


def holds_weights(kind: str) -> bool:
    """Whether a component's class is a model."""
    return re.search("Tokenizer|Processor|Extractor|Scheduler", kind) is None


def check_name(name: str, index: Index, model: str, what: str) -> None:
    """Raise InvalidJob for a component that the model does not have. `what`: the field of the job, to begin a message with."""
    if name not in components(index):
        raise InvalidJob(f"{what}: {model} has no {name}; its components: {', '.join(sorted(components(index)))}")


def check_configuration(config: dict[str, Any], file: str, model: str) -> None:
    """Raise InvalidJob for a configuration that names code of its own, or a quantisation that a job could not ask for."""
    if "auto_map" in config:
        raise InvalidJob(f"model {model}: {file} asks for code of its own (auto_map), which is never run; give a model without it")
    if isinstance(saved := config.get("quantization_config"), dict):
        backend = str(saved.get("quant_method"))
        for arguments in _torchao_arguments(saved) if backend == "torchao" else [saved]:
            check_arguments(backend, arguments, f"model {model}: the quantization_config of {file}")


# Those of torchao that scale each token of the activations by itself, unless they are told otherwise
_BY_TOKEN = ("Int8DynamicActivationInt8WeightConfig", "Int8DynamicActivationIntxWeightConfig", "Float8DynamicActivationInt4WeightConfig")


def check_arguments(backend: str, arguments: Mapping[str, Any], what: str) -> None:
    """Raise InvalidJob for a quantisation that chooses numbers over a whole batch. `what`: who asks for it, to begin a message with."""
    if (found := _over_the_batch(backend, arguments)) is not None:
        chosen, advice = found
        raise InvalidJob(f"{what}: {chosen}, so a sample's pixels would depend on its batch mates; {advice}")


def _over_the_batch(backend: str, arguments: Mapping[str, Any]) -> tuple[str, str] | None:
    """What is chosen so, and what to use instead."""
    if backend == "bitsandbytes" and arguments.get("load_in_8bit"):
        return "load_in_8bit takes columns out wherever the batch has large numbers", "use load_in_4bit, or torchao's Int8WeightOnlyConfig"
    if backend == "quanto" and arguments.get("activations") is not None:
        return "quanto's activations are scaled by what whole batches hold", "leave activations out"
    kind, granularity = str(arguments.get("quant_type")), arguments.get("granularity")
    if "DynamicActivation" in kind and granularity != "PerRow" and (granularity is not None or kind not in _BY_TOKEN):
        return f"{kind} scales activations by the whole batch", "give it granularity: PerRow"
    return None


def _torchao_arguments(saved: Any) -> Iterator[dict[str, Any]]:
    """As a job says them, of each configuration in what torchao saved: some hold others, by the names of layers."""
    if isinstance(saved, list):
        for one in saved:
            yield from _torchao_arguments(one)
    elif isinstance(saved, dict):
        of = saved.get("_data")
        granularity = of.get("granularity") if isinstance(of, dict) else None
        first = granularity[0] if isinstance(granularity, list) and granularity else granularity  # the other one is the weights'
        yield {"quant_type": saved.get("_type"), "granularity": first.get("_type") if isinstance(first, dict) else first}
        for one in saved.values():
            yield from _torchao_arguments(one)


def check_weights(files: Collection[str], index: Index, variant: str | None, model: str, *, safety_checker: bool) -> None:
    """Raise InvalidJob where a component has no weights that can be loaded, or none the variant that is asked for."""
    named = [name for name, (_, kind) in components(index).items() if holds_weights(kind)]
    there = {name: [file for file in files if file.startswith(f"{name}/")] for name in named}
    for name, inside in there.items():
        if f"{name}/config.json" in inside and (safety_checker or name not in SAFETY):
            check_component(inside, variant, f"model {model}: its {name}")
    check_variant(set().union(*(variants(inside) for inside in there.values())), variant, f"model {model}")


def check_variant(there: Iterable[str | None], variant: str | None, what: str) -> None:
    """`there`: what `variants` finds. `what`: the model, to begin a message with."""
    known = _named(there)
    if variant is not None and variant not in known:
        raise InvalidJob(
            f"{what}: no component has the variant {variant} (*.{variant}.safetensors); variants that there are: "
            f"{', '.join(known) or 'none'}"
        )


def check_component(files: Collection[str], variant: str | None, what: str) -> None:
    """`what`: the component, to begin a message with."""
    known = variants(files)
    if None in known or variant in known or any(file.endswith(QUANTISED) for file in files):
        return
    if others := _named(known):
        raise InvalidJob(f"{what} has weights of a variant only: give variant: {' or '.join(others)}")
    if pickled := sorted(os.path.basename(file) for file in files if file.endswith(PICKLED)):
        raise InvalidJob(
            f"{what} has pickled weights only ({pickled[0]}), which may hold code; load it with diffusers where you trust it, and save it "
            "with save_pretrained(…, safe_serialization=True)"
        )
    raise InvalidJob(f"{what} has no .safetensors file; was the model copied or fetched to its end?")


def _named(known: Iterable[str | None]) -> list[str]:
    """Variants that a job can ask for."""
    return sorted(variant for variant in known if variant is not None and not variant.endswith("."))


def _has_pipelines(library: str) -> bool:
    """Whether diffusers has a module of pipelines by this name: some components are theirs, e.g. a safety checker."""
    found = importlib.util.find_spec("diffusers")  # does not import it
    return found is not None and found.origin is not None and (Path(found.origin).parent / "pipelines" / library).is_dir()
