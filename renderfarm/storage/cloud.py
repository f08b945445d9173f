"""A prefix of a bucket or container, by fsspec's client for it.

Every request is tried again with jittered pauses for as long as `patience_s` says, whatever the client thinks of it: a store
that is busy or away, and credentials that have expired, cost time and no row. A create whose reply was lost finds its own
bytes at the next try and raises AlreadyExists: whoever creates reads back what is stored.
"""

from __future__ import annotations

import contextlib
import io
import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from renderfarm.errors import AlreadyExists, Expired, Fatal, InvalidJob, Transient
from renderfarm.storage.base import Stored, checked, scratch_file
from renderfarm.storage.clients import make_client, translated

PATIENCE_S = 120.0  # with a store that is busy or away; a lease that fails for it is tried again
FIRST_ANSWER_S = 20.0  # from a store that never answered: the URL or the network may be wrong
RENEWAL_S = 3600.0  # with credentials that have expired: people renew them
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 20.0
READ_AHEAD = 1 << 20
# What goes to S3 is one request below two pieces: s3fs by itself makes five for a part of 129 MB, which cost both ends time. Larger ones
# go up in pieces, so many of them at once, all of these in memory.
PIECE_BYTES, PIECES_AT_ONCE = 128 << 20, 4
DATES = ("LastModified", "last_modified", "updated", "mtime")

T = TypeVar("T")
logger = logging.getLogger(__name__)


class CloudStore:
    """`put` and `put_if_absent` are single requests, or multipart uploads that are seen once they are complete."""

    def __init__(self, url: str, *, single_writer: bool = False, patience_s: float = PATIENCE_S) -> None:
        """`single_writer`: the store has no create-if-absent, and nobody else writes here. `patience_s`: 0 tries once; who has less
        than the usual does not wait for new credentials either."""
        self.url = url.rstrip("/")
        self.single_writer, self.patience_s = single_writer, patience_s
        self._lock = threading.Lock()
        self._client: tuple[Any, str] | None = None
        self._answered = self._complained = False

    def __reduce__(self) -> tuple[Any, ...]:  # a client belongs to its process
        return _again, (self.url, self.single_writer, self.patience_s)

    def scratch(self, suffix: str) -> Path:
        return scratch_file(suffix)

    def put(self, key: str, data: bytes | Path) -> None:
        self._write(key, data)

    def put_if_absent(self, key: str, data: bytes | Path) -> None:
        if self.single_writer:
            if self.exists(key):
                raise AlreadyExists(f"{key} exists in {self.url}")
            self._write(key, data)
            return
        try:
            self._write(key, data, mode="create")
        except AlreadyExists:
            raise AlreadyExists(f"{key} exists in {self.url}") from None

    def _write(self, key: str, data: bytes | Path, **how: Any) -> None:
        if self._is_s3():
            how |= {"chunksize": PIECE_BYTES, "max_concurrency": PIECES_AT_ONCE}

        def ask(client: Any, path: str) -> None:
            if isinstance(data, bytes):
                client.pipe_file(path, data, **how)
            elif self._is_s3() and data.stat().st_size < 2 * PIECE_BYTES:
                client.pipe_file(path, data.read_bytes(), **how)  # the client would read it while no other request of this process moves
            else:
                client.put_file(str(data), path, **how)

        try:
            self._do(f"write {key}", key, ask)
        except KeyError:  # no key, but what it would lie in
            raise InvalidJob(
                f"cannot write {key} in {self.url}: there is no such bucket or container; create it, or correct the URL"
            ) from None

    def read(self, key: str) -> bytes:
        data: bytes = self._do(f"read {key}", key, lambda client, path: client.cat_file(path))
        return data

    def open(self, key: str) -> BinaryIO:
        size = self._do(f"read {key}", key, _size)
        return io.BufferedReader(_Ranges(self, key, size), READ_AHEAD)

    def read_range(self, key: str, start: int, stop: int) -> bytes:
        data: bytes = self._do(f"read {key}", key, lambda client, path: client.cat_file(path, start=start, end=stop))
        return data

    def exists(self, key: str) -> bool:
        try:
            self._do(f"look for {key}", key, _size)
            return True
        except KeyError:
            return False

    def delete(self, key: str) -> None:
        with contextlib.suppress(KeyError):
            self._do(f"delete {key}", key, lambda client, path: client.rm_file(path))

    def names(self) -> list[str]:
        def ask(client: Any, path: str) -> list[str]:
            client.invalidate_cache()
            found = (name.rstrip("/") for name in client.ls(path, detail=False))
            return [name.rpartition("/")[2] for name in found if name != path]  # a folder's own marker, as S3's console makes it

        try:
            return sorted(self._do("list files", "", ask))
        except KeyError:
            return []

    def list(self, prefix: str) -> list[str]:
        return sorted(stored.key for stored in self.stored(prefix))

    def stored(self, prefix: str) -> Iterator[Stored]:
        def ask(client: Any, path: str) -> list[tuple[str, dict[str, Any]]]:
            client.invalidate_cache()
            root = self._root()
            found = client.find(path, detail=True).items()
            return [
                (name.removeprefix(root).lstrip("/"), about) for name, about in found if name.startswith(f"{path}/") and name[-1] != "/"
            ]

        try:
            found = self._do(f"list {prefix or 'files'}", prefix, ask)
        except KeyError:
            return
        for key, about in found:
            yield Stored(key, int(about["size"] or 0), _date(about))

    def unfinished(self) -> Iterator[Stored]:
        """S3's multipart uploads. GCS and Azure forget such by themselves, after a week."""
        if not self._is_s3():
            return
        bucket, _, root = self._root().partition("/")

        def ask(client: Any, path: str) -> list[dict[str, Any]]:
            found: list[dict[str, Any]] = []
            place: dict[str, str] = {}
            while True:
                page = client.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=f"{root}/" if root else "", **place)
                found += page.get("Uploads", [])
                if not page.get("IsTruncated"):
                    return found
                place = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

        for upload in self._do("list uploads", "", ask):
            key = upload["Key"].removeprefix(root).lstrip("/")
            yield Stored(f"{key}?uploadId={upload['UploadId']}", 0, upload["Initiated"].timestamp())

    def discard(self, unfinished: Stored) -> None:
        key, _, upload = unfinished.key.rpartition("?uploadId=")

        def ask(client: Any, path: str) -> None:
            bucket, _, name = path.partition("/")
            with contextlib.suppress(FileNotFoundError):  # it ended meanwhile
                client.call_s3("abort_multipart_upload", Bucket=bucket, Key=name, UploadId=upload)

        self._do(f"discard an upload of {key}", key, ask)

    def _is_s3(self) -> bool:
        return self.url.partition("://")[0] in ("s3", "s3a")

    # ---------------------------------------------------------------------------------------------- one request

    def _do(self, doing: str, key: str, ask: Callable[[Any, str], T]) -> T:
        """One request, tried again while that may help. Raises KeyError where there is no such key."""
        began, pause = time.monotonic(), FIRST_PAUSE_S
        while True:
            try:
                client, root = self._connected()
                answer = ask(client, f"{root}/{checked(key, self.url)}".rstrip("/"))
                self._answered, self._complained = True, False
                return answer
            except Exception as error:  # each store's package has errors of its own
                found = translated(error, f"{doing} in {self.url}")
                self._answered |= isinstance(found, KeyError | AlreadyExists)
                if isinstance(found, Expired):
                    self._client = None  # the next one reads the credentials anew
                if not isinstance(found, Transient) or time.monotonic() - began + pause > self._patience(found):
                    raise found from (None if isinstance(found, KeyError) else error)
                self._complain(found)
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(LONGEST_PAUSE_S, 2 * pause)

    def _patience(self, error: Transient) -> float:
        if not self._answered:
            return min(self.patience_s, FIRST_ANSWER_S)
        return RENEWAL_S if isinstance(error, Expired) and self.patience_s >= PATIENCE_S else self.patience_s

    def _complain(self, error: Transient) -> None:
        """Once for each time that the store is away: people who see nothing happen want to know why."""
        if not self._complained:
            self._complained = True
            logger.warning("%s; trying again for %.0f s", error, self._patience(error))

    def _connected(self) -> tuple[Any, str]:
        with self._lock:
            if self._client is None:
                self._client = make_client(self.url)
            return self._client

    def _root(self) -> str:
        return self._connected()[1]


