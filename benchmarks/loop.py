"""The whole job beside the loops that people write: the same prompts, steps, sizes and seeds; each in a process of its own, warm.

    python benchmarks/loop.py [--quick] [--work parti] [--images 1632] [--rounds 9] [--threads 1] [--json FILE]

bare          for every B prompts one `pipe(prompt=[…], generator=[…])` of diffusers, which then saves its PNGs: nothing else
job           `renderfarm.run(job, engine="inline")`: reads the table, renders, encodes, hashes, writes, commits
job on Ray    the same with Ray, one worker
per prompt    one `pipe(prompt)` for each row, which then saves its PNG, as benchmarks' own generators do
Ray Data      read_parquet → map_batches on one actor, B rows at a time → write_parquet, the PNGs in a column
job, glibc's way   (--variants job,glibc) the job with freed memory as glibc treats it by itself

What is timed: images per second from the moment that the model is loaded to the last file. For a job that is from its first worker's
readiness to the commit of the last part; for Ray Data from the end of the actor's constructor to the last file written. Loading is in
`start_up.py`. `besides` is what a round took beyond that, loading included. Every variant has rendered two batches before it counts.
Each round renders the next rows of the table, so all rounds together are --images.

    --work parti        the first rows of PartiPrompts, B=8, 64², 20 steps
    --work sweep        20 of these prompts, each with 50 seeds (with --images: as many prompts as fit)
    --work unguided     as parti, with guidance_scale 1: no unconditional pass

`CPU ms/image` is of the whole process within that time, where it is one process: a machine's load moves it less. `page faults/image`: pages
of memory that the system handed out meanwhile.
`texts` and `predictions` are counted by hooks on the text encoder and the denoiser: rows that they were given, with fillers, and with what
a worker tries before it is ready. At the end the pictures of `bare` and `job` are compared.
"""

from __future__ import annotations

import argparse
import io
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from measuring import DATA, Child, Report, Round, column, compared, options, serve, spread, take_turns
from PIL import Image

B, SIZE, STEPS = 8, 64, 20
SEEDS_OF_A_PROMPT = 50
GUIDANCE = {"parti": 5.0, "sweep": 5.0, "unguided": 1.0}
VARIANTS = {"bare": "bare", "job": "job", "ray": "job on Ray", "prompts": "per prompt", "data": "Ray Data"}
FURTHER = {"glibc": "job, glibc's way"}
ENVIRONMENT = {"glibc": {"GLIBC_TUNABLES": "glibc.malloc.perturb=0"}}  # the default; that one is said is enough: the worker changes none


def main() -> None:
    given = options(
        str(__doc__).splitlines()[0],
        work=(str, "parti", "parti, sweep or unguided"),
        images=(int, (1632, 216), "of all rounds that count together"),
        rounds=(int, (9, 9), "that count"),
        threads=(int, 1, "of torch, in every variant"),
        variants=(str, ",".join(VARIANTS), "which ones"),
        manifest=(Path, DATA / "parti_prompts.parquet", "prompts"),
        folder=(Path, None, "where to work"),
    )
    if given.child:
        serve(CHILDREN[given.child](given))
        return
    with tempfile.TemporaryDirectory(prefix="rf-loop-", dir=given.folder) as name:
        folder = Path(name)
        write_rows(given, folder)
        report = Report(given)
        arguments = ["--folder", name, "--work", given.work, "--threads", str(given.threads)]
        names = VARIANTS | FURTHER
        children = {
            names[one]: Child("loop.py", "--child", one, *arguments, **ENVIRONMENT.get(one, {})) for one in given.variants.split(",")
        }
        try:
            found = take_turns({name: child.ask for name, child in children.items()}, given.rounds)
        finally:
            for child in children.values():
                child.close()
        show(report, given, found, folder)
        report.end()


