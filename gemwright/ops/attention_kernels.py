"""Triton kernels of attention over whole sequences, forward and backward; `attention_triton.py` launches them.

The structure is that of FlashAttention-2 (arXiv 2307.08691). Forward: a program holds a block of queries of one head
and goes over the blocks of keys that it sees. Backward: `_query_side` goes over the same blocks and sums dQ;
`_key_side` holds a block of keys of one key/value head and goes over the blocks of queries that see it, of all its
query heads, and sums dK and dV, transposed (keys by queries), so that weights meet the second product as its left
operand. Or by way of memory: `_pairs` writes weights and gradients of scores, `_columns` and `_lines` sum products of
them. No sum is shared between programs, so all results are the same bits each time.

Which blocks are visited, `_spans` finds from positions and documents: for each block the first and last block of the
other side of which anything is visible, and the run between them that is visible as a whole and needs no mask.

Scores are kept in units of log 2 (`exp2` is what the chip has). The slope of the cap is 1 - tanh^2 = 4 r (1 - r) with
tanh x = 1 - 2 r, r = 1 / (e^2x + 1). Where the cap bounds the scores well below fp32's range, weights are exp(score)
itself: no maximum is sought, and sums are never rescaled.

Legend: B rows, T queries, S keys, N query heads, K key/value heads, G = N / K, H head dim (WIDE: the power of 2 from
it); in a program: M queries, J keys. Strides are (row, position, head) of [B, T, N, H], whose last stride is 1.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gemwright.ops.decode_kernels import tanh

LOG2_E = tl.constexpr(1.4426950408889634)
NOWHERE = tl.constexpr(2**30)
"""Beyond every position and every number of blocks; `attention.EMPTY`."""


@triton.jit  # type: ignore[untyped-decorator]
def _tile(  # type: ignore[no-untyped-def]
    x, b, start, head, L, step_b, step_l, step_n, h, H: tl.constexpr, ROWS: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """Positions from `start` of one head at the places h, [ROWS, len(h)]; zeros past the length L and past H."""
    here = start + tl.arange(0, ROWS)
    place = x + b.to(tl.int64) * step_b + head.to(tl.int64) * step_n
    place = place + here.to(tl.int64)[:, None] * step_l + h[None, :]
    if EVEN:
        tile = tl.load(place, mask=(here < L)[:, None], other=0.0)
    else:
        tile = tl.load(place, mask=(here < L)[:, None] & (h < H)[None, :], other=0.0)
    return tile


@triton.jit  # type: ignore[untyped-decorator]
def _put(  # type: ignore[no-untyped-def]
    x, tile, b, start, head, L, step_b, step_l, step_n, h, H: tl.constexpr, ROWS: tl.constexpr
):
    """Write what `_tile` reads."""
    here = start + tl.arange(0, ROWS)
    place = x + b.to(tl.int64) * step_b + head.to(tl.int64) * step_n
    place = place + here.to(tl.int64)[:, None] * step_l + h[None, :]
    tl.store(place, tile.to(x.dtype.element_ty), mask=(here < L)[:, None] & (h < H)[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def _scores(raw, scale, cap, CAPPED: tl.constexpr, EXACT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Scores over log 2, and their slope by scale * raw (None without a cap).

    Not exact: tanh from r, off by 1e-7 of the cap where x is small, a hundredth of what bf16 keys do; `scale` holds
    2 scale / (cap log 2) then.
    """
    if CAPPED:
        if EXACT:
            bent = tanh(raw * scale)
            made = bent * (cap * LOG2_E)
            slope = 1.0 - bent * bent
        else:
            r = _inverse(tl.exp2(raw * scale) + 1.0)
            made = (cap * LOG2_E) - (2.0 * cap * LOG2_E) * r
            slope = 4.0 * r - 4.0 * r * r
    else:
        made = raw * (scale * LOG2_E)
        slope = 1.0
    return made, slope


@triton.jit
def _inverse(x):  # type: ignore[no-untyped-def]
    """1 / x by the chip's own instruction (1 ulp), which a plain division surrounds with others; 0 for infinity."""
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _inner(a, b):  # type: ignore[no-untyped-def]
    """Inner products of rows, in fp32."""
    return tl.sum(a.to(tl.float32) * b.to(tl.float32), 1)


