"""What a run costs besides rendering: rows per second through driver and parts, memory, the first lease, resuming.

    python benchmarks/control_plane.py [--quick] [--what rows,memory,manifest,begin,resume] [--rows 10000000] [--json FILE]

The fake model, no images. Each line is a process of its own, that nothing else shares.

rows       `renderfarm.run` on a table whose rows all end as error rows before they are rendered (a guidance scale that no model
           takes): they are read, leased, checked, written as parts and indexed; from the first worker's readiness to the last part
driver     the driver alone, against workers that answer at once with an empty file in the index for each part
memory     the same for 1e5 to 1e7 rows: what the process holds at the end, and the most that it held
manifest   8 million rows in one row group, streamed as leases of 1,000 rows, and the most memory that took
begin      `renderfarm run` as a command on a table of 1e7 rows: until a worker renders the first row
resume     the same where 99 % of the parts are committed (the first ones, so that the most of the table is passed over)
"""

from __future__ import annotations

import argparse
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from loop import write_job
from measuring import REPOSITORY, Report, Round, once, options, resident_mb, spread

PART_ROWS = 1000
AT_ONCE = 100_000  # rows that are written at a time
PATIENCE_S = 120.0


def main() -> None:
    given = options(
        str(__doc__).splitlines()[0],
        what=(str, "rows,memory,manifest,begin,resume", "which ones"),
        rows=(int, 10_000_000, "the most"),
        rounds=(int, (5, 3), "of rows, begin and resume"),
        error_rows=(int, (500_000, 100_000), "of `rows`"),
        engines=(str, "inline,ray", "which ones"),
        workers=(int, 2, "of Ray"),
        folder=(Path, None, "where to work, and where tables stay for the next time"),
    )
    if given.child:
        # whoever asked reads the answer from the first line
        import json

        print(json.dumps({"answer": CHILDREN[given.child](given)}), flush=True)
        return
    report = Report(given)
    with tempfile.TemporaryDirectory(prefix="rf-control-") as name:
        given.folder = given.folder or Path(name)
        for what in given.what.split(","):
            SHOWN[what](given, report)
    report.end()


def child(what: str, given: argparse.Namespace, **more: Any) -> Round:
    arguments = {"folder": given.folder, "workers": given.workers, **more}
    return once(
        "control_plane.py",
        "--child",
        what,
        *(text for name, value in arguments.items() for text in (f"--{name.replace('_', '-')}", str(value))),
    )


def table(folder: Path, rows: int, kind: str = "plain") -> Path:
    """`plain`: row groups of a million; `one`: one row group; `errors`: rows that no model renders. Written once, in its own process."""
    path = folder / f"{kind}-{rows}.parquet"
    if not path.exists():
        folder.mkdir(exist_ok=True)
        command = [sys.executable, __file__, "--child", "write", "--folder", str(folder), "--rows", str(rows), "--what", kind]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)  # noqa: S603 - this script
    return path


def write_table(given: argparse.Namespace) -> Round:
    path = given.folder / f"{given.what}-{given.rows}.parquet"
    groups = given.rows if given.what == "one" else 1_000_000
    pieces = []
    for start in range(0, given.rows, AT_ONCE):
        stop = min(given.rows, start + AT_ONCE)
        columns: dict[str, Any] = {"prompt": [f"a large red circle beside a small blue square, number {row}" for row in range(start, stop)]}
        if given.what == "errors":
            columns["guidance_scale"] = [-1.0] * (stop - start)
        pieces.append(pa.table(columns))
    pq.write_table(pa.concat_tables(pieces), path.with_suffix(".part"), row_group_size=groups)
    os.replace(path.with_suffix(".part"), path)
    return {}


def job_of(given: argparse.Namespace, manifest: Path, name: str) -> Path:
    said = {
        "version": 1,
        "name": name,
        "manifest": str(manifest),
        "model": "builtin:fake",
        "render": {"height": 8, "width": 8, "num_inference_steps": 1},
        "workers": {"max": given.workers, "batch_size": 64},
        "failure": {"tolerate": 1.0},
        "output": {"path": str(given.folder / name), "layout": "parquet", "part_rows": PART_ROWS},
    }
    shutil.rmtree(given.folder / name, ignore_errors=True)
    return write_job(given.folder / f"{name}.yaml", said)


# ------------------------------------------------------------------------------------------------ rows per second


