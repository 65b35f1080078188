"""PagedCache: keys and values in pages that sequences share, under the same two calls as KVCache.

Each layer keeps its keys and values in [pages + 1, K, PAGE, H]; the last page takes what padding writes and is never
read. Layers of one kind (local, global) share page numbers, so a sequence has two tables. A `View` is the cache as one
forward pass sees it; the model calls `advance` and `write` as on any cache. A slot's position follows from its place
in the table, so what a page held before is never seen: it lies past the row's end, and counts as EMPTY.

Where own kernels are there (native on CPU, Triton on CUDA), the pages are read where they lie; else they are gathered
into one tensor a layer, and the model's own backend attends to that. So are prompts where that has matrix tiles.

Legend: B rows, T new tokens, X = B T, n pages of a row, P pages, s = PAGE slots, S = n s, K key/value heads, H head
dim, D model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np
import psutil
import torch
from torch import Tensor

from gemwright.config import ModelConfig
from gemwright.engine.pages import PAGE
from gemwright.engine.scheduler import GLOBAL, LOCAL, Kind, Table
from gemwright.model import Gemma2
from gemwright.ops import gpu, native, native_flash
from gemwright.ops.attention import EMPTY, PADDING, Attend, Visibility

CPU_SHARE: Final = 0.25
CUDA_SHARE: Final = 0.9
"""Share of the free memory that the cache may take when no size is given."""
SHORT: Final = 16
"""Most tokens of a chunk that is laid out as one row a token, so that chunks of all lengths share a pass unpadded."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens of one sequence at positions start, start + 1, ..., whose pages are in its tables."""

    tokens: list[int]
    start: int
    tables: Mapping[Kind, Table]


class PagedCache:
    """Storage for `pages[kind]` pages of each kind of layer of a model."""

    def __init__(self, model: Gemma2, pages: Mapping[Kind, int]) -> None:
        config, table = model.config, model.model.embed_tokens.weight
        self.kinds = kinds(config)
        self.device = table.device
        self.in_place = reads_in_place(self.device, table.dtype)
        capped = (config.head_dim, config.attn_logit_softcapping)
        self.gathers = native_flash.fits(self.device, table.dtype, *capped) and model.attention.prefill == "blocked"
        """Whether chunks that are not short attend to gathered keys, though the pages could be read in place."""
        self.trash = pages
        shape = (kv_heads(model), PAGE, config.head_dim)
        self.k_PKsH, self.v_PKsH = (
            [_zeros((pages[kind] + 1, *shape), table.dtype, self.device) for kind in self.kinds] for _ in range(2)
        )

    def short(self, tokens: int) -> bool:
        """Whether a chunk of that many tokens becomes one row a token: its pages must be read where they lie."""
        return self.in_place and tokens <= SHORT


