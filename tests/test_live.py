"""What a person sees while a job runs: a live view on a terminal, a line now and then elsewhere, nothing with --json."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from renderfarm.progress import Progress, WorkerProgress
from renderfarm.records import PartReceipt, Receipt
from renderfarm.report.live import Line, Watcher, duration


@pytest.fixture
def progress() -> Progress:
    found = Progress(run_id="r", job="parti", rows=100, parts=10, state="RUNNING")
    found.workers = {
        "w0": WorkerProgress(device="cpu", state="ready"),
        "w1": WorkerProgress(state="benched", reason="dtype: bfloat16 there"),
    }
    found.first_ready = found.started
    found.add("w0", Receipt(0, (PartReceipt(0, 9, 1, 900, error_classes={"InvalidInput": 1}),), 1.0, 20, 70, 80))
    return found


def shown(progress: Progress, *, terminal: bool, quiet: bool = False, times: int = 1) -> str:
    out = io.StringIO()
    with Watcher(Console(file=out, force_terminal=terminal, width=100), quiet=quiet) as watcher:
        for _ in range(times):
            watcher(progress)
        if watcher.live:
            watcher.live.refresh()
    return out.getvalue()


def test_a_terminal_shows_parts_rate_errors_and_every_worker(progress: Progress) -> None:
    found = shown(progress, terminal=True)
    for text in (
        "running: part 1 of 10, 9 images, 1 errors",
        "w0",
        "ready",
        "cpu",
        "workers left out: 1: dtype: bfloat16 there",
        "InvalidInput 1",
    ):
        assert text in found


def test_a_log_gets_one_line_and_not_one_per_event(progress: Progress) -> None:
    lines = shown(progress, terminal=False, times=50).splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("running: part 1 of 10, 9 images, 1 errors, ")


def test_while_parts_are_not_measured_their_number_is_open() -> None:
    assert "starting: part 0 of ?, 0 images" in shown(Progress(run_id="r", job="j", rows=100), terminal=False)


@pytest.mark.parametrize("terminal", [True, False])
def test_quiet_is_silent(terminal: bool, progress: Progress) -> None:
    assert shown(progress, terminal=terminal, quiet=True) == ""


@pytest.mark.parametrize(("seconds", "text"), [(None, "?"), (0.4, "0:00"), (123, "2:03"), (3723, "1:02:03"), (100 * 3600, "100:00:00")])
def test_durations_read_as_clocks_do(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(("terminal", "quiet"), [(True, False), (True, True), (False, False)])
def test_a_line_is_for_those_who_watch_and_is_gone_at_the_end(terminal: bool, quiet: bool) -> None:
    out = io.StringIO()
    with Line(Console(file=out, force_terminal=terminal, width=100), quiet=quiet) as line:
        line("rendered again: [3] of 9")
        if line.live:
            line.live.refresh()
    if terminal and not quiet:
        assert "rendered again: [3] of 9" in out.getvalue()
        assert out.getvalue().endswith("\x1b[2K"), "erased"
    else:
        assert out.getvalue() == ""
