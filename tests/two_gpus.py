"""A process of its own with a Ray that believes in two GPUs: where do workers land? Prints JSON; `test_devices.py` reads it.

python two_gpus.py JOB OUT          JOB renders with builtin:fake, which needs no accelerator
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ray

import renderfarm
from renderfarm.engines.base import Failed, Ready
from renderfarm.engines.ray import RayEngine
from renderfarm.errors import RenderfarmError
from renderfarm.jobfile import load_job
from renderfarm.preparation import prepare
from renderfarm.worker import WorkerSpec


def spec(job: Path, **workers: Any) -> WorkerSpec:
    prepared = prepare(load_job(job, sets=[f"workers.{name}={value}" for name, value in workers.items()]))
    return WorkerSpec("", prepared.job, prepared.model, prepared.usual)


def devices_of(job: Path, devices: float, workers: int, expected: int) -> list[str]:
    """CUDA_VISIBLE_DEVICES of the workers that get ready, of so many that are asked for."""
    engine = RayEngine(spec(job, devices_per_worker=devices, device="cuda"))
    try:
        for k in range(workers):
            engine.start_worker(f"w{k}")
        ready: list[str] = []
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            # once all those are there that are expected, nobody else must come
            events = engine.next_events(1.0 if len(ready) < expected else 2.0)
            assert not any(isinstance(event, Failed) for event in events), events
            ready += [event.worker for event in events if isinstance(event, Ready)]
            if not events and len(ready) >= expected:
                break
        ask = [engine._actors[name].__ray_call__.remote(lambda _: os.environ["CUDA_VISIBLE_DEVICES"]) for name in ready]
        return sorted(ray.get(ask, timeout=30))
    finally:
        engine.shutdown()


def refusal(action: Any) -> str:
    try:
        action()
    except RenderfarmError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was refused"


def main(job: Path, out: Path) -> dict[str, Any]:
    half = ["workers.device=cuda", "workers.devices_per_worker=0.5", "workers.max=4", f"output.path={out}/half"]
    real = ["model=builtin:shapes", "workers.device=cuda", f"output.path={out}/real"]
    return {
        "quarter and half": [devices_of(job, 0.25, 9, 8), devices_of(job, 0.5, 5, 4)],
        "one": devices_of(job, 1, 3, 2),
        "two": devices_of(job, 2, 2, 1),
        "three": refusal(lambda: RayEngine(spec(job, devices_per_worker=3, device="cuda"))),
        "a whole job": renderfarm.run(load_job(job, sets=half)).state,
        "without CUDA": refusal(lambda: renderfarm.run(load_job(job, sets=real))),
    }


if __name__ == "__main__":
    folder = tempfile.mkdtemp(prefix="rft-")
    ray.init(
        address="local",
        _temp_dir=folder,
        num_cpus=9,
        num_gpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=128 << 20,
    )
    try:
        print(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]))))
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
