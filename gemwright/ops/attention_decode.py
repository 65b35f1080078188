"""Triton attention over keys and values in pages, where they lie: decoding and prompt chunks on CUDA.

The definition is `ops.attention.reference`; the contract is that of `native.paged_attention`, the same on CPU. A
program takes some queries of a row with all query heads of one key/value head (which share each page that is read)
over one part of the keys; a second kernel joins the parts. So a single row with a long context fills the chip as well
as many short ones do. How many parts there are follows from the shapes alone; where a part begins and ends is read on
the device from the positions. No launch depends on device values, so a pass can be captured in a CUDA graph.

Only pages that hold a position between the first visible one (the window's) and the last query are read. Softmax is
fp32; bf16 weights meet bf16 values, as in every flash kernel.

Legend: B rows, T queries, N query heads, K key/value heads, G = N / K, H head dim, P pages in the store, s positions in
a page, n pages in a row's table; in a program: M queries x heads, J keys.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemwright.ops.decode_kernels import tanh
from gemwright.ops.native import check_paged

MOST_PARTS = 32


@triton.jit(do_not_specialize=["T", "blocks", "width", "window"])  # type: ignore[untyped-decorator]
def _attend(  # type: ignore[no-untyped-def]
    q, k_store, v_store, table, first, pos, out, part_out, part_top, part_sum, T, blocks, width, window, scale, cap,
    K: tl.constexpr, G: tl.constexpr, H: tl.constexpr, WIDE: tl.constexpr, PAGE: tl.constexpr, M: tl.constexpr,
    J: tl.constexpr, PARTS: tl.constexpr, CAPPED: tl.constexpr, WINDOWED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    b, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    kv, part = tl.program_id(1), tl.program_id(2)
    QUERIES: tl.constexpr = M // G
    m = tl.arange(0, M)
    t = block * QUERIES + m // G
    real = (m // G < QUERIES) & (t < T)
    at = tl.load(pos + b * T + t, mask=real, other=-1)
    # [low, high): the positions that any of these queries sees, as far as the table has them
    begin = tl.load(first + b) * PAGE
    high = tl.minimum(tl.max(at, 0) + 1, begin + width * PAGE)
    low = begin
    if WINDOWED:
        low = tl.maximum(low, tl.min(tl.where(at < 0, 2147483647, at), 0) - window + 1)
    low_block = low // J
    count = tl.maximum(tl.cdiv(high, J) - low_block, 0)
    share = tl.cdiv(count, PARTS)
    start = low_block + part * share
    stop = tl.minimum(start + share, low_block + count)

    h = tl.arange(0, WIDE)
    row = (b * T + t).to(tl.int64) * (K * G) + kv * G + m % G
    inside = real[:, None] & (h < H)[None, :]
    query = tl.load(q + row[:, None] * H + h[None, :], mask=inside, other=0.0)
    top = tl.full((M,), -float("inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    mixed = tl.zeros((M, WIDE), tl.float32)
    for i in range(start, stop):
        p = i * J + tl.arange(0, J)
        held = (p >= low) & (p < high)
        page = tl.load(table + b.to(tl.int64) * width + (p // PAGE - begin // PAGE), mask=held, other=0).to(tl.int64)
        place = ((page * K + kv) * PAGE + p % PAGE) * H
        key = tl.load(k_store + place[None, :] + h[:, None], mask=held[None, :] & (h < H)[:, None], other=0.0)
        scores = tl.dot(query, key, input_precision=PRECISION) * scale
        if CAPPED:
            scores = cap * tanh(scores / cap)
        seen = held[None, :] & (p[None, :] <= at[:, None])
        if WINDOWED:
            seen = seen & (at[:, None] - p[None, :] < window)
        scores = tl.where(seen, scores, -float("inf"))
        most = tl.maximum(top, tl.max(scores, 1))
        finite = tl.where(most == -float("inf"), 0.0, most)
        weights = tl.exp(scores - finite[:, None])
        fade = tl.exp(top - finite)
        total = total * fade + tl.sum(weights, 1)
        value = tl.load(v_store + place[:, None] + h[None, :], mask=held[:, None] & (h < H)[None, :], other=0.0)
        mixed = mixed * fade[:, None] + tl.dot(weights.to(value.dtype), value, input_precision=PRECISION)
        top = most
    if PARTS == 1:
        mixed = mixed / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(out + row[:, None] * H + h[None, :], mixed.to(out.dtype.element_ty), mask=inside)
    else:
        tl.store(part_top + row * PARTS + part, top, mask=real)
        tl.store(part_sum + row * PARTS + part, total, mask=real)
        if stop > start:
            tl.store(part_out + (row[:, None] * PARTS + part) * H + h[None, :], mixed, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _join(part_out, part_top, part_sum, out, H: tl.constexpr, WIDE: tl.constexpr, PARTS: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    part, h = tl.arange(0, PARTS), tl.arange(0, WIDE)
    total = tl.load(part_sum + row * PARTS + part)
    top = tl.load(part_top + row * PARTS + part)
    some = total > 0.0
    most = tl.max(top, 0)
    weight = tl.where(some, tl.exp(top - tl.where(most == -float("inf"), 0.0, most)), 0.0)
    place = (row * PARTS + part)[:, None] * H + h[None, :]
    mixed = tl.load(part_out + place, mask=some[:, None] & (h < H)[None, :], other=0.0)
    whole = tl.sum(total * weight, 0)
    made = tl.sum(mixed * weight[:, None], 0) / tl.where(whole == 0.0, 1.0, whole)
    tl.store(out + row * H + h, made.to(out.dtype.element_ty), mask=h < H)


@dataclass(frozen=True)
class Launch:
    """How a shape is cut: tile of M queries x heads by J keys, queries a program, parts of the keys."""

    tile: int
    keys: int
    queries: int
    parts: int
    warps: int
    stages: int


@functools.cache
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def plan(
    B: int, T: int, N: int, K: int, H: int, *, bf16: bool, processors: int, tile: int = 0, keys: int = 0
) -> Launch:
    """From the shapes alone: a captured pass must not depend on what the tables say."""
    G, small = N // K, T * (N // K) <= 16 or not bf16
    tile = max(tile or (16 if small else 64), triton.next_power_of_2(G))
    queries = min(T, tile // G)
    programs = B * -(-T // queries) * K
    parts = 1
    while parts < MOST_PARTS and 2 * parts * programs <= 2 * processors:
        parts *= 2
    # fp32 products run on the plain units, whose registers hold less
    keys = keys or ((16 if H > 128 else 32) if not bf16 else 32 if small or H > 256 else 64)
    return Launch(tile, keys, queries, parts, warps=4 if tile < 64 else 8, stages=3 if keys * H <= 2**13 else 2)


def paged_attention(
    q_BTNH: Tensor,
    k_PKsH: Tensor,
    v_PKsH: Tensor,
    table_Bn: Tensor,
    first_B: Tensor,
    q_pos_BT: Tensor,
    *,
    window: int | None,
    scale: float,
    cap: float | None,
    launch: Launch | None = None,
) -> Tensor:
    """Attention over keys in pages, [B, T, N, H] in the dtype of q, k and v (bf16 or fp32, all on CUDA).

    Args:
        k_PKsH, v_PKsH: the stores; position p of a row is offset p % s of page table[p // s - first].
        table_Bn, first_B, q_pos_BT: int32. Entries of the table that hold no visible position are not read; positions
            that it does not reach are not seen. A query with position -1 is padding and yields 0.
        window: a key is visible up to window - 1 positions back; None: any distance.
        cap: of the scaled scores; None: none.
        launch: another plan than `plan` makes.
    """
    B, T, N, H = q_BTNH.shape
    K, s = k_PKsH.shape[1:3]
    n = table_Bn.shape[1]
    check_paged(q_BTNH, k_PKsH, v_PKsH, table_Bn, first_B, q_pos_BT)
    q_BTNH = q_BTNH.contiguous()
    assert q_BTNH.dtype == k_PKsH.dtype == v_PKsH.dtype and k_PKsH.is_contiguous() and v_PKsH.is_contiguous()
    out_BTNH = torch.empty_like(q_BTNH)
    if not q_BTNH.numel():
        return out_BTNH
    bf16 = q_BTNH.dtype == torch.bfloat16
    how = launch or plan(
        B, T, N, K, H, bf16=bf16, processors=_processors(q_BTNH.device.index) if q_BTNH.is_cuda else 4
    )  # fmt: skip
    parts, wide = how.parts, int(triton.next_power_of_2(max(16, H)))
    mixed = top = total = out_BTNH
    if parts > 1:
        mixed = torch.empty(B * T * N, parts, H, dtype=torch.float32, device=q_BTNH.device)
        top, total = (mixed.new_empty(B * T * N, parts) for _ in range(2))
    assert how.tile >= N // K and how.queries == min(T, how.tile // (N // K)), how
    # a query block holds tile // G queries, of which short passes use the first T
    blocks = -(-T // (how.tile // (N // K)))
    _attend[(B * blocks, K, parts)](
        q_BTNH, k_PKsH, v_PKsH, table_Bn, first_B, q_pos_BT, out_BTNH, mixed, top, total,
        T, blocks, n, window or 0, scale, cap or 1.0,
        K, N // K, H, wide, s, how.tile, how.keys, parts, cap is not None, window is not None,
        "tf32" if bf16 else "ieee", num_warps=how.warps, num_stages=how.stages,
    )  # fmt: skip
    if parts > 1:
        _join[(B * T * N,)](mixed, top, total, out_BTNH, H, wide, parts, num_warps=4)
    return out_BTNH
