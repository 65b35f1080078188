"""Every attention backend against fp64 truth: outputs and gradients, in fp32 and bf16, on ragged shapes.

What is compared with what stands in `attention_fixtures.py`.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import warnings

import pytest
import torch
from attention_fixtures import BF16, CASES, FP32, IDS, Case, check_gradients, check_output, rule
from oracle import relative
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode

from gemwright.ops import attention_blocked, attention_flex, native
from gemwright.ops.attention import (
    AUTO,
    BACKENDS,
    PADDING,
    PHASES,
    Attend,
    Attention,
    Backend,
    Visibility,
    resolve,
    softcap,
)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_mask_is_the_rule(case: Case) -> None:
    see = case.see()
    want = rule(case)
    assert torch.equal(see.mask(), want)
    assert torch.equal(see.mask(slice(0, 1), slice(1, None)), want[:, :1, 1:])


@pytest.fixture(params=["reference", "blocked", "blocks", "blocked_bf16"])
def attend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Attend:
    """A backend; `blocks` is the blocked one with a workspace of a few rows, `blocked_bf16` the one for native bf16."""
    if request.param == "reference":
        return BACKENDS["reference"].load()
    if request.param == "blocks":
        monkeypatch.setattr(attention_blocked, "WORKSPACE", 1)
    monkeypatch.setattr(attention_blocked, "has_fast_bf16", lambda: request.param == "blocked_bf16")
    return BACKENDS["blocked"].load()


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_output(attend: Attend, case: Case, dtype: torch.dtype) -> None:
    check_output(attend, case, dtype)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_gradients(attend: Attend, case: Case, dtype: torch.dtype) -> None:
    check_gradients(attend, case, dtype)


def test_many_blocks_are_really_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The premise of `blocks`: 130 queries make nine blocks, and a window's block reads its span alone."""
    monkeypatch.setattr(attention_blocked, "WORKSPACE", 1)
    see = Case("", 130, 130, window=20).see()
    blocks = attention_blocked.plan(see, 4)
    assert [b.queries.start for b in blocks] == list(range(0, 130, 16))
    assert [b.keys for b in blocks][2:4] == [slice(13, 48), slice(29, 64)]
    assert [b.full for b in blocks][2] == slice(15, 20)  # keys 28 .. 32 are in the window of all of 32 .. 47


def test_blocked_keeps_nothing_of_size_t_times_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor of T x S elements is made, forward or backward, when the workspace is smaller than that."""
    T, largest = 1024, 0
    monkeypatch.setattr(attention_blocked, "WORKSPACE", 4 * 4 * T * 32)

    class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            results = out if isinstance(out, tuple | list) else (out,)
            largest = max([largest, *(x.untyped_storage().nbytes() for x in results if isinstance(x, Tensor))])
            return out

    q, k, v = (x.requires_grad_() for x in Case("", T, T, rows=1).inputs(FP32))
    see = Case("", T, T, rows=1).see()
    with Watch():  # type: ignore[no-untyped-call]
        torch.autograd.grad(attention_blocked.blocked(q, k, v, see, scale=0.3, cap=50.0).sum(), (q, k, v))
    assert largest < 4 * T * T / 2, largest


def test_softcap() -> None:
    x = torch.tensor([-1e4, -50.0, 0.0, 25.0, 1e4])
    want = torch.tensor([-50.0, -38.07970778, 0.0, 23.10585786, 50.0])  # 50 tanh(x / 50)
    torch.testing.assert_close(softcap(x, 50.0), want)
    assert softcap(x, None) is x


@pytest.mark.parametrize("name", ["reference", "blocked"])
def test_the_order_is_scale_cap_mask(name: str) -> None:
    """By hand: q . k is 400 and 0, scaled 100 and 0, capped tanh(100) = 1 and 0; the key of the future is masked."""
    q = torch.tensor([[[[20.0]]]])
    k = torch.tensor([[[[20.0]], [[0.0]], [[5.0]]]])
    v = torch.tensor([[[[1.0]], [[2.0]], [[100.0]]]])
    see = Visibility(torch.tensor([[1]]), torch.tensor([[0, 1, 2]]))
    out = BACKENDS[name].load()(q, k, v, see, scale=0.25, cap=1.0)
    weight = math.e / (math.e + 1)
    assert float(out) == pytest.approx(weight * 1 + (1 - weight) * 2, abs=1e-6)


# ----- the choice of a backend


def test_auto_table() -> None:
    """`auto` takes what the table says, on every device and in every phase."""
    for (device, phase), name in AUTO.items():
        assert resolve("auto", phase, device=device, dtype=BF16, cap=50.0, window=4096) == name
    assert {device for device, _ in AUTO} == {"cpu", "cuda", "mps"}
    got = Attention.resolve(device="cuda", dtype=FP32, cap=50.0, window=4096)
    assert got == Attention("flex", "flex", "blocked")
    got = Attention.resolve(device="cpu", dtype=FP32, cap=50.0, window=8)
    assert got == Attention("blocked", "blocked", "blocked")


@pytest.mark.parametrize(
    ("name", "phase", "device", "dtype", "message"),
    [
        ("sdpa", "prefill", "cuda", BF16, "got 'sdpa', allowed are auto, reference, blocked, flex"),
        ("flex", "train", "cpu", FP32, "got 'flex' for train, which cannot run backward"),
        ("flex", "prefill", "mps", BF16, "got 'flex' for prefill, which cannot run on mps"),
        ("blocked", "decode", "mps", BF16, "got 'blocked' for decode, which cannot run on mps"),
        ("auto", "decode", "xpu", BF16, "got 'reference' for decode, which cannot run on xpu"),
        ("reference", "train", "cpu", torch.float64, "cannot compute in torch.float64"),
    ],
)
def test_what_cannot_run_is_refused(name: str, phase: str, device: str, dtype: torch.dtype, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(name, phase, device=device, dtype=dtype, cap=50.0, window=8)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("name", [*BACKENDS, "auto"])
def test_capless_or_windowless_backends_are_refused(name: str, phase: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that cannot cap serves a model without a cap and no other; the same for the window."""
    lame = {
        key: dataclasses.replace(backend, caps=False, windows=False, devices=("cuda",))
        for key, backend in BACKENDS.items()
    }
    monkeypatch.setattr("gemwright.ops.attention.BACKENDS", lame)
    with pytest.raises(ValueError, match="cannot apply the soft-cap or apply the window"):
        resolve(name, phase, device="cuda", dtype=BF16, cap=50.0, window=8)
    with pytest.raises(ValueError, match="cannot apply the window"):
        resolve(name, phase, device="cuda", dtype=BF16, cap=None, window=8)
    assert resolve(name, phase, device="cuda", dtype=BF16, cap=None, window=None) in BACKENDS


