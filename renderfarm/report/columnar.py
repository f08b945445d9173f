"""Tables as JSON by column, small enough for ten thousand rows in a page: a value that many rows share is there once."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

Value = str | int | float | None
EXACT = 1 << 53  # beyond it JavaScript's numbers are not whole
LONGEST_TEXT, LONGEST_NESTED = 20_000, 1_000  # characters of one value; the table has all of them


def columns_of(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of which any record has a value, in the order in which they appear: what `column` makes of each, and its `name`."""
    names = dict.fromkeys(name for record in records for name in record)
    found = []
    for name in names:
        values = [record.get(name) for record in records]
        if any(value is not None for value in values):
            found.append({"name": name, **column(values)})
    return found


def column(values: Sequence[Any]) -> dict[str, Any]:
    """`kind`: number or text. `values`; or `of`, each of them once, and `at`: which one each row has."""
    shown, kind = _alike([_shown(value) for value in values])
    distinct = {value: place for place, value in enumerate(dict.fromkeys(shown))}
    if len(distinct) == 1 or len(distinct) <= len(shown) // 2:
        return {"kind": kind, "of": list(distinct), "at": [distinct[value] for value in shown]}
    return {"kind": kind, "values": shown}


def _alike(values: list[Value]) -> tuple[list[Value], str]:
    """A column of numbers has nothing else but gaps."""
    if all(value is None or not isinstance(value, str) for value in values):
        return values, "number"
    return [value if value is None else str(value) for value in values], "text"


def _shown(value: Any) -> Value:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return value if abs(value) < EXACT else str(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if value is None:
        return None
    if isinstance(value, str):
        return _cut(value, LONGEST_TEXT)
    if isinstance(value, bytes):
        return f"({len(value):,} bytes)"
    if isinstance(value, list | dict | tuple):
        return _cut(json.dumps(value, ensure_ascii=False, default=str), LONGEST_NESTED)
    return _cut(str(value), LONGEST_NESTED)


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[:longest]}… ({len(text) - longest:,} more characters)"
