"""Log-probability, the one definition, and the losses that are sums of it; the logits of all tokens never exist.

    logprob(t) = logits[t] - lse,   lse = logsumexp(logits),   entropy = -sum p log p,   p = exp(logits - lse)

with the logits of `ops.head`. `reference` says it plainly; everything else is tested against it.

Where the weight of each token is known beforehand, the gradient is made in the forward pass, while a chunk's logits
are there (`cross_entropy`). Where it comes later (preference losses, policy gradients), `linear_logprob` keeps its
inputs and the entropy, and makes the logits of each chunk again in backward. Derivatives by the logits:

    d logprob(t) = onehot(t) - p        d lse = p        d entropy = -p (log p + entropy)

Legend: X tokens, any leading dimensions (x in one chunk), D model, V vocabulary (v in one tile), K targets a token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gemwright.ops import gpu, native_loss
from gemwright.ops.attention import softcap as cap_logits
from gemwright.ops.fuse import fused
from gemwright.ops.head import Chunk, Gradients, Head, log_probs, product_dtype, slope_, wide


def reference(
    hidden_XD: Tensor, weight_VD: Tensor, targets_X: Tensor, *, softcap: float | None, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition of `linear_logprob`, in fp32 (or fp64) with every logit in memory; differentiable."""
    dtype = wide(hidden_XD.dtype)
    logits_XV = cap_logits(F.linear(hidden_XD.to(dtype), weight_VD.to(dtype)), softcap) / temperature
    logprobs_XV = logits_XV.log_softmax(-1)
    logprob_X = logprobs_XV.gather(-1, targets_X[..., None])[..., 0]
    return logprob_X, logits_XV.logsumexp(-1), -(logprobs_XV.exp() * logprobs_XV).sum(-1)


