"""Soft-capped attention: the definition, who sees whom, and the choice of a backend.

    scores = softcap(scale * q . k),  masked, softmax over the visible keys,  out = weights . v        (in that order)

`reference` is that definition in fp32. Every other backend is tested against it and declares here what it can do; a
backend that cannot do what a model needs is refused, never quietly replaced (dropped caps are how Gemma 2 breaks).

Masks come from positions. A query with position -1 is padding: it sees nothing and its output is 0. A key with a
negative position or with `EMPTY` (a free cache slot) is never seen.

Legend: B rows, T queries, S keys, N query heads, K key/value heads, G = N / K, H head dim.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, TypeVar

import torch
from torch import Tensor

from gemwright.ops import gpu, native

EMPTY: Final = 2**30
"""Position of an empty cache slot: in the future of every query."""
PADDING: Final = -1
"""Position of a padding token."""

log = logging.getLogger(__name__)
T = TypeVar("T")


def softcap(x: Tensor, cap: float | None) -> Tensor:
    """cap * tanh(x / cap), or x itself without a cap (arXiv 2408.00118, section 2)."""
    if cap is None:
        return x
    if x.dtype == torch.float32 and native.serves(x):
        return native.softcap(x, cap)
    if x.dtype == torch.float32 and gpu.serves(x):
        return gpu.kernels().capped(x, cap)  # type: ignore[no-any-return]
    return cap * torch.tanh(x / cap)


@dataclass(frozen=True, eq=False)
class Visibility:
    """Who sees whom: key s is visible to query t iff same document and 0 <= q_pos - k_pos < window.

    Positions and documents are integer tensors [B, T] and [B, S]; `window` in positions, None for a global layer.
    Positions count inside a document, so a window never needs the document to be applied.
    """

    q_pos_BT: Tensor
    k_pos_BS: Tensor
    q_doc_BT: Tensor | None = None
    k_doc_BS: Tensor | None = None
    window: int | None = None
    _memo: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    def memo(self, key: Hashable, make: Callable[[], T]) -> T:
        """What a backend derives from the positions alone, made by the first layer and shared by the others."""
        if key not in self._memo:
            self._memo[key] = make()
        return self._memo[key]  # type: ignore[no-any-return]

    def mask(self, queries: slice = slice(None), keys: slice = slice(None)) -> Tensor:
        """The dense boolean mask [B, T, S] of a block of queries and keys."""
        q_BT1, k_B1S = self.q_pos_BT[:, queries, None], self.k_pos_BS[:, None, keys]
        seen_BTS = (k_B1S <= q_BT1) & (k_B1S >= 0)
        if self.window is not None:
            seen_BTS &= q_BT1 - k_B1S < self.window
        if self.q_doc_BT is not None and self.k_doc_BS is not None:
            seen_BTS &= self.q_doc_BT[:, queries, None] == self.k_doc_BS[:, None, keys]
        return seen_BTS


def reference(
    q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, see: Visibility, *, scale: float, cap: float | None
) -> Tensor:
    """The definition, in fp32 with the whole score matrix in memory; differentiable, on any device."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.float().reshape(B, T, K, N // K, H)
    scores = torch.einsum("btkgh,bskh->bkgts", q_BTKGH, k_BSKH.float()) * scale
    seen = see.mask()[:, None, None]
    scores = softcap(scores, cap).masked_fill(~seen, -torch.inf)
    # a query that sees nothing has a row of -inf: its weights are 0, not NaN
    top = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
    weights = torch.exp(scores - top)
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    out_BTKGH = torch.einsum("bkgts,bskh->btkgh", weights, v_BSKH.float())
    return out_BTKGH.reshape(B, T, N, H).to(q_BTNH.dtype)


class Attend(Protocol):
    """What a backend computes: q [B, T, N, H], k and v [B, S, K, H] -> [B, T, N, H] in the dtype of q."""

    def __call__(
        self, q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, see: Visibility, *, scale: float, cap: float | None
    ) -> Tensor: ...


