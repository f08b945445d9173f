"""The images that rows give: fetched, checked, decoded.

A row's image is somebody's file, so nothing of it is trusted: paths stay inside one folder or one place in a store, URLs begin
as the job says and those of the web lead to no private address (redirects included), bytes, pixels, seconds and formats are
limited. Files are kept in the output once they turned out to be pictures that a row can use.

What a store says: a key that is not there is the row's end; one that is away for longer than `storage` is patient ends the
lease, which is tried again, and no row; a store that refuses us ends the job.
"""

from __future__ import annotations

import http.client
import io
import ipaddress
import os
import queue
import re
import socket
import ssl
import stat
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit

from renderfarm import commit
from renderfarm.config import Inputs, is_url
from renderfarm.errors import Fatal, InvalidInput, RenderfarmError, Transient
from renderfarm.models.catalog import ModelInfo
from renderfarm.pictures import decode, shown, sized
from renderfarm.records import IMAGE_ARGUMENTS, InputImage, Sample
from renderfarm.samples import check_side
from renderfarm.storage import Store, is_store, open_store

FETCHED_AT_A_TIME = 8
LOOKED_AT_AT_A_TIME = 4  # each may be as large as a picture can be
REDIRECTS = 5
ATTEMPTS, PAUSE_S = 3, 1.0
LONGEST_KEY = 1000  # characters: S3 takes 1024 bytes
MAX_HELD_BYTES = 4 << 30  # of a part; a worker holds two or three
_DECODING = threading.BoundedSemaphore(4)  # of all parts: a picture of the largest size needs half a GB while it is decoded
NAT64 = ipaddress.ip_network("64:ff9b::/96")
# IPv4-compatible, IPv4-translated, a network's own NAT64, segment routing's, documentation's: no server of the web has one of
# them, a private one may be behind some, and not every Python's `is_global` knows them
NOT_OF_THE_WEB = tuple(map(ipaddress.ip_network, ("::/96", "::ffff:0:0:0/96", "64:ff9b:1::/48", "5f00::/16", "3fff::/20")))


Seen = tuple[int, int] | RenderfarmError | None  # an image's width and height; None: it lies elsewhere


