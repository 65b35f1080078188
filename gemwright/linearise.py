"""Gemma 2's post-norms made nearly linear, so that a model without them fits the architecture.

A sub-layer of Gemma 2 adds post(out) = g out sqrt(D) / |out| to the stream: the size of `out`, which differs from token
to token, is lost. It is kept if one dimension j of the stream is given up. There every sub-layer writes a constant c
instead, and the norm's gain is 0:

    post(out)_i = g sqrt(D) out_i / sqrt(|out|^2 + c^2)        which for c above |out| is out_i times g sqrt(D) / c

Where does a linear without bias find a constant? In a read-out t of its own input h, the least-squares solution of
t . h = 1 over calibration tokens (ridge): after a norm the inputs have a large common part, and the best read-out
varies by 1 to 15 %. A larger c keeps the sizes better (a first token may be 700 times a usual one), a smaller one
depends less on how constant t . h is; each sub-layer takes the c with the least error.

The final cap, 30 tanh(z / 30), bends large logits, and softmax does not see a constant added to all of them. So the
last sub-layer also moves the stream by a fixed vector, along the direction that the head reads as one number for all
tokens of the vocabulary, so that the likeliest logits come nearer to where the cap is straight.

Measured on SmolLM2-135M, held-out prose, nats a token against the source: see docs/mini.md.

Legend: B rows, T tokens, X tokens in one list, D model, I input of a sub-layer's last linear, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

from gemwright.adopt import GELU_OF_SILU, Llama, LlamaLayer
from gemwright.ops.attention import softcap

RIDGE: Final = 3e-3
"""Of the mean diagonal, in the read-outs' normal equations."""
SIZES: Final = tuple(2 ** (e / 2) for e in range(-2, 25))
"""Constants that are tried, in sizes of a usual output."""
SAMPLE: Final = 256
"""Tokens on which the shift of the logits is chosen ..."""
SHIFTS: Final = 9
"""... among so many."""
OUTPUTS: Final = ("self_attn.o_proj", "mlp.down_proj")
POST: Final = ("post_attention_layernorm", "post_feedforward_layernorm")


@dataclass(frozen=True)
class Linearised:
    """What replaces the adopted model's tensors."""

    dimension: int
    """j, the dimension that is given up."""
    rows: dict[str, Tensor]
    """Row j [I] of every sub-layer's last linear, by its name."""
    norms: dict[str, Tensor]
    """Weights [D] of the post-norms and of the final norm, by name, as Gemma 2 stores them."""
    shift: tuple[str, Tensor, Tensor]
    """The last linear's name, and column [D] and row [I] of an outer product that is added to it before its row j."""


@torch.no_grad()
def linearise(llama: Llama, tokens_BT: Tensor) -> Linearised:
    """Fit to what the source does on `tokens_BT`; several thousand tokens, since a read-out has up to I numbers."""
    c, pos_BT = llama.config, torch.arange(tokens_BT.shape[1], device=tokens_BT.device).expand_as(tokens_BT)
    j = least_used(llama, tokens_BT, pos_BT)
    rows, norms = {}, {}
    x = F.embedding(tokens_BT, llama.head)
    for i, layer in enumerate(llama.layers(tokens_BT, pos_BT)):
        if isinstance(layer, Tensor):
            break
        before = f"model.layers.{i}."
        inputs = layer.mixed, gelu_hidden(llama, i, layer.feedforward_in)
        outs = layer.attention_out, layer.feedforward_out
        for linear, post, h, out in zip(OUTPUTS, POST, inputs, outs, strict=True):
            h_XI, out_XD = h.flatten(0, 1).float(), out.flatten(0, 1).float()
            x_XD = x.flatten(0, 1).float()
            t_I = readout(h_XI)
            if i == c.num_hidden_layers - 1 and linear == OUTPUTS[1]:
                v_D, scale = head_shift(llama, x_XD + out_XD, j)
                shift = (f"{before}{linear}", v_D, t_I)
                out_XD = out_XD + v_D
                norms["model.norm.weight"] = llama.weights["model.norm.weight"].float() * scale - 1
            size, gain = constant(out_XD, h_XI @ t_I, (x_XD + out_XD).norm(dim=1), j)
            rows[f"{before}{linear}"] = size * t_I
            norms[f"{before}{post}.weight"] = torch.full_like(out_XD[0], math.sqrt(c.hidden_size) * gain - 1)
            norms[f"{before}{post}.weight"][j] = -1
            x = x + out
    return Linearised(j, rows, norms, shift)


