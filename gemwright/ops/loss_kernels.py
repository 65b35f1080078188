"""Triton kernels between the products of the head: what `head.py`, `loss.py` and `divergence.py` define, a pass each.

A chunk's logits are hundreds of megabytes, so a pass over them takes as long as a product: each kernel reads them once.
`read_` writes them back capped; the gradients are written in the dtype of the products that follow.

Tensors are on one CUDA device, logits contiguous fp32 [x, V], numbers of a token fp32 [x, 1].
Legend: x tokens in a chunk, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemwright.ops.decode_kernels import tanh

BLOCK: Final = 4096
"""Logits that a program holds at a time."""
WARPS: Final = 8
PARTS: Final = 4
"""Programs that share a row where it is summed."""
KINDS: Final = {"forward_kl": 0, "reverse_kl": 1, "jsd": 2, "soft_cross_entropy": 3}

Sums = tuple[Tensor, Tensor]


def read_(logits_xV: Tensor, cap: float | None, temperature: float) -> Sums:
    """Products become logits in their place; the largest of each token, and log sum exp(logits - largest)."""
    x, V = logits_xV.shape
    tops_xp, sums_xp = (logits_xV.new_empty(x, PARTS) for _ in range(2))
    _read[(x, PARTS)](
        logits_xV, tops_xp, sums_xp, V, cap or 1.0, 1 / temperature, CAPPED=cap is not None, SPAN=_span(V), BLOCK=BLOCK,
        PARTS=PARTS, num_warps=WARPS,
    )  # fmt: skip
    top_x1 = tops_xp.amax(-1, keepdim=True)
    return top_x1, (sums_xp * (tops_xp - top_x1).exp()).sum(-1, keepdim=True).log()


def gradient(
    logits_xV: Tensor,
    sums: Sums,
    p_weight_x1: Tensor,
    ids_x1: Tensor,
    id_weight_x1: Tensor,
    *,
    cap: float | None,
    temperature: float,
    dtype: torch.dtype,
) -> Tensor:
    """The gradient by h . W^T of sum p_weight * lse + id_weight * logits[id]."""
    x, V = logits_xV.shape
    made_xV = torch.empty_like(logits_xV, dtype=dtype)
    _gradient[(x, triton.cdiv(V, BLOCK))](
        logits_xV, made_xV, *sums, p_weight_x1.contiguous(), ids_x1.contiguous(), id_weight_x1.contiguous(), V,
        cap or 1.0, temperature, CAPPED=cap is not None, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return made_xV


def compare(ours_xV: Tensor, theirs_xV: Tensor, our_sums: Sums, their_sums: Sums, kind: str, beta: float) -> Sums:
    """The divergence of each token, and the sum of g, as `divergence.py` has them."""
    x, V = ours_xV.shape
    values_xp, totals_xp = (ours_xV.new_empty(x, PARTS) for _ in range(2))
    code, beta = _code(kind, beta)
    _compare[(x, PARTS)](
        ours_xV, theirs_xV, *our_sums, *their_sums, values_xp, totals_xp, V, beta, *_logs(beta), KIND=code,
        SPAN=_span(V), BLOCK=BLOCK, PARTS=PARTS, num_warps=WARPS,
    )  # fmt: skip
    return values_xp.sum(-1, keepdim=True), totals_xp.sum(-1, keepdim=True)


def divergence_gradient(
    ours_xV: Tensor,
    theirs_xV: Tensor,
    our_sums: Sums,
    their_sums: Sums,
    kind: str,
    beta: float,
    total_x1: Tensor,
    weight_x1: Tensor,
    *,
    cap: float | None,
    temperature: float,
    dtype: torch.dtype,
) -> Tensor:
    """The gradient of weight * divergence by the student's h . W^T."""
    x, V = ours_xV.shape
    made_xV = torch.empty_like(ours_xV, dtype=dtype)
    code, beta = _code(kind, beta)
    _divergence_gradient[(x, triton.cdiv(V, BLOCK))](
        ours_xV, theirs_xV, made_xV, *our_sums, *their_sums, total_x1.contiguous(), weight_x1.contiguous(), V, beta,
        *_logs(beta), cap or 1.0, temperature, KIND=code, CAPPED=cap is not None, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return made_xV


def _span(V: int) -> int:
    """Whole blocks of a row that one of its programs reads."""
    return -(-V // (BLOCK * PARTS)) * BLOCK


def _code(kind: str, beta: float) -> tuple[int, float]:
    """The kernel's branch; JSD at its ends is one of the KLs."""
    if kind == "jsd" and beta in (0, 1):
        kind = "reverse_kl" if beta else "forward_kl"
    return KINDS[kind], beta if kind == "jsd" else 0.5


def _logs(beta: float) -> tuple[float, float]:
    """log((1 - beta) / beta) and log(1 - beta)."""
    return math.log((1 - beta) / beta), math.log1p(-beta)


@triton.jit  # type: ignore[untyped-decorator]
def _read(  # type: ignore[no-untyped-def]
    logits, tops, sums, V, cap, inverse, CAPPED: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    row, part = tl.program_id(0), tl.program_id(1)
    start = part * SPAN
    logits += row.to(tl.int64) * V
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    added = tl.zeros([BLOCK], tl.float32)
    for at in range(start, min(start + SPAN, V), BLOCK):
        v = at + tl.arange(0, BLOCK)
        inside = v < V
        z = tl.load(logits + v, mask=inside, other=0.0)
        if CAPPED:
            z = cap * tanh(z / cap)
        z = z * inverse
        tl.store(logits + v, z, mask=inside)
        z = tl.where(inside, z, float("-inf"))
        most = tl.maximum(top, z)
        # a lane that has seen nothing yet holds -inf, whose differences are not numbers
        shift = tl.where(most == float("-inf"), 0.0, most)
        added = added * tl.exp(top - shift) + tl.exp(z - shift)
        top = most
    most = tl.max(top, 0)
    shift = tl.where(most == float("-inf"), 0.0, most)
    tl.store(tops + row * PARTS + part, most)
    tl.store(sums + row * PARTS + part, tl.sum(added * tl.exp(top - shift), 0))


@triton.jit  # type: ignore[untyped-decorator]
def _slope(z, cap, temperature, CAPPED: tl.constexpr):  # type: ignore[no-untyped-def]
    """d logits / d products, from the logits."""
    if CAPPED:
        t = z * (temperature / cap)
        slope = (1.0 - t * t) / temperature
    else:
        slope = tl.zeros_like(z) + 1.0 / temperature
    return slope


@triton.jit  # type: ignore[untyped-decorator]
def _gradient(  # type: ignore[no-untyped-def]
    logits, made, tops, log_sums, p_weights, ids, id_weights, V, cap, temperature, CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = v < V
    at = row.to(tl.int64) * V + v
    z = tl.load(logits + at, mask=inside, other=0.0)
    p = tl.exp(z - tl.load(tops + row) - tl.load(log_sums + row))
    d = p * tl.load(p_weights + row) + tl.where(v == tl.load(ids + row), tl.load(id_weights + row), 0.0)
    tl.store(made + at, (d * _slope(z, cap, temperature, CAPPED)).to(made.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _terms(log_p, log_q, beta, log_odds, log_rest, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """The terms and g of a divergence."""
    if KIND == 0:
        g = -tl.exp(log_p)
        value = g * (log_q - log_p)
    elif KIND == 1:
        g = tl.exp(log_q) * (log_q - log_p)
        value = g
    elif KIND == 2:
        ratio = log_p - log_q
        x = log_odds - ratio
        q_over_m = tl.minimum(x, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(x))) - log_rest
        g = (1.0 - beta) * tl.exp(log_q) * q_over_m
        value = g + beta * tl.exp(log_p) * (ratio + q_over_m)
    else:
        g = -tl.exp(log_p)
        value = g * log_q
    return value, g


@triton.jit  # type: ignore[untyped-decorator]
def _compare(  # type: ignore[no-untyped-def]
    ours, theirs, our_tops, our_logs, their_tops, their_logs, values, totals, V, beta, log_odds, log_rest,
    KIND: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    row, part = tl.program_id(0), tl.program_id(1)
    start = part * SPAN
    ours += row.to(tl.int64) * V
    theirs += row.to(tl.int64) * V
    our_top, our_log = tl.load(our_tops + row), tl.load(our_logs + row)
    their_top, their_log = tl.load(their_tops + row), tl.load(their_logs + row)
    value = tl.zeros([BLOCK], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for at in range(start, min(start + SPAN, V), BLOCK):
        v = at + tl.arange(0, BLOCK)
        inside = v < V
        log_q = tl.load(ours + v, mask=inside, other=0.0) - our_top - our_log
        log_p = tl.load(theirs + v, mask=inside, other=0.0) - their_top - their_log
        term, g = _terms(log_p, log_q, beta, log_odds, log_rest, KIND)
        value += tl.where(inside, term, 0.0)
        total += tl.where(inside, g, 0.0)
    tl.store(values + row * PARTS + part, tl.sum(value, 0))
    tl.store(totals + row * PARTS + part, tl.sum(total, 0))


@triton.jit  # type: ignore[untyped-decorator]
def _divergence_gradient(  # type: ignore[no-untyped-def]
    ours, theirs, made, our_tops, our_logs, their_tops, their_logs, totals, weights, V, beta, log_odds, log_rest, cap,
    temperature, KIND: tl.constexpr, CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = v < V
    at = row.to(tl.int64) * V + v
    z = tl.load(ours + at, mask=inside, other=0.0)
    log_q = z - tl.load(our_tops + row) - tl.load(our_logs + row)
    log_p = tl.load(theirs + at, mask=inside, other=0.0) - tl.load(their_tops + row) - tl.load(their_logs + row)
    term, g = _terms(log_p, log_q, beta, log_odds, log_rest, KIND)
    d = (g - tl.exp(log_q) * tl.load(totals + row)) * tl.load(weights + row)
    tl.store(made + at, (d * _slope(z, cap, temperature, CAPPED)).to(made.dtype.element_ty), mask=inside)
