"""What CUDA compiles into one pass over the logits, compiled on CPU: the same numbers as without a compiler, whatever
the number of tokens; and the losses as a whole on a GPU.

Legend: X tokens, D model, V vocabulary.
"""

from __future__ import annotations

import copy
import inspect
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from head_fixtures import D, V, X, exact, inputs
from oracle import relative
from torch import Tensor
from torch._dynamo import config as dynamo
from torch.utils._pytree import tree_leaves

from gemwright.ops import divergence as divergences
from gemwright.ops import fuse
from gemwright.ops import head as heads
from gemwright.ops import loss as losses
from gemwright.ops.divergence import DIVERGENCES, divergence
from gemwright.ops.head import Head
from gemwright.ops.loss import cross_entropy

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on a CPU")


def logits(rows: int) -> Tensor:
    return 20 * torch.randn(rows, V)


def sums(z: Tensor) -> tuple[Tensor, Tensor]:
    top = z.amax(-1, keepdim=True)
    return top, (z - top).exp().sum(-1, keepdim=True).log()


def both(function: Callable[..., Any], *arguments: Any) -> None:
    """Compiled and not: results and arguments changed in place are equal."""
    plain = inspect.unwrap(function)
    one, other = arguments, copy.deepcopy(arguments)
    want = plain(*one)
    with dynamo.patch(specialize_float=True, recompile_limit=fuse.VARIANTS):
        got = fuse.compiled(plain)(*other)
    for a, b in zip(tree_leaves((got, other)), tree_leaves((want, one)), strict=True):
        if isinstance(a, Tensor):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("cap", [30.0, None])
def test_cross_entropy_and_log_probabilities(cap: float | None) -> None:
    for rows in (X, 5):
        z = logits(rows)
        both(heads.read_, z.clone(), cap, 0.7)
        both(losses._entropy, z, *sums(z))
        weight_x1, entropy_x1 = torch.rand(rows, 1), torch.rand(rows, 1)
        both(losses._into_gradient_, z.clone(), *sums(z), weight_x1, cap, 0.7)
        both(losses._into_gradient_, z.clone(), *sums(z), weight_x1, cap, 0.7, (weight_x1 - 0.5, entropy_x1))


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_divergences(kind: str) -> None:
    for rows in (X, 5):
        q, p = logits(rows), logits(rows)
        both(divergences._compare_, q.clone(), p.clone(), sums(q), sums(p), DIVERGENCES[kind], 0.3)
        weight_x1, sum_x1 = torch.rand(rows, 1), torch.randn(rows, 1)
        both(divergences._into_gradient_, q.clone(), torch.randn(rows, V), sums(q), sum_x1, weight_x1, 30.0, 1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_divergences_on_a_gpu(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Value and gradients against fp64 autograd over whole log-probabilities, in several chunks."""
    monkeypatch.setitem(heads.CHUNK_FLOOR, "cuda", 4 * V * 5)
    monkeypatch.setattr(heads, "CHUNK_TOKENS", 0)
    sides = [[x.detach().cuda().requires_grad_() for x in inputs(dtype, width=width)] for width in (D, D + 8)]
    (hidden, weight), (teacher, teacher_weight) = sides
    got, _ = divergence(kind, hidden, Head(weight, 30.0), teacher, Head(teacher_weight, 30.0), beta=0.3)
    hidden64, weight64 = exact(hidden), exact(weight)
    log_q = (30 * torch.tanh(hidden64 @ weight64.T / 30)).log_softmax(-1)
    log_p = (30 * torch.tanh(teacher.double() @ teacher_weight.double().T / 30)).log_softmax(-1).detach()
    terms, _ = DIVERGENCES[kind](log_p, log_q, 0.3)
    tolerance = 1e-4 if dtype == torch.float32 else 0.02
    assert relative(got.detach().cpu(), terms.sum().detach().cpu()) < tolerance
    mine = torch.autograd.grad(got, (hidden, weight))
    for one, other in zip(mine, torch.autograd.grad(terms.sum(), (hidden64, weight64)), strict=True):
        assert float((one.double() - other).norm() / other.norm()) < tolerance


@pytest.mark.gpu
def test_the_head_of_a_2b_model_on_a_gpu() -> None:
    """At V 256000 the loss and its gradient in bf16 are those of fp64 within bf16's error, in two chunks."""
    tokens, vocab, width = 600, 256_000, 256
    hidden = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = (torch.randn(vocab, width, device="cuda") / 8).bfloat16().requires_grad_()
    targets = torch.randint(vocab, (tokens,), device="cuda")
    got, _, _ = cross_entropy(hidden, weight, targets, softcap=30.0)
    hidden32, weight32 = (x.detach().float().requires_grad_() for x in (hidden, weight))
    want = torch.nn.functional.cross_entropy(30 * torch.tanh(hidden32 @ weight32.T / 30), targets, reduction="sum")
    assert abs(float(got.detach()) / float(want.detach()) - 1) < 1e-4
    mine = torch.autograd.grad(got, (hidden, weight))
    for one, other in zip(mine, torch.autograd.grad(want, (hidden32, weight32)), strict=True):
        assert float((one.float() - other).norm() / other.norm()) < 0.01
