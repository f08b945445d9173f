"""What a run tells of itself while it goes on: counts, which `watch` and `status` show (`progress`), and events, which `logs` prints
(`journal`). The driver says once what has happened; nothing here decides anything.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import Any

from renderfarm.commit import Totals
from renderfarm.engines.base import Done, Failed
from renderfarm.errors import RenderfarmError
from renderfarm.journal import Journal
from renderfarm.plan import Grid
from renderfarm.progress import Progress, WorkerProgress
from renderfarm.records import Lease, PartId, WorkerReady
from renderfarm.shown import without_secrets
from renderfarm.summary import RunSummary

IN_THE_RECORD = ("run_id", "job", "key", "logical_date", "state", "new_images", "new_errors")


class Account:
    """One run's. Only the driver's thread uses it."""

    def __init__(self, progress: Progress) -> None:
        self.progress, self.journal = progress, Journal()
        self._known = self._state()

    # ------------------------------------------------------------------------------------------ of the run

    def began(self, *, shares: bool) -> None:
        known = self.progress
        about: dict[str, Any] = {"job": known.job, "key": known.key, "logical_date": known.logical_date, "shares": shares or None}
        self.journal.say("began", **about, rows_of_manifest=known.rows)

    def planned(self, grid: Grid, totals: Totals) -> None:
        self.progress.parts = grid.count
        self.progress.recount(totals)
        self.journal.say("planned", parts=grid.count, part_rows=grid.part_rows, parts_done=totals.parts_done)

    def retries(self, parts: Collection[PartId]) -> None:
        self.journal.say("retries", parts=[part.name for part in list(parts)[:100]], count=len(parts))

    def is_away(self, trouble: str | None) -> None:
        """What keeps the run from going on, if anything does."""
        self.progress.trouble = None if trouble is None else without_secrets(trouble)

    def note_changes(self) -> None:
        """In the journal, what has changed of the run as a whole."""
        if (now := self._state()) != self._known:
            state, trouble = now
            self.journal.say("waits" if trouble and trouble != self._known[1] else "state", state=state, reason=trouble)
        self._known = now

    def _state(self) -> tuple[str, str | None]:
        return self.progress.state, self.progress.trouble

    def snapshot(self, grid: Grid | None, is_done: bytearray, in_flight: list[Lease]) -> dict[str, Any]:
        """What another machine may know now. `is_done`: by part of the grid."""
        if grid is not None:
            done = grid.rows_in(self.progress.parts_done, last=bool(is_done) and bool(is_done[-1]))
            flying = {part.index: part.stop - part.start for lease in in_flight for part in lease.parts if not part.retry}
            planned = grid.rows_in(grid.count, last=bool(grid.wanted) and grid.wanted[-1].stop == grid.total)
            held = sum(flying.values())
            self.progress.rows_by_state = {"done": done, "in flight": held, "left": max(0, planned - done - held)}
        return self.progress.snapshot()

    def ended(self, summary: RunSummary) -> None:
        self.journal.say("ended", state=summary.state, exit_code=summary.exit_code, images=summary.images, errors=summary.errors)

    def ended_by(self, error: BaseException) -> dict[str, Any]:
        """The run's record, for who asks later."""
        self.journal.say("ended", state=self.progress.state, reason=f"{type(error).__name__}: {error}")
        known = {name: getattr(self.progress, name) for name in IN_THE_RECORD}
        return known | {"error": without_secrets(str(error)), "error_class": type(error).__name__}

    # ------------------------------------------------------------------------------------------ of workers

    def asked_for(self, worker: str) -> None:
        self.progress.forget()
        self.progress.workers[worker] = WorkerProgress()
        self.journal.say("asked for", routine=True, worker=worker)

    def ready(self, info: WorkerReady) -> None:
        shown = self.progress.workers[info.worker]
        shown.state, shown.device, shown.node = "ready", info.device, info.node
        self.progress.first_ready = self.progress.first_ready or time.time()
        self.progress.state = "RUNNING"
        self.journal.ready(info)

    def failed_to_start(self, worker: str, error: RenderfarmError, state: str = "failed to start") -> None:
        shown = self.progress.workers[worker]
        shown.state, shown.reason = state, without_secrets(str(error))
        self.journal.say(state, worker=worker, reason=f"{type(error).__name__}: {error}")

    def leaving(self, worker: str) -> None:
        self.progress.workers[worker].state = "leaving"
        self.journal.say("leaving", worker=worker)

    def let_go(self, worker: str, reason: str) -> None:
        self.progress.workers[worker].state = "let go"
        self.journal.say("let go", worker=worker, reason=reason)

    def all_let_go(self) -> None:
        for shown in self.progress.workers.values():
            shown.state = "let go" if shown.state in ("ready", "starting", "leaving") else shown.state

    def parked(self, worker: str) -> None:
        self.progress.workers[worker].state = "benched"
        self.journal.say("benched", worker=worker, reason="its device is benched")

    def lost(self, worker: str, error: RenderfarmError, leases: list[Lease], rows: frozenset[int]) -> None:
        """`rows`: that it was at, where it had said so."""
        self.progress.lost_workers += 1
        self.progress.workers[worker].state = "lost"
        self.journal.lost(worker, error, leases, rows)

    def away(self, worker: str, error: RenderfarmError) -> None:
        """Before it was ready, for what is not its own fault."""
        self.progress.workers[worker].state = "lost"
        self.journal.lost(worker, error, [], frozenset())

    def benched(self, worker: str, reason: str) -> None:
        """With the node or the device that it died on."""
        self.progress.workers[worker].reason = without_secrets(reason)
        self.journal.say("benched", worker=worker, reason=reason)

    # ------------------------------------------------------------------------------------------ of leases

    def leased(self, worker: str, lease: Lease, *, copy: bool) -> None:
        self.progress.copies += copy
        self.journal.leased(worker, lease, copy=copy)

    def committed(self, event: Done) -> None:
        self.progress.add(event.worker, event.receipt)
        self.journal.committed(event.worker, event.lease, event.receipt)

    def retried(self, event: Failed) -> None:
        assert event.lease is not None
        self.journal.retried(event.worker, event.lease, event.error)
