"""The gate of the feed-forward: gelu(gate) * up, with the tanh form of GELU (arXiv 1606.08415, section 2)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from gemwright.ops import gpu, native


def gated_gelu(gate_XF: Tensor, up_XF: Tensor) -> Tensor:
    """gelu_tanh(gate) * up in the dtype of both."""
    if native.serves(gate_XF, up_XF):
        return native.gated_gelu(gate_XF.contiguous(), up_XF.contiguous())
    if gpu.serves(gate_XF, up_XF):
        return gpu.kernels().gated_gelu(gate_XF, up_XF)  # type: ignore[no-any-return]
    return F.gelu(gate_XF, approximate="tanh") * up_XF
