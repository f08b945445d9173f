"""Any byte of what is published: where one changes, `verify` says so, or nobody who reads the dataset can tell.

Every byte of loose pictures, originals, tables and tables of errors alone is under a hash, and in `parquet` and `webdataset`
every byte of the table and of each picture. Not under one, so that a byte may change there without a word, are: headers of pages
between the pictures of a Parquet file, what a tar's headers say beside names and sizes, the bytes that fill its blocks, and views
(`errors/` of parts with pictures, `metadata/`), which are held against what they say and can be rebuilt. Not looked at here:
README.md, the contact sheet, `_renderfarm/` (`job.json` and `profile.json` are held against what rows and job say, an index
entry's counts and hash against its part; who committed it, the run's records and logs, progress.json and control.json against nothing).
"""

from __future__ import annotations

import random
import re
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from checker import error_rows, image_rows

import renderfarm
from renderfarm import checking, commit
from renderfarm.verification import Choice, verify

PLACES = 12  # of each file, drawn; beside the first bytes and the last
ENDS = 20
PROMPTS = ["a", "b", "[nan]", "c", "[nan]", "[nan]"]  # parts with pictures alone, with both, with errors alone


@pytest.fixture(scope="module", params=["files", "parquet", "webdataset"])
def published(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    pq.write_table(pa.table({"prompt": PROMPTS, "mood": list("uvwxyz")}), folder / "prompts.parquet")
    job = {
        "name": "flipped",
        "manifest": "prompts.parquet",
        "model": "builtin:fake",
        "render": {"height": 8, "width": 8, "num_inference_steps": 1},
        "workers": {"batch_size": 1},
        "output": {"path": str(folder / "out"), "part_rows": 2, "layout": request.param},
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(job))
    summary = renderfarm.run(folder / "job.yaml", engine="inline")
    assert (summary.images, summary.errors) == (3, 3)
    return folder / "out"


def changed(out: Path, seed: int = 0) -> Iterator[tuple[str, int]]:
    """One file after the other, with one byte changed, and put right afterwards."""
    chosen = random.Random(seed)
    paths = sorted(path for path in out.rglob("*") if path.is_file() and path.relative_to(out).parts[0] not in ("_renderfarm", "README.md"))
    paths = [path for path in paths if path.parent != out]
    assert {path.relative_to(out).parts[0] for path in paths} >= {"data", "errors"}
    for path in paths:
        good = path.read_bytes()
        ends = (*range(ENDS), *range(len(good) - ENDS, len(good)))
        sums = [found.start() - 5 for found in re.finditer(b"IEND", good)]  # a PNG's, over its pixels, at which no decoder looks
        for place in sorted({*ends, *sums, *(chosen.randrange(len(good)) for _ in range(PLACES))}):
            bad = bytearray(good)
            bad[place] ^= chosen.randrange(1, 256)
            path.write_bytes(bad)
            yield str(path.relative_to(out)), place
        path.write_bytes(good)


def unseen(out: Path) -> Iterator[tuple[str, int]]:
    return (change for change in changed(out) if verify(str(out), Choice(sample=0)).ok)


def seen_by_readers(out: Path) -> list[Any]:
    """All that is read of the files, by other code than the package's."""
    seen: list[Any] = [image_rows(out), error_rows(out)]
    for path in sorted((*out.glob("errors/*"), *out.glob("metadata/*"))):
        seen.append(pq.read_table(path).to_pylist())
    for path in sorted(out.glob("data/*.tar")):
        with tarfile.open(path) as tar:
            seen += [(member.name, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]
    return seen


def test_a_byte_that_changes_anywhere_in_what_is_published_is_found(published: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(published, tmp_path / "out"))
    before = seen_by_readers(out)
    for key, place in unseen(out):
        assert not _is_hashed(published, key), (key, place)
        assert seen_by_readers(out) == before, (key, place)
    assert verify(str(out), Choice(sample=0)).ok, "nothing else was wrong with it"


def _is_hashed(published: Path, key: str) -> bool:
    """Whether all of a file is under a hash: loose pictures, their tables, and the errors of the part that has nothing else."""
    return key == "errors/part-00000002.parquet" or (key.startswith("data/part-") and (published / key).parent.name != "data")


def _is_told(out: Path, before: list[Any]) -> bool:
    try:
        return seen_by_readers(out) != before
    except Exception:  # whatever a reader raises
        return True


class Equal(str):
    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = str.__hash__


HASHES: dict[str, tuple[object, str, object]] = {
    "of files": (checking, "hashlib", SimpleNamespace(sha256=lambda data: SimpleNamespace(hexdigest=lambda: Equal()))),
    "of commit objects": (commit, "is_as_committed", lambda *_: True),
}


@pytest.mark.parametrize("hash_", HASHES)
def test_without_a_hash_some_would_not_be(hash_: str, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the two is needed: PNG's own sums are not all looked at by who decodes it, and Parquet has none over a footer."""
    out = Path(shutil.copytree(published, tmp_path / "out"))
    before = seen_by_readers(out)
    monkeypatch.setattr(*HASHES[hash_])
    assert any(_is_hashed(published, key) or _is_told(out, before) for key, _ in unseen(out))
