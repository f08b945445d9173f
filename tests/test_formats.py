"""Jobs in every format: verified from the output alone, refused with other settings, and shown by `inspect`."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from test_encode import seen_elsewhere
from typer.testing import CliRunner

import renderfarm
from renderfarm.cli import app
from renderfarm.encode import FORMATS, encode, encoder_of
from renderfarm.errors import Fatal, InvalidJob
from renderfarm.estimate import estimate
from renderfarm.jobfile import load_job
from renderfarm.marks import PAINTED, read
from renderfarm.preparation import prepare
from renderfarm.verification import Choice, inspect, render_to, verify

Write = Callable[..., Path]
OUTPUTS: dict[str, dict[str, Any]] = {
    "png": {}, "webp": {"format": "webp"}, "lossy-webp": {"format": "webp", "encoding": {"quality": 80}},
    "jpeg": {"format": "jpeg"}, "avif": {"format": "avif"}, "jxl": {"format": "jxl"},
}  # fmt: skip
LOSSY = ("lossy-webp", "jpeg", "avif")


def job_file(folder: Path, name: str, **output: Any) -> Path:
    job = {
        "name": "t", "manifest": str(folder / "m.parquet"), "model": "builtin:shapes", "render": {"num_inference_steps": 3},
        "workers": {"batch_size": 2}, "output": {"path": str(folder / name), "part_rows": 2, **output},
    }  # fmt: skip
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(job))
    return path


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same rows in every format, each in a folder of its name."""
    folder = tmp_path_factory.mktemp("formats")
    columns = {"prompt": ["a red circle", "a blue ring", ""], "sampler": ["euler-a", "dpm++2m", "ddim"]}
    pq.write_table(pa.table(columns), folder / "m.parquet")
    for name, output in OUTPUTS.items():
        summary = renderfarm.run(job_file(folder, name, **output), engine="inline")
        assert (summary.images, summary.errors) == (2, 1)
    return folder


def rows(out: Path) -> list[dict[str, Any]]:
    return [row for table in sorted(out.glob("data/*/metadata.parquet")) for row in pq.read_table(table).to_pylist()]


