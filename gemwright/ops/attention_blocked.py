"""Blocked attention: query blocks against their visible span of keys, forward and backward, memory linear in length.

For each block of queries the positions give the smallest span of keys that anyone in the block can see; only that span
is read, so a local layer touches its window and a causal layer its past. Within the span only the columns that some
query does not see are masked. The workspace holds one block's scores, `WORKSPACE` bytes however long the input is; an
input whose scores fit is one plain block. Nothing of size T x S is kept for backward: it recomputes from the
log-sum-exp (as in FlashAttention-2, arXiv 2307.08691).

With a soft-cap every score is at most `cap`, so exp(score) cannot overflow fp32 and the row maximum is not needed.

Legend: B rows, T queries (t in one block), S keys (s in one span), N query heads, K key/value heads, G = N / K,
H head dim, Z = B * K.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from gemwright.ops import native, native_flash, native_scores
from gemwright.ops.attention import PADDING, Visibility
from gemwright.ops.cpu import has_fast_bf16

WORKSPACE: Final = 32 * 2**20
"""Bytes of fp32 scores held at a time."""


def blocked(
    q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, see: Visibility, *, scale: float, cap: float | None
) -> Tensor:
    """Attention [B, T, N, H] in the dtype of q; see `ops.attention.reference` for the definition."""
    if native_flash.serves(q_BTNH, k_BSKH, v_BSKH, cap):
        return native_flash.flash(q_BTNH, k_BSKH, v_BSKH, see, scale=scale, cap=cap)
    if torch.is_grad_enabled() and (q_BTNH.requires_grad or k_BSKH.requires_grad or v_BSKH.requires_grad):
        out_BTNH: Tensor = _Blocked.apply(q_BTNH, k_BSKH, v_BSKH, see, scale, cap)  # type: ignore[no-untyped-call]
        return out_BTNH
    with torch.no_grad():  # the same passes as within the function above
        return _forward(q_BTNH, k_BSKH, v_BSKH, see, scale, cap)[0]


@dataclass(frozen=True)
class Block:
    """One block of queries, the span of keys it can see, and the part of the span that all of it sees."""

    queries: slice
    keys: slice
    full: slice
    """Within `keys` (relative to its start): columns that need no mask."""


def plan(see: Visibility, heads: int) -> tuple[Block, ...]:
    """The blocks of a Visibility, planned once for all layers that share it."""
    return see.memo(("blocks", heads), lambda: tuple(_plan(see, heads)))


def _plan(see: Visibility, heads: int) -> Iterator[Block]:
    """Cut the queries into blocks whose scores fit the workspace; skip blocks that see nothing."""
    B, T = see.q_pos_BT.shape
    S = see.k_pos_BS.shape[1]
    size = max(16, min(T, WORKSPACE // (4 * B * heads * S)))
    for start in range(0, T, size):
        queries = slice(start, min(start + size, T))
        some_S, all_S = _columns(see, queries)
        span = some_S.nonzero()
        if len(span) == 0:
            continue
        lo, hi = int(span[0]), int(span[-1]) + 1
        inner = all_S[lo:hi].nonzero()
        a, b = (int(inner[0]), int(inner[-1]) + 1) if len(inner) else (0, 0)
        if b - a != len(inner):  # not one run, as in a wrapped ring: mask all of it
            a = b = 0
        yield Block(queries, slice(lo, hi), slice(a, b))


def _columns(see: Visibility, queries: slice) -> tuple[Tensor, Tensor]:
    """Keys that some query of the block may see (a bound from the extremes), and keys that all surely see: [S] each."""
    q_Bt, k_BS = see.q_pos_BT[:, queries], see.k_pos_BS
    real_Bt = q_Bt != PADDING
    last_B1 = q_Bt.amax(1, keepdim=True)
    first_B1 = torch.where(real_Bt, q_Bt, torch.iinfo(q_Bt.dtype).max).amin(1, keepdim=True)
    some_BS = (k_BS >= 0) & (k_BS <= last_B1)
    all_BS = (k_BS >= 0) & (k_BS <= first_B1) & real_Bt.all(1, keepdim=True)
    if see.window is not None:
        some_BS &= k_BS > first_B1 - see.window
        all_BS &= k_BS > last_B1 - see.window
    if see.q_doc_BT is not None and see.k_doc_BS is not None:
        doc_Bt = see.q_doc_BT[:, queries]
        low_B1, high_B1 = doc_Bt.amin(1, keepdim=True), doc_Bt.amax(1, keepdim=True)
        some_BS &= (see.k_doc_BS >= low_B1) & (see.k_doc_BS <= high_B1)
        all_BS &= (see.k_doc_BS == low_B1) & (see.k_doc_BS == high_B1)
    return some_BS.any(0), all_BS.all(0)


def _compute_dtype(x: Tensor) -> torch.dtype:
    """bf16 where the processor multiplies it natively, else fp32; fp16 scores would overflow, so never fp16."""
    return torch.bfloat16 if x.dtype == torch.bfloat16 and (x.is_cuda or has_fast_bf16()) else torch.float32


def _group(x_BtNH: Tensor, kv_heads: int, dtype: torch.dtype) -> Tensor:
    """[B, t, N, H] -> [B * K, G * t, H]: the query heads of one key head become more rows of one matmul."""
    B, t, N, H = x_BtNH.shape
    x = x_BtNH.reshape(B, t, kv_heads, N // kv_heads, H).permute(0, 2, 3, 1, 4)
    return x.reshape(B * kv_heads, -1, H).to(dtype)


def _ungroup(x_ZgH: Tensor, rows: int, t: int) -> Tensor:
    """The inverse of `_group`: [B * K, G * t, H] -> [B, t, N, H]."""
    H = x_ZgH.shape[-1]
    x = x_ZgH.view(rows, -1, t, H)  # B, K * G, t, H
    return x.permute(0, 2, 1, 3)


def _flat(x_BSKH: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, S, K, H] -> [B * K, S, H], without a copy where the storage is [B, K, S, H] already (the cache's)."""
    B, S, K, H = x_BSKH.shape
    return x_BSKH.transpose(1, 2).to(dtype).reshape(B * K, S, H)


