"""FlexAttention backend (torch.nn.attention.flex_attention): one fused CUDA kernel with cap and mask compiled in.

The mask is a block mask made from positions, so skipped blocks cost nothing and local layers read their window only.
On CPU it runs forward alone (torch 2.13 has no CPU backward), which is how its arithmetic is tested without a GPU.

Legend: B rows, T queries, S keys, N query heads, K key/value heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from gemwright.ops.attention import PADDING, Visibility


@cache
def _compiled() -> Callable[..., Any]:
    """One compiled kernel per shape and cap, shared by all layers."""
    return torch.compile(flex_attention, dynamic=False)


def block_mask(see: Visibility) -> BlockMask:
    """The block mask of a Visibility; the same rule as `Visibility.mask`, one element at a time."""
    q_pos, k_pos, q_doc, k_doc, window = see.q_pos_BT, see.k_pos_BS, see.q_doc_BT, see.k_doc_BS, see.window

    def visible(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        seen = (k_pos[b, s] <= q_pos[b, t]) & (k_pos[b, s] >= 0)
        if window is not None:
            seen = seen & (q_pos[b, t] - k_pos[b, s] < window)
        if q_doc is not None and k_doc is not None:
            seen = seen & (q_doc[b, t] == k_doc[b, s])
        return seen

    B, T = q_pos.shape
    return create_block_mask(visible, B, None, T, k_pos.shape[1], device=q_pos.device)


def flex(q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, see: Visibility, *, scale: float, cap: float | None) -> Tensor:
    """Attention [B, T, N, H] in the dtype of q; see `ops.attention.reference` for the definition."""

    def capped(score: Tensor, b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return score if cap is None else cap * torch.tanh(score / cap)

    out_BNTH = _compiled()(
        q_BTNH.transpose(1, 2),
        k_BSKH.transpose(1, 2),
        v_BSKH.transpose(1, 2),
        score_mod=capped,
        block_mask=see.memo("block_mask", lambda: block_mask(see)),
        scale=scale,
        enable_gqa=True,
    )
    # padding queries see nothing: 0 by definition, whatever the kernel leaves in their rows
    return out_BNTH.transpose(1, 2).masked_fill((see.q_pos_BT == PADDING)[:, :, None, None], 0)
