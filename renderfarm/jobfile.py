"""Reading a job file, or a value that says the same. `load_job` and `make_job` are the only ways in: they substitute `{{ ds }}`, apply
`--set`, validate, and turn every mistake into one `InvalidJob` that names file, field and the nearest valid word. Models as a person names
them, too.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import difflib
import numbers
import os
import re
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from renderfarm import params
from renderfarm.config import COMPANIONS, STEP_FILES, ComponentSpec, Job, ModelSpec, Output, Params, Step, Track, is_url
from renderfarm.config.render import LOOKALIKES
from renderfarm.errors import InvalidJob
from renderfarm.params import Place

MAX_JOB_BYTES = 1 << 20
UNION_MEMBERS = ("str", "int", "float", "bool")


Changes = Sequence[str] | Mapping[str, Any] | None
"""Fields that are to have other values: `["render.num_inference_steps=8"]`, with YAML values, or `{"render.num_inference_steps": 8}`."""


def load_job(path: str | Path, sets: Changes = None, out: str | None = None, logical_date: str | None = None) -> Job:
    """Read and validate a job file.

    `out` replaces `output.path`; `logical_date` (YYYY-MM-DD) fills `{{ ds }}` and `{{ ds_nodash }}`. Raises InvalidJob with one message.
    """
    path = Path(path)
    data, lines = _read_yaml(path)
    return _made(data, path.parent.absolute(), sets, out, logical_date, str(path), lines)


def make_job(fields: Mapping[str, Any]) -> Job:
    """The same of a value, as a file would hold it; its paths start at the current folder. Raises InvalidJob with one message."""
    return _made(_plain(fields), Path.cwd(), None, None, None, "job", {})


def _made(
    data: dict[str, Any], folder: Path, sets: Changes, out: str | None, logical_date: str | None, source: str, lines: dict[Place, int]
) -> Job:
    """`folder`: where relative paths start; `source`, `lines`: for messages."""
    named = partial(_named_place, source, lines, _names(sets))
    for item, name, value in _changes(sets):
        _set(data, item, name, value)
    if out is not None:
        if not out.strip():
            raise InvalidJob("--out is empty; give a folder (is a shell variable unset?)")
        output = data.get("output")
        data["output"] = {**(output if isinstance(output, dict) else {}), "path": _absolute(out, Path.cwd())}
    try:
        data = _fill_params(data, named)
        if logical_date is not None:
            data = {**data, "logical_date": logical_date}
        job = Job.model_validate(_fill_dates(data, data.get("logical_date"), source))
    except RecursionError:  # a YAML anchor that holds itself
        raise InvalidJob(f"{source}: a value contains itself; write it without YAML anchors") from None
    except ValidationError as error:
        raise InvalidJob(_explain(error, named)) from None
    return _resolve(job, folder)


def _plain(value: Any) -> Any:
    """As YAML would have given it."""
    if isinstance(value, BaseModel):
        return value.model_dump(exclude_unset=True)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(inner) for inner in value]
    return value.item() if isinstance(value, numbers.Number) and hasattr(value, "item") else value  # NumPy's


def _names(sets: Changes) -> list[str]:
    return [item.partition("=")[0] for item in sets or ()]


def _changes(sets: Changes) -> Iterator[tuple[str, str, Any]]:
    """Of each: what was said, for messages; the field; its value."""
    if isinstance(sets, Mapping):
        yield from ((name, name, _plain(value)) for name, value in sets.items())
        return
    for item in sets or ():
        name, equals, text = item.partition("=")
        if not equals or not name:
            raise InvalidJob(f"--set {item}: write it as field.sub=value, for example --set render.num_inference_steps=8")
        try:
            yield item, name, yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError):
            raise InvalidJob(f"--set {item}: the value is not valid YAML") from None


def _fill_params(data: dict[str, Any], named: Callable[[Place], str]) -> dict[str, Any]:
    given = TypeAdapter(dict[Literal["params"], Params]).validate_python({"params": data["params"]}) if data.get("params") else {}
    known = given.get("params", {})
    try:
        filled = params.values(known)
    except InvalidJob as error:
        name = str(error).split(maxsplit=1)[0].partition(".")[2]
        raise InvalidJob(f"{named(('params', name)).rpartition(': ')[0]}: {error}") from None
    return params.fill(data, filled, named)


def _named_place(source: str, lines: dict[Place, int], sets: list[str], place: Place) -> str:
    """`job.yaml, line 7: render.height`, or which --set it is of."""
    dotted = ".".join(map(str, place))
    if given := next((name for name in sets if f"{dotted}.".startswith(f"{name}.")), None):
        return f"{source}: --set {given}: {dotted}"
    known = next((place[:length] for length in range(len(place), 0, -1) if place[:length] in lines), None)
    return f"{source}{f', line {lines[known]}' if known else ''}: {dotted or 'job'}"


@contextlib.contextmanager
def at_its_line(path: str | Path, sets: Changes = None) -> Iterator[None]:
    """What is found wrong with a job's field once model and manifest are known is told with its file and line, too."""
    try:
        yield
    except InvalidJob as error:
        field = re.match(r"([a-z_0-9]+(?:\.\w+)*)[:\[ ]", str(error))
        if field is None or field[1].partition(".")[0] not in Job.model_fields:
            raise
        place = tuple(field[1].split("."))
        try:
            _, lines = _read_yaml(Path(path))
        except InvalidJob:  # the file is gone, or was edited meanwhile
            raise error from None
        named = _named_place(str(path), lines, _names(sets), place)
        raise type(error)(f"{named.removesuffix(f': {field[1]}')}: {error}") from error


