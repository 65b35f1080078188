"""What healing ships: the difference between an adopted model and a healed one, small.

A file of safetensors, by the names of the healed model:

    NAME.weight     a norm, whole, fp32
    NAME.lora_A     uint8 [r, in / 2]     \\
    NAME.lora_B     uint8 [r, out / 2]     >  a linear's update, B^T diag(scale) A
    NAME.scale      fp32 [r]              /
    model.embed_tokens.shift    fp32 [D], where there is one: added to every row of the embedding

The 2 r vectors hold whole numbers from -7 to 7, two a byte, each on a grid of its own: at equal bytes twice the rank of
int8. Rounding alone costs 3 to 7 % of an update's square, so training runs over the grid (`on_grid`). Files of int8,
[r, in] and [out, r], are read as well.

Legend: O out, I in, r rank, n numbers of a vector, ... any leading dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

PARTS: Final = ("lora_A", "lora_B", "scale")
SHIFT: Final = "model.embed_tokens.shift"
MOST: Final = 7
"""The largest number of the grid."""
STEPS: Final = (0.25, 0.35, 0.5, 0.7, 1.0)
"""Steps of a grid over its vector's root mean square, of which the best is taken: 0.35 for normal numbers, more where
some are many times as large as the others."""


def leading(update_OI: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first singular vectors and values: [..., O, r], [..., r], [..., I, r] of updates [..., O, I]."""
    u_Or, s_r, v_Ir = torch.svd_lowrank(update_OI, q=min(rank + 8, *update_OI.shape[-2:]), niter=4)
    return u_Or[..., :rank], s_r[..., :rank], v_Ir[..., :rank]


def steps(x_rn: Tensor) -> Tensor:
    """The step of each vector's grid, [..., r, 1]: that of STEPS with the least square error."""
    size_r1 = x_rn.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-30)  # no step is denormal
    errors_rk = torch.cat([(_round(x_rn, size_r1 * step) - x_rn).square().sum(-1, keepdim=True) for step in STEPS], -1)
    return size_r1 * torch.tensor(STEPS, device=x_rn.device)[errors_rk.argmin(-1, keepdim=True)]


def _round(x_rn: Tensor, step_r1: Tensor) -> Tensor:
    return (x_rn / step_r1).round_().clamp_(-MOST, MOST).mul_(step_r1)


def on_grid(x_rn: Tensor) -> Tensor:
    """Vectors [..., r, n] rounded as they are shipped; the gradient passes as if they were not."""
    with torch.no_grad():
        rounded_rn = _round(x_rn, steps(x_rn))
    return x_rn + (rounded_rn - x_rn).detach()


def compress(update_OI: Tensor, rank: int) -> dict[str, Tensor]:
    """The parts of an update: its best vectors for inputs, rounded, and the best ones for outputs beside those."""
    _, _, v_Ir = leading(update_OI.float(), rank)
    return packed(v_Ir.mT, torch.linalg.lstsq(on_grid(v_Ir.mT).mT, update_OI.float().mT).solution)


def packed(a_rI: Tensor, b_rO: Tensor) -> dict[str, Tensor]:
    """The parts of the update b^T a, both rounded. ValueError where a vector does not fill its bytes."""
    for name, x in (("in", a_rI), ("out", b_rO)):
        if x.shape[-1] % 2:
            raise ValueError(f"{name}: got {x.shape[-1]} features, allowed is an even number")
    steps_a, steps_b = steps(a_rI), steps(b_rO)
    codes_a, codes_b = _bytes(a_rI / steps_a), _bytes(b_rO / steps_b)
    return {"lora_A": codes_a, "lora_B": codes_b, "scale": (steps_a * steps_b)[:, 0].contiguous()}


def healed(weight_OI: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
    """An adopted linear's weight with its update, in fp32."""
    a, b = parts["lora_A"], parts["lora_B"]
    a_rI, b_Or = (a.float(), b.float()) if a.dtype is torch.int8 else (_numbers(a), _numbers(b).mT)
    return weight_OI.float() + (b_Or * parts["scale"]) @ a_rI


def _bytes(x_rn: Tensor) -> Tensor:
    """Numbers on a grid of step 1 as bytes [r, n / 2], the first of two in the lower half, 8 added to each."""
    codes_rn = (x_rn.round().clamp(-MOST, MOST) + 8).to(torch.uint8)
    return codes_rn[:, ::2] | codes_rn[:, 1::2] << 4


def _numbers(bytes_rn: Tensor) -> Tensor:
    """The inverse, in fp32."""
    return torch.stack([bytes_rn & 15, bytes_rn >> 4], -1).flatten(1).float() - 8