class Fetcher:
    """Samples' images, fetched side by side and checked; files are kept in the output."""

    def __init__(self, inputs: Inputs, model: ModelInfo, store: Store) -> None:
        """`inputs.folder` is an absolute path or a store's URL; without one, rows that give paths are errors."""
        self.inputs, self.model, self.store = inputs, model, store
        self.folder = Path(inputs.folder).resolve() if inputs.folder is not None and not is_store(inputs.folder) else None

    def fetch(self, samples: Sequence[Sample]) -> list[Sample | RenderfarmError]:
        """Each sample with its images and its size, or why it cannot be rendered. Raises Fatal where they are too much at once."""
        firsts = {_asked(sample): sample for sample in samples}  # a row's copies share its pictures
        files = _Files(firsts.values(), self._try_bytes)
        with ThreadPoolExecutor(FETCHED_AT_A_TIME, thread_name_prefix="fetch") as pool:
            try:
                found = list(pool.map(lambda sample: self._with_images(sample, files), firsts.values()))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        ready = dict(zip(firsts, found, strict=True))
        return [_like(ready[_asked(sample)], sample) for sample in samples]

    def problems(self, samples: Sequence[Sample]) -> list[RenderfarmError | None]:
        """What `fetch` would say of each sample, as far as it can be known here: a URL of the web is judged, and what it leads to
        is not asked for. Keeps no file and no picture. Raises what a store that cannot be read raises."""
        given = {(name, image) for sample in samples for name in IMAGE_ARGUMENTS if (image := getattr(sample, name)) is not None}
        with ThreadPoolExecutor(LOOKED_AT_AT_A_TIME, thread_name_prefix="look") as pool:
            seen = dict(zip(given, pool.map(lambda one: self._try_size(*one), given), strict=True))
        return [self._problem(sample, seen) for sample in samples]

    def _try_size(self, name: str, image: InputImage) -> Seen:
        try:
            if image.data is None and is_url(str(image.source)) and not is_store(str(image.source)):
                _check_url(name, str(image.source), self.inputs)
                return None
            return decode(_or_raise(name, self._try_bytes(image)), name).size
        except (Transient, Fatal):
            raise
        except RenderfarmError as error:
            return error

    def _problem(self, sample: Sample, seen: dict[tuple[str, InputImage], Seen]) -> RenderfarmError | None:
        found = {name: seen[name, image] for name in IMAGE_ARGUMENTS if (image := getattr(sample, name)) is not None}
        for size in found.values():
            if isinstance(size, RenderfarmError):
                return size
        sizes = {name: size for name, size in found.items() if isinstance(size, tuple)}
        try:
            if sizes:
                self._with_size(sample, sizes)
        except InvalidInput as error:
            return error
        return None

    def _try_bytes(self, image: InputImage) -> InputImage | RenderfarmError:
        """What may pass is tried again; what does not is the row's end, and a later run may retry the row."""
        for attempt in range(ATTEMPTS):
            try:
                data = image.data if image.data is not None else self._read(str(image.source))
                if len(data) > self.inputs.max_mebibytes * 2**20:
                    raise InvalidInput(self._too_large(image.source or "the embedded image"))
                return replace(image, data=data)
            except InvalidInput as error:
                return error
            except Transient as error:
                if image.source is None or not is_url(image.source) or is_store(image.source):
                    raise  # a store's, which was waited for
                last = error
                if attempt + 1 < ATTEMPTS:
                    time.sleep(PAUSE_S * 2**attempt)
        return last

    def _too_large(self, source: str) -> str:
        return f"{shown(source)} is larger than {self.inputs.max_mebibytes:g} MiB; make it smaller, or raise inputs.max_mebibytes"

    def _with_images(self, sample: Sample, files: _Files) -> Sample | RenderfarmError:
        given = {name: image for name in IMAGE_ARGUMENTS if (image := getattr(sample, name)) is not None}
        ready: dict[str, Any] = {}
        with files.lent(given.values()) as lent:
            try:
                for name, image in given.items():
                    fetched = _or_raise(name, lent[image])
                    with _DECODING:
                        ready[name] = replace(fetched, picture=decode(fetched, name))
                if not ready:
                    return sample
                sample = self._with_size(sample, {name: image.picture.size for name, image in ready.items()})
            except RenderfarmError as error:
                return error
            for name, image in ready.items():
                picture = sized(image.picture, sample)
                files.hold(picture.width * picture.height * len(picture.getbands()))
                ready[name] = InputImage(image.source, None, picture, commit.keep(self.store, image.data))
        return replace(sample, **ready)

    def _with_size(self, sample: Sample, sizes: dict[str, tuple[int, int]]) -> Sample:
        (first, (width, height)), *others = sizes.items()
        for name, size in others:
            if size != (width, height):
                raise InvalidInput(f"{name} has {_pixels(size)} pixels and {first} {_pixels((width, height))}; make them one size")
        wanted = sample.width or width, sample.height or height
        if sample.resize is None and wanted != (width, height):
            raise InvalidInput(
                f"{first} has {_pixels((width, height))} pixels and the row asks for {_pixels(wanted)}; leave height and width out, "
                "resize it, or say in the job how: inputs.resize: crop or stretch"
            )
        check_side(wanted[1], "height (the image's)" if not sample.height else "height", self.model)
        check_side(wanted[0], "width (the image's)" if not sample.width else "width", self.model)
        return replace(sample, width=wanted[0], height=wanted[1])

    def _read(self, source: str) -> bytes:
        if is_store(source):
            _allowed(source, self.inputs)
            key = source.split("/", 3)[3]
            return self._read_stored(source.removesuffix(f"/{key}"), key, source)
        if is_url(source):
            return _download(source, self.inputs, self._too_large(source))
        if self.inputs.folder is not None and is_store(self.inputs.folder):
            return self._read_stored(self.inputs.folder, source, f"{self.inputs.folder}/{source}")
        if self.folder is None:
            raise InvalidInput(f"{source!r} is a path, and the manifest's files lie in no one folder here; give inputs.folder")
        limit = int(self.inputs.max_mebibytes * 2**20) + 1
        try:
            path = (self.folder / source).resolve()
            if not path.is_relative_to(self.folder):
                raise InvalidInput(f"{source!r} leads out of {self.folder.name}/; put the file inside, or give inputs.folder")
            # resolved, so a link at its end is new; and a pipe would keep us waiting
            handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
            with open(handle, "rb") as file:
                if not stat.S_ISREG(os.fstat(handle).st_mode):
                    raise InvalidInput(f"{source!r} is no file; give the path of a picture")
                return file.read(limit)
        except (FileNotFoundError, NotADirectoryError):
            raise InvalidInput(f"{source!r} does not exist; paths start at {self.folder.name}/ (inputs.folder)") from None
        except RuntimeError:  # Python 3.12's word for it; later ones say so in the OSError below
            raise InvalidInput(f"{source!r} is a link that leads to itself; put the file there") from None
        except (OSError, ValueError) as error:
            raise InvalidInput(f"{source!r} cannot be read: {getattr(error, 'strerror', None) or error}") from None

    def _read_stored(self, place: str, key: str, whole: str) -> bytes:
        """`whole`: the URL that both make."""
        if any(step in ("", ".", "..") for step in key.split("/")) or re.search(r"[\x00-\x1f\x7f\\]", key) or len(whole) > LONGEST_KEY:
            raise InvalidInput(f"{key!r} is no name of a picture in {place}; paths start there, and may not lead out of it")
        try:
            with _folder(place).open(key) as file:
                if (size := file.seek(0, io.SEEK_END)) > self.inputs.max_mebibytes * 2**20:
                    raise InvalidInput(self._too_large(whole))
                file.seek(0)
                return file.read(size)
        except KeyError:
            raise InvalidInput(f"{shown(whole)} does not exist; correct the path, or inputs.folder") from None


