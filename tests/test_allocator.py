"""What the C library does with memory that tensors free."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from renderfarm.models.allocator import OF_THE_USER

# In a thread, as a worker renders: its heap is not the process's first one
WORK = """
import resource, sys, threading
import torch
from renderfarm.models.allocator import give_back_memory, keep_freed_memory

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
    many = [torch.ones(16 << 18) for _ in range(40)]
    del many
    print(resident())
    give_back_memory()
    print(resident())

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() >> 20

keep_freed_memory()
thread = threading.Thread(target=work)
thread.start()
thread.join()
"""


def work(**environment: str) -> tuple[int, int, int]:
    """Pages that the system handed out once more in 20 times 104 MB; MB resident when 640 MB are freed, and when they were given back."""
    clean = {name: value for name, value in os.environ.items() if name not in (*OF_THE_USER, "GLIBC_TUNABLES", "LD_PRELOAD")}
    done = subprocess.run([sys.executable, "-c", WORK], env=clean | environment, capture_output=True, text=True, check=True)
    faults, kept, given_back = map(int, done.stdout.split())
    return faults, kept, given_back


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps memory in its own way")
def test_freed_memory_is_kept_until_it_is_given_back_unless_the_user_says_otherwise() -> None:
    faults, kept, given_back = work()
    faults_of_the_user, kept_by_the_user, _ = work(MALLOC_TRIM_THRESHOLD_="131072")
    if faults_of_the_user < 20 * (104 << 20) / 4096 / 2:
        pytest.skip(f"the system hands memory out in larger pages ({faults_of_the_user} of them), so that there is little to see")
    assert faults < faults_of_the_user / 50
    assert kept > kept_by_the_user + 500
    assert given_back < kept - 500
