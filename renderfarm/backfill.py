"""`renderfarm backfill`: the runs of days that are past, one after the other."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from renderfarm import commit
from renderfarm.api import run
from renderfarm.config import expand_env
from renderfarm.errors import EXIT_OK, EXIT_ROWS_FAILED, InvalidJob
from renderfarm.failures import Choice, retry
from renderfarm.heartbeat import is_alive
from renderfarm.jobfile import load_job
from renderfarm.storage import open_store
from renderfarm.summary import RunSummary

Reprocess = Literal["missing", "failed", "all"]
State = Literal["missing", "unfinished", "running", "failed", "done"]
MAX_DAYS = 10_000
# Which days are rendered: never those that another run is rendering
WANTED: dict[Reprocess, tuple[State, ...]] = {
    "missing": ("missing", "unfinished"),
    "failed": ("missing", "unfinished", "failed"),
    "all": ("missing", "unfinished", "failed", "done"),
}


@dataclass(frozen=True)
class Day:
    """A logical date, what its output was like before, and what is done, or `None`: it is left alone."""

    date: str
    out: str
    state: State
    images: int
    errors: int
    action: str | None


@dataclass(frozen=True)
class Done:
    date: str
    summary: RunSummary


def days(first: str, last: str, every: int = 1) -> list[str]:
    """From one date to another, both of them, and neither yet to come. Raises InvalidJob."""
    try:
        begin, end = dt.date.fromisoformat(first), dt.date.fromisoformat(last)
    except ValueError:
        raise InvalidJob(f"--from {first} --to {last}: write dates as YYYY-MM-DD") from None
    if end < begin:
        raise InvalidJob(f"--from {first} --to {last}: the first day is behind the last one; exchange them")
    if end > (today := max(dt.date.today(), dt.datetime.now(dt.UTC).date())):
        raise InvalidJob(
            f"--to {last}: that day is yet to come; give {today} at most, or run that day alone: run JOB --logical-date {last}"
        )
    if (count := (end - begin).days // every + 1) > MAX_DAYS:
        raise InvalidJob(f"--from {first} --to {last}: {count:,} runs; the limit is {MAX_DAYS:,}")
    return [(begin + dt.timedelta(days=every * k)).isoformat() for k in range(count)]


def outputs(job: Path, dates: list[str], sets: list[str] | None = None) -> list[str]:
    """The output of each day, as the job writes it. Raises InvalidJob for a job whose days would share one."""
    outs = [load_job(job, sets, None, date).output.path for date in dates]
    if len(set(outs)) < len(outs):
        raise InvalidJob(f"{job}: two days have the output {max(outs, key=outs.count)}; put {{{{ ds }}}} into output.path")
    return outs


def survey(job: Path, dates: list[str], reprocess: Reprocess, sets: list[str] | None = None) -> list[Day]:
    """What there is of each day, and what would be done."""
    return [_day(date, expand_env(out), reprocess) for date, out in zip(dates, outputs(job, dates, sets), strict=True)]


def _day(date: str, out: str, reprocess: Reprocess) -> Day:
    state, images, errors = _state(out)
    action = None
    if state in WANTED[reprocess]:
        action = {
            "missing": "render",
            "unfinished": "go on",
            "failed": "render what failed again",
            "done": "check, and render again what is damaged",
        }[state]
    return Day(date, out, state, images, errors, action)


def _state(out: str) -> tuple[State, int, int]:
    store = open_store(out)
    try:
        job = commit.read_job(store)
    except KeyError:
        return "missing", 0, 0
    entries = commit.index_entries(store)
    found, grid = commit.totals(store, entries), commit.frozen_grid(store, job)
    counts = found.images, found.errors - found.waived
    if is_alive(commit.read_progress(store)):
        return "running", *counts
    if grid is None or len(commit.parts_of_the_grid(entries)) < grid.count or commit.open_retries(store, entries):
        return "unfinished", *counts
    return ("failed" if counts[1] else "done"), *counts


def backfill(
    job: Path,
    planned: list[Day],
    reprocess: Reprocess = "missing",
    sets: list[str] | None = None,
    *,
    told: Callable[[Day], None] = lambda day: None,
    **options: Any,
) -> Iterator[Done]:
    """Render the days that `survey` says, in order; `options` are those of `run`. Ends with the first that did not end by itself
    (interrupted, cancelled, stopped): whoever runs the same command again goes on there. Rows that fail end no day but their own."""
    for day in planned:
        if day.action is None:
            continue
        told(day)
        if reprocess != "missing" and day.state in ("failed", "unfinished", "done") and day.errors:
            retry(day.out, Choice(all=reprocess == "all"))
        summary = run(load_job(job, sets, None, day.date), repair=reprocess == "all" and day.state == "done", **options)
        yield Done(day.date, summary)
        if summary.exit_code not in (EXIT_OK, EXIT_ROWS_FAILED):
            return
