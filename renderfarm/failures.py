"""`renderfarm errors`, `retry`, `waive`: the samples that have no image by now, and what somebody wants done about them.

None of them needs a driver: they read and write the output alone. What `retry` asks for, a run renders: one that is at work when its
other parts are done, else the next.
"""

from __future__ import annotations

import contextlib
import difflib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from renderfarm import commit, errors, requests
from renderfarm.errors import AlreadyExists, Fatal, InvalidJob
from renderfarm.heartbeat import is_alive
from renderfarm.manifest import parse_ranges
from renderfarm.reading import Output
from renderfarm.reading import open as open_output
from renderfarm.records import PartId, Retry, SampleKey
from renderfarm.schema import ERROR_COLUMNS
from renderfarm.shown import Shown

By = Literal["class", "message", "worker"]
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Failure:
    """A sample that has no image. `part`: the rendering that said so last. `asked_again`: a run is to render it once more. `waived`: it
    may stay so, for that `reason`."""

    row: int
    row_id: str
    image_index: int
    error_class: str
    error_message: str
    retryable: bool
    prompt_sha256: str | None
    part: str
    asked_again: bool
    waived: bool
    reason: str | None

    @property
    def key(self) -> SampleKey:
        return SampleKey(self.row, self.image_index)

    @property
    def retry_takes(self) -> bool:
        return self.retryable and not self.asked_again and not self.waived


def failures(output: Output, *, look_for_requests: bool = False) -> Iterator[tuple[int, list[Failure], list[PartId]]]:
    """By part of the grid, ascending, with the rendering that each comes from. `look_for_requests`: else none is `asked_again`; it takes
    a request of the store for each that waits."""
    waivers = requests.waivers(output.store)
    renderings = _renderings(output) if look_for_requests and requests.asked(output.store) else {}
    for index, table, by in output.errors_by_part():
        waived, waiting, found = requests.waived(output.store, waivers.get(index, ())), set[SampleKey](), []
        with contextlib.suppress(Fatal):  # a damaged request: the run that comes to it says so
            waiting = _waiting(output, index, renderings)
        for row, part in zip(table.to_pylist(), by, strict=True):
            key = SampleKey(row["row"], row["image_index"])
            said: dict[str, Any] = {name: row[name] for name in ERROR_COLUMNS.names}
            said |= {"part": part.name, "asked_again": key in waiting, "waived": key in waived, "reason": waived.get(key)}
            found.append(Failure(**said))
        yield index, found, by


@dataclass
class Group:
    """Failures that have something in common. `retry_takes`: what a plain `retry` would ask for. `example`: the first one's message."""

    value: str
    count: int
    waived: int
    retryable: int
    asked_again: int
    retry_takes: int
    example: str


def groups(output: Output, by: By) -> list[Group]:
    """The largest first. By `worker`: which process on which machine said so, as far as the index knows."""
    found: dict[str, Group] = {}
    name_of = _worker_of(output) if by == "worker" else None
    for _, failed, parts in failures(output, look_for_requests=True):
        for failure, part in zip(failed, parts, strict=True):
            value = name_of(part) if name_of else failure.error_class if by == "class" else failure.error_message
            group = found.setdefault(value, Group(value, 0, 0, 0, 0, 0, failure.error_message))
            group.count += 1
            group.waived += failure.waived
            group.retryable += failure.retryable
            group.asked_again += failure.asked_again
            group.retry_takes += failure.retry_takes
    return sorted(found.values(), key=lambda group: (-group.count, group.value))


def _worker_of(output: Output) -> Callable[[PartId], str]:
    entries, names = commit.index_entries(output.store), dict[PartId, str]()

    def name(part: PartId) -> str:
        if part not in names:
            try:
                said = commit.committed_by(output.store, entries[part].key)
                names[part] = f"{said['worker']} on {said['host']} in run {said['run']}"
            except (KeyError, Fatal):  # an entry that was mended, or is to be
                names[part] = UNKNOWN
        return names[part]

    return name


# ------------------------------------------------------------------------------------------------------ which of them


