"""Another clock for one module of the package: threads of other tests, which may still be ending, keep the process's."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest


def own_time(monkeypatch: pytest.MonkeyPatch, module: str, **changes: Callable[..., Any]) -> None:
    """`own_time(monkeypatch, "renderfarm.waiting", sleep=…)`: that module's `time.sleep`, and nobody else's."""
    monkeypatch.setattr(importlib.import_module(module), "time", SimpleNamespace(**{**vars(time), **changes}))
