"""The one boundary to where bytes live. Foreign errors become renderfarm's here.

    put            replaces or creates; readers see the old or the new bytes, never a mix
    put_if_absent  creates; raises AlreadyExists, and then the stored bytes are unchanged. Of many concurrent calls
                   for one key exactly one returns.
    read           all bytes; raises KeyError where there is none
    exists, list   see every key whose put has returned

Keys are relative, `/`-separated, and lead nowhere else: tables name some of them, and anybody may write a table.
Local files: temp file, fsync, then link (create) or rename (replace), since fsspec's own create is an exists-check
followed by a write. `memory://` serves tests and `--engine inline`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Protocol

from renderfarm.errors import AlreadyExists, Fatal, InvalidJob, Transient

NOT_TO_BE_WRITTEN = (
    *(errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.EISDIR, errno.ENOENT),
)
OURS = "_renderfarm"
TEMPORARY = "_renderfarm/tmp"


class Store(Protocol):
    url: str

    def put(self, key: str, data: bytes) -> None: ...
    def put_if_absent(self, key: str, data: bytes) -> None: ...
    def read(self, key: str) -> bytes: ...
    def exists(self, key: str) -> bool: ...
    def names(self) -> list[str]:
        """Of files and folders at the top."""

    def list(self, prefix: str) -> list[str]: ...


def open_store(url: str) -> Store:
    """The store behind a path or URL. Creates nothing."""
    if url.startswith("memory://"):
        return MemoryStore(url)
    if url.startswith("file://"):
        url = url.removeprefix("file://")
    if "://" in url:
        scheme = url.partition("://")[0]
        raise InvalidJob(f"output {url}: {scheme}:// is not supported yet; write to a local path (or memory:// with --engine inline)")
    return LocalStore(os.path.abspath(url))


class LocalStore:
    """A folder. Safe against concurrent writers and SIGKILL on any POSIX file system with hard links."""

    def __init__(self, root: str) -> None:
        self.root = Path(root)
        self.url = str(self.root)

    def put(self, key: str, data: bytes) -> None:
        with self._written(key, data) as temporary:
            os.replace(temporary, self._path(key))

    def put_if_absent(self, key: str, data: bytes) -> None:
        with self._written(key, data) as temporary:
            try:
                os.link(temporary, self._path(key))
            except FileExistsError:
                raise AlreadyExists(f"{key} exists in {self.url}") from None

    def read(self, key: str) -> bytes:
        with _translated(f"read {key} in {self.url}"):
            try:
                return self._path(key).read_bytes()
            except FileNotFoundError:
                raise KeyError(key) from None

    def exists(self, key: str) -> bool:
        return self._path(key).exists()

    def names(self) -> list[str]:
        with _translated(f"read {self.url}"):
            return sorted(entry.name for entry in os.scandir(self.root)) if self.root.is_dir() else []

    def list(self, prefix: str) -> list[str]:
        """Keys below the folder `prefix`, sorted."""
        base = self.root / prefix
        found = (Path(folder) / name for folder, _, names in os.walk(base) for name in names)
        return sorted(path.relative_to(self.root).as_posix() for path in found)

    def _path(self, key: str) -> Path:
        """Raises Fatal for a key that leads elsewhere, as one that somebody wrote into a table may."""
        path = PurePosixPath(key)
        if path.is_absolute() or ".." in path.parts or "\0" in key:
            raise Fatal(f"{key!r} is no file of {self.url}; what names it was changed: restore it from a copy")
        return self.root / path

    @contextlib.contextmanager
    def _written(self, key: str, data: bytes) -> Iterator[Path]:
        """A durable temporary file with these bytes; whatever name it gets is made durable after."""
        target, temporary = self._path(key), self.root / TEMPORARY / uuid.uuid4().hex
        with _translated(f"write to {self.url}" if key.startswith(TEMPORARY) else f"write {key} in {self.url}"):
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary.parent.mkdir(parents=True, exist_ok=True)
            try:
                with open(temporary, "xb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                yield temporary
                folder = os.open(target.parent, os.O_RDONLY)
                try:
                    os.fsync(folder)
                finally:
                    os.close(folder)
            finally:
                temporary.unlink(missing_ok=True)


_MEMORY: dict[str, bytes] = {}
_MEMORY_LOCK = threading.Lock()


class MemoryStore:
    """Keys in this process."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def put(self, key: str, data: bytes) -> None:
        with _MEMORY_LOCK:
            _MEMORY[f"{self.url}/{key}"] = data

    def put_if_absent(self, key: str, data: bytes) -> None:
        with _MEMORY_LOCK:
            if f"{self.url}/{key}" in _MEMORY:
                raise AlreadyExists(f"{key} exists in {self.url}")
            _MEMORY[f"{self.url}/{key}"] = data

    def read(self, key: str) -> bytes:
        return _MEMORY[f"{self.url}/{key}"]

    def exists(self, key: str) -> bool:
        return f"{self.url}/{key}" in _MEMORY

    def names(self) -> list[str]:
        return sorted({key.partition("/")[0] for key in self.list("")})

    def list(self, prefix: str) -> list[str]:
        start = f"{self.url}/{prefix.rstrip('/')}/" if prefix else f"{self.url}/"
        with _MEMORY_LOCK:
            return sorted(key.removeprefix(f"{self.url}/") for key in _MEMORY if key.startswith(start))


def probe(store: Store) -> None:
    """Prove that the store can be written and honours create-if-absent. Raises Fatal or InvalidJob."""
    key = f"{TEMPORARY}/probe-{uuid.uuid4().hex}"
    store.put_if_absent(key, b"1")
    try:
        store.put_if_absent(key, b"2")
    except AlreadyExists:
        return
    finally:
        if isinstance(store, LocalStore):
            (store.root / key).unlink(missing_ok=True)
    raise Fatal(f"{store.url} does not honour create-if-absent: two writers could both believe that they committed a part")


@contextlib.contextmanager
def _translated(doing: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in NOT_TO_BE_WRITTEN:
            raise InvalidJob(f"cannot {doing}: {reason}; choose a folder that you may write, or change its permissions") from error
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise Fatal(f"cannot {doing}: {reason}; free some space and run again (nothing committed is lost)") from error
        raise Transient(f"cannot {doing}: {reason}") from error
