"""Attention on AMX tiles, forward and backward: `native_flash.c` through ctypes, where blocked attention is asked for.

Scores stay in fp32 and in the caches; `attention_blocked.py` writes a block's products to memory, rounded to bf16, and
reads them three times.

Legend: B rows, T queries, S keys, N query heads, K key/value heads, H head dim.
"""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p
from typing import Any, Final

import torch
from torch import Tensor

from gemwright.ops import native
from gemwright.ops.attention import Visibility

FEWEST: Final = 16
"""Queries of a row from which on tiles are filled well enough."""
DEEP: Final = 32
"""The head dim is a multiple of it."""
SAFE_CAP: Final = 60.0
"""exp(60) summed over 2^20 keys is still below fp32's maximum, so no largest score is needed."""
ANY: Final = 2**31 - 1
"""The window of a global layer."""


class _Flash(ctypes.Structure):
    """The struct of the same name in native_flash.c."""

    _fields_ = (
        *((name, c_void_p) for name in ("q", "k", "v", "dout", "attended", "out", "dk", "dv", "lse")),
        *((name, c_void_p) for name in ("q_pos", "k_pos", "q_doc", "k_doc")),
        *((name, c_int64) for name in ("B", "T", "S", "N", "K", "H", "window")),
        *((name, c_float) for name in ("scale", "cap")),
        ("threads", c_int32),
    )


def fits(device: torch.device, dtype: torch.dtype, head_dim: int, cap: float | None) -> bool:
    """Whether the kernel is made for such a model: bf16, a CPU with matrix tiles, no cap or one that bounds scores."""
    plain = device.type == "cpu" and dtype is torch.bfloat16 and head_dim % DEEP == 0
    return plain and (cap is None or cap <= SAFE_CAP) and native.has_tiles()


def serves(q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, cap: float | None) -> bool:
    """Whether the kernel computes this."""
    plain = all(type(x) is Tensor and x.dtype == q_BTNH.dtype for x in (q_BTNH, k_BSKH, v_BSKH))
    whole = plain and q_BTNH.shape[1] >= FEWEST and not torch.compiler.is_compiling()
    return whole and fits(q_BTNH.device, q_BTNH.dtype, q_BTNH.shape[-1], cap)


def flash(
    q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, see: Visibility, *, scale: float, cap: float | None
) -> Tensor:  # fmt: skip
    """Attention [B, T, N, H]; see `ops.attention.reference` for the definition."""
    if torch.is_grad_enabled() and (q_BTNH.requires_grad or k_BSKH.requires_grad or v_BSKH.requires_grad):
        out_BTNH: Tensor = _Function.apply(q_BTNH, k_BSKH, v_BSKH, see, scale, cap)  # type: ignore[no-untyped-call]
        return out_BTNH
    q, k, v = (x.contiguous() for x in (q_BTNH, k_BSKH, v_BSKH))
    return _forward(q, k, v, see, scale, cap)[0]


class _Function(torch.autograd.Function):
    """Keeps q, k, v, the output and the log-sum-exp."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, see: Visibility, scale: float, cap: float | None) -> Tensor:
        q, k, v = (x.contiguous() for x in (q, k, v))
        out, lse = _forward(q, k, v, see, scale, cap)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.see, ctx.scale, ctx.cap = see, scale, cap
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        tensors = {"dout": grads[0].contiguous(), "attended": out, "out": dq, "dk": dk, "dv": dv, "lse": lse}
        _call(q, k, v, tensors, ctx.see, ctx.scale, ctx.cap)
        return dq, dk, dv, None, None, None


def _forward(
    q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, see: Visibility, scale: float, cap: float | None
) -> tuple[Tensor, Tensor]:
    """The output and the log-sum-exp of each query's scores, [B, N, T]; -inf where it sees nothing."""
    B, T, N, _ = q_BTNH.shape
    out_BTNH, lse_BNT = torch.empty_like(q_BTNH), q_BTNH.new_empty(B, N, T, dtype=torch.float32)
    _call(q_BTNH, k_BSKH, v_BSKH, {"out": out_BTNH, "lse": lse_BNT}, see, scale, cap)
    return out_BTNH, lse_BNT


def _call(
    q_BTNH: Tensor,
    k_BSKH: Tensor,
    v_BSKH: Tensor,
    others: dict[str, Tensor],
    see: Visibility,
    scale: float,
    cap: float | None,
) -> None:
    """`others`: what else is read and what is written, by the names in the struct. MemoryError where that is short."""
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    assert k_BSKH.shape == v_BSKH.shape == (B, S, K, H) and N % K == 0, (q_BTNH.shape, k_BSKH.shape, v_BSKH.shape)
    tensors = {"q": q_BTNH, "k": k_BSKH, "v": v_BSKH, **others}
    for name, x in tensors.items():
        assert name == "lse" or (x.dtype is torch.bfloat16 and x.is_contiguous() and x.is_cpu), (x.dtype, x.stride())
    places = see.memo(("int32", B), lambda: _places(see, B))
    for place, length in zip(places.values(), (T, S, T, S), strict=False):
        assert place.shape == (B, length), (place.shape, B, length)
    call = _Flash(
        **{name: x.data_ptr() for name, x in {**tensors, **places}.items()},
        B=B, T=T, S=S, N=N, K=K, H=H, window=ANY if see.window is None else see.window, scale=scale, cap=cap or 0.0,
        threads=torch.get_num_threads(),
    )  # fmt: skip
    done = native.kernels().flash_attention(ctypes.addressof(call))
    assert done, "there are no matrix tiles here"
    if done < 0:
        raise MemoryError(f"attention of {T} queries over {S} keys: no memory for its copies")


def _places(see: Visibility, rows: int) -> dict[str, Tensor]:
    """Positions and documents as the kernel reads them, for each row; documents on both sides or on none."""
    found = {"q_pos": see.q_pos_BT, "k_pos": see.k_pos_BS}
    if see.q_doc_BT is not None and see.k_doc_BS is not None:
        found |= {"q_doc": see.q_doc_BT, "k_doc": see.k_doc_BS}
    return {name: x.to(torch.int32).expand(rows, -1).contiguous() for name, x in found.items()}
