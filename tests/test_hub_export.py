"""`export --to hub`, against a hub on loopback that takes what its client sends, or refuses it. The real hub was never asked."""

from __future__ import annotations

import base64
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from checker import image_rows
from servers import answering
from test_cli import cli, refused
from test_export import rows

import renderfarm

Write = Callable[..., Path]
NAME, TOKEN = "org/name", "hf_test"


@dataclass
class Writable:
    """As much of the hub as takes small files in one commit. `status`: what it answers to whoever would write."""

    status: int = 200
    url: str = ""
    created: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    commits: int = 0
    tokens: set[str | None] = field(default_factory=set)

    def answer(self, path: str, body: bytes) -> Any:
        if path == "/api/repos/create":
            self.created.append(json.loads(body))
            return {"url": f"{self.url}/datasets/{NAME}"}
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if path.startswith(f"/api/datasets/{NAME}/preupload/"):
            return {"files": [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in json.loads(body)["files"]]}
        if path.startswith(f"/api/datasets/{NAME}/commit/"):
            self.commits += 1
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "deletedFile":
                    del self.files[line["value"]["path"]]
            return {"commitUrl": f"{self.url}/datasets/{NAME}/commit/{'0' * 40}", "commitOid": "0" * 40, "success": True}
        if path.startswith(f"/api/datasets/{NAME}/tree/"):
            return [{"type": "file", "path": path, "size": len(data), "oid": "0" * 40} for path, data in self.files.items()]
        if path.startswith(f"/api/datasets/{NAME}"):
            return {"id": NAME, "sha": "0" * 40, "siblings": [{"rfilename": path} for path in self.files]}
        return None


@contextmanager
def serving(**what: Any) -> Iterator[Writable]:
    hub = Writable(**what)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer()

        def do_POST(self) -> None:
            self._answer()

        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"] or 0))
            hub.tokens.add(self.headers["Authorization"])
            answer = hub.answer(self.path.partition("?")[0], body) if hub.status == 200 else {"error": "no"}
            data = json.dumps({"error": "nothing here"} if answer is None else answer).encode()
            self.send_response(404 if answer is None else hub.status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    with answering(Handler) as hub.url:
        yield hub


@pytest.fixture
def out(write_manifest: Write, write_job: Write, tmp_path: Path) -> Path:
    renderfarm.run(write_job(write_manifest()), engine="inline")
    return tmp_path / "out"


def environment(hub: Writable, token: str = TOKEN, offline: str = "0") -> dict[str, str]:
    return {"HF_ENDPOINT": hub.url, "HF_TOKEN": token, "HF_HUB_OFFLINE": offline}


def to_hub(out: Path, staging: Path, *options: object) -> list[object]:
    return ["export", out, "--to", "hub", NAME, "--staging", staging, *options]


def staged(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and "_renderfarm" not in path.parts)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize("xet", ["0", "1"])
def test_a_repository_holds_the_export_and_nothing_else(xet: str, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By either of its client's ways: with its library for large files it sends in batches, which another run would continue."""
    monkeypatch.setenv("HF_HUB_DISABLE_XET", xet)
    staging = tmp_path / "staging"
    with serving() as hub:
        first = cli(*to_hub(out, staging, "--max-file-size", "3kB"), **environment(hub))
        assert first.returncode == 0, first.stdout + first.stderr
        assert "hf://datasets/org/name" in first.stdout
        before = dict(hub.files)
        assert before == staged(staging)
        assert len([name for name in before if name.startswith("data/train-")]) > 1
        hub.files["theirs.txt"] = b"mine"
        again = cli(*to_hub(out, staging, "--restart"), **environment(hub))
        assert again.returncode == 0, again.stdout + again.stderr
    assert hub.files == staged(staging) | {"theirs.txt": b"mine"}  # files of the export before are gone
    assert [name for name in hub.files if name.startswith("data/")] == ["data/train-00000-of-00001.parquet"]
    assert hub.created == [{"name": "name", "organization": "org", "visibility": "private", "type": "dataset"}] * 2
    assert hub.tokens == {"Bearer hf_test", None}  # the card is checked by whoever asks
    assert {row["pixel_sha256"] for row in rows(staging)} == {row["pixel_sha256"] for row in image_rows(out)}
    card = hub.files["README.md"].decode()
    assert 'load_dataset("org/name", split="train")' in card
    assert 'store, _ = fsspec.url_to_fs("hf://datasets/org/name")' in card
    assert 'store.glob("hf://datasets/org/name/data/*.parquet")' in card
    assert "hf_test" not in str(staged(staging))


def test_a_public_one_is_made_only_when_asked(out: Path, tmp_path: Path) -> None:
    with serving() as hub:
        assert cli(*to_hub(out, tmp_path / "staging", "--public", "--json"), **environment(hub)).returncode == 0
    assert [one.get("visibility") for one in hub.created] == ["public"]


@pytest.mark.parametrize(
    ("status", "token", "offline", "code", "says"),
    [
        (403, "hf_test", "0", 4, "the hub does not let this HF_TOKEN write org/name"),
        (401, "hf_test", "0", 4, "the hub does not let this HF_TOKEN write org/name"),
        (400, "hf_test", "0", 1, "not uploaded: "),
        (200, "", "0", 4, "the environment has no HF_TOKEN"),
        (200, "hf_test", "1", 4, "HF_HUB_OFFLINE forbids it"),
    ],
)
def test_where_the_hub_cannot_be_written_the_files_stay(
    status: int, token: str, offline: str, code: int, says: str, out: Path, tmp_path: Path
) -> None:
    staging = tmp_path / "it's staged"
    with serving(status=status) as hub:
        message = refused(*to_hub(out, staging), code=code, **environment(hub, token, offline))
        assert says in message
        assert "run the same command again, or upload them by hand" in message
        assert "hf_test" not in message
        assert sorted(staged(staging)) == ["README.md", "contact_sheet.png", "data/train-00000-of-00001.parquet"]
        assert not hub.files
        hub.status = 200
        assert cli(*to_hub(out, staging), **environment(hub)).returncode == 0
        assert hub.files == staged(staging)


def test_the_command_by_hand_does_the_same(out: Path, tmp_path: Path) -> None:
    staging = tmp_path / "it's staged"
    with serving() as hub:
        ended = cli(*to_hub(out, staging), **environment(hub, token=""))
        command = re.search(r"^  (hf upload .*)$", ended.stderr, re.MULTILINE)
        assert command is not None, ended.stderr
        hub.files["data/train-00000-of-00009.parquet"] = b"of an export before"
        program = Path(sys.executable).parent / "hf"
        words = shlex.split(command[1])[1:]
        done = subprocess.run([program, *words], capture_output=True, text=True, env={**os.environ, **environment(hub)}, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert hub.files == staged(staging)


def test_what_the_hub_does_not_take_is_refused_before_anything_is_written(out: Path, tmp_path: Path) -> None:
    staging = tmp_path / "staging"
    assert "give it as org/name" in refused("export", out, "--to", "hub", "s3://bucket/x", "--staging", staging)
    assert "files below 20 GB" in refused(*to_hub(out, staging, "--max-file-size", "20GB"))
    assert not staging.exists()