def show_rows(given: argparse.Namespace, report: Report) -> None:
    lines, rounds = [], {}
    for engine in given.engines.split(","):
        table(given.folder, given.error_rows, "errors")
        seen = [child("rows", given, engines=engine, rows=given.error_rows) for _ in range(given.rounds)]
        rounds[engine] = seen
        workers = given.workers if engine == "ray" else 1
        lines.append(
            [f"driver and parts, {engine}, {workers} worker(s)", f"{given.error_rows:,}", spread([one["rows_per_second"] for one in seen])]
        )
    table(given.folder, 1_000_000)
    seen = [child("driver", given, rows=1_000_000) for _ in range(given.rounds)]
    lines.append(["the driver alone", "1,000,000", spread([one["rows_per_second"] for one in seen])])
    report.show(
        f"Rows per second, parts of {PART_ROWS:,}, {given.rounds} rounds", ["", "rows", "rows/s"], lines, rounds=rounds | {"driver": seen}
    )


def rows_through(given: argparse.Namespace) -> Round:
    import renderfarm
    from renderfarm.jobfile import load_job

    job = load_job(job_of(given, table(given.folder, given.rows, "errors"), f"rows-{given.engines}"))
    ready, ended = [], [0.0]

    def observe(progress: Any) -> None:
        if progress.first_ready is not None:
            ready.append(progress.first_ready)
        if not ended[0] and progress.parts and progress.parts_done == progress.parts:
            ended[0] = time.time()

    summary = renderfarm.run(job, engine=given.engines, observe=observe)
    assert summary.errors == given.rows, summary
    return {"rows_per_second": given.rows / (ended[0] - ready[0]), **resident_mb()}


# ------------------------------------------------------------------------------------------------ the driver alone


class AtOnce:
    """An engine whose workers have done a lease as soon as they get it: the index says so, and nothing else is written."""

    def __init__(self, out: Path, workers: int) -> None:
        self.max_workers, self.parts = workers, out / "_renderfarm" / "parts"
        self.events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.parts.mkdir(parents=True, exist_ok=True)

    def start_worker(self, name: str, avoid: frozenset[str] = frozenset()) -> None:
        from renderfarm.engines.base import Ready
        from renderfarm.records import WorkerReady

        self.events.put(Ready(name, WorkerReady(name, "", "nothing", 0.0, 64)))

    def submit(self, worker: str, lease: Any) -> None:
        from renderfarm.engines.base import Done
        from renderfarm.records import PartReceipt, Receipt

        (part,) = lease.parts
        images = len(lease.rows)
        (self.parts / f"{part.name}.i{images}.e0.b{images}.json").touch()
        self.events.put(Done(worker, lease, Receipt(lease.number, (PartReceipt(part.index, images, 0, images),), 0.0)))

    def stop_worker(self, worker: str) -> None:
        pass

    def next_events(self, timeout_s: float) -> list[Any]:
        try:
            return [self.events.get(timeout=timeout_s)]
        except queue.Empty:
            return []

    def shutdown(self) -> None:
        pass


def driver_alone(given: argparse.Namespace) -> Round:
    from renderfarm.driver import Driver
    from renderfarm.jobfile import load_job
    from renderfarm.preparation import prepare

    path = table(given.folder, given.rows)
    prepared = prepare(load_job(job_of(given, path, f"driver-{given.rows}")))
    driver = Driver(prepared, threading.Event(), lambda progress: None)
    driver.begin()
    before, began = resident_mb(), time.perf_counter()
    summary = driver.run(lambda: AtOnce(Path(prepared.store.url), given.workers))
    seconds = time.perf_counter() - began
    assert summary.images == given.rows
    return {"rows_per_second": given.rows / seconds, "before_mb": before["now_mb"], **resident_mb()}


def show_memory(given: argparse.Namespace, report: Report) -> None:
    sizes = [size for size in (100_000, 1_000_000, 10_000_000) if size <= given.rows]
    for size in sizes:
        table(given.folder, size)
    seen = [child("driver", given, rows=size) for size in sizes]
    lines = []
    for size, one in zip(sizes, seen, strict=True):
        growth = one["most_mb"] / seen[0]["most_mb"] - 1
        figures = [f"{one[name]:.0f}" for name in ("before_mb", "now_mb", "most_mb")]
        lines.append([f"{size:,}", f"{-(-size // PART_ROWS):,}", *figures, f"{growth:+.1%}", f"{one['rows_per_second']:,.0f}"])
    titles = ["rows", "parts", "MB before", "MB at the end", "MB at most", "against the first", "rows/s"]
    report.show("The driver's memory", titles, lines, rounds=seen)


# ------------------------------------------------------------------------------------------------ one row group


def show_manifest(given: argparse.Namespace, report: Report) -> None:
    rows = min(given.rows, 8_000_000)
    path = table(given.folder, rows, "one")
    seen = child("stream", given, rows=rows)
    groups = pq.read_metadata(path).num_row_groups
    megabytes = [f"{number:.0f}" for number in (path.stat().st_size / 1e6, seen["before_mb"], seen["most_mb"])]
    lines = [[f"{rows:,} in {groups} row group", *megabytes, f"{seen['rows_per_second']:,.0f}"]]
    report.show("One large row group, as leases", ["rows", "MB on disk", "MB before", "MB at most", "rows/s"], lines, rounds=seen)