class _UniqueKeys(yaml.SafeLoader):
    """YAML's safe loader, but a key that comes twice is an error: the second one would win in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice; keep one", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def _lines(node: yaml.Node | None, place: Place = ()) -> Iterator[tuple[Place, int]]:
    """The line of each field and item."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield (*place, str(key.value)), key.start_mark.line + 1
            yield from _lines(value, (*place, str(key.value)))
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            yield (*place, number), value.start_mark.line + 1
            yield from _lines(value, (*place, number))


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[Place, int]]:
    """What a job file holds, and the line of each field."""
    try:
        if path.stat().st_size > MAX_JOB_BYTES:
            raise InvalidJob(f"{path}: larger than 1 MiB; a job file holds settings, prompts go into the manifest")
        text = path.read_text(encoding="utf-8")
        data = yaml.load(text, _UniqueKeys)  # noqa: S506 - a SafeLoader
    except FileNotFoundError:
        raise InvalidJob(f"{path}: no such job file; give the path of a YAML file such as jobs/demo.yaml") from None
    except OSError as error:
        raise InvalidJob(f"{path}: cannot read the job file: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InvalidJob(f"{path}: not a text file; a job is a YAML file in UTF-8") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise InvalidJob(f"{path}{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    except (ValueError, RecursionError) as error:  # PyYAML lets these through: a date such as 2024-13-45, brackets a thousand deep
        raise InvalidJob(f"{path}: not valid YAML: {error}; quote what is meant as text") from None
    if not isinstance(data, dict):
        raise InvalidJob(f"{path}: a job file is a YAML mapping with at least name, manifest, model and output")
    try:
        return data, dict(_lines(yaml.compose(text, _UniqueKeys)))
    except RecursionError:  # an anchor within itself; the job is told so
        return data, {}


def _set(data: dict[str, Any], item: str, name: str, value: Any) -> None:
    *parents, last = name.split(".")
    if parents == ["params"]:
        _set_param(data, item, last, value)
        return
    place = data
    for depth, parent in enumerate(parents):
        inner = place.get(parent)
        if inner is None:
            inner = {}
        elif isinstance(inner, str) and depth == 0 and parent in ("manifest", "model"):
            inner = {"path" if parent == "manifest" else "id": inner}
        if not isinstance(inner, dict):
            raise InvalidJob(f"--set {item}: {parent} is not a block in the job file")
        place[parent] = inner = dict(inner)
        place = inner
    place[last] = value


def _set_param(data: dict[str, Any], item: str, name: str, value: Any) -> None:
    declared = data.get("params")
    if not isinstance(declared, dict) or name not in declared:
        known = list(map(str, declared)) if isinstance(declared, dict) else []
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"it has: {', '.join(known) or 'none'}"
        raise InvalidJob(f"--set {item}: the job has no parameter {name!r}; {hint}")
    said = declared[name]
    data["params"] = {**declared, name: {**(said if isinstance(said, dict) else {"default": said}), "value": value}}


def _fill_dates(data: dict[str, Any], logical_date: Any, source: str) -> dict[str, Any]:
    try:
        day = dt.date.fromisoformat(str(logical_date)) if logical_date else None  # YAML makes a date of it
    except ValueError:
        raise InvalidJob(f"--logical-date {logical_date}: write it as YYYY-MM-DD") from None
    words = {"ds": day.isoformat(), "ds_nodash": day.strftime("%Y%m%d")} if day else {}

    def word(match: re.Match[str]) -> str:
        name = match[1]
        if name not in ("ds", "ds_nodash"):
            raise InvalidJob(f"{source}: {{{{ {name} }}}} is not known; use {{{{ ds }}}} or {{{{ ds_nodash }}}}")
        if not words:
            raise InvalidJob(f"{source}: uses {{{{ {name} }}}}; give --logical-date YYYY-MM-DD")
        return words[name]

    def fill(value: Any) -> Any:
        if isinstance(value, str):
            return re.sub(r"\{\{\s*(.*?)\s*\}\}", word, value)
        if isinstance(value, dict):
            return {key: fill(inner) for key, inner in value.items()}
        return [fill(inner) for inner in value] if isinstance(value, list) else value

    found = {key: fill(value) if key in ("manifest", "output") else value for key, value in data.items()}
    found |= {"logical_date": day.isoformat()} if day else {}
    if isinstance(given := data.get("output"), dict) and "card" in given:  # shown as it is written
        found["output"]["card"] = given["card"]
    return found


def _explain(error: ValidationError, named: Callable[[Place], str]) -> str:
    """One line for each place. What a union's members say of one place is said together."""
    said: dict[str, list[str]] = {}
    for problem in error.errors():
        # union members and validators add steps such as `list[str]` to the location; only names and indices help
        place = tuple(step for step in problem["loc"] if step not in UNION_MEMBERS and re.fullmatch(r"\w+", str(step)))
        if problem["type"] == "extra_forbidden" and problem["loc"][-1] not in place:
            place = (*place, problem["loc"][-1])
        said.setdefault(named(place), []).append(_message(problem))
    return "\n".join(f"{place}: {', or '.join(dict.fromkeys(messages))}" for place, messages in said.items())


def _message(problem: ErrorDetails) -> str:
    message, given = problem["msg"].removeprefix("Value error, "), problem["input"]
    if problem["type"] == "extra_forbidden":
        return f"unknown field{_nearest(problem['loc'])}"
    if problem["type"] == "missing":
        return "is required"
    if problem["type"] == "value_error" or problem["loc"][:1] == ("notify",) or not isinstance(given, str | int | float | bool):
        return message
    shown = f"{message}, not {given!r}" if len(str(given)) <= 60 else message
    if problem["type"] == "literal_error":
        words = re.findall(r"'([^']+)'", problem["ctx"]["expected"])
        if close := difflib.get_close_matches(str(given), words, n=1):
            return f"{shown}; did you mean {close[0]!r}?"
    return shown


def _nearest(location: tuple[int | str, ...]) -> str:
    model: Any = Job
    for step in location[:-1]:
        if isinstance(step, int):  # of a list; its items' model was found
            continue
        annotation = model.model_fields[step].annotation if step in model.model_fields else None
        kinds = (annotation, *typing.get_args(annotation))
        model = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
        if model is None:
            return ""
    names = list(model.model_fields)
    other = LOOKALIKES.get(str(location[-1]))
    close = [other] if other in names else difflib.get_close_matches(str(location[-1]), names, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known fields: {', '.join(names)}"


def model_spec(text: str, given: Sequence[str] = ()) -> ModelSpec:
    """A model as a person names it on the command line: builtin:…, a folder (relative to here), or org/name@COMMIT.

    `given`: its components from elsewhere, each as NAME=FOLDER or NAME=org/name@COMMIT[/SUBFOLDER].
    """
    id_, revision, _ = _named(text)
    return ModelSpec(id=id_, revision=revision, components=component_specs(given))


def component_specs(given: Sequence[str]) -> dict[str, ComponentSpec]:
    found = {}
    for item in given:
        name, equals, text = item.partition("=")
        if not equals or not name or not text:
            raise InvalidJob(f"--component {item}: write it as NAME=FOLDER or NAME=org/name@COMMIT/SUBFOLDER, for example vae=./other-vae")
        id_, revision, subfolder = _named(text)
        found[name] = ComponentSpec(id=id_, revision=revision, subfolder=subfolder)
    return found


def _named(text: str) -> tuple[str, str | None, str | None]:
    """Id, revision and subfolder."""
    if text.startswith((".", "/", "~")) or Path(text).exists():
        return _absolute(text, Path.cwd()), None, None
    id_, _, rest = text.partition("@")
    revision, _, subfolder = rest.partition("/")
    return id_, revision or None, subfolder or None


def _absolute(text: str, base: Path) -> str:
    """Local paths become absolute (against `base`); URLs and `${ENV}` starts stay as they are."""
    if is_url(text) or text.startswith("${"):
        return text
    return os.path.normpath(base / Path(text).expanduser())


def _model_folder(model_id: str, base: Path) -> str:
    """A hub id stays what it is."""
    return _absolute(model_id, base) if model_id.startswith((".", "/", "~")) else model_id


def _resolve(job: Job, base: Path) -> Job:
    absolute = [_absolute(path, base) for path in job.manifest.paths]
    path = absolute[0] if len(absolute) == 1 else absolute or None
    folder = job.inputs.folder or (str(base) if job.manifest.rows is not None else None)
    prompts = job.prompts and job.prompts.model_copy(update={"wildcards": _absolute(job.prompts.wildcards, base)})
    adapters = {name: given.model_copy(update={"weights": _absolute(given.weights, base)}) for name, given in job.model.adapters.items()}
    companions = {name: getattr(job.model, name) for name in COMPANIONS}
    resolved = {name: given and given.model_copy(update={"id": _model_folder(given.id, base)}) for name, given in companions.items()}
    resolved["components"] = {
        name: given.model_copy(update={"id": _model_folder(given.id, base)}) for name, given in job.model.components.items()
    }
    return job.model_copy(
        update={
            "manifest": job.manifest.model_copy(update={"path": path}),
            "prompts": prompts,
            "model": job.model.model_copy(update={"id": _model_folder(job.model.id, base), "adapters": adapters, **resolved}),
            "output": _resolve_output(job.output, base),
            "inputs": job.inputs.model_copy(update={"folder": folder and _absolute(folder, base)}),
            "after": tuple(_resolve_step(step, base) for step in job.after),
            "track": job.track and _resolve_track(job.track, base),
        }
    )


def _resolve_output(output: Output, base: Path) -> Output:
    resolved: dict[str, Any] = {"path": _absolute(output.path, base)}
    if (c2pa := output.c2pa) is not None:
        places = {name: _absolute(getattr(c2pa, name), base) for name in ("certificate", "private_key")}
        resolved["c2pa"] = c2pa.model_copy(update=places)
    return output.model_copy(update=resolved)


def _resolve_track(track: Track, base: Path) -> Track:
    mlflow = track.mlflow
    if mlflow is None or mlflow.tracking_uri is None:
        return track
    return track.model_copy(update={"mlflow": mlflow.model_copy(update={"tracking_uri": _model_folder(mlflow.tracking_uri, base)})})


def _resolve_step(step: Step, base: Path) -> Step:
    given = getattr(step, step.kind)
    paths = {field: _absolute(getattr(given, field), base) for field in STEP_FILES.get(step.kind, ())}
    return step.model_copy(update={step.kind: given.model_copy(update=paths)})
