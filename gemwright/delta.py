"""What healing ships: the difference between an adopted model and a healed one, small.

A file of safetensors, by the names of the healed model:

    NAME.weight     a norm, whole, fp32
    NAME.lora_A     int8 [r, in]    \\
    NAME.lora_B     int8 [out, r]    >  a linear's update, B diag(scale) A
    NAME.scale      fp32 [r]        /

An update's factors are its singular vectors, so that every one of the r outer products has a scale of its own and int8
costs less than one percent of each: at equal bytes twice the rank of bf16.

Legend: O out, I in, r rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

PARTS: Final = ("lora_A", "lora_B", "scale")


def leading(update_OI: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first singular vectors and values: [..., O, r], [..., r], [..., I, r] of updates [..., O, I]."""
    u_Or, s_r, v_Ir = torch.svd_lowrank(update_OI, q=min(rank + 8, *update_OI.shape[-2:]), niter=4)
    return u_Or[..., :rank], s_r[..., :rank], v_Ir[..., :rank]


def compress(update_OI: Tensor, rank: int) -> dict[str, Tensor]:
    """The best int8 outer products for an update, by PARTS."""
    u_Or, s_r, v_Ir = leading(update_OI.float(), rank)
    top_u, top_v = (x.abs().amax(0).clamp(min=torch.finfo(torch.float32).tiny) for x in (u_Or, v_Ir))
    return {
        "lora_A": (v_Ir / top_v * 127).round().to(torch.int8).T.contiguous(),
        "lora_B": (u_Or / top_u * 127).round().to(torch.int8).contiguous(),
        "scale": (s_r * top_u * top_v / 127**2).contiguous(),
    }


def healed(weight_OI: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
    """An adopted linear's weight with its update, in fp32."""
    return weight_OI.float() + (parts["lora_B"].float() * parts["scale"]) @ parts["lora_A"].float()
