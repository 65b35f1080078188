"""Linears for inference on CPU: the weight in the form that this processor multiplies fastest.

`PackedLinear`, where bf16 matmuls are native (AVX-512 BF16, AMX): oneDNN's blocked layout, chosen once. For one row it
reaches 95 % of the memory bandwidth (a plain bf16 linear 55 %), for a prompt 760 GFLOP/s (measured, 2 cores of Zen 5).

Where they are not (AVX2) torch emulates them. The weight stays shared there, so a tied head costs nothing:

`NativeLinear`: the own kernel up to `MANY_ROWS`, fp32 in tiles for more. One row takes half the time of torch's bf16
matmul, and 8 rows take 2.4 times as long as one (torch: 7 times; 9216 x 2304, measured on Zen 3).

`UpcastLinear`, without a C compiler: few rows go through torch's bf16 matrix-vector kernel, which is bound by memory;
many rows through fp32, the weight converted in tiles that fit the cache.

Legend: X rows (any leading dimensions), D in, F out, f a tile of F.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gemwright.ops import native
from gemwright.ops.cpu import has_fast_bf16

FEW_ROWS: Final = 3
"""Up to this many rows the bf16 kernel, whose time grows with each row, beats converting the weight (measured)."""
MANY_ROWS: Final = 128
"""Above this number of rows torch's fp32 matmul makes up for converting the weight, and the packed layout for AMX tiles
over the weight as it lies (measured)."""
TILE_BYTES: Final = 4 * 2**20
"""Bytes of fp32 weight converted at a time."""


class PackedLinear(nn.Module):
    """y = x W^T with W in oneDNN's packed layout; no gradient, not saved. `keep`: hold the weight as it lies, too."""

    def __init__(self, linear: nn.Linear, *, keep: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._weight_FD = linear.weight.detach() if keep else None
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())

    def forward(self, x_XD: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x_XD, self._packed, None, "none", [], "")
        return y


class UpcastLinear(nn.Module):
    """y = x W^T with W kept in bf16 and multiplied in fp32 where there are many rows; the result is rounded once."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = linear.weight

    def forward(self, x_XD: Tensor) -> Tensor:
        x = x_XD.reshape(-1, self.in_features)
        if len(x) <= FEW_ROWS:
            return F.linear(x_XD, self.weight)
        y = torch.empty(len(x), self.out_features)
        x32 = x.float()
        rows = max(64, TILE_BYTES // (4 * self.in_features))
        for start in range(0, self.out_features, rows):
            y[:, start : start + rows] = x32 @ self.weight[start : start + rows].float().T
        return y.to(x_XD.dtype).view(*x_XD.shape[:-1], self.out_features)


class NativeLinear(UpcastLinear):
    """y = x W^T with W kept in bf16 and read by the native kernel; no gradient."""

    def forward(self, x_XD: Tensor) -> Tensor:
        if x_XD.numel() > MANY_ROWS * self.in_features:
            return super().forward(x_XD)
        return native.linear(x_XD, self.weight)


def cpu_linear(linear: nn.Linear, *, keep: bool = False) -> nn.Module:
    """The module that computes this linear fastest on this processor; the linear itself where plain torch is that.

    `keep`: where that is a copy, hold the weight beside it, for `weight_of`.
    """
    dtype = linear.weight.dtype
    if has_fast_bf16() and dtype in (torch.bfloat16, torch.float32):
        return PackedLinear(linear, keep=keep)
    if dtype != torch.bfloat16:
        return linear
    return UpcastLinear(linear) if native.library() is None else NativeLinear(linear)


def weight_of(module: nn.Module) -> Tensor | None:
    """The weight [F, D], as it lies in memory, of a module that multiplies by it and does nothing else; else None."""
    if isinstance(module, PackedLinear):
        return module._weight_FD
    if type(module) in (UpcastLinear, NativeLinear) or (type(module) is nn.Linear and module.bias is None):
        weight = module.weight
        assert isinstance(weight, Tensor)
        return weight.detach() if type(weight) in (Tensor, nn.Parameter) else None
    return None


def most_rows(dtype: torch.dtype) -> int:
    """Rows up to which the native kernel over weights as they lie is level with `cpu_linear`'s form (measured)."""
    slow = dtype is not torch.bfloat16 or (has_fast_bf16() and not native.has_tiles())
    return FEW_ROWS if slow else MANY_ROWS
