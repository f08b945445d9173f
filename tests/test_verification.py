"""`verify` finds every kind of damage, and renders the same bits again; `inspect` does so for one image."""

from __future__ import annotations

import dataclasses
import hashlib
import io
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
from renderfarm.errors import Fatal, InvalidJob
from renderfarm.schema import ERRORS_KEY
from renderfarm.verification import Choice, _Chosen, inspect, render_to, verify

Write = Callable[..., Path]
FILES_ONLY = Choice(sample=0)
MENDED = "restore it from a copy, or `renderfarm run JOB --repair` mends it"
NEEDED = ("bytes", "seed", "row", "profile_sha256")


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
        "mood": ["calm"] * 5,
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


def test_it_says_how_far_it_is(rendered: Path) -> None:
    said: list[str] = []
    verify(str(rendered), Choice(rows="0-1"), say=said.append)
    assert said == [
        *(f"files: part {part} of 3, {images} images checked" for part, images in ((1, 0), (2, 3), (3, 4))),
        "loading the model",
        *(f"rendered again: {number} of 3 images" for number in (1, 2, 3)),
    ]


def test_rows_and_samples_choose_what_is_rendered_again(rendered: Path) -> None:
    assert {again.row for again in verify(str(rendered), Choice(rows="1,3-4")).again} == {1, 3, 4}
    first = verify(str(rendered), Choice(sample=2, seed=0)).again
    assert len(first) == 2
    assert first == verify(str(rendered), Choice(sample=2, seed=0)).again
    assert verify(str(rendered), FILES_ONLY).again == []
    with pytest.raises(InvalidJob, match="rows 2: no committed image"):
        verify(str(rendered), Choice(rows="2"))


def test_a_random_choice_is_another_one_each_time(rendered: Path) -> None:
    (sample, *_) = renderfarm.open(rendered).samples()
    thousand = [dataclasses.replace(sample, record=sample.record | {"row": row}) for row in range(1000)]

    def rows(choice: Choice) -> list[int]:
        chosen = _Chosen(choice)
        chosen.offer(thousand)
        return [one.record["row"] for one in chosen.samples]

    assert len({*rows(Choice()), *rows(Choice())}) > 8, "eight each, and no two times the same eight"
    assert rows(Choice(seed=1)) == rows(Choice(seed=1))


def without_index(out: Path) -> None:
    """It knows each table by its hash, and is derived: without it, a changed table must be found out by what it says."""
    for entry in out.glob("_renderfarm/parts/*"):
        entry.unlink()


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
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(file, "PNG")
    in_its_place(out, file.getvalue())


def not_an_image(out: Path) -> None:
    in_its_place(out, b"text")


def in_its_place(out: Path, data: bytes, row: int = 1, **said: object) -> None:
    """Other bytes for a picture's file, under the name that they get, and a table that says so."""
    old, digest = some_png(out, row), hashlib.sha256(data).hexdigest()
    new = old.with_name(f"{row:010d}-0000-{digest[:8]}.png")
    old.rename(new).write_bytes(data)
    says = {"file_name": new.name, "bytes": len(data), "file_sha256": digest, **said}
    rewritten(out, lambda record: says, row=row)


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


def column_dropped(name: str) -> Callable[[Path], None]:
    def damage(out: Path) -> None:
        table = some_png(out).parent / "metadata.parquet"
        pq.write_table(pq.read_table(table).drop_columns([name]), table)

    return damage


def gaps(out: Path) -> None:
    table = some_png(out).parent / "metadata.parquet"
    read = pq.read_table(table)
    place = read.column_names.index("seed")
    pq.write_table(read.set_column(place, "seed", pa.nulls(len(read), pa.int64())), table)


def another_type(out: Path) -> None:
    table = some_png(out).parent / "metadata.parquet"
    read = pq.read_table(table)
    place = read.column_names.index("row")
    pq.write_table(read.set_column(place, "row", read.column("row").cast(pa.string())), table)


def no_text(out: Path) -> None:
    table = some_png(out).parent / "metadata.parquet"
    read = pq.read_table(table)
    place = read.column_names.index("prompt")
    pq.write_table(read.set_column(place, "prompt", pa.array([b"\xff"] * len(read)).view(pa.string())), table)


def footer_that_lists_nothing(out: Path) -> None:
    table = some_png(out).parent / "metadata.parquet"
    pq.write_table(pq.read_table(table).replace_schema_metadata({ERRORS_KEY: b"[1]"}), table)