def test_choice_is_logged_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="gemwright"):
        Attention.resolve("reference", device="cpu", dtype=FP32, cap=50.0, window=8)
    assert [r.getMessage() for r in caplog.records] == [
        "attention on cpu: train reference, prefill reference, decode reference"
    ]


def test_explicit_name_holds_for_every_phase() -> None:
    assert isinstance(BACKENDS["blocked"], Backend)
    got = Attention.resolve("blocked", device="cuda", dtype=BF16, cap=50.0, window=8)
    assert got == Attention("blocked", "blocked", "blocked")
    with pytest.raises(ValueError, match="run backward"):
        Attention.resolve("flex", device="cpu", dtype=FP32, cap=50.0, window=8)


# ----- FlexAttention

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="compiling FlexAttention for CPU needs g++")


@needs_compiler
def test_flex_on_cpu() -> None:
    """The fused kernel, compiled once: one shape of padded blocks holds windows, layouts, caps and scales of all kinds.

    A regression: 40 keys made torch's CPU kernel write past its scores (relative error 0.18, or NaN), since 40 is whole
    vectors but not whole tiles.
    """
    same = [case for case in CASES if (case.rows, case.heads, case.kv_heads, case.head_dim) == (2, 4, 2, 16)]
    same = [case for case in same if case.S <= 128 and case.cap is not None and case.layout != "documents"]
    assert {(case.T, case.S) for case in same} >= {(1, 1), (1, 40), (7, 40), (40, 40), (7, 7)}
    before = compilations()
    with torch.no_grad():
        for case in same:
            check_output(attention_flex.flex, case, FP32)
    assert compilations() <= before + 1


