"""Shared parts of the tests: one private Ray per session, small manifests, jobs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

if TYPE_CHECKING:
    from servers import FaultProxy

# how long an example takes says something of the machine, and machines are shared
hypothesis.settings.register_profile("renderfarm", deadline=None)
hypothesis.settings.load_profile("renderfarm")

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "pink", "cyan")


# By pipeline class: whether each comparison with diffusers' own pixels passed, as the tests name them by `record_property`.
COMPARED: dict[str, list[bool]] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", metavar="FILE", help="write which classes gave diffusers' own pixels, and with which versions")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.failed:
        for name, class_name in report.user_properties:
            if name == "compared":
                COMPARED.setdefault(str(class_name), []).append(report.passed)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if file := session.config.getoption("--record"):
        classes = {name: len(passed) for name, passed in sorted(COMPARED.items()) if all(passed)}
        versions = {name: version(name).partition("+")[0] for name in ("torch", "diffusers", "transformers")}
        Path(file).write_text(json.dumps([{"device": "cpu", **versions, "comparisons": classes}], indent=2) + "\n")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Whatever the test before has told torch, which is for the process: references are computed on one thread."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """One Ray for the session, private to it; the Ray engine uses it instead of starting its own."""
    import ray

    folder = tempfile.mkdtemp(prefix="rft-")  # short: it holds Unix sockets, whose paths are limited
    ray.init(
        address="local",
        _temp_dir=folder,
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=256 << 20,
        _system_config={"metrics_report_interval_ms": 2000},  # ten seconds, which a test would wait for
    )
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=["inline", "ray"])
def engine(request: pytest.FixtureRequest) -> str:
    """The contract suite runs on every engine."""
    if request.param == "ray":
        request.getfixturevalue("local_ray")
    return str(request.param)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family's tiny model, by its name in `BUILDERS`, built on first use."""
    import call_families
    import families

    root, builders = tmp_path_factory.mktemp("models"), families.BUILDERS | call_families.BUILDERS
    return lambda name: families.build(builders[name], root / name)


@pytest.fixture(scope="session")
def model(tiny_model: Callable[[str], Path]) -> Iterator[Callable[..., Any]]:
    """`oracle.Model`s of families by name and dtype, each loaded once."""
    from oracle import Model

    made: dict[tuple[str, str], Model] = {}
    yield lambda name, dtype="float32": made.setdefault((name, dtype), Model(name, tiny_model(name), dtype))
    for one in made.values():
        one.close()


@pytest.fixture(scope="session")
def _moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    from servers import moto

    with moto(tmp_path_factory.mktemp("moto")) as endpoint:
        yield endpoint


@pytest.fixture(scope="session")
def _azurite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    from servers import azurite, azurite_missing

    if reason := azurite_missing():
        pytest.skip(reason)
    with azurite(tmp_path_factory.mktemp("azurite")) as connection:
        yield connection


@pytest.fixture
def s3(_moto: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of a new bucket; the environment leads every client to it."""
    import boto3

    for name, value in {"ACCESS_KEY_ID": "test", "SECRET_ACCESS_KEY": "test", "DEFAULT_REGION": "us-east-1", "ENDPOINT_URL": _moto}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    for name in ("CONFIG_FILE", "SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(f"AWS_{name}", os.devnull)
    bucket = f"b{uuid.uuid4().hex[:12]}"
    boto3.client("s3").create_bucket(Bucket=bucket)
    return f"s3://{bucket}"


@pytest.fixture
def azure(_azurite: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of a new container; the environment leads every client to it."""
    from azure.storage.blob import ContainerClient

    container = f"c{uuid.uuid4().hex[:12]}"
    with ContainerClient.from_connection_string(_azurite, container) as client:
        client.create_container()
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", _azurite)
    return f"az://{container}"


@pytest.fixture
def faults(s3: str, _moto: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """Between the clients and the server of `s3`."""
    from servers import FaultProxy

    with FaultProxy(_moto) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


@pytest.fixture
def write_manifest(tmp_path: Path) -> Callable[..., Path]:
    """Write a Parquet manifest; without columns, eight rows about coloured circles."""

    def write(columns: dict[str, Any] | None = None, name: str = "prompts.parquet", **options: Any) -> Path:
        columns = columns or {
            "id": [f"p{k}" for k in range(8)],
            "prompt": [f"a large {colour} circle on a white background" for colour in COLOURS],
            "category": ["warm" if colour in ("red", "yellow", "orange", "pink") else "cold" for colour in COLOURS],
        }
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), path, **options)
        return path

    return write


@pytest.fixture
def write_job(tmp_path: Path) -> Callable[..., Path]:
    """Write a job file for a manifest, with the fake model and small parts unless told otherwise."""

    def write(manifest: Path | dict[str, Any], name: str = "job.yaml", **changes: Any) -> Path:
        job: dict[str, Any] = {
            "version": 1,
            "name": "test",
            "manifest": manifest if isinstance(manifest, dict) else str(manifest),
            "model": "builtin:fake",
            "render": {"num_inference_steps": 3},
            "workers": {"batch_size": 4},
            "output": {"path": str(tmp_path / "out"), "part_rows": 3},
        }
        for key, value in changes.items():
            job[key] = {**job[key], **value} if isinstance(job.get(key), dict) and isinstance(value, dict) else value
        path = tmp_path / name
        path.write_text(yaml.safe_dump(job))
        return path

    return write


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """How much was simulated, whichever process did it."""
    passed = terminalreporter.stats.get("passed", [])
    total = sum((Counter(value) for report in passed for name, value in report.user_properties if name == "schedules"), Counter())
    if total:
        terminalreporter.write_line(f"simulated: {', '.join(f'{count} × {name}' for name, count in total.items())}")


@pytest.fixture(autouse=True)
def handlers_of_signals() -> Iterator[None]:
    """A command that a test calls in this process leaves its own: it would end soon."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)
