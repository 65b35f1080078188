"""Chunked losses equal the plain definition, in value and gradient, with logits far past the cap.

The truth is fp64 autograd over every logit. Chunks and tiles are cut so small that each case has several of both.

Legend: X tokens, D model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from head_fixtures import D, Meter, V, X, cut, exact, inputs, log_probs
from oracle import debug, pair, positions, relative, tokens
from torch import Tensor

from gemwright.ops import head as head_module
from gemwright.ops.head import Head, chunks, product_dtype
from gemwright.ops.loss import cross_entropy, linear_logprob, reference

CAPS = [(30.0, 1.0), (10.0, 0.7), (None, 1.5), (None, 1.0)]
ROWS = [1, 5, 36, 1000]

Outputs = tuple[Tensor, Tensor, Tensor]


def truth(hidden: Tensor, weight: Tensor, targets: Tensor, cap: float | None, temperature: float = 1.0) -> Outputs:
    """Log-probability, log-sum-exp and entropy by their definition."""
    logits = hidden @ weight.T
    logits = (logits if cap is None else cap * torch.tanh(logits / cap)) / temperature
    p = logits.softmax(-1)
    lse = logits.logsumexp(-1)
    entropy = (torch.special.entr(p)).sum(-1)
    return logits.gather(-1, targets[:, None])[:, 0] - lse, lse, entropy


def some_targets() -> Tensor:
    return torch.randint(V, (X,))


def naive_bf16(hidden: Tensor, weight: Tensor, cap: float | None) -> Tensor:
    """Log-probabilities as they are usually computed: bf16 logits, fp32 from the cap on."""
    logits = (hidden @ weight.T).float()
    return (logits if cap is None else cap * torch.tanh(logits / cap)).log_softmax(-1)


def test_reference_as_the_oracle_has_it() -> None:
    """Through the whole model: the definition, and the chunked function, from the oracle's capped logits."""
    config = debug()
    text = tokens(config, 2, 20)
    model, model_oracle = pair(config)
    hidden_BTD = model(text, positions(2, 20))
    want = model_oracle(text).logits.double().log_softmax(-1).gather(-1, text[..., None])[..., 0]
    for function in (reference, linear_logprob):
        got, _, _ = function(hidden_BTD, model.lm_head.weight, text, softcap=config.final_logit_softcapping)
        assert got.shape == text.shape
        assert relative(got, want) < 1e-4


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("cap", "temperature"), CAPS)
def test_linear_logprob(cap: float | None, temperature: float, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values, and gradients under weights drawn afterwards, all outputs together."""
    cut(monkeypatch, rows)
    (hidden, weight), targets = inputs(), some_targets()
    got = linear_logprob(hidden, weight, targets, softcap=cap, temperature=temperature)
    hidden64, weight64 = exact(hidden), exact(weight)
    want = truth(hidden64, weight64, targets, cap, temperature)
    for one, other in zip(got, want, strict=True):
        assert one.dtype == torch.float32
        assert relative(one, other) < 1e-5
    outer = torch.randn(3, X)
    got_grads = torch.autograd.grad((torch.stack(got) * outer).sum(), (hidden, weight))
    want_grads = torch.autograd.grad((torch.stack(want) * outer).sum(), (hidden64, weight64))
    for one, other in zip(got_grads, want_grads, strict=True):
        assert relative(one, other) < 1e-5


@pytest.mark.parametrize("which", [0, 1, 2])
def test_linear_logprob_one_output_alone(which: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unused output has no gradient at all, and costs the others nothing of theirs."""
    cut(monkeypatch, 5)
    (hidden, weight), targets = inputs(), some_targets()
    got = linear_logprob(hidden, weight, targets, softcap=30.0)[which].sum()
    hidden64 = exact(hidden)
    want = truth(hidden64, exact(weight), targets, 30.0)[which].sum()
    assert relative(torch.autograd.grad(got, hidden)[0], torch.autograd.grad(want, hidden64)[0]) < 1e-5


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("cap", "temperature"), CAPS)
def test_cross_entropy(cap: float | None, temperature: float, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sum, count and accuracy under fractional weights, and the gradient of a multiple of the sum."""
    cut(monkeypatch, rows)
    hidden, weight = inputs()
    weights = torch.rand(X)
    weights[3:11] = 0
    logp = log_probs(exact(hidden), exact(weight), cap, temperature)
    targets = torch.where(torch.rand(X) < 0.5, logp.argmax(-1), some_targets())
    got, count, correct = cross_entropy(hidden, weight, targets, weights, softcap=cap, temperature=temperature)
    hidden64, weight64 = exact(hidden), exact(weight)
    want = -(weights * truth(hidden64, weight64, targets, cap, temperature)[0]).sum()
    assert got.dtype == count.dtype == correct.dtype == torch.float32
    assert relative(got, want) < 1e-5
    assert relative(count, weights.sum()) < 1e-6
    assert relative(correct, (weights * (logp.argmax(-1) == targets)).sum()) < 1e-6
    got_grads = torch.autograd.grad(0.3 * got, (hidden, weight))
    want_grads = torch.autograd.grad(0.3 * want, (hidden64, weight64))
    for one, other in zip(got_grads, want_grads, strict=True):
        assert relative(one, other) < 1e-5


def test_leading_dimensions() -> None:
    (hidden, weight), targets = inputs(), some_targets()
    flat = cross_entropy(hidden[:36], weight, targets[:36], softcap=30.0)
    rows = cross_entropy(
        hidden[:36].view(2, 18, D), weight, targets[:36].view(2, 18), torch.ones(2, 18, dtype=torch.bool), softcap=30.0
    )
    assert [float(x) for x in map(torch.Tensor.detach, rows)] == [float(x) for x in map(torch.Tensor.detach, flat)]
    assert float(rows[1]) == 36


def test_gradients_against_finite_differences() -> None:
    """In fp64, every output. gradcheck runs backward often, a loss made forward allows it once."""
    hidden = (2 * torch.randn(4, 3, dtype=torch.float64)).requires_grad_()
    weight = (2 * torch.randn(7, 3, dtype=torch.float64)).requires_grad_()
    targets = torch.tensor([0, 6, 3, 3])
    weights = torch.tensor([1.0, 0.0, 0.5, 2.0])

    def logprob(h: Tensor, w: Tensor) -> Outputs:
        return linear_logprob(h, w, targets, softcap=3.0, temperature=0.8)

    def loss(h: Tensor, w: Tensor) -> Tensor:
        return cross_entropy(h, w, targets, weights, softcap=3.0, temperature=0.8)[0]

    assert torch.autograd.gradcheck(logprob, (hidden, weight))
    for x, grad in zip((hidden, weight), torch.autograd.grad(loss(hidden, weight), (hidden, weight)), strict=True):
        for i in range(x.numel()):
            ends = []
            for step in (1e-6, -1e-6):
                with torch.no_grad():
                    x.view(-1)[i] += step
                    ends.append(loss(hidden, weight))
                    x.view(-1)[i] -= step
            assert abs(float(ends[0] - ends[1]) / 2e-6 - float(grad.view(-1)[i])) < 1e-6


def test_the_cap_is_seen() -> None:
    """Dropping or moving the final cap changes value and gradient (greedy tokens could not tell: tanh is monotonic)."""
    (hidden, weight), targets = inputs(), some_targets()
    losses = [cross_entropy(hidden, weight, targets, softcap=cap)[0] for cap in (30.0, None, 29.0)]
    grads = [torch.autograd.grad(loss, hidden)[0] for loss in losses]
    for other in (1, 2):
        assert relative(losses[other].detach(), losses[0].detach()) > 0.01
        assert relative(grads[other], grads[0]) > 0.01


@pytest.mark.parametrize("native", [False, True])
def test_bf16_no_worse_than_naive(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """37 chunks of one token, the weight's gradient rounded to bf16 after each: still no farther from the truth.

    On either kind of processor: products in fp32, or in bf16 as where that is native.
    """
    cut(monkeypatch, 1)
    monkeypatch.setattr(head_module, "has_fast_bf16", lambda: native)
    (hidden, weight), targets = inputs(torch.bfloat16), some_targets()
    assert product_dtype(hidden) == (torch.bfloat16 if native else torch.float32)
    hidden64, weight64 = exact(hidden), exact(weight)
    want = -truth(hidden64, weight64, targets, 30.0)[0].sum()
    want_grads = torch.autograd.grad(want, (hidden64, weight64))
    usual = -naive_bf16(hidden, weight, 30.0).gather(-1, targets[:, None]).sum()
    usual_grads = torch.autograd.grad(usual, (hidden, weight))
    made, _, _ = cross_entropy(hidden, weight, targets, softcap=30.0)
    later = -linear_logprob(hidden, weight, targets, softcap=30.0)[0].sum()
    for got in (made, later):
        assert got.dtype == torch.float32
        assert relative(got.detach(), want.detach()) < relative(usual.detach(), want.detach()) + 1e-4
        for mine, usual_grad, truth_grad in zip(
            torch.autograd.grad(got, (hidden, weight)), usual_grads, want_grads, strict=True
        ):
            assert mine.dtype == torch.bfloat16
            assert norm_error(mine, truth_grad) < norm_error(usual_grad, truth_grad) + 2e-3


def norm_error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("native", [False, True])
def test_autocast_chooses_the_products_alone(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under bf16 autocast fp32 weights are multiplied in bf16 where that is native, else as without; sums stay fp32."""
    monkeypatch.setattr(head_module, "has_fast_bf16", lambda: native)
    (hidden, weight), targets = inputs(), some_targets()

    def run() -> list[Tensor]:
        total, _, _ = cross_entropy(hidden, weight, targets, softcap=30.0)
        logprob, lse, entropy = linear_logprob(hidden, weight, targets, softcap=30.0)
        later = (logprob + lse + entropy).sum()
        return [total, later, *(g for y in (total, later) for g in torch.autograd.grad(y, (hidden, weight)))]

    plain = run()
    with torch.autocast("cpu", torch.bfloat16):
        got = run()
    for one, other in zip(got, plain, strict=True):
        assert one.dtype == torch.float32
        assert (relative(one.detach(), other.detach()) > 1e-5) == native
        assert relative(one.detach(), other.detach()) < 0.1


def test_tokens_of_weight_zero_are_not_computed() -> None:
    """Their hidden states and targets may be anything: NaN times 0 would show."""
    hidden, weight = inputs()
    weights = torch.ones(X)
    weights[::2] = 0
    targets = torch.where(weights > 0, some_targets(), -100)
    broken = torch.where(weights[:, None] > 0, hidden.detach(), torch.nan).requires_grad_()
    got, count, _ = cross_entropy(broken, weight, targets, weights, softcap=30.0)
    want, _, _ = cross_entropy(hidden[1::2], weight, targets[1::2], softcap=30.0)
    assert float(got.detach()) == float(want.detach())
    assert float(count) == X // 2
    (got_grad,), (want_grad,) = torch.autograd.grad(got, broken), torch.autograd.grad(want, hidden)
    assert torch.equal(got_grad, want_grad)
    assert not got_grad[::2].any()


def test_nothing_to_learn_from() -> None:
    """No tokens, or none that counts: zero, with zero gradients, not NaN."""
    hidden, weight = inputs()
    for rows, weights in ((0, None), (X, torch.zeros(X))):
        targets = torch.zeros(rows, dtype=torch.int64)
        total, count, correct = cross_entropy(hidden[:rows], weight, targets, weights, softcap=30.0)
        assert [float(x.detach()) for x in (total, count, correct)] == [0, 0, 0]
        assert not any(g.any() for g in torch.autograd.grad(total, (hidden, weight)))
    outputs = linear_logprob(hidden[:0], weight, torch.zeros(0, dtype=torch.int64), softcap=30.0)
    assert [len(y) for y in outputs] == [0, 0, 0]
    assert not any(g.any() for g in torch.autograd.grad(outputs[0].sum(), (hidden, weight)))


def test_frozen_sides() -> None:
    """A frozen head gets no gradient and the hidden states the same one; likewise the other way round."""
    (hidden, weight), targets = inputs(), some_targets()

    def grads(h: Tensor, w: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor | None, ...]:
        h, w = (x.detach().clone().requires_grad_(x.requires_grad) for x in (h, w))
        loss(h, w).backward()  # type: ignore[no-untyped-call]
        return h.grad, w.grad

    def made(h: Tensor, w: Tensor) -> Tensor:
        return cross_entropy(h, w, targets, softcap=30.0)[0]

    def later(h: Tensor, w: Tensor) -> Tensor:
        return linear_logprob(h, w, targets, softcap=30.0)[0].sum()

    for loss in (made, later):
        both = grads(hidden, weight, loss)
        for h, w in ((hidden, weight.detach()), (hidden.detach(), weight)):
            for got, want, wanted in zip(grads(h, w, loss), both, (h.requires_grad, w.requires_grad), strict=True):
                assert (got is not None) == wanted
                assert got is None or (want is not None and torch.equal(got, want))
        assert not loss(hidden.detach(), weight.detach()).requires_grad


class TestMemory:
    """The law: never a tensor of all tokens times the vocabulary, and beside the weight's gradient a quarter of it."""

    TOKENS, VOCAB, WIDTH = 96, 2048, 64
    SLACK = 2**15
    """Bytes for a few tiles of 64 ids and a few numbers a token: 1/16 of the fp32 weight."""

    @pytest.fixture
    def case(self, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor, Tensor]:
        """Chunks of 12 tokens."""
        monkeypatch.setitem(head_module.CHUNK_FLOOR, "cpu", 0)
        monkeypatch.setattr(head_module, "CHUNK_TOKENS", 0)
        monkeypatch.setitem(head_module.TILE, "cpu", 64)
        monkeypatch.setattr(head_module, "TURNED", 64)
        hidden = torch.randn(self.TOKENS, self.WIDTH).requires_grad_()
        weight = torch.randn(self.VOCAB, self.WIDTH).requires_grad_()
        return hidden, weight, torch.randint(self.VOCAB, (self.TOKENS,))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_cross_entropy(self, case: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype) -> None:
        """At most 1.3 times the bytes of the weight's gradient, beside the gradient of the hidden states."""
        hidden, weight, targets = (x.detach().to(dtype) if x.is_floating_point() else x for x in case)
        hidden.requires_grad_(), weight.requires_grad_()
        with Meter() as meter:
            total, _, _ = cross_entropy(hidden, weight, targets, softcap=30.0)
            torch.autograd.grad(total / 7, (hidden, weight))
        assert meter.largest == weight.nbytes
        assert meter.peak <= 1.25 * weight.nbytes + hidden.nbytes + self.SLACK

    def test_frozen_head(self, case: tuple[Tensor, Tensor, Tensor]) -> None:
        hidden, weight, targets = case
        with Meter() as meter:
            total, _, _ = cross_entropy(hidden, weight.detach(), targets, softcap=30.0)
            torch.autograd.grad(total, hidden)
        assert meter.peak <= 0.25 * weight.nbytes + hidden.nbytes + self.SLACK

    def test_linear_logprob(self, case: tuple[Tensor, Tensor, Tensor]) -> None:
        """Between forward and backward only a few numbers a token are kept."""
        hidden, weight, targets = case
        with Meter() as meter:
            outputs = linear_logprob(hidden, weight, targets, softcap=30.0)
            assert meter.now < 20 * self.TOKENS
            torch.autograd.grad(torch.stack(outputs).sum(), (hidden, weight))
        assert meter.largest == weight.nbytes
        assert meter.peak <= 1.25 * weight.nbytes + hidden.nbytes + self.SLACK

    def test_no_gradient_is_made_that_nobody_asked_for(self, case: tuple[Tensor, Tensor, Tensor]) -> None:
        """Under no_grad the parameters still require gradients, and none may be made for them."""
        hidden, weight, targets = case
        with torch.no_grad(), Meter() as meter:
            cross_entropy(hidden, weight, targets, softcap=30.0)
        assert meter.peak <= 0.25 * weight.nbytes + self.SLACK


def test_backward_runs_once() -> None:
    """The gradient is scaled in place, so a second backward would scale it twice: it is refused."""
    (hidden, weight), targets = inputs(), some_targets()
    total, _, _ = cross_entropy(hidden, weight, targets, softcap=30.0)
    torch.autograd.grad(total, hidden, retain_graph=True)
    with pytest.raises(RuntimeError, match="backward ran already"):
        torch.autograd.grad(total, hidden)


def test_user_mistakes() -> None:
    (hidden, weight), targets = inputs(), some_targets()
    with pytest.raises(ValueError, match=r"temperature: got 0, allowed is more than 0"):
        linear_logprob(hidden, weight, targets, softcap=30.0, temperature=0)
    with pytest.raises(ValueError, match=r"softcap: got -1"):
        cross_entropy(hidden, weight, targets, softcap=-1)
    with pytest.raises(ValueError, match=r"targets: got shape \(36,\), allowed is \(37,\)"):
        linear_logprob(hidden, weight, targets[1:], softcap=30.0)
    with pytest.raises(ValueError, match=r"targets.*\(36,\), allowed is that of hidden, \(37,\)"):
        cross_entropy(hidden, weight, targets[1:], softcap=30.0)
    with pytest.raises(ValueError, match=r"weights: got tokens of shape \(36,\)"):
        cross_entropy(hidden, weight, targets, torch.ones(36), softcap=30.0)
    with pytest.raises(ValueError, match=r"weights: got a tensor that requires a gradient"):
        cross_entropy(hidden, weight, targets, torch.ones(X, requires_grad=True), softcap=30.0)


def test_chunks_cover_the_tokens_evenly() -> None:
    """Every token once, in order, none past the limit, and no small remainder."""
    for tokens_, rows in ((37, 5), (37, 36), (37, 37), (1, 5), (512, 230), (2048, 230)):
        parts = list(chunks(tokens_, V, 4 * V * rows))
        assert [i for part in parts for i in range(tokens_)[part]] == list(range(tokens_))
        sizes = [part.stop - part.start for part in parts]
        assert max(sizes) <= rows
        assert len(parts) == -(-tokens_ // rows)
        assert max(sizes) - min(sizes) < len(parts)
    assert list(chunks(0, V)) == []
    assert [part.stop for part in chunks(3, V, 1)] == [1, 2, 3]


def test_a_chunk_of_a_2b_head() -> None:
    """One quarter of the weight's bytes: 576 tokens of width 2304 in bf16, whatever the vocabulary; 256 at least."""
    for vocab, width, most in ((256_000, 2304, 576), (49_152, 2304, 576), (256_000, 256, 256), (1024, 64, 16384)):
        head = Head(torch.empty(vocab, width, dtype=torch.bfloat16, device="meta"), 30.0)
        assert head.chunk_bytes() // (2 * vocab) == most


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(dtype: torch.dtype) -> None:
    """The same numbers there, bf16 products summed in fp32."""
    (hidden, weight), targets = inputs(dtype), some_targets().cuda()
    hidden, weight = (x.detach().cuda().requires_grad_() for x in (hidden, weight))
    hidden64, weight64 = exact(hidden), exact(weight)
    want = truth(hidden64, weight64, targets, 30.0)
    made, _, _ = cross_entropy(hidden, weight, targets, softcap=30.0)
    later = linear_logprob(hidden, weight, targets, softcap=30.0)
    tolerance = 1e-4 if dtype == torch.float32 else 0.02
    for got, wanted in ((made, -want[0].sum()), (sum(y.sum() for y in later), sum(y.sum() for y in want))):
        assert isinstance(got, Tensor) and isinstance(wanted, Tensor)
        assert relative(got.detach().cpu(), wanted.detach().cpu()) < tolerance
        pairs = zip(
            torch.autograd.grad(got, (hidden, weight)),
            torch.autograd.grad(wanted, (hidden64, weight64), retain_graph=True),
            strict=True,
        )
        for mine, true in pairs:
            assert norm_error(mine, true) < tolerance
