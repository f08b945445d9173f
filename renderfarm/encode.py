"""Pixels → bytes of an image file, and back. One entry per format.

The same pixels, settings and marks give the same bytes, with one version of an encoder (`encoder_of`) on one kind of CPU. Only a
signature differs each time.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL
from PIL import Image, PngImagePlugin, features

from renderfarm import jxl
from renderfarm.config import Encoding
from renderfarm.errors import Fatal, InvalidInput
from renderfarm.marks import FORMATS as PILLOW_FORMATS
from renderfarm.marks import Marks
from renderfarm.signing import Sign

PLAIN = Marks()
UNDECODABLE = (OSError, ValueError, SyntaxError, RuntimeError)  # what Pillow's decoders raise for damaged files
JPEG_SEGMENT = 65533  # bytes that a JPEG's marker can hold; Pillow refuses more
XMP_NAME = 29  # of them, in front of XMP


@dataclass(frozen=True)
class EncodedImage:
    """An image file's bytes, and the hashes of the file and of the pixels that went into it."""

    data: bytes
    file_sha256: str
    pixel_sha256: str


@dataclass(frozen=True)
class Format:
    """`libraries`: what makes the bytes besides Pillow, by the names of Pillow's features; the first that it is built with.
    `bytes_per_pixel`: of rendered pictures at the default settings, about."""

    extension: str
    mime: str
    write: Callable[[np.ndarray, Encoding, Marks], bytes]
    libraries: tuple[str, ...]
    bytes_per_pixel: float


def pixel_sha256(pixels: np.ndarray) -> str:
    """SHA-256 of the raw bytes, row-major H×W×3 uint8."""
    return hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()


def _pillow(pixels: np.ndarray, format_: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels, "RGB").save(buffer, format_, **options)
    return buffer.getvalue()


def _png(pixels: np.ndarray, encoding: Encoding, marks: Marks) -> bytes:
    texts = PngImagePlugin.PngInfo()
    for key, text in marks.texts():  # Pillow's `xmp=` writes nothing into a PNG
        if key == "parameters":
            texts.add_text(key, text)  # tEXt, where Latin-1 can spell it
        else:
            texts.add_itxt(key, text)
    return _pillow(pixels, "PNG", compress_level=encoding.compression_level, pnginfo=texts)


def _webp(pixels: np.ndarray, encoding: Encoding, marks: Marks) -> bytes:
    # without loss, quality is effort: a twentieth of the default's time for a tenth more bytes
    how = {"lossless": True, "quality": 0, "method": 0} if encoding.lossless else {"quality": encoding.quality}
    return _pillow(pixels, "WEBP", **how, exif=marks.exif(), xmp=marks.xmp())


def _jpeg(pixels: np.ndarray, encoding: Encoding, marks: Marks) -> bytes:
    # not `optimize`: for 6 % fewer bytes it needs the whole file in a buffer, which Pillow makes too small for a noisy picture
    return _pillow(
        pixels,
        "JPEG",
        quality=encoding.quality,
        subsampling=encoding.subsampling,
        exif=marks.exif(JPEG_SEGMENT),
        xmp=marks.xmp(JPEG_SEGMENT - XMP_NAME),
    )


def _avif(pixels: np.ndarray, encoding: Encoding, marks: Marks) -> bytes:
    # several threads would cut the picture into tiles, and the number of cores would decide bytes
    how = {"quality": encoding.quality, "subsampling": encoding.subsampling, "max_threads": 1}
    return _pillow(pixels, "AVIF", **how, exif=marks.exif(), xmp=marks.xmp())


def _jxl(pixels: np.ndarray, encoding: Encoding, marks: Marks) -> bytes:
    return jxl.encode(pixels, marks.exif().removeprefix(b"Exif\x00\x00"), marks.xmp())


FORMATS: dict[str, Format] = {
    "png": Format("png", "image/png", _png, ("zlib_ng", "zlib"), 1.5),
    "webp": Format("webp", "image/webp", _webp, ("webp",), 1.4),
    "jpeg": Format("jpg", "image/jpeg", _jpeg, ("libjpeg_turbo", "jpg"), 0.5),
    "avif": Format("avif", "image/avif", _avif, ("avif",), 0.2),
    "jxl": Format("jxl", "image/jxl", _jxl, (), 1.4),
}

ORIGINALS = "png"  # of pictures before `after`, whatever format the dataset has: without loss


def encoder_of(format_: str) -> str:
    """Whose bytes a format's files are here: `Pillow 13.0.0, zlib_ng 2.3.3`."""
    if format_ == "jxl":
        return jxl.version()
    library = next((name for name in FORMATS[format_].libraries if features.check(name)), None)
    return f"Pillow {PIL.__version__}" + (f", {library} {features.version(library)}" if library else "")


def encode(
    pixels: np.ndarray, format_: str = "png", encoding: Encoding | None = None, marks: Marks = PLAIN, sign: Sign | None = None
) -> EncodedImage:
    """`pixels`: H×W×3 uint8. `encoding`: settled settings; None: the format's defaults. `sign` has the last word about the bytes."""
    try:
        data = FORMATS[format_].write(pixels, encoding or Encoding().settled(format_), marks)
    except (ValueError, OSError, RuntimeError) as error:  # sides that a format does not know
        height, width = pixels.shape[:2]
        raise InvalidInput(f"{width}×{height} pixels cannot be written as {format_}: {error}; use another output.format") from error
    if sign is not None:
        data = sign(data, FORMATS[format_].mime, marks.source_type)
    return EncodedImage(data, hashlib.sha256(data).hexdigest(), pixel_sha256(pixels))


@dataclass(frozen=True)
class Written:
    """How an output's files are written."""

    format: str
    encoding: Encoding
    signed: bool

    @property
    def lossless(self) -> bool:
        """Whether a file decodes to the pixels that went into it."""
        return bool(self.encoding.lossless)

    def seen(self, pixels: np.ndarray) -> np.ndarray:
        """What a reader of the file sees of these pixels."""
        return pixels if self.lossless else np.asarray(decode(encode(pixels, self.format, self.encoding).data))


def written(output: dict[str, Any]) -> Written:
    """From job.json's `output`. Raises Fatal for a damaged one."""
    try:
        format_ = output["format"]
        return Written(format_, Encoding.model_validate(output.get("encoding") or {}).settled(format_), bool(output.get("signed")))
    except (KeyError, ValueError, TypeError):
        raise Fatal("job.json is damaged (no format of files, or settings that it does not take); restore it from a copy") from None


def decode(data: bytes) -> Image.Image:
    """A file of one of these formats; Pillow's are decoded on first use. Raises OSError for a file of another kind, one of UNDECODABLE,
    now or then, for a damaged one."""
    if jxl.is_jxl(data):
        return Image.fromarray(jxl.decode(data))
    return Image.open(io.BytesIO(data), formats=tuple(PILLOW_FORMATS))
