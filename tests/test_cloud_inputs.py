"""Pictures, and a job's own files, that lie in a store: what comes out is what the same files in a folder give."""

from __future__ import annotations

import asyncio
import io
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from aiohttp import web
from covering import covering
from PIL import Image
from servers import FaultProxy, s3_error
from test_adapters import make_adapter
from upscalers import RRDBNet, random_network, save

import renderfarm
from renderfarm import inputs
from renderfarm.errors import Fatal, InvalidJob, Transient
from renderfarm.jobfile import load_job
from renderfarm.preparation import prepare
from renderfarm.storage import cloud, open_store
from renderfarm.validation import validate_rows
from renderfarm.verification import Choice, verify

Forward = Callable[[], Awaitable[web.Response]]


@pytest.fixture(params=["s3", "azure"])
def bucket(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(request.param))


def picture(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def table(**columns: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


NAMES = ["a.png", "more/b 1.png", "more/ü#[1].png"]


def files(names: list[str]) -> dict[str, bytes]:
    """A manifest, and pictures beside and below it."""
    found = {f"set/{name}": picture(number) for number, name in enumerate(NAMES)}
    return found | {"set/m.parquet": table(prompt=[f"a red circle {k}" for k in range(len(names))], image=names)}


def put(url: str, names: list[str]) -> None:
    for key, data in files(names).items():
        open_store(url).put(key, data)


@pytest.fixture
def write(write_job: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    def job(manifest: str, name: str = "there", **changes: Any) -> Path:
        settings = {"model": "builtin:shapes", "render": {"num_inference_steps": 3, "strength": 0.6}, "workers": {"batch_size": 2}}
        return write_job(manifest, f"{name}.yaml", **settings, output={"path": str(tmp_path / name), "part_rows": 2}, **changes)

    return job


def run(job: Path) -> list[tuple[int, str, str]]:
    """Each image's row, where its picture was, and its pixels' hash."""
    summary = renderfarm.run(job, engine="inline")
    return [(record["row"], record["init_image"], record["pixel_sha256"]) for _, record in renderfarm.open(summary.out)]


def errors(out: Path) -> list[tuple[str, str]]:
    table = renderfarm.open(out).errors()
    return list(zip(table.column("error_class").to_pylist(), table.column("error_message").to_pylist(), strict=True))


@pytest.mark.parametrize(
    ("bucket", "given"),
    covering([(kind, given) for given in ("set/m.parquet", "set", "set/*.parquet") for kind in ("s3", "azure")]),
    indirect=["bucket"],
)
def test_pictures_beside_a_manifest_in_a_store_give_the_pixels_of_a_local_copy(
    bucket: str, given: str, write: Callable[..., Path], tmp_path: Path
) -> None:
    put(bucket, NAMES)
    for key, data in files(NAMES).items():
        path = tmp_path / "local" / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    here, there = run(write(str(tmp_path / "local" / given), "here")), run(write(f"{bucket}/{given}"))
    assert len(there) == 3
    assert there == here
    assert len({pixels for _, _, pixels in there}) == 3
    assert verify(str(tmp_path / "there"), Choice(sample=1)).ok


def test_a_folder_in_a_store_and_urls_into_one_are_what_the_job_says(
    s3: str, azure: str, write: Callable[..., Path], tmp_path: Path
) -> None:
    put(s3, NAMES)
    (tmp_path / "m.parquet").write_bytes(table(prompt=["a red circle 0", "a red circle 1"], image=NAMES[:2]))
    by_folder = run(write(str(tmp_path / "m.parquet"), "folder", inputs={"folder": f"{s3}/set"}))
    open_store(azure).put("set/m.parquet", table(prompt=["a red circle 0", "a red circle 1"], image=[f"{s3}/set/{n}" for n in NAMES[:2]]))
    by_url = run(write(f"{azure}/set/m.parquet", "url", inputs={"urls": [f"{s3}/set/"]}))
    assert [pixels for *_, pixels in by_folder] == [pixels for *_, pixels in by_url]
    assert [source for _, source, _ in by_url] == [f"{s3}/set/{name}" for name in NAMES[:2]]


BAD = {
    "absent.png": "does not exist; correct the path",
    "more": "does not exist; correct the path",
    "../secret.png": "'../secret.png' is no name of a picture in",
    "/set/a.png": "'/set/a.png' is no name of a picture in",
    "more//a.png": "is no name of a picture in",
    "a\n.png": "is no name of a picture in",
    "x" * 1100: "is no name of a picture in",
    "m.parquet": "is no PNG, JPEG, WEBP file",
    "s3://BUCKET/set/a.png": "is not a URL that the job allows",
    "s3://BUCKET/allowed/../set/a.png": "is not a URL that the job allows",
    "s3://BUCKET/allowed/a.png?versionId=1": "a store's URL has no query",
    "s3://BUCKET/allowed/": "is no name of a picture in",
}


def test_a_bad_path_costs_its_row_and_validate_says_the_same(s3: str, write: Callable[..., Path], tmp_path: Path) -> None:
    names = [name.replace("s3://BUCKET", s3) for name in BAD]
    put(s3, [*names, "a.png"])
    open_store(s3).put("secret.png", picture(9))
    job = write(f"{s3}/set/m.parquet", inputs={"urls": [f"{s3}/allowed/"]})
    found = validate_rows(prepare(load_job(job)))
    assert (found.bad_rows, found.rows) == (len(BAD), len(BAD) + 1)
    assert len(run(job)) == 1
    said = errors(tmp_path / "there")
    assert {name for name, _ in said} == {"InvalidInput"}
    assert [line.split(": ", 1)[1] for line in found.problems] == [message for _, message in said]
    for (_, message), wanted in zip(said, BAD.values(), strict=True):
        assert wanted in message


def test_a_picture_that_is_too_large_is_not_read(s3: str, faults: FaultProxy, write: Callable[..., Path], tmp_path: Path) -> None:
    put(s3, ["a.png", "large.png"])
    open_store(s3).put("set/large.png", b"x" * (3 << 20))
    faults.seen.clear()
    assert len(run(write(f"{s3}/set/m.parquet", inputs={"max_mebibytes": 2}))) == 1
    assert [message for _, message in errors(tmp_path / "there")] == [
        f"image {s3}/set/large.png is larger than 2 MiB; make it smaller, or raise inputs.max_mebibytes"
    ]
    assert {line.split()[0] for line in faults.seen if "large.png" in line} == {"HEAD"}


def test_a_store_that_is_away_charges_no_row(
    s3: str, faults: FaultProxy, write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It stays away for longer than its client is patient: the lease comes back, and is tried again."""
    put(s3, NAMES)
    monkeypatch.setattr(cloud, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(inputs, "open_store", lambda url: open_store(url, patience_s=0.05))
    inputs._folder.cache_clear()
    refused = [0]

    async def fault(request: web.Request, forward: Forward) -> web.Response:
        if request.path.endswith("/b 1.png") and refused[0] < 8:
            refused[0] += 1
            await asyncio.sleep(0.02)
            return s3_error(503, "SlowDown")
        return await forward()

    faults.fault = fault
    job = write(f"{s3}/set/m.parquet")
    with pytest.raises(Transient, match="said by the test"):
        validate_rows(prepare(load_job(job)))
    assert len(run(job)) == 3
    assert refused[0] == 8
    assert errors(tmp_path / "there") == []


def test_a_store_that_refuses_us_ends_the_job(s3: str, faults: FaultProxy, write: Callable[..., Path]) -> None:
    put(s3, NAMES)

    async def fault(request: web.Request, forward: Forward) -> web.Response:
        return s3_error(403, "AccessDenied") if request.path.endswith("a.png") else await forward()

    faults.fault = fault
    with pytest.raises(Fatal, match=r"a\.png in .*: refused with the credentials of this environment"):
        run(write(f"{s3}/set/m.parquet"))


@pytest.mark.parametrize("url", ["s3://key:secret@bucket/", "s3://bucket", "ftp://host/folder/"])
def test_beginnings_of_urls_that_cannot_be_meant_are_refused(url: str, write: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "m.parquet").write_bytes(table(prompt=["a"], image=["a.png"]))
    with pytest.raises(InvalidJob, match=r"inputs\.urls"):
        load_job(write(str(tmp_path / "m.parquet"), inputs={"urls": [url]}))


@pytest.mark.parametrize(
    ("folder", "message"), [("s3://b/../c", "without `.`, `..`"), ("s3://b/c?d", "no query"), ("http://h/c", "no folder")]
)
def test_folders_that_cannot_be_meant_are_refused(folder: str, message: str, write: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "m.parquet").write_bytes(table(prompt=["a"], image=["a.png"]))
    with pytest.raises(InvalidJob, match=re.escape(message)):
        prepare(load_job(write(str(tmp_path / "m.parquet"), inputs={"folder": folder})))


# ---------------------------------------------------------------------------------------------- files that the job names


def test_adapters_and_networks_from_a_store_give_the_pixels_of_local_ones(
    bucket: str, tiny_model: Callable[[str], Path], write_manifest, write_job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    one = make_adapter(diffusers.StableDiffusionPipeline, tiny_model("sd"), tmp_path / "one.safetensors", seed=0)
    for path in (one, save(random_network(RRDBNet), tmp_path / "up.safetensors")):
        open_store(bucket).put(f"weights/{path.name}", path)

    def pixels(name: str, folder: str) -> list[str]:
        job = write_job(
            write_manifest({"prompt": ["a", "b"], "adapters": [None, "one:0.5"]}),
            f"{name}.yaml",
            model={"id": str(tiny_model("sd")), "adapters": {"one": f"{folder}/one.safetensors"}},
            render={"num_inference_steps": 2, "height": 32, "width": 32},
            workers={"batch_size": 2, "dtype": "float32"},
            after=[{"upscale": {"weights": f"{folder}/up.safetensors"}}],
            output={"path": str(tmp_path / name)},
        )
        summary = renderfarm.run(job, engine="inline")
        assert verify(summary.out, Choice(sample=1), str(tiny_model("sd"))).ok
        return [record["pixel_sha256"] for _, record in renderfarm.open(summary.out)]

    there, here = pixels("there", f"{bucket}/weights"), pixels("here", str(tmp_path))
    assert there == here
    assert len(set(there)) == 2
    assert len(list((tmp_path / "cache/renderfarm/adapters").glob("*.safetensors"))) == 1
    open_store(bucket).delete("weights/one.safetensors")
    with pytest.raises(InvalidJob, match=r"model\.adapters\.one: .*one.safetensors cannot be read: No such file"):
        pixels("there", f"{bucket}/weights")
