"""The Python API: `run` a job from its file or its value."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from renderfarm import commit, notify
from renderfarm.config import Job
from renderfarm.driver import GRACE_S, Driver, Observer
from renderfarm.engines.base import Engine
from renderfarm.errors import EXIT_INTERNAL, EXIT_INTERRUPTED, Interrupted, InvalidJob, RenderfarmError
from renderfarm.jobfile import at_its_line, load_job
from renderfarm.preparation import Prepared, prepare
from renderfarm.reading import Output
from renderfarm.report.card import write_card
from renderfarm.report.contact_sheet import KEY as SHEET
from renderfarm.report.contact_sheet import write_contact_sheet
from renderfarm.report.contents import runs
from renderfarm.report.figures import figures
from renderfarm.report.gallery import Bounds
from renderfarm.report.html import AT_THE_END, IN_A_HURRY, write_report
from renderfarm.report.html import KEY as REPORT
from renderfarm.summary import RunSummary
from renderfarm.worker import WorkerSpec

EngineName = Literal["ray", "inline"]


def run(
    job: Job | Prepared | str | Path,
    *,
    engine: EngineName = "ray",
    address: str | None = None,
    observe: Observer = lambda progress: None,
    stop: threading.Event | None = None,
    stop_now: threading.Event | None = None,
    repair: bool = False,
    grace_s: float = GRACE_S,
) -> RunSummary:
    """Render what the output of a job (or its file, or what `prepare` made of it) does not hold yet; run it again and it continues.

    `engine="inline"` renders in this process with one worker; `address` joins a Ray cluster instead of starting one.
    Setting `stop` ends the run after the leases in flight, or after `grace_s` seconds; `stop_now` at once with Interrupted.
    `repair` checks every committed part first: what can be rebuilt is, what is damaged is set aside and rendered again. Raises
    InvalidJob or Fatal; a bad row raises nothing.
    """
    prepared = _prepared(job)
    if engine == "ray" and prepared.store.url.startswith("memory://"):
        raise InvalidJob("memory:// is this process's memory, which Ray's workers do not share; use --engine inline or a folder")
    driver = Driver(prepared, stop or threading.Event(), observe, grace_s, stop_now, repair)
    told = prepared.job.notify
    notify.check(told)
    try:
        driver.begin()
        summary = _run(prepared, driver, engine, address)
    except Exception as error:  # whatever ended the run, somebody waits to hear of it
        if warning := notify.send(told, _ended_by(error, driver, prepared), at_once=isinstance(error, Interrupted)):
            error.add_note(warning)
        raise
    warning = notify.send(told, summary.to_dict(), at_once=summary.exit_code == EXIT_INTERRUPTED)  # whoever stops us waits
    return replace(summary, warnings=(*summary.warnings, warning)) if warning else summary


def _prepared(job: Job | Prepared | str | Path) -> Prepared:
    if isinstance(job, Prepared):
        return job
    if isinstance(job, Job):
        return prepare(job)
    with at_its_line(job):
        return prepare(load_job(job))


def _run(prepared: Prepared, driver: Driver, engine: EngineName, address: str | None) -> RunSummary:
    _write_card(prepared)  # at the start, so that an interrupted output opens, too
    try:
        summary = driver.run(_engine_maker(prepared, engine, address, driver.progress.run_id))
    except Interrupted:  # at once: the store may be what keeps somebody waiting
        raise
    except RenderfarmError:
        _write_card(prepared)  # parts may have been committed before the end came
        _write_report(prepared, AT_THE_END)
        raise
    write_contact_sheet(Output(prepared.store.url))
    _write_card(prepared)
    if _is_shown(prepared, summary):
        return summary
    warning = _write_report(prepared, IN_A_HURRY if summary.exit_code == EXIT_INTERRUPTED else AT_THE_END)
    return replace(summary, warnings=(*summary.warnings, warning)) if warning else summary


def _is_shown(prepared: Prepared, summary: RunSummary) -> bool:
    """Whether there is a report that shows the output as it is: nothing is new, and the run before ended the same way."""
    if summary.new_images or summary.new_errors or not prepared.store.exists(REPORT):
        return False
    return [run["state"] for run in runs(Output(prepared.store.url), most=2)] == [summary.state] * 2


def _write_report(prepared: Prepared, bounds: Bounds) -> str | None:
    """Why there is none, if there is none."""
    try:
        write_report(Output(prepared.store.url), bounds)
    except Exception as error:  # a view: whatever stands in its way, the run has ended as it has
        what = f"{type(error).__name__}: {error}"
        return f"the report was not written ({what}); `renderfarm report {prepared.store.url}` tries again"
    return None


def _ended_by(error: Exception, driver: Driver, prepared: Prepared) -> dict[str, Any]:
    """What is told of a run that an error ended: of a summary what is known of it, and the error."""
    code = error.exit_code if isinstance(error, RenderfarmError) else EXIT_INTERNAL
    known = driver.progress.snapshot()
    of_the_run = ("run_id", "job", "key", "logical_date", "rows", "images", "errors", "waived", "new_images", "new_errors", "bytes")
    counts = {name: known[name] for name in of_the_run}
    state = "INTERRUPTED" if isinstance(error, Interrupted) else "FAILED"
    return counts | {
        "out": prepared.store.url,
        "state": state,
        "exit_code": code,
        "error_classes": known["error_classes"],
        "seconds": round(driver.progress.seconds, 2),
        "error": str(error),
        "error_class": type(error).__name__,
    }


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
    grid, output, entries = prepared.grid(), prepared.job.output, commit.index_entries(prepared.store)
    counts = commit.counts(entries)
    write_card(
        prepared.store,
        prepared.frozen(),
        name=prepared.job.name,
        rows=prepared.manifest.rows,
        images=counts.images,
        errors=counts.errors,
        finished=grid is not None and counts.parts_done == grid.count,
        sheet=SHEET if prepared.store.exists(SHEET) else None,
        columns=prepared.columns(),
        warnings=prepared.model.warnings,
        card=output.card,
        figures=figures(prepared.store, output.layout, entries),
    )