def stream(given: argparse.Namespace) -> Round:
    from renderfarm.config import ManifestSpec, ModelSpec
    from renderfarm.manifest import open_manifest
    from renderfarm.models.catalog import describe
    from renderfarm.plan import Grid, leases

    arguments = describe(ModelSpec(id="builtin:fake")).arguments
    before = resident_mb()["now_mb"]
    manifest = open_manifest(ManifestSpec(path=str(table(given.folder, given.rows, "one"))), arguments)
    began = time.perf_counter()
    rows = sum(len(lease.rows) for lease in leases(manifest, Grid(manifest.rows, PART_ROWS), lambda index: False))
    assert rows == given.rows
    return {"rows_per_second": rows / (time.perf_counter() - began), "before_mb": before, **resident_mb()}


# ------------------------------------------------------------------------------------------------ the first lease


def show_begin(given: argparse.Namespace, report: Report) -> None:
    _show_first(given, report, "begin", "Until the first row is rendered", 0)


def show_resume(given: argparse.Namespace, report: Report) -> None:
    _show_first(given, report, "resume", "The same, resumed where 99 % of the parts are committed", -(-given.rows // PART_ROWS) * 99 // 100)


def _show_first(given: argparse.Namespace, report: Report, name: str, title: str, committed: int) -> None:
    path, lines, rounds = table(given.folder, given.rows), [], {}
    for engine in given.engines.split(","):
        seen = []
        for _ in range(given.rounds):
            job = job_of(given, path, name)
            if committed:
                commit_parts(job, given.folder / name, committed)
            seen.append({"seconds": first_row(job, engine, given.folder / "log")})
        rounds[engine] = seen
        lines.append([engine, f"{given.rows:,}", f"{committed:,}", spread([one["seconds"] for one in seen])])
    report.show(f"{title}, {given.rounds} rounds", ["engine", "rows", "parts committed", "seconds"], lines, rounds=rounds)


def first_row(job: Path, engine: str, log: Path) -> float:
    """Seconds from the command to the first line that a worker writes of a row; then the run is told to end."""
    log.unlink(missing_ok=True)
    environment = {**os.environ, "RENDERFARM_FAKE_LOG": str(log), "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "renderfarm", "run", str(job), "--engine", engine]
    began = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # noqa: S603 - this package
    while not (log.exists() and log.stat().st_size) and process.poll() is None and time.perf_counter() < began + PATIENCE_S:
        time.sleep(0.005)
    seconds = time.perf_counter() - began
    if process.poll() is not None or seconds > PATIENCE_S:
        process.kill()
        raise SystemExit(f"{' '.join(command)}: no row was rendered")
    for _ in range(2):  # the second one says: at once
        process.send_signal(signal.SIGINT)
        time.sleep(2)
    process.wait()
    return seconds


def commit_parts(job: Path, out: Path, parts: int) -> None:
    """One part is rendered, and its commit object and index entry are linked for the others: a run that goes on reads no rows of them."""
    import renderfarm
    from renderfarm import commit
    from renderfarm.driver import Driver
    from renderfarm.jobfile import load_job
    from renderfarm.preparation import prepare

    first = out.with_name("first")
    shutil.rmtree(first, ignore_errors=True)
    renderfarm.run(load_job(job, [f'manifest.where={{row: "0-{PART_ROWS - 1}"}}'], out=str(first)), engine="inline")
    driver = Driver(prepare(load_job(job)), threading.Event(), lambda progress: None)
    driver.begin()
    driver.heartbeat.put.result()
    (out / commit.PROGRESS).unlink()  # else the next run would take this one for a run that is at work
    shutil.copy(first / commit.PROFILE, out / commit.PROFILE)
    (entry,), (table_,) = (first / commit.PARTS).iterdir(), (first / "data").iterdir()
    for folder in (out / commit.PARTS, out / "data"):
        folder.mkdir(exist_ok=True)
    for index in range(parts):
        for source, folder in ((entry, out / commit.PARTS), (table_, out / "data")):
            os.link(source, folder / source.name.replace("part-00000000", f"part-{index:08d}"))


CHILDREN = {"write": write_table, "rows": rows_through, "driver": driver_alone, "stream": stream}
SHOWN = {"rows": show_rows, "memory": show_memory, "manifest": show_manifest, "begin": show_begin, "resume": show_resume}

if __name__ == "__main__":
    main()
