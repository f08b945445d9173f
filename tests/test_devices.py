"""Shares of devices, several devices, other devices than a CPU: what can be shown of them on a machine without any."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import pytest
import test_tasks
import torch
from covering import covering
from oracle import CLASSES, LEGAL, Model, row
from test_adapters import make_adapter

import renderfarm
from renderfarm.config import ModelSpec, Workers
from renderfarm.engines.ray import RayEngine
from renderfarm.errors import Fatal, InvalidJob
from renderfarm.jobfile import load_job
from renderfarm.models.catalog import IMAGES_OF, describe, for_task
from renderfarm.models.torch_setup import describe_profile, prepare_torch
from renderfarm.preparation import prepare
from renderfarm.records import InputImage, Sample
from renderfarm.verification import Choice, verify
from renderfarm.worker import WorkerSpec

Write = Callable[..., Path]


@pytest.mark.slow
def test_workers_land_on_devices_as_their_shares_say(write_manifest: Write, write_job: Write, tmp_path: Path) -> None:
    """On a Ray that was told of two GPUs: it hands them out without looking, and the fake model uses none."""
    script = Path(__file__).parent / "two_gpus.py"
    command = [sys.executable, str(script), str(write_job(write_manifest())), str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout.splitlines()[-1])
    assert found["quarter and half"] == [["0"] * 4 + ["1"] * 4, ["0", "0", "1", "1"]]
    assert found["one"] == ["0", "1"]
    assert found["two"] == ["0,1"]
    assert found["three"].startswith("Fatal: a worker needs 3 GPU, 1 CPU on one node, but no node of this Ray has them")
    assert "(the largest: 2 GPU, 9 CPU); lower workers.devices_per_worker" in found["three"]
    assert found["a whole job"] == "SUCCEEDED"
    assert found["without CUDA"].startswith("Fatal: workers.device is cuda, but torch finds no GPU here")


def test_a_worker_that_no_node_has_room_for_is_refused(local_ray: None, write_manifest: Write, write_job: Write) -> None:
    prepared = prepare(load_job(write_job(write_manifest(), workers={"device": "cuda"})))
    with pytest.raises(Fatal, match="no node of this Ray has a GPU"):
        RayEngine(WorkerSpec("", prepared.job, prepared.model, prepared.usual))


@pytest.mark.parametrize(
    ("workers", "message"),
    [
        ({"devices_per_worker": 1.5}, "1.5; above 1 give a whole number"),
        ({"devices_per_worker": 0}, "greater than 0"),
        ({"devices_per_worker": 0.5, "device": "cpu"}, "cpu has nothing to share or add"),
        ({"devices_per_worker": 2, "device": "mps"}, "mps has nothing to share or add"),
        ({"devices_per_worker": 0.5, "batch_size": "auto"}, "with a share of it give a number"),
        ({"offload": "model", "device": "cpu"}, "saves an accelerator's memory, and device cpu has none"),
        ({"offload": "model", "devices_per_worker": 2}, "offload model is for one device"),
        ({"offload": "disk"}, "'none', 'model' or 'sequential', not 'disk'"),
    ],
)
def test_settings_of_devices_that_cannot_work_are_refused(
    workers: dict[str, Any], message: str, write_manifest: Write, write_job: Write
) -> None:
    with pytest.raises(InvalidJob, match=message):
        load_job(write_job(write_manifest(), workers=workers))


def test_several_devices_that_are_not_there_stop_the_job_with_the_reason(write_manifest: Write, write_job: Write) -> None:
    job = write_job(write_manifest(), model="builtin:shapes", workers={"devices_per_worker": 2})
    with pytest.raises(Fatal, match="devices_per_worker is 2, but torch finds 0 of them here"):
        renderfarm.run(job, engine="inline")


@pytest.mark.parametrize(
    ("device", "reason"), [("cuda", "finds no GPU here .*without CUDA"), ("mps", "finds no GPU of Apple's here .*without MPS")]
)
def test_a_device_that_is_not_there_stops_the_job_with_the_reason(
    device: str, reason: str, write_manifest: Write, write_job: Write
) -> None:
    with pytest.raises(Fatal, match=rf"workers.device is {device}, but torch {reason}.*; use device: auto or cpu"):
        renderfarm.run(write_job(write_manifest(), model="builtin:shapes", workers={"device": device}), engine="inline")


@pytest.mark.parametrize(
    ("cuda", "mps", "device"), [(True, True, "cuda"), (True, False, "cuda"), (False, True, "mps"), (False, False, "cpu")]
)
def test_auto_takes_cuda_before_mps_before_the_cpu(cuda: bool, mps: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(torch.cuda.tunable, "enable", lambda value: None)  # a CPU build has none
    monkeypatch.setattr(torch.cuda.tunable, "is_enabled", lambda: False)
    assert prepare_torch(Workers()) == device


def test_the_profile_of_an_apple_gpu_names_chip_system_and_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only that it can be made: what a real one says is not known here."""
    monkeypatch.setattr(torch.backends.mps, "get_name", lambda: "Apple M4")
    monkeypatch.setattr(platform, "mac_ver", lambda: ("26.1", ("", "", ""), "arm64"))
    monkeypatch.setenv("PYTORCH_MPS_FAST_MATH", "1")
    profile = describe_profile(describe(ModelSpec(id="builtin:fake")), Workers(), "mps")
    assert (profile["device"], profile["device_model"]) == ("mps", "Apple M4, macOS 26.1")
    assert profile["cudnn"] is None
    assert profile["environment"]["PYTORCH_MPS_FAST_MATH"] == "1"