class _Ranges(io.RawIOBase):
    """A key's bytes, a range at a time; each request is one of the store's, with its patience."""

    def __init__(self, store: CloudStore, key: str, size: int) -> None:
        self.store, self.key, self.size, self.place = store, key, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.place, io.SEEK_END: self.size}[whence]
        return self.place

    def readinto(self, buffer: Any) -> int:
        stop = min(self.size, self.place + len(buffer))
        if stop <= self.place:
            return 0
        data = self.store.read_range(self.key, self.place, stop)
        buffer[: len(data)] = data
        self.place += len(data)
        return len(data)


def _size(client: Any, path: str) -> int:
    try:
        about = client.info(path)
    except FileNotFoundError:
        raise
    except OSError:  # the answer to a HEAD has no body that says why
        client.cat_file(path, start=0, end=1)
        raise
    if about["type"] != "file":
        raise FileNotFoundError(path)
    if about["size"] is None:
        raise Fatal(f"{path}: the server does not say how large it is, and so cannot serve parts of it; copy it to a folder or a store")
    return int(about["size"])


def _date(about: dict[str, Any]) -> float:
    found = next((about[name] for name in DATES if about.get(name)), None)
    if isinstance(found, str):
        found = datetime.fromisoformat(found)
    if isinstance(found, datetime):
        return found.timestamp()
    if found is None:
        raise Fatal("the store tells no dates")
    return float(found)


def _again(url: str, single_writer: bool, patience_s: float) -> CloudStore:
    return CloudStore(url, single_writer=single_writer, patience_s=patience_s)
