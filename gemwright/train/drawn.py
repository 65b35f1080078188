"""Ids drawn from a teacher with its own probability: a distribution in a few bytes, without bias (arXiv 2503.16870).

`draws` ids a token are drawn with replacement, and each is kept once with how often it came. counts / draws has the
teacher's probability as its mean, so a sum over it has the sum over the whole vocabulary as its mean; the teacher's
top k would not. The log-probability of each id is kept too, so that the KL's value has no bias either.

Legend: X tokens (x in a chunk), D model, V vocabulary, K ids of a token (draws, or as many as differ).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gemwright.ops.head import Head, log_probs, product_dtype


@dataclass(frozen=True)
class Samples:
    """Ids drawn from the teacher: how often each came, and its log-probability; where the count is 0, padding."""

    ids_XK: Tensor
    counts_XK: Tensor
    log_p_XK: Tensor

    def to(self, device: torch.device | str) -> Samples:
        """The same on another device."""
        return Samples(*(x.to(device, non_blocking=True) for x in (self.ids_XK, self.counts_XK, self.log_p_XK)))


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How ids are drawn."""

    draws: int
    temperature: float = 1.0
    seed: int = 0


@torch.no_grad()
def drawn(head: Head, hidden_XD: Tensor, sampling: Sampling, generator: torch.Generator) -> dict[str, Tensor]:
    """Ids drawn from the head's distribution, each id of a token once with its count; on CPU."""
    warm = Head(head.weight_VD, head.softcap, sampling.temperature)
    parts: list[tuple[Tensor, ...]] = []
    for chunk in warm.chunks(hidden_XD, product_dtype(hidden_XD)):
        log_p_xV = log_probs(chunk.logits(), *chunk.sums)
        # fp64: the sum of 256k probabilities would lose the tail in fp32
        mass_xV = log_p_xV.double().exp_().cumsum_(-1)
        u_xK = torch.rand(len(mass_xV), sampling.draws, dtype=torch.float64, generator=generator).to(mass_xV.device)
        ids_xK = torch.searchsorted(mass_xV, u_xK * mass_xV[:, -1:], right=True).clamp_(max=mass_xV.shape[1] - 1)
        ids_xK = ids_xK.sort(-1).values
        new_xK = torch.ones_like(ids_xK, dtype=torch.bool)
        new_xK[:, 1:] = ids_xK[:, 1:] != ids_xK[:, :-1]
        at = new_xK.flatten().nonzero()[:, 0]
        counts = torch.diff(at, append=at.new_tensor([new_xK.numel()]))
        ids = ids_xK.flatten()[at]
        log_p = log_p_xV[at // sampling.draws, ids]
        parts.append(tuple(x.cpu() for x in (new_xK.sum(-1), ids.int(), counts.short(), log_p.float())))
    kinds, ids, counts, log_p = (torch.cat(x) for x in zip(*parts, strict=True))
    return {"ends": kinds.cumsum(0).int(), "ids": ids, "counts": counts, "log_p": log_p}


def padded(tokens: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Samples:
    """The ids of each token side by side, as wide as the widest."""
    pad = torch.nn.utils.rnn.pad_sequence
    if not tokens:
        return Samples(torch.zeros(0, 1, dtype=torch.long), torch.zeros(0, 1), torch.zeros(0, 1))
    ids, counts, log_p = (pad(list(x), batch_first=True) for x in zip(*tokens, strict=True))
    return Samples(ids.long(), counts.float(), log_p)
