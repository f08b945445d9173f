"""The report in a real browser: what a person sees, clicks and types. Each page must complain of nothing and ask nobody for anything."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import browser as browsers
import numpy as np
import pytest
import servers
from PIL import Image
from test_retries import fail_on

import renderfarm
from renderfarm.failures import Choice, retry
from renderfarm.models.fake import Fake
from renderfarm.report.gallery import Bounds
from renderfarm.report.html import KEY, write_report

Write = Callable[..., Path]
EVIL = "</script><img src=x onerror=\"window.broken='{}'\"><svg onload=alert(1)>"
PROMPTS = ("a red circle", "a blue square", "a green cross")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if reason := browsers.missing():
        pytest.skip(reason)
    with browsers.chromium() as found:
        yield found


@pytest.fixture
def page(request: pytest.FixtureRequest, browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens a report; at the end nothing may have been complained of, and nothing asked for but what is in the file."""
    pages = []

    def open_(file: Path, **options: Any) -> Any:
        made = browsers.opened(browser, file, **options)
        page, seen = made.__enter__()
        pages.append((made, file, seen))
        return page

    yield open_
    for made, file, seen in pages:
        made.__exit__(None, None, None)
        assert seen.complaints == []
        assert [url for url in seen.requests if url != file.as_uri() and not url.startswith("blob:")] == []


@pytest.fixture
def sweep(write_manifest: Write, write_job: Write, tmp_path: Path) -> Path:
    """Three prompts × two samplers × three scales, and a row that cannot be rendered."""
    rows = [(p, s, g) for p in PROMPTS for s in ("euler", "ddim") for g in (1.0, 3.0, 7.5)]
    columns = {
        "id": [f"row-{k}" for k in range(19)],
        "prompt": [*(p for p, _, _ in rows), ""],
        "sampler": [*(s for _, s, _ in rows), "euler"],
        "guidance_scale": [*(g for _, _, g in rows), 1.0],
        "mood": [*("warm" if "red" in p else None for p, _, _ in rows), None],
    }
    renderfarm.run(write_job(write_manifest(columns)), engine="inline")
    return tmp_path / "out" / KEY


def tiles(page: Any) -> list[str]:
    """What the tiles are called, in the order in which they are seen."""
    placed = page.locator(".tile").evaluate_all(
        "tiles => tiles.map(tile => [tile.getBoundingClientRect().y, tile.getBoundingClientRect().x, tile.ariaLabel])"
    )
    return [name for _, _, name in sorted(placed)]


def count(page: Any) -> str:
    return str(page.locator("#count").inner_text())


# ------------------------------------------------------------------------------------------------- find


def test_search_filters_and_sorting_choose_the_images(page: Callable[..., Any], sweep: Path) -> None:
    shown = page(sweep)
    assert count(shown) == "18 images"
    shown.fill("#search", "BLUE ddim")
    assert count(shown) == "3 of 18 images"
    assert set(tiles(shown)) == {f"Row {row}, image 0: a blue square" for row in (9, 10, 11)}
    shown.get_by_label("7.5").check()
    assert tiles(shown) == ["Row 11, image 0: a blue square"]
    shown.get_by_text("Clear").click()
    assert (count(shown), shown.input_value("#search"), shown.get_by_label("7.5").is_checked()) == ("18 images", "", False)
    shown.get_by_label("warm").check()
    assert count(shown) == "6 of 18 images"
    shown.get_by_label("warm").uncheck()
    shown.select_option("#sort", "guidance_scale")
    shown.click("#direction")
    assert tiles(shown)[0] in {f"Row {row}, image 0: a green cross" for row in (14, 17)}
    shown.fill("#search", '"a green"')
    assert count(shown) == "6 of 18 images"
    _, record = next(iter(renderfarm.open(sweep.parent.parent.parent)))
    shown.fill("#search", record["pixel_sha256"][:12])
    assert tiles(shown) == ["Row 0, image 0: a red circle"]
    shown.fill("#search", "nothing like that")
    assert "No image fits" in shown.locator("#nothing").inner_text()


