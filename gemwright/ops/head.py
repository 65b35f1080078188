"""The output head over many tokens: logits chunk by chunk, and the way back to hidden states and weight.

    logits = softcap(h . W^T) / temperature                        d logits / d (h . W^T) = (1 - tanh^2) / temperature

With a vocabulary of 256k the logits of one sequence outweigh the model, so they exist for one chunk of tokens at a
time, in one buffer that a loss turns into its gradient in place. What stands between two matmuls is a pass or two over
that buffer: on a CPU in C (`native_loss.py`), over the products as the matmul left them; on CUDA in Triton
(`loss_kernels.py`), over fp32 logits; what has no kernel there is compiled (`fused`). Plain torch, where there is
neither, goes in tiles of the vocabulary whose temporaries fit the cache.

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

from gemwright.ops import gpu, native, native_loss
from gemwright.ops.attention import softcap
from gemwright.ops.cpu import has_fast_bf16, on_huge_pages
from gemwright.ops.fuse import fused

CHUNK_BYTES: Final = 128 * 2**20
"""Bytes of fp32 logits that one chunk of `chunks` may take by default."""
CHUNK_SHARE: Final = 4
"""A chunk of a loss may take one quarter of the weight's bytes: little beside the weight's gradient ..."""
CHUNK_TOKENS: Final = 128
"""... or hold as many tokens as its matmuls need (32 take 1.5 times as long as 128, measured) ..."""
CHUNK_FLOOR: Final = {"cpu": 32 * 2**20, "cuda": 512 * 2**20}
"""... or take as many bytes as never matter; whichever is most. A GPU's matmuls want 500 tokens of 256k ids."""
TILE: Final = {"cpu": 512}
"""Ids of the vocabulary in a tile, where it is not all of them. On CPU a tile's temporaries stay in the caches (best
from 455 to 1024 ids, 256 to 2304 wide, measured on AVX2)."""
TURNED: Final = 4096
"""Ids of the vocabulary whose bf16 gradient is transposed at a time: oneDNN multiplies rows twice as fast."""


