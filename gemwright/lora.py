"""LoRA (arXiv 2106.09685): y = x W^T + s (x A^T) B^T with W frozen, A [r, in] and B [out, r].

B starts at zero, so a fresh adapter is the identity. `fuse` folds s B A into W.
"""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional as F

from gemwright.swap import swap

ALL_LINEAR = r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"


class LoRALinear(nn.Module):
    """A frozen linear with a trainable low-rank update; `scale` is alpha / r."""

    def __init__(self, base: nn.Linear, rank: int, *, scale: float = 1.0) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scale = scale
        self.lora_A = nn.Parameter(base.weight.new_empty(rank, base.in_features))
        self.lora_B = nn.Parameter(base.weight.new_zeros(base.out_features, rank))
        nn.init.normal_(self.lora_A, std=1 / math.sqrt(base.in_features))

    def forward(self, x_XD: Tensor) -> Tensor:
        update_XF = F.linear(F.linear(x_XD, self.lora_A), self.lora_B)
        return self.base(x_XD) + self.scale * update_XF  # type: ignore[no-any-return]


def add_lora(model: nn.Module, rank: int, *, scale: float = 1.0, targets: str = ALL_LINEAR) -> list[str]:
    """Put a LoRALinear in the place of every linear that `targets` (a regular expression) names."""
    return swap(model, {targets: lambda _, linear: LoRALinear(linear, rank, scale=scale)})


def fuse(weight: Tensor, lora_a: Tensor, lora_b: Tensor, *, scale: float = 1.0) -> Tensor:
    """W + s B A, computed in fp32 and rounded once to the dtype of W."""
    return (weight.float() + scale * (lora_b.float() @ lora_a.float())).to(weight.dtype)
