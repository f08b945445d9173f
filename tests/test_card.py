"""The dataset card: its lines open an output in a store, its YAML is what the Hub reads, and no text of a job breaks out of it."""

from __future__ import annotations

import io
import itertools
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pytest
import yaml
from covering import covering
from datasets.info import DatasetInfosDict
from huggingface_hub import DatasetCard
from markdown_it import MarkdownIt
from PIL import Image
from test_readers import LAYOUTS, code_of, interrupt, pixels, run_code

import renderfarm
from renderfarm import commit
from renderfarm.config import Card
from renderfarm.errors import InvalidJob
from renderfarm.jobfile import load_job
from renderfarm.preparation import prepare
from renderfarm.report import figures as figures_module
from renderfarm.report.figures import figures
from renderfarm.report.views import write_card_of
from renderfarm.storage import open_store

Write = Callable[..., Path]
ROWS = {
    "id": [f"p{k}" for k in range(8)],
    "prompt": ["a", "", "c", "d", "e", "f", "", "h"],
    "negative_prompt": [*[None] * 7, "seen last"],  # a reader that guesses types from the first rows has none
    "num_inference_steps": [3, 3, 2, 2, 2, 2, 2, 4],
}


def card(url: str) -> str:
    return open_store(url).read("README.md").decode()


# --------------------------------------------------------------------------------------------------------- stores


