"""The command line. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn, cast

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from renderfarm.errors import (
    EXIT_INTERNAL,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_ROWS_FAILED,
    EXIT_STOPPED,
    EXIT_TIMED_OUT,
    EXIT_USAGE,
    InvalidJob,
    RenderfarmError,
)

app = typer.Typer(
    name="renderfarm",
    help="A Parquet table of prompts in, a verified image dataset out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out_console = Console(soft_wrap=True, highlight=False, emoji=False, width=None if sys.stdout.isatty() else 160)
console = Console(stderr=True, soft_wrap=True, highlight=False, emoji=False)


SAME_SIGNAL_S = 0.3


class EngineChoice(StrEnum):
    ray = "ray"
    inline = "inline"


JobFile = Annotated[Path, typer.Argument(help="The job's YAML file.", show_default=False)]
Sets = Annotated[list[str] | None, typer.Option("--set", help="Change a field: render.num_inference_steps=8. May be repeated.")]
Out = Annotated[str | None, typer.Option("--out", help="Output folder instead of the job's.")]
LogicalDate = Annotated[str | None, typer.Option("--logical-date", help="YYYY-MM-DD for {{ ds }} in the job's paths.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object, last.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        from renderfarm import __version__

        out_console.print(__version__)
        raise typer.Exit


@app.callback()
def renderfarm(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    pass


@app.command()
def run(
    job: JobFile,
    sets: Sets = None,
    out: Out = None,
    engine: Annotated[EngineChoice, typer.Option(help="inline: one worker in this process.")] = EngineChoice.ray,
    address: Annotated[str | None, typer.Option(help="A Ray cluster to join (auto, or ray://…); else a private local Ray.")] = None,
    logical_date: LogicalDate = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="First check every committed part; rebuild its views, or set it aside and render it again.")
    ] = False,
    grace: Annotated[float, typer.Option(min=0, help="Seconds that parts in flight have to finish after Ctrl-C or SIGTERM.")] = 30.0,
    as_json: AsJson = False,
) -> None:
    """Render what the output does not hold yet. Run it again and it continues."""
    from renderfarm.api import run as run_job
    from renderfarm.jobfile import load_job
    from renderfarm.report.live import Watcher

    loaded = load_job(job, sets, out, logical_date)
    stop, stop_now = _stop_on_signals()
    with Watcher(console, quiet=as_json) as watcher:
        signals = {"stop": stop, "stop_now": stop_now}
        summary = run_job(loaded, engine=engine.value, address=address, observe=watcher, repair=repair, grace_s=grace, **signals)
    if as_json:
        _print_json(summary.to_dict())
    else:
        for repaired in summary.repaired:
            out_console.print(f"repaired {repaired}", markup=False)
        if repair and not summary.repaired:
            out_console.print("nothing to repair: each committed part is what it was")
        _print_summary(summary.to_dict())
        if summary.state not in ("INTERRUPTED", "CANCELLED"):
            changes = [
                *(f"--set {shlex.quote(item)}" for item in sets or []),
                *([f"--logical-date {logical_date}"] if logical_date else []),
            ]
            _print_next(summary.to_dict(), shlex.join([str(job)]), changes, loaded.model)
    raise typer.Exit(summary.exit_code)


def _stop_on_signals() -> tuple[threading.Event, threading.Event]:
    """The first Ctrl-C or SIGTERM lets leases in flight finish; the second one ends at once; the third does not even say so in the
    output, which may be what everything waits for.

    Nothing is raised in the handler: an exception inside one of Ray's own calls becomes another error.
    """
    stop, stop_now = threading.Event(), threading.Event()
    first = second = 0.0

    def handle(number: int, frame: Any) -> None:
        nonlocal first, second
        if stop.is_set():
            # `timeout` and service managers signal a process and its group, so one stop may arrive twice
            if stop_now.is_set() and time.monotonic() - second > SAME_SIGNAL_S:
                os._exit(EXIT_INTERRUPTED)
            if time.monotonic() - first > SAME_SIGNAL_S and not stop_now.is_set():
                second = time.monotonic()
                stop_now.set()
            return
        first = time.monotonic()
        stop.set()
        console.print("stopping: parts in flight are being finished (again: stop at once; nothing committed is lost)")

    signal.signal(signal.SIGINT, handle)
    signal.signal(signal.SIGTERM, handle)
    return stop, stop_now


def _shown(path: str) -> str:
    """A local path below this folder as a person would type it."""
    relative = os.path.relpath(path) if os.path.isabs(path) else path
    return path if relative.startswith("..") else relative


def _print_summary(summary: dict[str, Any]) -> None:
    from renderfarm.report.contact_sheet import KEY as SHEET

    state, out = summary["state"], _shown(summary["out"])
    if state in ("INTERRUPTED", "CANCELLED"):
        out_console.print(f"{state.lower()}: run the same command again to continue")
    elif not summary["new_images"] and not summary["new_errors"]:
        out_console.print("nothing to do: every part is committed")
    else:
        out_console.print(
            f"{summary['new_images']:,} images in {summary['seconds']:.0f} s ({summary['images_per_second']:.1f} images/s while rendering)"
        )
    counts = f"{summary['images']:,} images, {summary['errors']:,} errors, {summary['rows']:,} rows"
    out_console.print(f"{state.lower()}: {counts} in {out}")
    for name, count in summary["error_classes"].items():
        out_console.print(f"  {name}: {count:,}  (reasons: renderfarm errors {shlex.quote(out)})", markup=False)
    if summary["waived"]:
        out_console.print(f"  of them waived: {summary['waived']:,}")
    for reason, number in summary["workers_left_out"].items():
        out_console.print(f"workers left out: {number}: {reason}", markup=False)
    for warning in summary["warnings"]:
        out_console.print(f"warning: {warning}", markup=False)
    if summary["images"]:
        out_console.print(f"contact sheet: {out}/{SHEET}")


def _print_next(summary: dict[str, Any], job: str, changes: list[str], model: Any) -> None:
    """Three commands to try, as they would have to be typed after this one. `model`: the job's ModelSpec."""
    from renderfarm.config import COMPANIONS

    me = "renderfarm" if shutil.which("renderfarm") else sys.argv[0]
    out, same = shlex.quote(_shown(summary["out"])), " ".join([job, *changes])
    folders = {"": model.id, **{f"{name}=": given.id for name in COMPANIONS if (given := getattr(model, name))}}
    folders |= {f"{name}=": given.id for name, given in model.components.items()}
    models = "".join(f" --model {shlex.quote(name + _shown(id_))}" for name, id_ in folders.items() if os.path.isabs(id_))
    out_console.print("next:")
    for command in (
        f"status {out}",
        f"verify {out} --sample 3{models}" if summary["images"] else f"validate {same}",
        f"validate {same}" if summary["errors"] else f"run {same} --set render.num_inference_steps=8 --out {out}-8-steps",
    ):
        out_console.print(f"  {me} {command}", markup=False, soft_wrap=True)


