"""Sampling: from a row of logits to the next token, for a batch of requests that each have their own controls.

Order, as in transformers: repetition penalty, banned stop ids, temperature, top-k, top-p, min-p, then the draw.

The draw is Gumbel-max: argmax(logit / T + noise), noise a hash of (seed, position, token id). So a request's outcome
depends on its own seed and positions, never on its neighbours, and no generator state is carried about.

A 256k-wide row is not sorted: top-p and min-p look at the largest few hundred logits, and at more only where those do
not hold the mass. Log-probabilities that are reported are the model's own, before penalty and temperature.

Legend: B rows, V vocabulary, C candidates.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

CANDIDATES: Final = 256
"""Largest logits looked at first."""
MAX_LOGPROBS: Final = 100


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """The controls of one request. ValueError names the field, what came and what is allowed."""

    max_new_tokens: int | None = None
    """Most tokens to generate; None: 256, or what is left of the context."""
    min_new_tokens: int = 0
    """No stop id ends the answer before this many tokens."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int | None = None
    """Keep the k likeliest tokens; None or 0: all."""
    top_p: float = 1.0
    """Keep the smallest set of likeliest tokens with at least this probability."""
    min_p: float = 0.0
    """Keep tokens with at least this share of the likeliest token's probability."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in prompt and answer (arXiv 1909.05858)."""
    stop: tuple[str, ...] = ()
    """Strings that end the answer; they are not part of it."""
    stop_ids: frozenset[int] | None = None
    """Token ids that end the answer; None: the model's own."""
    seed: int | None = None
    """Noise is a function of (seed, position); None: a fresh seed."""
    logprobs: int | None = None
    """Report each new token's log-probability and those of the top n; 0: the token's alone."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens."""

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        object.__setattr__(self, "stop", tuple(self.stop))
        top = f"an integer 0..{MAX_LOGPROBS} or None"
        rules: dict[str, tuple[bool, str]] = {
            "max_new_tokens": (
                self.max_new_tokens is None or _whole(self.max_new_tokens, 1),
                "an integer >= 1 or None",
            ),
            "min_new_tokens": (_whole(self.min_new_tokens), "an integer >= 0"),
            "temperature": (_number(self.temperature) and 0 <= self.temperature <= 100, "a number in 0..100"),
            "top_k": (self.top_k is None or _whole(self.top_k), "an integer >= 0 or None"),
            "top_p": (_number(self.top_p) and 0 < self.top_p <= 1, "a number in (0, 1]"),
            "min_p": (_number(self.min_p) and 0 <= self.min_p <= 1, "a number in 0..1"),
            "repetition_penalty": (
                _number(self.repetition_penalty) and 0 < self.repetition_penalty <= 10,
                "a number in (0, 10]",
            ),
            "stop": (all(isinstance(s, str) and s for s in self.stop), "strings that are not empty"),
            "seed": (self.seed is None or _whole(self.seed, -(2**63), 2**63 - 1), "a 64-bit integer or None"),
            "logprobs": (self.logprobs is None or _whole(self.logprobs, 0, MAX_LOGPROBS), top),
            "prompt_logprobs": (self.prompt_logprobs is None or _whole(self.prompt_logprobs, 0, MAX_LOGPROBS), top),
        }
        for field, (ok, allowed) in rules.items():
            if not ok:
                raise ValueError(f"{field}: got {getattr(self, field)!r}, allowed is {allowed}")
        if self.max_new_tokens is not None and self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens: got {self.min_new_tokens}, more than max_new_tokens {self.max_new_tokens}"
            )


def defaults(generation_config: Mapping[str, Any]) -> dict[str, Any]:
    """A folder's own sampling controls, as far as `generation_config.json` sets them; do_sample false means greedy."""
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    chosen = {name: generation_config[name] for name in names if generation_config.get(name) is not None}
    return chosen | ({"temperature": 0.0} if generation_config.get("do_sample") is False else {})


