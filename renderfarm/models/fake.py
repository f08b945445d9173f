"""`builtin:fake`: a model without torch, for tests, load measurements and fault drills.

It paints the seed's random pixels over a plain colour and takes RENDERFARM_FAKE_STEP_S seconds per denoiser call
(default 0). Words in a prompt script a fault: `[nan]`, `[oom]`, `[error]`, `[crash]` (the process dies).
"""

from __future__ import annotations

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
            if "[crash]" in state.sample.prompt:
                os.kill(os.getpid(), signal.SIGKILL)
            if "[oom]" in state.sample.prompt:
                raise OutOfMemory("scripted: out of memory")
            if "[error]" in state.sample.prompt:
                raise RuntimeError("scripted: something broke")
        return [state.steps_left == 0 for state in states]

    def places_that_differ(self, sample: Sample) -> list[int]:
        return []

    def decode(self, state: State) -> np.ndarray:
        sample = state.sample
        if "[nan]" in sample.prompt:
            raise NonFiniteOutput("scripted: not a number")
        random = np.random.default_rng(sample.seed)
        noise = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        return np.tile(noise, (sample.height // 8, sample.width // 8, 1))
