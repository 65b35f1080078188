"""What this processor's matrix units do well, asked of torch once where a path is chosen; pages for large tensors."""

from __future__ import annotations

import ctypes
import mmap
import sys

import torch
from torch import Tensor


def has_fast_bf16() -> bool:
    """Whether bf16 matmuls run natively (AVX-512 BF16 or AMX).

    Without them a bf16 matmul on x86 is an emulation: 10 GFLOP/s against 100 in fp32 on two AVX2 cores (measured,
    torch 2.13), so paths that read many rows go through fp32.
    """
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def on_huge_pages(x: Tensor) -> Tensor:
    """The same tensor, just made and not yet touched: on Linux its memory will come in pages of 2 MiB where it may.

    A fresh page of 4 KiB costs a microsecond or two, for a head's gradient of 1.2 GB half a second (measured).
    """
    if x.device.type == "cpu" and sys.platform == "linux":
        first = -(-x.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        length = x.data_ptr() + x.nbytes - first
        if length > 0:  # advice: a kernel that cannot take it says so, and nothing is lost
            ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), mmap.MADV_HUGEPAGE)
    return x
