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
from torch import Tensor
from torch.autograd.function import once_differentiable

from gemwright.ops import gpu
from gemwright.ops.attention import EMPTY, Visibility

SAFE_CAP: Final = 60.0
"""exp(60) summed over 2^20 keys is far below the maximum of fp32 and bf16: weights need no shift."""
LOG2_E: Final = 1.4426950408889634
Grads = tuple[Tensor, Tensor, Tensor]


WORKSPACE: Final = 2**30
"""Bytes of weights and gradients of scores that backward writes at most (`Stored`)."""


class Tile(NamedTuple):
    """How one kernel is launched: queries and keys of a block, warps, stages of its loads."""

    queries: int
    keys: int
    warps: int
    stages: int


class Piece(NamedTuple):
    """How a product is launched: what it reads at a time of the dimension that it sums over, warps, stages."""

    depth: int
    warps: int
    stages: int


class Stored(NamedTuple):
    """Backward by way of memory: five products instead of seven, and each score bent once instead of twice.

    Sums of a block of keys and of a block of queries over a head size of 256 fill the registers, which leaves small
    tiles. So weights and gradients of scores are made first, in blocks of `queries` by `keys`, and written for as many
    heads as `WORKSPACE` takes; dV, dK and dQ are plain products of them. A length of which not even the heads of one
    key/value head fit goes the other way, whose memory is linear.
    """

    queries: int
    keys: int
    pairs: Piece
    columns: Piece
    lines: Piece


@dataclass(frozen=True)
class Tiles:
    """The tiles of the kernels: forward, dQ, and dK with dV; with `values`, dV has a launch of its own."""

    forward: Tile
    queries: Tile
    keys: Tile
    values: Tile | None = None
    stored: Stored | None = None


