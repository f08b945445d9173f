"""Real kills, round after round: `make chaos`, or

    python tests/chaos_rounds.py --rounds 100 --seed 0 [--store any|folder|s3]

A round is one small output. Its run's processes (driver, workers, raylet) are killed, stopped and told to end at drawn moments, on local
disk or on S3 (moto) behind a proxy that loses replies, answers 503 and resets; then the same command is run until it says that all is
done. `checker` recounts and recomputes what is there then. Last, a run of 1,000 rows of which one kills its worker, and that run's driver's
memory. Prints a line a round, and the figures as a table and as JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from aiohttp import web
from checker import check_complete, error_rows, image_rows
from servers import FaultProxy, lose_reply, moto, s3_error

ROWS, PART_ROWS, LEASES = 60, 3, 3
BAD = {7, 31}
KINDS = ("kill driver", "stop run", "kill worker", "freeze worker", "kill raylet", "freeze raylet")
MOST_RUNS = 8
ON_S3 = {"any": 0.3, "folder": 0.0, "s3": 1.0}


@dataclass
class Figures:
    rounds: int = 0
    lost: int = 0
    twice: int = 0
    wrong: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    again: int = 0
    may_again: int = 0
    to_exit_s: list[float] = field(default_factory=list)
    to_replace_s: list[float] = field(default_factory=list)


# ------------------------------------------------------------------------------------------------------ processes


def descendants(pid: int) -> list[tuple[int, str]]:
    """(pid, command line) of all that descend from a process."""
    lines = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True).stdout.splitlines()[1:]
    table = [(int(pid), int(parent), command) for pid, parent, command in (line.split(None, 2) for line in lines)]
    found, wanted = [], {pid}
    for child, parent, command in sorted(table):
        if parent in wanted:
            wanted.add(child)
            found.append((child, command))
    return found


def send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


class Run:
    def __init__(self, job: Path, engine: str, log: Path, environment: dict[str, str]) -> None:
        self.log = log.open("wb")
        command = [sys.executable, "-m", "renderfarm", "run", str(job), "--engine", engine, "--json"]
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log, env=environment, start_new_session=True)
        self.family: set[int] = set()

    def strike(self, kind: str, chosen: random.Random) -> bool:
        """Whether there was anybody to suffer it."""
        family = descendants(self.process.pid)
        self.family |= {pid for pid, _ in family}
        actors = [pid for pid, command in family if command.startswith("ray::_Actor")]
        raylets = [pid for pid, command in family if "/raylet/raylet" in command.split()[0]]
        whom = {"driver": [self.process.pid], "run": [self.process.pid], "worker": actors, "raylet": raylets}[kind.split()[1]]
        if not whom or self.process.poll() is not None:
            return False
        pid = chosen.choice(whom)
        match kind.split()[0]:
            case "kill":
                send(pid, signal.SIGKILL)
            case "stop":
                send(pid, signal.SIGTERM)
            case "freeze":
                send(pid, signal.SIGSTOP)
                time.sleep(chosen.uniform(0.5, 4))
                send(pid, signal.SIGCONT)
        return True

    def clear(self) -> None:
        """After its death nothing of it may be left; what a raylet's death left is killed by its id."""
        deadline = time.monotonic() + 20
        while any(Path(f"/proc/{pid}").exists() for pid in self.family) and time.monotonic() < deadline:
            time.sleep(0.1)
        for pid in self.family:
            send(pid, signal.SIGKILL)
        self.log.close()


# --------------------------------------------------------------------------------------------------------- rounds


