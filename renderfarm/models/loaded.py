"""A diffusers pipeline, loaded for exactness: what every family shares, however it is batched."""

from __future__ import annotations

from abc import ABC
from typing import Any

import torch

from renderfarm.config import Workers, fixed_batch_size
from renderfarm.errors import Fatal
from renderfarm.models.catalog import ModelInfo
from renderfarm.models.torch_setup import describe_profile, prepare_torch


class LoadedPipeline(ABC):
    """`pipeline`: diffusers' class. `text_length`: positions that the longest text encoder reads."""

    pipeline: Any
    text_length: int

    def __init__(self, info: ModelInfo, workers: Workers) -> None:
        self.info, self.workers, self.batch_size = info, workers, fixed_batch_size(workers)
        self.device = prepare_torch(workers)
        self.dtype: torch.dtype = getattr(torch, workers.dtype)
        assert info.folder is not None
        try:
            self.pipe = self.pipeline.from_pretrained(
                info.folder, dtype=self.dtype, use_safetensors=True, local_files_only=True, **self._load_arguments()
            ).to(self.device)
        except Exception as error:  # damaged weights raise many kinds; none of them is the row's fault
            raise Fatal(f"model {info.id}: cannot be loaded from {info.folder}: {error}") from error

    def _load_arguments(self) -> dict[str, Any]:
        return {}

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def profile(self) -> dict[str, Any]:
        # names with `_` are diffusers' own notes, one of them a list in hash order
        scheduler = {key: value for key, value in self.pipe.scheduler.config.items() if not key.startswith("_")}
        own = {"text_length": self.text_length, "vae_slicing": True, "scheduler": scheduler, "safety_checker": self.info.safety_checker}
        return describe_profile(self.info, self.workers, self.device) | own | {"batch_size": self.batch_size}
