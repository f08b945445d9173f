"""What files say of themselves is read by other people's readers: Pillow, A1111's own convention, bytes by the specifications."""

from __future__ import annotations

import io
import json
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from test_encode import RECORD, picture

from renderfarm import jxl
from renderfarm.config import Metadata
from renderfarm.encode import FORMATS, encode
from renderfarm.errors import InvalidInput, InvalidJob
from renderfarm.marks import MAX_BYTES, PAINTED, marks, read, read_file
from renderfarm.samplers import SAMPLERS, find_sampler

IPTC = "http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
PIXELS = picture(48, 64)
NASTY = 'a <b> & "c" ]]> \\ é 日本 \U0001f600\r\nsecond\tline \x1b[31m \x0b \ufffe {curly} %s'


def file_of(record: dict[str, Any] = RECORD, format_: str = "png", **wanted: bool) -> bytes:
    return encode(PIXELS, format_, marks=marks(record, Metadata(**wanted))).data


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def chunks(png: bytes) -> list[tuple[bytes, bytes]]:
    found, place = [], 8
    while place < len(png):
        (size,) = struct.unpack(">I", png[place : place + 4])
        found.append((png[place + 4 : place + 8], png[place + 8 : place + 8 + size]))
        place += 12 + size
    return found


def exif_of(data: bytes) -> Image.Exif:
    if not jxl.is_jxl(data):
        return opened(data).getexif()
    exif = Image.Exif()
    exif.load(b"Exif\x00\x00" + dict(jxl.boxes(data))[b"Exif"][4:])
    return exif


def xmp_of(data: bytes) -> bytes | None:
    return dict(jxl.boxes(data)).get(b"xml ") if jxl.is_jxl(data) else opened(data).info.get("xmp")


def parsed_as_a1111_does(text: str) -> dict[str, str]:
    """Its documented convention: a last line of at least three `Name: value`, quoted where needed; above it prompt and negative."""
    *lines, last = text.strip().split("\n")
    field = r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)'
    found = dict(re.findall(field, last))
    assert len(found) >= 3
    found = {name: json.loads(value) if value.startswith('"') else value for name, value in found.items()}
    prompts: dict[str, list[str]] = {"Prompt": [], "Negative prompt": []}
    where = "Prompt"
    for line in lines:
        if line.strip().startswith("Negative prompt:"):
            where, line = "Negative prompt", line.strip().removeprefix("Negative prompt:")
        prompts[where].append(line.strip())
    return {**found, **{name: "\n".join(texts) for name, texts in prompts.items()}}


def user_comment(data: bytes) -> str:
    """As A1111 reads it: eight bytes that name the encoding, then UTF-16, big-endian."""
    comment = exif_of(data).get_ifd(0x8769)[0x9286]
    assert comment[:8] == b"UNICODE\x00"
    return str(comment[8:].decode("utf_16_be"))


# ---------------------------------------------------------------------------------------------- written


@pytest.mark.parametrize("format_", FORMATS)
def test_a1111_reads_every_argument_back(format_: str) -> None:
    record = RECORD | {"seed_b": 5, "blend": 0.25, "strength": 0.75, "guidance_scale": 6.5}
    data = file_of(record, format_)
    text = opened(data).info["parameters"] if format_ == "png" else user_comment(data)
    assert parsed_as_a1111_does(text) == {
        "Prompt": RECORD["prompt"], "Negative prompt": "a dog", "Steps": "20", "Sampler": "DPM++ 2M", "Schedule type": "Karras",
        "CFG scale": "6.5", "Seed": "3", "Size": "640x512", "Model": "org/name", "Variation seed": "5",
        "Variation seed strength": "0.25", "Denoising strength": "0.75",
    }  # fmt: skip


def test_values_that_hold_separators_are_quoted_and_whole_numbers_have_no_point() -> None:
    found = parsed_as_a1111_does(opened(file_of(RECORD | {"model": 'a, "b": c', "sampler": "ddpm"})).info["parameters"])
    assert (found["Model"], found["CFG scale"], found["Sampler"]) == ('a, "b": c', "7", "ddpm")
    assert "Schedule type" not in found, "A1111 has no such sampler, so no schedule of its own either"


@pytest.mark.parametrize("name", [name for name, sampler in SAMPLERS.items() if sampler.a1111])
def test_a1111s_spelling_of_a_sampler_leads_back_to_it(name: str) -> None:
    found = parsed_as_a1111_does(opened(file_of(RECORD | {"sampler": name})).info["parameters"])
    schedule = {"Karras": " Karras", "Uniform": ""}[found["Schedule type"]]
    assert find_sampler(found["Sampler"] + schedule, "diffusion").name == name