def _products(a: Tensor, b: Tensor) -> Tensor:
    """a b in fp32. CUDA sums and leaves in fp32; a CPU's bf16 product is rounded to bf16 (torch 2.13 has no other)."""
    if a.is_cuda and a.dtype == torch.bfloat16:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a, b).float()


def _weights(
    q_ZgH: Tensor, k_ZsH: Tensor, see: Visibility, block: Block, scale: float, cap: float | None, lse_Zg: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """exp(score - shift) of one block in fp32, zero where masked; tanh of the scores; the shift used, [Z, g] or 0-d.

    `lse_Zg` given (backward) makes the weights normalised.
    """
    tanh = None
    x = _products(q_ZgH, k_ZsH.transpose(1, 2)).mul_(scale if cap is None else scale / cap)
    if cap is not None:
        x.tanh_()
        tanh = None if lse_Zg is None else x.clone()  # only backward needs it
        x.mul_(cap)
    if lse_Zg is not None:
        shift = lse_Zg
    elif cap is not None and cap <= native_flash.SAFE_CAP:
        shift = x.new_zeros(())
    else:
        shift = _hide(x, see, block, -torch.inf).amax(-1).clamp(min=torch.finfo(torch.float32).min)
    if shift.dim():
        x.sub_(shift.unsqueeze(-1))
    return _hide(x.exp_(), see, block, 0.0), tanh, shift


def _hide(x_Zgs: Tensor, see: Visibility, block: Block, value: float) -> Tensor:
    """Write `value` where a key is not visible, touching only the columns that need it."""
    B = see.q_pos_BT.shape[0]
    s = block.keys.stop - block.keys.start
    t = block.queries.stop - block.queries.start
    for part in (slice(0, block.full.start), slice(block.full.stop, s)):
        if part.stop > part.start:
            keys = slice(block.keys.start + part.start, block.keys.start + part.stop)
            part_key = (block.queries.start, block.queries.stop, keys.start, keys.stop)
            hidden_Bts = see.memo(part_key, partial(_hidden, see, block.queries, keys))
            x_Zgs.view(B, -1, t, s)[..., part].masked_fill_(hidden_Bts[:, None], value)
    return x_Zgs


def _masks(see: Visibility, block: Block) -> native_scores.Hidden:
    """The same for the native passes."""
    start, stop = block.keys.start, block.keys.stop
    left, right = (block.full.start, block.full.stop) if block.full.stop > block.full.start else (0, 0)

    def make() -> native_scores.Hidden:
        parts = (slice(start, start + left), slice(start + right, stop))
        first_Btl, last_Btr = (_hidden(see, block.queries, part).contiguous() for part in parts)
        return native_scores.Hidden(first_Btl, last_Btr, left, right)

    return see.memo(("masks", block.queries.start, block.queries.stop, start, stop), make)


def _serves(q_ZgH: Tensor, cap: float | None) -> bool:
    """Whether the native passes do: they need no largest score, so the cap must bound it."""
    return cap is not None and cap <= native_flash.SAFE_CAP and native.serves(q_ZgH)


def _hidden(see: Visibility, queries: slice, keys: slice) -> Tensor:
    """Mask [B, t, s] of the keys that are not visible."""
    return ~see.mask(queries, keys)


def _forward(
    q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, see: Visibility, scale: float, cap: float | None
) -> tuple[Tensor, Tensor]:
    """Output [B, T, N, H] and log-sum-exp [B * K, G, T] of the scores (-inf where nothing is seen)."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    dtype = _compute_dtype(q_BTNH)
    k_ZSH, v_ZSH = _flat(k_BSKH, dtype), _flat(v_BSKH, dtype)
    out_BTNH = torch.zeros_like(q_BTNH, memory_format=torch.contiguous_format)
    lse_ZGT = q_BTNH.new_full((B * K, N // K, T), -torch.inf, dtype=torch.float32)
    for block in plan(see, N):
        q_ZgH = _group(q_BTNH[:, block.queries], K, dtype)
        if _serves(q_ZgH, cap):
            weights_Zgs = torch.bmm(q_ZgH, k_ZSH[:, block.keys].transpose(1, 2))
            total_Zg = native_scores.weights_(weights_Zgs, _masks(see, block), None, scale=scale, cap=cap)
            shift = total_Zg.new_zeros(())
        else:
            weights_Zgs, _, shift = _weights(q_ZgH, k_ZSH[:, block.keys], see, block, scale, cap, None)
            total_Zg = weights_Zgs.sum(-1)
        out_ZgH = _products(weights_Zgs.to(dtype), v_ZSH[:, block.keys])
        out_ZgH /= total_Zg.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1)
        t = block.queries.stop - block.queries.start
        out_BTNH[:, block.queries] = _ungroup(out_ZgH, B, t)
        lse_ZGT[..., block.queries] = (total_Zg.log() + shift).view(B * K, N // K, t)
    return out_BTNH, lse_ZGT


def _score_gradient(
    q_ZgH: Tensor, k_ZsH: Tensor, v_ZsH: Tensor, dout_ZgH: Tensor, see: Visibility, block: Block, scale: float,
    cap: float | None, lse_Zg: Tensor, delta_Zg: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The weights of one block and the gradient by the products q k, in the dtype of q."""
    if _serves(q_ZgH, cap):
        weights_Zgs, d_Zgs = (torch.bmm(a, b.transpose(1, 2)) for a, b in ((q_ZgH, k_ZsH), (dout_ZgH, v_ZsH)))
        native_scores.gradient_(weights_Zgs, d_Zgs, _masks(see, block), lse_Zg, delta_Zg, scale=scale, cap=cap)
        return weights_Zgs, d_Zgs
    weights_Zgs, tanh_Zgs, _ = _weights(q_ZgH, k_ZsH, see, block, scale, cap, lse_Zg)
    d_Zgs = _products(dout_ZgH, v_ZsH.transpose(1, 2))
    d_Zgs -= delta_Zg.unsqueeze(-1)
    d_Zgs *= weights_Zgs
    if tanh_Zgs is not None:  # derivative of cap * tanh(x / cap)
        d_Zgs *= tanh_Zgs.square_().neg_().add_(1.0)
    return weights_Zgs.to(q_ZgH.dtype), d_Zgs.mul_(scale).to(q_ZgH.dtype)


class _Blocked(torch.autograd.Function):
    """Keeps q, k, v, the output and the log-sum-exp; backward recomputes the weights block by block."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, see: Visibility, scale: float, cap: float | None) -> Tensor:
        out, lse = _forward(q, k, v, see, scale, cap)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.see, ctx.scale, ctx.cap = see, scale, cap
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q_BTNH, k_BSKH, v_BSKH, out_BTNH, lse_ZGT = ctx.saved_tensors
        B, _, N, H = q_BTNH.shape
        S, K = k_BSKH.shape[1:3]
        dtype = _compute_dtype(q_BTNH)
        k_ZSH, v_ZSH = _flat(k_BSKH, dtype), _flat(v_BSKH, dtype)
        dq_BTNH = torch.zeros_like(q_BTNH)
        dk_ZSH, dv_ZSH = (torch.zeros(B * K, S, H, dtype=torch.float32, device=q_BTNH.device) for _ in range(2))
        for block in plan(ctx.see, N):
            q_ZgH = _group(q_BTNH[:, block.queries], K, dtype)
            dout_ZgH = _group(grads[0][:, block.queries], K, dtype)
            out_ZgH = _group(out_BTNH[:, block.queries], K, torch.float32)
            # a query that sees nothing has lse -inf; +inf makes its weights 0 instead of NaN
            lse_Zg = lse_ZGT[..., block.queries].reshape(B * K, -1)
            lse_Zg = lse_Zg.masked_fill(lse_Zg == -torch.inf, torch.inf)
            keys = block.keys
            delta_Zg = (dout_ZgH.float() * out_ZgH).sum(-1)
            inputs = q_ZgH, k_ZSH[:, keys], v_ZSH[:, keys], dout_ZgH
            weights_Zgs, dx_Zgs = _score_gradient(*inputs, ctx.see, block, ctx.scale, ctx.cap, lse_Zg, delta_Zg)
            dv_ZSH[:, keys] += torch.bmm(weights_Zgs.transpose(1, 2), dout_ZgH)
            t = block.queries.stop - block.queries.start
            dq_BTNH[:, block.queries] = _ungroup(torch.bmm(dx_Zgs, k_ZSH[:, keys]), B, t)
            dk_ZSH[:, keys] += torch.bmm(dx_Zgs.transpose(1, 2), q_ZgH)
        dk_BSKH, dv_BSKH = (g.view(B, K, S, H).transpose(1, 2).to(k_BSKH.dtype) for g in (dk_ZSH, dv_ZSH))
        return dq_BTNH, dk_BSKH, dv_BSKH, None, None, None
