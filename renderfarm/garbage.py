"""`renderfarm gc`: what lies in an output and belongs to nobody.

    images         below data/part-N/ (layout `files`), and no committed table names them: of attempts that died or lost
    originals      the same below originals/part-N/
    unfinished     _renderfarm/tmp/ and multipart uploads: of writers that died
    announcements  of rows that were once rendered alone; a run reads its own only
    logs           what runs said, but for the last KEPT_LOGS of them

Only names that renderfarm gives are looked at, and only what is older than an age. What a table names is never touched; what is
to be known of a part is its table, so of a part whose table is damaged, lost or another than was committed nothing is removed.

While a run shows signs of life, parts that are not committed are left alone, and so is every unfinished write that began after it.
A name may be written again at any time: the same pixels get the same name. So whether a part is committed, whether a run lives and
how old each file is are asked again right before a part's files are removed.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from renderfarm import commit
from renderfarm.errors import Fatal
from renderfarm.heartbeat import is_alive
from renderfarm.journal import LOGS
from renderfarm.layouts.base import Committed
from renderfarm.reading import Output
from renderfarm.reading import open as open_output
from renderfarm.records import PartId
from renderfarm.shown import Shown
from renderfarm.storage import TEMPORARY, Stored

KINDS = ("images", "originals", "unfinished", "announcements", "logs")
KEPT_LOGS = 100
REMOVERS = 8
_IMAGE = re.compile(r"(data|originals)/part-(\d{8,})(?:\.r([1-9]\d*))?/\d{10,}-\d{4,}-[0-9a-f]{8}\.[a-z]+")
_ANNOUNCED = re.compile(rf"{commit.ANNOUNCED}/part-\d{{8,}}(\.r[1-9]\d*)?\.json")


@dataclass
class Count:
    files: int = 0
    bytes: int = 0


@dataclass
class Collected(Shown):
    """What was removed, or would be, by kind. `left_to_runs`: files of parts that a live run may be rendering. `notes`: parts that
    were left alone because nobody can say what belongs to them."""

    dry_run: bool
    removed: dict[str, Count] = field(default_factory=lambda: {kind: Count() for kind in KINDS})
    left_to_runs: int = 0
    notes: list[str] = field(default_factory=list)


def collect(out: str, older_than_s: float, *, dry_run: bool = False, say: Callable[[str], None] = lambda text: None) -> Collected:
    """Remove what is older than that; `dry_run`: only count. `say`: is told how far it is. Raises InvalidJob for what is no output."""
    output, before = open_output(out), time.time() - older_than_s
    found, entries = Collected(dry_run), commit.index_entries(output.store)
    by_part = _pictures(output, before)
    for done, (part, stored) in enumerate(sorted(by_part.items())):
        say(f"part {done:,} of {len(by_part):,} that hold old pictures")
        _collect_part(output, entries, part, stored, found)
    _collect_unfinished(output, before, found)
    logs = sorted(output.store.stored(LOGS), key=lambda stored: stored.modified)[:-KEPT_LOGS]
    _remove(found, [("logs", stored) for stored in logs if stored.modified < before], output.store.delete)
    return found


# ------------------------------------------------------------------------------------------------------- pictures


def _pictures(output: Output, before: float) -> dict[PartId, dict[str, Stored]]:
    """By part and key: files with a picture's name, as old as that."""
    found: dict[PartId, dict[str, Stored]] = {}
    for folder in ("data", "originals"):
        for stored in output.store.stored(folder):
            if (match := _IMAGE.fullmatch(stored.key)) and stored.modified < before:
                found.setdefault(PartId(int(match[2]), int(match[3] or 0)), {})[stored.key] = stored
    return found


def _collect_part(output: Output, entries: commit.Entries, part: PartId, old: dict[str, Stored], found: Collected) -> None:
    try:
        committed = output.as_committed(part, entries)
    except Fatal as error:
        found.notes.append(f"{error}; none of its files was removed")
        return
    named = set[str]() if committed is None else _named(output, *committed)
    orphans = {key: stored for key, stored in old.items() if key not in named}
    if not named and _run_began(output) is not None:  # not committed, or as errors alone: images that come later win
        found.left_to_runs += len(orphans)
        return
    still = [stored for stored in _of_part(output, part) if orphans.get(stored.key) == stored] if orphans else []
    _remove(found, [("images" if stored.key.startswith("data/") else "originals", stored) for stored in still], output.store.delete)


def _named(output: Output, key: str, committed: Committed) -> set[str]:
    originals = committed.images.column("original_file").to_pylist() if "original_file" in committed.images.column_names else []
    return {*(output.layout.picture_key(key, name) for name in committed.names), *originals}


def _of_part(output: Output, part: PartId) -> Iterator[Stored]:
    """As they are now: what somebody has written again meanwhile has another date."""
    yield from output.store.stored(f"data/{part.name}")
    yield from output.store.stored(f"originals/{part.name}")


# ------------------------------------------------------------------------------------------------ unfinished writes


def _collect_unfinished(output: Output, before: float, found: Collected) -> None:
    """A live run's own are younger than the run."""
    store, before = output.store, min(before, _run_began(output) or before)
    unfinished = {stored.key: stored for stored in store.unfinished() if stored.modified < before}
    _remove(found, [("unfinished", stored) for stored in unfinished.values()], lambda key: store.discard(unfinished[key]))
    probes = [stored for stored in store.stored(TEMPORARY) if stored.modified < before and stored.key not in unfinished]
    announced = [stored for stored in store.stored(commit.ANNOUNCED) if stored.modified < before and _ANNOUNCED.fullmatch(stored.key)]
    _remove(found, [*(("unfinished", stored) for stored in probes), *(("announcements", stored) for stored in announced)], store.delete)


def _run_began(output: Output) -> float | None:
    """When the run that shows signs of life began; None where none does."""
    progress = commit.read_progress(output.store)
    alive = is_alive(progress)
    return float(progress.get("started", 0)) if alive else None


def _remove(found: Collected, what: list[tuple[str, Stored]], delete: Callable[[str], None]) -> None:
    if not found.dry_run:
        with ThreadPoolExecutor(REMOVERS) as pool:
            list(pool.map(delete, [stored.key for _, stored in what]))
    for kind, stored in what:
        found.removed[kind].files += 1
        found.removed[kind].bytes += stored.size
