"""Commands that watch and steer an output's runs: status, watch, wait, logs, pause, resume, cancel, errors, retry, waive."""

from __future__ import annotations

import shlex
import sys
from enum import StrEnum
from functools import partial
from typing import Annotated, Any, cast

import typer
from rich.table import Table
from rich.text import Text

from renderfarm.cli.common import (
    AsJson,
    OutputFolder,
    app,
    as_called,
    console,
    out_console,
    print_json,
    print_next,
    print_pairs,
    seconds,
    shown_path,
)
from renderfarm.errors import EXIT_TIMED_OUT
from renderfarm.shown import shown_value

command = partial(app.command, rich_help_panel="Runs")


@command()
def status(out: OutputFolder, as_json: AsJson = False) -> None:
    """Show how far an output is, from any machine that can read it."""
    from renderfarm.status import read_status

    found = read_status(out)
    if as_json:
        print_json(found)
    else:
        print_pairs(found)
        _print_next(out, found["state"], found["errors"] - found["errors waived"])


def _print_next(out: str, state: str, errors: int) -> None:
    """What may be done with an output whose last run is in this state."""
    from renderfarm.heartbeat import ALIVE

    folder = shlex.quote(shown_path(out))
    if state == "PAUSED":
        print_next(f"resume {folder}")
    elif state in ALIVE:
        print_next(f"watch {folder}")
    elif errors and state in ("SUCCEEDED", "PARTIAL"):
        print_next(f"errors {folder}")
    elif state == "SUCCEEDED":
        print_next(f"verify {folder}", f"export {folder} {folder}-export")
    else:
        out_console.print("next: `renderfarm run JOB`, which continues")


After = Annotated[
    str | None,
    typer.Option(metavar="RUN", help="The run that comes after this one is meant; `submit` names it.", show_default=False),
]
BeginsWithin = Annotated[
    str | None, typer.Option(help="So long it may take until a run begins, as where machines come for it: 30m.", show_default=False)
]


def _begins(after: str | None, within: str | None) -> Any:
    """None: nothing is said of it."""
    from renderfarm.heartbeat import STALE_S
    from renderfarm.waiting import Begins

    if after is None and within is None:
        return None
    return Begins(after, STALE_S if within is None else seconds(within, "--begins-within"))


@command()
def watch(
    out: OutputFolder,
    interval: Annotated[str, typer.Option(help="Look again after so long: 2s, 1m.")] = "2s",
    after: After = None,
    begins_within: BeginsWithin = None,
    as_json: AsJson = False,
) -> None:
    """Show how a run goes on, from any machine that can read its output, until it ends; exits as it did. Ctrl-C ends the watching only."""
    from renderfarm.report.live import Changes
    from renderfarm.waiting import Begins
    from renderfarm.waiting import watch as look_again

    every_s, begins, code = seconds(interval, "--interval"), _begins(after, begins_within) or Begins(), 0
    with Changes(out_console) as changes:
        for seen in look_again(out, every_s, begins):
            said = seen.progress | {"state": seen.state, "trouble": seen.trouble or seen.progress.get("trouble")}
            if not as_json:
                changes(said)
            elif changes.is_new(said) or seen.exit_code is not None:
                print_json({"out": out, **said, "exit_code": seen.exit_code})
                sys.stdout.flush()
            code = seen.exit_code or 0
    if not as_json:
        counts = f"{said.get('images', 0):,} images, {said.get('errors', 0):,} errors in {out}"
        out_console.print(f"{seen.state.lower()}: {counts}", markup=False)
        if begins.after is not None and "run_id" not in said:
            out_console.print("next: what it was submitted with, and --logs (`renderfarm submit JOB … --logs`), says why none came")
        else:
            _print_next(out, seen.state, said.get("errors", 0) - said.get("waived", 0))
    raise typer.Exit(code)


