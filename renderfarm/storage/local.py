"""Folders: temp file, fsync, then link (create) or rename (replace), since fsspec's own create is an exists-check followed by a write."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import shutil
import threading
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from renderfarm.errors import AlreadyExists, Fatal, InvalidJob, Transient
from renderfarm.storage.base import TEMPORARY, Stored, checked

NOT_TO_BE_WRITTEN = (
    *(errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.EISDIR, errno.ENOENT),
)


AT_ONCE = 8 << 20


def start_writing(path: Path, begun: int) -> int:
    """Has the disk begin with a file's bytes from `begun` on, if they are many, and waits for nothing; where they end. Who makes a large
    file and calls this now and then finds the disk nearly done at its fsync, which else begins with all of it."""
    size = path.stat().st_size
    if size - begun < AT_ONCE or not hasattr(os, "posix_fadvise"):  # macOS has none
        return begun
    with path.open("rb") as file:  # the kernel drops what is on the disk already, and begins to write what is not: there is only the latter
        os.posix_fadvise(file.fileno(), begun, size - begun, os.POSIX_FADV_DONTNEED)
    return size


class LocalStore:
    """A folder. Safe against concurrent writers and SIGKILL on any POSIX file system with hard links."""

    def __init__(self, root: str) -> None:
        self.root = Path(root)
        self.url = str(self.root)
        self._lock = threading.Lock()
        # folders with names that a power failure may still take away, and which change to each was the last
        self._unsynced: dict[Path, int] = {}
        self._changes = itertools.count()

    def scratch(self, suffix: str) -> Path:
        path = self._temporary.with_suffix(suffix)
        with _translated(f"write to {self.url}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.open("xb").close()
        return path

    def put(self, key: str, data: bytes | Path) -> None:
        with self._written(key, data) as temporary:
            os.replace(temporary, self._path(key))

    def put_if_absent(self, key: str, data: bytes | Path) -> None:
        """What this store put before is as durable as the new key once this returns: a part's images need no folder's fsync each."""
        with self._written(key, data) as temporary:
            self._sync_folders()
            try:
                os.link(temporary, self._path(key))
            except FileExistsError:
                raise AlreadyExists(f"{key} exists in {self.url}") from None
            self._sync_folders({self._path(key).parent})

    def read(self, key: str) -> bytes:
        with _translated(f"read {key} in {self.url}"):
            try:
                return self._path(key).read_bytes()
            except FileNotFoundError:
                raise KeyError(key) from None

    def open(self, key: str) -> BinaryIO:
        with _translated(f"read {key} in {self.url}"):
            try:
                return self._path(key).open("rb")
            except FileNotFoundError:
                raise KeyError(key) from None

    def exists(self, key: str) -> bool:
        return self._path(key).exists()

    def delete(self, key: str) -> None:
        with _translated(f"delete {key} in {self.url}"):
            self._path(key).unlink(missing_ok=True)

    def names(self) -> list[str]:
        with _translated(f"read {self.url}"):
            return sorted(entry.name for entry in os.scandir(self.root)) if self.root.is_dir() else []

    def list(self, prefix: str) -> list[str]:
        start = len(os.path.join(self.root, ""))  # strings: a pathlib.Path for each of a million keys takes minutes
        found = (os.path.join(folder, name) for folder, _, names in os.walk(self.root / prefix) for name in names)
        return sorted(path[start:].replace(os.sep, "/") for path in found)

    def stored(self, prefix: str) -> Iterator[Stored]:
        for key in self.list(prefix):
            with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                about = self._path(key).stat()
                yield Stored(key, about.st_size, about.st_mtime)

    def unfinished(self) -> Iterator[Stored]:
        return self.stored(TEMPORARY)

    def discard(self, unfinished: Stored) -> None:
        self.delete(unfinished.key)

    def _path(self, key: str) -> Path:
        return self.root / checked(key, self.url)

    @property
    def _temporary(self) -> Path:
        """Another one each time."""
        return self.root / TEMPORARY / uuid.uuid4().hex

    @contextlib.contextmanager
    def _written(self, key: str, data: bytes | Path) -> Iterator[Path]:
        """A temporary file with these bytes, which are on the disk; whatever name it gets is so after the next `_sync_folders`."""
        target, temporary = self._path(key), self._temporary
        with _translated(f"write to {self.url}" if key.startswith(TEMPORARY) else f"write {key} in {self.url}"):
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary.parent.mkdir(parents=True, exist_ok=True)
            try:
                if isinstance(data, Path) and data.parent == temporary.parent:
                    os.link(data, temporary)
                elif isinstance(data, Path):
                    shutil.copyfile(data, temporary)  # within the kernel
                with temporary.open("ab") as file:
                    if isinstance(data, bytes):
                        file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                yield temporary
                with self._lock:
                    self._unsynced |= dict.fromkeys((target.parent, target.parent.parent), next(self._changes))
            finally:
                temporary.unlink(missing_ok=True)

    def _sync_folders(self, more: Iterable[Path] = ()) -> None:
        with self._lock:
            unsynced = dict(self._unsynced)
        for folder in {*unsynced, *more}:
            with contextlib.suppress(FileNotFoundError), contextlib.ExitStack() as stack:  # somebody removed it
                opened = os.open(folder, os.O_RDONLY)
                stack.callback(os.close, opened)
                os.fsync(opened)
        with self._lock:  # only now: another thread's create must not take them for synced
            self._unsynced = {folder: change for folder, change in self._unsynced.items() if unsynced.get(folder) != change}


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
