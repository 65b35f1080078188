"""Lowering: an adopted model's logits, brought below its final cap before anything is trained.

A Llama's likeliest logits may be 20 or 30, where Gemma 2's cap of 30 bends them. Softmax does not see what is taken off
all logits of a token alike, so it is taken off.

Legend: B rows, T tokens, X tokens of all rows, D model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
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
TURN_RANK: Final = 8
"""Of what a turn adds to a scale: on SmolLM2-135M 4 are as good as all."""
STATE: Final = "lowering"
"""What the names of its tensors begin with, in a file."""


@dataclass(frozen=True)
class Turn:
    """The map scale + left right [D, D] of what a linear reads."""

    scale: Tensor
    left_Dr: Tensor
    right_rD: Tensor

    def apply(self, weight_OD: Tensor) -> Tensor:
        """The linear that reads through it."""
        return weight_OD * self.scale + (weight_OD @ self.left_Dr) @ self.right_rD


@dataclass(frozen=True)
class Lowering:
    """What takes nearly the same off all logits of a token.

    A vector s is added to every row of the tied embedding, so all logits of a token with the hidden state h change by
    h . s. Hidden states have a large mean, so that a small s takes nearly as much off everywhere. The first layer reads
    s as well (behind it the stream is many times as large): its linears are turned, so that they give what they gave.
    """

    shift_D: Tensor
    turns: dict[str, Turn]
    """By the keys of FIRST_READS."""

    def apply(self, name: str, weight: Tensor) -> Tensor:
        """A tensor of the source or of the adopted model, lowered."""
        if name == EMBEDDING:
            return weight + self.shift_D
        turn = next((turn for reads, turn in self.turns.items() if name in _first(reads)), None)
        return weight if turn is None else turn.apply(weight)

    def state(self) -> dict[str, Tensor]:
        """Its tensors by name, as a file of safetensors holds them."""
        parts = {f"{reads}.{part}": x for reads, turn in self.turns.items() for part, x in vars(turn).items()}
        return {f"{STATE}.{name}": x.contiguous() for name, x in {"shift": self.shift_D, **parts}.items()}

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> Lowering | None:
        """The one among a file's tensors; None where there is none."""
        if f"{STATE}.shift" not in state:
            return None
        parts = ("scale", "left_Dr", "right_rD")
        turns = {reads: Turn(*(state[f"{STATE}.{reads}.{part}"] for part in parts)) for reads in FIRST_READS}
        return cls(state[f"{STATE}.shift"], turns)


def _first(reads: str) -> list[str]:
    """Names of the first layer's linears that read a field."""
    return [f"model.layers.0.{linear}.weight" for linear in FIRST_READS[reads]]


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
    first, hidden_XD = _first_layer(llama, tokens_BT), _hidden(llama, tokens_BT)
    every = max(1, len(hidden_XD) // MEASURED)
    picked_XD = hidden_XD[::every]
    largest_X = torch.cat([(part_XD @ llama.head.T).amax(-1) for part_XD in torch.split(picked_XD, 32)])
    if (by := float(largest_X.median()) - LOWERED_TO * cap) <= 0:
        return None
    moment_DD = hidden_XD.mT @ hidden_XD / len(hidden_XD)
    shift_D = torch.linalg.solve(_damped(moment_DD, 1.0), -by * hidden_XD.mean(0))
    lower = Lowering(shift_D, {})
    other = llama.replaced({EMBEDDING: lower.apply(EMBEDDING, llama.head)})
    for reads in FIRST_READS:
        lower.turns[reads] = _turn(getattr(_first_layer(other, tokens_BT), reads), getattr(first, reads))
        other = other.replaced({name: lower.apply(name, llama.weights[name]) for name in _first(reads)})
    before = _cost(picked_XD, llama.head, picked_XD, llama.head, cap)
    after = _cost(picked_XD, llama.head, _hidden(other, tokens_BT)[::every], other.head, cap)
    return lower if after < before / 2 else None


def _first_layer(llama: Llama, tokens_BT: Tensor) -> LlamaLayer:
    """The first layer's record, [X, D] each, without the first position."""
    first = next(llama.layers(tokens_BT))
    return LlamaLayer(*(x[:, 1:].flatten(0, 1) for x in vars(first).values()))


def _hidden(llama: Llama, tokens_BT: Tensor) -> Tensor:
    """The final hidden states, [X, D], without the first position, which is the attention sink's."""
    return llama(tokens_BT)[:, 1:].flatten(0, 1)


def _damped(moment_DD: Tensor, share: float) -> Tensor:
    """Second moments with a share of their mean added to the diagonal."""
    return moment_DD + share * moment_DD.diagonal().mean() * torch.eye(len(moment_DD), device=moment_DD.device)


def _turn(new_XD: Tensor, old_XD: Tensor) -> Turn:
    """What makes the old vectors of the new ones, near the identity: least squares, and the leading part of it."""
    solved_DD = torch.linalg.solve(_damped(new_XD.mT @ new_XD, 1e-2), new_XD.mT @ (old_XD - new_XD)).mT
    mean = solved_DD.diagonal().mean()
    u_DD, s_D, v_DD = torch.linalg.svd(solved_DD - mean * torch.eye(len(solved_DD), device=solved_DD.device))
    return Turn(1 + mean, u_DD[:, :TURN_RANK] * s_D[:TURN_RANK], v_DD[:TURN_RANK])


def _cost(truth_XD: Tensor, truth_VD: Tensor, hidden_XD: Tensor, head_VD: Tensor, cap: float) -> float:
    """Mean KL(softmax of the true logits || softmax of the capped ones), nats."""
    total = 0.0
    for truth_xD, hidden_xD in zip(*(torch.split(x, 32) for x in (truth_XD, hidden_XD)), strict=True):
        truth_xV = (truth_xD @ truth_VD.T).log_softmax(-1)
        capped_xV = cap * torch.tanh(hidden_xD @ head_VD.T / cap)
        total += float(F.kl_div(capped_xV.log_softmax(-1), truth_xV, log_target=True, reduction="sum"))
    return total / len(truth_XD)
