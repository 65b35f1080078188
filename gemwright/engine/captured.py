"""Decoding passes on CUDA as graphs: one launch a pass, in which every token is a row of its own.

A pass of a small model is hundreds of kernels, each shorter than its launch, so it is recorded once for each number of
rows (padded to `BUCKETS`) and replayed. What differs from pass to pass lies in one int32 tensor: tokens, positions, and
for each kind of layer the first page and the table of each row. It is filled on the CPU and copied at once; a row that
pads has position -1, writes to the trash page and sees nothing. Tables are as wide as the context, since the kernels
read lengths from the positions; so the number of rows is all that a graph depends on.

Where the model is plain (bf16 or fp32 linears), the pass is `_fused`: the arithmetic of `model.py`, with the same
roundings, in nine launches a layer. The weights of q, k and v, and of gate and up, then lie one after the other in
memory, as one matrix, and the model's parameters are views of it. Other models run their own forward pass, recorded.

Graphs read the weights and pages by address: `valid` says whether these are still the same.

Legend: X rows (a token each), n pages of a table, D model, N query heads, K key/value heads, H head dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import sqrt
from types import ModuleType
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gemwright.engine.paged import Chunk, PagedCache, Places, View, paged_attention
from gemwright.engine.pages import PAGE
from gemwright.engine.scheduler import Kind, Table
from gemwright.lora import AdaptedLinear
from gemwright.model import Gemma2
from gemwright.ops import gpu
from gemwright.ops.norm import RMSNorm
from gemwright.ops.rope import rope_tables

BUCKETS: Final[tuple[int, ...]] = (
    1,
    2,
    4,
    *range(8, 32, 8),
    *range(32, 128, 16),
    *range(128, 256, 32),
    *range(256, 513, 64),
)
"""Numbers of rows that are recorded; more than the last are not."""
CAPACITY: Final = (8, 32, 128, 512)
"""Rows of logits that are kept: what a pass needs, in few steps, since each step records all graphs anew."""
ALIGN: Final = 16
"""Fields begin at multiples of so many int32, or the kernels would be compiled for each alignment."""


@dataclass(frozen=True)
class Passed:
    """What a pass made of its rows. The next pass overwrites the logits, which may be changed in place."""

    hidden_XD: Tensor
    logits_XV: Tensor
    likeliest_X: Tensor

    def rows(self, places: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Logits and likeliest ids of some rows."""
        if len(places) == len(self.hidden_XD):
            return self.logits_XV, self.likeliest_X
        at = gpu.upload(places, self.logits_XV.device)
        return self.logits_XV[at], self.likeliest_X[at]


@dataclass(frozen=True)
class Fields:
    """The int32 inputs of a pass."""

    tokens_X: Tensor
    pos_X: Tensor
    places: dict[Kind, Places]


@dataclass(frozen=True)
class Layer:
    """A block's weights; `qkv` and `gate_up` hold one matrix where they lie one after the other, else each its own."""

    input_D: Tensor
    qkv: list[Tensor]
    o: Tensor
    post_attention_D: Tensor
    pre_feedforward_D: Tensor
    gate_up: list[Tensor]
    down: Tensor
    post_feedforward_D: Tensor


