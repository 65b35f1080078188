"""Many answers at once, drawn from student or teacher with a cache: the plain loop, in batches of a thousand.

A draw is the largest of logits / temperature plus Gumbel noise, which is a sample of their softmax in one pass.

Where the engine's attention over pages runs, a row's keys are one page of it, and nothing in a step waits for the
device; elsewhere they are in a `KVCache`.

Legend: B rows, T new positions, S positions of a row, K key/value heads, H head dim, D model, V vocabulary.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from gemwright.cache import KVCache
from gemwright.config import ModelConfig
from gemwright.engine.paged import paged_attention, reads_in_place
from gemwright.generate import pad
from gemwright.ops.attention import PADDING, Attend, Visibility

Read = Callable[..., Tensor]
"""hidden states of (tokens, positions, cache=...)"""
END = 2
STEP = 256
"""Lengths of a row's page are multiples of it: each other length is compiled anew."""


class Rows:
    """Keys and values of B sequences of up to S positions, each in a page of its own: a `Cache`."""

    def __init__(self, config: ModelConfig, rows: int, length: int, dtype: torch.dtype, device: torch.device) -> None:
        K, H = config.num_key_value_heads, config.head_dim
        S = (length // STEP + 1) * STEP  # one more at least, for padding
        self.stores = [
            torch.zeros(2, rows, K, S, H, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)
        ]
        self.row_B = torch.arange(rows, device=device)
        self.table_B1, self.first_B = self.row_B.int()[:, None], torch.zeros_like(self.row_B, dtype=torch.int32)
        self.pos_BT = self.row_B[:, None]
        self.attend: Attend | None = None

    def advance(self, pos_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Positions of a pass; whoever sees whom follows from them alone."""
        self.pos_BT = pos_BT
        self.attend = partial(_attend, self.table_B1, self.first_B, pos_BT.int())
        return pos_BT, pos_BT

    def write(self, layer: int, k_BTKH: Tensor, v_BTKH: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's keys and values; padding goes to the last place, which no sequence reaches."""
        keys, values = self.stores[layer]
        for store_BKSH, new_BTKH in ((keys, k_BTKH), (values, v_BTKH)):
            store_BKSH[self.row_B[:, None], :, self.pos_BT] = new_BTKH.to(store_BKSH.dtype)
        return keys, values


def _attend(
    table_B1: Tensor,
    first_B: Tensor,
    pos_BT: Tensor,
    q_BTNH: Tensor,
    k_BKSH: Tensor,
    v_BKSH: Tensor,
    see: Visibility,
    *,
    scale: float,
    cap: float | None,
) -> Tensor:
    attend = paged_attention(q_BTNH.is_cuda)
    return attend(q_BTNH, k_BKSH, v_BKSH, table_B1, first_B, pos_BT, window=see.window, scale=scale, cap=cap)


@torch.no_grad()
def sample(
    read: Read,
    logits: Callable[[Tensor], Tensor],
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    temperatures: Sequence[float],
    *,
    new_tokens: int,
    generator: torch.Generator,
    dtype: torch.dtype,
) -> list[list[int]]:
    """Continue every prompt, until its end token or for `new_tokens`; a batch also stops when nearly all have ended.

    Rows that were stopped so come back without their end token, as those that met the limit do.
    """
    device, longest = generator.device, max(map(len, prompts))
    size = len(prompts), longest + new_tokens
    paged = reads_in_place(device, dtype)
    cache = (
        Rows(config, *size, dtype, device)
        if paged
        else KVCache(config, *size, chunk=longest, dtype=dtype, device=device)
    )
    lengths_B = torch.tensor([len(prompt) for prompt in prompts], device=device)
    heat_B1 = torch.tensor(temperatures, device=device)[:, None]
    hidden_BTD = read(*pad(prompts, 0, longest, device), cache=cache)
    hidden_BD = hidden_BTD[torch.arange(len(prompts), device=device), lengths_B - 1].clone()
    drawn_TB = torch.full((new_tokens, len(prompts)), -1, device=device)
    ended_B = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    at_1 = torch.zeros(1, dtype=torch.int64, device=device)

    def step() -> None:
        """Draw a token of each row and read it; all that changes is changed in its place."""
        scores_BV = logits(hidden_BD).float().div_(heat_B1)
        scores_BV -= torch.empty_like(scores_BV).exponential_(generator=generator).log_()
        token_B = torch.where(ended_B, -1, scores_BV.argmax(-1))
        drawn_TB.index_copy_(0, at_1, token_B[None])
        ended_B.logical_or_(token_B == END)
        pos_B = torch.where(ended_B, PADDING, lengths_B + at_1)
        hidden_BD.copy_(read(token_B.clamp(min=0)[:, None], pos_B[:, None], cache=cache)[:, 0])
        at_1.add_(1)

    again: Callable[[], None] = step
    for done in range(1, new_tokens + 1):
        again()
        if done == 1 and paged and device.type == "cuda":
            again = recorded(step, generator)
        if done % 16 == 0 and int(ended_B.sum()) > 0.97 * len(prompts):
            break
    return [[token for token in row if token >= 0] for row in drawn_TB.T.tolist()]


def recorded(step: Callable[[], None], generator: torch.Generator) -> Callable[[], None]:
    """The step as a CUDA graph: its launches take longer than its arithmetic. As it is, and a word, if that fails."""
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(generator)
    try:
        with torch.cuda.graph(graph):
            step()
    except RuntimeError as error:
        print(f"not recorded: {error}", flush=True)
        return step
    return graph.replay


def degenerate(ids: Sequence[int]) -> bool:
    """Whether an answer that did not end repeats some four tokens more than four times."""
    most = max(Counter(zip(ids, ids[1:], ids[2:], ids[3:], strict=False)).values(), default=0)
    return ids[-1] != END and most > 4


class Clock:
    """Tokens a second since it was made."""

    def __init__(self) -> None:
        self.start, self.tokens = time.monotonic(), 0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start

    def __str__(self) -> str:
        return f"{self.tokens} tokens in {self.seconds:.1f} s, {self.tokens / self.seconds:.0f} tokens/s"
