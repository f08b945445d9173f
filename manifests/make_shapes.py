"""Make manifests/shapes.parquet: 96 prompts for builtin:shapes, with columns of every kind that a manifest may have.

python manifests/make_shapes.py
"""

from pathlib import Path
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq

from renderfarm.shapes.scenes import caption, random_scene

ROWS = 96
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


if __name__ == "__main__":
    main()