def garbage_in_error_view(out: Path) -> None:
    (out / "errors/part-00000001.parquet").write_bytes(b"PAR1 not what it was")


def folder_for_a_picture(out: Path) -> None:
    path = some_png(out)
    path.unlink()
    path.mkdir()


def swapped_rows(out: Path) -> None:
    """Two pictures that have taken each other's row."""
    table = some_png(out).parent / "metadata.parquet"
    read = pq.read_table(table)
    rows = read.to_pylist()
    for record in rows:
        record["row"] = 1 - record["row"]
    pq.write_table(pa.Table.from_pylist(rows, schema=read.schema), table)


def other_format(out: Path) -> None:
    rewritten(out, lambda record: {"format": "webp"})


def out_of_the_output(out: Path) -> None:
    shutil.copy(some_png(out), out.parent / "x.png")
    rewritten(out, lambda record: {"file_name": "../../../x.png"})


def index_entry_damaged(out: Path) -> None:
    next(out.glob("_renderfarm/parts/part-00000000.*")).write_bytes(b"not JSON")


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
        *((column_dropped(name), rf"part 0: a committed table is damaged \(no column {name}\)") for name in NEEDED),
        (gaps, r"part 0: a committed table is damaged \(column seed has gaps\)"),
        (another_type, r"part 0: a committed table is damaged \(column row is string, not int64\)"),
        (no_text, r"part 0: a committed table is damaged \(.*Invalid UTF8"),
        (footer_that_lists_nothing, r"part 0: a committed table is damaged"),
        (garbage_in_error_view, r"errors/part-00000001.parquet: a committed table is damaged"),
        (folder_for_a_picture, r"row 1, image 0 \(.*\): cannot read"),
        (swapped_rows, r"row 0, image 0: its file is named '0000000001-0000-.*', and should be 0000000000-0000-"),
        (other_format, r"row 1, image 0: its format is 'webp', and the output's 'png'"),
        (out_of_the_output, r"row 1, image 0: its file is named '../../../x.png', and should be 0000000001-0000-"),
        (index_entry_damaged, r"part 0: .*part-00000000.*json is damaged \(not JSON\)"),
    ],
)
def test_every_kind_of_damage_is_found_and_named(damage: Callable[[Path], None], message: str, out: Path) -> None:
    assert verify(str(out), FILES_ONLY).ok
    damage(out)
    found = verify(str(out), FILES_ONLY)
    assert not found.ok
    assert any(re.search(message, problem) for problem in found.problems), found.problems


UNTRUE = {
    "row_id": "another", "prompt_tokens": 3, "prompt_truncated": True, "prompt_cut_off": "and more", "model": "builtin:other",
    "model_revision": "0" * 40, "mood": "gloomy",
}  # fmt: skip


@pytest.mark.parametrize("name", UNTRUE)
def test_a_cell_that_decides_no_pixel_is_known_by_the_hash_of_its_table(name: str, out: Path) -> None:
    rewritten(out, lambda record: {name: UNTRUE[name]})
    found = verify(str(out), Choice(rows="1"))
    assert found.problems == [f"part 0: its table is not the one that was committed (SHA-256 differs); {MENDED}"]
    without_index(out)
    assert verify(str(out), FILES_ONLY).ok, "a part without an entry is no problem by itself"


@pytest.mark.parametrize("name", ["prompt_tokens", "prompt_truncated", "prompt_cut_off"])
def test_what_the_model_read_of_a_prompt_is_counted_again(name: str, out: Path) -> None:
    rewritten(out, lambda record: {name: UNTRUE[name]})
    without_index(out)
    again = verify(str(out), Choice(rows="1")).again
    assert [(one.ok, one.result) for one in again] == [(False, f"identical, but {name} is not the table's"), (True, "identical")]


def test_a_part_without_an_index_entry_is_worth_a_word(out: Path) -> None:
    assert verify(str(out), FILES_ONLY).notes == []
    next(out.glob("_renderfarm/parts/part-00000000.*")).unlink()
    found = verify(str(out), FILES_ONLY)
    assert found.ok
    (note,) = found.notes
    assert re.match(r"no index entry for 1 of 3 parts, so whether .* lost or changed .* could not be seen; run the job again", note)


def test_damage_in_one_part_hides_none_in_another(out: Path) -> None:
    column_dropped("bytes")(out)
    garbage_in_error_view(out)
    some_png(out, row=4).unlink()
    found = verify(str(out), Choice(all=True))
    assert len(found.problems) == 3
    assert [(again.row, again.ok) for again in found.again] == [(3, True), (4, True)]