class Steps:
    """Recorded passes of one model over one cache."""

    def __init__(self, model: Gemma2, cache: PagedCache, *, context: int) -> None:
        """`context`: most positions of a sequence."""
        self.model, self.cache, self.config = model, cache, model.config
        self.device = cache.device
        self.one_row = cache.k_PKsH[0].dtype == torch.bfloat16
        """Whether a single row is multiplied by the own kernel."""
        self._widths = {kind: min(-(-context // PAGE) + 1, cache.trash[kind]) for kind in sorted(set(cache.kinds))}
        self._size = -(-max(BUCKETS) // ALIGN) * ALIGN * (2 + sum(1 + width for width in self._widths.values()))
        self._static = torch.zeros(self._size, dtype=torch.int32, device=self.device)
        self._host = np.zeros(self._size, np.int32)
        self._rows: dict[Kind, list[tuple[Table, int, int] | None]] = {}
        self._filled = 0
        self._capacity = 0
        self._logits_XV = self._likeliest_X = torch.empty(0)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._pool: Any = None
        with torch.inference_mode(False), torch.no_grad():
            self.layers = self._weights()
            # the tables of all positions: one ulp more in an angle is 5e-4 radians at 8192
            cos, sin = rope_tables(
                torch.arange(context, device=self.device)[None], self.config.head_dim, self.config.rope_theta
            )
            half = self.config.head_dim // 2
            self.turns = cos[0, :, 0, :half].contiguous(), sin[0, :, 0, :half].contiguous()
        scale = torch.tensor(sqrt(self.config.hidden_size), dtype=model.model.embed_tokens.weight.dtype)
        self.scale = float(scale)
        self._addresses = [p.data_ptr() for p in model.parameters()]

    def valid(self) -> bool:
        """Whether the model's weights still lie where the graphs read them."""
        return bool(self._addresses == [p.data_ptr() for p in self.model.parameters()])

    def serves(self, rows: int) -> bool:
        """Whether passes of so many rows are recorded."""
        return rows <= BUCKETS[-1]

    @property
    def fused(self) -> bool:
        """Whether the model is plain, so that the pass is made of fused kernels."""
        return bool(self.layers)

    def run(self, chunks: Sequence[Chunk]) -> Passed:
        """One pass over the tokens of chunks, in their order; their keys and values are written."""
        X = sum(len(chunk.tokens) for chunk in chunks)
        rows = next(size for size in BUCKETS if size >= X)
        self._fill(rows, chunks)
        gpu.copy_(self._static[: self._filled], torch.from_numpy(self._host[: self._filled]))
        self._reserve(rows)
        hidden_XD = self._replay(rows)
        return Passed(hidden_XD[:X].clone(), self._logits_XV[:X], self._likeliest_X[:X])

    # --- inputs ------------------------------------------------------------------------------------------------------

    def _fields(self, rows: int) -> list[tuple[int, int]]:
        """Where each field of a pass begins and ends: tokens, positions, then first and table of each kind."""
        sizes = [rows, rows, *(size for width in self._widths.values() for size in (rows, rows * width))]
        spans, at = [], 0
        for size in sizes:
            spans.append((at, at + size))
            at += -(-size // ALIGN) * ALIGN
        return [*spans, (at, at)]

    def _fill(self, rows: int, chunks: Sequence[Chunk]) -> None:
        """Bring the host's copy up to date; of tables only rows that changed."""
        *spans, (end, _) = self._fields(rows)
        tokens, pos, *rest = (self._host[low:high] for low, high in spans)
        if end != self._filled:
            self._filled, self._rows = end, {kind: [None] * rows for kind in self._widths}
        flat = [token for chunk in chunks for token in chunk.tokens]
        X = len(flat)
        tokens[:X], tokens[X:] = flat, 0
        pos[:X] = [chunk.start + i for chunk in chunks for i in range(len(chunk.tokens))]
        pos[X:] = -1
        for (kind, width), first, table in zip(self._widths.items(), rest[::2], rest[1::2], strict=True):
            table_Xn, known = table.reshape(rows, width), self._rows[kind]
            row = 0
            for chunk in chunks:
                held = chunk.tables[kind]
                state = (held, held.first, len(held.pages))
                for _ in chunk.tokens:
                    # a table with the same first page and as many pages is the same: pages come and go at its ends
                    if (was := known[row]) is None or was[0] is not held or was[1:] != state[1:]:
                        first[row], known[row] = held.first, state
                        table_Xn[row, : len(held.pages)] = held.pages
                    row += 1

    def _inputs(self, rows: int) -> Fields:
        spans = self._fields(rows)[:-1]
        tokens, pos, *rest = (self._static[low:high] for low, high in spans)
        places = {
            kind: Places(table.view(rows, width), first, self.cache.trash[kind])
            for (kind, width), first, table in zip(self._widths.items(), rest[::2], rest[1::2], strict=True)
        }
        return Fields(tokens, pos, places)

    def _reserve(self, rows: int) -> None:
        """Room for the logits of a pass; graphs that write to a smaller one go."""
        if rows > self._capacity:
            self.forget()
            self._capacity = next(size for size in CAPACITY if size >= rows)
            self._logits_XV = torch.empty(
                self._capacity, self.config.vocab_size, dtype=torch.float32, device=self.device
            )
            self._likeliest_X = torch.zeros(self._capacity, dtype=torch.int64, device=self.device)

    def forget(self) -> None:
        """Record everything anew; torch gives up a pool with its last graph."""
        self._graphs.clear()
        self._pool = None

    # --- graphs ------------------------------------------------------------------------------------------------------

    def _replay(self, rows: int) -> Tensor:
        """Run a pass over the static inputs: hidden states of all rows; logits and likeliest ids in their tensors."""
        if rows not in self._graphs:
            self._graphs[rows] = self._record(rows)
        graph, hidden_XD = self._graphs[rows]
        graph.replay()
        return hidden_XD

    def _record(self, rows: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        # first on a stream of its own: kernels are compiled and workspaces allocated outside the graph
        side = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        main = torch.cuda.current_stream(self.device)
        side.wait_stream(main)
        with torch.cuda.stream(side):
            self.compute(rows)
        main.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            hidden_XD = self.compute(rows)
        return graph, hidden_XD

    def compute(self, rows: int) -> Tensor:
        """What is recorded."""
        fields = self._inputs(rows)
        hidden_XD = self._fused(fields) if self.fused else self._general(fields)
        raw_XV = self._product(hidden_XD, self.model.lm_head.weight) if self.fused else self.model.lm_head(hidden_XD)
        gpu.kernels().capped_best(
            raw_XV, self.config.final_logit_softcapping, self._logits_XV[:rows], self._likeliest_X[:rows]
        )
        return hidden_XD

    def _general(self, fields: Fields) -> Tensor:
        """Any model, through its own forward pass."""
        view = View(self.cache, fields.places)
        hidden_X1D: Tensor = self.model(fields.tokens_X[:, None], fields.pos_X[:, None], cache=view)
        return hidden_X1D[:, 0]

    def _fused(self, fields: Fields) -> Tensor:
        """The pass of `model.py` over the fused kernels."""
        config, kernels, cache = self.config, gpu.kernels(), self.cache
        eps, H = config.rms_norm_eps, config.head_dim
        N, K = config.num_attention_heads, config.num_key_value_heads
        attend = partial(paged_attention(True), scale=config.scale, cap=config.attn_logit_softcapping)
        embedding, last_D = self.model.model.embed_tokens.weight, self.model.model.norm.weight
        after = [*(layer.input_D for layer in self.layers[1:]), last_D]
        n_XD: Tensor
        x_XD, n_XD = kernels.embed(fields.tokens_X, embedding, self.scale, self.layers[0].input_D, eps)
        for i, layer in enumerate(self.layers):
            places, stores = fields.places[cache.kinds[i]], (cache.k_PKsH[i], cache.v_PKsH[i])
            where = (places.table_Bn, places.first_B, fields.pos_X)
            qkv = self._products(n_XD, layer.qkv, [N * H, K * H, K * H])
            q_XNH, k_XKH, v_XKH = (heads.view(len(x_XD), -1, H) for heads in qkv)
            q_XNH = kernels.write(q_XNH, k_XKH, v_XKH, self.turns, stores, *where)
            out_XNH = attend(q_XNH[:, None], *stores, *where[:2], fields.pos_X[:, None], window=config.window(i))
            o_XD = self._product(out_XNH.view(len(x_XD), N * H), layer.o)
            x_XD, n_XD = kernels.add_norm(o_XD, layer.post_attention_D, x_XD, layer.pre_feedforward_D, eps)
            down_XD = self._product(self._gate(kernels, n_XD, layer.gate_up), layer.down)
            x_XD, n_XD = kernels.add_norm(down_XD, layer.post_feedforward_D, x_XD, after[i], eps)
        return n_XD

    def _product(self, x_XD: Tensor, weight_FD: Tensor) -> Tensor:
        if len(x_XD) == 1 and self.one_row:
            return gpu.kernels().one_row(x_XD, weight_FD)  # type: ignore[no-any-return]
        return F.linear(x_XD, weight_FD)

    def _products(self, x_XD: Tensor, weights: list[Tensor], sizes: list[int]) -> Sequence[Tensor]:
        made = [self._product(x_XD, weight) for weight in weights]
        return torch.split(made[0], sizes, 1) if len(made) == 1 else made

    def _gate(self, kernels: ModuleType, n_XD: Tensor, weights: list[Tensor]) -> Tensor:
        if len(n_XD) == 1 and self.one_row and len(weights) == 1:
            return kernels.one_row(n_XD, weights[0], gated=True)  # type: ignore[no-any-return]
        size = self.config.intermediate_size
        gate_XF, up_XF = self._products(n_XD, weights, [size, size])
        return kernels.gated_gelu(gate_XF, up_XF)  # type: ignore[no-any-return]

    # --- weights -----------------------------------------------------------------------------------------------------

    def _weights(self) -> list[Layer]:
        """The blocks' weights; none where the model is not plain."""
        found = []
        for block in self.model.model.layers:
            names = [f"self_attn.{name}_proj" for name in "qkvo"] + [
                f"mlp.{name}_proj" for name in ("gate", "up", "down")
            ]
            linears = [_plain(block.get_submodule(name)) for name in names]
            norms = [
                block.get_submodule(f"{name}_layernorm")
                for name in ("input", "post_attention", "pre_feedforward", "post_feedforward")
            ]
            if not all(isinstance(norm, RMSNorm) for norm in norms) or not isinstance(self.model.lm_head, nn.Linear):
                return []
            q, k, v, o, gate, up, down = linears
            if q is None or k is None or v is None or o is None or gate is None or up is None or down is None:
                return []
            gains: list[Tensor] = [norm.weight for norm in norms]  # type: ignore[misc]
            found.append(
                Layer(
                    gains[0], joined([q, k, v]), o.weight, gains[1], gains[2], joined([gate, up]), down.weight, gains[3]
                )
            )
        return found


def _plain(module: nn.Module) -> nn.Linear | None:
    """The linear itself, if that is all it is; under an adapter, its base."""
    base = module.base if isinstance(module, AdaptedLinear) else module
    if type(base) is not nn.Linear or base.bias is not None or type(base.weight) is not nn.Parameter:
        return None
    return base if base.weight.is_contiguous() and base.weight.dtype in (torch.bfloat16, torch.float32) else None


def joined(linears: Sequence[nn.Linear]) -> list[Tensor]:
    """The weights of linears as one matrix [sum of F, D] of which each is a view; as they are, where they are trained.

    Those that do not lie so yet are moved: for a moment both copies exist.
    """
    weights = [linear.weight for linear in linears]
    if any(weight.requires_grad for weight in weights):
        return list(weights)
    first, sizes = weights[0], [len(weight) for weight in weights]
    ends = [weight.data_ptr() + weight.nbytes for weight in weights]
    storages = {weight.untyped_storage().data_ptr() for weight in weights}
    if len(storages) > 1 or [weight.data_ptr() for weight in weights[1:]] != ends[:-1]:
        matrix = torch.cat([weight.detach() for weight in weights])
        for weight, part in zip(weights, torch.split(matrix, sizes), strict=True):
            weight.data = part
        return [matrix]
    return [first.detach().as_strided((sum(sizes), first.shape[1]), (first.shape[1], 1))]
