"""Commands about ticks: schedule, backfill."""

from __future__ import annotations

import shlex
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.table import Table
from rich.text import Text

from renderfarm.cli.common import (
    Address,
    AsJson,
    Engine,
    EngineChoice,
    JobFile,
    Sets,
    app,
    console,
    out_console,
    print_json,
    print_next,
    shown_path,
    typed,
)
from renderfarm.cli.jobs import stop_on_signals
from renderfarm.errors import EXIT_OK, EXIT_ROWS_FAILED, InvalidJob

command = partial(app.command, rich_help_panel="Jobs")


class KindChoice(StrEnum):
    cron = "cron"
    systemd = "systemd"
    cronjob = "cronjob"
    raycronjob = "raycronjob"
    airflow = "airflow"


class OverlapChoice(StrEnum):
    skip = "skip"
    wait = "wait"
    allow = "allow"


@command()
def schedule(
    job: JobFile,
    kind: Annotated[KindChoice, typer.Option(help="Whose clock it is. cronjob: Kubernetes. raycronjob: KubeRay.")],
    at: Annotated[str, typer.Option(help="Five fields, as cron reads them: minute, hour, day, month, day of the week.")] = "15 2 * * *",
    overlap: Annotated[
        OverlapChoice | None,
        typer.Option(help="While the tick before is still at work: skip this one, wait, or allow both. [default: the kind's own]"),
    ] = None,
    sets: Sets = None,
    address: Annotated[str | None, typer.Option(help="As run's; http://HEAD:8265: each tick is submitted there.")] = None,
    image: Annotated[str | None, typer.Option(help="cronjob, raycronjob: a container image with renderfarm in it.")] = None,
    namespace: Annotated[
        str | None, typer.Option(help="cronjob, raycronjob: of Kubernetes. [default: kubectl's]", show_default=False)
    ] = None,
    secrets: Annotated[
        list[str] | None,
        typer.Option("--secret", help="cronjob, raycronjob: a Kubernetes secret, for the pods' environment. May be repeated."),
    ] = None,
    write: Annotated[Path | None, typer.Option(help="Write the files into this folder instead of printing them.")] = None,
    as_json: AsJson = False,
) -> None:
    """Print the file that has a scheduler render a job at each tick, under the tick's date."""
    from renderfarm.backfill import outputs
    from renderfarm.jobfile import load_job
    from renderfarm.schedule import Tick
    from renderfarm.schedule import schedule as make

    outputs(job, ["2024-02-28", "2024-02-29"], sets)  # two ticks have two
    loaded = load_job(job, sets, None, "2024-02-29")
    if kind.value not in ("cronjob", "raycronjob") and (namespace or secrets):
        raise InvalidJob("--namespace and --secret are for cronjob and raycronjob; leave them out")
    made_of: dict[str, Any] = {"address": address, "image": image, "namespace": namespace, "secrets": tuple(secrets or ())}
    tick = Tick(loaded, job.absolute(), at, sets=tuple(sets or ()), **made_of)
    made = make(tick, kind.value, cast(Any, overlap and overlap.value))
    if write is not None:
        for name, text in made.files.items():
            _write(write / name, text)
    if as_json:
        print_json({"files": made.files, "install": made.install})
        return
    if write is None:
        for name, text in made.files.items():
            if len(made.files) > 1:
                out_console.out(f"# ---- {name}", highlight=False)
            out_console.out(text, highlight=False, end="")
    if write is not None:
        console.print(f"wrote {', '.join(str(write / name) for name in made.files)}", markup=False)
    how = "to install, in that folder" if write is not None else "to install (with --write FOLDER, then in that folder)"
    console.print(f"{how}: {made.install}", markup=False)


def _write(file: Path, text: str) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InvalidJob(f"{file}: cannot be written: {error.strerror}") from None


class ReprocessChoice(StrEnum):
    missing = "missing"
    failed = "failed"
    all = "all"


@command()
def backfill(
    job: JobFile,
    first: Annotated[str, typer.Option("--from", help="The first logical date, YYYY-MM-DD.", show_default=False)],
    last: Annotated[str, typer.Option("--to", help="The last one.", show_default=False)],
    reprocess: Annotated[
        ReprocessChoice,
        typer.Option(
            help="missing: days that were not begun, or not finished. failed: also what failed and may succeed. all: also every other "
            "failure, and finished days are checked, and mended where they are damaged."
        ),
    ] = ReprocessChoice.missing,
    every: Annotated[int, typer.Option(min=1, help="Days from one tick to the next: 7 for a weekly job.")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be rendered.")] = False,
    sets: Sets = None,
    engine: Engine = EngineChoice.ray,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Render the ticks of days that are past, one after the other. Run it again and it continues."""
    from renderfarm.backfill import backfill as fill
    from renderfarm.backfill import days, survey
    from renderfarm.report.live import Watcher

    planned = survey(job, days(first, last, every), cast(Any, reprocess.value), sets)
    if not as_json:
        _print_days(planned)
    code, ended = EXIT_OK, []
    if not dry_run and any(day.action for day in planned):
        stop, stop_now = stop_on_signals()
        with Watcher(console, quiet=as_json) as watcher:
            options: dict[str, Any] = {"engine": engine.value, "address": address, "observe": watcher, "stop": stop, "stop_now": stop_now}
            for done in fill(job, planned, cast(Any, reprocess.value), sets, **options):
                ended.append({"date": done.date, **done.summary.to_dict()})
                code = (
                    done.summary.exit_code
                    if done.summary.exit_code not in (EXIT_OK, EXIT_ROWS_FAILED)
                    else max(code, done.summary.exit_code)
                )
                if not as_json:
                    said = f"{done.summary.images:,} images, {done.summary.errors:,} errors in {shown_path(done.summary.out)}"
                    out_console.print(f"{done.date} {done.summary.state.lower()}: {said}", markup=False)
    if as_json:
        print_json({"days": [vars(day) for day in planned], "runs": ended, "exit_code": code})
    elif dry_run and any(day.action for day in planned):
        how = ["--from", first, "--to", last, "--reprocess", reprocess.value, *(["--every", str(every)] if every > 1 else [])]
        again = shlex.join([str(job), *how, *typed(sets, engine=engine, address=address)])
        print_next(f"backfill {again}")
    raise typer.Exit(code)


def _print_days(planned: list[Any]) -> None:
    table = Table(box=None, padding=(0, 2), header_style="bold")
    for column in ("date", "is", "images", "errors", "to do", "output"):
        table.add_column(column)
    for day in planned:
        cells = (day.date, day.state, f"{day.images:,}", f"{day.errors:,}", day.action or "nothing", shown_path(day.out))
        table.add_row(*(Text(cell, overflow="fold") for cell in cells))
    out_console.print(table)
