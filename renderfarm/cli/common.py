"""What every command uses: the app, consoles, options that several take, how values are printed and read."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from renderfarm.errors import InvalidJob
from renderfarm.shown import shown_value as shown_value

app = typer.Typer(
    name="renderfarm",
    help="A Parquet table of prompts in, a verified image dataset out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


out_console = Console(soft_wrap=True, highlight=False, emoji=False, width=None if sys.stdout.isatty() else 160)


console = Console(stderr=True, soft_wrap=True, highlight=False, emoji=False)


class EngineChoice(StrEnum):
    ray = "ray"
    inline = "inline"


Engine = Annotated[EngineChoice, typer.Option(help="inline: one worker in this process.")]
JobFile = Annotated[Path, typer.Argument(help="The job's YAML file.", show_default=False)]


Sets = Annotated[list[str] | None, typer.Option("--set", help="Change a field: render.num_inference_steps=8. May be repeated.")]


Out = Annotated[str | None, typer.Option("--out", help="Output folder instead of the job's.")]


Address = Annotated[str | None, typer.Option(help="A Ray cluster to join (auto, or ray://…); else a private local Ray.")]
LogicalDate = Annotated[str | None, typer.Option("--logical-date", help="YYYY-MM-DD for {{ ds }} in the job's paths.")]


AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object, last.")]


OutputFolder = Annotated[str, typer.Argument(help="The output folder.", show_default=False)]


def print_version(wanted: bool) -> None:
    if wanted:
        from renderfarm import __version__

        out_console.print(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    pass


def shown_path(path: str) -> str:
    """A local path below this folder as a person would type it."""
    relative = os.path.relpath(path) if os.path.isabs(path) else path
    return path if relative.startswith("..") else relative


def seconds(text: str, option: str) -> float:
    """30s, 15m, 12h, 1d."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text.strip())
    if match is None:
        raise InvalidJob(f"{option} {text!r}: give a number with its unit, for example 12h or 1d")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]


def as_called() -> str:
    """This program, as a person would have to type it here."""
    if shutil.which("renderfarm"):
        return "renderfarm"
    return "python -m renderfarm" if sys.argv[0].endswith("__main__.py") else sys.argv[0]


def typed(
    sets: list[str] | None = None,
    logical_date: str | None = None,
    engine: EngineChoice = EngineChoice.ray,
    address: str | None = None,
) -> list[str]:
    """The options that a command was given, for the command that it says comes next."""
    words = [word for item in sets or [] for word in ("--set", item)]
    words += ["--logical-date", logical_date] if logical_date else []
    words += ["--engine", engine.value] if engine is not EngineChoice.ray else []
    return words + (["--address", address] if address else [])


def print_next(*commands: str) -> None:
    """What may be typed after this command, without the program's name."""
    if len(commands) > 1:
        out_console.print("next:")
    for line in commands:
        out_console.print(f"{'  ' if len(commands) > 1 else 'next: '}{as_called()} {line}", markup=False, soft_wrap=True)


def print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, ensure_ascii=False, default=str) + "\n")


def print_pairs(pairs: dict[str, Any]) -> None:
    table = Table(box=None, show_header=False, padding=(0, 2))
    for name, value in pairs.items():
        table.add_row(name, Text(shown_value(value), overflow="fold"))  # Text: a prompt may hold what rich takes for markup
    out_console.print(table)
