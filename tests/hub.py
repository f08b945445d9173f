"""A hub on loopback: as much of its API as its client uses, from a folder, with faults to order."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from servers import answering

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = 10_000  # bytes; larger files are LFS files, known by their SHA-256


@dataclass
class Hub:
    """Serves `folder` as org/name at COMMIT. `cut`: answers with a file of that name that end in its middle, so many.
    `status`: what everything answers instead. `bad`: files served with a byte flipped."""

    folder: Path
    url: str = ""
    cut: dict[str, int] = field(default_factory=dict)
    bad: set[str] = field(default_factory=set)
    status: int = 200
    code: str = ""
    ranges: bool = True
    delay_s: float = 0.0
    token: str | None = None
    requests: list[tuple[str, str]] = field(default_factory=list)

    def fetched(self) -> list[str]:
        """Files that were asked for with GET, in order; once for each time."""
        return [path.partition(f"/resolve/{COMMIT}/")[2] for method, path in self.requests if method == "GET" and "/resolve/" in path]

    def tree(self) -> list[dict[str, Any]]:
        found = []
        for path in sorted(path for path in self.folder.rglob("*") if path.is_file()):
            data = path.read_bytes()
            entry: dict[str, Any] = {"type": "file", "path": path.relative_to(self.folder).as_posix(), "size": len(data), "oid": _git(data)}
            if len(data) > LARGE:
                entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
            found.append(entry)
        return found


def _git(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


@contextmanager
def served(folder: Path, **faults: Any) -> Iterator[Hub]:
    hub = Hub(folder, **faults)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def _answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append((self.command, path))
            if hub.status != 200 or (hub.token and self.headers["Authorization"] != f"Bearer {hub.token}"):
                self._send(hub.status if hub.status != 200 else 401, b'{"error": "no"}', {"X-Error-Code": hub.code or "GatedRepo"})
            elif path == f"/api/models/org/name/tree/{COMMIT}":
                self._send(200, json.dumps(hub.tree()).encode(), {"Content-Type": "application/json"})
            elif path.startswith("/api/models/org/name/tree/"):
                self._send(404, b'{"error": "no"}', {"X-Error-Code": "RevisionNotFound"})
            elif path.startswith(f"/org/name/resolve/{COMMIT}/"):
                self._file(path.partition(f"/{COMMIT}/")[2])
            else:
                self._send(404, b'{"error": "no"}', {"X-Error-Code": "RepoNotFound"})

        def _file(self, name: str) -> None:
            data = (hub.folder / name).read_bytes()
            etag = hashlib.sha256(data).hexdigest() if len(data) > LARGE else _git(data)
            if name in hub.bad:
                data = data[:-1] + bytes([data[-1] ^ 1])
            headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "X-Linked-Size": str(len(data)), "Accept-Ranges": "bytes"}
            time.sleep(hub.delay_s)
            start = int((self.headers["Range"] or "bytes=0-").removeprefix("bytes=").partition("-")[0]) if hub.ranges else 0
            self._send(206 if start else 200, data[start:], headers, cut=self.command == "GET" and hub.cut.get(name, 0) > 0, name=name)

        def _send(self, status: int, data: bytes, headers: dict[str, str], *, cut: bool = False, name: str = "") -> None:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(key, value)
            self.end_headers()
            if cut:
                hub.cut[name] -= 1
                with contextlib.suppress(ConnectionError):
                    self.wfile.write(data[: len(data) // 2])
                self.close_connection = True
            elif self.command == "GET":
                with contextlib.suppress(ConnectionError):  # a client may give up
                    self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    with answering(Handler) as hub.url:
        yield hub
