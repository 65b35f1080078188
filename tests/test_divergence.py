"""Chunked divergences equal the ones computed whole, in value and gradient, with logits far past the caps.

The truth is fp64 autograd over both sides' logits, each divergence written out from its formula.

Legend: X tokens, V vocabulary, K stored ids a token.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from head_fixtures import D, Meter, V, X, cut, exact, inputs, log_probs
from oracle import debug, ours, pair, positions, relative, tokens, weights
from torch import Tensor
from torch.nn import functional as F

from gemwright.ops import head as head_module
from gemwright.ops.divergence import DIVERGENCES, divergence, sparse_kl
from gemwright.ops.head import Head
from gemwright.ops.loss import cross_entropy

TEACHER = 2 * D
"""The teacher is wider."""


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(P || Q) per token, where P is the first, unlike F.kl_div."""
    return F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)


def jsd(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    log_m = (beta * log_p.exp() + (1 - beta) * log_q.exp()).log()
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)


CASES: dict[str, tuple[str, float, Callable[[Tensor, Tensor], Tensor]]] = {
    "forward_kl": ("forward_kl", 0.5, kl),
    "reverse_kl": ("reverse_kl", 0.5, lambda log_p, log_q: kl(log_q, log_p)),
    "soft_cross_entropy": ("soft_cross_entropy", 0.5, lambda log_p, log_q: -(log_p.exp() * log_q).sum(-1)),
    "jsd 0.5": ("jsd", 0.5, lambda log_p, log_q: jsd(log_p, log_q, 0.5)),
    "jsd 0.1": ("jsd", 0.1, lambda log_p, log_q: jsd(log_p, log_q, 0.1)),
    "jsd 0": ("jsd", 0.0, kl),
    "jsd 1": ("jsd", 1.0, lambda log_p, log_q: kl(log_q, log_p)),
}
"""Name of a case: kind, beta, and the divergence per token from log-probabilities of teacher and student."""


