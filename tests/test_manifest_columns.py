"""Manifests as columns: names, types, own columns, the map and presets, and files whose columns differ."""

from __future__ import annotations

import datetime as dt
import itertools
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from opening import SUPPORTED, Write, opened, refusal, rows, table

from renderfarm.arguments import ARGUMENTS, IMAGE, PRESETS
from renderfarm.manifest import EXTRA, ROW

# -------------------------------------------------------------------------------------------------------- columns


def test_without_a_prompt_column_the_message_shows_the_way_to_name_one(write_manifest: Write) -> None:
    path = write_manifest({"caption": ["a"], "seed": [1]})
    message = refusal(path)
    assert message.startswith(f"{path}: no column `prompt` (it has: caption, seed); ")
    assert "manifest: {path: …, columns: {prompt: caption}}" in message
    assert rows(path, columns={"prompt": "caption"}) == {ROW: [0], "seed": [1], "prompt": ["a"]}


@pytest.mark.parametrize(
    ("column", "values", "expected"),
    [
        ("prompt", [1, 2], "column 'prompt' has type int64, but prompt must be text; cast the column"),
        ("prompt", [b"a", b"b"], "column 'prompt' has type binary, but prompt must be text"),
        ("prompt", [["a"], ["b"]], "column 'prompt' has type list<"),
        ("prompt", pa.array([{}, {}], pa.struct([("text", pa.string())])), "column 'prompt' has type struct<"),
        ("negative_prompt", [1.5, None], "column 'negative_prompt' has type double, but negative_prompt must be text"),
        ("seed", ["1", "2"], "column 'seed' has type string, but seed must be a whole number"),
        ("seed", [True, False], "column 'seed' has type bool, but seed must be a whole number"),
        ("height", [dt.date(2024, 1, 1), None], "column 'height' has type date32[day], but height must be a whole number"),
        ("guidance_scale", ["7.5", None], "column 'guidance_scale' has type string, but guidance_scale must be a number"),
        ("guidance_scale", pa.array(["7.5", None]).cast(pa.decimal128(5, 2)), "guidance_scale must be a number"),
        ("sampler", [1.0, None], "column 'sampler' has type double, but sampler must be text or a whole number"),
        ("id", [1.5, 2.5], "column 'id' has type double, but id must be text or a whole number"),
        ("width", pa.array(["64", "64"]).dictionary_encode(), "column 'width' has type string, but width must be a whole number"),
    ],
)
def test_a_column_of_the_wrong_type_is_named_with_the_right_one(write_manifest: Write, column: str, values: Any, expected: str) -> None:
    path = write_manifest({"prompt": ["a", "b"], column: values})
    assert f"{path}: " in refusal(path)
    assert expected in refusal(path)


@pytest.mark.parametrize(
    "type_",
    [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string()), pa.dictionary(pa.int32(), pa.large_string())],
)
def test_text_may_have_any_text_type(write_manifest: Write, type_: pa.DataType) -> None:
    path = write_manifest({"prompt": pa.array(["a", "b", "a"]).cast(type_), "own": pa.array(["a", None, "a"]).cast(type_)})
    assert rows(path) == {ROW: [0, 1, 2], "prompt": ["a", "b", "a"], EXTRA + "own": ["a", None, "a"]}
    assert rows(path, where={"prompt": "a", "own": ["a", "z"]})[ROW] == [0, 2]


@pytest.mark.parametrize("type_", [pa.int8(), pa.uint8(), pa.int16(), pa.uint32(), pa.int64(), pa.uint64(), pa.float32(), pa.float64()])
def test_a_whole_number_may_have_any_number_type(write_manifest: Write, type_: pa.DataType) -> None:
    assert rows(write_manifest({"prompt": ["a", "b"], "seed": pa.array([7, None], type_)}))["seed"] == [7, None]


