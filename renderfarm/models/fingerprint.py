"""SHA-256 of a model's files, remembered for large ones: hashing tens of gigabytes at every start would be waiting."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import time
import uuid
from pathlib import Path

from renderfarm.errors import Fatal
from renderfarm.models.files import INDEX, QUANTISED, listed, read_files, read_of_component

WORTH_REMEMBERING = 1 << 20  # bytes; smaller files are hashed each time
SETTLED_NS = 2_000_000_000  # a file written just now may change again without another size or time


def weight_hashes(folder: Path, variant: str | None = None, *, safety_checker: bool) -> dict[str, str]:
    """SHA-256 of every file that the pipeline reads, by its path in the folder: of the components that its index names,
    without other variants of their weights. A folder may hold more, and what nobody loads decides no pixel.

    Raises Fatal where a denoiser has no weights to hash.
    """
    found = {file: file_sha256(folder / file) for file in _read_files(folder, variant, safety_checker=safety_checker)}
    if not any(path.startswith(("unet/", "transformer/")) and path.endswith((".safetensors", QUANTISED)) for path in found):
        raise Fatal(f"model {folder}: its denoiser has no .safetensors file; give a model in diffusers' format")
    return found


def companion_hashes(folder: Path, variant: str | None) -> dict[str, str]:
    """The same of a second model: a pipeline, or a single component."""
    if (folder / INDEX).is_file():
        return weight_hashes(folder, variant, safety_checker=False)
    return {name: file_sha256(folder / name) for name in sorted(read_of_component([path.name for path in folder.iterdir()], variant))}


def model_sha256(hashes: dict[str, str]) -> str:
    """One hash for a whole model: of its files' hashes, sorted by path, one `path hash` a line."""
    return hashlib.sha256("".join(f"{path} {hashes[path]}\n" for path in sorted(hashes)).encode()).hexdigest()


def damaged_blobs(folder: Path, hashes: dict[str, str]) -> list[str]:
    """Files of the hub's cache that are not what the hub said when they were fetched: a large one is named by its SHA-256.
    Its client compares sizes only."""
    links = {file: Path(os.readlink(folder / file)) for file in hashes if (folder / file).is_symlink()}
    blobs = {file: link.name for file, link in links.items() if link.parent.name == "blobs" and len(link.name) == 64}
    return [str((folder / file).resolve()) for file, sha256 in blobs.items() if sha256 != hashes[file]]


def weight_bytes(folder: Path, variant: str | None) -> dict[str, int]:
    """Bytes of the weight files of each component that the pipeline loads."""
    found: dict[str, int] = {}
    for file in _read_files(folder, variant, safety_checker=False):
        if file.endswith((".safetensors", QUANTISED)):
            name = file.partition("/")[0]
            found[name] = found.get(name, 0) + (folder / file).stat().st_size
    return found


def _read_files(folder: Path, variant: str | None, *, safety_checker: bool) -> list[str]:
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    return read_files(listed(folder, index), index, variant, safety_checker=safety_checker)


def file_sha256(path: Path) -> str:
    """A large file's hash is taken from the cache while its size and modification time are what they were."""
    real = path.resolve()  # the hub's cache links to its blobs
    stat = real.stat()
    if stat.st_size < WORTH_REMEMBERING:
        return _hash(real)
    note = cache_folder("sha256") / f"{hashlib.sha256(str(real).encode()).hexdigest()}.json"
    # unpacked and copied files may share size and time with other bytes, and nodes may share a home: the inode tells
    state = {name: getattr(stat, f"st_{name}") for name in ("size", "mtime_ns", "ctime_ns", "ino", "dev")} | {"host": platform.node()}
    with contextlib.suppress(OSError, ValueError, AttributeError):
        known = json.loads(note.read_text())
        if {name: known.get(name) for name in state} == state and len(known["sha256"]) == 64:
            return str(known["sha256"])
    found = _hash(real)
    if time.time_ns() - max(stat.st_mtime_ns, stat.st_ctime_ns) > SETTLED_NS:
        _remember(note, {**state, "sha256": found})
    return found


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_folder(of: str) -> Path:
    """This user's, on this node."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "renderfarm" / of


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
