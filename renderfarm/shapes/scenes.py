"""Drawn scenes: captions, pictures, and reading a picture back.

A scene is one object or two on a plain background. `caption(scene)` is its prompt, `draw(scene)` its picture, and
`read_background` and `read_things` tell from pixels alone what was painted, so that a model's obedience can be
measured without a second network.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from functools import cache
from random import Random

import numpy as np
from PIL import Image, ImageDraw
from scipy.ndimage import binary_dilation, binary_erosion, distance_transform_edt, label  # type: ignore[import-untyped]

SIZE_PX = 64
PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 30),
    "green": (30, 150, 50),
    "blue": (35, 70, 215),
    "yellow": (245, 220, 40),
    "orange": (250, 135, 20),
    "purple": (120, 40, 160),
    "pink": (250, 150, 190),
    "cyan": (70, 210, 225),
    "white": (250, 250, 250),
    "black": (15, 15, 15),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "diamond")
SIZES = {"small": (8.0, 10.0), "medium": (13.0, 15.0), "large": (19.0, 22.0)}  # radius in pixels
PAIR_SIZES = {"small": (8.0, 9.0), "large": (12.5, 14.0)}
PLACES = {
    "in the centre": (0.5, 0.5),
    "at the left": (0.0, 0.5),
    "at the right": (1.0, 0.5),
    "at the top": (0.5, 0.0),
    "at the bottom": (0.5, 1.0),
}
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}

Mask = np.ndarray
_BLOCK = np.ones((3, 3), dtype=bool)  # a pixel and its eight neighbours


@dataclass(frozen=True)
class Thing:
    """One object: its words, and its centre and radius in pixels."""

    size: str
    colour: str
    shape: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """One or two things; `relation` places the first against the second, `place` a single one in the picture."""

    things: tuple[Thing, ...]
    background: str
    place: str | None = None
    relation: str | None = None


def is_held_out(thing: Thing, background: str) -> bool:
    """A fixed tenth of all (size, colour, shape, background) is never trained on."""
    key = f"{thing.size} {thing.colour} {thing.shape} {background}"
    return zlib.crc32(key.encode()) % 10 == 0


def random_scene(rng: Random, *, objects: int | None = None, held_out: bool = False) -> Scene:
    """Draw a scene; with `held_out`, only from the one-object combinations that training never shows."""
    if (objects or (1 if rng.random() < 0.55 else 2)) == 2:
        return _random_pair(rng)
    while True:
        colour, background = rng.sample(list(PALETTE), 2)
        size, shape = rng.choice(list(SIZES)), rng.choice(SHAPES)
        radius = rng.uniform(*SIZES[size])
        place = rng.choice(list(PLACES)) if rng.random() < 0.5 else None
        lo, hi = radius + 2, SIZE_PX - radius - 2
        fx, fy = PLACES[place] if place else (rng.random(), rng.random())
        if place:  # a place is not a point
            fx, fy = (min(1.0, max(0.0, f + rng.uniform(-0.08, 0.08))) for f in (fx, fy))
        thing = Thing(size, colour, shape, lo + fx * (hi - lo), lo + fy * (hi - lo), radius)
        if is_held_out(thing, background) == held_out:
            return Scene((thing,), background, place=place)


def _random_pair(rng: Random) -> Scene:
    first, second, background = rng.sample(list(PALETTE), 3)
    relation = rng.choice(list(RELATIONS))
    dx, dy = RELATIONS[relation]
    things = []
    for colour, side in ((first, 1), (second, -1)):
        size, shape = rng.choice(list(PAIR_SIZES)), rng.choice(SHAPES)
        radius = rng.uniform(*PAIR_SIZES[size])
        x, y = (SIZE_PX / 2 + side * d * 15.5 + rng.uniform(-1, 1) for d in (dx, dy))
        across = rng.uniform(-8, 8)
        things.append(Thing(size, colour, shape, x + across * abs(dy), y + across * abs(dx), radius))
    return Scene(tuple(things), background, relation=relation)


def caption(scene: Scene, rng: Random | None = None) -> str:
    """The scene's prompt. With `rng`, words are left out at random, as training needs for looser prompts.

    >>> caption(Scene((Thing("large", "red", "circle", 32, 32, 20),), "blue"))
    'a large red circle on a blue background'
    """

    def words(thing: Thing) -> str:
        size = "" if rng is not None and rng.random() < 0.2 else thing.size + " "
        return _with_article(f"{size}{thing.colour} {thing.shape}")

    text = f" {scene.relation} ".join(words(thing) for thing in scene.things)
    if scene.place:
        text += f" {scene.place}"
    if rng is not None and rng.random() < 0.1:
        return text
    return f"{text} on {_with_article(scene.background)} background"


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def outline(shape: str, x: float, y: float, radius: float) -> list[tuple[float, float]]:
    """Corner points of a polygonal shape around (x, y), in the units of `radius`."""
    r = radius
    if shape == "square":
        h = r * 0.82
        return [(x - h, y - h), (x + h, y - h), (x + h, y + h), (x - h, y + h)]
    if shape == "diamond":
        return [(x, y - r), (x + r, y), (x, y + r), (x - r, y)]
    if shape == "cross":
        a, b = r * 0.95, r * 0.32
        return [(x - b, y - a), (x + b, y - a), (x + b, y - b), (x + a, y - b), (x + a, y + b), (x + b, y + b),
                (x + b, y + a), (x - b, y + a), (x - b, y + b), (x - a, y + b), (x - a, y - b), (x - b, y - b)]  # fmt: skip
    if shape == "triangle":
        return [(x, y - r * 0.95), (x + r, y + r * 0.8), (x - r, y + r * 0.8)]
    if shape == "star":
        points = []
        for k in range(10):
            length = r * (1.08 if k % 2 == 0 else 0.46)
            angle = math.pi * k / 5 - math.pi / 2
            points.append((x + length * math.cos(angle), y + r * 0.08 + length * math.sin(angle)))
        return points
    raise ValueError(f"{shape} has no corners")


def paint(canvas: ImageDraw.ImageDraw, thing: Thing, colour: object, scale: int) -> None:
    """Paint one thing on a canvas `scale` times as large as the picture."""
    x, y, r = thing.x * scale, thing.y * scale, thing.radius * scale
    if thing.shape == "circle":
        canvas.ellipse((x - r, y - r, x + r, y + r), fill=colour)  # type: ignore[arg-type]
    elif thing.shape == "ring":
        canvas.ellipse((x - r, y - r, x + r, y + r), outline=colour, width=round(r * 0.42))  # type: ignore[arg-type]
    else:
        canvas.polygon(outline(thing.shape, x, y, r), fill=colour)  # type: ignore[arg-type]


def draw(scene: Scene, size_px: int = SIZE_PX) -> Image.Image:
    """The scene's picture (RGB, `size_px` square), four times supersampled for soft edges."""
    scale = 4 * size_px // SIZE_PX
    image = Image.new("RGB", (size_px * 4, size_px * 4), PALETTE[scene.background])
    canvas = ImageDraw.Draw(image)
    for thing in scene.things:
        paint(canvas, thing, PALETTE[thing.colour], scale)
    return image.reduce(4)


