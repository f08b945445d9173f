r"""Prompt templates, as users of dynamicprompts write them.

    {red|blue}             one of these                  {2$$a|b|c}          two of them, in any order, joined by a comma
    {3::red|blue}          red three times as often      {1-2$$ and $$a|b}   one or two, joined by " and "
    __colours__            a line of colours.txt         ${style}            the row's own column `style`
    __animals/c*__         of all files that match       \{ \| \} \$         the sign itself

All of them nest, and a wildcard's lines are templates, too (`3::red` weighs one; `#` begins a remark). A template that is read
knows how many texts it has before any is made. Whatever cannot be what its writer meant is refused: as text it would be painted.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import math
import os
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn, Protocol

from renderfarm.errors import InvalidJob

MAX_DEPTH = 50
MAX_TEXT = 100_000  # characters: wildcards that name each other could make texts without end
MAX_WAYS = 1_000_000
MAX_FILE_BYTES = 16 << 20
JOINER = ","

_TOKEN = re.compile(
    r"\\(?P<literal>[{}|$])"
    r"|\$\{(?P<column>[^{}|$]+)\}"
    r"|__(?P<wildcard>[A-Za-z0-9*](?:[\w*./-]*?[A-Za-z0-9*])?)__"
    r"|(?P<sign>[{}|])"
)
_HOW_MANY = re.compile(r"(?:(?P<low>\d+)?(?P<dash>-)?(?P<high>\d+)?)\$\$(?:(?P<joiner>[^{}|$]*)\$\$)?")
_WEIGHT = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)::")

Row = Mapping[str, object]


class Node(Protocol):
    @property
    def count(self) -> int:
        """Texts in all."""

    @property
    def longest(self) -> int:
        """Characters of the longest text, values of columns aside."""

    def texts(self, row: Row) -> Iterator[str]:
        """Each text once, in the order of the template; the last choice changes first."""

    def draw(self, row: Row, chance: random.Random) -> str: ...


@dataclass(frozen=True)
class Words:
    text: str
    count = 1

    @property
    def longest(self) -> int:
        return len(self.text)

    def texts(self, row: Row) -> Iterator[str]:
        yield self.text

    def draw(self, row: Row, chance: random.Random) -> str:
        return self.text


@dataclass(frozen=True)
class Column:
    name: str
    count, longest = 1, 0

    def texts(self, row: Row) -> Iterator[str]:
        if self.name not in row:
            close = difflib.get_close_matches(self.name, list(row), n=1)
            raise InvalidJob(f"${{{self.name}}}: the row has no such column" + (f"; did you mean {close[0]!r}?" if close else ""))
        value = row[self.name]
        yield "" if value is None else str(value)

    def draw(self, row: Row, chance: random.Random) -> str:
        return next(self.texts(row))


@dataclass(frozen=True)
class Several:
    """One after the other."""

    parts: tuple[Node, ...]
    count: int = field(init=False)
    longest: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "count", math.prod(part.count for part in self.parts))
        object.__setattr__(self, "longest", sum(part.longest for part in self.parts))

    def texts(self, row: Row) -> Iterator[str]:
        return ("".join(texts) for texts in _every(self.parts, row))

    def draw(self, row: Row, chance: random.Random) -> str:
        return "".join(part.draw(row, chance) for part in self.parts)


@dataclass(frozen=True)
class Choice:
    """`low` to `high` of the options, none twice, in any order."""

    options: tuple[Node, ...]
    weights: tuple[float, ...]
    low: int = 1
    high: int = 1
    joiner: str = JOINER
    count: int = field(init=False)
    longest: int = field(init=False)

    def __post_init__(self) -> None:
        ways = [1] + [0] * self.high  # by how many are taken, in one order
        for option in self.options:
            for taken in range(self.high, 0, -1):
                ways[taken] += ways[taken - 1] * option.count
        object.__setattr__(self, "count", sum(ways[taken] * math.factorial(taken) for taken in range(self.low, self.high + 1)))
        longest = sorted((option.longest for option in self.options), reverse=True)[: self.high]
        object.__setattr__(self, "longest", sum(longest) + max(0, self.high - 1) * len(self.joiner))

    def texts(self, row: Row) -> Iterator[str]:
        for taken in range(self.low, self.high + 1):
            for chosen in itertools.permutations(self.options, taken):
                yield from (self.joiner.join(texts) for texts in _every(chosen, row))

    def draw(self, row: Row, chance: random.Random) -> str:
        left, taken = list(range(len(self.options))), []
        for _ in range(self.low + int(chance.random() * (self.high - self.low + 1))):
            weights = [self.weights[place] for place in left]
            left.remove(place := left[_weighted(weights, chance)])
            taken.append(self.options[place].draw(row, chance))
        return self.joiner.join(taken)


def _every(parts: Sequence[Node], row: Row) -> Iterator[tuple[str, ...]]:
    if not parts:
        yield ()
        return
    for first in parts[0].texts(row):
        for others in _every(parts[1:], row):
            yield (first, *others)


def _weighted(weights: list[float], chance: random.Random) -> int:
    """A place, as often as its weight says; `random()` is what Python promises to keep, its `choices` is not."""
    point = chance.random() * sum(weights) if any(weights) else 0.0
    for place, weight in enumerate(weights):
        if point < weight:
            return place
        point -= weight
    return max(place for place, weight in enumerate(weights) if weight or not any(weights))


class Wildcards:
    """The files of one folder, `name.txt` for `__name__`; none outside it is read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sha256: dict[str, str] = {}
        """Of the files that were read so far, by name."""
        self._read: dict[str, Choice] = {}

    def choice(self, name: str, within: tuple[str, ...]) -> Choice:
        """Every line of the files that match. `within`: the wildcards whose lines name this one."""
        if name in within:
            raise InvalidJob(f"__{name}__: its lines lead back to itself ({' → '.join((*within, name))}); break the circle")
        if name not in self._read:
            options: dict[Node, float] = {}
            for path in self._files(name):
                for node, weight in self._lines(path, (*within, name)):
                    options.setdefault(node, weight)
            if not options:
                raise InvalidJob(f"__{name}__: no line in it to choose from; write one choice a line")
            self._read[name] = _choice(list(options.items()))
        return self._read[name]

    def _files(self, name: str) -> list[Path]:
        if ".." in name.split("/") or name.startswith("/"):
            raise InvalidJob(f"__{name}__ leads out of {self.folder}; put the file into it")
        found = sorted(path for path in self.folder.glob(f"{name}.txt") if path.is_file())
        if outside := [path for path in found if not path.resolve().is_relative_to(self.folder.resolve())]:
            raise InvalidJob(f"__{name}__: {outside[0]} is a link out of {self.folder}; put the file into it")
        if not found:
            known = [path.relative_to(self.folder).with_suffix("").as_posix() for path in self.folder.glob("**/*.txt")]
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean __{close[0]}__?" if close else f"; there are: {', '.join(sorted(known)[:20]) or 'none'}"
            raise InvalidJob(f"__{name}__: no {name}.txt in {self.folder} (prompts.wildcards){hint}")
        return found

    def _lines(self, path: Path, within: tuple[str, ...]) -> Iterator[tuple[Node, float]]:
        name = path.relative_to(self.folder).as_posix()
        try:
            if path.stat().st_size > MAX_FILE_BYTES:
                raise InvalidJob(f"{path}: larger than 16 MiB, which is no list of words; make it smaller")
            data = path.read_bytes()
            lines = data.decode("utf-8-sig").splitlines()
        except OSError as error:
            raise InvalidJob(f"{path}: cannot be read: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise InvalidJob(f"{path}, line {data.count(10, 0, error.start) + 1}: not UTF-8; save the file as UTF-8") from None
        self.sha256[name] = hashlib.sha256(data).hexdigest()
        for number, line in enumerate(lines, 1):
            if (text := line.strip()) and not text.startswith("#"):
                try:
                    weight = _WEIGHT.match(text)
                    yield _parse(text[weight.end() :] if weight else text, self, within), float(weight[1]) if weight else 1.0
                except InvalidJob as error:
                    raise InvalidJob(f"{os.path.relpath(path, self.folder.parent)}, line {number}: {error}") from None


def parse(text: str, wildcards: Wildcards) -> Node:
    """Raises InvalidJob that says where in the text the mistake is."""
    return _parse(text, wildcards, ())


def _parse(text: str, wildcards: Wildcards, within: tuple[str, ...]) -> Node:
    reader = _Reader(text, wildcards, within)
    node = reader.sequence(0)
    if reader.place < len(text):
        reader.refuse("a } that closes nothing; write \\} for the sign itself")
    if node.longest > MAX_TEXT:
        raise InvalidJob(f"a text of it would have {node.longest:,} characters; the limit is {MAX_TEXT:,}: choose fewer words")
    return node


def _choice(options: Iterable[tuple[Node, float]], low: int = 1, high: int | None = 1, joiner: str = JOINER) -> Choice:
    """Options that say the same count once."""
    unique = dict(reversed(list(options)))
    nodes = tuple(reversed(unique))
    most = len(nodes) if high is None else min(high, len(nodes))  # as dynamicprompts: no more than there are
    if most > 1 and most * len(nodes) > MAX_WAYS:
        raise InvalidJob(f"up to {most:,} of {len(nodes):,} choices are more than anybody can count; say how many, as in {{2$$…}}")
    return Choice(nodes, tuple(unique[node] for node in nodes), min(low, most), most, joiner)


class _Reader:
    def __init__(self, text: str, wildcards: Wildcards, within: tuple[str, ...]) -> None:
        self.text, self.wildcards, self.within, self.place = text, wildcards, within, 0

    def refuse(self, why: str, place: int | None = None) -> NoReturn:
        at = self.place if place is None else place
        raise InvalidJob(f"{self.text[max(0, at - 20) : at + 20]!r}, character {at + 1}: {why}")

    def sequence(self, depth: int) -> Node:
        """Up to the end, or to a `|` or `}` of the choice that this is in."""
        parts: list[Node] = []
        while (match := _TOKEN.search(self.text, self.place)) is not None:
            before, begin = self.text[self.place : match.start()], match.start()
            if match["sign"] in ("|", "}") and (depth or match["sign"] == "}"):
                self.place = begin
                return _joined([*parts, Words(before)])
            parts.append(Words(before))
            self.place = match.end()
            if match["sign"] == "{":
                parts.append(self._braces(begin, depth + 1))
            elif match["column"]:
                parts.append(Column(match["column"].strip()))
            elif match["wildcard"]:
                parts.append(self.wildcards.choice(match["wildcard"], self.within))
            else:
                parts.append(Words(match["literal"] or match["sign"]))
        rest, self.place = self.text[self.place :], len(self.text)
        return _joined([*parts, Words(rest)])

    def _braces(self, begin: int, depth: int) -> Node:
        if depth > MAX_DEPTH:
            self.refuse(f"more than {MAX_DEPTH} braces within each other")
        if self.text.startswith(("~", "@", "!"), self.place):
            self.refuse("a choice that says how it is drawn is not known here; the job says it, in prompts.templates")
        low, joiner = 1, JOINER
        high: int | None = 1
        if (asked := _HOW_MANY.match(self.text, self.place)) is not None:
            low, high, joiner = self._how_many(asked)
            self.place = asked.end()
        options: list[tuple[Node, float]] = []
        while True:
            weight = _WEIGHT.match(self.text, self.place)
            self.place = weight.end() if weight else self.place
            options.append((_stripped(self.sequence(depth)), float(weight[1]) if weight else 1.0))
            if self.place == len(self.text):
                self.refuse("a { that nothing closes; write \\{ for the sign itself", begin)
            self.place += 1
            if self.text[self.place - 1] == "}":
                break
        if not any(weight for _, weight in options):
            self.refuse("every choice has the weight 0, so none can be drawn", begin)
        if len(options) == 1 and isinstance(alone := options[0][0], Choice) and asked is not None:  # {2$$__colours__}: two of its lines
            options = list(zip(alone.options, alone.weights, strict=True))
        return _choice(options, low, high, joiner)

    def _how_many(self, asked: re.Match[str]) -> tuple[int, int | None, str]:
        if not any(asked[name] for name in ("low", "dash", "high")):
            self.refuse("$$ without a number before it; write {2$$a|b|c}")
        low = int(asked["low"] or 1)
        high = int(asked["high"]) if asked["high"] else None if asked["dash"] else low
        if high is not None and high < low:
            self.refuse(f"from {low} to {high} is nothing; write the smaller number first")
        return low, high, JOINER if asked["joiner"] is None else asked["joiner"]


def _joined(parts: list[Node]) -> Node:
    kept = tuple(part for part in parts if part != Words(""))
    return kept[0] if len(kept) == 1 else Several(kept) if kept else Words("")


def _stripped(node: Node) -> Node:
    """Without the space before its first word, as dynamicprompts reads an option; the one behind it may be meant."""
    if isinstance(node, Words):
        return Words(node.text.lstrip())
    if isinstance(node, Several) and isinstance(first := node.parts[0], Words):
        return _joined([Words(first.text.lstrip()), *node.parts[1:]])
    return node
