"""What the C library does with memory that tensors free."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

# In a thread, as a worker renders: its heap is not the process's first one
WORK = """
import resource, sys, threading
import torch
from renderfarm.models.allocator import keep_freed_memory

def work():
    def once():
        for size in (4, 24, 8, 16):
            some = [torch.zeros(size << 18) for _ in range(2)]
    for _ in range(3):
        once()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        once()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

keep_freed_memory()
thread = threading.Thread(target=work)
thread.start()
thread.join()
"""


def faults(**environment: str) -> int:
    """Pages that the system handed out once more, in 20 times 104 MB."""
    done = subprocess.run([sys.executable, "-c", WORK], env={**os.environ, **environment}, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps memory in its own way")
def test_freed_memory_is_kept_unless_the_user_says_otherwise() -> None:
    kept, by_default = faults(), faults(MALLOC_TRIM_THRESHOLD_="131072")
    assert by_default > 20 * (104 << 20) / 4096 / 2, "what is given back is handed out page by page"
    assert kept < by_default / 50
