"""Progress for people: a live view on a terminal, one line per 30 s in a log, nothing for `--json`."""

from __future__ import annotations

import time
from collections import Counter
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from renderfarm.heartbeat import ALIVE
from renderfarm.progress import Progress

LOG_EVERY_S = 30.0
GOING_ON = (*ALIVE, "UNKNOWN")
TOLD = ("PAUSING", "PAUSED", "CANCELLING")  # at once: somebody has asked for it


def duration(seconds: float | None) -> str:
    """`1:02:03`, `2:03`; `?` if unknown."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def one_line(said: dict[str, Any]) -> str:
    """`said`: a `Progress.snapshot()`, of this process or of the output."""
    known: dict[str, Any] = {"state": "UNKNOWN", "parts_done": 0, "images": 0, "errors": 0, "workers": {}} | said
    ready = sum(worker["state"] == "ready" for worker in known["workers"].values())
    going_on = f", {duration(said.get('eta_seconds'))} left, {ready} workers" if known["state"] in GOING_ON else ""
    return (
        f"{known['state'].lower()}: part {known['parts_done']} of {said.get('parts') or '?'}, {known['images']} images, "
        f"{known['errors']} errors, {said.get('images_per_second') or 0.0:.1f} images/s{going_on}"
        + (f"; waiting: {printable(said['trouble'])}" if said.get("trouble") else "")
        + ("; `renderfarm resume` goes on" if known["state"] == "PAUSED" else "")
    )


def printable(text: str) -> str:
    """Somebody's text may hold what a terminal obeys."""
    return "".join(sign if sign.isprintable() else "\ufffd" for sign in " ".join(text.split()))


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
            self.live.update(view(progress.snapshot()))
        elif not self.quiet and (time.monotonic() >= self.next_line or (progress.state != self.state and progress.state in TOLD)):
            self.state = progress.state
            self.next_line = time.monotonic() + LOG_EVERY_S
            self.console.print(one_line(progress.snapshot()), highlight=False, soft_wrap=True)


class Line(_Shown):
    """One line that says what is being done; nothing where nobody watches."""

    def __call__(self, text: str) -> None:
        if self.live:
            self.live.update(Text(text))


def view(said: dict[str, Any]) -> Group:
    """`said`: as `one_line` takes it."""
    workers = Table(box=None, padding=(0, 2))
    for column in ("worker", "state", "device", "leases", "images", "images/s"):
        workers.add_column(column)
    seconds = max(1.0, said.get("updated", 0.0) - (said.get("first_ready") or said.get("updated", 0.0)))
    every: dict[str, Any] = said.get("workers", {})
    for name, worker in list(every.items())[-16:]:
        cells = (name, worker["state"], worker["device"], str(worker["leases"]), str(worker["images"]), f"{worker['images'] / seconds:.1f}")
        workers.add_row(*map(Text, cells))
    bar = Table.grid()  # a bare ProgressBar ends without a line break
    bar.add_row(ProgressBar(total=said.get("parts") or 0, completed=said.get("parts_done", 0), width=60))
    lines: list[Text | Table] = [Text(one_line(said)), bar]
    if rows := said.get("rows_by_state"):
        lines.append(Text("rows: " + ", ".join(f"{count:,} {state}" for state, count in rows.items())))
    lines.append(workers)
    left_out = Counter(worker["reason"] for worker in every.values() if worker.get("reason"))
    lines += [Text(f"workers left out: {count}: {printable(reason)}") for reason, count in left_out.items()]
    if classes := said.get("error_classes"):
        waived = f" ({said['waived']} of them waived)" if said.get("waived") else ""
        lines.append(Text("errors: " + ", ".join(f"{name} {count}" for name, count in classes.items()) + waived))
    return Group(*lines)


class Changes(_Shown):
    """What `watch` shows of a run of which only the output is known: a live view on a terminal, else a line for each change."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self.last: tuple[Any, ...] = ()

    def is_new(self, said: dict[str, Any]) -> bool:
        """Whether it says another thing than the one before. Time alone changes rates and what is left, too, but tells nothing."""
        told = ("run_id", "state", "trouble", "parts", "parts_done", "images", "errors", "waived", "rows_by_state", "error_classes")
        states = {name: worker["state"] for name, worker in said.get("workers", {}).items()}
        before, self.last = self.last, (*(said.get(name) for name in told), states)
        return before != self.last

    def __call__(self, said: dict[str, Any]) -> None:
        if self.live:
            self.live.update(view(said))
        elif self.is_new(said):
            self.console.print(one_line(said), markup=False, highlight=False, soft_wrap=True)
