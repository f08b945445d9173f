"""Manifests: real Parquet files in, canonical rows out, and a message with file and column for each that cannot be read."""

from __future__ import annotations

import datetime as dt
import itertools
import tempfile
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from renderfarm.arguments import ARGUMENTS, PRESETS
from renderfarm.config import ManifestSpec
from renderfarm.errors import Fatal, InvalidJob
from renderfarm.manifest import BATCH_ROWS, EXTRA, ROW, Manifest, _in_ranges, open_manifest

SUPPORTED = frozenset(
    "id prompt negative_prompt seed num_images_per_prompt height width num_inference_steps guidance_scale sampler".split()  # noqa: SIM905
)
Write = Callable[..., Path]


def opened(path: Any, **spec: Any) -> Manifest:
    paths = [str(one) for one in path] if isinstance(path, list) else str(path)
    return open_manifest(ManifestSpec(path=paths, **spec), SUPPORTED)


def table(manifest: Manifest) -> pa.Table:
    return pa.concat_tables(manifest.stream([(0, manifest.rows)]))


def rows(path: Any, **spec: Any) -> dict[str, list[Any]]:
    values: dict[str, list[Any]] = table(opened(path, **spec)).to_pydict()
    return values


def refusal(path: Any, **spec: Any) -> str:
    with pytest.raises(InvalidJob) as caught:
        opened(path, **spec)
    return str(caught.value)


# --------------------------------------------------------------------------------------------------- which files


def test_one_file_gives_its_rows_with_ordinals_arguments_and_own_columns(write_manifest: Write) -> None:
    path = write_manifest({"prompt": ["a", "b"], "seed": [7, None], "mood": ["x", None]})
    assert rows(path) == {ROW: [0, 1], "prompt": ["a", "b"], "seed": [7, None], EXTRA + "mood": ["x", None]}


def test_a_folder_is_read_in_order_of_paths_without_hidden_and_foreign_files(write_manifest: Write, tmp_path: Path) -> None:
    for name in ("m/b.parquet", "m/a.parquet", "m/sub/c.parquet", "m/_temporary/x.parquet", "m/.hidden.parquet", "m/_metadata.parquet"):
        write_manifest({"prompt": [name]}, name)
    (tmp_path / "m/notes.txt").write_text("not a table")
    assert rows(tmp_path / "m")["prompt"] == ["m/a.parquet", "m/b.parquet", "m/sub/c.parquet"]


def test_a_glob_and_a_list_are_read_in_their_order(write_manifest: Write, tmp_path: Path) -> None:
    for name in ("m-2.parquet", "m-10.parquet", "other.parquet"):
        write_manifest({"prompt": [name]}, name)
    assert rows(tmp_path / "m-*.parquet")["prompt"] == ["m-10.parquet", "m-2.parquet"]
    assert rows([tmp_path / "other.parquet", tmp_path / "m-*.parquet"])["prompt"] == ["other.parquet", "m-10.parquet", "m-2.parquet"]


@pytest.mark.parametrize(
    "name", ["a[1].parquet", "what?.parquet", "star*.parquet", "mit leerzeichen ü.parquet", "%20.parquet", "#1.parquet"]
)
def test_a_file_whose_own_name_looks_like_a_pattern_is_found(write_manifest: Write, name: str) -> None:
    assert rows(write_manifest({"prompt": ["a"]}, name))["prompt"] == ["a"]


def test_a_manifest_may_lie_on_any_fsspec_url(write_manifest: Write) -> None:
    folder = f"memory://{uuid.uuid4().hex}"
    for name in ("b", "a"):
        with fsspec.open(f"{folder}/{name}.parquet", "wb") as file:
            pq.write_table(pa.table({"prompt": [name]}), file)
    assert rows(folder)["prompt"] == ["a", "b"]
    assert rows(f"{folder}/*.parquet")["prompt"] == ["a", "b"]
    assert "no such file" in refusal(f"{folder}/c.parquet")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    message = refusal(tmp_path / "no.parquet")
    assert message == f"manifest {tmp_path}/no.parquet: no such file; paths are relative to the job file"


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path) == f"manifest {tmp_path}: the folder holds no .parquet file; give the folder that does"


