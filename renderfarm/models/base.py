"""What the slot loop needs of a model family. Shapes: B slots, H×W pixels, h×w latents, L text positions."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from renderfarm.records import Sample


@dataclass(frozen=True)
class Counted:
    """`tokens`: of the whole prompt, with specials. `cut_off`, `negative_cut_off`: the exact ends that do not fit; None
    where all of it does, or where there is no negative prompt to read."""

    tokens: int
    cut_off: str | None = None
    negative_cut_off: str | None = None

    def columns(self) -> dict[str, Any]:
        """What the image table says of it."""
        return {
            "prompt_tokens": self.tokens,
            "prompt_truncated": self.cut_off is not None,
            "prompt_cut_off": self.cut_off,
            "negative_prompt_cut_off": self.negative_cut_off,
        }


class SlotModel(Protocol):
    """A loaded pipeline, used by one thread only. `batch_size` may be set until the first sample is rendered.

    A *state* is one sample's own scheduler, generator, latents and place in its timesteps: everything that its
    pixels depend on besides the weights. A sample is finished when `step` says so; then `decode` gives its pixels.
    """

    batch_size: int
    device: str
    cached_texts: int
    """How many texts' embeddings the loop keeps for samples to come."""

    def synchronize(self) -> None:
        """Return when the device has done all that it was given."""

    def profile(self) -> dict[str, Any]:
        """Everything besides the row that decides pixels, as JSON values."""

    def slot_group(self, sample: Sample) -> Hashable:
        """What must be equal for samples to share denoiser calls."""

    def texts(self, sample: Sample) -> tuple[Hashable, ...]:
        """The texts whose embeddings `start` needs, in its order: a string, or a tuple of one for each text encoder."""

    def encode_texts(self, texts: Sequence[Any]) -> list[Any]:
        """Embeddings of at most B such texts, computed at the constant shape B×L."""

    def count_tokens(self, sample: Sample) -> Counted:
        """What the model's longest text encoder reads of the sample's texts, and what it does not see."""

    def start(self, sample: Sample, embeddings: Sequence[Any]) -> Any:
        """A new state."""

    def calls(self, state: Any) -> int:
        """Denoiser calls that a state needs from its beginning to its end."""

    def step(self, states: Sequence[Any]) -> list[bool]:
        """One denoiser call for 1 to B states of one slot group, at the constant shape B; True: finished."""

    def shape(self, sample: Sample) -> Hashable | None:
        """What decides how kernels cut its denoiser calls; None where that is known to decide no pixel."""

    def places_that_differ(self, sample: Sample) -> list[int]:
        """Of the B places of a denoiser call, those that give this sample other bits than place 0, or than beside other
        samples; none where exact."""

    def decode(self, state: Any) -> np.ndarray:
        """H×W×3 uint8 of a finished state. Raises NonFiniteOutput instead of painting NaN as black."""
