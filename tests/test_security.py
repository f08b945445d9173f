"""A manifest is data: nothing in it is executed, and what could execute it is never imported."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from checker import error_rows, image_rows
from covering import only
from pictures_given import encoded, picture
from servers import answering
from test_input_urls import Site

ROOT = Path(__file__).parent.parent
CANARY = "canary5d1f"  # stands in each secret
Write = Callable[..., Path]


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return open, (str(self.path), "w")


def test_a_manifest_with_pickles_in_extension_types_executes_nothing(write_job: Write, tmp_path: Path) -> None:
    fired = tmp_path / "fired"
    payload = pickle.dumps(Bomb(fired))
    crafted = [
        pa.field("prompt", pa.string()),
        *(
            pa.field(f"x{k}", pa.binary(), metadata={"ARROW:extension:name": name, "ARROW:extension:metadata": payload})
            for k, name in enumerate(("ray.data.arrow_pickled_object", "ray.data.arrow_tensor", "arrow.py_extension_type"))
        ),
    ]
    path = tmp_path / "crafted.parquet"
    pq.write_table(pa.table([["a circle"], [payload], [payload], [payload]], schema=pa.schema(crafted)), path)
    script = (
        "import sys, renderfarm\n"
        f"summary = renderfarm.run({str(write_job(path))!r}, engine='ray')\n"
        "assert summary.images == 1, summary\n"
        f"assert len(list(renderfarm.open({str(tmp_path / 'out')!r}))) == 1\n"
        "print('RAY DATA', 'ray.data' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "RAY DATA False"
    assert not fired.exists()
    pickle.loads(payload).close()  # noqa: S301 - the payload is live: it would have fired
    assert fired.exists()


def test_no_module_and_no_test_imports_ray_data() -> None:
    needles = ["import ray" + ".data", "from ray" + ".data", "from ray import" + " data"]
    sources = [path for folder in ("renderfarm", "tests", "manifests") for path in (ROOT / folder).rglob("*.py")]
    assert len(sources) > 40
    assert [str(path) for path in sources if any(needle in path.read_text() for needle in needles)] == []


def held(folder: Path) -> dict[str, str]:
    """What each file below a folder holds, as text; tables are opened, as their pages are compressed."""
    found = {}
    for path in (path for path in folder.rglob("*") if path.is_file()):
        text = f"{path.relative_to(folder)} " + path.read_bytes().decode("latin-1")
        if path.suffix == ".parquet":
            table = pq.read_table(path)
            text += f" {table.to_pylist()} {table.schema.metadata}"
        found[str(path.relative_to(folder))] = text
    return found


@pytest.fixture
def server() -> Iterator[str]:
    with answering(Site) as url:
        yield url.removeprefix("http://")


@pytest.mark.parametrize("engine", only(["inline"], ["inline", "ray"]))
def test_secrets_of_the_environment_and_of_urls_are_in_no_file_and_in_nothing_that_is_said(
    engine: str, tiny_model: Callable[[str], Path], write_manifest: Write, write_job: Write, tmp_path: Path, server: str
) -> None:
    secret = tmp_path / f"{CANARY}-token/data"
    secret.mkdir(parents=True)
    (secret / "models").symlink_to(tiny_model("sd").parent)
    (secret / "a.png").write_bytes(encoded(picture(1)))
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "MY_PASSWORD")
    environment = {name: f"{CANARY}-{name}" for name in names} | {"DATA": str(secret)}
    pages = {
        "ok.png": "",
        "an é.png": "",
        "inside": "",
        "gone": "answered 404",
        "text": "is no PNG, JPEG, WEBP file",
        "busy": "answered 503",
        "away": "not a URL that the job allows",
        "nowhere": "is no URL",
    }
    images = {f"http://{server}/pub/{page}?signature={CANARY}#{CANARY}": reason for page, reason in pages.items()}
    images |= {f"http://u:{CANARY}@{server}/pub/ok.png": "not a URL that the job allows", f"http://[?{CANARY}": "is no URL"}
    images |= {"gone.png": "does not exist; paths start at data/"}
    count = len(images) + 1
    columns = {"prompt": ["a red circle"] * count, "image": ["a.png", *images], "id": [f"id-{k}" for k in range(count)]}
    write_manifest(columns, str(secret.relative_to(tmp_path) / "m.parquet"))
    path = write_job(
        Path("${DATA}/m.parquet"), model="${DATA}/models/sd",
        inputs={"folder": "${DATA}", "urls": [f"http://{server}/pub/"], "private_addresses": True},
        render={"height": 32, "width": 32, "num_inference_steps": 2, "sampler": "euler"},
    )  # fmt: skip
    said = ""
    others = (
        [
            ["validate", path],
            ["plan", path],
            ["models", "--job", path],
            *([command, tmp_path / "out"] for command in ("status", "watch", "logs")),
        ]
        if engine == "inline"
        else []
    )
    for command in [["run", path, "--engine", engine], *others]:
        line = [sys.executable, "-m", "renderfarm", *map(str, command)]
        done = subprocess.run(line, capture_output=True, text=True, env=os.environ | environment)
        assert done.returncode in (0, 3), done.stderr
        said += done.stdout + done.stderr
    out = tmp_path / "out"
    assert len(image_rows(out)) == 4
    for error in error_rows(out):
        assert images[list(images)[error["row"] - 1]] in error["error_message"]
    files = held(out)
    assert any("id-3" in text for name, text in files.items() if name.endswith(".parquet")), "tables are read"
    assert any(name.startswith("_renderfarm/logs/") and "committed" in text for name, text in files.items())
    assert {"_renderfarm/job.json", "_renderfarm/profile.json", "_renderfarm/progress.json", "README.md"} <= files.keys()
    assert [name for name, text in files.items() if CANARY in text] == []
    assert [line for line in said.splitlines() if CANARY in line] == []