def test_a_glob_that_matches_nothing_is_refused(tmp_path: Path) -> None:
    assert f"manifest {tmp_path}/*.parquet: no file matches" in refusal(tmp_path / "*.parquet")


def test_one_missing_file_of_a_list_is_named(write_manifest: Write, tmp_path: Path) -> None:
    assert f"{tmp_path}/no.parquet" in refusal([write_manifest(), tmp_path / "no.parquet"])


def test_a_glob_that_matches_a_folder_is_refused_at_once(write_manifest: Write, tmp_path: Path) -> None:
    (tmp_path / "m.parquet").mkdir()
    assert refusal(tmp_path / "m*.parquet") == f"manifest {tmp_path}/m.parquet: Is a directory; give Parquet files that you may read"


@pytest.mark.parametrize("url", ["nonsense://bucket/x.parquet", "://x"])
def test_an_unknown_scheme_is_refused(url: str) -> None:
    assert refusal(url).startswith(f"manifest {url}: ")


def test_a_path_below_a_file_is_no_such_file(write_manifest: Write) -> None:
    path = write_manifest() / "below.parquet"
    assert f"manifest {path}: no such file" in refusal(path)


def test_an_unset_environment_variable_in_the_path_is_named(monkeypatch: pytest.MonkeyPatch, write_manifest: Write, tmp_path: Path) -> None:
    write_manifest({"prompt": ["a"]})
    monkeypatch.setenv("WHERE_PROMPTS_ARE", str(tmp_path))
    assert rows("${WHERE_PROMPTS_ARE}/prompts.parquet")["prompt"] == ["a"]
    monkeypatch.delenv("WHERE_PROMPTS_ARE")
    assert "${WHERE_PROMPTS_ARE}" in refusal("${WHERE_PROMPTS_ARE}/prompts.parquet")


# ---------------------------------------------------------------------------------------------------- broken files


