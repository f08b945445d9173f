"""`after`: what is done to finished pictures, by job: exactly, verifiably, and out of the way of the dataset's readers."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from checker import check_complete, error_rows, image_rows, pixels, tables
from PIL import Image, ImageEnhance
from test_readers import run_card
from torch import nn
from upscalers import Compact, RRDBNet, enlarged, random_network, save

import renderfarm
from renderfarm import after
from renderfarm.config import Colour, Job, RestoreFaces, Step, Upscale, Watermark
from renderfarm.errors import Fatal, InvalidInput, InvalidJob
from renderfarm.estimate import estimate
from renderfarm.jobfile import load_job
from renderfarm.models.fake import Fake
from renderfarm.models.measure import seconds_per_image
from renderfarm.preparation import prepare
from renderfarm.retouch import write_on
from renderfarm.verification import Choice, inspect, render_to, verify

Write = Callable[..., Path]
COLOUR = {"saturation": 1.4, "contrast": 1.2, "brightness": 0.9}
TEXT = "© shapes"
PROMPTS = ["a red circle", "a blue ring", "a green star", "a pink cross", "a black square"]


def job_file(folder: Path, name: str = "job", **changes: Any) -> Path:
    job = {
        "name": "t", "manifest": str(folder / "m.parquet"), "model": "builtin:shapes", "render": {"num_inference_steps": 3},
        "workers": {"batch_size": 3}, "output": {"path": str(folder / name), "part_rows": 2},
    }  # fmt: skip
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**job, **changes, "output": {**job["output"], **changes.get("output", {})}}))
    return path


def retouched(picture: np.ndarray) -> np.ndarray:
    """COLOUR, as a user of Pillow would write it."""
    image = ImageEnhance.Color(Image.fromarray(picture)).enhance(COLOUR["saturation"])
    image = ImageEnhance.Contrast(image).enhance(COLOUR["contrast"])
    return np.asarray(ImageEnhance.Brightness(image).enhance(COLOUR["brightness"]))


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module, nn.Module]:
    """A folder with `small` (rrdb ×2) and `fast` (compact ×2), and the networks."""
    folder = tmp_path_factory.mktemp("networks")
    small, fast = random_network(RRDBNet, scale=2, features=8, blocks=1), random_network(Compact, seed=1, scale=2, features=8)
    save(small, folder / "small.safetensors")
    save(fast, folder / "fast.safetensors")
    return folder, small, fast


@pytest.fixture(scope="module")
def done(networks: tuple[Path, nn.Module, nn.Module], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `plain`, and `finished` of the same rows with steps on both sides of the networks."""
    folder = tmp_path_factory.mktemp("after")
    columns = {"prompt": [*PROMPTS[:2], "", *PROMPTS[3:]], "sampler": ["euler-a", "dpm++2m", "ddim", "lms", "dpm2-a"]}
    pq.write_table(pa.table(columns), folder / "m.parquet")
    for file in networks[0].iterdir():
        shutil.copy(file, folder)
    steps = [
        {"upscale": {"weights": "small.safetensors", "tile": 64}},
        {"colour": COLOUR},
        {"upscale": {"weights": "fast.safetensors", "tile": None}},
        {"watermark": {"text": TEXT}},
    ]
    assert renderfarm.run(job_file(folder, "plain"), engine="inline").images == 4
    summary = renderfarm.run(job_file(folder, "finished", after=steps, output={"keep_originals": True}), engine="inline")
    assert (summary.images, summary.errors) == (4, 1)
    return folder


@pytest.fixture
def out(done: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(done / "finished", tmp_path / "out"))


# ---------------------------------------------------------------------------------------------- pictures


