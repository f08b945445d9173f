"""The job files for published models: each is parsed and planned against a model of its class and sizes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from renderfarm.config import expand_env
from renderfarm.estimate import estimate
from renderfarm.jobfile import load_job
from renderfarm.preparation import prepare
from renderfarm.validation import validate_rows

JOBS = Path(__file__).parents[1] / "jobs" / "models"
VAE = {"vae": {"block_out_channels": [128, 256, 512, 512]}}
SDXL: tuple[str, dict[str, dict[str, Any]]] = ("sdxl", {"unet": {"sample_size": 128}, **VAE})
# of each published model, its class's tiny one and the parts of its configuration that decide sizes
PUBLISHED: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    "sdxl": SDXL,
    **dict.fromkeys([f"sdxl-{what}" for what in ("image-to-image", "controlnet", "refiner", "lcm-lora")], SDXL),
    "sdxl-turbo": ("sdxl", {"unet": {"sample_size": 64}, **VAE}),
    "lcm": ("lcm", {"unet": {"sample_size": 96}, **VAE}),
    "sd3": ("sd3", {"transformer": {"sample_size": 128, "pos_embed_max_size": 192}, **VAE}),
    "flux1-dev": ("flux-dev", VAE),
    "flux2-klein": ("flux2-klein-distilled", VAE),
    "qwen-image": ("qwen-image", {"vae": {"temperal_downsample": [False, True, True]}}),
    "z-image-turbo": ("z-image", VAE),
}
# and of a second model beside it
BESIDE = {"controlnet": "sdxl-controlnet", "refiner": "sdxl-refiner"}


@pytest.mark.parametrize("path", sorted(JOBS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_job_for_a_published_model_is_planned(
    path: Path, tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, changes = PUBLISHED[path.stem]
    monkeypatch.setenv("MODELS", str(tmp_path))
    job = load_job(path, out=str(tmp_path / "out"))
    folder = shutil.copytree(tiny_model(name), tmp_path / job.model.id.rpartition("/")[2])
    for part, values in changes.items():
        config = folder / part / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | values))
    for part, other in BESIDE.items():
        if (given := getattr(job.model, part)) is not None:
            shutil.copytree(tiny_model(other), tmp_path / given.id.rpartition("/")[2])
    for adapter in job.model.adapters.values():
        file = Path(expand_env(adapter.weights))
        file.parent.mkdir()
        save_file({"lora": np.zeros(1, np.float32)}, file)
    prepared = prepare(job)
    plan = estimate(prepared)
    assert plan["rows"] == plan["images left"] == (8 if prepared.model.images else 96)
    wanted = prepared.usual.sample
    assert (wanted.height, wanted.width) == (job.render.height, job.render.width)
    if path.stem not in ("lcm", "sdxl-turbo"):  # whose own default is less than their classes'
        assert prepared.model.height in (1024, wanted.height)
    validated = validate_rows(prepared)
    assert validated.ok, validated.problems


def test_the_jobs_show_each_task_and_each_part_beside_a_model(tmp_path: Path) -> None:
    jobs = [load_job(path, out=str(tmp_path)) for path in JOBS.glob("*.yaml")]
    assert {name for job in jobs for name, value in job.model if value and name in ("controlnet", "refiner", "adapters")} == {
        *("controlnet", "refiner", "adapters")
    }
    columns = [job.manifest.columns for job in jobs if isinstance(job.manifest.columns, dict)]
    assert {name for names in columns for name in names} == {"image", "control_image"}


def test_every_job_has_its_model() -> None:
    assert {path.stem for path in JOBS.glob("*.yaml")} == set(PUBLISHED)