BROKEN: dict[str, Callable[[bytes], bytes]] = {
    "an empty file": lambda good: b"",
    "a text file": lambda good: b"id,prompt\n0,a red circle\n",
    "a short file": lambda good: b"PAR1",
    "only the magic words": lambda good: b"PAR1PAR1",
    "the first half": lambda good: good[: len(good) // 2],
    "all but the last byte": lambda good: good[:-1],
    "a footer length beyond the file": lambda good: good[:-8] + b"\xff\xff\xff\x7fPAR1",
    "a footer length of zero": lambda good: good[:-8] + b"\x00\x00\x00\x00PAR1",
    "a footer of zeros": lambda good: good[:-200] + bytes(192) + good[-8:],
    "a flipped byte in the footer's head": lambda good: _flipped(good, len(good) - 8 - int.from_bytes(good[-8:-4], "little")),
    "a png": lambda good: b"\x89PNG\r\n\x1a\n" + good[8:-8],
    "zeros": lambda good: bytes(len(good)),
    "another row count in the file than in its groups": lambda good: good.replace(b"\x16\xd8\x12\x19", b"\x16\xd6\x12\x19"),
}


def _flipped(data: bytes, place: int, mask: int = 0xFF) -> bytes:
    return data[:place] + bytes([data[place] ^ mask]) + data[place + 1 :]


@pytest.mark.parametrize("how", BROKEN)
def test_a_file_that_is_no_parquet_is_named_and_to_be_written_again(write_manifest: Write, how: str) -> None:
    path = write_manifest({"prompt": [f"a red circle {k}" for k in range(1196)]})
    good = path.read_bytes()
    path.write_bytes(BROKEN[how](good))
    assert path.read_bytes() != good
    assert refusal([path]).startswith(f"manifest {path}: not a readable Parquet file (")
    assert refusal([path]).endswith("write it again")


def test_a_bad_file_among_good_ones_is_the_one_that_is_named(write_manifest: Write, tmp_path: Path) -> None:
    for name in ("a.parquet", "b.parquet", "c.parquet"):
        write_manifest(name=f"m/{name}")
    (tmp_path / "m/b.parquet").write_bytes(b"PAR1 is how it begins")
    assert refusal(tmp_path / "m").startswith(f"manifest {tmp_path}/m/b.parquet: not a readable Parquet file")


@settings(max_examples=150, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), mask=st.integers(1, 255))
def test_a_flipped_byte_anywhere_in_the_footer_loses_no_row_in_silence(place: float, mask: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prompts.parquet"
        pq.write_table(pa.table({"prompt": [f"p{k}" for k in range(20)], "n": ["a", None] * 10}), path, row_group_size=7)
        good = path.read_bytes()
        footer = int.from_bytes(good[-8:-4], "little") + 8
        path.write_bytes(_flipped(good, len(good) - footer + int(place * footer), mask))
        try:
            outcome = f"{path}: {table(opened(path)).num_rows} rows"
        except (InvalidJob, Fatal) as error:
            outcome = str(error)
        assert str(path) in outcome
        assert outcome.endswith((" 20 rows", "write it again", "run again", "cast the column")) or "no column" in outcome, outcome


def test_a_data_page_damaged_under_a_checksum_stops_the_job_with_file_and_place(write_manifest: Write) -> None:
    path = write_manifest(
        {"prompt": [f"a red circle {k}" for k in range(50)]}, compression="none", use_dictionary=False, write_page_checksum=True
    )
    good = path.read_bytes()
    path.write_bytes(_flipped(good, good.index(b"circle 7"), 1))
    manifest = opened(path)
    with pytest.raises(Fatal) as caught:
        table(manifest)
    assert str(caught.value).startswith(f"{path}: damaged near row 0: ")
    assert str(caught.value).endswith("restore the file and run again")


def test_a_file_that_lost_its_head_stops_the_job(write_manifest: Write) -> None:
    path = write_manifest({"prompt": [f"a red circle {k}" for k in range(50)]})
    path.write_bytes(path.read_bytes()[100:])
    manifest = opened(path)
    with pytest.raises(Fatal, match=rf"{path}: damaged near row 0: .*; restore the file and run again"):
        table(manifest)


def test_a_damaged_compressed_page_stops_the_job_where_it_lies(write_manifest: Write) -> None:
    prompts = [f"{k:09d}" for k in range(2 * BATCH_ROWS)]
    path = write_manifest({"prompt": prompts}, row_group_size=BATCH_ROWS, compression="zstd", use_dictionary=False)
    column = pq.read_metadata(path).row_group(1).column(0)
    data = bytearray(path.read_bytes())
    start = column.data_page_offset
    data[start + 30 : start + column.total_compressed_size] = bytes(column.total_compressed_size - 30)
    path.write_bytes(data)
    manifest = opened(path)
    stream = manifest.stream([(0, BATCH_ROWS), (BATCH_ROWS, 2 * BATCH_ROWS)])
    assert next(stream).column("prompt").to_pylist() == prompts[:BATCH_ROWS]
    with pytest.raises(Fatal, match=rf"prompts\.parquet: damaged near row {BATCH_ROWS}: "):
        next(stream)


def test_a_file_that_vanished_or_shrank_after_it_was_opened_is_named(write_manifest: Write) -> None:
    path = write_manifest({"prompt": ["a"] * 10})
    manifest = opened(path)
    write_manifest({"prompt": ["a"] * 5})
    with pytest.raises(Fatal, match="ends before its footer says; it was changed or damaged: restore it and run again"):
        table(manifest)
    path.unlink()
    with pytest.raises(InvalidJob, match=f"manifest {path}: the file is gone"):
        table(manifest)


def test_a_manifest_without_rows_is_refused(write_manifest: Write) -> None:
    path = write_manifest({"prompt": pa.array([], pa.string())})
    assert refusal(path) == f"{path}: the manifest has no rows; write at least one prompt"


def test_files_and_row_groups_without_rows_are_passed_over(tmp_path: Path) -> None:
    schema, paths = pa.schema([("prompt", pa.string())]), [tmp_path / f"{k}.parquet" for k in range(5)]
    for path, groups in zip(paths, ([], [["a"], [], ["b"]], [[]], [["c"], []], []), strict=True):
        with pq.ParquetWriter(path, schema) as writer:
            for group in groups:
                writer.write_table(pa.table({"prompt": group}, schema))
    assert rows(paths)["prompt"] == ["a", "b", "c"]


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


@pytest.mark.parametrize("argument", sorted(set(ARGUMENTS) - SUPPORTED))
def test_an_argument_that_the_model_does_not_take_is_refused_with_a_way_out(write_manifest: Write, argument: str) -> None:
    path = write_manifest({"prompt": ["a"], argument: pa.nulls(1, pa.string())})
    message = refusal(path)
    assert message.startswith(f"{path}: column {argument!r} is the argument `{argument}`, which this model does not take here; ")
    assert f"manifest: {{columns: {{{argument}: null}}}}" in message
    assert rows(path, columns={argument: None}) == {ROW: [0], "prompt": ["a"], EXTRA + argument: [None]}


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
    assert refusal(path) == f"{path}: columns 'file_name' and 'input_file_name' would both be 'input_file_name' in the output; rename one"


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


# -------------------------------------------------------------------------------------------------------------- where


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ({"mood": "x"}, [0, 3]),
        ({"mood": ["x", "z"]}, [0, 2, 3]),
        ({"mood": None}, [4]),
        ({"mood": ["y", None]}, [1, 4]),
        ({"mood": []}, []),
        ({"mood": "nobody"}, []),
        ({"seed": 3}, [3]),
        ({"seed": [1, 2], "mood": ["x", "y"]}, [1]),
        ({"day": dt.date(2024, 1, 2)}, [1]),
        ({"flag": True}, [0, 2]),
        ({"cfg": 7.1}, [4]),
        ({"row": "1-3"}, [1, 2, 3]),
        ({"row": 2}, [2]),
        ({"row": "0-4:2"}, [0, 2, 4]),
        ({"row": "1-4:2,0"}, [0, 1, 3]),
        ({"row": " 0 , 4 "}, [0, 4]),
        ({"row": "3-100"}, [3, 4]),
        ({"row": "9"}, []),
        ({"row": "0-3", "mood": "x"}, [0, 3]),
    ],
)
def test_where_selects_by_value_list_and_row_range_and_keeps_ordinals(
    write_manifest: Write, where: dict[str, Any], expected: list[int]
) -> None:
    columns = {
        "prompt": list("abcde"),
        "mood": ["x", "y", "z", "x", None],
        "seed": [0, 1, 2, 3, 4],
        "day": [dt.date(2024, 1, 1 + k) for k in range(5)],
        "flag": [True, False, True, None, False],
        "cfg": pa.array([0, 1, 2, 3, 7.1], pa.float32()),
    }
    found = rows(write_manifest(columns), where=where)
    assert found[ROW] == expected
    assert found["prompt"] == ["abcde"[k] for k in expected]


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ({"moood": "x"}, "manifest.where: no column 'moood'; did you mean 'mood'?"),
        ({"xyz": "x"}, "manifest.where: no column 'xyz'; there are: row, prompt, seed, mood, tags"),
        ({"seed": "many"}, "manifest.where: seed has type int64, which 'many' does not fit"),
        ({"seed": 1.5}, "manifest.where: seed has type int64, which 1.5 does not fit"),
        ({"seed": 10**30}, "manifest.where: seed has type int64, which 1000"),
        ({"seed": [1, "x"]}, "manifest.where: seed has type int64, which [1, 'x'] does not fit"),
        ({"mood": {"a": 1}}, "manifest.where: mood has type string, which {'a': 1} does not fit"),
        ({"tags": "x"}, "manifest.where: tags has type list<"),
        ({"row": "5-1"}, "manifest.where.row: '5-1' is not a range; write rows as 0-199,300,400-500:2"),
        ({"row": "a-b"}, "manifest.where.row: 'a-b' is not a range"),
        ({"row": "0-9:0"}, "manifest.where.row: '0-9:0' is not a range"),
        ({"row": "0-9:-1"}, "manifest.where.row: '0-9:-1' is not a range"),
        ({"row": "-3"}, "manifest.where.row: '-3' is not a range"),
        ({"row": "1,,2"}, "manifest.where.row: '' is not a range"),
        ({"row": ""}, "manifest.where.row: '' is not a range"),
        ({"row": None}, "manifest.where.row: 'None' is not a range"),
    ],
)
def test_a_wrong_where_is_refused_before_any_row_is_read(write_manifest: Write, where: dict[str, Any], expected: str) -> None:
    path = write_manifest({"prompt": ["a"], "seed": [1], "mood": ["x"], "tags": [["x"]]})
    assert expected in refusal(path, where=where)


