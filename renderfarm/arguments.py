"""The arguments a row may give: diffusers' own names, and the Arrow types that are read for each."""

from __future__ import annotations

import pyarrow as pa

TEXT, INTEGER, NUMBER, TEXT_OR_INTEGER = "text", "a whole number", "a number", "text or a whole number"
IMAGE = "a path or URL, a file's bytes, or {bytes, path} as Hugging Face stores images"

ARGUMENTS: dict[str, str] = {
    "id": TEXT_OR_INTEGER,
    "prompt": TEXT,
    "negative_prompt": TEXT,
    "seed": INTEGER,
    "num_images_per_prompt": INTEGER,
    "height": INTEGER,
    "width": INTEGER,
    "num_inference_steps": INTEGER,
    "guidance_scale": NUMBER,
    "sampler": TEXT_OR_INTEGER,
    # taken by some families only; where one is not taken, a row that gives it is an error, not rendered without it
    "prompt_2": TEXT,
    "prompt_3": TEXT,
    "negative_prompt_2": TEXT,
    "negative_prompt_3": TEXT,
    "true_cfg_scale": NUMBER,
    "adapters": TEXT,
    "seed_b": INTEGER,
    "blend": NUMBER,
    "image": IMAGE,
    "mask_image": IMAGE,
    "strength": NUMBER,
    "control_image": IMAGE,
    "controlnet_conditioning_scale": NUMBER,
    "control_guidance_start": NUMBER,
    "control_guidance_end": NUMBER,
    "denoising_end": NUMBER,
}
OUR_OWN = "renderfarm"  # the preset for the tables that renderfarm writes, of whose other columns none travels
PRESETS: dict[str, dict[str, str]] = {
    "diffusiondb": {
        "prompt": "prompt",
        "seed": "seed",
        "num_inference_steps": "step",
        "guidance_scale": "cfg",
        "sampler": "sampler",
        "width": "width",
        "height": "height",
    },
    OUR_OWN: {
        **{name: name for name in ARGUMENTS if name != "num_images_per_prompt"},
        "id": "row_id",
        # the files in the output's _renderfarm/inputs, which `inputs.folder` names
        **{name: f"init_{name}_sha256" for name, kind in ARGUMENTS.items() if kind == IMAGE},
    },
}


def accepts(kind: str, type_: pa.DataType) -> bool:
    """Whether a column of this Arrow type can hold the argument. pandas turns integers with gaps into floats."""
    if pa.types.is_dictionary(type_):
        type_ = type_.value_type
    if pa.types.is_null(type_):
        return True
    if isinstance(type_, pa.BaseExtensionType):
        type_ = type_.storage_type
    if pa.types.is_struct(type_):
        held = {field.name: field.type for field in type_}
        whole = held.keys() <= {"bytes", "path"} and _is_data(held.get("bytes", pa.null())) and _is_text(held.get("path", pa.null()))
        return kind == IMAGE and bool(held) and whole
    text, data = _is_text(type_), _is_data(type_)
    whole = pa.types.is_integer(type_)
    number = whole or pa.types.is_floating(type_)
    return bool({TEXT: text, INTEGER: number, NUMBER: number, TEXT_OR_INTEGER: text or whole, IMAGE: text or data}[kind])


def _is_text(type_: pa.DataType) -> bool:
    return any(is_type(type_) for is_type in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null))


def _is_data(type_: pa.DataType) -> bool:
    return any(is_type(type_) for is_type in (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_null))
