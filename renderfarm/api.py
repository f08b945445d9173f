"""The Python API: `run` a job from its file or its value."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from renderfarm import commit
from renderfarm.config import Job
from renderfarm.driver import GRACE_S, Driver, Observer, RunSummary
from renderfarm.engines.base import Engine
from renderfarm.errors import Interrupted, InvalidJob, RenderfarmError
from renderfarm.jobfile import load_job
from renderfarm.preparation import Prepared, prepare
from renderfarm.reading import Output
from renderfarm.report.card import write_card
from renderfarm.report.contact_sheet import KEY as SHEET
from renderfarm.report.contact_sheet import write_contact_sheet
from renderfarm.report.figures import figures
from renderfarm.worker import WorkerSpec

EngineName = Literal["ray", "inline"]


def run(
    job: Job | str | Path,
    *,
    engine: EngineName = "ray",
    address: str | None = None,
    observe: Observer = lambda progress: None,
    stop: threading.Event | None = None,
    stop_now: threading.Event | None = None,
    repair: bool = False,
    grace_s: float = GRACE_S,
) -> RunSummary:
    """Render what the job's output does not hold yet; run it again and it continues.

    `engine="inline"` renders in this process with one worker; `address` joins a Ray cluster instead of starting one.
    Setting `stop` ends the run after the leases in flight, or after `grace_s` seconds; `stop_now` at once with Interrupted.
    `repair` checks every committed part first: what can be rebuilt is, what is damaged is set aside and rendered again. Raises
    InvalidJob or Fatal; a bad row raises nothing.
    """
    prepared = prepare(job if isinstance(job, Job) else load_job(job))
    if engine == "ray" and prepared.store.url.startswith("memory://"):
        raise InvalidJob("memory:// is this process's memory, which Ray's workers do not share; use --engine inline or a folder")
    driver = Driver(prepared, stop or threading.Event(), observe, grace_s, stop_now, repair)
    driver.begin()
    _write_card(prepared)  # at the start, so that an interrupted output opens, too
    try:
        summary = driver.run(_engine_maker(prepared, engine, address, driver.progress.run_id))
    except Interrupted:  # at once: the store may be what keeps somebody waiting
        raise
    except RenderfarmError:
        _write_card(prepared)  # parts may have been committed before the end came
        raise
    write_contact_sheet(Output(prepared.store.url))
    _write_card(prepared)
    return summary


def _engine_maker(prepared: Prepared, engine: EngineName, address: str | None, run_id: str) -> Callable[[], Engine]:
    def make() -> Engine:
        spec = WorkerSpec("", prepared.job, prepared.model, prepared.usual, run_id)
        if engine == "inline":
            from renderfarm.engines.inline import InlineEngine

            return InlineEngine(spec)
        from renderfarm.engines.ray import RayEngine

        return RayEngine(spec, address)

    return make


def _write_card(prepared: Prepared) -> None:
    totals, grid, output = commit.totals(prepared.store), prepared.grid(), prepared.job.output
    write_card(
        prepared.store,
        prepared.frozen(),
        name=prepared.job.name,
        rows=prepared.manifest.rows,
        images=totals.images,
        errors=totals.errors,
        finished=grid is not None and totals.parts_done == grid.count,
        sheet=SHEET if prepared.store.exists(SHEET) else None,
        columns=prepared.columns(),
        warnings=prepared.model.warnings,
        card=output.card,
        figures=figures(prepared.store, output.layout),
    )
