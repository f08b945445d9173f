"""`validate`: every row is looked at, each problem is told with file and row, and nothing is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from renderfarm.errors import InvalidJob
from renderfarm.jobfile import load_job
from renderfarm.preparation import prepare
from renderfarm.validation import KEPT_PROBLEMS, Validation, validate_rows

Write = Callable[..., Path]


@pytest.fixture
def validate(write_job: Write) -> Callable[..., Validation]:
    def check(path: Path, sets: list[str] | None = None, **changes: Any) -> Validation:
        return validate_rows(prepare(load_job(write_job(path, **changes), sets)))

    return check


Validate = Callable[..., Validation]


def test_a_good_manifest_is_counted_and_has_no_problem(write_manifest: Write, validate: Validate) -> None:
    found = validate(write_manifest(), render={"num_images_per_prompt": 3})
    assert (found.rows, found.images, found.bad_rows, found.duplicate_ids, found.problems) == (8, 24, 0, 0, [])
    assert found.ok


def test_each_bad_row_is_told_with_its_file_its_row_and_its_column(write_manifest: Write, validate: Validate, tmp_path: Path) -> None:
    write_manifest({"prompt": ["a", None, "c"], "height": [64, 64, 65]}, "m/a.parquet")
    write_manifest({"prompt": ["d", "e"], "height": [-1, 64]}, "m/b.parquet")
    found = validate(tmp_path / "m")
    assert found.problems == [
        "a.parquet, row 1: prompt is null; give the row a prompt or leave the row out",
        "a.parquet, row 2: height is 65; it must be a multiple of 8 for this model: 64 or 72",
        "b.parquet, row 0: height is -1; it must be a positive number of pixels",
    ]
    assert (found.rows, found.images, found.bad_rows, dict(found.classes)) == (5, 2, 3, {"InvalidInput": 3})
    assert not found.ok


def test_duplicate_ids_are_told_with_both_their_rows(write_manifest: Write, validate: Validate, tmp_path: Path) -> None:
    write_manifest({"prompt": list("abc"), "id": ["x", "y", "x"]}, "m/a.parquet")
    write_manifest({"prompt": list("de"), "id": ["z", "y"]}, "m/b.parquet")
    found = validate(tmp_path / "m")
    advice = "without a seed of their own both get the same noise: give each row its own id"
    assert found.problems == [
        f"a.parquet, row 2: its id is that of a.parquet, row 0; {advice}",
        f"b.parquet, row 1: its id is that of a.parquet, row 1; {advice}",
    ]
    assert (found.duplicate_ids, found.bad_rows, found.images) == (2, 0, 5)
    assert not found.ok


def test_an_id_given_three_times_is_two_duplicates(write_manifest: Write, validate: Validate) -> None:
    assert validate(write_manifest({"prompt": list("abcd"), "id": [7, 7, 8, 7]})).duplicate_ids == 2


def test_a_null_id_is_the_ordinal_and_may_clash_with_a_given_one(write_manifest: Write, validate: Validate) -> None:
    assert validate(write_manifest({"prompt": list("abc"), "id": [None, "b", None]})).duplicate_ids == 0
    assert validate(write_manifest({"prompt": list("abc"), "id": [None, "0", None]})).duplicate_ids == 1


def test_duplicates_among_selected_rows_are_told_by_their_place_there(write_manifest: Write, validate: Validate) -> None:
    path = write_manifest({"prompt": list("abcd"), "id": ["x", "x", "y", "x"]})
    found = validate(path, sets=["manifest.where={row: 1-3}"])
    assert (found.rows, found.duplicate_ids) == (3, 1)
    assert found.problems[0].startswith("row 2 of the selection: its id is that of row 0 of the selection; ")


def test_a_manifest_without_ids_has_no_duplicates(write_manifest: Write, validate: Validate) -> None:
    assert validate(write_manifest({"prompt": ["same"] * 5})).ok


def test_rows_left_out_by_where_are_not_looked_at(write_manifest: Write, validate: Validate) -> None:
    path = write_manifest({"prompt": ["a", "", "c"], "mood": ["x", "y", "x"]})
    found = validate(path, sets=["manifest.where={mood: x}"])
    assert (found.rows, found.ok) == (2, True)


def test_a_million_problems_are_all_counted_but_only_the_first_are_kept(write_manifest: Write, validate: Validate) -> None:
    count = 3 * KEPT_PROBLEMS
    path = write_manifest({"prompt": [""] * count, "id": ["same"] * count})
    found = validate(path, output={"part_rows": 64})
    assert (found.bad_rows, found.duplicate_ids, len(found.problems)) == (count, count - 1, KEPT_PROBLEMS)
    assert found.problems[-1].startswith(f"prompts.parquet, row {KEPT_PROBLEMS - 1}: prompt is empty")


def test_validating_writes_nothing(write_manifest: Write, write_job: Write, tmp_path: Path) -> None:
    job = write_job(write_manifest())
    before = sorted(tmp_path.rglob("*"))
    assert validate_rows(prepare(load_job(job))).rows == 8
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"render": {"sampler": "eulr"}}, "render: unknown sampler 'eulr'; did you mean 'euler'?"),
        ({"render": {"height": 65}}, "render: height is 65; it must be a multiple of 8 for this model: 64 or 72"),
        ({"render": {"width": 8192}}, "render: width is 8192; this model's limit is 4096 pixels"),
        ({"model": "builtin:nothing"}, "model builtin:nothing: there is no such builtin"),
        ({"model": "/no/such/folder"}, "model /no/such/folder: no such folder"),
        ({"model": "org/name"}, "a hub model needs its full commit"),
        ({"model": {"id": "org/name", "revision": "main"}}, "a hub model needs its full commit"),
        ({"model": "a b c"}, "model a b c: give builtin:shapes, a folder"),
        ({"output": {"path": "${RENDERFARM_UNSET}/out"}}, "uses ${RENDERFARM_UNSET}, but that environment variable is not set"),
        ({"output": {"path": "ftp://host/out"}}, "ftp://host/out: ftp:// cannot be written"),
    ],
)
def test_what_is_wrong_with_the_whole_job_is_known_before_any_row_is_read(
    write_manifest: Write, write_job: Write, changes: dict[str, Any], expected: str
) -> None:
    with pytest.raises(InvalidJob) as caught:
        prepare(load_job(write_job(write_manifest(), **changes)))
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("manifest", "expected"),
    [
        ("/no/such.parquet", "manifest /no/such.parquet: no such file"),
        ("${RENDERFARM_UNSET}/m.parquet", "uses ${RENDERFARM_UNSET}, but that environment variable is not set"),
        ("{path: prompts.parquet, where: {mood: x}}", "manifest.where: no column 'mood'"),
        ("{path: prompts.parquet, columns: diffusion}", "manifest.columns: no preset 'diffusion'; known: diffusiondb"),
    ],
)
def test_what_is_wrong_with_the_manifest_is_known_before_any_row_is_read(
    write_manifest: Write, write_job: Write, manifest: str, expected: str
) -> None:
    path = write_job(write_manifest({"prompt": ["a"]}))
    with pytest.raises(InvalidJob) as caught:
        prepare(load_job(path, [f"manifest={manifest}"]))
    assert expected in str(caught.value)


@pytest.mark.parametrize("content", ["{}", "not json", '{"_class_name": "FluxPipeline"}', '{"_class_name": "StableDiffusionPipeline"}'])
def test_a_folder_that_is_no_model_we_know_is_refused_by_name(
    write_manifest: Write, write_job: Write, tmp_path: Path, content: str
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/model_index.json").write_text(content)
    with pytest.raises(InvalidJob, match=f"model {tmp_path}/model: "):
        prepare(load_job(write_job(write_manifest(), model=str(tmp_path / "model"))))


def test_an_empty_folder_is_no_model(write_manifest: Write, write_job: Write, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(InvalidJob, match=r"is not a model in diffusers' format \(model_index\.json\)"):
        prepare(load_job(write_job(write_manifest(), model="./model")))
