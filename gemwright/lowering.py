"""Lowering: an adopted model's logits, brought below its final cap before anything is trained.

A Llama's likeliest logits may be 20 or 30, where Gemma 2's cap of 30 bends them. Softmax does not see what is taken off
all logits of a token alike, so it is taken off.

Legend: B rows, T tokens, X tokens of all rows, D model, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

from gemwright.llama import EMBEDDING, Llama, LlamaLayer

LOWERED_TO: Final = 0.1
"""Of the cap: half of the tokens' largest logits are brought below it."""
MEASURED: Final = 256
"""Tokens whose logits are looked at, all of them."""
FIRST_READS: Final = {
    "attention_in": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "feedforward_in": ("mlp.gate_proj", "mlp.up_proj"),
}
"""Linears of the first layer, by the field of `LlamaLayer` that they read, in the order of computation."""


@dataclass(frozen=True)
class Lowering:
    """What takes nearly the same off all logits of a token.

    A vector s is added to every row of the tied embedding, so all logits of a token with the hidden state h change by
    h . s. Hidden states have a large mean, so that a small s takes nearly as much off everywhere. The first layer reads
    s as well (behind it the stream is many times as large): its linears are turned, so that they give what they gave.
    """

    shift_D: Tensor
    turns: dict[str, Tensor]
    """[D, D] by the names of the first layer's linears; W becomes W turn."""

    def apply(self, name: str, weight: Tensor) -> Tensor:
        """A tensor of the source or of the adopted model, lowered."""
        if name == EMBEDDING:
            return weight + self.shift_D
        return weight @ self.turns[name] if name in self.turns else weight


@torch.no_grad()
def lowering(llama: Llama, tokens_BT: Tensor) -> Lowering | None:
    """Brings the source's logits below the final cap; None where that does not halve what the cap costs.

    Args:
        llama: in fp32.
        tokens_BT: text; 500 tokens are enough.
    """
    cap = llama.config.final_logit_softcapping
    if cap is None:
        return None
    first, hidden_XD = _ends(llama, tokens_BT)
    every = max(1, len(hidden_XD) // MEASURED)
    picked_XD = hidden_XD[::every]
    largest_X = torch.cat([(part_XD @ llama.head.T).amax(-1) for part_XD in torch.split(picked_XD, 32)])
    if (by := float(largest_X.median()) - LOWERED_TO * cap) <= 0:
        return None
    moment_DD = hidden_XD.mT @ hidden_XD / len(hidden_XD)
    shift_D = torch.linalg.solve(_damped(moment_DD, 1.0), -by * hidden_XD.mean(0))
    lower = Lowering(shift_D, {})
    other = llama.replaced({EMBEDDING: lower.apply(EMBEDDING, llama.head)})
    for field, linears in FIRST_READS.items():
        turn_DD = _turn(getattr(_ends(other, tokens_BT)[0], field), getattr(first, field))
        names = [f"model.layers.0.{linear}.weight" for linear in linears]
        lower.turns.update(dict.fromkeys(names, turn_DD))
        other = other.replaced({name: lower.apply(name, llama.weights[name]) for name in names})
    lowered_XD = _ends(other, tokens_BT)[1][::every]
    before, after = (
        _cost(picked_XD, llama.head, h_XD, head_VD, cap)
        for h_XD, head_VD in ((picked_XD, llama.head), (lowered_XD, other.head))
    )
    return lower if after < before / 2 else None


def _ends(llama: Llama, tokens_BT: Tensor) -> tuple[LlamaLayer, Tensor]:
    """The first layer's record and the final hidden states, [X, D] each, without the first position."""
    pos_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device).expand_as(tokens_BT)
    layers = llama.layers(tokens_BT, pos_BT)
    first = last = next(layers)
    for last in layers:  # noqa: B007
        pass
    assert isinstance(first, LlamaLayer)
    assert isinstance(last, Tensor)
    return LlamaLayer(*(x[:, 1:].flatten(0, 1) for x in vars(first).values())), last[:, 1:].flatten(0, 1)


def _damped(moment_DD: Tensor, share: float) -> Tensor:
    """Second moments with a share of their mean added to the diagonal."""
    return moment_DD + share * moment_DD.diagonal().mean() * torch.eye(len(moment_DD), device=moment_DD.device)


def _turn(new_XD: Tensor, old_XD: Tensor) -> Tensor:
    """The matrix [D, D], near the identity, that makes the old vectors of the new ones: least squares."""
    solved_DD = torch.linalg.solve(_damped(new_XD.mT @ new_XD, 1e-2), new_XD.mT @ (old_XD - new_XD))
    turn_DD: Tensor = solved_DD.mT + torch.eye(new_XD.shape[1], device=new_XD.device)
    return turn_DD


def _cost(truth_XD: Tensor, truth_VD: Tensor, hidden_XD: Tensor, head_VD: Tensor, cap: float) -> float:
    """Mean KL(softmax of the true logits || softmax of the capped ones), nats."""
    total = 0.0
    for truth_xD, hidden_xD in zip(*(torch.split(x, 32) for x in (truth_XD, hidden_XD)), strict=True):
        truth_xV = (truth_xD @ truth_VD.T).log_softmax(-1)
        capped_xV = cap * torch.tanh(hidden_xD @ head_VD.T / cap)
        total += float(F.kl_div(capped_xV.log_softmax(-1), truth_xV, log_target=True, reduction="sum"))
    return total / len(truth_XD)
