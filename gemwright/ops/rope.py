"""Rotary position embedding, the half-split form: dimension i turns with dimension i + H/2.

Angles are position * base^(-2i/H), computed in fp32 from integer positions: a bf16 position past 256 is already wrong.
Legend: B rows, T queries, N heads, H head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemwright.ops import gpu, native


def rope_tables(pos_BT: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine tables, [B, T, 1, H] in fp32, of the given positions (padding's -1 is turned like any other)."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=pos_BT.device) / head_dim
    # the same two roundings as transformers: one ulp more is 5e-4 radians at position 8192
    angle = pos_BT[..., None, None].float() * (1.0 / theta**exponent)
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos(), angle.sin()


def rotate(x_BTNH: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Turn queries or keys by their positions' angles, in fp32; the result has the dtype of the input."""
    if native.serves(x_BTNH):
        return native.rotate(x_BTNH, tables)
    if gpu.serves(x_BTNH):
        return gpu.kernels().rotate(x_BTNH, tables)  # type: ignore[no-any-return]
    cos, sin = tables
    left, right = x_BTNH.chunk(2, dim=-1)
    return (x_BTNH * cos + torch.cat((-right, left), dim=-1) * sin).to(x_BTNH.dtype)