@pytest.fixture
def state(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def bucket(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(request.param))


@pytest.fixture
def stored(request: pytest.FixtureRequest, state: str, bucket: str, write_manifest: Write, write_job: Write) -> str:
    """The URL of an output with error rows."""
    url = f"{bucket}/it's here"
    job = write_job(write_manifest(ROWS), output={"path": url, "layout": request.param})
    renderfarm.run(job, engine="inline")
    if state == "interrupted":
        interrupt(job)
    return url


@pytest.mark.parametrize(
    ("stored", "bucket", "state"),
    covering(list(itertools.product(LAYOUTS, ("s3", "azure"), ("finished", "interrupted"))), together=2),
    indirect=True,
)
def test_every_line_of_the_card_opens_an_output_in_a_store(
    stored: str, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    expected = {record["row"]: record for _, record in renderfarm.open(stored)}
    assert sorted(expected) == ([0, 2, 3, 4, 5, 7] if state == "finished" else [0, 2, 7])

    def check(rows: list[dict[str, Any]]) -> None:
        assert sorted(row["row"] for row in rows) == sorted(expected)
        for row in rows:
            truth = expected[row["row"]]
            assert (row["prompt"], row["negative_prompt"]) == (truth["prompt"], truth["negative_prompt"])
            assert pixels(row["picture"]) == row["pixel_sha256"] == truth["pixel_sha256"]

    page = card(stored)
    tables = {
        "pandas": lambda table: table.astype(object).where(table.notna(), None).to_dict("records"),
        "polars": lambda table: table.to_dicts(),
        "duckdb": lambda table: table.to_arrow_table().to_pylist(),
    }
    for library, to_rows in tables.items():
        rows = to_rows(run_code(code_of(page, library), tmp_path)["table"])
        check([{**row, "picture": _picture_of(row)} for row in rows])
    samples = list(run_code(code_of(page, "datasets"), tmp_path / "cache")["dataset"])
    check([{**row.get("json", row), "picture": row.get("png", row.get("image"))} for row in samples])
    if "import webdataset" in page:
        check([{**row, "picture": picture} for picture, row in run_code(code_of(page, "webdataset"), tmp_path)["dataset"]])
    run_code(code_of(page, "renderfarm"), tmp_path)


def _picture_of(row: dict[str, Any]) -> bytes:
    if "image" in row:
        return bytes(row["image"]["bytes"])
    store, path = fsspec.url_to_fs(row["table_file"])
    folder, _, name = path.rpartition("/")
    if not folder.endswith("/metadata"):
        return bytes(store.cat_file(f"{folder}/{row['file_name']}"))
    tar = store.cat_file(f"{folder.removesuffix('metadata')}data/{name.replace('.parquet', '.tar')}")
    return tarfile.open(fileobj=io.BytesIO(tar)).extractfile(row["file_name"]).read()  # type: ignore[union-attr]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tables_open_in_a_store_whose_folder_is_a_pattern(
    layout: str, s3: str, write_manifest: Write, write_job: Write, tmp_path: Path
) -> None:
    url = f"{s3}/it [is] 'here'"
    renderfarm.run(write_job(write_manifest(ROWS), output={"path": url, "layout": layout}), engine="inline")
    for library in ("pandas", "polars", "duckdb"):
        assert len(run_code(code_of(card(url), library), tmp_path)["table"]) == 6, library
    if layout == "webdataset":
        assert len(list(run_code(code_of(card(url), layout), tmp_path)["dataset"])) == 6


def test_memory_has_only_our_own_line(write_manifest: Write, write_job: Write, tmp_path: Path) -> None:
    url = "memory://cards"
    renderfarm.run(write_job(write_manifest(ROWS), output={"path": url}), engine="inline")
    assert re.findall(r"^(?:from|import) (\w+)", card(url), re.MULTILINE) == ["renderfarm"]
    run_code(code_of(card(url), "renderfarm"), tmp_path)


# ------------------------------------------------------------------------------------------- what is in the YAML

NASTY = [
    "plain",
    "---",
    "--- \n",
    "a \"quoted\" 'text': #1, {{ title }} {% raw %} ${HOME}",
    "*stars* _under_ `code` [a](javascript:alert(1)) ![b](c) <script>alert(1)</script> <b>",
    "# heading",
    "1. list",
    "- list",
    "a | b | c",
    "&amp; &lt;script&gt; $x^2$ \\ ~~gone~~ https://example.com",
    "| | |\n|---|---|\n| a |",
    "no",
    "null",
    "2026-01-01",
    "@x %y ?z !tag &anchor *alias",
    "Größe 漢字 😀",
]


def written(tmp_path: Path, write_manifest: Write, write_job: Write, layout: str = "files", **fields: Any) -> str:
    """The card of an output whose job says this of it; made from Python, where `{{` is no date."""
    job = load_job(write_job(write_manifest(ROWS), output={"layout": layout}))
    output = job.output.model_copy(update={"card": Card(**fields)})
    prepared = prepare(job.model_copy(update={"output": output}))
    write_card_of(prepared, prepared.store)
    return card(prepared.store.url)


@pytest.mark.parametrize("text", NASTY)
def test_no_text_of_a_job_breaks_out_of_the_yaml_or_the_page(text: str, write_manifest: Write, write_job: Write, tmp_path: Path) -> None:
    line = " ".join(text.split())
    page = written(tmp_path, write_manifest, write_job, pretty_name=line, tags=(line,), description=f"{text}\n\n---\n\n{text}")
    read = DatasetCard(page)
    assert (read.data.pretty_name, read.data.tags) == (line, ["renderfarm", "synthetic", line])
    parser = MarkdownIt("commonmark").enable("table").enable("strikethrough")

    def shape(tokens: list[Any]) -> list[str]:
        return [part for token in tokens for part in (token.type, *(child.type for child in token.children or ()))]

    plain = written(tmp_path, write_manifest, write_job, pretty_name="x", tags=("x",), description="y\n\nz\n\ny")
    assert shape(parser.parse(read.text)) == shape(parser.parse(DatasetCard(plain).text))
    shown = [token.children for token in parser.parse(read.text) if token.type == "inline"][:4]
    assert ["".join(child.content for child in children or ()) for children in shown] == [line, line, "---", line]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_hubs_own_libraries_read_what_the_card_says(layout: str, write_manifest: Write, write_job: Write, tmp_path: Path) -> None:
    given: dict[str, Any] = {
        "license": "other", "license_name": "my-license-1.0", "license_link": "https://example.com/l", "language": ("no", "pt-BR"),
    }  # fmt: skip
    data = DatasetCard(written(tmp_path, write_manifest, write_job, layout, **given)).data
    assert {name: getattr(data, name) for name in given} == {**given, "language": ["no", "pt-BR"]}
    assert (data.pretty_name, data.task_categories, data.size_categories) == ("test", ["text-to-image"], ["n<1K"])
    assert data.configs[0]["data_files"][0]["split"] == "train"
    infos = DatasetInfosDict.from_dataset_card_data(data)
    if layout == "webdataset":
        features = infos["default"].features
        assert isinstance(features["png"], datasets.Image)
        assert features["json"]["num_inference_steps"] == datasets.Value("int32")
    else:
        assert not infos


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"license": "MIT License"}, "output.card.license"),
        ({"license": "other"}, "give license_name and license_link"),
        ({"license": "other", "license_name": "mine"}, "give license_name and license_link"),
        ({"license": "mit", "license_link": "LICENSE"}, "card.license_link: the Hub takes it with license other only"),
        ({"license": "other", "license_name": "x", "license_link": "javascript:alert(1)"}, "output.card.license_link"),
        ({"license": "other", "license_name": "x", "license_link": "https://me:secret@example.com"}, "holds credentials"),
        ({"language": ["English"]}, "output.card.language"),
        ({"language": [False]}, "output.card.language"),
        ({"tags": ["two\nlines"]}, "output.card.tags"),
        ({"pretty_name": "a\nb"}, "output.card.pretty_name"),
        ({"description": "a\x1b[31mb"}, "output.card.description"),
        ({"licence": "mit"}, "license"),
    ],
)
def test_what_the_hub_would_refuse_is_refused_before_the_run(
    fields: dict[str, Any], said: str, write_manifest: Write, write_job: Write
) -> None:
    with pytest.raises(InvalidJob) as caught:
        load_job(write_job(write_manifest(), output={"card": fields}))
    assert said in str(caught.value)


