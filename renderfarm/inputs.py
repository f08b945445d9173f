"""The images that rows give: fetched and checked.

A row's image is somebody's file, so nothing of it is trusted: paths stay inside one folder, URLs begin as the job says
and lead to no private address (redirects included), bytes, pixels, seconds and formats are limited.
"""

from __future__ import annotations

import http.client
import ipaddress
import os
import socket
import ssl
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urljoin, urlsplit

from renderfarm import commit
from renderfarm.config import Inputs, Job, is_url
from renderfarm.errors import InvalidInput, RenderfarmError, Transient
from renderfarm.models.catalog import ModelInfo
from renderfarm.pictures import decode
from renderfarm.records import InputImage, Sample
from renderfarm.samples import check_side
from renderfarm.storage import Store

FETCHED_AT_A_TIME = 8
REDIRECTS = 5


class Fetcher:
    """Samples' images, fetched side by side and checked; files are kept in the output."""

    def __init__(self, job: Job, model: ModelInfo, store: Store) -> None:
        self.inputs, self.model, self.store = job.inputs, model, store
        self.folder = Path(job.inputs.folder or _folder_of(job.manifest.path)).resolve()

    def fetch(self, samples: Sequence[Sample]) -> list[Sample | RenderfarmError]:
        """Each sample with its images' bytes and its size, or why it cannot be rendered. Raises Transient."""
        wanted = {image for sample in samples for image in (sample.image, sample.mask_image) if image is not None}
        with ThreadPoolExecutor(FETCHED_AT_A_TIME, thread_name_prefix="fetch") as pool:
            found = dict(zip(wanted, pool.map(self._try_bytes, wanted), strict=True))
        return [self._with_images(sample, found) for sample in samples]

    def _try_bytes(self, image: InputImage) -> InputImage | InvalidInput:
        try:
            data = image.data if image.data is not None else self._read(str(image.source))
            if len(data) > self.inputs.max_mebibytes * 2**20:
                raise InvalidInput(self._too_large(image.source or "the embedded image"))
        except InvalidInput as error:
            return error
        fetched = replace(image, data=data)
        commit.keep(self.store, data)
        return fetched

    def _too_large(self, source: str) -> str:
        return f"{source} is larger than {self.inputs.max_mebibytes:g} MiB; make it smaller, or raise inputs.max_mebibytes"

    def _with_images(self, sample: Sample, found: dict[InputImage, InputImage | InvalidInput]) -> Sample | RenderfarmError:
        try:
            given = {name: image for name in ("image", "mask_image") if (image := getattr(sample, name)) is not None}
            ready: dict[str, Any] = {}
            for name, image in given.items():
                if isinstance(fetched := found[image], InvalidInput):
                    return InvalidInput(f"{name} {fetched}")
                ready[name] = fetched
            return self._with_size(replace(sample, **ready), {name: decode(image, name).size for name, image in ready.items()})
        except InvalidInput as error:
            return error

    def _with_size(self, sample: Sample, sizes: dict[str, tuple[int, int]]) -> Sample:
        if not sizes:
            return sample
        width, height = sizes["image"]
        if sizes.get("mask_image", (width, height)) != (width, height):
            raise InvalidInput(
                f"mask_image has {_shown(sizes['mask_image'])} pixels and image {_shown((width, height))}; make them one size"
            )
        wanted = sample.width or width, sample.height or height
        if sample.resize is None and wanted != (width, height):
            raise InvalidInput(
                f"image has {_shown((width, height))} pixels and the row asks for {_shown(wanted)}; leave height and width out, "
                "resize it, or say in the job how: inputs.resize: crop or stretch"
            )
        check_side(wanted[1], "height (the image's)" if not sample.height else "height", self.model)
        check_side(wanted[0], "width (the image's)" if not sample.width else "width", self.model)
        return replace(sample, width=wanted[0], height=wanted[1])

    def _read(self, source: str) -> bytes:
        if is_url(source):
            return _download(source, self.inputs, self._too_large(source))
        try:
            path = (self.folder / source).resolve()
            if not path.is_relative_to(self.folder):
                raise InvalidInput(f"{source!r} leads out of {self.folder.name}/; put the file inside, or give inputs.folder")
            with open(path, "rb") as file:
                return file.read(int(self.inputs.max_mebibytes * 2**20) + 1)
        except (FileNotFoundError, NotADirectoryError):
            raise InvalidInput(f"{source!r} does not exist; paths start at {self.folder.name}/ (inputs.folder)") from None
        except (OSError, ValueError) as error:
            raise InvalidInput(f"{source!r} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _shown(size: tuple[int, int]) -> str:
    return f"{size[0]}×{size[1]}"


def _folder_of(manifest: str | list[str]) -> str:
    first = manifest if isinstance(manifest, str) else manifest[0]
    return first if os.path.isdir(first) else os.path.dirname(first)


def _download(url: str, inputs: Inputs, too_large: str) -> bytes:
    """One GET, redirects followed by hand so that each is checked. Raises InvalidInput, or Transient for what may pass."""
    deadline, asked = time.monotonic() + inputs.timeout_s, url
    for _ in range(REDIRECTS + 1):
        parts = urlsplit(url)
        if not any(url.startswith(beginning) for beginning in inputs.urls) or ".." in parts.path:
            raise InvalidInput(f"{_bare(url)} is not a URL that the job allows; add its beginning to inputs.urls")
        try:
            connection = _connect(parts, inputs, deadline)
            try:
                connection.request("GET", f"{parts.path or '/'}?{parts.query}" if parts.query else parts.path or "/")
                answer = connection.getresponse()
                if answer.status in (301, 302, 303, 307, 308) and answer.headers["Location"]:
                    url = urljoin(url, answer.headers["Location"])
                    continue
                if answer.status >= 500 or answer.status in (408, 429):
                    raise Transient(f"{_bare(url)} answered {answer.status} {answer.reason}")
                if answer.status != 200:
                    raise InvalidInput(f"{_bare(asked)} answered {answer.status} {answer.reason}; correct the URL")
                return _body(answer, inputs, deadline, _bare(url), too_large)
            finally:
                connection.close()
        except (OSError, http.client.HTTPException) as error:
            raise Transient(f"{_bare(url)}: {error or type(error).__name__}") from None
    raise InvalidInput(f"{_bare(asked)} redirects more than {REDIRECTS} times; correct the URL")


def _body(answer: http.client.HTTPResponse, inputs: Inputs, deadline: float, shown: str, too_large: str) -> bytes:
    data = b""
    while piece := answer.read(1 << 16):
        data += piece
        if len(data) > inputs.max_mebibytes * 2**20:
            raise InvalidInput(too_large)
        if time.monotonic() > deadline:
            raise Transient(f"{shown} took longer than inputs.timeout_s")
    return data


def _bare(url: str) -> str:
    """Without its query, which may hold a signature."""
    return url.partition("?")[0]


def _connect(parts: SplitResult, inputs: Inputs, deadline: float) -> http.client.HTTPConnection:
    """To an address that was checked, so that a name cannot lead elsewhere a moment later."""
    host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    try:
        addresses = [str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    except socket.gaierror as error:
        raise Transient(f"{host}: {error.strerror}") from None
    for address in addresses:
        if not inputs.private_addresses and not ipaddress.ip_address(address).is_global:
            raise InvalidInput(f"{_bare(parts.geturl())} leads to a private address; give public URLs, or inputs.private_addresses: true")
    left = max(0.1, deadline - time.monotonic())
    connection = http.client.HTTPConnection(host, port, timeout=left)
    connection.sock = socket.create_connection((addresses[0], port), timeout=left)
    if parts.scheme == "https":
        connection.sock = ssl.create_default_context().wrap_socket(connection.sock, server_hostname=host)
    return connection
