"""What the tests of losses share: a head driven far past its cap, small chunks and tiles, and a meter of memory.

Legend: X tokens, D model, V vocabulary.
"""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gemwright.ops import head

X, D, V = 37, 24, 131


def inputs(dtype: torch.dtype = torch.float32, *, width: int = D) -> tuple[Tensor, Tensor]:
    """Hidden states [X, width] and a weight [V, width] that want gradients; logits reach about 100."""
    hidden, weight = 3 * torch.randn(X, width), 2 * torch.randn(V, width)
    assert float((hidden @ weight.T).abs().max()) > 60
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()


def exact(x: Tensor) -> Tensor:
    """The same values in fp64, wanting a gradient."""
    return x.detach().double().requires_grad_()


def log_probs(hidden: Tensor, weight: Tensor, cap: float | None, temperature: float = 1.0) -> Tensor:
    """Log-probabilities [X, V] by their definition, in the dtype of the inputs."""
    logits = hidden @ weight.T
    return ((logits if cap is None else cap * torch.tanh(logits / cap)) / temperature).log_softmax(-1)


def cut(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Chunks of at most `rows` tokens (twice as many where bf16 products are held) and tiles of 50 ids, at V ids."""
    monkeypatch.setitem(head.CHUNK_FLOOR, "cpu", 4 * V * rows)
    monkeypatch.setattr(head, "CHUNK_TOKENS", 0)
    monkeypatch.setattr(head, "CHUNK_SHARE", 10**9)
    monkeypatch.setitem(head.TILE, "cpu", 50)
    monkeypatch.setattr(head, "TURNED", 50)


class Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the memory that is made inside: bytes of the largest piece, bytes alive, now and at the peak."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.largest = self.now = self.peak = 0
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage(), made=False)
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage(), made=True)
        return out

    def _count(self, storage: torch.UntypedStorage, *, made: bool) -> None:
        key = storage._cdata
        if key not in self._alive:
            size = self._alive[key] = storage.nbytes() if made else 0
            self.largest = max(self.largest, size)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._alive.pop(key)
