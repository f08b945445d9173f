"""`renderfarm status OUT`: how far an output is, read from the store alone."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

from renderfarm import commit
from renderfarm.heartbeat import is_alive, state_of
from renderfarm.reading import Output
from renderfarm.reading import open as open_output


def read_status(out: str) -> dict[str, Any]:
    """Counts come from the parts' index, so they are right even if no driver lives; the rest from its last heartbeat."""
    output: Output = open_output(out)
    entries = commit.index_entries(output.store)
    totals = commit.totals(output.store, entries)
    progress = commit.read_progress(output.store)
    grid = commit.frozen_grid(output.store, output.job)
    running, age = is_alive(progress), time.time() - progress.get("updated", 0)
    return {
        "out": output.store.url,
        "job": progress.get("job"),
        "run": progress.get("run_id"),
        "run key": progress.get("key"),
        "logical date": progress.get("logical_date"),
        "state": state_of(progress, unfinished=grid is not None and totals.parts_done < grid.count),
        "rows": sum(file["rows"] for file in output.job["manifest"]["files"]),
        "rows by state": progress.get("rows_by_state") if running else None,
        "parts": grid.count if grid is not None else None,
        "parts done": totals.parts_done,
        "images": totals.images,
        "errors": totals.errors,
        "error classes": totals.classes,
        "errors waived": totals.waived,
        "errors to be rendered again": sum(len(retry.samples) for retry in commit.open_retries(output.store, entries)),
        "bytes": totals.bytes,
        "images/s": progress.get("images_per_second"),
        "seconds left": progress.get("eta_seconds") if running else None,
        "workers ready": sum(worker["state"] == "ready" for worker in progress.get("workers", {}).values()) if running else 0,
        "workers left out": dict(Counter(w["reason"] for w in progress.get("workers", {}).values() if w.get("reason"))),
        "waiting for": progress.get("trouble") if running else None,
        "last sign of life (s ago)": round(age) if progress else None,
    }