class Sampler:
    """The controls of a batch as tensors, applied to all rows at once."""

    def __init__(self, params: Sequence[SamplingParams], device: torch.device | str = "cpu") -> None:
        def column(values: list[Any], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)[:, None]

        everything = 2**62
        self.temperature_B1 = column([p.temperature for p in params], torch.float32)
        self.top_k_B1 = column([p.top_k or everything for p in params], torch.int64)
        self.top_p_B1 = column([p.top_p for p in params], torch.float32)
        self.min_p_B1 = column([p.min_p for p in params], torch.float32)
        self.penalty_B1 = column([p.repetition_penalty for p in params], torch.float32)
        seeds = [secrets.randbits(63) if p.seed is None else p.seed for p in params]
        self.seed_B1 = column(seeds, torch.int64)
        self.penalised = any(p.repetition_penalty != 1 for p in params)
        filtered = [bool(p.top_k) or p.top_p < 1 or p.min_p > 0 for p in params]
        drawn = [p.temperature > 0 for p in params]
        self.filtered = [i for i, on in enumerate(filtered) if on and drawn[i]]
        self.open = [i for i, on in enumerate(filtered) if not on and drawn[i]]

    def __call__(
        self, logits_BV: Tensor, position_B: Tensor, *, seen_BV: Tensor | None = None, banned_BV: Tensor | None = None
    ) -> Tensor:
        """Next tokens [B]. `seen_BV` marks ids of prompt and answer so far, `banned_BV` ids that may not come now."""
        if self.penalised and seen_BV is not None:
            penalised_BV = torch.where(logits_BV > 0, logits_BV / self.penalty_B1, logits_BV * self.penalty_B1)
            logits_BV = torch.where(seen_BV, penalised_BV, logits_BV)
        if banned_BV is not None:
            logits_BV = logits_BV.masked_fill(banned_BV, -torch.inf)
        tokens_B = logits_BV.argmax(-1)
        if self.open:
            scaled = logits_BV[self.open] / self.temperature_B1[self.open]
            ids = torch.arange(scaled.shape[1], device=scaled.device).expand_as(scaled)
            tokens_B[self.open] = self._draw(scaled, ids, self.open, position_B)
        if self.filtered:
            scaled, ids = self._candidates(logits_BV[self.filtered] / self.temperature_B1[self.filtered])
            tokens_B[self.filtered] = self._draw(scaled, ids, self.filtered, position_B)
        return tokens_B

    def _candidates(self, scaled_BV: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and ids [B, C] of what top-k, top-p and min-p keep, the rest of the C at -inf."""
        rows, V = self.filtered, scaled_BV.shape[1]
        top_k_B1, top_p_B1, min_p_B1 = self.top_k_B1[rows], self.top_p_B1[rows], self.min_p_B1[rows]
        size = min(V, CANDIDATES)
        while True:
            scaled_BC, ids_BC = scaled_BV.topk(size)
            rank_C = torch.arange(size, device=scaled_BV.device)
            within_BC = rank_C < top_k_B1
            # with top-k on, the probabilities are those of the k, as in transformers; else of the whole row
            kept_BC = scaled_BC.masked_fill(~within_BC, -torch.inf)
            lse_B1 = torch.where(
                top_k_B1 <= size, kept_BC.logsumexp(-1, keepdim=True), scaled_BV.logsumexp(-1, keepdim=True)
            )
            p_BC = (kept_BC - lse_B1).exp()
            before_BC = p_BC.cumsum(-1) - p_BC
            keep_BC = within_BC & (before_BC < top_p_B1) & (p_BC >= min_p_B1 * p_BC[:, :1])
            keep_BC[:, 0] = True
            # the last candidate is kept: what lies beyond might be, too
            if size == V or not bool(keep_BC[:, -1].any()):
                return scaled_BC.masked_fill(~keep_BC, -torch.inf), ids_BC
            size = min(V, size * 8)

    def _draw(self, scaled_BC: Tensor, ids_BC: Tensor, rows: list[int], position_B: Tensor) -> Tensor:
        noise_BC = gumbel(self.seed_B1[rows], position_B[rows, None], ids_BC)
        return ids_BC.gather(1, (scaled_BC.double() + noise_BC).argmax(-1, keepdim=True))[:, 0]


def gumbel(seed: Tensor, position: Tensor, ids: Tensor) -> Tensor:
    """Standard Gumbel noise in fp64, a hash of (seed, position, id); the int64 tensors broadcast."""
    bits = _mix(_mix(_mix(seed) + position) + ids)
    uniform = ((bits >> 12 & (2**52 - 1)).double() + 0.5) * 2.0**-52
    return -torch.log(-torch.log(uniform))


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64 (Steele, Lea and Flood 2014); multiplication wraps, shifts are made logical."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ (x >> 30 & (2**34 - 1))) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> 27 & (2**37 - 1))) * _signed(0x94D049BB133111EB)
    return x ^ (x >> 31 & (2**33 - 1))


def _signed(x: int) -> int:
    return x - 2**64 if x >= 2**63 else x


def _whole(value: object, low: int = 0, high: int = 2**62) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
