"""What torch code asks about CUDA: which tensors the own kernels serve (Triton: `decode_kernels.py`,
`attention_kernels.py` and `loss_kernels.py`), small uploads."""

from __future__ import annotations

import functools
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn


@functools.cache
def available() -> bool:
    """Whether Triton is installed, as it is with every CUDA build of torch on Linux."""
    return find_spec("triton") is not None


def serves(*tensors: Tensor) -> bool:
    """Whether a kernel may stand in for plain torch: one known dtype, no gradient, no tracing, the current device."""
    first = tensors[0]
    return (
        first.is_cuda
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and first.device.index == torch.cuda.current_device()  # which is where Triton launches
        and first.dtype in (torch.bfloat16, torch.float32)
        and all(type(t) in (Tensor, nn.Parameter) and t.dtype == first.dtype and t.is_cuda for t in tensors)
        and available()
    )


@functools.cache
def kernels() -> ModuleType:
    """The module of kernels."""
    from gemwright.ops import decode_kernels

    return decode_kernels


def upload(values: Any, device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """Numbers as a tensor on a device. A CUDA device is not waited for, as a copy from pageable memory would be."""
    host = torch.as_tensor(values, dtype=dtype)
    return copy_(torch.empty_like(host, device=device), host)


def copy_(target: Tensor, host: Tensor) -> Tensor:
    """`target`, filled from a tensor on the CPU, which may be changed right after."""
    if not target.is_cuda:
        return target.copy_(host)
    # the pinned copy is not given to others before the device has read it: torch's host allocator sees to that
    return target.copy_(host.pin_memory(), non_blocking=True)


@functools.cache
def losses() -> ModuleType:
    """The module of kernels of the losses."""
    from gemwright.ops import loss_kernels

    return loss_kernels


@functools.cache
def attention() -> ModuleType:
    """The module of kernels of attention over whole sequences."""
    from gemwright.ops import attention_kernels

    return attention_kernels