class Round:
    def __init__(self, number: int, seed: int, root: Path, proxy: FaultProxy | None, on_s3: float = 0.3) -> None:
        """`on_s3`: how likely the output is behind the proxy."""
        self.random = random.Random(f"{seed}.{number}")
        self.engine = self.random.choice(["inline", "inline", "ray"])
        self.proxy = proxy if self.random.random() < on_s3 else None
        self.folder = root / f"round-{number}"
        self.folder.mkdir()
        self.executed = self.folder / "executed"
        self.executed.touch()
        self.workers = 2 if self.engine == "ray" else 1
        self.out = f"s3://chaos/round-{number}" if self.proxy else str(self.folder / "out")
        self.job = self._job()
        self.kinds = self.random.choices(KINDS[:2] if self.engine == "inline" else KINDS, k=self.random.randint(1, 3))

    def _job(self) -> Path:
        prompts = [f"row {row}" if row not in BAD else "[nan]" for row in range(ROWS)]
        pq.write_table(pa.table({"prompt": prompts}), self.folder / "prompts.parquet")
        job = {
            "name": "chaos",
            "manifest": "prompts.parquet",
            "model": "builtin:fake",
            "render": {"height": 16, "width": 16, "num_inference_steps": 4},
            "workers": {"max": self.workers, "batch_size": 2},
            "failure": {"tolerate": 1, "deadline_s": 20, "attempts": 6},
            "output": {"path": self.out, "part_rows": PART_ROWS, "layout": self.random.choice(["files", "files", "parquet", "webdataset"])},
        }
        (self.folder / "job.yaml").write_text(yaml.safe_dump(job))
        return self.folder / "job.yaml"

    def live(self, figures: Figures) -> str:
        struck: list[str] = []
        for attempt in range(MOST_RUNS):
            kind = self.kinds[attempt] if attempt < len(self.kinds) else None
            code = self._run(attempt, kind, struck, figures)
            if code in (0, 3) and attempt + 1 >= len(self.kinds):
                break
        else:
            raise AssertionError(f"round {self.folder.name}: not done after {MOST_RUNS} runs")
        figures.faults.update(struck)
        self._judge(figures, len(struck))
        return f"{self.engine}{', S3' if self.proxy else ''}: {', '.join(struck) or 'nothing'}"

    def _run(self, attempt: int, kind: str | None, struck: list[str], figures: Figures) -> int:
        environment = {**os.environ, "RENDERFARM_FAKE_STEP_S": "0.04", "RENDERFARM_FAKE_LOG": str(self.executed), "OMP_NUM_THREADS": "1"}
        if self.proxy is not None:
            environment["AWS_ENDPOINT_URL"] = self.proxy.url
        before = self._count()
        run = Run(self.job, self.engine, self.folder / f"run-{attempt}.log", environment)
        if kind is not None:
            self._wait_for_rendering(run, before)
            time.sleep(self.random.uniform(0, 1.5))
            began = time.monotonic()
            if run.strike(kind, self.random):
                struck.append(kind)
                if kind == "stop run":
                    run.process.wait(120)
                    figures.to_exit_s.append(time.monotonic() - began)
                if kind == "kill worker":
                    self._wait_for_replacement(run, began, figures)
        code = run.process.wait(300)
        run.clear()
        return code

    def _count(self) -> int:
        return self.executed.read_bytes().count(b"\n")

    def _wait_for_rendering(self, run: Run, before: int) -> None:
        deadline = time.monotonic() + 90
        while self._count() == before and run.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)

    def _wait_for_replacement(self, run: Run, began: float, figures: Figures) -> None:
        """Until a process renders that has not rendered before."""
        known = {line.split()[1] for line in self.executed.read_text().splitlines()}
        while run.process.poll() is None and time.monotonic() < began + 60:
            if {line.split()[1] for line in self.executed.read_text().splitlines() if line.count(" ") == 1} - known:
                figures.to_replace_s.append(time.monotonic() - began)
                return
            time.sleep(0.05)

    def _judge(self, figures: Figures, kills: int) -> None:
        out = self._fetched()
        planned = {(row, 0) for row in range(ROWS)}
        try:
            images, errors = image_rows(out), error_rows(out)
        except AssertionError:
            figures.wrong += 1
            raise
        ended = Counter((row["row"], row["image_index"]) for row in (*images, *errors))
        figures.lost += len(planned - ended.keys())
        figures.twice += sum(count - 1 for count in ended.values() if count > 1)
        figures.wrong += {row["row"] for row in errors} != BAD
        check_complete(out, planned)
        assert {row["row"] for row in errors} == BAD
        figures.again += self._count() - (ROWS - len(BAD))
        # a store that loses replies makes workers render a lease again, too, and so does each run's end
        figures.may_again += (kills + (LEASES if self.proxy else 0)) * self.workers * LEASES * PART_ROWS
        figures.rounds += 1

    def _fetched(self) -> Path:
        if self.proxy is None:
            return Path(self.out)
        client = boto3.client("s3", endpoint_url=self.proxy.upstream)
        for page in client.get_paginator("list_objects_v2").paginate(Bucket="chaos", Prefix=f"{self.folder.name}/"):
            for found in page.get("Contents", ()):
                path = self.folder / "out" / found["Key"].partition("/")[2]
                path.parent.mkdir(parents=True, exist_ok=True)
                client.download_file("chaos", found["Key"], str(path))
        return self.folder / "out"


