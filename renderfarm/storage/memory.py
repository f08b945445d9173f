"""`memory://`: keys in this process, for tests and `--engine inline`."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from renderfarm.errors import AlreadyExists
from renderfarm.storage.base import Stored, scratch_file

_KEYS: dict[str, tuple[bytes, float]] = {}
_LOCK = threading.Lock()


class MemoryStore:
    """Keys in this process."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def scratch(self, suffix: str) -> Path:
        return scratch_file(suffix)

    def put(self, key: str, data: bytes | Path) -> None:
        data = data if isinstance(data, bytes) else data.read_bytes()
        with _LOCK:
            _KEYS[f"{self.url}/{key}"] = data, time.time()

    def put_if_absent(self, key: str, data: bytes | Path) -> None:
        data = data if isinstance(data, bytes) else data.read_bytes()
        with _LOCK:
            if f"{self.url}/{key}" in _KEYS:
                raise AlreadyExists(f"{key} exists in {self.url}")
            _KEYS[f"{self.url}/{key}"] = data, time.time()

    def read(self, key: str) -> bytes:
        return _KEYS[f"{self.url}/{key}"][0]

    def open(self, key: str) -> BinaryIO:
        return io.BytesIO(self.read(key))

    def exists(self, key: str) -> bool:
        return f"{self.url}/{key}" in _KEYS

    def delete(self, key: str) -> None:
        with _LOCK:
            _KEYS.pop(f"{self.url}/{key}", None)

    def names(self) -> list[str]:
        return sorted({key.partition("/")[0] for key in self.list("")})

    def list(self, prefix: str) -> list[str]:
        return sorted(stored.key for stored in self.stored(prefix))

    def stored(self, prefix: str) -> Iterator[Stored]:
        start = f"{self.url}/{prefix.rstrip('/')}/" if prefix else f"{self.url}/"
        with _LOCK:
            found = [(key, *value) for key, value in _KEYS.items() if key.startswith(start)]
        return (Stored(key.removeprefix(f"{self.url}/"), len(data), modified) for key, data, modified in found)

    def unfinished(self) -> Iterator[Stored]:
        return iter(())

    def discard(self, unfinished: Stored) -> None:
        raise AssertionError("a put in memory has no middle")
