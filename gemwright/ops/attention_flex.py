"""FlexAttention backend (torch.nn.attention.flex_attention): one fused CUDA kernel with cap and mask compiled in.

The mask is a block mask made from positions, so skipped blocks cost nothing and local layers read their window only.
Which blocks are skipped follows from the smallest and largest position and document of each block, so no mask of all
queries and keys is ever made.
Positions, documents, window, scale and cap all reach the kernel as captured tensors: their values may change without
compiling again, and local and global layers share one kernel. (A float that changes in the closure would become a
symbol, which the compiler of torch 2.13 cannot lower.) Numbers are filled in on the device: nothing is waited for, and
a CUDA graph may hold the pass.

On CPU the kernel runs forward alone (torch 2.13 has no CPU backward), which is how its arithmetic is tested without a
GPU. There lengths are padded to whole blocks: its product q . k writes past the end of the scores where the last keys
fill some vectors but not a whole tile of the matmul (40 keys on AVX2, say), and symbolic lengths do not compile.

Legend: B rows, T queries, S keys, N query heads, K key/value heads, H head dim, L = T or S.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor
from torch._dynamo import config as dynamo
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from gemwright.ops.attention import EMPTY, PADDING, Visibility

BLOCK: Final = 128
"""The block size of the mask; lengths on CPU are padded to a multiple of it."""
VARIANTS: Final = 64
"""Kernels that one process may compile: with and without gradient, documents, one row or many, one block or many. At
torch's own limit of 8 it would go on with the whole score matrix in memory; past this one it raises."""
KERNELS: Final[dict[int, dict[str, int]]] = {
    256: {"fwd_BLOCK_M": 128, "fwd_BLOCK_N": 64, "fwd_num_warps": 8, "fwd_num_stages": 2},
}
"""By head size, the tiles of the CUDA kernels in bf16 where torch's own choice is not the fastest (on an H100 forward
over 8192 positions takes 1.56 and 1.95 ms, local and global, instead of 3.76 and 2.15); for BLOCK queries or more,
since fewer run another kernel."""
ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


@cache
def _compiled(device: str) -> Callable[..., Any]:
    """The kernel of a kind of device, for all layers; on CUDA a length becomes symbolic at its second value."""
    return torch.compile(flex_attention, dynamic=False if device == "cpu" else None)


def _pad(x_BL: Tensor, value: int = 0) -> Tensor:
    """On CPU, x [B, L, ...] with L brought to whole blocks; on CUDA x itself."""
    B, L, *rest = x_BL.shape
    extra = -L % BLOCK if x_BL.device.type == "cpu" else 0
    return torch.cat((x_BL, x_BL.new_full((B, extra, *rest), value)), dim=1) if extra else x_BL