def compilations() -> int:
    """Graphs that torch.compile made in this process."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def test_flex_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Score and mask functions as CUDA gets them, over every case, with torch's uncompiled definition as the kernel."""
    monkeypatch.setattr(attention_flex, "_compiled", lambda device: flex_attention)
    monkeypatch.setattr(attention_flex, "_pad", lambda x, value=0: x)
    monkeypatch.setattr("torch.nn.attention.flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    for case in CASES:
        check_output(attention_flex.flex, case, FP32)


@pytest.mark.parametrize("window", [None, 130])
def test_flex_reads_the_blocks_it_must_and_no_others(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the dense mask: blocks with a visible pair are listed once, as full only where all of it is visible."""
    monkeypatch.setattr(attention_flex, "_pad", lambda x, value=0: x)
    pos = torch.arange(600)
    packed = torch.cat((torch.arange(300), torch.arange(280), torch.full((20,), PADDING)))
    docs = torch.cat((torch.zeros(300), torch.ones(300))).int().repeat(2, 1)
    positions = torch.stack((pos, packed))
    for see, exact in ((Visibility(positions[:1], positions[:1], window=window), True),
                       (Visibility(positions, positions, docs, docs, window=window), False)):  # fmt: skip
        mask = attention_flex.block_mask(see)
        padded = torch.nn.functional.pad(see.mask(), (0, -600 % 128, 0, -600 % 128))
        tiles_Btskk = padded.view(len(padded), 5, 128, 5, 128).transpose(2, 3)
        some, whole = tiles_Btskk.any((-2, -1)), tiles_Btskk.all(-1).all(-1)
        partial, full = (
            dense(n, i)
            for n, i in ((mask.kv_num_blocks, mask.kv_indices), (mask.full_kv_num_blocks, mask.full_kv_indices))
        )
        assert not (partial & full).any()
        assert not (some & ~(partial | full)).any()
        assert torch.equal(full, whole)
        assert not exact or torch.equal(partial | full, some)


def dense(counts: Tensor | None, indices: Tensor | None) -> Tensor:
    """Listed blocks as a mask [B, t, k]."""
    assert counts is not None
    assert indices is not None
    listed = torch.arange(indices.shape[-1]) < counts[..., None]
    return torch.zeros_like(listed).scatter_(-1, indices.long(), listed)[:, 0]


def test_flex_compiles_few_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA, lengths are symbolic once they change: new windows, caps, scales and lengths need no new kernel.

    A regression: at torch's own limit of kernels (8, here 1) it warned once and went on with the whole score matrix in
    memory.
    """
    torch._dynamo.reset()
    kernel = torch.compile(flex_attention, dynamic=None, backend="eager")
    monkeypatch.setattr(attention_flex, "_compiled", lambda device: kernel)
    monkeypatch.setattr(attention_flex, "_pad", lambda x, value=0: x)
    before = compilations()
    with torch.no_grad(), warnings.catch_warnings(), torch._dynamo.config.patch(recompile_limit=1):
        warnings.simplefilter("error")
        for T, S in [(64, 64), (40, 40), (57, 57), (64, 192), (13, 205)]:
            for window, cap, scale in ((8, 50.0, 0.25), (None, 50.0, 0.25), (9, 30.0, 0.3)):
                check_output(attention_flex.flex, Case("", T, S, window=window, cap=cap, scale=scale), FP32)
    assert 1 < compilations() - before <= 3
    torch._dynamo.reset()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("head_dim", [16, 128, 256])
def test_flex_on_cuda(head_dim: int, dtype: torch.dtype) -> None:
    """Forward and backward against truth, over every layout, at the head sizes of the debug, 27B and smaller models."""
    for case in CASES:
        if case.head_dim == 16:
            wide = dataclasses.replace(case, head_dim=head_dim, scale=case.scale * (16 / head_dim) ** 0.5)
            with torch.no_grad():
                check_output(attention_flex.flex, wide, dtype, "cuda")
            check_gradients(attention_flex.flex, wide, dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["reference", "blocked"])
def test_plain_backends_on_cuda(name: str, dtype: torch.dtype) -> None:
    for case in CASES:
        check_output(BACKENDS[name].load(), case, dtype, "cuda")
        check_gradients(BACKENDS[name].load(), case, dtype, "cuda")


@pytest.mark.skipif(native.library() is None, reason="no compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("workspace", [1, attention_blocked.WORKSPACE])
def test_blocked_is_the_same_without_the_native_passes(
    dtype: torch.dtype, workspace: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Output and gradients, with a window, documents and padding, scores past the cap; torch alone is the oracle."""
    monkeypatch.setattr(attention_blocked, "WORKSPACE", workspace)
    monkeypatch.setattr(attention_blocked, "has_fast_bf16", lambda: True)
    pos = torch.cat([torch.arange(40), torch.arange(30), torch.full((7,), PADDING)]).expand(2, -1).clone()
    doc = torch.cat([torch.zeros(40), torch.ones(37)]).long().expand(2, -1)
    q, k, v = ((3 * torch.randn(2, 77, n, 16)).to(dtype).requires_grad_() for n in (4, 2, 2))
    outer = torch.randn(2, 77, 4, 16).to(dtype)

    def run() -> list[Tensor]:
        see = Visibility(pos, pos, doc, doc, 9)
        out = attention_blocked.blocked(q, k, v, see, scale=1.0, cap=20.0)
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), outer)]

    with torch.no_grad():
        assert attention_blocked._serves(q, 20.0)
    fast = run()
    monkeypatch.setattr(native, "library", lambda: None)
    for one, other in zip(fast, run(), strict=True):
        assert relative(one, other) < (2e-6 if dtype == torch.float32 else 1e-2)
