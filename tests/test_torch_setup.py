"""What was set in a process before decides no pixel: flags are set one by one, and are in the profile."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from oracle import Model, row

from renderfarm.config import Workers
from renderfarm.errors import OutOfMemory
from renderfarm.models.torch_setup import ATTENTION, FLAGS, prepare_torch, translated


def elsewhere(name: str) -> None:
    """Set one of them as a user's own program may have done."""
    if name == "precision":
        torch.set_float32_matmul_precision("medium")
    elif name == "bf16":
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"  # type: ignore[attr-defined]
    elif name == "mkldnn":
        torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
    else:
        getattr(torch.backends.cuda, f"enable_{name}_sdp")(False)


@pytest.fixture(autouse=True)
def set_right_afterwards() -> Iterator[None]:
    yield
    prepare_torch(Workers())


@pytest.mark.parametrize("name", ["precision", "bf16", "mkldnn", *ATTENTION])
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
    assert set(profile["flags"]) == {f"{place}.{flag}" for place, flag, _ in FLAGS} | {f"sdp.{kernels}" for kernels in ATTENTION}
    for name in ("bf16", "mkldnn", *ATTENTION):
        elsewhere(name)
        assert one.adapter.profile()["flags"] != profile["flags"], name
        prepare_torch(Workers())
    assert one.adapter.profile() == profile


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
