"""Rows to samples: precedence, seeds, and one clear error per image for every row that cannot be rendered."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from renderfarm.config import Job, ManifestSpec, ModelSpec
from renderfarm.errors import InvalidInput
from renderfarm.manifest import EXTRA, ROW, open_manifest
from renderfarm.models.catalog import ModelInfo, describe
from renderfarm.records import SampleKey
from renderfarm.samples import MAX_IMAGES_PER_ROW, MAX_PROMPT_CHARACTERS, ExpandedRow, check_side, expand_row, expand_rows
from renderfarm.seeds import MAX_SEED, sample_seed

FAKE = describe(ModelSpec(id="builtin:fake"))  # 64 px, multiples of 8 up to 4096, 20 steps, guidance 5, euler


def job(**changes: Any) -> Job:
    return Job.model_validate({"name": "t", "manifest": "m", "model": "builtin:fake", "output": {"path": "o"}, **changes})


def expand(row: int = 3, job_: Job | None = None, model: ModelInfo = FAKE, **cells: Any) -> ExpandedRow:
    return expand_row({ROW: row, "prompt": "a cat", **cells}, job_ or job(), model)


def refused(job_: Job | None = None, **cells: Any) -> str:
    """The message of the one error that this row ends in."""
    expanded = expand(job_=job_, **cells)
    assert expanded.samples == ()
    assert {error.error_class for error in expanded.errors} == {"InvalidInput"}
    assert not any(error.retryable for error in expanded.errors)
    (message,) = {error.error_message for error in expanded.errors}
    return message


def from_file(tmp_path: Path, columns: dict[str, Any], job_: Job | None = None) -> list[ExpandedRow]:
    """Through a real Parquet file and back."""
    pq.write_table(pa.table(columns), tmp_path / "m.parquet")
    manifest = open_manifest(ManifestSpec(path=str(tmp_path / "m.parquet")), FAKE.arguments)
    return [row for table in manifest.stream([(0, manifest.rows)]) for row in expand_rows(table, job_ or job(), FAKE)]


def texts(*values: bytes | None) -> pa.Array:
    """A string array over any bytes: Arrow itself does not check them."""
    data = b"".join(value or b"" for value in values)
    ends = [sum(len(value or b"") for value in values[:k]) for k in range(len(values) + 1)]
    offsets = pa.py_buffer(b"".join(end.to_bytes(4, "little") for end in ends))
    valid = pa.array([value is not None for value in values]).buffers()[1]
    return pa.Array.from_buffers(pa.string(), len(values), [valid, offsets, pa.py_buffer(data)])


# ------------------------------------------------------------------------------------------------------ precedence


def test_a_row_with_a_prompt_alone_gets_the_models_own_defaults() -> None:
    (sample,) = expand().samples
    assert (sample.key, sample.row_id, sample.prompt, sample.negative_prompt) == (SampleKey(3, 0), "3", "a cat", None)
    assert (sample.height, sample.width, sample.num_inference_steps, sample.guidance_scale, sample.sampler) == (64, 64, 20, 5.0, "euler")


def test_the_row_wins_over_the_job_and_the_job_over_the_model() -> None:
    render = {"height": 128, "width": 256, "num_inference_steps": 7, "guidance_scale": 0, "sampler": "ddim", "negative_prompt": "blur"}
    (sample,) = expand(job_=job(render=render), width=64, guidance_scale=2.5, sampler=None).samples
    assert (sample.height, sample.width, sample.num_inference_steps, sample.guidance_scale, sample.sampler) == (128, 64, 7, 2.5, "ddim")
    assert sample.negative_prompt == "blur"
    assert expand(job_=job(render=render), negative_prompt="").samples[0].negative_prompt == ""
    assert expand(job_=job(render=render)).samples[0].guidance_scale == 0.0


def test_an_override_wins_over_the_row_even_where_the_rows_value_is_wrong() -> None:
    render = {"height": 64, "sampler": "ddim", "override": ["height", "sampler"]}
    (sample,) = expand(job_=job(render=render), height=-5, sampler="nonsense", width=72).samples
    assert (sample.height, sample.width, sample.sampler) == (64, 72, "ddim")


def test_samplers_are_stored_under_the_tables_own_name() -> None:
    assert expand(sampler="K_EULER_A").samples[0].sampler == "euler-a"
    assert expand(sampler=8).samples[0].sampler == "lms"


# ------------------------------------------------------------------------------------------------------- identity


@given(
    row=st.integers(0, 10**12),
    row_id=st.none() | st.text(max_size=20) | st.integers(),
    job_seed=st.integers(0, MAX_SEED - 10),
    prompts=st.tuples(st.text(min_size=1, max_size=9).filter(lambda text: "\x00" not in text and text.strip()), st.just("another")),
    side=st.sampled_from([64, 128]),
    mood=st.text(max_size=5),
)
def test_a_samples_seed_and_key_depend_on_identity_only(
    row: int, row_id: Any, job_seed: int, prompts: tuple[str, str], side: int, mood: str
) -> None:
    first = expand(row, job(seed=job_seed), id=row_id, prompt=prompts[0], num_images_per_prompt=3).samples
    second = expand(
        row,
        job(seed=job_seed, workers={"batch_size": 3}),
        id=row_id,
        prompt=prompts[1],
        height=side,
        negative_prompt=None,
        num_images_per_prompt=2,
    ).samples
    assert [(sample.key, sample.row_id, sample.seed) for sample in first[:2]] == [
        (sample.key, sample.row_id, sample.seed) for sample in second
    ]
    name = str(row) if row_id is None else str(row_id)
    assert [sample.seed for sample in first] == [sample_seed("derive", job_seed, name, None, k) for k in range(3)]


def test_the_ordinal_decides_the_seed_only_where_there_is_no_id() -> None:
    assert expand(1, id="x").samples[0].seed == expand(2, id="x").samples[0].seed
    assert expand(1).samples[0].seed != expand(2).samples[0].seed
    assert expand(1, id=7).samples[0].seed == expand(2, id="7").samples[0].seed


def test_image_k_of_a_row_with_a_seed_has_seed_plus_k() -> None:
    samples = expand(seed=100, num_images_per_prompt=3).samples
    assert [(sample.key.image_index, sample.seed) for sample in samples] == [(0, 100), (1, 101), (2, 102)]
    assert [sample.seed for sample in expand(job_=job(seed=5, seed_policy="same"), num_images_per_prompt=2).samples] == [5, 6]


# --------------------------------------------------------------------------------------------------------- prompts


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (None, "prompt is null; give the row a prompt or leave the row out"),
        ("", "prompt is empty; give the row a prompt or leave the row out"),
        (" \t\n\u3000", "prompt is empty; give the row a prompt or leave the row out"),
        ("a\x00cat", "prompt holds a NUL character; remove it"),
        ("x" * 100_000, "prompt has 100,000 characters; the limit is 20,000: shorten it"),
        ("ü" * (MAX_PROMPT_CHARACTERS + 1), "prompt has 20,001 characters; the limit is 20,000: shorten it"),
    ],
)
def test_a_prompt_that_cannot_be_rendered_is_told_why(prompt: Any, expected: str) -> None:
    assert refused(prompt=prompt) == expected


def test_a_bad_negative_prompt_is_told_too_but_an_empty_one_is_fine() -> None:
    assert refused(negative_prompt="\x00") == "negative_prompt holds a NUL character; remove it"
    assert refused(negative_prompt="x" * 20_001).startswith("negative_prompt has 20,001 characters")
    assert expand(negative_prompt="").samples[0].negative_prompt == ""


@pytest.mark.parametrize(
    "prompt", ["x" * MAX_PROMPT_CHARACTERS, "🦊" * 100, "\u202eright to left", "e\u0301", " kept as it is ", "line\nbreak"]
)
def test_an_unusual_prompt_is_kept_letter_for_letter(tmp_path: Path, prompt: str) -> None:
    (row,) = from_file(tmp_path, {"prompt": [prompt]})
    assert row.samples[0].prompt == prompt


@pytest.mark.parametrize("data", [b"ok\xff", b"\xc3\x28", b"\xed\xa0\x80", b"\xf8\x88\x80\x80\x80", b"\x80"])
@pytest.mark.parametrize("dictionary", [True, False])
def test_text_that_is_not_utf8_costs_its_own_row_only(tmp_path: Path, data: bytes, dictionary: bool) -> None:
    encoded = texts(b"a", data, None, b"\xc3\xa9")
    if dictionary:
        encoded = pa.DictionaryArray.from_arrays(pa.array([0, 1, None, 2], pa.int32()), texts(b"a", data, b"\xc3\xa9"))
    rows = from_file(tmp_path, {"prompt": encoded, "id": ["p", "q", "r", "s"]})
    assert [len(row.samples) for row in rows] == [1, 0, 0, 1]
    assert rows[3].samples[0].prompt == "é"
    (error,) = rows[1].errors
    assert error.error_message.startswith("prompt is not valid UTF-8 text (byte ")
    assert error.error_message.endswith("; write the column again as UTF-8")
    assert (error.key, error.row_id, error.error_class, error.prompt_sha256) == (SampleKey(1, 0), "q", "InvalidInput", None)


@pytest.mark.parametrize("column", ["id", "negative_prompt", "sampler"])
def test_any_argument_that_is_not_utf8_is_an_error_and_never_taken_as_not_given(tmp_path: Path, column: str) -> None:
    rows = from_file(tmp_path, {"prompt": ["a", "b"], column: texts(b"euler", b"\xff\xff")})
    assert [len(row.samples) for row in rows] == [1, 0]
    assert rows[1].errors[0].error_message.startswith(f"{column} is not valid UTF-8 text")
    assert rows[1].errors[0].prompt_sha256 == hashlib.sha256(b"b").hexdigest()


def test_an_own_column_that_no_reader_could_decode_costs_its_row_with_its_name(tmp_path: Path) -> None:
    nested = pa.ListArray.from_arrays([0, 1, 2, 3], texts(b"x", b"y", b"\xfe"))
    rows = from_file(tmp_path, {"prompt": ["a", "b", "c"], "note": texts(b"fine", b"\xff", None), "tags": nested})
    assert [len(row.samples) for row in rows] == [1, 0, 0]
    assert rows[1].errors[0].error_message.startswith("note is not valid UTF-8 text")
    assert rows[2].errors[0].error_message.startswith("tags is not valid UTF-8 text")


def test_the_error_of_a_row_carries_its_prompts_hash_and_one_error_per_planned_image() -> None:
    expanded = expand(9, prompt="a cat", height=-1, num_images_per_prompt=3, id="x")
    assert expanded.samples == ()
    assert [error.key for error in expanded.errors] == [SampleKey(9, k) for k in range(3)]
    assert {error.prompt_sha256 for error in expanded.errors} == {hashlib.sha256(b"a cat").hexdigest()}
    assert {error.row_id for error in expanded.errors} == {"x"}


# ----------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("name", ["height", "width"])
@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, "is 0; it must be a positive number of pixels"),
        (-64, "is -64; it must be a positive number of pixels"),
        (63, "is 63; it must be a multiple of 8 for this model: 56 or 64"),
        (3, "is 3; it must be a multiple of 8 for this model: 8"),
        (4104, "is 4104; this model's limit is 4096 pixels"),
        (4097, "is 4097; this model's limit is 4096 pixels"),
        (2**63, f"is {2**63}; this model's limit is 4096 pixels"),
        (64.5, "is 64.5; it must be a whole number"),
        (math.inf, "is inf; it must be a whole number"),
        (-math.inf, "is -inf; it must be a whole number"),
    ],
)
def test_a_size_that_the_model_cannot_paint_is_told_what_it_can(name: str, value: Any, expected: str) -> None:
    assert refused(**{name: value}) == f"{name} {expected}"


@given(st.integers(-10, 5000))
def test_a_size_is_never_rounded_and_an_advised_one_is_accepted(value: int) -> None:
    try:
        assert check_side(value, "height", FAKE) == value
        assert value % 8 == 0
    except InvalidInput as error:
        if "multiple of" in str(error):
            for near in str(error).rpartition(": ")[2].split(" or "):
                assert check_side(int(near), "height", FAKE) == int(near)


# --------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps is 0; it must be at least 1"),
        ({"num_inference_steps": 999}, "num_inference_steps is 999; sampler euler takes at most 998"),
        ({"num_inference_steps": 51, "sampler": "lcm"}, "num_inference_steps is 51; sampler lcm takes at most 50"),
        ({"num_inference_steps": 2.5}, "num_inference_steps is 2.5; it must be a whole number"),
        ({"num_inference_steps": 1, "sampler": "dpm++2s"}, "num_inference_steps is 1; sampler dpm++2s needs at least 2"),
        ({"guidance_scale": -0.5}, "guidance_scale is -0.5; it must be between 0 and 1000"),
        ({"guidance_scale": 1001}, "guidance_scale is 1001.0; it must be between 0 and 1000"),
        ({"guidance_scale": math.nan}, "guidance_scale is nan; give a finite number"),
        ({"guidance_scale": math.inf}, "guidance_scale is inf; give a finite number"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt is 0; it must be between 1 and 10,000"),
        ({"num_images_per_prompt": -1}, "num_images_per_prompt is -1; it must be between 1 and 10,000"),
        ({"num_images_per_prompt": MAX_IMAGES_PER_ROW + 1}, "num_images_per_prompt is 10001; it must be between 1 and 10,000"),
        ({"num_images_per_prompt": 1.5}, "num_images_per_prompt is 1.5; it must be a whole number"),
        ({"seed": -1}, "seed is -1; it must be between 0 and 2^63 - 1 (leave it out for a derived one)"),
        ({"seed": 2**63}, f"seed is {2**63}; it must be between 0 and 2^63 - 1 (leave it out for a derived one)"),
        ({"seed": MAX_SEED, "num_images_per_prompt": 2}, f"seed is {MAX_SEED}; it must be between 0 and 2^63 - 2"),
        ({"seed": 0.5}, "seed is 0.5; it must be a whole number"),
        ({"sampler": "eulr"}, "unknown sampler 'eulr'; did you mean 'euler'?"),
        ({"sampler": ""}, "unknown sampler ''"),
        ({"sampler": 9}, "sampler code 9 has no exact equivalent"),
    ],
)
def test_a_number_or_a_name_out_of_range_is_told_the_range(cells: dict[str, Any], expected: str) -> None:
    assert refused(**cells).startswith(expected)


@pytest.mark.parametrize(("seed", "images"), [(0, 1), (MAX_SEED, 1), (MAX_SEED - 1, 2), (MAX_SEED - 9_999, 10_000)])
def test_every_seed_that_fits_the_tables_is_taken(seed: int, images: int) -> None:
    samples = expand(seed=seed, num_images_per_prompt=images).samples
    assert (samples[0].seed, samples[-1].seed, len(samples)) == (seed, seed + images - 1, images)
    assert pa.array([sample.seed for sample in samples], pa.int64())[-1].as_py() == seed + images - 1


def test_a_job_seed_that_leaves_no_room_for_the_images_is_an_error_and_no_overflow() -> None:
    tight = job(seed=MAX_SEED, seed_policy="same")
    assert expand(job_=tight).samples[0].seed == MAX_SEED
    assert refused(tight, num_images_per_prompt=2) == f"the job's seed is {MAX_SEED}; for 2 images it must be at most 2^63 - 2"


@pytest.mark.parametrize("type_", [pa.float16(), pa.float32(), pa.float64()])
def test_whole_floats_are_integers_and_nan_is_a_gap(tmp_path: Path, type_: pa.DataType) -> None:
    rows = from_file(
        tmp_path,
        {
            "prompt": ["a", "b", "c"],
            "seed": pa.array([7.0, math.nan, None], type_),
            "height": pa.array([128.0, math.nan, None], type_),
            "num_images_per_prompt": pa.array([2.0, math.nan, None], type_),
        },
    )
    assert [len(row.samples) for row in rows] == [2, 1, 1]
    assert [sample.seed for sample in rows[0].samples] == [7, 8]
    assert [row.samples[0].height for row in rows] == [128, 64, 64]
    assert isinstance(rows[0].samples[0].height, int)
    assert [row.samples[0].seed for row in rows[1:]] == [sample_seed("derive", 0, str(k), None, 0) for k in (1, 2)]


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "prompt": st.none() | st.text(max_size=5),
            "negative_prompt": st.none() | st.text(max_size=5),
            "seed": st.none() | st.integers(-(2**63), 2**64 - 1) | st.floats(),
            "height": st.none() | st.integers(-(2**63), 2**64 - 1) | st.floats(),
            "num_images_per_prompt": st.none() | st.integers(-3, 40) | st.floats(),
            "num_inference_steps": st.none() | st.integers(-5, 2000) | st.floats(),
            "guidance_scale": st.none() | st.floats() | st.integers(-(2**63), 2**64 - 1),
            "sampler": st.none() | st.text(max_size=5) | st.integers(-3, 12),
            "id": st.none() | st.text(max_size=5) | st.integers(),
        },
    )
)
def test_any_row_ends_as_samples_or_as_errors_one_per_image(cells: dict[str, Any]) -> None:
    expanded = expand_row({ROW: 4, **cells}, job(), FAKE)
    assert bool(expanded.samples) != bool(expanded.errors)
    keys = [outcome.key for outcome in (*expanded.samples, *expanded.errors)]
    assert keys == [SampleKey(4, k) for k in range(len(keys))]
    for sample in expanded.samples:
        assert 0 <= sample.seed <= MAX_SEED
        assert sample.height % 8 == 0
        assert math.isfinite(sample.guidance_scale)
    for error in expanded.errors:
        assert error.error_message


def test_rows_are_expanded_in_order_each_exactly_once(tmp_path: Path) -> None:
    rows = from_file(tmp_path, {"prompt": ["a", None, "c", ""], "own": [1, 2, 3, 4]})
    assert [row.ordinal for row in rows] == [0, 1, 2, 3]
    assert [len(row.samples) for row in rows] == [1, 0, 1, 0]


def test_own_columns_never_reach_a_sample() -> None:
    table = pa.table({ROW: [0], "prompt": ["a"], EXTRA + "seed": [5], EXTRA + "height": [-1]})
    (row,) = expand_rows(table, job(), FAKE)
    assert (row.samples[0].height, row.samples[0].seed) == (64, sample_seed("derive", 0, "0", None, 0))
