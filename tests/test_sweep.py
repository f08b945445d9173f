"""Sweeps and templates in a job: the rows that come out, and that they are made once."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import renderfarm
from renderfarm.config import Sweep
from renderfarm.errors import Fatal, InvalidJob
from renderfarm.jobfile import load_job
from renderfarm.preparation import Prepared, prepare
from renderfarm.sweep import Expansion, axes
from renderfarm.validation import validate_rows

Write = Callable[..., Path]
CATS = {"id": ["cat", "dog"], "prompt": ["a {red|blue} cat", "a dog"], "mood": ["calm", None]}


def rows(job: Path) -> list[dict[str, Any]]:
    """What is rendered, by the manifest's own names."""
    prepared: Prepared = prepare(load_job(job))
    return list(pq.read_table(prepared.manifest.files[0].path).to_pylist())


def refusal(job: Path) -> str:
    with pytest.raises(InvalidJob) as caught:
        prepare(load_job(job))
    return str(caught.value)


@pytest.mark.parametrize(
    ("written", "values"),
    [
        ("1..4", [1, 2, 3, 4]),
        ("1..10:3", [1, 4, 7, 10]),
        ("10..1:4", [10, 6, 2]),
        ("0.5..0.8:0.1", [0.5, 0.6, 0.7, 0.8]),
        ("-1..1", [-1, 0, 1]),
        ([1, "3..5", 9], [1, 3, 4, 5, 9]),
        (["ddim", None], ["ddim", None]),
        ("ddim", ["ddim"]),
    ],
)
def test_an_axis_is_a_list_or_a_range(written: Any, values: list[Any]) -> None:
    found = axes(Sweep(product={"x": written})).values["x"]
    assert found == values
    assert list(map(type, found)) == list(map(type, values))


def test_a_prompt_may_look_like_a_range() -> None:
    assert axes(Sweep(product={"prompt": ["1..3"]})).values["prompt"] == ["1..3"]


def test_product_axes_change_the_last_first_and_a_zip_is_one_more_of_them() -> None:
    found = axes(Sweep(product={"a": [1, 2], "b": "1..2"}, zip={"c": ["x", "y"], "d": [8, 9]}))
    assert found.combinations == 8
    assert list(zip(*(found.values[name] for name in "abcd"), strict=True)) == [
        (1, 1, "x", 8), (1, 1, "y", 9), (1, 2, "x", 8), (1, 2, "y", 9), (2, 1, "x", 8), (2, 1, "y", 9), (2, 2, "x", 8), (2, 2, "y", 9),
    ]  # fmt: skip


def test_rows_keep_their_columns_and_say_what_they_are_of(write_manifest: Write, write_job: Write) -> None:
    job = write_job(write_manifest(CATS), sweep={"product": {"guidance_scale": [3, 5.5]}}, prompts={"templates": "combinatorial"})
    found = rows(job)
    assert [(row["id"], row["guidance_scale"], row["prompt"], row["sweep_text"]) for row in found] == [
        ("cat-0", 3.0, "a red cat", 0),
        ("cat-1", 3.0, "a blue cat", 1),
        ("cat-2", 5.5, "a red cat", 0),
        ("cat-3", 5.5, "a blue cat", 1),
        ("dog-0", 3.0, "a dog", 0),
        ("dog-1", 5.5, "a dog", 0),
    ]
    assert [row["mood"] for row in found] == ["calm"] * 4 + [None] * 2
    assert {(row["sweep_source"], row["sweep_template"]) for row in found} == {("cat", "a {red|blue} cat"), ("dog", "a dog")}


