"""Whether a device waits for PNG: pictures of 1024², whose encoding takes as long as their rendering.

    python benchmarks/overlap.py [--quick] [--images 256] [--rounds 5] [--json FILE]

The fake model, at a time per picture that is measured first: what the encoder takes for one picture, alone. Its `step` sleeps, as a
process does whose device computes; its `decode` gives pictures with grain, drawn before the clock starts: PNGs of 2 MB, as of photographs.
The device counts as busy for what is asked of it in `step`; idle is the rest of the time from its first call to the end of its last. Two
variants take turns:

overlapped   the job as it is: encoding, hashing and writing beside the next steps
in turn      the same calls as a plain loop makes them: render B pictures, encode and write them, go on

At the end `renderfarm report` shows the last run's parts one by one: wait, prepare, render, encode, put.
"""

from __future__ import annotations

import argparse
import functools
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from loop import write_job
from measuring import Child, Report, Round, column, compared, options, serve, spread, take_turns
from PIL import Image

B, SIZE, STEPS, PART_ROWS = 8, 1024, 10, 32
DIFFERENT = 8  # pictures, over and over


def main() -> None:
    given = options(
        str(__doc__).splitlines()[0],
        images=(int, (256, 96), "in each round"),
        rounds=(int, (9, 5), "that count"),
        folder=(Path, None, "where to work"),
        share=(float, 1.0, "rendering's time as a share of encoding's"),
        picture_s=(float, 0.0, "seconds that a picture's rendering takes; 0: as long as its encoding"),
    )
    if given.child:
        serve(CHILDREN[given.child](given))
        return
    report = Report(given)
    alone = given.picture_s or encoding_seconds()
    rendering = given.share * alone
    with tempfile.TemporaryDirectory(prefix="rf-overlap-", dir=given.folder) as name:
        arguments = ["--folder", name, "--images", str(given.images), "--picture-s", str(rendering)]
        step = {"RENDERFARM_FAKE_STEP_S": str(B * rendering / STEPS)}
        children = {title: Child("overlap.py", "--child", child, *arguments, **step) for title, child in VARIANTS.items()}
        try:
            found = take_turns({title: child.ask for title, child in children.items()}, given.rounds)
        finally:
            for child in children.values():
                child.close()
        lines = [
            [*line, spread([100 * one for one in column(rounds, "idle")]), f"{statistics.median(column(rounds, 'seconds')):.1f}"]
            for line, rounds in zip(compared(found, "overlapped", "images_per_second"), found.values(), strict=True)
        ]
        title = f"{given.images} PNGs of {SIZE}², {rendering * 1e3:.1f} ms each on the device, {alone * 1e3:.1f} ms to encode"
        report.show(
            f"{title}, {given.rounds} rounds",
            ["", "images/s", "`overlapped` / it", "not below (95 %)", "device idle, %", "s"],
            lines,
            rounds=found,
        )
        show_timeline(Path(name) / "out")
    report.end()


@functools.cache
def picture(number: int) -> np.ndarray:
    """Smooth, with some grain: about as large as a photograph's PNG."""
    noise = np.random.default_rng(number)
    smooth = Image.fromarray(noise.integers(0, 256, (16, 16, 3), np.uint8), "RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    return np.clip(np.asarray(smooth, np.int16) + noise.integers(-6, 7, (SIZE, SIZE, 3)), 0, 255).astype(np.uint8)


def encoding_seconds() -> float:
    from renderfarm.encode import encode

    seen = []
    for number in range(12):
        pixels, began = picture(number % DIFFERENT), time.perf_counter()
        encode(pixels)
        seen.append(time.perf_counter() - began)
    return statistics.median(seen[2:])


def show_timeline(out: Path) -> None:
    """A few of the last run's parts, as its index has them."""
    entries = sorted((json.loads(path.read_text()) for path in (out / "_renderfarm" / "parts").iterdir()), key=lambda entry: entry["began"])
    first = entries[0]["began"]
    print("\nThe last run's parts, in seconds (renderfarm report draws them):")
    for entry in entries[:6]:
        stages = ", ".join(f"{name} {seconds:.2f}" for name, seconds in entry["seconds"].items())
        print(f"  began {entry['began'] - first:6.2f}: {stages}")


class Busy:
    """When the device was at work."""

    def __init__(self) -> None:
        self.spans: list[tuple[float, float]] = []

    def around(self, function: Any) -> Any:
        def inner(*arguments: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*arguments)
            finally:
                self.spans.append((began, time.perf_counter()))

        return inner

    def idle(self, call_s: float) -> float:
        """Of the time from its first call to its last one's end, where each call takes the device so long. How long the call itself took
        says more: it may have waited for its thread's turn."""
        whole = max(end for _, end in self.spans) - min(begin for begin, _ in self.spans)
        return 1 - call_s * len(self.spans) / whole


def watched() -> Busy:
    """The fake model's calls are timed, and its pictures those with grain."""
    from renderfarm.models.fake import Fake

    busy = Busy()
    Fake.step = busy.around(Fake.step)  # type: ignore[method-assign]
    Fake.decode = lambda self, state: picture(state.sample.key.row % DIFFERENT)  # type: ignore[method-assign]
    for number in range(DIFFERENT):
        picture(number)
    return busy


def overlapped(given: argparse.Namespace) -> Callable[[str], Round]:
    import renderfarm
    from renderfarm.jobfile import load_job

    busy, out = watched(), given.folder / "out"
    pq.write_table(pa.table({"prompt": [f"a red circle {row}" for row in range(given.images)]}), given.folder / "rows.parquet")
    said = {
        "version": 1,
        "name": "overlap",
        "manifest": str(given.folder / "rows.parquet"),
        "model": "builtin:fake",
        "render": {"height": SIZE, "width": SIZE, "num_inference_steps": STEPS},
        "workers": {"max": 1, "batch_size": B},
        "output": {"path": str(out), "part_rows": PART_ROWS},
    }
    job = load_job(write_job(given.folder / "job.yaml", said))

    def work(_: str) -> Round:
        shutil.rmtree(out, ignore_errors=True)
        busy.spans.clear()
        ended = [0.0]

        def observe(progress: Any) -> None:
            if not ended[0] and progress.parts and progress.parts_done == progress.parts:
                ended[0] = time.perf_counter()

        renderfarm.run(job, engine="inline", observe=observe)
        seconds = ended[0] - min(begin for begin, _ in busy.spans)
        return {"images_per_second": given.images / seconds, "idle": busy.idle(B * given.picture_s / STEPS), "seconds": seconds}

    return work


def in_turn(given: argparse.Namespace) -> Callable[[str], Round]:
    from renderfarm.encode import encode

    busy, out = Busy(), given.folder / "plain"
    call = busy.around(time.sleep)
    out.mkdir()

    def work(_: str) -> Round:
        busy.spans.clear()
        began = time.perf_counter()
        for start in range(0, given.images, B):
            for _ in range(STEPS):
                call(B * given.picture_s / STEPS)
            for row in range(start, start + B):
                (out / f"{row}.png").write_bytes(encode(picture(row % DIFFERENT)).data)
        seconds = time.perf_counter() - began
        return {"images_per_second": given.images / seconds, "idle": busy.idle(B * given.picture_s / STEPS), "seconds": seconds}

    return work


VARIANTS = {"overlapped": "overlapped", "in turn": "plain"}
CHILDREN: dict[str, Callable[[argparse.Namespace], Callable[[str], Round]]] = {"overlapped": overlapped, "plain": in_turn}

if __name__ == "__main__":
    main()
