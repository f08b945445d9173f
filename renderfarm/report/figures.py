"""What an output's card counts, at a bounded cost: an output may have a hundred thousand parts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from renderfarm import commit
from renderfarm.layouts import LAYOUTS
from renderfarm.report.gone import left_out
from renderfarm.storage import Store

TABLES_READ = 64
ENTRIES_READ = 1000
KINDS_SHOWN = 8
COUNTED = {"samplers": ("sampler",), "steps": ("num_inference_steps",), "sizes": ("width", "height")}
OF_PROFILE = ("dtype", "device", "device_model", "torch", "diffusers", "transformers", "cuda")


@dataclass(frozen=True)
class Figures:
    """`kinds`: how often which samplers, steps and sizes, the most frequent first. `truncated`: prompts of which the model saw a part.
    Both are of `counted` images: all of them in a small output, else those of parts spread over it."""

    bytes: int
    error_classes: dict[str, int]
    counted: int
    kinds: dict[str, dict[str, int]]
    truncated: int
    profile: dict[str, Any] | None
    profiles: int


def figures(store: Store, layout: str, entries: commit.Entries) -> Figures:
    tables = list(_tables(store, layout, entries))
    table = pa.concat_tables(tables) if tables else None
    profile, profiles = _profile(store)
    return Figures(
        bytes=commit.counts(entries).bytes,
        error_classes=_error_classes(store, entries),
        counted=0 if table is None else len(table),
        kinds={} if table is None else {name: _count(table, columns) for name, columns in COUNTED.items()},
        truncated=0 if table is None else pc.sum(table.column("prompt_truncated")).as_py() or 0,
        profile=profile,
        profiles=profiles,
    )


def _tables(store: Store, layout: str, entries: commit.Entries) -> Iterator[pa.Table]:
    parts = [part for part, entry in entries.items() if entry.images]
    columns = [*(name for names in COUNTED.values() for name in names), "prompt_truncated"]
    for part in parts[:: -(-len(parts) // TABLES_READ)] if parts else []:
        key = LAYOUTS[layout].TABLES.replace("*", part.name)
        with left_out(), store.open(key) as file:
            yield pq.ParquetFile(file).read(columns=columns, use_threads=False)


def _count(table: pa.Table, columns: tuple[str, ...]) -> dict[str, int]:
    counts = table.group_by(list(columns)).aggregate([([], "count_all")]).to_pylist()
    counts.sort(key=lambda row: (-row["count_all"], [row[name] for name in columns]))
    return {"×".join(str(row[name]) for name in columns): row["count_all"] for row in counts}


def _error_classes(store: Store, entries: commit.Entries) -> dict[str, int]:
    """None named where that would take too many reads."""
    with left_out():
        if sum(entry.errors > 0 or part.retry > 0 for part, entry in entries.items()) <= ENTRIES_READ:
            return dict(sorted(commit.error_classes(store, entries).items()))
    return {}


def _profile(store: Store) -> tuple[dict[str, Any] | None, int]:
    """The first worker's, with its hash, and how many there are."""
    with left_out():
        profile = commit.read_profile(store)
        shown = {name: profile[name] for name in OF_PROFILE if profile.get(name)}
        shown |= {"batch_size": profile["batch_size"], "sha256": commit.profile_sha256(profile)}
        return shown, 1 + len(store.list(commit.PROFILES))
    return None, 0
