"""What was set in a process before decides no pixel: flags are set one by one, and are in the profile."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from oracle import Model, row

from renderfarm.config import Workers
from renderfarm.models.torch_setup import ATTENTION, FLAGS, prepare_torch


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
