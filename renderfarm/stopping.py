"""Who asks a run to stop: the first time its leases in flight finish, the second time it ends at once.

Nothing is raised in a signal's handler: an exception inside one of Ray's own calls becomes another error.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

SAME_SIGNAL_S = 1.0
"""Within which two signals are one stop. Python hears a signal only between two calls, and the driver waits in Ray for half a second."""
STOPPING = "stopping: parts in flight are being finished (again, in a second or later: stop at once; nothing committed is lost)"


class Stop:
    """A handler of signals. `wanted` and `at_once` are what a run looks at."""

    def __init__(self, say: Callable[[str], None], third: Callable[[int, Any], Any]) -> None:
        """`say`: is told of the first request; `third`: called for each after the second, as a handler."""
        self.say, self.third = say, third
        self.wanted, self.at_once = threading.Event(), threading.Event()
        self._first = self._second = 0.0

    def __call__(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if not self.wanted.is_set():
            self._first = now
            self.wanted.set()
            self.say(STOPPING)
        # `timeout` and service managers signal a process and its group, so one stop may arrive twice
        elif self.at_once.is_set():
            if now - self._second > SAME_SIGNAL_S:
                self.third(number, frame)
        elif now - self._first > SAME_SIGNAL_S:
            self._second = now
            self.at_once.set()


@contextlib.contextmanager
def on_interrupt(say: Callable[[str], None]) -> Iterator[Stop]:
    """While it lasts, Ctrl-C, and a notebook's Interrupt, is a request to stop; the third one is what it was before. Only the main thread
    hears it: in another one nobody is listened to."""
    if threading.current_thread() is not threading.main_thread():
        yield Stop(say, lambda number, frame: None)
        return
    before = signal.getsignal(signal.SIGINT)
    stop = Stop(say, before if callable(before) else signal.default_int_handler)
    signal.signal(signal.SIGINT, stop)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
