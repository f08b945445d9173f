"""Make manifests/shapes.parquet, 96 prompts for builtin:shapes, with columns of every kind that a manifest may have, and
manifests/pictures.parquet, 8 prompts with drawn pictures and their edges, for jobs that begin with images.

python manifests/make_shapes.py
"""

import io
from pathlib import Path
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageChops, ImageFilter, ImageOps

from renderfarm.shapes.scenes import caption, draw, random_scene

ROWS = 96
PICTURES, SIDE_PX = 8, 1024
MATERIALS = ("folded paper", "stained glass", "felt", "brushed steel")
SAMPLERS = ("dpm++2m", "euler", "euler-a", "ddim", "heun", "unipc", "lms", "dpm++2m-karras")


def main() -> None:
    rng = Random(2026)
    scenes = [random_scene(rng, objects=1 + row % 2) for row in range(ROWS)]
    table = pa.table(
        {
            "id": [f"shape-{row:03d}" for row in range(ROWS)],
            "prompt": [caption(scene) for scene in scenes],
            "sampler": [SAMPLERS[row % len(SAMPLERS)] if row % 3 == 0 else None for row in range(ROWS)],
            "num_inference_steps": pa.array([(15, 20, 25)[row % 3] if row % 4 == 0 else None for row in range(ROWS)], pa.int32()),
            "objects": pa.array([len(scene.things) for scene in scenes], pa.int8()),
            "background": [scene.background for scene in scenes],
        }
    )
    pq.write_table(table, Path(__file__).with_name("shapes.parquet"), compression="zstd")
    write_pictures(Random(2027))


def write_pictures(rng: Random) -> None:
    scenes = [random_scene(rng, objects=1 + row % 2) for row in range(PICTURES)]
    pictures = [draw(scene, SIDE_PX) for scene in scenes]
    table = pa.table(
        {
            "id": [f"picture-{row}" for row in range(PICTURES)],
            "prompt": [f"{caption(scene)}, made of {MATERIALS[row % len(MATERIALS)]}" for row, scene in enumerate(scenes)],
            "picture": [png(picture) for picture in pictures],
            "edges": [png(edges(picture)) for picture in pictures],
        }
    )
    pq.write_table(table, Path(__file__).with_name("pictures.parquet"), compression="zstd")


def edges(picture: Image.Image) -> Image.Image:
    """White lines on black, as ControlNets for Canny's edges were trained on."""
    red, green, blue = (channel.filter(ImageFilter.FIND_EDGES) for channel in picture.split())
    found = ImageChops.lighter(ImageChops.lighter(red, green), blue).point(lambda value: 255 if value > 40 else 0)
    return ImageOps.expand(ImageOps.crop(found, 1), 1, 0)  # the filter leaves the picture's own border as it is


def png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return file.getvalue()


if __name__ == "__main__":
    main()
