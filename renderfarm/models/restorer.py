"""GFPGAN (Wang et al. 2021) on torch, one face at a time: what a face becomes depends on nothing beside its own picture.

A U-Net looks at the damaged face and says how StyleGAN2 (Karras et al. 2020) is to paint it: a style for each layer, and for
half of each layer's features what they are multiplied by and what is added. Always in float32, as its authors run it: with 16 bits
its clean kind goes wrong (TencentARC/GFPGAN#50). Shapes: S the side of the network's square, F features.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load

from renderfarm.errors import NonFiniteOutput, OutOfMemory
from renderfarm.faces import Detector, cut_out, place, put_back
from renderfarm.models.common import to_uint8
from renderfarm.models.networks import FaceNetwork, canonical


class FaceRestorer:
    def __init__(self, data: bytes, network: FaceNetwork, detector: Detector, strength: float, device: str) -> None:
        self.network, self.detector, self.strength, self.device = network, detector, strength, device
        needed = network.shapes()
        self._tensors = {
            name: tensor.to(device, torch.float32) for given, tensor in load(data).items() if (name := canonical(given)) in needed
        }

    def __call__(self, pixels_HW3: np.ndarray) -> np.ndarray:
        """H×W×3 uint8 with its faces restored, each from the picture as it came. Raises OutOfMemory, NonFiniteOutput."""
        made = pixels_HW3
        for points in self.detector(pixels_HW3):
            at = place(points, self.network.side)
            made = put_back(made, self.restored(cut_out(pixels_HW3, at, self.network.side)), at, self.strength)
        return made

    @torch.inference_mode()
    def restored(self, face_SS3: np.ndarray) -> np.ndarray:
        """S×S×3 uint8 of S×S×3 uint8."""
        try:
            face = torch.from_numpy(face_SS3.copy()).to(self.device).permute(2, 0, 1)[None]
            made = self._painted(*self._looked_at((face.float() / 255 - 0.5) / 0.5))[0]
            if not torch.isfinite(made).all():
                raise NonFiniteOutput("the network gave NaN or infinite values; its weights may be damaged")
            return to_uint8((made.clamp(-1, 1).permute(1, 2, 0).cpu().numpy() + 1) / 2)
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(
                "the device has too little memory for it beside the model; lower workers.batch_size (in a new output: it decides pixels)"
            ) from error

    def _looked_at(self, x: torch.Tensor) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
        """One style for each layer that paints, and for each size from 8 px on what its features are multiplied by and what is added."""
        levels, seen = range(self.network.levels), []
        x = _leaky(self._conv("conv_body_first", x))
        for level in levels:
            x = self._residual(f"conv_body_down.{level}", x, 0.5)
            seen.append(x)
        x = _leaky(self._conv("final_conv", x))
        styles = self._linear("final_linear", x.flatten(1)).view(-1, self.network.style)
        changes = []
        for level in levels:
            x = self._residual(f"conv_body_up.{level}", x + seen.pop(), 2)
            changes.append((self._condition(f"condition_scale.{level}", x), self._condition(f"condition_shift.{level}", x)))
        return styles, changes

    def _painted(self, styles: torch.Tensor, changes: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        """StyleGAN2's picture, -1..1: at each size colours are added to those of the size before."""
        x = self._styled("style_conv1", 0, self._tensors["stylegan_decoder.constant_input.weight"], styles[0])
        picture = self._colours("to_rgb1", x, styles[1])
        for level, (scale, shift) in enumerate(changes):
            first = 2 * level + 1
            x = self._styled(f"style_convs.{first - 1}", first, _sized(x, 2), styles[first])
            kept, changed = x[:, : -scale.shape[1]], x[:, -scale.shape[1] :]
            x = torch.cat([kept, changed * scale + shift], dim=1)
            x = self._styled(f"style_convs.{first}", first + 1, x, styles[first + 1])
            picture = self._colours(f"to_rgbs.{level}", x, styles[first + 2]) + _sized(picture, 2)
        return picture

    def _styled(self, name: str, noise: int, x: torch.Tensor, style: torch.Tensor) -> torch.Tensor:
        """The noise is what is stored with the weights: drawn anew, a face would be another one each time."""
        at = f"stylegan_decoder.{name}"
        x = self._modulated(at, x, style, normed=True) * 2**0.5
        x = x + self._tensors[f"{at}.weight"] * self._tensors[f"stylegan_decoder.noises.noise{noise}"]
        return _leaky(x + self._tensors[f"{at}.bias"])

    def _colours(self, name: str, x: torch.Tensor, style: torch.Tensor) -> torch.Tensor:
        at = f"stylegan_decoder.{name}"
        return self._modulated(at, x, style, normed=False) + self._tensors[f"{at}.bias"]

    def _modulated(self, at: str, x: torch.Tensor, style: torch.Tensor, *, normed: bool) -> torch.Tensor:
        """A convolution whose kernel the style scales by input; `normed`: then to length 1 by output."""
        kernel = self._tensors[f"{at}.modulated_conv.weight"][0]  # F×F×k×k
        kernel = kernel * self._linear(f"{at}.modulated_conv.modulation", style)[:, None, None]
        if normed:
            kernel = kernel * torch.rsqrt(kernel.pow(2).sum([1, 2, 3], keepdim=True) + 1e-8)
        return F.conv2d(x, kernel, padding=kernel.shape[-1] // 2)

    def _residual(self, at: str, x: torch.Tensor, factor: float) -> torch.Tensor:
        made = _sized(_leaky(self._conv(f"{at}.conv1", x)), factor)
        return _leaky(self._conv(f"{at}.conv2", made)) + self._conv(f"{at}.skip", _sized(x, factor))

    def _condition(self, at: str, x: torch.Tensor) -> torch.Tensor:
        return self._conv(f"{at}.2", _leaky(self._conv(f"{at}.0", x)))

    def _conv(self, name: str, x: torch.Tensor) -> torch.Tensor:
        kernel = self._tensors[f"{name}.weight"]
        return F.conv2d(x, kernel, self._tensors.get(f"{name}.bias"), padding=kernel.shape[-1] // 2)

    def _linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self._tensors[f"{name}.weight"], self._tensors[f"{name}.bias"])


def _leaky(x: torch.Tensor) -> torch.Tensor:
    return F.leaky_relu(x, 0.2)


def _sized(x: torch.Tensor, factor: float) -> torch.Tensor:
    return F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)
