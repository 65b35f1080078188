"""The output head over many tokens: logits chunk by chunk, and the way back to hidden states and weight.

    logits = softcap(h . W^T) / temperature                        d logits / d (h . W^T) = (1 - tanh^2) / temperature

With a vocabulary of 256k the logits of one sequence outweigh the model, so they exist for one chunk of tokens at a
time, in one fp32 buffer that a loss turns into its gradient in place. On a CPU the vocabulary goes in tiles whose
weight and temporaries fit the cache: what a tile needs between two matmuls costs no memory traffic, and a weight in
another dtype than the products' is converted as it is read. On CUDA a tile is the whole chunk, and what stands between
two matmuls is one pass over it (`loss_kernels.py`, Triton); what has no kernel there is compiled (`fused`).

Products run in bf16 where the device multiplies it natively and the caller works in bf16, else in fp32
(`product_dtype`); cap, log-sum-exp and sums are fp32 always, fp64 for fp64 inputs.

Legend: X tokens (x in one chunk), D model, V vocabulary (v in one tile).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from gemwright.ops import gpu, native
from gemwright.ops.attention import softcap
from gemwright.ops.cpu import has_fast_bf16
from gemwright.ops.fuse import fused

CHUNK_BYTES: Final = 128 * 2**20
"""Bytes of fp32 logits that one chunk of `chunks` may take by default."""
CHUNK_SHARE: Final = 5
"""A chunk of a loss may take one fifth of the weight's bytes: little beside the weight's gradient ..."""
CHUNK_TOKENS: Final = 128
"""... or hold as many tokens as its matmuls need (32 take 1.5 times as long as 128, measured) ..."""
CHUNK_FLOOR: Final = {"cpu": 32 * 2**20, "cuda": 512 * 2**20}
"""... or take as many bytes as never matter; whichever is most. A GPU's matmuls want 500 tokens of 256k ids."""
TILE: Final = {"cpu": 512}
"""Ids of the vocabulary in a tile, where it is not all of them. On CPU a tile's temporaries stay in the caches (best
from 455 to 1024 ids, 256 to 2304 wide, measured on AVX2)."""


