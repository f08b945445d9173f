"""A short piece of `make chaos`: kills behind a store that loses replies and answers 503."""

from __future__ import annotations

from pathlib import Path

import pytest
from chaos_rounds import Figures, Round, store

pytestmark = pytest.mark.chaos


def test_a_round_of_kills_behind_the_fault_proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "DEFAULT_REGION"):
        monkeypatch.setenv(f"AWS_{name}", "")  # `store` sets them; put back afterwards
    figures = Figures()
    with store(tmp_path, seed=0) as proxy:
        one = Round(3, 0, tmp_path, proxy, on_s3=1.0)
        assert one.kinds == ["stop run", "kill driver"]
        assert one.live(figures) == "inline, S3: stop run, kill driver"
    assert (figures.rounds, figures.lost, figures.twice, figures.wrong) == (1, 0, 0, 0)
