"""An output as a Python value: what the commands do with one, as methods, for scripts and notebooks.

>>> output = renderfarm.open("out/cats")  # doctest: +SKIP
>>> output.status()["images"], output.errors().to_pandas()  # doctest: +SKIP
>>> for image, record in output: ...  # doctest: +SKIP

Each method is one command, takes what it takes, and raises the package's own errors.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa

from renderfarm import reading
from renderfarm.config import check_credentials, expand_env
from renderfarm.errors import InvalidJob
from renderfarm.shown import Figures

if TYPE_CHECKING:
    from renderfarm.config import Offload
    from renderfarm.control import Told, Wanted
    from renderfarm.export import Exported
    from renderfarm.failures import Asked, By, Waived
    from renderfarm.garbage import Collected
    from renderfarm.report.html import WrittenReport
    from renderfarm.verification import Again, Provenance, Verification
    from renderfarm.waiting import Seen, Waited

Place = str | os.PathLike[str]
Rows = str | int | Iterable[int]
"""`"0-5,7"`, one row, or several."""
Say = Callable[[str], None]


def _silent(text: str) -> None:
    pass


class Output(reading.Output):
    """An output, finished or not, also while a run is at work on it. Iterates (PIL image, record) in the manifest's order."""

    # ------------------------------------------------------------------------------------------------- watch and steer

    def status(self) -> Figures:
        """How far it is, as `status --json` has it."""
        from renderfarm.status import read_status

        return Figures(f"status of {self.url}", read_status(self.url))

    def wait(self, timeout_s: float | None = None, *, after: str | None = None, begins_within_s: float = 60.0) -> Waited:
        """Until its run has ended, or `timeout_s` has passed; `exit_code` is that of the run, 6 after the timeout. `after`: the id of a run
        that has ended (`status()["run"]`); the one that comes after it is meant, which has `begins_within_s` to begin."""
        from renderfarm.waiting import Begins, wait

        return wait(self.url, timeout_s, begins=Begins(after, begins_within_s))

    def watch(self, every_s: float = 2.0, *, after: str | None = None, begins_within_s: float = 60.0) -> Iterator[Seen]:
        """How far its run is, every few seconds, until it has ended or is paused: the last one has an `exit_code`. `after`,
        `begins_within_s`: as for `wait`."""
        from renderfarm.waiting import Begins, watch

        return watch(self.url, every_s, Begins(after, begins_within_s))

    def logs(
        self, run: str | None = None, *, worker: str | None = None, rows: Rows | None = None, follow: bool = False
    ) -> Iterator[dict[str, Any]]:
        """What its runs said, event by event: of one run, one worker, or about some rows. `follow`: and what they say until they end."""
        from renderfarm.logs import Choice, read_logs

        return read_logs(self.url, Choice(run, worker, _ranges(rows)), follow=follow)

    def pause(self) -> Told:
        """Let the run finish its parts in flight, let its workers go, and wait. Raises InvalidJob where none is at work."""
        return self._tell("pause")

    def resume(self) -> Told:
        """Let a paused run go on."""
        return self._tell("run")

    def cancel(self) -> Told:
        """End the run when its parts in flight are finished; what is committed stays."""
        return self._tell("cancel")

    def _tell(self, wanted: Wanted) -> Told:
        from renderfarm.control import ask

        return ask(self.store, wanted)

    # ------------------------------------------------------------------------------------------------- what failed

    def errors(self, group_by: By | None = None) -> pa.Table:
        """The samples that have no image, and why; or, `group_by` class, message or worker, how many have that in common."""
        from renderfarm.failures import Failure, Group, failures, groups

        if group_by is not None:
            return _table_of(groups(self, group_by), Group)
        return _table_of([failure for _, failed, _ in failures(self, look_for_requests=True) for failure in failed], Failure)

    def retry(self, *, classes: Sequence[str] = (), rows: Rows | None = None, all: bool = False) -> Asked:
        """Ask for failed samples to be rendered again by the next run, or the one at work: those that may succeed, or those named."""
        from renderfarm.failures import Choice, retry

        return retry(self.url, Choice(_classes(classes), _ranges(rows), all))

    def waive(self, *, classes: Sequence[str] = (), rows: Rows | None = None, all: bool = False, reason: str | None = None) -> Waived:
        """Say that failed samples may stay errors: they count no more against failure.tolerate."""
        from renderfarm.failures import Choice, waive

        return waive(self.url, Choice(_classes(classes), _ranges(rows), all), reason)

    # ------------------------------------------------------------------------------------------------- what was rendered

    def verify(
        self,
        sample: int = 8,
        *,
        rows: Rows | None = None,
        all: bool = False,
        model: str | None = None,
        parts: Mapping[str, str] | None = None,
        offload: Offload = "none",
        say: Say = _silent,
    ) -> Verification:
        """Check every file against its table, and render some images again: `sample` of them, others each time, those of `rows`, or all.
        `model`: where it lies if the job named a folder; `parts`: those of it that lie elsewhere, by name. `say`: is told how far it is."""
        from renderfarm.verification import Choice, verify

        return verify(self.url, Choice(all=all, rows=_ranges(rows), sample=sample), model, parts, offload, say)

    def inspect(self, row: int, image_index: int = 0) -> Provenance:
        """Where one image comes from: its row of the table, its part, its file, the render profile."""
        from renderfarm.verification import inspect

        return inspect(self.url, row, image_index)

    def render(
        self,
        row: int,
        image_index: int = 0,
        *,
        file: Place,
        model: str | None = None,
        parts: Mapping[str, str] | None = None,
        offload: Offload = "none",
    ) -> Again:
        """Render one image again, alone, into that PNG file, and compare it with the stored one: `inspect --render`."""
        from renderfarm.verification import render_to

        return render_to(self.inspect(row, image_index), Path(file), model, parts, offload)

    def report(self, file: Place | None = None, max_images: int = 10_000, *, say: Say = _silent) -> WrittenReport:
        """Write one HTML file that shows it, into the output or as `file`."""
        from renderfarm.report.gallery import Bounds
        from renderfarm.report.html import write_report

        return write_report(self, Bounds(max_images), None if file is None else Path(file), say)

    def export(
        self,
        dest: Place,
        to: Literal["parquet", "webdataset", "files", "hub"] = "parquet",
        *,
        max_file_size: int | str | None = None,
        shuffle: int | None = None,
        restart: bool = False,
        staging: Place | None = None,
        public: bool = False,
        say: Say = _silent,
    ) -> Exported:
        """Write it once more as few large files, each picture checked against its hash. Do it again and it continues. `dest`: a new folder
        or store URL; to the hub `org/name`. `max_file_size`: in bytes, or `"500MB"`; about 1 GB."""
        from renderfarm.export import Options, export, size_in_bytes
        from renderfarm.hub import check_repository, export_to_hub

        place = os.fspath(dest)
        if to == "files" and max_file_size is not None:
            raise InvalidJob("--max-file-size: with --to files each picture is a file of its own; leave it out")
        if to != "hub" and (staging is not None or public):
            raise InvalidJob("--staging and --public are for --to hub; leave them out")
        options = Options("parquet" if to == "hub" else to, size_in_bytes(max_file_size or "1GB"), shuffle)
        if to == "hub":
            check_repository(place, options.max_file_size)
            folder = Path(staging) if staging is not None else Path("hub") / place.replace("/", "--")
            return export_to_hub(self.url, place, folder, options, public=public, restart=restart, say=say)
        check_credentials("DEST", place)
        return export(self.url, expand_env(place), options, restart=restart, say=say)

    def gc(self, older_than_s: float = 86_400.0, *, dry_run: bool = False, say: Say = _silent) -> Collected:
        """Remove what no table names and what is older than that; `dry_run`: only count it."""
        from renderfarm.garbage import collect

        return collect(self.url, older_than_s, dry_run=dry_run, say=say)

    # ------------------------------------------------------------------------------------------------- in a notebook

    def __repr__(self) -> str:
        output = self.job["output"]
        return f"<renderfarm.Output {self.url}: {output['layout']}, {output['format']}>"

    def _repr_html_(self) -> str:
        from renderfarm.report.notebook import sheet

        return sheet(self.url)


def open(out: Place) -> Output:
    """Open an output folder or URL. Raises InvalidJob if it is none."""
    return Output(expand_env(os.fspath(out)))


def _classes(given: Sequence[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


def _ranges(rows: Rows | None) -> str | None:
    if rows is None or isinstance(rows, str):
        return rows
    return str(rows) if isinstance(rows, int) else ",".join(str(int(row)) for row in rows)


def _table_of(values: Sequence[object], kind: type) -> pa.Table:
    """Their fields as columns, which are there without any value, too."""
    types = {"str": pa.string(), "int": pa.int64(), "bool": pa.bool_()}
    schema = pa.schema([pa.field(name, types[said.removesuffix(" | None")]) for name, said in kind.__annotations__.items()])
    return pa.Table.from_pylist([vars(value) for value in values], schema=schema)
