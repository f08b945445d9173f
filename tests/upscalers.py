"""Real-ESRGAN's two networks as torch modules, written apart from the package, with tiny random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

Tensor = torch.Tensor


def conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, 1, 1)


class Dense(nn.Module):
    def __init__(self, features: int, growth: int) -> None:
        super().__init__()
        for k in range(5):
            setattr(self, f"conv{k + 1}", conv(features + k * growth, growth if k < 4 else features))
        self.act = nn.LeakyReLU(0.2)

    def forward(self, x: Tensor) -> Tensor:
        a = self.act(self.conv1(x))
        b = self.act(self.conv2(torch.cat((x, a), 1)))
        c = self.act(self.conv3(torch.cat((x, a, b), 1)))
        d = self.act(self.conv4(torch.cat((x, a, b, c), 1)))
        out: Tensor = self.conv5(torch.cat((x, a, b, c, d), 1)) * 0.2 + x
        return out


class Block(nn.Module):
    def __init__(self, features: int, growth: int) -> None:
        super().__init__()
        self.rdb1, self.rdb2, self.rdb3 = (Dense(features, growth) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.rdb3(self.rdb2(self.rdb1(x))) * 0.2 + x
        return out


class RRDBNet(nn.Module):
    """×4, ×2 or ×1: for the last two it sees 2×2 or 4×4 pixels as one."""

    def __init__(self, scale: int = 4, features: int = 16, blocks: int = 2, growth: int = 8) -> None:
        super().__init__()
        self.fold = 4 // scale
        self.scale = scale
        self.conv_first = conv(3 * self.fold**2, features)
        self.body = nn.Sequential(*(Block(features, growth) for _ in range(blocks)))
        self.conv_body, self.conv_up1, self.conv_up2, self.conv_hr = (conv(features, features) for _ in range(4))
        self.conv_last = conv(features, 3)
        self.act, self.up = nn.LeakyReLU(0.2), nn.Upsample(scale_factor=2, mode="nearest")

    def forward(self, x: Tensor) -> Tensor:
        high, wide = x.shape[2:]
        x = nn.ReflectionPad2d((0, -wide % self.fold, 0, -high % self.fold))(x)
        entered = self.conv_first(nn.PixelUnshuffle(self.fold)(x))
        x = self.conv_body(self.body(entered)) + entered
        x = self.act(self.conv_up1(self.up(x)))
        x = self.act(self.conv_up2(self.up(x)))
        out: Tensor = self.conv_last(self.act(self.conv_hr(x)))
        return out[..., : high * self.scale, : wide * self.scale]


class Compact(nn.Module):
    def __init__(self, scale: int = 4, features: int = 16, blocks: int = 2) -> None:
        super().__init__()
        inner = [layer for _ in range(blocks) for layer in (conv(features, features), nn.PReLU(features))]
        self.body = nn.ModuleList([conv(3, features), nn.PReLU(features), *inner, conv(features, 3 * scale**2)])
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        base = nn.Upsample(scale_factor=self.scale, mode="nearest")(x)
        for layer in self.body:
            x = layer(x)
        return nn.PixelShuffle(self.scale)(x) + base


def random_network(kind: Any, seed: int = 0, **shape: Any) -> nn.Module:
    """Weights that give pictures with many values, most of them within 0..1."""
    torch.manual_seed(seed)
    network: nn.Module = kind(**shape).eval()
    if isinstance(network, RRDBNet):
        nn.init.constant_(network.conv_last.bias, 0.5)
        nn.init.normal_(network.conv_last.weight, std=0.6)
        nn.init.normal_(network.conv_first.weight, std=0.4)
    return network


def save(network: nn.Module, path: Path, rename: Any = lambda name: name) -> Path:
    save_file({rename(name): tensor.contiguous() for name, tensor in network.state_dict().items()}, path)
    return path


def enlarged(network: nn.Module, pixels: np.ndarray, dtype: torch.dtype = torch.float32) -> np.ndarray:
    """H×W×3 uint8 through the network on one thread, as a user of it would write it."""
    torch.set_num_threads(1)
    with torch.inference_mode():
        x = torch.from_numpy(pixels / np.float32(255)).permute(2, 0, 1)[None]
        y = network.to(dtype)(x.to(dtype)).float().clamp(0, 1)[0].permute(1, 2, 0)
    network.float()
    return (y.numpy() * 255).round().astype(np.uint8)
