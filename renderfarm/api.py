"""`run` a job, from its file or its value: from preparation to the last word."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Protocol

from renderfarm import notify, tracking
from renderfarm.config import Job
from renderfarm.driver import GRACE_S, Driver, Observer
from renderfarm.engines.base import Engine
from renderfarm.errors import EXIT_INTERNAL, EXIT_INTERRUPTED, Interrupted, InvalidJob, RenderfarmError, Transient
from renderfarm.jobfile import at_its_line, load_job
from renderfarm.preparation import Prepared, prepare
from renderfarm.progress import Progress
from renderfarm.report.views import write_card_of, write_views
from renderfarm.shown import without_secrets
from renderfarm.summary import RunSummary
from renderfarm.worker import WorkerSpec

EngineName = Literal["ray", "inline"]


class HasSpec(Protocol):
    """A `renderfarm.Job`."""

    @property
    def spec(self) -> Job: ...


def run(
    job: Job | HasSpec | Prepared | str | Path,
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
    notify.check(prepared.job.notify)
    tracking.check(prepared.job.track)
    tracker = tracking.Tracker(prepared)

    def watch(progress: Progress) -> None:
        observe(progress)
        tracker(progress)

    driver = Driver(prepared, stop or threading.Event(), watch, grace_s, stop_now, repair)
    try:
        driver.begin()
        summary = _run(prepared, driver, engine, address)
    except Exception as error:  # whatever ended the run, somebody waits to hear of it
        for warning in _tell(prepared, tracker, _ended_by(error, driver, prepared), at_once=isinstance(error, Interrupted)):
            error.add_note(warning)
        raise
    # whoever stops us waits
    return _warned(summary, _tell(prepared, tracker, summary.to_dict(), at_once=summary.exit_code == EXIT_INTERRUPTED))


def _tell(prepared: Prepared, tracker: tracking.Tracker, ended: dict[str, Any], *, at_once: bool) -> list[str]:
    """Everybody who wants to hear of the end. Warnings."""
    warnings = tracker.end(ended, at_once=at_once)
    said = notify.send(prepared.job.notify, ended, at_once=at_once)
    return [*warnings, said] if said else warnings


def _prepared(job: Job | HasSpec | Prepared | str | Path) -> Prepared:
    if isinstance(job, Prepared):
        return job
    if isinstance(spec := getattr(job, "spec", job), Job):
        return prepare(spec)
    assert isinstance(job, str | Path)
    with at_its_line(job):
        return prepare(load_job(job))


def _run(prepared: Prepared, driver: Driver, engine: EngineName, address: str | None) -> RunSummary:
    write_card_of(prepared, prepared.store)  # at the start, so that an interrupted output opens, too
    try:
        summary = driver.run(_engine_maker(prepared, engine, address, driver.progress.run_id))
    except (Interrupted, Transient):  # at once: the store may be what keeps somebody waiting
        raise
    except RenderfarmError as error:
        for warning in write_views(prepared, None):  # parts may have been committed before the end came
            error.add_note(warning)
        raise
    return _warned(summary, write_views(prepared, summary))


def _warned(summary: RunSummary, warnings: list[str]) -> RunSummary:
    return replace(summary, warnings=(*summary.warnings, *warnings)) if warnings else summary


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
        "error": without_secrets(str(error)),
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
