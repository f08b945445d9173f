"""What the scripts of this folder share: variants that take turns, what their rounds say together, the machine, the table.

Each variant lives in a process of its own (`Child`), is told to do the same work again and again, and is idle while another one is at it. A
figure of a round is compared with the figure that another variant has in the *same* round; what is shown is the median of these ratios, its
spread, and the value that the median is not below, with 95 % confidence: by order statistics, so no distribution is assumed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

Round = dict[str, Any]
REPOSITORY = Path(__file__).resolve().parents[1]
DATA = REPOSITORY.parent / "shared" / "data"
"""Tables that are not part of the repository: `--manifest` names others."""
PACKAGES = ("torch", "diffusers", "transformers", "ray", "pyarrow", "pillow", "numpy")
CONFIDENCE = 0.95


class Child:
    """A script of this folder in a process of its own; it answers each line with a line of JSON, and says one before it is asked."""

    def __init__(self, script: str, *arguments: str, **environment: str) -> None:
        command = [sys.executable, str(Path(__file__).with_name(script)), *arguments]
        # threads as a user has them: whoever runs tests here may have told OpenMP otherwise
        clean = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "GOMP_SPINCOUNT")}
        clean |= {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])}
        self.name = " ".join([script, *arguments])
        self.process = subprocess.Popen(command, env=clean | environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # noqa: S603
        self.said = self._answer()

    def ask(self, line: str) -> Round:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> Round:
        assert self.process.stdout is not None
        for line in self.process.stdout:  # libraries may say something, too
            if line.startswith('{"answer"'):
                return dict(json.loads(line)["answer"])
        raise SystemExit(f"{self.name} ended with {self.process.wait()}; what it said is above")

    def close(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(60)
            return
        self.process.kill()


def serve(answer: Callable[[str], Round], said: Round | None = None) -> None:
    """The child's side: answer every line until there is none."""
    print(json.dumps({"answer": said or {}}), flush=True)
    for line in sys.stdin:
        print(json.dumps({"answer": answer(line.strip())}), flush=True)


def once(script: str, *arguments: str, **environment: str) -> Round:
    """What a child says when it begins; it ends at once."""
    child = Child(script, *arguments, **environment)
    child.close()
    return child.said


def take_turns(variants: Mapping[str, Callable[[str], Round]], rounds: int) -> dict[str, list[Round]]:
    """A B C, B C A, …: each is told the number of the round, and does the same work in it. Round -1 warms up and is not counted. Each
    begins on a quiet machine: a Ray cluster goes on starting workers after its turn, and that was the next one's loss."""
    found: dict[str, list[Round]] = {name: [] for name in variants}
    names = list(variants)
    for number in range(-1, rounds):
        for name in names[max(0, number) % len(names) :] + names[: max(0, number) % len(names)]:
            settle()
            seen = variants[name](str(number))
            if number >= 0:
                found[name].append(seen)
            print(f"  round {number + 1} {name}: {said(seen)}", file=sys.stderr, flush=True)
    return found


def settle(quiet: float = 0.1, patience_s: float = 30.0) -> None:
    """Wait until all processes together take less than that share of one core for a second. Without /proc (no Linux), do nothing."""
    ends = time.monotonic() + patience_s
    with contextlib.suppress(OSError):
        while time.monotonic() < ends:
            before = _busy_s()
            time.sleep(1.0)
            if _busy_s() - before < quiet:
                return


def _busy_s() -> float:
    """Seconds of CPU that the machine has worked: all but idle and waiting for disks (proc_stat(5))."""
    ticks = [int(text) for text in Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()[1:9]]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")


def said(seen: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value:.3f}" if isinstance(value, float) else f"{name} {value}" for name, value in seen.items())


# ----------------------------------------------------------------------------------------------------- figures


def column(rounds: Sequence[Round], figure: str) -> list[float]:
    return [float(one[figure]) for one in rounds]


def ratios(ours: Sequence[Round], theirs: Sequence[Round], figure: str) -> list[float]:
    """Of the same rounds."""
    return [a / b for a, b in zip(column(ours, figure), column(theirs, figure), strict=True)]


