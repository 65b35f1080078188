"""Distillation losses between two heads: neither side's logits ever exist for more than a chunk of tokens.

P is the teacher's distribution over the vocabulary, Q the student's, each from its own hidden states, head, cap and
temperature. A divergence D is a sum of terms over the vocabulary; `DIVERGENCES` gives each term and g = Q dD/dQ. Then

    dD / d logit_j = g_j - Q_j sum(g)

which the softmax makes blind to a constant in dD/dQ, so such constants are left out. The gradient is made in the
forward pass, as in `ops.loss`: the student's buffer of logits becomes the gradient, the teacher's holds g.

No factor of temperature^2 is applied.

Legend: X tokens, any leading dimensions (x in one chunk), D model, V vocabulary (v in one tile), K stored ids a token.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional as F

from gemwright.ops import gpu, native_loss
from gemwright.ops.fuse import fused
from gemwright.ops.head import Chunk, Gradients, Head, log_probs, product_dtype, slope_, wide
from gemwright.ops.loss import MadeForward, counted, gradients_wanted, sparse_targets

Terms = tuple[Tensor, Tensor]
"""A divergence's terms and g, both [x, v]."""


def forward_kl(log_p_xv: Tensor, log_q_xv: Tensor, beta: float) -> Terms:
    """KL(P || Q) = sum P log(P / Q): the student covers what the teacher may say."""
    p_xv = log_p_xv.exp()
    return p_xv * (log_p_xv - log_q_xv), -p_xv


def reverse_kl(log_p_xv: Tensor, log_q_xv: Tensor, beta: float) -> Terms:
    """KL(Q || P) = sum Q log(Q / P): the student keeps to what the teacher is likely to say (arXiv 2306.08543)."""
    g_xv = log_q_xv.exp() * (log_q_xv - log_p_xv)
    return g_xv, g_xv


def soft_cross_entropy(log_p_xv: Tensor, log_q_xv: Tensor, beta: float) -> Terms:
    """-sum P log Q (arXiv 2408.00118, section 3): the forward KL plus the teacher's entropy, the same gradient."""
    p_xv = log_p_xv.exp()
    return -p_xv * log_q_xv, -p_xv


def jsd(log_p_xv: Tensor, log_q_xv: Tensor, beta: float) -> Terms:
    """beta KL(P || M) + (1 - beta) KL(Q || M), M = beta P + (1 - beta) Q (GKD, arXiv 2306.13649).

    It vanishes at both ends: near 0 it is beta KL(P || Q), near 1 it is (1 - beta) KL(Q || P). At 0 and 1 themselves
    this is the forward and the reverse KL, as in TRL: the scale jumps there, the direction of the gradient does not.
    """
    if beta in (0, 1):
        return (reverse_kl if beta else forward_kl)(log_p_xv, log_q_xv, beta)
    # log(Q / M) from log(P / Q) alone: differences of the three log-probabilities would cancel
    p_over_q_xv = log_p_xv - log_q_xv
    q_over_m_xv = F.logsigmoid(math.log((1 - beta) / beta) - p_over_q_xv) - math.log1p(-beta)
    g_xv = (1 - beta) * log_q_xv.exp() * q_over_m_xv
    return g_xv + beta * log_p_xv.exp() * (p_over_q_xv + q_over_m_xv), g_xv


DIVERGENCES: Final[dict[str, Callable[[Tensor, Tensor, float], Terms]]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "soft_cross_entropy": soft_cross_entropy,
}


