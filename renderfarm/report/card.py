"""The dataset card: OUT/README.md, which makes `load_dataset(OUT)` work and says what the dataset is."""

from __future__ import annotations

import glob
import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import yaml
from jinja2 import Environment

from renderfarm.encode import FORMATS
from renderfarm.layouts import LAYOUTS, webdataset
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
  - {split: train, path: "{{ data_files }}"}
{{ features }}---
# {{ name }}

Images rendered by renderfarm from a table of prompts. {% if exported %}Exported from an output
that was {{ "" if finished else "not " }}finished:{% elif finished %}Finished:{% else %}Not finished; what is here is
committed and complete in itself. When this card was written:{% endif %} {{ images }} images, {{ errors }} errors, {{ rows }} manifest rows.

| | |
|---|---|
| model | `{{ model }}`{% if revision %} at `{{ revision }}`{% endif %} |
| layout, format | {{ layout }}, {{ format }} |
| job seed | {{ seed }} |
{% if after %}| done to each picture | {{ after }}; `width`, `height`: as it was rendered; `file_width`, `file_height`: as it is here |
{% endif %}
{% if originals and not exported %}| originals | the pictures before that: `originals/`, named by `original_file` |
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

```python
from datasets import load_dataset

dataset = load_dataset({{ dataset|py }}, split="train")  # columns: {{ seen }}
```
{% if layout == "webdataset" %}

```python
import glob
import webdataset

shards = sorted(glob.glob({{ (escaped ~ "/data/*.tar")|py }}))
dataset = webdataset.WebDataset(shards, shardshuffle=False).decode({{ decoder }}).to_tuple({{ extension|py }}, "json")
```
{% endif %}

```python
{% if layout == "parquet" %}
import pandas

table = pandas.read_parquet({{ (out ~ "/data")|py }})
{% else %}
import glob
import pandas

tables = sorted(glob.glob({{ tables|py }}))
table = pandas.concat([pandas.read_parquet(path).assign(table_file=path) for path in tables], ignore_index=True)
{% endif %}
```

```python
import polars

table = polars.scan_parquet({{ tables|py }}{{ "" if layout == "parquet" else ', include_file_paths="table_file"' }}).collect()
```

```python
import duckdb

table = duckdb.sql({{ query|py }})
```

{% if not exported %}
```python
import renderfarm

for picture, row in renderfarm.open({{ out|py }}):
    print(picture.size, row["prompt"])
```

{% endif %}
`pixel_sha256` is the SHA-256 of the image's raw RGB bytes (row-major, H×W×3, uint8); `file_sha256` that of the file.
{% if exported %}
Rows that could not be rendered are not in here.{% if originals %} `original_file` names a picture of the output that this was exported
from.{% endif %}

{% else %}
Rows that could not be rendered are in `errors/`, each with its reason. `_renderfarm/` is renderfarm's own.
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
    exported: str | None = None,
) -> None:
    """Write or refresh the card. `frozen` is job.json's value, `columns` those of the image table. `exported`: where readers find
    what the store holds, if that is an export, whose layout `frozen` says: its own place, or hf://datasets/org/name."""
    # Markdown, not HTML: every value is checked by the job's schema, a number, or JSON-quoted
    environment = Environment(autoescape=False, trim_blocks=True, keep_trailing_newline=True)  # noqa: S701
    environment.filters["py"] = lambda text: json.dumps(text, ensure_ascii=False)
    layout, format_ = frozen["output"]["layout"], frozen["output"]["format"]
    out = exported or store.url
    tables = f"{glob.escape(out)}/{LAYOUTS[layout].TABLES}"
    extension = FORMATS[format_].extension
    features = webdataset.features(columns, extension) if layout == "webdataset" else None
    text = environment.from_string(_TEMPLATE).render(
        name=name,
        rows=f"{rows:,}",
        images=f"{images:,}",
        errors=f"{errors:,}",
        finished=finished,
        model=frozen["model"]["id"],
        revision=frozen["model"]["revision"],
        layout=layout,
        format=format_,
        extension=extension,
        # of itself it knows no AVIF, which Pillow opens
        decoder='webdataset.imagehandler("pil", ["avif"])' if extension == "avif" else '"pil"',
        seen=f"{extension}, json" if layout == "webdataset" else "image, prompt, seed, …",
        data_files={"files": "data/**", "parquet": "data/*.parquet", "webdataset": "data/*.tar"}[layout],
        features=yaml.safe_dump({"dataset_info": {"features": features}}, sort_keys=False, allow_unicode=True) if features else "",
        seed=frozen["seed"],
        weighted=frozen["render"].get("prompt_weighting") is not None,
        exported=exported is not None,
        out=out,
        dataset=out.removeprefix("hf://datasets/"),
        escaped=glob.escape(out),
        tables=tables,
        query=_query(tables, named=layout != "parquet"),
        sheet=sheet,
        after=", ".join(next(iter(step)) for step in frozen["after"] or ()),
        originals=frozen["output"]["keep_originals"],
        warnings=warnings,
    )
    store.put(KEY, text.encode())


def _query(tables: str, *, named: bool) -> str:
    """`named`: each row says which file it is from."""
    quoted, option = tables.replace("'", "''"), ", filename = 'table_file'" if named else ""
    return f"select * from read_parquet('{quoted}'{option})"  # noqa: S608 - text for people, never run here
