"""The dataset card: OUT/README.md, which makes `load_dataset(OUT)` work and says what the dataset is."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import yaml
from jinja2 import Environment

from renderfarm.commit import read_json, to_json
from renderfarm.config import Card
from renderfarm.encode import FORMATS
from renderfarm.errors import Fatal
from renderfarm.layouts import webdataset
from renderfarm.report import readers
from renderfarm.report.figures import KINDS_SHOWN, Figures
from renderfarm.storage import Store

KEY = "README.md"
GIVEN = "_renderfarm/card.json"
"""What the job says of the dataset, and what its model warns of, for whoever writes another card of it."""
DATA_FILES = {"files": "data/**", "parquet": "data/*.parquet", "webdataset": "data/*.tar"}
_TEMPLATE = """\
---
{{ metadata }}---
# {{ title|text }}

{% for paragraph in description %}
{{ paragraph|text }}

{% endfor %}
Images rendered by renderfarm from a table of prompts. {% if exported %}Exported from an output that was \
{{ "" if finished else "not " }}finished:{% elif finished %}Finished:{% else %}Not finished; what is here is
committed and complete in itself. When this card was written:{% endif %} {{ images|count }} images, {{ errors|count }} errors, \
{{ rows|count }} manifest rows.

| | |
|---|---|
| model | {{ model|text }}{% if revision %} at {{ revision|text }}{% endif %} |
{% if adapters %}| adapters | {{ adapters|join(", ")|text }} |
{% endif %}
| layout, format | {{ layout }}, {{ format }} |
| job seed | {{ seed }} |
{% if after %}| done to each picture | {{ after }}; `width`, `height`: as it was rendered; `file_width`, `file_height`: as it is here |
{% endif %}
{% if originals %}| originals | the pictures before that: `originals/`, named by `original_file` |
{% endif %}
{% if weighted %}| prompts | with weights, as users of A1111 write them: `(word:1.3)` |
{% endif %}
{% if figures %}
{% if images %}| size of the image files | {{ figures.bytes|count }} bytes |
{% endif %}
{% if figures.error_classes %}| errors | {{ figures.error_classes|kinds }} |
{% endif %}
{% for name, counts in figures.kinds.items() %}| {{ name }}{{ part_of }} | {{ counts|kinds }} |
{% endfor %}
{% if figures.truncated %}| prompts of which the model saw a part{{ part_of }} | {{ figures.truncated|count }}: `prompt_cut_off` |
{% endif %}
{% if figures.profile %}| render profile | `{{ figures.profile.sha256 }}`\
{% if figures.profiles > 1 %}, and {{ figures.profiles - 1 }} more{% endif %} |
| rendered with | {{ machine|text }} |
{% endif %}
{% endif %}
{% for warning in warnings %}| warning | {{ warning|text }} |
{% endfor %}
{% if sheet %}

![Contact sheet: some of the images, each with its prompt]({{ sheet }})
{% endif %}

## Open it

Each row's place in the manifest is in `row`; readers may give the rows in another order.
{% if layout == "files" %}
A row's picture is the file `file_name` beside its table, which `table_file` below names.
{% elif layout == "parquet" %}
The pictures' files are in the tables: `image` has their `bytes`, and their names (`path`). Name the columns that you need,
and pictures that you do not need are not read.
{% else %}
Each picture lies in a tar, with its row as JSON beside it: there dates are text, bytes are base64, and NaN is null. The tables in
`metadata/` have the same rows with their own types; `file_name` is the picture's name in that tar of `data/` which is named as
the table is, and `table_file` below names the table.
{% endif %}
{{ readers }}
## What it holds

- `pixel_sha256`: the SHA-256 of the image's raw RGB bytes (row-major, H×W×3, uint8) before it was encoded; \
{% if lossless %}its file decodes to them.{% else %}{{ format }} keeps less of them.{% endif %} `file_sha256`: that of the file.
{% if exported %}
- Rows that could not be rendered are not in here.{% if originals %} `original_file` names a picture of the output that this was exported \
from.{% endif %}

{% else %}
- `errors/`: the rows that could not be rendered, each with its `error_class` and `error_message`; of what was rendered again (`.r1`), the \
last one counts, and an image more than any. `_renderfarm/` is renderfarm's own.
{% endif %}
{% if says %}
- Each file says of itself: {{ says|join("; ") }}.
{% endif %}

{% if not exported %}
Check every file, and render some images again, bit for bit:

```sh
renderfarm verify {{ out|shell }}
```

{% endif %}
{% if not (exported and images_given) %}
The tables are a manifest again: they hold each image's prompt, seed and settings. A job that is otherwise the same renders the same
pixels from them; one with another model, its own pictures of the same prompts.

