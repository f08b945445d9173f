"""The tables' columns. What a reader of the dataset may rely on."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import Any

import pyarrow as pa

IMAGE_COLUMNS = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("row_id", pa.string(), nullable=False),
        pa.field("image_index", pa.int32(), nullable=False),
        pa.field("file_name", pa.string()),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("negative_prompt", pa.string()),
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("num_inference_steps", pa.int32(), nullable=False),
        pa.field("guidance_scale", pa.float64(), nullable=False),
        pa.field("sampler", pa.string(), nullable=False),
        pa.field("model", pa.string(), nullable=False),
        pa.field("model_revision", pa.string()),
        pa.field("profile_sha256", pa.string(), nullable=False),
        pa.field("prompt_tokens", pa.int32()),
        pa.field("prompt_truncated", pa.bool_()),
        pa.field("prompt_cut_off", pa.string()),
        pa.field("negative_prompt_cut_off", pa.string()),
        pa.field("format", pa.string(), nullable=False),
        pa.field("encoder", pa.string()),
        pa.field("bytes", pa.int64(), nullable=False),
        pa.field("file_sha256", pa.string(), nullable=False),
        pa.field("pixel_sha256", pa.string(), nullable=False),
    ]
)
# Arguments that only some families take, and what the job's `after` adds. A table has such a column if the manifest or
# the job gives the argument.
ARGUMENT_COLUMNS = pa.schema(
    [
        pa.field("prompt_2", pa.string()),
        pa.field("prompt_3", pa.string()),
        pa.field("negative_prompt_2", pa.string()),
        pa.field("negative_prompt_3", pa.string()),
        pa.field("true_cfg_scale", pa.float64()),
        pa.field("seed_b", pa.int64()),
        pa.field("blend", pa.float64()),
        pa.field("adapters", pa.string()),
        pa.field("strength", pa.float64()),
        pa.field("resize", pa.string()),
        pa.field("init_image", pa.string()),
        pa.field("init_image_sha256", pa.string()),
        pa.field("init_mask_image", pa.string()),
        pa.field("init_mask_image_sha256", pa.string()),
        pa.field("init_control_image", pa.string()),
        pa.field("init_control_image_sha256", pa.string()),
        pa.field("controlnet_conditioning_scale", pa.float64()),
        pa.field("control_guidance_start", pa.float64()),
        pa.field("control_guidance_end", pa.float64()),
        pa.field("denoising_end", pa.float64()),
        pa.field("file_height", pa.int32()),
        pa.field("file_width", pa.int32()),
        pa.field("original_pixel_sha256", pa.string()),
        pa.field("original_file", pa.string()),
        pa.field("original_bytes", pa.int64()),
        pa.field("original_file_sha256", pa.string()),
    ]
)
# Which argument, or which part of the job, makes a column of ARGUMENT_COLUMNS appear, where it is not the one of its name.
# `image` is what readers of datasets call the picture that was painted.
GIVEN_BY = {
    "strength": "image",
    "resize": "images",
    "init_image": "image",
    "init_image_sha256": "image",
    "init_mask_image": "mask_image",
    "init_mask_image_sha256": "mask_image",
    "init_control_image": "control_image",
    "init_control_image_sha256": "control_image",
    "controlnet_conditioning_scale": "control_image",
    "control_guidance_start": "control_image",
    "control_guidance_end": "control_image",
    "denoising_end": "refiner",
    "file_height": "after",
    "file_width": "after",
    "original_pixel_sha256": "after",
    "original_file": "keep_originals",
    "original_bytes": "keep_originals",
    "original_file_sha256": "keep_originals",
}
# `image` is what readers call the picture that was painted
OUR_COLUMNS = frozenset((*IMAGE_COLUMNS.names, *ARGUMENT_COLUMNS.names, "image"))


def image_columns(given: Collection[str]) -> pa.Schema:
    """An image table's columns but for the manifest's own. `given`: arguments and parts of the job (`GIVEN_BY`)."""
    return pa.schema([*IMAGE_COLUMNS, *(field for field in ARGUMENT_COLUMNS if GIVEN_BY.get(field.name, field.name) in given)])


ERROR_COLUMNS = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("row_id", pa.string(), nullable=False),
        pa.field("image_index", pa.int32(), nullable=False),
        pa.field("error_class", pa.string(), nullable=False),
        pa.field("error_message", pa.string(), nullable=False),
        pa.field("retryable", pa.bool_(), nullable=False),
        pa.field("prompt_sha256", pa.string()),
    ]
)
ERRORS_KEY = b"renderfarm.errors"  # Parquet footer metadata of a commit object: its part's error rows, as JSON


_TAKEN_FOR_PATHS = re.compile(r"(^|_)file_names?$")


def output_name(column: str) -> str:
    """The name under which a manifest's own column reaches the table. `datasets` takes each column whose name ends in `file_name` for
    paths of pictures, and fails where they are none."""
    while column in OUR_COLUMNS:
        column = f"input_{column}"
    return f"{column}_" if _TAKEN_FOR_PATHS.search(column) else column


def errors_to_json(table: pa.Table) -> bytes:
    return json.dumps(table.to_pylist(), separators=(",", ":"), sort_keys=True).encode()


def errors_from_json(text: bytes) -> pa.Table:
    rows: list[dict[str, Any]] = json.loads(text)
    return pa.Table.from_pylist(rows, schema=ERROR_COLUMNS)