def write_rows(given: argparse.Namespace, folder: Path) -> None:
    """What every variant renders in each round: the next rows of the table, whole batches of them."""
    prompts = pq.read_table(given.manifest, columns=["prompt"]).column("prompt").to_pylist()
    if given.work == "sweep":
        several = [prompt for prompt in prompts for _ in range(SEEDS_OF_A_PROMPT)]
        prompts = several[: min(given.images, 20 * SEEDS_OF_A_PROMPT)]
    each = max(B, min(given.images, len(prompts)) // given.rounds // B * B)
    for number in range(-1, given.rounds):
        start, stop = (0, 2 * B) if number < 0 else (number * each, (number + 1) * each)
        pq.write_table(pa.table({"prompt": prompts[start:stop], "seed": list(range(start, stop))}), rows_of(folder, str(number)))


def rows_of(folder: Path, number: str) -> Path:
    return folder / f"rows{number}.parquet"


def show(report: Report, given: argparse.Namespace, found: dict[str, list[Round]], folder: Path) -> None:
    ours = "job" if "job" in found else next(iter(found))
    of_process = ["CPU ms/image", "page faults/image", "besides, s", "texts", "predictions"]
    titles = ["", "images/s", f"`{ours}` / it", "not below (95 %)", *of_process]
    lines = []
    for line, rounds in zip(compared(found, ours, "images_per_second"), found.values(), strict=True):
        counts = [str(rounds[-1].get(name, "")) for name in ("texts", "predictions")]
        used = [spread(column(rounds, name)) if name in rounds[0] else "" for name in ("cpu_ms", "faults")]
        lines.append([*line, *used, f"{statistics.median(one['besides'] for one in rounds):.1f}", *counts])
    images = pq.read_metadata(rows_of(folder, "0")).num_rows
    title = f"{given.work}: {SIZE}², {STEPS} steps, B={B}, guidance {GUIDANCE[given.work]:g}, {given.threads} thread(s)"
    report.show(f"{title}, {given.rounds} rounds of {images} images", titles, lines, rounds=found)
    if (folder / "bare").is_dir() and (folder / "job").is_dir():
        same, of, most = differences(folder)
        print(f"\n{same} of {of} pictures of `job` are those of `bare`, bit for bit; the largest difference of the others is {most}")
        report.value["same_pictures"] = {"same": same, "of": of, "largest_difference": most}


def differences(folder: Path) -> tuple[int, int, int]:
    """Equal pictures, all, and the largest difference. A batch of another make-up may move bits in `bare`, never in `job`."""
    same, most = 0, 0
    tables = sorted((folder / "job").glob("data/*/metadata.parquet"))
    rows = [(path.parent / row["file_name"], row["seed"]) for path in tables for row in pq.read_table(path).to_pylist()]
    for file, seed in rows:
        ours, theirs = (np.asarray(Image.open(one), np.int16) for one in (file, folder / "bare" / f"{seed}.png"))
        most = max(most, int(np.abs(ours - theirs).max()))
        same += bool((ours == theirs).all())
    return same, len(rows), most


# ------------------------------------------------------------------------------------------------ the loops people write


class Counts:
    """Rows that text encoders and denoiser were given."""

    def __init__(self) -> None:
        self.texts = self.predictions = 0

    def watch(self, pipe: Any) -> None:
        pipe.text_encoder.register_forward_pre_hook(self._text)
        pipe.unet.register_forward_pre_hook(self._prediction)

    def _text(self, module: Any, inputs: tuple[Any, ...]) -> None:
        self.texts += inputs[0].shape[0]

    def _prediction(self, module: Any, inputs: tuple[Any, ...]) -> None:
        self.predictions += inputs[0].shape[0]

    def taken(self) -> dict[str, int]:
        """Since this was last asked."""
        found = {"texts": self.texts, "predictions": self.predictions}
        self.texts = self.predictions = 0
        return found


class Used:
    """What this process has taken so far."""

    def __init__(self) -> None:
        self.cpu_s, self.faults = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt

    def since(self, before: Used, images: int) -> dict[str, float]:
        """By image: milliseconds of CPU; pages that the system handed out."""
        return {"cpu_ms": 1e3 * (self.cpu_s - before.cpu_s) / images, "faults": (self.faults - before.faults) / images}


def load(threads: int) -> Any:
    """As a user of diffusers does, without its progress bar."""
    import renderfarm
    from renderfarm.models.load import prepare_libraries

    prepare_libraries()  # silences imports; not a number changes
    import torch
    from diffusers import StableDiffusionPipeline

    torch.set_num_threads(threads)
    folder = Path(renderfarm.__file__).parent / "shapes" / "model"
    pipe = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, work: str, rows: list[dict[str, Any]]) -> list[Image.Image]:
    import torch

    generators = [torch.Generator("cpu").manual_seed(row["seed"]) for row in rows]
    pictures: list[Image.Image] = pipe(
        prompt=[row["prompt"] for row in rows],
        generator=generators,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE[work],
        height=SIZE,
        width=SIZE,
    ).images
    return pictures


def plain(given: argparse.Namespace, size: int, name: str) -> Callable[[str], Round]:
    pipe, counts, out = load(given.threads), Counts(), given.folder / name
    counts.watch(pipe)
    out.mkdir()

    def work(number: str) -> Round:
        rows = pq.read_table(rows_of(given.folder, number)).to_pylist()
        counts.taken()
        began, used = time.perf_counter(), Used()
        for start in range(0, len(rows), size):
            some = rows[start : start + size]
            for row, picture in zip(some, draw(pipe, given.work, some), strict=True):
                picture.save(out / f"{row['seed']}.png")
        seconds, since = time.perf_counter() - began, Used().since(used, len(rows))
        return {"images_per_second": len(rows) / seconds, **since, "besides": 0.0, **counts.taken()}

    return work


# ------------------------------------------------------------------------------------------------ the job


