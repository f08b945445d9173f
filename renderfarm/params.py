"""A job's own parameters: `params:` says what they are, `${params.NAME}` where they go, `--set params.NAME=VALUE` what they are now.

A field that is nothing but `${params.NAME}` gets the value with its type; within a text it becomes text. `${NAME}` without `params.`
is an environment variable, and stays as it is written.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from typing import Any

from renderfarm.config import Param, Scalar
from renderfarm.errors import InvalidJob

_USE = re.compile(r"\$\{params\.([^{}]*)\}")
_ACCEPTS: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "str": (str,), "bool": (bool,)}
_CALLED = {"int": "a whole number", "float": "a number", "str": "text", "bool": "true or false"}

Place = tuple[str | int, ...]


def values(params: dict[str, Param]) -> dict[str, Scalar]:
    """What each parameter is now. Raises InvalidJob for one without a value, or with one that it does not allow."""
    return {name: _value(name, param) for name, param in params.items()}


def _value(name: str, param: Param) -> Scalar:
    value = param.default if param.value is None else param.value
    if value is None:
        raise InvalidJob(
            f"params.{name} has no default; give --set params.{name}=…" + (f" ({param.description})" if param.description else "")
        )
    kind = param.kind
    if kind == "str" and not isinstance(value, str) and param.value is not None:  # --set reads `5` as a number
        value = str(value)
    if not isinstance(value, _ACCEPTS[kind]) or (isinstance(value, bool) and kind != "bool"):
        raise InvalidJob(f"params.{name} is {value!r}, and must be {_CALLED[kind]}")
    if param.choices is not None and value not in param.choices:
        close = difflib.get_close_matches(str(value), list(map(str, param.choices)), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise InvalidJob(f"params.{name} is {value!r}; it may be {', '.join(map(repr, param.choices))}{hint}")
    if isinstance(value, int | float):
        if param.min is not None and value < param.min:
            raise InvalidJob(f"params.{name} is {value!r}; the least is {param.min:g}")
        if param.max is not None and value > param.max:
            raise InvalidJob(f"params.{name} is {value!r}; the most is {param.max:g}")
    return value


def fill(data: dict[str, Any], known: dict[str, Scalar], named: Callable[[Place], str]) -> dict[str, Any]:
    """A job's fields with its parameters in them. `named`: a place in the file, for messages."""

    def replaced(value: Any, place: Place) -> Any:
        if isinstance(value, dict):
            return {key: replaced(inner, (*place, str(key))) for key, inner in value.items()}
        if isinstance(value, list):
            return [replaced(inner, (*place, number)) for number, inner in enumerate(value)]
        if not isinstance(value, str) or "${params." not in value:
            return value
        if whole := _USE.fullmatch(value):
            return looked_up(whole[1], place)
        return _USE.sub(lambda use: str(looked_up(use[1], place)), value)

    def looked_up(name: str, place: Place) -> Scalar:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(known) or 'none'}"
            raise InvalidJob(f"{named(place)}: ${{params.{name}}}: no such parameter in params; {hint}")
        return known[name]

    return {key: value if key == "params" else replaced(value, (key,)) for key, value in data.items()}
