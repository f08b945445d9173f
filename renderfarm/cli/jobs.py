"""Commands that take a job file: init, run, validate, plan, preview."""

from __future__ import annotations

import os
import shlex
import signal
import threading
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from renderfarm.cli.common import (
    Address,
    AsJson,
    Engine,
    EngineChoice,
    JobFile,
    LogicalDate,
    Out,
    Sets,
    app,
    as_called,
    console,
    out_console,
    print_json,
    print_next,
    print_pairs,
    shown_path,
    typed,
)
from renderfarm.errors import EXIT_INTERRUPTED, EXIT_OK, EXIT_ROWS_FAILED
from renderfarm.stopping import Stop

command = partial(app.command, rich_help_panel="Jobs")


@command()
def run(
    job: JobFile,
    sets: Sets = None,
    out: Out = None,
    engine: Engine = EngineChoice.ray,
    address: Address = None,
    logical_date: LogicalDate = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="First check every committed part; rebuild its views, or set it aside and render it again.")
    ] = False,
    grace: Annotated[float, typer.Option(min=0, help="Seconds that parts in flight have to finish after Ctrl-C or SIGTERM.")] = 30.0,
    as_json: AsJson = False,
) -> None:
    """Render what the output does not hold yet. Run it again and it continues."""
    from renderfarm.api import run as run_job
    from renderfarm.jobfile import at_its_line, load_job
    from renderfarm.report.live import Watcher

    loaded = load_job(job, sets, out, logical_date)
    stop, stop_now = stop_on_signals()
    with Watcher(console, quiet=as_json) as watcher, at_its_line(job, sets):
        signals = {"stop": stop, "stop_now": stop_now}
        summary = run_job(loaded, engine=engine.value, address=address, observe=watcher, repair=repair, grace_s=grace, **signals)
    if as_json:
        print_json(summary.to_dict())
    else:
        for repaired in summary.repaired:
            out_console.print(f"repaired {repaired}", markup=False)
        if repair and not summary.repaired:
            out_console.print("nothing to repair: each committed part is what it was")
        _print_summary(summary.to_dict(), some_rows=loaded.manifest.where is not None)
        if summary.state not in ("INTERRUPTED", "CANCELLED"):
            how = shlex.join(typed(engine=engine, address=address))
            _print_next(summary.to_dict(), shlex.join([str(job), *typed(sets, logical_date)]), how, loaded.model, loaded.sweep)
    raise typer.Exit(summary.exit_code)


def stop_on_signals() -> tuple[threading.Event, threading.Event]:
    """The first Ctrl-C or SIGTERM lets leases in flight finish; the second one ends at once; the third does not even say so in the
    output, which may be what everything waits for."""
    stop = Stop(console.print, lambda number, frame: os._exit(EXIT_INTERRUPTED))
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    return stop.wanted, stop.at_once


def _print_summary(summary: dict[str, Any], some_rows: bool) -> None:
    from renderfarm.report.contact_sheet import KEY as SHEET
    from renderfarm.report.html import KEY as REPORT
    from renderfarm.storage import open_store

    state, out = summary["state"], shown_path(summary["out"])
    if state in ("INTERRUPTED", "CANCELLED"):
        out_console.print(f"{state.lower()}: run the same command again to continue")
    elif not summary["new_images"] and not summary["new_errors"]:
        out_console.print("nothing to do: every part is committed")
    else:
        new = f"{summary['new_images']:,} images" + (f" and {summary['new_errors']:,} errors" if summary["new_errors"] else "")
        rate = f"{summary['images_per_second']:.1f} images/s while rendering"
        out_console.print(f"{new} in {summary['seconds']:.0f} s ({rate})")
    rows = f"of those that `where` selects from {summary['rows']:,} rows" if some_rows else f"{summary['rows']:,} rows"
    counts = f"{summary['images']:,} images, {summary['errors']:,} errors, {rows}"
    out_console.print(f"{state.lower()}: {counts} in {out}")
    for name, count in summary["error_classes"].items():
        out_console.print(f"  {name}: {count:,}  (reasons: {as_called()} errors {shlex.quote(out)})", markup=False)
    if summary["waived"]:
        out_console.print(f"  of them waived: {summary['waived']:,}")
    for reason, number in summary["workers_left_out"].items():
        out_console.print(f"workers left out: {number}: {reason}", markup=False)
    for warning in summary["warnings"]:
        out_console.print(f"warning: {warning}", markup=False)
    if summary["images"]:
        out_console.print(f"contact sheet: {out}/{SHEET}")
    if open_store(summary["out"]).exists(REPORT):
        out_console.print(f"report: {out}/{REPORT}")


def _print_next(summary: dict[str, Any], job: str, how: str, model: Any, sweep: Any) -> None:
    """Three commands to try, as they would have to be typed after this one. `job`: its file and what was changed in it; `how`: it was run;
    `model`: the job's ModelSpec; `sweep`: its Sweep, if it has one, whose values win over the job's."""
    from renderfarm.config import COMPANIONS

    out = shlex.quote(shown_path(summary["out"]))
    folders = {"": model.id, **{f"{name}=": given.id for name in COMPANIONS if (given := getattr(model, name))}}
    folders |= {f"{name}=": given.id for name, given in model.components.items()}
    models = "".join(f" --model {shlex.quote(name + shown_path(id_))}" for name, id_ in folders.items() if os.path.isabs(id_))
    again = " ".join(filter(None, (job, how)))
    steps_vary = sweep is not None and "num_inference_steps" in {**sweep.product, **sweep.zip}
    other = f"export {out} {out}-export" if steps_vary else f"run {again} --set render.num_inference_steps=8 --out {out}-8-steps"
    print_next(
        f"status {out}",
        f"verify {out} --sample 3{models}" if summary["images"] else f"validate {job}",
        f"errors {out}" if summary["errors"] else other,
    )


