"""What an image file says of itself: written from its row of the table, and read back.

    PNG                     text chunks: parameters, renderfarm, XML:com.adobe.xmp
    JPEG, WebP, AVIF, JXL   EXIF UserComment: parameters; XMP: the mark of a model's picture, renderfarm:row

`parameters` is A1111's text, `renderfarm` (or `renderfarm:row`) our own JSON. Everything comes from the row, so that the same
row gives the same bytes.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from PIL import Image, UnidentifiedImageError

from renderfarm import jxl, signing
from renderfarm.config import Metadata
from renderfarm.errors import InvalidInput, InvalidJob
from renderfarm.pictures import MAX_PIXELS
from renderfarm.samplers import SAMPLERS

PARAMETERS, ROW, XMP = "parameters", "renderfarm", "XML:com.adobe.xmp"
FORMATS = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp", "AVIF": "image/avif"}

# https://cv.iptc.org/newscodes/digitalsourcetype/ : the second is for inpainting, where part of the picture was given
PAINTED = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
PAINTED_INTO = "http://cv.iptc.org/newscodes/digitalsourcetype/compositeWithTrainedAlgorithmicMedia"

_IPTC, _OURS = "http://iptc.org/std/Iptc4xmpExt/2008-02-29/", "urn:renderfarm:1/"
_RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
_PACKET = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="{rdf}">'
    '<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="{iptc}" xmlns:renderfarm="{ours}">{properties}</rdf:Description>'
    '</rdf:RDF></x:xmpmeta><?xpacket end="r"?>'
)
# Properties of the packet, the most important first, and what `read` calls them
_SOURCE, _PROMPTS, _ROW = "Iptc4xmpExt:DigitalSourceType", "Iptc4xmpExt:AIPromptInformation", "renderfarm:row"
_READ = {
    _SOURCE: "digital_source_type",
    "Iptc4xmpExt:AISystemUsed": "ai_system",
    "Iptc4xmpExt:AISystemVersionUsed": "ai_system_version",
    _PROMPTS: "ai_prompt",
    _ROW: "row",
}

# Columns that say something of the file, which it cannot hold, or shows by itself
_OF_FILES = {
    *("file_name", "format", "encoder", "bytes", "file_sha256", "file_height", "file_width"),
    *("original_file", "original_bytes", "original_file_sha256"),
}
_TEXTS = {
    *("prompt", "prompt_2", "prompt_3", "negative_prompt", "negative_prompt_2", "negative_prompt_3"),
    *("prompt_cut_off", "negative_prompt_cut_off"),
}

_EXIF_IFD, _USER_COMMENT = 0x8769, 0x9286


@dataclass(frozen=True)
class Marks:
    """What goes into one file. `source_type`: IPTC's, for whoever signs the file; `provenance`: XMP properties in the order of
    their weight."""

    parameters: str | None = None
    row: str | None = None
    provenance: Mapping[str, str] = field(default_factory=dict)
    source_type: str = PAINTED

    def of_its_origin(self) -> Marks:
        """Only who painted it: for the same picture in another state."""
        return replace(self, parameters=None, row=None)

    def texts(self) -> list[tuple[str, str]]:
        """Keys and texts of PNG's chunks."""
        found = {PARAMETERS: self.parameters, ROW: self.row, XMP: _packet(self.provenance.items())}
        return [(key, text) for key, text in found.items() if text]

    def exif(self, limit: int | None = None) -> bytes:
        """`Exif`, and a TIFF structure with the parameters as UserComment; nothing where there are none, or they do not fit."""
        if self.parameters is None:
            return b""
        exif = Image.Exif()
        # as A1111 writes it: big-endian whatever the structure around it
        exif.get_ifd(_EXIF_IFD)[_USER_COMMENT] = b"UNICODE\x00" + self.parameters.encode("utf_16_be")
        data = exif.tobytes()
        return data if limit is None or len(data) <= limit else b""

    def xmp(self, limit: int | None = None) -> bytes:
        """The packet, with our JSON in it. Where it is limited, without the last properties that do not fit."""
        properties = list(self.provenance.items())
        if self.row is not None:  # before the prompts, which it holds, too
            properties.insert(len(properties) - (_PROMPTS in self.provenance), (_ROW, self.row))
        while limit is not None and len(_packet(properties).encode()) > limit:
            properties.pop()
        return _packet(properties).encode()


