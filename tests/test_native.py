"""The native kernels against plain fp64, at sizes that fit no vector, tile, panel or block, and how they are built."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from paged_fixtures import Rows, last_positions
from torch import Tensor
from torch.nn import functional as F

from gemwright.ops import native, native_loss, rope
from gemwright.ops.attention import softcap
from gemwright.ops.divergence import DIVERGENCES, divergence
from gemwright.ops.gelu import gated_gelu
from gemwright.ops.head import Head
from gemwright.ops.loss import cross_entropy, linear_logprob
from gemwright.ops.norm import RMSNorm

DTYPES = (torch.float32, torch.bfloat16)
PAGE = 32
needs_library = pytest.mark.skipif(native.library() is None, reason="needs a C compiler")


def relative(x: Tensor, truth: Tensor) -> float:
    return float((x.double() - truth.double()).norm() / truth.double().norm())


def no_worse(ours: Tensor, naive: Tensor, truth: Tensor) -> None:
    """Our error is at most that of the naive computation in the same dtype, but for fp32's own rounding."""
    assert ours.dtype == naive.dtype
    assert ours.shape == truth.shape
    assert relative(ours, truth) <= relative(naive, truth) + 1e-6


# ---- linears ----


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 63, 70])
@pytest.mark.parametrize(("D", "out"), [(7, 13), (1, 1), (64, 201), (2100, 9)])
def test_linear(dtype: torch.dtype, rows: int, D: int, out: int) -> None:
    """Odd rows, tails of vectors, several panels, and more columns than one depth of the blocking."""
    x, w = torch.randn(rows, D).to(dtype), torch.randn(out, D).to(dtype)
    no_worse(native.linear(x, w), F.linear(x, w), x.double() @ w.double().T)


@pytest.mark.skipif(not native.has_tiles(), reason="this processor has no matrix tiles (AMX)")
@pytest.mark.parametrize("rows", [1, 3, 16, 17, 32, 33, 100])
@pytest.mark.parametrize(("D", "out"), [(32, 32), (96, 160), (1536, 576)])
def test_linear_on_tiles(rows: int, D: int, out: int) -> None:
    """Whole and partial tiles of x; what lies around x and the weight is NaN and not touched."""
    around_x, around_w = torch.full((rows + 2, D), torch.nan), torch.full((out + 2, D), torch.nan)
    around_x[1:-1], around_w[1:-1] = torch.randn(rows, D), torch.randn(out, D)
    x, w = around_x.bfloat16()[1:-1], around_w.bfloat16()[1:-1]
    no_worse(native.linear(x, w), F.linear(x, w), x.double() @ w.double().T)


@needs_library
def test_linear_keeps_leading_dimensions_and_takes_any_layout_of_x() -> None:
    x, w = torch.randn(5, 2, 3).bfloat16(), torch.randn(11, 5).bfloat16()
    turned = x.permute(1, 2, 0)
    assert torch.equal(native.linear(turned, w), native.linear(turned.reshape(6, 5), w).view(2, 3, 11))


@needs_library
def test_linear_reads_no_element_past_a_row() -> None:
    """The weight is the last thing in its storage, and its neighbours are NaN."""
    around = torch.full((3, 7), torch.nan).bfloat16()
    around[1] = 1.0
    assert native.linear(torch.ones(1, 7).bfloat16(), around[1:2]).item() == 7


@needs_library
def test_linear_with_several_threads_is_bitwise_that_with_one() -> None:
    x, w = torch.randn(9, 300).bfloat16(), torch.randn(1000, 300).bfloat16()
    want = native.linear(x, w)
    torch.set_num_threads(3)
    assert torch.equal(native.linear(x, w), want)


@needs_library
def test_linear_rounds_to_nearest_even_and_keeps_what_is_not_finite() -> None:
    w = torch.eye(1).bfloat16()
    up, down = torch.tensor([[1 + 2**-7, 2**-8]]).bfloat16(), torch.tensor([[1.0, 2**-8]]).bfloat16()
    ones = torch.ones(1, 2).bfloat16()
    assert native.linear(up, ones).item() == 1 + 2**-6  # halfway: to the even one above
    assert native.linear(down, ones).item() == 1  # halfway: to the even one below
    assert native.linear(torch.full((1, 1), torch.inf).bfloat16(), w).item() == torch.inf
    assert native.linear(torch.full((1, 1), torch.nan).bfloat16(), w).isnan()


