"""Attention in Triton for training and long prompts on CUDA: forward and backward in kernels of our own.

The definition is `ops.attention.reference`; the kernels and their maths are in `attention_kernels.py`. Nothing here
waits for the device, no launch depends on what lies there (so a pass can be captured in a CUDA graph), and q, k and v
are read where they lie, in any strides whose last is 1. What the kernels need of the positions alone is made once for
all layers that share a Visibility. Kept for backward: q, k, v, the output and a log-sum-exp for each query and head.

Legend: B rows, T queries, S keys, N query heads, K key/value heads, H head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Final, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton.tools.tensor_descriptor import TensorDescriptor

from gemwright.ops import attention_kernels as kernels
from gemwright.ops.attention import EMPTY, Visibility

SAFE_CAP: Final = 60.0
"""exp(60) summed over 2^20 keys is far below the maximum of fp32 and bf16: weights need no shift."""
WIDEST: Final = 256
"""Head sizes above have no tiles that fit a chip's shared memory."""
LOG2_E: Final = 1.4426950408889634


class Tile(NamedTuple):
    """How one kernel is launched: queries and keys of a block, warps, stages of its loads, and whether the chip's
    copy engine (TMA) makes them."""

    queries: int
    keys: int
    warps: int
    stages: int
    tma: bool = False


@dataclass(frozen=True)
class Tiles:
    """The tiles of the kernels: forward, dQ, and dK with dV; with `values`, dV has a launch of its own."""

    forward: Tile
    queries: Tile
    keys: Tile
    values: Tile | None = None


