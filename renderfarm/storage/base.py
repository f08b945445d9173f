"""What a store promises, whatever it is made of.

    put            replaces or creates; readers see the old or the new bytes, never a mix
    put_if_absent  creates; raises AlreadyExists, and then the stored bytes are unchanged. Of many concurrent calls
                   for one key exactly one returns. Then it, and all that was put through this object before, outlives
                   the machine's end.
    read, open     all bytes; a file that seeks. Both raise KeyError where there is none
    delete         no key with that name is left; one that is not there is no error
    exists, list   see every key whose put has returned

Keys are relative, `/`-separated, and lead nowhere else: tables name some of them, and anybody may write a table.
Bytes may be given as a file on this machine's disk, for what is too large for memory; it is left where it is. Best it is one of
`scratch`, which need not be copied to be a key of this machine, and is not written any more once it was put.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Protocol

from renderfarm.errors import Fatal

OURS = "_renderfarm"
TEMPORARY = "_renderfarm/tmp"


@dataclass(frozen=True)
class Stored:
    """A key, its size in bytes, and when it was written, in seconds since 1970."""

    key: str
    size: int
    modified: float


class Store(Protocol):
    url: str

    def scratch(self, suffix: str) -> Path:
        """A new, empty file of this machine, for bytes that are to be put. Whoever asks for it removes it."""

    def put(self, key: str, data: bytes | Path) -> None: ...
    def put_if_absent(self, key: str, data: bytes | Path) -> None: ...
    def read(self, key: str) -> bytes: ...
    def open(self, key: str) -> BinaryIO: ...
    def exists(self, key: str) -> bool: ...
    def delete(self, key: str) -> None: ...
    def names(self) -> list[str]:
        """Of files and folders at the top."""

    def list(self, prefix: str) -> list[str]:
        """Keys below the folder `prefix`, sorted."""

    def stored(self, prefix: str) -> Iterator[Stored]:
        """The same with sizes and dates, in any order."""

    def unfinished(self) -> Iterator[Stored]:
        """Writes that were begun and are no key: of writers that died, or that are at it. `key` says so much as `discard` needs."""

    def discard(self, unfinished: Stored) -> None:
        """Remove what is stored of one; its writer, if it lives, fails."""


def scratch_file(suffix: str) -> Path:
    """One where temporary files are kept. Raises OSError."""
    with tempfile.NamedTemporaryFile(prefix="renderfarm-", suffix=suffix, delete=False) as file:
        return Path(file.name)


def checked(key: str, url: str) -> str:
    """Raises Fatal for a key that leads elsewhere, as one that somebody wrote into a table may."""
    path = PurePosixPath(key)
    if path.is_absolute() or ".." in path.parts or "\0" in key:
        raise Fatal(f"{key!r} is no file of {url}; what names it was changed: restore it from a copy")
    return key
