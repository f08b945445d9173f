"""`renderfarm pause`, `resume`, `cancel`: what somebody wants of a run, in a file of the output that the run looks at.

    _renderfarm/control.json    {"run_id": …, "wanted": "pause" | "run" | "cancel", "at": seconds since 1970}

It names the run, so that it says nothing to the next one. Nobody needs to reach the driver.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Literal, cast

from renderfarm import commit
from renderfarm.errors import Fatal, InvalidJob
from renderfarm.heartbeat import is_alive
from renderfarm.shown import Shown
from renderfarm.storage import Store

CONTROL = "_renderfarm/control.json"
Wanted = Literal["pause", "run", "cancel"]
WANTED = ("pause", "run", "cancel")


@dataclass(frozen=True)
class Told(Shown):
    """What a run was told. `before`: what was wanted of it until then; `state`: what it said of itself last."""

    out: str
    run_id: str
    wanted: Wanted
    before: Wanted
    state: str


def read(store: Store, run_id: str, but: dict[str, Any] | None = None) -> Wanted:
    """What is wanted of that run: to go on, where nothing, something damaged, or something of another run is there. `but`: what was
    `asked` before the run began, which says nothing to it.

    Raises Transient for a store that is away, which asks for nothing new.
    """
    return said(store, run_id, but) or "run"


def said(store: Store, run_id: str, but: dict[str, Any] | None = None) -> Wanted | None:
    """What somebody has said to that run last; None where nobody has. Raises as `read` does."""
    found = asked(store)
    if found is None or found == but or family(str(found.get("run_id"))) != family(run_id) or found.get("wanted") not in WANTED:
        return None
    return cast(Wanted, found["wanted"])


def asked(store: Store) -> dict[str, Any] | None:
    """The last request, of whichever run; None where there is none that can be read. Raises as `read` does."""
    try:
        return commit.read_json(store, CONTROL)
    except (KeyError, Fatal):
        return None


def family(run_id: str) -> str:
    """Of runs that share an output's work, the name of the first: what is asked of one of them is asked of all."""
    return run_id.partition("+")[0]


def ask(store: Store, wanted: Wanted) -> Told:
    """Tell the run that is at work. Raises InvalidJob where none is, and where the one that is there is being cancelled."""
    progress = commit.read_progress(store)
    run_id = str(progress.get("run_id"))
    if not is_alive(progress):
        if not progress:
            raise InvalidJob(f"{store.url}: no run has begun here, so there is nothing to {_verb(wanted)}")
        raise InvalidJob(
            f"{store.url}: no run is at work (the last one, {run_id}, said {progress.get('state')} and nothing since), so there is nothing "
            f"to {_verb(wanted)}; `renderfarm run JOB` continues"
        )
    before = read(store, run_id)
    if before == "cancel" and wanted != "cancel":
        raise InvalidJob(f"{store.url}: the run {run_id} is being cancelled; when it has ended, `renderfarm run JOB` continues")
    # said anew even where the same was said before: a run that joined the work since does not listen to what is older
    store.put(CONTROL, commit.to_json({"run_id": run_id, "wanted": wanted, "at": round(time.time(), 3)}))
    return Told(store.url, run_id, wanted, before, str(progress.get("state")))


def _verb(wanted: Wanted) -> str:
    return "resume" if wanted == "run" else wanted
