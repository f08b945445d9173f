"""`builtin:fake`: a model without torch, for tests, load measurements and fault drills.

It paints the seed's random pixels and takes RENDERFARM_FAKE_STEP_S seconds per denoiser call (default 0); with
RENDERFARM_FAKE_MAX_PIXELS, larger pictures do not fit its device. Each row that is rendered becomes a line "ROW PROCESS" of the file
RENDERFARM_FAKE_LOG. Words in a prompt script a fault:

    [nan]      the picture is not finite         [crash]    the process is killed
    [oom]      the device has no room for it     [segv]     the process reads memory that is not its own
    [error]    an error that nobody foresaw      [hang]     a call into C that never returns and holds the interpreter
    [cuda]     the device's context breaks
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from renderfarm.config import Workers, fixed_batch_size
from renderfarm.errors import NonFiniteOutput, OutOfMemory
from renderfarm.models.base import Counted
from renderfarm.models.catalog import ModelInfo
from renderfarm.records import Sample

TEXT_LENGTH = 77


@dataclass
class State:
    sample: Sample
    steps_left: int


class Fake:
    cached_texts = 2048

    def __init__(self, info: ModelInfo, workers: Workers) -> None:
        self.batch_size, self.device = fixed_batch_size(workers), "cpu"
        self.step_seconds = float(os.environ.get("RENDERFARM_FAKE_STEP_S", "0"))
        self.log = os.environ.get("RENDERFARM_FAKE_LOG")
        self.max_pixels = float(os.environ.get("RENDERFARM_FAKE_MAX_PIXELS", "inf"))

    def synchronize(self) -> None:
        pass

    def profile(self) -> dict[str, Any]:
        return {"model": "builtin:fake", "batch_size": self.batch_size}

    def slot_group(self, sample: Sample) -> Hashable:
        return sample.height, sample.width

    def shape(self, sample: Sample) -> None:
        return None

    def texts(self, sample: Sample) -> tuple[str, ...]:
        return (sample.prompt,)

    def encode_texts(self, texts: Sequence[str]) -> list[Any]:
        return list(texts)

    def count_tokens(self, sample: Sample) -> Counted:
        words, negative = sample.prompt.split(), (sample.negative_prompt or "").split()
        return Counted(len(words) + 2, *(" ".join(text[TEXT_LENGTH - 2 :]) or None for text in (words, negative)))

    def start(self, sample: Sample, embeddings: Sequence[Any]) -> State:
        return State(sample, sample.num_inference_steps)

    def calls(self, state: State) -> int:
        return state.sample.num_inference_steps

    def step(self, states: Sequence[State]) -> list[bool]:
        time.sleep(self.step_seconds)
        for state in states:
            state.steps_left -= 1
            self._fault(state.sample)
        return [state.steps_left == 0 for state in states]

    def _fault(self, sample: Sample) -> None:
        prompt = sample.prompt
        if "[crash]" in prompt:
            os.kill(os.getpid(), signal.SIGKILL)
        if "[segv]" in prompt:
            ctypes.string_at(0)  # a signal that is sent would come to another thread, and this one go on
        if "[hang]" in prompt:
            ctypes.PyDLL(None).sleep(100_000)
        if "[oom]" in prompt or sample.height * sample.width > self.max_pixels:
            raise OutOfMemory("scripted: out of memory; lower workers.batch_size in a new output, or give the row a smaller size")
        if "[cuda]" in prompt:
            raise RuntimeError("CUDA error: scripted: an illegal memory access was encountered")
        if "[error]" in prompt:
            raise RuntimeError("scripted: something broke")

    def places_that_differ(self, sample: Sample) -> list[int]:
        return []

    def decode(self, state: State) -> np.ndarray:
        sample = state.sample
        if "[nan]" in sample.prompt:
            raise NonFiniteOutput("scripted: not a number")
        if self.log is not None:
            with open(self.log, "ab", buffering=0) as file:  # one write, so that lines of several processes do not mix
                file.write(f"{sample.key.row} {os.getpid()}\n".encode())
        random = np.random.default_rng(sample.seed)
        noise = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        return np.tile(noise, (sample.height // 8, sample.width // 8, 1))
