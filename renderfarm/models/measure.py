"""What a worker finds out on its device before its first lease: whether the job's attention backend works there, whether a
sample's place in the batch decides its pixels, and, if it is the first, the B that gives most images per second
(`batch_size: auto`) and how long an image takes (`part_rows: auto`). The last two are found once and then kept."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from renderfarm.errors import Fatal, InvalidInput, OutOfMemory, RenderfarmError
from renderfarm.models.base import SlotModel
from renderfarm.records import Sample

CANDIDATES = (1, 2, 4, 8, 16, 32, 64)
WORTH_IT = 1.05  # a larger B must give 5 % more: it takes memory, and more of it is filler where rows are few
WARM_UP, MEASURED = 1, 2  # denoiser calls


def check_places(model: SlotModel, sample: Sample) -> None:
    """Raise Fatal where a denoiser call gives a sample other bits at another place in the batch, or cannot be made.

    It happens where kernels cut a batch in the middle of a sample or of a vector, which depends on B, threads, device
    and libraries: there no row would keep its pixels.
    """
    try:
        places = model.places_that_differ(sample)
    except InvalidInput:
        return  # rows that are too large for the device, or wrong in another way, say so themselves
    except Exception as error:  # torch and diffusers raise what they like; no row is to blame
        raise Fatal(
            f"the model cannot render a trial sample of {sample.width}×{sample.height} pixels here: {type(error).__name__}: {error}; "
            "do its files, and this machine's libraries, fit together?"
        ) from error
    if places:
        raise Fatal(
            f"the denoiser gives a sample other bits at {len(places)} of {model.batch_size} places of its batch "
            f"(at {sample.width}×{sample.height} pixels on this device), so rows would not keep their pixels; "
            "set another workers.batch_size (1 always works), or workers.threads: 1 on a CPU"
        )


def check_attention(model: SlotModel, sample: Sample, backend: str) -> None:
    """Raise Fatal where this backend cannot compute the model's attention: its dtypes, masks and head sizes, only a call tells."""
    try:
        model.places_that_differ(sample)
    except OutOfMemory:
        return  # as above
    except Exception as error:  # each backend refuses in its own way
        raise Fatal(f"workers.attention_backend {backend} cannot render this model here: {error}; give another one") from error


def best_batch_size(model: SlotModel, sample: Sample) -> int:
    """Try candidates from small to large until one is not worth it or does not fit. Leaves the model at the best one."""
    best, best_rate = CANDIDATES[0], 0.0
    for size in CANDIDATES:
        model.batch_size = size
        try:
            rate = size / _step_for_a_while(model, sample)[0]
        except (OutOfMemory, RuntimeError):  # with a smaller batch it went well, so there is too much of something
            if size == CANDIDATES[0]:
                raise
            break
        if rate < best_rate * WORTH_IT:
            break
        best, best_rate = size, rate
    model.batch_size = best
    return best


def seconds_per_image(model: SlotModel, sample: Sample, after: Callable[[np.ndarray], object] = lambda pixels: pixels) -> float | None:
    """With every slot full: its share of all its denoiser calls, its decoding, and what comes `after` that in the same
    thread. None where there is no room for it, or the sample cannot be rendered."""
    try:
        seconds, state = _step_for_a_while(model, sample)
        for _ in range(2):  # the first decoding warms up
            started = time.perf_counter()
            with contextlib.suppress(RenderfarmError):  # it is not finished: a filter or a check may well refuse it
                after(model.decode(state))
            decoding = time.perf_counter() - started
    except InvalidInput:
        return None
    return model.calls(state) * seconds / model.batch_size + decoding


def _step_for_a_while(model: SlotModel, sample: Sample) -> tuple[float, Any]:
    """Seconds of a denoiser call with every slot full, and one of its states."""
    enough = replace(sample, num_inference_steps=max(WARM_UP + MEASURED + 1, sample.num_inference_steps))
    embeddings = [model.encode_texts([text])[0] for text in model.texts(enough)]
    states = [model.start(enough, embeddings) for _ in range(model.batch_size)]
    for _ in range(WARM_UP):
        model.step(states)
    model.synchronize()
    started = time.perf_counter()
    for _ in range(MEASURED):
        model.step(states)
    model.synchronize()
    return (time.perf_counter() - started) / MEASURED, states[0]
