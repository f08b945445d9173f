"""The job file: what is accepted, and what each mistake is told."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from renderfarm.config import Failure, Job, check_credentials, expand_env
from renderfarm.errors import InvalidJob
from renderfarm.jobfile import MAX_JOB_BYTES, load_job
from renderfarm.preparation import prepare
from renderfarm.seeds import MAX_SEED

MINIMAL = {"name": "t", "manifest": "prompts.parquet", "model": "builtin:fake", "output": {"path": "out"}}


def write(folder: Path, job: Any = None, **changes: Any) -> Path:
    """A job file with MINIMAL and these changes; a text is written as it is."""
    path = folder / "job.yaml"
    path.write_text(job if isinstance(job, str) else yaml.safe_dump({**MINIMAL, **(job or {}), **changes}))
    return path


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(InvalidJob) as caught:
        load_job(path, **options)
    return str(caught.value)


def told(path: Path, **options: Any) -> str:
    """A refusal without the lines that it names."""
    return re.sub(r"(?m)^(\S+\.yaml), line \d+:", r"\1:", refusal(path, **options))


def test_a_minimal_job_gets_every_default(tmp_path: Path) -> None:
    job = load_job(write(tmp_path))
    assert (job.seed, job.seed_policy, job.workers.batch_size, job.workers.dtype) == (0, "derive", 8, "float32")
    given = job.render.model_dump(exclude={"override", "on_truncation"})
    assert given == dict.fromkeys(given)
    assert job.render.on_truncation == "record"
    assert (job.output.layout, job.output.format, job.output.part_rows) == ("files", "png", "auto")


def test_local_paths_are_relative_to_the_job_file_and_out_to_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "jobs").mkdir()
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "jobs", manifest=["../a.parquet", "b/*.parquet", "s3://bucket/c.parquet", "/x/d.parquet"], model="./model")
    job = load_job(path)
    assert job.manifest.path == [f"{tmp_path}/a.parquet", f"{tmp_path}/jobs/b/*.parquet", "s3://bucket/c.parquet", "/x/d.parquet"]
    assert (job.model.id, job.output.path) == (f"{tmp_path}/jobs/model", f"{tmp_path}/jobs/out")
    assert load_job(path, out="elsewhere").output.path == f"{tmp_path}/elsewhere"
    assert load_job(Path("jobs/job.yaml")).output.path == f"{tmp_path}/jobs/out"


def test_short_forms_of_manifest_and_model_mean_the_long_ones(tmp_path: Path) -> None:
    short = load_job(write(tmp_path))
    assert short == load_job(write(tmp_path, manifest={"path": "prompts.parquet"}, model={"id": "builtin:fake"}))
    assert short == load_job(write(tmp_path, manifest=["prompts.parquet"]))


def test_a_job_cannot_be_changed_after_it_was_read(tmp_path: Path) -> None:
    job = load_job(write(tmp_path))
    with pytest.raises(ValueError, match="frozen"):
        job.seed = 1  # type: ignore[misc]


def test_every_field_explains_itself_in_the_schema() -> None:
    described = {"ManifestSpec": {"path", "columns", "where"}, "Workers": {"min", "max", "batch_size", "device", "threads"}}
    for name, fields in described.items():
        properties = Job.model_json_schema()["$defs"][name]["properties"]
        assert all(properties[field].get("description") for field in fields)


# ------------------------------------------------------------------------------------------- files that are no job


def test_a_missing_file_is_named_and_told_what_to_give(tmp_path: Path) -> None:
    message = refusal(tmp_path / "no.yaml")
    assert message.startswith(f"{tmp_path}/no.yaml: no such job file; give the path of a YAML file")


def test_a_folder_is_not_a_job_file(tmp_path: Path) -> None:
    assert refusal(tmp_path) == f"{tmp_path}: cannot read the job file: Is a directory"


def test_a_path_below_a_file_is_not_a_job_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot read the job file: Not a directory" in refusal(tmp_path / "file/job.yaml")


def test_a_huge_file_is_refused_unread(tmp_path: Path) -> None:
    with open(tmp_path / "job.yaml", "wb") as file:
        file.truncate(MAX_JOB_BYTES + 1)
    assert "larger than 1 MiB; a job file holds settings, prompts go into the manifest" in refusal(tmp_path / "job.yaml")


@pytest.mark.parametrize("data", [b"\xff\xfe\x00", b"name: caf\xe9", "name: t".encode("utf-16"), bytes(range(128, 256))])
def test_a_file_that_is_not_utf8_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "job.yaml").write_bytes(data)
    assert refusal(tmp_path / "job.yaml").endswith("not a text file; a job is a YAML file in UTF-8")


def test_a_utf8_byte_order_mark_is_no_problem(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_bytes(b"\xef\xbb\xbf" + yaml.safe_dump(MINIMAL).encode())
    assert load_job(tmp_path / "job.yaml").name == "t"


@pytest.mark.parametrize("text", ["", "# nothing\n", "just words", "- a\n- b\n", "42", "null", "2024-01-01"])
def test_yaml_that_is_no_mapping_is_told_what_a_job_holds(tmp_path: Path, text: str) -> None:
    message = refusal(write(tmp_path, text))
    assert message == f"{tmp_path}/job.yaml: a job file is a YAML mapping with at least name, manifest, model and output"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("name: t\nrender: {height: 64\noutput: x\n", 3),
        ("name: t\n\tmodel: x\n", 2),
        ("name: 't\n", 2),
        ("a: b: c\n", 1),
        ("x: &a 1\ny: *b\n", 2),
    ],
)
def test_broken_yaml_names_file_and_line(tmp_path: Path, text: str, line: int) -> None:
    assert refusal(write(tmp_path, text)).startswith(f"{tmp_path}/job.yaml, line {line}: not valid YAML: ")


@pytest.mark.parametrize(
    "text",
    [
        "name: \x07",
        "a\x00b: 1",
        "name: 2024-13-45",
        "[" * 5000,
        "{a: " * 3000,
        "{{ ds }}: 1",
        "!!python/object/apply:os.getcwd []",
        "%",
        "name: !x y",
    ],
)
def test_text_that_yaml_cannot_take_is_refused_and_never_a_crash(tmp_path: Path, text: str) -> None:
    assert "not valid YAML: " in refusal(write(tmp_path, text))


@pytest.mark.parametrize("text", ["manifest: &m [*m]\n", "output: &o {path: *o}\n", "render: &r {height: *r}\n"])
def test_an_anchor_that_holds_itself_is_refused(tmp_path: Path, text: str) -> None:
    assert str(tmp_path / "job.yaml") in refusal(write(tmp_path, "name: t\n" + text))


@given(st.binary(max_size=200))
def test_any_bytes_are_a_job_or_one_refusal_that_names_the_file(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(data)
    assert str(path) in refusal(path)  # two hundred random bytes make no job


# ------------------------------------------------------------------------------------------------ wrong fields


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"sead": 1}, "sead: unknown field; did you mean 'seed'?"),
        ({"worker": {}}, "worker: unknown field; did you mean 'workers'?"),
        ({"xyzzy": 1}, "xyzzy: unknown field; known fields: version, name, manifest"),
        ({"render": {"steps": 8}}, "render.steps: unknown field; did you mean 'num_inference_steps'?"),
        ({"render": {"heigth": 64}}, "render.heigth: unknown field; did you mean 'height'?"),
        ({"render": {"steps": 8}}, "render.steps: unknown field; "),
        ({"manifest": {"path": "a", "colums": {}}}, "manifest.colums: unknown field; did you mean 'columns'?"),
        ({"output": {"path": "o", "part_row": 3}}, "output.part_row: unknown field; did you mean 'part_rows'?"),
        ({"model": {"id": "a/b", "revison": "x"}}, "model.revison: unknown field; did you mean 'revision'?"),
        ({"workers": {"batchsize": 3}}, "workers.batchsize: unknown field; did you mean 'batch_size'?"),
        ({"failure": {"tolerat": 0}}, "failure.tolerat: unknown field; did you mean 'tolerate'?"),
        ({1: 2}, "1: Keys should be strings"),
    ],
)
def test_an_unknown_field_is_named_with_its_place_and_the_nearest_word(tmp_path: Path, changes: dict[Any, Any], expected: str) -> None:
    assert f"{tmp_path}/job.yaml: {expected}" in told(write(tmp_path, changes))


@pytest.mark.parametrize("field", ["name", "manifest", "model", "output"])
def test_a_missing_field_is_said_to_be_required(tmp_path: Path, field: str) -> None:
    text = yaml.safe_dump({key: value for key, value in MINIMAL.items() if key != field})
    assert refusal(write(tmp_path, text)) == f"{tmp_path}/job.yaml: {field}: is required"


def test_all_mistakes_are_told_at_once_one_a_line(tmp_path: Path) -> None:
    lines = told(write(tmp_path, seed=-1, sead=2, render={"height": "tall"})).splitlines()
    assert [line.split(": ")[1] for line in lines] == ["render.height", "seed", "sead"]


@pytest.mark.parametrize(
    ("changes", "place", "words"),
    [
        ({"version": 2}, "version", "should be 1, not 2"),
        ({"name": ""}, "name", "match pattern"),
        ({"name": "a/b"}, "name", "match pattern"),
        ({"name": "x" * 101}, "name", "match pattern"),
        ({"name": 5}, "name", "valid string"),
        ({"seed": -1}, "seed", "greater than or equal to 0"),
        ({"seed": MAX_SEED + 1}, "seed", "less than or equal to"),
        ({"seed": 1.5}, "seed", "valid integer"),
        ({"seed": "many"}, "seed", "valid integer"),
        ({"seed_policy": "random"}, "seed_policy", "'derive' or 'same', not 'random'"),
        ({"render": {"height": 0}}, "render.height", "greater than or equal to 1"),
        ({"render": {"width": 9000}}, "render.width", "less than or equal to 8192"),
        ({"render": {"width": -64}}, "render.width", "greater than or equal to 1"),
        ({"render": {"num_inference_steps": 0}}, "render.num_inference_steps", "greater than or equal to 1"),
        ({"render": {"num_inference_steps": 1001}}, "render.num_inference_steps", "less than or equal to 1000"),
        ({"render": {"num_images_per_prompt": 0}}, "render.num_images_per_prompt", "greater than or equal to 1"),
        ({"render": {"guidance_scale": float("nan")}}, "render.guidance_scale", "finite"),
        ({"render": {"guidance_scale": float("inf")}}, "render.guidance_scale", ""),
        ({"render": {"guidance_scale": -0.1}}, "render.guidance_scale", "greater than or equal to 0"),
        ({"render": {"override": ["seed"]}}, "render.override.0", "not 'seed'"),
        ({"render": {"override": ["height"]}}, "render", "override names height, but render.height is not given"),
        ({"render": {"seed": 1}}, "render", "give every row the same noise"),
        ({"render": [1]}, "render", "valid dictionary"),
        ({"workers": {"min": 3, "max": 2}}, "workers", "workers.min (3) is larger than workers.max (2)"),
        ({"workers": {"min": 0}}, "workers.min", "greater than or equal to 1"),
        ({"workers": {"batch_size": 0}}, "workers.batch_size", "greater than or equal to 1"),
        ({"workers": {"batch_size": "many"}}, "workers.batch_size", "valid integer"),
        ({"workers": {"dtype": "fp16"}}, "workers.dtype", "not 'fp16'"),
        ({"workers": {"device": "tpu"}}, "workers.device", "not 'tpu'"),
        ({"output": {}}, "output.path", "is required"),
        ({"output": "out"}, "output", "valid dictionary"),
        ({"output": {"path": ""}}, "output.path", "at least 1 character"),
        ({"output": {"path": "o", "layout": "zip"}}, "output.layout", "not 'zip'"),
        ({"output": {"path": "o", "format": "jpg"}}, "output.format", "not 'jpg'"),
        ({"output": {"path": "o", "part_rows": 0}}, "output.part_rows", "greater than or equal to 1"),
        ({"output": {"path": "o", "part_rows": "all"}}, "output.part_rows", "'auto'"),
        ({"manifest": 5}, "manifest", "valid dictionary"),
        ({"manifest": []}, "manifest.path", "at least 1 item"),
        ({"manifest": ""}, "manifest.path", "at least 1 character"),
        ({"manifest": ["a", ""]}, "manifest.path.1", "at least 1 character"),
        ({"manifest": ["a", 5]}, "manifest.path.1", "valid string"),
        ({"manifest": {"path": "a", "columns": 5}}, "manifest.columns", "valid dictionary"),
        ({"manifest": {"path": "a", "columns": {"prompt": 5}}}, "manifest.columns.prompt", "valid string"),
        ({"manifest": {"path": "a", "where": "x"}}, "manifest.where", "valid dictionary"),
        ({"failure": {"tolerate": 2}}, "failure.tolerate", "write a share of all images as 0.005 or 0.5%, not 2"),
        ({"failure": {"tolerate": "half"}}, "failure.tolerate", "write a share of all images as 0.005 or 0.5%, not 'half'"),
        ({"output": {"path": "o", "layout": "parqet"}}, "output.layout", "not 'parqet'; did you mean 'parquet'?"),
        ({"sweep": {"product": {}, "noize": "own"}}, "sweep.noize", "unknown field; did you mean 'noise'?"),
        ({"sweep": {"product": {"seed": []}}}, "sweep.product.seed", "at least 1 item"),
        ({"sweep": {"product": {"seed": [1]}, "zip": {"seed": [1]}}}, "sweep", "seed is an axis of product and of zip; name it once"),
        ({"prompts": {"templates": "randm"}}, "prompts.templates", "did you mean 'random'?"),
        ({"prompts": {"templates": "combinatorial", "samples": 2}}, "prompts", "prompts.samples is for templates: random"),
        ({"manifest": {"columns": {}}}, "manifest", "give either path or rows"),
        ({"params": {"steps": {"kind": "int"}}}, "params.steps.kind", "unknown field"),
        ({"params": {"steps": {"min": 1}}}, "params.steps", "give a type (int, float, str, bool) or a default"),
        ({"params": {"style": {"default": "x", "min": 1}}}, "params.style", "min and max are for numbers"),
        ({"failure": {"attempts": 0}}, "failure.attempts", "greater than or equal to 1"),
    ],
)
def test_a_wrong_value_names_file_and_field_and_what_would_be_right(
    tmp_path: Path, changes: dict[str, Any], place: str, words: str
) -> None:
    message = told(write(tmp_path, changes))
    assert any(line.startswith(f"{tmp_path}/job.yaml: {place}: ") and words in line for line in message.splitlines()), message


def test_a_seed_in_the_render_block_is_told_both_ways_out(tmp_path: Path) -> None:
    message = refusal(write(tmp_path, render={"seed": 5}))
    assert "use the top-level `seed`" in message
    assert "`seed_policy: same`" in message


# ----------------------------------------------------------------------------------------- credentials, environment


@pytest.mark.parametrize(
    "url",
    [
        "https://user:hunter2@host/x",
        "s3://AKIA:hunter2@bucket/x",
        "s3://AKIA:hun/ter2+x=hunter2@bucket/x",
        "S3://AKIA:hunter2@bucket",
        "s3://:hunter2@bucket/x",
        "hdfs://me:hunter2@namenode:8020/x",
        "https://hunter2@host/x",
    ],
)
@pytest.mark.parametrize("place", ["manifest.path", "output.path", "model.id"])
def test_a_url_with_credentials_is_refused_without_printing_them(tmp_path: Path, place: str, url: str) -> None:
    block, _, field = place.partition(".")
    message = refusal(write(tmp_path, {block: {field: url}}))
    assert f"the URL in {place} holds credentials; remove them and use the environment's own credential chain" in message
    assert "hunter2" not in message


@pytest.mark.parametrize(
    ("place", "changes"),
    [
        ("model.adapters.a", {"model": {"id": "builtin:shapes", "adapters": {"a": "s3://AKIA:hunter2@bucket/a.safetensors"}}}),
        ("after[0].upscale.weights", {"after": [{"upscale": {"weights": "https://me:hunter2@host/x.safetensors"}}]}),
        ("after[0].restore_faces.detector", {"after": [{"restore_faces": {"weights": "w", "detector": "s3://k:hunter2@b/y.onnx"}}]}),
        ("inputs.folder", {"inputs": {"folder": "s3://KEY:hunter2@bucket/x"}}),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)
def test_credentials_are_refused_wherever_a_job_names_a_place(tmp_path: Path, place: str, changes: dict[str, Any]) -> None:
    message = refusal(write(tmp_path, **changes))
    assert f"the URL in {place} holds credentials" in message
    assert "hunter2" not in message


@pytest.mark.parametrize(
    "query",
    [
        "sv=2026-01-01&sig=hunter2",
        "X-Amz-Signature=hunter2",
        "x-amz-security-token=hunter2",
        "X-Goog-Credential=hunter2",
        "AWSAccessKeyId=hunter2&Expires=1",
        "token=hunter2",
        "access_token=hunter2",
        "api_key=hunter2",
        "client-secret=hunter2",
        "x=1#access_token=hunter2",
    ],
)
def test_a_url_that_lets_its_bearer_in_is_refused_where_it_would_be_kept(
    tmp_path: Path, query: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"https://host/x?{query}"
    kept = {"manifest.path": {"manifest": url}, "output.path": {"output": {"path": url}}, "notify.url": {"notify": {"url": url}}}
    for place, changes in kept.items():
        message = refusal(write(tmp_path, **changes))
        assert f"the URL in {place} holds credentials (its " in message
        assert "hunter2" not in message
    monkeypatch.setenv("URL", url)
    with pytest.raises(InvalidJob, match=r"the URL in model\.id holds credentials") as caught:
        prepare(load_job(write(tmp_path, model="${URL}")))
    assert "hunter2" not in str(caught.value)
    check_credentials("manifest.path", "s3://bucket/what?sigma=1&keys=2&versionId=3&page_token=4")
    check_credentials("notify.url", "https://hooks.example.org/x?token=${TOKEN}")


def test_credentials_in_an_environment_variable_are_refused_before_they_reach_the_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODEL_URL", "http://user:hunter2@127.0.0.1:9/model")
    with pytest.raises(InvalidJob, match=r"the URL in model\.id holds credentials") as caught:
        prepare(load_job(write(tmp_path, model="${MODEL_URL}")))
    assert "hunter2" not in str(caught.value)


def test_credentials_in_a_list_of_manifests_or_in_out_are_found_too(tmp_path: Path) -> None:
    assert "manifest.path holds credentials" in refusal(write(tmp_path, manifest=["a.parquet", "s3://k:s@b/x"]))
    assert "output.path holds credentials" in refusal(write(tmp_path), out="s3://k:s@b/x")
    assert "output.path holds credentials" in refusal(write(tmp_path), sets=["output.path=s3://k:s@b/x"])


@pytest.mark.parametrize(
    "url",
    [
        "abfs://container@account.dfs.core.windows.net/x",
        "s3://bucket/a@b/c",
        "http://host:9000/bucket@main/x",
        "hf://datasets/org/name@main/x.parquet",
        "/data/a:b@c",
    ],
)
def test_an_at_sign_in_a_path_is_no_credential(tmp_path: Path, url: str) -> None:
    assert load_job(write(tmp_path, manifest=url)).manifest.path == url


def test_environment_variables_stay_as_written_until_they_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUCKET", "s3://bucket")
    job = load_job(write(tmp_path, manifest="${BUCKET}/x.parquet", output={"path": "out/${USER_NAME}"}))
    assert job.manifest.path == "${BUCKET}/x.parquet"
    assert job.output.path == f"{tmp_path}/out/${{USER_NAME}}"
    assert expand_env(job.manifest.path) == "s3://bucket/x.parquet"


def test_an_unset_environment_variable_is_an_error_and_never_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RENDERFARM_UNSET", raising=False)
    with pytest.raises(InvalidJob, match=r"uses \$\{RENDERFARM_UNSET\}, but that environment variable is not set; set it"):
        expand_env("a/${RENDERFARM_UNSET}/b")


@given(st.text(alphabet=st.characters(exclude_characters="$", codec="utf-8")))
def test_text_without_a_dollar_is_left_alone(text: str) -> None:
    assert expand_env(text) == text


def test_a_lone_dollar_is_left_alone() -> None:
    assert expand_env("$HOME/$/${}/${1}/$$") == "$HOME/$/${}/${1}/$$"


# ------------------------------------------------------------------------------------------------------ dates


def test_the_logical_date_fills_the_paths(tmp_path: Path) -> None:
    path = write(tmp_path, manifest="{{ds}}/*.parquet", output={"path": "/out/{{ ds }}/{{  ds_nodash  }}"})
    job = load_job(path, logical_date="2024-02-29")
    assert job.manifest.path == f"{tmp_path}/2024-02-29/*.parquet"
    assert job.output.path == "/out/2024-02-29/20240229"
    assert load_job(path, out="/other/{{ ds }}", logical_date="2024-02-29").output.path == "/other/2024-02-29"


@pytest.mark.parametrize("word", ["ds", "ds_nodash"])
def test_a_date_in_the_job_without_a_logical_date_says_which_option_to_give(tmp_path: Path, word: str) -> None:
    message = refusal(write(tmp_path, output={"path": f"out/{{{{ {word} }}}}"}))
    assert message == f"{tmp_path}/job.yaml: uses {{{{ {word} }}}}; give --logical-date YYYY-MM-DD"


@pytest.mark.parametrize("word", ["data_interval_start", "macros.ds_add(ds, 1)", "ds + 1", ""])
def test_a_template_word_that_is_not_known_is_refused_and_never_a_folders_name(tmp_path: Path, word: str) -> None:
    message = refusal(write(tmp_path, output={"path": f"out/{{{{ {word} }}}}"}), logical_date="2024-01-01")
    assert f"{{{{ {word} }}}} is not known; use {{{{ ds }}}} or {{{{ ds_nodash }}}}" in message


@pytest.mark.parametrize("date", ["yesterday", "2024-13-01", "2023-02-29", "01/02/2024"])
def test_a_date_that_is_none_is_refused(tmp_path: Path, date: str) -> None:
    assert refusal(write(tmp_path), logical_date=date) == f"--logical-date {date}: write it as YYYY-MM-DD"


def test_braces_in_a_prompt_are_not_a_template(tmp_path: Path) -> None:
    assert load_job(write(tmp_path, render={"negative_prompt": "{{ ds }}"})).render.negative_prompt == "{{ ds }}"


# ------------------------------------------------------------------------------------------------------- --set


def test_set_changes_one_field_and_leaves_its_neighbours(tmp_path: Path) -> None:
    path = write(tmp_path, render={"height": 64, "width": 64})
    job = load_job(path, sets=["render.height=128", "seed=7", "workers.max=4", "render.sampler=dpm++2m", "render.guidance_scale=3"])
    assert (job.render.height, job.render.width, job.seed, job.workers.max) == (128, 64, 7, 4)
    assert (job.render.sampler, job.render.guidance_scale) == ("dpm++2m", 3.0)


def test_set_takes_yaml_values_and_the_last_one_wins(tmp_path: Path) -> None:
    sets = ["manifest.where={category: [a, b]}", "render.negative_prompt='a=b'", "seed=1", "seed=2", "render.height=null"]
    job = load_job(write(tmp_path, render={"height": 64}), sets=sets)
    assert job.manifest.where == {"category": ["a", "b"]}
    assert job.manifest.path == f"{tmp_path}/prompts.parquet"
    assert (job.render.negative_prompt, job.seed, job.render.height) == ("a=b", 2, None)


def test_set_reaches_inside_the_short_forms(tmp_path: Path) -> None:
    job = load_job(write(tmp_path, model="org/name"), sets=["model.revision=abc", "manifest.columns=diffusiondb"])
    assert (job.model.id, job.model.revision, job.manifest.columns) == ("org/name", "abc", "diffusiondb")


@pytest.mark.parametrize("item", ["", "seed", "=5", "render.height:64"])
def test_a_set_without_field_or_value_is_told_how_to_write_it(tmp_path: Path, item: str) -> None:
    assert refusal(write(tmp_path), sets=[item]).startswith(f"--set {item}: write it as field.sub=value, for example")


@pytest.mark.parametrize("value", ["[1", "{a", "2024-13-45", "'x", "*a"])
def test_a_set_whose_value_is_not_yaml_is_refused(tmp_path: Path, value: str) -> None:
    assert refusal(write(tmp_path), sets=[f"seed={value}"]) == f"--set seed={value}: the value is not valid YAML"


@pytest.mark.parametrize("item", ["seed.x=1", "name.x=1", "manifest.path.x=1"])
def test_a_set_below_a_plain_value_is_refused(tmp_path: Path, item: str) -> None:
    assert "is not a block in the job file" in refusal(write(tmp_path, seed=3), sets=[item])


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ("rendr.height=64", "rendr: unknown field; did you mean 'render'?"),
        ("render.heigt=64", "render.heigt: unknown field; did you mean 'height'?"),
    ],
)
def test_a_set_of_an_unknown_field_gets_the_nearest_word(tmp_path: Path, item: str, expected: str) -> None:
    assert expected in refusal(write(tmp_path), sets=[item])


def test_a_set_does_not_leak_into_the_next_job(tmp_path: Path) -> None:
    path = write(tmp_path)
    before = dict(os.environ), path.read_bytes()
    load_job(path, sets=["seed=9"], out="/elsewhere")
    assert load_job(path).seed == 0
    assert (dict(os.environ), path.read_bytes()) == before


def test_a_key_that_is_given_twice_is_an_error_that_names_its_line(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("name: a\nseed: 1\nseed: 2\n")
    with pytest.raises(InvalidJob, match=r"job.yaml, line 3: .*'seed' is given twice; keep one"):
        load_job(tmp_path / "job.yaml")


def test_a_share_of_failures_may_be_given_in_percent() -> None:
    assert Failure(tolerate="0.5%").tolerate == pytest.approx(0.005)  # type: ignore[arg-type]
    assert Failure(tolerate=0.25).tolerate == 0.25
    for wrong in ("five", "101%", "-1%", 2):
        with pytest.raises(ValidationError):
            Failure(tolerate=wrong)  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------------- lines, and parameters


def test_each_mistake_names_its_line_or_the_set_that_made_it(tmp_path: Path) -> None:
    text = "name: t\nmanifest: p.parquet\nmodel: builtin:fake\n\nrender:\n  # tall\n  heigth: 64\n  override: [width, heigt]\n"
    text += "output: {path: out}\nseed: -1\n"
    path = write(tmp_path, text)
    lines = refusal(path, sets=["workers.max=0", "render.sampler=[1]"]).splitlines()
    assert {line.split(": ")[0].rsplit("/", 1)[1] + ": " + line.split(": ")[1] for line in lines} == {
        "job.yaml, line 7: render.heigth",
        "job.yaml, line 8: render.override.1",
        "job.yaml, line 10: seed",
        "job.yaml: --set workers.max",
        "job.yaml: --set render.sampler",
    }


PARAMS = {
    "steps": {"type": "int", "default": 20, "min": 1, "max": 50, "description": "more is finer"},
    "style": {"default": "photo", "choices": ["photo", "drawing"]},
    "scale": 5,
    "note": {"type": "str"},
}


def with_params(folder: Path, **changes: Any) -> Path:
    render = {"num_inference_steps": "${params.steps}", "negative_prompt": "no ${params.style}, ${params.steps} ${HOME}"}
    return write(folder, {"params": PARAMS, "render": render, "output": {"path": "out/${params.style}-${params.note}"}, **changes})


def test_a_parameter_keeps_its_type_alone_and_becomes_text_within_a_text(tmp_path: Path) -> None:
    job = load_job(with_params(tmp_path), sets=["params.note=7", "params.steps=30"])
    assert job.render.num_inference_steps == 30
    assert job.render.negative_prompt == "no photo, 30 ${HOME}"
    assert job.output.path == f"{tmp_path}/out/photo-7"
    again = load_job(write(tmp_path, job.model_dump(mode="json"), name="job"))  # as `submit` sends it
    assert again.render == job.render


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        ([], "params.note has no default; give --set params.note=…"),
        (["params.note=x", "params.step=3"], "the job has no parameter 'step'; did you mean 'steps'?"),
        (["params.note=x", "params.steps=60"], "params.steps is 60; the most is 50"),
        (["params.note=x", "params.steps=0"], "params.steps is 0; the least is 1"),
        (["params.note=x", "params.steps=many"], "params.steps is 'many', and must be a whole number"),
        (["params.note=x", "params.steps=true"], "params.steps is True, and must be a whole number"),
        (["params.note=x", "params.scale=x"], "params.scale is 'x', and must be a whole number"),
        (["params.note=x", "params.style=draw"], "params.style is 'draw'; it may be 'photo', 'drawing'; did you mean 'drawing'?"),
    ],
)
def test_a_parameter_that_is_not_allowed_is_told_what_is(tmp_path: Path, sets: list[str], words: str) -> None:
    assert words in refusal(with_params(tmp_path), sets=sets)


def test_a_use_of_an_unknown_parameter_names_its_line(tmp_path: Path) -> None:
    path = write(tmp_path, "name: t\nparams: {steps: 20}\nrender:\n  num_inference_steps: ${params.stesp}\n")
    assert refusal(path) == (
        f"{path}, line 4: render.num_inference_steps: ${{params.stesp}}: no such parameter in params; did you mean 'steps'?"
    )
    path = write(tmp_path, "name: t\nparams:\n  steps: {default: 20, max: 10}\nrender: {}\n")
    assert refusal(path) == f"{path}, line 3: params.steps is 20; the most is 10"
