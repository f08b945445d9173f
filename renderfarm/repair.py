"""`renderfarm run --repair`: make an output say again what its commit objects say, and free the parts whose own are damaged.

    views, index entries      rebuilt from the commit object
    commit object, pictures   set aside under `_renderfarm/damaged/RUN/`, and the run that follows renders the part again

Setting aside is copying all that is stored of the part, then deleting: the error view and the commit object, other views, and the index
entries last. A death in between leaves an entry whose commit object is gone, which `verify` names and the next repair takes up. Were
the entry the first to go, a commit object that only its hash there gives away would pass for a good one from then on.

With a rendering its retries are set aside, whose samples were its errors; what was asked for stays asked, and is rendered again, too.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from renderfarm import commit
from renderfarm.checking import CheckedPart, Checker, Problem
from renderfarm.errors import Fatal, InvalidJob, Transient
from renderfarm.heartbeat import is_alive
from renderfarm.layouts import LAYOUTS
from renderfarm.layouts.base import errors_key
from renderfarm.reading import Output
from renderfarm.records import Part
from renderfarm.schema import ERROR_COLUMNS, IMAGE_COLUMNS
from renderfarm.storage import Store

DAMAGED = "_renderfarm/damaged"
READERS = 8


@dataclass(frozen=True)
class Repaired:
    """What was wrong with one part, and what became of it. `kept`: where what was set aside lies; None: its views or its index entry
    were rebuilt, and nothing is rendered."""

    part: str
    problems: tuple[str, ...]
    kept: str | None

    def __str__(self) -> str:
        more = f" (and {len(self.problems) - 1} more)" if len(self.problems) > 1 else ""
        done = f"set aside in {self.kept} and to be rendered again" if self.kept else "views and index entry rebuilt"
        return f"{self.part}: {done}: {self.problems[0]}{more}"


def refuse_if_alive(store: Store) -> None:
    """A run that is at work would commit into what is being repaired. Raises InvalidJob."""
    if is_alive(progress := commit.read_progress(store)):
        raise InvalidJob(
            f"{store.url}: another run of this output ({progress.get('run_id')}) is at work, or was until less than a minute ago; "
            "stop it, or wait a minute if it is dead, and then repair"
        )


def repair(store: Store, layout: str, run_id: str, each: Callable[[int, int, Repaired | None], None]) -> None:
    """Mend what can be rebuilt, set aside what cannot. `each`: is told part by part, with how many of how many are looked through.

    Raises Transient where a part cannot be read now, which says nothing of damage.
    """
    with ThreadPoolExecutor(READERS, thread_name_prefix="check") as readers:
        checker, folder, last = Checker(Output(store.url), readers), f"{DAMAGED}/{run_id}", -1
        for number, part in enumerate(checker.parts, 1):
            checked = checker.check(part)
            if part.index == last:  # what it was rendered again for is rendered anew, and may end otherwise
                checked.problems.append(Problem(f"{part.name}: the rendering before it was set aside", "damage"))
            repaired = _mend(store, layout, checked, folder)
            last = part.index if checked.damaged else last
            each(number, len(checker.parts), repaired)


def _mend(store: Store, layout: str, checked: CheckedPart, folder: str) -> Repaired | None:
    unread = [problem.text for problem in checked.problems if problem.kind == "unread"]
    if unread:
        raise Transient(f"{unread[0]}; what cannot be read now cannot be repaired: run again later")
    problems, part = tuple(problem.text for problem in checked.problems), checked.part
    if checked.damaged:
        _set_aside(store, layout, checked, folder)
        return Repaired(part.name, problems, folder)
    if not problems and (checked.entries or not checked.readable):
        return None
    # a part without an entry is a whole one, and a run that found it would enter it, too
    commit.find_commit(store, LAYOUTS[layout], part)
    _remove_untrue(store, layout, checked)
    return Repaired(part.name, problems or ("it had no index entry",), None)


def _remove_untrue(store: Store, layout: str, checked: CheckedPart) -> None:
    """What `find_commit` leaves: views of images that there are not, and other entries."""
    assert checked.stored.committed is not None
    if not checked.stored.samples:
        for key in _views(layout, checked.part):
            store.delete(key)
    for entry in checked.entries:
        if entry != commit.entry_key(checked.part, checked.stored.committed):
            store.delete(entry)


def _set_aside(store: Store, layout: str, checked: CheckedPart, folder: str) -> None:
    part = checked.part
    # an error table that is no view would pass for the commit once that of the images is gone
    keys = [errors_key(part), LAYOUTS[layout].commit_key(part), *_views(layout, part), *checked.entries]
    there = [key for key in keys if store.exists(key)]
    for key in (*there, *(key for problem in checked.problems if (key := _overwritten(store, part, problem)))):
        _keep(store, key, f"{folder}/{key}")
    for key in there:
        store.delete(key)


def _overwritten(store: Store, part: Part, problem: Problem) -> str | None:
    """The damaged file, where the part will write it again: not what a damaged table names elsewhere."""
    key = problem.key or ""
    own = key.startswith((f"data/{part.name}/", f"originals/{part.name}/")) and ".." not in key.split("/")
    return key if own and store.exists(key) else None


def _views(layout: str, part: Part) -> list[str]:
    """Keys of the views for readers, which a layout names whatever the tables hold."""
    return list(LAYOUTS[layout].views(part, IMAGE_COLUMNS.empty_table(), ERROR_COLUMNS.empty_table()))


def _keep(store: Store, key: str, copy: str) -> None:
    """By way of a file, since a part may be larger than memory."""
    with tempfile.NamedTemporaryFile(prefix="renderfarm-") as file:
        try:
            with store.open(key) as source:
                shutil.copyfileobj(source, file, 1 << 20)
            file.flush()
        except OSError as error:
            raise Fatal(f"cannot keep {key} before it is repaired: {error.strerror or error}; nothing was changed, run again") from error
        store.put(copy, Path(file.name))
