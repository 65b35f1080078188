"""KVCache: keys and values addressed by position.

A token at position p lies in slot p mod capacity, so chunked prefill, decode, ragged rows and rejected draft tokens are
one path: write, then attend; positions, never slots, decide who sees whom. A global layer has a slot for every
position. A local layer has a ring of window + chunk - 1 slots: while a chunk is written, its first query still finds
its whole window (one slot fewer would lose a key). A rejected draft needs no call: its keys lie in the future of every
query until they are overwritten.

Padding (position -1) is written to one spare slot past the end, which nobody reads.

Legend: B rows, T new tokens, S live slots, K key/value heads, H head dim.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from gemwright.config import ModelConfig
from gemwright.ops.attention import EMPTY, Attend


class Cache(Protocol):
    """What the model asks of a cache: positions in, once for a forward pass, then keys and values, once a layer."""

    attend: Attend | None
    """The attention that reads what `write` returns, where that is laid out in a way of its own; None: the model's."""

    def advance(self, pos_BT: Tensor) -> tuple[Tensor, Tensor]: ...
    def write(self, layer: int, k_BTKH: Tensor, v_BTKH: Tensor) -> tuple[Tensor, Tensor]: ...


class _Ring:
    """The positions that are held for one kind of layer, and the slots that the current chunk goes to."""

    def __init__(self, rows: int, capacity: int, device: torch.device) -> None:
        self.capacity = capacity
        self.pos_BS = torch.full((rows, capacity + 1), EMPTY, dtype=torch.int64, device=device)
        self.slots_BT = torch.empty(0)
        self.live = 0
        self.run: slice | None = None

    def advance(self, pos_BT: Tensor, end: int, run: slice | None) -> Tensor:
        """Take the positions in, and return those of the live slots [B, S]."""
        self.slots_BT = torch.where(pos_BT < 0, self.capacity, pos_BT % self.capacity)
        self.pos_BS.scatter_(1, self.slots_BT, torch.where(pos_BT < 0, EMPTY, pos_BT))
        self.live = min(max(self.live, end), self.capacity)
        # every row at the same place and no wrap inside the chunk: a slice copy instead of a scatter
        self.run = None
        if run is not None:
            first = run.start % self.capacity
            last = first + run.stop - run.start
            self.run = slice(first, last) if last <= self.capacity else None
        return self.pos_BS[:, : self.live]


class KVCache:
    """Keys and values of `rows` sequences of up to `max_length` positions, read in chunks of at most `chunk`."""

    attend: Attend | None = None

    def __init__(
        self,
        config: ModelConfig,
        rows: int,
        max_length: int,
        *,
        chunk: int = 512,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
    ) -> None:
        assert rows > 0 and max_length > 0 and chunk > 0, (rows, max_length, chunk)
        self.max_length, self.chunk = max_length, chunk
        device = torch.device(device)
        ring = min(config.sliding_window + chunk - 1, max_length)
        self.local = _Ring(rows, ring, device)
        self.globe = _Ring(rows, max_length, device)
        self._rings = [self.globe if config.window(i) is None else self.local for i in range(config.num_hidden_layers)]
        K, H = config.num_key_value_heads, config.head_dim

        def storage(ring: _Ring) -> Tensor:
            return torch.zeros(rows, K, ring.capacity + 1, H, dtype=dtype, device=device)

        self._k_BKSH = [storage(ring) for ring in self._rings]
        self._v_BKSH = [storage(ring) for ring in self._rings]

    @property
    def nbytes(self) -> int:
        """Bytes that keys and values take."""
        return sum(x.nbytes for x in (*self._k_BKSH, *self._v_BKSH))

    def advance(self, pos_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Take in the positions of a forward pass; key positions [B, S] of local and of global layers."""
        T = pos_BT.shape[1]
        assert self.chunk >= T, f"{T} tokens in one pass, the cache was made for chunks of {self.chunk}"
        end = int(pos_BT.max()) + 1
        assert end <= self.max_length, f"position {end - 1}, the cache holds {self.max_length}"
        first = end - T
        straight = torch.arange(first, end, device=pos_BT.device).expand_as(pos_BT)
        run = slice(first, end) if first >= 0 and torch.equal(pos_BT, straight) else None
        return self.local.advance(pos_BT, end, run), self.globe.advance(pos_BT, end, run)

    def write(self, layer: int, k_BTKH: Tensor, v_BTKH: Tensor) -> tuple[Tensor, Tensor]:
        """Store the chunk's keys and values; the live ones [B, S, K, H] to attend to, as views."""
        ring = self._rings[layer]
        for store_BKSH, new_BTKH in ((self._k_BKSH[layer], k_BTKH), (self._v_BKSH[layer], v_BTKH)):
            if ring.run is not None:
                store_BKSH[:, :, ring.run] = new_BTKH.transpose(1, 2)
            else:
                B, T, K, H = new_BTKH.shape
                slots = ring.slots_BT[:, None, :, None].expand(B, K, T, H)
                store_BKSH.scatter_(2, slots, new_BTKH.transpose(1, 2).to(store_BKSH.dtype))
        k, v = (store[layer][:, :, : ring.live].transpose(1, 2) for store in (self._k_BKSH, self._v_BKSH))
        return k, v

    def reset(self, row: int | None = None) -> None:
        """Forget a row, or all of them."""
        rows = slice(None) if row is None else slice(row, row + 1)
        for ring in (self.local, self.globe):
            ring.pos_BS[rows] = EMPTY
            if row is None:
                ring.live = 0

    def copy(self, source: int, target: int, length: int) -> None:
        """Give row `target` the first `length` positions of row `source`.

        The source's local ring must still hold the window before `length`; asserted, since a key that was overwritten
        cannot be had back.
        """
        held_S = self.local.pos_BS[source]
        wanted = torch.arange(max(0, length - (self.local.capacity - self.chunk + 1)), length, device=held_S.device)
        assert torch.isin(wanted, held_S).all(), f"row {source} no longer holds the window before position {length}"
        for ring in (self.local, self.globe):
            pos_S = ring.pos_BS[source]
            ring.pos_BS[target] = torch.where(pos_S < length, pos_S, EMPTY)
        for store in (*self._k_BKSH, *self._v_BKSH):
            store[target] = store[source]