def test_axes_share_the_noise_and_texts_do_not(write_manifest: Write, write_job: Write, tmp_path: Path) -> None:
    manifest, sweep = write_manifest(CATS), {"product": {"guidance_scale": [3, 5]}}
    seeds = {(row["id"]): row["seed"] for row in rows(write_job(manifest, sweep=sweep, prompts={"templates": "combinatorial"}))}
    assert seeds["cat-0"] == seeds["cat-2"] != seeds["cat-1"] == seeds["cat-3"]
    # alone, the row has this noise, too
    plain = write_job(
        write_manifest({"id": ["cat"], "prompt": ["a cat"]}, "one.parquet"), "plain.yaml", output={"path": str(tmp_path / "plain")}
    )
    renderfarm.run(plain, engine="inline")
    ((_, record),) = renderfarm.open(tmp_path / "plain")
    assert rows(write_job(tmp_path / "one.parquet", sweep=sweep))[0]["seed"] == record["seed"]
    assert "seed" not in rows(write_job(manifest, sweep={**sweep, "noise": "own"}))[0]
    assert "seed" not in rows(write_job(manifest, sweep=sweep, seed_policy="same"))[0]
    own = write_manifest({"prompt": ["a", "b"], "seed": pa.array([5, None], pa.int64())}, "seeds.parquet")
    found = [row["seed"] for row in rows(write_job(own, sweep=sweep))]
    assert found[:2] == [5, 5]
    assert found[2] == found[3] != 5
    assert [row["seed"] for row in rows(write_job(own, sweep={"product": {"seed": "1..2"}}))] == [1, 2, 1, 2]


def test_axes_may_be_columns_and_words_of_the_prompt(write_manifest: Write, write_job: Write) -> None:
    manifest = write_manifest({"prompt": ["a ${style} ${mood} cat"], "mood": ["calm"]})
    job = write_job(manifest, sweep={"product": {"mood": ["wild", "calm"], "style": ["drawn"]}}, prompts={"templates": "combinatorial"})
    assert [(row["prompt"], row["mood"], row["style"]) for row in rows(job)] == [
        ("a drawn wild cat", "wild", "drawn"),
        ("a drawn calm cat", "calm", "drawn"),
    ]


def test_an_axis_of_prompts_takes_the_place_of_the_rows_own(write_manifest: Write, write_job: Write) -> None:
    sweep = {"product": {"prompt": ["a {big|small} dog", "a cat"]}}
    job = write_job(write_manifest({"prompt": ["unused"]}), sweep=sweep, prompts={"templates": "combinatorial"})
    assert [row["prompt"] for row in rows(job)] == ["a big dog", "a small dog", "a cat"]


def test_renamed_columns_and_where_are_those_of_the_rows_that_are_multiplied(write_manifest: Write, write_job: Write) -> None:
    manifest = write_manifest({"caption": ["a", "b"], "prompt": ["not this", "nor this"], "cfg": [2.0, 3.0], "seed": ["x", "y"]})
    spec = {"path": str(manifest), "columns": {"prompt": "caption", "guidance_scale": "cfg", "seed": None}, "where": {"row": "1"}}
    job = write_job(spec, sweep={"product": {"guidance_scale": [5, 6]}})
    prepared = prepare(load_job(job))
    assert prepared.manifest.columns == {"prompt": "caption", "guidance_scale": "cfg", "id": "id", "seed": "sweep_seed"}
    assert [(row["caption"], row["cfg"], row["seed"], row["id"]) for row in rows(job)] == [("b", 5, "y", "1-0"), ("b", 6, "y", "1-1")]


def test_chance_has_a_seed_of_its_own_and_axes_do_not_move_it(write_manifest: Write, write_job: Write) -> None:
    manifest = write_manifest({"id": ["a", "b"], "prompt": ["{1|2|3|4|5|6|7|8} cats"] * 2})

    def drawn(**changes: Any) -> list[str]:
        prompts = {"templates": "random", "samples": 3, **changes.pop("prompts", {})}
        return [row["prompt"] for row in rows(write_job(manifest, prompts=prompts, **changes))]

    first = drawn()
    assert len(first) == 6
    assert first[:3] != first[3:]
    assert first == drawn(seed=99)
    assert first != drawn(prompts={"prompt_seed": 1})
    swept = drawn(sweep={"product": {"guidance_scale": [1, 2]}})
    assert swept[:3] == swept[3:6] == first[:3]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"sweep": {"product": {"guidance_scal": [1]}}}, "has this name; did you mean 'guidance_scale'"),
        ({"sweep": {"zip": {"steps": [1]}}, "prompts": {"templates": "random"}}, "did you mean 'num_inference_steps'"),
        ({"sweep": {"product": {"height": ["tall"]}}}, "sweep.product.height: height must be a whole number"),
        ({"sweep": {"product": {"height": [64, "tall"]}}}, "its values are of several types"),
        ({"sweep": {"product": {"height": [64, 64]}}}, "a value is given twice"),
        ({"sweep": {"product": {"height": "1..2:0"}}}, "is not a range"),
        ({"sweep": {"product": {"id": [1]}}}, "ids are made from the rows' own"),
        ({"sweep": {"zip": {"height": [64, 32], "width": [64]}}}, "have other lengths (height 2, width 1)"),
        ({"sweep": {"product": {"height": [64]}}, "render": {"height": 64, "override": ["height"]}}, "has the job's own height win"),
        ({"sweep": {"product": {"seed": "1..200000"}}}, "= 200,000 combinations for each row are more than"),
        ({"sweep": {"product": {"seed": "1..30"}, "max_rows": 50}}, "with 30 combinations of axes and their texts, become 60 rows, and"),
        ({"prompts": {"templates": "combinatorial"}, "sweep": {"max_rows": 2}}, "become 3 rows"),
        ({"prompts": {"templates": "random", "samples": 60_000}}, "become 120,000 rows"),
    ],
)  # fmt: skip
def test_an_axis_that_means_nothing_and_an_explosion_are_refused(
    changes: dict[str, Any], told: str, write_manifest: Write, write_job: Write
) -> None:
    assert told in refusal(write_job(write_manifest(CATS), **changes))


