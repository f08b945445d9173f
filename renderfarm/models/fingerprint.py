"""SHA-256 of a model's files, remembered for large ones: hashing tens of gigabytes at every start would be waiting."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
import uuid
from pathlib import Path

WORTH_REMEMBERING = 1 << 20  # bytes; smaller files are hashed each time
SETTLED_NS = 2_000_000_000  # a file written just now may change again without another size or time


def weight_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every weight and configuration file that a pipeline may read, by its path in the folder."""
    wanted = sorted(path for path in folder.rglob("*") if path.suffix in (".safetensors", ".json", ".txt", ".model"))
    return {path.relative_to(folder).as_posix(): file_sha256(path) for path in wanted}


def file_sha256(path: Path) -> str:
    """A large file's hash is taken from the cache while its size and modification time are what they were."""
    real = path.resolve()  # the hub's cache links to its blobs
    stat = real.stat()
    if stat.st_size < WORTH_REMEMBERING:
        return _hash(real)
    note = _cache_folder() / f"{hashlib.sha256(str(real).encode()).hexdigest()}.json"
    state = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    with contextlib.suppress(OSError, ValueError, AttributeError):
        known = json.loads(note.read_text())
        if {name: known.get(name) for name in state} == state and len(known["sha256"]) == 64:
            return str(known["sha256"])
    found = _hash(real)
    if time.time_ns() - stat.st_mtime_ns > SETTLED_NS:
        _remember(note, {**state, "sha256": found})
    return found


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "renderfarm" / "sha256"


def _remember(note: Path, value: dict[str, object]) -> None:
    """Best effort: without a cache the next start takes longer, and nothing else. Whole or not at all: workers share it."""
    temporary = note.with_suffix(f".{uuid.uuid4().hex}")
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(value))
        temporary.replace(note)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
