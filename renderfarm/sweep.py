"""The rows that a sweep and templates make of a manifest's: counted first, then made in one order, a table at a time.

A row becomes, for each combination of the axes and each text of its templates, one row: the axes as they are written, the last
changing first, and texts within them. Its id is the row's, and which of these it is (`cat-0`, `cat-1`, …); columns say the same
(`sweep_source`, `sweep_text`, `sweep_template`), and each axis has its column, so that a report can put pictures into a grid.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from renderfarm.arguments import ARGUMENTS, IMAGE, TEXT, accepts
from renderfarm.config import Job, Prompts, Sweep
from renderfarm.config.render import LOOKALIKES
from renderfarm.errors import InvalidJob
from renderfarm.manifest import EXTRA, ROW, Manifest
from renderfarm.seeds import sample_seed
from renderfarm.templates import Node, Wildcards, parse

ROWS_AT_A_TIME = 8192
SOURCE, TEXT_NUMBER, TEMPLATE = "sweep_source", "sweep_text", "sweep_template"
MAX_VALUES = 1_000_000  # of one axis
KEPT_TEMPLATES = 4096

_RANGE = re.compile(r"(-?\d+(?:\.\d+)?)\.\.(-?\d+(?:\.\d+)?)(?::(\d+(?:\.\d+)?))?")


@dataclass(frozen=True)
class Axes:
    """`values[name][c]`: what the axis says in combination c of all of them."""

    values: dict[str, list[Any]]
    combinations: int


def axes(sweep: Sweep) -> Axes:
    """Raises InvalidJob for what is no axis."""
    product = {name: _values(given, f"sweep.product.{name}", name) for name, given in sweep.product.items()}
    together = {name: _values(given, f"sweep.zip.{name}", name) for name, given in sweep.zip.items()}
    lengths = {name: len(values) for name, values in together.items()}
    if len(set(lengths.values())) > 1:
        said = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise InvalidJob(f"sweep.zip: the lists go together, and have other lengths ({said}); give each the same number of values")
    sizes = [len(values) for values in product.values()] + list(lengths.values())[:1]
    if (total := math.prod(sizes)) > sweep.max_rows:
        raise InvalidJob(
            f"sweep: {' × '.join(map(str, sizes))} = {total:,} combinations for each row are more than sweep.max_rows "
            f"({sweep.max_rows:,}); sweep over less, or raise it"
        )
    places = list(itertools.product(*(range(size) for size in sizes)))
    values = {name: [of[place[axis]] for place in places] for axis, (name, of) in enumerate(product.items())}
    return Axes(values | {name: [of[place[-1]] for place in places] for name, of in together.items()}, total)


def _values(given: Any, place: str, name: str) -> list[Any]:
    is_text = ARGUMENTS.get(name) in (TEXT, IMAGE)
    found: list[Any] = []
    for value in given if isinstance(given, list) else [given]:
        match = _RANGE.fullmatch(value.strip()) if isinstance(value, str) and not is_text else None
        found += _range(match, place) if match else [value]
    if len(set(map(repr, found))) < len(found):
        raise InvalidJob(f"{place}: a value is given twice; its pictures would be the same")
    return found


def _range(match: re.Match[str], place: str) -> list[int] | list[float]:
    """`1..10`, `10..30:10`, `0.5..1:0.1`, `10..1`; both ends belong to it, as far as the step meets them."""
    try:
        first, last, step = Decimal(match[1]), Decimal(match[2]), Decimal(match[3] or 1)
        count = int(abs(last - first) / step) + 1
    except (InvalidOperation, ZeroDivisionError):
        raise InvalidJob(f"{place}: {match[0]!r} is not a range; write it as 1..10, or 1..10:3 for every third") from None
    if count > MAX_VALUES:
        raise InvalidJob(f"{place}: {match[0]} has {count:,} values; the limit is {MAX_VALUES:,}")
    numbers = [first + step * k * (1 if last >= first else -1) for k in range(count)]
    whole = all(number == int(number) for number in numbers) and "." not in match[0].replace("..", " ")
    return [int(number) for number in numbers] if whole else [float(number) for number in numbers]


class _Made(NamedTuple):
    """One row to come: of which row of a table, which combination, which text."""

    row: int
    combination: int
    text: int
    number: int  # among those of its row
    texts: tuple[str | None, ...]  # of `prompts.arguments`


class Expansion:
    """What a job's `sweep` and `prompts` make of a manifest. Raises InvalidJob for axes that mean nothing."""

    def __init__(self, source: Manifest, types: Mapping[str, pa.DataType], job: Job) -> None:
        """`types`: of the source's columns, by their own names."""
        self.source, self.job, self.types = source, job, types
        self.sweep = job.sweep or Sweep()
        self.axes = axes(self.sweep)
        self.wildcards = Wildcards(Path(job.prompts.wildcards if job.prompts else "wildcards"))
        self._parsed: dict[str, Node] = {}
        self.names = dict(source.columns)  # by argument: its column in what comes out
        self._check_axes()
        for argument in ("id", *(["seed"] if self._gives_seeds else [])):
            self.names.setdefault(argument, self._free(argument))
        self.columns = [*dict.fromkeys([*self.names.values(), *source.extras.names, *self._axis_columns(), *self._notes()])]

    @property
    def _gives_seeds(self) -> bool:
        several = self.axes.combinations > 1 and "seed" not in self.axes.values
        return several and self.sweep.noise == "shared" and self.job.seed_policy == "derive"

    def _check_axes(self) -> None:
        known = [*ARGUMENTS, *self.source.extras.names]
        for name, values in self.axes.values.items():
            place = f"sweep.{'product' if name in self.sweep.product else 'zip'}.{name}"
            if name == "id":
                raise InvalidJob(f"{place}: ids are made from the rows' own; sweep over another column")
            if name not in known and not self._is_a_word_of_prompts(name, known):
                near = LOOKALIKES.get(name) or next(iter(difflib.get_close_matches(name, known, n=1)), None)
                hint = f"; did you mean {near!r}?" if near else f"; known: {', '.join(known)}"
                raise InvalidJob(f"{place}: no argument or column of the manifest has this name{hint}")
            if name in self.job.render.override:
                raise InvalidJob(f"{place}: render.override has the job's own {name} win over every row's; leave it out there")
            try:
                type_ = pa.array(values).type
            except (pa.ArrowException, OverflowError, TypeError):
                raise InvalidJob(f"{place}: its values are of several types; give numbers alone, or text alone") from None
            is_argument = name in self.source.columns or (name in ARGUMENTS and name not in self.source.extras.names)
            if is_argument and not accepts(ARGUMENTS[name], type_):
                raise InvalidJob(f"{place}: {name} must be {ARGUMENTS[name]}, and its values are of type {type_}")
            if is_argument:
                self.names.setdefault(name, self._free(name))

    def _is_a_word_of_prompts(self, name: str, known: list[str]) -> bool:
        """Whether an axis is one of the user's own, for `${name}` in prompts, and no misspelt argument."""
        return self.job.prompts is not None and name not in LOOKALIKES and not difflib.get_close_matches(name, known, cutoff=0.75)

    def _free(self, name: str) -> str:
        taken = {*self.source.columns.values(), *self.source.extras.names}
        return name if name not in taken else self._free(f"sweep_{name}")

    def _axis_columns(self) -> dict[str, str]:
        """The column of each axis, and its name."""
        return {self.names.get(name, name): name for name in self.axes.values}

    def _notes(self) -> list[str]:
        return [self._free(name) for name in (SOURCE, *([TEXT_NUMBER, TEMPLATE] if self.job.prompts else []))]

    def mapping(self) -> dict[str, str | None]:
        """`manifest.columns` with which the rows that come out are read."""
        plain = {name: None for name in self.columns if name in ARGUMENTS and name not in {*self.names, *self.names.values()}}
        return {**self.names, **plain}

    # ------------------------------------------------------------------------------------------------ counting

    def count(self) -> int:
        """Raises InvalidJob beyond `sweep.max_rows`, and for a template that cannot be read, before any row is made."""
        rows = total = 0
        prompts = self.job.prompts
        for table in self._source_tables():
            rows += len(table)
            if prompts is None or prompts.templates == "random":
                total += len(table) * self.axes.combinations * (prompts.samples if prompts else 1)
            if prompts is not None:
                total += self._count_texts(table, prompts)
            if total > self.sweep.max_rows:
                of = f"the first {rows:,} of {self.source.rows:,} rows" if rows < self.source.rows else f"{rows:,} rows"
                raise InvalidJob(
                    f"{of}, with {self.axes.combinations:,} combinations of axes and their texts, become {total:,} rows, and "
                    f"sweep.max_rows is {self.sweep.max_rows:,}; sweep over less, use templates: random, or raise it"
                )
        if not total:
            raise InvalidJob("manifest.where selects no row; correct it")
        return total

    def _count_texts(self, table: pa.Table, prompts: Prompts) -> int:
        """Reads every template; the rows that they make, if every text is made."""
        swept = [name for name in prompts.arguments if name in self.axes.values]
        total = 0
        for row in range(len(table)):
            for combination in range(self.axes.combinations if swept else 1):
                total += math.prod(node.count for node in self._nodes(table, row, combination, prompts) if node is not None)
        return 0 if prompts.templates == "random" else total * (1 if swept else self.axes.combinations)

    def _source_tables(self) -> Iterator[pa.Table]:
        starts = range(0, self.source.rows, ROWS_AT_A_TIME)
        return self.source.stream((start, min(start + ROWS_AT_A_TIME, self.source.rows)) for start in starts)

    # ------------------------------------------------------------------------------------------------ templates

    def _nodes(self, table: pa.Table, row: int, combination: int, prompts: Prompts) -> list[Node | None]:
        return [self._node(self._text(table, row, combination, name), table, row, name) for name in prompts.arguments]

    def _text(self, table: pa.Table, row: int, combination: int, name: str) -> str | None:
        if name in self.axes.values:
            value = self.axes.values[name][combination]
        else:
            value = table.column(name)[row].as_py() if name in table.column_names else None
        return None if value is None else str(value)

    def _node(self, text: str | None, table: pa.Table, row: int, name: str) -> Node | None:
        if text is None:
            return None
        if text not in self._parsed:
            if len(self._parsed) >= KEPT_TEMPLATES:
                self._parsed.clear()
            try:
                self._parsed[text] = parse(text, self.wildcards)
            except InvalidJob as error:
                raise self._refusal(table, row, name, error) from None
        return self._parsed[text]

    def _refusal(self, table: pa.Table, row: int, name: str, error: InvalidJob) -> InvalidJob:
        where = f"sweep: {name}" if name in self.axes.values else f"{self.source.where_is(table.column(ROW)[row].as_py())}: {name}"
        return InvalidJob(f"{where}: {error}")

    def _texts(self, table: pa.Table, row: int, combination: int, prompts: Prompts) -> Iterator[tuple[str | None, ...]]:
        nodes = self._nodes(table, row, combination, prompts)
        values = _Values(self, table, row, combination)
        try:
            if prompts.templates == "combinatorial":
                yield from _every(nodes, values)
                return
            identity = f"{prompts.prompt_seed}\x00{self._id(table, row)}"
            for sample in range(prompts.samples):
                digest = hashlib.sha256(f"{identity}\x00{sample}".encode()).digest()
                chance = random.Random(int.from_bytes(digest, "big"))
                yield tuple(None if node is None else node.draw(values, chance) for node in nodes)
        except InvalidJob as error:
            raise self._refusal(table, row, prompts.arguments[0], error) from None

    def _id(self, table: pa.Table, row: int) -> str:
        own = table.column("id")[row].as_py() if "id" in table.column_names else None
        return str(table.column(ROW)[row].as_py() if own is None else own)

    # ------------------------------------------------------------------------------------------------ rows

    def tables(self) -> Iterator[pa.Table]:
        """Every row, some thousand at a time."""
        for table in self._source_tables():
            made = self._made(table)
            while some := list(itertools.islice(made, ROWS_AT_A_TIME)):
                yield self._table(table, some)

    def _made(self, table: pa.Table) -> Iterator[_Made]:
        prompts = self.job.prompts
        for row in range(len(table)):
            number = 0
            for combination in range(self.axes.combinations):
                texts = self._texts(table, row, combination, prompts) if prompts else ((),)
                for text, of_arguments in enumerate(texts):
                    yield _Made(row, combination, text, number, of_arguments)
                    number += 1

    def _table(self, table: pa.Table, some: list[_Made]) -> pa.Table:
        taken = table.take(pa.array([made.row for made in some], pa.int64()))
        columns = {name: taken.column(argument) for argument, name in self.source.columns.items()}
        columns |= {name: taken.column(EXTRA + name) for name in self.source.extras.names}
        types = {name: self.types[name] for name in columns}
        for column, axis in self._axis_columns().items():
            values = pa.array(self.axes.values[axis])
            columns[column], types[column] = values.take(pa.array([made.combination for made in some])), values.type
        ids = {row: self._id(table, row) for row in {made.row for made in some}}
        if self._gives_seeds:
            own = taken.column("seed").to_pylist() if "seed" in self.source.columns else [None] * len(some)
            seeds = zip(some, own, strict=True)
            columns[self.names["seed"]] = [self._seed(made, ids[made.row]) if seed is None else seed for made, seed in seeds]
            types[self.names["seed"]] = pa.int64()
        columns[self.names["id"]] = [f"{ids[made.row]}-{made.number}" for made in some]
        notes: list[list[Any]] = [[ids[made.row] for made in some]]
        if prompts := self.job.prompts:
            for place, argument in enumerate(prompts.arguments):
                if argument in self.names:
                    columns[self.names[argument]] = [made.texts[place] for made in some]
                    types[self.names[argument]] = pa.string()
            notes += [[made.text for made in some], [self._text(table, made.row, made.combination, prompts.arguments[0]) for made in some]]
        columns |= dict(zip(self._notes(), notes, strict=True))
        types |= {self.names["id"]: pa.string(), **dict(zip(self._notes(), (pa.string(), pa.int32(), pa.string()), strict=False))}
        return pa.table({name: _as(columns[name], types[name]) for name in self.columns})

    def _seed(self, made: _Made, id_: str) -> int:
        """As the row without its axes would have for its first image."""
        return sample_seed("derive", self.job.seed, f"{id_}/{made.text}" if self.job.prompts else id_, None, 0)


class _Values(Mapping[str, object]):
    """A row's columns by name, as `${name}` names them; an axis says what the row itself does not."""

    def __init__(self, of: Expansion, table: pa.Table, row: int, combination: int) -> None:
        self.of, self.table, self.row, self.combination = of, table, row, combination

    def __getitem__(self, name: str) -> object:
        if name in self.of.axes.values:
            return self.of.axes.values[name][self.combination]
        for column in (name, EXTRA + name):
            if column in self.table.column_names:
                return self.table.column(column)[self.row].as_py()
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self.of.axes.values, *(name.removeprefix(EXTRA) for name in self.table.column_names)]))

    def __len__(self) -> int:
        return len(list(iter(self)))


def _every(nodes: Sequence[Node | None], values: Mapping[str, object]) -> Iterator[tuple[str | None, ...]]:
    """The texts of each with those of the others, none of them kept."""
    if not nodes:
        yield ()
        return
    for first in (None,) if nodes[0] is None else nodes[0].texts(values):
        for others in _every(nodes[1:], values):
            yield (first, *others)


def _as(values: Any, type_: pa.DataType) -> Any:
    return pa.array(values, type_) if isinstance(values, list) else values.cast(type_, safe=False)
