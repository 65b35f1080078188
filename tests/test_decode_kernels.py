"""The Triton kernels against the definitions: on a GPU as they are, elsewhere in fp32 through Triton's interpreter.

Attention over pages is compared with `reference` on the keys before they were scattered, at ragged lengths, windows
inside and across pages, scores far past the cap, groups of odd size; what lies between the matmuls with the modules of
the model.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from paged_fixtures import Rows, last_positions
from torch import Tensor
from torch.nn import functional as F
from triton_fixtures import DEVICE, GPU, MARKS

from gemwright.ops import gpu, rope
from gemwright.ops.attention import softcap
from gemwright.ops.gelu import gated_gelu
from gemwright.ops.norm import RMSNorm

FP32, BF16 = torch.float32, torch.bfloat16
DTYPES = [FP32, BF16] if GPU else [FP32]
"""The interpreter multiplies the bits of bf16 numbers as integers (Triton 3.6)."""


pytestmark = MARKS


def kernels() -> Any:
    return importlib.import_module("gemwright.ops.decode_kernels")


def attention() -> Any:
    return importlib.import_module("gemwright.ops.attention_decode")


def relative(x: Tensor, truth: Tensor) -> float:
    x, truth = (t.detach().double().cpu() for t in (x, truth))
    assert x.shape == truth.shape
    return float((x - truth).norm() / truth.norm())


def attend(paged: Rows, q_BTNH: Tensor, q_pos: Tensor, **how: Any) -> Tensor:
    """Output of the kernel, on the CPU; the store's tensors go to the device, where NaN stays NaN."""
    on = [x.to(DEVICE) for x in (q_BTNH, paged.k, paged.v, paged.table, paged.first, q_pos.int())]
    out: Tensor = attention().paged_attention(*on, **how)
    return out.cpu()


SHAPES = [(1, 4, 2, 64), (3, 9, 3, 16), (17, 6, 1, 24), (40, 2, 2, 32)]
LARGE = [(1, 8, 4, 256), (1, 32, 16, 128), (5, 16, 8, 256), (130, 8, 4, 256)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 5, 100])
@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize(("T", "N", "K", "H"), SHAPES)
def test_attention_over_pages(
    dtype: torch.dtype, window: int | None, cap: float | None, T: int, N: int, K: int, H: int
) -> None:
    check_attention(dtype, window, cap, T, N, K, H)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize(("T", "N", "K", "H"), LARGE)
def test_attention_at_the_sizes_of_gemma(
    dtype: torch.dtype, window: int | None, T: int, N: int, K: int, H: int
) -> None:
    check_attention(dtype, window, 50.0, T, N, K, H)


def check_attention(dtype: torch.dtype, window: int | None, cap: float | None, T: int, N: int, K: int, H: int) -> None:
    lengths = [T, 33 + T, 200, 64 + T]
    lengths = [max(n, T) for n in lengths]
    paged = Rows(lengths, K=K, H=H, dtype=dtype)
    q_BTNH, q_pos = (3 * torch.randn(4, T, N, H)).to(dtype), last_positions(lengths, T)
    q_pos[1, 0] = -1  # padding: its output is 0
    how: dict[str, Any] = dict(window=window, scale=H**-0.5, cap=cap)
    truth = paged.plain(q_BTNH, q_pos, FP32, **how)
    got = attend(paged, q_BTNH, q_pos, **how)
    assert got.isfinite().all()
    assert not got[1, 0].any()
    assert relative(got, truth) < (2e-6 if dtype == FP32 else 2**-7)