def block_mask(see: Visibility) -> BlockMask:
    """The block mask of a Visibility; the same rule as `Visibility.mask`, one element at a time."""
    q_pos, k_pos = _pad(see.q_pos_BT, PADDING), _pad(see.k_pos_BS, EMPTY)
    docs = None if see.q_doc_BT is None or see.k_doc_BS is None else (_pad(see.q_doc_BT), _pad(see.k_doc_BS))
    window = torch.full((), see.window or EMPTY, device=q_pos.device)  # every distance is below EMPTY

    def visible(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        seen = (k_pos[b, s] <= q_pos[b, t]) & (k_pos[b, s] >= 0) & (q_pos[b, t] - k_pos[b, s] < window)
        return seen if docs is None else seen & (docs[0][b, t] == docs[1][b, s])

    some_Btk, all_Btk = _blocks(q_pos, k_pos, docs, window)
    partial, full = (_listed(seen_Btk) for seen_Btk in (some_Btk & ~all_Btk, all_Btk))
    lengths = q_pos.shape[1], k_pos.shape[1]
    return BlockMask.from_kv_blocks(*partial, *full, BLOCK_SIZE=BLOCK, mask_mod=visible, seq_lengths=lengths)


def _blocks(q_BT: Tensor, k_BS: Tensor, docs: tuple[Tensor, Tensor] | None, window: Tensor) -> tuple[Tensor, Tensor]:
    """Which blocks of queries see some of a block of keys, at most, and which all of it: [B, t, k] over blocks."""
    (q_least, q_most), (k_least, k_most) = (_range(x_BL, ignore=x_BL < 0) for x_BL in (q_BT, k_BS))
    q_least, q_most, k_least, k_most = q_least[..., None], q_most[..., None], k_least[:, None], k_most[:, None]
    some = (k_least <= q_most) & (q_least - k_most < window)
    whole = (k_most <= q_least) & (q_most - k_least < window)
    for x_BL, dim in ((q_BT, 2), (k_BS, 1)):
        whole &= (_tiled(x_BL, PADDING) >= 0).all(-1).unsqueeze(dim)
    if docs is not None:
        (q_first, q_last), (k_first, k_last) = (_range(doc_BL, ignore=None) for doc_BL in docs)
        q_first, q_last, k_first, k_last = q_first[..., None], q_last[..., None], k_first[:, None], k_last[:, None]
        some &= (q_first <= k_last) & (k_first <= q_last)
        whole &= (q_first == q_last) & (k_first == k_last) & (q_first == k_first)
    return some, whole


def _tiled(x_BL: Tensor, value: int) -> Tensor:
    """[B, blocks, BLOCK], the last block filled up."""
    extra = -x_BL.shape[1] % BLOCK
    return torch.nn.functional.pad(x_BL, (0, extra), value=value).view(len(x_BL), -1, BLOCK)


def _range(x_BL: Tensor, ignore: Tensor | None) -> tuple[Tensor, Tensor]:
    """The smallest and largest value of each block, [B, blocks]; of a block without any, EMPTY and PADDING."""
    if ignore is None:
        least, most = _tiled(x_BL, EMPTY), _tiled(x_BL, PADDING)
    else:
        least, most = _tiled(x_BL.masked_fill(ignore, EMPTY), EMPTY), _tiled(x_BL.masked_fill(ignore, PADDING), PADDING)
    return least.amin(-1), most.amax(-1)


def _listed(seen_Btk: Tensor) -> tuple[Tensor, Tensor]:
    """For each block of queries, over one head: the number of its blocks of keys, and their indices before the rest."""
    order_B1tk = torch.argsort(seen_Btk.int(), dim=-1, descending=True, stable=True)[:, None].int()
    return seen_Btk.sum(-1, dtype=torch.int32)[:, None], order_B1tk.contiguous()


def score_mod(scale: float, cap: float | None, device: torch.device, *, exact: bool = True) -> ScoreMod:
    """Scale and soft-cap of one score.

    Not exact: tanh x = 2 sigmoid 2x - 1, off by 1e-7 of the cap where x is small, a hundredth of what bf16 keys do. It
    takes a fifth of the instructions of the library's tanh, which the backward pass computes twice more.
    """
    scale_ = torch.full((), scale if cap is None else scale / cap, device=device)
    cap_ = None if cap is None else torch.full((), cap, device=device)

    def capped(score: Tensor, b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        if cap_ is None:
            return score * scale_
        return cap_ * (torch.tanh(score * scale_) if exact else 2 * torch.sigmoid(2 * score * scale_) - 1)

    return capped


def flex(q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, see: Visibility, *, scale: float, cap: float | None) -> Tensor:
    """Attention [B, T, N, H] in the dtype of q; see `ops.attention.reference` for the definition."""
    q_BNTH, k_BKSH, v_BKSH = (_pad(x_BLNH).transpose(1, 2) for x_BLNH in (q_BTNH, k_BSKH, v_BSKH))
    mask = see.memo("block_mask", lambda: block_mask(see))
    exact = q_BTNH.dtype == torch.float32
    capped = see.memo(("score_mod", scale, cap, exact), lambda: score_mod(scale, cap, q_BTNH.device, exact=exact))
    chosen = q_BTNH.is_cuda and q_BTNH.shape[1] >= BLOCK and not exact
    tiles = KERNELS.get(q_BTNH.shape[3]) if chosen else None
    with dynamo.patch(recompile_limit=VARIANTS, fail_on_recompile_limit_hit=True):
        out_BNTH: Tensor = _compiled(q_BTNH.device.type)(
            q_BNTH, k_BKSH, v_BKSH, score_mod=capped, block_mask=mask, scale=1.0, enable_gqa=True, kernel_options=tiles
        )
    out_BTNH = out_BNTH.transpose(1, 2)[:, : q_BTNH.shape[1]]
    # padding queries see nothing: 0 by definition, whatever the kernel leaves in their rows
    return out_BTNH.masked_fill((see.q_pos_BT == PADDING)[:, :, None, None], 0)
