"""Images that rows name by URL, and how long their bytes and pictures are held."""

from __future__ import annotations

import contextlib
import hashlib
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
from oracle import row
from pictures_given import encoded, mask, picture
from PIL import Image
from servers import answering

from renderfarm.config import Inputs, Job, ModelSpec
from renderfarm.errors import Fatal, InvalidInput, Transient
from renderfarm.inputs import FETCHED_AT_A_TIME, Fetcher, is_public
from renderfarm.models.catalog import describe, for_task
from renderfarm.records import InputImage, Sample
from renderfarm.storage import open_store


class Site(BaseHTTPRequestHandler):
    image = encoded(picture(5))

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        status = {"/pub/gone": 404, "/pub/busy": 503, "/pub/nowhere": 302, "/pub/away": 302, "/pub/loop": 302, "/pub/inside": 302}.get(
            path, 200
        )
        self.send_response(status)
        if status == 302:
            self.send_header(
                "Location",
                {"/pub/away": "/secret/x", "/pub/loop": "/pub/loop", "/pub/inside": "/pub/ok.png", "/pub/nowhere": "http://["}[path],
            )
        self.end_headers()
        if path == "/pub/slow":
            for _ in range(200):
                with contextlib.suppress(ConnectionError):
                    self.wfile.write(b"x")
                time.sleep(0.05)
        elif status == 200:
            with contextlib.suppress(ConnectionError):  # who has read enough hangs up
                self.wfile.write(b"text" if path == "/pub/text" else self.image * (100_000 if path == "/pub/huge" else 1))

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def site() -> Iterator[str]:
    with answering(Site) as url:
        yield url


def fetch(tmp_path: Path, url: str, **inputs: Any) -> Any:
    allowed = Inputs.model_construct(**{**Inputs().model_dump(), "folder": str(tmp_path), "max_mebibytes": 1, **inputs})
    model = for_task(describe(ModelSpec(id="builtin:shapes")), ("image",))
    wanted = row(sampler="euler", strength=0.5, height=0, width=0, image=InputImage(url))
    (found,) = Fetcher(allowed, model, open_store(str(tmp_path / "o"))).fetch([wanted])
    return found


@pytest.mark.parametrize("sign", ["\t", "\n", "\r", "\x7f"])
def test_a_url_with_a_control_character_is_no_url(sign: str, site: str, tmp_path: Path) -> None:
    """Some of them are dropped by whoever parses it later, so that `\\t..` becomes a step up."""
    found = fetch(tmp_path, f"{site}/pub/{sign}../secret/x", urls=[f"{site}/pub/"], private_addresses=True)
    assert isinstance(found, InvalidInput)
    assert "is no URL" in str(found)


def test_a_row_s_copies_share_one_decoded_image(tmp_path: Path) -> None:
    fetcher, copies, other = copies_of_an_image(tmp_path)
    found: list[Any] = fetcher.fetch([*copies, other])
    first, second, third = found
    assert first.image.picture is second.image.picture
    assert (first.seed, second.seed) == (1, 2)
    assert third.image.picture.size == (64, 32)


def test_images_beyond_a_part_s_memory_stop_the_job_with_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetcher, copies, other = copies_of_an_image(tmp_path)
    monkeypatch.setattr("renderfarm.inputs.MAX_HELD_BYTES", 32 * 32 * 3 + len(Site.image))
    assert all(isinstance(found, Sample) for found in fetcher.fetch(copies))
    with pytest.raises(Fatal, match=r"lower output\.part_rows"):
        fetcher.fetch([*copies, other])


