"""Request and TokenEvent: what goes into the engine and what comes out, tokens on both sides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from gemwright.generate import TokenLogprob
from gemwright.sampling import SamplingParams

Finish = Literal["stop", "length", "cancelled", "error"]
Pooling = Literal["mean", "last"]


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt in token ids, and what is wanted of it: samples, a score of its own tail, or an embedding."""

    tokens: Sequence[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    adapter: str | None = None
    """Name of a loaded adapter; None: the model itself."""
    constraint: Any = None
    """What the answer must look like: an `engine.structured.Constraint`."""
    score_from: int | None = None
    """Generate nothing; report the log-probabilities of tokens[score_from:] instead (score_from >= 1)."""
    embed: Pooling | None = None
    """Generate nothing; report the final hidden states, their mean over the tokens or the last one."""
    policy_logprobs: bool = False
    """Report each token's log-probability under the distribution it was drawn from: what a policy gradient needs."""
    after: str | None = None
    """Id of a request that begins alike: where that is in flight, this one waits until it has read its prompt, and
    finds its keys."""
    id: str | None = None
    """Chosen by the engine where it is None; must be unique among those in flight."""


@dataclass(frozen=True, kw_only=True)
class TokenEvent:
    """One new token of one sample, or the end of it. The last event of a sample has `finish`."""

    id: str
    index: int = 0
    """Which of the request's n samples."""
    token: int | None = None
    """A stop id is reported with finish "stop" and is not part of the answer; None: only the end is reported."""
    finish: Finish | None = None
    logprob: TokenLogprob | None = None
    policy_logprob: float | None = None
    """Of the token under the distribution it was drawn from (penalties, temperature and filters applied)."""
    prompt_logprobs: list[TokenLogprob] | None = None
    """On sample 0's first event: of the prompt from its second token on, or of tokens[score_from:]."""
    embedding_D: Tensor | None = None
    cached_tokens: int = 0
    """On a sample's first event: prompt tokens whose keys were found in the prefix cache."""
    error: str | None = None


@dataclass
class Stats:
    """Counters since the engine was made, and the gauges of this moment."""

    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    preemptions: int = 0
    cancelled: int = 0
    errors: int = 0
    waiting: int = 0
    running: int = 0
    pages_used: int = 0
    pages_total: int = 0
