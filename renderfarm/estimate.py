"""`renderfarm plan`: what a run would do, and what that costs, as far as it is known."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from renderfarm import commit
from renderfarm.after import scale
from renderfarm.commit import Counts
from renderfarm.encode import FORMATS, ORIGINALS
from renderfarm.preparation import Prepared
from renderfarm.records import Part
from renderfarm.report.live import duration


@dataclass(frozen=True)
class Rate:
    """Images per second of one worker, and where the number is from."""

    images_per_second: float
    source: str


def plan(prepared: Prepared) -> dict[str, Any]:
    """The same, once the rows of a sweep are made and kept: what is planned is what will be rendered."""
    prepared.rows.keep(prepared.store)
    return estimate(prepared)


def estimate(prepared: Prepared) -> dict[str, Any]:
    """Rows and parts exactly; images exactly unless rows say how many; bytes, time and cost from what was rendered already, or from
    what the job states."""
    job, grid = prepared.job, prepared.grid()
    entries = commit.index_entries(prepared.store)
    committed = commit.parts_of_the_grid(entries)
    if committed:
        commit.check_job(prepared.store, prepared.frozen())
    counts = commit.counts(entries)
    asked_again = sum(len(retry.samples) for retry in commit.open_retries(prepared.store, entries))
    rows_done = _rows(grid.part(index) for index in committed) if grid is not None else 0
    rows_wanted = _rows(grid) if grid is not None else prepared.grid_of(1).count
    images_left = round((rows_wanted - rows_done) * _images_per_row(prepared, counts, rows_done)) + asked_again
    rows_decide = job.manifest.where is not None or "num_images_per_prompt" in prepared.manifest.columns
    progress = commit.read_progress(prepared.store)
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
        "rows done": rows_done,
        "rows left": rows_wanted - rows_done,
        "rows per part": grid.part_rows if grid is not None else "auto: measured by the first worker",
        "parts (leases)": grid.count if grid is not None else None,
        "parts done": len(committed),
        "parts left": grid.count - len(committed) if grid is not None else None,
        "images done": counts.images,
        "errors done": counts.errors,
        "of them to be rendered again": asked_again,
        "images left": images_left,
        "images left is": "an upper bound: `where` leaves rows out, or rows say how many" if rows_decide else "exact",
        **_slots(prepared, images_left, progress),
        "bytes left (estimate)": round(images_left * _bytes_per_image(prepared, counts)),
        "images/s of the last run": float(progress.get("images_per_second", 0)) or None,
        **_time_and_cost(prepared, images_left, progress),
    }


def _images_per_row(prepared: Prepared, counts: Counts, rows_done: int) -> float:
    if rows_done and prepared.job.manifest.where is None:
        return (counts.images + counts.errors) / rows_done
    return prepared.job.render.num_images_per_prompt or 1


def _bytes_per_image(prepared: Prepared, counts: Counts) -> float:
    job, model = prepared.job, prepared.model
    if counts.images:
        return counts.bytes / counts.images
    pixels = (job.render.height or model.height) * (job.render.width or model.width)
    kept = 1 if job.output.keep_originals else 0
    finished = pixels * scale(prepared.after_files, job.after) ** 2
    return finished * FORMATS[job.output.format].bytes_per_pixel + pixels * kept * FORMATS[ORIGINALS].bytes_per_pixel


def _slots(prepared: Prepared, images_left: int, progress: dict[str, Any]) -> dict[str, Any]:
    """How much of the batches is filler: as the last run had it, else what is left over of the last batch."""
    if useful := progress.get("useful_slots"):
        return {"slots that are filler": f"{1 - useful:.1%}", "of which is known": "the last run"}
    size = prepared.job.workers.batch_size
    if size == "auto" or not images_left:
        return {"slots that are filler": None, "of which is known": None}
    return {
        "slots that are filler": f"{1 - images_left / (-(-images_left // size) * size):.1%}",
        "of which is known": f"the last batch of {size}, if all rows share batches; sizes and guidance on or off separate them",
    }


def _time_and_cost(prepared: Prepared, images_left: int, progress: dict[str, Any]) -> dict[str, Any]:
    """Hours of accelerators do not depend on how many share them; the time does."""
    job, rate = prepared.job, _rate(prepared, progress)
    if rate is None:
        unknown = "unknown: nothing was rendered yet; `renderfarm preview` says images/s, for cost.images_per_second"
        return {"rate": unknown, "time left (estimate)": None, "accelerator hours left (estimate)": None, "cost left (estimate)": None}
    hours = images_left / rate.images_per_second / 3600
    price = job.cost.per_hour
    return {
        "rate": f"{rate.images_per_second:.4g} images/s and worker, {rate.source}",
        "time left (estimate)": f"{duration(hours * 3600 / job.workers.max)} with {job.workers.max} workers",
        "accelerator hours left (estimate)": round(hours * job.workers.devices_per_worker, 4),
        "cost left (estimate)": None if price is None else f"{hours * price:,.2f} {job.cost.currency}",
    }


def _rate(prepared: Prepared, progress: dict[str, Any]) -> Rate | None:
    stated = prepared.job.cost.images_per_second
    if last := float(progress.get("images_per_second", 0)):
        rendered = sum(worker.get("images", 0) > 0 for worker in progress.get("workers", {}).values()) or prepared.job.workers.max
        return Rate(last / rendered, f"measured by the last run ({rendered} workers)")
    if seconds := commit.measured_seconds(prepared.store):
        return Rate(1 / seconds, "measured by the first worker")
    return Rate(stated, "stated in the job (cost.images_per_second)") if stated else None


def _rows(parts: Iterable[Part]) -> int:
    return sum(part.stop - part.start for part in parts)
