"""Servers that the tests start on loopback, on ports of their own: S3 (moto), Azure Blob (azurite), and a proxy that breaks things."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import aiohttp
from aiohttp import web

AZURITE = Path(sys.prefix) / "azurite" / "node_modules" / ".bin" / "azurite-blob"  # where `make` puts it
# the account and key that azurite's documentation publishes for every installation
AZURE_ACCOUNT = "devstoreaccount1"
AZURE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="  # gitleaks:allow


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def _serving(command: list[str], port: int, log: Path) -> Iterator[None]:
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + 60
            while True:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                    break
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
            yield
        finally:
            process.terminate()
            process.wait(60)


@contextlib.contextmanager
def moto(folder: Path) -> Iterator[str]:
    """The endpoint of an S3 server in a process of its own."""
    port = free_port()
    with _serving(
        [sys.executable, str(Path(__file__).with_name("moto_server.py")), "-H", "127.0.0.1", "-p", str(port)], port, folder / "moto.log"
    ):
        yield f"http://127.0.0.1:{port}"


def azurite_missing() -> str | None:
    if shutil.which("node") is None:
        return "azurite needs node, which is not installed here"
    return None if AZURITE.exists() else f"azurite is not installed: npm install --prefix {AZURITE.parents[2]} azurite"


@contextlib.contextmanager
def azurite(folder: Path) -> Iterator[str]:
    """The connection string of an Azure Blob server in a process of its own."""
    port = free_port()
    command = [str(AZURITE), "--blobHost", "127.0.0.1", "--blobPort", str(port), "-l", str(folder / "azurite"), "--skipApiVersionCheck"]
    with _serving([*command, "--silent", "--disableTelemetry"], port, folder / "azurite.log"):
        yield (
            f"DefaultEndpointsProtocol=http;AccountName={AZURE_ACCOUNT};AccountKey={AZURE_KEY};"
            f"BlobEndpoint=http://127.0.0.1:{port}/{AZURE_ACCOUNT};"
        )


@contextlib.contextmanager
def answering(handler: Callable[..., BaseHTTPRequestHandler]) -> Iterator[str]:
    """The URL of a web server in this process, each of whose requests `handler` answers in a thread."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


Fault = Callable[[web.Request, Callable[[], Awaitable[web.Response]]], Awaitable[web.Response]]


class FaultProxy:
    """Forwards each request to `upstream`, or does to it what `fault` says: answers itself, waits, or loses the server's reply.

    `fault` is called with the request and what forwards it; set it to None to let everything through. `seen` holds "METHOD path" of
    each request.
    """

    def __init__(self, upstream: str) -> None:
        self.upstream, self.port = upstream, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.fault: Fault | None = None
        self.seen: list[str] = []
        self._loop = asyncio.new_event_loop()
        self._started, self._stop = threading.Event(), asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),), daemon=True)

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        assert self._started.wait(60)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(60)

    async def _serve(self) -> None:
        server = web.Application(client_max_size=1 << 30)
        server.router.add_route("*", "/{path:.*}", self._answer)
        runner = web.AppRunner(server, access_log=None)
        async with aiohttp.ClientSession(auto_decompress=False) as self._session:
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", self.port, shutdown_timeout=1).start()
            self._started.set()
            await self._stop.wait()
            await runner.cleanup()
            left = asyncio.all_tasks() - {asyncio.current_task()}  # faults that were still waiting
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.seen.append(f"{request.method} {request.path_qs}")
        body = await request.read()

        async def forward() -> web.Response:
            headers = {name: value for name, value in request.headers.items() if name not in ("Transfer-Encoding", "Expect")}
            async with self._session.request(
                request.method, f"{self.upstream}{request.raw_path}", headers=headers, data=body or None, allow_redirects=False
            ) as reply:
                data = await reply.read()
                kept = {name: value for name, value in reply.headers.items() if name not in ("Content-Length", "Transfer-Encoding")}
                if request.method == "HEAD":
                    kept["Content-Length"] = reply.headers.get("Content-Length", "0")
                return web.Response(status=reply.status, headers=kept, body=None if request.method == "HEAD" else data)

        return await (self.fault(request, forward) if self.fault is not None else forward())


def s3_error(status: int, code: str, message: str = "said by the test") -> web.Response:
    text = f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>{message}</Message></Error>'
    return web.Response(status=status, text=text, content_type="application/xml")


def lose_reply(request: web.Request) -> web.Response:
    """Close the connection in place of an answer."""
    assert request.transport is not None
    request.transport.abort()
    return web.Response()
