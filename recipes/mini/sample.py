"""Many answers at once, drawn from student or teacher with a cache: the plain loop, in batches of a thousand.

A draw is the largest of logits / temperature plus Gumbel noise, which is a sample of their softmax in one pass.

Legend: B rows, T new positions, D model, V vocabulary.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gemwright.cache import KVCache
from gemwright.config import ModelConfig
from gemwright.generate import pad
from gemwright.ops.attention import PADDING

Read = Callable[..., Tensor]
"""hidden states of (tokens, positions, cache=...)"""
END = 2


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
    cache = KVCache(config, len(prompts), longest + new_tokens, chunk=longest, dtype=dtype, device=device)
    lengths_B = torch.tensor([len(prompt) for prompt in prompts], device=device)
    heat_B1 = torch.tensor(temperatures, device=device)[:, None]
    hidden_BTD = read(*pad(prompts, 0, longest, device), cache=cache)
    hidden_BD = hidden_BTD[torch.arange(len(prompts), device=device), lengths_B - 1]
    drawn, ended_B = [], torch.zeros(len(prompts), dtype=torch.bool, device=device)
    for step in range(new_tokens):
        scores_BV = logits(hidden_BD).float().div_(heat_B1)
        scores_BV -= torch.empty_like(scores_BV).exponential_(generator=generator).log_()
        token_B = torch.where(ended_B, -1, scores_BV.argmax(-1))
        drawn.append(token_B)
        ended_B |= token_B == END
        if step % 16 == 15 and int(ended_B.sum()) > 0.97 * len(prompts):
            break
        pos_B = torch.where(ended_B, PADDING, lengths_B + step)
        hidden_BD = read(token_B.clamp(min=0)[:, None], pos_B[:, None], cache=cache)[:, 0]
    return [[token for token in row if token >= 0] for row in torch.stack(drawn, dim=1).tolist()]


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
