"""A contact sheet: one PNG that makes an output visible at a glance."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from renderfarm.encode import UNDECODABLE
from renderfarm.reading import Output
from renderfarm.report.gone import left_out

KEY = "_renderfarm/report/contact_sheet.png"
CELL_PX, CAPTION_PX, GAP_PX, COLUMNS = 128, 34, 8, 6


def _prompt(record: dict[str, Any]) -> str:
    return str(record["prompt"])


def write_contact_sheet(output: Output, limit: int = 36, caption: Callable[[dict[str, Any]], str] = _prompt) -> str | None:
    """Put a sheet of up to `limit` images, spread over the output, at KEY. None if there is no image."""
    cells = []
    for sample in output.spread(limit):
        with left_out(*UNDECODABLE):
            cells.append((sample.image().convert("RGB"), caption(sample.record)))
    if not cells:
        return None
    buffer = io.BytesIO()
    _draw(cells).save(buffer, "PNG")
    output.store.put(KEY, buffer.getvalue())
    return f"{output.store.url}/{KEY}"


def _draw(cells: list[tuple[Image.Image, str]]) -> Image.Image:
    columns = min(COLUMNS, len(cells))
    rows = -(-len(cells) // columns)
    wide, high = CELL_PX + GAP_PX, CELL_PX + CAPTION_PX + GAP_PX
    sheet = Image.new("RGB", (columns * wide + GAP_PX, rows * high + GAP_PX), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
    for index, (image, prompt) in enumerate(cells):
        x, y = GAP_PX + index % columns * wide, GAP_PX + index // columns * high
        small = image
        scale = CELL_PX / max(small.size)
        size = (max(1, round(small.width * scale)), max(1, round(small.height * scale)))
        small = small.resize(size, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST)
        sheet.paste(small, (x + (CELL_PX - size[0]) // 2, y + (CELL_PX - size[1]) // 2))
        lines = textwrap.wrap(prompt, 25, max_lines=3, placeholder=" …")
        pen.multiline_text((x, y + CELL_PX + 2), "\n".join(lines), fill="black", font=font, spacing=1)
    return sheet
