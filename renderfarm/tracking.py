"""A job's `track`: a run's settings, counts and end, for Weights & Biases or MLflow. What fails here is a warning and never the run's end.

Each sink has a thread of its own, which alone speaks to its package: somebody's server must not keep the driver's loop waiting, nor the
process from its end. Prompts go nowhere; secrets are the packages' own environment variables.
"""

from __future__ import annotations

import importlib.util
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from renderfarm.config import Mlflow, Param, Scalar, Track, Wandb, expand_env
from renderfarm.errors import EXIT_INTERRUPTED, EXIT_OK, EXIT_ROWS_FAILED, EXIT_STOPPED_BY_USER, InvalidJob
from renderfarm.journal import redacted
from renderfarm.params import values
from renderfarm.preparation import Prepared
from renderfarm.progress import Progress

EVERY_S = 30.0
END_S, AT_ONCE_S = 20.0, 3.0
PARAMETER_SIGNS = 500  # MLflow's limit
COUNTS = ("parts_done", "images", "errors", "bytes", "new_images", "new_errors", "images_per_second", "useful_slots", "lost_workers")
PACKAGES = {"wandb": "wandb", "mlflow": "mlflow"}

Figures = Mapping[str, float]


class Sink(Protocol):
    """Made when there is something to say, in the thread that alone uses it."""

    def log(self, figures: Figures, step: int) -> None: ...

    def end(self, figures: Figures, said: Mapping[str, str], exit_code: int) -> None: ...


def check(track: Track | None) -> None:
    """Raises InvalidJob where a package that the job wants is missing."""
    for name in _wanted(track):
        found = importlib.util.find_spec(PACKAGES[name])
        if found is None or found.origin is None:  # a folder of that name, as W&B leaves them, is none
            raise InvalidJob(f"track.{name} needs the package {PACKAGES[name]}: pip install 'renderfarm[{name}]', or leave it out")


def _wanted(track: Track | None) -> list[str]:
    return [name for name in PACKAGES if track is not None and getattr(track, name) is not None]


class Tracker:
    """Observes a run. Nothing is begun for one that has nothing to do."""

    def __init__(self, prepared: Prepared, every_s: float = EVERY_S) -> None:
        track = prepared.job.track
        self.every_s, self._next, self._step = every_s, 0.0, 0
        self._speakers = [_Speaker(name, _maker(name, getattr(track, name), prepared)) for name in _wanted(track)]

    def __call__(self, progress: Progress) -> None:
        if not self._speakers or progress.first_ready is None or time.monotonic() < self._next:
            return
        self._next = time.monotonic() + self.every_s
        said = progress.snapshot()
        figures = _numbers(said) | {
            "seconds": round(progress.seconds, 1),
            "workers_ready": sum(worker.state == "ready" for worker in progress.workers.values()),
        }
        step, self._step = self._step, self._step + 1
        for speaker in self._speakers:
            speaker.say(said["run_id"], lambda sink: sink.log(figures, step))

    def end(self, summary: Mapping[str, Any], *, at_once: bool) -> list[str]:
        """Warnings. `summary`: how it ended, as for `notify`; `at_once`: somebody waits for our end."""
        figures = _numbers(summary) | {f"errors_{name}": count for name, count in summary["error_classes"].items()}
        said = {name: str(summary[name]) for name in ("state", "out", "error_class") if summary.get(name)}
        said |= {"error": redacted(summary["error"])} if summary.get("error") else {}
        deadline = time.monotonic() + (AT_ONCE_S if at_once else END_S)
        spoken = [one for one in self._speakers if one.began or summary["new_images"] or summary["new_errors"] or "error" in summary]
        for speaker in spoken:
            speaker.say(summary["run_id"], lambda sink: sink.end(figures, said, summary["exit_code"]), last=True)
        return [warning for speaker in spoken if (warning := speaker.trouble(deadline)) is not None]


def _numbers(said: Mapping[str, Any]) -> dict[str, float]:
    return {name: said[name] for name in COUNTS if isinstance(said.get(name), int | float)}


def parameters(prepared: Prepared) -> dict[str, str]:
    """What a run was asked for, as `render.num_inference_steps`: its settings, never a prompt."""
    job, frozen = prepared.job, prepared.frozen()
    said: dict[str, Any] = {
        "job": job.name,
        "model": frozen["model"]["id"],
        "model.revision": frozen["model"]["revision"],
        "task": frozen["task"],
        "seed": job.seed,
        "rows": prepared.manifest.rows,
        "logical_date": job.logical_date,
        **{f"render.{name}": value for name, value in frozen["render"].items() if "prompt" not in name},
        **{f"render.{name}": frozen["render"][name] for name in ("num_images_per_prompt", "prompt_weighting")},
        **{f"workers.{name}": getattr(job.workers, name) for name in ("max", "batch_size", "dtype", "device")},
        **{f"output.{name}": getattr(job.output, name) for name in ("layout", "format")},
        **{f"params.{name}": value for name, value in values(job.params).items() if _is_no_text(job.params[name], value)},
    }
    return {name: str(value)[:PARAMETER_SIGNS] for name, value in said.items() if value not in (None, [], {})}