def test_what_the_card_says_may_change_and_the_output_goes_on(write_manifest: Write, write_job: Write, tmp_path: Path) -> None:
    manifest = write_manifest(ROWS)
    renderfarm.run(write_job(manifest, output={"card": {"license": "mit"}}), engine="inline")
    again = renderfarm.run(write_job(manifest, output={"card": {"license": "cc0-1.0"}}), engine="inline")
    assert again.new_images == 0
    assert DatasetCard(card(str(tmp_path / "out"))).data.license == "cc0-1.0"


# --------------------------------------------------------------------------------------------------------- figures


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_figures_are_those_of_the_tables(layout: str, write_manifest: Write, write_job: Write, tmp_path: Path) -> None:
    renderfarm.run(write_job(write_manifest(ROWS), output={"layout": layout}), engine="inline")
    out = str(tmp_path / "out")
    page, rows = card(out), [record for _, record in renderfarm.open(out)]
    size = sum(row["bytes"] for row in rows)
    for line in (
        f"| size of the image files | {size:,} bytes |",
        "| errors | InvalidInput: 2 |",
        "| samplers | euler: 6 |",
        "| steps | 2: 4, 3: 1, 4: 1 |",
        "| sizes | 64×64: 6 |",
        f"`{rows[0]['profile_sha256']}`",
        "![Contact sheet: some of the images, each with its prompt](_renderfarm/report/contact_sheet.png)",
    ):
        assert line in page
    assert Image.open(Path(out) / "_renderfarm/report/contact_sheet.png").width > 64


def test_an_output_of_many_parts_costs_a_bounded_number_of_reads(
    write_manifest: Write, write_job: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures_module, "TABLES_READ", 2)
    monkeypatch.setattr(figures_module, "ENTRIES_READ", 1)
    job = write_job(write_manifest(ROWS), output={"part_rows": 2})
    renderfarm.run(job, engine="inline")
    store = open_store(str(tmp_path / "out"))
    found = figures(store, "files", commit.index_entries(store))
    assert (found.counted, found.error_classes, sum(found.kinds["samplers"].values())) == (3, {}, 3)
    assert "| samplers (of 3 images) | euler: 3 |" in card(str(tmp_path / "out"))


def test_a_damaged_or_missing_table_does_not_keep_the_card_from_being_written(
    write_manifest: Write, write_job: Write, tmp_path: Path
) -> None:
    renderfarm.run(write_job(write_manifest(ROWS)), engine="inline")
    tables = sorted((tmp_path / "out/data").glob("*/metadata.parquet"))
    tables[0].write_bytes(b"PAR1 damaged")
    tables[1].unlink()
    (tmp_path / "out/_renderfarm/profile.json").write_text("{")
    (tmp_path / "out/_renderfarm/parts/part-00000009.i1.e0.b1.json").write_text("{}")  # of a part whose table is gone, too
    store = open_store(str(tmp_path / "out"))
    found = figures(store, "files", commit.index_entries(store))
    assert (found.counted, found.profile) == (1, None)


# --------------------------------------------------------------------------------------- what readers do not open


@pytest.mark.parametrize(("layout", "format_"), [("files", "avif"), ("parquet", "jxl"), ("webdataset", "jxl")])
def test_the_card_gives_no_line_for_pictures_that_datasets_does_not_open(
    layout: str, format_: str, write_manifest: Write, write_job: Write, tmp_path: Path
) -> None:
    renderfarm.run(write_job(write_manifest(ROWS), output={"layout": layout, "format": format_}), engine="inline")
    page = card(str(tmp_path / "out"))
    assert "from datasets" not in page
    assert f"`datasets` opens no {format_} in this layout" in page
    assert len(run_code(code_of(page, "polars"), tmp_path)["table"]) == 6


@pytest.mark.parametrize(("layout", "place"), covering([(layout, place) for layout in LAYOUTS for place in ("folder", "s3")]))
def test_the_tables_are_a_manifest_by_the_cards_own_lines(
    place: str, layout: str, request: pytest.FixtureRequest, write_manifest: Write, write_job: Write, tmp_path: Path
) -> None:
    """In layout `parquet`, too, whose column `image` is no picture to begin with."""
    out = f"{tmp_path if place == 'folder' else request.getfixturevalue(place)}/it's [here]"
    renderfarm.run(write_job(write_manifest(ROWS), model="builtin:shapes", output={"path": out, "layout": layout}), engine="inline")
    (block,) = re.findall(r"```yaml\n(.*?)```", card(out), re.DOTALL)
    job = write_job(tmp_path, model="builtin:shapes", seed=77, output={"path": str(tmp_path / "again")})
    job.write_text(yaml.safe_dump(yaml.safe_load(job.read_text()) | yaml.safe_load(block)))
    summary = renderfarm.run(job, engine="inline")
    assert (summary.images, summary.errors) == (6, 0)
    first, again = ([row for _, row in renderfarm.open(url)] for url in (out, tmp_path / "again"))
    assert [row["pixel_sha256"] for row in again] == [row["pixel_sha256"] for row in first]
    assert not any("init_image" in row for row in again)
