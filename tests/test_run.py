"""The whole way from a manifest to a dataset, on every engine."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from checker import check_complete, error_rows, image_rows, pixels, tables

import renderfarm
from renderfarm import worker
from renderfarm.errors import Fatal, InvalidJob
from renderfarm.estimate import estimate
from renderfarm.jobfile import load_job
from renderfarm.logs import read_logs
from renderfarm.models.fake import Fake
from renderfarm.preparation import prepare
from renderfarm.schema import ERROR_COLUMNS, IMAGE_COLUMNS

Write = Callable[..., Path]


def every(rows: int, images: int = 1) -> set[tuple[int, int]]:
    return {(row, k) for row in range(rows) for k in range(images)}


def test_every_row_becomes_one_image_and_its_own_columns_arrive(
    engine: str, write_manifest: Write, write_job: Write, tmp_path: Path
) -> None:
    summary = renderfarm.run(write_job(write_manifest()), engine=engine)
    assert (summary.state, summary.exit_code, summary.images, summary.errors) == ("SUCCEEDED", 0, 8, 0)
    check_complete(tmp_path / "out", every(8))
    rows = image_rows(tmp_path / "out")
    assert [row["row_id"] for row in rows] == [f"p{k}" for k in range(8)]
    assert rows[0]["category"] == "warm"
    assert pq.read_schema(tables(tmp_path / "out")[0]).names == [*IMAGE_COLUMNS.names, "category"]


def test_many_images_per_row_count_the_seed_up(engine: str, write_manifest: Write, write_job: Write, tmp_path: Path) -> None:
    manifest = write_manifest({"prompt": ["a", "b"], "seed": [100, None]})
    renderfarm.run(write_job(manifest, render={"num_images_per_prompt": 3}), engine=engine)
    check_complete(tmp_path / "out", every(2, 3))
    seeds = {(row["row"], row["image_index"]): row["seed"] for row in image_rows(tmp_path / "out")}
    assert [seeds[0, k] for k in range(3)] == [100, 101, 102]
    assert len({seeds[1, k] for k in range(3)}) == 3


def test_running_again_does_nothing_and_changes_no_byte(engine: str, write_manifest: Write, write_job: Write, tmp_path: Path) -> None:
    job = write_job(write_manifest())
    renderfarm.run(job, engine=engine)
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (tmp_path / "out/data").rglob("*.*")}
    summary = renderfarm.run(job, engine=engine)
    assert (summary.state, summary.new_images, summary.images) == ("SUCCEEDED", 0, 8)
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (tmp_path / "out/data").rglob("*.*")} == before


def test_a_lost_part_is_made_again_with_the_same_bytes(engine: str, write_manifest: Write, write_job: Write, tmp_path: Path) -> None:
    out = tmp_path / "out"
    job = write_job(write_manifest())
    renderfarm.run(job, engine=engine)
    table = tables(out)[1]
    before = table.read_bytes()
    shutil.rmtree(table.parent)
    next(out.glob("_renderfarm/parts/part-00000001.*")).unlink()
    summary = renderfarm.run(job, engine=engine)
    assert summary.new_images == 3
    assert table.read_bytes() == before


def test_a_committed_part_whose_index_entry_is_missing_is_adopted_not_rendered(
    engine: str, write_manifest: Write, write_job: Write, tmp_path: Path
) -> None:
    job = write_job(write_manifest())
    renderfarm.run(job, engine=engine)
    next((tmp_path / "out").glob("_renderfarm/parts/part-00000001.*")).unlink()
    summary = renderfarm.run(job, engine=engine)
    assert (summary.new_images, summary.images, summary.state) == (0, 8, "SUCCEEDED")
    assert list((tmp_path / "out").glob("_renderfarm/parts/part-00000001.*"))


def test_part_size_and_worker_count_move_no_pixel(local_ray: None, write_manifest: Write, write_job: Write, tmp_path: Path) -> None:
    manifest = write_manifest()
    renderfarm.run(write_job(manifest), engine="inline")
    other = write_job(manifest, "b.yaml", output={"path": str(tmp_path / "b"), "part_rows": 2}, workers={"max": 2})
    renderfarm.run(other, engine="ray")
    assert pixels(tmp_path / "out") == pixels(tmp_path / "b")


def test_bad_rows_become_error_rows_with_reasons_and_the_rest_renders(
    engine: str, write_manifest: Write, write_job: Write, tmp_path: Path
) -> None:
    manifest = write_manifest(
        {
            "prompt": ["good", None, "  ", "good", "good", "[nan]", "[error]", "good"],
            "width": [64, 64, 64, 0, 65, 64, 64, None],
            "sampler": ["euler", "euler", "euler", "euler", "ddim", "euler", "euler", "eulr"],
        }
    )
    summary = renderfarm.run(write_job(manifest), engine=engine)
    out = tmp_path / "out"
    check_complete(out, every(8))
    assert (summary.state, summary.exit_code, summary.images, summary.errors) == ("PARTIAL", 3, 1, 7)
    errors = {row["row"]: row for row in error_rows(out)}
    assert "prompt is null" in errors[1]["error_message"]
    assert "prompt is empty" in errors[2]["error_message"]
    assert "width is 0" in errors[3]["error_message"]
    assert "64 or 72" in errors[4]["error_message"]
    assert errors[5]["error_class"] == "NonFiniteOutput"
    assert errors[6]["error_class"] == "RenderFailed"
    assert errors[6]["retryable"]
    assert "did you mean 'euler'" in errors[7]["error_message"]
    assert summary.error_classes == {"InvalidInput": 5, "NonFiniteOutput": 1, "RenderFailed": 1}
    assert pq.read_schema(out / "errors/part-00000001.parquet").names == ERROR_COLUMNS.names


def test_a_part_without_any_image_is_done_too(engine: str, write_manifest: Write, write_job: Write, tmp_path: Path) -> None:
    job = write_job(write_manifest({"prompt": ["", "", "", "good"]}))
    assert renderfarm.run(job, engine=engine).errors == 3
    summary = renderfarm.run(job, engine=engine)
    assert (summary.new_errors, summary.errors, summary.images) == (0, 3, 1)
    check_complete(tmp_path / "out", every(4))


def test_failures_within_the_declared_tolerance_exit_zero(write_manifest: Write, write_job: Write) -> None:
    manifest = write_manifest({"prompt": ["", "a", "b", "c"]})
    assert renderfarm.run(write_job(manifest, failure={"tolerate": 0.25}), engine="inline").exit_code == 0


def test_where_renders_a_selection_and_keeps_ordinals(engine: str, write_manifest: Write, write_job: Write, tmp_path: Path) -> None:
    job = load_job(write_job(write_manifest()), ["manifest.where={category: warm, row: 0-5}"])
    summary = renderfarm.run(job, engine=engine)
    assert summary.state == "SUCCEEDED"
    check_complete(tmp_path / "out", {(0, 0), (3, 0), (4, 0)})


def test_memory_output_works_in_this_process_and_is_refused_with_ray(write_manifest: Write, write_job: Write) -> None:
    job = write_job(write_manifest(), output={"path": "memory://test-run/out"})
    assert renderfarm.run(job, engine="inline").images == 8
    read = [(image.size, record["row"]) for image, record in renderfarm.open("memory://test-run/out")]
    assert read == [((64, 64), row) for row in range(8)]
    with pytest.raises(InvalidJob, match="--engine inline"):
        renderfarm.run(job, engine="ray")


def test_other_settings_on_the_same_output_are_refused_with_the_differences(write_manifest: Write, write_job: Write) -> None:
    manifest = write_manifest()
    renderfarm.run(write_job(manifest), engine="inline")
    with pytest.raises(InvalidJob, match=r"render\.num_inference_steps: 3 there, 4 now"):
        renderfarm.run(write_job(manifest, render={"num_inference_steps": 4}), engine="inline")
    assert renderfarm.run(write_job(manifest, workers={"max": 7}), engine="inline").state == "SUCCEEDED"


def test_a_changed_manifest_is_refused(write_manifest: Write, write_job: Write) -> None:
    renderfarm.run(write_job(write_manifest()), engine="inline")
    with pytest.raises(InvalidJob, match=r"manifest\.files\[0\]\.rows: 8 there, 1 now"):
        renderfarm.run(write_job(write_manifest({"id": ["x"], "prompt": ["other"], "category": ["c"]})), engine="inline")


def test_a_model_that_cannot_be_loaded_stops_the_job_at_once_with_the_reason(
    engine: str, write_manifest: Write, write_job: Write, tmp_path: Path
) -> None:
    from renderfarm.config import ModelSpec
    from renderfarm.models.catalog import describe

    folder = tmp_path / "damaged"
    shutil.copytree(str(describe(ModelSpec(id="builtin:shapes")).folder), folder)
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(Fatal, match="cannot be loaded"):
        renderfarm.run(write_job(write_manifest(), model=str(folder)), engine=engine)


def test_a_cluster_where_nobody_listens_is_not_waited_for(write_manifest: Write, write_job: Write) -> None:
    """In processes of their own: this one has a Ray, which would be taken."""

    def said(address: str) -> str:
        command = [sys.executable, "-m", "renderfarm", "run", str(write_job(write_manifest())), "--address", address]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 4, done.stdout + done.stderr
        return done.stderr

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and listens to nobody
        for scheme in ("", "ray://"):
            told = said(address := f"{scheme}127.0.0.1:{taken.getsockname()[1]}")
            assert f"error: cannot start or join Ray at {address}: " in told
            assert "refused; is the address right?" in told
    assert "a dashboard's, for `renderfarm submit`; give HOST:6379" in said("http://127.0.0.1:8265")


def test_stopping_finishes_what_is_in_flight_and_the_next_run_continues(
    write_manifest: Write, write_job: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RENDERFARM_FAKE_STEP_S", "0.05")
    manifest = write_manifest({"prompt": [f"row {k}" for k in range(60)]})
    stop = threading.Event()
    job = write_job(manifest)
    first = renderfarm.run(job, engine="inline", stop=stop, observe=lambda p: stop.set() if p.parts_done >= 2 else None)
    assert (first.state, first.exit_code) == ("INTERRUPTED", 75)
    assert 6 <= first.images < 60
    monkeypatch.setenv("RENDERFARM_FAKE_STEP_S", "0")
    second = renderfarm.run(job, engine="inline")
    assert second.new_images == 60 - first.images
    check_complete(tmp_path / "out", every(60))


@pytest.mark.chaos
def test_a_row_that_kills_its_worker_ends_as_an_error_and_the_others_render(
    local_ray: None, write_manifest: Write, write_job: Write, tmp_path: Path
) -> None:
    manifest = write_manifest({"prompt": ["a", "b", "c", "d", "[crash] now", "f", "g"]})
    summary = renderfarm.run(write_job(manifest, workers={"max": 2}), engine="ray")
    out = tmp_path / "out"
    check_complete(out, every(7))
    assert [(row["row"], row["error_class"]) for row in error_rows(out)] == [(4, "WorkerCrashed")]
    assert summary.images == 6
    lost = [event for event in read_logs(str(out)) if event["event"] == "lost"]
    assert (len(lost), lost[-1]["at_rows"]) == (3, [4]), "the last death named its row"


def test_tables_hold_no_column_that_the_schema_does_not_name_and_are_typed_alike(
    write_manifest: Write, write_job: Write, tmp_path: Path
) -> None:
    renderfarm.run(write_job(write_manifest()), engine="inline")
    schemas = {pq.read_schema(path).remove_metadata() for path in tables(tmp_path / "out")}
    assert schemas == {pa.schema([*IMAGE_COLUMNS, pa.field("category", pa.string())])}


def test_the_job_can_be_given_as_a_value(write_manifest: Write, write_job: Write) -> None:
    assert renderfarm.run(load_job(write_job(write_manifest())), engine="inline").images == 8


@pytest.mark.parametrize("name", ["_renderfarm/job.json", "_renderfarm/profile.json", "data/part-00000001/metadata.parquet"])
def test_a_damaged_file_in_the_output_is_one_message_that_names_the_way_out(
    name: str, write_manifest: Write, write_job: Write, tmp_path: Path
) -> None:
    job = write_job(write_manifest())
    renderfarm.run(job, engine="inline")
    (tmp_path / "out" / name).write_bytes(b"PAR1 not what it was")
    next((tmp_path / "out").glob("_renderfarm/parts/part-00000001.*")).unlink()
    with pytest.raises(Fatal, match="damaged"):
        renderfarm.run(job, engine="inline")


def test_a_float_seed_that_is_no_longer_exact_is_refused(write_manifest: Write, write_job: Write, tmp_path: Path) -> None:
    renderfarm.run(write_job(write_manifest({"prompt": ["a", "b"], "seed": [2.0**53, 2.0**60]})), engine="inline")
    assert [row["seed"] for row in image_rows(tmp_path / "out")] == [2**53]
    assert "write the column as int64" in error_rows(tmp_path / "out")[0]["error_message"]


def test_a_row_that_fails_in_a_batch_costs_no_mate(engine: str, write_manifest: Write, write_job: Write, tmp_path: Path) -> None:
    manifest = write_manifest({"prompt": ["a", "b", "[error]", "d", "[oom]", "f"]})
    renderfarm.run(write_job(manifest, output={"part_rows": 6}), engine=engine)
    out = tmp_path / "out"
    check_complete(out, every(6))
    assert [(row["row"], row["error_class"]) for row in error_rows(out)] == [(2, "RenderFailed"), (4, "OutOfMemory")]


def test_a_removed_or_damaged_picture_does_not_stop_the_next_run(write_manifest: Write, write_job: Write, tmp_path: Path) -> None:
    job = write_job(write_manifest())
    renderfarm.run(job, engine="inline")
    gone, damaged = sorted((tmp_path / "out/data").rglob("*.png"))[:2]
    gone.unlink()
    damaged.write_bytes(b"")
    assert renderfarm.run(job, engine="inline").state == "SUCCEEDED"


@pytest.mark.parametrize("part_rows", [3, "auto"])
def test_a_row_range_outside_the_manifest_is_an_error_before_any_worker_starts(
    part_rows: Any, write_manifest: Write, write_job: Write, tmp_path: Path
) -> None:
    job = write_job(write_manifest(), output={"part_rows": part_rows})
    load = load_job(job, ["manifest.where={row: 100-200}"])
    with pytest.raises(InvalidJob, match="selects no row: its `row` lies outside the manifest"):
        renderfarm.run(load, engine="inline")
    assert not (tmp_path / "out/_renderfarm/job.json").exists()


def test_a_selection_of_no_row_is_an_error_that_says_so(write_manifest: Write, write_job: Write) -> None:
    job = load_job(write_job(write_manifest()), ["manifest.where={category: hot}"])
    with pytest.raises(InvalidJob, match="selects no row"):
        renderfarm.run(job, engine="inline")


def test_workers_that_write_elsewhere_do_not_count_as_done(write_manifest: Write, write_job: Write, tmp_path: Path) -> None:
    """As on nodes whose folder of that name is not shared: receipts come, but the parts are not here."""
    from renderfarm.driver import Driver
    from renderfarm.engines.inline import InlineEngine
    from renderfarm.preparation import prepare
    from renderfarm.worker import WorkerSpec

    job = load_job(write_job(write_manifest()))
    elsewhere = job.model_copy(update={"output": job.output.model_copy(update={"path": str(tmp_path / "elsewhere")})})
    prepared = prepare(job)
    driver = Driver(prepared, threading.Event(), lambda progress: None)
    driver.begin()
    with pytest.raises(Fatal, match="not the same place for every node"):
        driver.run(lambda: InlineEngine(WorkerSpec("", elsewhere, prepared.model, prepared.usual)))


def test_an_output_named_by_an_environment_variable_is_where_this_process_says(
    engine: str, write_manifest: Write, write_job: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RENDERFARM_TEST_OUT", str(tmp_path / "named"))
    summary = renderfarm.run(write_job(write_manifest(), output={"path": "${RENDERFARM_TEST_OUT}/x"}), engine=engine)
    assert summary.out == str(tmp_path / "named/x")
    check_complete(tmp_path / "named/x", every(8))
    assert "RENDERFARM_TEST_OUT" not in (tmp_path / "named/x/README.md").read_text()


def test_a_moved_model_and_an_explicit_default_are_the_same_job(write_manifest: Write, write_job: Write, tmp_path: Path) -> None:
    from renderfarm.config import ModelSpec
    from renderfarm.models.catalog import describe

    manifest, shipped = write_manifest({"prompt": ["a"]}), str(describe(ModelSpec(id="builtin:shapes")).folder)
    one, two = (shutil.copytree(shipped, tmp_path / place / "model") for place in "ab")
    renderfarm.run(write_job(manifest, model=str(one)), engine="inline")
    again = write_job(manifest, model=str(two), render={"height": 64, "sampler": "Euler"})
    assert renderfarm.run(again, engine="inline").new_images == 0


def test_a_column_called_image_does_not_hide_the_pictures(write_manifest: Write, write_job: Write, tmp_path: Path) -> None:
    job = load_job(write_job(write_manifest({"prompt": ["a"], "image": ["old.png"]})), ["manifest.columns={image: null}"])
    renderfarm.run(job, engine="inline")
    assert image_rows(tmp_path / "out")[0]["input_image"] == "old.png"


LONG, NEGATIVE = " ".join(f"w{k}" for k in range(80)), " ".join(f"n{k}" for k in range(80))


def test_the_table_tells_what_the_model_did_not_see_of_a_prompt(write_manifest: Write, write_job: Write, tmp_path: Path) -> None:
    manifest = write_manifest({"prompt": ["short", LONG, "short"], "negative_prompt": [None, None, NEGATIVE]})
    renderfarm.run(write_job(manifest), engine="inline")
    columns = ("prompt_tokens", "prompt_truncated", "prompt_cut_off", "negative_prompt_cut_off")
    assert [tuple(made[column] for column in columns) for made in image_rows(tmp_path / "out")] == [
        (3, False, None, None),
        (82, True, "w75 w76 w77 w78 w79", None),
        (3, False, None, "n75 n76 n77 n78 n79"),
    ]


def test_a_prompt_that_is_not_seen_whole_is_an_error_where_the_job_says_so(write_manifest: Write, write_job: Write, tmp_path: Path) -> None:
    manifest = write_manifest({"prompt": ["short", LONG, "short"], "negative_prompt": [None, None, NEGATIVE]})
    summary = renderfarm.run(write_job(manifest, render={"on_truncation": "error"}), engine="inline")
    assert (summary.images, summary.error_classes) == (1, {"PromptTruncated": 2})
    prompt, negative = (error["error_message"] for error in error_rows(tmp_path / "out"))
    assert "the prompt has 82 tokens; the model would not see its end: 'w75 w76 w77 w78 w79'" in prompt
    assert "the end of the negative prompt: 'n75 n76 n77 n78 n79'" in negative


def test_a_folder_that_holds_something_else_is_not_taken_for_an_output(write_manifest: Write, write_job: Write, tmp_path: Path) -> None:
    mine = tmp_path / "out/README.md"
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(InvalidJob, match=r"is no output of renderfarm, and not empty \(it holds README.md\); give an empty folder"):
        renderfarm.run(write_job(write_manifest()), engine="inline")
    assert mine.read_text() == "mine"
    mine.unlink()
    assert renderfarm.run(write_job(write_manifest()), engine="inline").images == 8


def test_a_run_warns_of_ids_that_come_twice_and_of_columns_that_look_like_arguments(write_manifest: Write, write_job: Write) -> None:
    columns = {"id": ["a", "b", "a", None, None], "prompt": list("vwxyz"), "guidence_scale": [1.0] * 5}
    summary = renderfarm.run(write_job(write_manifest(columns)), engine="inline")
    hint, again = summary.warnings
    assert "column 'guidence_scale' is not read as an argument; if it is guidance_scale" in hint
    assert again.startswith("1 rows have the id of another row, and get its noise")
    columns["seed"] = [1, 2, 3, 4, 5]
    manifest = write_manifest(columns, name="seeds.parquet")
    other = renderfarm.run(write_job(manifest, output={"path": str(manifest.parent / "seeds")}), engine="inline")
    assert other.warnings == (hint,)


def test_a_run_that_has_nothing_to_do_leaves_the_rate_for_plan(write_manifest: Write, write_job: Write) -> None:
    path = write_job(write_manifest())
    renderfarm.run(path, engine="inline")
    before = estimate(prepare(load_job(path)))["images/s of the last run"]
    assert before
    assert renderfarm.run(path, engine="inline").new_images == 0
    assert estimate(prepare(load_job(path)))["images/s of the last run"] == before


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere threads have no priorities of their own")
def test_encoders_step_back_behind_the_thread_that_renders(
    write_manifest: Callable[..., Path], write_job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        os.setpriority(os.PRIO_PROCESS, 0, os.getpriority(os.PRIO_PROCESS, 0))
    except OSError:
        pytest.skip("priorities may not be set here")
    found: dict[str, set[int]] = {}

    def looked_at(name: str, function: Any) -> Any:
        def inner(*arguments: Any, **named: Any) -> Any:
            found.setdefault(name, set()).add(os.getpriority(os.PRIO_PROCESS, 0))
            return function(*arguments, **named)

        return inner

    monkeypatch.setattr(worker, "encode", looked_at("encode", worker.encode))
    monkeypatch.setattr(Fake, "step", looked_at("step", Fake.step))
    renderfarm.run(write_job(write_manifest()), engine="inline")
    ((encoding,), (rendering,)) = found["encode"], found["step"]
    assert min(19, rendering + worker.ENCODERS_STEP_BACK) == encoding
    assert rendering == os.getpriority(os.PRIO_PROCESS, 0)
