"""`renderfarm plan`: what a run would do, and what that costs, as far as it is known."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from renderfarm import commit
from renderfarm.after import scale
from renderfarm.encode import FORMATS, ORIGINALS
from renderfarm.preparation import Prepared
from renderfarm.records import Part
from renderfarm.report.live import duration


def estimate(prepared: Prepared) -> dict[str, Any]:
    """Rows and parts exactly; images exactly unless rows say how many; bytes and time from what was rendered already."""
    job, model, grid = prepared.job, prepared.model, prepared.grid()
    entries = commit.index_entries(prepared.store)
    committed = commit.parts_of_the_grid(entries)
    if committed:
        commit.check_job(prepared.store, prepared.frozen())
    counts = commit.counts(entries)
    images_done, errors_done = counts.images, counts.errors
    asked_again = sum(len(retry.samples) for retry in commit.open_retries(prepared.store, entries))
    rows_done = _rows(grid.part(index) for index in committed) if grid is not None else 0
    rows_wanted = _rows(grid) if grid is not None else prepared.grid_of(1).count
    per_row = (images_done + errors_done) / rows_done if rows_done and job.manifest.where is None else job.render.num_images_per_prompt or 1
    images_left = round((rows_wanted - rows_done) * per_row) + asked_again
    if images_done:
        bytes_per_image = counts.bytes / images_done
    else:
        pixels = (job.render.height or model.height) * (job.render.width or model.width)
        kept = 1 if job.output.keep_originals else 0
        finished = pixels * scale(prepared.after_files, job.after) ** 2
        bytes_per_image = finished * FORMATS[job.output.format].bytes_per_pixel + pixels * kept * FORMATS[ORIGINALS].bytes_per_pixel
    rate = _last_rate(prepared)
    rows_decide = job.manifest.where is not None or "num_images_per_prompt" in prepared.manifest.columns
    return {
        "job": job.name,
        "model": job.model.id,  # as the job says it: `${ENV}` may stand for what is nobody else's to see
        "out": prepared.store.url,
        "manifest files": len(prepared.manifest.files),
        "columns read": ", ".join(
            name if name == argument else f"{argument} from {name}" for argument, name in prepared.manifest.columns.items()
        ),
        "columns that travel": ", ".join(prepared.manifest.extras.names) or None,
        "rows": prepared.manifest.rows,
        "rows per part": grid.part_rows if grid is not None else "auto: measured by the first worker",
        "parts (leases)": grid.count if grid is not None else None,
        "parts done": len(committed),
        "parts left": grid.count - len(committed) if grid is not None else None,
        "images done": images_done,
        "errors done": errors_done,
        "of them to be rendered again": asked_again,
        "images left": images_left,
        "images left is": "an upper bound: `where` leaves rows out, or rows say how many" if rows_decide else "exact",
        "bytes left (estimate)": round(images_left * bytes_per_image),
        "images/s of the last run": rate,
        "time left (estimate)": duration(images_left / rate) if rate else None,
    }


def _rows(parts: Iterable[Part]) -> int:
    return sum(part.stop - part.start for part in parts)


def _last_rate(prepared: Prepared) -> float | None:
    return float(commit.read_progress(prepared.store).get("images_per_second", 0)) or None