def chunks(tokens: int, vocab: int, limit: int = CHUNK_BYTES, *, itemsize: int = 4) -> Iterator[slice]:
    """Slices of tokens, as equal as may be, whose logits of `itemsize` bytes fit `limit` bytes (one token at least)."""
    most = max(1, limit // (itemsize * vocab))
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


def add_product_(total: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """total += a @ b, rounded once to the dtype of `total`; the first product overwrites what is there."""
    if total.dtype == a.dtype:
        total.addmm_(a, b, beta=0 if first else 1)
    elif first:
        total.copy_(product(a, b))
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
    """A chunk of tokens at the head. The next chunk overwrites `held_xV`."""

    part: slice
    hidden_xD: Tensor
    """In the dtype of the products."""
    held_xV: Tensor
    """The logits in fp32; or, where there is `native`, the products that they are computed from."""
    top_x1: Tensor
    """The largest logit of each token."""
    log_sum_x1: Tensor
    """log sum exp(logits - top)."""
    native: native_loss.Side | None = None
    """What the native passes take."""

    @property
    def sums(self) -> tuple[Tensor, Tensor]:
        """What `log_probs` takes off the logits."""
        return self.top_x1, self.log_sum_x1

    def logits(self, ids_xK: Tensor | None = None) -> Tensor:
        """The logits of some ids of each token, or of all, in fp32."""
        some = self.held_xV if ids_xK is None else self.held_xV.gather(1, ids_xK)
        if self.native is None:
            return some
        return native_loss.logits(some, cap=self.native.cap, temperature=self.native.temperature)


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

    def tiles(self, size: int | None = None) -> Iterator[slice]:
        """Slices of the vocabulary, of `size` ids or as many as a tile has."""
        V = len(self.weight_VD)
        size = size or TILE.get(self.weight_VD.device.type, V)
        return (slice(v, min(v + size, V)) for v in range(0, V, size))

    def product_tiles(self, dtype: torch.dtype) -> Iterator[slice]:
        """The whole vocabulary, where no part of the weight has to be converted first."""
        return self.tiles(len(self.weight_VD) if self.weight_VD.dtype == dtype else None)

    def chunk_bytes(self) -> int:
        """Bytes of logits that a chunk of a loss may take."""
        floor = CHUNK_FLOOR.get(self.weight_VD.device.type, CHUNK_FLOOR["cpu"])
        return max(self.weight_VD.nbytes // CHUNK_SHARE, 4 * len(self.weight_VD) * CHUNK_TOKENS, floor)

    def chunks(
        self, hidden_XD: Tensor, dtype: torch.dtype, limit: int | None = None, *, plain: bool = False
    ) -> Iterator[Chunk]:
        """The logits of all tokens, chunk by chunk, multiplied in `dtype`; with `plain` in fp32, for plain torch."""
        V = len(self.weight_VD)
        serves = not plain and native.serves(hidden_XD.new_empty(0, dtype=dtype))
        held = dtype if serves else wide(dtype)
        parts = list(chunks(len(hidden_XD), V, limit or self.chunk_bytes(), itemsize=min(held.itemsize, 4)))
        if parts:
            # rows an odd number of cache lines apart: with 256000 ids, whole pages apart, columns of them collide in a
            # cache (transposing took four times as long). Zeros between them, since oneDNN multiplies bf16 in pairs
            stride = 32 * (-(-V // 32) | 1) if serves else V
            buffer_xV = on_huge_pages(hidden_XD.new_empty(parts[0].stop, stride, dtype=held))
            buffer_xV[:, V:] = 0
        read = self._raw if serves else self._read
        for part in parts:
            yield read(part, hidden_XD[part].to(dtype), buffer_xV[: part.stop - part.start, :V])

    def _raw(self, part: slice, hidden_xD: Tensor, raw_xV: Tensor) -> Chunk:
        for v in self.product_tiles(hidden_xD.dtype):
            torch.mm(hidden_xD, self.weight_VD[v].to(hidden_xD.dtype).T, out=raw_xV[:, v])
        side = native_loss.read(raw_xV, cap=self.softcap, temperature=self.temperature)
        return Chunk(part, hidden_xD, raw_xV, side.top_x1, side.log_sum_x1, side)

    def _read(self, part: slice, hidden_xD: Tensor, logits_xV: Tensor) -> Chunk:
        if logits_xV.is_cuda:
            product(hidden_xD, self.weight_VD.to(hidden_xD.dtype).T, logits_xV)
            read = gpu.losses().read_ if gpu.serves(logits_xV) else read_
            return Chunk(part, hidden_xD, logits_xV, *read(logits_xV, self.softcap, self.temperature))
        top_x1 = logits_xV.new_full((len(hidden_xD), 1), -torch.inf)
        sum_x1 = torch.zeros_like(top_x1)
        for v in self.tiles():
            raw_xv = product(hidden_xD, self.weight_VD[v].to(hidden_xD.dtype).T)
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
        self._hidden_XD = torch.zeros_like(hidden_XD) if needs[0] else None
        self._weight_VD = on_huge_pages(torch.empty_like(weight_VD)) if needs[1] else None
        self._empty = True
        self.any = any(needs)

    def add(self, head: Head, chunk: Chunk, made_xV: Tensor) -> None:
        """Add a chunk by d loss / d (h . W^T), which may lie where the logits were."""
        h_xD = chunk.hidden_xD
        if self._hidden_XD is not None:
            sum_xD = torch.zeros_like(h_xD, dtype=wide(h_xD.dtype))
            for v in head.product_tiles(h_xD.dtype) if made_xV.dtype == h_xD.dtype else head.tiles():
                sum_xD += product(made_xV[:, v].to(h_xD.dtype), head.weight_VD[v].to(h_xD.dtype))
            self._hidden_XD[chunk.part] = sum_xD
        if self._weight_VD is not None:
            turned = h_xD.dtype == torch.bfloat16 and h_xD.device.type == "cpu"
            # one buffer for all tiles: fresh pages cost as much as the copy
            rows_vx = h_xD.new_empty(min(TURNED, len(head.weight_VD)) if turned else 0, len(h_xD))
            for v in head.tiles(TURNED if turned else None):
                d_vx = made_xV[:, v].T
                d_vx = rows_vx[: len(d_vx)].copy_(d_vx) if turned else d_vx.to(h_xD.dtype)
                add_product_(self._weight_VD[v], d_vx, h_xD, first=self._empty)
            if self._empty:
                self._weight_VD[len(head.weight_VD) :] = 0
        self._empty = False

    def both(self, by: Tensor | None = None) -> tuple[Tensor | None, Tensor | None]:
        """Both, times d objective / d loss, in place: a scaled copy of the weight's would double the memory."""
        if self._empty and self._weight_VD is not None:
            self._weight_VD.zero_()
            self._empty = False
        found = self._hidden_XD, self._weight_VD
        if by is None or (not by.is_cuda and float(by) == 1):
            return found
        return tuple(g if g is None else g.mul_(by) for g in found)  # type: ignore[return-value]
