"""Any other text-to-image class of diffusers, called as it is; nothing was compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from renderfarm.models.base import Counted
from renderfarm.models.calls import State, WholeCall
from renderfarm.records import Sample


class Generic(WholeCall):
    text_length = 0  # not known

    def count_tokens(self, sample: Sample) -> Counted:
        tokenizer = getattr(self.pipe, "tokenizer", None)
        return Counted(0 if tokenizer is None else len(tokenizer(sample.prompt).input_ids))

    def _arguments(self, states: Sequence[State]) -> dict[str, Any]:
        return {name: value for name, value in super()._arguments(states).items() if name in self.taken}
