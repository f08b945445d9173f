"""How a run ended: what `run` returns, the output's `runs/` keep, and a webhook is told."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from renderfarm.errors import EXIT_INTERRUPTED, EXIT_OK, EXIT_ROWS_FAILED, EXIT_STOPPED_BY_USER
from renderfarm.progress import Progress
from renderfarm.repair import Repaired
from renderfarm.shown import Shown


@dataclass(frozen=True)
class RunSummary(Shown):
    """How a run ended. Counts are of the whole output; `new_*` of this run."""

    run_id: str
    job: str
    out: str
    state: str
    exit_code: int
    rows: int
    images: int
    errors: int
    new_images: int
    new_errors: int
    error_classes: dict[str, int]
    workers_left_out: dict[str, int]
    """Why workers took no part (they have another render profile, or could not be started), and how many."""
    seconds: float
    images_per_second: float
    useful_slots: float | None
    bytes: int
    lost_workers: int
    copies: int
    """Leases that a second worker rendered, too, since the first was slow."""
    warnings: tuple[str, ...] = ()
    """What a user of the dataset should know of the model's rendering."""
    repaired: tuple[Repaired, ...] = ()
    """With `--repair`: the parts that were not as they had been committed."""
    waived: int = 0
    """Of the errors, those that may stay."""
    key: str = ""
    """Hash of the job, its parameters and its logical date: every go at the same tick has the same."""
    logical_date: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def end_of(progress: Progress, *, unfinished: bool, cancelled: bool, tolerate: float) -> tuple[str, int]:
    """A run's last state, and its exit code. `tolerate`: the share of samples that may fail."""
    if unfinished:
        return ("CANCELLED", EXIT_STOPPED_BY_USER) if cancelled else ("INTERRUPTED", EXIT_INTERRUPTED)
    failed = (progress.errors - progress.waived) / max(1, progress.errors + progress.images)
    return ("PARTIAL", EXIT_ROWS_FAILED) if failed > tolerate else ("SUCCEEDED", EXIT_OK)


def summarise(progress: Progress, out: str, exit_code: int, warnings: list[str], repaired: list[Repaired]) -> RunSummary:
    """`progress`: as the run left it."""
    return RunSummary(
        run_id=progress.run_id,
        job=progress.job,
        key=progress.key,
        logical_date=progress.logical_date,
        out=out,
        state=progress.state,
        exit_code=exit_code,
        rows=progress.rows,
        images=progress.images,
        errors=progress.errors,
        waived=progress.waived,
        new_images=progress.new_images,
        new_errors=progress.new_errors,
        error_classes=dict(progress.error_classes),
        workers_left_out=progress.left_out,
        seconds=round(progress.seconds, 2),
        images_per_second=round(progress.images_per_second, 3),
        useful_slots=progress.useful_slots,
        bytes=progress.bytes,
        lost_workers=progress.lost_workers,
        copies=progress.copies,
        warnings=tuple(warnings),
        repaired=tuple(repaired),
    )
