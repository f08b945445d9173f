"""What was set in a process before decides no pixel: flags are set one by one, and are in the profile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import Model, row

from renderfarm.config import ModelSpec, Workers
from renderfarm.errors import Fatal, OutOfMemory
from renderfarm.models.catalog import describe
from renderfarm.models.torch_setup import ATTENTION, FLAGS, describe_profile, prepare_torch, translated


def elsewhere(name: str) -> None:
    """Set one of them as a user's own program may have done."""
    if name == "precision":
        torch.set_float32_matmul_precision("medium")
    elif name == "bf16":
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"  # type: ignore[attr-defined]
    elif name == "accumulation":
        torch.backends.cuda.matmul.allow_fp16_accumulation = True
    elif name == "mkldnn":
        torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
    else:
        getattr(torch.backends.cuda, f"enable_{name}_sdp")(False)


@pytest.fixture(autouse=True)
def set_right_afterwards() -> Iterator[None]:
    yield
    prepare_torch(Workers())


@pytest.mark.parametrize("name", ["precision", "bf16", "mkldnn", "accumulation", *ATTENTION])
def test_what_another_program_set_moves_no_pixel_and_no_profile(name: str, model: Callable[..., Model]) -> None:
    one = model("sd")
    wanted = [row(k, sampler="euler", height=96, width=96) for k in range(3)]
    usual, profile = one.render(wanted), one.adapter.profile()
    elsewhere(name)
    again = Model("sd", one.folder)
    try:
        for before, after in zip(usual, again.render(wanted), strict=True):
            np.testing.assert_array_equal(before, after)
        assert again.adapter.profile() == profile
    finally:
        again.close()


def test_a_flag_that_changes_after_that_is_another_profile(model: Callable[..., Model]) -> None:
    one = model("sd")
    profile = one.adapter.profile()
    named = {f"{place}.{flag}" for place, flag, _ in FLAGS} | {f"sdp.{kernels}" for kernels in ATTENTION}
    assert set(profile["flags"]) == named | {"preferred_blas", "preferred_linalg"}
    for name in ("bf16", "mkldnn", "accumulation", *ATTENTION):
        elsewhere(name)
        assert one.adapter.profile()["flags"] != profile["flags"], name
        prepare_torch(Workers())
    assert one.adapter.profile() == profile


