"""Elementwise arithmetic over large tensors, compiled into a pass or two where it runs on CUDA.

On a GPU a chain of elementwise operations reads and writes memory once each, and memory is what they wait for; on a CPU
callers cut their tensors so that the chain stays in the caches. The arithmetic is written once for both.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any, Concatenate, Final, ParamSpec, TypeVar

import torch
from torch import Tensor

VARIANTS: Final = 64
"""Compilations of one function: for each cap, temperature, dtype and divergence. Past them it runs as it is."""

P = ParamSpec("P")
R = TypeVar("R")


def fused(function: Callable[Concatenate[Tensor, P], R]) -> Callable[Concatenate[Tensor, P], R]:
    """A function of a tensor: compiled where that lies on CUDA, elsewhere as it is."""

    @wraps(function)
    def call(first: Tensor, /, *others: P.args, **named: P.kwargs) -> R:
        if not first.is_cuda or torch.compiler.is_compiling():  # a caller that is compiled takes it in
            return function(first, *others, **named)
        from torch._dynamo import config as dynamo

        # a float is a constant: as a symbol it cannot be lowered (torch 2.13)
        with dynamo.patch(specialize_float=True, recompile_limit=VARIANTS):
            return compiled(function)(first, *others, **named)  # type: ignore[no-any-return]

    return call


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function for tensors of any size."""
    return torch.compile(function, dynamic=True)