class _Files:
    """A part's files, each fetched once and let go after the last of its samples; and how much memory they and their pictures
    take. Files are counted once they are there, so that eight more may be on their way."""

    def __init__(self, samples: Iterable[Sample], fetched: Callable[[InputImage], InputImage | RenderfarmError]) -> None:
        given = (image for sample in samples for name in IMAGE_ARGUMENTS if (image := getattr(sample, name)) is not None)
        self._fetched, self._left = fetched, Counter(given)
        self._locks = {image: threading.Lock() for image in self._left}
        self._here: dict[InputImage, InputImage | RenderfarmError] = {}
        self._held, self._counting = 0, threading.Lock()

    @contextmanager
    def lent(self, images: Iterable[InputImage]) -> Iterator[dict[InputImage, InputImage | RenderfarmError]]:
        images = list(images)
        try:
            yield {image: self._one(image) for image in images}
        finally:
            for image in images:
                self._returned(image)

    def _one(self, image: InputImage) -> InputImage | RenderfarmError:
        with self._locks[image]:
            if image not in self._here:
                self._here[image] = found = self._fetched(image)
                self.hold(_file_bytes(found))
            return self._here[image]

    def _returned(self, image: InputImage) -> None:
        with self._locks[image]:
            self._left[image] -= 1
            if not self._left[image] and image in self._here:
                self.hold(-_file_bytes(self._here.pop(image)))

    def hold(self, count: int) -> None:
        """So many bytes more. Raises Fatal where that is too much."""
        with self._counting:
            self._held += count
            if count > 0 and self._held > MAX_HELD_BYTES:
                raise Fatal(
                    f"the images that one part's rows give need more than {MAX_HELD_BYTES >> 30} GiB of a worker's memory; "
                    "lower output.part_rows (in a new output), or give smaller images"
                )


def _file_bytes(fetched: InputImage | RenderfarmError) -> int:
    """Those of a row itself are not ours to let go."""
    return len(fetched.data or b"") if isinstance(fetched, InputImage) and fetched.source is not None else 0


@lru_cache(maxsize=32)
def _folder(url: str) -> Store:
    """One client for all parts and rows."""
    return open_store(url)


def _or_raise(name: str, fetched: InputImage | RenderfarmError) -> InputImage:
    if isinstance(fetched, RenderfarmError):
        raise type(fetched)(f"{name} {fetched}")
    return fetched


def _asked(sample: Sample) -> Any:
    """What decides a sample's pictures."""
    return (*(getattr(sample, name) for name in IMAGE_ARGUMENTS), sample.height, sample.width, sample.resize)


def _like(ready: Sample | RenderfarmError, sample: Sample) -> Sample | RenderfarmError:
    if isinstance(ready, RenderfarmError):
        return ready
    return replace(sample, height=ready.height, width=ready.width, **{name: getattr(ready, name) for name in IMAGE_ARGUMENTS})


def _pixels(size: tuple[int, int]) -> str:
    return f"{size[0]}×{size[1]}"


def _download(url: str, inputs: Inputs, too_large: str) -> bytes:
    """One GET, redirects followed by hand so that each is checked. Raises InvalidInput, or Transient for what may pass."""
    deadline, asked = time.monotonic() + inputs.timeout_s, url
    for _ in range(REDIRECTS + 1):
        try:
            connection = _connect(parts := _allowed(url, inputs), inputs, deadline)
        except ValueError:  # a name with a part that is too long
            raise InvalidInput(_no_url(url)) from None
        except OSError as error:
            raise Transient(f"{shown(url)}: {error.strerror or error}") from None
        assert connection.sock is not None
        # a server may send a byte a second for days, each in time
        clock = threading.Timer(max(0.1, deadline - time.monotonic()), connection.sock.shutdown, [socket.SHUT_RDWR])
        clock.start()
        try:
            target = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
            connection.request("GET", f"{target}?{quote(parts.query, safe='/%:@!$&()*+,;=~-._?')}" if parts.query else target)
            answer = connection.getresponse()
            if answer.status in (301, 302, 303, 307, 308) and answer.headers["Location"]:
                url = _joined(url, answer.headers["Location"])
                continue
            if answer.status >= 500 or answer.status in (408, 429):
                raise Transient(f"{shown(url)} answered {answer.status} {answer.reason}")
            if answer.status != 200:
                raise InvalidInput(f"{shown(asked)} answered {answer.status} {answer.reason}; correct the URL")
            return _body(answer, inputs, deadline, too_large)
        except (OSError, http.client.HTTPException) as error:
            late = " (longer than inputs.timeout_s)" if time.monotonic() > deadline else ""
            raise Transient(f"{shown(url)}: {error or type(error).__name__}{late}") from None
        finally:
            clock.cancel()
            connection.close()
    raise InvalidInput(f"{shown(asked)} redirects more than {REDIRECTS} times; correct the URL")