def test_where_may_name_a_mapped_argument_and_reads_a_column_of_gaps(write_manifest: Write) -> None:
    paths = [
        write_manifest({"caption": ["a", "b"], "seed": pa.nulls(2)}, "a.parquet"),
        write_manifest({"caption": ["a"], "seed": [5]}, "b.parquet"),
    ]
    assert rows(paths, columns={"prompt": "caption"}, where={"prompt": "a"})[ROW] == [0, 2]
    assert rows(paths, columns={"prompt": "caption"}, where={"seed": 5})[ROW] == [2]
    assert rows(paths, columns={"prompt": "caption"}, where={"seed": None})[ROW] == [0, 1]


@given(st.data())
def test_row_ranges_mean_what_python_ranges_mean(data: st.DataObject) -> None:
    spans = data.draw(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 20), st.integers(1, 7)), min_size=1, max_size=4))
    text = ",".join(f"{start}-{start + length}:{step}" for start, length, step in spans)
    expected = {row for start, length, step in spans for row in range(start, start + length + 1, step)}
    ordinals = np.arange(70)
    assert set(ordinals[_in_ranges(ordinals, text)]) == expected


# ----------------------------------------------------------------------------------------------------------- streaming


@st.composite
def split_tables(draw: st.DrawFn) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Files as (rows, row group size), and ascending ranges over them."""
    files = draw(st.lists(st.tuples(st.integers(0, 25), st.integers(1, 9)), min_size=1, max_size=5).filter(lambda f: sum(n for n, _ in f)))
    total = sum(count for count, _ in files)
    ends = sorted(draw(st.sets(st.integers(0, total), min_size=2, max_size=12)) if total > 1 else {0, 1})
    pairs = list(itertools.pairwise(ends))
    keep = draw(st.lists(st.booleans(), min_size=len(pairs), max_size=len(pairs)))
    return files, [pair for pair, kept in zip(pairs, keep, strict=True) if kept]


@settings(max_examples=150, deadline=None)
@given(split_tables())
def test_any_ascending_ranges_over_any_split_equal_slices_of_the_whole_table(
    case: tuple[list[tuple[int, int]], list[tuple[int, int]]],
) -> None:
    files, ranges = case
    total = sum(count for count, _ in files)
    whole = pa.table(
        {"prompt": [f"p{k}" for k in range(total)], "seed": range(total), "own": [None if k % 3 else k / 2 for k in range(total)]}
    )
    with tempfile.TemporaryDirectory() as folder:
        start = 0
        for number, (count, group) in enumerate(files):
            pq.write_table(whole.slice(start, count), f"{folder}/{number}.parquet", row_group_size=group)
            start += count
        tables = list(opened(folder).stream(ranges))
    expected = whole.rename_columns(["prompt", "seed", EXTRA + "own"])
    assert [found.column(ROW).to_pylist() for found in tables] == [list(range(*pair)) for pair in ranges]
    for found, (first, stop) in zip(tables, ranges, strict=True):
        assert found.drop_columns([ROW]).to_pydict() == expected.slice(first, stop - first).to_pydict()


def test_ranges_that_cross_batches_of_a_large_row_group_lose_nothing(write_manifest: Write) -> None:
    count = 2 * BATCH_ROWS + 37
    manifest = opened(write_manifest({"prompt": [f"p{k}" for k in range(count)]}))
    ranges = [(start, min(count, start + 1000)) for start in range(0, count, 1000)]
    assert [row for found in manifest.stream(ranges) for row in found.column(ROW).to_pylist()] == list(range(count))
    skipping = [(5, 6), (BATCH_ROWS - 1, BATCH_ROWS + 1), (count - 1, count)]
    assert [found.column("prompt").to_pylist() for found in manifest.stream(skipping)] == [["p5"], ["p4095", "p4096"], [f"p{count - 1}"]]


def test_two_streams_of_one_manifest_do_not_disturb_each_other(write_manifest: Write) -> None:
    manifest = opened(write_manifest({"prompt": [f"p{k}" for k in range(100)]}, row_group_size=9))
    found: list[list[str]] = [[] for _ in range(4)]

    def read(place: int) -> None:
        for piece in manifest.stream([(k, k + 5) for k in range(0, 100, 5)]):
            found[place] += piece.column("prompt").to_pylist()

    threads = [threading.Thread(target=read, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[f"p{k}" for k in range(100)]] * 4


# --------------------------------------------------------------------------------------------------------- identity


def test_the_fingerprint_knows_content_and_names_but_not_folders(write_manifest: Write) -> None:
    first = opened(write_manifest({"prompt": ["a", "b"]}, "here/m.parquet")).fingerprint()
    assert first == opened(write_manifest({"prompt": ["a", "b"]}, "there/m.parquet")).fingerprint()
    assert first != opened(write_manifest({"prompt": ["a", "c"]}, "here/m.parquet")).fingerprint()
    assert first != opened(write_manifest({"prompt": ["a", "b"]}, "here/n.parquet")).fingerprint()
    assert [(entry["path"], entry["rows"]) for entry in first] == [("m.parquet", 2)]


def test_a_row_is_told_by_its_file_and_its_place_in_it(write_manifest: Write) -> None:
    manifest = opened([write_manifest({"prompt": ["x"] * count}, f"{count}.parquet") for count in (3, 1, 2)])
    assert [manifest.where_is(k) for k in range(6)] == [
        "3.parquet, row 0",
        "3.parquet, row 1",
        "3.parquet, row 2",
        "1.parquet, row 0",
        "2.parquet, row 0",
        "2.parquet, row 1",
    ]


def test_columns_that_look_like_arguments_are_pointed_out_and_the_others_are_not(write_manifest: Write) -> None:
    names = ("prompt", "steps", "cfg_scale", "samplr", "Seed", "category", "notes")
    found = opened(write_manifest({name: ["x"] for name in names})).hints()
    assert [hint.split("'")[1] for hint in found] == ["steps", "cfg_scale", "samplr", "Seed"]
    assert "columns: {num_inference_steps: steps}" in found[0]
    assert opened(write_manifest({"prompt": ["x"], "num_inference_steps": [3], "steps": [4]}, "b.parquet")).hints() == []