def test_files_show_what_the_steps_make_of_what_is_rendered_without_them(done: Path, networks: tuple[Path, nn.Module, nn.Module]) -> None:
    check_complete(done / "finished", {(number, 0) for number in range(5)})
    rows, before = image_rows(done / "finished"), pixels(done / "plain")
    for row in rows:
        assert (row["width"], row["height"], row["file_width"], row["file_height"]) == (64, 64, 256, 256)
        assert row["original_pixel_sha256"] == before[row["row"], 0]
        original = np.asarray(Image.open(done / "finished" / row["original_file"]))
        wanted = enlarged(networks[2], retouched(enlarged(networks[1], original)))
        made = np.asarray(Image.open(done / f"finished/data/part-{row['row'] // 2:08d}" / row["file_name"]))
        differs = np.argwhere((made != wanted).any(axis=2))
        assert differs.size, "the watermark is somewhere"
        (top, left), (bottom, right) = differs.min(axis=0), differs.max(axis=0)
        assert min(top - (256 - 20), left - (256 - 80), 254 - bottom, 254 - right) > 0, "and at the bottom right only"
    assert len({row["pixel_sha256"] for row in rows}) == 4


def test_the_profile_names_what_decides_pixels_and_job_json_no_path(done: Path) -> None:
    profile, job = (json.loads((done / f"finished/_renderfarm/{name}.json").read_text()) for name in ("profile", "job"))
    plain = json.loads((done / "plain/_renderfarm/profile.json").read_text())
    sha256 = [hashlib.sha256((done / f"{name}.safetensors").read_bytes()).hexdigest() for name in ("small", "fast")]
    assert job["after"] == [
        {"upscale": {"sha256": sha256[0], "tile": 64}},
        {"colour": COLOUR},
        {"upscale": {"sha256": sha256[1]}},
        {"watermark": {"text": TEXT, "opacity": 0.5}},
    ]
    assert {name: value for name, value in profile.items() if name != "after"} == plain
    assert [step["upscale"]["sha256"] for step in profile["after"] if "upscale" in step] == sha256
    assert profile["after"][3]["freetype"]
    assert str(done) not in (done / "finished/_renderfarm/job.json").read_text()


def test_readers_see_the_finished_pictures_alone(out: Path, done: Path, tmp_path: Path) -> None:
    assert len(list(out.glob("originals/*/*.png"))) == 4
    expected = {row["row"]: row for row in image_rows(out)}
    card = out / "README.md"  # of the output that `out` is a copy of
    card.write_text(card.read_text().replace(str(done / "finished"), str(out)))
    dataset = run_card(out, "datasets", tmp_path / "cache")["dataset"]
    assert {row["row"] for row in dataset} == set(expected)
    assert dataset.num_rows == 4
    assert {row["image"].size for row in dataset} == {(256, 256)}
    assert all(row["original_file"] == expected[row["row"]]["original_file"] for row in dataset), "a column of text"
    assert sorted(run_card(out, "duckdb", tmp_path)["table"].project("row, pixel_sha256, file_width").fetchall()) == sorted(
        (row["row"], row["pixel_sha256"], 256) for row in expected.values()
    )
    read = {sample.record["row"]: sample for sample in renderfarm.open(out).samples()}
    for number, row in expected.items():
        original = read[number].original()
        assert original is not None
        assert hashlib.sha256(np.asarray(original).tobytes()).hexdigest() == row["original_pixel_sha256"]
    assert "originals/" in (out / "README.md").read_text()


def test_without_steps_tables_and_folders_are_as_they_were(done: Path) -> None:
    names = pq.read_schema(tables(done / "plain")[0]).names
    assert not [name for name in names if name.startswith(("original_", "file_h", "file_w"))]
    assert not (done / "plain/originals").exists()
    sample = next(iter(renderfarm.open(done / "plain").samples()))
    assert sample.original() is None


def test_hashes_of_originals_are_there_even_if_the_originals_are_not(done: Path, tmp_path: Path) -> None:
    shutil.copytree(done, tmp_path / "again")
    renderfarm.run(job_file(tmp_path / "again", "hashed", after=[{"colour": COLOUR}]), engine="inline")
    rows = image_rows(tmp_path / "again/hashed")
    assert {(row["row"], 0): row["original_pixel_sha256"] for row in rows} == pixels(done / "plain")
    assert "original_file" not in rows[0]
    assert not (tmp_path / "again/hashed/originals").exists()


