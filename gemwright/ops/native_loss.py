"""What the losses compute between two products of the head, in C: `native_loss.c` through ctypes, a pass each.

A chunk's products stay as the matmul left them, bf16 or fp32; each pass makes the logits of them again, which costs
less than to write and read them in fp32. The passes sum in fp32 and round a gradient once.

For autograd functions, which differentiate by hand. Legend: X tokens (x in a chunk), V vocabulary, K ids of a token.
"""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int64, c_void_p
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from gemwright.ops import native

KINDS: Final = {"forward_kl": 0, "reverse_kl": 1, "jsd": 2, "soft_cross_entropy": 3}


class _Side(ctypes.Structure):
    """The struct `side` of native_loss.c."""

    _fields_ = (
        *((name, c_void_p) for name in ("raw", "top", "log_sum")), ("stride", c_int64), ("cap", c_float),
        ("inverse", c_float),
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Side:
    """A head's products of a chunk, how they become logits, and what the logits sum to."""

    raw_xV: Tensor
    top_x1: Tensor
    """The largest logit of each token, fp32."""
    log_sum_x1: Tensor
    """log sum exp(logit - top), fp32."""
    cap: float | None
    temperature: float

    def pointer(self) -> object:
        """The struct, by reference."""
        _check(self.raw_xV, self.top_x1, self.log_sum_x1)
        tensors = (x.data_ptr() for x in (self.raw_xV, self.top_x1, self.log_sum_x1))
        return ctypes.byref(_Side(*tensors, self.raw_xV.stride(0), self.cap or 0.0, 1 / self.temperature))


def _check(raw_xV: Tensor, *columns_x1: Tensor) -> bool:
    """Whether products, rows of whatever length in one piece, are bf16; beside them lie whole columns in fp32."""
    assert raw_xV.dtype in (torch.bfloat16, torch.float32) and raw_xV.is_cpu, raw_xV.dtype
    assert raw_xV.stride(1) == 1 or raw_xV.shape[1] == 1, raw_xV.stride()
    for x_x1 in columns_x1:
        assert x_x1.dtype is torch.float32 and x_x1.is_contiguous() and x_x1.shape == (len(raw_xV), 1), x_x1.shape
    return raw_xV.dtype is torch.bfloat16


def logits(raw: Tensor, *, cap: float | None, temperature: float) -> Tensor:
    """Logits in fp32 of products of any shape."""
    raw = raw.contiguous()
    assert raw.dtype in (torch.bfloat16, torch.float32) and raw.is_cpu, raw.dtype
    out = torch.empty_like(raw, dtype=torch.float32)
    bf16 = raw.dtype is torch.bfloat16
    native.kernels().logits_of(raw.data_ptr(), out.data_ptr(), raw.numel(), cap or 0.0, 1 / temperature, bf16)
    return out


def read(raw_xV: Tensor, *, cap: float | None, temperature: float) -> Side:
    """Products with the largest logit of each token and log sum exp(logit - largest)."""
    bf16, top_x1 = _check(raw_xV), raw_xV.new_empty(len(raw_xV), 1, dtype=torch.float32)
    sum_x1 = torch.empty_like(top_x1)
    native.kernels().logits_read(
        raw_xV.data_ptr(), top_x1.data_ptr(), sum_x1.data_ptr(), *raw_xV.shape, raw_xV.stride(0), cap or 0.0,
        1 / temperature, bf16, torch.get_num_threads(),
    )  # fmt: skip
    return Side(raw_xV, top_x1, sum_x1.log_(), cap, temperature)


def entropy(side: Side) -> Tensor:
    """-sum p log p of each token, [x], fp32."""
    out_x = side.top_x1.new_empty(len(side.raw_xV))
    bf16 = side.raw_xV.dtype is torch.bfloat16
    native.kernels().logits_entropy(side.pointer(), out_x.data_ptr(), *side.raw_xV.shape, bf16, torch.get_num_threads())
    return out_x


def gradient_(side: Side, weight_x1: Tensor, ids_xK: Tensor, mass_xK: Tensor) -> Tensor:
    """Products become the gradient by them of weight * lse + sum_k mass * logit[id]; an id may stand twice."""
    raw_xV, K = side.raw_xV, ids_xK.shape[1]
    ids_xK, mass_xK = ids_xK.contiguous(), mass_xK.contiguous()
    weight_x1 = weight_x1.contiguous()
    bf16 = _check(raw_xV, weight_x1)
    assert ids_xK.dtype is torch.int64 and mass_xK.dtype is torch.float32 and ids_xK.shape == mass_xK.shape, mass_xK
    assert not ids_xK.numel() or (int(ids_xK.min()) >= 0 and int(ids_xK.max()) < raw_xV.shape[1]), "an id past V"
    held_xK = logits(raw_xV.gather(1, ids_xK), cap=side.cap, temperature=side.temperature)
    native.kernels().logits_gradient(
        side.pointer(), weight_x1.data_ptr(), ids_xK.data_ptr(), mass_xK.data_ptr(), held_xK.data_ptr(), *raw_xV.shape,
        K, bf16, torch.get_num_threads(),
    )  # fmt: skip
    return raw_xV


def _kind(kind: str, beta: float) -> tuple[int, float]:
    """The kernel's branch; JSD at its ends is one of the KLs."""
    if kind == "jsd" and beta in (0, 1):
        kind = "reverse_kl" if beta else "forward_kl"
    return KINDS[kind], beta if kind == "jsd" else 0.5


def compare(ours: Side, theirs: Side, kind: str, beta: float) -> tuple[Tensor, Tensor]:
    """The divergence of each token, and the sum of its g, [x, 1] each, as `divergence.py` has them."""
    value_x1, total_x1 = torch.empty_like(ours.top_x1), torch.empty_like(ours.top_x1)
    native.kernels().divergence_compare(
        ours.pointer(), theirs.pointer(), value_x1.data_ptr(), total_x1.data_ptr(), *_shape(ours, theirs),
        *_kind(kind, beta), ours.raw_xV.dtype is torch.bfloat16, torch.get_num_threads(),
    )  # fmt: skip
    return value_x1, total_x1


def divergence_gradient_(
    ours: Side, theirs: Side, kind: str, beta: float, total_x1: Tensor, weight_x1: Tensor
) -> Tensor:
    """Our products become the gradient by them of weight * divergence; `total` is the sum of g."""
    total_x1, weight_x1 = total_x1.contiguous(), weight_x1.contiguous()
    bf16 = _check(ours.raw_xV, total_x1, weight_x1)
    native.kernels().divergence_gradient(
        ours.pointer(), theirs.pointer(), total_x1.data_ptr(), weight_x1.data_ptr(), *_shape(ours, theirs),
        *_kind(kind, beta), bf16, torch.get_num_threads(),
    )  # fmt: skip
    return ours.raw_xV


def _shape(ours: Side, theirs: Side) -> torch.Size:
    one, other = ours.raw_xV, theirs.raw_xV
    assert one.shape == other.shape and one.dtype == other.dtype, (one.shape, other.shape, one.dtype, other.dtype)
    return one.shape
