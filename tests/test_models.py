"""What a model is, read without loading it; and how it is found."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from renderfarm.config import ModelSpec, Workers, load_job
from renderfarm.errors import InvalidJob
from renderfarm.models.catalog import describe
from renderfarm.models.load import load_model
from renderfarm.plan import Grid, leases
from renderfarm.preparation import prepare

SHAPES = describe(ModelSpec(id="builtin:shapes"))
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(str(SHAPES.folder), tmp_path / "my-model"))


def test_the_embedded_model_says_its_size_and_defaults() -> None:
    assert (SHAPES.height, SHAPES.width, SHAPES.factor, SHAPES.num_inference_steps) == (64, 64, 8, 20)
    assert SHAPES.adapter == "stable_diffusion:StableDiffusion"


def test_the_embedded_model_is_small_and_only_safetensors() -> None:
    files = [path for path in Path(str(SHAPES.folder)).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12_000_000
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".txt"}


def test_a_folder_is_a_model_and_tables_show_its_name_not_its_place(copy: Path) -> None:
    info = describe(ModelSpec(id=str(copy)))
    assert (info.name, info.sampler) == ("my-model", SHAPES.sampler)


def test_a_scheduler_that_the_model_comes_with_is_its_default_sampler(copy: Path) -> None:
    index = json.loads((copy / "model_index.json").read_text())
    for scheduler, sampler in (
        ("PNDMScheduler", "pndm"),
        ("DPMSolverMultistepScheduler", "dpm++2m"),
        ("SomethingElse", "ddim"),
    ):
        index["scheduler"] = ["diffusers", scheduler]
        (copy / "model_index.json").write_text(json.dumps(index))
        assert describe(ModelSpec(id=str(copy))).sampler == sampler


def test_another_pipeline_class_is_refused_by_name(copy: Path) -> None:
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps({**index, "_class_name": "FluxPipeline"}))
    with pytest.raises(InvalidJob, match="FluxPipeline is not supported yet; supported: StableDiffusionPipeline"):
        describe(ModelSpec(id=str(copy)))


def test_a_pinned_hub_model_is_found_in_the_cache(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    repository = tmp_path / "hub/models--org--name"
    (repository / "snapshots").mkdir(parents=True)
    shutil.move(copy, repository / "snapshots" / COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    info = describe(ModelSpec(id="org/name", revision=COMMIT))
    assert (info.name, info.revision) == ("org/name", COMMIT)
    assert str(info.folder).endswith(COMMIT)


@pytest.mark.parametrize("revision", [None, "main", "abc123"])
def test_a_hub_model_without_its_full_commit_is_refused(revision: str | None) -> None:
    with pytest.raises(InvalidJob, match="full commit"):
        describe(ModelSpec(id="org/name", revision=revision))


def test_the_profile_names_weights_versions_and_flags() -> None:
    profile = load_model(SHAPES, Workers(batch_size=2)).profile()
    assert profile["deterministic_algorithms"] is True
    assert len(profile["weights"]["vae/diffusion_pytorch_model.safetensors"]) == 64
    assert {"torch", "diffusers", "transformers", "threads", "cpu_capability", "dtype", "text_length"} <= set(profile)


def test_a_lease_carries_its_own_rows_only(write_manifest: Callable[..., Path], write_job: Callable[..., Path]) -> None:
    manifest = write_manifest({"prompt": ["x" * 1000] * 1000})
    prepared = prepare(load_job(write_job(manifest)))
    first = next(leases(prepared.manifest, Grid(1000, 4), lambda index: False))
    assert len(pickle.dumps(first)) < 20_000


def test_the_profile_is_the_same_in_processes_with_other_hash_seeds(copy: Path) -> None:
    """diffusers notes defaults of a short scheduler configuration in hash order; that must not reach the profile."""
    config = copy / "scheduler/scheduler_config.json"
    config.write_text(json.dumps({"_class_name": "DPMSolverMultistepScheduler", "beta_end": 0.012}))
    script = (
        "import json; from renderfarm.config import ModelSpec, Workers\n"
        "from renderfarm.models.catalog import describe; from renderfarm.models.load import load_model\n"
        f"print(json.dumps(load_model(describe(ModelSpec(id={str(copy)!r})), Workers()).profile(), sort_keys=True))\n"
    )
    profiles = {
        subprocess.run(
            [sys.executable, "-c", script], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout.splitlines()[-1]
        for seed in ("1", "2")
    }
    assert len(profiles) == 1