@command()
def validate(
    job: JobFile,
    sets: Sets = None,
    out: Out = None,
    logical_date: LogicalDate = None,
    limit: Annotated[int, typer.Option(help="Problems to print.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Check the job file and every row of its manifest; nothing is rendered or written."""
    from renderfarm.jobfile import at_its_line, load_job
    from renderfarm.preparation import prepare
    from renderfarm.validation import validate_rows

    with at_its_line(job, sets):
        found = validate_rows(prepare(load_job(job, sets, out, logical_date)))
    if as_json:
        print_json({**vars(found), "ok": found.ok})
    else:
        for problem in found.problems[:limit]:
            out_console.print(problem, markup=False)
        if len(found.problems) > limit:
            out_console.print(f"… (--limit shows more than {limit})")
        for hint in found.hints:
            out_console.print(hint, markup=False)
        bad = f"{found.bad_rows:,} bad rows, {found.duplicate_ids:,} duplicate ids"
        out_console.print(f"{found.rows:,} rows, {found.images:,} images, {bad}")
        if found.ok:
            print_next(shlex.join(["plan", str(job), *typed(sets, logical_date), *(["--out", out] if out else [])]))
    raise typer.Exit(EXIT_OK if found.ok else EXIT_ROWS_FAILED)


@command()
def plan(job: JobFile, sets: Sets = None, out: Out = None, logical_date: LogicalDate = None, as_json: AsJson = False) -> None:
    """Show what `run` would do: rows, parts done and left, images, bytes, time and cost. The rows of a sweep are made now, and kept."""
    from renderfarm.estimate import plan as plan_job
    from renderfarm.jobfile import at_its_line, load_job
    from renderfarm.preparation import prepare

    with at_its_line(job, sets):
        found = plan_job(prepare(load_job(job, sets, out, logical_date)))
    if as_json:
        print_json(found)
    else:
        print_pairs(found)
        again = [str(job), *typed(sets, logical_date)]
        run_it = shlex.join(["run", *again, *(["--out", out] if out else [])])
        if not found["parts left"] and not found["of them to be rendered again"] and found["parts (leases)"]:
            print_next(shlex.join(["status", shown_path(found["out"])]))
        elif found["parts done"]:
            print_next(run_it)
        else:
            print_next(shlex.join(["preview", *again]), run_it)


@command()
def preview(
    job: JobFile,
    rows: Annotated[int, typer.Option(help="How many, spread over the manifest and its sweep.")] = 9,
    file: Annotated[
        Path | None, typer.Option(help="The contact sheet, a PNG. [default: JOB-preview.png in this folder]", show_default=False)
    ] = None,
    sets: Sets = None,
    logical_date: LogicalDate = None,
    as_json: AsJson = False,
) -> None:
    """Render some rows here, in the pixels of the later run, and leave nothing but a contact sheet of them."""
    from renderfarm.jobfile import at_its_line, load_job
    from renderfarm.preview import preview as preview_job
    from renderfarm.report.live import Watcher

    loaded, sheet = load_job(job, sets, None, logical_date), file or Path(f"{job.stem}-preview.png")
    with Watcher(console, quiet=as_json) as watcher, at_its_line(job, sets):
        found = preview_job(loaded, sheet, rows, watcher)
    if as_json:
        print_json(found.to_dict())
        raise typer.Exit(found.exit_code)
    said = f"{found.images:,} images of {len(found.rows):,} rows in {found.seconds:.0f} s"
    out_console.print(f"{said} ({found.images_per_second:.3g} images/s while rendering)")
    for reason in found.reasons[:20]:
        out_console.print(reason, markup=False)
    if found.file is not None:
        out_console.print(f"contact sheet: {shown_path(found.file)}", markup=False)
        print_next(shlex.join(["run", str(job), *typed(sets, logical_date)]))
    raise typer.Exit(found.exit_code)


class StarterChoice(StrEnum):
    t2i = "t2i"
    sweep = "sweep"
    dataset = "dataset"
    img2img = "img2img"


@command()
def init(
    file: Annotated[Path, typer.Argument(help="The job file to write.")] = Path("job.yaml"),
    template: Annotated[
        StarterChoice, typer.Option(help="Pictures from prompts; one prompt with many settings; a dataset; pictures from pictures.")
    ] = StarterChoice.t2i,
    as_json: AsJson = False,
) -> None:
    """Write a job file to begin with, explained line by line; it runs as it is. Nothing is overwritten."""
    from renderfarm.starters import write_starter

    written = [str(path) for path in write_starter(template.value, file)]
    if as_json:
        print_json({"written": written})
        return
    out_console.print(f"wrote {', '.join(written)}", markup=False)
    print_next(shlex.join(["plan", str(file)]))