def test_png_texts_are_text_chunks_and_international_ones_only_where_they_must_be() -> None:
    latin = {content.split(b"\x00")[0]: type_ for type_, content in chunks(file_of()) if type_ in (b"tEXt", b"iTXt")}
    assert latin == {b"parameters": b"tEXt", b"renderfarm": b"iTXt", b"XML:com.adobe.xmp": b"iTXt"}
    other = [type_ for type_, content in chunks(file_of(RECORD | {"prompt": "日本"})) if content.startswith(b"parameters\x00")]
    assert other == [b"iTXt"]
    assert [type_ for type_, _ in chunks(file_of())][-2:] == [b"IDAT", b"IEND"], "texts stand before the pixels"


@pytest.mark.parametrize("format_", FORMATS)
def test_the_mark_of_a_models_picture_is_where_pillow_reads_xmp(format_: str) -> None:
    data = file_of(format_=format_)
    if format_ == "jxl":
        packet = xmp_of(data)
        assert packet is not None
        assert f"<Iptc4xmpExt:DigitalSourceType>{PAINTED}</Iptc4xmpExt:DigitalSourceType>".encode() in packet
        assert f'xmlns:Iptc4xmpExt="{IPTC}"'.encode() in packet
        return
    said = opened(data).getxmp()["xmpmeta"]["RDF"]["Description"]
    assert said["DigitalSourceType"] == "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
    assert (said["AISystemUsed"], said["AISystemVersionUsed"]) == ("org/name", "ab" * 20)
    assert said["AIPromptInformation"] == "a café, (red:1.2)\nNegative prompt: a dog"
    assert said["about"] == ""


def test_a_picture_that_was_painted_into_a_given_one_is_a_composite() -> None:
    found = read(file_of(RECORD | {"init_image_sha256": "aa", "init_mask_image_sha256": "bb"}))
    assert found["digital_source_type"] == "http://cv.iptc.org/newscodes/digitalsourcetype/compositeWithTrainedAlgorithmicMedia"
    assert read(file_of(RECORD | {"init_image_sha256": "aa"}))["digital_source_type"] == PAINTED


@pytest.mark.parametrize("format_", FORMATS)
def test_everything_is_read_back_whatever_a_prompt_holds(format_: str) -> None:
    record = RECORD | {"prompt": NASTY, "bytes": 9, "file_sha256": "x", "file_name": "y", "prompt_2": None, "blend": 0.1}
    found = read(file_of(record, format_))
    said = {name: value for name, value in record.items() if value is not None and name not in ("bytes", "file_sha256", "file_name")}
    assert found["row"] == said
    assert found["parameters"].startswith(NASTY)
    assert (found["digital_source_type"], found["c2pa"]) == (PAINTED, None)
    legal = NASTY.replace("\x1b", "\ufffd").replace("\x0b", "\ufffd").replace("\ufffe", "\ufffd")
    assert found["ai_prompt"] == f"{legal}\nNegative prompt: a dog"


@pytest.mark.parametrize("format_", FORMATS)
def test_without_prompts_no_file_holds_a_word_of_them(format_: str) -> None:
    texts = {name: f"secret-{name}" for name in ("prompt", "prompt_2", "prompt_3", "negative_prompt", "negative_prompt_2")}
    texts |= {name: f"secret-{name}" for name in ("negative_prompt_3", "prompt_cut_off", "negative_prompt_cut_off")}
    with_them, without = (file_of(RECORD | texts, format_, prompts=prompts) for prompts in (True, False))
    spellings = [b"secret", "secret".encode("utf_16_be"), "secret".encode("utf_16_le")]
    assert any(spelling in with_them for spelling in spellings)
    assert not any(spelling in without for spelling in spellings)
    found = read(without)
    assert found["row"]["seed"] == 3
    assert found["ai_prompt"] is None
    assert found["parameters"].startswith("Steps: 20, ")


@pytest.mark.parametrize("format_", FORMATS)
def test_each_mark_can_be_left_out(format_: str) -> None:
    names = ("provenance", "parameters", "row")
    bare = file_of(format_=format_, **dict.fromkeys(names, False))
    assert bare == encode(PIXELS, format_).data
    for one, key in zip(names, ("digital_source_type", "parameters", "row"), strict=True):
        found = read(file_of(format_=format_, **(dict.fromkeys(names, False) | {one: True})))
        assert [name for name in ("digital_source_type", "parameters", "row") if found[name]] == [key]