@pytest.mark.parametrize("rows", [1, 5, 36, 1000])
@pytest.mark.parametrize(("cap", "teacher_cap", "temperature"), [(30.0, None, 1.0), (10.0, 30.0, 0.7), (None, 30.0, 2)])
@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient(
    name: str, cap: float | None, teacher_cap: float | None, temperature: float, rows: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Weighted, each side with its own cap and temperature, gradients of a multiple of the sum.

    Confident tokens are hard on a gradient: a log-sum-exp rounded at the size of a logit put the JSD's off by 1e-4.
    """
    cut(monkeypatch, rows)
    kind, beta, definition = CASES[name]
    (hidden, weight), (teacher, teacher_weight) = inputs(), inputs(width=TEACHER)
    mask = torch.rand(X)
    mask[3:11] = 0
    got, count = divergence(
        kind, hidden, Head(weight, cap, temperature), teacher, Head(teacher_weight, teacher_cap, 1.3), mask, beta=beta
    )
    hidden64, weight64 = exact(hidden), exact(weight)
    log_q = log_probs(hidden64, weight64, cap, temperature)
    log_p = log_probs(teacher.detach().double(), teacher_weight.detach().double(), teacher_cap, 1.3)
    want = (mask * definition(log_p, log_q)).sum()
    assert got.dtype == torch.float32
    assert relative(got.detach(), want.detach()) < 1e-5
    assert relative(count, mask.sum()) < 1e-6
    got_grads = torch.autograd.grad(0.3 * got, (hidden, weight))
    want_grads = torch.autograd.grad(0.3 * want, (hidden64, weight64))
    for one, other in zip(got_grads, want_grads, strict=True):
        assert relative(one, other) < 2e-5


def test_every_divergence_has_a_case() -> None:
    assert {kind for kind, _, _ in CASES.values()} == set(DIVERGENCES)


def test_each_cap_is_seen() -> None:
    """Dropping or moving either side's cap changes every divergence and its gradient."""
    (hidden, weight), (teacher, teacher_weight) = inputs(), inputs(width=TEACHER)
    for kind in DIVERGENCES:
        found = []
        for cap, teacher_cap in ((30.0, 30.0), (None, 30.0), (29.0, 30.0), (30.0, None), (30.0, 29.0)):
            total, _ = divergence(kind, hidden, Head(weight, cap), teacher, Head(teacher_weight, teacher_cap))
            found.append((total.detach(), torch.autograd.grad(total, hidden)[0]))
        for value, grad in found[1:]:
            assert relative(value, found[0][0]) > 1e-4
            assert relative(grad, found[0][1]) > 1e-3


def test_no_loss_beside_itself() -> None:
    """A student that is its teacher is at zero, with zero gradient; cross-entropy is then the entropy."""
    hidden, weight = inputs()
    head = Head(weight, 30.0)
    for kind in ("forward_kl", "reverse_kl", "jsd"):
        total, _ = divergence(kind, hidden, head, hidden, head)
        assert abs(float(total.detach())) < 1e-4
        assert float(torch.autograd.grad(total, hidden)[0].abs().max()) < 1e-4


def test_the_ends_of_the_generalised_jsd() -> None:
    """Divided by beta it nears the forward KL at 0, divided by 1 - beta the reverse at 1."""
    (hidden, weight), (teacher, teacher_weight) = inputs(), inputs(width=TEACHER)
    hidden, weight, teacher, teacher_weight = (x / 4 for x in (hidden, weight, teacher, teacher_weight))

    def value(kind: str, beta: float = 0.5) -> float:
        args = hidden.double(), Head(weight.double(), 30.0), teacher.double(), Head(teacher_weight.double(), 30.0)
        return float(divergence(kind, *args, beta=beta)[0].detach())

    for end, kind in ((0.0, "forward_kl"), (1.0, "reverse_kl")):
        near = [value("jsd", abs(end - step)) / step for step in (1e-2, 1e-4, 1e-6)]
        gaps = [abs(x - value(kind)) for x in near]
        assert all(b < a for a, b in pairwise(gaps))
        assert gaps[-1] < 1e-3 * value(kind)


def test_padded_rows_are_cropped() -> None:
    """A padded table gives what the cropped one gives, and padding rows no gradient; unequal widths ask for `vocab`."""
    (hidden, weight), (teacher, teacher_weight) = inputs(), inputs(width=TEACHER)
    short, short_teacher = Head(weight[:100], 30.0), Head(teacher_weight[:100], None)
    want, _ = divergence("jsd", hidden, short, teacher, short_teacher)
    want_grads = torch.autograd.grad(want, (hidden, weight))
    for other in (teacher_weight, teacher_weight[:100]):
        got, _ = divergence("jsd", hidden, Head(weight, 30.0), teacher, Head(other, None), vocab=100)
        assert torch.equal(got, want)
        for mine, wanted in zip(torch.autograd.grad(got, (hidden, weight)), want_grads, strict=True):
            assert torch.equal(mine, wanted)
    with pytest.raises(ValueError, match=r"heads: got 131 and 100 rows, allowed are equal widths, or `vocab`"):
        divergence("jsd", hidden, Head(weight, 30.0), teacher, short_teacher)


@pytest.mark.parametrize("native", [False, True])
def test_bf16_no_worse_than_naive(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On either kind of processor, chunks of one token: no farther from the truth than bf16 logits on both sides."""
    cut(monkeypatch, 1)
    monkeypatch.setattr(head_module, "has_fast_bf16", lambda: native)
    (hidden, weight), (teacher, teacher_weight) = inputs(torch.bfloat16), inputs(torch.bfloat16, width=TEACHER)
    teacher, teacher_weight = teacher.detach(), teacher_weight.detach()

    def naive(h: Tensor, w: Tensor, cap: float | None) -> Tensor:
        logits = (h @ w.T).float()
        return (logits if cap is None else cap * torch.tanh(logits / cap)).log_softmax(-1)

    hidden64, weight64 = exact(hidden), exact(weight)
    for kind, beta, definition in CASES.values():
        log_p = log_probs(teacher.double(), teacher_weight.double(), 30.0)
        want = definition(log_p, log_probs(hidden64, weight64, 30.0)).sum()
        usual = definition(naive(teacher, teacher_weight, 30.0), naive(hidden, weight, 30.0)).sum()
        got, _ = divergence(kind, hidden, Head(weight, 30.0), teacher, Head(teacher_weight, 30.0), beta=beta)
        assert relative(got.detach(), want.detach()) < relative(usual.detach(), want.detach()) + 1e-3
        grads = [torch.autograd.grad(y, xs) for y, xs in (
            (got, (hidden, weight)), (usual, (hidden, weight)), (want, (hidden64, weight64))
        )]  # fmt: skip
        for mine, other, true in zip(*grads, strict=True):
            assert mine.dtype == torch.bfloat16
            errors = [float((g.double() - true).norm() / true.norm()) for g in (mine, other)]
            assert errors[0] < errors[1] + 5e-3


def test_sparse_is_the_forward_kl_where_every_id_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    """In any order, with the probabilities as mass."""
    cut(monkeypatch, 5)
    (hidden, weight), (teacher, teacher_weight) = inputs(), inputs(width=TEACHER)
    p = log_probs(teacher.detach(), teacher_weight.detach(), 30.0).exp()
    ids = torch.rand(X, V).argsort(-1)
    mask = torch.rand(X) * (torch.rand(X) < 0.7)
    head = Head(weight, 30.0, 0.9)
    want, _ = divergence("forward_kl", hidden, head, teacher, Head(teacher_weight, 30.0), mask)
    got, count = sparse_kl(hidden, head, ids, p.gather(-1, ids), mask)
    assert relative(got.detach(), want.detach()) < 1e-5
    assert relative(count, mask.sum()) < 1e-6
    for one, other in zip(*(torch.autograd.grad(y, (hidden, weight)) for y in (got, want)), strict=True):
        assert relative(one, other) < 1e-5


def test_sparse_top_k_is_its_own_sum() -> None:
    """The stored terms of the KL alone, the student normalised over the whole vocabulary; mass 0 counts for nothing."""
    (hidden, weight), (teacher, teacher_weight) = inputs(), inputs(width=TEACHER)
    log_p = log_probs(teacher.detach().double(), teacher_weight.detach().double(), 30.0)
    best = log_p.topk(4)
    mass = best.values.exp()
    mass[::3, 2:] = 0
    hidden64, weight64 = exact(hidden), exact(weight)
    log_q = log_probs(hidden64, weight64, 30.0).gather(-1, best.indices)
    want = (mass * (best.values - log_q)).sum()
    got, _ = sparse_kl(hidden, Head(weight, 30.0), best.indices, mass)
    assert relative(got.detach(), want.detach()) < 1e-5
    got_grads = torch.autograd.grad(got, (hidden, weight))
    for one, other in zip(got_grads, torch.autograd.grad(want, (hidden64, weight64)), strict=True):
        assert relative(one, other) < 1e-5


def test_sparse_samples_are_unbiased() -> None:
    """Over every pair of draws, each as likely as the teacher has it, value and gradient average to the KL's."""
    width = 6
    (hidden, weight), (teacher, teacher_weight) = inputs(), inputs(width=TEACHER)
    hidden, head = hidden[:1] / 8, Head(weight[:width], 30.0)
    other = Head(teacher_weight[:width] / 8, 30.0)
    want, _ = divergence("forward_kl", hidden, head, teacher[:1], other)
    (want_grad,) = torch.autograd.grad(want, hidden)
    log_p = log_probs(teacher[0].detach(), other.weight_VD.detach(), 30.0)
    ids = torch.cartesian_prod(torch.arange(width), torch.arange(width))
    chance = log_p.exp()[ids].prod(-1)
    assert math.isclose(float(chance.sum()), 1, rel_tol=1e-5)
    hiddens = hidden.detach().expand(len(ids), -1).clone().requires_grad_()
    mass = torch.full(ids.shape, 0.5)
    got, _ = sparse_kl(hiddens, head, ids, mass, chance, log_p_XK=log_p[ids])
    assert relative(got.detach(), want.detach()) < 1e-4
    assert relative(torch.autograd.grad(got, hiddens)[0].sum(0, keepdim=True), want_grad) < 1e-4


def test_one_stored_id_is_cross_entropy() -> None:
    (hidden, weight), targets = inputs(), torch.randint(V, (X,))
    want, _, _ = cross_entropy(hidden, weight, targets, softcap=30.0)
    got, _ = sparse_kl(hidden, Head(weight, 30.0), targets[:, None], torch.ones(X, 1))
    assert torch.equal(got, want)


def test_between_models_as_the_oracle_has_it() -> None:
    """Through the whole model: KL from the hidden states equals KL between the oracle's capped logits."""
    config = debug()
    text = tokens(config, 2, 20)
    student, student_oracle = pair(config, seed=0)
    teacher = ours(config, weights(config, seed=1))
    _, teacher_oracle = pair(config, seed=1)
    sides = [(m(text, positions(2, 20)), Head(m.lm_head.weight, 30.0)) for m in (student, teacher)]
    got, count = divergence("forward_kl", *sides[0], *sides[1])
    log_q, log_p = (m(text).logits.flatten(0, 1).double().log_softmax(-1) for m in (student_oracle, teacher_oracle))
    assert relative(got, kl(log_p, log_q).sum()) < 1e-4
    assert float(count) == 40


def test_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most 1.5 times the head's gradient: that itself, and one chunk of either side's logits."""
    tokens_, vocab, width = 96, 2048, 64
    monkeypatch.setitem(head_module.CHUNK_FLOOR, "cpu", 0)
    monkeypatch.setattr(head_module, "CHUNK_TOKENS", 0)
    monkeypatch.setitem(head_module.TILE, "cpu", 64)
    hidden, weight = torch.randn(tokens_, width).requires_grad_(), torch.randn(vocab, width).requires_grad_()
    teacher, teacher_weight = torch.randn(tokens_, 2 * width), torch.randn(vocab, 2 * width)
    with Meter() as meter:
        total, _ = divergence("forward_kl", hidden, Head(weight, 30.0), teacher, Head(teacher_weight, 30.0))
        torch.autograd.grad(total / 7, (hidden, weight))
    assert meter.largest == weight.nbytes
    assert meter.peak <= 1.4 * weight.nbytes + hidden.nbytes + 2**15
    with torch.no_grad(), Meter() as meter:
        divergence("forward_kl", hidden, Head(weight, 30.0), teacher, Head(teacher_weight, 30.0))
    assert meter.peak <= 0.4 * weight.nbytes + 2**15


def test_nothing_to_learn_from() -> None:
    """No token that counts: zero, with zero gradients; broken rows of weight 0 are not looked at."""
    (hidden, weight), (teacher, teacher_weight) = inputs(), inputs(width=TEACHER)
    heads = Head(weight, 30.0), Head(teacher_weight, 30.0)
    for kind in DIVERGENCES:
        total, count = divergence(kind, hidden, heads[0], teacher * torch.nan, heads[1], torch.zeros(X))
        assert float(total.detach()) == float(count) == 0
        assert not any(g.any() for g in torch.autograd.grad(total, (hidden, weight)))
    total, _ = sparse_kl(hidden[:0], heads[0], torch.zeros(0, 3, dtype=torch.int64), torch.zeros(0, 3))
    assert float(total.detach()) == 0


def test_user_mistakes() -> None:
    (hidden, weight), (teacher, teacher_weight) = inputs(), inputs(width=TEACHER)
    heads = Head(weight, 30.0), Head(teacher_weight, 30.0)
    with pytest.raises(ValueError, match=r"divergence: got 'kl', allowed are forward_kl, reverse_kl, jsd"):
        divergence("kl", hidden, heads[0], teacher, heads[1])
    with pytest.raises(ValueError, match=r"beta: got 1.5, allowed is 0..1"):
        divergence("jsd", hidden, heads[0], teacher, heads[1], beta=1.5)
    with pytest.raises(ValueError, match=r"vocab: got 132, allowed is 1..131"):
        divergence("jsd", hidden, heads[0], teacher, heads[1], vocab=132)
    with pytest.raises(ValueError, match=r"teacher: got tokens of shape \(36,\), allowed is that of hidden, \(37,\)"):
        divergence("jsd", hidden, heads[0], teacher[1:], heads[1])