def rewrite(out: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Change rows of the first part's table; its index entry knew the old one, and goes."""
    table = out / "data/part-00000000/metadata.parquet"
    old = pq.read_table(table)
    pq.write_table(pa.Table.from_pylist([change(row) for row in old.to_pylist()], schema=old.schema), table)
    for entry in out.glob("_renderfarm/parts/*"):
        entry.unlink()


@pytest.mark.parametrize("name", OUTPUTS)
def test_the_table_says_what_the_file_is_and_the_pixels_are_those_of_png(name: str, done: Path) -> None:
    format_ = OUTPUTS[name].get("format", "png")
    found = rows(done / name)
    assert [row["pixel_sha256"] for row in found] == [row["pixel_sha256"] for row in rows(done / "png")]
    for row in found:
        path = done / name / "data/part-00000000" / row["file_name"]
        data = path.read_bytes()
        assert path.suffix == {"jpeg": ".jpg"}.get(format_, f".{format_}")
        assert (row["format"], row["encoder"], row["bytes"]) == (format_, encoder_of(format_), len(data))
        assert row["file_sha256"] == hashlib.sha256(data).hexdigest()
        same = hashlib.sha256(seen_elsewhere(data).tobytes()).hexdigest() == row["pixel_sha256"]
        assert same == (name not in LOSSY)


def test_other_parts_and_a_second_run_give_the_same_bytes(done: Path, tmp_path: Path) -> None:
    path = job_file(done, "again", format="jpeg", part_rows=3, path=str(tmp_path / "again"))
    assert renderfarm.run(path, engine="inline").images == 2
    assert [row["file_sha256"] for row in rows(tmp_path / "again")] == [row["file_sha256"] for row in rows(done / "jpeg")]


def test_originals_are_kept_without_loss_and_say_who_painted_them(done: Path, tmp_path: Path) -> None:
    path = job_file(done, "kept", format="jpeg", keep_originals=True, path=str(tmp_path / "kept"))
    path.write_text(path.read_text() + "after: [{colour: {saturation: 0.5}}]\n")
    assert renderfarm.run(path, engine="inline").images == 2
    for row, plain in zip(rows(tmp_path / "kept"), rows(done / "png"), strict=True):
        data = (tmp_path / "kept" / row["original_file"]).read_bytes()
        assert hashlib.sha256(seen_elsewhere(data).tobytes()).hexdigest() == plain["pixel_sha256"] == row["original_pixel_sha256"]
        assert row["original_file"].endswith(".png")
        said = read(data)
        assert (said["digital_source_type"], said["row"], said["parameters"]) == (PAINTED, None, None)
        finished = read((tmp_path / "kept/data/part-00000000" / row["file_name"]).read_bytes())
        assert finished["row"]["pixel_sha256"] == row["pixel_sha256"] != plain["pixel_sha256"]
    assert verify(str(tmp_path / "kept"), Choice(all=True)).ok


@pytest.mark.parametrize("name", OUTPUTS)
def test_verify_finds_every_format_whole_and_says_what_a_lossy_one_takes(name: str, done: Path) -> None:
    found = verify(str(done / name), Choice(all=True))
    assert (found.ok, found.images, found.problems) == (True, 2, [])
    assert {again.result for again in found.again} == {"identical"}
    for again in found.again:
        assert again.psnr is None if name not in LOSSY else again.psnr is not None and 25 < again.psnr < 60


def in_its_place(out: Path, data: bytes) -> None:
    """Other bytes for row 0's file, under the name that they get, and a table that says so."""
    old, digest = out / "data/part-00000000" / rows(out)[0]["file_name"], hashlib.sha256(data).hexdigest()
    new = old.with_name(f"0000000000-0000-{digest[:8]}{old.suffix}")
    old.rename(new).write_bytes(data)
    said = {"file_name": new.name, "bytes": len(data), "file_sha256": digest}
    rewrite(out, lambda row: row | said if row["row"] == 0 else row)


@pytest.mark.parametrize("name", ["jpeg", "lossy-webp", "avif", "webp"])
def test_another_picture_under_true_hashes_of_its_file_is_found_by_rendering(name: str, done: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(done / name, tmp_path / "out"))
    in_its_place(out, (out / "data/part-00000000" / rows(out)[1]["file_name"]).read_bytes())
    found = verify(str(out), Choice(rows="0"))
    assert not found.ok
    if name in LOSSY:
        assert found.problems == []
        assert [again.result for again in found.again] == ["identical, but the file shows another picture"]
    else:
        assert "its pixels are not those that were rendered" in found.problems[0]
    again = render_to(inspect(str(out), 0, 0), tmp_path / "again.png")
    assert not again.ok
    assert again.result.startswith("identical, but the ")


def test_a_lossy_file_of_another_encoder_need_only_look_alike_and_of_this_one_must_be_the_same(done: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(done / "jpeg", tmp_path / "out"))
    path = out / "data/part-00000000" / rows(out)[0]["file_name"]
    file = io.BytesIO()
    Image.open(path).save(file, "JPEG", quality=93, subsampling="4:4:4")
    in_its_place(out, file.getvalue())
    assert not verify(str(out), Choice(rows="0")).ok
    rewrite(out, lambda row: row | {"encoder": "Pillow 9.0.0"} if row["row"] == 0 else row)
    assert verify(str(out), Choice(rows="0")).ok


@pytest.mark.parametrize("name", ["jpeg", "avif", "jxl", "webp"])
def test_damage_of_any_format_is_a_line(name: str, done: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(done / name, tmp_path / "out"))
    path = out / "data/part-00000000" / rows(out)[0]["file_name"]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)
    assert "its bytes are not those that were written" in verify(str(out), Choice(sample=0)).problems[0]
    in_its_place(out, bytes(data[: len(data) // 2]))
    assert "cannot be decoded" in verify(str(out), Choice(sample=0)).problems[0]
    rewrite(out, lambda row: row | {"format": "png"})
    assert "its format is 'png', and the output's" in verify(str(out), Choice(sample=0)).problems[0]


@pytest.mark.parametrize(
    "output", [{}, {"format": "gif"}, {"format": "jpeg", "encoding": {"compression_level": 1}}, {"format": "png", "encoding": 3}]
)
def test_a_damaged_job_is_said_to_be_damaged(output: dict[str, Any], done: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(done / "jpeg", tmp_path / "out"))
    frozen = json.loads((out / "_renderfarm/job.json").read_text())
    frozen["output"] = {"part_rows": 2, **output}
    (out / "_renderfarm/job.json").write_text(json.dumps(frozen))
    with pytest.raises(Fatal, match=r"job.json is damaged"):
        verify(str(out), Choice(sample=0))


def test_a_picture_that_comes_out_otherwise_is_held_against_the_lossy_file(done: Path, tmp_path: Path) -> None:
    """A table that names another seed: the pixels differ from its hash, and from the file."""
    out = Path(shutil.copytree(done / "jpeg", tmp_path / "out"))
    rewrite(out, lambda row: row | {"seed": row["seed"] + 1})
    (again,) = verify(str(out), Choice(rows="0")).again
    assert not again.ok
    assert again.result.startswith("differs in ")
    assert again.psnr is not None


def test_inspect_renders_a_lossy_row_again_without_loss(done: Path, tmp_path: Path) -> None:
    again = render_to(inspect(str(done / "jpeg"), 1, 0), tmp_path / "again.png")
    assert (again.ok, again.result) == (True, "identical")
    with Image.open(tmp_path / "again.png") as image:
        assert hashlib.sha256(np.asarray(image).tobytes()).hexdigest() == rows(done / "png")[1]["pixel_sha256"]


@pytest.mark.parametrize(
    ("name", "output", "difference"),
    [
        ("jpeg", {"format": "jpeg", "encoding": {"quality": 90}}, "output.encoding.quality: 95 there, 90 now"),
        ("jpeg", {"format": "jpeg", "encoding": {"subsampling": "4:2:0"}}, 'output.encoding.subsampling: "4:4:4" there, "4:2:0" now'),
        ("jpeg", {"format": "webp"}, 'output.format: "jpeg" there, "webp" now'),
        ("png", {"encoding": {"compression_level": 6}}, "output.encoding.compression_level: 1 there, 6 now"),
        ("png", {"metadata": {"prompts": False}}, "output.metadata.prompts: true there, false now"),
    ],
)
def test_other_settings_than_the_output_was_begun_with_are_refused(name: str, output: dict[str, Any], difference: str, done: Path) -> None:
    path = job_file(done, name, **output)
    with pytest.raises(InvalidJob, match="was begun with other settings") as error:
        renderfarm.run(path, engine="inline")
    assert difference in str(error.value)


def test_a_default_that_is_written_out_is_the_same_job(done: Path) -> None:
    path = job_file(done, "jpeg", format="jpeg", encoding={"quality": 95, "subsampling": "4:4:4", "lossless": False})
    assert renderfarm.run(path, engine="inline").images == 2


def test_reading_an_output_gives_pictures_of_every_format(done: Path) -> None:
    for name in OUTPUTS:
        pictures = [np.asarray(image) for image, _ in renderfarm.open(done / name)]
        assert [picture.shape for picture in pictures] == [(64, 64, 3)] * 2


def test_the_plan_knows_that_lossy_files_are_smaller(done: Path, tmp_path: Path) -> None:
    left = {}
    for format_ in FORMATS:
        job = load_job(job_file(done, "x", format=format_, path=str(tmp_path / "new")))
        left[format_] = estimate(prepare(job))["bytes left (estimate)"]
    assert left["avif"] < left["jpeg"] < left["webp"] <= left["png"]


@pytest.mark.parametrize("layout", ["files", "parquet", "webdataset"])
@pytest.mark.parametrize("format_", FORMATS)
def test_every_layout_holds_every_format_and_says_where_load_dataset_finds_no_picture(
    format_: str, layout: str, write_manifest: Write, write_job: Write, tmp_path: Path
) -> None:
    job = write_job(write_manifest(), output={"format": format_, "layout": layout})
    assert renderfarm.run(job, engine="inline").images == 8
    out = tmp_path / "out"
    assert verify(str(out), Choice(rows="0-1")).ok
    assert [np.asarray(image).shape for image, _ in renderfarm.open(out)] == [(64, 64, 3)] * 8
    warned = any(text.startswith(f"output.format {format_}: ") for text in prepare(load_job(job)).warnings)
    assert warned == (not pictures_by_load_dataset(out, FORMATS[format_].extension, tmp_path))


@pytest.mark.parametrize("format_", ["jpeg", "webp", "avif", "jxl"])
def test_the_cards_line_for_webdataset_gives_pictures(format_: str, write_manifest: Write, write_job: Write, tmp_path: Path) -> None:
    renderfarm.run(write_job(write_manifest(), output={"format": format_, "layout": "webdataset"}), engine="inline")
    card = (tmp_path / "out/README.md").read_text()
    (block,) = [block for block in re.findall(r"```python\n(.*?)```", card, re.DOTALL) if "import webdataset" in block]
    found: dict[str, Any] = {}
    exec(block, found)  # noqa: S102 - the card's own lines
    pairs = list(found["dataset"])
    assert len(pairs) == 8
    assert all(isinstance(picture, Image.Image) and row["format"] == format_ for picture, row in pairs)


def pictures_by_load_dataset(out: Path, extension: str, cache: Path) -> bool:
    """Whether every row comes with a picture that is opened."""
    try:
        dataset = datasets.load_dataset(str(out), split="train", cache_dir=str(cache / "cache"))
        column = next(name for name in ("image", extension) if name in dataset.column_names)
        return len(dataset) == 8 and all(isinstance(picture, Image.Image) for picture in dataset[column])
    except (StopIteration, OSError, datasets.exceptions.DatasetsError):
        return False


# ---------------------------------------------------------------------------------------------- inspect FILE


def shown(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["inspect", *arguments])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("name", OUTPUTS)
def test_inspect_shows_what_a_file_says_of_itself(name: str, done: Path) -> None:
    row = rows(done / name)[1]
    path = str(done / name / "data/part-00000000" / row["file_name"])
    text = shown(path)
    for said in ("a blue ring", PAINTED, "Sampler: DPM++ 2M", row["pixel_sha256"], f"seed: {row['seed']}"):
        assert said in text
    found = json.loads(shown(path, "--json"))
    assert found["row"]["profile_sha256"] == row["profile_sha256"]
    assert {key: row[key] for key in found["row"]} == found["row"], "what the file says is what the table says"


def test_inspect_says_that_a_file_says_nothing_and_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    (tmp_path / "bare.png").write_bytes(encode(np.zeros((8, 8, 3), np.uint8)).data)
    assert "says nothing of itself" in shown(str(tmp_path / "bare.png"))
    (tmp_path / "text.png").write_text("hello")
    cases = {
        (str(tmp_path / "text.png"),): "is no image file of a kind that is read here",
        (str(tmp_path),): "say which image of an output: ROW or ROW:K",
        (str(tmp_path / "gone.png"),): "or give an image file",
        (str(tmp_path / "bare.png"), "--render", str(tmp_path / "x.png")): "need an output and a row",
    }
    for arguments, message in cases.items():
        result = CliRunner().invoke(app, ["inspect", *arguments])
        assert isinstance(result.exception, InvalidJob)
        assert message in str(result.exception)


def test_a_terminal_obeys_nothing_that_a_file_says(tmp_path: Path) -> None:
    from test_marks import RECORD, file_of

    (tmp_path / "a.png").write_bytes(file_of(RECORD | {"prompt": "red \x1b[31m \x9b31m \x07 [bold]word[/bold]"}))
    text = shown(str(tmp_path / "a.png"))
    assert "[bold]word[/bold]" in text
    assert not {sign for sign in text if not sign.isprintable()} - {"\n"}