# ---------------------------------------------------------------------------------------------- verify, inspect, resume


def test_the_output_alone_is_enough_to_make_every_picture_again(out: Path, tmp_path: Path) -> None:
    found = verify(str(out), Choice(all=True))  # moved, and its job's weights are elsewhere
    assert (found.ok, found.problems, found.profile_differences) == (True, [], [])
    assert [again.result for again in found.again] == ["identical"] * 4
    one = inspect(str(out), 3, 0)
    assert render_to(one, tmp_path / "alone.png").result == "identical"
    assert Image.open(tmp_path / "alone.png").size == (256, 256)


def rewritten(out: Path, row: int = 0, **change: Any) -> None:
    path = tables(out)[0]
    table = pq.read_table(path)
    rows = [{**record, **change} if record["row"] == row else record for record in table.to_pylist()]
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)
    for entry in out.glob("_renderfarm/parts/*"):  # it knows the table by its hash
        entry.unlink()


def test_damage_to_originals_and_to_what_is_said_of_them_is_found(out: Path) -> None:
    original = sorted(out.glob("originals/part-00000000/*.png"))[0]
    data = original.read_bytes()
    for damage, message in (
        (lambda: original.unlink(), "the file is missing"),
        (lambda: original.write_bytes(data[:-1]), "bytes, the table says"),
        (lambda: original.write_bytes(data[:-1] + b"x"), "SHA-256 differs"),
    ):
        damage()
        found = verify(str(out), Choice(sample=0))
        assert found.problem_count == 1
        assert f"row 0, image 0 ({original.relative_to(out)})" in found.problems[0]
        assert message in found.problems[0]
        original.write_bytes(data)
    rewritten(out, original_pixel_sha256="0" * 64)
    assert verify(str(out), Choice(sample=0)).problem_count == 1
    again = verify(str(out), Choice(rows="0")).again[0]
    assert (again.ok, again.result) == (False, "identical, but the picture before `after` is not the table's")


def test_verify_says_whether_the_steps_or_the_model_made_another_picture(out: Path) -> None:
    record = image_rows(out)[0]
    file = out / "data/part-00000000" / record["file_name"]
    picture = np.array(Image.open(file))
    picture[0, 0] ^= 1
    Image.fromarray(picture).save(file)
    said = {"pixel_sha256": hashlib.sha256(picture.tobytes()).hexdigest()}
    data = file.read_bytes()
    rewritten(out, row=0, **said, bytes=len(data), file_sha256=hashlib.sha256(data).hexdigest())
    again = verify(str(out), Choice(rows="0")).again[0]
    assert (again.ok, again.result) == (False, "differs in 3 of 196,608 values, identical before `after`")
    rewritten(out, row=0, original_pixel_sha256="0" * 64)
    assert verify(str(out), Choice(rows="0")).again[0].result == "differs in 3 of 196,608 values"


def test_a_table_with_another_size_is_found(out: Path) -> None:
    rewritten(out, file_width=64)
    assert "is 256×256, the table says 64×256" in verify(str(out), Choice(sample=0)).problems[0]


def test_weights_that_the_output_has_lost_are_missed(out: Path, done: Path) -> None:
    sha256 = hashlib.sha256((done / "fast.safetensors").read_bytes()).hexdigest()
    (out / "_renderfarm/inputs" / sha256).write_bytes(b"other")
    with pytest.raises(InvalidJob, match=f"{sha256} is missing or damaged"):
        verify(str(out), Choice(sample=1))


