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

WORTH_REMEMBERING = 1 << 20  # bytes; smaller files are hashed each time
SETTLED_NS = 2_000_000_000  # a file written just now may change again without another size or time


def weight_hashes(folder: Path, *, safety_checker: bool) -> dict[str, str]:
    """SHA-256 of every file that the pipeline reads, by its path in the folder: of the components that its index names,
    without other variants of their weights. A folder may hold more, and what nobody loads decides no pixel.

    Raises Fatal where a denoiser has no weights to hash.
    """
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    named = {name for name, value in index.items() if isinstance(value, list) and value and value[0] is not None}
    if not safety_checker:
        named -= {"safety_checker", "feature_extractor"}
    files = [folder / "model_index.json"]
    for name in sorted(named):
        for place, _, inside in os.walk(folder / name, followlinks=True):  # a component may be a link to another model's
            files += [Path(place) / file for file in inside if _is_read(file)]
    found = {path.relative_to(folder).as_posix(): file_sha256(path) for path in sorted(files)}
    if not any(path.startswith(("unet/", "transformer/")) and path.endswith(".safetensors") for path in found):
        raise Fatal(f"model {folder}: its denoiser has no .safetensors file; give a model in diffusers' format")
    return found


def companion_hashes(folder: Path) -> dict[str, str]:
    """The same of a second model: a pipeline, or a single component."""
    if (folder / "model_index.json").is_file():
        return weight_hashes(folder, safety_checker=False)
    return {path.name: file_sha256(path) for path in sorted(folder.iterdir()) if _is_read(path.name)}


def model_sha256(hashes: dict[str, str]) -> str:
    """One hash for a whole model: of its files' hashes, sorted by path, one `path hash` a line."""
    return hashlib.sha256("".join(f"{path} {hashes[path]}\n" for path in sorted(hashes)).encode()).hexdigest()


def weight_bytes(folder: Path) -> dict[str, int]:
    """Bytes of the weight files of each component that the pipeline loads."""
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    found = {}
    for name, value in index.items():
        if isinstance(value, list) and value and value[0] is not None:
            files = [path for path in (folder / name).rglob("*.safetensors") if _is_read(path.name)]
            if files:
                found[name] = sum(path.stat().st_size for path in files)
    return found


def _is_read(name: str) -> bool:
    variant = ".fp16" in name or ".non_ema" in name
    return name.endswith((".safetensors", ".json", ".txt", ".model", ".jinja")) and not variant  # .jinja: chat templates


def file_sha256(path: Path) -> str:
    """A large file's hash is taken from the cache while its size and modification time are what they were."""
    real = path.resolve()  # the hub's cache links to its blobs
    stat = real.stat()
    if stat.st_size < WORTH_REMEMBERING:
        return _hash(real)
    note = _cache_folder() / f"{hashlib.sha256(str(real).encode()).hexdigest()}.json"
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