@needs_library
def test_tensors_that_do_not_fit_are_refused() -> None:
    x, w = torch.ones(1, 8), torch.ones(4, 8)
    for bad_x, bad_w in ((x[:, :7], w), (x.bfloat16(), w), (x.double(), w.double()), (x, torch.ones(8, 4).T)):
        with pytest.raises(AssertionError):
            native.linear(bad_x, bad_w)


# ---- attention ----


class Paged(Rows):
    """Rows over the native kernel."""

    def native(self, q_BTNH: Tensor, q_pos: Tensor, *, window: int | None, scale: float, cap: float | None) -> Tensor:
        return native.paged_attention(
            q_BTNH, self.k, self.v, self.table, self.first, q_pos.int(), window=window, scale=scale, cap=cap
        )


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 5, 64, 100])
@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize(("T", "N", "K", "H"), [(1, 4, 2, 64), (3, 9, 3, 16), (17, 6, 1, 23), (70, 2, 2, 8)])
def test_paged_attention(
    dtype: torch.dtype, window: int | None, cap: float | None, T: int, N: int, K: int, H: int
) -> None:
    """Ragged rows, windows inside and across pages, scores far past the cap, groups and heads of odd size."""
    lengths = [T, 33 + T, 200, 64 + T]
    lengths = [max(n, T) for n in lengths]
    paged = Paged(lengths, K=K, H=H, dtype=dtype)
    q_BTNH, q_pos = 3 * torch.randn(4, T, N, H).to(dtype), last_positions(lengths, T)
    how = dict(window=window, scale=H**-0.5, cap=cap)
    truth = paged.plain(q_BTNH, q_pos, torch.float32, **how)
    no_worse(paged.native(q_BTNH, q_pos, **how), truth.to(dtype), truth)


