"""`renderfarm init`: job files to begin with, each of which runs as it is."""

from __future__ import annotations

import json
import os
import re
from importlib.resources import files
from pathlib import Path

from renderfarm.config import Job
from renderfarm.errors import InvalidJob

TEMPLATES = ("t2i", "sweep", "dataset", "img2img")
SCHEMA, PICTURE = "job.schema.json", "starter.png"


def write_starter(template: str, file: Path) -> list[Path]:
    """Write a job file, and beside it what it needs that is not there: the schema for editors, a picture to begin with.

    Returns what was written. Raises InvalidJob where the file exists, or cannot be written.
    """
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", file.stem).strip("-._") or "job"
    text = files(__name__).joinpath(f"{template}.yaml").read_text(encoding="utf-8")
    text = text.replace("NAME", name[:100]).replace("FILE", os.path.relpath(file))
    beside = {SCHEMA: (json.dumps(Job.model_json_schema(), ensure_ascii=False, indent=1) + "\n").encode()}
    if template == "img2img":
        beside[PICTURE] = _picture()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("x", encoding="utf-8") as opened:
            opened.write(text)
        written = [file]
        for other, data in beside.items():
            if not (place := file.with_name(other)).exists():
                place.write_bytes(data)
                written.append(place)
    except OSError as error:
        if file.exists():
            raise InvalidJob(
                f"{file} exists, and is left as it is; name another file: renderfarm init --template {template} FILE"
            ) from None
        raise InvalidJob(f"{file}: cannot be written: {error.strerror}; choose a folder that you may write") from None
    return written


def _picture() -> bytes:
    """A red circle on white, 64×64."""
    import io

    from PIL import Image, ImageDraw

    picture, buffer = Image.new("RGB", (64, 64), "white"), io.BytesIO()
    ImageDraw.Draw(picture).ellipse((14, 14, 50, 50), fill=(220, 30, 30))
    picture.save(buffer, "PNG")
    return buffer.getvalue()
