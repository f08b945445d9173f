"""Upscaling networks: the pixels of the same networks written as torch modules, whole and in tiles; what is no such network."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save as to_bytes
from upscalers import Compact, RRDBNet, enlarged, random_network, save

from renderfarm.errors import InvalidInput, NonFiniteOutput
from renderfarm.models.networks import MAX_PIXELS, identify
from renderfarm.models.upscaler import CONTEXT, Upscaler, windows

KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "rrdb x4": (RRDBNet, {"scale": 4}),
    "rrdb x2": (RRDBNet, {"scale": 2, "features": 24, "blocks": 1}),
    "rrdb x1": (RRDBNet, {"scale": 1, "growth": 16}),
    "compact x4": (Compact, {"scale": 4}),
    "compact x2": (Compact, {"scale": 2, "blocks": 5}),
    "compact x1": (Compact, {"scale": 1, "blocks": 0}),
}


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def upscaler(data: bytes, tile: int | None = None, dtype: str = "float32") -> Upscaler:
    torch.set_num_threads(1)
    return Upscaler(data, identify(data), tile, "cpu", dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_becomes_what_the_network_itself_makes_of_it(kind: str, dtype: str, tmp_path: Path) -> None:
    class_, shape = KINDS[kind]
    network = random_network(class_, **shape)
    data = save(network, tmp_path / "w.safetensors").read_bytes()
    assert identify(data).scale == shape["scale"]
    made = upscaler(data, dtype=dtype)
    for height, width in ((24, 32), (21, 30)):
        seen = picture(height, width)
        wanted = enlarged(network, seen, getattr(torch, dtype))
        np.testing.assert_array_equal(made(seen), wanted)
        assert wanted.shape == (height * shape["scale"], width * shape["scale"], 3)
        assert len(np.unique(wanted)) > 50, "a picture that has something to differ in"


def first_release(name: str) -> str:
    """ESRGAN's own names of a fourfold network of two blocks."""
    if match := re.match(r"body\.(\d)\.rdb(\d)\.conv(\d)\.(\w+)", name):
        return "model.1.sub.{}.RDB{}.conv{}.0.{}".format(*match.groups())
    layer, _, what = name.partition(".")
    place = {"conv_first": "0", "conv_body": "1.sub.2", "conv_up1": "3", "conv_up2": "6", "conv_hr": "8", "conv_last": "10"}[layer]
    return f"model.{place}.{what}"


@pytest.mark.parametrize("rename", [first_release, "params_ema.{}".format, "params.{}".format])
def test_other_peoples_names_of_the_same_tensors_mean_the_same(rename: Any, tmp_path: Path) -> None:
    network = random_network(RRDBNet)
    plain = save(network, tmp_path / "a.safetensors").read_bytes()
    other = save(network, tmp_path / "b.safetensors", rename).read_bytes()
    assert identify(plain) == identify(other)
    np.testing.assert_array_equal(upscaler(plain)(picture(8, 8)), upscaler(other)(picture(8, 8)))


def test_tiles_with_context_give_the_same_picture_as_the_whole(tmp_path: Path) -> None:
    network = random_network(Compact, scale=2)  # sees 4 pixels each way, less than a tile's context
    data = save(network, tmp_path / "w.safetensors").read_bytes()
    seen = picture(150, 97)
    whole, tiled = upscaler(data)(seen).astype(int), upscaler(data, tile=64)(seen).astype(int)
    assert np.abs(whole - tiled).max() <= 1, "convolutions of another size may round otherwise, and no more"
    assert (whole != tiled).mean() < 1e-3
    np.testing.assert_array_equal(upscaler(data, tile=512)(seen), whole)


@given(st.integers(1, 3000), st.integers(8, 64).map(lambda k: k * 8))
def test_tiles_take_every_pixel_once_from_where_it_has_its_context(side: int, tile: int) -> None:
    taken, length = 0, min(side, tile)
    for start, first, stop in windows(side, tile):
        assert first == taken < stop
        assert start >= 0
        assert start + length <= side
        assert first - start >= CONTEXT or start == 0
        assert start + length - stop >= CONTEXT or start + length == side
        taken = stop
    assert taken == side


def test_nan_and_pictures_too_large_are_errors_of_the_picture(tmp_path: Path) -> None:
    network = random_network(Compact)
    with torch.no_grad():
        network.body[0].weight[:] = float("nan")
    with pytest.raises(NonFiniteOutput, match="NaN or infinite"):
        upscaler(save(network, tmp_path / "w.safetensors").read_bytes())(picture(8, 8))
    huge = np.broadcast_to(np.uint8(1), (4000, 4000, 3))
    assert huge.size / 3 * 16 > MAX_PIXELS == Image.MAX_IMAGE_PIXELS
    with pytest.raises(InvalidInput, match="would become 16000×16000; the limit is"):
        upscaler(save(random_network(Compact), tmp_path / "v.safetensors").read_bytes())(huge)


def without(name: str) -> dict[str, torch.Tensor]:
    return {key: value for key, value in random_network(RRDBNet).state_dict().items() if key != name}


CONV = torch.zeros(8, 3, 3, 3)
FOREIGN: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "a layer is missing": (without("body.1.rdb2.conv3.bias"), "looks like rrdb ×4, but 1 of its tensors are .* body.1.rdb2.conv3.bias"),
    "the first layer is missing": (without("conv_first.weight"), "no network of Real-ESRGAN's kinds"),
    "a block is missing": (without("body.0.rdb1.conv1.weight"), "no network of Real-ESRGAN's kinds"),
    "a layer too many": (without("") | {"more.weight": CONV}, "not part of it, such as more.weight"),
    "another shape": (without("") | {"conv_last.weight": CONV}, "of another shape .* conv_last.weight"),
    "numbers that are no floats": (without("") | {"conv_last.bias": torch.zeros(3, dtype=torch.int8)}, "no floats"),
    "one tensor under two names": (without("") | {"params.conv_last.bias": torch.zeros(3)}, "holds a tensor under two names"),
    "a LoRA": ({"unet.down.lora_A.weight": torch.zeros(2, 4)}, "no network of Real-ESRGAN's kinds"),
    "nothing": ({}, "no network of Real-ESRGAN's kinds"),
    "a first layer that is no convolution": ({"conv_first.weight": torch.zeros(3)}, "no network of"),
    "scale 0": ({"body.0.weight": CONV, "body.2.weight": torch.zeros(1, 8, 3, 3)}, "no network of"),
    "scale 9": ({"body.0.weight": CONV, "body.2.weight": torch.zeros(243, 8, 3, 3)}, "no network of"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_what_is_no_such_network_is_refused_with_the_reason(case: str) -> None:
    tensors, reason = FOREIGN[case]
    with pytest.raises(ValueError, match=reason):
        identify(to_bytes(tensors))


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:40], lambda data: b"{}", lambda data: b""])
def test_a_damaged_file_is_called_so(damage: Any, tmp_path: Path) -> None:
    data = save(random_network(Compact), tmp_path / "w.safetensors").read_bytes()
    with pytest.raises(ValueError, match="is damaged, or no safetensors file"):
        identify(damage(data))
