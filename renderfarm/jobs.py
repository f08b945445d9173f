"""A job as a Python value: `renderfarm validate`, `plan`, `preview` and `run` as methods, for scripts and notebooks.

>>> job = renderfarm.Job(name="cats", manifest="cats.csv", model="builtin:shapes", output={"path": "out/cats"})  # doctest: +SKIP
>>> job.plan()  # doctest: +SKIP
>>> summary = job.run()  # doctest: +SKIP

Mistakes are the package's own errors (`renderfarm.errors`); nothing is printed unless one asks for it.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypedDict, Unpack

from renderfarm import config
from renderfarm.errors import InvalidJob
from renderfarm.jobfile import at_its_line, load_job, make_job
from renderfarm.shown import Figures, table_of
from renderfarm.stopping import on_interrupt

if TYPE_CHECKING:
    from renderfarm.driver import Observer
    from renderfarm.outputs import Output
    from renderfarm.preparation import Prepared
    from renderfarm.preview import Preview
    from renderfarm.summary import RunSummary
    from renderfarm.validation import Validation

Block = Mapping[str, Any]
Place = str | os.PathLike[str]


class Fields(TypedDict, total=False):
    """A job file's own fields, each as the file has it; `renderfarm schema job` explains them. Paths start at the current folder."""

    version: Literal[1]
    name: str
    manifest: Place | Sequence[Place] | Block
    model: Place | Block
    sweep: Block
    prompts: Block
    params: Block
    render: Block
    seed: int
    seed_policy: Literal["derive", "same"]
    inputs: Block
    after: Sequence[Block]
    workers: Block
    output: Block
    failure: Block
    if_running: Literal["share", "exit"]
    notify: Block
    track: Block
    logical_date: str
    cost: Block


class Job:
    """One render job, checked when it is made. It does not change; make another one."""

    def __init__(self, fields: Mapping[str, Any] | None = None, /, **more: Unpack[Fields]) -> None:
        """From a job file's own fields: as arguments, in a dict, or both. Raises InvalidJob with one message for all that is wrong."""
        if fields is not None and not isinstance(fields, Mapping):
            raise InvalidJob(f"a job's fields are wanted, not {type(fields).__name__}; Job.load(FILE) reads a job file")
        self._made(make_job({**(fields or {}), **more}), None, None)

    def _made(self, spec: config.Job, file: Path | None, changed: Mapping[str, Any] | None) -> None:
        self.spec, self._file, self._changed = spec, file, changed

    @classmethod
    def load(cls, file: Place, *, set: Mapping[str, Any] | None = None, out: Place | None = None, logical_date: str | None = None) -> Self:
        """From a job file. `set`: fields that are to have other values, `{"render.num_inference_steps": 8}`, also its parameters
        (`{"params.steps": 30}`); `out`: another output; `logical_date`: YYYY-MM-DD, for `{{ ds }}`. Raises InvalidJob."""
        job = cls.__new__(cls)
        job._made(load_job(Path(file), set, None if out is None else os.fspath(out), logical_date), Path(file), set)
        return job

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def out(self) -> str:
        """Where its output is, as the job says it: `${ENV}` is not expanded."""
        return self.spec.output.path

    def validate(self) -> Validation:
        """Check every row of the manifest; nothing is rendered or written. Of what is wrong with rows, the first 100 messages."""
        from renderfarm.validation import validate_rows

        with self._told():
            return validate_rows(self._prepared())

    def plan(self) -> Figures:
        """What `run` would do: rows, parts done and left, images, bytes, time and cost, as `plan --json` has it. The rows of a sweep are
        made now, and kept."""
        from renderfarm.estimate import plan

        with self._told():
            return Figures(f"plan of {self.name}", plan(self._prepared()))

    def preview(self, rows: int = 9, file: Place | None = None) -> Preview:
        """Render some rows here, spread over manifest and sweep, in the pixels of the later run. `file`: a PNG for the contact sheet,
        which a notebook shows in any case."""
        from renderfarm.preview import preview

        with self._told():
            return preview(self.spec, None if file is None else Path(file), rows)

    def run(
        self,
        *,
        engine: Literal["ray", "inline"] = "ray",
        address: str | None = None,
        repair: bool = False,
        grace_s: float = 30.0,
        progress: bool | Observer = False,
    ) -> RunSummary:
        """Render what the output does not hold yet. Run it again and it continues.

        `engine`: `inline` is one worker in this process. `address`: a Ray cluster to join; where Ray is initialised, that one is used, and
        left as it is. `repair`: check what is committed first, and mend it. `progress`: print how far it is, or call that with each
        `Progress`. Ctrl-C, or a notebook's Interrupt, lets parts in flight finish, `grace_s` seconds at most: the summary's `state` is then
        INTERRUPTED. A second one raises Interrupted at once. A bad row raises nothing; Fatal and InvalidJob say what stops a job.
        """
        from renderfarm.api import run

        with _shown(progress) as (observe, say), on_interrupt(say) as stop, self._told():
            signals = {"stop": stop.wanted, "stop_now": stop.at_once}
            return run(self.spec, engine=engine, address=address, observe=observe, repair=repair, grace_s=grace_s, **signals)

    def submit(self, address: str) -> str:
        """Hand it to a running Ray cluster (`http://HEAD:8265`), which renders it as `run` does; the submission's id. One that is queued or
        running there is attached to. Raises Fatal where the cluster cannot be asked. `output().wait()` waits for it."""
        from renderfarm.submit import submit_job

        with self._told():
            return submit_job(self.spec, address)[0]

    def output(self) -> Output:
        """What it has rendered so far. Raises InvalidJob before the first run."""
        from renderfarm.outputs import open

        return open(self.out)

    def _prepared(self) -> Prepared:
        from renderfarm.preparation import prepare

        return prepare(self.spec)

    def _told(self) -> contextlib.AbstractContextManager[None]:
        """What is found wrong with a field later is told with its line in the file, too."""
        return at_its_line(self._file, self._changed) if self._file else contextlib.nullcontext()

    def __repr__(self) -> str:
        manifest = self.spec.manifest
        rows = ", ".join(manifest.paths) if manifest.rows is None else f"{len(manifest.rows)} rows"
        return f"<renderfarm.Job {self.name}: {rows} × {self.spec.model.id} → {self.out}>"

    def _repr_html_(self) -> str:
        said = self.spec.model_dump(mode="json", exclude_unset=True, exclude={"version", "name", "notify"})
        return table_of(self.name, said)


@contextlib.contextmanager
def _shown(progress: bool | Observer) -> Iterator[tuple[Observer, Any]]:
    """Who is told how far a run is, and that it stops."""
    if callable(progress):
        yield progress, lambda text: None
    elif not progress:
        yield lambda known: None, lambda text: None
    else:
        from rich.console import Console

        from renderfarm.report.live import Watcher

        console = Console(file=sys.stderr, soft_wrap=True, highlight=False, emoji=False)
        with Watcher(console) as watcher:
            yield watcher, console.print
