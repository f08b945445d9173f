"""How long `status` and `run` take on an output of many committed parts, on local disk.

    python benchmarks/many_parts.py [--parts 100000] [--folder FOLDER]

One part of one row is rendered, and its table and index entry are written again under every other part's name. Then the commands are
run as a user does, in processes of their own. The yardstick beside them: `os.walk` over the same folder of index entries, in a bare
interpreter.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

import renderfarm
from renderfarm import commit
from renderfarm.driver import Driver
from renderfarm.jobfile import load_job
from renderfarm.preparation import prepare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", type=int, default=100_000)
    parser.add_argument("--missing", type=int, default=10, help="parts that the resumed run still has to render")
    parser.add_argument("--folder", type=Path, default=None, help="where to work; a temporary folder otherwise")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        job = write_job(folder, given.parts)
        began = time.perf_counter()
        make_output(job, given.parts - given.missing)
        print(f"made {given.parts - given.missing:,} committed parts in {time.perf_counter() - began:.0f} s", flush=True)
        walk = f"import os; print(sum(len(names) for _, _, names in os.walk({str(folder / 'out' / commit.PARTS)!r})))"
        for title, command in (
            ("os.walk over the index", [sys.executable, "-c", walk]),
            ("renderfarm --version", [sys.executable, "-m", "renderfarm", "--version"]),
            ("renderfarm status", [sys.executable, "-m", "renderfarm", "status", str(folder / "out"), "--json"]),
            (f"renderfarm run, {given.missing} parts to do", [sys.executable, "-m", "renderfarm", "run", str(job), "--engine", "inline"]),
            ("renderfarm run, nothing to do", [sys.executable, "-m", "renderfarm", "run", str(job), "--engine", "inline"]),
        ):
            began, cpu = time.perf_counter(), cpu_seconds()
            done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603 - the commands above
            wall, cpu = time.perf_counter() - began, cpu_seconds() - cpu
            print(f"{title}: {wall:.1f} s, {cpu:.1f} of CPU; {done.stdout.strip().splitlines()[0][:80]}", flush=True)


def cpu_seconds() -> float:
    """Of the commands that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def write_job(folder: Path, rows: int) -> Path:
    pq.write_table(pa.table({"prompt": [f"a red circle {k}" for k in range(rows)]}), folder / "prompts.parquet")
    job = {
        "version": 1,
        "name": "many",
        "manifest": str(folder / "prompts.parquet"),
        "model": "builtin:fake",
        "workers": {"batch_size": 1},
        "output": {"path": str(folder / "out"), "part_rows": 1},
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(job))
    return folder / "job.yaml"


def make_output(job: Path, parts: int) -> None:
    """Render the first part, and write its table and index entry again under every other part's name: neither command reads them."""
    renderfarm.run(load_job(job, ['manifest.where={row: "0"}'], out=str(job.parent / "first")), engine="inline")
    prepared = prepare(load_job(job))
    Driver(prepared, threading.Event(), lambda progress: None).begin()
    first, out = job.parent / "first", job.parent / "out"
    shutil.copy(first / commit.PROFILE, out / commit.PROFILE)
    (entry,) = (first / commit.PARTS).iterdir()
    (out / commit.PARTS).mkdir()
    table, entered, name = (first / "data/part-00000000/metadata.parquet").read_bytes(), entry.read_bytes(), entry.name
    for index in range(parts):
        part = f"part-{index:08d}"
        (out / "data" / part).mkdir(parents=True)
        (out / "data" / part / "metadata.parquet").write_bytes(table)
        (out / commit.PARTS / name.replace("part-00000000", part)).write_bytes(entered)


if __name__ == "__main__":
    main()
