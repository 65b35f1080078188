"""NF4 with double quantization (QLoRA, arXiv 2305.14314): the frozen base under a LoRA adapter, in 4.13 bits a weight.

A weight is cut, row after row, into blocks of 64. A block has one scale, its largest magnitude, and each of its weights
is one of 16 levels times that: the quantiles of a normal distribution, with an exact zero. Scales are quantized in
turn: their mean is taken off, and blocks of 256 of what is left become 8-bit integers times an fp32 step.

    weight = LEVELS[code] * (offset + step * scale)          4 + 8 / 64 + 32 / (64 * 256) bits a weight

`Nf4Linear` computes in the dtype of its input. The whole weight exists in that dtype only while one product runs:
forward keeps nothing of it, backward (to the input alone, the base is frozen) makes it again.

Legend: X any leading dimensions, D in, F out, n weights in blocks (b blocks), P packed bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gemwright.ops import native
from gemwright.ops.fuse import fused

LEVELS: Final = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""Quantiles of N(0, 1) over the largest, seven below zero and eight above (appendix E)."""
BLOCK: Final = 64
"""Weights of one scale."""
SCALES: Final = 256
"""Scales of one step."""
PIECE: Final = 2**16
"""Blocks that are quantized at a time: their fp32 copy and codes take 50 MB."""


@dataclass(frozen=True, eq=False)
class Nf4:
    """A quantized tensor."""

    packed_P: Tensor
    """uint8, two codes a byte, the first in the upper four bits; the last block is filled up with zeros."""
    scales: Tensor
    """int8 [steps, SCALES]: one for each block, the last row filled up with zeros."""
    steps: Tensor
    """fp32, one for SCALES scales."""
    offset: Tensor
    """fp32, 0-d: the mean of the scales."""
    shape: tuple[int, ...]


def quantize(weight: Tensor) -> Nf4:
    """The nearest level of each weight; computed in fp32, piece by piece.

    Raises ValueError for a weight that is not finite: it has no scale.
    """
    pieces = [_quantize(piece_bk) for piece_bk in _pieces(weight)]
    packed_P, absmax_b = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    if not bool(absmax_b.isfinite().all()):
        raise ValueError("quantize: got a weight that is not finite, allowed are finite numbers")
    offset = absmax_b.mean()
    rest_bs = F.pad(absmax_b - offset, (0, -len(absmax_b) % SCALES)).view(-1, SCALES)
    steps = rest_bs.abs().amax(-1) / 127
    scales = (rest_bs / steps.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).round().to(torch.int8)
    return Nf4(packed_P, scales, steps, offset, tuple(weight.shape))


def _pieces(weight: Tensor) -> Iterator[Tensor]:
    """Blocks of a weight in fp32, some at a time."""
    for part in torch.split(weight.detach().flatten(), PIECE * BLOCK):
        yield F.pad(part.float(), (0, -len(part) % BLOCK)).view(-1, BLOCK)


def _quantize(weight_bk: Tensor) -> tuple[Tensor, Tensor]:
    """Packed codes, and the largest magnitude of each block."""
    levels = torch.tensor(LEVELS, device=weight_bk.device)
    absmax_b = weight_bk.abs().amax(-1)
    relative_bk = weight_bk / absmax_b.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    codes_n = torch.bucketize(relative_bk, (levels[1:] + levels[:-1]) / 2, out_int32=True).to(torch.uint8).flatten()
    return (codes_n[::2] << 4) | codes_n[1::2], absmax_b


def dequantize(nf4: Nf4, dtype: torch.dtype) -> Tensor:
    """The weight in `dtype`, rounded once from fp32."""
    absmax_b = torch.addcmul(nf4.offset, nf4.steps[:, None], nf4.scales).flatten()[: 2 * len(nf4.packed_P) // BLOCK]
    if absmax_b.is_cpu and dtype in (torch.bfloat16, torch.float32) and native.library() is not None:
        weight_n = native.nf4(nf4.packed_P, torch.tensor(LEVELS), absmax_b, dtype)
    else:
        weight_n = _weights(nf4.packed_P, absmax_b, dtype)
    return weight_n[: torch.Size(nf4.shape).numel()].view(nf4.shape)


@fused
def _weights(packed_P: Tensor, absmax_b: Tensor, dtype: torch.dtype) -> Tensor:
    """The weights of whole blocks, flat."""
    levels = torch.tensor(LEVELS, device=packed_P.device)
    codes_P2 = torch.stack((packed_P >> 4, packed_P & 15), dim=-1)
    return (levels[codes_P2.int()].view(-1, BLOCK) * absmax_b[:, None]).to(dtype).flatten()


class Nf4Linear(nn.Module):
    """A frozen linear whose weight is held in NF4."""

    packed_P: Tensor
    scales: Tensor
    steps: Tensor
    offset: Tensor

    def __init__(self, nf4: Nf4) -> None:
        super().__init__()
        self.out_features, self.in_features = nf4.shape
        for name in ("packed_P", "scales", "steps", "offset"):
            self.register_buffer(name, getattr(nf4, name))

    def quantized(self) -> Nf4:
        """The weight as it is held."""
        shape = self.out_features, self.in_features
        return Nf4(self.packed_P, self.scales, self.steps, self.offset, shape)

    def forward(self, x_XD: Tensor) -> Tensor:
        """x W^T in the dtype of x, or autocast's."""
        y_XF: Tensor = _Linear.apply(x_XD, *vars(self.quantized()).values())  # type: ignore[no-untyped-call]
        return y_XF

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}"


class _Linear(torch.autograd.Function):
    """F.linear over a weight that is made for each product."""

    @staticmethod
    def forward(ctx: Any, x_XD: Tensor, *parts: Any) -> Tensor:
        ctx.save_for_backward(*parts[:-1])
        ctx.shape = parts[-1]
        device = x_XD.device.type
        ctx.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_XD.dtype
        ctx.came = x_XD.dtype
        return F.linear(x_XD.to(ctx.dtype), dequantize(Nf4(*parts), ctx.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_XF: Tensor) -> tuple[Tensor | None, ...]:
        packed_P, scales, steps, offset = ctx.saved_tensors
        weight_FD = dequantize(Nf4(packed_P, scales, steps, offset, ctx.shape), ctx.dtype)
        return (d_XF.to(ctx.dtype) @ weight_FD).to(ctx.came), None, None, None, None, None


def make(name: str, linear: nn.Linear) -> nn.Module:
    """The linear in NF4, on the same device; for `swap`."""
    return Nf4Linear(quantize(linear.weight))