def linear_logprob(
    hidden_XD: Tensor, weight_VD: Tensor, targets_X: Tensor, *, softcap: float | None, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability of each target, log-sum-exp and entropy (nats), all [X] in fp32 (fp64 for fp64).

    All three are differentiable in the hidden states and, where it requires a gradient, the weight; weigh the tokens
    afterwards. Nothing V wide is kept for backward.

    Args:
        hidden_XD: hidden states after the final norm.
        weight_VD: the head's weight.
        targets_X: ids in 0..V-1.
        softcap: the model's final cap, None for a model without.
        temperature: divides the capped logits.
    """
    head = Head(weight_VD, softcap, temperature)
    flat = hidden_XD.reshape(-1, hidden_XD.shape[-1]), targets_X.reshape(-1)
    if len(flat[0]) != len(flat[1]):
        raise ValueError(f"targets: got shape {tuple(targets_X.shape)}, allowed is {tuple(hidden_XD.shape[:-1])}")
    outputs: tuple[Tensor, Tensor, Tensor] = _LogProb.apply(*flat, weight_VD, head)  # type: ignore[no-untyped-call]
    logprob_X, lse_X, entropy_X = (y.view(targets_X.shape) for y in outputs)
    return logprob_X, lse_X, entropy_X


class _LogProb(torch.autograd.Function):
    """Keeps its inputs and the entropy; backward makes the logits again, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any, hidden_XD: Tensor, targets_X: Tensor, weight_VD: Tensor, head: Head
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = product_dtype(hidden_XD)
        logprob_X, lse_X, entropy_X = (hidden_XD.new_zeros(len(hidden_XD), dtype=wide(dtype)) for _ in range(3))
        for chunk in head.chunks(hidden_XD, dtype):
            part = chunk.part
            logprob_X[part] = log_probs(chunk.logits(targets_X[part, None]), *chunk.sums)[:, 0]
            lse_X[part] = (chunk.top_x1 + chunk.log_sum_x1)[:, 0]
            if chunk.native is not None:
                entropy_X[part] = native_loss.entropy(chunk.native)
                continue
            for v in head.tiles():
                entropy_X[part] += _entropy(chunk.held_xV[:, v], *chunk.sums)
        ctx.save_for_backward(hidden_XD, targets_X, weight_VD, entropy_X)
        ctx.softcap, ctx.temperature, ctx.dtype = head.softcap, head.temperature, dtype
        ctx.set_materialize_grads(False)
        return logprob_X, lse_X, entropy_X

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *outer: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden_XD, targets_X, weight_VD, entropy_X = ctx.saved_tensors
        head = Head(weight_VD, ctx.softcap, ctx.temperature)
        # unused outputs have no gradient: zeros, and no work for the entropy
        d_logprob_X, d_lse_X, d_entropy_X = (torch.zeros_like(entropy_X) if g is None else g for g in outer)
        grads = Gradients(hidden_XD, weight_VD, (ctx.needs_input_grad[0], ctx.needs_input_grad[2]))
        for chunk in head.chunks(hidden_XD, ctx.dtype, plain=outer[2] is not None):
            part = chunk.part
            weights = (d_lse_X - d_logprob_X)[part, None], targets_X[part, None], d_logprob_X[part, None]
            entropy = None if outer[2] is None else (d_entropy_X[part, None], entropy_X[part, None])
            grads.add(head, chunk, gradient(head, chunk, *weights, entropy))
        hidden, weight = grads.both()
        return hidden, None, weight, None


def gradient(
    head: Head,
    chunk: Chunk,
    p_weight_x1: Tensor,
    ids_xK: Tensor,
    id_weight_xK: Tensor,
    entropy: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The gradient by h . W^T of sum p_weight * lse + sum_k id_weight * logits[id], [x, V].

    It takes the place of what the chunk holds, where that has its dtype.

    Args:
        entropy: the outer gradient and the value of the entropy, [x, 1] each, where that counts too; of a plain chunk.
    """
    if chunk.native is not None:
        assert entropy is None, "the native pass knows no entropy: ask for plain chunks"
        return native_loss.gradient_(chunk.native, p_weight_x1, ids_xK, id_weight_xK)
    z_xV = chunk.held_xV
    if entropy is None and ids_xK.shape[1] == 1 and gpu.serves(z_xV):
        made_xV: Tensor = gpu.losses().gradient(
            z_xV, chunk.sums, p_weight_x1, ids_xK, id_weight_xK, cap=head.softcap, temperature=head.temperature,
            dtype=chunk.hidden_xD.dtype,
        )  # fmt: skip
        return made_xV
    d_ids_xK = id_weight_xK * head.slope_(z_xV.gather(1, ids_xK))
    for v in head.tiles():
        _into_gradient_(z_xV[:, v], *chunk.sums, p_weight_x1, head.softcap, head.temperature, entropy)
    return z_xV.scatter_add_(1, ids_xK, d_ids_xK)


@fused
def _entropy(logits_xv: Tensor, top_x1: Tensor, log_sum_x1: Tensor) -> Tensor:
    """The tile's part of the entropies, [x]."""
    log_p_xv = log_probs(logits_xv, top_x1, log_sum_x1)
    return -log_p_xv.exp().mul_(log_p_xv).sum(-1)


@fused
def _into_gradient_(
    logits_xv: Tensor,
    top_x1: Tensor,
    log_sum_x1: Tensor,
    p_weight_x1: Tensor,
    cap: float | None,
    temperature: float,
    entropy: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Logits become the gradient by h . W^T of p_weight * lse (`entropy`: its outer gradient and its value)."""
    log_p_xv = log_probs(logits_xv, top_x1, log_sum_x1)
    if entropy is None:
        d_xv = log_p_xv.exp_().mul_(p_weight_x1)
    else:
        d_entropy_x1, entropy_x1 = entropy
        d_xv = log_p_xv.exp() * (p_weight_x1 - d_entropy_x1 * (log_p_xv + entropy_x1))
    slope_(logits_xv, cap, temperature).mul_(d_xv)


def cross_entropy(
    hidden_XD: Tensor,
    weight_VD: Tensor,
    targets_X: Tensor,
    weights_X: Tensor | None = None,
    *,
    softcap: float | None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted cross-entropy: sum of -weight * logprob (nats), sum of weights, weight of tokens predicted right.

    All 0-d fp32; divide the first by the global sum of the second, once. The third over the second is the accuracy. The
    first is differentiable in the hidden states and, where it requires a gradient, the weight: the gradient is made
    here, so backward only scales it and runs once.

    Args:
        hidden_XD: hidden states after the final norm.
        weight_VD: the head's weight.
        targets_X: ids in 0..V-1; where the weight is 0, anything.
        weights_X: weight of each token, a constant; None: all 1. A token of weight 0 is left out of all computation.
        softcap: the model's final cap, None for a model without.
        temperature: divides the capped logits.
    """
    head = Head(weight_VD, softcap, temperature)
    weights_X, (hidden_XD, targets_X) = counted(weights_X, hidden_XD, targets_X[..., None])
    total, correct = sparse_targets(hidden_XD, head, targets_X, weights_X[:, None])
    return total, weights_X.sum(), correct


def counted(weights_X: Tensor | None, hidden_XD: Tensor, *others_XY: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Weights in fp32 and what belongs to the tokens, flat, all without the tokens of weight 0.

    Raises ValueError where a shape is not that of the hidden states' tokens, or the weights want a gradient.
    """
    X = hidden_XD.shape[:-1]
    weights_X = torch.ones(X, device=hidden_XD.device) if weights_X is None else weights_X
    for name, shape in [("weights", weights_X.shape), *(("targets or teacher", y.shape[:-1]) for y in others_XY)]:
        if shape != X:
            raise ValueError(f"{name}: got tokens of shape {tuple(shape)}, allowed is that of hidden, {tuple(X)}")
    if weights_X.requires_grad:
        raise ValueError("weights: got a tensor that requires a gradient, allowed is a constant; see linear_logprob")
    flat = weights_X.to(wide(hidden_XD.dtype)).flatten()
    rows = flat.nonzero()[:, 0]
    tensors = (y.reshape(-1, y.shape[-1]) for y in (hidden_XD, *others_XY))
    if len(rows) == len(flat):
        return flat, tuple(tensors)
    return flat[rows], tuple(y[rows] for y in tensors)


def sparse_targets(hidden_XD: Tensor, head: Head, ids_XK: Tensor, mass_XK: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of -mass * log p(id) over all tokens and targets; mass of the tokens whose first target is the likeliest."""
    needs = gradients_wanted(hidden_XD, head)
    out: tuple[Tensor, Tensor] = _SparseTargets.apply(hidden_XD, head.weight_VD, head, needs, ids_XK, mass_XK)  # type: ignore[no-untyped-call]
    return out


def gradients_wanted(hidden_XD: Tensor, head: Head) -> tuple[bool, bool]:
    """Whether hidden states and weight want a gradient: `ctx.needs_input_grad` says so under no_grad too."""
    enabled = torch.is_grad_enabled()
    return enabled and hidden_XD.requires_grad, enabled and head.weight_VD.requires_grad


class MadeForward(torch.autograd.Function):
    """A loss of (hidden, weight, ...) whose first output is a sum and whose gradient, `ctx.grads`, is there already."""

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            raise RuntimeError("backward ran already: this loss's gradient is made once, in the forward pass")
        return (*grads.both(outer[0]), *[None] * (len(ctx.needs_input_grad) - 2))


class _SparseTargets(MadeForward):
    @staticmethod
    def forward(
        ctx: Any, hidden_XD: Tensor, weight_VD: Tensor, head: Head, needs: tuple[bool, bool],
        ids_XK: Tensor, mass_XK: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        dtype = product_dtype(hidden_XD)
        total, correct = (hidden_XD.new_zeros((), dtype=wide(dtype)) for _ in range(2))
        grads = ctx.grads = Gradients(hidden_XD, weight_VD, needs)
        for chunk in head.chunks(hidden_XD, dtype):
            ids_xK, mass_xK = ids_XK[chunk.part], mass_XK[chunk.part]
            at_xK = chunk.logits(ids_xK)
            mass_x1 = mass_xK.sum(-1, keepdim=True)
            total -= (mass_xK * log_probs(at_xK, *chunk.sums)).sum()
            correct += (mass_x1 * (at_xK[:, :1] >= chunk.top_x1)).sum()
            if grads.any:
                grads.add(head, chunk, gradient(head, chunk, mass_x1, ids_xK, -mass_xK))
        ctx.mark_non_differentiable(correct)
        return total, correct
