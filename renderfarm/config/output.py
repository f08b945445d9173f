"""What is written: format, marks, signature, card, layout."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from renderfarm.config.base import Strict, is_path

# What each format takes, and its defaults. WebP's are those of its lossless kind; the other has LOSSY_WEBP.
ENCODINGS: dict[str, dict[str, Any]] = {
    "png": {"lossless": True, "compression_level": 1},  # level 1: a third of Pillow's own level's time for 7 % more bytes
    "webp": {"lossless": True},
    "jpeg": {"lossless": False, "quality": 95, "subsampling": "4:4:4"},
    "avif": {"lossless": False, "quality": 75, "subsampling": "4:2:0"},  # Pillow's own
    "jxl": {"lossless": True},
}


LOSSY_WEBP: dict[str, Any] = {"lossless": False, "quality": 90}


class Encoding(Strict):
    """How pictures are written in `output.format`. None: the format's own default."""

    lossless: bool | None = None
    """For webp: true, or with a quality false. PNG and JPEG XL are always lossless, JPEG and AVIF never."""
    quality: Annotated[int, Field(ge=1, le=100)] | None = None
    """jpeg: 95. avif: 75. webp that is not lossless: 90."""
    compression_level: Annotated[int, Field(ge=0, le=9)] | None = None
    """png: 1. 9 takes seven times as long and saves a twelfth of the bytes."""
    subsampling: Literal["4:4:4", "4:2:2", "4:2:0"] | None = None
    """Of colours. jpeg: 4:4:4, none of it. avif: 4:2:0."""

    def settled(self, format_: str) -> Encoding:
        """Every setting that the format takes, with its defaults. Raises ValueError for what it does not take."""
        defaults = ENCODINGS[format_]
        if format_ == "webp" and (self.lossless is False or (self.lossless is None and self.quality is not None)):
            defaults = LOSSY_WEBP
        given = self.model_dump(exclude_none=True)
        for name in given.keys() - defaults.keys():
            why = "lossless WebP" if defaults is ENCODINGS["webp"] else format_
            raise ValueError(f"encoding.{name}: {why} has none; it takes {', '.join(defaults)}")
        if given.get("lossless", defaults["lossless"]) != defaults["lossless"]:
            always, others = ("always", "webp, jpeg or avif") if defaults["lossless"] else ("never", "png, webp or jxl")
            raise ValueError(f"encoding.lossless: {format_} is {always} lossless; leave it out, or use format {others}")
        return Encoding(**{**defaults, **given})


class Metadata(Strict):
    """What each image file says of itself."""

    provenance: bool = True
    """That a model painted it, and which one, for machines to read: IPTC's digital source type, in an XMP packet."""
    parameters: bool = True
    """A1111's text: prompts, steps, sampler, seed, so that its users' tools read the file. Where A1111 has it."""
    row: bool = True
    """JSON: the row's identity and every argument, with the hashes of profile and pixels."""
    prompts: bool = True
    """Whether any of these hold the prompts, which may be personal data. The tables hold them in any case."""


class C2pa(Strict):
    """Content Credentials: each file is signed when it is finished; originals are not. Needs renderfarm[c2pa]. Each signature is
    another one, so files of the same pixels differ."""

    certificate: Annotated[str, Field(min_length=1)]
    """PEM file on every worker: the signing certificate first, then those up to its root; relative to the job file."""
    private_key: Annotated[str, Field(min_length=1)]
    """PEM file on every worker, relative to the job file; `${C2PA_KEY}` keeps its place out of the job."""
    algorithm: Literal["es256", "es384", "es512", "ps256", "ps384", "ps512", "ed25519"] = "es256"
    """That of the key."""

    @field_validator("certificate", "private_key")
    @classmethod
    def _is_a_path(cls, value: str) -> str:
        if not is_path(value):
            raise ValueError("give the path of a PEM file; a job file is no place for the key itself: it is copied and shown")
        return value


Line = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029]*$")]
"""Text in one line."""


class Card(Strict):
    """What `README.md` says of the dataset, to people and to the Hub's search, beside the figures. May change from run to run."""

    pretty_name: Line | None = None
    """Its title. None: the job's name."""
    description: Annotated[str, Field(min_length=1, max_length=20_000, pattern=r"^[^\x00-\x08\x0b-\x1f\x7f]*$")] | None = None
    """Plain text, shown as it is written; an empty line begins a paragraph."""
    license: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.+-]{0,99}$")] | None = None
    """Of the dataset, by the Hub's name: `cc-by-4.0`, `apache-2.0`, `openrail++`, or `other`, which needs the next two."""
    license_name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.+-]{0,99}$")] | None = None
    """For license other: `my-license-1.0`."""
    license_link: Annotated[str, Field(pattern=r"^(https?://[^\s\x00-\x1f]+|LICENSE(\.md|\.txt)?)$", max_length=2000)] | None = None
    """For license other: a URL, or `LICENSE`, a file that you put beside the card."""
    language: tuple[Annotated[str, Field(pattern=r"^[a-z]{2,3}(-[A-Za-z0-9]{2,8})*$")], ...] = ()
    """Of the prompts, as ISO 639 has it: `[en, de]`. In YAML write Norwegian as `"no"`."""
    tags: tuple[Line, ...] = ()
    """`[logos, texture]`, beside `renderfarm` and `synthetic`."""

    @model_validator(mode="after")
    def _another_license_is_named(self) -> Card:
        named = [name for name in ("license_name", "license_link") if getattr(self, name)]
        if self.license == "other" and len(named) < 2:
            raise ValueError("card.license: other says nothing by itself; give license_name and license_link, too")
        if self.license != "other" and named:
            raise ValueError(f"card.{named[0]}: the Hub takes it with license other only; leave it out, or give license: other")
        return self


class Output(Strict):
    path: Annotated[str, Field(min_length=1)]
    """Folder or URL of the dataset; relative to the job file. `{{ ds }}` becomes the logical date."""
    layout: Literal["files", "parquet", "webdataset"] = "files"
    """files: one folder per part, images beside a metadata.parquet (Hugging Face imagefolder). parquet: one file per part, images in
    it (Hugging Face's column `image`). webdataset: one tar per part, each image beside its row as JSON, and the tables in `metadata`.
    The last two keep a part's images in memory and TMPDIR until it is committed."""
    format: Literal["png", "webp", "jpeg", "avif", "jxl"] = "png"
    """Of the image files. jxl (JPEG XL, lossless) needs renderfarm[codecs]."""
    encoding: Encoding = Encoding()
    """`{quality: 90}`. What a format does not take is refused."""
    metadata: Metadata = Metadata()
    """What is written into each file beside its pixels: `{prompts: false}`."""
    c2pa: C2pa | None = None
    """Sign each file: `{certificate: ./chain.pem, private_key: "${C2PA_KEY}"}`. None: not signed."""
    part_rows: Annotated[int, Field(ge=1, le=100_000)] | Literal["auto"] = "auto"
    """Manifest rows per part (the unit of commit). auto: about half a minute of rendering, measured once by the first worker."""
    single_writer: bool = False
    """Write to a store that has no create-if-absent. Only where nothing else ever writes to this output at the same time: two runs
    would overwrite each other's parts, and nobody would notice."""
    keep_originals: bool = False
    """Keep each picture as it was before the steps of `after`, too: a PNG in `originals/`, which the table names."""

    card: Card = Card()
    """What the dataset card says beside the figures: `{license: cc-by-4.0, language: [en], description: Drawn shapes.}`."""

    @model_validator(mode="after")
    def _format_takes_it(self) -> Output:
        self.encoding.settled(self.format)
        return self