def _joined(url: str, location: str) -> str:
    try:
        return urljoin(url, location)
    except ValueError:
        raise InvalidInput(f"{shown(url)} redirects to what is no URL; correct it") from None


def _body(answer: http.client.HTTPResponse, inputs: Inputs, deadline: float, too_large: str) -> bytes:
    data = bytearray()
    while piece := answer.read1(1 << 16):
        data += piece
        if len(data) > inputs.max_mebibytes * 2**20:
            raise InvalidInput(too_large)
    if time.monotonic() >= deadline:  # the end may be that of our patience
        raise TimeoutError
    if answer.length:  # bytes that were announced and did not come
        raise http.client.IncompleteRead(b"", answer.length)
    return bytes(data)


def _check_url(name: str, url: str, inputs: Inputs) -> None:
    """Raises InvalidInput for a URL that would not be asked for."""
    try:
        _allowed(url, inputs)
    except InvalidInput as error:
        raise InvalidInput(f"{name} {error}") from None


def _no_url(url: str) -> str:
    return f"{shown(url)} is no URL; correct it"


def _allowed(url: str, inputs: Inputs) -> SplitResult:
    """The URL's parts, if it begins as the job says and no step of its path, however encoded, leads up again. Raises InvalidInput."""
    try:
        if re.search(r"[\x00-\x1f\x7f]", url):  # of which urlsplit drops some, so that it would read another URL than is checked here
            raise ValueError("control characters")
        parts, path = urlsplit(url), url
        _ = parts.port
    except ValueError:
        raise InvalidInput(_no_url(url)) from None
    while (plainer := unquote(path)) != path:
        path = plainer
    steps = re.split(r"[/\\]", path.partition("?")[0].partition("#")[0])
    climbs = any(step in (".", "..") for step in steps) or "\\" in path
    if is_store(url) and (parts.query or parts.fragment or url.endswith(("?", "#"))):
        raise InvalidInput(f"{shown(url)}: a store's URL has no query; leave it out")
    if climbs or parts.username or parts.password or not any(url.startswith(beginning) for beginning in inputs.urls):
        raise InvalidInput(f"{shown(url)} is not a URL that the job allows; add its beginning to inputs.urls")
    return parts


def _connect(parts: SplitResult, inputs: Inputs, deadline: float) -> http.client.HTTPConnection:
    """To an address that was checked, so that a name cannot lead elsewhere a moment later."""
    host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    addresses = _resolved(host, port, deadline)
    if not inputs.private_addresses and not all(is_public(address) for address in addresses):
        raise InvalidInput(f"{shown(parts.geturl())} leads to a private address; give public URLs, or inputs.private_addresses: true")
    connection = http.client.HTTPConnection(host, port)
    for number, address in enumerate(addresses):
        try:
            plain = socket.create_connection((address, port), timeout=max(0.1, deadline - time.monotonic()))
            break
        except OSError:
            if number + 1 == len(addresses):
                raise
    connection.sock = ssl.create_default_context().wrap_socket(plain, server_hostname=host) if parts.scheme == "https" else plain
    return connection


def _resolved(host: str, port: int, deadline: float) -> list[str]:
    """A name's addresses. The system's resolver takes no limit, so it is asked by a thread that may be left behind."""
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except Exception as error:  # is raised below
            answers.put(error)

    threading.Thread(target=ask, name="resolve", daemon=True).start()
    try:
        found = answers.get(timeout=max(0.1, deadline - time.monotonic()))
    except queue.Empty:
        raise TimeoutError("the name was not resolved in time (inputs.timeout_s)") from None
    if isinstance(found, Exception):
        raise found
    return list(dict.fromkeys(str(info[4][0]) for info in found))


def is_public(address: str) -> bool:
    """Whether an address, and the IPv4 one that an IPv6 one may stand for, is anybody's to reach."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour or (ipaddress.IPv4Address(int(found) & 0xFFFFFFFF) if found in NAT64 else None)
        if inner is not None:
            return is_public(str(inner))
        if found.is_site_local or any(found in network for network in NOT_OF_THE_WEB):
            return False
    return found.is_global and not found.is_multicast