def reads_in_place(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a kernel reads pages where they lie."""
    if dtype not in (torch.bfloat16, torch.float32):
        return False
    return native.library() is not None if device.type == "cpu" else device.type == "cuda" and gpu.available()


def paged_attention(cuda: bool) -> Callable[..., Tensor]:
    """The kernel that reads pages where they lie."""
    if not cuda:
        return native.paged_attention
    from gemwright.ops import attention_decode

    return attention_decode.paged_attention


def kinds(config: ModelConfig) -> list[Kind]:
    """The kind of each layer."""
    return [GLOBAL if config.window(i) is None else LOCAL for i in range(config.num_hidden_layers)]


def count_pages(
    model: Gemma2, rows: int, budget: int, tokens: int | None, least: Callable[[int], int]
) -> dict[Kind, int]:
    """Pages of each kind for `tokens` positions in all; None: rows x context, or a share of the free memory.

    `least`: what several ranks make of each one's number.
    """
    config, layers, table = model.config, kinds(model.config), model.model.embed_tokens.weight
    if tokens is None:
        token_bytes = len(layers) * 2 * kv_heads(model) * config.head_dim * table.dtype.itemsize
        if table.is_cuda:
            free = CUDA_SHARE * torch.cuda.mem_get_info(table.device)[0]
        else:
            free = CPU_SHARE * psutil.virtual_memory().available
        tokens = min(rows * config.max_position_embeddings, int(free / token_bytes))
    pages = max(1, least(tokens) // PAGE)
    # of a local layer a row needs its window, the chunk that is being read and the pages these begin and end in
    ring = rows * (-(-(config.sliding_window + budget) // PAGE) + 1)
    return {GLOBAL: pages if GLOBAL in layers else 0, LOCAL: min(pages, ring) if LOCAL in layers else 0}


def kv_heads(model: Gemma2) -> int:
    """Key/value heads of this rank: under tensor parallelism a projection makes some of them."""
    width = model.model.layers[0].get_submodule("self_attn.k_proj").out_features
    assert isinstance(width, int)
    return width // model.config.head_dim


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros, since a free slot has weight 0 and 0 x NaN would be NaN; on CPU a page is committed when it is written."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)


def read(
    model: Gemma2, cache: PagedCache, chunks: Sequence[Chunk], select: Callable[[list[int]], None] | None = None
) -> list[Tensor]:
    """Hidden states [count, D] of each chunk's tokens, in one forward pass that also writes their keys and values.

    Short chunks become one row a token, with nothing padded: a token's keys are written before any row attends.
    `select` is told which chunk each row of the pass belongs to.
    """
    flat = all(cache.short(len(chunk.tokens)) for chunk in chunks)
    width = 1 if flat else max(len(chunk.tokens) for chunk in chunks)
    owners = [i for i, chunk in enumerate(chunks) for _ in range(len(chunk.tokens) if flat else 1)]
    if flat:
        tokens = [[token] for chunk in chunks for token in chunk.tokens]
        pos = [[chunk.start + i] for chunk in chunks for i in range(len(chunk.tokens))]
    else:
        tokens = [chunk.tokens + [0] * (width - len(chunk.tokens)) for chunk in chunks]
        pos = [[*range(c.start, c.start + len(c.tokens))] + [PADDING] * (width - len(c.tokens)) for c in chunks]
    if select is not None:
        select(owners)
    view = View.of(cache, [chunks[i] for i in owners], in_place=cache.in_place and not (cache.gathers and not flat))
    hidden_BTD = model(gpu.upload(tokens, cache.device), gpu.upload(pos, cache.device), cache=view)
    if flat:
        return list(hidden_BTD[:, 0].split([len(chunk.tokens) for chunk in chunks]))
    return [hidden_TD[: len(chunk.tokens)] for hidden_TD, chunk in zip(hidden_BTD, chunks, strict=True)]


class Places:
    """Where one kind of layer keeps the rows of a pass."""

    def __init__(self, table_Bn: Tensor, first_B: Tensor, trash: int) -> None:
        self.table_Bn, self.first_B, self.trash = table_Bn, first_B, trash
        self.page_X = self.slot_X = self.gather_Z = torch.empty(0)

    @classmethod
    def of(cls, tables: Sequence[Table], trash: int, device: torch.device) -> Places:
        """The int32 tensors of tables, shorter ones filled up with the trash page."""
        width = max(1, *(len(table.pages) for table in tables))
        rows = [table.pages + [trash] * (width - len(table.pages)) for table in tables]
        firsts = [table.first for table in tables]
        return cls(gpu.upload(rows, device, torch.int32), gpu.upload(firsts, device, torch.int32), trash)

    def advance(self, pos_BT: Tensor) -> None:
        """Work out the slots that the pass writes."""
        page_BT = pos_BT.div(PAGE, rounding_mode="floor") - self.first_B[:, None]
        held_BT = self.table_Bn.gather(1, page_BT.clamp(min=0)).long()
        self.page_X = torch.where(pos_BT < 0, self.trash, held_BT).flatten()
        self.slot_X = (pos_BT % PAGE).flatten()

    def positions(self, end_B1: Tensor) -> Tensor:
        """Position of each slot of each row [B, S], EMPTY past the row's end."""
        steps_S = torch.arange(self.table_Bn.shape[1] * PAGE, device=end_B1.device)
        pos_BS = self.first_B[:, None] * PAGE + steps_S
        return torch.where(pos_BS < end_B1, pos_BS, EMPTY)

    def plan_gather(self, kv_heads: int) -> None:
        """Indices [B * K * n] into [P * K, s, H] that bring a row's heads together, so one copy suffices."""
        heads_K1 = torch.arange(kv_heads, device=self.table_Bn.device)[:, None]
        self.gather_Z = (self.table_Bn.long()[:, None] * kv_heads + heads_K1).flatten()


class View:
    """One forward pass over the cache: what the model calls a cache."""

    attend: Attend | None = None

    def __init__(self, cache: PagedCache, places: Mapping[Kind, Places], ends: Sequence[int] | None = None) -> None:
        """`ends`: one past the last position of each row, where keys are gathered; else pages are read in place."""
        self._cache, self._places, self._ends = cache, places, ends
        self._pos_BT = torch.empty(0)
        self._free: dict[Kind, Tensor] = {}
        """Gathered slots [B, S, 1, 1] that hold nothing of their row."""

    @classmethod
    def of(cls, cache: PagedCache, chunks: Sequence[Chunk], *, in_place: bool) -> View:
        """The pass that reads a chunk in each row."""
        places = {
            kind: Places.of([chunk.tables[kind] for chunk in chunks], cache.trash[kind], cache.device)
            for kind in set(cache.kinds)
        }
        return cls(cache, places, None if in_place else [chunk.start + len(chunk.tokens) for chunk in chunks])

    def advance(self, pos_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Take in the positions of the pass; key positions [B, S] of local and of global layers."""
        cache, ends = self._cache, self._ends
        if ends is None:
            self._pos_BT = pos_BT.int()
            # not a method of this view: the cycle would keep the cache's memory until the next collection
            self.attend = partial(_attend_in_place, self._places, self._pos_BT)
        if ends is not None or not pos_BT.is_cuda:  # where that kernel works out the slots itself
            for places in self._places.values():
                places.advance(pos_BT)
        if ends is None:
            return pos_BT[:, :0], pos_BT[:, :0]  # the kernel reads positions from the tables
        end_B1 = gpu.upload(ends, cache.device)[:, None]
        found: dict[Kind, Tensor] = {}
        for kind, places in self._places.items():
            places.plan_gather(cache.k_PKsH[0].shape[1])
            found[kind] = places.positions(end_B1)
            self._free[kind] = (found[kind] == EMPTY)[:, :, None, None]
        any_kind = next(iter(found.values()))
        return found.get(LOCAL, any_kind), found.get(GLOBAL, any_kind)

    def write(self, layer: int, k_BTKH: Tensor, v_BTKH: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new keys and values; those to attend to, [B, S, K, H] or the pages themselves."""
        cache = self._cache
        places = self._places[cache.kinds[layer]]
        k_PKsH, v_PKsH = cache.k_PKsH[layer], cache.v_PKsH[layer]
        if self.attend is not None and k_BTKH.is_cuda:
            gpu.kernels().write(
                None, k_BTKH.flatten(0, 1), v_BTKH.flatten(0, 1), None, (k_PKsH, v_PKsH),
                places.table_Bn, places.first_B, self._pos_BT.flatten(),
            )  # fmt: skip
            return k_PKsH, v_PKsH
        k_PKsH[places.page_X, :, places.slot_X] = k_BTKH.flatten(0, 1).to(k_PKsH.dtype)
        v_PKsH[places.page_X, :, places.slot_X] = v_BTKH.flatten(0, 1).to(v_PKsH.dtype)
        if self.attend is not None:
            return k_PKsH, v_PKsH
        B, K = k_BTKH.shape[0], k_PKsH.shape[1]

        def gathered(store_PKsH: Tensor) -> Tensor:
            rows = store_PKsH.flatten(0, 1).index_select(0, places.gather_Z)  # [B * K * n, s, H]
            return rows.view(B, K, -1, rows.shape[-1]).transpose(1, 2)

        # what another row has left there may be NaN, of which a weight of 0 makes NaN again
        return gathered(k_PKsH), gathered(v_PKsH).masked_fill_(self._free[cache.kinds[layer]], 0)


def _attend_in_place(
    places: Mapping[Kind, Places],
    pos_BT: Tensor,
    q_BTNH: Tensor,
    k_PKsH: Tensor,
    v_PKsH: Tensor,
    see: Visibility,
    *,
    scale: float,
    cap: float | None,
) -> Tensor:
    own = places[GLOBAL if see.window is None else LOCAL]
    return paged_attention(q_BTNH.is_cuda)(
        q_BTNH,
        k_PKsH,
        v_PKsH,
        own.table_Bn,
        own.first_B,
        pos_BT,
        window=see.window,
        scale=scale,
        cap=cap,
    )