@pytest.mark.parametrize("text", ["{}", '{"manifest": {"files": [{}], "where": null}, "model": {}, "output": {}, "render": {}}', "[]"])
def test_a_job_file_that_says_nothing_is_one_message(text: str, out: Path) -> None:
    (out / "_renderfarm/job.json").write_text(text)
    for use in (lambda: verify(str(out), FILES_ONLY), lambda: inspect(str(out), 0, 0), lambda: renderfarm.open(out)):
        with pytest.raises(Fatal, match=r"_renderfarm/job.json is damaged \(not"):
            use()


def test_a_reader_follows_no_name_that_leads_out_of_the_output(out: Path) -> None:
    out_of_the_output(out)
    sample = next(sample for sample in renderfarm.open(out).samples() if sample.record["row"] == 1)
    with pytest.raises(Fatal, match=r"'data/part-00000000/../../../x.png' is no file of .*/out"):
        sample.image()
    original = dataclasses.replace(sample, record=sample.record | {"original_file": str(out.parent / "x.png")})
    with pytest.raises(Fatal, match="is no file of"):
        original.original()


def test_a_profile_that_is_lost_is_not_a_job_that_never_ran(out: Path) -> None:
    (out / "_renderfarm/profile.json").unlink()
    lost = r"_renderfarm/profile.json is missing, and parts are committed; restore it from a copy"
    assert re.search(lost, "".join(verify(str(out), Choice(all=True)).problems))
    with pytest.raises(Fatal, match=lost):
        inspect(str(out), 0, 0)


def test_the_job_file_decides_nothing_that_the_profile_holds(out: Path) -> None:
    """Its hash is nowhere: where it says another dtype, pictures would be compared only, and one changed by a level would pass."""
    job = json.loads((out / "_renderfarm/job.json").read_text())
    job["workers"] = {"dtype": "bfloat16", "batch_size": 1}
    job["model"] |= {"id": "org/other", "revision": "0" * 40, "safety_checker": True, "adapters": {"../../mine": "0" * 64}}
    job["render"]["prompt_weighting"] = "a1111"
    job["after"] = [{"watermark": {"text": "mine"}}]
    (out / "_renderfarm/job.json").write_text(json.dumps(job))
    brighter(out, row=4)
    found = verify(str(out), Choice(all=True))
    assert found.profile_differences == []
    assert [(again.row, again.ok) for again in found.again] == [(0, True), (1, True), (1, True), (3, True), (4, False)]


def brighter(out: Path, row: int) -> None:
    """One picture by one level in each value, and a table that says so."""
    pixels = np.clip(np.asarray(Image.open(some_png(out, row))).astype(int) + 1, 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    in_its_place(out, file.getvalue(), row, pixel_sha256=hashlib.sha256(pixels.tobytes()).hexdigest())
    without_index(out)


def test_rows_with_a_recorded_profile_are_rendered_as_that_one_says(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["a red circle", "a blue ring"]}), tmp_path / "m.parquet")

    def run(threads: int) -> None:
        job = {
            "name": "t", "manifest": str(tmp_path / "m.parquet"), "model": "builtin:shapes", "render": {"num_inference_steps": 2},
            "workers": {"batch_size": 2, "threads": threads, "other_profiles": "record"},
            "output": {"path": str(tmp_path / "out"), "part_rows": 1},
        }  # fmt: skip
        (tmp_path / "job.yaml").write_text(json.dumps(job))
        assert renderfarm.run(tmp_path / "job.yaml", engine="inline").errors == 0

    out = tmp_path / "out"
    run(threads=1)
    shutil.rmtree(out / "data/part-00000001")
    next(out.glob("_renderfarm/parts/part-00000001.*")).unlink()
    run(threads=2)
    assert len({sample.record["profile_sha256"] for sample in renderfarm.open(out).samples()}) == 2
    found = verify(str(out), Choice(all=True))
    assert [again.result for again in found.again] == ["identical", "identical"]
    assert (found.ok, found.profile_differences) == (True, [])
    assert render_to(inspect(str(out), 1, 0), tmp_path / "alone.png").ok
    brighter(out, row=1)
    assert [again.ok for again in verify(str(out), Choice(all=True)).again] == [True, False], "its bits are promised, too"
    assert not render_to(inspect(str(out), 1, 0), tmp_path / "alone.png").ok

    other = next(out.glob("_renderfarm/profiles/*.json"))
    profile = json.loads(other.read_text()) | {"cpu_capability": "of another machine"}
    other.with_name("third.json").write_text(json.dumps(profile))
    rewritten(out, lambda record: {"profile_sha256": profile_sha256(profile)})
    found = verify(str(out), Choice(all=True))
    assert all(line.startswith(f"profile {profile_sha256(profile)[:12]}: cpu_capability") for line in found.profile_differences)
    assert len(found.profile_differences) == 1
    assert [again.result.endswith("(another profile: bits are not promised)") for again in found.again] == [False, True]
    (other.with_name("third.json")).unlink()
    found = verify(str(out), Choice(all=True))
    assert [again.row for again in found.again] == [0], "nothing says how to render the other"
    assert "no profile in the output has that hash" in found.problems[0]
    with pytest.raises(InvalidJob, match="row 1 names a render profile that the output has not"):
        render_to(inspect(str(out), 1, 0), tmp_path / "alone.png")