def test_resume_gives_the_same_bytes_and_refuses_other_steps(done: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(done, tmp_path / "copy"))
    steps = yaml.safe_load((folder / "finished.yaml").read_text())["after"]
    path = job_file(folder, "finished", after=steps, output={"keep_originals": True})
    table = tables(folder / "finished")[0]
    before, originals = table.read_bytes(), sorted((folder / "finished/originals").rglob("*.png"))
    shutil.rmtree(table.parent)
    next((folder / "finished/_renderfarm/parts").glob("part-00000000.*")).unlink()
    assert renderfarm.run(path, engine="inline").new_images == 2
    assert table.read_bytes() == before
    assert sorted((folder / "finished/originals").rglob("*.png")) == originals
    for changed, named in (
        (steps[:3], "after: "),
        ([*steps[:3], {"watermark": {"text": "other"}}], r"after\[3\].watermark.text: .* there, \"other\" now"),
        ([steps[2], *steps[1:]], r"after\[0\].upscale.sha256"),
    ):
        with pytest.raises(InvalidJob, match=named):
            renderfarm.run(job_file(folder, "finished", after=changed, output={"keep_originals": True}), engine="inline")
    with pytest.raises(InvalidJob, match=r"output.keep_originals: true there, null now"):
        renderfarm.run(job_file(folder, "finished", after=steps), engine="inline")
    shutil.copy(folder / "fast.safetensors", folder / "small.safetensors")
    with pytest.raises(InvalidJob, match=r"after\[0\].upscale.sha256"):
        renderfarm.run(path, engine="inline")


@pytest.mark.slow
def test_two_workers_on_ray_give_the_pictures_of_one_in_this_process(done: Path, local_ray: None, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(done, tmp_path / "copy"))
    steps = yaml.safe_load((folder / "finished.yaml").read_text())["after"]
    for name, workers in (("one", 1), ("two", 2)):
        options = {"workers": {"batch_size": 3, "min": workers, "max": workers}, "output": {"keep_originals": True, "part_rows": 1}}
        assert renderfarm.run(job_file(folder, name, after=steps, **options), engine="ray").images == 4
        assert pixels(folder / name) == pixels(done / "finished")
    assert verify(str(folder / "two"), Choice(all=True)).ok


# ---------------------------------------------------------------------------------------------- rows that fail


def test_a_row_whose_picture_a_step_cannot_take_is_that_rows_error(write_manifest: Write, write_job: Write, tmp_path: Path) -> None:
    columns = {"prompt": PROMPTS, "height": [64, 128, 64, 128, 64], "width": [64, 128, 64, 128, 256]}
    long = "a text of this length needs more than sixty-four pixels"
    path = write_job(write_manifest(columns), after=[{"colour": {"contrast": 1.1}}, {"watermark": {"text": long[:24]}}])
    assert renderfarm.run(path, engine="inline").images == 3
    check_complete(tmp_path / "out", {(number, 0) for number in range(5)})
    for error in error_rows(tmp_path / "out"):
        assert (error["row"] in (0, 2), error["error_class"], error["retryable"]) == (True, "InvalidInput", False)
        assert error["error_message"].startswith("after[1].watermark: the text does not fit a picture of 64×64 pixels")


def test_nan_and_black_are_errors_on_both_sides_of_the_future(
    networks: tuple[Path, nn.Module, nn.Module], write_manifest: Write, write_job: Write, tmp_path: Path
) -> None:
    broken = random_network(Compact, scale=1)
    nn.init.constant_(broken.body[0].bias, float("inf"))  # type: ignore[arg-type, union-attr]
    save(broken, tmp_path / "nan.safetensors")
    black = random_network(Compact, scale=1)
    nn.init.constant_(black.body[-1].bias, -1000.0)  # type: ignore[arg-type, union-attr]
    save(black, tmp_path / "black.safetensors")
    for number, (step, named) in enumerate(
        (
            ({"upscale": {"weights": "nan.safetensors"}}, "after[0].upscale: the network gave NaN"),
            ({"upscale": {"weights": "black.safetensors"}}, "after[0].upscale: the picture is wholly black"),
            ({"colour": {"brightness": 0.001}}, "after[0].colour: the picture is wholly black"),
        )
    ):
        manifest = write_manifest({"prompt": PROMPTS[:2]})
        out = tmp_path / f"out{number}"
        options: dict[str, Any] = {"model": "builtin:shapes", "output": {"path": str(out), "part_rows": 2}}
        assert renderfarm.run(write_job(manifest, after=[step], **options), engine="inline").errors == 2
        assert not tables(out)
        assert {error["error_class"] for error in error_rows(out)} == {"NonFiniteOutput"}
        assert all(error["error_message"].startswith(named) for error in error_rows(out))


