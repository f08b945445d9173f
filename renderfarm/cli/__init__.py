"""The command line. Nothing heavy is imported before a command needs it.

Each module adds its commands when it is imported; their order is that of `--help`.
"""
# ruff: noqa: I001, F401

from __future__ import annotations

import os
import sys
from typing import NoReturn

from renderfarm.cli import jobs, submissions, schedules, runs, outputs, about
from renderfarm.cli.common import app, console, print_json
from renderfarm.errors import EXIT_INTERNAL, EXIT_INTERRUPTED, EXIT_OK, EXIT_STOPPED, EXIT_USAGE, RenderfarmError


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
            print_json({"error": str(error), "error_class": type(error).__name__, "exit_code": error.exit_code})
        _leave(error.exit_code)
    except SystemExit as end:
        _leave(end.code if isinstance(end.code, int) else EXIT_INTERNAL)
    except BrokenPipeError:
        sys.exit(EXIT_USAGE)
    sys.exit(EXIT_OK)
