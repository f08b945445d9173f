"""JPEG XL: pixels by imagecodecs (renderfarm[codecs]), and the boxes of a file, in which metadata stands beside them.

signature | ftyp | Exif | xml | jxlc (the codestream)        each box: length (4 bytes), type (4 bytes), content
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from renderfarm.errors import InvalidJob

SIGNATURE = b"\x00\x00\x00\x0cJXL \r\n\x87\n"
CODESTREAM = b"\xff\n"
EFFORT = 1  # of 9: a tenth of PNG's time at level 1, and fewer bytes


def codec() -> Any:
    """imagecodecs. Raises InvalidJob where it is missing."""
    try:
        import imagecodecs
    except ImportError:
        raise InvalidJob("JPEG XL needs the package imagecodecs: pip install 'renderfarm[codecs]'") from None
    return imagecodecs


def version() -> str:
    """Of package and library: `imagecodecs 2026.3.6, libjxl 0.11.2`."""
    return f"imagecodecs {codec().__version__}, {codec().jpegxl_version()}"


def encode(pixels: np.ndarray, exif: bytes, xmp: bytes) -> bytes:
    """`pixels`: H×W×3 uint8, kept without loss. `exif`: a TIFF structure, without the `Exif` before it."""
    stream = codec().jpegxl_encode(pixels, lossless=True, effort=EFFORT, usecontainer=False, numthreads=1)
    found = [SIGNATURE, _box(b"ftyp", b"jxl \x00\x00\x00\x00jxl ")]
    if exif:
        found.append(_box(b"Exif", b"\x00\x00\x00\x00" + exif))  # where in it the TIFF structure begins: at once
    if xmp:
        found.append(_box(b"xml ", xmp))
    return b"".join([*found, _box(b"jxlc", stream)])


def decode(data: bytes) -> np.ndarray:
    """H×W×3 uint8. Raises OSError for a damaged file."""
    try:
        pixels: np.ndarray = codec().jpegxl_decode(data, numthreads=1)
    except (RuntimeError, ValueError) as error:  # imagecodecs' own error is a RuntimeError
        raise OSError(f"not a readable JPEG XL file ({error})") from None
    return pixels


def is_jxl(data: bytes) -> bool:
    return data.startswith((SIGNATURE, CODESTREAM))


def boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Type and content of each box of a file; none for a bare codestream. What is no whole box ends it."""
    place = 0
    while data.startswith(SIGNATURE) and place + 8 <= len(data):
        size, start = int.from_bytes(data[place : place + 4], "big"), 8
        if size == 1:  # the length follows the type, in 8 bytes
            size, start = int.from_bytes(data[place + 8 : place + 16], "big"), 16
        elif size == 0:  # up to the end
            size = len(data) - place
        if size < start or place + size > len(data):
            return
        yield data[place + 4 : place + 8], data[place + start : place + size]
        place += size


def _box(type_: bytes, content: bytes) -> bytes:
    return (len(content) + 8).to_bytes(4, "big") + type_ + content
