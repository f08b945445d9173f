"""A table whose rows differ: slots beside grouping by equal arguments, and beside a loop over rows.

    python benchmarks/mixed.py [--quick] [--rows 400] [--rounds 5] [--json FILE]

The rows are shaped as DiffusionDB's (samplers, step counts, guidance scales and sizes with one common value each and long tails), sizes
mapped to three that the embedded model paints: 64², 80×48, 48×80. Step counts are divided by `--steps-divisor`, so that a round takes
seconds; as many different ones are left. All variants get the same rows, samplers, steps, guidance and seeds, and save PNGs.

job               `renderfarm.run`: one denoiser call a step for B slots
grouped, padded   `pipe(…)` for up to B rows with equal arguments, filled up to B: what exactness would ask of grouping
grouped           the same without filling up: batches of any size, so a row's pixels depend on its mates
per row           one `pipe(…)` a row

`calls` are denoiser calls of the whole round, `useful` the share of their B places that was no filler. Grouping gets better the more rows
there are to group; the last table counts, for the whole table of 4,000 rows, what it would call, and what slots do call: that job runs with
the fake model, which takes as many steps of 20 ms.
"""

from __future__ import annotations

import argparse
import random
import shutil
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from loop import B, load, rows_of, timed_run, write_job
from measuring import DATA, Child, Report, Round, compared, once, options, serve, take_turns

from renderfarm.samplers import DIFFUSIONDB_CODES

VARIANTS = {"job": "job", "padded": "grouped, padded", "grouped": "grouped", "rows": "per row"}
PART_ROWS = 64
Row = dict[str, Any]
Key = tuple[Any, ...]


def main() -> None:
    given = options(
        str(__doc__).splitlines()[0],
        rows=(int, (400, 48), "of the table, drawn at random with a fixed seed"),
        rounds=(int, (5, 3), "that count"),
        steps_divisor=(int, (5, 10), "by which step counts are divided"),
        variants=(str, ",".join(VARIANTS), "which ones"),
        manifest=(Path, DATA / "diffusiondb_shaped.parquet", "rows in DiffusionDB's columns"),
        folder=(Path, None, "where to work"),
    )
    if given.child:
        if given.child == "fake":
            serve(lambda line: {}, job(given, "builtin:fake")(str(given.folder / "every.parquet")))
        else:
            serve(job(given) if given.child == "job" else plain(given, given.child))
        return
    with tempfile.TemporaryDirectory(prefix="rf-mixed-", dir=given.folder) as name:
        folder = Path(name)
        every = read_rows(given)
        rows = sorted(random.Random(0).sample(every, min(given.rows, len(every))), key=lambda row: row["seed"])
        for number in range(-1, given.rounds):
            pq.write_table(pa.Table.from_pylist(rows[:B] if number < 0 else rows), rows_of(folder, str(number)))
        pq.write_table(pa.Table.from_pylist(every), folder / "every.parquet")
        report = Report(given)
        children = {VARIANTS[one]: Child("mixed.py", "--child", one, "--folder", name) for one in given.variants.split(",")}
        try:
            found = take_turns({name: child.ask for name, child in children.items()}, given.rounds)
        finally:
            for child in children.values():
                child.close()
        show(report, found, rows, every, once("mixed.py", "--child", "fake", "--folder", name, RENDERFARM_FAKE_STEP_S="0.02"))
        report.end()


