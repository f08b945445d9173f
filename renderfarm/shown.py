"""Values as people read them: as text, and as HTML where a notebook shows them. Nothing of what somebody else wrote becomes markup."""

from __future__ import annotations

import base64
import dataclasses
import html
import os
import re
from collections.abc import Mapping
from typing import Any, ClassVar

MOST_LINES, MOST_SIGNS = 40, 2_000  # of one value
SHORTEST_SECRET = 8  # a shorter value of such a variable is a switch or a number, and would be found everywhere
_SECRETS = re.compile(r"(^|_|API|ACCESS)(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|CONNECTION_STRING)S?($|_)", re.IGNORECASE)
_USER_IN_URL = re.compile(r"(?<!abfs://)(?<!abfss://)(?<!wasb://)(?<!wasbs://)(?<=://)[^/\s@'\"]{1,1000}@")  # in those it is a container
_ENDS_QUERY = re.compile(r"[\s'\")\]]")

_TABLE = "border-collapse: collapse; font-size: 13px; text-align: left"
_NAME = "text-align: left; font-weight: 600; vertical-align: top; padding-right: 1em"
_VALUE = "text-align: left; white-space: pre-wrap; overflow-wrap: anywhere"


def without_secrets(text: str) -> str:
    """For what is kept or told: without what this environment's variables of secrets hold, and without users and queries of URLs. What is a
    path is none."""
    secrets = {value: name for name, value in os.environ.items() if _SECRETS.search(name) and len(value) >= SHORTEST_SECRET}
    for value in sorted(secrets, key=len, reverse=True):  # one may begin with another
        if value in text and not os.path.exists(value):
            text = text.replace(value, f"${{{secrets[value]}}}")
    return _USER_IN_URL.sub("…@", _without_queries(text))


def _without_queries(text: str) -> str:
    """`?…` for what follows a path's question mark and holds an equals sign; `why?` and `a?b=c` are words."""
    kept, place = list[str](), 0
    while (mark := text.find("?", place)) >= 0:
        ends = found.start() if (found := _ENDS_QUERY.search(text, mark)) else len(text)
        begins = max(text.rfind(sign, place, mark) for sign in " \t\n'\"([") + 1
        is_query = "=" in text[mark:ends] and "/" in text[max(begins, place) : mark]
        kept += [text[place : mark + 1], "…" if is_query else text[mark + 1 : ends]]
        place = ends
    return "".join([*kept, text[place:]])


def shown_value(value: Any) -> str:
    if value is None or value == {}:
        return "—"
    if isinstance(value, dict):
        return "\n".join(f"{name}: {shown_value(of)}" for name, of in value.items())
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    # somebody's text may hold what a terminal obeys
    return "".join(sign if sign.isprintable() or sign in "\n\t" else "\ufffd" for sign in str(value))


def table_of(title: str, values: Mapping[str, Any]) -> str:
    """Two columns. `values`: by name; what says nothing is left out."""
    said = _that_says_something(values)
    rows = (
        f'<tr><th style="{_NAME}">{html.escape(name)}</th><td style="{_VALUE}">{html.escape(_bounded(value))}</td></tr>'
        for name, value in said.items()
    )
    return f'<table style="{_TABLE}"><caption style="text-align: left">{html.escape(title)}</caption>{"".join(rows)}</table>'


def _that_says_something(values: Mapping[str, Any]) -> dict[str, Any]:
    inner = {name: _that_says_something(value) if isinstance(value, dict) else value for name, value in values.items()}
    return {name: value for name, value in inner.items() if value not in (None, {}, [], (), "")}


def picture_of(data: bytes, media_type: str, about: str, style: str = "max-width: 100%") -> str:
    """A file of a picture within the page."""
    source = f"data:{media_type};base64,{base64.b64encode(data).decode()}"
    return f'<img src="{source}" alt="{html.escape(about)}" title="{html.escape(about)}" style="{style}">'


def _bounded(value: Any) -> str:
    if isinstance(value, list | tuple):
        lines = [shown_value(_pairs(one)) for one in value[:MOST_LINES]]
        lines = [", ".join(lines)] if all(isinstance(one, int | float) for one in value[:MOST_LINES]) else lines
        lines += [f"… {len(value) - MOST_LINES:,} more"] if len(value) > MOST_LINES else []
    else:
        lines = shown_value(value).splitlines()
        lines = [*lines[:MOST_LINES], f"… {len(lines) - MOST_LINES:,} more"] if len(lines) > MOST_LINES else lines
    text = "\n".join(lines)
    return text if len(text) <= MOST_SIGNS else f"{text[:MOST_SIGNS]}…"


def _pairs(value: Any) -> str:
    """One of a list, in a line: its own words, or those of its fields that say something."""
    if not dataclasses.is_dataclass(value) or type(value).__str__ is not object.__str__:
        return str(value)
    return ", ".join(f"{name} {said}" for name, said in vars(value).items() if said not in (None, ""))


class Shown:
    """What a command found, as a dataclass: a notebook shows it as a table of its fields."""

    unshown: ClassVar[frozenset[str]] = frozenset()
    """Fields that are no text."""

    def _repr_html_(self) -> str:
        said = {name.replace("_", " "): value for name, value in vars(self).items() if name not in self.unshown}
        return table_of(type(self).__name__, said)


class Figures(dict[str, Any]):
    """What a command found, under the names that it prints; the same as its `--json`."""

    title = ""

    def __init__(self, title: str, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self.title = title

    def _repr_html_(self) -> str:
        return table_of(self.title, self)
