"""The chunked divergence equals the one computed whole, in value and gradient, with logits far past the caps.

Legend: X tokens, D model, V vocabulary.
"""

from __future__ import annotations

import pytest
import torch
from oracle import debug, ours, pair, positions, relative, tokens, weights
from torch import Tensor
from torch.nn import functional as F

from gemwright.ops import loss
from gemwright.ops.loss import chunks, kl_divergence

X, D, V = 37, 24, 131


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Student's hidden states and head, teacher's (of another width), with logits up to about 100."""
    hidden, teacher = 3 * torch.randn(X, D), 3 * torch.randn(X, 2 * D)
    head, teacher_head = 2 * torch.randn(V, D), 2 * torch.randn(V, 2 * D)
    return hidden.to(dtype), head.to(dtype), teacher.to(dtype), teacher_head.to(dtype)


def whole(
    hidden: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor, cap: float | None, teacher_cap: float | None
) -> Tensor:
    """KL(teacher || student) by its definition, in fp64."""

    def log_probs(x: Tensor, w: Tensor, c: float | None) -> Tensor:
        logits = x.double() @ w.double().T
        return (logits if c is None else c * torch.tanh(logits / c)).log_softmax(-1)

    return F.kl_div(
        log_probs(hidden, head, cap), log_probs(teacher, teacher_head, teacher_cap), log_target=True, reduction="sum"
    )


@pytest.mark.parametrize("rows", [1, 5, 36, 37, 1000])
@pytest.mark.parametrize(("cap", "teacher_cap"), [(30.0, None), (30.0, 30.0), (None, None), (10.0, 30.0)])
def test_value_and_gradient(
    cap: float | None, teacher_cap: float | None, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "CHUNK_BYTES", 4 * V * rows)
    hidden, head, teacher, teacher_head = inputs()
    assert float((hidden @ head.T).abs().max()) > 60
    hidden.requires_grad_()
    got = kl_divergence(hidden, head, teacher, teacher_head, cap=cap, teacher_cap=teacher_cap)
    exact = hidden.detach().double().requires_grad_()
    want = whole(exact, head, teacher, teacher_head, cap, teacher_cap)
    assert relative(got, want) < 1e-5
    (got_grad,) = torch.autograd.grad(2 * got, hidden)
    (want_grad,) = torch.autograd.grad(2 * want, exact)
    assert relative(got_grad, want_grad) < 1e-5


def test_the_cap_is_seen() -> None:
    """Dropping the final cap changes value and gradient (greedy tokens could not tell: tanh is monotonic)."""
    hidden, head, teacher, teacher_head = inputs()
    values = [float(kl_divergence(hidden, head, teacher, teacher_head, cap=cap)) for cap in (None, 30.0, 29.0)]
    assert abs(values[1] - values[0]) > 0.01 * values[0]
    assert abs(values[2] - values[1]) > 0.01 * values[1]


def test_no_wider_tensor_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK_BYTES", 4 * V * 5)
    parts = list(chunks(X, V))
    assert [p.stop - p.start for p in parts] == [5] * 7 + [2]
    assert [p.start for p in parts[1:]] == [p.stop for p in parts[:-1]]
    monkeypatch.setattr(loss, "CHUNK_BYTES", 1)
    assert [p.stop - p.start for p in chunks(3, V)] == [1, 1, 1]


def test_bf16_inputs() -> None:
    """bf16 matmul, fp32 from there on: near the fp64 value, and the gradient comes back in bf16."""
    hidden, head, teacher, teacher_head = inputs(torch.bfloat16)
    hidden.requires_grad_()
    got = kl_divergence(hidden, head, teacher, teacher_head, cap=30.0)
    exact = hidden.detach().double().requires_grad_()
    want = whole(exact, head, teacher, teacher_head, 30.0, None)
    assert got.dtype == torch.float32
    assert relative(got, want) < 0.02
    (got_grad,) = torch.autograd.grad(got, hidden)
    (want_grad,) = torch.autograd.grad(want, exact)
    assert got_grad.dtype == torch.bfloat16
    assert relative(got_grad, want_grad) < 0.05


def test_a_frozen_student_gives_a_value_alone() -> None:
    assert not kl_divergence(*inputs(), cap=30.0).requires_grad


def test_the_teacher_itself_is_at_zero() -> None:
    hidden, head, _, _ = inputs()
    hidden.requires_grad_()
    value = kl_divergence(hidden, head, hidden.detach(), head, cap=30.0, teacher_cap=30.0)
    assert abs(float(value.detach())) < 1e-4
    assert float(torch.autograd.grad(value, hidden)[0].abs().max()) < 1e-4


def test_between_models_as_the_oracle_has_it() -> None:
    """Through the whole model: KL from the hidden states equals KL between the oracle's capped logits."""
    config = debug()
    text = tokens(config, 2, 20)
    student, student_oracle = pair(config, seed=0)
    teacher = ours(config, weights(config, seed=1))
    _, teacher_oracle = pair(config, seed=1)
    hidden, teacher_hidden = (m(text, positions(2, 20)).flatten(0, 1) for m in (student, teacher))
    got = kl_divergence(
        hidden, student.lm_head.weight, teacher_hidden, teacher.lm_head.weight, cap=30.0, teacher_cap=30.0
    )
    log_q, log_p = (m(text).logits.flatten(0, 1).double().log_softmax(-1) for m in (student_oracle, teacher_oracle))
    assert relative(got, F.kl_div(log_q, log_p, log_target=True, reduction="sum")) < 1e-4
