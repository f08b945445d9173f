"""Measure how far a model of drawn shapes does what its prompts say.

    python -m renderfarm.shapes.evaluate renderfarm/shapes/model

Two sets of prompts are rendered with diffusers' own pipeline (fp32, CPU), each prompt with its own seed, and read
back from the pixels:

- one object: only combinations of size, colour, shape and background that training never shows;
- two objects: none of these is kept from training, but there are 564,480 of them. The 40,000 scenes that training
  draws hold about 18,000, so hardly any comes up twice there, and all but about 3 % of the prompts here are new.

A prompt may come more than once in an evaluation, then with another seed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from renderfarm.errors import RenderfarmError
from renderfarm.samplers import SAMPLERS, find_sampler, make_scheduler
from renderfarm.shapes.scenes import Scene, caption, random_scene, read_background, read_place, read_relation, read_things

# Of the scenes; training draws with 1 and 2.
ONE_OBJECT_SEED, TWO_OBJECTS_SEED = 11, 12
# Of the first image's noise; the k-th image has this plus k, so the first K images do not depend on how many follow.
ONE_OBJECT_NOISE, TWO_OBJECTS_NOISE = 0, 1_000_000

Verdict = dict[str, bool]


@dataclass(frozen=True)
class OneObject:
    """Shares 0..1 of the one-object prompts; `place` of those that name one. NaN is a share of no prompts."""

    prompts: int
    colour: float
    background: float
    shape: float
    place: float
    all: float


@dataclass(frozen=True)
class TwoObjects:
    """Shares 0..1 of the two-object prompts. NaN is a share of no prompts."""

    prompts: int
    colours: float
    binding: float
    place: float
    background: float
    all: float


@dataclass(frozen=True)
class Adherence:
    """What was rendered how, and what share of it is right."""

    sampler: str
    guidance: float
    steps: int
    one: OneObject
    two: TwoObjects


def load_pipeline(folder: Path | str) -> StableDiffusionPipeline:
    """The model in fp32 on the CPU. Slicing decodes image by image, as a batch may round differently."""
    pipe = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    pipe.vae.enable_slicing()
    return pipe


def one_object_scenes(count: int) -> list[Scene]:
    rng = Random(ONE_OBJECT_SEED)
    return [random_scene(rng, objects=1, held_out=True) for _ in range(count)]


def two_object_scenes(count: int) -> list[Scene]:
    rng = Random(TWO_OBJECTS_SEED)
    return [random_scene(rng, objects=2) for _ in range(count)]


def render(
    pipe: StableDiffusionPipeline, scenes: Sequence[Scene], first_seed: int, *, steps: int, guidance: float, sampler: str, batch: int
) -> Iterator[Image.Image]:
    """One picture for each scene's caption, in order, `batch` at a time; the pipeline's own scheduler stays."""
    own = pipe.scheduler
    for start in range(0, len(scenes), batch):
        prompts = [caption(scene) for scene in scenes[start : start + batch]]
        seeds = range(first_seed + start, first_seed + start + len(prompts))
        pipe.scheduler = make_scheduler(sampler, own.config)
        try:
            images = pipe(
                prompts,
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            ).images
        finally:
            pipe.scheduler = own
        yield from images


def judge_one(scene: Scene, image: Image.Image) -> Verdict:
    """What is right of a one-object picture, by its largest object; `all` asks that there be no other.

    `place` is there only where the prompt names a place.
    """
    (wanted,), seen = scene.things, read_things(image)
    verdict = {
        "colour": bool(seen) and seen[0].colour == wanted.colour,
        "background": read_background(image) == scene.background,
        "shape": bool(seen) and seen[0].shape == wanted.shape,
    }
    if scene.place:
        verdict["place"] = bool(seen) and read_place(wanted.size, seen[0]) == scene.place
    return {**verdict, "all": all(verdict.values()) and len(seen) == 1}


def judge_two(scene: Scene, image: Image.Image) -> Verdict:
    """What is right of a two-object picture, by the objects of the two colours; `all` asks that there be no other.

    Where a colour is missing, neither the binding of shapes to colours nor the place can be right.
    """
    seen = {thing.colour: thing for thing in read_things(image)}
    found = [(wanted, seen[wanted.colour]) for wanted in scene.things if wanted.colour in seen]
    both = len(found) == 2
    verdict = {
        "colours": both,
        "binding": both and all(wanted.shape == thing.shape for wanted, thing in found),
        "place": both and read_relation(found[0][1], found[1][1]) == scene.relation,
        "background": read_background(image) == scene.background,
    }
    return {**verdict, "all": all(verdict.values()) and len(seen) == 2}


def share(verdicts: Iterable[Verdict], key: str) -> float:
    """The share of right ones among the verdicts that have this key; NaN if none has."""
    answers = [verdict[key] for verdict in verdicts if key in verdict]
    return sum(answers) / len(answers) if answers else math.nan


def summarize_one(verdicts: Sequence[Verdict]) -> OneObject:
    return OneObject(len(verdicts), *(share(verdicts, key) for key in ("colour", "background", "shape", "place", "all")))


def summarize_two(verdicts: Sequence[Verdict]) -> TwoObjects:
    return TwoObjects(len(verdicts), *(share(verdicts, key) for key in ("colours", "binding", "place", "background", "all")))


def evaluate(
    pipe: StableDiffusionPipeline,
    *,
    one: int = 500,
    two: int = 500,
    steps: int = 20,
    guidance: float = 5.0,
    sampler: str = "euler",
    batch: int = 8,
) -> Adherence:
    """Render and read back `one` one-object and `two` two-object prompts."""

    def verdicts(scenes: list[Scene], first_seed: int, judge: Callable[[Scene, Image.Image], Verdict]) -> list[Verdict]:
        images = render(pipe, scenes, first_seed, steps=steps, guidance=guidance, sampler=sampler, batch=batch)
        return [judge(scene, image) for scene, image in zip(scenes, images, strict=True)]

    return Adherence(
        sampler,
        guidance,
        steps,
        summarize_one(verdicts(one_object_scenes(one), ONE_OBJECT_NOISE, judge_one)),
        summarize_two(verdicts(two_object_scenes(two), TWO_OBJECTS_NOISE, judge_two)),
    )


def percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{100 * value:.1f} %"


def as_json(result: Adherence) -> dict[str, Any]:
    """The result with shares 0..1, and null for a share of nothing, which JSON cannot call NaN."""
    tree = dataclasses.asdict(result)
    for part in ("one", "two"):
        tree[part] = {key: None if math.isnan(value) else value for key, value in tree[part].items()}
    return tree


def format_table(result: Adherence) -> str:
    one, two = result.one, result.two
    rows = (
        (f"one object, held out ({one.prompts} prompts)", ""),
        ("  colour of the shape", percent(one.colour)),
        ("  background", percent(one.background)),
        ("  shape", percent(one.shape)),
        ("  place, where named", percent(one.place)),
        ("  all, and nothing else", percent(one.all)),
        (f"two objects ({two.prompts} prompts)", ""),
        ("  both colours present", percent(two.colours)),
        ("  each colour has its shape", percent(two.binding)),
        ("  place of one against the other", percent(two.place)),
        ("  background", percent(two.background)),
        ("  all, and nothing else", percent(two.all)),
    )
    lines = [f"{result.sampler}, {result.steps} steps, guidance {result.guidance:g}"]
    return "\n".join(lines + [f"{name:<36}{value:>8}".rstrip() for name, value in rows])


def format_guidance(result: Adherence) -> str:
    one, two = result.one, result.two
    return (
        f"guidance {result.guidance:<4g}  one object: colour {percent(one.colour)}, background {percent(one.background)}, "
        f"shape {percent(one.shape)}, place {percent(one.place)}, all {percent(one.all)}; "
        f"two: colours {percent(two.colours)}, binding {percent(two.binding)}, place {percent(two.place)}, all {percent(two.all)}"
    )


def format_sampler(result: Adherence) -> str:
    return f"{result.sampler:<20} colour right {percent(result.one.colour):>8}"


def _at_least_one(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return value


def _guidances(text: str) -> list[float]:
    return [float(word) for word in text.split(",")]


def _sampler(text: str) -> str:
    try:
        return find_sampler(text.strip(), "diffusion").name
    except RenderfarmError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _samplers(text: str) -> list[str]:
    return (
        [name for name, sampler in SAMPLERS.items() if sampler.kind == "diffusion"]
        if text == "all"
        else [_sampler(word) for word in text.split(",")]
    )


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL_FOLDER", help="a pipeline in diffusers' format")
    parser.add_argument("--prompts", type=_at_least_one, default=500, help="prompts of each kind (default 500)")
    parser.add_argument("--steps", type=_at_least_one, default=20, help="inference steps (default 20)")
    parser.add_argument("--batch", type=_at_least_one, default=8, help="images at a time (default 8)")
    parser.add_argument("--json", action="store_true", help="print JSON, shares from 0 to 1")
    guidance = parser.add_mutually_exclusive_group()
    guidance.add_argument("--guidance", type=float, default=5.0, help="guidance scale (default 5)")
    guidance.add_argument("--guidances", type=_guidances, metavar="1,3,5", help="one line for each guidance scale")
    sampler = parser.add_mutually_exclusive_group()
    sampler.add_argument("--sampler", type=_sampler, default="euler", help="a name of `renderfarm samplers` (default euler)")
    sampler.add_argument(
        "--samplers", type=_samplers, metavar="NAMES|all", help="one line for each sampler: colour right, one-object prompts only"
    )
    args = parser.parse_args(words)
    if args.guidances and args.samplers:
        parser.error("--guidances and --samplers: vary one at a time")
    return args


def main() -> None:
    args = parse_arguments()
    pipe = load_pipeline(args.model)
    # Samplers are told apart by one-object prompts alone: two-object prompts would double the time for no more to say.
    two = 0 if args.samplers else args.prompts
    line = format_sampler if args.samplers else format_guidance if args.guidances else format_table
    results = []
    for sampler in args.samplers or [args.sampler]:
        for guidance in args.guidances or [args.guidance]:
            result = evaluate(
                pipe, one=args.prompts, two=two, steps=args.steps, guidance=guidance, sampler=sampler, batch=args.batch
            )  # fmt: skip
            results.append(as_json(result))
            if not args.json:
                print(line(result), flush=True)
    if args.json:
        print(json.dumps(results if args.samplers or args.guidances else results[0], indent=2))


if __name__ == "__main__":
    main()
