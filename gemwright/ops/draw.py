"""Drawing tokens: hashed Gumbel noise, and selections from 256k-wide rows without sorting them.

Gumbel-max: argmax(s_v + g_v) over standard Gumbel g is a draw from softmax(s). The noise g is a hash of (seed,
position, id), so an outcome depends on nothing else, and no generator state is carried about.

On a CPU, argmax and topk run at a tenth of a maximum's speed, so rows are cut in blocks and looked into only where a
block's maximum says so; and a logarithm is taken only of noise that can win.

Legend: X rows, V vocabulary, C candidates, W = ceil(V / 32) words of 32 bits; _X1 broadcasts over a row.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from gemwright.ops import native

HEAD: Final = 64
"""Largest values whose noise is looked at before that of the whole row."""
ROOM: Final = 8
"""The share of all ids that may have noise enough to win, for a kernel to collect them (a flat row has one in HEAD)."""


def likeliest(values_XV: Tensor) -> Tensor:
    """argmax of each row, the first where several are equal."""
    X, V = values_XV.shape
    block = 256
    if values_XV.is_cuda or V % block:
        return values_XV.argmax(-1)
    blocks = values_XV.view(X, V // block, block)
    best_X = blocks.amax(-1).argmax(-1)
    inside_X = blocks[torch.arange(X, device=values_XV.device), best_X].argmax(-1)
    return best_X * block + inside_X


def largest(values_XV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest values of each row, falling, and their ids: [X, k] both."""
    X, V = values_XV.shape
    block = 32
    if values_XV.is_cuda or V % block or 8 * k * block > V:
        values_XC, ids_XC = values_XV.topk(k)
        return values_XC, ids_XC
    blocks = values_XV.view(X, V // block, block)
    # each of the k largest lies in one of the k blocks with the largest maxima
    best_Xk1 = blocks.amax(-1).topk(k, sorted=False).indices[:, :, None]
    inside = blocks.gather(1, best_Xk1.expand(-1, -1, block)).flatten(1)
    values_XC, at_XC = inside.topk(k)
    ids = (best_Xk1 * block + torch.arange(block, device=values_XV.device)).flatten(1)
    return values_XC, ids.gather(1, at_XC)


def draw(scaled_XC: Tensor, ids_XC: Tensor, seed_X1: Tensor, position_X1: Tensor) -> Tensor:
    """Ids [X] drawn from softmax(scaled) over the candidates `ids`."""
    at_X1 = (scaled_XC.double() + gumbel(seed_X1, position_X1, ids_XC)).argmax(-1, keepdim=True)
    return ids_XC.gather(1, at_X1)[:, 0]


def draw_row(scaled_XV: Tensor, seed_X1: Tensor, position_X1: Tensor) -> Tensor:
    """`draw` from whole rows, the id being the column. On a CPU the same ids without the noise of most of them."""
    X, V = scaled_XV.shape
    if scaled_XV.device.type != "cpu" or V <= HEAD:
        return draw(scaled_XV, torch.arange(V, device=scaled_XV.device).expand(X, V), seed_X1, position_X1)
    head_XC, ids_XC = largest(scaled_XV, HEAD)
    best_X1 = (head_XC.double() + gumbel(seed_X1, position_X1, ids_XC)).amax(-1, keepdim=True)
    # an id outside the head has at most the head's last value, so it wins only with noise of the difference or more;
    # noise grows with its bits, and the slack covers rounding
    noise_X1 = best_X1 - head_XC[:, -1:] - 1e-6
    least_X1 = ((-(-noise_X1).exp()).exp() * 2.0**52).long() - 2
    able_XC = _able(_key(seed_X1, position_X1)[:, 0], least_X1[:, 0], V)
    ids_XC = torch.cat([ids_XC, torch.where(able_XC < 0, ids_XC[:, :1], able_XC)], dim=1)
    return draw(scaled_XV.gather(1, ids_XC), ids_XC, seed_X1, position_X1)


def _able(key_X: Tensor, least_X: Tensor, vocab: int) -> Tensor:
    """The ids [X, C] below `vocab` whose noise has at least that many bits; -1 fills up a row with fewer."""
    if native.library() is not None:
        ids_XC, counts_X = native.noisy_ids(key_X, least_X, vocab, vocab // ROOM)
        most = int(counts_X.max())
        if most <= vocab // ROOM:
            return ids_XC[:, :most].masked_fill(torch.arange(most) >= counts_X[:, None], -1)
    parts = torch.arange(vocab).chunk(-(-vocab // 2**15))  # which stay in the cache
    found = [
        torch.cat([ids[_bits(key, ids) >= least] for ids in parts]) for key, least in zip(key_X, least_X, strict=True)
    ]
    return pad_sequence(found, batch_first=True, padding_value=-1)


def gumbel(seed: Tensor, position: Tensor, ids: Tensor) -> Tensor:
    """Standard Gumbel noise in fp64, a hash of (seed, position, id); the int64 tensors broadcast."""
    return _noise(_bits(_key(seed, position), ids))


def derived(seed: int, index: int) -> int:
    """The seed of the index-th of several streams that one seed gives."""
    return int(_mix(_mix(torch.tensor(seed)) + index))


def unpack(words_XW: Tensor, width: int) -> Tensor:
    """Booleans [X, width] of int32 words: column v is bit v % 32 of word v // 32 (little-endian, as in memory)."""
    table = (torch.arange(256)[:, None] >> torch.arange(8) & 1).to(torch.uint8).view(torch.int64)[:, 0]
    octets = words_XW.contiguous().view(torch.uint8)
    bits = table.to(octets.device).index_select(0, octets.flatten().int())
    return bits.view(torch.bool).view(len(words_XW), -1)[:, :width]


def _key(seed: Tensor, position: Tensor) -> Tensor:
    return _mix(_mix(seed) + position)


def _bits(key: Tensor, ids: Tensor) -> Tensor:
    """52 uniform bits."""
    return (_mix(key + ids) >> 12).bitwise_and_(2**52 - 1)


def _noise(bits: Tensor) -> Tensor:
    uniform = (bits.double() + 0.5) * 2.0**-52
    return -torch.log(-torch.log(uniform))


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64 (Steele, Lea and Flood 2014); multiplication wraps, shifts are made logical."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x ^= (x >> 30).bitwise_and_(2**34 - 1)
    x *= _signed(0xBF58476D1CE4E5B9)
    x ^= (x >> 27).bitwise_and_(2**37 - 1)
    x *= _signed(0x94D049BB133111EB)
    x ^= (x >> 31).bitwise_and_(2**33 - 1)
    return x


def _signed(x: int) -> int:
    return x - 2**64 if x >= 2**63 else x