@needs_library
@pytest.mark.parametrize("threads", [1, 4])
def test_long_rows_are_split_and_merged(threads: int) -> None:
    """With more threads than heads the pages of a row are several jobs; one key far ahead of the rest outweighs all."""
    torch.set_num_threads(threads)
    lengths = [1200, 40]
    paged = Paged(lengths, K=1, H=8, dtype=torch.float32)
    page, offset = paged.table[0, 300 // PAGE], 300 % PAGE
    paged.k[page, :, offset] = paged.k_BSKH[0, 300] = 30.0
    q_BTNH, q_pos = torch.rand(2, 2, 3, 8), last_positions(lengths, 2)
    for window in (None, 1000):
        got = paged.native(q_BTNH, q_pos, window=window, scale=0.3, cap=None)
        want = paged.plain(q_BTNH, q_pos, torch.float32, window=window, scale=0.3, cap=None)
        torch.testing.assert_close(got, want, atol=2e-6, rtol=2e-6)


@needs_library
def test_tables_may_begin_late_and_hold_padding() -> None:
    """A local table begins where the window does; padded queries yield 0, alone in a row, between and after others."""
    lengths = [150, 7, 90]
    paged = Paged(lengths, K=2, H=16, dtype=torch.float32, first=[3, 0, 1])
    q_pos = torch.tensor([[148, 149, -1], [-1, -1, -1], [88, -1, 89]])
    q_BTNH = torch.randn(3, 3, 4, 16)
    got = paged.native(q_BTNH, q_pos, window=40, scale=0.25, cap=5.0)
    want = paged.plain(q_BTNH, q_pos, torch.float32, window=40, scale=0.25, cap=5.0)
    torch.testing.assert_close(got, want, atol=2e-6, rtol=2e-6)
    assert got[1].eq(0).all()
    assert got[0, 2].eq(0).all()
    assert got[2, 1].eq(0).all()
    assert got[2, 2].ne(0).all()


@needs_library
@pytest.mark.parametrize("page", [-1, 10**6])
def test_a_visible_page_must_be_in_the_store(page: int) -> None:
    paged = Paged([40], K=1, H=8, dtype=torch.float32)
    paged.table[0, 0] = page
    q_BTNH = torch.randn(1, 1, 1, 8)
    with pytest.raises(AssertionError, match="not in its table of 3, or not among the 4 of"):
        paged.native(q_BTNH, torch.tensor([[39]]), window=None, scale=1.0, cap=None)
    assert paged.native(q_BTNH, torch.tensor([[39]]), window=8, scale=1.0, cap=None).isfinite().all()  # not read


@needs_library
@pytest.mark.parametrize(("first", "pos"), [(1, 39), (0, 96)])
def test_a_table_must_hold_every_visible_page(first: int, pos: int) -> None:
    """It begins too late, or ends too early: keys would be left out in silence."""
    paged = Paged([40], K=1, H=8, dtype=torch.float32)
    paged.first += first
    with pytest.raises(AssertionError, match="not in its table"):
        paged.native(torch.randn(1, 1, 1, 8), torch.tensor([[pos]]), window=None, scale=1.0, cap=None)


@needs_library
def test_a_nan_key_is_not_hidden() -> None:
    paged = Paged([40], K=1, H=8, dtype=torch.float32)
    paged.k[paged.table[0, 0], 0, 3] = torch.nan
    q_BTNH = torch.randn(1, 1, 1, 8)
    for cap in (None, 2.0):
        assert paged.native(q_BTNH, torch.tensor([[39]]), window=None, scale=1.0, cap=cap).isnan().all()


@needs_library
@pytest.mark.parametrize("cap", [None, 50.0, 1.0, 1e4])
def test_every_weight_is_exact(cap: float | None) -> None:
    """Values are one-hot, so the output is the weights. A cap of 1e4 asks for tanh near 0, a cap of 1 far from it."""
    scores = -torch.arange(PAGE, dtype=torch.float32) / 16
    k, v = scores.view(1, 1, PAGE, 1).expand(1, 1, PAGE, PAGE) / PAGE, torch.eye(PAGE).view(1, 1, PAGE, PAGE)
    zero = torch.zeros(1, 1, dtype=torch.int32)
    got = native.paged_attention(
        torch.ones(1, 1, 1, PAGE), k.contiguous(), v, zero, zero[0], zero + PAGE - 1, window=None, scale=1.0, cap=cap
    )
    capped = scores.double() if cap is None else cap * torch.tanh(scores.double() / cap)
    torch.testing.assert_close(got.flatten().double(), capped.softmax(0), atol=0, rtol=5e-7)


# ---- what lies between ----


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm(dtype: torch.dtype) -> None:
    for size in (7, 64, 2304):
        plain = RMSNorm(size, 1e-6).to(dtype).requires_grad_(False)
        plain.weight.copy_(torch.randn(size))
        weight = plain.weight.data
        x = torch.randn(2, 3, size).to(dtype)
        x[0, 0] *= 1e-4  # where eps counts
        x64 = x.double()
        truth = x64 / (x64.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + weight.double())
        no_worse(native.norm(x, weight, 1e-6), plain(x), truth)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("H", [2, 6, 64])
def test_rotate(dtype: torch.dtype, H: int) -> None:
    pos = torch.tensor([[0, 1, 5000], [-1, 7, 100]])
    x, tables = torch.randn(2, 3, 5, H).to(dtype), rope.rope_tables(pos, H, 10000.0)
    truth = rope.rotate(x.double(), (tables[0].double(), tables[1].double()))
    no_worse(native.rotate(x, tables), rope.rotate(x, tables), truth)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_gelu(dtype: torch.dtype) -> None:
    gate = torch.cat((torch.linspace(-4, 4, 1001), torch.tensor([0.0, 1e-6, -1e-6]))).to(dtype)
    up = torch.randn(len(gate)).to(dtype)
    truth = F.gelu(gate.double(), approximate="tanh") * up.double()
    no_worse(native.gated_gelu(gate, up), F.gelu(gate, approximate="tanh") * up, truth)
    far = torch.tensor([1e4, -1e4, torch.nan])
    torch.testing.assert_close(
        native.gated_gelu(far, torch.ones(3)), torch.tensor([1e4, 0.0, torch.nan]), equal_nan=True
    )


# ---- the build ----


def test_without_a_compiler_there_is_no_library_and_the_log_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert native.library.__wrapped__() is None
    (line,) = caplog.messages
    assert line == "native kernels are not used, torch computes instead: no C compiler (gcc or cc) is in PATH"


@needs_library
def test_a_compiler_that_fails_is_quoted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr(native, "FLAGS", ("-mno-such-flag",))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert native.library.__wrapped__() is None
    assert "-mno-such-flag" in caplog.text
    assert not list((tmp_path / "gemwright").iterdir())  # nothing half made is left


@needs_library
def test_a_cache_folder_that_cannot_be_made_is_no_crash(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        assert native.library.__wrapped__() is None
    assert "Not a directory" in caplog.text


@needs_library
def test_two_builds_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty library serves: what is tested is the way into the folder."""
    monkeypatch.setattr(native, "SOURCES", ())
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(native.build, [tmp_path, tmp_path])
    assert first == second
    assert list(tmp_path.iterdir()) == [first]
    before = first.stat().st_mtime_ns
    assert native.build(tmp_path).stat().st_mtime_ns == before  # not compiled again
    monkeypatch.setattr(native, "_processor", lambda: "another one")
    assert native.build(tmp_path) != first


@needs_library
def test_the_kernels_run_in_the_pool_of_torch() -> None:
    """Bug caught: another package's OpenMP runtime, mapped beside torch's, was taken for it."""
    ours, torchs = native.library(), ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    assert ours is not None
    one, other = (ctypes.cast(lib.omp_get_max_threads, ctypes.c_void_p).value for lib in (ours, torchs))
    assert one == other


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_arithmetic_is_the_same_with_the_kernels(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Norm, rotation, gate and cap of the model: in inference they run the kernels, and equal the plain definition."""
    x, y = (3 * torch.randn(2, 5, 4, 16)).to(dtype), torch.randn(2, 5, 4, 16).to(dtype)
    norm = RMSNorm(16, 1e-6).to(dtype)
    tables = rope.rope_tables(torch.arange(5).expand(2, 5) + 1000, 16, 10000.0)
    calls: list[Callable[[], Tensor]] = [
        lambda: norm(x),
        lambda: rope.rotate(x, tables),
        lambda: gated_gelu(x, y),
        lambda: softcap(99 * x.float(), 50.0),
    ]
    with torch.no_grad():
        norm.weight.normal_()
        fast = [call() for call in calls]
        monkeypatch.setattr(native, "library", lambda: None)
        plain = [call() for call in calls]
    for a, b in zip(fast, plain, strict=True):
        tolerance = 2e-2 if a.dtype == torch.bfloat16 else 1e-5  # one rounding instead of two
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)
    with torch.enable_grad():
        assert not native.serves(x), "a gradient needs plain torch"


# ---- losses ----


def sided(raw: Tensor, cap: float | None, temperature: float) -> tuple[native_loss.Side, Tensor]:
    """What the kernels take, its products inside larger rows, and the logits in fp64."""
    held = torch.full((len(raw), raw.shape[1] + 10), torch.nan, dtype=raw.dtype)
    held[:, : raw.shape[1]] = raw
    wide = raw.double()
    logits = (wide if cap is None else cap * torch.tanh(wide / cap)) / temperature
    return native_loss.read(held[:, : raw.shape[1]], cap=cap, temperature=temperature), logits


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("cap", "temperature"), [(30.0, 1.0), (10.0, 0.7), (None, 1.5)])
def test_logits_and_their_gradient(dtype: torch.dtype, cap: float | None, temperature: float) -> None:
    """An odd width past one span of fp32 sums, past the cap, against fp64; what lies beside the rows stays."""
    raw = (60 * torch.randn(9, 2501)).to(dtype)
    side, want = sided(raw, cap, temperature)
    got = native_loss.logits(raw, cap=cap, temperature=temperature)
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-5)
    assert torch.equal(side.top_x1, got.amax(-1, keepdim=True)), "the likeliest id is found by comparing with it"
    torch.testing.assert_close(
        (side.top_x1 + side.log_sum_x1).double(), want.logsumexp(-1, keepdim=True), rtol=1e-6, atol=1e-6
    )
    torch.testing.assert_close(
        native_loss.entropy(side).double(), torch.special.entr(want.softmax(-1)).sum(-1), rtol=1e-5, atol=1e-5
    )
    weight, mass, ids = torch.rand(9, 1), torch.randn(9, 3), torch.randint(2501, (9, 3))
    ids[:, 2] = ids[:, 0]  # an id that stands twice
    ids[0, 1] = 2500
    slope = 1 if cap is None else 1 - torch.tanh(raw.double() / cap) ** 2
    truth = (weight.double() * want.softmax(-1)).scatter_add(1, ids, mass.double()) * slope / temperature
    made = native_loss.gradient_(side, weight, ids, mass)
    assert relative(made, truth) < (1e-5 if dtype == torch.float32 else 4e-3)
    assert side.raw_xV.untyped_storage().nbytes() == 9 * 2511 * dtype.itemsize
    assert made.as_strided((9, 10), (2511, 1), 2501).isnan().all()


