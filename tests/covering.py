"""Which cases of a cross product `make test` runs; `make test-all` runs the others, too, which are marked slow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import combinations
from typing import Any

import pytest


def covering(cases: Iterable[Any], together: int = 1) -> list[Any]:
    """The cases for `parametrize`. Not slow are as many as it takes for each `together` values that some case has together
    to be in one of them: with 1 each value is seen, with 2 each pair of values.

    covering([("sd", "fp32"), ("sd", "bf16"), ("lcm", "fp32"), ("lcm", "bf16")]): ("sd", "fp32") and ("lcm", "bf16") stay.
    """
    cases = [case if isinstance(case, tuple) else (case,) for case in cases]
    parts = [{(places, tuple(case[k] for k in places)) for places in combinations(range(len(case)), together)} for case in cases]
    left, used, kept = set().union(*parts), Counter[Any](), set[int]()
    while left:
        best = max(range(len(cases)), key=lambda k: (len(parts[k] & left), -sum(used[value] for value in enumerate(cases[k]))))
        kept.add(best)
        left -= parts[best]
        used.update(enumerate(cases[best]))
    return [pytest.param(*case, marks=[] if k in kept else pytest.mark.slow) for k, case in enumerate(cases)]


def only(kept: Iterable[Any], cases: Iterable[Any]) -> list[Any]:
    """The cases for `parametrize`: those of `kept`, and the others as slow ones."""
    kept = list(kept)
    assert all(case in cases for case in kept), "what is kept is one of them"  # type: ignore[operator]
    values = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*case, marks=[] if (case if len(case) > 1 else case[0]) in kept else pytest.mark.slow) for case in values]
