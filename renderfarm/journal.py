"""What a run says of itself while it goes on: events, for whoever asks later why a row or a worker ended as it did.

    _renderfarm/logs/RUN_ID.jsonl    {"n": 7, "at": 1796000000.1, "event": "committed", "worker": "w0", "part": "part-00000003", …}

Ray's own logs go with their cluster; these stay with the output. The driver writes them, for its workers too: what a worker has to say
(it is ready, a part is committed with these failed rows, it cannot start, it died) comes to the driver as a value. One object a run, put
anew beside the heartbeat: at once where something went wrong, else every EVERY_S; what a killed driver had not put yet is lost.

An object stays below MAX_BYTES, however long the run is. Of leases and commits the last ones are kept; of what went wrong the first ones
and the last ones; `left_out` says how many lines are gone. Rows are named by ordinal and id, never by their prompts, which are personal,
and a message is shown without what may be a secret.
"""

from __future__ import annotations

import json
import time
from collections import deque
from typing import Any

from renderfarm.records import Lease, Part, Receipt, WorkerReady
from renderfarm.shown import without_secrets

LOGS = "_renderfarm/logs"
EVERY_S = 15.0
FIRST_BYTES, LAST_BYTES, ROUTINE_BYTES = 128 << 10, 256 << 10, 256 << 10
MAX_BYTES = FIRST_BYTES + LAST_BYTES + ROUTINE_BYTES + 1024
MAX_MESSAGE, MAX_ID = 300, 100  # characters
LOOKED_AT = 10 * MAX_MESSAGE  # of a message, of which no more than MAX_MESSAGE is kept


def log_key(run_id: str) -> str:
    return f"{LOGS}/{run_id}.jsonl"


def redacted(text: str) -> str:
    """Without secrets, on one line, and not too long."""
    text = " ".join(without_secrets(text[:LOOKED_AT]).split())
    return text if len(text) <= MAX_MESSAGE else f"{text[: MAX_MESSAGE - 1]}…"


class _Ring:
    """The last lines, as many as have room."""

    def __init__(self, most_bytes: int) -> None:
        self.lines, self.bytes, self.most_bytes = deque[tuple[int, bytes]](), 0, most_bytes

    def add(self, number: int, line: bytes) -> None:
        self.lines.append((number, line))
        self.bytes += len(line)
        while self.bytes > self.most_bytes:
            self.bytes -= len(self.lines.popleft()[1])


class Journal:
    """One run's. Only the driver's thread uses it."""

    def __init__(self) -> None:
        self.first: list[tuple[int, bytes]] = []
        self.first_bytes = 0
        self.last, self.routine = _Ring(LAST_BYTES), _Ring(ROUTINE_BYTES)
        self.number = self.put = 0
        """Events so far, and how many of them the output was given."""
        self.is_urgent, self.put_at = False, -EVERY_S

    def say(self, event: str, *, routine: bool = False, **about: Any) -> None:
        """`about`: JSON values; None and empty ones are left out. `routine`: what comes with each lease."""
        self.number += 1
        said = {name: redacted(value) if name == "reason" else value for name, value in about.items() if value not in (None, "", [])}
        text = json.dumps({"n": self.number, "at": round(time.time(), 3), "event": event, **said}, ensure_ascii=False)
        # a path that an error names may be no Unicode; then it is as JSON escapes it
        line = text.encode(errors="backslashreplace") + b"\n"
        self.is_urgent |= not routine
        if routine:
            self.routine.add(self.number, line)
        elif self.first_bytes + len(line) <= FIRST_BYTES:
            self.first.append((self.number, line))
            self.first_bytes += len(line)
        else:
            self.last.add(self.number, line)

    def due(self, *, anyway: bool = False) -> bytes | None:
        """The object that the output should have now; None where what it has will do for a while. `anyway`: it did not get the last one."""
        waited = time.monotonic() >= self.put_at + EVERY_S
        if not anyway and (self.number == self.put or not (waited or self.is_urgent)):
            return None
        self.put, self.put_at, self.is_urgent = self.number, time.monotonic(), False
        lines = sorted([*self.first, *self.last.lines, *self.routine.lines])
        gone = json.dumps({"n": 0, "left_out": self.number - len(lines)}).encode() + b"\n"
        return gone + b"".join(line for _, line in lines)

    # ------------------------------------------------------------------------------------------ of leases and workers

    def ready(self, info: WorkerReady) -> None:
        about: dict[str, Any] = {
            "device": info.device,
            "node": info.node,
            "load_seconds": round(info.load_seconds, 1),
            "batch_size": info.batch_size,
        }
        self.say("ready", worker=info.worker, **about)

    def leased(self, worker: str, lease: Lease, *, copy: bool = False) -> None:
        for part in lease.parts:
            losses = {"losses": lease.losses or None, "alone": True if lease.announce_as else None, "killers": sorted(lease.killers)}
            self.say("copied" if copy else "leased", routine=True, worker=worker, **_where(part), **losses)

    def committed(self, worker: str, lease: Lease, receipt: Receipt) -> None:
        for part, done in zip(lease.parts, receipt.parts, strict=False):
            failed = [{"row": row, "image_index": k, "row_id": id_[:MAX_ID], "error_class": name} for row, k, id_, name in done.failed]
            counts = {"images": done.images, "errors": done.errors, "bytes": done.bytes, "adopted": done.adopted or None}
            self.say("committed", routine=not done.errors, worker=worker, **_where(part), **counts, failed=failed)

    def retried(self, worker: str, lease: Lease, reason: Exception) -> None:
        for part in lease.parts:
            self.say("failed", worker=worker, **_where(part), reason=f"{type(reason).__name__}: {reason}")

    def lost(self, worker: str, reason: Exception, leases: list[Lease], rows: frozenset[int]) -> None:
        """`rows`: that it was at, where it had said so."""
        parts = [part for lease in leases for part in lease.parts]
        about: dict[str, Any] = {"parts": [part.name for part in parts], "rows": _span(parts), "at_rows": sorted(rows)}
        self.say("lost", worker=worker, reason=f"{type(reason).__name__}: {reason}", **about)


def _where(part: Part) -> dict[str, Any]:
    return {"part": part.name, "rows": [part.start, part.stop]}


def _span(parts: list[Part]) -> list[int]:
    return [min(part.start for part in parts), max(part.stop for part in parts)] if parts else []