def job(given: argparse.Namespace, name: str, engine: str) -> Callable[[str], Round]:
    """Each round is a run of its own, into a new output."""
    from renderfarm.jobfile import load_job

    counts = Counts()
    if engine == "inline":
        count_in_worker(counts)
    else:
        start_ray(given.folder / given.child)
    said = {
        "version": 1,
        "name": "loop",
        "manifest": str(rows_of(given.folder, "-1")),
        "model": "builtin:shapes",
        "render": {"height": SIZE, "width": SIZE, "num_inference_steps": STEPS, "guidance_scale": GUIDANCE[given.work], "sampler": "euler"},
        "workers": {"max": 1, "batch_size": B, "threads": given.threads, "device": "cpu"},
        "output": {"path": str(given.folder / name), "part_rows": 64},
    }
    file = write_job(given.folder / f"{name}.yaml", said)

    def work(number: str) -> Round:
        shutil.rmtree(given.folder / name, ignore_errors=True)
        counts.taken()
        job = load_job(file, [f"manifest={rows_of(given.folder, number)}"])
        return timed_run(job, engine) | (counts.taken() if engine == "inline" else {})

    return work


def write_job(file: Path, said: dict[str, Any]) -> Path:
    import yaml

    file.write_text(yaml.safe_dump(said))
    return file


def timed_run(job: Any, engine: Any, address: str | None = None) -> Round:
    """Images per second from the first worker's readiness to the last part's commit, as the driver hears of it."""
    import renderfarm

    seen: list[tuple[float, Used]] = []  # its beginning and its end

    def observe(progress: Any) -> None:
        if progress.first_ready is not None and not seen:
            seen.append((progress.first_ready, Used()))
        if len(seen) == 1 and progress.parts and progress.parts_done == progress.parts:
            seen.append((time.time(), Used()))

    began = time.time()
    summary = renderfarm.run(job, engine=engine, address=address, observe=observe)
    whole, (ready, before), (end, after) = time.time() - began, *seen
    seconds = end - ready
    assert not summary.errors, summary.error_classes
    cpu = after.since(before, summary.images) if engine == "inline" else {}
    return {"images_per_second": summary.images / seconds, **cpu, "besides": whole - seconds, "useful_slots": summary.useful_slots}


def count_in_worker(counts: Counts) -> None:
    """The worker loads its model by this name; what it loads is watched, and nothing else changes."""
    import renderfarm.worker

    plain_load = renderfarm.worker.load_model

    def watched(*arguments: Any) -> Any:
        model = plain_load(*arguments)
        counts.watch(model.pipe)  # type: ignore[attr-defined]
        return model

    renderfarm.worker.load_model = watched


def start_ray(folder: Path) -> None:
    """Once for all rounds; the engine uses it in place of one of its own."""
    import ray

    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR", _temp_dir=str(folder))


# ------------------------------------------------------------------------------------------------ Ray Data


class Renderer:
    """What Ray Data's documentation calls a callable class: one actor loads the model once."""

    def __init__(self, threads: int, work: str) -> None:
        self.pipe, self.work = load(threads), work
        self.ready = time.time()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        rows = [{"prompt": str(prompt), "seed": int(seed)} for prompt, seed in zip(batch["prompt"], batch["seed"], strict=True)]
        files = []
        for picture in draw(self.pipe, self.work, rows):
            buffer = io.BytesIO()
            picture.save(buffer, "PNG")
            files.append(buffer.getvalue())
        return {"seed": batch["seed"], "image": np.array(files, dtype=object), "ready": np.full(len(files), self.ready)}


def data(given: argparse.Namespace) -> Callable[[str], Round]:
    start_ray(given.folder / given.child)
    import ray.data  # here alone: it lets a crafted Parquet file run code in this process

    ray.data.DataContext.get_current().enable_progress_bars = False
    out = given.folder / "ray-data"

    def work(number: str) -> Round:
        shutil.rmtree(out, ignore_errors=True)
        began = time.time()
        rows = ray.data.read_parquet(str(rows_of(given.folder, number)))
        actor = {"fn_constructor_args": (given.threads, given.work), "compute": ray.data.ActorPoolStrategy(size=1)}
        rows.map_batches(Renderer, batch_size=B, num_cpus=1, **actor).write_parquet(str(out))
        whole, files = time.time() - began, list(out.glob("*.parquet"))
        ready = min(pq.read_table(file, columns=["ready"]).column("ready")[0].as_py() for file in files)
        images = sum(pq.read_metadata(file).num_rows for file in files)
        seconds = max(file.stat().st_mtime for file in files) - ready
        assert images == pq.read_metadata(rows_of(given.folder, number)).num_rows
        return {"images_per_second": images / seconds, "besides": whole - seconds}

    return work


CHILDREN: dict[str, Callable[[argparse.Namespace], Callable[[str], Round]]] = {
    "bare": lambda given: plain(given, B, "bare"),
    "prompts": lambda given: plain(given, 1, "prompts"),
    "job": lambda given: job(given, "job", "inline"),
    "ray": lambda given: job(given, "job-ray", "ray"),
    "glibc": lambda given: job(given, "job-glibc", "inline"),
    "data": data,
}


if __name__ == "__main__":
    main()