def test_a_column_of_nulls_alone_fits_any_argument(write_manifest: Write) -> None:
    path = write_manifest({"prompt": ["a"], "negative_prompt": pa.nulls(1), "seed": pa.nulls(1), "sampler": pa.nulls(1)})
    assert rows(path) == {ROW: [0], "prompt": ["a"], "negative_prompt": [None], "seed": [None], "sampler": [None]}


@pytest.mark.parametrize("argument", ["image", "mask_image", "control_image"])
def test_an_image_that_the_model_does_not_take_is_refused_with_a_way_out(write_manifest: Write, argument: str) -> None:
    path = write_manifest({"prompt": ["a"], argument: pa.nulls(1, pa.string())})
    message = refusal(path)
    assert message.startswith(f"{path}: column {argument!r} is the argument `{argument}`, which this model does not take here; ")
    assert f"manifest: {{columns: {{{argument}: null}}}}" in message
    assert rows(path, columns={argument: None}) == {ROW: [0], "prompt": ["a"], EXTRA + argument: [None]}


@pytest.mark.parametrize("argument", sorted(name for name, kind in ARGUMENTS.items() if name not in SUPPORTED and kind != IMAGE))
def test_any_other_argument_is_read_so_that_each_row_can_be_judged(write_manifest: Write, argument: str) -> None:
    path = write_manifest({"prompt": ["a"], argument: pa.nulls(1)})
    assert rows(path) == {ROW: [0], "prompt": ["a"], argument: [None]}


def test_two_columns_of_one_name_are_refused_in_any_file(write_manifest: Write, tmp_path: Path) -> None:
    good = write_manifest({"prompt": ["a"]})
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"])
    pq.write_table(twice, tmp_path / "twice.parquet")
    for paths in (tmp_path / "twice.parquet", [good, tmp_path / "twice.parquet"]):
        assert refusal(paths) == f"{tmp_path}/twice.parquet: two columns have the same name; rename one"


def test_own_columns_of_every_shape_travel_untouched(write_manifest: Write) -> None:
    values = {
        "a": [1, None],
        "a.b": [2.5, None],
        "": ["no name", None],
        "row": ["mine", None],
        "input:prompt": ["x", "y"],
        "tags": [["x", None], []],
        "size": [{"w": 1, "h": None}, None],
        "day": [dt.date(2024, 2, 29), None],
        "when": pa.array([1_700_000_000_000, None], pa.timestamp("ms", "Europe/Berlin")),
        "price": pa.array(["1.50", None]).cast(pa.decimal128(9, 2)),
        "raw": [b"\xff\x00", None],
        "flag": [True, None],
        "map": pa.array([[("k", 1)], None], pa.map_(pa.string(), pa.int32())),
    }
    path = write_manifest({"prompt": ["p", "q"], **values})
    expected = pq.read_table(path).to_pydict()
    assert rows(path) == {ROW: [0, 1], **{name if name == "prompt" else EXTRA + name: column for name, column in expected.items()}}


def test_extension_and_dictionary_columns_travel_as_what_they_store(write_manifest: Write) -> None:
    key = uuid.UUID(int=7)
    path = write_manifest(
        {
            "prompt": ["a", "b"],
            "uuid": pa.array([key.bytes, None], pa.uuid()),
            "json": pa.array(["{}", None], pa.json_()),
            "tensor": pa.FixedShapeTensorArray.from_numpy_ndarray(np.arange(8.0).reshape(2, 2, 2)),
            "colour": pa.array(["red", None]).dictionary_encode(),
            "count": pa.array([5, None]).dictionary_encode(),
        }
    )
    manifest = opened(path)
    assert {field.name: str(field.type) for field in manifest.extras} == {
        "uuid": "fixed_size_binary[16]",
        "json": "string",
        "tensor": "fixed_size_list<item: double>[4]",
        "colour": "string",
        "count": "int64",
    }
    found = table(manifest)
    assert found.schema.field(EXTRA + "tensor").type == manifest.extras.field("tensor").type
    assert found.column(EXTRA + "uuid").to_pylist() == [key.bytes, None]
    assert found.column(EXTRA + "json").to_pylist() == ["{}", None]
    assert found.column(EXTRA + "tensor").to_pylist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert found.column(EXTRA + "colour").to_pylist() == ["red", None]