def test_a_range_of_numbers_is_a_filter_too(page: Callable[..., Any], sweep: Path) -> None:
    shown = page(sweep)
    shown.locator("summary", has_text=re.compile("^row$")).click()
    shown.get_by_label("row: lowest").fill("4")
    shown.get_by_label("row: highest").fill("6")
    assert [name.split(",")[0] for name in tiles(shown)] == ["Row 4", "Row 5", "Row 6"]


def test_any_columns_are_the_axes_of_the_grid(page: Callable[..., Any], sweep: Path) -> None:
    shown = page(sweep)
    shown.click("#tab-grid")
    assert [shown.input_value(f"#axis-{axis}") for axis in "xyz"] == ["sampler", "prompt", "guidance_scale"], "each image has a cell"
    shown.select_option("#axis-z", "")
    assert shown.locator(".sweep .cell").count() == 6
    assert shown.locator(".cell .more").first.inner_text() == "×3"
    shown.select_option("#axis-z", "guidance_scale")
    assert shown.locator(".layer h3").all_inner_texts() == ["guidance_scale: 1", "guidance_scale: 3", "guidance_scale: 7.5"]
    assert (shown.locator(".sweep .cell").count(), shown.locator(".cell .more").count()) == (18, 0)
    shown.click("#swap")
    assert shown.locator(".layer").first.locator("thead th").all_inner_texts() == list(PROMPTS)
    shown.locator(".layer").nth(2).locator(".cell").nth(4).click()
    recipe = shown.locator("#detail-text").inner_text()
    assert "a blue square" in recipe
    assert re.search(r"sampler\s+ddim", recipe)
    assert re.search(r"guidance_scale\s+7.5", recipe)
    shown.keyboard.press("Escape")
    shown.fill("#search", "blue")
    assert shown.locator(".layer").first.locator("thead th").all_inner_texts() == ["a blue square"]
    shown.select_option("#axis-x", "mood")
    assert shown.locator(".layer").first.locator("thead th").all_inner_texts() == ["—"], "the images that have none"


@pytest.fixture
def with_failures(write_manifest: Write, write_job: Write, tmp_path: Path) -> Path:
    """A sweep of two prompts and three scales, of which one prompt cannot be rendered."""
    manifest = write_manifest({"id": ["a", "b"], "prompt": ["a cat", "a dog [nan]"]})
    renderfarm.run(write_job(manifest, sweep={"product": {"guidance_scale": [1.5, 3, 7.5]}}), engine="inline")
    return tmp_path / "out" / KEY


def test_failed_samples_of_a_sweep_have_their_cells_in_the_grid(page: Callable[..., Any], with_failures: Path) -> None:
    shown = page(with_failures)
    shown.click("#tab-grid")
    shown.select_option("#axis-x", "guidance_scale")
    for axis in ("y", "z"):
        shown.select_option(f"#axis-{axis}", "")
    assert shown.locator(".cell").all_inner_texts() == ["✕1"] * 3, "beside the images"
    assert "1 failed" in shown.locator(".cell").first.get_attribute("aria-label")
    shown.fill("#search", "dog")
    assert shown.locator(".sweep thead th").all_inner_texts() == ["1.5", "3", "7.5"], "scales that no image has any more"
    assert shown.locator(".cell").all_inner_texts() == ["✕ NonFiniteOutput"] * 3
    shown.locator(".cell").nth(1).click()
    shown.locator("#panel-failures").wait_for(state="visible")
    assert shown.locator("#panel-failures tbody tr").count() == 1
    assert shown.locator("#panel-failures tbody td").first.inner_text() == "4:0"


def test_what_has_no_cell_is_said(page: Callable[..., Any], sweep: Path) -> None:
    shown = page(sweep)
    shown.click("#tab-grid")
    assert "1 failed sample in no cell" in shown.locator("#grid-note").inner_text()


# ------------------------------------------------------------------------------------------------- one image


