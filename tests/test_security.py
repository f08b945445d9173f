"""A manifest is data: nothing in it is executed, and what could execute it is never imported."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).parent.parent
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