def divergence(
    kind: str,
    student_XD: Tensor,
    student: Head,
    teacher_XD: Tensor,
    teacher: Head,
    weights_X: Tensor | None = None,
    *,
    beta: float = 0.5,
    vocab: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum of weight * divergence over tokens (nats) and sum of weights, 0-d fp32; divide once, globally.

    Differentiable in the student's hidden states and, where it requires a gradient, its weight; the teacher is a
    constant. The gradient is made here, so backward only scales it and runs once.

    Args:
        kind: a key of DIVERGENCES.
        student_XD: the student's hidden states after its final norm.
        student: its head.
        teacher_XD: the teacher's hidden states at the same tokens; their width may differ.
        teacher: its head.
        weights_X: weight of each token, a constant; None: all 1. A token of weight 0 is left out of all computation.
        beta: of "jsd", in [0, 1].
        vocab: rows of both heads that are the vocabulary, where one is padded; None: all, and the widths must agree.
    """
    if kind not in DIVERGENCES:
        raise ValueError(f"divergence: got {kind!r}, allowed are {', '.join(DIVERGENCES)}")
    if not 0 <= beta <= 1:
        raise ValueError(f"beta: got {beta}, allowed is 0..1")
    widths = len(student.weight_VD), len(teacher.weight_VD)
    if vocab is None and widths[0] != widths[1]:
        raise ValueError(
            f"heads: got {widths[0]} and {widths[1]} rows, allowed are equal widths, or `vocab` to crop to"
        )
    if vocab is not None and not 0 < vocab <= min(widths):
        raise ValueError(f"vocab: got {vocab}, allowed is 1..{min(widths)}")
    weights_X, (student_XD, teacher_XD) = counted(weights_X, student_XD, teacher_XD)
    needs = gradients_wanted(student_XD, student)
    total: Tensor = _Divergence.apply(  # type: ignore[no-untyped-call]
        student_XD, student.weight_VD, cropped(student, vocab), needs, teacher_XD, cropped(teacher, vocab), weights_X,
        kind, beta,
    )  # fmt: skip
    return total, weights_X.sum()


def cropped(head: Head, vocab: int | None) -> Head:
    """The head of the first `vocab` rows, as a constant."""
    return replace(head, weight_VD=head.weight_VD.detach()[:vocab])


@fused
def _compare_(
    ours_xv: Tensor,
    theirs_xv: Tensor,
    our_sums: tuple[Tensor, Tensor],
    their_sums: tuple[Tensor, Tensor],
    terms: Callable[[Tensor, Tensor, float], Terms],
    beta: float,
) -> tuple[Tensor, Tensor]:
    """The tile's part of the divergences and of the sums of g, [x, 1] each; the teacher's logits become g."""
    terms_xv, g_xv = terms(log_probs(theirs_xv, *their_sums), log_probs(ours_xv, *our_sums), beta)
    theirs_xv.copy_(g_xv)
    return terms_xv.sum(-1, keepdim=True), g_xv.sum(-1, keepdim=True)


@fused
def _into_gradient_(
    ours_xv: Tensor,
    g_xv: Tensor,
    our_sums: tuple[Tensor, Tensor],
    sum_x1: Tensor,
    weight_x1: Tensor,
    cap: float | None,
    temperature: float,
) -> None:
    """The student's logits become the gradient by h . W^T."""
    d_xv = g_xv - log_probs(ours_xv, *our_sums).exp_().mul_(sum_x1)
    slope_(ours_xv, cap, temperature).mul_(d_xv).mul_(weight_x1)


def _chunk(
    head: Head, ours: Chunk, theirs: Chunk, kind: str, beta: float, weight_x1: Tensor, wanted: bool
) -> tuple[Tensor, Tensor | None]:
    """The divergences of a chunk, and the gradient by h . W^T of their weighted sum, where it is wanted."""
    made_xV: Tensor | None = None
    if ours.native is not None and theirs.native is not None:
        value_x1, sum_x1 = native_loss.compare(ours.native, theirs.native, kind, beta)
        if wanted:
            made_xV = native_loss.divergence_gradient_(ours.native, theirs.native, kind, beta, sum_x1, weight_x1)
        return value_x1, made_xV
    if gpu.serves(ours.held_xV, theirs.held_xV):
        sides = ours.held_xV, theirs.held_xV, ours.sums, theirs.sums, kind, beta
        value_x1, sum_x1 = gpu.losses().compare(*sides)
        if wanted:
            made_xV = gpu.losses().divergence_gradient(
                *sides, sum_x1, weight_x1, cap=head.softcap, temperature=head.temperature, dtype=ours.hidden_xD.dtype
            )
        return value_x1, made_xV
    value_x1, sum_x1 = torch.zeros_like(weight_x1), torch.zeros_like(weight_x1)
    tiles = [(ours.held_xV[:, v], theirs.held_xV[:, v]) for v in head.tiles()]
    for tile in tiles:
        value_v1, sum_v1 = _compare_(*tile, ours.sums, theirs.sums, DIVERGENCES[kind], beta)
        value_x1 += value_v1
        sum_x1 += sum_v1
    if wanted:
        for tile in tiles:
            _into_gradient_(*tile, ours.sums, sum_x1, weight_x1, head.softcap, head.temperature)
        made_xV = ours.held_xV
    return value_x1, made_xV


class _Divergence(MadeForward):
    @staticmethod
    def forward(
        ctx: Any, student_XD: Tensor, weight_VD: Tensor, student: Head, needs: tuple[bool, bool],
        teacher_XD: Tensor, teacher: Head, weights_X: Tensor,
        kind: str, beta: float,
    ) -> Tensor:  # fmt: skip
        dtypes = product_dtype(student_XD), product_dtype(teacher_XD)
        # two buffers of logits: half a weight's bytes in all would be too much beside its gradient
        limit, plain = student.chunk_bytes() * 4 // 5, dtypes[0] != dtypes[1]
        total = student_XD.new_zeros((), dtype=wide(dtypes[0]))
        grads = ctx.grads = Gradients(student_XD, weight_VD, needs)
        ours_theirs = zip(
            student.chunks(student_XD, dtypes[0], limit, plain=plain),
            teacher.chunks(teacher_XD, dtypes[1], limit, plain=plain),
            strict=True,
        )
        for ours, theirs in ours_theirs:
            weight_x1 = weights_X[ours.part, None]
            value_x1, made_xV = _chunk(student, ours, theirs, kind, beta, weight_x1, grads.any)
            total += (weight_x1 * value_x1).sum()
            if made_xV is not None:
                grads.add(student, ours, made_xV)
        return total


def sparse_kl(
    hidden_XD: Tensor,
    head: Head,
    ids_XK: Tensor,
    mass_XK: Tensor,
    weights_X: Tensor | None = None,
    *,
    log_p_XK: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum of weight * sum_k mass (log p - log q) over tokens (nats) and sum of weights, 0-d fp32; q is the student's.

    What `mass` is decides what this estimates (arXiv 2503.16870):
    - counts / draws of ids drawn from the teacher: the KL(P || Q) of the full vocabulary, gradient and, where
      `log_p_XK` is the teacher's true log-probability, value unbiased;
    - the probabilities of the teacher's top k: the KL's own terms, without those not stored, which is biased.

    Differentiable as `divergence` is; the student's log-probabilities are those of its whole vocabulary.

    Args:
        hidden_XD: the student's hidden states after its final norm.
        head: its head.
        ids_XK: ids in 0..V-1; one may stand twice, and where the mass is 0 any id may stand.
        mass_XK: how much each id counts for, not negative.
        weights_X: weight of each token, a constant; None: all 1. A token of weight 0 is left out of all computation.
        log_p_XK: the teacher's log-probability of each id; None: log mass.
    """
    mass_XK = mass_XK.to(wide(hidden_XD.dtype))
    # 0 log 0 is 0: an id that does not count has no teacher term either
    log_p_XK = mass_XK.log() if log_p_XK is None else log_p_XK
    known_XK = torch.where(mass_XK > 0, mass_XK * log_p_XK, 0)
    weights_X, (hidden_XD, ids_XK, mass_XK, known_XK) = counted(weights_X, hidden_XD, ids_XK, mass_XK, known_XK)
    cross, _ = sparse_targets(hidden_XD, head, ids_XK, mass_XK * weights_X[:, None])
    return cross + (known_XK * weights_X[:, None]).sum(), weights_X.sum()