def chunks(tokens: int, vocab: int, limit: int = CHUNK_BYTES) -> Iterator[slice]:
    """Slices of tokens, as equal as may be, whose fp32 logits fit `limit` bytes (one token at least)."""
    most = max(1, limit // (4 * vocab))
    size = -(-tokens // max(1, -(-tokens // most)))
    return (slice(i, min(i + size, tokens)) for i in range(0, tokens, max(1, size)))


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which the head multiplies these hidden states: autocast's, or their own.

    A processor that only emulates bf16 multiplies fp32 five to ten times faster, and fp16 overflows: both take fp32.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    if x.dtype == torch.float64:
        return x.dtype
    native = device == "cuda" or (device == "cpu" and has_fast_bf16())
    return torch.bfloat16 if dtype == torch.bfloat16 and native else torch.float32


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of everything but products: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b in fp32 (or fp64). CUDA keeps a bf16 product's fp32 sums, a CPU rounds them; `out=` keeps autocast away.

    Args:
        out: takes the result; on CUDA alone.
    """
    if a.is_cuda:
        out = a.new_empty(a.shape[0], b.shape[1], dtype=wide(a.dtype)) if out is None else out
        return torch.mm(a, b, out=out) if a.dtype == out.dtype else torch.mm(a, b, out_dtype=out.dtype, out=out)
    assert out is None, "a CPU's product is rounded before it is widened"
    return torch.mm(a, b, out=a.new_empty(a.shape[0], b.shape[1])).to(wide(a.dtype))


def add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, rounded once to the dtype of `total`."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += product(a, b)


def log_probs(logits_xv: Tensor, top_x1: Tensor, log_sum_x1: Tensor) -> Tensor:
    """Log-probabilities of some of the logits, from the largest of all and the log of the sum of exp(logit - largest).

    The log-sum-exp is taken off in two parts: their sum would be rounded at the size of a logit and put all p of a
    token off by a common factor, which the small gradient of a confident token does not bear.
    """
    return (logits_xv - top_x1).sub_(log_sum_x1)


def slope_(logits_xv: Tensor, cap: float | None, temperature: float) -> Tensor:
    """d logits / d (h . W^T), computed from the logits in their place."""
    if cap is None:
        return logits_xv.fill_(1 / temperature)
    return logits_xv.mul_(temperature / cap).square_().sub_(1).mul_(-1 / temperature)


@fused
def read_(logits_xV: Tensor, cap: float | None, temperature: float) -> tuple[Tensor, Tensor]:
    """Products become logits in their place; the largest of each token, and log sum exp(logits - largest)."""
    logits_xV.copy_(softcap(logits_xV, cap) * (1 / temperature))
    top_x1 = logits_xV.amax(-1, keepdim=True)
    return top_x1, (logits_xV - top_x1).exp().sum(-1, keepdim=True).log()


@dataclass(frozen=True, eq=False)
class Chunk:
    """A chunk of tokens at the head. The next chunk overwrites `logits_xV`."""

    part: slice
    hidden_xD: Tensor
    """In the dtype of the products."""
    logits_xV: Tensor
    top_x1: Tensor
    """The largest logit of each token."""
    log_sum_x1: Tensor
    """log sum exp(logits - top)."""

    @property
    def sums(self) -> tuple[Tensor, Tensor]:
        """What `log_probs` takes off the logits."""
        return self.top_x1, self.log_sum_x1


@dataclass(frozen=True, eq=False)
class Head:
    """An output head: its weight [V, D], its cap (None: the model has none) and the temperature its logits are read at.

    The cap has no default: a head without its cap gives another distribution with the same greedy tokens.
    """

    weight_VD: Tensor
    softcap: float | None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for name, value in (("softcap", self.softcap), ("temperature", self.temperature)):
            if value is not None and not value > 0:
                raise ValueError(f"{name}: got {value}, allowed is more than 0")

    def tiles(self) -> Iterator[slice]:
        """Slices of the vocabulary."""
        V = len(self.weight_VD)
        size = TILE.get(self.weight_VD.device.type, V)
        return (slice(v, min(v + size, V)) for v in range(0, V, size))

    def chunk_bytes(self) -> int:
        """Bytes of logits that a chunk of a loss may take."""
        floor = CHUNK_FLOOR.get(self.weight_VD.device.type, CHUNK_FLOOR["cpu"])
        return max(self.weight_VD.nbytes // CHUNK_SHARE, 4 * len(self.weight_VD) * CHUNK_TOKENS, floor)

    def chunks(self, hidden_XD: Tensor, dtype: torch.dtype, limit: int | None = None) -> Iterator[Chunk]:
        """The logits of all tokens, chunk by chunk, multiplied in `dtype`."""
        V = len(self.weight_VD)
        parts = list(chunks(len(hidden_XD), V, limit or self.chunk_bytes()))
        if parts:
            buffer_xV = hidden_XD.new_empty(parts[0].stop, V, dtype=wide(dtype))
        for part in parts:
            yield self._chunk(part, hidden_XD[part].to(dtype), buffer_xV[: part.stop - part.start])

    def _chunk(self, part: slice, hidden_xD: Tensor, logits_xV: Tensor) -> Chunk:
        if logits_xV.is_cuda:
            product(hidden_xD, self.weight_VD.to(hidden_xD.dtype).T, logits_xV)
            read = gpu.losses().read_ if gpu.serves(logits_xV) else read_
            return Chunk(part, hidden_xD, logits_xV, *read(logits_xV, self.softcap, self.temperature))
        top_x1 = logits_xV.new_full((len(hidden_xD), 1), -torch.inf)
        sum_x1 = torch.zeros_like(top_x1)
        for v in self.tiles():
            raw_xv = torch.mm(hidden_xD, self.weight_VD[v].to(hidden_xD.dtype).T, out=hidden_xD.new_empty(0))
            if native.serves(raw_xv):
                sums = top_x1, sum_x1
                native.logits_read_(raw_xv, logits_xV[:, v], *sums, cap=self.softcap, temperature=self.temperature)
                continue
            raw_xv = raw_xv.to(logits_xV.dtype)
            tile_xv = torch.mul(softcap(raw_xv, self.softcap), 1 / self.temperature, out=logits_xV[:, v])
            before_x1, top_x1 = top_x1, torch.maximum(top_x1, tile_xv.amax(-1, keepdim=True))
            sum_x1 *= (before_x1 - top_x1).exp_()
            sum_x1 += (tile_xv - top_x1).exp_().sum(-1, keepdim=True)
        return Chunk(part, hidden_xD, logits_xV, top_x1, sum_x1.log_())

    def slope_(self, logits_xv: Tensor) -> Tensor:
        """`slope_` at this head's cap and temperature."""
        return slope_(logits_xv, self.softcap, self.temperature)


class Gradients:
    """The gradients of hidden states and weight, added up chunk by chunk, each in the dtype of what it belongs to.

    A row of the hidden states' gradient is written once. A bf16 weight's is rounded once a chunk, since an fp32 sum
    would triple the largest tensor of all: after 9 chunks (2048 tokens of the 2B shape) it is off by 0.4 % in norm,
    after 36 by 0.7 %, where the gradient through bf16 logits, summed at once, is off by 0.5 % (measured).
    """

    def __init__(self, hidden_XD: Tensor, weight_VD: Tensor, needs: tuple[bool, bool]) -> None:
        self.hidden_XD = torch.zeros_like(hidden_XD) if needs[0] else None
        self.weight_VD = torch.zeros_like(weight_VD) if needs[1] else None
        self.any = any(needs)

    def add(self, head: Head, chunk: Chunk, made_xV: Tensor | None = None) -> None:
        """Add a chunk whose logits have been replaced by d loss / d (h . W^T), or where that lies apart."""
        h_xD = chunk.hidden_xD
        sum_xD = torch.zeros_like(h_xD, dtype=wide(h_xD.dtype))
        for v in head.tiles():
            d_xv = (chunk.logits_xV if made_xV is None else made_xV)[:, v].to(h_xD.dtype)
            if self.hidden_XD is not None:
                add_product_(sum_xD, d_xv, head.weight_VD[v].to(h_xD.dtype))
            if self.weight_VD is not None:
                add_product_(self.weight_VD[v], d_xv.T, h_xD)
        if self.hidden_XD is not None:
            self.hidden_XD[chunk.part] = sum_xD

    def scaled(self, by: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Both times d objective / d loss, in place: a scaled copy of the weight's gradient would double the memory."""
        return tuple(g if g is None else g.mul_(by) for g in (self.hidden_XD, self.weight_VD))  # type: ignore[return-value]