def test_a_template_that_cannot_be_read_is_named_with_its_row_before_any_row_is_made(write_manifest: Write, write_job: Write) -> None:
    job = write_job(write_manifest({"prompt": ["fine", "a {red|blue cat"]}), prompts={"templates": "random"})
    assert "prompts.parquet, row 1: prompt: 'a {red|blue cat', character 3: a { that nothing closes" in refusal(job)
    (job.parent / "p.csv").write_text('prompt\n"two\nlines"\na __nothing__ cat\n')
    assert "p.csv, line 4: prompt: __nothing__: no nothing.txt in" in refusal(
        write_job(job.parent / "p.csv", prompts={"templates": "random"})
    )


def test_two_billion_texts_are_counted_at_once(write_manifest: Write, write_job: Write) -> None:
    ten = "{0|1|2|3|4|5|6|7|8|9}"
    job = write_job(write_manifest({"prompt": [" ".join([ten] * 30)]}), prompts={"templates": "combinatorial"})
    assert f"become {10**30:,} rows" in refusal(job)


def test_a_row_of_a_sweep_that_cannot_be_rendered_is_named_by_its_id(write_manifest: Write, write_job: Write) -> None:
    job = write_job(write_manifest(CATS), sweep={"product": {"height": [64, 63]}})
    assert validate_rows(prepare(load_job(job))).problems[0].startswith("row 1 of the sweep (id cat-1): height is 63; ")


# ------------------------------------------------------------------------------------------- made once


def swept(write_manifest: Write, write_job: Write, **changes: Any) -> Path:
    return write_job(
        write_manifest(CATS), prompts={"templates": "combinatorial"}, sweep={"product": {"num_inference_steps": [2, 3]}}, **changes
    )


def test_a_run_that_goes_on_draws_nothing_again(tmp_path: Path, write_manifest: Write, write_job: Write) -> None:
    (tmp_path / "wildcards").mkdir()
    (tmp_path / "wildcards/colours.txt").write_text("red\nblue\n")
    job = write_job(write_manifest({"prompt": ["a __colours__ cat"] * 4}), prompts={"templates": "random"})
    first = renderfarm.run(job, engine="inline")
    before = [record["prompt"] for _, record in renderfarm.open(tmp_path / "out")]
    (tmp_path / "wildcards/colours.txt").write_text("green\n")
    next((tmp_path / "out/data").iterdir()).rename(tmp_path / "lost")  # a part to render again
    for entry in (tmp_path / "out/_renderfarm/parts").iterdir():
        entry.unlink()
    again = renderfarm.run(job, engine="inline")
    assert (first.images, again.new_images) == (4, 3)
    assert [record["prompt"] for _, record in renderfarm.open(tmp_path / "out")] == before
    with pytest.raises(InvalidJob, match=r"manifest\.made\.prompts\.prompt_seed: 0 there, 1 now"):
        renderfarm.run(load_job(job, ["prompts.prompt_seed=1"]), engine="inline")