class Stamp(pa.ExtensionType):
    """A user's own extension type, unknown to every reader of the output."""

    def __init__(self) -> None:
        super().__init__(pa.int64(), "renderfarm.tests.stamp")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type: pa.DataType, serialized: bytes) -> Stamp:
        return cls()


def test_a_registered_extension_type_travels_as_what_it_stores(write_manifest: Write) -> None:
    pa.register_extension_type(Stamp())
    try:
        path = write_manifest({"prompt": ["a"], "stamp": pa.ExtensionArray.from_storage(Stamp(), pa.array([5]))})
        assert pq.read_schema(path).field("stamp").type == Stamp()
        assert opened(path).extras.field("stamp").type == pa.int64()
        assert rows(path)[EXTRA + "stamp"] == [5]
    finally:
        pa.unregister_extension_type("renderfarm.tests.stamp")


def test_own_columns_that_would_get_one_name_in_the_output_are_refused(write_manifest: Write) -> None:
    path = write_manifest({"prompt": ["a"], "file_name": ["x"], "input_file_name": ["y"]})
    assert refusal(path) == f"{path}: columns 'file_name' and 'input_file_name' would both be 'input_file_name_' in the output; rename one"


# ----------------------------------------------------------------------------------------------------- columns map


def test_a_map_renames_and_the_old_owner_of_the_name_becomes_an_own_column(write_manifest: Write) -> None:
    path = write_manifest({"prompt": ["short"], "caption": ["long"], "n": [4]})
    found = rows(path, columns={"prompt": "caption", "num_inference_steps": "n"})
    assert found == {ROW: [0], "prompt": ["long"], "num_inference_steps": [4], EXTRA + "prompt": ["short"]}


def test_a_map_may_swap_two_columns(write_manifest: Write) -> None:
    path = write_manifest({"prompt": ["bad"], "negative_prompt": ["good"]})
    assert rows(path, columns={"prompt": "negative_prompt", "negative_prompt": "prompt"}) == {
        ROW: [0],
        "prompt": ["good"],
        "negative_prompt": ["bad"],
    }


def test_a_null_in_the_map_makes_a_column_an_ordinary_one(write_manifest: Write) -> None:
    path = write_manifest({"prompt": ["a"], "seed": ["not a number"]})
    assert "seed must be a whole number" in refusal(path)
    assert rows(path, columns={"seed": None}) == {ROW: [0], "prompt": ["a"], EXTRA + "seed": ["not a number"]}


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"prompt": "captoin"}, "no column 'captoin' for prompt; did you mean 'caption'?"),
        ({"promt": "caption"}, "manifest.columns: 'promt' is not an argument; did you mean 'prompt'?"),
        ({"prompt": "caption", "xyz": "caption"}, "manifest.columns: 'xyz' is not an argument; there are: id, prompt"),
        ({"prompt": "caption", "id": "caption"}, "manifest.columns: column 'caption' is given to two arguments; copy it"),
        ({"prompt": None}, "no column `prompt`"),
        ("diffusion_db", "manifest.columns: no preset 'diffusion_db'; known: diffusiondb"),
    ],
)
def test_a_wrong_map_is_refused_with_the_nearest_word(write_manifest: Write, columns: Any, expected: str) -> None:
    assert expected in refusal(write_manifest({"caption": ["a"]}), columns=columns)


