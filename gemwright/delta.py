"""What healing ships: the difference between an adopted model and a healed one, small.

A file of safetensors, by the names of the healed model:

    NAME.weight     a norm, whole, fp32
    NAME.lead_A     int8 [l, in]           \\
    NAME.lead_B     int8 [l, out]           \\
    NAME.lora_A     uint8 [r - l, in / 2]    >  a linear's update, B^T diag(scale) A
    NAME.lora_B     uint8 [r - l, out / 2]  /
    NAME.scale      fp32 [r]               /
    lowering.*      what the adopted model begins from (`lowering.py`, `ballast.py`)
    ballast.*

Each vector is on a grid of its own. The first l, which hold most of an update, are whole numbers from -127 to 127; the
others, from -7 to 7, lie two in a byte. Training runs over the grids (`on_grid`).

Legend: O out, I in, r rank, l leading vectors of it, n numbers of a vector, ... any leading dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from gemwright.ballast import Ballast
from gemwright.config import ModelConfig
from gemwright.lowering import Lowering

PARTS: Final = ("lead_A", "lead_B", "lora_A", "lora_B", "scale")
LEADING: Final = 12
"""Vectors of 8 bits: with 4 bits in all of rank 104, rounding cost 0.02 nats of KL, with these next to nothing."""
STEPS: Final = {7: (0.25, 0.35, 0.5, 0.7, 1.0), 127: (0.025, 0.035, 0.05, 0.08, 0.2)}
"""By the largest number of a grid its steps over its vector's root mean square, of which the best is taken: the second
for normal numbers, more where some are many times as large as the others."""


def leading(update_OI: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first singular vectors and values: [..., O, r], [..., r], [..., I, r] of updates [..., O, I]."""
    u_Or, s_r, v_Ir = torch.svd_lowrank(update_OI, q=min(rank + 8, *update_OI.shape[-2:]), niter=4)
    return u_Or[..., :rank], s_r[..., :rank], v_Ir[..., :rank]


def grid_steps(x_rn: Tensor, most: int) -> Tensor:
    """The step of each vector's grid up to `most`, [..., r, 1]: that of STEPS with the least square error."""
    size_r1 = x_rn.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-30)  # no step is denormal
    tried_rk = [(_round(x_rn, size_r1 * step, most) - x_rn).square().sum(-1, keepdim=True) for step in STEPS[most]]
    return size_r1 * torch.tensor(STEPS[most], device=x_rn.device)[torch.cat(tried_rk, -1).argmin(-1, keepdim=True)]


def _codes(x_rn: Tensor, step_r1: Tensor, most: int) -> Tensor:
    """The nearest whole numbers on a grid, from -most to most."""
    return (x_rn / step_r1).round_().clamp_(-most, most)


def _round(x_rn: Tensor, step_r1: Tensor, most: int) -> Tensor:
    return _codes(x_rn, step_r1, most).mul_(step_r1)


def _parted(x_rn: Tensor) -> tuple[tuple[Tensor, int], tuple[Tensor, int]]:
    """The leading vectors and the others, each with the largest number of its grid."""
    return (x_rn[..., :LEADING, :], 127), (x_rn[..., LEADING:, :], 7)


def on_grid(x_rn: Tensor) -> Tensor:
    """Vectors [..., r, n] rounded as they are shipped; the gradient passes as if they were not."""
    with torch.no_grad():
        rounded_rn = torch.cat([_round(part, grid_steps(part, most), most) for part, most in _parted(x_rn)], -2)
    return x_rn + (rounded_rn - x_rn).detach()


def compress(update_OI: Tensor, rank: int) -> dict[str, Tensor]:
    """The parts of an update: its best vectors for inputs, rounded, and the best ones for outputs beside those."""
    _, _, v_Ir = leading(update_OI.float(), rank)
    return packed(v_Ir.mT, torch.linalg.lstsq(on_grid(v_Ir.mT).mT, update_OI.float().mT).solution)


def packed(a_rI: Tensor, b_rO: Tensor) -> dict[str, Tensor]:
    """The parts of the update b^T a, both rounded. ValueError where a vector does not fill its bytes."""
    codes: dict[str, Tensor] = {}
    sizes = []
    for letter, side, x_rn in (("A", "in", a_rI), ("B", "out", b_rO)):
        if x_rn.shape[-1] % 2:
            raise ValueError(f"{side}: got {x_rn.shape[-1]} features, allowed is an even number")
        grids = [(part, grid_steps(part, most), most) for part, most in _parted(x_rn)]
        lead_rn, rest_rn = (_codes(*grid) for grid in grids)
        codes |= {f"lead_{letter}": lead_rn.to(torch.int8), f"lora_{letter}": _bytes(rest_rn)}
        sizes.append(torch.cat([step_r1 for _, step_r1, _ in grids])[:, 0])
    return {**codes, "scale": sizes[0] * sizes[1]}


def steps(delta: Mapping[str, Tensor], config: ModelConfig) -> list[Lowering | Ballast]:
    """Of a delta's tensors the steps of adoption that it begins from."""
    return [step for step in (Lowering.of(delta), Ballast.of(delta, config)) if step is not None]


def parts(delta: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Of a delta's tensors those of the update of a linear's weight `name`, by the names above; none for a norm."""
    stem = name.removesuffix("weight")
    return {part: delta[stem + part] for part in PARTS if stem + part in delta}


def healed(weight_OI: Tensor, update: Mapping[str, Tensor]) -> Tensor:
    """An adopted linear's weight with the parts of its update, in fp32."""
    a_rI, b_rO = (torch.cat([update[f"lead_{x}"].float(), _numbers(update[f"lora_{x}"])]) for x in "AB")
    return weight_OI.float() + (b_rO.mT * update["scale"]) @ a_rI


def _bytes(codes_rn: Tensor) -> Tensor:
    """Whole numbers from -7 to 7 as bytes [r, n / 2], the first of two in the lower half, 8 added to each."""
    halves_rn = (codes_rn + 8).to(torch.uint8)
    return halves_rn[:, ::2] | halves_rn[:, 1::2] << 4


def _numbers(bytes_rn: Tensor) -> Tensor:
    """The inverse, in fp32."""
    return torch.stack([bytes_rn & 15, bytes_rn >> 4], -1).flatten(1).float() - 8
