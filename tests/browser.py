"""A headless Chromium that says what a page asks for and complains of. `make test` and `.ci/run` install what it needs."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")


def missing() -> str | None:
    if importlib.util.find_spec("playwright") is None:
        return "playwright is not installed: pip install playwright"
    if not any(map(shutil.which, NAMES)):
        return "no Chromium is installed here: apt-get install chromium"
    return None


@dataclass
class Seen:
    """What must stay empty: errors and warnings on the console, exceptions, requests to anybody."""

    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    path = next(filter(None, map(shutil.which, NAMES)))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])  # tests may run as root, in a container
        yield browser
        browser.close()


@contextlib.contextmanager
def opened(browser: Any, file: Path, **options: Any) -> Iterator[tuple[Any, Seen]]:
    """A page with the report, ready to be used."""
    seen = Seen()
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}} | options)
    page = context.new_page()
    page.on("console", lambda message: seen.complaints.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: seen.complaints.append(str(error)))
    page.on("request", lambda request: seen.requests.append(request.url))
    page.goto(file.as_uri())
    page.wait_for_selector("html[data-ready]", timeout=120_000)
    yield page, seen
    context.close()
