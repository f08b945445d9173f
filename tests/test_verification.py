"""`verify` finds every kind of damage, and renders the same bits again; `inspect` does so for one image."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import renderfarm
from renderfarm.commit import profile_sha256
from renderfarm.errors import InvalidJob
from renderfarm.verification import Choice, inspect, render_to, verify

Write = Callable[..., Path]
FILES_ONLY = Choice(sample=0)


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mixed rows through builtin:shapes, one of them an error; copied by each test that damages it."""
    folder = tmp_path_factory.mktemp("verified")
    columns = {
        "prompt": ["a red circle", "a blue ring", "", "a green star", "a pink cross"],
        "sampler": ["euler-a", "dpm++2m", "ddim", "lms", "dpm2-a"],
        "guidance_scale": [1.0, 5.0, 3.0, 2.0, 7.5],
        "negative_prompt": [None, "a square", None, None, "a circle"],
        "num_images_per_prompt": [1, 2, 2, 1, 1],
    }
    pq.write_table(pa.table(columns), folder / "m.parquet")
    job = {
        "name": "t", "manifest": str(folder / "m.parquet"), "model": "builtin:shapes", "render": {"num_inference_steps": 3},
        "workers": {"batch_size": 3}, "output": {"path": str(folder / "out"), "part_rows": 2},
    }  # fmt: skip
    (folder / "job.yaml").write_text(json.dumps(job))
    assert renderfarm.run(folder / "job.yaml", engine="inline").images == 5
    return folder / "out"


@pytest.fixture
def out(rendered: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(rendered, tmp_path / "out"))


def some_png(out: Path, row: int = 1) -> Path:
    return next(iter(sorted(out.glob(f"data/*/{row:010d}-*.png"))))


def test_all_images_come_out_again_bit_for_bit_and_nothing_is_written(rendered: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in rendered.rglob("*")}
    found = verify(str(rendered), Choice(all=True))
    assert (found.ok, found.images, found.errors, found.parts_done, found.parts) == (True, 5, 2, 3, 3)
    assert sorted((again.row, again.image_index) for again in found.again) == [(0, 0), (1, 0), (1, 1), (3, 0), (4, 0)]
    assert {again.result for again in found.again} == {"identical"}
    assert found.profile_differences == []
    assert {path: path.stat().st_mtime_ns for path in rendered.rglob("*")} == before


def test_rows_and_samples_choose_what_is_rendered_again(rendered: Path) -> None:
    assert {again.row for again in verify(str(rendered), Choice(rows="1,3-4")).again} == {1, 3, 4}
    first = verify(str(rendered), Choice(sample=2)).again
    assert len(first) == 2
    assert first == verify(str(rendered), Choice(sample=2)).again
    assert verify(str(rendered), FILES_ONLY).again == []
    with pytest.raises(InvalidJob, match="rows 2: no committed image"):
        verify(str(rendered), Choice(rows="2"))


def missing(out: Path) -> None:
    some_png(out).unlink()


def cut_short(out: Path) -> None:
    path = some_png(out)
    path.write_bytes(path.read_bytes()[:-40])


def one_bit(out: Path) -> None:
    path = some_png(out)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def rewritten(out: Path, change: Callable[[dict[str, object]], dict[str, object]], row: int = 1, image_index: int = 0) -> None:
    """Change what the table says of an image."""
    table = some_png(out, row).parent / "metadata.parquet"
    read = pq.read_table(table)
    rows = read.to_pylist()
    place = next(index for index, record in enumerate(rows) if (record["row"], record["image_index"]) == (row, image_index))
    rows[place] |= change(rows[place])
    pq.write_table(pa.Table.from_pylist(rows, schema=read.schema), table)


def other_picture(out: Path) -> None:
    """A picture in another's place, with the table's size and file hash made to fit."""
    path = some_png(out)
    Image.new("RGB", (64, 64), "red").save(path)
    data = path.read_bytes()
    rewritten(out, lambda record: {"bytes": len(data), "file_sha256": hashlib.sha256(data).hexdigest()})


def not_an_image(out: Path) -> None:
    path = some_png(out)
    path.write_bytes(b"text")
    rewritten(out, lambda record: {"bytes": 4, "file_sha256": hashlib.sha256(b"text").hexdigest()})


def other_size(out: Path) -> None:
    rewritten(out, lambda record: {"height": 72})


def other_row(out: Path) -> None:
    rewritten(out, lambda record: {"row": 4})


def twice(out: Path) -> None:
    rewritten(out, lambda record: {"image_index": 1})


def lost_table(out: Path) -> None:
    (some_png(out).parent / "metadata.parquet").unlink()


def image_left_out(out: Path) -> None:
    """The table without an image that it was committed with."""
    table = some_png(out).parent / "metadata.parquet"
    read = pq.read_table(table)
    pq.write_table(read.slice(0, len(read) - 1), table)


def lost_error_view(out: Path) -> None:
    (out / "errors/part-00000001.parquet").unlink()


