"""Weight hashes: right whatever the cache holds, and not computed twice for a large file."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import pytest

from renderfarm.errors import Fatal
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
    monkeypatch.setattr(fingerprint, "SETTLED_NS", -1)  # files of a test are new
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
    write(path, data[::-1])
    assert file_sha256(path) == sha256(data[::-1]), "same size and modification time, as after unpacking an archive"
    write(path, data + b"x")
    assert file_sha256(path) == sha256(data + b"x"), "another size"


def test_a_file_written_just_now_is_not_remembered(tmp_path: Path, hashed: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "SETTLED_NS", 2_000_000_000)
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


INDEX = b'{"unet": ["diffusers", "U"], "tokenizer": ["t", "T"], "safety_checker": ["s", "S"], "image_encoder": [null, null]}'


def model_folder(folder: Path) -> Path:
    write(folder / "model_index.json", INDEX)
    write(folder / "unet/diffusion_pytorch_model.safetensors", b"w")
    write(folder / "tokenizer/merges.txt", b"m")
    return folder


def test_the_files_that_the_pipeline_reads_are_hashed_by_their_place_and_no_others(tmp_path: Path, hashed: list[Path]) -> None:
    folder = model_folder(tmp_path / "m")
    wanted = {
        "model_index.json": sha256(INDEX),
        "tokenizer/merges.txt": sha256(b"m"),
        "unet/diffusion_pytorch_model.safetensors": sha256(b"w"),
    }
    assert weight_hashes(folder, safety_checker=False) == wanted
    for other in ("README.md", "v1-5.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors", "image_encoder/model.safetensors"):
        write(folder / other, b"not read")
    write(folder / "safety_checker/model.safetensors", b"s")
    assert weight_hashes(folder, safety_checker=False) == wanted
    assert weight_hashes(folder, safety_checker=True) == wanted | {"safety_checker/model.safetensors": sha256(b"s")}


def test_a_component_that_is_a_link_to_another_models_is_hashed(tmp_path: Path, hashed: list[Path]) -> None:
    folder, other = model_folder(tmp_path / "m"), model_folder(tmp_path / "n")
    write(other / "unet/diffusion_pytorch_model.safetensors", b"of another model")
    shutil.rmtree(folder / "unet")
    with pytest.raises(Fatal, match=r"no \.safetensors file"):
        weight_hashes(folder, safety_checker=False)
    (folder / "unet").symlink_to(other / "unet")
    assert weight_hashes(folder, safety_checker=False)["unet/diffusion_pytorch_model.safetensors"] == sha256(b"of another model")
