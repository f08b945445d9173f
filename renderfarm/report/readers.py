"""The lines that open an output, as its card states them; tests run them from the card.

A folder's readers find files by themselves. Of a store, fsspec finds them with the environment's credentials: what of the readers
speaks to stores wants other settings than fsspec, or none of the environment (polars and Azure), or a download (DuckDB).
"""

from __future__ import annotations

import glob
import json
from typing import Any

from jinja2 import Environment

from renderfarm.encode import FORMATS
from renderfarm.layouts import LAYOUTS
from renderfarm.preparation import UNKNOWN_TO_DATASETS

_DATASETS = """\
{% if unknown %}
`datasets` opens no {{ format }} in this layout, so `load_dataset` would give no pictures\
{{ "; `renderfarm.open`, below, does." if ours else "." }}
{% elif memory %}
{% elif hub or not cloud %}

```python
from datasets import load_dataset

dataset = load_dataset({{ (hub or out)|py }}, split="train")  # columns: {{ seen }}
```
{% elif layout == "parquet" %}

```python
from datasets import load_dataset

dataset = load_dataset("parquet", data_files={{ (out ~ "/data/*.parquet")|py }}, split="train")  # columns: {{ seen }}
```
{% else %}

`datasets` takes pictures beside a table, and the columns that this card describes, only from a folder: copy them first.

```python
import fsspec
from datasets import load_dataset

store, path = fsspec.url_to_fs({{ out|py }})
store.get(f"{path}/README.md", {{ (copy ~ "/README.md")|py }})
store.get(f"{path}/data/", {{ (copy ~ "/data/")|py }}, recursive=True)
dataset = load_dataset({{ copy|py }}, split="train")  # columns: {{ seen }}
```
{% endif %}
"""

_WEBDATASET = """\
{% if layout == "webdataset" and not memory %}

```python
{% if cloud %}
import fsspec
import webdataset
from webdataset.gopen import gopen_schemes
{% else %}
import glob
import webdataset
{% endif %}
{% if format == "jxl" %}
from renderfarm.encode import decode
{% endif %}

{% if cloud %}
store, _ = fsspec.url_to_fs({{ out|py }})
gopen_schemes["stored"] = lambda url, *_, **options: store.open(url.removeprefix("stored:"))
shards = ["stored:" + path for path in sorted(store.glob({{ (escaped ~ "/data/*.tar")|py }}))]
{% else %}
shards = sorted(glob.glob({{ (escaped ~ "/data/*.tar")|py }}))
{% endif %}
dataset = webdataset.WebDataset(shards, shardshuffle=False).decode({{ decoder }}).to_tuple({{ extension|py }}, "json")
```
{% endif %}
"""

_TABLES = """\
{% if memory %}

This output is in the memory of the process that wrote it, where only renderfarm finds it.
{% elif not cloud %}

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
{% else %}

```python
import fsspec
import pandas

store, _ = fsspec.url_to_fs({{ out|py }})
tables = sorted(store.glob({{ tables|py }}))
table = pandas.concat(
    [pandas.read_parquet(path, filesystem=store).assign(table_file=store.unstrip_protocol(path)) for path in tables], ignore_index=True
)
```

```python
import fsspec
import polars
import pyarrow.dataset

store, _ = fsspec.url_to_fs({{ out|py }})
tables = {path: pyarrow.dataset.dataset(path, filesystem=store) for path in sorted(store.glob({{ tables|py }}))}
table = polars.concat(
    [polars.scan_pyarrow_dataset(one).with_columns(table_file=polars.lit(store.unstrip_protocol(path))) for path, one in tables.items()]
).collect()
```

```python
import duckdb
import fsspec

store, _ = fsspec.url_to_fs({{ out|py }})
connection = duckdb.connect()
connection.register_filesystem(store)
table = connection.sql({{ query|py }})
```
{% endif %}
"""

_OURS = """\

```python
import renderfarm

for picture, row in renderfarm.open({{ out|py }}):
    print(picture.size, row["prompt"])
```
"""


def lines(out: str, name: str, layout: str, format_: str, *, ours: bool) -> str:
    """Markdown. `out`: the output's folder or URL, `name`: of a copy of it. `ours`: it is an output, and no export of one."""
    escaped, extension = glob.escape(out), FORMATS[format_].extension
    memory = out.startswith("memory://")
    cloud = "://" in out and not memory
    values: dict[str, Any] = {
        "out": out,
        "copy": f"./{name}",
        "escaped": escaped,
        "tables": tables(out, layout),
        "query": _query(tables(out, layout), named=cloud or layout != "parquet"),
        "layout": layout,
        "format": format_,
        "extension": extension,
        "memory": memory,
        "hub": out.removeprefix("hf://datasets/") if out.startswith("hf://") else None,
        "ours": ours,
        "cloud": cloud,
        "unknown": format_ in UNKNOWN_TO_DATASETS[layout],
        "seen": f"{extension}, json" if layout == "webdataset" else "image, prompt, seed, …",
        "decoder": _decoder(format_),
    }
    # Markdown, not HTML: each value is one of ours, or JSON-quoted
    environment = Environment(autoescape=False, trim_blocks=True, keep_trailing_newline=True)  # noqa: S701
    environment.filters["py"] = lambda text: json.dumps(text, ensure_ascii=False)
    return "".join(environment.from_string(text).render(values) for text in (_DATASETS, _WEBDATASET, _TABLES, *([_OURS] if ours else [])))


def tables(out: str, layout: str) -> str:
    """A pattern of the output's tables."""
    return f"{glob.escape(out)}/{LAYOUTS[layout].TABLES}"


def _decoder(format_: str) -> str:
    """What `webdataset` decodes pictures with; of itself it knows no AVIF, which Pillow opens, and no JPEG XL."""
    if format_ == "jxl":
        return 'lambda key, data: decode(data) if key == ".jxl" else None'
    return 'webdataset.imagehandler("pil", ["avif"])' if format_ == "avif" else '"pil"'


def _query(tables: str, *, named: bool) -> str:
    """`named`: each row says which file it is from."""
    quoted, option = tables.replace("'", "''"), ", filename = 'table_file'" if named else ""
    return f"select * from read_parquet('{quoted}'{option})"  # noqa: S608 - text for people, never run here
