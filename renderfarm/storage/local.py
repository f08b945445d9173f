"""Folders: temp file, fsync, then link (create) or rename (replace), since fsspec's own create is an exists-check followed by a write."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from renderfarm.errors import AlreadyExists, Fatal, InvalidJob, Transient
from renderfarm.storage.base import TEMPORARY, Stored, checked

NOT_TO_BE_WRITTEN = (
    *(errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.EISDIR, errno.ENOENT),
)


class LocalStore:
    """A folder. Safe against concurrent writers and SIGKILL on any POSIX file system with hard links."""

    def __init__(self, root: str) -> None:
        self.root = Path(root)
        self.url = str(self.root)

    def put(self, key: str, data: bytes | Path) -> None:
        with self._written(key, data) as temporary:
            os.replace(temporary, self._path(key))

    def put_if_absent(self, key: str, data: bytes | Path) -> None:
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

    @contextlib.contextmanager
    def _written(self, key: str, data: bytes | Path) -> Iterator[Path]:
        """A durable temporary file with these bytes; whatever name it gets is made durable after."""
        target, temporary = self._path(key), self.root / TEMPORARY / uuid.uuid4().hex
        with _translated(f"write to {self.url}" if key.startswith(TEMPORARY) else f"write {key} in {self.url}"):
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary.parent.mkdir(parents=True, exist_ok=True)
            try:
                with open(temporary, "xb") as file:
                    if isinstance(data, bytes):
                        file.write(data)
                    else:
                        with data.open("rb") as source:
                            shutil.copyfileobj(source, file, 1 << 20)
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
