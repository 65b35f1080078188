"""What this processor's matrix units do well, asked of torch once where a path is chosen; pages for large tensors."""

from __future__ import annotations

import ctypes
import mmap
import platform
import sys
from functools import cache
from typing import Final

import psutil
import torch
from torch import Tensor


def has_fast_bf16() -> bool:
    """Whether bf16 matmuls run natively (AVX-512 BF16 or AMX).

    Without them a bf16 matmul on x86 is an emulation: 10 GFLOP/s against 100 in fp32 on two AVX2 cores (measured,
    torch 2.13), so paths that read many rows go through fp32.
    """
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


RESERVED: Final = 0.5
"""Share of the free memory that `keep_memory` sets aside, in addresses, not in pages."""
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of glibc's mallopt; a threshold of -1 is never reached."""


@cache
def keep_memory() -> bool:
    """From now on this process keeps the memory that its tensors leave and gives it to later ones; True where it does.

    glibc returns every large block to the kernel, and the next operation pays for fresh pages again, which costs a
    training step as much as its arithmetic (1380 tokens/s, 2360 without, 32M parameters on two cores). So nothing is
    mapped or trimmed any more, and what the heap will grow into is asked to come in pages of 2 MiB. Of the process as
    a whole, and not undone.
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    if not (libc.mallopt(M_MMAP_MAX, 0) and libc.mallopt(M_TRIM_THRESHOLD, -1)):
        return False
    size = int(RESERVED * psutil.virtual_memory().available)
    block = libc.malloc(size)
    if block:  # freed untouched, it stays on top of the heap
        _advise(libc, block, size)
        libc.free(block)
    return True


def on_huge_pages(x: Tensor) -> Tensor:
    """The same tensor, just made and not yet touched: on Linux its memory will come in pages of 2 MiB where it may.

    A fresh page of 4 KiB costs a microsecond or two, for a head's gradient of 1.2 GB half a second (measured).
    """
    if x.device.type == "cpu" and sys.platform == "linux":
        _advise(ctypes.CDLL(None), x.data_ptr(), x.nbytes)
    return x


def _advise(libc: ctypes.CDLL, address: int, size: int) -> None:
    """Ask for huge pages; a kernel that cannot give them says so, and nothing is lost."""
    first = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    if address + size > first:
        libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(address + size - first), mmap.MADV_HUGEPAGE)