def marks(record: Mapping[str, Any], wanted: Metadata) -> Marks:
    """What a file says that shows the picture of a row of the image table."""
    source_type = PAINTED_INTO if record.get("init_mask_image_sha256") is not None else PAINTED
    return Marks(
        parameters=_parameters(record, prompts=wanted.prompts) if wanted.parameters else None,
        row=_row(record, prompts=wanted.prompts) if wanted.row else None,
        provenance=_provenance(record, source_type, prompts=wanted.prompts) if wanted.provenance else {},
        source_type=source_type,
    )


def _parameters(record: Mapping[str, Any], *, prompts: bool) -> str:
    """A1111's text: the prompt, `Negative prompt: …`, and a line of `Name: value` with commas."""
    sampler = SAMPLERS[record["sampler"]]
    found = {
        "Steps": record["num_inference_steps"],
        "Sampler": sampler.a1111 or sampler.name,
        # A1111 without one takes the sampler's own, which for some is Karras'
        "Schedule type": None if sampler.a1111 is None else "Karras" if sampler.overrides.get("use_karras_sigmas") else "Uniform",
        "CFG scale": record["guidance_scale"],
        "Seed": record["seed"],
        "Size": f"{record['width']}x{record['height']}",
        "Model": record["model"],
        "Variation seed": record.get("seed_b"),
        "Variation seed strength": record.get("blend"),
        "Denoising strength": record.get("strength"),
    }
    last = ", ".join(f"{name}: {_value(value)}" for name, value in found.items() if value is not None)
    return "\n".join([*(_prompt_lines(record) if prompts else ()), last])


def _value(value: Any) -> str:
    """Quoted as JSON where it holds what separates values."""
    text = repr(value).removesuffix(".0") if isinstance(value, float) else str(value)
    return json.dumps(text, ensure_ascii=False) if re.search(r'[,:\n"]', text) else text


def _prompt_lines(record: Mapping[str, Any]) -> list[str]:
    negative = record.get("negative_prompt")
    return [record["prompt"], *([f"Negative prompt: {negative}"] if negative else [])]


