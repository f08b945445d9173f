"""Each format's files are what its settings say, decode by other people's readers, and are the same bytes each time."""

from __future__ import annotations

import contextlib
import io
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import imagecodecs
import numpy as np
import pytest
from PIL import AvifImagePlugin, Image, ImageFilter, JpegImagePlugin, features
from pydantic import ValidationError

from renderfarm import jxl
from renderfarm.config import ENCODINGS, Encoding, Metadata, Output
from renderfarm.encode import FORMATS, UNDECODABLE, Written, decode, encode, encoder_of
from renderfarm.errors import InvalidInput, InvalidJob
from renderfarm.marks import marks

RECORD = {
    "row": 7, "row_id": "cat-7", "image_index": 1, "prompt": "a café, (red:1.2)", "negative_prompt": "a dog", "seed": 3, "height": 512,
    "width": 640, "num_inference_steps": 20, "guidance_scale": 7.0, "sampler": "dpm++2m-karras", "model": "org/name",
    "model_revision": "ab" * 20, "profile_sha256": "cd" * 32, "pixel_sha256": "ef" * 32,
}  # fmt: skip
ALL = marks(RECORD, Metadata())


def picture(height: int = 96, width: int = 128) -> np.ndarray:
    """Smooth shades with some noise: neither flat nor random."""
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(noise).filter(ImageFilter.GaussianBlur(2)))


def seen_elsewhere(data: bytes) -> np.ndarray:
    """What another reader than ours sees."""
    return imagecodecs.imread(data) if data[4:8] == b"JXL " else np.asarray(Image.open(io.BytesIO(data)))


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / ((a.astype(float) - b) ** 2).mean()))


@pytest.mark.parametrize("format_", FORMATS)
def test_a_lossless_file_is_the_pixels_and_a_lossy_one_looks_like_them(format_: str) -> None:
    pixels, settled = picture(), Encoding().settled(format_)
    data = encode(pixels, format_, marks=ALL).data
    for reader in (seen_elsewhere, lambda data: np.asarray(decode(data))):
        found = reader(data)
        assert found.shape == pixels.shape
        if settled.lossless:
            np.testing.assert_array_equal(found, pixels)
        else:
            assert 30 < psnr(found, pixels) < 60
    np.testing.assert_array_equal(Written(format_, settled, signed=False).seen(pixels), seen_elsewhere(data))


@pytest.mark.parametrize(("format_", "given"), [(name, {}) for name in FORMATS] + [("webp", {"quality": 90})])
def test_the_same_call_gives_the_same_bytes_in_two_threads_at_once(format_: str, given: dict[str, Any]) -> None:
    pictures, encoding = [picture(), picture()[::-1], picture(64, 64)] * 4, Encoding(**given).settled(format_)
    alone = [encode(pixels, format_, encoding, ALL).data for pixels in pictures]
    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(lambda pixels: encode(pixels, format_, encoding, ALL).data, pictures)) == alone


def test_the_number_of_cores_decides_no_byte_of_an_avif(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = picture(1024, 1024)

    def with_cores(cores: int, write: Any) -> bytes:
        monkeypatch.setattr(AvifImagePlugin, "_get_default_max_threads", lambda: cores)
        return bytes(write())

    def plainly() -> bytes:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "AVIF", quality=75)
        return file.getvalue()

    assert with_cores(1, plainly) != with_cores(8, plainly), "the trap that this test is about is gone"
    ours = [with_cores(cores, lambda: encode(pixels, "avif").data) for cores in (1, 8)]
    assert ours[0] == ours[1]


def test_a_jpeg_keeps_its_colours_whole_unless_it_is_told_otherwise() -> None:
    def sampling(**given: Any) -> int:
        data = encode(picture(), "jpeg", Encoding(**given).settled("jpeg")).data
        return int(JpegImagePlugin.get_sampling(Image.open(io.BytesIO(data))))

    assert sampling() == sampling(quality=100) == 0
    assert (sampling(subsampling="4:2:2"), sampling(subsampling="4:2:0", quality=95)) == (1, 2)


@pytest.mark.parametrize("format_", ["jpeg", "webp", "avif"])
def test_a_higher_quality_is_more_bytes_nearer_to_the_pixels(format_: str) -> None:
    pixels = picture()
    low, high = (encode(pixels, format_, Encoding(quality=quality).settled(format_)).data for quality in (30, 97))
    assert len(low) < len(high)
    assert psnr(seen_elsewhere(low), pixels) + 3 < psnr(seen_elsewhere(high), pixels)


def test_png_levels_and_webp_without_loss_are_what_pillow_makes_of_them() -> None:
    pixels = picture()

    def pillows(format_: str, **options: Any) -> bytes:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, format_, **options)
        return file.getvalue()

    assert encode(pixels).data == pillows("PNG", compress_level=1)
    assert encode(pixels, "png", Encoding(compression_level=9).settled("png")).data == pillows("PNG", compress_level=9)
    assert encode(pixels, "webp").data == pillows("WEBP", lossless=True, quality=0, method=0)
    assert encode(pixels, "webp", Encoding(lossless=False).settled("webp")).data == pillows("WEBP", quality=90)
    assert encode(pixels, "jpeg").data == pillows("JPEG", quality=95, subsampling="4:4:4")


