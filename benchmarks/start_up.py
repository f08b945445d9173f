"""From the command to the first batch, on a warm disk, and where the time goes.

    python benchmarks/start_up.py [--quick] [--rounds 9] [--json FILE]

Each round is a process of its own, so everything is imported and loaded anew; the first round warms the disk's cache and does not count.

plain diffusers   imports, `from_pretrained`, and one `pipe(…)` of B prompts, saved
run, inline       `renderfarm run JOB --engine inline` with B rows: to the first image, and to its end
run, Ray          the same with Ray and one worker

`first image` is when the first PNG is in the output. Below, what a worker does until it is ready, and what Ray takes, each timed by itself.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from loop import GUIDANCE, SIZE, STEPS, B, draw, load, write_job
from measuring import REPOSITORY, Report, Round, compared, options, spread, take_turns

STAGES = {
    "import renderfarm.cli": "import renderfarm.cli",
    "import renderfarm.api": "import renderfarm.api",
    "import pyarrow.parquet": "import pyarrow.parquet",
    "import torch": "import torch",
    "import torch, diffusers": "import torch, diffusers",
    "… and StableDiffusionPipeline": "from diffusers import StableDiffusionPipeline",
    "import ray": "import ray",
}


def main() -> None:
    given = options(
        str(__doc__).splitlines()[0],
        rounds=(int, (9, 5), "that count"),
        folder=(Path, None, "where to work"),
    )
    if given.child:
        CHILDREN[given.child](given)
        return
    report = Report(given)
    with tempfile.TemporaryDirectory(prefix="rf-start-", dir=given.folder) as name:
        folder = Path(name)
        pq.write_table(pa.table({"prompt": [f"a large red circle {row}" for row in range(B)], "seed": range(B)}), folder / "rows.parquet")
        variants = {
            "plain diffusers": lambda _: command(folder, [__file__, "--child", "plain", "--folder", name], "plain"),
            "run, inline": lambda _: run(folder, "inline"),
            "run, Ray": lambda _: run(folder, "ray"),
        }
        found = take_turns(variants, given.rounds)
        lines = [
            [*line, spread([one["whole"] for one in rounds])]
            for line, rounds in zip(compared(found, "plain diffusers", "first_image"), found.values(), strict=True)
        ]
        titles = ["", "first image, s", "plain / it", "not below (95 %)", "whole, s"]
        report.show(f"Start-up, {B} images of {SIZE}², {STEPS} steps, {given.rounds} rounds", titles, lines, rounds=found)
        show_stages(report, given, folder)
    report.end()


def show_stages(report: Report, given: argparse.Namespace, folder: Path) -> None:
    """Each import in a bare interpreter of its own (less an empty one's time), then a worker's own stages and Ray's."""
    stages = {title: lambda _, code=code: python(code) for title, code in {"an empty interpreter": "", **STAGES}.items()}  # type: ignore[misc]
    found = take_turns(stages, min(5, given.rounds))
    empty = statistics.median(one["seconds"] for one in found["an empty interpreter"])
    lines = [
        [title, f"{statistics.median(one['seconds'] for one in rounds) - empty * (title != 'an empty interpreter'):.2f}"]
        for title, rounds in found.items()
    ]
    inside = [parts(folder, child) for child in ("worker", "ray") for _ in range(min(5, given.rounds))]
    names = dict.fromkeys(name for one in inside for name in one)
    lines += [[name, f"{statistics.median(one[name] for one in inside if name in one):.2f}"] for name in names]
    report.show("Where it goes, each alone", ["", "s"], lines, rounds=found | {"inside": inside})


def environment() -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "GOMP_SPINCOUNT")}
    return clean | {"PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}


def python(code: str) -> Round:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], env=environment(), check=True)  # noqa: S603 - the imports above
    return {"seconds": time.perf_counter() - began}


def parts(folder: Path, child: str) -> Round:
    command_ = [sys.executable, __file__, "--child", child, "--folder", str(folder)]
    said = subprocess.run(command_, env=environment(), check=True, capture_output=True, text=True).stdout  # noqa: S603 - this script
    return dict(json.loads(said.strip().splitlines()[-1]))


def command(folder: Path, arguments: list[str], out: str) -> Round:
    """Seconds from its start to the first picture below `out`, and to its end."""
    target = folder / out
    subprocess.run(["rm", "-rf", str(target)], check=True)  # noqa: S603, S607
    began, first = time.perf_counter(), 0.0
    process = subprocess.Popen([sys.executable, *arguments], env=environment(), stdout=subprocess.DEVNULL)  # noqa: S603 - this package
    while process.poll() is None:
        if not first and any(target.glob("**/*.png")):
            first = time.perf_counter() - began
        time.sleep(0.01)
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)} ended with {process.returncode}")
    whole = time.perf_counter() - began
    return {"first_image": first or whole, "whole": whole}


def run(folder: Path, engine: str) -> Round:
    job = write_job(folder / f"{engine}.yaml", said(folder, engine))
    return command(folder, ["-m", "renderfarm", "run", str(job), "--engine", engine], engine)


def said(folder: Path, out: str) -> dict[str, object]:
    return {
        "version": 1,
        "name": "start",
        "manifest": str(folder / "rows.parquet"),
        "model": "builtin:shapes",
        "render": {"height": SIZE, "width": SIZE, "num_inference_steps": STEPS, "guidance_scale": GUIDANCE["parti"]},
        "workers": {"max": 1, "batch_size": B, "device": "cpu"},
        "output": {"path": str(folder / out), "part_rows": B},
    }


# ------------------------------------------------------------------------------------------------ children


def plain(given: argparse.Namespace) -> None:
    pipe, out = load(1), given.folder / "plain"
    out.mkdir()
    rows = pq.read_table(given.folder / "rows.parquet").to_pylist()
    for row, picture in enumerate(draw(pipe, "parti", rows)):
        picture.save(out / f"{row}.png")


class Laps:
    def __init__(self) -> None:
        self.at, self.seen = time.perf_counter(), dict[str, float]()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seen[name], self.at = now - self.at, now


def worker(given: argparse.Namespace) -> None:
    """What `Worker` does until it is ready, one after the other."""
    laps = Laps()
    from renderfarm.jobfile import load_job
    from renderfarm.preparation import prepare

    prepared = prepare(load_job(write_job(given.folder / "worker.yaml", said(given.folder, "worker"))))
    laps.lap("driver: read the job, prepare")
    from renderfarm.models.load import load_model, prepare_libraries
    from renderfarm.models.measure import check_places

    prepare_libraries()
    import renderfarm.models.stable_diffusion  # noqa: F401

    laps.lap("worker: imports")
    model = load_model(prepared.model, prepared.job.workers)
    laps.lap("worker: load the model")
    model.profile()
    laps.lap("worker: describe its profile")
    check_places(model, prepared.usual.sample)
    laps.lap("worker: try the batch's places")
    states = [model.start(prepared.usual.sample, model.encode_texts(list(model.texts(prepared.usual.sample)))) for _ in range(B)]
    model.step(states)
    laps.lap("worker: first step")
    print(json.dumps(laps.seen))


def ray_alone(given: argparse.Namespace) -> None:
    laps = Laps()
    import ray

    laps.lap("ray: import")
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR", object_store_memory=256 << 20
    )
    laps.lap("ray: init")

    @ray.remote
    class Nothing:
        def ready(self) -> None:
            pass

    ray.get(Nothing.remote().ready.remote())
    laps.lap("ray: an empty actor")
    print(json.dumps(laps.seen))


CHILDREN = {"plain": plain, "worker": worker, "ray": ray_alone}

if __name__ == "__main__":
    main()
