"""Real-ESRGAN's networks on torch, one picture at a time: what a picture becomes depends on nothing beside it.

Shapes: H×W pixels, s the network's scale.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load

from renderfarm.errors import InvalidInput, NonFiniteOutput, OutOfMemory
from renderfarm.models.common import to_uint8
from renderfarm.models.networks import MAX_PIXELS, Network, canonical
from renderfarm.models.torch_setup import is_too_much

CONTEXT = 16  # pixels around what is taken from a tile: at its edge a network sees what is not there


class Upscaler:
    """`tile`: side of the squares in which the network sees a picture; None: the whole of it at once."""

    def __init__(self, data: bytes, network: Network, tile: int | None, device: str, dtype: str) -> None:
        self.network, self.tile, self.device, self.dtype = network, tile, device, getattr(torch, dtype)
        self._tensors = {canonical(name): tensor.to(device, self.dtype) for name, tensor in load(data).items()}

    @torch.inference_mode()
    def __call__(self, pixels_HW3: np.ndarray) -> np.ndarray:
        """sH×sW×3 uint8 of H×W×3 uint8. Raises InvalidInput, OutOfMemory, NonFiniteOutput."""
        height, width, scale = *pixels_HW3.shape[:2], self.network.scale
        if height * width * scale**2 > MAX_PIXELS:
            raise InvalidInput(f"{width}×{height} pixels would become {width * scale}×{height * scale}; the limit is {MAX_PIXELS:,} in all")
        made = np.empty((height * scale, width * scale, 3), np.uint8)
        for y, top, bottom in windows(height, self.tile):
            for x, left, right in windows(width, self.tile):
                seen = self._enlarged(pixels_HW3[y : y + (self.tile or height), x : x + (self.tile or width)])
                taken = seen[(top - y) * scale : (bottom - y) * scale, (left - x) * scale : (right - x) * scale]
                made[top * scale : bottom * scale, left * scale : right * scale] = taken
        return made

    def _enlarged(self, pixels_HW3: np.ndarray) -> np.ndarray:
        try:
            picture = torch.from_numpy(pixels_HW3.copy()).to(self.device).permute(2, 0, 1)[None]
            made = (self._rrdb if self.network.kind == "rrdb" else self._compact)((picture.float() / 255).to(self.dtype))[0].float()
            if not torch.isfinite(made).all():
                raise NonFiniteOutput("the network gave NaN or infinite values; try workers.dtype: float32 or bfloat16")
            return to_uint8(made.clamp(0, 1).permute(1, 2, 0).cpu().numpy())
        except (RuntimeError, MemoryError) as error:
            if not is_too_much(error):
                raise
            raise OutOfMemory(
                "the device has too little memory for it beside the model; give the step a smaller tile, or lower "
                "workers.batch_size (in a new output: both decide pixels)"
            ) from error

    def _conv(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self._tensors[f"{name}.weight"], self._tensors[f"{name}.bias"], padding=1)

    def _rrdb(self, picture: torch.Tensor) -> torch.Tensor:
        """ESRGAN's (Wang et al. 2018): residual blocks of three dense blocks, then twice nearest neighbours and a layer."""
        height, width, gathered = *picture.shape[2:], self.network.gathered
        picture = F.pad(picture, (0, -width % gathered, 0, -height % gathered), mode="reflect")
        first = self._conv("conv_first", F.pixel_unshuffle(picture, gathered))
        x = first
        for block in range(self.network.blocks):
            entered = x
            for dense in (1, 2, 3):
                x = x + 0.2 * self._dense(f"body.{block}.rdb{dense}", x)
            x = entered + 0.2 * x
        x = first + self._conv("conv_body", x)
        for name in ("conv_up1", "conv_up2"):
            x = _leaky(self._conv(name, F.interpolate(x, scale_factor=2, mode="nearest")))
        made = self._conv("conv_last", _leaky(self._conv("conv_hr", x)))
        return made[:, :, : height * self.network.scale, : width * self.network.scale]

    def _dense(self, at: str, x: torch.Tensor) -> torch.Tensor:
        """Each layer sees all that came before it."""
        for layer in (1, 2, 3, 4):
            x = torch.cat([x, _leaky(self._conv(f"{at}.conv{layer}", x))], dim=1)
        return self._conv(f"{at}.conv5", x)

    def _compact(self, picture: torch.Tensor) -> torch.Tensor:
        """What the layers find is added to the picture's nearest neighbours."""
        x = self._conv("body.0", picture)
        for place in range(1, 2 * self.network.blocks + 2, 2):
            x = self._conv(f"body.{place + 1}", F.prelu(x, self._tensors[f"body.{place}.weight"]))
        return F.pixel_shuffle(x, self.network.scale) + F.interpolate(picture, scale_factor=self.network.scale, mode="nearest")


def _leaky(x: torch.Tensor) -> torch.Tensor:
    return F.leaky_relu(x, 0.2)


def windows(side: int, tile: int | None) -> Iterator[tuple[int, int, int]]:
    """Along one side: where each tile begins, and from where to where its result is taken. All are equally long.

    >>> list(windows(100, 64))
    [(0, 0, 32), (16, 32, 64), (36, 64, 96), (36, 96, 100)]
    """
    if tile is None or side <= tile:
        yield 0, 0, side
        return
    step = tile - 2 * CONTEXT
    for start in range(0, side, step):
        yield min(max(0, start - CONTEXT), side - tile), start, min(start + step, side)
