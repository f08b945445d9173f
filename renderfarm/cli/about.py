"""Commands that say what there is: models, samplers, schema, version."""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from renderfarm.cli.common import AsJson, LogicalDate, Out, Sets, app, out_console, print_json, print_pairs, print_version
from renderfarm.errors import EXIT_OK, EXIT_USAGE, InvalidJob

command = partial(app.command, rich_help_panel="What there is")

Components = Annotated[
    list[str] | None, typer.Option("--component", help="One from elsewhere: vae=FOLDER, vae=org/name@COMMIT/SUBFOLDER. May be repeated.")
]


@command()
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
            print_json(found)
        else:
            print_pairs(found)
        return
    if markdown:
        sys.stdout.write(families_markdown())
        return
    if as_json:
        print_json({"builtin": list(BUILTIN_MODELS), "families": list(FAMILIES)})
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


@command()
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
        print_json({"samplers": rows})
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


@command()
def doctor(
    job: Annotated[Path | None, typer.Argument(help="Look at this job's model, memory and output, too.", show_default=False)] = None,
    sets: Sets = None,
    out: Out = None,
    logical_date: LogicalDate = None,
    address: Annotated[
        str | None, typer.Option(help="Of a Ray cluster: http://HOST:8265, or ray://HOST:10001.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say whether this machine is ready to render, line by line, and what to do where it is not. Exits 2 if anything is wrong."""
    from renderfarm.doctor import Finding, examine
    from renderfarm.jobfile import load_job

    if job is None and (sets or out or logical_date):
        raise InvalidJob("--set, --out and --logical-date change a job; name it, or leave them out")
    findings: list[Finding] = []
    for finding in examine(load_job(job, sets, out, logical_date) if job else None, address):
        findings.append(finding)
        if not as_json:
            word = {"ok": "OK  ", "note": "note", "wrong": "FIX "}[finding.state]
            out_console.print(f"{word}  {finding.what}: {finding.said}" + (f"\n      → {finding.fix}" if finding.fix else ""), markup=False)
    wrong = [finding for finding in findings if finding.state == "wrong"]
    if as_json:
        print_json({"ok": not wrong, "findings": [vars(finding) for finding in findings]})
    else:
        out_console.print(f"{len(wrong)} of {len(findings)} to fix" if wrong else "ready")
    raise typer.Exit(EXIT_USAGE if wrong else EXIT_OK)


class SchemaChoice(StrEnum):
    job = "job"
    images = "images"
    errors = "errors"


@command()
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
        print_json(columns)
    else:
        print_pairs(columns)


@command()
def version() -> None:
    """Print renderfarm's version."""
    print_version(True)