@app.command()
def validate(
    job: JobFile,
    sets: Sets = None,
    out: Out = None,
    logical_date: LogicalDate = None,
    limit: Annotated[int, typer.Option(help="Problems to print.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Check the job file and every row of its manifest; nothing is rendered or written."""
    from renderfarm.jobfile import load_job
    from renderfarm.preparation import prepare
    from renderfarm.validation import validate_rows

    found = validate_rows(prepare(load_job(job, sets, out, logical_date)))
    if as_json:
        _print_json({**vars(found), "ok": found.ok})
    else:
        for problem in found.problems[:limit]:
            out_console.print(problem, markup=False)
        if len(found.problems) > limit:
            out_console.print(f"… (--limit shows more than {limit})")
        for hint in found.hints:
            out_console.print(hint, markup=False)
        bad = f"{found.bad_rows:,} bad rows, {found.duplicate_ids:,} duplicate ids"
        out_console.print(f"{found.rows:,} rows, {found.images:,} images, {bad}")
    raise typer.Exit(EXIT_OK if found.ok else EXIT_ROWS_FAILED)


@app.command()
def plan(job: JobFile, sets: Sets = None, out: Out = None, logical_date: LogicalDate = None, as_json: AsJson = False) -> None:
    """Show what `run` would do: rows, parts done and left, images, bytes and time."""
    from renderfarm.estimate import estimate
    from renderfarm.jobfile import load_job
    from renderfarm.preparation import prepare

    found = estimate(prepare(load_job(job, sets, out, logical_date)))
    if as_json:
        _print_json(found)
    else:
        _print_pairs(found)


@app.command()
def status(out: Annotated[str, typer.Argument(help="The output folder.", show_default=False)], as_json: AsJson = False) -> None:
    """Show how far an output is, from any machine that can read it."""
    from renderfarm.status import read_status

    found = read_status(out)
    if as_json:
        _print_json(found)
    else:
        _print_pairs(found)


OutputFolder = Annotated[str, typer.Argument(help="The output folder.", show_default=False)]
Classes = Annotated[list[str] | None, typer.Option("--class", help="Those of this class. May be repeated.", show_default=False)]
Rows = Annotated[str | None, typer.Option(help="Those of these rows: 0-5,7.", show_default=False)]
All = Annotated[bool, typer.Option("--all", help="Every failed sample.")]


class GroupChoice(StrEnum):
    class_ = "class"
    message = "message"
    worker = "worker"


@app.command()
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
    if group_by is not None:
        found = groups(output, cast(Any, group_by.value))
        lines, total = [vars(group) for group in found], sum(group.count for group in found)
        lines = lines[: limit or None]
        shown = {"count": "count", "waived": "waived", "retryable": "retryable", "value": group_by.value, "example": "for example"}
    else:
        every = chain.from_iterable(failed for _, failed, _ in failures(output))
        lines = [vars(failure) for failure in islice(every, limit or None)]
        total = len(lines) + sum(1 for _ in every)
        shown = {"row": "row", "image_index": "image", "row_id": "id", "error_class": "class"}
        shown |= {"retryable": "retryable", "waived": "waived", "error_message": "message"}
    if as_json:
        _print_json({"out": output.store.url, "errors": total, "groups" if group_by else "failures": lines})
        return
    table = Table(box=None, padding=(0, 2), header_style="bold")
    for title in shown.values():
        table.add_column(title)
    for line in lines:
        table.add_row(*(Text(_cell(line[column]), overflow="fold") for column in shown))
    out_console.print(table if lines else "no errors: every sample that was rendered has its image")
    if not group_by and total > len(lines):
        out_console.print(f"… {total:,} in all (--limit 0 prints them)")


def _cell(value: Any) -> str:
    return ("yes" if value else "no") if isinstance(value, bool) else " ".join(_shown_value(value).split())


@app.command()
def retry(out: OutputFolder, classes: Classes = None, rows: Rows = None, all_: All = False, as_json: AsJson = False) -> None:
    """Ask for failed samples to be rendered again: those that may succeed, or exactly those that are named. A run renders them."""
    from renderfarm.failures import Choice
    from renderfarm.failures import retry as ask_again

    found = ask_again(out, Choice(tuple(classes or ()), rows, all_))
    if as_json:
        _print_json(vars(found))
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


@app.command()
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
        _print_json(vars(found))
        return
    before = f" ({found.already:,} more were before)" if found.already else ""
    if not found.samples:
        out_console.print(f"nothing to waive: no failed sample is among those{before}")
        return
    out_console.print(f"waived: {found.samples:,} samples{before}; the next run counts them no more against failure.tolerate")


@app.command()
def wait(
    out: OutputFolder,
    timeout: Annotated[str | None, typer.Option(help="At most so long: 30s, 2h. Without it, to the end.", show_default=False)] = None,
    as_json: AsJson = False,
) -> None:
    """Wait until the run of an output has ended, from any machine that can read it. Exits as that run does, 6 after the timeout."""
    from renderfarm.report.live import Line
    from renderfarm.waiting import wait as wait_for_end

    with Line(console, quiet=as_json) as line:
        found = wait_for_end(out, None if timeout is None else _seconds(timeout, "--timeout"), line)
    if as_json:
        _print_json(vars(found))
    else:
        late = " (still; --timeout has passed)" if found.exit_code == EXIT_TIMED_OUT else ""
        out_console.print(f"{found.state.lower()}{late}: {found.images:,} images, {found.errors:,} errors in {found.out}", markup=False)
    raise typer.Exit(found.exit_code)


@app.command()
def pause(out: OutputFolder, as_json: AsJson = False) -> None:
    """Let a run finish the parts in flight, let its workers go, and wait for `resume`."""
    _tell(out, "pause", "is paused when the parts in flight are finished; its workers are let go. `renderfarm resume` goes on", as_json)


@app.command()
def resume(out: OutputFolder, as_json: AsJson = False) -> None:
    """Let a paused run go on."""
    _tell(out, "run", "goes on, with new workers", as_json)


@app.command()
def cancel(out: OutputFolder, as_json: AsJson = False) -> None:
    """End a run when the parts in flight are finished; what is committed stays, and running its job again continues."""
    _tell(out, "cancel", "ends when the parts in flight are finished; what is committed stays", as_json)


def _tell(out: str, wanted: str, what: str, as_json: bool) -> None:
    from renderfarm.control import ask
    from renderfarm.reading import open as open_output

    told = ask(open_output(out).store, cast(Any, wanted))
    if as_json:
        _print_json(vars(told))
    elif told.before == told.wanted:
        already = {"pause": "was told to pause before", "run": "is not paused", "cancel": "was told to end before"}[wanted]
        out_console.print(f"{told.run_id} {already}; it says {told.state.lower()}", markup=False)
    else:
        out_console.print(f"{told.run_id} {what}", markup=False)


Models = Annotated[
    list[str] | None,
    typer.Option(
        "--model", help="Where the model lies, if the job named a folder; again as vae=FOLDER or controlnet=FOLDER for its parts."
    ),
]
Components = Annotated[
    list[str] | None, typer.Option("--component", help="One from elsewhere: vae=FOLDER, vae=org/name@COMMIT/SUBFOLDER. May be repeated.")
]


def _model_and_parts(models: list[str] | None) -> tuple[str | None, dict[str, str]]:
    """What stands alone, and what is named as NAME=PLACE."""
    parts = {match[1]: match[2] for text in models or [] if (match := re.fullmatch(r"([a-z]\w*)=(.+)", text))}
    own = [text for text in models or [] if not re.fullmatch(r"[a-z]\w*=.+", text)]
    if len(own) > 1:
        raise InvalidJob(f"--model is given twice ({' and '.join(own)}); name one, and its parts as NAME=FOLDER")
    return (own[0] if own else None), parts


class OffloadChoice(StrEnum):
    none = "none"
    model = "model"
    sequential = "sequential"


Offload = Annotated[OffloadChoice, typer.Option("--offload", help="As a job's workers.offload, to save this device's memory.")]


@app.command()
def verify(
    out: Annotated[str, typer.Argument(help="The output folder.", show_default=False)],
    sample: Annotated[int, typer.Option(min=0, help="So many images, others each time, are rendered again; 0: files only.")] = 8,
    rows: Annotated[str | None, typer.Option(help="Render these rows again: 0-5,7.")] = None,
    all_: Annotated[bool, typer.Option("--all", help="Render everything again.")] = False,
    model: Models = None,
    offload: Offload = OffloadChoice.none,
    as_json: AsJson = False,
) -> None:
    """Check every file against its table, and render some images again: the same bits must come out."""
    from dataclasses import asdict

    from renderfarm.report.live import Line
    from renderfarm.verification import Choice
    from renderfarm.verification import verify as verify_output

    if all_ and rows is not None:
        raise InvalidJob("--all renders every row again, and --rows some; give one of them")
    choice, (own, beside) = Choice(all=all_, rows=rows, sample=sample), _model_and_parts(model)
    with Line(console, quiet=as_json) as line:
        found = verify_output(out, choice, own, beside, offload.value, line)
    if as_json:
        _print_json({**asdict(found), "ok": found.ok})
    else:
        _print_verification(asdict(found))
    raise typer.Exit(EXIT_OK if found.ok else EXIT_ROWS_FAILED)


def _print_verification(found: dict[str, Any]) -> None:
    what = f"{found['images']:,} images and {found['errors']:,} error rows in {found['parts_done']:,} of {found['parts']:,} parts"
    if not found["problem_count"]:
        out_console.print(f"files: {what}; each one is what its table says")
    else:
        out_console.print(f"files: {what}; {found['problem_count']:,} problems")
        for problem in found["problems"]:
            out_console.print(f"  {problem}", markup=False)
        if found["problem_count"] > len(found["problems"]):
            out_console.print("  …")
        out_console.print(
            "restore what is damaged from a copy; or `renderfarm run JOB --repair` rebuilds what can be, sets damaged parts aside, and "
            "renders them again"
        )
    for note in found["notes"]:
        out_console.print(note, markup=False)
    if not found["problem_count"] and found["parts_done"] < found["parts"]:
        out_console.print("not finished: what is missing was not rendered yet; `renderfarm run` continues")
    if not found["again"]:
        return
    if found["profile_differences"]:
        out_console.print("this machine would render with another profile, so equal bits are not promised and pictures are compared:")
        for line in found["profile_differences"]:
            out_console.print(f"  {line}", markup=False)
    table = Table(box=None, padding=(0, 2), header_style="bold")
    for column in ("row", "image", "sampler", "prompt", "rendered again", "PSNR"):
        table.add_column(column)
    for again in found["again"]:
        prompt = again["prompt"] if len(again["prompt"]) <= 48 else again["prompt"][:47] + "…"
        psnr = "" if again["psnr"] is None else f"{again['psnr']:.1f} dB"
        cells = (str(again["row"]), str(again["image_index"]), again["sampler"], prompt, again["result"], psnr)
        table.add_row(*(Text(cell) for cell in cells))
    out_console.print(table)
    same = sum(again["result"] == "identical" for again in found["again"])
    out_console.print(f"rendered again: {same:,} of {len(found['again']):,} identical, bit for bit")


@app.command()
def inspect(
    out: Annotated[str, typer.Argument(metavar="OUT|FILE", help="The output folder; or an image file, alone.", show_default=False)],
    image: Annotated[
        str | None, typer.Argument(metavar="[ROW[:K]]", help="The row's ordinal, and which of its images.", show_default=False)
    ] = None,
    render: Annotated[Path | None, typer.Option(help="Render that image again, alone, into this PNG file, and compare.")] = None,
    model: Models = None,
    offload: Offload = OffloadChoice.none,
    as_json: AsJson = False,
) -> None:
    """Show where one image comes from; with --render, make it again. Of an image file: what it says of itself."""
    from dataclasses import asdict

    from renderfarm.verification import inspect as inspect_image
    from renderfarm.verification import render_to

    if image is None:
        _inspect_file(Path(out), as_json, alone=render is None and not model)
        return
    row, _, k = image.partition(":")
    if not row.isdecimal() or not (k or "0").isdecimal() or len(image) > 30:
        raise InvalidJob(f"{image!r} is not ROW or ROW:K; the row's ordinal counts from 0, for example 12 or 12:3")
    found = inspect_image(out, int(row), int(k or 0))
    again = render_to(found, render, *_model_and_parts(model), offload.value) if render else None
    if as_json:
        shown = {"out": found.out, "part": found.part, "file": found.file, "record": found.record, "profile": found.profile}
        _print_json({**shown, "again": asdict(again) if again else None})
    else:
        _print_pairs({"part": found.part, "file": found.file, **{name: str(v) for name, v in found.record.items() if v is not None}})
        if found.profile:
            out_console.print("render profile:")
        _print_pairs({name: value for name, value in found.profile.items() if not isinstance(value, dict | list)})
        if again:
            psnr = f", {again.psnr:.1f} dB" if again.psnr is not None else ""
            out_console.print(f"rendered again into {render}: {again.result}{psnr}")
    if again and not again.ok:
        raise typer.Exit(EXIT_ROWS_FAILED)


def _inspect_file(file: Path, as_json: bool, *, alone: bool) -> None:
    from renderfarm.marks import SAYS, read_file

    if not file.is_file():
        raise InvalidJob(f"{file}: say which image of an output: ROW or ROW:K, for example 12 or 12:3; or give an image file")
    if not alone:
        raise InvalidJob("--render and --model need an output and a row; a file alone says only what it holds")
    found = read_file(file)
    if as_json:
        _print_json(found)
        return
    row = found["row"]
    shown = found | {"row": {name: str(value) for name, value in row.items()} if isinstance(row, dict) else row}  # a seed without commas
    _print_pairs({name: value for name, value in shown.items() if value is not None})
    if not any(found[name] for name in SAYS):
        out_console.print("says nothing of itself: it has no row, no parameters, no mark of a model's picture and no signature")


class ToChoice(StrEnum):
    parquet = "parquet"
    webdataset = "webdataset"
    files = "files"
    hub = "hub"


@app.command()
def export(
    out: Annotated[str, typer.Argument(help="The output folder, finished or not.", show_default=False)],
    dest: Annotated[str, typer.Argument(help="A new folder or store URL; with --to hub, org/name.", show_default=False)],
    to: Annotated[ToChoice, typer.Option("--to", help="hub: parquet, uploaded to the Hugging Face hub.")] = ToChoice.parquet,
    max_file_size: Annotated[str | None, typer.Option(help="About so large: 500MB, 2GB. [default: 1GB]", show_default=False)] = None,
    shuffle: Annotated[int | None, typer.Option(metavar="SEED", help="In an order that this number decides.")] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Remove another export at DEST, and begin anew.")] = False,
    staging: Annotated[
        Path | None, typer.Option(help="--to hub: where files wait for their upload. [default: ./hub/org--name]", show_default=False)
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="--to hub: a new repository is one that everybody reads.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write an output once more as few large files, each picture checked against its hash. Run it again and it continues."""
    from dataclasses import asdict

    from renderfarm.config import check_credentials, expand_env
    from renderfarm.export import Format, Options
    from renderfarm.export import export as export_output
    from renderfarm.hub import check_repository, export_to_hub
    from renderfarm.report.live import Line

    if to is ToChoice.files and max_file_size is not None:
        raise InvalidJob("--max-file-size: with --to files each picture is a file of its own; leave it out")
    if to is not ToChoice.hub and (staging is not None or public):
        raise InvalidJob("--staging and --public are for --to hub; leave them out")
    size = _bytes(max_file_size or "1GB")
    options = Options("parquet" if to is ToChoice.hub else cast(Format, to.value), size, shuffle)
    with Line(console, quiet=as_json) as line:
        if to is ToChoice.hub:
            check_repository(dest, options.max_file_size)
            folder = staging or Path("hub") / dest.replace("/", "--")
            found = export_to_hub(out, dest, folder, options, public=public, restart=restart, say=line)
        else:
            check_credentials("DEST", dest)
            found = export_output(out, expand_env(dest), options, restart=restart, say=line)
    if as_json:
        _print_json(asdict(found))
        return
    what = "folders" if to is ToChoice.files else "files"
    made = f"{found.images:,} images in {found.files:,} {what}, {found.new_files:,} of them new"
    out_console.print(f"{made}: {_shown(found.dest)}", markup=False)
    if found.errors_left_out:
        out_console.print(f"{found.errors_left_out:,} error rows are not in it")
    out_console.print("the lines that open it are in its README.md")


def _bytes(text: str) -> int:
    """1GB, 500 MB, 2.5GiB."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kMGT]?)(i?)B", text.strip().replace("K", "k"))
    size = int(float(match[1]) * (1024 if match[3] else 1000) ** " kMGT".index(match[2] or " ")) if match else 0
    if size < 1:
        raise InvalidJob(f"--max-file-size {text!r}: give a number with its unit, for example 500MB or 2GB")
    return size


@app.command()
def gc(
    out: Annotated[str, typer.Argument(help="The output folder.", show_default=False)],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    older_than: Annotated[str, typer.Option(help="Leave what is younger alone: 12h, 1d.")] = "1d",
    as_json: AsJson = False,
) -> None:
    """Remove what no table names: images of attempts that died or lost, unfinished writes."""
    from dataclasses import asdict

    from renderfarm.garbage import collect
    from renderfarm.report.live import Line

    with Line(console, quiet=as_json) as line:
        found = collect(out, _seconds(older_than, "--older-than"), dry_run=dry_run, say=line)
    if as_json:
        _print_json({"out": out, **asdict(found)})
        return
    table = Table(box=None, padding=(0, 2), header_style="bold")
    for column in ("would be removed" if dry_run else "removed", "files", "bytes"):
        table.add_column(column)
    for kind, count in found.removed.items():
        table.add_row(kind, f"{count.files:,}", f"{count.bytes:,}")
    out_console.print(table)
    if found.left_to_runs:
        out_console.print(f"a run is going on: {found.left_to_runs:,} files of parts that are not committed yet are left to it")
    for note in found.notes:
        out_console.print(note, markup=False)


def _seconds(text: str, option: str) -> float:
    """30s, 15m, 12h, 1d."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text.strip())
    if match is None:
        raise InvalidJob(f"{option} {text!r}: give a number with its unit, for example 12h or 1d")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]


@app.command()
def models(
    model: Annotated[str | None, typer.Option(help="What is known of this one: builtin:shapes, a folder, or org/name@COMMIT.")] = None,
    variant: Annotated[str | None, typer.Option(help="Of its weights, as a job's model.variant: fp16.")] = None,
    components: Components = None,
    fetch: Annotated[bool, typer.Option("--fetch", help="Fetch its weights, too, and hash them.")] = False,
    job: Annotated[Path | None, typer.Option(help="The memory that a job's weights need in each worker; nothing is loaded.")] = None,
    sets: Sets = None,
    logical_date: LogicalDate = None,
    markdown: Annotated[bool, typer.Option(help="Print the table of renderfarm/models/FAMILIES.md.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the model families that can be rendered, and the builtin models; with --model, what one of them takes and needs;
    with --job, what a job needs."""
    from renderfarm.config import BUILTIN_MODELS
    from renderfarm.models.families import FAMILIES, families_markdown

    if job is not None and (model or variant or components or fetch):
        raise InvalidJob("--job asks about a job as it is; leave --model, --variant, --component and --fetch out (--set changes a field)")
    if model is not None or job is not None:
        found = _needs(job, sets, logical_date) if job is not None else _about(str(model), variant, components, fetch)
        if as_json:
            _print_json(found)
        else:
            _print_pairs(found)
        return
    if markdown:
        sys.stdout.write(families_markdown())
        return
    if as_json:
        _print_json({"builtin": list(BUILTIN_MODELS), "families": list(FAMILIES)})
        return
    for name, text in BUILTIN_MODELS.items():
        out_console.print(f"{name:16} {text}")
    for name in FAMILIES:
        out_console.print(f"{name}: any folder or pinned hub id with this class in model_index.json")


def _about(model: str, variant: str | None, components: list[str] | None, fetch: bool) -> dict[str, Any]:
    from renderfarm.jobfile import model_spec
    from renderfarm.models.about import about

    return about(model_spec(model, components or ()).model_copy(update={"variant": variant}), fetch=fetch)


def _needs(job: Path, sets: list[str] | None, logical_date: str | None) -> dict[str, Any]:
    from renderfarm.jobfile import load_job
    from renderfarm.needs import needs
    from renderfarm.preparation import prepare

    return needs(prepare(load_job(job, sets, None, logical_date)))


@app.command()
def samplers(
    model: Annotated[
        str | None, typer.Option(help="Only those that this model can use: builtin:shapes, a folder, or org/name@COMMIT.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the samplers: name, scheduler, other spellings; with --model, which ones it can use, and why not the others."""
    from renderfarm.samplers import DIFFUSIONDB_CODES, SAMPLERS, why_not

    info = None
    if model is not None:
        from renderfarm.jobfile import model_spec
        from renderfarm.models.catalog import describe

        info = describe(model_spec(model))
    codes = {name: code for code, name in DIFFUSIONDB_CODES.items()}
    rows = [{**vars(sampler), "diffusiondb_code": codes.get(sampler.name)} for sampler in SAMPLERS.values()]
    if info:
        for row, sampler in zip(rows, SAMPLERS.values(), strict=True):
            row["refused"] = why_not(sampler, info.kind, info.refused_samplers)
    if as_json:
        _print_json({"samplers": rows})
        return
    table = Table(box=None, padding=(0, 2), header_style="bold")
    for column in ("name", "scheduler", "for models of", "draws noise at its steps", "also written", "DiffusionDB"):
        table.add_column(column)
    for row in rows:
        if not row.get("refused"):
            code, draws = row["diffusiondb_code"], "yes" if row["draws"] else ""
            cells = (row["name"], row["scheduler"], row["kind"], draws, ", ".join(row["aliases"]), str(code) if code else "")
            table.add_row(*(Text(cell) for cell in cells))
    out_console.print(table)
    for row in rows:
        if row.get("refused"):
            out_console.print(f"refused: {row['refused']}", markup=False)


class SchemaChoice(StrEnum):
    job = "job"
    images = "images"
    errors = "errors"


@app.command()
def schema(
    what: Annotated[
        SchemaChoice, typer.Argument(help="job: JSON Schema of the job file. images, errors: the tables' columns.")
    ] = SchemaChoice.job,
    as_json: AsJson = False,
) -> None:
    """Print the JSON Schema of job files, or a table's columns."""
    if what is SchemaChoice.job:
        from renderfarm.config import Job

        sys.stdout.write(json.dumps(Job.model_json_schema(), ensure_ascii=False, indent=1) + "\n")  # lines, for whoever compares versions
        return
    from renderfarm.schema import ERROR_COLUMNS, IMAGE_COLUMNS

    columns = {field.name: str(field.type) for field in (IMAGE_COLUMNS if what is SchemaChoice.images else ERROR_COLUMNS)}
    if as_json:
        _print_json(columns)
    else:
        _print_pairs(columns)


@app.command()
def submit(
    job: JobFile,
    address: Annotated[str, typer.Option(help="The Ray head's dashboard, http://HOST:8265.", show_default=False)],
    sets: Sets = None,
    out: Out = None,
    logical_date: LogicalDate = None,
    wait: Annotated[bool, typer.Option(help="Wait for the end; exit 0 only if the job succeeded.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run a job on a running Ray cluster; the same job twice is one submission."""
    from renderfarm.jobfile import load_job
    from renderfarm.submit import submit_job, wait_for

    loaded = load_job(job, sets, out, logical_date)
    id_, new = submit_job(loaded, address)
    ended = wait_for(id_, address) if wait else None
    if as_json:
        _print_json(
            {"submission_id": id_, "new": new, "status": ended and ended[0], "log_tail": ended and ended[1], "out": loaded.output.path}
        )
    else:
        out_console.print(f"{'submitted' if new else 'already running, attached'}: {id_}")
        out_console.print(f"renderfarm status {loaded.output.path}")
        if ended:
            out_console.print(f"ended: {ended[0]}")
            if ended[0] != "SUCCEEDED":
                out_console.print(ended[1], markup=False)
    if ended is not None and ended[0] != "SUCCEEDED":
        raise typer.Exit(EXIT_ROWS_FAILED)


@app.command()
def version() -> None:
    """Print renderfarm's version."""
    _print_version(True)


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, ensure_ascii=False, default=str) + "\n")


def _print_pairs(pairs: dict[str, Any]) -> None:
    table = Table(box=None, show_header=False, padding=(0, 2))
    for name, value in pairs.items():
        table.add_row(name, Text(_shown_value(value), overflow="fold"))  # Text: a prompt may hold what rich takes for markup
    out_console.print(table)


def _shown_value(value: Any) -> str:
    if value is None or value == {}:
        return "—"
    if isinstance(value, dict):
        return "\n".join(f"{name}: {_shown_value(of)}" for name, of in value.items())
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    # somebody's text may hold what a terminal obeys
    return "".join(sign if sign.isprintable() or sign in "\n\t" else "\ufffd" for sign in str(value))


def _leave(code: int) -> NoReturn:
    """End the process. After an interruption or a failure at once: a thread that is still rendering cannot be joined, and torch
    aborts the process when Python ends beside it."""
    if code in (EXIT_INTERRUPTED, EXIT_STOPPED):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def main() -> NoReturn:
    """Entry point: every expected error is one message and an exit code."""
    try:
        app()
    except RenderfarmError as error:
        console.print(f"error: {error}", markup=False, style="red" if console.is_terminal else None)
        for note in getattr(error, "__notes__", ()):
            console.print(f"warning: {note}", markup=False)
        if "--json" in sys.argv:
            _print_json({"error": str(error), "error_class": type(error).__name__, "exit_code": error.exit_code})
        _leave(error.exit_code)
    except SystemExit as end:
        _leave(end.code if isinstance(end.code, int) else EXIT_INTERNAL)
    except BrokenPipeError:
        sys.exit(EXIT_USAGE)
    sys.exit(EXIT_OK)
