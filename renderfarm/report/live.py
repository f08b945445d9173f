"""Progress for people: a live view on a terminal, one line per 30 s in a log, nothing for `--json`."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from renderfarm.progress import Progress

LOG_EVERY_S = 30.0
TOLD = ("PAUSING", "PAUSED", "CANCELLING")  # at once: somebody has asked for it


def duration(seconds: float | None) -> str:
    """`1:02:03`, `2:03`; `?` if unknown."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def one_line(progress: Progress) -> str:
    return (
        f"{progress.state.lower()}: part {progress.parts_done} of {progress.parts or '?'}, {progress.images} images, "
        f"{progress.errors} errors, {progress.images_per_second:.1f} images/s, {duration(progress.eta_seconds)} left, "
        f"{sum(w.state == 'ready' for w in progress.workers.values())} workers"
        + (f"; waiting: {progress.trouble}" if progress.trouble else "")
        + ("; `renderfarm resume` goes on" if progress.state == "PAUSED" else "")
    )


class _Shown:
    """A context manager with a live view while it lasts, on a terminal."""

    def __init__(self, console: Console, quiet: bool = False) -> None:
        self.console, self.quiet = console, quiet
        self.live = Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal and not quiet else None

    def __enter__(self) -> Self:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.live:
            self.live.stop()


class Watcher(_Shown):
    """It is also the driver's observer."""

    def __init__(self, console: Console, quiet: bool = False) -> None:
        super().__init__(console, quiet)
        self.next_line, self.state = time.monotonic(), ""

    def __call__(self, progress: Progress) -> None:
        if self.live:
            self.live.update(_view(progress))
        elif not self.quiet and (time.monotonic() >= self.next_line or (progress.state != self.state and progress.state in TOLD)):
            self.state = progress.state
            self.next_line = time.monotonic() + LOG_EVERY_S
            self.console.print(one_line(progress), highlight=False, soft_wrap=True)


class Line(_Shown):
    """One line that says what is being done; nothing where nobody watches."""

    def __call__(self, text: str) -> None:
        if self.live:
            self.live.update(Text(text))


def _view(progress: Progress) -> Group:
    workers = Table(box=None, padding=(0, 2))
    for column in ("worker", "state", "device", "leases", "images", "images/s"):
        workers.add_column(column)
    seconds = max(1.0, time.time() - (progress.first_ready or time.time()))
    for name, worker in list(progress.workers.items())[-16:]:
        workers.add_row(name, worker.state, worker.device, str(worker.leases), str(worker.images), f"{worker.images / seconds:.1f}")
    bar = Table.grid()  # a bare ProgressBar ends without a line break
    bar.add_row(ProgressBar(total=progress.parts, completed=progress.parts_done, width=60))
    lines: list[Text | Table] = [Text(one_line(progress)), bar, workers]
    lines += [Text(f"workers left out: {count}: {reason}") for reason, count in progress.left_out.items()]
    if progress.error_classes:
        lines.append(Text("errors: " + ", ".join(f"{name} {count}" for name, count in progress.error_classes.items())))
    return Group(*lines)