def test_an_address_names_an_image(page: Callable[..., Any], sweep: Path) -> None:
    """`#sample=12:0` opens it, and whatever is open is in the address."""
    shown = page(sweep)
    address = f"{sweep.as_uri()}#sample=12:0"
    shown.goto(address)
    shown.locator("#detail").wait_for(state="visible")
    assert shown.locator("#detail-title").inner_text() == "Row 12, image 0"
    shown.reload()
    shown.wait_for_selector("html[data-ready]")
    assert shown.locator("#detail-title").inner_text() == "Row 12, image 0"
    shown.keyboard.press("ArrowRight")
    assert shown.evaluate("location.hash") == "#sample=13:0"
    shown.keyboard.press("Escape")
    shown.wait_for_function("() => location.hash === '#images'")
    shown.evaluate("location.hash = '#sample=007'")
    shown.wait_for_function("() => document.getElementById('detail-title').textContent === 'Row 7, image 0'")
    shown.keyboard.press("Escape")
    shown.wait_for_function("() => location.hash === '#images'")
    shown.evaluate("location.hash = '#sample=18:0'")
    shown.locator("#missing").wait_for(state="visible")
    assert "Sample 18:0 is not in this report" in shown.locator("#missing").inner_text()
    assert not shown.locator("#detail").is_visible()


