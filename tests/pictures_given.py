"""Pictures for rows that give some."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image, ImageOps


def picture(number: int = 0, size: tuple[int, int] = (32, 32), mode: str = "RGB") -> Image.Image:
    noise = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.NEAREST).convert(mode)


def mask(size: tuple[int, int] = (32, 32), *, inverted: bool = False) -> Image.Image:
    found = Image.new("L", size)
    found.paste(255, (8, 8, 24, 24))
    return ImageOps.invert(found) if inverted else found


def encoded(image: Image.Image, format_: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format_, **options)
    return file.getvalue()