def test_a_job_that_says_something_else_is_refused_with_the_differences(write_manifest: Write, write_job: Write) -> None:
    job = swept(write_manifest, write_job)
    assert renderfarm.run(job, engine="inline").images == 6
    message = ""
    with pytest.raises(InvalidJob) as caught:
        renderfarm.run(load_job(job, ["sweep.product.num_inference_steps=[2, 4]"]), engine="inline")
    message = str(caught.value)
    assert "manifest.made.sweep.product.num_inference_steps[1]: 3 there, 4 now" in message
    with pytest.raises(InvalidJob, match=r"manifest\.made: \{.*there, null now"):
        renderfarm.run(load_job(job, ["sweep=null", "prompts=null"]), engine="inline")
    assert renderfarm.run(load_job(job, ["sweep.max_rows=7"]), engine="inline").images == 6


def test_an_edited_sweep_may_be_planned_again_until_a_run_has_begun(write_manifest: Write, write_job: Write, tmp_path: Path) -> None:
    job = swept(write_manifest, write_job)
    prepared = prepare(load_job(job))
    prepared.rows.keep(prepared.store)
    prepared.rows.keep(prepared.store)
    other = prepare(load_job(job, ["sweep.product.num_inference_steps=[2, 4]"]))
    other.rows.keep(other.store)
    assert len(list((tmp_path / "out/_renderfarm/rows").iterdir())) == 2
    assert renderfarm.run(load_job(job, ["sweep.product.num_inference_steps=[2, 4]"]), engine="inline").images == 6
    assert {record["num_inference_steps"] for _, record in renderfarm.open(tmp_path / "out")} == {2, 4}


def test_rows_that_were_lost_are_asked_for(write_manifest: Write, write_job: Write, tmp_path: Path) -> None:
    job = swept(write_manifest, write_job)
    renderfarm.run(job, engine="inline")
    next((tmp_path / "out/_renderfarm/rows").iterdir()).unlink()
    with pytest.raises(Fatal, match="holds the rows of this output; restore it from a copy"):
        renderfarm.run(job, engine="inline")


def test_a_sweep_is_the_same_on_every_engine_and_in_a_store(
    write_manifest: Write, write_job: Write, local_ray: None, s3: str, tmp_path: Path
) -> None:
    assert renderfarm.run(swept(write_manifest, write_job), engine="inline").images == 6
    expected = [record["pixel_sha256"] for _, record in renderfarm.open(tmp_path / "out")]
    for out, engine in ((tmp_path / "ray", "ray"), (f"{s3}/out", "inline"), (f"memory://{tmp_path.name}/out", "inline")):
        job = load_job(tmp_path / "job.yaml", out=str(out))
        assert renderfarm.run(job, engine=engine).images == 6  # type: ignore[arg-type]
        assert [record["pixel_sha256"] for _, record in renderfarm.open(str(out))] == expected
        assert renderfarm.run(job, engine="inline").new_images == 0


def test_shapes_are_painted_as_their_templates_say(write_manifest: Write, write_job: Write, tmp_path: Path) -> None:
    manifest = write_manifest({"prompt": ["a large {red|blue} circle on a white background"]})
    job = write_job(manifest, model="builtin:shapes", render={"num_inference_steps": 12}, prompts={"templates": "combinatorial"})
    assert renderfarm.run(job, engine="inline").images == 2
    pictures = {
        record["prompt"].split()[2]: image.resize((1, 1), box=(24, 24, 40, 40)).getpixel((0, 0))
        for image, record in renderfarm.open(tmp_path / "out")
    }
    assert pictures["red"][0] > 150 > pictures["red"][2]
    assert pictures["blue"][2] > 120 > pictures["blue"][0]


def test_a_million_rows_stream(write_manifest: Write, write_job: Write) -> None:
    """What Python holds does not grow with the rows; the time of 60,000 is what a test may take."""
    peaks = []
    for steps in (5, 50):
        sweep = {"product": {"num_inference_steps": f"1..{steps}", "guidance_scale": "1..60"}, "max_rows": 10**6}
        job = load_job(
            write_job(write_manifest({"prompt": ["a {big|small} cat"] * 10}), sweep=sweep, prompts={"templates": "combinatorial"})
        )
        prepared = prepare(job.model_copy(update={"sweep": None, "prompts": None}))
        expansion = Expansion(prepared.manifest, {"prompt": pa.string()}, job)
        assert expansion.count() == 10 * steps * 60 * 2
        tracemalloc.start()
        assert sum(len(table) for table in expansion.tables()) == 10 * steps * 60 * 2
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 2 * peaks[0] + 4_000_000