def test_the_recipe_has_every_column_and_the_command_makes_the_image_again(
    page: Callable[..., Any], write_manifest: Write, write_job: Write, tmp_path: Path
) -> None:
    out = tmp_path / "it's an output"
    renderfarm.run(
        write_job(write_manifest({"prompt": ["a cat", "a dog"], "note": ["x", "y"]}), output={"path": str(out)}), engine="inline"
    )
    shown = page(out / KEY)
    shown.locator(".tile").nth(1).click()
    _, record = list(renderfarm.open(out))[1]
    cells = dict(
        zip(shown.locator("#detail .columns th").all_inner_texts(), shown.locator("#detail .columns td").all_inner_texts(), strict=True)
    )
    wanted = {name: value for name, value in record.items() if value is not None and name != "prompt"}
    assert cells.keys() == wanted.keys()
    assert (cells["seed"], cells["note"], cells["pixel_sha256"]) == (str(record["seed"]), "y", record["pixel_sha256"])
    command, parameters = shown.locator("#detail pre").all_inner_texts()
    assert parameters.startswith("a dog\nSteps: 3, ")
    assert command == f"renderfarm inspect {shlex.quote(str(out))} 1:0 --render 1-0.png"
    typed = [sys.executable, "-m", *shlex.split(command)]
    done = subprocess.run(typed, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert "rendered again into 1-0.png: identical" in done.stdout, done.stdout + done.stderr
    link = shown.locator("#detail .file a")
    assert Path(shown.evaluate("link => decodeURIComponent(new URL(link.href).pathname)", link.element_handle())).is_file()


def test_copy_puts_the_text_into_the_clipboard(page: Callable[..., Any], sweep: Path) -> None:
    shown = page(sweep)
    shown.locator(".tile").first.click()
    button = shown.get_by_label("Copy: Make it again")
    button.click()
    shown.get_by_text("Copied").wait_for()
    shown.keyboard.press("Escape")
    shown.locator(".tile:focus").wait_for()  # which takes it a moment after the dialog is gone
    shown.focus("#search")
    shown.keyboard.press("Control+V")
    assert shown.input_value("#search").endswith("0:0 --render 0-0.png")


def test_everything_can_be_done_by_keyboard(page: Callable[..., Any], sweep: Path) -> None:
    shown = page(sweep)

    def focused() -> str:
        return str(shown.evaluate("document.activeElement.getAttribute('aria-label') ?? document.activeElement.id"))

    def focus_comes_back(to: str) -> None:
        """A dialog says that it is closed a moment after it is."""
        shown.wait_for_function("to => document.activeElement.getAttribute('aria-label') === to", arg=to)

    shown.keyboard.press("/")
    assert focused() == "search"
    shown.keyboard.type("circle")
    shown.keyboard.press("Escape")
    shown.keyboard.press("ArrowRight")
    assert focused() == "Row 1, image 0: a red circle"
    shown.keyboard.press("End")
    shown.keyboard.press("ArrowRight")
    assert focused() == "Row 5, image 0: a red circle", "there is nothing behind the last one"
    shown.keyboard.press("Home")
    shown.keyboard.press("Enter")
    assert shown.locator("#detail-title").inner_text() == "Row 0, image 0"
    shown.keyboard.press("ArrowRight")
    shown.keyboard.press("ArrowRight")
    assert (shown.locator("#detail-title").inner_text(), shown.locator("#detail-place").inner_text()) == ("Row 2, image 0", "3 of 6")
    shown.keyboard.press("Escape")
    shown.locator("#detail").wait_for(state="hidden")
    focus_comes_back("Row 2, image 0: a red circle")  # one goes on where one has looked
    shown.focus("#tab-images")
    shown.keyboard.press("ArrowRight")
    shown.locator("#panel-grid").wait_for(state="visible")
    shown.focus(".cell[tabindex='0']")
    shown.keyboard.press("ArrowRight")
    assert focused().startswith("Row 3, image 0: a red circle")
    shown.keyboard.press("Enter")
    shown.keyboard.press("Escape")
    focus_comes_back("Row 3, image 0: a red circle")


# ------------------------------------------------------------------------------------------------- safe


def test_texts_of_others_never_become_markup(page: Callable[..., Any], write_manifest: Write, write_job: Write, tmp_path: Path) -> None:
    """In prompts, ids, values, names of columns and messages of errors."""
    columns = {
        "id": [EVIL.format("id"), "b", "c" + EVIL.format("failed id")],
        "prompt": [EVIL.format("prompt"), "<!-- <script>", ""],
        "negative_prompt": [EVIL.format("negative"), None, None],
        EVIL.format("column"): [EVIL.format("value"), "__proto__", None],
        "sampler": ["euler", "ddim", EVIL.format("sampler")],
        "__proto__": ["x", "\u2028'\"`${window.broken=1}", "\u202e"],
    }
    renderfarm.run(write_job(write_manifest(columns)), engine="inline")
    shown = page(tmp_path / "out" / KEY)
    assert tiles(shown)[0] == f"Row 0, image 0: {EVIL.format('prompt')}"
    for tab in ("grid", "failures", "timeline", "facts", "images"):
        shown.click(f"#tab-{tab}")
    shown.click("#tab-failures")
    assert "c" + EVIL.format("failed id") in shown.locator("#panel-failures").inner_text()
    shown.click("#tab-images")
    shown.locator(".tile").first.click()
    assert EVIL.format("value") in shown.locator("#detail-text").inner_text()
    assert shown.locator("img, svg[onload], iframe, object").count() == 0
    assert shown.evaluate("[window.broken, ({}).polluted]") == [None, None]


def test_the_policy_lets_nothing_in_and_nothing_out(browser: Any, sweep: Path) -> None:
    asked = []

    class Handler(servers.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *_: object) -> None:
            pass

    with servers.answering(Handler) as url, browsers.opened(browser, sweep) as (page, seen):
        page.evaluate(
            """async (url) => {
              const script = document.createElement('script');
              script.textContent = 'window.broken = 1';
              document.body.append(script);
              for (const [tag, name] of [['img', 'src'], ['link', 'href'], ['iframe', 'src'], ['script', 'src']]) {
                const made = document.createElement(tag);
                if (tag === 'link') made.rel = 'stylesheet';
                made[name] = `${url}/${tag}`;
                document.body.append(made);
              }
              await fetch(`${url}/fetch`).catch(() => {});
            }""",
            url,
        )
        page.wait_for_timeout(300)
        assert page.evaluate("window.broken") is None
    assert asked == []
    assert sum("Content Security Policy" in text for text in seen.complaints) >= 6


# ------------------------------------------------------------------------------------------------- outputs of every kind


@pytest.mark.parametrize("layout", ["files", "parquet", "webdataset"])
def test_each_layout_with_failures_and_retries(
    layout: str, page: Callable[..., Any], write_manifest: Write, write_job: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows 0 and 3 fail at first, are asked for again, and then are images like the others."""
    job = write_job(write_manifest({"prompt": ["a", "", "b [nan]", "c"]}), output={"layout": layout, "part_rows": 2})
    with monkeypatch.context() as patch:
        fail_on(patch)({(0, 0), (3, 0)})
        renderfarm.run(job, engine="inline")
    retry(str(tmp_path / "out"), Choice(rows="0,3"))
    renderfarm.run(job, engine="inline")
    shown = page(tmp_path / "out" / KEY)
    assert tiles(shown) == ["Row 0, image 0: a", "Row 3, image 0: c"]
    assert shown.locator(".thumbnail").count() == 2
    assert shown.locator("#state").inner_text() == "partial"
    assert shown.locator("#tab-failures").inner_text() == "Failures (2)"
    shown.click("#tab-failures")
    assert shown.locator(".bar-name").all_inner_texts() == ["InvalidInput", "NonFiniteOutput"]
    shown.locator(".bar-line", has_text="NonFiniteOutput").click()
    assert shown.locator("#panel-failures tbody tr").all_inner_texts()[0].split("\t")[0] == "2:0"
    assert shown.locator("#panel-failures tbody tr").count() == 1
    shown.click("#tab-timeline")
    shown.locator("#by-part tbody tr").first.wait_for()
    assert set(shown.locator("#by-part tbody td:first-child").all_inner_texts()) == {"0.r1", "1.r1"}, "of the last run, by their start"
    assert shown.locator("#panel-timeline select option").count() == 2


def test_an_output_without_images_says_so(page: Callable[..., Any], write_manifest: Write, write_job: Write, tmp_path: Path) -> None:
    renderfarm.run(write_job(write_manifest({"prompt": ["", ""]})), engine="inline")
    shown = page(tmp_path / "out" / KEY)
    shown.locator("#panel-failures").wait_for(state="visible")
    for tab in ("images", "grid", "timeline", "facts"):
        shown.click(f"#tab-{tab}")
        shown.locator(f"#panel-{tab}").wait_for(state="visible")
    shown.click("#tab-images")
    assert "has ended as an error" in shown.locator("#nothing").inner_text()


def test_parts_and_entries_that_cannot_be_read_are_named(page: Callable[..., Any], sweep: Path) -> None:
    out = sweep.parent.parent.parent
    (out / "data/part-00000001/metadata.parquet").write_bytes(b"damaged")
    for entry in out.glob("_renderfarm/parts/part-00000002.*"):
        entry.write_text("damaged")
    write_report(renderfarm.open(out), Bounds(100))
    shown = page(sweep)
    assert "1 part could not be read, and its images are not in this report (1)." in shown.locator("#partial").inner_text()
    shown.click("#tab-timeline")
    assert "The index entries of 1 part are damaged (2)" in shown.locator("#panel-timeline .note").inner_text()


def test_an_output_that_nobody_has_rendered_yet(page: Callable[..., Any], write_manifest: Write, write_job: Write, tmp_path: Path) -> None:
    from test_cli import prepared_only

    out = prepared_only(write_job(write_manifest()), tmp_path / "out")
    write_report(renderfarm.open(out), Bounds(100))
    shown = page(out / KEY)
    assert shown.locator("#state").inner_text() in ("planned", "starting")  # the first heartbeat is written beside
    assert "No image was rendered yet" in shown.locator("#nothing").inner_text()
    shown.click("#tab-timeline")
    assert "No part is committed yet" in shown.locator("#panel-timeline").inner_text()


def test_the_timeline_shows_each_part_and_its_table_says_the_same(page: Callable[..., Any], sweep: Path) -> None:
    shown = page(sweep)
    shown.click("#tab-timeline")
    assert shown.locator("#chart g[data-part]").count() == 7
    assert shown.locator("#by-part tbody tr").count() == 7
    assert shown.locator("#by-worker td").all_inner_texts()[0] == "w0"
    assert re.fullmatch(r"\d+(\.\d)? %", shown.locator("#by-worker td").nth(4).inner_text())
    shown.locator("#chart rect.render").first.hover()
    shown.locator("#tip").wait_for(state="visible")
    assert "render" in shown.locator("#tip").inner_text()
    width = shown.locator("#chart svg").bounding_box()["width"]
    shown.get_by_label("Zoom in").click()
    assert shown.locator("#chart svg").bounding_box()["width"] > 1.5 * width


def test_light_and_dark_follow_the_reader(page: Callable[..., Any], sweep: Path) -> None:
    def brightness(scheme: str) -> int:
        shown = page(sweep, color_scheme=scheme)
        return sum(map(int, re.findall(r"\d+", shown.evaluate("getComputedStyle(document.body).backgroundColor"))[:3]))

    assert brightness("light") > 700
    assert brightness("dark") < 120


@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_is_wider_than_the_window(width: int, page: Callable[..., Any], sweep: Path) -> None:
    shown = page(sweep, viewport={"width": width, "height": 700})
    for tab in ("images", "grid", "failures", "timeline", "facts"):
        shown.click(f"#tab-{tab}")
        assert shown.evaluate("document.documentElement.scrollWidth") <= width, tab


def smooth(seed: int) -> np.ndarray:
    """256×256 pixels of a few large blobs of colour."""
    blobs = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(blobs).resize((256, 256), Image.Resampling.BICUBIC))


@pytest.mark.slow
def test_ten_thousand_images_open_and_answer_at_once(
    page: Callable[..., Any],
    write_manifest: Write,
    write_job: Write,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The figures are printed, not asserted: they say something of the machine, too. Pictures are smooth, as painted ones are: noise, which
    the fake model paints, would make a file of another size."""
    monkeypatch.setattr(Fake, "decode", lambda self, state: smooth(state.sample.seed))
    rows = 10_000
    columns = {
        "prompt": [f"a {PROMPTS[k % 3][2:]} number {k % 97} beside {'many ' * (k % 40)}others" for k in range(rows)],
        "sampler": [("euler", "ddim", "dpm++2m")[k % 3] for k in range(rows)],
        "guidance_scale": [1.0 + k % 7 for k in range(rows)],
    }
    job = write_job(
        write_manifest(columns),
        render={"num_inference_steps": 1, "height": 256, "width": 256},
        workers={"batch_size": 64},
        output={"part_rows": 1000, "layout": "parquet", "format": "jpeg"},
    )
    renderfarm.run(job, engine="inline")
    began = time.monotonic()
    written = write_report(renderfarm.open(tmp_path / "out"), Bounds(rows))
    figures: dict[str, Any] = {"written in s": time.monotonic() - began, "MB": written.bytes / 1e6}
    assert (written.images, written.thumbnails) == (rows, rows)
    began = time.monotonic()
    shown = page(tmp_path / "out" / KEY)
    figures["opened in s"] = time.monotonic() - began
    assert shown.locator(".tile").count() < 200
    figures["searched in ms"] = shown.evaluate(
        """() => { const began = performance.now(); choice.words = wordsOf('square "number 42 "'); choose(); paintGallery(true);
           return performance.now() - began; }"""
    )
    assert count(shown) == f"{sum(k % 3 == 1 and k % 97 == 42 for k in range(rows))} of 10,000 images"
    shown.get_by_text("Clear").click()
    figures["scrolled to the end in ms"] = shown.evaluate(
        """async () => { const began = performance.now(); scrollTo(0, document.body.scrollHeight);
           await new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done))); return performance.now() - began; }"""
    )
    assert tiles(shown)[-1].startswith("Row 9999, image 0")
    shown.click("#tab-grid")
    shown.select_option("#axis-y", "guidance_scale")
    assert shown.locator(".cell").count() == 21
    figures["heap MB"] = shown.evaluate("performance.memory.usedJSHeapSize / 1e6")
    with capsys.disabled():
        print(f"\nreport of {rows:,} images: {json.dumps({name: round(value, 2) for name, value in figures.items()})}")