@dataclass(frozen=True)
class Choice:
    """Which failures: of these classes, of these rows (`1-3,7`), or all. Of nothing given, `retry` takes what may succeed."""

    classes: tuple[str, ...] = ()
    rows: str | None = None
    all: bool = False

    def __post_init__(self) -> None:
        if self.all and (self.classes or self.rows is not None):
            raise InvalidJob("--all is every failed sample; leave it out, or --class and --rows")
        if self.rows is not None:
            parse_ranges(self.rows, "--rows")

    @property
    def given(self) -> bool:
        return bool(self.all or self.classes or self.rows is not None)

    def chooser(self, rows: int) -> Callable[[Failure], bool]:
        """`rows`: of the manifest. Raises InvalidJob for ranges that lie outside."""
        ranges = None if self.rows is None else parse_ranges(self.rows, "--rows")
        if outside := next((wanted for wanted in ranges or () if wanted.start >= rows), None):
            raise InvalidJob(f"--rows {outside.start}: there is no such row; the manifest has rows 0 to {rows - 1}")

        def chosen(failure: Failure) -> bool:
            named = not self.classes or failure.error_class in self.classes
            return named and (ranges is None or any(failure.row in wanted for wanted in ranges))

        return chosen

    def check_classes(self, there: Counter[str]) -> None:
        """A word that is no class at all is a mistake; a class that nothing failed with is none."""
        known = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, errors.RenderfarmError)}
        for name in self.classes:
            if name not in known | there.keys():
                near = next(iter(difflib.get_close_matches(name, sorted(known | there.keys()), n=1)), None)
                has = ", ".join(f"{kind} ({count:,})" for kind, count in there.most_common()) or "no error"
                raise InvalidJob(
                    f"--class {name}: no error is called that{f', did you mean {near}?' if near else ';'} the output has: {has}"
                )


# ------------------------------------------------------------------------------------------------------ retry, waive


@dataclass
class Asked(Shown):
    """What `retry` did. `samples`: to be rendered again, as `parts`; `already`: asked for before, and not rendered yet; left alone:
    `not_retryable`, since the same would come out, and `waived`. `alive`: the run that will take them up, if one is at work."""

    out: str
    samples: int = 0
    parts: list[str] = field(default_factory=list)
    already: int = 0
    not_retryable: int = 0
    waived: int = 0
    alive: str | None = None


def retry(out: str, choice: Choice) -> Asked:
    """Ask for failed samples to be rendered again: those that may succeed, or exactly those that `choice` names. What is waived is left
    alone unless its row is named."""
    output = open_output(out)
    chosen = choice.chooser(output.grid.rows)
    progress, found, classes = commit.read_progress(output.store), Asked(output.store.url), Counter[str]()
    found.alive = str(progress.get("run_id")) if is_alive(progress) else None
    renderings = _renderings(output)
    for index, failed, _ in failures(output):
        classes.update(failure.error_class for failure in failed)
        wanted = set()
        for failure in filter(chosen, failed):
            if failure.waived and choice.rows is None:
                found.waived += 1
            elif not failure.retryable and not choice.given:
                found.not_retryable += 1
            else:
                wanted.add(failure.key)
        if wanted:
            _ask(output, index, wanted, found, renderings)
    choice.check_classes(classes)
    return found


Renderings = dict[int, tuple[list[PartId], list[PartId]]]
"""Of each part of the grid: which retries were asked for, and which renderings are committed."""


def _renderings(output: Output) -> Renderings:
    found: Renderings = {}
    for part in requests.asked(output.store):
        found.setdefault(part.index, ([], []))[0].append(part)
    for part in commit.index_entries(output.store):
        found.setdefault(part.index, ([], []))[1].append(part)
    return found


def _waiting(output: Output, index: int, renderings: Renderings) -> set[SampleKey]:
    """What was asked for and is not rendered yet."""
    asked, committed = renderings.get(index, ([], []))
    found: set[SampleKey] = set()
    for part in asked:
        with contextlib.suppress(KeyError):  # somebody has removed it meanwhile
            found |= set() if part in committed else requests.read(output.store, part).samples
    return found


def _ask(output: Output, index: int, wanted: set[SampleKey], found: Asked, renderings: Renderings) -> None:
    """Under the part's next number. Who asks at the same time may have it first."""
    while True:
        left = wanted - _waiting(output, index, renderings)
        if not left:
            break
        asked, committed = renderings.get(index, ([], []))
        number = 1 + max((part.retry for part in (*asked, *committed)), default=0)
        try:
            requests.ask(output.store, Retry(PartId(index, number), frozenset(left)))
        except AlreadyExists:
            renderings.update(_renderings(output))
            continue
        found.parts.append(PartId(index, number).name)
        break
    found.samples += len(left)
    found.already += len(wanted) - len(left)


@dataclass
class Waived(Shown):
    """What `waive` did. `samples`: waived now; `already`: before."""

    out: str
    samples: int = 0
    already: int = 0


def waive(out: str, choice: Choice, reason: str | None) -> Waived:
    """Say that failed samples may stay errors. Raises InvalidJob where `choice` names none."""
    if not choice.given:
        raise InvalidJob("say which failed samples may stay errors: --class, --rows, or --all")
    output = open_output(out)
    chosen = choice.chooser(output.grid.rows)
    found, classes = Waived(output.store.url), Counter[str]()
    for index, failed, _ in failures(output):
        classes.update(failure.error_class for failure in failed)
        wanted = [failure for failure in failed if chosen(failure)]
        new = [failure.key for failure in wanted if not failure.waived]
        if new:
            requests.waive(output.store, index, new, reason)
        found.samples += len(new)
        found.already += len(wanted) - len(new)
    choice.check_classes(classes)
    return found
