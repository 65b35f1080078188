"""Memory on a CPU: what tensors leave stays with the process, and large tensors come in large pages.

Each case in a process of its own, since what the allocator is told holds for the whole of it.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gemwright.ops.cpu import on_huge_pages

ROOT = Path(__file__).resolve().parent.parent

FAULTS = """
import json, resource
import torch
from gemwright.ops.cpu import keep_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

torch.set_num_threads(1)
before = resident()
kept = {kept}
reserved = resident() - before
for i in range(3):
    start = faults()
    torch.ones(2**24 - 2**14 * i)  # 64 MiB; less each time, since glibc's aligned blocks are larger than their holes
print(json.dumps([kept, faults() - start, reserved]))
"""

needs_glibc = pytest.mark.skipif(
    sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="it is glibc that returns memory"
)


def faults_of_a_tensor(call: str) -> tuple[bool, int, int]:
    """Whether memory is kept, fresh pages of the third tensor, bytes that became resident by asking."""
    done = subprocess.run(
        [sys.executable, "-c", FAULTS.replace("{kept}", call)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    kept, faults, reserved = json.loads(done.stdout)
    return kept, faults, reserved


@needs_glibc
def test_memory_is_kept() -> None:
    """A tensor after a larger one of 64 MiB meets no fresh page; without, 16384 of them, or 32 huge ones."""
    kept, faults, reserved = faults_of_a_tensor("keep_memory()")
    assert kept
    assert faults < 100
    assert reserved < 2**25, "what is set aside is addresses, not pages"
    assert faults_of_a_tensor("False")[1] > faults + 20


@pytest.mark.parametrize("size", [0, 1, 5000, 2**22])
def test_huge_pages_change_no_tensor(size: int) -> None:
    x = on_huge_pages(torch.arange(size))
    assert torch.equal(x, torch.arange(size))
