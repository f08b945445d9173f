"""What Pillow does to a finished picture, always the same way (of one Pillow and FreeType, which the render profile names)."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFont

from renderfarm.config import Colour
from renderfarm.errors import InvalidInput

SMALLEST_PX = 8  # letters that can still be read


def colour(pixels: np.ndarray, wanted: Colour) -> np.ndarray:
    """H×W×3 uint8 with other saturation, then contrast, then brightness."""
    picture = Image.fromarray(pixels)
    enhancers = ((ImageEnhance.Color, wanted.saturation), (ImageEnhance.Contrast, wanted.contrast))
    for enhancer, factor in (*enhancers, (ImageEnhance.Brightness, wanted.brightness)):
        if factor != 1:
            picture = enhancer(picture).enhance(factor)
    return np.asarray(picture)


def write_on(pixels: np.ndarray, text: str, opacity: float) -> np.ndarray:
    """H×W×3 uint8 with white, outlined letters at the bottom right. Raises InvalidInput where they do not fit."""
    picture = Image.fromarray(pixels).convert("RGBA")
    layer = Image.new("RGBA", picture.size)
    pen, margin = ImageDraw.Draw(layer), max(2, min(picture.size) // 64)
    for size in range(max(SMALLEST_PX, min(picture.size) // 24), SMALLEST_PX - 1, -1):
        font = ImageFont.load_default(size)
        left, top, right, bottom = pen.textbbox((0, 0), text, font=font, stroke_width=1)
        x, y = picture.width - margin - right, picture.height - margin - bottom
        if x + left >= 0 and y + top >= 0:
            break
    else:
        raise InvalidInput(f"the text does not fit a picture of {picture.width}×{picture.height} pixels; shorten it")
    alpha = round(255 * opacity)
    pen.text((x, y), text, font=font, fill=(255, 255, 255, alpha), stroke_width=1, stroke_fill=(0, 0, 0, alpha))
    return np.asarray(Image.alpha_composite(picture, layer).convert("RGB"))