def test_files_are_let_go_as_soon_as_their_pictures_are_made_and_shared_ones_are_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part's photographs may be many times what is left of them at the rows' size."""
    fetcher, _, wanted = copies_of_an_image(tmp_path)
    (tmp_path / "mask.png").write_bytes(encoded(mask((64, 64))))
    sizes = []
    for number in range(40):
        noise = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        (tmp_path / f"{number}.png").write_bytes(encoded(Image.fromarray(noise)))
        sizes.append((tmp_path / f"{number}.png").stat().st_size)
    made, shared = 40 * 32 * 64 * 4, (tmp_path / "mask.png").stat().st_size
    limit = made + shared + FETCHED_AT_A_TIME * max(sizes)
    assert limit < sum(sizes)
    monkeypatch.setattr("renderfarm.inputs.MAX_HELD_BYTES", limit)
    read, asked = Fetcher._read, []
    monkeypatch.setattr(Fetcher, "_read", lambda self, source: asked.append(source) or read(self, source))
    samples = [replace(wanted, image=InputImage(f"{k}.png"), mask_image=InputImage("mask.png")) for k in range(40)]
    found: list[Any] = fetcher.fetch(samples)
    assert sorted(asked) == sorted(["mask.png", *(f"{k}.png" for k in range(40))])
    assert {one.image.data for one in found} == {one.mask_image.data for one in found} == {None}
    for number, one in enumerate(found):
        data = (tmp_path / f"{number}.png").read_bytes()
        assert one.image.sha256 == hashlib.sha256(data).hexdigest()
        assert (tmp_path / f"o/_renderfarm/inputs/{one.image.sha256}").read_bytes() == data


def copies_of_an_image(tmp_path: Path) -> tuple[Fetcher, list[Sample], Sample]:
    (tmp_path / "a.png").write_bytes(Site.image)
    model = for_task(describe(ModelSpec(id="builtin:shapes")), ("image",))
    inputs = Inputs.model_construct(**{**Inputs().model_dump(), "folder": str(tmp_path)})
    wanted = row(sampler="euler", strength=0.5, height=0, width=0, image=InputImage("a.png"))
    copies = [replace(wanted, seed=seed) for seed in (1, 2)]
    return (Fetcher(inputs, model, open_store(str(tmp_path / "o"))), copies, replace(wanted, height=32, width=64, resize="stretch"))


@pytest.mark.parametrize("page", ["/pub/ok.png", "/pub/inside", "/pub/ok.png?signature=abc"])
def test_a_url_that_the_job_allows_is_fetched(page: str, site: str, tmp_path: Path) -> None:
    found = fetch(tmp_path, site + page, urls=[f"{site}/pub/"], private_addresses=True)
    assert isinstance(found, Sample)
    assert found.image is not None
    assert (tmp_path / f"o/_renderfarm/inputs/{found.image.sha256}").read_bytes() == Site.image
    assert (found.height, found.width) == (32, 32)


@pytest.mark.parametrize(
    ("page", "reason"),
    [
        ("/secret/x", "is not a URL that the job allows"),
        ("/pub/../secret/x", "is not a URL that the job allows"),
        ("/pub/away", "/secret/x is not a URL that the job allows"),
        ("/pub/loop", "redirects more than 5 times"),
        ("/pub/gone", "answered 404 Not Found; correct the URL"),
        ("/pub/huge", "larger than 1 MiB"),
    ],
)
def test_a_url_that_leads_elsewhere_is_its_rows_error(page: str, reason: str, site: str, tmp_path: Path) -> None:
    found = fetch(tmp_path, site + page, urls=[f"{site}/pub/"], private_addresses=True)
    assert isinstance(found, InvalidInput)
    assert reason in str(found)


def test_a_private_address_is_refused_unless_the_job_says_so(site: str, tmp_path: Path) -> None:
    found = fetch(tmp_path, f"{site}/pub/ok.png", urls=[f"{site}/pub/"])
    assert "leads to a private address; give public URLs, or inputs.private_addresses: true" in str(found)


def test_a_server_that_is_busy_slow_or_away_is_tried_again_and_then_costs_its_row(
    site: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("renderfarm.inputs.PAUSE_S", 0.01)
    for url, reason in (
        (f"{site}/pub/busy", "answered 503"),
        ("http://127.0.0.1:9/pub/x", "refused"),
        (f"{site}/pub/slow", "inputs.timeout_s"),
    ):
        started = time.monotonic()
        found = fetch(tmp_path, url, urls=[url.rpartition("/")[0] + "/"], private_addresses=True, timeout_s=0.5)
        assert time.monotonic() - started < 60
        assert isinstance(found, Transient)
        assert found.retryable
        assert reason in str(found)


@pytest.mark.parametrize(
    "url",
    [
        "http://[", "http://[::1", "http://127.0.0.1:x/pub/a", "SITE/pub/%2e%2e/secret/x", "SITE/pub/%252e%252e/secret/x",
        "SITE/pub/..\\secret", "http://u:hunter2@HOST/pub/a", "SITE/pub/gone?signature=hunter2", "SITE/pub/text?signature=hunter2#hunter2",
        "SITE/pub/huge?signature=hunter2", "SITE/pub/nowhere",
    ],
)  # fmt: skip
def test_a_url_of_a_row_never_stops_the_job_and_its_secrets_are_in_no_message(url: str, site: str, tmp_path: Path) -> None:
    url = url.replace("SITE", site).replace("HOST", site.removeprefix("http://"))
    found = fetch(tmp_path, url, urls=[f"{site}/pub/", "http://[", "http://u:hunter2@"], private_addresses=True)
    assert isinstance(found, InvalidInput)
    assert "hunter2" not in str(found)
    assert not list((tmp_path / "o").rglob("inputs/*")), "what is no picture is not kept"


def test_odd_letters_in_a_path_are_sent_as_the_web_writes_them(site: str, tmp_path: Path) -> None:
    found = fetch(tmp_path, f"{site}/pub/an é and a space.png", urls=[f"{site}/pub/"], private_addresses=True)
    assert isinstance(found, Sample)


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True), ("10.0.0.1", False), ("127.0.0.1", False), ("169.254.169.254", False), ("224.0.0.1", False), ("::1", False),
        ("::ffff:10.0.0.1", False), ("64:ff9b::a9fe:a9fe", False), ("2002:7f00:1::", False), ("fec0::1", False), ("fe80::1%eth0", False),
        ("2001:4860:4860::8888", True), ("64:ff9b::808:808", True), ("64:ff9b:1::7f00:1", False), ("64:ff9b:1:a::808:808", False),
        ("::127.0.0.1", False), ("::8.8.8.8", False), ("::ffff:0:127.0.0.1", False), ("::ffff:0:8.8.8.8", False), ("::", False),
        ("::ffff:8.8.8.8", True), ("5f00::1", False), ("3fff::1", False),
    ],
)  # fmt: skip
def test_which_addresses_are_public(address: str, public: bool) -> None:
    assert is_public(address) is public


def test_a_name_that_nobody_resolves_in_time_is_given_up_and_may_be_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, answer = [], Event()

    def waits(*args: Any, **kwargs: Any) -> Any:
        asked.append(args)
        answer.wait(90)
        raise socket.gaierror

    monkeypatch.setattr("renderfarm.inputs.PAUSE_S", 0.01)
    monkeypatch.setattr("renderfarm.inputs.socket.getaddrinfo", waits)
    started = time.monotonic()
    found = fetch(tmp_path, "http://slow.example.org/a.png", urls=["http://slow.example.org/"], timeout_s=0.2)
    answer.set()
    assert time.monotonic() - started < 60
    assert isinstance(found, Transient)
    assert "http://slow.example.org/a.png: the name was not resolved in time (inputs.timeout_s)" in str(found)
    assert len(asked) == 3


def test_a_name_that_nobody_knows_may_be_tried_again_and_one_that_is_none_is_the_rows_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*args: Any, **kwargs: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr("renderfarm.inputs.PAUSE_S", 0.01)
    with monkeypatch.context() as patch:
        patch.setattr("renderfarm.inputs.socket.getaddrinfo", unknown)
        found = fetch(tmp_path, "http://nobody.invalid/a.png", urls=["http://nobody.invalid/"])
    assert isinstance(found, Transient)
    assert "http://nobody.invalid/a.png: Name or service not known" in str(found)
    found = fetch(tmp_path, f"http://{'x' * 70}.invalid/a.png", urls=[f"http://{'x' * 70}.invalid/"])
    assert "is no URL; correct it" in str(found)


@pytest.mark.parametrize("url", ["https://u:p@example.org/", "ftp://example.org/", "https://example.org", "example.org/"])
def test_a_beginning_that_allows_too_much_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="write it as https://HOST/"):
        Job.model_validate({"name": "t", "manifest": "m", "model": "m", "output": {"path": "o"}, "inputs": {"urls": [url]}})
