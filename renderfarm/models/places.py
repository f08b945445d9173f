"""Whether a sample's place in the batch, or what lies beside it, decides its bits: one call with copies of it, one among others."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, TypeVar

import torch

from renderfarm.records import Sample

State = TypeVar("State")


def mate_of(sample: Sample) -> Sample:
    """The same but for its noise."""
    return replace(sample, seed=sample.seed ^ 1)


def mates(state: State, mate: State, batch_size: int) -> list[State]:
    """A batch in which the state has every other place."""
    return [mate if place % 2 else state for place in range(batch_size)]


def differing(calls: Iterable[tuple[Any, Any]], batch_size: int) -> list[int]:
    """Places whose rows are not what they should be. `calls`: what the denoiser gave for copies alone, and for `mates`; B rows,
    or a multiple of them where guidance makes several passes of one call."""
    found = set()
    for alike, mixed in calls:
        for row, (one, again) in enumerate(zip(alike, mixed, strict=True)):
            place = row % batch_size
            if not torch.equal(one, alike[row - place]) or (place % 2 == 0 and not torch.equal(one, again)):
                found.add(place)
    return sorted(found)
