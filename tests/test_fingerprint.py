"""Weight hashes: right whatever the cache holds, and not computed twice for a large file."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from renderfarm.models import fingerprint
from renderfarm.models.fingerprint import WORTH_REMEMBERING, file_sha256, weight_hashes

OLD = 1_700_000_000


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """The files that were really read, with a cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    read: list[Path] = []
    real = fingerprint._hash

    def counted(path: Path) -> str:
        read.append(path)
        return real(path)

    monkeypatch.setattr(fingerprint, "_hash", counted)
    return read


def write(path: Path, data: bytes, mtime: float = OLD) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    os.utime(path, (mtime, mtime))
    return path


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_a_large_file_is_read_once_and_again_when_it_changes(tmp_path: Path, hashed: list[Path]) -> None:
    data = os.urandom(WORTH_REMEMBERING)
    path = write(tmp_path / "unet.safetensors", data)
    assert [file_sha256(path), file_sha256(path)] == [sha256(data)] * 2
    assert hashed == [path]
    write(path, data[::-1], OLD + 1)
    assert file_sha256(path) == sha256(data[::-1]), "same size, another time"
    write(path, data + b"x", OLD + 1)
    assert file_sha256(path) == sha256(data + b"x"), "same time, another size"


def test_a_file_written_just_now_is_not_remembered(tmp_path: Path, hashed: list[Path]) -> None:
    path = tmp_path / "unet.safetensors"
    path.write_bytes(bytes(WORTH_REMEMBERING))
    file_sha256(path)
    file_sha256(path)
    assert len(hashed) == 2


@pytest.mark.parametrize("damage", [b"", b"[]", b'{"size": 1}', b"\xff\xfe"])
def test_a_damaged_or_unwritable_cache_costs_time_only(
    damage: bytes, tmp_path: Path, hashed: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = os.urandom(WORTH_REMEMBERING)
    path = write(tmp_path / "unet.safetensors", data)
    file_sha256(path)
    (note,) = (tmp_path / "cache").rglob("*.json")
    note.write_bytes(damage)
    assert file_sha256(path) == sha256(data)
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/nowhere")
    assert file_sha256(path) == sha256(data)


def test_all_files_that_a_pipeline_reads_are_hashed_by_their_place(tmp_path: Path, hashed: list[Path]) -> None:
    write(tmp_path / "m/model_index.json", b"{}")
    write(tmp_path / "m/unet/diffusion_pytorch_model.safetensors", b"w")
    write(tmp_path / "m/tokenizer/merges.txt", b"m")
    write(tmp_path / "m/README.md", b"not read")
    assert weight_hashes(tmp_path / "m") == {
        "model_index.json": sha256(b"{}"),
        "tokenizer/merges.txt": sha256(b"m"),
        "unet/diffusion_pytorch_model.safetensors": sha256(b"w"),
    }
