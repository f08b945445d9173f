"""control.json: what somebody wants of a run, said through the store, so that nobody has to reach its driver."""

from __future__ import annotations

from typing import Literal, get_args

from renderfarm import commit
from renderfarm.errors import Fatal
from renderfarm.storage import Store

CONTROL = "_renderfarm/control.json"
Wanted = Literal["run", "pause", "cancel"]


def read(store: Store, run_id: str) -> Wanted:
    """What is wanted of a run. A file that is of another run, missing or unreadable asks for nothing."""
    try:
        said = commit.read_json(store, CONTROL)
    except (KeyError, Fatal):
        return "run"
    wanted: Wanted = said.get("wanted", "run")
    return wanted if family(str(said.get("run_id"))) == family(run_id) and wanted in get_args(Wanted) else "run"


def family(run_id: str) -> str:
    """Of runs that share an output's work: the name of the first."""
    return run_id.partition("+")[0]