def test_the_cpu_that_draws_noise_and_makes_schedules_is_in_the_profile_of_every_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPY_DISABLE_CPU_FEATURES", "AVX512_SPR")
    monkeypatch.setattr(torch.backends.mps, "get_name", lambda: "Apple M4")
    monkeypatch.setattr("renderfarm.models.torch_setup._cpuinfo", lambda: {"flags": "sse2 sse4_2 avx2 fma"})
    model = describe(ModelSpec(id="builtin:fake"))
    for device in ("cpu", "mps"):
        profile = describe_profile(model, Workers(), device)
        assert profile["cpu_instructions"] == ["avx2", "fma", "sse4_2"]
        assert profile["cpu_capability"] == torch.backends.cpu.get_cpu_capability()
        assert profile["environment"]["NPY_DISABLE_CPU_FEATURES"] == "AVX512_SPR"


def test_other_numbers_of_whole_devices_are_other_settings_and_shares_are_not(write_manifest: Write, write_job: Write) -> None:
    manifest = write_manifest()
    frozen = [prepare(load_job(write_job(manifest, workers={"devices_per_worker": n}))).frozen()["workers"] for n in (0.5, 1, 2)]
    assert [workers["devices_per_worker"] for workers in frozen] == [None, None, 2]


@pytest.mark.parametrize("offload", ["model", "sequential"])
def test_offloading_without_an_accelerator_stops_the_job_with_the_reason(offload: str, write_manifest: Write, write_job: Write) -> None:
    job = write_job(write_manifest(), model="builtin:shapes", workers={"offload": offload})
    with pytest.raises(Fatal, match=f"offload {offload} saves an accelerator's memory, and torch finds none here"):
        renderfarm.run(job, engine="inline")


def test_where_components_wait_is_no_part_of_job_or_profile(write_manifest: Write, write_job: Write, fresh: Callable[..., Model]) -> None:
    manifest = write_manifest()
    frozen = [prepare(load_job(write_job(manifest, workers={"offload": where}))).frozen() for where in ("none", "model")]
    assert frozen[0] == frozen[1]
    one = fresh("sd")
    before = one.adapter.profile()
    offload(one, "model")
    assert one.adapter.profile() == before


def test_verify_offloads_as_told_but_not_on_a_cpu(write_manifest: Write, write_job: Write, tmp_path: Path) -> None:
    renderfarm.run(write_job(write_manifest({"prompt": ["a"]}), model="builtin:shapes", output={"part_rows": 1}), engine="inline")
    with pytest.raises(InvalidJob, match="offload model saves an accelerator's memory, and device cpu has none"):
        verify(str(tmp_path / "out"), Choice(), offload="model")


def some_rows(name: str) -> list[Sample]:
    """More than slots, so that texts are encoded and pictures decoded between denoiser calls."""
    words = ("a red circle", "two blue squares", "a sky", "grass", "a green star")
    return [
        row(k, prompt=prompt, num_inference_steps=2 + k % 3, sampler=LEGAL[name][0], negative_prompt="grey" if k % 2 else None)
        for k, prompt in enumerate(words)
    ]


@pytest.fixture
def fresh(tiny_model: Callable[[str], Path]) -> Iterator[Callable[..., Model]]:
    """Models that a test may hang hooks on."""
    made: list[Model] = []

    def make(name: str, dtype: str = "float32") -> Model:
        made.append(Model(name, tiny_model(name), dtype))
        return made[-1]

    yield make
    for one in made:
        one.close()


def modules(one: Model) -> dict[str, torch.nn.Module]:
    return {name: part for name, part in one.adapter.pipe.components.items() if isinstance(part, torch.nn.Module)}