@command()
def logs(
    out: OutputFolder,
    run: Annotated[str | None, typer.Option(help="Of this run only, by its id.", show_default=False)] = None,
    worker: Annotated[str | None, typer.Option(help="Of this worker only: w0.", show_default=False)] = None,
    rows: Annotated[str | None, typer.Option(help="Only what is about these rows: 0-5,7.", show_default=False)] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Go on with what comes, until no run is at work.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print what the runs of an output said of parts, failed rows and workers, also after a crash. With --json, an object a line."""
    from renderfarm.logs import Choice, line_of, read_logs

    anything = False
    for event in read_logs(out, Choice(run, worker, rows), follow=follow):
        anything = True
        if as_json:
            print_json(event)
        else:
            out_console.print(shown_value(" ".join(line_of(event).split())), markup=False)
        if follow:
            sys.stdout.flush()
    if not anything:
        console.print("nothing: no run has said such a thing here", markup=False)


@command()
def wait(
    out: OutputFolder,
    timeout: Annotated[str | None, typer.Option(help="At most so long: 30s, 2h. Without it, to the end.", show_default=False)] = None,
    after: After = None,
    begins_within: BeginsWithin = None,
    as_json: AsJson = False,
) -> None:
    """Wait until the run of an output has ended, from any machine that can read it. Exits as that run does, 6 after the timeout."""
    from renderfarm.report.live import Line
    from renderfarm.waiting import wait as wait_for_end

    with Line(console, quiet=as_json) as line:
        found = wait_for_end(out, None if timeout is None else seconds(timeout, "--timeout"), line, _begins(after, begins_within))
    if as_json:
        print_json(vars(found))
    else:
        late = " (still; --timeout has passed)" if found.exit_code == EXIT_TIMED_OUT else ""
        out_console.print(f"{found.state.lower()}{late}: {found.images:,} images, {found.errors:,} errors in {found.out}", markup=False)
        _print_next(out, found.state, found.errors)
    raise typer.Exit(found.exit_code)


@command()
def pause(out: OutputFolder, as_json: AsJson = False) -> None:
    """Let a run finish the parts in flight, let its workers go, and wait for `resume`."""
    _tell(out, "pause", "is paused when the parts in flight are finished; its workers are let go. `renderfarm resume` goes on", as_json)


@command()
def resume(out: OutputFolder, as_json: AsJson = False) -> None:
    """Let a paused run go on."""
    _tell(out, "run", "goes on, with new workers", as_json)


@command()
def cancel(out: OutputFolder, as_json: AsJson = False) -> None:
    """End a run when the parts in flight are finished; what is committed stays, and running its job again continues."""
    _tell(out, "cancel", "ends when the parts in flight are finished; what is committed stays", as_json)


def _tell(out: str, wanted: str, what: str, as_json: bool) -> None:
    from renderfarm.control import ask
    from renderfarm.reading import open as open_output

    told = ask(open_output(out).store, cast(Any, wanted))
    if as_json:
        print_json(vars(told))
    elif told.before == told.wanted:
        already = {"pause": "was told to pause before", "run": "is not paused", "cancel": "was told to end before"}[wanted]
        out_console.print(f"{told.run_id} {already}; it says {told.state.lower()}", markup=False)
    else:
        out_console.print(f"{told.run_id} {what}", markup=False)


Classes = Annotated[list[str] | None, typer.Option("--class", help="Those of this class. May be repeated.", show_default=False)]


Rows = Annotated[str | None, typer.Option(help="Those of these rows: 0-5,7.", show_default=False)]


All = Annotated[bool, typer.Option("--all", help="Every failed sample.")]


class GroupChoice(StrEnum):
    class_ = "class"
    message = "message"
    worker = "worker"


@command()
def errors(
    out: OutputFolder,
    group_by: Annotated[GroupChoice | None, typer.Option(help="Count them by what they have in common.", show_default=False)] = None,
    limit: Annotated[int, typer.Option(min=0, help="Lines to print; 0: all.")] = 50,
    as_json: AsJson = False,
) -> None:
    """List the samples that have no image, and why; of those that were rendered again, how they ended last."""
    from itertools import chain, islice

    from renderfarm.failures import failures, groups
    from renderfarm.reading import open as open_output

    output = open_output(out)
    found: list[Any]
    if group_by is not None:
        counted = groups(output, cast(Any, group_by.value))
        found, total = [*counted[: limit or None]], sum(group.count for group in counted)
        shown = {"count": "count", "waived": "waived", "retryable": "retryable", "asked_again": "asked again"}
        shown |= {"value": group_by.value, "example": "for example"}
    else:
        every = chain.from_iterable(failed for _, failed, _ in failures(output, look_for_requests=True))
        found = [*islice(every, limit or None)]
        total = len(found) + sum(1 for _ in every)
        shown = {"row": "row", "image_index": "image", "row_id": "id", "error_class": "class"}
        shown |= {"retryable": "retryable", "asked_again": "asked again", "waived": "waived", "error_message": "message"}
    lines = [vars(one) for one in found]
    if as_json:
        print_json({"out": output.store.url, "errors": total, "groups" if group_by else "failures": lines})
        return
    table = Table(box=None, padding=(0, 2), header_style="bold")
    for title in shown.values():
        table.add_column(title)
    for line in lines:
        table.add_row(*(Text(_cell(line[column]), overflow="fold") for column in shown))
    out_console.print(table if lines else "no errors: every sample that was rendered has its image")
    if not group_by and total > len(lines):
        out_console.print(f"… {total:,} in all (--limit 0 prints them)")
    folder = shlex.quote(shown_path(out))
    if any(line["asked_again"] for line in lines):
        out_console.print(f"what is asked for again, a run renders: {as_called()} run JOB", markup=False)
    advice = [f"retry {folder}"] if any(one.retry_takes for one in found) else []
    if advice or any(line["waived"] + line["asked_again"] < line.get("count", 1) for line in lines):
        print_next(*advice, f'waive {folder} --all --reason "as it should be"')


def _cell(value: Any) -> str:
    return ("yes" if value else "no") if isinstance(value, bool) else " ".join(shown_value(value).split())


@command()
def retry(out: OutputFolder, classes: Classes = None, rows: Rows = None, all_: All = False, as_json: AsJson = False) -> None:
    """Ask for failed samples to be rendered again: those that may succeed, or exactly those that are named. A run renders them."""
    from renderfarm.failures import Choice
    from renderfarm.failures import retry as ask_again

    found = ask_again(out, Choice(tuple(classes or ()), rows, all_))
    if as_json:
        print_json(vars(found))
        return
    if found.samples:
        out_console.print(f"to be rendered again: {found.samples:,} samples of {len(found.parts):,} parts")
    if found.already:
        out_console.print(f"asked for before, and not rendered yet: {found.already:,}")
    if not found.samples and not found.already:
        out_console.print("nothing to retry: no failed sample is among those")
    if found.not_retryable:
        out_console.print(f"left alone, since the same would come out: {found.not_retryable:,} (--class, --rows or --all take them, too)")
    if found.waived:
        out_console.print(f"left alone, since they are waived: {found.waived:,} (--rows takes them)")
    if found.samples or found.already:
        at_work = f"the run {found.alive} takes them up when its other parts are done (if it is ending just now, the next one does)"
        out_console.print(at_work if found.alive else "render them: renderfarm run JOB", markup=False)


@command()
def waive(
    out: OutputFolder,
    classes: Classes = None,
    rows: Rows = None,
    all_: All = False,
    reason: Annotated[str | None, typer.Option(help="Why, for whoever reads `errors --json`.", show_default=False)] = None,
    as_json: AsJson = False,
) -> None:
    """Say that failed samples may stay errors: they count no more against failure.tolerate."""
    from renderfarm.failures import Choice
    from renderfarm.failures import waive as waive_them

    found = waive_them(out, Choice(tuple(classes or ()), rows, all_), reason)
    if as_json:
        print_json(vars(found))
        return
    before = f" ({found.already:,} more were before)" if found.already else ""
    if not found.samples:
        out_console.print(f"nothing to waive: no failed sample is among those{before}")
        return
    out_console.print(f"waived: {found.samples:,} samples{before}; the next run counts them no more against failure.tolerate")
