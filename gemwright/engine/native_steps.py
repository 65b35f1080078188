"""Decoding steps on CPU in one native call, where the model's linears are plain: `ops/native_pass.py` over the cache.

Every token is a row of its own, as where `paged.read` lays out short chunks. Whether a pass is made here depends on the
number of rows: above it the linears' own form multiplies faster than their weights as they lie (`ops/linear.py`).

Legend: X rows, D model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gemwright.engine.paged import Chunk, PagedCache, Places
from gemwright.lora import AdaptedLinear
from gemwright.model import Gemma2
from gemwright.ops.linear import most_rows, weight_of
from gemwright.ops.native_pass import WEIGHTS, ModelPass, Weights
from gemwright.ops.norm import RMSNorm


class NativeSteps:
    """Passes of one model over one cache, whose weights and pages are read by address."""

    def __init__(self, model: Gemma2, cache: PagedCache) -> None:
        self.model, self.cache = model, cache
        self.kinds = sorted(set(cache.kinds))
        self.rows = 0
        """Tokens of the largest pass that is made here; 0 where the model's linears are not plain."""
        weights = _weights(model) if cache.in_place else None
        self._addresses = _addresses(weights)
        if weights is not None:
            stores = list(zip(cache.k_PKsH, cache.v_PKsH, strict=True))
            self._pass = ModelPass(model.config, weights, stores, [self.kinds.index(kind) for kind in cache.kinds])
            self.rows = most_rows(weights.last_D.dtype)

    def valid(self) -> bool:
        """Whether the model's weights still lie where the passes read them."""
        return _addresses(_weights(self.model)) == self._addresses

    def decode(self, chunks: Sequence[Chunk]) -> Tensor:
        """Hidden states [X, D] of all tokens of chunks, in their order; their keys and values are written."""
        owners = [chunk for chunk in chunks for _ in chunk.tokens]
        tokens_X = torch.tensor([token for chunk in chunks for token in chunk.tokens])
        pos_X = torch.tensor([chunk.start + i for chunk in chunks for i in range(len(chunk.tokens))], dtype=torch.int32)
        tables = {}
        for number, kind in enumerate(self.kinds):
            places = Places.of([chunk.tables[kind] for chunk in owners], self.cache.trash[kind], self.cache.device)
            tables[number] = places.table_Bn, places.first_B
        return self._pass(self.model.embed(tokens_X), pos_X, tables)


def _weights(model: Gemma2) -> Weights | None:
    """The model's weights, if every part is what the pass computes, in the embedding's dtype."""
    blocks = [[_weight(block.get_submodule(name)) for name in WEIGHTS] for block in model.model.layers]
    last = _weight(model.model.norm)
    dtype = model.model.embed_tokens.weight.dtype
    found = [[weight for weight in block if weight is not None and weight.dtype == dtype] for block in blocks]
    if last is None or last.dtype != dtype or any(len(block) < len(WEIGHTS) for block in found):
        return None
    return Weights(found, last)


def _weight(module: nn.Module) -> Tensor | None:
    """A norm's gain, or the weight of a plain linear; under an adapter, that of its base."""
    if isinstance(module, RMSNorm):
        return module.weight.detach()
    weight = weight_of(module.base if isinstance(module, AdaptedLinear) else module)
    return weight if weight is not None and weight.is_contiguous() else None


def _addresses(weights: Weights | None) -> list[int]:
    if weights is None:
        return []
    return [weight.data_ptr() for weight in (*(weight for block in weights.blocks for weight in block), weights.last_D)]