def same_pixels(before: list[np.ndarray], after: list[np.ndarray]) -> None:
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux-dev", "qwen-image"])
def test_the_hooks_that_a_device_map_puts_on_components_move_no_pixel(name: str, fresh: Callable[..., Model]) -> None:
    """With the CPU as the device of each: whether our own calls of components get along with them is all that shows here."""
    one, rows = fresh(name), some_rows(name)
    plain = one.render(rows)
    for part in modules(one).values():
        accelerate.dispatch_model(part, {"": "cpu"}, force_hooks=True)
    called = {part for part, module in modules(one).items() if hasattr(module, "_hf_hook")}
    assert {"vae", "text_encoder"} < called
    same_pixels(plain, one.render(rows))


@pytest.fixture(autouse=True)
def cpu_without_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers numbers the device; to `cpu:0` torch copies what is on `cpu`, and accelerate's parameters lose their class."""
    numbered = accelerate.cpu_offload
    monkeypatch.setattr(accelerate, "cpu_offload", lambda model, device, **more: numbered(model, torch.device(device.type), **more))


def offload(one: Model, how: str) -> None:
    """As on an accelerator, but the device that components come to when they are called is the CPU as well."""
    one.adapter.workers = Workers(batch_size=one.batch_size, offload=how)  # type: ignore[arg-type]
    one.adapter._place(one.adapter.pipe)


@pytest.mark.parametrize(("name", "how"), covering([(name, how) for name in LEGAL for how in ("model", "sequential")]))
def test_the_hooks_that_bring_components_to_the_device_move_no_pixel(name: str, how: str, fresh: Callable[..., Model]) -> None:
    one, rows = fresh(name), some_rows(name)
    plain = one.render(rows)
    offload(one, how)
    if how == "sequential":
        away = {part for part, module in modules(one).items() if all(weights.is_meta for weights in module.parameters())}
        assert away == set(modules(one))
    same_pixels(plain, one.render(rows))
    if how == "sequential":
        assert all(weights.is_meta for weights in one.denoiser.parameters())


@pytest.mark.parametrize(("name", "task", "how"), covering([(*key, how) for key in test_tasks.CLASSES for how in ("model", "sequential")]))
def test_the_hooks_move_no_pixel_of_rows_with_images(name: str, task: Any, how: str, fresh: Callable[..., Model]) -> None:
    one = fresh(name)
    one.info = for_task(one.info, IMAGES_OF[task])
    pictures = {"image": test_tasks.picture(), "mask_image": test_tasks.mask()}
    given = {kind: InputImage(None, test_tasks.encoded(pictures[kind])) for kind in IMAGES_OF[task]}
    rows = [replace(wanted, strength=0.8, num_inference_steps=4, **given) for wanted in some_rows(name)[:2]]
    plain = one.render(rows)
    offload(one, how)
    same_pixels(plain, one.render(rows))


@pytest.mark.parametrize("how", ["model", "sequential"])
@pytest.mark.parametrize("name", ["sd", "flux-dev", "qwen-image"])
def test_adapters_come_to_the_device_with_their_layers(
    name: str, how: str, fresh: Callable[..., Model], tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    one = fresh(name)
    file = make_adapter(CLASSES[name], tiny_model(name), tmp_path / "one.safetensors", 0)
    one.info = replace(one.info, adapters={"one": str(file)})
    rows = [replace(wanted, adapters=on) for wanted in some_rows(name)[:2] for on in ("one:1.0", None)]
    plain = one.render(rows)
    assert (plain[0] != plain[1]).any()
    offload(one, how)
    same_pixels(plain, one.render(rows))


@pytest.mark.parametrize("name", ["sd", "lcm", "sdxl", "sd3", "flux-dev"])
def test_with_offload_model_one_stage_at_a_time_is_on_the_device(
    name: str, fresh: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    """accelerate's hooks, with a list in place of the device: who comes, who is sent away, and who is called meanwhile."""
    one, seen = fresh(name), set()
    offload(one, "model")
    names = {id(module): part for part, module in modules(one).items()}
    here: set[str] = set()

    def arrive(hook: Any, module: Any, *args: Any, **kwargs: Any) -> Any:
        if hook.prev_module_hook is not None:
            here.discard(names[id(hook.prev_module_hook.model)])
        here.add(names[id(module)])
        seen.add(frozenset("text_encoder" if part.startswith("text_encoder") else part for part in here))
        return args, kwargs

    monkeypatch.setattr(accelerate.hooks.CpuOffload, "pre_forward", arrive)
    monkeypatch.setattr(accelerate.hooks.UserCpuOffloadHook, "offload", lambda hook: here.discard(names[id(hook.model)]))
    one.render([*some_rows(name), *(replace(r, prompt=f"again {r.prompt}") for r in some_rows(name))])
    assert seen == {frozenset({part}) for part in ("text_encoder", "unet" if "unet" in names.values() else "transformer", "vae")}