KERNELS: Final[dict[int, Tiles]] = {
    64: Tiles(Tile(128, 64, 4, 3), Tile(128, 64, 4, 3), Tile(64, 128, 8, 3)),
    128: Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(64, 128, 8, 2)),
    256: Tiles(Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(64, 64, 8, 2)),
}
"""By head size, for bf16 and fp16."""
PLAIN: Final[dict[int, Tiles]] = {
    64: Tiles(Tile(64, 32, 4, 2), Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
    128: Tiles(Tile(32, 32, 4, 2), Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
    256: Tiles(Tile(32, 32, 8, 1), Tile(32, 16, 8, 1), Tile(16, 32, 8, 1)),
}
"""By head size, for fp32, whose products run on the plain units."""


class Places(NamedTuple):
    """Positions and documents of a Visibility as the kernels read them: int32, in rows of one piece."""

    q_pos_BT: Tensor
    k_pos_BS: Tensor
    q_doc_BT: Tensor
    k_doc_BS: Tensor
    docs: bool
    window: int


def attend(
    q_BTNH: Tensor,
    k_BSKH: Tensor,
    v_BSKH: Tensor,
    see: Visibility,
    *,
    scale: float,
    cap: float | None,
    tiles: Tiles | None = None,
) -> Tensor:
    """Attention [B, T, N, H] in the dtype of q; see `ops.attention.reference` for the definition.

    Args:
        tiles: others than those of the head size.

    Raises:
        ValueError: the head size is above `WIDEST`.
    """
    if q_BTNH.shape[3] > WIDEST:
        raise ValueError(f"attention: got head_dim {q_BTNH.shape[3]}, the triton backend allows up to {WIDEST}")
    if torch.is_grad_enabled() and (q_BTNH.requires_grad or k_BSKH.requires_grad or v_BSKH.requires_grad):
        out_BTNH: Tensor = _Attention.apply(q_BTNH, k_BSKH, v_BSKH, see, scale, cap, tiles)  # type: ignore[no-untyped-call]
        return out_BTNH
    return Call.of(q_BTNH, k_BSKH, v_BSKH, see, scale, cap, tiles).forward()[0]


class _Attention(torch.autograd.Function):
    """Keeps q, k, v, the output and the log-sum-exp; backward makes the weights anew, block by block."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *how: Any) -> Tensor:
        out, lse = Call.of(q, k, v, *how).forward()
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.how = how
        return out

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        return *Call.of(q, k, v, *ctx.how).backward(out, lse, grad), None, None, None, None


@dataclass(frozen=True)
class Call:
    """One call's inputs, and the launches of its kernels."""

    q_BTNH: Tensor
    k_BSKH: Tensor
    v_BSKH: Tensor
    see: Visibility
    scale: float
    cap: float | None
    tiles: Tiles

    @classmethod
    def of(
        cls, q: Tensor, k: Tensor, v: Tensor, see: Visibility, scale: float, cap: float | None, tiles: Tiles | None
    ) -> Call:
        """With the tiles of the head size and dtype, and in strides that the kernels read."""
        assert q.dtype == k.dtype == v.dtype, (q.dtype, k.dtype, v.dtype)
        wide = max(64, _wide(q.shape[3]))
        chosen = tiles or (PLAIN if q.dtype == torch.float32 else KERNELS)[wide]
        return cls(_rows(q), _rows(k), _rows(v), see, scale, cap, chosen)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Output [B, T, N, H], and the log-sum-exp [B, N, T] over log 2 (+inf where nothing is seen)."""
        B, T, N, H = self.q_BTNH.shape
        out_BTNH = self.q_BTNH.new_empty(B, T, N, H)
        lse_BNT = self.q_BTNH.new_empty(B, N, T, dtype=torch.float32)
        if not out_BTNH.numel():
            return out_BTNH, lse_BNT
        tile = self.tiles.forward
        shift = self.cap is None or self.cap > SAFE_CAP or self.q_BTNH.dtype == torch.float16
        (q, q_steps), (k, k_steps), (v, v_steps) = self._operands(tile)
        kernels._attend[(B * N, -(-T // tile.queries))](
            q, k, v, out_BTNH, lse_BNT, *self._seen(tile, "queries"), *self._numbers(),
            *q_steps, *k_steps, *v_steps, **self._shapes(tile), SHIFT=shift,
        )  # fmt: skip
        return out_BTNH, lse_BNT

    def backward(self, out_BTNH: Tensor, lse_BNT: Tensor, dout_BTNH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v, in their dtype."""
        dq, dk, dv = (x.new_empty(x.shape) for x in (self.q_BTNH, self.k_BSKH, self.v_BSKH))
        if not dq.numel():
            return dq, dk.zero_(), dv.zero_()
        dout_BTNH = _rows(dout_BTNH)
        inner_BNT = torch.empty_like(lse_BNT)
        self.query_side(out_BTNH, lse_BNT, dout_BTNH, inner_BNT, dq)
        if self.tiles.values is not None:
            self.key_side(self.tiles.keys, lse_BNT, dout_BTNH, inner_BNT, dk, None)
            self.key_side(self.tiles.values, lse_BNT, dout_BTNH, inner_BNT, None, dv)
        else:
            self.key_side(self.tiles.keys, lse_BNT, dout_BTNH, inner_BNT, dk, dv)
        return dq, dk, dv

    def query_side(self, out: Tensor, lse: Tensor, dout: Tensor, inner: Tensor, dq: Tensor) -> None:
        """Write dQ, and the inner products of the output and its gradient."""
        B, T, N, _ = self.q_BTNH.shape
        tile = self.tiles.queries
        (q, q_steps), (k, k_steps), (v, v_steps) = self._operands(tile)
        grad, grad_steps = _operand(dout, tile.queries, tile.tma)
        kernels._query_side[(B * N, -(-T // tile.queries))](
            q, k, v, out, grad, lse, inner, dq, *self._seen(tile, "queries"), *self._numbers(), self.scale,
            *q_steps, *k_steps, *v_steps, *grad_steps, **self._shapes(tile),
        )  # fmt: skip

    def key_side(
        self, tile: Tile, lse: Tensor, dout: Tensor, inner: Tensor, dk: Tensor | None, dv: Tensor | None
    ) -> None:
        """Write dK, dV or both."""
        B, S, K, _ = self.k_BSKH.shape
        (q, q_steps), (k, k_steps), (v, v_steps) = self._operands(tile)
        grad, grad_steps = _operand(dout, tile.queries, tile.tma)
        kernels._key_side[(B * K, -(-S // tile.keys))](
            q, k, v, grad, lse, inner, lse if dk is None else dk, lse if dv is None else dv,
            *self._seen(tile, "keys"), *self._numbers(), self.scale,
            *q_steps, *k_steps, *v_steps, *grad_steps, **self._shapes(tile),
            KEYS=dk is not None, VALUES=dv is not None,
        )  # fmt: skip

    def _operands(self, tile: Tile) -> tuple[tuple[Any, tuple[int, ...]], ...]:
        return (
            _operand(self.q_BTNH, tile.queries, tile.tma),
            _operand(self.k_BSKH, tile.keys, tile.tma),
            _operand(self.v_BSKH, tile.keys, tile.tma),
        )

    def _seen(self, tile: Tile, side: str) -> tuple[Any, ...]:
        """Positions, documents, spans of the blocks of a side, lengths and window."""
        places = self.see.memo("places", partial(_places, self.see))
        key = ("spans", side, tile.queries, tile.keys)
        spans = self.see.memo(key, partial(_spans, places, tile, side))
        return *places[:4], spans, places.q_pos_BT.shape[1], places.k_pos_BS.shape[1], places.window

    def _numbers(self) -> tuple[float, float]:
        """What raw scores are multiplied by, as the kernels' `_scores` has it, and the cap."""
        if self.cap is None:
            return self.scale, 1.0
        exact = self.q_BTNH.dtype == torch.float32
        return self.scale / self.cap * (1.0 if exact else 2 * LOG2_E), self.cap

    def _shapes(self, tile: Tile) -> dict[str, Any]:
        """The constants of a compilation."""
        N, H = self.q_BTNH.shape[2:]
        exact = self.q_BTNH.dtype == torch.float32
        places = self.see.memo("places", partial(_places, self.see))
        return dict(
            N=N, G=N // self.k_BSKH.shape[2], H=H, WIDE=_wide(H), M=tile.queries, J=tile.keys, DOCS=places.docs,
            CAPPED=self.cap is not None, EXACT=exact, TMA=tile.tma, PRECISION="ieee" if exact else "tf32",
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip


def _wide(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


def _rows(x_BLNH: Tensor) -> Tensor:
    """x itself where its last stride is 1."""
    return x_BLNH if x_BLNH.stride(3) == 1 else x_BLNH.contiguous()


def _operand(x_BLNH: Tensor, length: int, tma: bool) -> tuple[Any, tuple[int, ...]]:
    """What a kernel reads a tensor by, and its strides: a descriptor of blocks of `length` positions, or itself."""
    steps = x_BLNH.stride()
    if tma:
        return TensorDescriptor(x_BLNH, x_BLNH.shape, steps, [1, length, 1, _wide(x_BLNH.shape[3])]), steps[:3]
    return x_BLNH, steps[:3]


def _places(see: Visibility) -> Places:
    q_pos, k_pos = (x.int().contiguous() for x in (see.q_pos_BT, see.k_pos_BS))
    window = EMPTY if see.window is None else see.window  # every distance is below EMPTY
    if see.q_doc_BT is None or see.k_doc_BS is None:
        return Places(q_pos, k_pos, q_pos, k_pos, False, window)
    return Places(q_pos, k_pos, see.q_doc_BT.int().contiguous(), see.k_doc_BS.int().contiguous(), True, window)


def _spans(places: Places, tile: Tile, side: str) -> Tensor:
    """For each block of queries (or of keys) the blocks of keys (of queries) to visit, [B, blocks, 4]."""
    q_pos, k_pos, q_doc, k_doc, docs, window = places
    (own, own_doc, size), (other, other_doc, other_size) = (q_pos, q_doc, tile.queries), (k_pos, k_doc, tile.keys)
    if side == "keys":
        (own, own_doc, size), (other, other_doc, other_size) = (other, other_doc, other_size), (own, own_doc, size)
    B, L = own.shape
    blocks = -(-L // size)
    spans = torch.empty(B, blocks, 4, dtype=torch.int32, device=own.device)
    kernels._spans[(blocks, B)](
        own, own_doc, other, other_doc, spans, L, other.shape[1], window,
        size, other_size, max(1, 2048 // other_size), docs, side == "queries", num_warps=4,
    )  # fmt: skip
    return spans