@needs_library
def test_a_confident_token_keeps_its_small_gradient_in_bf16() -> None:
    """p - 1 is rounded after the difference: from a rounded p it would be 0 or 0.4 %."""
    raw = torch.zeros(1, 64, dtype=torch.bfloat16)
    raw[0, 7] = 12.0
    side, logits = sided(raw, None, 1.0)
    made = native_loss.gradient_(side, torch.ones(1, 1), torch.tensor([[7]]), -torch.ones(1, 1))
    want = logits.softmax(-1)[0, 7] - 1
    assert -1e-3 < float(want) < 0
    assert abs(float(made[0, 7]) / float(want) - 1) < 4e-3


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("kind", "beta"), [*((kind, 0.5) for kind in DIVERGENCES), ("jsd", 0.1), ("jsd", 1), ("jsd", 0)]
)
def test_divergences(kind: str, beta: float, dtype: torch.dtype) -> None:
    """Each kind of the kernels is the definition of `ops.divergence` on fp64 logits, value and gradient."""
    raws = [(20 * torch.randn(5, 2501)).to(dtype) for _ in range(2)]
    (ours, _), (theirs, their_logits) = sided(raws[0], 30.0, 0.7), sided(raws[1], None, 1.3)
    raw = raws[0].double().requires_grad_()
    log_q = (30 * torch.tanh(raw / 30) / 0.7).log_softmax(-1)
    values, _ = DIVERGENCES[kind](their_logits.log_softmax(-1), log_q, beta)
    want = values.sum(-1, keepdim=True)
    value, total = native_loss.compare(ours, theirs, kind, beta)
    assert relative(value, want.detach()) < 1e-5
    weight = torch.rand(5, 1)
    (truth,) = torch.autograd.grad((want * weight).sum(), raw)
    made = native_loss.divergence_gradient_(ours, theirs, kind, beta, total, weight)
    # where the teacher leaves nothing to the student's favourite, the gradient of the JSD is a small difference
    exact = 2e-4 if kind == "jsd" else 2e-5
    assert relative(made, truth) < (exact if dtype == torch.float32 else 4e-3)


