"""The C library's memory, for tensors that are made and freed thousands of times a second."""

from __future__ import annotations

import contextlib
import ctypes
import os
from typing import Any

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h
LARGEST_KEPT = 32 << 20  # the largest that glibc takes for the last of them; what is larger goes back to the system each time
HEAP = 64 << 20  # of a thread, at most; with so much to spare none is given back that is free as a whole
KEPT = 1 << 30
"""Bytes of freed memory at the end of the process's first heap, from which on they go back to the system."""
OF_THE_USER = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_THRESHOLD_")


def keep_freed_memory() -> None:
    """Have glibc keep what tensors free, until `give_back_memory`; the setting is the process's until it ends. By default it gives much of
    it back, and the system hands it out again page by page, each one cleared first: on a CPU up to a tenth of the time, and as much as the
    order of a process's first allocations decides. Whoever has said otherwise in the environment, or has another allocator or C library,
    keeps what they have.
    """
    if any(name in os.environ for name in OF_THE_USER) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    with contextlib.suppress(AttributeError, OSError, TypeError):
        libc = _libc()
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT)
        libc.mallopt(M_TRIM_THRESHOLD, KEPT)
        libc.mallopt(M_TOP_PAD, HEAP)


def give_back_memory() -> None:
    """What is free in all heaps by now, to the system: after something large is over, as loading is."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        _libc().malloc_trim(0)


def _libc() -> Any:
    return ctypes.CDLL(None)
