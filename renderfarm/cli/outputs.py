"""Commands on what was rendered: verify, inspect, export, gc."""

from __future__ import annotations

import re
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from renderfarm.cli.common import (
    AsJson,
    OutputFolder,
    app,
    console,
    out_console,
    print_json,
    print_pairs,
    seconds,
    shown_path,
)
from renderfarm.errors import EXIT_OK, EXIT_ROWS_FAILED, InvalidJob

command = partial(app.command, rich_help_panel="Outputs")

Models = Annotated[
    list[str] | None,
    typer.Option(
        "--model", help="Where the model lies, if the job named a folder; again as vae=FOLDER or controlnet=FOLDER for its parts."
    ),
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


@command()
def verify(
    out: OutputFolder,
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

    choice, (own, beside) = Choice(all=all_, rows=rows, sample=sample), _model_and_parts(model)
    with Line(console, quiet=as_json) as line:
        found = verify_output(out, choice, own, beside, offload.value, line)
    if as_json:
        print_json({**asdict(found), "ok": found.ok})
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


@command()
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
        print_json({**shown, "again": asdict(again) if again else None})
    else:
        print_pairs({"part": found.part, "file": found.file, **{name: str(v) for name, v in found.record.items() if v is not None}})
        if found.profile:
            out_console.print("render profile:")
        print_pairs({name: value for name, value in found.profile.items() if not isinstance(value, dict | list)})
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
        print_json(found)
        return
    row = found["row"]
    shown = found | {"row": {name: str(value) for name, value in row.items()} if isinstance(row, dict) else row}  # a seed without commas
    print_pairs({name: value for name, value in shown.items() if value is not None})
    if not any(found[name] for name in SAYS):
        out_console.print("says nothing of itself: it has no row, no parameters, no mark of a model's picture and no signature")


@command()
def report(
    out: OutputFolder,
    file: Annotated[
        Path | None, typer.Option(help="Write it there instead of into the output.", dir_okay=False, show_default=False)
    ] = None,
    max_images: Annotated[int, typer.Option(min=1, help="Images to show, spread over the output.")] = 10_000,
    as_json: AsJson = False,
) -> None:
    """Write one HTML file that shows an output: images with their recipes, X/Y/Z grid, failures, timeline. It opens without a server."""
    from dataclasses import asdict

    from renderfarm.reading import open as open_output
    from renderfarm.report.gallery import Bounds
    from renderfarm.report.html import write_report
    from renderfarm.report.live import Line

    with Line(console, quiet=as_json) as line:
        found = write_report(open_output(out), Bounds(max_images), file, line)
    if as_json:
        print_json(asdict(found))
        return
    some = f"{found.images:,} of {found.of:,}" if found.images < found.of else f"{found.images:,}"
    out_console.print(f"report of {some} images, {found.bytes / 1e6:.1f} MB: {shown_path(found.place)}", markup=False)
    if found.images < found.of and not found.unread_parts:
        out_console.print(f"--max-images {found.of} takes all of them")
    if found.unread_parts:
        out_console.print(f"{found.unread_parts:,} parts are not in it, since they cannot be read; `renderfarm verify` says what is wrong")
    if found.thumbnails < found.images:
        out_console.print(
            f"{found.images - found.thumbnails:,} have no thumbnail, since their files cannot be read; `renderfarm verify` names them"
        )


class ToChoice(StrEnum):
    parquet = "parquet"
    webdataset = "webdataset"
    files = "files"
    hub = "hub"


@command()
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

    from renderfarm.outputs import open as open_output
    from renderfarm.report.live import Line

    options: dict[str, Any] = {"max_file_size": max_file_size, "shuffle": shuffle, "restart": restart, "staging": staging, "public": public}
    with Line(console, quiet=as_json) as line:
        found = open_output(out).export(dest, to.value, **options, say=line)
    if as_json:
        print_json(asdict(found))
        return
    what = "folders" if to is ToChoice.files else "files"
    made = f"{found.images:,} images in {found.files:,} {what}, {found.new_files:,} of them new"
    out_console.print(f"{made}: {shown_path(found.dest)}", markup=False)
    if found.errors_left_out:
        out_console.print(f"{found.errors_left_out:,} error rows are not in it")
    out_console.print("the lines that open it are in its README.md")


@command()
def gc(
    out: OutputFolder,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    older_than: Annotated[str, typer.Option(help="Leave what is younger alone: 12h, 1d.")] = "1d",
    as_json: AsJson = False,
) -> None:
    """Remove what no table names: images of attempts that died or lost, unfinished writes."""
    from dataclasses import asdict

    from renderfarm.garbage import collect
    from renderfarm.report.live import Line

    with Line(console, quiet=as_json) as line:
        found = collect(out, seconds(older_than, "--older-than"), dry_run=dry_run, say=line)
    if as_json:
        print_json({"out": out, **asdict(found)})
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
