"""An output in a notebook: some of its pictures, small, with their prompts. Bounded, since notebooks are kept with all that they show."""

from __future__ import annotations

import html
import io

from PIL import Image

from renderfarm import commit
from renderfarm.errors import RenderfarmError
from renderfarm.outage import ASKED_S
from renderfarm.reading import Output, StoredSample
from renderfarm.report.gallery import thumbnail
from renderfarm.shown import picture_of

IMAGES, SIDE_PX = 24, 128
MOST_BYTES = 400_000  # of pictures
CAPTION_SIGNS = 120

_GRID = "display: flex; flex-wrap: wrap; gap: 8px"
_CELL = f"width: {SIDE_PX}px; margin: 0; font-size: 11px; line-height: 1.3; overflow-wrap: anywhere"


def sheet(url: str) -> str:
    """HTML of up to IMAGES pictures, spread over an output. Whoever shows it cannot handle an error: what goes wrong is said in it."""
    try:
        output = Output(url, patience_s=ASKED_S)
        counts = commit.counts(commit.index_entries(output.store))
        said = f"{url}: {counts.images:,} images, {counts.errors:,} errors"
        cells, left = [], MOST_BYTES
        for sample in output.spread(IMAGES):
            picture = _picture(sample)
            left -= len(picture)
            if left < 0:
                break
            cells.append(_cell(sample, picture))
    except RenderfarmError as error:
        return f"<p>{html.escape(url)}: {html.escape(str(error))}</p>"
    return f'<p>{html.escape(said)}</p><div style="{_GRID}">{"".join(cells)}</div>'


def small_sheet(png: bytes) -> str:
    """A contact sheet as HTML, as much smaller as it takes to stay below MOST_BYTES."""
    with Image.open(io.BytesIO(png)) as opened:
        picture = opened.convert("RGB")
    while True:
        file = io.BytesIO()
        picture.save(file, "WEBP", quality=80, method=2)
        if len(file.getvalue()) <= MOST_BYTES:
            return picture_of(file.getvalue(), "image/webp", "contact sheet")
        picture = picture.resize((max(1, picture.width * 2 // 3), max(1, picture.height * 2 // 3)), Image.Resampling.LANCZOS)


def _picture(sample: StoredSample) -> bytes:
    """A WebP file; nothing for a picture that is gone or damaged."""
    small, file = thumbnail(sample, SIDE_PX, None), io.BytesIO()
    if small is None:
        return b""
    small.save(file, "WEBP", quality=80, method=2)
    return file.getvalue()


def _cell(sample: StoredSample, picture: bytes) -> str:
    record = sample.record
    prompt = str(record["prompt"])
    shown = prompt if len(prompt) <= CAPTION_SIGNS else f"{prompt[:CAPTION_SIGNS]}…"
    about = f"row {record['row']}, image {record['image_index']}"
    drawn = picture_of(picture, "image/webp", about, "width: 100%") if picture else "(cannot be read)"
    return f'<figure style="{_CELL}">{drawn}<figcaption>{html.escape(shown)}</figcaption></figure>'
