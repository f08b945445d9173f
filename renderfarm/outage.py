"""A store that is away, as the driver's loop sees it: asked now and then, so that the loop goes on, and given up in the end."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from renderfarm.errors import Expired, Interrupted, Transient

ASKED_S = 5.0
"""Patience with each request in between: what fails now and then must not keep many requests from ending together."""
GIVEN_UP_S = 900.0
RENEWAL_S = 3600.0  # with credentials that have expired: people renew them
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 20.0

T = TypeVar("T")


class Outage:
    """Of one store; `trouble`: why it cannot be asked, for as long as it cannot."""

    def __init__(self) -> None:
        self.trouble: Transient | None = None
        self.since = self._again_at = self._pause = 0.0

    def ask(self, do: Callable[[], T]) -> T:
        """What `do` says. Raises Transient where the store is away, without asking it while a pause lasts; Interrupted once it has been
        away for too long."""
        if self.trouble is not None and time.monotonic() < self._again_at:
            raise type(self.trouble)(str(self.trouble))
        try:
            answer = do()
        except Transient as error:
            self._failed(error)
            raise
        self.trouble = None
        return answer

    def _failed(self, error: Transient) -> None:
        now = time.monotonic()
        if self.trouble is None:
            self.since, self._pause = now, FIRST_PAUSE_S
        self.trouble = error
        if is_given_up(error, self.since):
            raise given_up(error, self.since) from error
        self._again_at, self._pause = now + self._pause, min(LONGEST_PAUSE_S, 2 * self._pause)


def is_given_up(error: Transient, since: float) -> bool:
    return time.monotonic() - since > (RENEWAL_S if isinstance(error, Expired) else GIVEN_UP_S)


def given_up(error: Transient, since: float) -> Interrupted:
    return Interrupted(f"{error}; this has gone on for {time.monotonic() - since:.0f} s: run the same command again when it is over")