def not_below(values: Sequence[float]) -> float | None:
    """What the median is not below, with 95 % confidence: the k-th smallest value, where fewer than k of n fall below the median with a
    probability of at most 5 %. None: fewer than five values say nothing."""
    ordered, n = sorted(values), len(values)
    below = 0.0
    bound = None
    for k in range(n):
        below += math.comb(n, k) / 2**n
        if below > 1 - CONFIDENCE:
            break
        bound = ordered[k]
    return bound


def spread(values: Sequence[float]) -> str:
    """`median (least to most)`."""
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def compared(found: Mapping[str, list[Round]], ours: str, figure: str) -> list[list[str]]:
    """A line for each variant: its figure, and how `ours` stands to it in the same rounds."""
    lines = []
    for name, rounds in found.items():
        values = ratios(found[ours], rounds, figure)
        bound = not_below(values)
        shown = ["", ""] if name == ours else [spread(values), "–" if bound is None else f"{bound:.3g}"]
        lines.append([name, spread(column(rounds, figure)), *shown])
    return lines


# ----------------------------------------------------------------------------------------------------- what is shown


def machine() -> dict[str, Any]:
    """Where this ran, with what, and how busy it was."""
    names = {"cpu": _cpu_name(), "cores": os.cpu_count(), "memory_gb": _memory_gb(), "system": platform.platform()}
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return names | {"python": platform.python_version(), "versions": found, "load": [round(one, 2) for one in os.getloadavg()]}


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        lines = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
        info = {name.strip(): value.strip() for name, _, value in reversed(list(lines))}
        return f"{info.get('model name', platform.machine())} (family {info.get('cpu family')}, model {info.get('model')})"
    return platform.machine()


def _memory_gb() -> int | None:
    with contextlib.suppress(OSError, ValueError):
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9)
    return None


def resident_mb() -> dict[str, float]:
    """This process's memory: now, and the most that it ever was."""
    values = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(values[key].split()[0]) / 1024 for name, key in (("now_mb", "VmRSS"), ("most_mb", "VmHWM"))}


def table(titles: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    """Markdown, so that it can be pasted."""
    rows = [[str(cell) for cell in line] for line in (titles, *lines)]
    widths = [max(len(row[k]) for row in rows) for k in range(len(titles))]
    shown = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows]
    return "\n".join([shown[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *shown[1:]])


class Report:
    """Prints as it goes, and at the end the same as JSON, for whoever wants the rounds."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.path: Path | None = given.json
        options = {name: str(value) if isinstance(value, Path) else value for name, value in vars(given).items()}
        self.value: dict[str, Any] = {"script": Path(sys.argv[0]).name, "options": options, "before": machine()}
        self.began = time.time()

    def show(self, title: str, titles: Sequence[str], lines: Sequence[Sequence[object]], **rounds: Any) -> None:
        print(f"\n{title}\n\n{table(titles, lines)}", flush=True)
        self.value.setdefault("tables", []).append(
            {"title": title, "columns": list(titles), "lines": [list(line) for line in lines], **rounds}
        )

    def end(self) -> None:
        self.value |= {"load_after": [round(one, 2) for one in os.getloadavg()], "seconds": round(time.time() - self.began, 1)}
        about = self.value["before"]
        print(f"\n{about['cpu']}, {about['cores']} cores, load before {about['load'][0]}, after {self.value['load_after'][0]}")
        print(", ".join(f"{name} {number}" for name, number in {"Python": about["python"], **about["versions"]}.items()))
        if self.path is not None:
            self.path.write_text(json.dumps(self.value, indent=1) + "\n")


def options(description: str, **more: tuple[Any, Any, str]) -> argparse.Namespace:
    """Those that every script has, and `more`: name → (type, default, what it is). A default that is a pair is (usual, --quick)."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="as much as fits in four minutes on two cores")
    parser.add_argument("--json", type=Path, default=None, help="write every round there")
    parser.add_argument("--child", default=None, help=argparse.SUPPRESS)
    for name, (kind, default, about) in more.items():
        usual = default if isinstance(default, tuple) else (default, default)
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=None, help=f"{about} ({usual[0]}; with --quick {usual[1]})")
    given = parser.parse_args()
    for name, (_, default, _) in more.items():
        if getattr(given, name) is None:
            setattr(given, name, default[given.quick] if isinstance(default, tuple) else default)
    return given
