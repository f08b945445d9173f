"""Files of pictures become pixels, always the same ones (of one Pillow version, which the render profile names)."""

from __future__ import annotations

import io

from PIL import Image, ImageOps, UnidentifiedImageError

from renderfarm.errors import InvalidInput
from renderfarm.records import InputImage, Sample

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 64 << 20
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # what converts to RGB without clipping


def decode(image: InputImage, name: str = "image") -> Image.Image:
    """RGB as a viewer shows it: turned by its EXIF orientation, alpha dropped. Raises InvalidInput."""
    assert image.data is not None
    shown = f"{name} {image.source!r}" if image.source else f"the embedded {name}"
    try:
        opened = Image.open(io.BytesIO(image.data), formats=FORMATS)
        if opened.width * opened.height > MAX_PIXELS:
            raise InvalidInput(f"{shown} has {opened.width}×{opened.height} pixels; the limit is {MAX_PIXELS:,} in all: make it smaller")
        if opened.mode not in MODES:
            raise InvalidInput(f"{shown} has pixels of mode {opened.mode}; save it with 8 bits a channel")
        return ImageOps.exif_transpose(opened).convert("L" if name == "mask_image" else "RGB")
    except UnidentifiedImageError:
        raise InvalidInput(f"{shown} is no {', '.join(FORMATS)} file; convert it") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InvalidInput(f"{shown} cannot be decoded ({error}); it may be cut off: write it again") from None


def sized(picture: Image.Image, sample: Sample) -> Image.Image:
    """The picture at the sample's size, by its `resize`."""
    size = (sample.width, sample.height)
    if picture.size == size:
        return picture
    resample = Image.Resampling.NEAREST if picture.mode == "L" else Image.Resampling.LANCZOS
    return ImageOps.fit(picture, size, resample) if sample.resize == "crop" else picture.resize(size, resample)


def blank(height: int, width: int) -> InputImage:
    """A grey picture, where any will do."""
    file = io.BytesIO()
    Image.new("RGB", (width, height), (128, 128, 128)).save(file, "PNG")
    return InputImage(None, file.getvalue())
