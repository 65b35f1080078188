"""RMSNorm as Gemma 2 has it: normalise in fp32, multiply by (1 + weight), then cast.

The weight is stored as the distance from one, so a fresh layer is the identity gain and weight decay pulls towards it.
Multiplying before the cast is part of the definition: Llama casts first.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gemwright.ops import gpu, native


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * (1 + weight), over the last dimension, in fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x_XD: Tensor) -> Tensor:
        """Normalise rows of any float dtype; the result has the dtype of the input."""
        if native.serves(x_XD, self.weight):
            return native.norm(x_XD, self.weight, self.eps)
        if gpu.serves(x_XD, self.weight):
            return gpu.kernels().norm(x_XD, self.weight, self.eps)  # type: ignore[no-any-return]
        x = x_XD.float()
        gain_D = 1.0 + self.weight.float()
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * gain_D
        return y.to(x_XD.dtype)