def test_a_noisy_picture_of_many_pixels_is_a_jpeg_of_full_quality() -> None:
    """Which it is not with `optimize`: Pillow's buffer is too small for it."""
    noise = np.random.default_rng(1).integers(0, 256, (700, 900, 3), dtype=np.uint8)
    assert seen_elsewhere(encode(noise, "jpeg", Encoding(quality=100).settled("jpeg"), ALL).data).shape == noise.shape


@pytest.mark.parametrize(
    ("format_", "given", "message"),
    [
        ("png", {"quality": 90}, "encoding.quality: png has none; it takes lossless, compression_level"),
        ("jpeg", {"compression_level": 3}, "encoding.compression_level: jpeg has none; it takes lossless, quality, subsampling"),
        ("jpeg", {"lossless": True}, "encoding.lossless: jpeg is never lossless; leave it out, or use format png, webp or jxl"),
        ("avif", {"lossless": True}, "avif is never lossless"),
        ("png", {"lossless": False}, "encoding.lossless: png is always lossless; leave it out, or use format webp, jpeg or avif"),
        ("webp", {"lossless": True, "quality": 80}, "encoding.quality: lossless WebP has none"),
        ("webp", {"subsampling": "4:2:0"}, "encoding.subsampling: lossless WebP has none"),
        ("webp", {"quality": 80, "subsampling": "4:2:0"}, "encoding.subsampling: webp has none; it takes lossless, quality"),
        ("jxl", {"quality": 80}, "encoding.quality: jxl has none; it takes lossless"),
        ("jpeg", {"quality": 0}, "greater than or equal to 1"),
        ("png", {"compression_level": 10}, "less than or equal to 9"),
    ],
)
def test_what_a_format_does_not_take_is_refused(format_: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Output(path="out", format=format_, encoding=given)


def test_settled_settings_are_whole_and_settle_to_themselves() -> None:
    for format_ in ENCODINGS:
        settled = Encoding().settled(format_)
        assert settled == settled.settled(format_)
        assert settled.model_dump(exclude_none=True) == ENCODINGS[format_]
    assert Encoding(quality=50).settled("webp") == Encoding(lossless=False, quality=50)
    assert set(ENCODINGS) == set(FORMATS)


def test_the_encoder_is_named_with_the_versions_that_make_its_bytes() -> None:
    assert encoder_of("webp") == f"Pillow {Image.__version__}, webp {features.version('webp')}"
    assert encoder_of("jxl") == f"imagecodecs {imagecodecs.__version__}, {imagecodecs.jpegxl_version()}"
    for format_ in FORMATS:
        assert sum(sign.isdigit() for sign in encoder_of(format_)) >= 4, encoder_of(format_)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of Pillow, about damaged EXIF
@pytest.mark.parametrize("format_", FORMATS)
def test_a_damaged_file_is_one_of_the_errors_that_are_known(format_: str) -> None:
    data = encode(picture(), format_, marks=ALL).data
    for damaged in (data[: len(data) // 2], data[:20], b"no picture at all"):
        with pytest.raises(UNDECODABLE):
            decode(damaged).load()
    random = np.random.default_rng(0)
    for _ in range(100):  # decodes or not, but ends in nothing else
        damaged = bytearray(data)
        for place in random.integers(0, len(data), 5):
            damaged[place] = random.integers(0, 256)
        with contextlib.suppress(*UNDECODABLE):
            decode(bytes(damaged)).load()


def test_files_of_other_formats_are_not_opened() -> None:
    file = io.BytesIO()
    Image.fromarray(picture()).save(file, "TIFF")
    with pytest.raises(OSError, match="cannot identify"):
        decode(file.getvalue())


def test_without_its_package_jpeg_xl_says_which_one_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "imagecodecs", None)
    with pytest.raises(InvalidJob, match=r"imagecodecs: pip install 'renderfarm\[codecs\]'"):
        encode(picture(), "jxl")


def test_boxes_of_a_cut_off_file_end_without_an_error() -> None:
    data = encode(picture(), "jxl", marks=ALL).data
    assert [type_ for type_, _ in jxl.boxes(data)] == [b"JXL ", b"ftyp", b"Exif", b"xml ", b"jxlc"]
    assert list(jxl.boxes(data[:-1]))[-1][0] == b"xml "
    large = jxl.SIGNATURE + b"\x00\x00\x00\x01xml " + (20).to_bytes(8, "big") + b"<a/>" + b"\x00\x00\x00\x00jxlcrest"
    assert list(jxl.boxes(large))[1:] == [(b"xml ", b"<a/>"), (b"jxlc", b"rest")]
    assert list(jxl.boxes(jxl.SIGNATURE + b"\x00\x00\x00\x02xml "))[1:] == []


@pytest.mark.parametrize("format_", ["webp", "avif", "jpeg"])
def test_sides_that_a_format_does_not_know_are_the_rows_error(format_: str) -> None:
    with pytest.raises(InvalidInput, match=rf"70000×1 pixels cannot be written as {format_}: .*; use another output.format"):
        encode(np.zeros((1, 70_000, 3), np.uint8), format_)