@pytest.mark.parametrize(
    "name",
    [
        *("CUBLAS_EMULATE_SINGLE_PRECISION", "CUBLAS_WORKSPACE_CONFIG", "CUBLASLT_WORKSPACE_SIZE", "TORCH_CUBLASLT_UNIFIED_WORKSPACE"),
        *("TORCH_BLAS_PREFER_CUBLASLT", "TORCH_LINALG_PREFER_CUSOLVER", "DISABLE_ADDMM_CUDA_LT", "PYTORCH_TUNABLEOP_FILENAME"),
        *("TORCH_CUDNN_USE_HEURISTIC_MODE_B", "TORCH_MKLDNN_MATMUL_MIN_DIM", "TORCH_LINEAR_FLATTEN_3D", "NVIDIA_TF32_OVERRIDE"),
        "DIFFUSERS_GGUF_CUDA_KERNELS",
    ],
)
def test_a_variable_that_chooses_kernels_is_in_the_profile(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1")
    monkeypatch.setenv("MKL_NUM_THREADS", "1")
    said = describe_profile(describe(ModelSpec(id="builtin:fake")), Workers(), "cpu")["environment"]
    assert said[name] == "1"
    assert "MKL_NUM_THREADS" not in said


def on_cuda(monkeypatch: pytest.MonkeyPatch, enabled: list[bool], variable: bool = False) -> None:
    """As much of a GPU as these tests ask; TunableOp as torch documents it: its variable wins over what is set."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU")
    monkeypatch.setattr(torch.cuda.tunable, "enable", enabled.append)
    monkeypatch.setattr(torch.cuda.tunable, "is_enabled", lambda: variable or enabled[-1])


def test_kernels_are_not_chosen_by_timing_them(monkeypatch: pytest.MonkeyPatch) -> None:
    on_cuda(monkeypatch, enabled := [True])
    assert prepare_torch(Workers(device="cuda")) == "cuda"
    assert enabled == [True, False]
    assert describe_profile(describe(ModelSpec(id="builtin:fake")), Workers(), "cuda")["flags"]["tunable"] is False
    on_cuda(monkeypatch, [True], variable=True)
    with pytest.raises(Fatal, match=r"PYTORCH_TUNABLEOP_ENABLED makes torch choose kernels by timing them.*; unset it"):
        prepare_torch(Workers(device="cuda"))


def test_on_cuda_the_profile_names_the_packages_that_its_libraries_come_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("nvidia_cublas", "nvidia_ml_py"):
        (folder := tmp_path / f"{name}-13.1.dist-info").mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 13.1\n")
    monkeypatch.syspath_prepend(tmp_path)
    on_cuda(monkeypatch, [False])
    packages = describe_profile(describe(ModelSpec(id="builtin:fake")), Workers(), "cuda")["cuda_packages"]
    assert packages["nvidia-cublas"] == "13.1"
    assert "nvidia-ml-py" not in packages


def test_the_cpus_threads_are_in_the_profile_of_a_gpu_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum of as many numbers as noise has comes out otherwise on two, and blended noise is computed there."""
    on_cuda(monkeypatch, [False])
    info = describe(ModelSpec(id="builtin:fake"))
    of = [describe_profile(info, Workers(device="cuda", threads=n, batch_size=2), "cuda")["threads"] for n in (1, 2)]
    assert of == [1, 2]


def test_the_codecs_that_rows_images_go_through_are_in_the_profile_of_jobs_with_images() -> None:
    info = describe(ModelSpec(id="builtin:fake"))
    codecs = describe_profile(replace(info, task="image-to-image"), Workers(), "cpu")["image_codecs"]
    assert set(codecs) == {"jpg", "libjpeg_turbo", "webp", "zlib"}
    assert all(codecs[name] for name in ("jpg", "webp", "zlib"))
    assert "image_codecs" not in describe_profile(info, Workers(), "cpu")


def test_torchvision_is_in_the_profile_where_it_decides_what_a_safety_checker_sees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = replace(describe(ModelSpec(id="builtin:fake")), safety_checker=True)
    (folder := tmp_path / "torchvision-0.28.0.dist-info").mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.28.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert describe_profile(info, Workers(), "cpu")["torchvision"] == "0.28.0"
    assert "torchvision" not in describe_profile(replace(info, safety_checker=False), Workers(), "cpu")


@pytest.mark.parametrize(
    "fail",
    [
        lambda: torch.empty(1 << 50),  # as torch's allocator on a CPU has it, a bare RuntimeError
        lambda: np.empty(1 << 60, np.uint8),
        *(
            lambda words=words: _raise(words)
            for words in (
                "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call",
                "MPS backend out of memory (MPS allocated: 1.00 GB, other allocations: 1.00 GB, max allowed: 2.00 GB)",
                "Invalid buffer size: 28.00 GiB",
                "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
                "Expected canUse32BitIndexMath(input) && canUse32BitIndexMath(output) to be true, but got false.",
                "upsample_nearest2d_nhwc only supports output tensors with less than INT_MAX elements",
            )
        ),
    ],
)
def test_too_much_is_out_of_memory_however_torch_says_it(fail: Callable[[], object]) -> None:
    with pytest.raises(OutOfMemory, match=r"too little memory for this size at the job's batch size; lower workers\.batch_size"):
        translated(fail)()


def _raise(words: str) -> None:
    raise RuntimeError(words)


@pytest.mark.parametrize(
    ("fail", "message"),
    [
        (lambda: torch.zeros(2, 3) @ torch.zeros(2, 3), "mat1 and mat2 shapes cannot be multiplied"),
        (lambda: _raise("CUDA error: an illegal memory access was encountered"), "an illegal memory access"),
        (lambda: _raise("Input type (float) and bias type (c10::Half) should be the same"), "should be the same"),
    ],
)
def test_other_errors_of_torch_stay_what_they_are(fail: Callable[[], object], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        translated(fail)()
