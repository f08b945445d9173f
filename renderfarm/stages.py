"""How long a part took in each stage, for its index entry: plain seconds, one after the other, whose sum is the part's time.

    prepare   rows become samples, their images are fetched
    wait      for a slot: behind the parts before it, which is meant, since the slots must never run dry
    render    from the first sample in a slot to the last one's pixels
    encode    what is left of it then; most of it is done beside rendering
    put       the commit object, its views

A worker has several parts at once, so that one renders while others wait, encode or are put.
"""

from __future__ import annotations

import itertools
import threading
import time
from concurrent.futures import Future
from typing import Any

from renderfarm.slots import Rendered

STAGES = ("prepare", "wait", "render", "encode", "put")


class Stopwatch:
    """One part's. Each stage ends where the next one begins; one that never came takes no time."""

    def __init__(self) -> None:
        self._began, self._start = time.time(), time.monotonic()
        self._prepared = self._encoded = self._start
        self._entered: float | None = None
        self._rendered: float | None = None
        self._lock = threading.Lock()

    def prepared(self) -> None:
        self._prepared = time.monotonic()

    def rendered(self, sample: Future[Rendered]) -> None:
        """A sample has ended, in the render thread."""
        with self._lock:
            self._rendered = time.monotonic()
            if sample.exception() is None and (entered := sample.result().entered) is not None:
                self._entered = entered if self._entered is None else min(entered, self._entered)

    def encoded(self) -> None:
        self._encoded = time.monotonic()

    def entry(self) -> dict[str, Any]:
        """`began`: seconds since 1970, by this machine's clock. `seconds`: of each stage, until now."""
        marks = [self._start, self._prepared, self._entered, self._rendered, self._encoded, time.monotonic()]
        ends = itertools.accumulate((mark or 0.0 for mark in marks), max)
        lengths = [round(end - begin, 4) for begin, end in itertools.pairwise(ends)]
        return {"began": round(self._began, 3), "seconds": dict(zip(STAGES, lengths, strict=True))}