KERNELS: Final[dict[int, Tiles]] = {
    64: Tiles(Tile(64, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 64, 4, 2)),
    128: Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(64, 64, 8, 2)),
    256: Tiles(
        Tile(128, 64, 8, 2),
        Tile(128, 32, 8, 3),
        Tile(64, 128, 8, 1),
        Tile(64, 128, 8, 2),
        Stored(128, 128, Piece(32, 8, 4), Piece(64, 8, 4), Piece(64, 8, 3)),
    ),
}
"""By head size, for bf16 and fp16; that of 256 is the best of some fifty (bench/attention_gpu.py, an H100), the others
are those that fit the registers."""
PLAIN: Final[dict[int, Tiles]] = {
    64: Tiles(Tile(64, 32, 4, 2), Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
    128: Tiles(Tile(32, 32, 4, 2), Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
}
"""By head size, for fp32, whose products run on the plain units; wider heads would leave the registers."""


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
        ValueError: no tiles serve the head size in this dtype.
    """
    most = max(PLAIN if q_BTNH.dtype == torch.float32 else KERNELS)
    if q_BTNH.shape[3] > most:
        got = f"head_dim {q_BTNH.shape[3]} in {q_BTNH.dtype}"
        raise ValueError(f"attention: got {got}, the triton backend allows up to {most}; flex takes others")
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
    @once_differentiable
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
        gpu.attention()._attend[(B * N, -(-T // tile.queries))](
            self.q_BTNH, self.k_BSKH, self.v_BSKH, out_BTNH, lse_BNT, *self._seen("queries", tile.queries, tile.keys),
            *self._numbers(), *self._steps(), **self._shapes(tile), **self._kind(), SHIFT=shift,
        )  # fmt: skip
        return out_BTNH, lse_BNT

    def backward(self, out_BTNH: Tensor, lse_BNT: Tensor, dout_BTNH: Tensor) -> Grads:
        """Gradients of q, k and v, in their dtype."""
        dq, dk, dv = (x.new_empty(x.shape) for x in (self.q_BTNH, self.k_BSKH, self.v_BSKH))
        if not dq.numel():
            return dq, dk.zero_(), dv.zero_()
        dout_BTNH = _rows(dout_BTNH)
        stored = self.tiles.stored
        heads = 0 if stored is None else WORKSPACE // self._bytes(stored)
        if stored is not None and heads:
            self.stored(stored, heads, out_BTNH, lse_BNT, dout_BTNH, (dq, dk, dv))
            return dq, dk, dv
        inner_BNT = torch.empty_like(lse_BNT)
        self.query_side(out_BTNH, lse_BNT, dout_BTNH, inner_BNT, dq)
        if self.tiles.values is None:
            self.key_side(self.tiles.keys, lse_BNT, dout_BTNH, inner_BNT, dk, dv)
        else:
            self.key_side(self.tiles.keys, lse_BNT, dout_BTNH, inner_BNT, dk, None)
            self.key_side(self.tiles.values, lse_BNT, dout_BTNH, inner_BNT, None, dv)
        return dq, dk, dv

    def query_side(self, out: Tensor, lse: Tensor, dout: Tensor, inner: Tensor, dq: Tensor) -> None:
        """Write dQ, and the inner products of the output and its gradient."""
        B, T, N, _ = self.q_BTNH.shape
        tile = self.tiles.queries
        gpu.attention()._query_side[(B * N, -(-T // tile.queries))](
            self.q_BTNH, self.k_BSKH, self.v_BSKH, out, dout, lse, inner, dq,
            *self._seen("queries", tile.queries, tile.keys), *self._numbers(), self.scale,
            *self._steps(), *dout.stride()[:3], **self._shapes(tile), **self._kind(),
        )  # fmt: skip

    def key_side(
        self, tile: Tile, lse: Tensor, dout: Tensor, inner: Tensor, dk: Tensor | None, dv: Tensor | None
    ) -> None:
        """Write dK, dV or both."""
        B, S, K, _ = self.k_BSKH.shape
        gpu.attention()._key_side[(B * K, -(-S // tile.keys))](
            self.q_BTNH, self.k_BSKH, self.v_BSKH, dout, lse, inner, lse if dk is None else dk,
            lse if dv is None else dv, *self._seen("keys", tile.queries, tile.keys), *self._numbers(), self.scale,
            *self._steps(), *dout.stride()[:3], **self._shapes(tile), **self._kind(),
            KEYS=dk is not None, VALUES=dv is not None,
        )  # fmt: skip

    def stored(self, how: Stored, heads: int, out: Tensor, lse: Tensor, dout: Tensor, grads: Grads) -> None:
        """Write all three gradients, some key/value heads (of all rows) at a time."""
        dq, dk, dv = grads
        B, N, K = len(self.q_BTNH), self.q_BTNH.shape[2], self.k_BSKH.shape[2]
        heads = min(heads, B * K)
        rows, columns = self._blocks(how)
        size = 2, heads * (N // K), rows * how.queries, columns * how.keys
        weights, dscores = self.q_BTNH.new_empty(size)
        for base in range(0, B * K, heads):
            some = range(base, min(base + heads, B * K))
            self.pairs(how, some, out, lse, dout, weights, dscores)
            self.columns(how, some, weights, dout, 1.0, dv)
            self.columns(how, some, dscores, self.q_BTNH, self.scale, dk)
            self.lines(how, some, dscores, dq)

    def pairs(
        self, how: Stored, some: range, out: Tensor, lse: Tensor, dout: Tensor, weights: Tensor, dscores: Tensor
    ) -> None:
        """Write weights and gradients of scores of some key/value heads, counted over all rows."""
        rows, columns = self._blocks(how)
        group = self.q_BTNH.shape[2] // self.k_BSKH.shape[2]
        gpu.attention()._pairs[(len(some) * group, rows)](
            self.q_BTNH, self.k_BSKH, self.v_BSKH, out, dout, lse, weights, dscores, *self._seen("written", *how[:2]),
            *self._numbers(), some.start, rows, columns, *self._steps(), *dout.stride()[:3],
            **self._shapes(how, how.pairs), **self._kind(),
        )  # fmt: skip

    def columns(self, how: Stored, some: range, pairs: Tensor, right: Tensor, slant: float, made: Tensor) -> None:
        """Write dV (of the weights and dO) or dK (of the scores' gradients and q)."""
        rows, columns = self._blocks(how)
        gpu.attention()._columns[(len(some), columns)](
            pairs, right, made, *self._seen("keys", *how[:2])[4:7], slant, some.start, rows, columns,
            *right.stride()[:3], **self._shapes(how, how.columns),
        )  # fmt: skip

    def lines(self, how: Stored, some: range, dscores: Tensor, dq: Tensor) -> None:
        """Write dQ."""
        rows, columns = self._blocks(how)
        group = self.q_BTNH.shape[2] // self.k_BSKH.shape[2]
        gpu.attention()._lines[(len(some) * group, rows)](
            dscores, self.k_BSKH, dq, *self._seen("written", *how[:2])[4:7], self.scale, some.start, rows, columns,
            *self.k_BSKH.stride()[:3], **self._shapes(how, how.lines),
        )  # fmt: skip

    def _blocks(self, how: Stored) -> tuple[int, int]:
        """Of queries and of keys."""
        return -(-self.q_BTNH.shape[1] // how.queries), -(-self.k_BSKH.shape[1] // how.keys)

    def _bytes(self, how: Stored) -> int:
        """What is written for one key/value head."""
        rows, columns = self._blocks(how)
        group = self.q_BTNH.shape[2] // self.k_BSKH.shape[2]
        return 2 * group * rows * how.queries * columns * how.keys * self.q_BTNH.element_size()

    def _seen(self, side: str, queries: int, keys: int) -> tuple[Any, ...]:
        """Positions, documents, spans of the blocks of a side, lengths and window."""
        places = _places(self.see)
        spans = _spans(self.see, side, queries, keys)
        return *places[:4], spans, places.q_pos_BT.shape[1], places.k_pos_BS.shape[1], places.window

    def _numbers(self) -> tuple[float, float]:
        """What raw scores are multiplied by, as the kernels' `_scores` has it, and the cap."""
        if self.cap is None:
            return self.scale, 1.0
        return self.scale / self.cap * (1.0 if self._exact() else 2 * LOG2_E), self.cap

    def _steps(self) -> tuple[int, ...]:
        """Strides of q, k and v."""
        return *self.q_BTNH.stride()[:3], *self.k_BSKH.stride()[:3], *self.v_BSKH.stride()[:3]

    def _shapes(self, tile: Tile | Stored, piece: Piece | None = None) -> dict[str, Any]:
        """What every kernel is compiled for."""
        N, H = self.q_BTNH.shape[2:]
        constants = dict(
            N=N, G=N // self.k_BSKH.shape[2], H=H, WIDE=_wide(H), M=tile.queries, J=tile.keys,
            PRECISION="ieee" if self.q_BTNH.dtype == torch.float32 else "tf32",
        )  # fmt: skip
        if piece is not None:
            return dict(constants, DEPTH=piece.depth, num_warps=piece.warps, num_stages=piece.stages)
        assert isinstance(tile, Tile)
        return dict(constants, num_warps=tile.warps, num_stages=tile.stages)

    def _kind(self) -> dict[str, bool]:
        """What a kernel that makes scores is compiled for besides."""
        return dict(DOCS=_places(self.see).docs, CAPPED=self.cap is not None, EXACT=self._exact())

    def _exact(self) -> bool:
        """Whether tanh is that of the definition, to a few ulp of fp32, which bf16 cannot tell."""
        return self.q_BTNH.dtype != torch.bfloat16


def _wide(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


def _rows(x_BLNH: Tensor) -> Tensor:
    """x itself where its last stride is 1."""
    return x_BLNH if x_BLNH.stride(3) == 1 else x_BLNH.contiguous()


def _places(see: Visibility) -> Places:
    def make() -> Places:
        q_pos, k_pos = (x.int().contiguous() for x in (see.q_pos_BT, see.k_pos_BS))
        window = EMPTY if see.window is None else see.window  # every distance is below EMPTY
        if see.q_doc_BT is None or see.k_doc_BS is None:
            return Places(q_pos, k_pos, q_pos, k_pos, False, window)
        q_doc, k_doc = (x.int().contiguous() for x in (see.q_doc_BT, see.k_doc_BS))
        return Places(q_pos, k_pos, q_doc, k_doc, True, window)

    return see.memo("places", make)


def _spans(see: Visibility, side: str, queries: int, keys: int) -> Tensor:
    """For each block of queries (or of keys) the blocks of keys (of queries) to visit, [B, blocks, 4]."""
    make = _written if side == "written" else partial(_found, side=side)
    return see.memo(("spans", side, queries, keys), lambda: make(see, queries=queries, keys=keys))


def _found(see: Visibility, side: str, queries: int, keys: int) -> Tensor:
    """By the positions."""
    q_pos, k_pos, q_doc, k_doc, docs, window = _places(see)
    (own, own_doc, size), (other, other_doc, other_size) = (q_pos, q_doc, queries), (k_pos, k_doc, keys)
    if side == "keys":
        (own, own_doc, size), (other, other_doc, other_size) = (other, other_doc, other_size), (own, own_doc, size)
    B, L = own.shape
    blocks = -(-L // size)
    spans = torch.empty(B, blocks, 4, dtype=torch.int32, device=own.device)
    gpu.attention()._spans[(blocks, B)](
        own, own_doc, other, other_doc, spans, L, other.shape[1], window,
        size, other_size, max(1, 2048 // other_size), docs, side == "queries", num_warps=4,
    )  # fmt: skip
    return spans


def _written(see: Visibility, queries: int, keys: int) -> Tensor:
    """For each block of queries also the blocks of keys that are to visit it, as far as both have gaps in their runs:
    whatever a block of keys reads has been written."""
    spans_Bt4 = _spans(see, "queries", queries, keys).clone()
    visits_Bk4 = _spans(see, "keys", queries, keys)
    t = torch.arange(spans_Bt4.shape[1], device=spans_Bt4.device)[:, None]
    k = torch.arange(visits_Bk4.shape[1], device=spans_Bt4.device, dtype=torch.int32)
    skipped_Btk = (visits_Bk4[:, None, :, 0] > t) | (t >= visits_Bk4[:, None, :, 1])
    k_Btk = k.expand(skipped_Btk.shape)  # filled, not chosen by `where`, which uploads its numbers: no graph holds that
    first_Bt, last_Bt = k_Btk.masked_fill(skipped_Btk, EMPTY).amin(-1), (k_Btk + 1).masked_fill(skipped_Btk, 0).amax(-1)
    empty_Bt = spans_Bt4[..., 0] == spans_Bt4[..., 1]
    first_Bt = torch.minimum(first_Bt, spans_Bt4[..., 0].masked_fill(empty_Bt, EMPTY))
    last_Bt = torch.maximum(last_Bt, spans_Bt4[..., 1])
    spans_Bt4[..., 0], spans_Bt4[..., 1] = torch.minimum(first_Bt, last_Bt), last_Bt
    return spans_Bt4
