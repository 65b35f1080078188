"""Log-probabilities and divergences from hidden states and a head, in chunks of tokens: no [T, V] tensor ever exists.

Logits are softcap(hidden . W^T) in fp32, as in `Gemma2.logits`; log-probability is logit - logsumexp. The matmul runs
in the dtype it is given, cap, logsumexp and sums in fp32.

Legend: X tokens (x in one chunk), D model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional as F

from gemwright.ops.attention import softcap

CHUNK_BYTES: Final = 128 * 2**20
"""Bytes of fp32 logits that one chunk may take."""


def chunks(tokens: int, vocab: int) -> Iterator[slice]:
    """Slices of tokens whose fp32 logits fit CHUNK_BYTES."""
    size = max(1, CHUNK_BYTES // (4 * vocab))
    return (slice(i, min(i + size, tokens)) for i in range(0, tokens, size))


def kl_divergence(
    hidden_XD: Tensor,
    weight_VD: Tensor,
    teacher_XD: Tensor,
    teacher_VD: Tensor,
    *,
    cap: float | None = None,
    teacher_cap: float | None = None,
) -> Tensor:
    """Sum over tokens of KL(teacher || student) in nats, 0-d fp32; differentiable in `hidden_XD` alone.

    Each side has its own head and cap. The heads are frozen, so the gradient of each chunk is made in the forward pass
    while its logits are there: dKL/dlogit = p_student - p_teacher, through the cap's 1 - tanh^2.
    """
    total: Tensor = _KL.apply(hidden_XD, weight_VD, teacher_XD, teacher_VD, cap, teacher_cap)  # type: ignore[no-untyped-call]
    return total


class _KL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor,
        cap: float | None, teacher_cap: float | None,
    ) -> Tensor:  # fmt: skip
        total = hidden.new_zeros((), dtype=torch.float32)
        grad_XD = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for part in chunks(hidden.shape[0], weight.shape[0]):
            log_p_xV = softcap(F.linear(teacher[part], teacher_weight).float(), teacher_cap).log_softmax(-1)
            logits_xV = softcap(F.linear(hidden[part], weight).float(), cap)
            log_q_xV = logits_xV.log_softmax(-1)
            p_xV = log_p_xV.exp()
            total += (p_xV * (log_p_xV - log_q_xV)).sum()
            if grad_XD is not None:
                dlogits_xV = log_q_xV.exp_().sub_(p_xV)
                if cap is not None:
                    dlogits_xV *= 1 - (logits_xV / cap).square()
                grad_XD[part] = dlogits_xV.to(weight.dtype) @ weight
        ctx.save_for_backward(grad_XD)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_XD,) = ctx.saved_tensors
        return grad_XD * grads[0], None, None, None, None, None
