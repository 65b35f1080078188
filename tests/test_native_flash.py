"""Attention on matrix tiles against the definition in fp64: all layouts, whole and partial blocks, gradients."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from attention_fixtures import BF16, CASES, Case, check_gradients, check_output
from torch import Tensor

from gemwright.ops import attention_blocked, native, native_flash
from gemwright.ops.attention import Visibility

pytestmark = pytest.mark.skipif(not native.has_tiles(), reason="this processor has no matrix tiles (AMX)")
SERVED = [case for case in CASES if case.cap is None or case.cap <= native_flash.SAFE_CAP]
LARGE = [
    Case("several blocks", 200, 200, heads=4, kv_heads=2),
    Case("several blocks, window", 300, 300, rows=1, heads=3, kv_heads=1, window=70),
    Case("whole blocks alone", 256, 256, rows=1, window=64),
    Case("chunk after a cache", 70, 330, window=100),
    Case("documents in blocks", 333, 333, window=50, layout="documents"),
    Case("padding in blocks", 200, 200, rows=3, layout="right_padding"),
    Case("wrapped ring in blocks", 40, 300, rows=3, window=290, layout="ring"),
]

UNCAPPED = [dataclasses.replace(case, name=f"no cap, {case.name}", cap=None) for case in LARGE]


def flash(
    q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, see: Visibility, *, scale: float, cap: float | None
) -> Tensor:
    """The kernel as a backend, however few the queries."""
    return native_flash.flash(q_BTNH, k_BSKH, v_BSKH, see, scale=scale, cap=cap)


@pytest.mark.parametrize("head_dim", [32, 64, 256])
@pytest.mark.parametrize("case", SERVED + LARGE + UNCAPPED, ids=lambda case: case.name)
def test_output_and_gradients(case: Case, head_dim: int) -> None:
    case = dataclasses.replace(case, head_dim=head_dim, scale=case.scale * (16 / head_dim) ** 0.5)
    check_output(flash, case, BF16)
    check_gradients(flash, case, BF16)


def test_it_is_nearer_to_the_truth_than_scores_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products that reach the weights unrounded: a third of the error at most, in the output and in each gradient."""
    torch.manual_seed(0)
    q, k, v = (3 * torch.randn(1, 300, n, 64).bfloat16() for n in (4, 2, 2))
    pos = torch.arange(300)[None]
    made = torch.randn(1, 300, 4, 64).bfloat16()

    def errors() -> list[float]:
        found = []
        for x in ((q, k, v), (q.double(), k.double(), v.double())):
            q_, k_, v_ = (y.detach().clone().requires_grad_() for y in x)
            out = attention_blocked.blocked(q_, k_, v_, Visibility(pos, pos), scale=0.125, cap=50.0)
            found.append([out.detach(), *torch.autograd.grad(out, (q_, k_, v_), made.to(out.dtype))])
        return [float((a.double() - b).norm() / b.double().norm()) for a, b in zip(*found, strict=True)]

    ours = errors()
    monkeypatch.setattr(native_flash, "serves", lambda *_: False)
    assert all(3 * a < b for a, b in zip(ours, errors(), strict=True)), ours


def test_results_do_not_depend_on_threads_or_repetition() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 150, n, 64).bfloat16().requires_grad_() for n in (4, 2, 2))
    pos = torch.arange(150).repeat(2, 1)

    def once() -> list[Tensor]:
        out = native_flash.flash(q, k, v, Visibility(pos, pos, window=90), scale=0.125, cap=50.0)
        return [out, *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))]

    runs = []
    for threads in (1, 3, 3):
        torch.set_num_threads(threads)
        runs.append(once())
    for run in runs[1:]:
        assert all(map(torch.equal, run, runs[0]))


def test_what_is_not_finite_is_not_hidden() -> None:
    """A NaN in a query, and a NaN or an infinity in a key, reach every row that sees it, forward and backward."""
    for which, value, reached in ((0, torch.nan, [5]), (1, torch.nan, range(5, 32)), (1, torch.inf, range(5, 32))):
        torch.manual_seed(0)
        inputs = [torch.randn(1, 32, 1, 32).bfloat16() for _ in range(3)]
        inputs[which][0, 5] = value
        q, k, v = (x.requires_grad_() for x in inputs)
        pos = torch.arange(32)[None]
        out = native_flash.flash(q, k, v, Visibility(pos, pos), scale=0.1, cap=50.0)
        finite = out.isfinite().all(-1)[0, :, 0]
        if value is torch.nan:
            assert [t for t in range(32) if not finite[t]] == list(reached)
        (grad,) = torch.autograd.grad(out, q, torch.ones_like(out))
        assert not grad[0, list(reached)].isfinite().all()


def test_positions_of_one_row_serve_all_and_a_window_of_none_sees_nothing() -> None:
    q, k, v = (torch.randn(2, 20, 1, 32).bfloat16() for _ in range(3))
    pos = torch.arange(20)[None]
    got = native_flash.flash(q, k, v, Visibility(pos, pos), scale=0.1, cap=50.0)
    both = pos.repeat(2, 1)
    assert torch.equal(got, native_flash.flash(q, k, v, Visibility(both, both), scale=0.1, cap=50.0))
    assert not native_flash.flash(q, k, v, Visibility(pos, pos, window=0), scale=0.1, cap=50.0).any()


def test_which_calls_are_served() -> None:
    """What the tiles do not hold, or a cap does not bound, stays with the blocked backend."""
    q = torch.zeros(1, 40, 4, 64).bfloat16()
    assert native_flash.serves(q, q, q, 50.0) and native_flash.serves(q, q, q, None)
    for other, cap in ((q, 61.0), (q.float(), 50.0), (q[..., :48], 50.0), (q[:, :15], 50.0)):
        assert not native_flash.serves(other, other, other, cap)
    assert not native_flash.serves(q, q.float(), q.float(), 50.0)