@dataclass(frozen=True)
class Seen:
    """What the pixels show of one object: colour and shape words, centre in pixels, area in pixels."""

    colour: str
    shape: str
    x: float
    y: float
    area: int


def label_pixels(image: Image.Image) -> np.ndarray:
    """Index into PALETTE of the nearest colour, H×W."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    colours = np.array(list(PALETTE.values()), dtype=np.float32)
    return np.asarray(np.argmin(((pixels[:, :, None, :] - colours) ** 2).sum(-1), axis=-1))


def read_background(image: Image.Image) -> str:
    """The commonest colour along the border."""
    labels = label_pixels(image)
    border = np.concatenate([labels[:2].ravel(), labels[-2:].ravel(), labels[:, :2].ravel(), labels[:, -2:].ravel()])
    return list(PALETTE)[int(np.bincount(border, minlength=len(PALETTE)).argmax())]


def read_things(image: Image.Image) -> list[Seen]:
    """The objects seen, largest area first, at most one of each colour; (x, y) is the middle of an object's extent.

    An edge pixel between two colours may lie nearest to a third one, so a colour counts only where a pixel and its
    four neighbours agree, and an object needs twelve such places in one piece. An object's soft edge is then the
    pixels around its piece that are nearer to its colour than to the background, and nearer to its piece than to any
    other: the edge of one object may well blend through the colour of the other.
    """
    labels, background = label_pixels(image), list(PALETTE).index(read_background(image))
    cores = {
        colour: core
        for index, colour in enumerate(PALETTE)
        if index != background and binary_erosion(core := _solid_piece(labels == index)).sum() >= 12
    }
    away = {colour: distance_transform_edt(~core) for colour, core in cores.items()}  # pixels
    seen = []
    for colour, core in cores.items():
        mask = _nearer(image, colour, list(PALETTE)[background]) & binary_dilation(core, _BLOCK, iterations=2)
        for other in cores.keys() - {colour}:
            mask &= away[colour] < away[other]
        mask = _solid_piece(mask)
        ys, xs = np.nonzero(mask)
        x, y = (float(v.min() + v.max() + 1) / 2 for v in (xs, ys))
        seen.append(Seen(colour, _name_shape(mask), x, y, len(xs)))
    return sorted(seen, key=lambda thing: -thing.area)


def read_place(size: str, seen: Seen) -> str:
    """The named place nearest to where an object of that size is seen."""
    reach = sum(SIZES[size]) / 2 + 2  # how close its centre may come to the picture's border, in pixels

    def distance(place: str) -> float:
        return math.dist((seen.x, seen.y), tuple(reach + f * (SIZE_PX - 2 * reach) for f in PLACES[place]))

    return min(PLACES, key=distance)


def read_relation(first: Seen, second: Seen) -> str:
    """Where the first lies against the second: of both axes, the one that parts them more."""
    dx, dy = first.x - second.x, first.y - second.y
    if abs(dx) > abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def _solid_piece(mask: Mask) -> Mask:
    """Of the mask's 8-connected pieces, the one with most interior: a soft edge is long but has none."""
    pieces, _ = label(mask, _BLOCK)
    interior = np.bincount(pieces[binary_erosion(mask)], minlength=2)
    return np.asarray(pieces == 1 + int(interior[1:].argmax()))


