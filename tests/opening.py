"""What the tests of manifests share: open one as the engine does, read it whole, get the message that refuses it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from renderfarm.config import ManifestSpec
from renderfarm.errors import InvalidJob
from renderfarm.manifest import Manifest, open_manifest

SUPPORTED = frozenset(
    "id prompt negative_prompt seed num_images_per_prompt height width num_inference_steps guidance_scale sampler".split()  # noqa: SIM905
)
Write = Callable[..., Path]


def opened(path: Any, **spec: Any) -> Manifest:
    paths = [str(one) for one in path] if isinstance(path, list) else str(path)
    return open_manifest(ManifestSpec(path=paths, **spec), SUPPORTED)


def table(manifest: Manifest) -> pa.Table:
    return pa.concat_tables(manifest.stream([(0, manifest.rows)]))


def rows(path: Any, **spec: Any) -> dict[str, list[Any]]:
    values: dict[str, list[Any]] = table(opened(path, **spec)).to_pydict()
    return values


def refusal(path: Any, **spec: Any) -> str:
    with pytest.raises(InvalidJob) as caught:
        opened(path, **spec)
    return str(caught.value)
