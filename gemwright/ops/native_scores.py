"""What blocked attention computes between two matmuls, in C: `native_scores.c` through ctypes, a pass each.

Scores stay as the matmul left them, bf16 or fp32, and become weights in place; the arithmetic is fp32. In torch the
same is ten operations, half of them conversions, which took a third of a training step on AMX.

Legend: Z batch rows times key heads, g query rows of one key head (group times tokens), s keys, B batch rows, t tokens.
"""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from gemwright.ops import native


class _Scores(ctypes.Structure):
    """The struct of the same name in native_scores.c."""

    _fields_ = (
        *((name, c_void_p) for name in ("raw", "d", "first", "last", "shift", "delta", "total")),
        *((name, c_int64) for name in ("rows", "s", "t", "group", "left", "right")),
        *((name, c_float) for name in ("scale", "cap")),
        *((name, c_int32) for name in ("bf16", "threads")),
    )


@dataclass(frozen=True, eq=False)
class Hidden:
    """Which keys of a block are hidden: masks [B, t, columns] of its first `left` keys and of those from `right` on."""

    first_Btl: Tensor
    last_Btr: Tensor
    left: int
    right: int


def weights_(raw_Zgs: Tensor, hidden: Hidden, shift_Zg: Tensor | None, *, scale: float, cap: float | None) -> Tensor:
    """Products q k become exp(score - shift), 0 where hidden; the sums of them, [Z, g] in fp32."""
    total_Zg = raw_Zgs.new_empty(raw_Zgs.shape[:2], dtype=torch.float32)
    _call(raw_Zgs, None, hidden, shift_Zg, None, total_Zg, scale, cap)
    return total_Zg


def gradient_(
    raw_Zgs: Tensor, d_Zgs: Tensor, hidden: Hidden, lse_Zg: Tensor, delta_Zg: Tensor, *, scale: float,
    cap: float | None,
) -> None:  # fmt: skip
    """Products q k become normalised weights, and d = d out . v the gradient by those products, both in place.

    Args:
        delta_Zg: d out . out of each query, fp32.
    """
    _call(raw_Zgs, d_Zgs, hidden, lse_Zg, delta_Zg, None, scale, cap)


def _call(
    raw_Zgs: Tensor,
    d_Zgs: Tensor | None,
    hidden: Hidden,
    shift_Zg: Tensor | None,
    delta_Zg: Tensor | None,
    total_Zg: Tensor | None,
    scale: float,
    cap: float | None,
) -> None:
    Z, g, s = raw_Zgs.shape
    B, t, left = hidden.first_Btl.shape
    assert hidden.last_Btr.shape == (B, t, s - hidden.right) and left == hidden.left <= hidden.right, hidden
    assert Z % B == 0 and g % t == 0, (raw_Zgs.shape, B, t)
    for scores in (raw_Zgs, d_Zgs):
        assert scores is None or (scores.is_contiguous() and scores.dtype == raw_Zgs.dtype), raw_Zgs.dtype
        assert scores is None or scores.shape == raw_Zgs.shape, scores.shape
    for row in (shift_Zg, delta_Zg, total_Zg):
        assert row is None or (row.dtype is torch.float32 and row.is_contiguous() and row.shape == (Z, g)), row
    for mask in (hidden.first_Btl, hidden.last_Btr):
        assert mask.dtype is torch.bool and mask.is_contiguous(), mask.dtype
    tensors = raw_Zgs, d_Zgs, hidden.first_Btl, hidden.last_Btr, shift_Zg, delta_Zg, total_Zg
    call = _Scores(
        *(None if x is None or not x.numel() else x.data_ptr() for x in tensors), Z * g, s, t, Z // B * g, left,
        hidden.right, scale, cap or 0.0, raw_Zgs.dtype is torch.bfloat16, torch.get_num_threads(),
    )  # fmt: skip
    native.kernels().scores(ctypes.byref(call))