def read_rows(given: argparse.Namespace) -> list[Row]:
    """Every row whose sampler DiffusionDB's codes name, with a seed of its own."""
    table = pq.read_table(given.manifest, columns=["prompt", "step", "cfg", "sampler", "width", "height"]).to_pylist()
    found = []
    for seed, row in enumerate(table):
        if row["sampler"] not in DIFFUSIONDB_CODES:
            continue
        height, width = (64, 64) if row["height"] == row["width"] else (80, 48) if row["height"] > row["width"] else (48, 80)
        steps = max(1, row["step"] // given.steps_divisor)
        numbers = {"seed": seed, "num_inference_steps": steps, "guidance_scale": float(row["cfg"]), "height": height, "width": width}
        found.append({"prompt": row["prompt"], "sampler": DIFFUSIONDB_CODES[row["sampler"]], **numbers})
    return found


def group_of(row: Row) -> Key:
    """What must be equal for one call of a pipeline."""
    return tuple(row[name] for name in ("height", "width", "guidance_scale", "num_inference_steps", "sampler"))


def chunks(rows: list[Row]) -> list[list[Row]]:
    """Up to B rows with equal arguments each."""
    groups: dict[Key, list[Row]] = {}
    for row in rows:
        groups.setdefault(group_of(row), []).append(row)
    return [group[start : start + B] for group in groups.values() for start in range(0, len(group), B)]


def show(report: Report, found: dict[str, list[Round]], rows: list[Row], every: list[Row], slots: Round) -> None:
    lines = []
    for line, rounds in zip(compared(found, "job", "images_per_second"), found.values(), strict=True):
        useful = rounds[-1].get("useful_slots")
        lines.append([*line, rounds[-1].get("calls", ""), "" if useful is None else f"{useful:.1%}"])
    title = f"{len(rows)} rows, {len({group_of(row) for row in rows})} of them different in their arguments"
    report.show(title, ["", "images/s", "`job` / it", "not below (95 %)", "calls", "useful"], lines, rounds=found)
    lines = []
    in_parts = [every[start : start + PART_ROWS] for start in range(0, len(every), PART_ROWS)]
    for title, several in (
        (f"{len(rows)} rows", [rows]),
        (f"{len(every)} rows, in parts of {PART_ROWS}", in_parts),
        (f"{len(every)} rows", [every]),
    ):
        some = [row for part in several for row in part]
        work = sum(row["num_inference_steps"] for row in some)
        calls = sum(chunk[0]["num_inference_steps"] for part in several for chunk in chunks(part))
        lines.append([title, len({group_of(row) for row in some}), work // B, calls, f"{work / (B * calls):.1%}"])
    lines[-1] += [slots["calls"], f"{slots['useful_slots']:.1%}"]
    lines[:-1] = [[*line, "", ""] for line in lines[:-1]]
    titles = [
        "steps counted, not rendered",
        "different rows",
        "least calls of B",
        "calls when grouped",
        "useful then",
        "calls of slots",
        "useful then",
    ]
    report.show("What grouping would call, and slots", titles, lines)


# ------------------------------------------------------------------------------------------------ variants


def job(given: argparse.Namespace, model: str = "builtin:shapes") -> Callable[[str], Round]:
    import renderfarm.slots
    from renderfarm.jobfile import load_job

    loops: list[Any] = []
    plain_loop = renderfarm.slots.SlotLoop.__init__

    def kept(self: Any, *arguments: Any) -> None:
        loops[:] = [self]
        plain_loop(self, *arguments)

    renderfarm.slots.SlotLoop.__init__ = kept  # type: ignore[method-assign]
    said = {
        "version": 1,
        "name": "mixed",
        "manifest": str(given.folder / "every.parquet"),
        "model": model,
        "workers": {"max": 1, "batch_size": B, "device": "cpu"},
        "output": {"path": str(given.folder / "job"), "part_rows": PART_ROWS},
    }
    file = write_job(given.folder / "job.yaml", said)

    def work(number: str) -> Round:
        shutil.rmtree(given.folder / "job", ignore_errors=True)
        manifest = number if number.endswith(".parquet") else rows_of(given.folder, number)
        return timed_run(load_job(file, [f"manifest={manifest}"]), "inline") | {"calls": loops[0].counters.denoiser_calls}

    return work


def plain(given: argparse.Namespace, name: str) -> Callable[[str], Round]:
    from renderfarm.samplers import make_scheduler

    pipe, calls = load(1), Counter[str]()
    pipe.unet.register_forward_pre_hook(lambda module, inputs: calls.update(["calls"]))
    config = dict(pipe.scheduler.config)
    schedulers = {sampler: make_scheduler(sampler, config) for sampler in DIFFUSIONDB_CODES.values()}
    out = given.folder / name
    out.mkdir()

    def work(number: str) -> Round:
        import torch

        rows = pq.read_table(rows_of(given.folder, number)).to_pylist()
        calls.clear()
        began = time.perf_counter()
        for chunk in [[row] for row in rows] if name == "rows" else chunks(rows):
            padded = chunk + [chunk[0]] * (B - len(chunk) if name == "padded" else 0)
            same = ("num_inference_steps", "guidance_scale", "height", "width")
            pipe.scheduler = schedulers[chunk[0]["sampler"]]
            pictures = pipe(
                prompt=[row["prompt"] for row in padded],
                generator=[torch.Generator("cpu").manual_seed(row["seed"]) for row in padded],
                **{argument: chunk[0][argument] for argument in same},
            ).images
            for row, picture in zip(chunk, pictures, strict=False):
                picture.save(out / f"{row['seed']}.png")
        seconds = time.perf_counter() - began
        found = {"images_per_second": len(rows) / seconds, "calls": calls["calls"]}
        if name == "padded":
            # some samplers call the denoiser twice a step, so places are counted by call
            found["useful_slots"] = useful(rows)
        return found

    def useful(rows: list[Row]) -> float:
        return statistics.fmean(len(chunk) / B for chunk in chunks(rows) for _ in range(chunk[0]["num_inference_steps"]))

    return work


if __name__ == "__main__":
    main()