def unsteady(seed: int) -> Any:
    """One request in twenty suffers something."""
    chosen = random.Random(seed)

    async def fault(request: web.Request, forward: Any) -> web.StreamResponse:
        match chosen.random():
            case luck if luck < 0.02:
                await forward()
                return lose_reply(request)
            case luck if luck < 0.035:
                return s3_error(503, "SlowDown")
            case luck if luck < 0.05:
                return lose_reply(request)
        return await forward()

    return fault


KILLER, KILLERS_ROWS = 617, 1000


def killer_row(root: Path) -> dict[str, Any]:
    """One row among a thousand kills whatever renders it; how much memory the driver had with the first part, and at most."""
    prompts = [f"row {row}" if row != KILLER else "[segv]" for row in range(KILLERS_ROWS)]
    pq.write_table(pa.table({"prompt": prompts}), root / "killer.parquet")
    job = {
        "name": "killer",
        "manifest": "killer.parquet",
        "model": "builtin:fake",
        "render": {"height": 16, "width": 16, "num_inference_steps": 4},
        "workers": {"max": 2, "batch_size": 4},
        "failure": {"tolerate": 1},
        "output": {"path": str(root / "killer"), "part_rows": 20},
    }
    (root / "killer.yaml").write_text(yaml.safe_dump(job))
    run = Run(root / "killer.yaml", "ray", root / "killer.log", {**os.environ, "RENDERFARM_FAKE_STEP_S": "0.05", "OMP_NUM_THREADS": "1"})
    memory: list[int] = []
    while run.process.poll() is None:
        if any((root / "killer/_renderfarm/parts").glob("*")):
            with contextlib.suppress(OSError, IndexError):  # it has just ended
                memory.append(int(Path(f"/proc/{run.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
        time.sleep(0.2)
    run.clear()
    summary = json.loads((root / "killer.log").read_text().splitlines()[-1])
    check_complete(root / "killer", {(row, 0) for row in range(KILLERS_ROWS)})
    assert {row["row"]: row["error_class"] for row in error_rows(root / "killer")} == {KILLER: "WorkerCrashed"}
    assert summary["lost_workers"] <= 3
    return {name: summary[name] for name in ("images", "errors", "lost_workers")} | {"rss": (memory[0], max(memory), memory[-2])}


@contextlib.contextmanager
def store(root: Path, seed: int) -> Iterator[FaultProxy]:
    with moto(root) as endpoint, FaultProxy(endpoint) as proxy:
        os.environ |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
        boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket="chaos")
        proxy.fault = unsteady(seed)
        yield proxy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--store", choices=ON_S3, default="any", help="where outputs are: on S3 three times in ten, never, or always")
    options = parser.parse_args()
    figures, root, began = Figures(), Path(tempfile.mkdtemp(prefix="chaos-")), time.monotonic()
    with store(root, options.seed) as proxy:
        for number in range(options.rounds):
            one = Round(number, options.seed, root, proxy, ON_S3[options.store])
            print(f"round {number}: {one.live(figures)}", flush=True)
            shutil.rmtree(one.folder)
    killed = killer_row(root)
    shutil.rmtree(root, ignore_errors=True)
    seconds = {"SIGTERM to exit": figures.to_exit_s, "worker's death to its replacement's first picture": figures.to_replace_s}
    print(f"{figures.rounds} rounds, {figures.faults.total()} faults: {dict(figures.faults)}")
    print(f"lost {figures.lost}, twice {figures.twice}, wrong {figures.wrong}")
    print(f"rendered again: {figures.again} samples; in flight when something struck: at most {figures.may_again}")
    for name, values in seconds.items():
        if values:
            print(f"{name}: median {median(values):.1f} s, longest {max(values):.1f} s ({len(values)} times)")
    counted = f"{killed['images']} images, {killed['errors']} error, {killed['lost_workers']} workers lost"
    print(f"one row of {KILLERS_ROWS:,} kills its worker: {counted}")
    first, most, last = (size / 1e6 for size in killed["rss"])
    print(f"the driver's memory in that run: {first:.0f} MB at its first part, {most:.0f} at most, {last:.0f} at its end")
    print(json.dumps({**vars(figures), "killer row": killed, "seconds": time.monotonic() - began}))
    assert figures.again <= figures.may_again


if __name__ == "__main__":
    main()