@triton.jit  # type: ignore[untyped-decorator]
def _visible(at, pos, doc_at, doc_pos, window, DOCS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The rule of `Visibility.mask`, for queries at `at` and keys at `pos` that broadcast."""
    seen = (pos >= 0) & (pos <= at) & (at - pos < window)
    if DOCS:
        seen = seen & (doc_at == doc_pos)
    return seen


@triton.jit  # type: ignore[untyped-decorator]
def _places(pos, doc, b, start, L, ROWS: tl.constexpr, DOCS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Positions and documents of ROWS places; padding past the length."""
    here = start + tl.arange(0, ROWS)
    at = b.to(tl.int64) * L + here
    found = tl.load(pos + at, mask=here < L, other=-1)
    of = tl.load(doc + at, mask=here < L, other=-1) if DOCS else found
    return found, of


@triton.jit  # type: ignore[untyped-decorator]
def _extremes(pos, doc, inside, axis: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of blocks of places: least and most position and document of the real ones, and whether all are real."""
    real = inside & (pos >= 0) & (pos < NOWHERE)
    least = tl.min(tl.where(real, pos, NOWHERE), axis)
    most = tl.max(tl.where(real, pos, -1), axis)
    first = tl.min(tl.where(real, doc, 2147483647), axis)
    last = tl.max(tl.where(real, doc, -2147483648), axis)
    whole = tl.min(real.to(tl.int32), axis) > 0
    return least, most, first, last, whole


@triton.jit(do_not_specialize=["T", "S", "window"])  # type: ignore[untyped-decorator]
def _spans(  # type: ignore[no-untyped-def]
    own_pos, own_doc, other_pos, other_doc, spans, T, S, window,
    OWN: tl.constexpr, OTHER: tl.constexpr, CHUNK: tl.constexpr, DOCS: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """For a block of OWN places (queries, or keys) of T: [first, last) of the blocks of OTHER places of S of which
    something may be visible, and [from, to) of those that are visible whole, or an empty run."""
    block, b = tl.program_id(0), tl.program_id(1)
    t = block * OWN + tl.arange(0, OWN)
    own, own_of = _places(own_pos, own_doc, b, block * OWN, T, OWN, DOCS)
    o_least, o_most, o_first, o_last, o_whole = _extremes(own, own_of, t < T, 0)
    first, last, begin, end, count = NOWHERE + 0, 0, NOWHERE + 0, 0, 0
    for base in range(0, tl.cdiv(S, OTHER), CHUNK):
        j = base + tl.arange(0, CHUNK)
        s = j[:, None] * OTHER + tl.arange(0, OTHER)[None, :]
        at = b.to(tl.int64) * S + s
        pos = tl.load(other_pos + at, mask=s < S, other=-1)
        doc = tl.load(other_doc + at, mask=s < S, other=-1) if DOCS else pos
        least, most, lowest, highest, whole = _extremes(pos, doc, s < S, 1)
        if QUERIES:
            some = (least <= o_most) & (o_least - most < window)
            whole = whole & o_whole & (most <= o_least) & (o_most - least < window)
        else:
            some = (o_least <= most) & (least - o_most < window)
            whole = whole & o_whole & (o_most <= least) & (most - o_least < window)
        if DOCS:
            some = some & (lowest <= o_last) & (o_first <= highest)
            whole = whole & (lowest == highest) & (o_first == o_last) & (lowest == o_first)
        first = tl.minimum(first, tl.min(tl.where(some, j, NOWHERE), 0))
        last = tl.maximum(last, tl.max(tl.where(some, j + 1, 0), 0))
        begin = tl.minimum(begin, tl.min(tl.where(whole, j, NOWHERE), 0))
        end = tl.maximum(end, tl.max(tl.where(whole, j + 1, 0), 0))
        count += tl.sum(whole.to(tl.int32), 0)
    run = end - begin == count  # else not one run, as in a wrapped ring: all of it is masked
    spans += (b * tl.num_programs(0) + block) * 4
    tl.store(spans, tl.minimum(first, last))
    tl.store(spans + 1, last)
    tl.store(spans + 2, tl.where(run, begin, NOWHERE))
    tl.store(spans + 3, tl.where(run, end, NOWHERE))


@triton.jit(do_not_specialize=["T", "S", "window"])  # type: ignore[untyped-decorator]
def _attend(  # type: ignore[no-untyped-def]
    q, k, v, out, lse, q_pos, k_pos, q_doc, k_doc, spans, T, S, window, scale, cap,
    q_b, q_t, q_n, k_b, k_s, k_n, v_b, v_s, v_n,
    N: tl.constexpr, G: tl.constexpr, H: tl.constexpr, WIDE: tl.constexpr, M: tl.constexpr, J: tl.constexpr,
    DOCS: tl.constexpr, CAPPED: tl.constexpr, EXACT: tl.constexpr, SHIFT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    b, n = tl.program_id(0) // N, tl.program_id(0) % N
    block = tl.num_programs(1) - 1 - tl.program_id(1)  # under a causal mask the last see most: they begin first
    h = tl.arange(0, WIDE)
    spans += (b * tl.num_programs(1) + block) * 4
    first, last, begin, end = tl.load(spans), tl.load(spans + 1), tl.load(spans + 2), tl.load(spans + 3)
    at, doc_at = _places(q_pos, q_doc, b, block * M, T, M, DOCS)
    query = _tile(q, b, block * M, n, T, q_b, q_t, q_n, h, H, M, H == WIDE)
    top = tl.full((M,), -float("inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    mixed = tl.zeros((M, WIDE), tl.float32)
    for j in range(first, last):
        key = _tile(k, b, j * J, n // G, S, k_b, k_s, k_n, h, H, J, H == WIDE)
        raw = tl.dot(query, key.T, input_precision=PRECISION)
        scores, slope = _scores(raw, scale, cap, CAPPED, EXACT)
        if (j < begin) | (j >= end):
            pos, doc = _places(k_pos, k_doc, b, j * J, S, J, DOCS)
            seen = _visible(at[:, None], pos[None, :], doc_at[:, None], doc[None, :], window, DOCS)
            scores = tl.where(seen, scores, -float("inf"))
        if SHIFT:
            most = tl.maximum(top, tl.max(scores, 1))
            # a query that has seen nothing yet holds -inf, whose differences are not numbers
            finite = tl.where(most == -float("inf"), 0.0, most)
            scores -= finite[:, None]
            fade = tl.exp2(top - finite)
            total *= fade
            mixed *= fade[:, None]
            top = most
        weights = tl.exp2(scores)
        total += tl.sum(weights, 1)
        value = _tile(v, b, j * J, n // G, S, v_b, v_s, v_n, h, H, J, H == WIDE)
        mixed = tl.dot(weights.to(value.dtype), value, mixed, input_precision=PRECISION)
    blind = total == 0.0
    mixed = mixed / tl.where(blind, 1.0, total)[:, None]
    _put(out, mixed, b, block * M, n, T, T * N * H, N * H, H, h, H, M)
    t = block * M + tl.arange(0, M)
    found = tl.log2(total)
    if SHIFT:
        found += top
    # +inf where nothing is seen: backward's weights are 0 then, not NaN
    tl.store(lse + (b.to(tl.int64) * N + n) * T + t, tl.where(blind, float("inf"), found), mask=t < T)


@triton.jit(do_not_specialize=["T", "S", "window"])  # type: ignore[untyped-decorator]
def _query_side(  # type: ignore[no-untyped-def]
    q, k, v, out, dout, lse, inner, dq, q_pos, k_pos, q_doc, k_doc, spans, T, S, window, scale, cap, slant,
    q_b, q_t, q_n, k_b, k_s, k_n, v_b, v_s, v_n, g_b, g_t, g_n,
    N: tl.constexpr, G: tl.constexpr, H: tl.constexpr, WIDE: tl.constexpr, M: tl.constexpr, J: tl.constexpr,
    DOCS: tl.constexpr, CAPPED: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ, and for `_key_side` the inner products of outputs and their gradients, [B, N, T]."""
    b, n = tl.program_id(0) // N, tl.program_id(0) % N
    block = tl.num_programs(1) - 1 - tl.program_id(1)
    h = tl.arange(0, WIDE)
    spans += (b * tl.num_programs(1) + block) * 4
    first, last, begin, end = tl.load(spans), tl.load(spans + 1), tl.load(spans + 2), tl.load(spans + 3)
    at, doc_at = _places(q_pos, q_doc, b, block * M, T, M, DOCS)
    t = block * M + tl.arange(0, M)
    row = (b.to(tl.int64) * N + n) * T + t
    grad = _tile(dout, b, block * M, n, T, g_b, g_t, g_n, h, H, M, H == WIDE)
    made = _tile(out, b, block * M, n, T, T * N * H, N * H, H, h, H, M, H == WIDE)
    less = _inner(made, grad)
    tl.store(inner + row, less, mask=t < T)
    shift = tl.load(lse + row, mask=t < T, other=float("inf"))
    query = _tile(q, b, block * M, n, T, q_b, q_t, q_n, h, H, M, H == WIDE)
    total = tl.zeros((M, WIDE), tl.float32)
    for j in range(first, last):
        key = _tile(k, b, j * J, n // G, S, k_b, k_s, k_n, h, H, J, H == WIDE)
        value = _tile(v, b, j * J, n // G, S, v_b, v_s, v_n, h, H, J, H == WIDE)
        raw = tl.dot(query, key.T, input_precision=PRECISION)
        dweights = tl.dot(grad, value.T, input_precision=PRECISION)
        scores, slope = _scores(raw, scale, cap, CAPPED, EXACT)
        weights = tl.exp2(scores - shift[:, None])
        if (j < begin) | (j >= end):
            pos, doc = _places(k_pos, k_doc, b, j * J, S, J, DOCS)
            seen = _visible(at[:, None], pos[None, :], doc_at[:, None], doc[None, :], window, DOCS)
            weights = tl.where(seen, weights, 0.0)
        dscores = weights * (dweights - less[:, None]) * slope
        total = tl.dot(dscores.to(key.dtype), key, total, input_precision=PRECISION)
    _put(dq, total * slant, b, block * M, n, T, T * N * H, N * H, H, h, H, M)


@triton.jit(do_not_specialize=["T", "S", "window"])  # type: ignore[untyped-decorator]
def _key_side(  # type: ignore[no-untyped-def]
    q, k, v, dout, lse, inner, dk, dv, q_pos, k_pos, q_doc, k_doc, spans, T, S, window, scale, cap, slant,
    q_b, q_t, q_n, k_b, k_s, k_n, v_b, v_s, v_n, g_b, g_t, g_n,
    N: tl.constexpr, G: tl.constexpr, H: tl.constexpr, WIDE: tl.constexpr, M: tl.constexpr, J: tl.constexpr,
    DOCS: tl.constexpr, CAPPED: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
    KEYS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """dK (with KEYS) and dV (with VALUES): both sums together may not fit the registers."""
    K: tl.constexpr = N // G
    b, kv, block = tl.program_id(0) // K, tl.program_id(0) % K, tl.program_id(1)
    h = tl.arange(0, WIDE)
    spans += (b * tl.num_programs(1) + block) * 4
    first, last, begin, end = tl.load(spans), tl.load(spans + 1), tl.load(spans + 2), tl.load(spans + 3)
    pos, doc = _places(k_pos, k_doc, b, block * J, S, J, DOCS)
    key = _tile(k, b, block * J, kv, S, k_b, k_s, k_n, h, H, J, H == WIDE)
    if KEYS:
        value = _tile(v, b, block * J, kv, S, v_b, v_s, v_n, h, H, J, H == WIDE)
        dkey = tl.zeros((J, WIDE), tl.float32)
    if VALUES:
        dvalue = tl.zeros((J, WIDE), tl.float32)
    count = last - first
    for i in range(0, G * count):
        n, m = kv * G + i // count, first + i % count
        t = m * M + tl.arange(0, M)
        row = (b.to(tl.int64) * N + n) * T + t
        query = _tile(q, b, m * M, n, T, q_b, q_t, q_n, h, H, M, H == WIDE)
        raw = tl.dot(key, query.T, input_precision=PRECISION)
        grad = _tile(dout, b, m * M, n, T, g_b, g_t, g_n, h, H, M, H == WIDE)
        shift = tl.load(lse + row, mask=t < T, other=float("inf"))
        scores, slope = _scores(raw, scale, cap, CAPPED, EXACT)
        weights = tl.exp2(scores - shift[None, :])
        if (m < begin) | (m >= end):
            at, doc_at = _places(q_pos, q_doc, b, m * M, T, M, DOCS)
            seen = _visible(at[None, :], pos[:, None], doc_at[None, :], doc[:, None], window, DOCS)
            weights = tl.where(seen, weights, 0.0)
        if VALUES:
            dvalue = tl.dot(weights.to(grad.dtype), grad, dvalue, input_precision=PRECISION)
        if KEYS:
            less = tl.load(inner + row, mask=t < T, other=0.0)
            dweights = tl.dot(value, grad.T, input_precision=PRECISION)
            dscores = weights * (dweights - less[None, :]) * slope
            dkey = tl.dot(dscores.to(query.dtype), query, dkey, input_precision=PRECISION)
    if KEYS:
        _put(dk, dkey * slant, b, block * J, kv, S, S * K * H, K * H, H, h, H, J)
    if VALUES:
        _put(dv, dvalue, b, block * J, kv, S, S * K * H, K * H, H, h, H, J)


@triton.jit(do_not_specialize=["T", "S", "window", "base", "blocks", "across"])  # type: ignore[untyped-decorator]
def _pairs(  # type: ignore[no-untyped-def]
    q, k, v, out, dout, lse, weights, dscores, q_pos, k_pos, q_doc, k_doc, spans, T, S, window, scale, cap,
    base, blocks, across, q_b, q_t, q_n, k_b, k_s, k_n, v_b, v_s, v_n, g_b, g_t, g_n,
    N: tl.constexpr, G: tl.constexpr, H: tl.constexpr, WIDE: tl.constexpr, M: tl.constexpr, J: tl.constexpr,
    DEPTH: tl.constexpr, DOCS: tl.constexpr, CAPPED: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Weights and gradients of the scores of some heads, whole blocks of them, [heads, blocks * M, across * J].

    The products run over the head size in pieces of DEPTH, in one loop over all blocks of keys: what the next block
    needs is read while the last one is written.
    """
    K: tl.constexpr = N // G
    PIECES: tl.constexpr = WIDE // DEPTH
    x = tl.program_id(0)
    b, kv = (base + x // G) // K, (base + x // G) % K
    n, block = kv * G + x % G, tl.num_programs(1) - 1 - tl.program_id(1)
    spans += (b * blocks + block) * 4
    first, last, begin, end = tl.load(spans), tl.load(spans + 1), tl.load(spans + 2), tl.load(spans + 3)
    at, doc_at = _places(q_pos, q_doc, b, block * M, T, M, DOCS)
    t = block * M + tl.arange(0, M)
    shift = tl.load(lse + (b.to(tl.int64) * N + n) * T + t, mask=t < T, other=float("inf"))
    less = tl.zeros((M,), tl.float32)
    for piece in tl.static_range(0, PIECES):
        less += _inner(
            _tile(out, b, block * M, n, T, T * N * H, N * H, H, piece * DEPTH + tl.arange(0, DEPTH), H, M, H == WIDE),
            _tile(dout, b, block * M, n, T, g_b, g_t, g_n, piece * DEPTH + tl.arange(0, DEPTH), H, M, H == WIDE),
        )
    place = (x.to(tl.int64) * blocks * M + t)[:, None] * (across * J) + tl.arange(0, J)[None, :]
    for j in range(first, last):
        raw = tl.zeros((M, J), tl.float32)
        dweights = tl.zeros((M, J), tl.float32)
        for c in range(0, WIDE, DEPTH):
            h = c + tl.arange(0, DEPTH)
            query = _tile(q, b, block * M, n, T, q_b, q_t, q_n, h, H, M, H == WIDE)
            key = _tile(k, b, j * J, kv, S, k_b, k_s, k_n, h, H, J, H == WIDE)
            grad = _tile(dout, b, block * M, n, T, g_b, g_t, g_n, h, H, M, H == WIDE)
            value = _tile(v, b, j * J, kv, S, v_b, v_s, v_n, h, H, J, H == WIDE)
            raw = tl.dot(query, key.T, raw, input_precision=PRECISION)
            dweights = tl.dot(grad, value.T, dweights, input_precision=PRECISION)
        scores, slope = _scores(raw, scale, cap, CAPPED, EXACT)
        weight = tl.exp2(scores - shift[:, None])
        if (j < begin) | (j >= end):
            pos, doc = _places(k_pos, k_doc, b, j * J, S, J, DOCS)
            seen = _visible(at[:, None], pos[None, :], doc_at[:, None], doc[None, :], window, DOCS)
            weight = tl.where(seen, weight, 0.0)
        tl.store(weights + place + j * J, weight.to(weights.dtype.element_ty))
        dscore = weight * (dweights - less[:, None]) * slope
        tl.store(dscores + place + j * J, dscore.to(dscores.dtype.element_ty))


@triton.jit(do_not_specialize=["T", "S", "base", "blocks", "across"])  # type: ignore[untyped-decorator]
def _columns(  # type: ignore[no-untyped-def]
    pairs, x, made, spans, T, S, slant, base, blocks, across, x_b, x_t, x_n,
    N: tl.constexpr, G: tl.constexpr, H: tl.constexpr, WIDE: tl.constexpr, M: tl.constexpr, J: tl.constexpr,
    DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What `_pairs` wrote, transposed, times x [B, T, N, H], over the queries and heads that see a block of keys:
    [B, S, K, H]. With weights and dO it is dV; with gradients of the scores and q, dK."""
    K: tl.constexpr = N // G
    PIECES: tl.constexpr = M // DEPTH
    z, block = tl.program_id(0), tl.program_id(1)
    b, kv = (base + z) // K, (base + z) % K
    h = tl.arange(0, WIDE)
    spans += (b * tl.num_programs(1) + block) * 4
    first, last = tl.load(spans), tl.load(spans + 1)
    count = (last - first) * PIECES
    s = block * J + tl.arange(0, J)
    total = tl.zeros((J, WIDE), tl.float32)
    for i in range(0, G * count):
        g, start = i // count, first * M + (i % count) * DEPTH
        t = start + tl.arange(0, DEPTH)
        row = (z * G + g).to(tl.int64) * blocks * M + t
        pair = tl.load(pairs + row[:, None] * (across * J) + s[None, :])
        right = _tile(x, b, start, kv * G + g, T, x_b, x_t, x_n, h, H, DEPTH, H == WIDE)
        total = tl.dot(pair.T, right, total, input_precision=PRECISION)
    _put(made, total * slant, b, block * J, kv, S, S * K * H, K * H, H, h, H, J)


@triton.jit(do_not_specialize=["T", "S", "base", "blocks", "across"])  # type: ignore[untyped-decorator]
def _lines(  # type: ignore[no-untyped-def]
    pairs, x, made, spans, T, S, slant, base, blocks, across, x_b, x_s, x_n,
    N: tl.constexpr, G: tl.constexpr, H: tl.constexpr, WIDE: tl.constexpr, M: tl.constexpr, J: tl.constexpr,
    DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What `_pairs` wrote times x [B, S, K, H], over the keys that a block of queries sees: with gradients of the
    scores and k, dQ [B, T, N, H]."""
    K: tl.constexpr = N // G
    PIECES: tl.constexpr = J // DEPTH
    z, block = tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1)
    b, kv = (base + z // G) // K, (base + z // G) % K
    h = tl.arange(0, WIDE)
    spans += (b * blocks + block) * 4
    first, last = tl.load(spans), tl.load(spans + 1)
    row = z.to(tl.int64) * blocks * M + block * M + tl.arange(0, M)
    total = tl.zeros((M, WIDE), tl.float32)
    for i in range(first * PIECES, last * PIECES):
        s = i * DEPTH + tl.arange(0, DEPTH)
        pair = tl.load(pairs + row[:, None] * (across * J) + s[None, :])
        right = _tile(x, b, i * DEPTH, kv, S, x_b, x_s, x_n, h, H, DEPTH, H == WIDE)
        total = tl.dot(pair, right, total, input_precision=PRECISION)
    _put(made, total * slant, b, block * M, kv * G + z % G, T, T * N * H, N * H, H, h, H, M)