@needs_library
def test_every_divergence_has_a_kernel() -> None:
    assert native_loss.KINDS.keys() == DIVERGENCES.keys()


@needs_library
def test_products_that_are_not_finite_reach_the_sum() -> None:
    raw = torch.zeros(2, 40)
    raw[0, 39] = torch.nan
    side = native_loss.read(raw, cap=30.0, temperature=1.0)
    assert side.log_sum_x1[0].isnan()
    torch.testing.assert_close(side.log_sum_x1[1].exp(), torch.tensor([40.0]))


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
def test_losses_are_the_same_without_the_kernels(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cross-entropy, log-probabilities and a divergence with their gradients, through plain torch."""
    hidden, weight = (torch.randn(n, 24).to(dtype).requires_grad_() for n in (37, 131))
    teacher, targets = torch.randn(37, 24).to(dtype), torch.randint(131, (37,))

    def run() -> list[Tensor]:
        found = [
            cross_entropy(hidden, weight, targets, softcap=5.0)[0],
            linear_logprob(hidden, weight, targets, softcap=5.0)[0].sum(),
            divergence("jsd", hidden, Head(weight, 5.0), teacher, Head(weight.detach(), None))[0],
        ]
        return [x.detach() for y in found for x in (y, *torch.autograd.grad(y, (hidden, weight)))]

    fast = run()
    monkeypatch.setattr(native, "library", lambda: None)
    for one, other in zip(fast, run(), strict=True):
        assert one.dtype == other.dtype
        assert relative(one, other) < (1e-5 if dtype == torch.float32 else 1e-2)
