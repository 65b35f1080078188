"""What this processor's matrix units do well, asked of torch once where a path is chosen."""

from __future__ import annotations

import torch


def has_fast_bf16() -> bool:
    """Whether bf16 matmuls run natively (AVX-512 BF16 or AMX).

    Without them a bf16 matmul on x86 is an emulation: 10 GFLOP/s against 100 in fp32 on two AVX2 cores (measured,
    torch 2.13), so paths that read many rows go through fp32.
    """
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