def _nearer(image: Image.Image, colour: str, other: str) -> Mask:
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    near, far = (((pixels - np.array(PALETTE[c], dtype=np.float32)) ** 2).sum(-1) for c in (colour, other))
    return np.asarray(near < far)


def _cropped(mask: Mask, side: int = 24) -> np.ndarray:
    """The mask's bounding box, resized to side×side, as coverage 0..1 (the shapes differ enough without aspect)."""
    ys, xs = np.nonzero(mask)
    box = mask[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
    picture = Image.fromarray(box.astype(np.uint8) * 255).resize((side, side), Image.Resampling.BOX)
    return np.asarray(picture, dtype=np.float32) / 255


@cache
def _templates() -> dict[str, list[np.ndarray]]:
    found: dict[str, list[np.ndarray]] = {}
    for shape in SHAPES:
        for radius in (8, 9, 13, 20):
            scene = Scene((Thing("large", "white", shape, 32, 32, radius),), "black")
            found.setdefault(shape, []).append(_cropped(np.asarray(draw(scene).convert("L")) > 127))
    return found


def _name_shape(mask: Mask) -> str:
    coverage = _cropped(mask)
    distance = {shape: min(float(np.abs(coverage - t).mean()) for t in templates) for shape, templates in _templates().items()}
    return min(distance, key=lambda shape: distance[shape])
