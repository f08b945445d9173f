"""The report: one HTML file that shows an output in any browser, without a server and without a request to anybody.

What it shows is data in `<script type="application/json">`, whose `<` is escaped; the page's own script makes text of it, never markup. A
Content-Security-Policy allows that script and that style by their hashes, the thumbnails that are in the file, and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shlex
from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from renderfarm import commit
from renderfarm.errors import InvalidJob
from renderfarm.reading import Output
from renderfarm.report import contents
from renderfarm.report.gallery import Bounds, Gallery, Say, gallery
from renderfarm.shown import Shown

KEY = "_renderfarm/report/report.html"
AT_THE_END = Bounds(images=1_000, seconds=20.0)  # of a run
IN_A_HURRY = Bounds(images=1_000, seconds=3.0)  # somebody waits for the run to end
SCRIPTS = (
    *("data.js", "elements.js", "thumbnails.js", "choice.js", "filters.js", "gallery.js", "grid.js", "detail.js"),
    *("failures.js", "timeline.js", "facts.js", "main.js"),
)
_ESCAPED = str.maketrans({sign: f"\\u{ord(sign):04x}" for sign in "<>&\u2028\u2029"})


@dataclass(frozen=True)
class WrittenReport(Shown):
    """`place`: the file's path or URL. `images` of the output's `of` are in it, `thumbnails` of them with a picture. `bytes`: its size.
    `unread_parts`: of which no image is in it, since their tables are gone or damaged."""

    place: str
    images: int
    of: int
    thumbnails: int
    bytes: int
    unread_parts: int = 0


def write_report(output: Output, bounds: Bounds, file: Path | None = None, say: Say = lambda text: None) -> WrittenReport:
    """Write the report into the output, or as a local `file`. Raises InvalidJob where the file cannot be written."""
    say("reading the output")
    entries = commit.index_entries(output.store)
    found = gallery(output, entries, bounds, say)
    summary = contents.summary(output, entries)
    data = {
        "summary": summary | {"version": metadata.version("renderfarm"), "command": f"renderfarm inspect {shlex.quote(output.store.url)}"},
        "runs": contents.runs(output),
        "timeline": contents.timeline(output, entries),
        "failures": contents.failures(output),
        "pictures": found.pictures | {"folder": _folder(output, file)},
    }
    page = render(data, found).encode()
    if file is None:
        output.store.put(KEY, page)
    else:
        try:
            file.write_bytes(page)
        except OSError as error:
            raise InvalidJob(f"{file}: cannot be written: {error.strerror or error}") from None
    place = f"{output.store.url}/{KEY}" if file is None else str(file)
    return WrittenReport(place, found.images, summary["images"], found.thumbnails, len(page), found.unread_parts)


def render(data: dict[str, Any], found: Gallery) -> str:
    style, script = _asset("report.css"), "\n".join(["'use strict';", *map(_asset, SCRIPTS)])
    policy = f"default-src 'none'; img-src blob:; style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'; form-action 'none'"
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    return environment.from_string(_asset("report.html")).render(
        title=data["summary"]["name"] or "renderfarm",
        policy=policy,
        style=Markup(style),  # noqa: S704 - our own file
        script=Markup(script),  # noqa: S704 - our own files
        data=_json(data),
        sheets=found.sheets,
    )


def _json(value: Any) -> Markup:
    """JSON that ends no element and begins no comment, whatever texts are in it."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    # a lone surrogate, which UTF-8 cannot hold, becomes what readers show for it
    return Markup(text.translate(_ESCAPED).encode(errors="replace").decode())  # noqa: S704


def _asset(name: str) -> str:
    return (resources.files("renderfarm.report") / "page" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _folder(output: Output, file: Path | None) -> str | None:
    """Where the output lies from the report: what a link to a picture's file begins with. None where there are none."""
    if output.job["output"]["layout"] != "files":
        return None
    if file is None:
        return "../../"
    return None if "://" in output.store.url else os.path.relpath(output.store.url, file.absolute().parent) + "/"
