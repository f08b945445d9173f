"""Files of pictures become pixels, always the same ones (of one Pillow version, which the render profile names)."""

from __future__ import annotations

import io
import re

from PIL import Image, ImageOps, UnidentifiedImageError

from renderfarm.config import is_url
from renderfarm.errors import InvalidInput
from renderfarm.records import InputImage, Sample

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 64 << 20
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # what converts to RGB without clipping


MAX_SCANS = 100  # of a progressive JPEG: each costs its whole area, and a file may hold millions


def shown(source: str) -> str:
    """A path as it is; of a URL only host and path, since the rest may hold a password or a signature."""
    if not is_url(source):
        return source
    scheme, _, rest = source.partition("://")
    host, slash, path = re.split(r"[?#]", rest)[0].partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def decode(image: InputImage, name: str = "image") -> Image.Image:
    """RGB as a viewer shows it: turned by its EXIF orientation, alpha dropped. A mask is grey, and may have no alpha: some
    programs draw masks there, and what it would be without it is another one. Raises InvalidInput."""
    assert image.data is not None
    which = f"{name} {shown(image.source)!r}" if image.source else f"the embedded {name}"
    if image.data.count(b"\xff\xda") > MAX_SCANS and image.data.startswith(b"\xff\xd8"):
        raise InvalidInput(f"{which} is a JPEG of more than {MAX_SCANS} scans; save it again")
    try:
        opened = Image.open(io.BytesIO(image.data), formats=FORMATS)
        if opened.width * opened.height > MAX_PIXELS:
            raise InvalidInput(f"{which} has {opened.width}×{opened.height} pixels; the limit is {MAX_PIXELS:,} in all: make it smaller")
        if opened.mode not in MODES:
            raise InvalidInput(f"{which} has pixels of mode {opened.mode}; save it with 8 bits a channel")
        if name == "mask_image" and _is_transparent(opened):
            raise InvalidInput(f"{which} has transparent pixels; give a mask without alpha, white where it is painted anew")
        ImageOps.exif_transpose(opened, in_place=True)
        return opened.convert("L" if name == "mask_image" else "RGB")
    except Image.DecompressionBombError:
        raise InvalidInput(f"{which} has more than {MAX_PIXELS:,} pixels in all; make it smaller") from None
    except UnidentifiedImageError:
        raise InvalidInput(f"{which} is no {', '.join(FORMATS)} file; convert it") from None
    except InvalidInput:
        raise
    except Exception as error:  # damaged files, and damaged EXIF in them, raise many kinds
        raise InvalidInput(f"{which} cannot be decoded ({error}); it may be cut off: write it again") from None


def _is_transparent(picture: Image.Image) -> bool:
    """Whether any pixel is; an alpha channel that is opaque everywhere says nothing."""
    lowest = picture.convert("RGBA").getchannel("A").getextrema()[0] if picture.has_transparency_data else 255
    return lowest != 255


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
