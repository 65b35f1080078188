"""Attention in Triton against truth, forward and backward: on a GPU as it is, elsewhere through Triton's interpreter.

The cases are those of the other backends: windows, documents, padding, rings with empty slots, rows that see nothing,
odd lengths, more keys than queries, scores far past the cap. Off a GPU blocks are small, so that the cases have several
in each direction; both ways of backward are tried, in parts too.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from attention_fixtures import BF16, CASES, FP16, FP32, IDS, Case, check_gradients, check_output, rule
from torch import Tensor
from triton_fixtures import DEVICE, GPU, MARKS

from gemwright.ops.attention import PADDING, Attend, Visibility

pytestmark = MARKS


def ours() -> Any:
    return importlib.import_module("gemwright.ops.attention_triton")


def small(way: str) -> Any:
    """Tiles of a few queries and keys, for one of the ways that backward has."""
    module = ours()
    tile, piece = module.Tile(32, 16, 4, 1), module.Piece(16, 4, 1)
    stored = module.Stored(32, 16, piece, piece, piece) if way == "stored" else None
    return module.Tiles(tile, tile, tile, tile if way == "apart" else None, stored)


def attend(way: str) -> Attend:
    """The backend with small tiles; `chosen` has its own."""
    tiles = None if way == "chosen" else small(way)

    made: Attend = partial(ours().attend, tiles=tiles)
    return made


@pytest.fixture(autouse=True)
def _nothing_is_zero_by_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN, as it may on a GPU: what is read must have been written."""
    if GPU:
        return
    empty = Tensor.new_empty

    def filled(x: Tensor, *size: Any, **how: Any) -> Tensor:
        made = empty(x, *size, **how)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(Tensor, "new_empty", filled)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_output(case: Case) -> None:
    check_output(attend("straight"), case, FP32, DEVICE)


@pytest.mark.parametrize("way", ["straight", "apart", "stored"])
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_gradients(case: Case, way: str) -> None:
    check_gradients(attend(way), case, FP32, DEVICE)


