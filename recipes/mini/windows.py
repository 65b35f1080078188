"""Local layers taught to do without the first token.

A Llama's heads rest on the first token where nothing else matters to them (attention sinks, arXiv 2309.17453), and in a
Llama it is always in sight. In a local layer of Gemma 2 it is not, past the window, and heads that should do nothing do
something. Nothing else is missed there: past position 4096 SmolLM2, healed in short rows, is at KL 0.37, with windows
that reach everywhere at 0.02, and with Gemma 2's windows and the first token besides at 0.02 again.

So each local layer's attention is fitted, alone, to its own output with everything in sight: gradient descent on its
four linears, a few hundred queries at a time. What it learns becomes part of the update that healing goes on with.

Legend: B rows (one), T tokens of a text, Q queries and S keys of a piece, D model, N query heads, K key/value heads,
H head dim.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from student import Student
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from gemwright.model import Block, Gemma2
from gemwright.ops.attention import BACKENDS, Visibility
from gemwright.ops.rope import rope_tables

ATTENTION = "blocked"
"""The backend that differentiates any number of queries and keys on any device, compiling nothing."""
QUERIES = 512
"""Of a piece of text that a step looks at; it looks at one before the window's end and two behind."""
RATE = 2e-2
"""Of Adam, for numbers relative to their usual size."""
WARMUP = 10
SMALL = 0.05
"""Error that a layer is left with, as a share of its output's variance."""


@dataclass(frozen=True)
class Seen:
    """What a layer's attention reads in a text, and what its norm makes of the output with everything in sight."""

    in_TD: Tensor
    out_TD: Tensor
    variance: Tensor
    """Of the output: the mean over its dimensions."""


def teach_windows(student: Student, texts: Sequence[Tensor], steps: int) -> None:
    """Fit every local layer whose output its window changes; the student's updates, whole as yet, take it in.

    Args:
        student: whose weights are written.
        texts: token ids [T], each more than a window and QUERIES long; the last one is held out.
        steps: of a layer.
    """
    window = student.model.config.sliding_window
    assert len(texts) > 1 and min(map(len, texts)) >= window + QUERIES, list(map(len, texts))
    records: dict[int, list[Seen]] = {}
    for text in texts:
        for layer, one in _record(student.model, text):
            records.setdefault(layer, []).append(one)
    for layer in list(records):
        seen = records.pop(layer)
        fit = _Fit(student.model, layer)
        start, began = fit.error(seen[-1]), time.monotonic()
        if start > SMALL:
            fit.run(seen[:-1], steps)
            student.put({f"model.layers.{layer}.self_attn.{name}": w for name, w in fit.weights().items()})
        took = time.monotonic() - began
        print(
            f"layer {layer}: error past the window {start:.3f} -> {fit.error(seen[-1]):.3f}, {took:.0f} s", flush=True
        )


@torch.no_grad()
def _record(model: Gemma2, text_T: Tensor) -> Iterator[tuple[int, Seen]]:
    """Each local layer's record, in a model whose windows reach everywhere."""
    pos_BT = torch.arange(len(text_T), device=text_T.device)[None]
    see, attend = Visibility(pos_BT, pos_BT), BACKENDS[ATTENTION].load()
    tables = rope_tables(pos_BT, model.config.head_dim, model.config.rope_theta)
    x_BTD = model.embed(text_T[None])
    for i, block in enumerate(model.model.layers):
        assert isinstance(block, Block)
        in_BTD = block.input_layernorm(x_BTD)
        out_BTD = block.post_attention_layernorm(block.self_attn(in_BTD, see, tables, attend, None))
        if model.config.window(i) is not None:
            yield i, Seen(in_BTD[0], out_BTD[0], out_BTD[0, 1:].float().var(0).mean())
        x_BTD = x_BTD + out_BTD
        x_BTD = x_BTD + block.post_feedforward_layernorm(block.mlp(block.pre_feedforward_layernorm(x_BTD)))


class _Fit:
    """One layer's attention in training."""

    def __init__(self, model: Gemma2, layer: int) -> None:
        block = model.model.layers[layer]
        assert isinstance(block, Block)
        self.config, self.attention, self.norm = model.config, block.self_attn, block.post_attention_layernorm
        self.begun = {name: weight.detach().float() for name, weight in self.attention.named_parameters()}
        self.size = {name: weight.square().mean().sqrt() for name, weight in self.begun.items()}
        self.change = {name: torch.zeros_like(weight, requires_grad=True) for name, weight in self.begun.items()}
        self.dtype = model.lm_head.weight.dtype
        self.window = model.config.sliding_window

    def weights(self) -> dict[str, Tensor]:
        """As they are by now, fp32."""
        return {name: weight + self.change[name] * self.size[name] for name, weight in self.begun.items()}

    def rounded(self) -> dict[str, Tensor]:
        """The weights in the model's dtype."""
        return {name: weight.to(self.dtype) for name, weight in self.weights().items()}

    def loss(self, seen: Seen, start: int, weights: dict[str, Tensor]) -> Tensor:
        """Squared error of the queries from `start` on, as a share of the output's variance."""
        first, end = max(0, start - self.window), start + QUERIES
        pos_BS = torch.arange(first, end, device=seen.in_TD.device)[None]
        see = Visibility(pos_BS[:, -QUERIES:], pos_BS, window=self.window)
        tables = rope_tables(pos_BS, self.config.head_dim, self.config.rope_theta)
        given = seen.in_TD[None, first:end], see, tables, _last_queries, None
        out_BQD = self.norm(functional_call(self.attention, weights, given))
        return F.mse_loss(out_BQD[0].float(), seen.out_TD[start:end].float()) / seen.variance

    @torch.no_grad()
    def error(self, seen: Seen) -> float:
        """Mean loss past the window."""
        starts, weights = range(self.window, len(seen.in_TD) - QUERIES + 1, QUERIES), self.rounded()
        return sum(float(self.loss(seen, start, weights)) for start in starts) / len(starts)

    @torch.enable_grad()
    def run(self, seen: Sequence[Seen], steps: int) -> None:
        """Train."""
        optimizer = torch.optim.Adam(self.change.values(), betas=(0.9, 0.98))
        generator = torch.Generator().manual_seed(0)

        def draw(low: int, high: int) -> int:
            return int(torch.randint(low, high, (), generator=generator))

        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = RATE * min(1.0, (step + 1) / WARMUP) * (1 - step / steps)
            text, weights = seen[draw(0, len(seen))], self.rounded()
            last = len(text.in_TD) - QUERIES
            # the first token's own output is the sink's, hundreds of times larger than others: not before position 1
            starts = (draw(1, self.window - QUERIES), draw(self.window, last + 1), draw(self.window, last + 1))
            loss = torch.stack([self.loss(text, start, weights) for start in starts]).mean()
            loss.backward(inputs=list(self.change.values()))  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()


def _last_queries(
    q_BSNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, see: Visibility, *, scale: float, cap: float | None
) -> Tensor:
    """Attention of the last QUERIES positions alone."""
    return BACKENDS[ATTENTION].load()(q_BSNH[:, -QUERIES:], k_BSKH, v_BSKH, see, scale=scale, cap=cap)
