"""Seeds: a row's own, or derived from (job seed, row id, image index) so that nothing else can move them."""

from __future__ import annotations

import hashlib
from typing import Literal

MAX_SEED = 2**63 - 1  # int64 in the tables; torch.Generator takes it
SeedPolicy = Literal["derive", "same"]


def sample_seed(policy: SeedPolicy, job_seed: int, row_id: str, row_seed: int | None, image_index: int) -> int:
    """The seed of image `image_index`.

    A row's own seed counts up per image, as A1111, ComfyUI and InvokeAI do. Else `same` counts up from the job's
    seed in every row, and `derive` takes the first 32 bits of SHA-256 over the identity.
    """
    if row_seed is not None:
        return row_seed + image_index
    if policy == "same":
        return job_seed + image_index
    digest = hashlib.sha256(f"{job_seed}\x00{row_id}\x00{image_index}".encode()).digest()
    return int.from_bytes(digest[:4], "big")
