"""What the report's file holds, and that it is written whatever the output is like. `test_report_page.py` looks at it in a browser."""

from __future__ import annotations

import base64
import datetime as dt
import io
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image, ImageChops, ImageStat
from test_cli import cli, refused

import renderfarm
from renderfarm import commit, reading
from renderfarm.errors import Fatal, Transient
from renderfarm.report import contents, figures, views
from renderfarm.report.columnar import column, columns_of
from renderfarm.report.gallery import Bounds
from renderfarm.report.html import KEY, write_report
from renderfarm.storage.local import LocalStore

Write = Callable[..., Path]


def data_of(page: str) -> dict[str, Any]:
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    found: dict[str, Any] = json.loads(text)
    return found


def report_of(out: Path) -> dict[str, Any]:
    return data_of((out / KEY).read_text())


def values(columns: list[dict[str, Any]], name: str) -> list[Any]:
    (found,) = (one for one in columns if one["name"] == name)
    return found["values"] if "values" in found else [found["of"][place] for place in found["at"]]


@pytest.fixture
def out(write_manifest: Write, write_job: Write, tmp_path: Path) -> Path:
    renderfarm.run(write_job(write_manifest()), engine="inline")
    return tmp_path / "out"


# ------------------------------------------------------------------------------------------------- what it holds


@pytest.mark.parametrize("layout", ["files", "parquet", "webdataset"])
def test_every_row_is_in_it_with_its_values_and_its_picture(layout: str, write_manifest: Write, write_job: Write, tmp_path: Path) -> None:
    renderfarm.run(write_job(write_manifest(), output={"layout": layout}), engine="inline")
    page = (tmp_path / "out" / KEY).read_text()
    pictures = data_of(page)["pictures"]
    samples = list(renderfarm.open(tmp_path / "out").samples())
    for name in ("row", "prompt", "seed", "guidance_scale", "category", "pixel_sha256"):
        assert values(pictures["columns"], name) == [sample.record[name] for sample in samples]
    (sheet,) = re.findall(r'<script type="text/plain" class="sheet">(.*?)</script>', page)
    picture = Image.open(io.BytesIO(base64.b64decode(sheet)))
    assert (pictures["side"], pictures["across"], picture.size) == (64, 16, (8 * 64, 64))
    for k in range(8):
        thumbnail = picture.crop((64 * k, 0, 64 * k + 64, 64))
        differences = [difference(thumbnail, sample.image()) for sample in samples]
        assert differences.index(min(differences)) == k


def difference(one: Image.Image, other: Image.Image) -> float:
    return float(ImageStat.Stat(ImageChops.difference(one, other.convert("RGB"))).sum[0])


def test_the_file_is_one_document_that_loads_nothing(out: Path) -> None:
    page = (out / KEY).read_text()
    assert not re.findall(r"""(?:src|href)\s*=\s*["']?(?!#)[a-z]+:""", page.split("<script>")[0])
    assert not re.findall(r"@import|url\((?!\"\$\{)", page)
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert policy.replace("&#39;", "'").startswith("default-src 'none'; img-src blob:; style-src 'sha256-")
    assert "unsafe" not in policy


def test_a_name_that_is_markup_is_shown_as_a_name() -> None:
    from renderfarm.report.gallery import Gallery
    from renderfarm.report.html import render

    name = "</title><script>alert(1)</script>&\u2028"
    page = render({"summary": {"name": name}}, Gallery({}, [], 0, 0))
    assert data_of(page)["summary"]["name"] == name
    assert page.count("<script>") == 1
    assert "\u2028" not in page.split('id="data">')[1].split("</script>")[0]


def test_columns_say_each_value_once_where_many_rows_share_it() -> None:
    assert column(["a", "a", "b", "a"]) == {"kind": "text", "of": ["a", "b"], "at": [0, 0, 1, 0]}
    assert column([1.5, None, 3]) == {"kind": "number", "values": [1.5, None, 3]}
    assert column([1, "x"]) == {"kind": "text", "values": ["1", "x"]}
    records = [{"a": 1, "gone": None}, {"a": 2, "gone": None, "b": "x"}]
    assert [one["name"] for one in columns_of(records)] == ["a", "b"]


def test_values_that_json_or_javascript_do_not_have_are_texts() -> None:
    given = [2**60 + 1, float("nan"), float("-inf"), True, b"\x00" * 2000, ["<", 1], dt.date(2026, 1, 2), "y" * 30_000]
    shown = column(given)["values"]
    assert shown[:7] == [str(2**60 + 1), "nan", "-inf", "true", "(2,000 bytes)", '["<", 1]', "2026-01-02"]
    assert shown[7].endswith("… (10,000 more characters)")
    json.dumps(shown, allow_nan=False)


