"""What somebody asks of an output's failed samples, in files that need no driver to be written or read.

    _renderfarm/retries/part-00000012.r1.json       {"samples": [[96, 0], …]}: render these again, as that part
    _renderfarm/waived/part-00000012.1f0c9a3e.json  {"samples": [[96, 0], …], "reason": …}: these may stay errors

A request is made once (create-if-absent) and never changed; it is open until its part is committed. Of two that ask at the same time
for the same number one loses, and looks again. A waiver's name holds digits of its own hash, so that saying the same twice is one file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Collection, Iterable
from typing import Any

from renderfarm.errors import AlreadyExists, Fatal
from renderfarm.records import PartId, Retry, SampleKey
from renderfarm.storage import Store

RETRIES = "_renderfarm/retries"
WAIVED = "_renderfarm/waived"
_RETRY = re.compile(rf"{RETRIES}/part-(\d{{8,}})\.r([1-9]\d*)\.json")
_WAIVER = re.compile(rf"{WAIVED}/part-(\d{{8,}})\.[0-9a-f]{{8}}\.json")


def key(part: PartId) -> str:
    return f"{RETRIES}/{part.name}.json"


def ask(store: Store, retry: Retry) -> None:
    """Raises AlreadyExists where another one has that number."""
    store.put_if_absent(key(retry.part), _json({"samples": _pairs(retry.samples)}))


def asked(store: Store) -> list[PartId]:
    """Every request that was ever made, ascending."""
    return sorted(PartId(int(match[1]), int(match[2])) for name in store.list(RETRIES) if (match := _RETRY.fullmatch(name)))


def read(store: Store, part: PartId) -> Retry:
    """Raises KeyError where there is none, Fatal for a damaged one."""
    advice = "remove it, and `renderfarm retry` asks again for what failed"
    return Retry(part, _samples(_read(store, key(part), advice), f"{store.url}/{key(part)}", advice))


def waive(store: Store, index: int, samples: Collection[SampleKey], reason: str | None) -> None:
    data = _json({"samples": _pairs(samples), "reason": reason})
    with contextlib.suppress(AlreadyExists):  # the same was said before
        store.put_if_absent(f"{WAIVED}/{PartId(index).name}.{hashlib.sha256(data).hexdigest()[:8]}.json", data)


def waivers(store: Store) -> dict[int, list[str]]:
    """Keys of the waivers by part: one listing, no reads."""
    found: dict[int, list[str]] = {}
    for name in store.list(WAIVED):
        if match := _WAIVER.fullmatch(name):
            found.setdefault(int(match[1]), []).append(name)
    return found


def waived(store: Store, names: Iterable[str]) -> dict[SampleKey, str | None]:
    """The samples that these waivers name, with the reasons. Raises Fatal for a damaged one."""
    found: dict[SampleKey, str | None] = {}
    advice = "remove it, and waive again what may stay an error"
    for name in names:
        value = _read(store, name, advice)
        found |= dict.fromkeys(_samples(value, f"{store.url}/{name}", advice), value.get("reason"))
    return found


def _pairs(samples: Iterable[SampleKey]) -> list[list[int]]:
    return [[sample.row, sample.image_index] for sample in sorted(samples)]


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _read(store: Store, name: str, advice: str) -> dict[str, Any]:
    try:
        value: Any = json.loads(store.read(name))
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise _damaged(f"{store.url}/{name}", "not JSON", advice)
    return value


def _samples(value: dict[str, Any], where: str, advice: str) -> frozenset[SampleKey]:
    pairs = value.get("samples")
    whole = isinstance(pairs, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(type(number) is int and number >= 0 for number in pair) for pair in pairs
    )
    if not whole:
        raise _damaged(where, "no list of [row, image]", advice)
    return frozenset(SampleKey(*pair) for pair in value["samples"])


def _damaged(where: str, reason: str, advice: str) -> Fatal:
    return Fatal(f"{where} is damaged ({reason}); {advice}")