@pytest.mark.parametrize("parts", [1, 2, 8])
@pytest.mark.parametrize("window", [None, 300])
def test_parts_are_joined(parts: int, window: int | None) -> None:
    """More parts than blocks of keys, and fewer; one key far ahead of the rest outweighs all."""
    lengths = [700, 40, 1]
    paged = Rows(lengths, K=1, H=16, dtype=FP32)
    paged.k_BSKH[0, 600] *= 6
    page, offset = paged.table[0, 600 // 32], 600 % 32
    paged.k[page, :, offset] *= 6
    q_BTNH, q_pos = 3 * torch.randn(3, 1, 2, 16), last_positions(lengths, 1)
    how: dict[str, Any] = dict(window=window, scale=0.25, cap=20.0)
    launch = attention().Launch(tile=16, keys=32, queries=1, parts=parts, warps=4, stages=2)
    got = attend(paged, q_BTNH, q_pos, launch=launch, **how)
    assert relative(got, paged.plain(q_BTNH, q_pos, torch.float64, **how)) < 2e-6


def test_a_table_that_begins_late() -> None:
    """A local layer's table has lost its first pages; the window does not reach them."""
    lengths = [150, 90]
    paged = Rows(lengths, K=2, H=16, dtype=FP32, first=[3, 1])
    q_BTNH, q_pos = torch.randn(2, 1, 4, 16), last_positions(lengths, 1)
    how: dict[str, Any] = dict(window=40, scale=0.25, cap=None)
    assert relative(attend(paged, q_BTNH, q_pos, **how), paged.plain(q_BTNH, q_pos, FP32, **how)) < 2e-6


def test_launches_follow_from_shapes() -> None:
    """One row fills the chip with parts of its keys, many rows need none; the tile holds the heads of a group."""
    plan = attention().plan
    one = plan(1, 1, 8, 4, 256, bf16=True, processors=132)
    assert one.parts == 32 and one.tile == 16
    assert plan(64, 1, 8, 4, 256, bf16=True, processors=132).parts == 1
    assert plan(4, 512, 8, 4, 256, bf16=True, processors=132).tile == 64
    assert plan(1, 1, 40, 2, 64, bf16=True, processors=132).tile >= 20


@pytest.mark.parametrize("dtype", DTYPES)
def test_tanh_far_past_the_cap_and_near_zero(dtype: torch.dtype) -> None:
    x = torch.cat([torch.linspace(-400, 400, 4001), torch.logspace(-8, 0, 200), torch.tensor([0.0, 1e6, -1e6])])
    got = kernels().capped(x.to(DEVICE, dtype)[None], 30.0)[0]
    truth = 30 * torch.tanh(x.to(dtype).double() / 30)
    torch.testing.assert_close(got.double().cpu(), truth, atol=1e-12, rtol=3e-6)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_between_the_matmuls(dtype: torch.dtype) -> None:
    """Norm, rotation and gate against the modules of the model; the same roundings."""
    slack = 1e-6 if dtype == FP32 else 2**-7  # the interpreter cuts to bf16 where a GPU rounds
    for size in (7, 64, 2304):
        first, second = (RMSNorm(size, 1e-6).to(dtype) for _ in range(2))
        for norm in (first, second):
            torch.nn.init.normal_(norm.weight, std=0.3)
        x, y = torch.randn(5, size).to(dtype), torch.randn(5, size).to(dtype)
        total = x + first(y)
        on = [t.detach().to(DEVICE) for t in (y, first.weight, x, second.weight)]
        got = kernels().add_norm(*on, 1e-6)
        assert relative(got[0], total) < slack
        assert relative(got[1], second(got[0].cpu())) < slack
        assert relative(kernels().norm(on[2], on[3], 1e-6), second(x)) < slack
    x, pos = torch.randn(2, 3, 5, 24).to(dtype), torch.tensor([[0, 1, 5000], [-1, 7, 100]])
    tables = rope.rope_tables(pos, 24, 10000.0)
    got = kernels().rotate(x.to(DEVICE), (tables[0].to(DEVICE), tables[1].to(DEVICE)))
    assert relative(got, rope.rotate(x, tables)) < slack
    both = 2 * torch.randn(3, 2 * 1030).to(dtype)
    gate, up = torch.split(both, 1030, 1)
    got = kernels().gated_gelu(*torch.split(both.to(DEVICE), 1030, 1))
    assert relative(got, F.gelu(gate, approximate="tanh") * up) < slack


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_one_row_products(dtype: torch.dtype) -> None:
    """Widths that fill no tile; the gated form is gelu(gate) * up."""
    for D, rows in ((40, 6), (700, 26), (2304, 18)):
        x, w = torch.randn(1, D).to(dtype), (torch.randn(rows, D) / D**0.5).to(dtype)
        truth = x.double() @ w.double().T
        slack = 2e-6 if dtype == FP32 else 2**-7
        assert relative(kernels().one_row(x.to(DEVICE), w.to(DEVICE)), truth) < slack
        gate, up = torch.split(truth, rows // 2, 1)
        truth = F.gelu(gate, approximate="tanh") * up
        assert relative(kernels().one_row(x.to(DEVICE), w.to(DEVICE), gated=True), truth) < 2 * slack


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_logits_and_the_likeliest(dtype: torch.dtype) -> None:
    """Capped in fp32; the first of equal ones; V that fills no block."""
    raw = (20 * torch.randn(3, 9001)).to(dtype)
    raw[1, [17, 8000]] = 10_000.0
    raw[2, -1] = 10_000.0
    y, ids = torch.empty(3, 9001, device=DEVICE), torch.zeros(3, dtype=torch.int64, device=DEVICE)
    kernels().capped_best(raw.to(DEVICE), 30.0, y, ids)
    torch.testing.assert_close(y.cpu(), softcap(raw.float(), 30.0), atol=1e-5, rtol=3e-6)
    assert ids.tolist() == [int(y[0].argmax()), 17, 9000]


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_keys_and_values_are_written_to_their_pages(dtype: torch.dtype) -> None:
    """Rotated by their positions; padding goes to the last page; rows of several tokens share a table."""
    N, K, H, P = 4, 2, 16, 6
    qkv = torch.randn(6, (N + 2 * K) * H).to(dtype)
    q, k, v = (x.view(6, -1, H) for x in torch.split(qkv.to(DEVICE), [N * H, K * H, K * H], 1))
    table = torch.tensor([[3, 1], [0, 4]], dtype=torch.int32, device=DEVICE)
    first = torch.tensor([0, 1], dtype=torch.int32, device=DEVICE)
    pos = torch.tensor([30, 31, 32, 63, 64, -1], dtype=torch.int32)
    cos, sin = rope.rope_tables(torch.arange(100)[None], H, 10000.0)
    turns = tuple(t[0, :, 0, : H // 2].contiguous().to(DEVICE) for t in (cos, sin))
    stores = [torch.zeros(P, K, 32, H, dtype=dtype, device=DEVICE) for _ in "kv"]
    out = kernels().write(q, k, v, turns, stores, table, first, pos.to(DEVICE))
    tables = rope.rope_tables(pos.clamp(min=0)[:, None], H, 10000.0)
    turned_q, turned_k = (rope.rotate(x.cpu()[:, None], tables)[:, 0] for x in (q, k))
    tolerance: dict[str, Any] = dict(atol=1e-6, rtol=1e-6) if dtype == FP32 else dict(atol=2**-7, rtol=2**-7)
    torch.testing.assert_close(out.cpu(), turned_q, **tolerance)
    places = [(3, 30), (3, 31), (1, 0), (0, 31), (4, 0), (5, 0)]
    for row, (page, slot) in enumerate(places):
        torch.testing.assert_close(stores[0][page, :, slot].cpu(), turned_k[row], **tolerance)
        assert torch.equal(stores[1][page, :, slot], v[row])
    plain = [torch.zeros_like(store) for store in stores]
    kernels().write(None, k, v, None, plain, table, first, pos.to(DEVICE))
    assert torch.equal(plain[0][3, :, 30], k[0])
    assert torch.equal(plain[1], stores[1])


@pytest.mark.gpu
def test_many_shapes_compile_few_kernels() -> None:
    """Lengths, rows and table widths of a serving load: the kinds of tile bound what is compiled, these do not."""
    kernel = attention()._attend

    def compiled() -> int:
        return sum(len(caches[0]) for caches in kernel.device_caches.values())

    def use(rows: int, T: int, length: int) -> None:
        paged = Rows([length] * rows, K=2, H=64, dtype=BF16)
        q_BTNH = torch.randn(rows, T, 4, 64).to(BF16)
        attend(paged, q_BTNH, last_positions(paged.lengths, T), window=50, scale=0.1, cap=50.0)

    before = compiled()
    for i in range(1, 40):
        use(rows=1 + i % 7, T=i, length=2 * i + i % 5)
    assert compiled() - before <= 12  # two tiles, and 1 to 32 parts


@pytest.mark.gpu
def test_the_model_runs_them_in_inference_alone() -> None:
    """On CUDA the modules call the kernels without a gradient, and plain torch with one; both agree."""
    x, y = torch.randn(2, 5, 4, 64, device="cuda"), torch.randn(2, 5, 4, 64, device="cuda")
    norm = RMSNorm(64, 1e-6).cuda()
    tables = rope.rope_tables(torch.arange(5, device="cuda").expand(2, 5) + 1000, 64, 10000.0)
    calls: list[Callable[[], Tensor]] = [
        lambda: norm(x), lambda: rope.rotate(x, tables), lambda: gated_gelu(x, y), lambda: softcap(99 * x, 50.0),
    ]  # fmt: skip
    plain = [call().detach() for call in calls]
    with torch.no_grad():
        assert gpu.serves(x)
        fast = [call() for call in calls]
    for a, b in zip(fast, plain, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
