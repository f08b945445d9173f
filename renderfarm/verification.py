"""`renderfarm verify` and `inspect`: are the files what the tables say, and do the same pixels come out again?"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from renderfarm import commit
from renderfarm.checking import Checker, file_problem
from renderfarm.config import Offload
from renderfarm.encode import UNDECODABLE, Written, encode, encoder_of, pixel_sha256, written
from renderfarm.errors import Fatal, InvalidJob, RenderfarmError
from renderfarm.manifest import parse_ranges
from renderfarm.reading import Output, StoredSample
from renderfarm.records import PartId
from renderfarm.rerender import Renderer
from renderfarm.shown import Shown
from renderfarm.slots import Rendered

READERS = 8
GROUP = 256  # samples submitted together: enough to keep slots full, few enough to hold their pixels
SAME_PICTURE_DB = 30.0  # below this PSNR, people see another picture and not another rounding
KEPT_PROBLEMS = 100


@dataclass(frozen=True)
class Again(Shown):
    """One sample rendered again. `psnr`: dB of the stored picture against it, None where it is infinite or cannot be known; of an
    identical picture, what a lossy format takes from it."""

    row: int
    image_index: int
    sampler: str
    prompt: str
    result: str
    psnr: float | None
    ok: bool


@dataclass
class Verification(Shown):
    """`problems`: one line for each thing that is not as it should be, at most KEPT_PROBLEMS; `problem_count` counts all. `notes`:
    what could not be checked, and is no problem by itself."""

    parts: int
    parts_done: int = 0
    images: int = 0
    errors: int = 0
    problem_count: int = 0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    again: list[Again] = field(default_factory=list)
    profile_differences: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problem_count and all(again.ok for again in self.again)

    def add(self, problem: str) -> None:
        self.problem_count += 1
        if len(self.problems) < KEPT_PROBLEMS:
            self.problems.append(problem)


@dataclass(frozen=True)
class Choice:
    """Which samples to render again: all, those of some rows, or so many at random. `seed`: of that choice; None: other ones each
    time, so that asking again sees more of the output."""

    all: bool = False
    rows: str | None = None
    sample: int = 8
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.all and self.rows is not None:
            raise InvalidJob("--all renders every row again, and --rows some; give one of them")


def verify(
    out: str,
    choice: Choice,
    model: str | None = None,
    beside: Mapping[str, str] | None = None,
    offload: Offload = "none",
    say: Callable[[str], None] = lambda text: None,
) -> Verification:
    """Check every file against its table, then render the chosen samples again. `say`: is told how far that is.

    Raises InvalidJob for what is no output, and for a choice that names no image.
    """
    output = Output(out)
    found = Verification(parts=output.grid.count)
    chosen, named, without_entry = _Chosen(choice), set[str](), 0
    with ThreadPoolExecutor(READERS) as readers:
        checker = Checker(output, readers)
        for part in checker.parts:
            say(f"files: part {found.parts_done + 1:,} of {found.parts:,}, {found.images:,} images checked")
            checked = checker.check(part)
            for problem in checked.problems:
                found.add(problem.text)
            if checked.readable:
                found.parts_done += not part.retry
                found.images += len(checked.stored.samples)
                found.errors += -len(checked.stored.samples) if part.retry else len(checked.stored.errors)
                named |= {sample.record["profile_sha256"] for sample in checked.stored.samples}
                chosen.offer(checked.stored.samples)
                without_entry += not checked.entries
    if without_entry:
        found.notes.append(
            f"no index entry for {without_entry:,} of {found.parts_done:,} parts, so whether such a table was lost or changed since its "
            "commit could not be seen; run the job again to write the entries"
        )
    if not found.parts_done and found.ok:
        raise InvalidJob(f"{out}: nothing was rendered yet; run its job first")
    profiles = _profiles(found, output, named) if named else {}
    if choice.rows is not None and not chosen.samples and found.ok:
        raise InvalidJob(f"rows {choice.rows}: no committed image; `renderfarm status {out}` shows what there is")
    _render_again(
        found, chosen.samples, checker.how, profiles, lambda profile: Renderer(output, profile, model, beside or {}, offload), say
    )
    return found


class _Chosen:
    """Picks while the tables pass by; a random choice by reservoir sampling (Vitter's algorithm R), in bounded memory."""

    def __init__(self, choice: Choice) -> None:
        self.choice, self.samples, self.seen = choice, list[StoredSample](), 0
        self.ranges = parse_ranges(choice.rows, "--rows") if choice.rows is not None else []
        self.random = random.Random(choice.seed)

    def offer(self, samples: Iterable[StoredSample]) -> None:
        for sample in samples:
            self.seen += 1
            if self.choice.all or any(sample.record["row"] in wanted for wanted in self.ranges):
                self.samples.append(sample)
            elif self.choice.rows is None and self.choice.sample:
                if len(self.samples) < self.choice.sample:
                    self.samples.append(sample)
                elif (place := self.random.randrange(self.seen)) < self.choice.sample:
                    self.samples[place] = sample


def _profiles(found: Verification, output: Output, named: set[str]) -> dict[str, dict[str, Any]]:
    """The profiles that rows name. What names another one is a problem, and is not rendered again: nothing says how."""
    try:
        known = commit.read_profiles(output.store)
    except Fatal as error:
        found.add(f"the render profile cannot be read: {error}")
        return {}
    for sha256 in sorted(named - known.keys()):
        found.add(f"rows name the render profile {sha256}, and no profile in the output has that hash; was it changed?")
    return known


# ---------------------------------------------------------------------------------------------- render again


def _render_again(
    found: Verification,
    samples: list[StoredSample],
    how: Written,
    profiles: dict[str, dict[str, Any]],
    set_up: Callable[[dict[str, Any]], Renderer],
    say: Callable[[str], None],
) -> None:
    """Each sample as the profile says that its row names."""

    def ended(again: Again) -> None:
        found.again.append(again)
        say(f"rendered again: {len(found.again):,} of {len(samples):,} images")

    groups: dict[str, list[StoredSample]] = {}
    for sample in sorted(samples, key=lambda sample: sample.key):
        if (sha256 := sample.record["profile_sha256"]) in profiles:
            groups.setdefault(sha256, []).append(sample)
    for sha256, group in groups.items():
        say("loading the model")
        renderer = set_up(profiles[sha256])
        which = f"profile {sha256[:12]}: " if len(groups) > 1 else ""
        found.profile_differences += [f"{which}{line}" for line in renderer.differences]
        _render_group(group, how, renderer, ended)
    found.again.sort(key=lambda again: (again.row, again.image_index))


def _render_group(samples: list[StoredSample], how: Written, renderer: Renderer, ended: Callable[[Again], None]) -> None:
    try:
        for start in range(0, len(samples), GROUP):
            group = samples[start : start + GROUP]
            for sample, future in zip(group, renderer.render(sample.record for sample in group), strict=True):
                try:
                    ended(compare(sample, future.result(), how, exact=renderer.promises(sample.record)))
                except RenderfarmError as error:
                    ended(_again(sample, f"{type(error).__name__}: {error}", None, ok=False))
    finally:
        renderer.close()


def compare(sample: StoredSample, rendered: Rendered, how: Written, *, exact: bool) -> Again:
    """`exact`: the profile is the same, so anything but equal bits is a difference; else the pictures must look alike. A lossy file
    is held against what its format makes of the pixels: by their hash nobody knows it."""
    pixels, record = rendered.pixels, sample.record
    before = record.get("original_pixel_sha256")
    same_before = before == pixel_sha256(rendered.original)
    same = pixel_sha256(pixels) == record["pixel_sha256"]
    if same:
        untrue = [] if same_before or before is None else ["the picture before `after`"]
        untrue += [name for name, value in rendered.counted.columns().items() if record[name] != value]
        if untrue:
            return _again(sample, f"identical, but {', '.join(untrue)} is not the table's", None, ok=not exact)
        if how.lossless:
            return _again(sample, "identical", None, ok=True)
    try:
        stored, seen = np.asarray(sample.image()), how.seen(pixels)
        psnr = _psnr(stored, seen)
    except (KeyError, RenderfarmError, *UNDECODABLE):
        table = "identical, but" if same else "differs from the table, and"
        return _again(sample, f"{table} the file cannot be read", None, ok=False)
    if same:
        again = exact and record["encoder"] == encoder_of(how.format)  # then the same file comes out, but for what it says of itself
        alike = psnr is None or (not again and psnr >= SAME_PICTURE_DB)
        return _again(sample, "identical" if alike else "identical, but the file shows another picture", _psnr(stored, pixels), ok=alike)
    if psnr is None:
        return _again(sample, "differs from the table, but not from the file", None, ok=not exact and not how.lossless)
    other = (", identical before `after`" if same_before else "") + ("" if exact else " (another profile: bits are not promised)")
    values = int((stored != seen).sum())
    return _again(sample, f"differs in {values:,} of {stored.size:,} values{other}", psnr, ok=not exact and psnr >= SAME_PICTURE_DB)


def _psnr(a: np.ndarray, b: np.ndarray) -> float | None:
    """dB between two pictures of one size; None where they are equal. Raises ValueError for other sizes."""
    error = float(((a.astype(np.float64) - b) ** 2).mean())
    return 10 * math.log10(255**2 / error) if error else None


def _again(sample: StoredSample, result: str, psnr: float | None, *, ok: bool) -> Again:
    record = sample.record
    return Again(record["row"], record["image_index"], record["sampler"], record["prompt"], result, psnr, ok)


# ---------------------------------------------------------------------------------------------- one image


@dataclass(frozen=True)
class Provenance:
    """Where one sample comes from. `record`: its row of the image table, or of the error table (then `file` is None)."""

    out: str
    part: str
    file: str | None
    record: dict[str, Any]
    profile: dict[str, Any]
    stored: StoredSample | None


def inspect(out: str, row: int, image_index: int) -> Provenance:
    """Find one sample of an output. Raises InvalidJob where it is not."""
    output = Output(out)
    grid = output.grid
    if not 0 <= row < grid.rows:
        raise InvalidJob(f"row {row}: the manifest has rows 0 to {grid.rows - 1}")
    index = row // grid.part_rows
    parts = [PartId(index, retry) for retry in range(output.renderings().get(index, 1))]
    stored = {part: output.part(part.index, part.retry) for part in parts}
    profiles = commit.read_profiles(output.store)
    for part in parts:
        for sample in stored[part].samples:
            if (sample.record["row"], sample.record["image_index"]) == (row, image_index):
                profile = profiles.get(sample.record["profile_sha256"], {})
                return Provenance(output.store.url, part.name, sample.key, sample.record, profile, sample)
    for part in reversed(parts):  # the last one counts
        for error in stored[part].errors:
            if (error["row"], error["image_index"]) == (row, image_index):
                return Provenance(output.store.url, part.name, None, error, {}, None)
    images = sorted(s.record["image_index"] for part in stored.values() for s in part.samples if s.record["row"] == row)
    there = f"it has the images {images[0]} to {images[-1]}" if images else "it is not rendered yet, or `where` leaves it out"
    raise InvalidJob(f"row {row} has no image {image_index}: {there}")


def render_to(
    found: Provenance, path: Path, model: str | None = None, beside: Mapping[str, str] | None = None, offload: Offload = "none"
) -> Again:
    """Render one image again, alone: filler takes the place of its batch mates. Writes a PNG file, and looks at the stored one, too.

    Raises InvalidJob for an error row, and for a file that cannot be written.
    """
    if found.stored is None:
        raise InvalidJob(f"row {found.record['row']} has no image: it ended as {found.record['error_class']}")
    if not found.profile:
        raise InvalidJob(f"row {found.record['row']} names a render profile that the output has not; restore it from a copy")
    output = Output(found.out)
    renderer, how = Renderer(output, found.profile, model, beside or {}, offload), written(output.job["output"])
    try:
        rendered = renderer.render([found.record])[0].result()
    finally:
        renderer.close()
    try:
        path.write_bytes(encode(rendered.pixels).data)
    except OSError as error:
        raise InvalidJob(f"{path}: cannot be written: {error.strerror}; give another file") from None
    again = compare(found.stored, rendered, how, exact=renderer.promises(found.record))
    problem = file_problem(found.stored, how)
    if problem is None:
        return again
    return replace(again, result=f"{again.result}, but the stored file is not what its table says: {problem.text}", ok=False)
