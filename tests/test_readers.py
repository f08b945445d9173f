"""OUT opens in other people's readers by the very lines that its card states: each layout, finished and interrupted."""

from __future__ import annotations

import hashlib
import io
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from checker import image_rows
from PIL import Image

import renderfarm
from renderfarm.jobfile import load_job
from renderfarm.preparation import prepare
from renderfarm.report.views import write_card_of

Write = Callable[..., Path]
LAYOUTS = ("files", "parquet", "webdataset")


@pytest.fixture(params=["finished", "interrupted", "with error rows"])
def state(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def folder(request: pytest.FixtureRequest) -> str:
    """What SQL has other ideas about; `datasets` itself finds nothing in a folder with a bracket."""
    return getattr(request, "param", "it's here")


@pytest.fixture(params=LAYOUTS)
def out(request: pytest.FixtureRequest, state: str, folder: str, write_manifest: Write, write_job: Write, tmp_path: Path) -> Path:
    prompts = [f"a large red circle {k}" for k in range(8)]
    if state == "with error rows":
        prompts[1] = prompts[6] = ""
    columns = {
        "id": [f"p{k}" for k in range(8)],
        "prompt": prompts,
        "negative_prompt": [*[None] * 7, "seen last"],  # a reader that guesses types from the first rows has none
        "challenge": ["x", None] * 4,
    }
    out = tmp_path / folder
    job = write_job(write_manifest(columns), output={"path": str(out), "layout": request.param})
    renderfarm.run(job, engine="inline")
    if state == "interrupted":
        leave_an_original(out)
        interrupt(job)
    return out


TO_ROWS: dict[str, Callable[[Any], list[dict[str, Any]]]] = {
    "pandas": lambda table: table.astype(object).where(table.notna(), None).to_dict("records"),
    "polars": lambda table: table.to_dicts(),
    "duckdb": lambda table: table.to_arrow_table().to_pylist(),
}


def leave_an_original(out: Path) -> None:
    (out / "originals/part-00000001").mkdir(parents=True)
    shutil.copy(out / "_renderfarm/report/contact_sheet.png", out / "originals/part-00000001/0000000003-0000-00000000.png")


def interrupt(job: Path) -> None:
    """Leave what a SIGKILL before the second part's commit does: the start's card, and in layout `files` images that no table names."""
    prepared, gone = prepare(load_job(job)), re.compile(r"part-00000001(\.|/metadata)")
    for key in [key for top in ("data", "metadata", "errors", "_renderfarm/parts") for key in prepared.store.list(top)]:
        if gone.search(key):
            prepared.store.delete(key)
    write_card_of(prepared, prepared.store)


def card_code(out: Path, library: str) -> str:
    return code_of((out / "README.md").read_text(), library)


def code_of(card: str, library: str) -> str:
    """The card's own lines for a library."""
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    (code,) = (block for block in blocks if re.search(rf"^(?:from|import) {library}\b(?!\.)", block, re.MULTILINE))
    return str(code)


def run_card(out: Path, library: str, cache: Path) -> dict[str, Any]:
    return run_code(card_code(out, library), cache)


def run_code(code: str, cache: Path) -> dict[str, Any]:
    """Names and values after those lines have run."""
    names: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
        patch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", cache / "downloads")
        if "data_files=" in code:  # from the test's own server, which for `datasets` is online
            patch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        exec(code, names)  # noqa: S102 - the card's code is what is tested
    return names


def pixels(picture: Image.Image | bytes) -> str:
    image = Image.open(io.BytesIO(picture)) if isinstance(picture, bytes) else picture
    return hashlib.sha256(np.asarray(image).tobytes()).hexdigest()


def picture_of(row: dict[str, Any]) -> bytes:
    """A table row's picture, as the card says where it is."""
    if "image" in row:
        return bytes(row["image"]["bytes"])
    table = Path(row["table_file"])
    if table.parent.name == "metadata":
        with tarfile.open(table.parent.parent / "data" / f"{table.stem}.tar") as tar:
            return tar.extractfile(row["file_name"]).read()  # type: ignore[union-attr]
    return (table.parent / row["file_name"]).read_bytes()


def check(rows: list[dict[str, Any]], out: Path) -> None:
    """Every committed image and nothing else; each row's picture has the row's pixels."""
    names, expected = ("row", "prompt", "pixel_sha256", "challenge"), image_rows(out)
    assert len(rows) == len(expected) >= 5
    for found, row in zip(sorted(rows, key=lambda row: row["row"]), expected, strict=True):
        assert [found[name] for name in names] == [row[name] for name in names]
        assert pixels(found["picture"]) == row["pixel_sha256"]


def test_datasets_gives_every_committed_image_with_its_columns(out: Path, tmp_path: Path) -> None:
    rows = list(run_card(out, "datasets", tmp_path / "cache")["dataset"])
    if (out / "metadata").exists():
        check([{**row["json"], "picture": row["png"]} for row in rows], out)
        assert {row["json"]["negative_prompt"] for row in rows} == {None, "seen last"}
    else:
        check([{**row, "picture": row["image"]} for row in rows], out)


@pytest.mark.parametrize("folder", ["it's [here]"], indirect=True)
def test_tables_give_the_same_rows_and_say_where_the_pictures_are(out: Path, tmp_path: Path) -> None:
    for library, to_rows in TO_ROWS.items():
        rows = to_rows(run_card(out, library, tmp_path)["table"])
        check([{**row, "picture": picture_of(row)} for row in rows], out)


def test_webdataset_reads_the_tars(out: Path, tmp_path: Path) -> None:
    if not (out / "metadata").exists():
        with pytest.raises(ValueError, match="not enough values"):
            card_code(out, "webdataset")
        return
    samples = list(run_card(out, "webdataset", tmp_path)["dataset"])
    check([{**row, "picture": picture} for picture, row in samples], out)


def test_the_cards_own_loop_and_renderfarm_open_give_pictures_with_their_records(
    out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_card(out, "renderfarm", tmp_path)
    output = renderfarm.open(out)
    assert len(capsys.readouterr().out.splitlines()) == len(output) == len(list(output))
    check([{**record, "picture": image} for image, record in output], out)


@pytest.mark.parametrize("state", ["finished"], indirect=True)
def test_an_output_that_was_moved_still_opens(out: Path, tmp_path: Path) -> None:
    moved = Path(shutil.move(out, tmp_path / "elsewhere"))
    check([{**record, "picture": image} for image, record in renderfarm.open(moved)], moved)
    dataset = datasets.load_dataset(str(moved), split="train", cache_dir=str(tmp_path / "cache"))
    assert dataset.num_rows == len(image_rows(moved))
