"""OUT opens in other people's readers by the very lines that its card states, finished and interrupted."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import duckdb
import pandas
import pytest
from checker import image_rows
from PIL import Image

import renderfarm

Write = Callable[..., Path]


@pytest.fixture(params=["finished", "interrupted", "with error rows"])
def out(request: pytest.FixtureRequest, write_manifest: Write, write_job: Write, tmp_path: Path) -> Path:
    prompts = [f"a large red circle {k}" for k in range(8)]
    if request.param == "with error rows":
        prompts[1] = prompts[6] = ""
    columns = {"id": [f"p{k}" for k in range(8)], "prompt": prompts, "challenge": ["x", None] * 4}
    renderfarm.run(write_job(write_manifest(columns)), engine="inline")
    if request.param == "interrupted":
        # what a SIGKILL between images and commit leaves: images that no table names
        (tmp_path / "out/data/part-00000001/metadata.parquet").unlink()
        next((tmp_path / "out/_renderfarm/parts").glob("part-00000001*")).unlink()
    return tmp_path / "out"


def card_lines(out: Path) -> dict[str, str]:
    """The card's own code, by library."""
    code = re.search(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)
    assert code is not None
    return {
        "datasets": next(line for line in code[1].splitlines() if "load_dataset(" in line),
        "pandas": next(line for line in code[1].splitlines() if "pandas.concat" in line),
        "duckdb": next(line for line in code[1].splitlines() if "duckdb.sql" in line),
    }


def run_line(line: str, **names: Any) -> Any:
    exec(line, names)  # noqa: S102 - the card's code is what is tested
    return names.get("dataset", names.get("table"))


def test_load_dataset_gives_every_committed_image_with_its_columns(out: Path, tmp_path: Path) -> None:
    def load(path: str, **options: Any) -> datasets.Dataset:
        return datasets.load_dataset(path, cache_dir=str(tmp_path / "cache"), **options)

    dataset = run_line(card_lines(out)["datasets"], load_dataset=load)
    expected = image_rows(out)
    assert dataset.num_rows == len(expected) >= 5
    for found, row in zip(sorted(dataset, key=lambda r: r["row"]), expected, strict=True):
        assert isinstance(found["image"], Image.Image)
        assert found["image"].size == (64, 64)
        assert (found["prompt"], found["pixel_sha256"], found["challenge"]) == (row["prompt"], row["pixel_sha256"], row["challenge"])


def test_pandas_and_duckdb_read_the_same_rows_by_the_cards_lines(out: Path) -> None:
    import glob

    expected = [(row["row"], row["pixel_sha256"]) for row in image_rows(out)]
    frame = run_line(card_lines(out)["pandas"], pandas=pandas, glob=glob)
    assert sorted(zip(frame["row"], frame["pixel_sha256"], strict=True)) == expected
    relation = duckdb.sql(card_lines(out)["duckdb"].split('duckdb.sql("')[1].rstrip(')"'))
    assert sorted(relation.project("row, pixel_sha256").fetchall()) == expected


def test_renderfarm_open_iterates_pictures_with_their_records(out: Path) -> None:
    output = renderfarm.open(out)
    read = list(output)
    assert [record["row"] for _, record in read] == [row["row"] for row in image_rows(out)]
    assert all(image.size == (64, 64) for image, _ in read)
    assert len(output) == len(read)


def test_an_output_that_was_moved_still_opens(out: Path, tmp_path: Path) -> None:
    moved = shutil.move(out, tmp_path / "elsewhere")
    assert len(list(renderfarm.open(moved))) == len(image_rows(Path(moved)))
    dataset = datasets.load_dataset(str(moved), split="train", cache_dir=str(tmp_path / "cache"))
    assert dataset.num_rows == len(image_rows(Path(moved)))