# ---------------------------------------------------------------------------------------------- what is refused


def test_weights_that_cannot_be_used_are_refused_before_anything_is_written(
    networks: tuple[Path, nn.Module, nn.Module], write_manifest: Write, write_job: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in networks[0].iterdir():
        shutil.copy(file, tmp_path)
    data = (tmp_path / "small.safetensors").read_bytes()
    (tmp_path / "w.pth").write_bytes(b"x")
    (tmp_path / "cut.safetensors").write_bytes(data[:-1])
    (tmp_path / "text.safetensors").write_bytes(b"x" * 100)
    save(nn.Linear(2, 2), tmp_path / "foreign.safetensors")
    manifest = write_manifest()
    for upscale, reason in (
        ({"weights": "w.pth"}, r"after\[0\].upscale.weights: .* is no .safetensors file; other formats may hold code"),
        ({"weights": "gone.safetensors"}, "cannot be read: No such file or directory; paths start at the job file"),
        ({"weights": "${NOT_SET_HERE}/w.safetensors"}, "that environment variable is not set"),
        ({"weights": "cut.safetensors"}, "is damaged, or no safetensors file"),
        ({"weights": "text.safetensors"}, "is damaged, or no safetensors file"),
        ({"weights": "foreign.safetensors"}, "foreign.safetensors is no network of Real-ESRGAN's kinds"),
        ({"weights": "small.safetensors", "sha256": "0" * 64}, "has the hash .*, and the job asks for 000"),
    ):
        with pytest.raises(InvalidJob, match=reason):
            renderfarm.run(write_job(manifest, model="builtin:shapes", after=[{"upscale": upscale}]), engine="inline")
    with pytest.raises(InvalidJob, match="builtin:fake draws without torch"):
        renderfarm.run(write_job(manifest, after=[{"upscale": {"weights": "small.safetensors"}}]), engine="inline")
    assert not (tmp_path / "out").exists()
    monkeypatch.setenv("WEIGHTS", str(tmp_path))
    good = {"weights": "${WEIGHTS}/small.safetensors", "sha256": hashlib.sha256(data).hexdigest()}
    assert prepare(load_job(write_job(manifest, model="builtin:shapes", after=[{"upscale": good}]))).after_files == {good["sha256"]: data}


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"upscal": {"weights": "a"}}, "after.0.upscal: unknown field; did you mean 'upscale'?"),
        ({"upscale": {"weight": "a"}}, "after.0.upscale.weight: unknown field; did you mean 'weights'?"),
        ({}, "after.0: a step is one of upscale, restore_faces, colour, watermark"),
        ({"colour": {"contrast": 2}, "watermark": {"text": "a"}}, "after.0: a step is one of"),
        ({"colour": {}}, "after.0.colour: changes nothing"),
        ({"colour": {"brightness": 0}}, "after.0.colour.brightness: Input should be greater than 0"),
        ({"upscale": {"weights": "a", "tile": 100}}, "after.0.upscale.tile: Input should be a multiple of 8"),
        ({"watermark": {}}, "after.0.watermark: give either text or hook"),
        ({"watermark": {"text": "a", "hook": "b"}}, "after.0.watermark: give either text or hook"),
        ({"watermark": {"text": "Käse"}}, "after.0.watermark.text: "),
        ({"watermark": {"text": "  "}}, "after.0.watermark.text: "),
    ],
)
def test_steps_that_mean_nothing_are_refused_by_name(step: dict[str, Any], message: str, write_job: Write, tmp_path: Path) -> None:
    with pytest.raises(InvalidJob) as caught:
        load_job(write_job(tmp_path / "m.parquet", after=[step]))
    assert message in str(caught.value)


def test_originals_of_nothing_are_refused(write_job: Write, tmp_path: Path) -> None:
    with pytest.raises(InvalidJob, match=r"output\.keep_originals: without `after`"):
        load_job(write_job(tmp_path / "m.parquet", output={"keep_originals": True}))


# ---------------------------------------------------------------------------------------------- hooks

