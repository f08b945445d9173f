"""The slot loop by itself, with the fake model: what ends badly ends, and nobody waits for ever."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from oracle import row

from renderfarm.config import ModelSpec, Workers
from renderfarm.errors import Fatal, InvalidInput, RenderFailed
from renderfarm.models.catalog import describe
from renderfarm.models.fake import Fake, State
from renderfarm.records import Sample
from renderfarm.slots import SlotLoop

INFO = describe(ModelSpec(id="builtin:fake"))


class Trouble(Fake):
    """Prompts say what goes wrong, and where."""

    def __init__(self) -> None:
        super().__init__(INFO, Workers(batch_size=2))

    def slot_group(self, sample: Sample) -> Hashable:
        if sample.prompt == "group":
            raise TypeError("a text that the tokenizer does not take")
        return super().slot_group(sample)

    def step(self, states: Sequence[State]) -> list[bool]:
        if any(state.sample.prompt == "exit" for state in states):
            raise SystemExit(3)
        return super().step(states)


def rows(*prompts: str) -> list[Sample]:
    return [row(k, prompt=prompt, sampler="euler") for k, prompt in enumerate(prompts)]


def test_a_sample_whose_group_cannot_be_told_fails_alone() -> None:
    loop = SlotLoop(Trouble)
    good, bad, also_good = loop.submit(rows("one", "group", "two"))
    assert good.result(timeout=60).pixels.shape == also_good.result(timeout=60).pixels.shape == (32, 32, 3)
    with pytest.raises(RenderFailed, match="a text that the tokenizer does not take"):
        bad.result(timeout=60)
    loop.close()


def test_a_shape_in_which_places_decide_pixels_is_tried_once_and_its_samples_fail() -> None:
    tried = []

    class Cutting(Fake):
        def shape(self, sample: Sample) -> Hashable:
            return sample.height, sample.width

        def places_that_differ(self, sample: Sample) -> list[int]:
            tried.append(sample.height)
            return [1] if sample.height == 8 else []

    loop = SlotLoop(lambda: Cutting(INFO, Workers(batch_size=2)))
    small = [replace(one, height=8) for one in rows("one", "two", "three")]
    good, *bad = [loop.submit(rows("four"))[0], *loop.submit(small)]
    assert good.result(timeout=60).pixels.shape == (32, 32, 3)
    for future in bad:
        with pytest.raises(InvalidInput, match=r"^at 32×8 pixels .* other bits at 1 of 2 places .*workers.threads: 1 on a CPU"):
            future.result(timeout=60)
    loop.close()
    assert sorted(tried) == [8, 32]


def test_a_loop_that_ends_answers_whoever_waits_and_whoever_comes_later() -> None:
    loop = SlotLoop(Trouble)
    for future in [*loop.submit(rows("exit", "one", "two", "three")), *loop.submit(rows("four"))]:
        with pytest.raises(RuntimeError, match="the render thread ended: SystemExit: 3"):
            future.result(timeout=60)
    (late,) = loop.submit(rows("five"))
    with pytest.raises(RuntimeError, match="the render thread ended"):
        late.result(timeout=60)
    loop.close()


def test_a_model_that_cannot_be_loaded_answers_samples_too() -> None:
    def load() -> Any:
        raise Fatal("no such weights")

    loop = SlotLoop(load)
    with pytest.raises(Fatal, match="no such weights"):
        loop.ready.result(timeout=60)
    (future,) = loop.submit(rows("one"))
    with pytest.raises(RuntimeError, match="the render thread ended: Fatal: no such weights"):
        future.result(timeout=60)
    loop.close()


def test_loops_of_one_process_take_turns_and_none_starves() -> None:
    inside, most, order = 0, 0, []

    class Counting(Fake):
        def __init__(self, name: str) -> None:
            super().__init__(INFO, Workers(batch_size=1))
            self.name = name

        def step(self, states: Sequence[State]) -> list[bool]:
            nonlocal inside, most
            inside += 1
            most = max(most, inside)
            order.append(self.name)
            threading.Event().wait(0.002)
            inside -= 1
            return super().step(states)

    loops = [SlotLoop(lambda name=name: Counting(name)) for name in "ab"]  # type: ignore[misc]
    for loop in loops:
        loop.ready.result(timeout=60)
    for future in [future for loop in loops for future in loop.submit(rows(*["x"] * 20))]:
        future.result(timeout=120)
    for loop in loops:
        loop.close()
    assert most == 1
    changes = sum(first != second for first, second in itertools.pairwise(order))
    assert changes > len(order) / 2, "whoever waits is next"