def test_the_preset_diffusiondb_reads_its_metadata_table(write_manifest: Write) -> None:
    path = write_manifest(
        {
            "image_name": ["a.png", "b.png"],
            "prompt": ["a castle", "a cat"],
            "part_id": pa.array([1, 1], pa.uint16()),
            "seed": pa.array([2**32 - 1, 0], pa.uint32()),
            "step": pa.array([50, 20], pa.uint16()),
            "cfg": pa.array([7.0, 12.5], pa.float32()),
            "sampler": pa.array([8, 1], pa.uint8()),
            "width": pa.array([512, 64], pa.uint16()),
            "height": pa.array([768, 64], pa.uint16()),
            "timestamp": pa.array([1_660_000_000_000, None], pa.timestamp("ms", "UTC")),
        }
    )
    found = rows(path, columns="diffusiondb")
    assert {name: found[name] for name in PRESETS["diffusiondb"]} == {
        "prompt": ["a castle", "a cat"],
        "seed": [2**32 - 1, 0],
        "num_inference_steps": [50, 20],
        "guidance_scale": [7.0, 12.5],
        "sampler": [8, 1],
        "width": [512, 64],
        "height": [768, 64],
    }
    assert [name for name in found if name.startswith(EXTRA)] == [EXTRA + "image_name", EXTRA + "part_id", EXTRA + "timestamp"]


# ------------------------------------------------------------------------------------------------- files that differ


def test_a_later_file_that_lacks_a_column_is_named_with_it(write_manifest: Write) -> None:
    paths = [write_manifest({"prompt": ["a"], "mood": ["x"]}, "a.parquet"), write_manifest({"prompt": ["a"]}, "b.parquet")]
    assert refusal(paths).startswith(f"{paths[1]}: column 'mood' is missing, which the first file has")


@pytest.mark.parametrize("column", ["seed", "mood"])
def test_a_later_file_with_one_more_column_is_refused_and_never_read_without_it(write_manifest: Write, column: str) -> None:
    paths = [write_manifest({"prompt": ["a"]}, "a.parquet"), write_manifest({"prompt": ["a"], column: [5]}, "b.parquet")]
    assert refusal(paths).startswith(f"{paths[1]}: column {column!r} is not in the first file")


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ({"mood": [1]}, {"mood": ["x"]}, "column 'mood' has type string, in the first file int64; cast one of them"),
        ({"seed": [1]}, {"seed": [1.0]}, "column 'seed' has type double, in a file before it int64; cast one of them"),
        ({"id": [1]}, {"id": ["1"]}, "column 'id' has type string, in a file before it int64; cast one of them"),
        ({"seed": [1]}, {"seed": ["1"]}, "column 'seed' has type string, but seed must be a whole number"),
    ],
)
def test_files_whose_types_differ_are_refused(write_manifest: Write, first: Any, second: Any, expected: str) -> None:
    paths = [write_manifest({"prompt": ["a"], **first}, "a.parquet"), write_manifest({"prompt": ["a"], **second}, "b.parquet")]
    assert refusal(paths).startswith(f"{paths[1]}: {expected}")


def test_one_part_may_span_files_whose_arguments_are_wider_or_all_null(write_manifest: Write) -> None:
    columns = [
        {"prompt": ["a"], "seed": pa.nulls(1), "sampler": pa.nulls(1)},
        {"prompt": pa.array(["b"], pa.large_string()), "seed": pa.array([2**31 - 1], pa.int32()), "sampler": ["euler"]},
        {"prompt": pa.array(["c"]).dictionary_encode(), "seed": pa.array([2**62 + 1], pa.int64()), "sampler": pa.nulls(1)},
    ]
    for order in itertools.permutations(range(3)):
        paths = [write_manifest(columns[k], f"{place}.parquet") for place, k in enumerate(order)]
        expected = [[("a", None, None), ("b", 2**31 - 1, "euler"), ("c", 2**62 + 1, None)][k] for k in order]
        found = rows(paths)
        assert list(zip(found["prompt"], found["seed"], found["sampler"], strict=True)) == expected