def damaged_table(out: Path) -> None:
    path = some_png(out).parent / "metadata.parquet"
    path.write_bytes(path.read_bytes()[:200])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (missing, r"row 1, image 0 \(data/part-00000000/.*png\): the file is missing"),
        (cut_short, r"row 1, image 0 .*: has [\d,]+ bytes, the table says"),
        (one_bit, "not those that were written"),
        (other_picture, "pixels are not those that were rendered"),
        (not_an_image, "cannot be decoded"),
        (other_size, "is 64×64, the table says 64×72"),
        (other_row, "row 4 does not belong to it"),
        (twice, "row 1, image 1 ended 2 times"),
        (lost_table, "part 0: was committed, and its table is missing"),
        (image_left_out, "part 0: was committed with 3 images and 0 errors, and its table has 2 and 0"),
        (lost_error_view, r"errors/part-00000001.parquet is not what the part's table says"),
        (damaged_table, "part 0: a committed table is damaged"),
    ],
)
def test_every_kind_of_damage_is_found_and_named(damage: Callable[[Path], None], message: str, out: Path) -> None:
    assert verify(str(out), FILES_ONLY).ok
    damage(out)
    found = verify(str(out), FILES_ONLY)
    assert not found.ok
    assert any(re.search(message, problem) for problem in found.problems), found.problems


@pytest.mark.parametrize("change", [{"seed": 5}, {"prompt": "a green star"}, {"guidance_scale": 5.01}, {"num_inference_steps": 4}])
def test_a_table_that_tells_another_story_than_the_pixels_is_found(change: dict[str, object], out: Path) -> None:
    rewritten(out, lambda record: change)
    assert verify(str(out), FILES_ONLY).ok, "the files are what they were"
    found = verify(str(out), Choice(rows="1"))
    assert [again.ok for again in found.again] == [False, True]
    assert found.again[0].result.startswith("differs in ")
    assert found.again[0].psnr is not None


def test_with_another_profile_pictures_are_compared_and_the_difference_is_named(out: Path) -> None:
    profile = json.loads((out / "_renderfarm/profile.json").read_text())
    elsewhere = profile | {"cpu_capability": "of another machine"}
    (out / "_renderfarm/profile.json").write_text(json.dumps(elsewhere))
    problem = verify(str(out), FILES_ONLY).problems
    assert len(problem) == 1
    assert "no profile in the output has that hash" in problem[0]
    for row in (0, 1, 3, 4):
        rewritten(out, lambda record: {"profile_sha256": profile_sha256(elsewhere)}, row=row)
    rewritten(out, lambda record: {"profile_sha256": profile_sha256(elsewhere)}, row=1, image_index=1)
    found = verify(str(out), Choice(all=True))
    assert found.ok
    assert any("cpu_capability" in line for line in found.profile_differences)

    png = some_png(out, row=4)
    stored = np.asarray(Image.open(png)).astype(int)
    Image.fromarray(np.clip(stored + 1, 0, 255).astype(np.uint8)).save(png)
    rewritten(out, lambda record: {"pixel_sha256": "0" * 64}, row=4)
    found = verify(str(out), Choice(rows="4"))
    assert found.again[0].ok, "one step of brightness is the same picture where bits are not promised"
    assert found.again[0].psnr > 40
    Image.new("RGB", (64, 64), "red").save(png)
    found = verify(str(out), Choice(rows="4"))
    assert not found.again[0].ok, "and another picture is not"


def test_a_model_in_a_folder_must_be_pointed_to_and_its_weights_decide(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from renderfarm import shapes

    folder = Path(shutil.copytree(Path(shapes.__file__).parent / "model", tmp_path / "mine"))
    stored = json.loads((out / "_renderfarm/job.json").read_text())
    stored["model"]["id"] = "mine"
    (out / "_renderfarm/job.json").write_text(json.dumps(stored))
    profile = json.loads((out / "_renderfarm/profile.json").read_text()) | {"model": "mine"}
    (out / "_renderfarm/profile.json").write_text(json.dumps(profile))
    for row, k in ((0, 0), (1, 0), (1, 1), (3, 0), (4, 0)):
        rewritten(out, lambda record: {"profile_sha256": profile_sha256(profile)}, row=row, image_index=k)
    with pytest.raises(InvalidJob, match="--model FOLDER"):
        verify(str(out), Choice(sample=1))
    assert verify(str(out), Choice(all=True), model=str(folder)).ok
    monkeypatch.chdir(tmp_path)
    for written in ("./mine", "mine"):
        assert verify(str(out), Choice(sample=1), model=written).again[0].result == "identical"
    (folder / "scheduler/scheduler_config.json").write_text(
        (folder / "scheduler/scheduler_config.json").read_text().replace('"beta_end": 0.02', '"beta_end": 0.019')
    )
    found = verify(str(out), Choice(sample=1), model=str(folder))
    assert any("scheduler" in line for line in found.profile_differences)


def test_one_image_of_a_batch_is_rendered_again_alone(rendered: Path, tmp_path: Path) -> None:
    found = inspect(str(rendered), 1, 1)
    assert found.record["prompt"] == "a blue ring"
    assert found.part == "part-00000000"
    again = render_to(found, tmp_path / "alone.png")
    assert (again.ok, again.result) == (True, "identical")
    pixels = np.asarray(Image.open(tmp_path / "alone.png"))
    assert hashlib.sha256(pixels.tobytes()).hexdigest() == found.record["pixel_sha256"]


def test_an_error_row_tells_its_reason_and_cannot_be_rendered(rendered: Path, tmp_path: Path) -> None:
    found = inspect(str(rendered), 2, 1)
    assert found.record["error_message"].startswith("prompt is empty")
    with pytest.raises(InvalidJob, match="ended as InvalidInput"):
        render_to(found, tmp_path / "x.png")


@pytest.mark.parametrize(("row", "k", "message"), [(9, 0, "rows 0 to 4"), (1, 5, "images 0 to 1")])
def test_what_is_not_there_is_said(row: int, k: int, message: str, rendered: Path) -> None:
    with pytest.raises(InvalidJob, match=message):
        inspect(str(rendered), row, k)