@pytest.mark.parametrize("change", [{"seed": 5}, {"prompt": "a green star"}, {"guidance_scale": 5.01}, {"num_inference_steps": 4}])
def test_a_table_that_tells_another_story_than_the_pixels_is_found(change: dict[str, object], out: Path) -> None:
    rewritten(out, lambda record: change)
    without_index(out)
    assert verify(str(out), FILES_ONLY).ok, "the files are what they were"
    found = verify(str(out), Choice(rows="1"))
    assert [again.ok for again in found.again] == [False, True]
    assert found.again[0].result.startswith("differs in ")
    assert found.again[0].psnr is not None


def test_with_another_profile_pictures_are_compared_and_the_difference_is_named(out: Path) -> None:
    profile = json.loads((out / "_renderfarm/profile.json").read_text())
    elsewhere = profile | {"cpu_capability": "of another machine"}
    without_index(out)
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
    without_index(out)
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


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (other_picture, "its pixels are not those that were rendered"),
        (one_bit, "its bytes are not those that were written"),
        (missing, "the file is missing"),
        (not_an_image, "cannot be decoded"),
    ],
)
def test_an_image_that_comes_out_again_does_not_hide_that_the_stored_file_is_another(
    damage: Callable[[Path], None], message: str, out: Path, tmp_path: Path
) -> None:
    damage(out)
    again = render_to(inspect(str(out), 1, 0), tmp_path / "alone.png")
    assert not again.ok
    assert re.fullmatch(rf"identical, but the stored file is not what its table says: row 1, image 0 .*: {message}.*", again.result)
    other = render_to(inspect(str(out), 1, 1), tmp_path / "alone.png")
    assert (other.ok, other.result) == (True, "identical")


def test_an_error_row_tells_its_reason_and_cannot_be_rendered(rendered: Path, tmp_path: Path) -> None:
    found = inspect(str(rendered), 2, 1)
    assert found.record["error_message"].startswith("prompt is empty")
    with pytest.raises(InvalidJob, match="ended as InvalidInput"):
        render_to(found, tmp_path / "x.png")


@pytest.mark.parametrize(("row", "k", "message"), [(9, 0, "rows 0 to 4"), (1, 5, "images 0 to 1")])
def test_what_is_not_there_is_said(row: int, k: int, message: str, rendered: Path) -> None:
    with pytest.raises(InvalidJob, match=message):
        inspect(str(rendered), row, k)


def test_a_damaged_part_is_rendered_again_once_its_table_and_its_entry_are_removed(
    write_manifest: Write, write_job: Write, tmp_path: Path
) -> None:
    """What `verify` advises."""
    path, out = write_job(write_manifest()), tmp_path / "out"
    assert renderfarm.run(path, engine="inline").images == 8
    pictures = {file: file.read_bytes() for file in out.glob("data/part-00000001/*.png")}
    first = next(iter(pictures))
    first.write_bytes(b"damaged")
    assert not verify(str(out), Choice(sample=0)).ok
    (out / "data/part-00000001/metadata.parquet").unlink()
    for entry in (out / "_renderfarm/parts").glob("part-00000001.*"):
        entry.unlink()
    assert renderfarm.run(path, engine="inline").new_images == 3
    without_index(out)
    assert len(verify(str(out), Choice(sample=0)).notes) == 1
    assert renderfarm.run(path, engine="inline").new_images == 0
    assert verify(str(out), Choice(sample=0)).notes == [], "what the note advises"
    assert {file: file.read_bytes() for file in out.glob("data/part-00000001/*.png")} == pictures
    assert verify(str(out), Choice(sample=0)).ok
