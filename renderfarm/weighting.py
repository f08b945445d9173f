r"""Prompt weights, as users of A1111's web UI write them.

    (x)       x counts 1.1 times as much      \( \) \[ \] \\   the character itself
    [x]       and here 1.1 times less         BREAK            what follows starts a chunk of its own
    (x:1.5)   1.5 times as much

Nested weights multiply. A bracket that nobody closes weighs all that follows; one that nobody opened is text, and so is
a colon without a number behind it. What else that program reads in a prompt (texts that change between steps, networks)
is refused: as text it would be painted.
"""

from __future__ import annotations

import re
from itertools import groupby
from typing import NamedTuple

from renderfarm.errors import InvalidInput

MAX_WEIGHT = 10.0
MAX_DEPTH = 100  # brackets that are open at once: each is a pass over what it holds
_STEP = 1.1


class Fragment(NamedTuple):
    text: str
    weight: float


Part = tuple[Fragment, ...]  # what stands between two BREAKs; neighbours differ in weight

_PIECE = re.compile(
    r"\\(?P<literal>[()\[\]\\])"
    r"|(?P<opening>[(\[])"
    r"|(?::\s*(?P<number>[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+))\s*)?(?P<closing>[)\]])"
    r"|(?P<break>\bBREAK\b)"
    r"|(?P<network><\w+:[^<>]+>)"
    r"|(?P<and>\bAND\b)"
    r"|.",
    re.DOTALL,
)
_REFUSED = {
    "network": "{} names a network, which is not read here; LoRA adapters go into the column adapters",
    "and": "AND joins prompts that are painted apart, which is not done here; write it small",
}
_CHANGES = r"[…:number] and […|…] change the text between steps, which is not done here; keep one text, or write \[ for the bracket"


def parse(text: str, name: str = "prompt") -> tuple[Part, ...]:
    """The text's parts. `name`: of the argument, for the InvalidInput that says what is wrong with it.

    >>> parse("an (important) word")
    ((Fragment(text='an ', weight=1.0), Fragment(text='important', weight=1.1), Fragment(text=' word', weight=1.0)),)
    """
    pieces: list[tuple[str | None, float]] = []  # None: BREAK
    opened: dict[str, list[int]] = {"(": [], "[": []}  # where: indices of pieces

    def weigh(start: int, factor: float) -> None:
        pieces[start:] = [(piece, weight * factor) for piece, weight in pieces[start:]]

    for match in _PIECE.finditer(text):
        kind, found, closing, number = match.lastgroup, match[0], match["closing"], match["number"]
        if kind in _REFUSED:
            raise InvalidInput(f"{name}: {_REFUSED[kind].format(found)}")
        if kind == "opening":
            opened[found].append(len(pieces))
            if sum(map(len, opened.values())) > MAX_DEPTH:
                raise InvalidInput(f"{name}: more than {MAX_DEPTH} brackets are open; close them, or write \\( for the bracket itself")
        elif closing == ")" and opened["("]:
            weigh(opened["("].pop(), _STEP if number is None else float(number))
        elif closing == "]" and opened["["]:
            start = opened["["].pop()
            if number or any(piece == "|" for piece, _ in pieces[start:]):
                raise InvalidInput(f"{name}: {_CHANGES}")
            weigh(start, 1 / _STEP)
        else:
            pieces.append((None if kind == "break" else match["literal"] or found, 1.0))
    for start in opened["("]:
        weigh(start, _STEP)
    for start in opened["["]:
        weigh(start, 1 / _STEP)
    return _parts(pieces, name)


def _parts(pieces: list[tuple[str | None, float]], name: str) -> tuple[Part, ...]:
    parts: list[Part] = [()]
    for (is_break, weight), run in groupby(pieces, lambda piece: (piece[0] is None, piece[1])):
        if is_break:
            parts += [()] * len(list(run))
            continue
        fragment = Fragment("".join(text for text, _ in run if text), weight)
        if not 0 <= weight <= MAX_WEIGHT:
            limits = f"it must be between 0 and {MAX_WEIGHT:g} (nested weights multiply)"
            raise InvalidInput(f"{name}: {fragment.text[:40]!r} has the weight {weight:g}; {limits}")
        parts[-1] += (fragment,)
    return tuple(parts)


def words(parts: tuple[Part, ...]) -> str:
    """The text without its marks."""
    return " ".join("".join(fragment.text for fragment in part) for part in parts)