def test_what_is_written_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three of four key/value heads at a time; and where not one fits, nothing is written at all."""
    case = Case("bounded", 40, 40, window=8)
    call = made_call(case, small("stored"))
    monkeypatch.setattr(ours(), "WORKSPACE", 3 * call._bytes(call.tiles.stored) + 1)
    check_gradients(attend("stored"), case, FP32, DEVICE)
    monkeypatch.setattr(ours(), "WORKSPACE", call._bytes(call.tiles.stored) - 1)
    monkeypatch.setattr(ours().Call, "stored", None)
    check_gradients(attend("stored"), case, FP32, DEVICE)


def made_call(case: Case, tiles: Any) -> Any:
    q, k, v = case.inputs(FP32, DEVICE)
    return ours().Call.of(q, k, v, case.see(DEVICE), case.scale, case.cap, tiles)


@pytest.mark.parametrize("heads", [(3, 1), (4, 1), (3, 3)])
@pytest.mark.parametrize("size", [24, 64])
def test_groups_and_head_sizes(heads: tuple[int, int], size: int) -> None:
    case = Case("groups", 50, 70, rows=1, heads=heads[0], kv_heads=heads[1], head_dim=size, window=20)
    check_output(attend("straight"), case, FP32, DEVICE)
    check_gradients(attend("straight"), case, FP32, DEVICE)
    check_gradients(attend("stored"), dataclasses.replace(case, layout="documents"), FP32, DEVICE)


@pytest.mark.parametrize("case", CASES, ids=IDS)
@pytest.mark.parametrize("side", ["queries", "keys"])
def test_blocks_that_are_visited(case: Case, side: str) -> None:
    """Every block with something visible lies in the run; what is said to be visible whole is."""
    call = made_call(case, small("straight"))
    spans = call._seen(side, 32, 16)[4].tolist()
    mask = torch.nn.functional.pad(rule(case), (0, -case.S % 16, 0, -case.T % 32))
    blocks = mask.view(case.rows, mask.shape[1] // 32, 32, mask.shape[2] // 16, 16).transpose(2, 3)
    some, whole = blocks.any(-1).any(-1), blocks.all(-1).all(-1)
    if side == "keys":
        some, whole = some.transpose(1, 2), whole.transpose(1, 2)
    for row in range(case.rows):
        for block, (first, last, begin, end) in enumerate(spans[row]):
            outside = [j for j in range(some.shape[2]) if not first <= j < last]
            assert not some[row, block, outside].any()
            assert whole[row, block, begin:end].all()
            if case.layout == "causal":  # and no others are visited, no other is masked
                assert last - first == int(some[row, block].sum())
                assert max(0, min(end, last) - begin) == int(whole[row, block].sum())


def test_strides_are_taken_as_they_are() -> None:
    """Keys and values are views of one projection, the gradient that comes back has strides of its own."""
    torch.manual_seed(0)
    both = torch.randn(2, 40, 4, 16, device=DEVICE)
    q = torch.randn(2, 40, 4, 16, device=DEVICE).requires_grad_()
    both.requires_grad_()
    see = Case("", 40, 40, window=9).see(DEVICE)
    upstream = torch.randn(2, 4, 16, 40, device=DEVICE).permute(0, 3, 1, 2)
    views: Callable[[Tensor], tuple[Tensor, Tensor]] = lambda x: (x[:, :, :2], x[:, :, 2:])  # noqa: E731
    got = torch.autograd.grad(attend("straight")(q, *views(both), see, scale=0.3, cap=5.0), (q, both), upstream)
    want = torch.autograd.grad(reference(q, *views(both), see), (q, both), upstream)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, atol=2e-5, rtol=2e-5)


def reference(q: Tensor, k: Tensor, v: Tensor, see: Visibility) -> Tensor:
    from gemwright.ops.attention import reference as definition

    return definition(q, k, v, see, scale=0.3, cap=5.0)


def test_nothing_to_do() -> None:
    q, k, v = (torch.randn(0, 4, 2, 16, device=DEVICE).requires_grad_() for _ in range(3))
    pos = torch.zeros(0, 4, dtype=torch.int64, device=DEVICE)
    out = attend("chosen")(q, k, v, Visibility(pos, pos), scale=1.0, cap=None)
    assert out.shape == q.shape
    assert all(g.shape == q.shape for g in torch.autograd.grad(out.sum(), (q, k, v)))


@pytest.mark.parametrize(("size", "dtype"), [(320, BF16), (256, FP32)], ids=["wide", "fp32"])
def test_heads_too_wide_are_refused(size: int, dtype: torch.dtype) -> None:
    q = torch.randn(1, 4, 2, size, device=DEVICE).to(dtype)
    pos = torch.arange(4, device=DEVICE)[None]
    with pytest.raises(ValueError, match=f"got head_dim {size} in {dtype}, the triton backend allows up to"):
        attend("chosen")(q, q, q, Visibility(pos, pos), scale=1.0, cap=None)


@pytest.mark.parametrize("name", ["window of 3", "documents", "no cap"])
def test_half_precision(name: str) -> None:
    case = next(case for case in CASES if case.name == name)
    check_output(attend("straight"), case, FP16, DEVICE)
    check_gradients(attend("straight"), case, FP16, DEVICE)


# ----- on a GPU, with the tiles of the head sizes


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("size", [16, 64, 96, 128, 256])
def test_cases_at_the_sizes_of_models(size: int, dtype: torch.dtype) -> None:
    if (size, dtype) == (256, FP32):
        pytest.skip("refused: no tiles")
    for case in CASES:
        if case.head_dim == 16:
            wide = dataclasses.replace(case, head_dim=size, scale=case.scale * (16 / size) ** 0.5)
            with torch.no_grad():
                check_output(attend("chosen"), wide, dtype, "cuda")
            check_gradients(attend("chosen"), wide, dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("size", [64, 128, 256])
def test_many_blocks(size: int) -> None:
    """Lengths past several blocks of the real tiles, whole ones among them, and rows of padding."""
    for layout, window in (("causal", None), ("causal", 300), ("documents", None), ("right_padding", 200)):
        case = Case(
            "long", 901, 901, heads=6, kv_heads=2, head_dim=size, window=window, layout=layout, scale=size**-0.5
        )
        check_output(attend("chosen"), case, BF16, "cuda")
        check_gradients(attend("chosen"), case, BF16, "cuda")


@pytest.mark.gpu
def test_a_step_can_be_captured_and_is_the_same_bits() -> None:
    """Forward and backward in a CUDA graph; replays and plain calls agree bit by bit."""
    torch.manual_seed(0)
    pos = torch.arange(512, device="cuda").repeat(2, 1)
    pos[1, 500:] = PADDING
    q, k, v = (torch.randn(2, 512, n, 256, device="cuda").bfloat16().requires_grad_() for n in (8, 4, 4))
    upstream = torch.randn_like(q)

    def step() -> tuple[Tensor, ...]:
        out = attend("chosen")(q, k, v, Visibility(pos, pos, window=100), scale=1 / 16, cap=50.0)
        grads = torch.autograd.grad(out, (q, k, v), upstream)
        return out.detach(), *grads  # a live graph would tie the leaves to the stream it was made on

    want = step()
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
