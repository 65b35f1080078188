"""Triton kernels between the matmuls of a pass on CUDA, and the matmul of one row.

A decoding step of a small model is hundreds of launches, each longer than its arithmetic: these kernels do in one what
the definitions (`norm.py`, `rope.py`, `gelu.py`, `model.py`) do in many, with the same roundings. Shapes are constants
of a compilation; numbers of rows and table widths are not, so no load compiles without end. Nothing waits for the
device, and no grid depends on what lies there: all of them can be captured in a CUDA graph.

Inference only. Tensors are on one CUDA device, bf16 or fp32, sums are fp32.
Legend: X rows (any leading dimensions), D model, F out, N query heads, K key/value heads, H head dim, V vocabulary,
P pages in the store, s positions in a page, n pages in a row's table.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROW_WARPS = 8
LOGITS = 4096
"""Logits that one program caps."""
TILE = {"ROWS": 2, "WIDTH": 512, "STAGES": 4, "num_warps": 2}
"""Rows and columns of the weight that a program of the one-row product reads at a time, and how many times ahead: the
best of six (bench/engine_gpu.py, H100). With 8 rows, 2304 are 2.2 programs for each of 132 processors, a third of which
wait for the last."""


@triton.jit
def tanh(x):  # type: ignore[no-untyped-def]
    """tanh to a few ulp, exact far past 1. Near 0, where 1 - 2 / (e^2x + 1) cancels, a series serves."""
    size = tl.abs(x)
    square = x * x
    series = x * (
        1.0 + square * (-0.3333333333 + square * (0.1333333333 + square * (-0.0539682540 + square * 0.0218694885)))
    )
    far = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)
    return tl.where(size < 0.25, series, tl.where(x < 0, -far, far))


@triton.jit
def gelu(x):  # type: ignore[no-untyped-def]
    """The tanh form of GELU."""
    return 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))


@triton.jit  # type: ignore[untyped-decorator]
def _normed(x, weight, eps, D: tl.constexpr):  # type: ignore[no-untyped-def]
    """RMSNorm with gain 1 + weight of a row in fp32, padded with zeros."""
    return x * tl.rsqrt(tl.sum(x * x, 0) / D + eps) * (1.0 + weight)


@triton.jit  # type: ignore[untyped-decorator]
def _norm(x, weight, y, eps, D: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    d = tl.arange(0, WIDTH)
    inside = d < D
    at = tl.program_id(0).to(tl.int64) * D + d
    row = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    gain = tl.load(weight + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, _normed(row, gain, eps, D).to(y.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _add_norm(y, post, x, pre, x_out, n_out, eps, D: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    d = tl.arange(0, WIDTH)
    inside = d < D
    at = tl.program_id(0).to(tl.int64) * D + d
    # all loads first: each waits for memory once, not after the sum before it
    made = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
    old = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    after = tl.load(post + d, mask=inside, other=0.0).to(tl.float32)
    before = tl.load(pre + d, mask=inside, other=0.0).to(tl.float32)
    made = _normed(made, after, eps, D).to(x.dtype.element_ty).to(tl.float32)
    total = (old + made).to(x.dtype.element_ty)
    tl.store(x_out + at, total, mask=inside)
    tl.store(n_out + at, _normed(total.to(tl.float32), before, eps, D).to(n_out.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _embed(tokens, table, scale, weight, x_out, n_out, eps, D: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    d = tl.arange(0, WIDTH)
    inside = d < D
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(tokens + row).to(tl.int64)
    found = tl.load(table + token * D + d, mask=inside, other=0.0).to(tl.float32)
    scaled = (found * scale).to(table.dtype.element_ty)
    tl.store(x_out + row * D + d, scaled, mask=inside)
    gain = tl.load(weight + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(n_out + row * D + d, _normed(scaled.to(tl.float32), gain, eps, D).to(n_out.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _rotate(x, cos, sin, y, N, HALF: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    h = tl.arange(0, WIDTH)
    inside = h < HALF
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at, turn = (row * N + head) * 2 * HALF + h, row * 2 * HALF + h
    left = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    right = tl.load(x + at + HALF, mask=inside, other=0.0).to(tl.float32)
    c, s = tl.load(cos + turn, mask=inside, other=0.0), tl.load(sin + turn, mask=inside, other=0.0)
    tl.store(y + at, (left * c - right * s).to(y.dtype.element_ty), mask=inside)
    tl.store(y + at + HALF, (right * c + left * s).to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T", "width", "trash"])  # type: ignore[untyped-decorator]
def _write(  # type: ignore[no-untyped-def]
    q, k, v, q_step, k_step, v_step, cos, sin, q_out, k_store, v_store, table, first, pos, T, width, trash,
    N: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr, PAGE: tl.constexpr, TURN: tl.constexpr,
):  # fmt: skip
    h = tl.arange(0, WIDTH)
    inside = h < HALF
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = tl.load(pos + row)
    slot = tl.maximum(at, 0)
    b = row // T
    index = slot // PAGE - tl.load(first + b)
    held = (at >= 0) & (index >= 0) & (index < width)
    page = tl.load(table + b * width + index, mask=held, other=0)
    page = tl.where(held, page, trash).to(tl.int64)
    c, s = tl.full((WIDTH,), 1.0, tl.float32), tl.full((WIDTH,), 0.0, tl.float32)
    if TURN:
        c = tl.load(cos + slot * HALF + h, mask=inside, other=0.0)
        s = tl.load(sin + slot * HALF + h, mask=inside, other=0.0)
    if head < N:
        source = q + row * q_step + head * 2 * HALF + h
        left = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        right = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
        target = q_out + (row * N + head) * 2 * HALF + h
        tl.store(target, (left * c - right * s).to(q_out.dtype.element_ty), mask=inside)
        tl.store(target + HALF, (right * c + left * s).to(q_out.dtype.element_ty), mask=inside)
    elif head < N + K:
        source = k + row * k_step + (head - N) * 2 * HALF + h
        left = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        right = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
        target = k_store + ((page * K + head - N) * PAGE + slot % PAGE) * 2 * HALF + h
        tl.store(target, (left * c - right * s).to(k_store.dtype.element_ty), mask=inside)
        tl.store(target + HALF, (right * c + left * s).to(k_store.dtype.element_ty), mask=inside)
    else:
        source = v + row * v_step + (head - N - K) * 2 * HALF + h
        target = v_store + ((page * K + head - N - K) * PAGE + slot % PAGE) * 2 * HALF + h
        left = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        right = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
        tl.store(target, left.to(v_store.dtype.element_ty), mask=inside)
        tl.store(target + HALF, right.to(v_store.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _gate(gate, up, y, gate_step, up_step, F, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(0).to(tl.int64)
    inside = f < F
    opened = gelu(tl.load(gate + row * gate_step + f, mask=inside, other=0.0).to(tl.float32))
    opened = opened.to(y.dtype.element_ty).to(tl.float32)
    raised = tl.load(up + row * up_step + f, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * F + f, (opened * raised).to(y.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _cap(raw, y, top, best, cap, V, BLOCKS, CAPPED: tl.constexpr, BEST: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    v = block * BLOCK + tl.arange(0, BLOCK)
    inside = v < V
    x = tl.load(raw + row * V + v, mask=inside, other=-float("inf")).to(tl.float32)
    if CAPPED:
        x = tl.where(inside, cap * tanh(x / cap), -float("inf"))
    tl.store(y + row * V + v, x, mask=inside)
    if BEST:
        most = tl.max(x, 0)
        tl.store(top + row * BLOCKS + block, most)
        tl.store(best + row * BLOCKS + block, tl.min(tl.where(x == most, v, V - 1), 0))


@triton.jit  # type: ignore[untyped-decorator]
def _likeliest(top, best, tokens, BLOCKS, V, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0)
    i = tl.arange(0, WIDTH)
    inside = i < BLOCKS
    x = tl.load(top + row * BLOCKS + i, mask=inside, other=-float("inf"))
    ids = tl.load(best + row * BLOCKS + i, mask=inside, other=V - 1)
    tl.store(tokens + row, tl.min(tl.where(x == tl.max(x, 0), ids, V - 1), 0).to(tl.int64))


@triton.jit  # type: ignore[untyped-decorator]
def _one_row(  # type: ignore[no-untyped-def]
    x, weight, y, F, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, GATED: tl.constexpr, STAGES: tl.constexpr
):
    f = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = f < F
    start = tl.minimum(f, F - 1).to(tl.int64)[:, None] * D
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    raised = tl.zeros((ROWS, WIDTH), tl.float32)
    for base in tl.range(0, D, WIDTH, num_stages=STAGES):
        d = base + tl.arange(0, WIDTH)
        there = (d < D)[None, :]
        row = tl.load(x + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
        total += row * tl.load(weight + start + d[None, :], mask=there, other=0.0).to(tl.float32)
        if GATED:
            raised += row * tl.load(weight + F * D + start + d[None, :], mask=there, other=0.0).to(tl.float32)
    made = tl.sum(total, 1).to(y.dtype.element_ty)
    if GATED:
        opened = gelu(made.to(tl.float32)).to(y.dtype.element_ty).to(tl.float32)
        made = (opened * tl.sum(raised, 1).to(y.dtype.element_ty).to(tl.float32)).to(y.dtype.element_ty)
    tl.store(y + f, made, mask=inside)


def _wide(size: int) -> int:
    return int(triton.next_power_of_2(size))


def _check(*tensors: Tensor) -> None:
    for tensor in tensors:
        assert tensor.is_contiguous(), tensor.stride()


def norm(x_XD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """RMSNorm with gain 1 + weight."""
    x_XD = x_XD.contiguous()
    D = x_XD.shape[-1]
    y_XD = torch.empty_like(x_XD)
    if x_XD.numel():
        _norm[(x_XD.numel() // D,)](x_XD, weight_D, y_XD, eps, D, _wide(D), num_warps=ROW_WARPS)
    return y_XD


def add_norm(y_XD: Tensor, post_D: Tensor, x_XD: Tensor, pre_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + norm(y) with gain `post`, and the norm of that with gain `pre`; each rounded where the definition rounds."""
    _check(y_XD, x_XD)
    D = x_XD.shape[-1]
    x_out, n_out = torch.empty_like(x_XD), torch.empty_like(x_XD)
    _add_norm[(x_XD.numel() // D,)](
        y_XD, post_D, x_XD, pre_D, x_out, n_out, eps, D, _wide(D), num_warps=ROW_WARPS
    )  # fmt: skip
    return x_out, n_out


def embed(tokens_X: Tensor, table_VD: Tensor, scale: float, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Rows of a table times `scale` (which has the table's precision), and their norm."""
    X, D = len(tokens_X), table_VD.shape[1]
    x_XD, n_XD = (table_VD.new_empty(X, D) for _ in "xn")
    _embed[(X,)](tokens_X, table_VD, scale, weight_D, x_XD, n_XD, eps, D, _wide(D), num_warps=ROW_WARPS)
    return x_XD, n_XD


def rotate(x_BTNH: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """What ops.rope.rotate computes, with fp32 tables [B, T, 1, H]."""
    x_BTNH = x_BTNH.contiguous()
    B, T, N, H = x_BTNH.shape
    cos, sin = (table.contiguous() for table in tables)
    assert cos.shape == (B, T, 1, H) and cos.dtype == torch.float32, (cos.shape, cos.dtype, x_BTNH.shape)
    y_BTNH = torch.empty_like(x_BTNH)
    if y_BTNH.numel():
        _rotate[(B * T, N)](x_BTNH, cos, sin, y_BTNH, N, H // 2, _wide(H // 2), num_warps=1)
    return y_BTNH


def write(
    q_XNH: Tensor | None,
    k_XKH: Tensor,
    v_XKH: Tensor,
    turns: tuple[Tensor, Tensor] | None,
    stores: tuple[Tensor, Tensor],
    table_Bn: Tensor,
    first_B: Tensor,
    pos_X: Tensor,
) -> Tensor:
    """Put keys and values where they belong in the pages; with `turns`, queries and keys are rotated first.

    Args:
        q_XNH, k_XKH, v_XKH: views of one row length are allowed. Without queries the result is empty.
        turns: cosine and sine of every position, [positions, H / 2] fp32.
        stores: keys and values [P, K, s, H]; the last page takes what padding (position -1) writes.
        table_Bn, first_B, pos_X: int32, as in `attention_decode.paged_attention`; X = B T.
    """
    k_store, v_store = stores
    P, K, s, H = k_store.shape
    X, N = len(k_XKH), 0 if q_XNH is None else q_XNH.shape[1]
    for heads in (k_XKH, v_XKH, *(() if q_XNH is None else (q_XNH,))):
        assert heads.stride()[1:] == (H, 1) or heads.shape[1] == 1, (heads.shape, heads.stride())
    _check(table_Bn, first_B, pos_X)
    assert len(pos_X) == X and X % len(first_B) == 0, (X, pos_X.shape, first_B.shape)
    q = k_XKH if q_XNH is None else q_XNH
    q_out = q.new_empty(X, N, H)
    cos, sin = (k_XKH, k_XKH) if turns is None else turns
    if X:
        _write[(X, N + 2 * K)](
            q, k_XKH, v_XKH, q.stride(0), k_XKH.stride(0), v_XKH.stride(0), cos, sin, q_out, k_store, v_store,
            table_Bn, first_B, pos_X, X // len(first_B), table_Bn.shape[1], P - 1,
            N, K, H // 2, _wide(H // 2), s, turns is not None, num_warps=1,
        )  # fmt: skip
    return q_out


def gated_gelu(gate_XF: Tensor, up_XF: Tensor) -> Tensor:
    """gelu_tanh(gate) * up, each product rounded; both may be halves of one tensor [X, 2 F]."""
    F = gate_XF.shape[-1]
    shape = gate_XF.shape
    gate_XF, up_XF = gate_XF.reshape(-1, F), up_XF.reshape(-1, F)
    X = len(gate_XF)
    y_XF = gate_XF.new_empty(X, F)
    if X:
        _gate[(X, triton.cdiv(F, 1024))](gate_XF, up_XF, y_XF, gate_XF.stride(0), up_XF.stride(0), F, 1024, num_warps=4)
    return y_XF.view(shape)


def capped(raw_XV: Tensor, cap: float | None) -> Tensor:
    """Soft-capped logits in fp32."""
    raw_XV = raw_XV.contiguous()
    V = raw_XV.shape[-1]
    y_XV = torch.empty_like(raw_XV, dtype=torch.float32)
    if y_XV.numel():
        rows, blocks = y_XV.numel() // V, triton.cdiv(V, LOGITS)
        _cap[(rows, blocks)](raw_XV, y_XV, y_XV, y_XV, cap or 1.0, V, blocks, cap is not None, False, LOGITS)
    return y_XV


def capped_best(raw_XV: Tensor, cap: float | None, y_XV: Tensor, tokens_X: Tensor) -> None:
    """Soft-capped logits into `y` (fp32), the first likeliest id of each row into `tokens` (int64)."""
    _check(raw_XV, y_XV)
    X, V = raw_XV.shape
    blocks = triton.cdiv(V, LOGITS)
    top = y_XV.new_empty(X, blocks)
    best = top.new_empty(X, blocks, dtype=torch.int32)
    _cap[(X, blocks)](raw_XV, y_XV, top, best, cap or 1.0, V, blocks, cap is not None, True, LOGITS)
    _likeliest[(X,)](top, best, tokens_X, blocks, V, _wide(blocks), num_warps=1)


def one_row(x_1D: Tensor, weight_FD: Tensor, *, gated: bool = False, tile: dict[str, int] | None = None) -> Tensor:
    """x W^T for one row; `gated`: W is gate over up, and the result gelu(gate) * up of half its length."""
    _check(x_1D, weight_FD)
    rows, D = weight_FD.shape
    F = rows // 2 if gated else rows
    how = tile or TILE
    y_1F = x_1D.new_empty(1, F)
    _one_row[(triton.cdiv(F, how["ROWS"]),)](x_1D, weight_FD, y_1F, F, D, GATED=gated, **how)
    return y_1F
