"""Keys and values scattered over pages, and the definition of attention over them as they were before.

Legend: B rows, T queries, S keys, N query heads, K key/value heads, H head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemwright.engine.pages import PAGE
from gemwright.ops.attention import EMPTY, Visibility, reference


class Rows:
    """Rows of keys and values scattered over a store; what no row has written is NaN."""

    def __init__(self, lengths: list[int], *, K: int, H: int, dtype: torch.dtype, first: list[int] | None = None):
        self.lengths, B, S = lengths, len(lengths), max(lengths)
        self.k_BSKH, self.v_BSKH = (torch.randn(B, S, K, H).to(dtype) for _ in "kv")
        self.first = torch.tensor(first or [0] * B, dtype=torch.int32)
        width = max(-(-n // PAGE) - int(f) for n, f in zip(lengths, self.first, strict=True)) + 1
        pages = B * width + 1
        ids = torch.randperm(pages)[: B * width].view(B, width)
        self.table = torch.full((B, width), 10**6, dtype=torch.int32)  # what is not used names no page
        self.k, self.v = (torch.full((pages, K, PAGE, H), torch.nan).to(dtype) for _ in "kv")
        for b, n in enumerate(lengths):
            for p in range(int(self.first[b]) * PAGE, n):
                place = p // PAGE - int(self.first[b])
                self.table[b, place] = ids[b, place]
                self.k[ids[b, place], :, p % PAGE] = self.k_BSKH[b, p]
                self.v[ids[b, place], :, p % PAGE] = self.v_BSKH[b, p]

    def plain(
        self, q_BTNH: Tensor, q_pos: Tensor, dtype: torch.dtype, *, window: int | None, scale: float, cap: float | None
    ) -> Tensor:
        """The definition, on the keys as they were before they were scattered."""
        k_pos = torch.arange(max(self.lengths)).expand(len(self.lengths), -1).clone()
        for b, n in enumerate(self.lengths):
            k_pos[b, n:] = EMPTY
        see = Visibility(q_pos, k_pos, window=window)
        k, v = self.k_BSKH.to(dtype), self.v_BSKH.to(dtype)
        return reference(q_BTNH.to(dtype), k, v, see, scale=scale, cap=cap)


def last_positions(lengths: list[int], T: int) -> Tensor:
    """The last T positions of each row."""
    return torch.stack([torch.arange(n - T, n) for n in lengths])