def _is_no_text(param: Param, value: Scalar) -> bool:
    """A text that is free may be somebody's prompt, or stand in one."""
    return not isinstance(value, str) or param.choices is not None


# ------------------------------------------------------------------------------------------------------------- threads


class _Speaker:
    """The thread of one sink. `began`: whether it has been told anything."""

    def __init__(self, name: str, make: Callable[[str], Sink]) -> None:
        self.name, self.began = name, False
        self._make, self._reason = make, ""
        self._heard: queue.SimpleQueue[tuple[str, Callable[[Sink], None], bool]] = queue.SimpleQueue()
        self._done = threading.Event()

    def say(self, run_id: str, what: Callable[[Sink], None], last: bool = False) -> None:
        if not self.began:
            self.began = True
            threading.Thread(target=self._speak, name=f"track {self.name}", daemon=True).start()
        if last or self._heard.qsize() == 0:  # one that is slow misses counts, and hears of the end
            self._heard.put((run_id, what, last))

    def _speak(self) -> None:
        sink: Sink | None = None
        while True:
            run_id, what, last = self._heard.get()
            try:
                sink = sink or self._make(run_id)
                what(sink)
                self._reason = ""
            except BaseException as error:  # whatever somebody else's package raises, an exit included, is its own affair
                self._reason = f"{type(error).__name__}: {redacted(next(iter(str(error).splitlines()), ''))}"
            if last:
                self._done.set()
                return

    def trouble(self, deadline: float) -> str | None:
        if not self._done.wait(max(0.0, deadline - time.monotonic())):
            return f"track: {self.name} did not take the run's end in time; what it has of the run may be incomplete"
        return f"track: {self.name} was not told of the run's end ({self._reason})" if self._reason else None


def _maker(name: str, settings: Any, prepared: Prepared) -> Callable[[str], Sink]:
    sinks: dict[str, Callable[..., Sink]] = {"wandb": WandbRun, "mlflow": MlflowRun}
    return lambda run_id: sinks[name](settings, prepared, run_id)


# --------------------------------------------------------------------------------------------------------------- sinks


class WandbRun:
    """Where and how it is kept, W&B's own variables say: WANDB_API_KEY, WANDB_MODE=offline, WANDB_DIR."""

    def __init__(self, settings: Wandb, prepared: Prepared, run_id: str) -> None:
        import wandb

        self.run = wandb.init(
            project=settings.project,
            entity=settings.entity,
            name=run_id,
            group=prepared.job.name,
            tags=list(settings.tags),
            notes=f"output: {prepared.store.url}",
            config=parameters(prepared) | {"out": prepared.store.url},
            reinit="create_new",  # a notebook's own run goes on
            settings=wandb.Settings(console="off", silent=True, save_code=False, disable_git=True),
        )

    def log(self, figures: Figures, step: int) -> None:
        self.run.log(dict(figures), step=step)

    def end(self, figures: Figures, said: Mapping[str, str], exit_code: int) -> None:
        self.run.summary.update({**figures, **said})
        self.run.finish(exit_code=0 if exit_code in (EXIT_OK, EXIT_ROWS_FAILED) else exit_code)


STATUSES = {EXIT_OK: "FINISHED", EXIT_ROWS_FAILED: "FINISHED", EXIT_STOPPED_BY_USER: "KILLED", EXIT_INTERRUPTED: "KILLED"}
"""MLflow's words."""


class MlflowRun:
    """By MLflow's client, so that a notebook's active run stays what it is. Who asks, MLFLOW_TRACKING_TOKEN and its kin say."""

    def __init__(self, settings: Mlflow, prepared: Prepared, run_id: str) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self.client = MlflowClient(None if settings.tracking_uri is None else expand_env(settings.tracking_uri))
        found = self.client.get_experiment_by_name(settings.experiment)
        experiment = found.experiment_id if found is not None else self.client.create_experiment(settings.experiment)
        url = prepared.store.url
        tags = {"renderfarm.out": url, "renderfarm.job": prepared.job.name, "mlflow.note.content": f"output: {url}"}
        self.id = self.client.create_run(experiment, tags=tags, run_name=run_id).info.run_id
        # with the first counts: were this to fail once there is a run, the next try would begin another one
        self._parameters = [Param(name, value) for name, value in parameters(prepared).items()]

    def log(self, figures: Figures, step: int) -> None:
        self._log(figures, step)

    def _log(self, figures: Figures, step: int, tags: Sequence[Any] = ()) -> None:
        self.client.log_batch(self.id, metrics=list(self._metrics(figures, step)), params=self._parameters, tags=tags)
        self._parameters = []

    def _metrics(self, figures: Figures, step: int) -> Iterator[Any]:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        return (Metric(name, float(value), now, step) for name, value in figures.items())

    def end(self, figures: Figures, said: Mapping[str, str], exit_code: int) -> None:
        from mlflow.entities import RunTag

        tags = [RunTag(f"renderfarm.{name}", text) for name, text in said.items()]
        self._log({f"final_{name}": value for name, value in figures.items()}, 0, tags)
        self.client.set_terminated(self.id, STATUSES.get(exit_code, "FAILED"))