@dataclass(frozen=True)
class Backend:
    """What an attention backend can do. `load` imports it lazily."""

    load: Callable[[], Attend]
    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    backward: bool
    caps: bool = True
    windows: bool = True


def _blocked() -> Attend:
    from gemwright.ops.attention_blocked import blocked

    return blocked


def _flex() -> Attend:
    from gemwright.ops.attention_flex import flex

    return flex


def _triton() -> Attend:
    if not gpu.available():
        raise ImportError(
            "attention: the triton backend needs the package triton, part of CUDA builds of torch on Linux"
        )
    from gemwright.ops.attention_triton import attend

    return attend


_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
BACKENDS: Final[dict[str, Backend]] = {
    "reference": Backend(lambda: reference, ("cpu", "cuda", "mps"), _FLOATS, backward=True),
    "blocked": Backend(_blocked, ("cpu", "cuda"), _FLOATS, backward=True),
    "flex": Backend(_flex, ("cuda", "cpu"), _FLOATS, backward=True),
    "triton": Backend(_triton, ("cuda",), _FLOATS, backward=True),
}
PHASES: Final = ("train", "prefill", "decode")

# What `auto` takes, per device and phase. FlexAttention has no backward on CPU (torch 2.13), and on CUDA takes two to
# three times as long as kernels of our own; a decode step is one plain block of the blocked backend, with nothing to
# compile. MPS runs the definition.
AUTO: Final[dict[tuple[str, str], str]] = {
    ("cpu", "train"): "blocked",
    ("cpu", "prefill"): "blocked",
    ("cpu", "decode"): "blocked",
    ("cuda", "train"): "triton",
    ("cuda", "prefill"): "triton",
    ("cuda", "decode"): "blocked",
    ("mps", "train"): "reference",
    ("mps", "prefill"): "reference",
    ("mps", "decode"): "reference",
}


OTHERS: Final[dict[tuple[str, str], str]] = {("cuda", "train"): "flex", ("cuda", "prefill"): "flex"}
"""The same for all but bf16: the triton backend is fast and was tried on GPUs in bf16."""


def resolve(name: str, phase: str, *, device: str, dtype: torch.dtype, cap: float | None, window: int | None) -> str:
    """Name of the backend for one phase; `auto` chooses, an explicit name that cannot run raises ValueError."""
    assert phase in PHASES, phase
    chosen = name
    if name == "auto":
        chosen = AUTO.get((device, phase), "reference")
        chosen = chosen if dtype == torch.bfloat16 else OTHERS.get((device, phase), chosen)
    if chosen not in BACKENDS:
        raise ValueError(f"attention: got {name!r}, allowed are auto, {', '.join(BACKENDS)}")
    backend = BACKENDS[chosen]
    lacks = {
        f"run on {device}": device not in backend.devices,
        f"compute in {dtype}": dtype not in backend.dtypes,
        "apply the soft-cap": cap is not None and not backend.caps,
        "apply the window": window is not None and not backend.windows,
        "run backward": phase == "train" and not (backend.backward and (chosen, device) != ("flex", "cpu")),
    }
    missing = [what for what, lack in lacks.items() if lack]
    if missing:
        raise ValueError(f"attention: got {chosen!r} for {phase}, which cannot {' or '.join(missing)}")
    return chosen


@dataclass(frozen=True)
class Attention:
    """The chosen backend of each phase: `train` has no cache, `prefill` many queries, `decode` one."""

    train: str = "reference"
    prefill: str = "reference"
    decode: str = "reference"

    @classmethod
    def resolve(
        cls, name: str = "auto", *, device: str, dtype: torch.dtype, cap: float | None, window: int | None
    ) -> Attention:
        """Resolve every phase at once and log the choice in one line."""
        chosen = cls(*(resolve(name, p, device=device, dtype=dtype, cap=cap, window=window) for p in PHASES))
        log.info(
            "attention on %s: train %s, prefill %s, decode %s", device, chosen.train, chosen.prefill, chosen.decode
        )
        return chosen

    def backend(self, phase: str) -> Attend:
        """The function to call in a phase."""
        assert phase in PHASES, phase
        return BACKENDS[getattr(self, phase)].load()