def test_columns_of_any_type_come_into_it(write_manifest: Write, write_job: Write, tmp_path: Path) -> None:
    columns = {
        "prompt": ["a", "b"],
        "when": pa.array([1, 10**12], pa.timestamp("s")),
        "half": pa.array([b"\x00\xff", None], pa.binary()),
        "nested": pa.array([[{"x": 1}], None]),
        "large": pa.array([2**63 - 1, 0]),
        "surrogate": ["\ud7ff", "\U0001f600"],
    }
    renderfarm.run(write_job(write_manifest(columns)), engine="inline")
    found = report_of(tmp_path / "out")["pictures"]["columns"]
    assert values(found, "large") == [str(2**63 - 1), "0"]
    assert values(found, "half") == ["(2 bytes)", None]
    assert values(found, "nested") == ['[{"x": 1}]', None]
    assert values(found, "when") == ["1970-01-01 00:00:01.000", "<value out of range: 1000000000000000>"], "as Arrow writes it"


# ------------------------------------------------------------------------------------------------- bounds, damage


def test_few_images_of_many_are_spread_over_the_output_and_it_says_so(out: Path) -> None:
    found = write_report(renderfarm.open(out), Bounds(4))
    assert (found.images, found.of, found.thumbnails) == (4, 8, 4)
    rows = values(report_of(out)["pictures"]["columns"], "row")
    assert len({row // 3 for row in rows}) == 3, "of every part"


def test_where_time_is_up_images_have_no_thumbnail_and_all_else(out: Path) -> None:
    found = write_report(renderfarm.open(out), Bounds(8, seconds=0))
    assert (found.images, found.thumbnails) == (8, 0)
    assert values(report_of(out)["pictures"]["columns"], "row") == list(range(8))


def test_what_is_gone_or_damaged_keeps_nothing_else_from_being_shown(out: Path) -> None:
    pictures = sorted(out.glob("data/*/*.png"))
    pictures[0].unlink()
    pictures[1].write_bytes(b"damaged")
    (out / "data/part-00000001/metadata.parquet").write_bytes(b"damaged")
    for entry in out.glob("_renderfarm/parts/part-00000002.*"):
        entry.write_text("damaged")
    (out / "_renderfarm/runs/20250101T000000Z-000000.json").write_text("[]")
    found = write_report(renderfarm.open(out), Bounds(100))
    assert (found.images, found.of, found.thumbnails) == (5, 8, 3)
    said = report_of(out)
    assert values(said["timeline"]["parts"], "part") == ["0", "1"]
    assert (said["timeline"]["unread"], said["timeline"]["unread_count"]) == (["2"], 1)
    assert (found.unread_parts, said["pictures"]["unread"]) == (1, ["1"])
    assert len(said["runs"]) == 1


def test_failures_are_there_with_their_reasons_and_waivers(write_manifest: Write, write_job: Write, tmp_path: Path) -> None:
    from renderfarm.failures import Choice, waive

    renderfarm.run(write_job(write_manifest({"prompt": ["a", "", "b [nan]", ""]})), engine="inline")
    waive(str(tmp_path / "out"), Choice(rows="1"), None)
    write_report(renderfarm.open(tmp_path / "out"), Bounds(10))
    said = report_of(tmp_path / "out")
    assert said["summary"]["error_classes"] == {"InvalidInput": 2, "NonFiniteOutput": 1}
    failures = said["failures"]["columns"]
    assert (values(failures, "row"), values(failures, "waived")) == ([1, 2, 3], ["true", "false", "false"])


def test_of_a_sweep_it_says_what_was_asked_of_the_samples_that_failed(write_manifest: Write, write_job: Write, tmp_path: Path) -> None:
    columns = {"prompt": ["a", "b [nan]"], "mood": ["warm", "cold"], "caption": ["x", "y"]}
    sweep = {"product": {"guidance_scale": [2, 7.5]}, "zip": {"sampler": ["Euler", "DDIM"], "height": [64, 72]}}
    renderfarm.run(write_job(write_manifest(columns), sweep=sweep), engine="inline")
    said = report_of(tmp_path / "out")
    images, asked = said["pictures"]["columns"], said["failures"]["asked"]
    assert values(asked, "sampler") == values(images, "sampler") == ["euler", "ddim"] * 2
    assert values(asked, "guidance_scale") == values(images, "guidance_scale") == [2, 2, 7.5, 7.5]
    assert values(asked, "num_inference_steps") == values(images, "num_inference_steps")
    assert values(asked, "height") == values(images, "height")
    assert (set(values(asked, "prompt")), set(values(asked, "mood"))) == ({"b [nan]"}, {"cold"})


# ------------------------------------------------------------------------------------------------- when it is written


def away(*_: Any, **__: Any) -> Any:
    raise Transient("scripted: the store is away")


def test_a_store_that_is_away_at_the_end_is_asked_once_and_is_a_warning(
    write_manifest: Write, write_job: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    class Away(LocalStore):
        """Answers nothing once the run has ended."""

        def _is_away(self, key: str) -> None:
            asked.append(key)
            raise Transient("scripted: away")

        read = list = open = exists = put = _is_away  # type: ignore[assignment]

    patience: list[float] = []

    def opened(url: str, *, single_writer: bool = False, patience_s: float = 120.0) -> LocalStore:
        patience.append(patience_s)
        return Away(url)

    for module in (views, reading):
        monkeypatch.setattr(module, "open_store", opened)
    summary = renderfarm.run(write_job(write_manifest()), engine="inline")
    assert (summary.state, summary.exit_code) == ("SUCCEEDED", 0)
    said = (
        "the contact sheet, the dataset card, the report were not written, since the store is away (scripted: away); run the same command"
    )
    assert [warning for warning in summary.warnings if warning.startswith(said)] == list(summary.warnings)
    assert len(asked) == 1, "the second request would wait as long"
    assert set(patience) == {views.PATIENCE_S}


def test_a_store_that_goes_away_meanwhile_ends_a_view_at_once(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is gone or damaged is left out; what cannot be asked is not."""
    output = renderfarm.open(out)
    entries = commit.index_entries(output.store)
    with monkeypatch.context() as patch:
        patch.setattr(reading.StoredSample, "image", away)
        with pytest.raises(Transient):
            write_report(output, Bounds(8))
    monkeypatch.setattr(LocalStore, "open", away)
    monkeypatch.setattr(LocalStore, "read", away)
    for ask in (figures.figures, contents.timeline, contents.runs):
        given = {figures.figures: (output.store, "files", entries), contents.timeline: (output, entries)}.get(ask, (output,))
        with pytest.raises(Transient):
            ask(*given)


def test_a_report_that_cannot_be_written_is_a_warning_of_a_run_that_succeeded(
    write_manifest: Write, write_job: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("scripted")

    monkeypatch.setattr(views, "write_report", fail)
    summary = renderfarm.run(write_job(write_manifest()), engine="inline")
    assert (summary.state, summary.exit_code) == ("SUCCEEDED", 0)
    assert "the report was not written (ZeroDivisionError: scripted); `renderfarm report" in summary.warnings[-1]


def test_a_run_that_failed_leaves_a_report_and_one_with_nothing_to_do_leaves_it_alone(
    write_manifest: Write, write_job: Write, tmp_path: Path
) -> None:
    manifest = write_manifest({"prompt": ["a", "", "b", "c"]})
    with pytest.raises(Fatal, match="stop_after"):
        renderfarm.run(write_job(manifest, output={"part_rows": 1}, failure={"stop_after": 1}), engine="inline")
    assert report_of(tmp_path / "out")["summary"]["state"] == "FAILED"
    time.sleep(1.1)  # which run was the last, their names say to the second
    renderfarm.run(write_job(manifest, output={"part_rows": 1}), engine="inline")
    said = report_of(tmp_path / "out")
    assert (said["summary"]["state"], said["summary"]["images"]) == ("PARTIAL", 3)
    assert {run["state"]: run["error"] is None for run in said["runs"]} == {"PARTIAL": True, "FAILED": False}
    assert all(len(run["key"]) == 12 for run in said["runs"])
    before = (tmp_path / "out" / KEY).stat().st_mtime_ns
    renderfarm.run(write_job(manifest, output={"part_rows": 1}), engine="inline")
    assert (tmp_path / "out" / KEY).stat().st_mtime_ns == before


def test_of_a_run_that_is_at_work_it_shows_what_is_committed(write_manifest: Write, write_job: Write, tmp_path: Path) -> None:
    renderfarm.run(write_job(write_manifest()), engine="inline")
    out = tmp_path / "out"
    progress = json.loads((out / commit.PROGRESS).read_text())
    for state, age, shown in (("RUNNING", 0, "RUNNING"), ("RUNNING", 3600, "INTERRUPTED"), ("PAUSED", 1, "PAUSED")):
        (out / commit.PROGRESS).write_text(json.dumps(progress | {"state": state, "updated": time.time() - age}))
        write_report(renderfarm.open(out), Bounds(10))
        assert report_of(out)["summary"]["state"] == shown


def test_the_command_writes_it_into_the_output_or_where_one_says(out: Path, tmp_path: Path) -> None:
    (out / KEY).unlink()
    done = cli("report", out)
    assert re.search(r"report of 8 images, 0\.\d MB: .*/_renderfarm/report/report\.html", done.stdout), done.stdout + done.stderr
    assert (out / KEY).exists()
    elsewhere = tmp_path / "sub" / "mine.html"
    assert "cannot be written" in refused("report", out, "--file", elsewhere)
    elsewhere.parent.mkdir()
    done = cli("report", out, "--file", elsewhere, "--max-images", "5")
    assert "--max-images 8 takes all of them" in done.stdout
    assert data_of(elsewhere.read_text())["pictures"]["folder"] == "../out/"
    said = json.loads(cli("report", out, "--json").stdout)
    assert (said["images"], said["of"], said["thumbnails"], said["bytes"]) == (8, 8, 8, (out / KEY).stat().st_size)
    assert "not an output of renderfarm" in refused("report", tmp_path)