def test_what_a_jpeg_cannot_hold_is_left_out_from_the_end_and_the_mark_stays() -> None:
    for length in (15_000, 40_000, 70_000):  # characters of three bytes: the prompts are too long, then the row, then both
        record = RECORD | {"prompt": "日" * length, "negative_prompt": None}
        found, whole = read(file_of(record, "jpeg")), read(file_of(record, "webp"))
        assert found["digital_source_type"] == PAINTED
        assert found["ai_system"] == "org/name"
        for name in ("parameters", "row", "ai_prompt"):
            assert found[name] in (None, whole[name])
            assert whole[name] is not None
        assert (found["row"] is not None, found["ai_prompt"] is not None) == (length < 20_000, False)


# ---------------------------------------------------------------------------------------------- read


def test_files_of_a1111_are_read() -> None:
    text = "a cat\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 8x8"
    texts, png, jpeg = PngImagePlugin.PngInfo(), io.BytesIO(), io.BytesIO()
    texts.add_text("parameters", text)
    opened(file_of(provenance=False, parameters=False, row=False)).save(png, "PNG", pnginfo=texts)
    assert read(png.getvalue())["parameters"] == text
    comment = b"UNICODE\x00" + text.encode("utf_16_be")  # a TIFF structure by hand: IFD0 → Exif IFD → UserComment
    tiff = b"MM\x00*" + struct.pack(">IHHHIII", 8, 1, 0x8769, 4, 1, 26, 0) + struct.pack(">HHHIII", 1, 0x9286, 7, len(comment), 44, 0)
    Image.fromarray(PIXELS).save(jpeg, "JPEG", exif=b"Exif\x00\x00" + tiff + comment)
    found = read(jpeg.getvalue())
    assert (found["parameters"], found["row"], found["format"], found["width"]) == (text, None, "JPEG", 64)


def with_xmp(packet: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, "WEBP", xmp=packet.encode())
    return file.getvalue()


@pytest.mark.parametrize(
    "description",
    [
        f'<r:Description r:about="" xmlns:i="{IPTC}" i:DigitalSourceType="{PAINTED}"/>',
        f'<r:Description r:about="" xmlns:i="{IPTC}"><i:DigitalSourceType r:resource="{PAINTED}"/></r:Description>',
    ],
)
def test_other_tools_spellings_of_the_mark_are_read(description: str) -> None:
    found = read(with_xmp(f'<r:RDF xmlns:r="http://www.w3.org/1999/02/22-rdf-syntax-ns#">{description}</r:RDF>'))
    assert found["digital_source_type"] == PAINTED


def test_a_file_that_says_nothing_says_nothing() -> None:
    assert not any(value for name, value in read(encode(PIXELS).data).items() if name not in ("format", "width", "height"))


def huge_png() -> bytes:
    data = bytearray(encode(np.zeros((1, 1, 3), np.uint8)).data)
    data[16:24] = struct.pack(">II", 30_000, 30_000)
    data[29:33] = struct.pack(">I", __import__("zlib").crc32(bytes(data[12:29])))
    return bytes(data)


@pytest.mark.parametrize("xmp", ['<!DOCTYPE a [<!ENTITY b "ha"><!ENTITY c "&b;&b;&b;">]><a>&c;</a>', "<a><b></a>"])
def test_xmp_that_cannot_be_read_hides_nothing_else(xmp: str) -> None:
    found = read(with_xmp(xmp))
    assert (found["format"], found["digital_source_type"]) == ("WEBP", None)


def test_a_comment_in_the_other_byte_order_is_read() -> None:
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\x00" + "a red circle\nSteps: 20".encode("utf_16_le")
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG", exif=exif)
    assert read(file.getvalue())["parameters"] == "a red circle\nSteps: 20"


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"not an image", "is no image file of a kind that is read here"),
        (file_of()[:-30], "cannot be read"),
        (huge_png(), "cannot be read|limit"),
        (jxl.SIGNATURE + struct.pack(">I", 30) + b"Exif" + b"\x00" * 4 + b"no TIFF structure!", "cannot be read"),
    ],
)
def test_what_cannot_be_read_is_one_message(data: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=message):
        read(data)
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(InvalidJob, match=message):
        read_file(tmp_path / "file")


def test_a_row_that_is_no_json_is_shown_as_it_is_and_one_without_end_is_refused() -> None:
    def png(row: str) -> bytes:
        texts, file = PngImagePlugin.PngInfo(), io.BytesIO()
        texts.add_itxt("renderfarm", row)
        Image.fromarray(PIXELS).save(file, "PNG", pnginfo=texts)
        return file.getvalue()

    assert read(png("{half"))["row"] == "{half"
    with pytest.raises(InvalidInput, match="cannot be read"):
        read(png("[" * 200_000))


def test_a_file_that_no_dataset_holds_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    with path.open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(InvalidJob, match="larger than 256 MiB"):
        read_file(path)
