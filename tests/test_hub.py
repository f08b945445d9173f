"""Models from the hub: pinned, fetched once per node, found again without it; and what goes wrong on the way."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from checker import image_rows
from hub import COMMIT, served

import renderfarm

UNWANTED = {"README.md", "v1-5.safetensors", "v1-5.ckpt", *(f"unet/diffusion_pytorch_model.{end}" for end in ("bin", "fp16.safetensors"))}
UNET = "unet/diffusion_pytorch_model.safetensors"
FIND = f"""
import sys
from renderfarm.config import ModelSpec
from renderfarm.models.sources import find_model
print(find_model(ModelSpec(id="org/name", revision={COMMIT!r}), weights=True))
"""
AGAIN = """
import json, renderfarm
from renderfarm.jobfile import load_job
from renderfarm.verification import Choice, verify
def again(job, out, verified):
    assert renderfarm.run(load_job(job, out=out), engine="inline").images == 2
    print(json.dumps([one.result for one in verify(verified, Choice(all=True)).again]))
again"""
Client = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def published(tiny_model: Callable[[str], Path], tmp_path: Path) -> Path:
    """A tiny model as people publish them: with other formats, single files and documentation beside it."""
    folder = Path(shutil.copytree(tiny_model("sd"), tmp_path / "published"))
    for name in (
        "README.md",
        "v1-5.safetensors",
        "v1-5.ckpt",
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.fp16.safetensors",
    ):
        (folder / name).write_bytes(b"x" * 100)
    return folder


@pytest.fixture
def client(tmp_path: Path) -> Client:
    """A process with a cache of the test's own, which reads the hub's address when it starts."""

    def run(*arguments: str, hub: Any, **environment: str) -> subprocess.CompletedProcess[str]:
        plain = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        mine = {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": hub if isinstance(hub, str) else hub.url, "PYTHONWARNINGS": "ignore"}
        return subprocess.run([sys.executable, *arguments], env=plain | mine | environment, capture_output=True, text=True, timeout=300)

    return run


@pytest.fixture
def job(write_manifest: Callable[..., Path], write_job: Callable[..., Path]) -> Callable[..., str]:
    def write(**changes: Any) -> str:
        model = {"id": "org/name", "revision": COMMIT, **changes}
        manifest = write_manifest({"prompt": ["a", "b"], "seed": [1, 2]})
        return str(write_job(manifest, model=model, render={"num_inference_steps": 2}, workers={"batch_size": 2}))

    return write


def test_a_model_is_fetched_once_and_rendered_again_and_verified_without_the_hub(
    published: Path, client: Client, job: Callable[..., str], tmp_path: Path, write_job: Callable[..., Path]
) -> None:
    with served(published) as hub:
        first = client("-m", "renderfarm", "run", job(), "--engine", "inline", "--json", hub=hub)
        assert first.returncode == 0, first.stderr
        fetched = hub.fetched()
    wanted = {path.relative_to(published).as_posix() for path in published.rglob("*") if path.is_file()}
    wanted -= {
        "README.md",
        "v1-5.safetensors",
        "v1-5.ckpt",
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.fp16.safetensors",
    }
    assert sorted(fetched) == sorted(wanted), "each file once"
    again = client("-c", f"{AGAIN}({job()!r}, {str(tmp_path / 'again')!r}, {str(tmp_path / 'out')!r})", hub=hub)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout.splitlines()[-1]) == ["identical"] * 2
    renderfarm.run(write_job(tmp_path / "prompts.parquet", model=str(published), workers={"batch_size": 2},
                             render={"num_inference_steps": 2}, output={"path": str(tmp_path / "plain")}), engine="inline")  # fmt: skip
    pixels = [[record["pixel_sha256"] for record in image_rows(tmp_path / name)] for name in ("out", "again", "plain")]
    assert pixels[0] == pixels[1] == pixels[2]


def test_planning_fetches_configurations_only(published: Path, client: Client, job: Callable[..., str]) -> None:
    with served(published) as hub:
        assert client("-m", "renderfarm", "plan", job(), hub=hub).returncode == 0
        assert {name.rpartition("/")[2] for name in hub.fetched()} == {
            *("model_index.json", "config.json", "scheduler_config.json", "tokenizer_config.json")
        }


def test_workers_of_one_node_that_start_together_fetch_each_file_once(published: Path, client: Client) -> None:
    with served(published, delay_s=0.3) as hub, ThreadPoolExecutor(3) as pool:
        ended = list(pool.map(lambda _: client("-c", FIND, hub=hub), range(3)))
        assert [one.returncode for one in ended] == [0, 0, 0], ended[0].stderr
        assert len({one.stdout for one in ended}) == 1
        assert len(hub.fetched()) == len(set(hub.fetched())) > 9


def test_a_download_that_is_cut_off_goes_on_where_it_ended(published: Path, client: Client) -> None:
    with served(published, cut={UNET: 2}) as hub:
        ended = client("-c", FIND, hub=hub)
        assert ended.returncode == 0, ended.stderr
        assert hub.fetched().count(UNET) == 3
    assert (Path(ended.stdout.strip()) / UNET).read_bytes() == (published / UNET).read_bytes()


def test_a_server_that_cuts_off_each_answer_and_begins_anew_is_given_up(published: Path, client: Client) -> None:
    """The hub's client would try for ever: it counts attempts that bring nothing."""
    pieces = "import huggingface_hub.constants as c; c.DOWNLOAD_CHUNK_SIZE = 100_000\n"
    with served(published, cut={UNET: 1 << 30}, ranges=False) as hub:
        ended = client("-c", pieces + FIND, hub=hub)
        assert hub.fetched().count(UNET) == 4
    assert "CutOff: model org/name" in ended.stderr
    assert "the connection was cut in the middle of a file 3 times; run again to go on" in ended.stderr


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], int, str]] = {
    # faults of the hub, what the job says, exit code, message
    "no such commit": ({}, {"revision": "f" * 40}, 2, "the hub has no commit ffff"),
    "no such model": ({}, {"id": "org/other"}, 2, "model org/other: the hub has no such model; check the id"),
    "gated": ({"status": 403, "code": "GatedRepo"}, {}, 4, "accept the model's terms on its page, and set HF_TOKEN"),
    "not allowed": ({"token": "hf_right"}, {}, 4, "set HF_TOKEN to a token that may read it, on every node"),
    "always cut off": ({"cut": {UNET: 1 << 30}}, {}, 4, "peer closed connection .*; run again to go on"),
    "another byte": ({"bad": {UNET}}, {}, 4, "these files are not what the hub has; remove them and run again: /"),
    "another hash": ({}, {"sha256": "0" * 64}, 4, r"and the job asks for 000"),
    "no such variant": ({}, {"variant": "bf16"}, 2, r"no component has the variant bf16 .*; variants that there are: fp16"),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if "always" in name else name for name in REFUSED])
