"""Passes on CUDA as graphs: one launch a pass instead of hundreds.

A pass of a small model is hundreds of kernels, each shorter than its launch, so it is recorded once for each number of
rows (padded to `DECODE` or `PROMPT`) and replayed over the same `Inputs`. Where sequences decode, a row is a token, and
the logits are part of the pass; where prompts are read, a row is `ROW` consecutive tokens of one. The number of rows is
all that a graph depends on.

Where the model is plain (bf16 or fp32 linears), the pass is `_fused`: the arithmetic of `model.py`, with the same
roundings, in nine launches a layer. The weights of q, k and v, and of gate and up, then lie one after the other in
memory, as one matrix, and the model's parameters are views of it. Other models run their own forward pass, recorded.

Graphs read the weights and pages by address: `valid` says whether these are still the same.

Legend: B rows, T tokens of a row, X = B T, n pages of a table, D model, N query heads, K key/value heads, H head dim,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import sqrt
from types import ModuleType
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gemwright.engine.inputs import Fields, Inputs
from gemwright.engine.paged import Chunk, PagedCache, View, paged_attention
from gemwright.engine.pages import PAGE
from gemwright.lora import AdaptedLinear
from gemwright.model import Gemma2
from gemwright.ops import gpu
from gemwright.ops.norm import RMSNorm
from gemwright.ops.rope import rope_tables

DECODE: Final[tuple[int, ...]] = (
    1,
    2,
    4,
    *range(8, 32, 8),
    *range(32, 128, 16),
    *range(128, 256, 32),
    *range(256, 513, 64),
)
"""Numbers of rows of a token that are recorded; more than the last are not."""
ROW: Final = 32
"""Tokens in a row of a prompt: with the heads of a group they fill the tile of the attention kernel."""
PROMPT: Final[tuple[int, ...]] = (1, 2, 4, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 96, 128)
"""Numbers of such rows."""
CAPACITY: Final = (8, 32, 128, 512)
"""Rows of logits that are kept: what a pass needs, in few steps, since each step records all graphs anew."""


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
        widths = {kind: min(-(-context // PAGE) + 1, cache.trash[kind]) for kind in sorted(set(cache.kinds))}
        self._decode = Inputs(DECODE[-1], 1, widths, self.device)
        self._prompt = Inputs(PROMPT[-1], ROW, widths, self.device)
        self._capacity = 0
        self._logits_XV = self._likeliest_X = torch.empty(0)
        self._graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
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

    def decodes(self, rows: int) -> bool:
        """Whether passes of so many tokens, each a row, are recorded."""
        return rows <= DECODE[-1]

    def reads(self, counts: Sequence[int]) -> bool:
        """Whether passes over chunks of so many tokens are recorded."""
        return sum(-(-count // ROW) for count in counts) <= PROMPT[-1]

    @property
    def fused(self) -> bool:
        """Whether the model is plain, so that the pass is made of fused kernels."""
        return bool(self.layers)

    def decode(self, chunks: Sequence[Chunk]) -> Passed:
        """One pass over the tokens of chunks, in their order; their keys and values are written."""
        X = self._decode.rows_of(chunks)
        rows = next(size for size in DECODE if size >= X)
        self._decode.fill(rows, chunks)
        self._reserve(rows)
        hidden_XD = self._replay(rows, 1)
        return Passed(hidden_XD[:X].clone(), self._logits_XV[:X], self._likeliest_X[:X])

    def read(self, chunks: Sequence[Chunk]) -> list[Tensor]:
        """One pass over chunks of prompts; hidden states [count, D] of each one's tokens."""
        needed = self._prompt.rows_of(chunks)
        rows = next(size for size in PROMPT if size >= needed)
        self._prompt.fill(rows, chunks)
        hidden_XD = self._replay(rows, ROW).clone()
        return [hidden_XD[place] for place in self._prompt.places(chunks)]

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

    def _replay(self, rows: int, tokens: int) -> Tensor:
        """Run a pass over the inputs: its hidden states; logits and likeliest ids lie in their tensors."""
        if (rows, tokens) not in self._graphs:
            self._graphs[rows, tokens] = self.record(rows, tokens)
        graph, hidden_XD = self._graphs[rows, tokens]
        graph.replay()
        return hidden_XD

    def record_ahead(self, rows: int, tokens: int) -> None:
        """Record the pass of so many rows and tokens a row now, over nothing but padding."""
        if tokens == 1:
            self._reserve(rows)
        (self._decode if tokens == 1 else self._prompt).fill(rows, ())
        if (rows, tokens) not in self._graphs:
            self._graphs[rows, tokens] = self.record(rows, tokens)

    def record(self, rows: int, tokens: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """A pass of so many rows and tokens a row as a graph, with its hidden states. It runs once, over the inputs."""
        # on a stream of its own: kernels are compiled and workspaces allocated outside the graph
        side = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        main = torch.cuda.current_stream(self.device)
        side.wait_stream(main)
        with torch.cuda.stream(side):
            self.compute(rows, tokens)
        main.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            hidden_XD = self.compute(rows, tokens)
        return graph, hidden_XD

    def compute(self, rows: int, tokens: int) -> Tensor:
        """What is recorded: hidden states [X, D]; where a row is a token, its logits, too."""
        inputs = self._decode if tokens == 1 else self._prompt
        fields = inputs.fields(rows, self.cache.trash)
        hidden_XD = self._fused(fields) if self.fused else self._general(fields)
        if tokens > 1:
            return hidden_XD
        raw_XV = self._product(hidden_XD, self.model.lm_head.weight) if self.fused else self.model.lm_head(hidden_XD)
        gpu.kernels().capped_best(
            raw_XV, self.config.final_logit_softcapping, self._logits_XV[:rows], self._likeliest_X[:rows]
        )
        return hidden_XD

    def _general(self, fields: Fields) -> Tensor:
        """Any model, through its own forward pass."""
        view = View(self.cache, fields.places)
        hidden_BTD: Tensor = self.model(fields.tokens_BT, fields.pos_BT, cache=view)
        return hidden_BTD.flatten(0, 1)

    def _fused(self, fields: Fields) -> Tensor:
        """The pass of `model.py` over the fused kernels."""
        config, kernels, cache = self.config, gpu.kernels(), self.cache
        eps, H = config.rms_norm_eps, config.head_dim
        N, K = config.num_attention_heads, config.num_key_value_heads
        attend = partial(paged_attention(True), scale=config.scale, cap=config.attn_logit_softcapping)
        embedding, last_D = self.model.model.embed_tokens.weight, self.model.model.norm.weight
        after = [*(layer.input_D for layer in self.layers[1:]), last_D]
        n_XD: Tensor
        (B, T), pos_X = fields.pos_BT.shape, fields.pos_BT.flatten()
        x_XD, n_XD = kernels.embed(fields.tokens_BT.flatten(), embedding, self.scale, self.layers[0].input_D, eps)
        for i, layer in enumerate(self.layers):
            places, stores = fields.places[cache.kinds[i]], (cache.k_PKsH[i], cache.v_PKsH[i])
            where = (places.table_Bn, places.first_B)
            qkv = self._products(n_XD, layer.qkv, [N * H, K * H, K * H])
            q_XNH, k_XKH, v_XKH = (heads.view(len(x_XD), -1, H) for heads in qkv)
            q_XNH = kernels.write(q_XNH, k_XKH, v_XKH, self.turns, stores, *where, pos_X)
            out_BTNH = attend(q_XNH.view(B, T, N, H), *stores, *where, fields.pos_BT, window=config.window(i))
            o_XD = self._product(out_BTNH.view(B * T, N * H), layer.o)
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