MODULE = """
import numpy as np
CALLS = []

def corner(pixels):
    CALLS.append(pixels.shape)
    pixels[:4, :4] = (255, 0, 255)  # in its own copy
    return pixels

def moody(pixels):
    CALLS.append(pixels.shape)
    pixels[0, 0] = len(CALLS)
    return pixels

def halving(pixels):
    return pixels[::2]

def picky(pixels):
    if pixels.shape[1] == 64:
        raise ValueError("too narrow")
    return pixels
"""


@pytest.fixture
def hooks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A package that is installed beside renderfarm, and offers some functions."""
    site = tmp_path / "site"
    (site / "my_marks-1.2.dist-info").mkdir(parents=True)
    (site / "my_marks.py").write_text(MODULE)
    (site / "my_marks-1.2.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: my-marks\nVersion: 1.2\n")
    names = ("corner", "moody", "halving", "picky")
    points = "".join(f"{name} = my_marks:{name}\n" for name in names)
    (site / "my_marks-1.2.dist-info/entry_points.txt").write_text(f"[{after.HOOKS}]\n{points}")
    monkeypatch.syspath_prepend(str(site))
    yield site
    sys.modules.pop("my_marks", None)


def hooked(name: str) -> list[dict[str, Any]]:
    return [{"watermark": {"hook": name}}]


def test_an_installed_packages_function_marks_a_copy_and_is_in_the_profile(
    hooks: Path, write_manifest: Write, write_job: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = write_manifest()
    plain = tmp_path / "plain"
    renderfarm.run(write_job(manifest, output={"path": str(plain), "part_rows": 3}, model="builtin:shapes"), engine="inline")
    path = write_job(manifest, after=hooked("corner"), output={"keep_originals": True}, model="builtin:shapes")
    assert renderfarm.run(path, engine="inline").images == 8
    for row in image_rows(tmp_path / "out"):
        made = np.asarray(Image.open(tmp_path / f"out/data/part-{row['row'] // 3:08d}" / row["file_name"]))
        wanted = np.array(Image.open(tmp_path / "out" / row["original_file"]))
        wanted[:4, :4] = (255, 0, 255)
        np.testing.assert_array_equal(made, wanted)
        assert row["original_pixel_sha256"] == pixels(plain)[row["row"], 0]
    profile = json.loads((tmp_path / "out/_renderfarm/profile.json").read_text())
    module = hashlib.sha256(MODULE.encode()).hexdigest()
    expected = {"function": "my_marks:corner", "package": "my-marks", "version": "1.2", "module_sha256": module}
    assert profile["after"] == [{"watermark": {"hook": "corner", "opacity": 0.5}, "hook": expected}]
    assert verify(str(tmp_path / "out"), Choice(sample=2)).ok
    (hooks / "my_marks.py").write_text(MODULE + "# another one\n")
    differences = verify(str(tmp_path / "out"), Choice(sample=1)).profile_differences
    assert [line for line in differences if "module_sha256" in line]
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place != str(hooks)])
    with pytest.raises(InvalidJob, match="no installed package offers 'corner'"):
        verify(str(tmp_path / "out"), Choice(sample=1))


def test_functions_that_no_package_offers_are_not_even_imported(hooks: Path, write_manifest: Write, write_job: Write) -> None:
    for name in ("my_marks:corner", "os:system", "none"):
        with pytest.raises(InvalidJob, match=r"no installed package offers '.*' .*\(here: corner, halving, moody, picky\)"):
            renderfarm.run(write_job(write_manifest(), after=hooked(name)), engine="inline")
    prepare(load_job(write_job(write_manifest(), after=hooked("corner"))))
    assert "my_marks" not in sys.modules, "looking at a job runs no code"


@pytest.mark.parametrize(
    ("name", "message"),
    [("moody", "gives a picture other bits the second time"), ("halving", r"after\[0\].watermark: cannot be set up: TypeError: my_marks")],
)
def test_a_function_that_cannot_be_relied_on_stops_the_job(
    name: str, message: str, hooks: Path, write_manifest: Write, write_job: Write
) -> None:
    with pytest.raises(Fatal, match=message):
        renderfarm.run(write_job(write_manifest(), after=hooked(name)), engine="inline")


def test_a_function_that_fails_on_a_picture_fails_that_row(hooks: Path, write_manifest: Write, write_job: Write, tmp_path: Path) -> None:
    manifest = write_manifest({"prompt": PROMPTS, "width": [64, 72, 64, 72, 72]})
    assert renderfarm.run(write_job(manifest, after=hooked("picky")), engine="inline").images == 3
    errors = {error["row"]: error["error_message"] for error in error_rows(tmp_path / "out")}
    assert errors == dict.fromkeys((0, 2), "after[0].watermark: ValueError: too narrow")


# ---------------------------------------------------------------------------------------------- values


def test_steps_come_back_from_json_as_they_went() -> None:
    sha256 = "ab" * 32
    steps = (
        Step(upscale=Upscale(weights=sha256, sha256=sha256, tile=None)),
        Step(upscale=Upscale(weights=sha256, sha256=sha256, tile=96)),
        Step(restore_faces=RestoreFaces(weights=sha256, sha256=sha256, detector="cd" * 32, detector_sha256="cd" * 32, strength=0.5)),
        Step(colour=Colour(saturation=0.5)),
        Step(watermark=Watermark(text="a", opacity=0.25)),
        Step(watermark=Watermark(hook="mark")),
    )
    assert after.thawed(json.loads(json.dumps(after.frozen(steps)))) == steps
    job = {"name": "t", "manifest": "m", "model": "m", "output": {"path": "o", "keep_originals": True}, "after": steps}
    whole = Job.model_validate(job)
    assert Job.model_validate(yaml.safe_load(yaml.safe_dump(whole.model_dump(mode="json")))) == whole, "as `submit` sends it"


@pytest.mark.parametrize("size", [(64, 64), (64, 200), (512, 384)])
def test_letters_are_white_outlined_half_seen_and_inside(size: tuple[int, int]) -> None:
    grey = np.full((*size, 3), 100, np.uint8)
    marked = write_on(grey, "(c) me", 0.5)
    np.testing.assert_array_equal(marked, write_on(grey, "(c) me", 0.5))
    assert marked.shape == grey.shape
    assert 140 <= marked.max() <= 178, "white at one half; thin letters are never wholly white"
    assert 50 <= marked.min() <= 65
    changed = np.argwhere((marked != grey).any(axis=2))
    assert changed.min(axis=0)[0] > size[0] * 0.75
    assert (changed.max(axis=0) < np.array(size) - 1).all()
    with pytest.raises(InvalidInput, match="shorten it"):
        write_on(grey, "w" * 200, 0.5)


def test_the_plan_knows_how_much_larger_files_become(
    networks: tuple[Path, nn.Module, nn.Module], write_manifest: Write, write_job: Write, tmp_path: Path
) -> None:
    def left(**options: Any) -> int:
        found = estimate(prepare(load_job(write_job(write_manifest(), model="builtin:shapes", **options))))["bytes left (estimate)"]
        return int(found)

    steps = [{"upscale": {"weights": str(networks[0] / f"{name}.safetensors")}} for name in ("small", "fast")]
    assert left(after=steps[:1]) == 4 * left()
    assert left(after=[*steps, {"colour": {"contrast": 2}}]) == 16 * left()
    assert left(after=steps, output={"path": str(tmp_path / "out"), "keep_originals": True}) == 17 * left()
    with pytest.raises(InvalidJob, match="after: pictures would become 16384×16384; the limit is 89,478,485 pixels"):
        left(after=steps * 4)


def test_the_time_of_an_image_holds_what_the_render_thread_does_after_it(write_manifest: Write, write_job: Write) -> None:
    prepared = prepare(load_job(write_job(write_manifest())))
    model = Fake(prepared.model, prepared.job.workers)
    seconds = seconds_per_image(model, prepared.usual.sample, lambda picture: time.sleep(0.2))
    assert seconds is not None
    assert seconds >= 0.2
