"""Models in a store: fetched once per node, whole or not at all, found again without the store where a hash is given."""

from __future__ import annotations

import functools
import hashlib
import http.server
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest
from checker import image_rows
from fsspec.implementations.memory import MemoryFileSystem

import renderfarm
from renderfarm.config import ComponentSpec, ModelSpec
from renderfarm.errors import Fatal, InvalidJob, Transient
from renderfarm.jobfile import load_job
from renderfarm.models.about import about
from renderfarm.models.catalog import describe
from renderfarm.models.fingerprint import cache_folder
from renderfarm.models.sources import find_model
from renderfarm.verification import Choice, verify

Write = Callable[..., Path]
UNET = "unet/diffusion_pytorch_model.safetensors"
USUAL: dict[str, Any] = {"render": {"sampler": "euler", "num_inference_steps": 2}, "workers": {"batch_size": 2}}


@pytest.fixture
def url(tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A tiny model in fsspec's memory, with what nobody loads beside it; and a cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    store = fsspec.filesystem("memory")
    store.put(str(tiny_model("sd")), "/bucket/model", recursive=True)
    store.pipe("/bucket/model/model.ckpt", b"pickled")
    yield "memory://bucket/model"
    store.rm("/bucket", recursive=True)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Files that were read from the store."""
    names: list[str] = []
    real = MemoryFileSystem.get_file

    def counted(self: Any, path: str, *arguments: Any, **options: Any) -> Any:
        names.append(path.partition("/model/")[2])
        return real(self, path, *arguments, **options)

    monkeypatch.setattr(MemoryFileSystem, "get_file", counted)
    return names


def test_a_model_in_a_store_is_fetched_once_rendered_and_verified(
    url: str, read: list[str], tiny_model: Callable[[str], Path], write_manifest: Write, write_job: Write, tmp_path: Path
) -> None:
    path = write_job(write_manifest({"prompt": ["a", "b"]}), model=url, **USUAL)
    assert renderfarm.run(path, engine="inline").images == 2
    assert len(read) == len(set(read)) == sum(file.is_file() for file in tiny_model("sd").rglob("*"))
    renderfarm.run(load_job(path, ["output.part_rows=2"], out=str(tmp_path / "again")), engine="inline")
    assert len(read) == len(set(read))
    renderfarm.run(write_job(tmp_path / "prompts.parquet", model=str(tiny_model("sd")), output={"path": str(tmp_path / "plain")}, **USUAL),
                   engine="inline")  # fmt: skip
    pixels = [[record["pixel_sha256"] for record in image_rows(tmp_path / name)] for name in ("out", "again", "plain")]
    assert pixels[0] == pixels[1] == pixels[2]
    assert {record["model"] for record in image_rows(tmp_path / "out")} == {url}
    assert [again.result for again in verify(str(tmp_path / "out"), Choice()).again] == ["identical"] * 2


def test_a_model_that_changed_in_its_store_is_another_one(url: str, read: list[str]) -> None:
    before = find_model(ModelSpec(id=url), weights=True)
    store = fsspec.filesystem("memory")
    data = store.cat_file(f"/bucket/model/{UNET}")
    store.pipe(f"/bucket/model/{UNET}", data[:-1] + b"\0")
    after = find_model(ModelSpec(id=url), weights=True)
    assert (before / UNET).read_bytes() == data != (after / UNET).read_bytes()


def test_planning_fetches_configurations_and_workers_that_start_together_fetch_each_file_once(url: str, read: list[str]) -> None:
    describe(ModelSpec(id=url))
    assert read
    assert all(name.endswith(("config.json", "model_index.json")) for name in read)
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(lambda _: find_model(ModelSpec(id=url), weights=True), range(4)))
    assert len(folders) == 1
    assert len(read) == len(set(read))


def test_a_component_may_lie_in_a_store(url: str, read: list[str], tiny_model: Callable[[str], Path]) -> None:
    spec = ModelSpec(id=str(tiny_model("sd")), components={"vae": ComponentSpec(id=url, subfolder="vae")})
    folder = find_model(spec, weights=True)
    assert sorted(read) == ["vae/config.json", "vae/diffusion_pytorch_model.safetensors"]
    assert (folder / "vae").resolve().is_relative_to((Path(str(folder)).parent.parent / "stores").resolve())


def test_a_download_that_breaks_leaves_nothing_that_looks_whole(url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = MemoryFileSystem.get_file

    def broken(self: Any, path: str, target: str, **options: Any) -> None:
        real(self, path, target, **options)
        if path.endswith(UNET):
            file = Path(target)
            file.write_bytes(file.read_bytes()[:1000])

    with monkeypatch.context() as patched:
        patched.setattr(MemoryFileSystem, "get_file", broken)
        with pytest.raises(Transient, match=r"cannot fetch model memory://bucket/model: .*\.safetensors ended after 1,000 of"):
            find_model(ModelSpec(id=url), weights=True)
    assert not [*tmp_path.glob(f"cache/**/{UNET}*"), *tmp_path.glob("cache/**/*.part")]
    folder = find_model(ModelSpec(id=url), weights=True)
    assert (folder / UNET).read_bytes() == fsspec.filesystem("memory").cat_file(f"/bucket/model/{UNET}")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("memory://bucket/nothing", r"there is nothing at memory://bucket/nothing; correct the URL|does not exist, or not any more"),
        ("nosuch://bucket/model", r"model nosuch://bucket/model: Protocol not known: nosuch"),
        ("gs://bucket/model", r"model gs://bucket/model: gs:// needs another package: pip install 'renderfarm\[gcs\]'"),
        ("https://host/model?version=3", r"^model https://host/model: a store's URL has no query"),
        ("https://host/model?token=secret", r"the URL in model\.id holds credentials \(its token\)"),
        ("https://me:secret@host/model", "the URL in model.id holds credentials"),
    ],
)
def test_a_url_that_cannot_be_a_model_is_refused(
    model: str, message: str, write_manifest: Write, write_job: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    if model.startswith("gs"):
        monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(InvalidJob, match=message):
        renderfarm.run(load_job(write_job(write_manifest(), model=model)), engine="inline")


@pytest.fixture
def web_server(tiny_model: Callable[[str], Path]) -> Iterator[tuple[str, Callable[[], None]]]:
    """A tiny model on a server of its own: its URL, and what ends the server."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tiny_model("sd")))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()

    def end() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    yield f"http://127.0.0.1:{server.server_port}", end
    if thread.is_alive():
        end()


def test_a_model_from_a_web_server_is_rendered_without_it_where_its_hash_is_known(
    web_server: tuple[str, Callable[[], None]],
    tiny_model: Callable[[str], Path],
    write_manifest: Write,
    write_job: Write,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    url, end = web_server
    model = {"id": url, "sha256": about(ModelSpec(id=str(tiny_model("sd"))))["sha256"]}
    path = write_job(write_manifest({"prompt": ["a"]}), model=model, **USUAL)
    assert renderfarm.run(path, engine="inline").images == 1
    end()
    again = load_job(path, out=str(tmp_path / "again"))
    assert renderfarm.run(again, engine="inline").images == 1
    with pytest.raises(Fatal, match=r"cannot fetch model http://127\.0\.0\.1:\d+: .*; run again to go on"):
        renderfarm.run(load_job(path, ["model.sha256=null"], out=str(tmp_path / "third")), engine="inline")


def test_a_worker_that_does_not_see_the_drivers_cache_fetches_the_model_itself(
    web_server: tuple[str, Callable[[], None]],
    local_ray: None,
    write_manifest: Write,
    write_job: Write,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Workers have the environment that Ray was started with, as they would on another node."""
    url, _ = web_server
    of_workers = cache_folder("stores") / hashlib.sha256(url.encode()).hexdigest()[:32]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = write_job(write_manifest({"prompt": ["a", "b"]}), model=url, **USUAL)
    try:
        assert renderfarm.run(path, engine="ray").images == 2
        assert not [*tmp_path.glob("cache/renderfarm/stores/**/*.safetensors")]
        assert len([*of_workers.glob(f"*/{UNET}")]) == 1
    finally:
        shutil.rmtree(of_workers, ignore_errors=True)
        of_workers.with_suffix(".json").unlink(missing_ok=True)


def test_a_store_whose_names_lead_elsewhere_is_refused(url: str, tmp_path: Path) -> None:
    fsspec.filesystem("memory").pipe("/bucket/model/unet/../../../evil.json", b"{}")
    with pytest.raises(InvalidJob, match="which would lie elsewhere here; remove it"):
        describe(ModelSpec(id=url))
    assert not list(tmp_path.rglob("evil.json"))
