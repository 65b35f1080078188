"""Where kernels in Triton are tested: on a GPU as they are, elsewhere through Triton's interpreter, or not at all."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gemwright.ops import gpu

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"


def interprets() -> bool:
    """Whether the interpreter runs here: Triton 3.6 needs a numpy that makes integers of one-element arrays."""
    try:
        return gpu.available() and int(np.zeros(1)) == 0
    except TypeError:
        return False


MARKS = [
    pytest.mark.skipif(
        not GPU and not interprets(), reason="needs a CUDA device, or triton and a numpy that its interpreter knows"
    ),
    *([pytest.mark.gpu] if GPU else []),
]