def least_used(llama: Llama, tokens_BT: Tensor, pos_BT: Tensor) -> int:
    """The dimension of the stream in which the sub-layers write least, each output in proportion to the stream."""
    x, share_D = F.embedding(tokens_BT, llama.head), torch.zeros_like(llama.head[0], dtype=torch.float32)
    for layer in llama.layers(tokens_BT, pos_BT):
        if isinstance(layer, LlamaLayer):
            for out in (layer.attention_out, layer.feedforward_out):
                x = x + out
                share_D += (out.float() / x.float().norm(dim=-1, keepdim=True)).square().sum((0, 1))
    return int(share_D.argmin())


def gelu_hidden(llama: Llama, i: int, f_in: Tensor) -> Tensor:
    """What `down_proj` reads in the adopted model, where the gate is a GELU."""
    gate, up = (F.linear(f_in, llama.weights[f"model.layers.{i}.mlp.{n}_proj.weight"]) for n in ("gate", "up"))
    return F.gelu(gate / GELU_OF_SILU, approximate="tanh") * (up * GELU_OF_SILU)


def readout(h_XI: Tensor) -> Tensor:
    """t [I] with t . h nearly 1 on all tokens."""
    square_II = h_XI.T @ h_XI / len(h_XI)
    square_II += RIDGE * square_II.diagonal().mean() * torch.eye(len(square_II), device=h_XI.device)
    t_I: Tensor = torch.linalg.solve(square_II, h_XI.mean(0))
    return t_I


def constant(out_XD: Tensor, read_X: Tensor, stream_X: Tensor, j: int) -> tuple[float, float]:
    """The constant c and the gain g with the least error in the stream, each token's in proportion to its size."""
    out_XD = out_XD.index_fill(1, torch.tensor(j, device=out_XD.device), 0)
    own_X = out_XD.norm(dim=1)
    usual = float(own_X.median())
    best = (math.inf, 0.0, 0.0)
    for size in SIZES:
        # |out|^2 (1 - g / |.|)^2 is the squared error of a token, g / |.| its factor
        factor_X = 1 / torch.sqrt(own_X.square() + (size * usual * read_X).square())
        weight_X = (own_X / stream_X).square()
        gain = float((weight_X * factor_X).sum() / (weight_X * factor_X.square()).sum())
        error = float((weight_X * (1 - gain * factor_X).square()).sum())
        best = min(best, (error, size * usual, gain / math.sqrt(out_XD.shape[1])))
    return best[1], best[2]


def head_shift(llama: Llama, x_XD: Tensor, j: int) -> tuple[Tensor, float]:
    """The vector v [D] that the last sub-layer adds, and the factor of the final norm's gain that goes with it.

    d is the least-squares solution of W d = 1 over the vocabulary, with d_j = 0. Adding -s d to the normed state takes
    nearly s from all logits; s lies between 0 and the mean of the largest logits, where the KL between the logits and
    the shifted and capped ones is least.
    """
    head_VD, weight_D = llama.head.float(), llama.weights["model.norm.weight"].float()
    rms_X = x_XD.square().mean(1).sqrt()
    kept = torch.ones_like(weight_D)
    kept[j] = 0
    square_DD = (head_VD.T @ head_VD) * kept * kept[:, None]
    square_DD += torch.diag(1e-4 * square_DD.diagonal().mean() + (1 - kept))
    d_D = torch.linalg.solve(square_DD, head_VD.sum(0) * kept)
    some = slice(None, None, max(1, len(x_XD) // SAMPLE))
    h_xD = x_XD[some] / rms_X[some, None] * weight_D
    logits_xV = h_xD @ head_VD.T
    log_p_xV = logits_xV.log_softmax(-1)
    best = (math.inf, 0.0)
    for size in torch.linspace(0, float(logits_xV.amax(1).mean()), SHIFTS).tolist():
        log_q_xV = softcap((h_xD - size * d_D) @ head_VD.T, llama.config.final_logit_softcapping).log_softmax(-1)
        best = min(best, (float((log_p_xV.exp() * (log_p_xV - log_q_xV)).sum(1).mean()), size))
    v_D = -best[1] * d_D / weight_D * rms_X.median()
    return v_D, float(((x_XD + v_D).square().mean(1).sqrt() / rms_X).median())