```yaml
manifest:
  path: {{ tables|py }}
  columns: renderfarm
{% if images_given %}
inputs:
  folder: {{ (out ~ "/_renderfarm/inputs")|py }}
{% endif %}
```
{% endif %}
"""


def write_card(
    store: Store,
    frozen: dict[str, Any],
    *,
    name: str,
    rows: int,
    images: int,
    errors: int,
    finished: bool,
    sheet: str | None,
    columns: pa.Schema,
    warnings: Sequence[str] = (),
    card: Card | None = None,
    figures: Figures | None = None,
    exported: str | None = None,
) -> None:
    """Write or refresh the card. `frozen` is job.json's value, `columns` those of the image table, `card` what the job says. `exported`:
    where readers find what the store holds, if that is an export, whose layout `frozen` says: its own place, or
    hf://datasets/org/name."""
    card = card or Card()
    # Markdown, not HTML: every value is a number, one of ours, or quoted by a filter
    environment = Environment(autoescape=False, trim_blocks=True, keep_trailing_newline=True)  # noqa: S701
    environment.filters |= {
        "py": lambda text: json.dumps(text, ensure_ascii=False),
        "shell": shlex.quote,
        "text": _text,
        "count": lambda number: f"{number:,}",
        "kinds": _kinds,
    }
    output = frozen["output"]
    layout, format_, out = output["layout"], output["format"], exported or store.url
    counted = figures.counted if figures else images
    text = environment.from_string(_TEMPLATE).render(
        metadata=yaml.safe_dump(_metadata(frozen, card, name, images, columns), sort_keys=False, allow_unicode=True, width=1 << 30),
        title=card.pretty_name or name,
        description=re.split(r"\n\s*\n", card.description.strip()) if card.description else (),
        rows=rows,
        images=images,
        errors=errors,
        finished=finished,
        model=frozen["model"]["id"],
        revision=frozen["model"]["revision"],
        adapters=sorted(frozen["model"]["adapters"]),
        layout=layout,
        format=format_,
        lossless=output["encoding"]["lossless"],
        seed=frozen["seed"],
        weighted=frozen["render"].get("prompt_weighting") is not None,
        exported=exported is not None,
        images_given=not frozen["task"].endswith("text-to-image"),
        out=out,
        tables=readers.tables(out, layout),
        readers=readers.lines(out, name, layout, format_, ours=exported is None),
        sheet=sheet,
        after=", ".join(next(iter(step)) for step in frozen["after"] or ()),
        originals=output["keep_originals"],
        says=_says(output),
        figures=figures,
        part_of="" if counted == images else f" (of {counted:,} images)",
        machine=_machine(figures.profile) if figures and figures.profile else "",
        warnings=warnings,
    )
    store.put(KEY, text.encode())
    if exported is None:
        store.put(GIVEN, to_json({"card": card.model_dump(mode="json"), "warnings": list(warnings)}))


def given(store: Store) -> tuple[Card, tuple[str, ...]]:
    """The card and the warnings of an output, by its last run."""
    try:
        said = read_json(store, GIVEN)
        return Card.model_validate(said["card"]), tuple(map(str, said["warnings"]))
    except (KeyError, ValueError, TypeError, Fatal):  # written before this was known, or damaged: a card is no reason to stop
        return Card(), ()


# ------------------------------------------------------------------------------------------------ what it says


def _metadata(frozen: dict[str, Any], card: Card, name: str, images: int, columns: pa.Schema) -> dict[str, Any]:
    """The YAML that the Hub and `datasets` read. https://github.com/huggingface/hub-docs/blob/main/datasetcard.md"""
    layout, format_ = frozen["output"]["layout"], frozen["output"]["format"]
    given = card.model_dump(include={"license", "license_name", "license_link", "language"}, mode="json")
    found: dict[str, Any] = {"pretty_name": card.pretty_name or name}
    found |= {key: value for key, value in given.items() if value}
    found["task_categories"] = ["text-to-image" if frozen["task"].endswith("text-to-image") else "image-to-image"]
    found["size_categories"] = [_size(images)]
    found["tags"] = list(dict.fromkeys(["renderfarm", "synthetic", *card.tags]))
    found["configs"] = [{"config_name": "default", "data_files": [{"split": "train", "path": DATA_FILES[layout]}]}]
    if layout == "webdataset":
        found["dataset_info"] = {"features": webdataset.features(columns, FORMATS[format_].extension)}
    return found


def _size(images: int) -> str:
    """The Hub's word for it."""
    bounds = (("1K", 10**3), ("10K", 10**4), ("100K", 10**5), ("1M", 10**6), ("10M", 10**7), ("100M", 10**8), ("1B", 10**9))
    below = "n<1K"
    for (word, bound), (following, _) in zip(bounds, (*bounds[1:], ("10B", 0)), strict=True):
        if images >= bound:
            below = f"{word}<n<{following}"
    return below


def _says(output: dict[str, Any]) -> list[str]:
    metadata = output["metadata"]
    found = [
        (metadata["provenance"], "that a model painted it (IPTC's digital source type, in XMP)"),
        (metadata["parameters"], "A1111's `parameters`"),
        (metadata["row"], "its row, as JSON"),
        (output.get("signed"), "a C2PA signature (Content Credentials), another one each time"),
    ]
    without = [] if metadata["prompts"] else ["none of it the prompt"]
    said = [text for on, text in found if on]
    return said + without if said else []


def _machine(profile: dict[str, Any]) -> str:
    """`float32, 8 at once, cpu (x86_64 AuthenticAMD 26 2), torch 2.13.0, diffusers 0.42.1`."""
    device = profile.get("device", "cpu") + (f" ({profile['device_model']})" if "device_model" in profile else "")
    versions = [f"{name} {profile[name]}" for name in ("torch", "diffusers", "transformers", "cuda") if name in profile]
    return ", ".join([profile.get("dtype", ""), f"{profile['batch_size']} at once", device, *versions]).lstrip(", ")


def _kinds(counts: dict[str, int]) -> str:
    shown = [f"{_text(kind)}: {count:,}" for kind, count in list(counts.items())[:KINDS_SHOWN]]
    return ", ".join([*shown, f"{len(counts) - KINDS_SHOWN:,} more kinds"] if len(counts) > KINDS_SHOWN else shown)


def _text(text: str) -> str:
    """As Markdown that shows the text itself, in one paragraph or cell of a table."""
    line = re.sub(r"([\\`*_{}\[\]<>#|~&$!])", r"\\\1", " ".join(text.split()))
    return re.sub(r"^(\d*)([-+=.)])", r"\1\\\2", line)  # a list, a rule, an underlined heading
