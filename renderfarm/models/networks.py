"""Which network a file of weights holds, read from its tensors' names and shapes, without torch.

Of those that upscale, `rrdb` is that of ESRGAN and Real-ESRGAN (x4plus, x2plus, anime 6B), `compact` that of Real-ESRGAN's small models
(general-x4v3, animevideov3). Of those for faces there is GFPGAN's, as its versions 1.3 and 1.4 have it. Shapes: F features,
G features that a dense layer adds.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

import safetensors

Shapes = dict[str, tuple[int, ...]]

MAX_SCALE = 8
MAX_LEVELS = 8  # of a network for faces: 1024 px
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


def _conv(name: str, inputs: int, outputs: int, side: int = 3) -> Shapes:
    return {f"{name}.weight": (outputs, inputs, side, side), f"{name}.bias": (outputs,)}


@dataclass(frozen=True)
class FaceNetwork:
    """GFPGAN's. `encoder`: features of its U-Net at `side` px, at half of that, and so on down to 4 px; `decoder`: those of
    StyleGAN2, from 4 px up to `side`; `style`: how many numbers style one of its layers."""

    encoder: tuple[int, ...]
    decoder: tuple[int, ...]
    style: int

    @property
    def levels(self) -> int:
        return len(self.encoder) - 1

    @property
    def side(self) -> int:
        """Of the square that it sees and paints, in pixels."""
        return 4 << self.levels

    def shapes(self) -> Shapes:
        """Every tensor that the network needs."""
        first, last = self.encoder[0], self.encoder[-1]
        found = _conv("conv_body_first", 3, first, 1) | _conv("final_conv", last, last)
        found |= _linear("final_linear", 16 * last, (2 * self.levels + 2) * self.style)
        widths = list(zip(self.encoder, self.encoder[1:], strict=False))
        for level, (inputs, outputs) in enumerate(widths):
            found |= _residual(f"conv_body_down.{level}", inputs, outputs)
        for level, (outputs, inputs) in enumerate(reversed(widths)):
            found |= _residual(f"conv_body_up.{level}", inputs, outputs)
            half = self.decoder[level + 1] // 2
            for name in ("condition_scale", "condition_shift"):
                found |= _conv(f"{name}.{level}.0", outputs, outputs) | _conv(f"{name}.{level}.2", outputs, half)
        return found | {f"stylegan_decoder.{name}": shape for name, shape in self._decoder_shapes().items()}

    def _decoder_shapes(self) -> Shapes:
        first = self.decoder[0]
        found: Shapes = {"constant_input.weight": (1, first, 4, 4), "noises.noise0": (1, 1, 4, 4)}
        found |= self._painting("style_conv1", "to_rgb1", first, first)
        for level, (inputs, outputs) in enumerate(zip(self.decoder, self.decoder[1:], strict=False)):
            side, one, two = 8 << level, 2 * level, 2 * level + 1
            found |= self._painting(f"style_convs.{one}", None, inputs, outputs)
            found |= self._painting(f"style_convs.{two}", f"to_rgbs.{level}", outputs, outputs)
            found |= {f"noises.noise{number}": (1, 1, side, side) for number in (one + 1, two + 1)}
        return found

    def _painting(self, conv: str, to_rgb: str | None, inputs: int, outputs: int) -> Shapes:
        """A styled layer, and the one that makes colours of it."""
        found = self._modulated(conv, inputs, outputs, 3) | {f"{conv}.weight": (1,), f"{conv}.bias": (1, outputs, 1, 1)}
        if to_rgb is not None:
            found |= self._modulated(to_rgb, outputs, 3, 1) | {f"{to_rgb}.bias": (1, 3, 1, 1)}
        return found

    def _modulated(self, name: str, inputs: int, outputs: int, side: int) -> Shapes:
        name = f"{name}.modulated_conv"
        return {f"{name}.weight": (1, outputs, inputs, side, side)} | _linear(f"{name}.modulation", self.style, inputs)


def _linear(name: str, inputs: int, outputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _residual(name: str, inputs: int, outputs: int) -> Shapes:
    skip = {f"{name}.skip.weight": (outputs, inputs, 1, 1)}
    return _conv(f"{name}.conv1", inputs, inputs) | _conv(f"{name}.conv2", inputs, outputs) | skip


def identify(data: bytes) -> Network:
    """The upscaling network of a safetensors file. Raises ValueError with the reason where it is none of these, or not whole."""
    shapes = _shapes(data)
    try:
        network = _rrdb(shapes) if "conv_first.weight" in shapes else _compact(shapes)
    except (KeyError, ValueError, TypeError):  # a layer by which it is told is missing, or has no such shape
        raise ValueError("is no network of Real-ESRGAN's kinds (RRDBNet, SRVGGNetCompact)") from None
    if not 1 <= network.scale <= MAX_SCALE:
        raise ValueError("is no network of Real-ESRGAN's kinds (RRDBNet, SRVGGNetCompact)")
    _check(shapes, network.shapes(), f"{network.kind} ×{network.scale}")
    return network


def identify_face(data: bytes) -> FaceNetwork:
    """The network for faces of a safetensors file. Raises as `identify`."""
    # a mapping that the published networks skip, and pictures that only training looks at
    unused = ("stylegan_decoder.style_mlp.", "toRGB.")
    shapes = {name: shape for name, shape in _shapes(data).items() if not name.startswith(unused)}
    try:
        network = _gfpgan(shapes)
    except (LookupError, ValueError):  # as in `identify`
        raise ValueError("is no GFPGAN network as its versions 1.3 and 1.4 have it") from None
    _check(shapes, network.shapes(), f"GFPGAN of {network.side} px")
    return network


def _shapes(data: bytes) -> Shapes:
    try:
        tensors = safetensors.deserialize(data)  # type: ignore[no-untyped-call]
    except Exception as error:  # of safetensors' own, and others for what it did not expect
        raise ValueError(f"is damaged, or no safetensors file ({error}); fetch it again") from None
    shapes: Shapes = {canonical(name): tuple(tensor["shape"]) for name, tensor in tensors}
    if any(tensor["dtype"] not in FLOATS for _, tensor in tensors):
        raise ValueError("holds numbers that are no floats; give weights that are not quantized")
    if len(shapes) != len(tensors):
        raise ValueError("holds a tensor under two names, such as params and params_ema; keep one of them")
    return shapes


def _check(shapes: Shapes, wanted: Shapes, called: str) -> None:
    if wrong := sorted(name for name in {*wanted, *shapes} if wanted.get(name) != shapes.get(name)):
        raise ValueError(
            f"looks like {called}, but {len(wrong)} of its tensors are missing, of another shape or not part of it, such as {wrong[0]}"
        )


def canonical(name: str) -> str:
    """A tensor's name as the code of Real-ESRGAN or GFPGAN has it."""
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


def _gfpgan(shapes: Shapes) -> FaceNetwork:
    levels = sum(re.fullmatch(r"conv_body_down\.\d+\.conv1\.weight", name) is not None for name in shapes)
    if not 1 <= levels <= MAX_LEVELS:
        raise ValueError(levels)
    last, _, _, _ = shapes["final_conv.weight"]
    encoder = [shapes[f"conv_body_down.{level}.conv1.weight"][0] for level in range(levels)]
    layers = ["style_conv1", *(f"style_convs.{2 * level}" for level in range(levels))]
    decoder = [shapes[f"stylegan_decoder.{layer}.modulated_conv.weight"][1] for layer in layers]
    _, style = shapes["stylegan_decoder.style_conv1.modulated_conv.modulation.weight"]
    return FaceNetwork((*encoder, last), tuple(decoder), style)
