"""What the first worker measures on its device: the B that gives most images per second (`batch_size: auto`), and how
long an image takes (`part_rows: auto`). Both are found once and then kept."""

from __future__ import annotations

import contextlib
import time
from typing import Any

from renderfarm.errors import OutOfMemory, RenderfarmError
from renderfarm.models.base import SlotModel
from renderfarm.records import Sample

CANDIDATES = (1, 2, 4, 8, 16, 32, 64)
WORTH_IT = 1.05  # a larger B must give 5 % more: it takes memory, and more of it is filler where rows are few
WARM_UP, MEASURED = 1, 2  # denoiser calls


def best_batch_size(model: SlotModel, sample: Sample) -> int:
    """Try candidates from small to large until one is not worth it or does not fit. Leaves the model at the best one.

    `sample`: what the job's rows look like by default; it must have more than WARM_UP + MEASURED steps.
    """
    best, best_rate = CANDIDATES[0], 0.0
    for size in CANDIDATES:
        model.batch_size = size
        try:
            rate = _steps_per_second(model, sample)[0]
        except (OutOfMemory, RuntimeError):  # torch reports some kinds of too much as a bare RuntimeError
            if size == CANDIDATES[0]:
                raise
            break
        if rate < best_rate * WORTH_IT:
            break
        best, best_rate = size, rate
    model.batch_size = best
    return best


def seconds_per_image(model: SlotModel, sample: Sample) -> float:
    """With every slot full: `sample`'s share of the denoiser calls of all its steps, and its decoding."""
    rate, state = _steps_per_second(model, sample)
    started = time.perf_counter()
    with contextlib.suppress(RenderfarmError):  # it is not finished: a filter or a check may well refuse what it shows
        model.decode(state)
    return sample.num_inference_steps / rate + time.perf_counter() - started


def _steps_per_second(model: SlotModel, sample: Sample) -> tuple[float, Any]:
    """Steps of samples, summed over all slots, in a second; and the state of one such sample."""
    embeddings = [model.encode_texts([text])[0] for text in model.texts(sample)]
    states = [model.start(sample, embeddings) for _ in range(model.batch_size)]
    for _ in range(WARM_UP):
        model.step(states)
    model.synchronize()
    started = time.perf_counter()
    for _ in range(MEASURED):
        model.step(states)
    model.synchronize()
    return model.batch_size * MEASURED / (time.perf_counter() - started), states[0]
