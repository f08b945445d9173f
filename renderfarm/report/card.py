"""The dataset card: OUT/README.md, which makes `load_dataset(OUT)` work and says what the dataset is."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from typing import Any

from jinja2 import Environment

from renderfarm.layouts import files
from renderfarm.storage import Store

KEY = "README.md"
_TEMPLATE = """\
---
pretty_name: {{ name|tojson }}
task_categories: [text-to-image]
tags: [renderfarm, synthetic]
configs:
- config_name: default
  data_files:
  - {split: train, path: "data/**"}
---
# {{ name }}

Images rendered by renderfarm from a table of prompts. {% if finished %}Finished:{% else %}Not finished; what is here is
committed and complete in itself. When this card was written:{% endif %} {{ images }} images, {{ errors }} errors, {{ rows }} manifest rows.

| | |
|---|---|
| model | `{{ model }}`{% if revision %} at `{{ revision }}`{% endif %} |
| layout, format | {{ layout }}, {{ format }} |
| job seed | {{ seed }} |
{% if after %}| done to each picture | {{ after }}; `width`, `height`: as it was rendered; `file_width`, `file_height`: as it is here |
{% endif %}
{% if originals %}| originals | the pictures before that: `originals/`, named by `original_file` |
{% endif %}
{% if weighted %}| prompts | with weights, as users of A1111 write them: `(word:1.3)` |
{% endif %}
{% for warning in warnings %}| warning | {{ warning }} |
{% endfor %}
{% if sheet %}

![contact sheet]({{ sheet }})
{% endif %}

## Open it

Each row's place in the manifest is in `row`; readers may give the rows in another order.

```python
from datasets import load_dataset
dataset = load_dataset({{ out|tojson }}, split="train")   # columns: image, prompt, seed, …

import glob, pandas
table = pandas.concat(map(pandas.read_parquet, sorted(glob.glob({{ (escaped ~ "/" ~ tables)|tojson }}))))

import duckdb
table = duckdb.sql("select * from '{{ quoted }}/{{ tables }}'")

import renderfarm
for image, record in renderfarm.open({{ out|tojson }}): ...
```

`pixel_sha256` is the SHA-256 of the image's raw RGB bytes (row-major, H×W×3, uint8); `file_sha256` that of the file.
Rows that could not be rendered are in `errors/`, each with its reason. `_renderfarm/` is renderfarm's own.
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
    warnings: Sequence[str] = (),
) -> None:
    """Write or refresh the card. `frozen` is job.json's value."""
    # Markdown, not HTML: every value is checked by the job's schema, a number, or JSON-quoted
    environment = Environment(autoescape=False, trim_blocks=True, keep_trailing_newline=True)  # noqa: S701
    text = environment.from_string(_TEMPLATE).render(
        name=name,
        rows=f"{rows:,}",
        images=f"{images:,}",
        errors=f"{errors:,}",
        finished=finished,
        model=frozen["model"]["id"],
        revision=frozen["model"]["revision"],
        layout=frozen["output"]["layout"],
        format=frozen["output"]["format"],
        seed=frozen["seed"],
        weighted=frozen["render"].get("prompt_weighting") is not None,
        out=store.url,
        escaped=glob.escape(store.url),
        quoted=store.url.replace("'", "''"),
        tables=files.TABLES,
        sheet=sheet,
        after=", ".join(next(iter(step)) for step in frozen["after"] or ()),
        originals=frozen["output"]["keep_originals"],
        warnings=warnings,
    )
    store.put(KEY, text.encode())