def _row(record: Mapping[str, Any], *, prompts: bool) -> str:
    left_out = _OF_FILES if prompts else _OF_FILES | _TEXTS
    said = {name: value for name, value in record.items() if value is not None and name not in left_out}
    return json.dumps(said, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def _provenance(record: Mapping[str, Any], source_type: str, *, prompts: bool) -> dict[str, str]:
    found = {_SOURCE: source_type, "Iptc4xmpExt:AISystemUsed": record["model"]}
    if record.get("model_revision"):
        found["Iptc4xmpExt:AISystemVersionUsed"] = record["model_revision"]
    return found | ({_PROMPTS: "\n".join(_prompt_lines(record))} if prompts else {})


# what XML 1.0 cannot hold, in whatever spelling
_NOT_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")


def _packet(properties: Iterable[tuple[str, str]]) -> str:
    """An XMP packet; empty where there is nothing to say."""
    written = "".join(f"<{name}>{_xml(name, text)}</{name}>" for name, text in properties)
    return _PACKET.format(rdf=_RDF, iptc=_IPTC, ours=_OURS, properties=written) if written else ""


def _xml(name: str, text: str) -> str:
    # JSON has another spelling for such a character; of a prompt, the row has the true text
    legal = _NOT_XML.sub(lambda sign: f"\\u{ord(sign[0]):04x}" if name == _ROW else "\ufffd", text)
    return escape(legal, {"\r": "&#13;"})  # which readers of XML would take for \n


# ---------------------------------------------------------------------------------------------- read back


SAYS = (PARAMETERS, *_READ.values(), "c2pa")
MAX_BYTES = 256 << 20


def read_file(path: Path) -> dict[str, Any]:
    """As `read`. Raises InvalidJob where that cannot be said."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise InvalidJob(f"{path}: larger than {MAX_BYTES >> 20} MiB, which no picture of a dataset is")
        return read(path.read_bytes())
    except OSError as error:
        raise InvalidJob(f"{path}: cannot be read: {error.strerror}; give an image file that you may read") from None
    except InvalidInput as error:
        raise InvalidJob(f"{path}: {error}") from None


def read(data: bytes) -> dict[str, Any]:
    """What an image file says of itself, ours or somebody else's; None for what it does not say. Nothing in it is trusted.

    Keys: format, width, height (null for JPEG XL, whose pixels are not opened for it), parameters, row, digital_source_type,
    ai_system, ai_system_version, ai_prompt, c2pa. Raises InvalidInput for what is no image file that can be read.
    """
    try:
        found = _from_boxes(data) if jxl.is_jxl(data) else _from_pillow(data)
        said = dict[str, Any](dict.fromkeys(_READ.values())) | _from_xmp(found.pop("xmp"))
        said["row"] = _json(found.pop("row", None) or said["row"])
    except InvalidInput:
        raise
    except UnidentifiedImageError:
        raise InvalidInput(f"is no image file of a kind that is read here ({', '.join(FORMATS)}, JXL)") from None
    except Exception as error:  # damaged files, and damaged EXIF and XML in them, raise many kinds
        raise InvalidInput(f"cannot be read ({error}); it may be cut off or damaged") from None
    mime = FORMATS.get(found["format"], "image/jxl")
    return {**found, **said, "c2pa": signing.signature(data, mime)}


def _from_pillow(data: bytes) -> dict[str, Any]:
    with Image.open(io.BytesIO(data), formats=tuple(FORMATS)) as image:
        found: dict[str, Any] = {"format": image.format, "width": image.width, "height": image.height}
        if image.width * image.height > MAX_PIXELS:
            raise InvalidInput(f"has {image.width}×{image.height} pixels; the limit is {MAX_PIXELS:,} in all")
        if image.format == "PNG":
            image.load()  # texts may stand behind the pixels
        texts = {key: str(text) for key, text in image.info.items() if key in (PARAMETERS, ROW) and isinstance(text, str)}
        parameters = texts.get(PARAMETERS) or _user_comment(image.getexif())
        return {**found, "parameters": parameters, "row": texts.get(ROW), "xmp": image.info.get("xmp")}


def _from_boxes(data: bytes) -> dict[str, Any]:
    boxes = dict(jxl.boxes(data))
    exif = Image.Exif()
    if content := boxes.get(b"Exif"):
        exif.load(b"Exif\x00\x00" + content[4 + int.from_bytes(content[:4], "big") :])
    return {"format": "JXL", "width": None, "height": None, "parameters": _user_comment(exif), "xmp": boxes.get(b"xml ")}


def _user_comment(exif: Image.Exif) -> str | None:
    comment = exif.get_ifd(_EXIF_IFD).get(_USER_COMMENT)
    if not isinstance(comment, bytes):
        return comment
    code, text = comment[:8], comment[8:]
    if code != b"UNICODE\x00":
        return text.decode("utf-8", errors="replace").strip("\x00") or None
    # A1111 writes big-endian, others the file's own order; in the wrong one, plain letters become rare signs
    readings = [text.decode(order, errors="replace").strip("\x00") for order in ("utf_16_be", "utf_16_le")]
    return max(readings, key=lambda read: sum(sign < "\u0250" for sign in read)) or None


def _from_xmp(packet: bytes | None) -> dict[str, str]:
    """Properties of a packet, whether they are written as elements or as attributes."""
    if not packet:
        return {}
    from defusedxml import DefusedXmlException, ElementTree

    try:
        elements = [*ElementTree.fromstring(packet.rstrip(b"\x00")).iter()]
    except (ElementTree.ParseError, DefusedXmlException):  # somebody else's; what the file says otherwise can be read
        return {}
    full = {name.replace("Iptc4xmpExt:", f"{{{_IPTC}}}").replace("renderfarm:", f"{{{_OURS}}}"): key for name, key in _READ.items()}
    found = dict[str, str]()
    for element in elements:
        said = {element.tag: element.get(f"{{{_RDF}}}resource") or element.text, **element.attrib}
        found |= {full[name]: text for name, text in said.items() if name in full and text}
    return found


def _json(text: str | None) -> Any:
    """A row as it was written; a text that is no JSON as it is."""
    try:
        return text and json.loads(text)
    except ValueError:
        return text