def test_what_goes_wrong_ends_with_one_message_before_a_row_is_rendered(
    name: str, published: Path, client: Client, job: Callable[..., str], tmp_path: Path
) -> None:
    faults, changes, code, message = REFUSED[name]
    with served(published, **faults) as hub:
        ended = client("-m", "renderfarm", "run", job(**changes), "--engine", "inline", hub=hub, HF_TOKEN="hf_canary")
    said = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert ended.returncode == code, ended.stderr
    assert len(said) == 1
    assert "Traceback" not in ended.stderr
    assert re.search(message, said[0]), ended.stderr
    assert "hf_canary" not in ended.stderr + ended.stdout
    assert not list(tmp_path.glob("out/data/**/*.png"))


def test_of_a_component_from_the_hub_only_its_own_files_are_fetched(
    published: Path, client: Client, tiny_model: Callable[[str], Path]
) -> None:
    script = f"""
from renderfarm.jobfile import model_spec
from renderfarm.models.sources import find_model
print(find_model(model_spec({str(tiny_model("sd"))!r}, ["vae=org/name@{COMMIT}/vae"]), weights=True))
"""
    with served(published) as hub:
        ended = client("-c", script, hub=hub)
        assert ended.returncode == 0, ended.stderr
        assert [name for name in hub.fetched() if not name.endswith(".json")] == ["vae/diffusion_pytorch_model.safetensors"]
    assert "/hf/hub/" in str((Path(ended.stdout.strip()) / "vae").resolve())
    assert (Path(ended.stdout.strip()) / "unet").resolve() == tiny_model("sd") / "unet"


@pytest.mark.slow  # its client waits between its attempts
def test_a_hub_that_is_away_for_the_moment_is_said_and_the_next_run_goes_on(
    published: Path, client: Client, job: Callable[..., str]
) -> None:
    away = client("-m", "renderfarm", "plan", job(), hub="http://127.0.0.1:9")
    assert away.returncode == 4
    assert "model org/name: cannot be fetched at" in away.stderr
    assert "run again to go on" in away.stderr
    with served(published, token="hf_right") as hub:
        assert client("-m", "renderfarm", "plan", job(), hub=hub, HF_TOKEN="hf_right").returncode == 0


def test_a_model_that_is_not_here_while_the_hub_is_not_to_be_asked_is_said(client: Client, job: Callable[..., str]) -> None:
    offline = client("-m", "renderfarm", "plan", job(), hub="http://127.0.0.1:9", HF_HUB_OFFLINE="1")
    assert offline.returncode == 4
    assert "HF_HUB_OFFLINE forbids to fetch it" in offline.stderr
