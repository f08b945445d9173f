"""What a run leaves for people to look at: dataset card, contact sheet, report. Whatever stands in their way, the run has ended as it has;
and a store that is away must not keep it from ending."""

from __future__ import annotations

from collections.abc import Callable

from renderfarm import commit
from renderfarm.errors import EXIT_INTERRUPTED, Transient
from renderfarm.preparation import Prepared
from renderfarm.reading import Output
from renderfarm.report.card import write_card
from renderfarm.report.contact_sheet import KEY as SHEET
from renderfarm.report.contact_sheet import write_contact_sheet
from renderfarm.report.contents import runs
from renderfarm.report.figures import figures
from renderfarm.report.html import AT_THE_END, IN_A_HURRY, write_report
from renderfarm.report.html import KEY as REPORT
from renderfarm.storage import Store, open_store
from renderfarm.summary import RunSummary

PATIENCE_S = 10.0  # with each request at the end; the first that fails all the same is the last


def write_views(prepared: Prepared, summary: RunSummary | None) -> list[str]:
    """Warnings: what could not be written, and why. `summary`: of the run that has ended; None: an error ended it."""
    url = prepared.store.url
    store = open_store(url, single_writer=prepared.job.output.single_writer, patience_s=PATIENCE_S)
    views: dict[str, Callable[[], str | None]] = {"dataset card": lambda: write_card_of(prepared, store)}
    if summary is not None:
        views = {"contact sheet": lambda: _write_sheet(Output(url, PATIENCE_S)), **views}
    views["report"] = lambda: _write_report(Output(url, PATIENCE_S), summary)
    warnings, left = [], list(views)
    for what, write in views.items():
        try:
            if said := write():
                warnings.append(said)
        except Transient as error:
            which = f"the {what} was" if len(left) == 1 else f"{', '.join(f'the {view}' for view in left)} were"
            return [*warnings, f"{which} not written, since the store is away ({error}); run the same command again when it is back"]
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            again = f"`renderfarm report {url}` tries again" if what == "report" else "the next run of the job tries again"
            warnings.append(f"the {what} was not written ({why}); {again}")
        left.remove(what)
    return warnings


def write_card_of(prepared: Prepared, store: Store) -> None:
    grid, output, entries = prepared.grid(), prepared.job.output, commit.index_entries(store)
    counts = commit.counts(entries)
    write_card(
        store,
        prepared.frozen(),
        name=prepared.job.name,
        rows=prepared.manifest.rows,
        images=counts.images,
        errors=counts.errors,
        finished=grid is not None and counts.parts_done == grid.count,
        sheet=SHEET if store.exists(SHEET) else None,
        columns=prepared.columns(),
        warnings=prepared.model.warnings,
        card=output.card,
        figures=figures(store, output.layout, entries),
    )


def _write_sheet(output: Output) -> None:
    write_contact_sheet(output)


def _write_report(output: Output, summary: RunSummary | None) -> str | None:
    """What a reader of the report should know."""
    if summary is not None and _is_shown(output, summary):
        return None
    written = write_report(output, IN_A_HURRY if summary is not None and summary.exit_code == EXIT_INTERRUPTED else AT_THE_END)
    if not written.unread_parts:
        return None
    return (
        f"{written.unread_parts:,} parts could not be read, and are not in the report; `renderfarm verify {output.url}` says what is wrong"
    )


def _is_shown(output: Output, summary: RunSummary) -> bool:
    """Whether there is a report that shows the output as it is: nothing is new, and the run before ended the same way."""
    if summary.new_images or summary.new_errors or not output.store.exists(REPORT):
        return False
    return [run["state"] for run in runs(output, most=2)] == [summary.state] * 2
