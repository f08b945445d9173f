"""Which upscaling network a file of weights holds, read from its tensors' names and shapes, without torch.

`rrdb` is that of ESRGAN and Real-ESRGAN (x4plus, x2plus, anime 6B), `compact` that of Real-ESRGAN's small models
(general-x4v3, animevideov3). Shapes: F features, G features that a dense layer adds.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

import safetensors

Shapes = dict[str, tuple[int, ...]]

MAX_SCALE = 8
MAX_PIXELS = 89_478_485  # of a picture; beyond that, Pillow and those who read with it take it for a bomb
FLOATS = ("F16", "BF16", "F32", "F64")
# ESRGAN's first release named the same layers (of a fourfold network) by their place
_FIRST_NAMES = {"0": "conv_first", "3": "conv_up1", "6": "conv_up2", "8": "conv_hr", "10": "conv_last"}


@dataclass(frozen=True)
class Network:
    """`blocks`: of rrdb; the layers between the first and the last of compact. `gathered`: an rrdb sees so many pixels
    each way as one place with more channels."""

    kind: Literal["rrdb", "compact"]
    scale: int
    features: int
    blocks: int
    growth: int = 0
    gathered: int = 1

    def shapes(self) -> Shapes:
        """Every tensor that the network needs."""
        return self._rrdb_shapes() if self.kind == "rrdb" else self._compact_shapes()

    def _rrdb_shapes(self) -> Shapes:
        f, g = self.features, self.growth
        found = _conv("conv_first", 3 * self.gathered**2, f)
        for block in range(self.blocks):
            for dense in (1, 2, 3):
                for layer in (1, 2, 3, 4, 5):
                    found |= _conv(f"body.{block}.rdb{dense}.conv{layer}", f + (layer - 1) * g, g if layer < 5 else f)
        for name in ("conv_body", "conv_up1", "conv_up2", "conv_hr"):
            found |= _conv(name, f, f)
        return found | _conv("conv_last", f, 3)

    def _compact_shapes(self) -> Shapes:
        f, last = self.features, 2 * self.blocks + 2
        found = _conv("body.0", 3, f) | _conv(f"body.{last}", f, 3 * self.scale**2)
        for place in range(2, last, 2):
            found |= _conv(f"body.{place}", f, f)
        return found | {f"body.{place}.weight": (f,) for place in range(1, last, 2)}


def _conv(name: str, inputs: int, outputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs, 3, 3), f"{name}.bias": (outputs,)}


def identify(data: bytes) -> Network:
    """The network of a safetensors file. Raises ValueError with the reason where it is none of these, or not whole."""
    try:
        tensors = safetensors.deserialize(data)  # type: ignore[no-untyped-call]
    except Exception as error:  # of safetensors' own, and others for what it did not expect
        raise ValueError(f"is damaged, or no safetensors file ({error}); fetch it again") from None
    shapes: Shapes = {canonical(name): tuple(tensor["shape"]) for name, tensor in tensors}
    if any(tensor["dtype"] not in FLOATS for _, tensor in tensors):
        raise ValueError("holds numbers that are no floats; give weights that are not quantized")
    try:
        network = _rrdb(shapes) if "conv_first.weight" in shapes else _compact(shapes)
    except (KeyError, ValueError, TypeError):  # a layer by which it is told is missing, or has no such shape
        raise ValueError("is no network of Real-ESRGAN's kinds (RRDBNet, SRVGGNetCompact)") from None
    if not 1 <= network.scale <= MAX_SCALE or len(shapes) != len(tensors):
        raise ValueError("is no network of Real-ESRGAN's kinds (RRDBNet, SRVGGNetCompact)")
    wanted = network.shapes()
    if wrong := sorted(name for name in {*wanted, *shapes} if wanted.get(name) != shapes.get(name)):
        raise ValueError(
            f"looks like {network.kind} ×{network.scale}, but {len(wrong)} of its tensors are missing, of another shape or not part "
            f"of it, such as {wrong[0]}"
        )
    return network


def canonical(name: str) -> str:
    """A tensor's name as Real-ESRGAN's code has it."""
    name = re.sub(r"^params(_ema)?\.", "", name)
    if inner := re.fullmatch(r"model\.1\.sub\.(\d+)\.RDB([123])\.conv([1-5])\.0\.(weight|bias)", name):
        return "body.{}.rdb{}.conv{}.{}".format(*inner.groups())
    if after := re.fullmatch(r"model\.1\.sub\.\d+\.(weight|bias)", name):
        return f"conv_body.{after[1]}"
    if outer := re.fullmatch(r"model\.(0|3|6|8|10)\.(weight|bias)", name):
        return f"{_FIRST_NAMES[outer[1]]}.{outer[2]}"
    return name


def _rrdb(shapes: Shapes) -> Network:
    features, inputs, _, _ = shapes["conv_first.weight"]
    gathered = {3: 1, 12: 2, 48: 4}[inputs]
    blocks = 1 + max(int(match[1]) for name in shapes if (match := re.match(r"body\.(\d{1,3})\.", name)))
    return Network("rrdb", 4 // gathered, features, blocks, shapes["body.0.rdb1.conv1.weight"][0], gathered)


def _compact(shapes: Shapes) -> Network:
    features, _, _, _ = shapes["body.0.weight"]
    last = max(int(match[1]) for name in shapes if (match := re.match(r"body\.(\d{1,3})\.", name)))
    return Network("compact", math.isqrt(shapes[f"body.{last}.weight"][0] // 3), features, last // 2 - 1)
