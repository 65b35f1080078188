"""Inputs: what a recorded pass reads, as one int32 tensor on the device, filled on the CPU and copied at once.

A pass has B rows of T tokens of one sequence: a token each where sequences decode, more where prompts are read; a chunk
takes as many rows as it needs. Fields lie one after the other: tokens [B, T], positions [B, T], and for each kind of
layer the first page [B] and the table [B, n] of each row. What pads has position -1: it writes to the trash page and
sees nothing. Tables are as wide as the context, since kernels read lengths from the positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from gemwright.engine.paged import Chunk, Places
from gemwright.engine.scheduler import Kind, Table
from gemwright.ops import gpu

ALIGN: Final = 16
"""Fields begin at multiples of so many int32, or the kernels would be compiled for each alignment."""


@dataclass(frozen=True)
class Fields:
    """The inputs of a pass on the device."""

    tokens_BT: Tensor
    pos_BT: Tensor
    places: dict[Kind, Places]


class Inputs:
    """The inputs of passes of up to `rows` rows of `tokens` tokens, over tables of so many pages (`widths`)."""

    def __init__(self, rows: int, tokens: int, widths: Mapping[Kind, int], device: torch.device) -> None:
        self.tokens, self.widths = tokens, dict(widths)
        size = self._spans(rows)[-1][1]
        self._device = torch.zeros(size, dtype=torch.int32, device=device)
        self._host = np.zeros(size, np.int32)
        self._known: dict[Kind, list[tuple[Table, int, int] | None]] = {}
        self._rows = 0

    def rows_of(self, chunks: Sequence[Chunk]) -> int:
        """Rows that these chunks take."""
        return sum(-(-len(chunk.tokens) // self.tokens) for chunk in chunks)

    def fill(self, rows: int, chunks: Sequence[Chunk]) -> None:
        """Bring the device's tensor up to date for a pass of `rows` rows; of tables only what changed is written."""
        T, spans = self.tokens, self._spans(rows)
        tokens, pos, *rest = (self._host[low:high] for low, high in spans)
        if rows != self._rows:
            self._rows, self._known = rows, {kind: [None] * rows for kind in self.widths}
        taken = [-(-len(chunk.tokens) // T) for chunk in chunks]
        tokens[:], pos[:] = 0, -1
        if T == 1:
            flat = [token for chunk in chunks for token in chunk.tokens]
            tokens[: len(flat)] = flat
            pos[: len(flat)] = [chunk.start + i for chunk in chunks for i in range(len(chunk.tokens))]
        else:
            for chunk, place in zip(chunks, self.places(chunks), strict=True):
                tokens[place] = chunk.tokens
                pos[place] = np.arange(chunk.start, chunk.start + len(chunk.tokens))
        for (kind, width), first, table in zip(self.widths.items(), rest[::2], rest[1::2], strict=True):
            table_Bn, known = table.reshape(rows, width), self._known[kind]
            end = 0
            for chunk, count in zip(chunks, taken, strict=True):
                held = chunk.tables[kind]
                begin, pages = held.first, held.pages
                begun, end = end, end + count
                for row in range(begun, end):
                    # a table with the same first page and as many pages is the same: pages come and go at its ends
                    was = known[row]
                    if was is None or was[0] is not held or was[1] != begin or was[2] != len(pages):
                        first[row], known[row] = begin, (held, begin, len(pages))
                        table_Bn[row, : len(pages)] = pages
        size = spans[-1][1]
        gpu.copy_(self._device[:size], torch.from_numpy(self._host[:size]))

    def places(self, chunks: Sequence[Chunk]) -> list[slice]:
        """Where the tokens of each chunk lie among the B T of the pass."""
        found, at = [], 0
        for chunk in chunks:
            found.append(slice(at, at + len(chunk.tokens)))
            at += -(-len(chunk.tokens) // self.tokens) * self.tokens
        return found

    def fields(self, rows: int, trash: Mapping[Kind, int]) -> Fields:
        """The tensors of a pass; `trash`: the page of each kind that takes what padding writes."""
        tokens, pos, *rest = (self._device[low:high] for low, high in self._spans(rows))
        places = {
            kind: Places(table.view(rows, width), first, trash[kind])
            for (kind, width), first, table in zip(self.widths.items(), rest[::2], rest[1::2], strict=True)
        }
        return Fields(tokens.view(rows, self.tokens), pos.view(rows, self.tokens), places)

    def _spans(self, rows: int) -> list[tuple[int, int]]:
        """Where each field begins and ends."""
        tables = (size for width in self.widths.values() for size in (rows, rows * width))
        spans, at = [], 0
        for size in (rows * self.tokens, rows * self.tokens, *tables):
            spans.append((at, at + size))
            at += -(-size // ALIGN) * ALIGN
        return spans
