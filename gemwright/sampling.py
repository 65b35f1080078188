"""Sampling: from rows of logits to the next tokens, for a batch of requests that each have their own controls.

Order, as in transformers, with OpenAI's controls where vLLM has them:

    logit bias            l_v + b_v
    repetition penalty    l_v / r where l_v > 0, else l_v * r, for ids of prompt and answer (arXiv 1909.05858)
    OpenAI's penalties    l_v - c_v * frequency - [c_v > 0] * presence, c_v: how often the answer has v
    banned ids, grammar   l_v to -1e30 and -inf
    temperature, top-k, top-p, min-p, then the draw

The draw is Gumbel-max: argmax(l_v / T + noise_v), noise a hash of (seed, position, token id). So a request's outcome
depends on its own seed and positions, never on its neighbours, and no generator state is carried about. Rows are
independent: several positions of one sequence, as speculation verifies them, are rows of the same request.

A 256k-wide row is not sorted: top-p and min-p look at the largest hundred logits, and at more only where those do not
hold the mass. Log-probabilities that are reported are the model's own, from before all of this.

Legend: B requests, X rows of logits, V vocabulary, C candidates, W = ceil(V / 32) words of 32 bits.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gemwright.ops.draw import derived, draw, draw_row, largest, likeliest, unpack
from gemwright.ops.gpu import upload

CANDIDATES: Final = 128
"""Largest logits looked at first."""
MAX_LOGPROBS: Final = 100
MAX_SAMPLES: Final = 128
COLDEST: Final = 1e-5
"""Lower temperatures take the likeliest token: logits divided by less would leave fp32."""
BANNED: Final = -1e30
"""Logit of a banned stop id: below every other, above what a grammar forbids, so that a finished grammar still ends."""
_EVERYTHING: Final = 2**62
"""Stands for no top-k."""


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
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit for each time the answer has it (OpenAI)."""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of every token that the answer has (OpenAI)."""
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()
    """Token ids and what is added to their logits (OpenAI); kept as pairs in order of id."""
    n: int = 1
    """Answers to one prompt, each with a seed of its own: see `sample`."""
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
        if self.stop_ids is not None:
            object.__setattr__(self, "stop_ids", frozenset(self.stop_ids))
        if isinstance(self.logit_bias, Mapping):
            object.__setattr__(self, "logit_bias", tuple(self.logit_bias.items()))
        for field, (ok, allowed) in self._rules().items():
            if not ok:
                raise ValueError(f"{field}: got {getattr(self, field)!r}, allowed is {allowed}")
        object.__setattr__(self, "logit_bias", tuple(sorted(dict(self.logit_bias).items())))
        if self.max_new_tokens is not None and self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens: got {self.min_new_tokens}, more than max_new_tokens {self.max_new_tokens}"
            )
        if self.n > 1 and self.greedy:
            raise ValueError(f"n: got {self.n}, allowed is 1 at temperature 0, where all answers are the same")

    def _rules(self) -> dict[str, tuple[bool, str]]:
        """For each field: does it hold, and what is allowed."""
        top, penalty = f"an integer 0..{MAX_LOGPROBS} or None", "a number in -2..2"
        return {
            "max_new_tokens": (
                self.max_new_tokens is None or _whole(self.max_new_tokens, 1),
                "an integer >= 1 or None",
            ),
            "min_new_tokens": (_whole(self.min_new_tokens), "an integer >= 0"),
            "temperature": (_number(self.temperature, 0, 100), "a number in 0..100"),
            "top_k": (self.top_k is None or _whole(self.top_k), "an integer >= 0 or None"),
            "top_p": (_number(self.top_p, 0, 1) and self.top_p > 0, "a number in (0, 1]"),
            "min_p": (_number(self.min_p, 0, 1), "a number in 0..1"),
            "repetition_penalty": (
                _number(self.repetition_penalty, 0, 10) and self.repetition_penalty > 0,
                "a number in (0, 10]",
            ),
            "frequency_penalty": (_number(self.frequency_penalty, -2, 2), penalty),
            "presence_penalty": (_number(self.presence_penalty, -2, 2), penalty),
            "logit_bias": (
                all(_whole(i) and _number(b, -100, 100) for i, b in dict(self.logit_bias).items())
                and len(dict(self.logit_bias)) == len(self.logit_bias),
                "token ids, each once, with numbers in -100..100",
            ),
            "n": (_whole(self.n, 1, MAX_SAMPLES), f"an integer 1..{MAX_SAMPLES}"),
            "stop": (all(isinstance(s, str) and s for s in self.stop), "strings that are not empty"),
            "stop_ids": (self.stop_ids is None or all(map(_whole, self.stop_ids)), "token ids or None"),
            "seed": (self.seed is None or _whole(self.seed, -(2**63), 2**63 - 1), "a 64-bit integer or None"),
            "logprobs": (self.logprobs is None or _whole(self.logprobs, 0, MAX_LOGPROBS), top),
            "prompt_logprobs": (self.prompt_logprobs is None or _whole(self.prompt_logprobs, 0, MAX_LOGPROBS), top),
        }

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken, without a draw."""
        return self.temperature < COLDEST

    @property
    def penalised(self) -> bool:
        """Whether the next token depends on which ids came before: the sampler then needs the row's `History`."""
        return self.repetition_penalty != 1 or self.frequency_penalty != 0 or self.presence_penalty != 0

    def check(self, vocab_size: int) -> None:
        """ValueError for an id that a vocabulary of this size does not have."""
        for field, ids in (("logit_bias", dict(self.logit_bias)), ("stop_ids", self.stop_ids or ())):
            if wrong := [i for i in ids if i >= vocab_size]:
                raise ValueError(f"{field}: got token id {min(wrong)}, allowed is 0..{vocab_size - 1}")

    def sample(self, index: int) -> SamplingParams:
        """The controls of one of the `n` answers, as a request of its own with n = 1 and a seed that is set.

        Index 0 keeps the request's seed, the others derive theirs from (seed, index).
        """
        assert 0 <= index < self.n, (index, self.n)
        seed = secrets.randbits(63) if self.seed is None else self.seed
        if index and self.seed is not None:
            seed = derived(seed, index)
        return replace(self, n=1, seed=seed)


def defaults(generation_config: Mapping[str, Any]) -> dict[str, Any]:
    """A folder's own sampling controls, as far as `generation_config.json` sets them; do_sample false means greedy."""
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    chosen = {name: generation_config[name] for name in names if generation_config.get(name) is not None}
    return chosen | ({"temperature": 0.0} if generation_config.get("do_sample") is False else {})


class History:
    """The ids that a sequence has, each once, and how often its answer has each. Grows by `push`."""

    def __init__(self, prompt: Iterable[int]) -> None:
        self._slots = {i: slot for slot, i in enumerate(dict.fromkeys(prompt))}
        self._ids = np.fromiter(self._slots, np.int64)
        self._counts = np.zeros(len(self._ids), np.float32)

    @property
    def ids(self) -> NDArray[np.int64]:
        return self._ids[: len(self._slots)]

    @property
    def counts(self) -> NDArray[np.float32]:
        """For each of `ids`: occurrences in the answer, 0 where only the prompt has it."""
        return self._counts[: len(self._slots)]

    def push(self, token: int) -> None:
        """The answer grows by one token."""
        slot = self._slots.setdefault(token, len(self._slots))
        if slot == len(self._ids):
            room = np.zeros(slot + 64, np.int64)
            self._ids, self._counts = np.append(self._ids, room), np.append(self._counts, room.astype(np.float32))
        self._ids[slot] = token
        self._counts[slot] += 1

    def with_drafts(self, drafts: Sequence[int]) -> History:
        """A copy in which the answer has the drafts too; without any, this history itself."""
        if not drafts:
            return self
        copy = History(())
        copy._slots, copy._ids, copy._counts = dict(self._slots), self._ids.copy(), self._counts.copy()
        for token in drafts:
            copy.push(token)
        return copy


class Sampler:
    """The controls of a batch as tensors, applied to all rows at once. To be made anew when the batch changes."""

    def __init__(self, params: Sequence[SamplingParams], device: torch.device | str = "cpu") -> None:
        numbers = [
            (
                max(p.temperature, COLDEST),
                p.top_p,
                p.min_p,
                p.repetition_penalty,
                p.frequency_penalty,
                p.presence_penalty,
            )
            for p in params
        ]
        integers = [(secrets.randbits(63) if p.seed is None else p.seed, p.top_k or _EVERYTHING) for p in params]
        self._numbers_6B = torch.tensor(numbers, dtype=torch.float32, device=device).T.contiguous()
        self._integers_2B = torch.tensor(integers, dtype=torch.int64, device=device).T.contiguous()
        self._params = params
        self._kinds = [
            "greedy" if p.greedy else "filtered" if p.top_k or p.top_p < 1 or p.min_p > 0 else "open" for p in params
        ]
        self._adjusted = any(p.penalised or p.logit_bias for p in params)
        self._top_ks = {
            p.top_k or _EVERYTHING for p, kind in zip(params, self._kinds, strict=True) if kind == "filtered"
        }

    def __call__(
        self,
        logits_XV: Tensor,
        position_X: Tensor,
        *,
        rows: Sequence[int] | None = None,
        histories: Sequence[History | None] | None = None,
        banned: Mapping[int, Iterable[int]] | None = None,
        allowed: tuple[Sequence[int], Tensor] | None = None,
        likeliest_X: Tensor | None = None,
    ) -> Tensor:
        """Next tokens [X].

        Args:
            logits_XV: fp32, contiguous. Changed in place where a control asks for it: what is reported of them must be
                taken before, or from a copy.
            position_X: the position that each new token will have.
            rows: for each row of logits, the request that it belongs to; None: one row a request, in order.
            histories: for each row, what came before; needed where the request is `penalised`.
            banned: for rows where stop ids may not come yet, those ids.
            allowed: rows under a grammar, and W int32 words for each: bit v % 32 of word v // 32 allows id v.
            likeliest_X: the first largest logit of each row as it comes in, where that is known.
        """
        rows = range(len(self._params)) if rows is None else rows
        device, X = logits_XV.device, len(logits_XV)
        assert len(rows) == X == len(position_X), (len(rows), X, len(position_X))
        if self._adjusted:
            self._bias(logits_XV, rows)
            self._penalise(logits_XV, rows, histories)
        for x, ids in (banned or {}).items():
            logits_XV[x, torch.tensor(sorted(ids), dtype=torch.int64, device=device)] = BANNED
        if allowed is not None:
            forbidden_YV = unpack(~allowed[1].to(device), logits_XV.shape[1])
            for x, forbidden_V in zip(allowed[0], forbidden_YV, strict=True):
                logits_XV[x].masked_fill_(forbidden_V, -torch.inf)
        kinds = [self._kinds[row] for row in rows]
        if "filtered" not in kinds and "open" not in kinds:
            known = likeliest_X is not None and not (self._adjusted or banned or allowed is not None)
            return likeliest_X if known and likeliest_X is not None else likeliest(logits_XV)
        row_X = upload(rows, device)
        tokens_X = torch.empty(X, dtype=torch.int64, device=device)
        for kind, choose in (("greedy", self._greedy), ("filtered", self._filtered), ("open", self._open)):
            if kinds.count(kind) == X:
                return choose(logits_XV, row_X, position_X)
            if where := [x for x, other in enumerate(kinds) if other == kind]:
                where_Y = upload(where, device)
                tokens_X[where_Y] = choose(logits_XV[where_Y], row_X[where_Y], position_X[where_Y])
        return tokens_X

    def _bias(self, logits_XV: Tensor, rows: Sequence[int]) -> None:
        """Add the logit biases, all rows at once."""
        V, flat = logits_XV.shape[1], logits_XV.view(-1)
        pairs = [(x * V + i, b) for x, row in enumerate(rows) for i, b in dict(self._params[row].logit_bias).items()]
        at, bias = zip(*pairs, strict=True) if pairs else ((), ())
        flat[torch.tensor(at, dtype=torch.int64, device=flat.device)] += torch.tensor(bias, device=flat.device)

    def _penalise(self, logits_XV: Tensor, rows: Sequence[int], histories: Sequence[History | None] | None) -> None:
        """The three penalties, only at the ids that a row has, all rows at once."""
        V, flat = logits_XV.shape[1], logits_XV.view(-1)
        wanted = [x for x, row in enumerate(rows) if self._params[row].penalised]
        found = [(x, history) for x in wanted if histories is not None and (history := histories[x]) is not None]
        assert len(found) == len(wanted), f"{len(wanted)} rows are penalised, {len(found)} have a history"
        if not found:
            return
        at = torch.from_numpy(np.concatenate([x * V + history.ids for x, history in found])).to(flat.device)
        count = torch.from_numpy(np.concatenate([history.counts for _, history in found])).to(flat.device)
        owner = np.repeat([rows[x] for x, _ in found], [len(history.ids) for _, history in found])
        repetition, frequency, presence = self._numbers_6B[3:, torch.from_numpy(owner).to(flat.device)]
        value = flat[at]
        value = torch.where(value > 0, value / repetition, value * repetition)
        flat[at] = value - count * frequency - (count > 0) * presence

    def _greedy(self, logits_XV: Tensor, row_X: Tensor, position_X: Tensor) -> Tensor:
        return likeliest(logits_XV)

    def _open(self, logits_XV: Tensor, row_X: Tensor, position_X: Tensor) -> Tensor:
        """A draw from the whole row."""
        scaled_XV = logits_XV / self._numbers_6B[0, row_X, None]
        return draw_row(scaled_XV, self._integers_2B[0, row_X, None], position_X[:, None])

    def _filtered(self, logits_XV: Tensor, row_X: Tensor, position_X: Tensor) -> Tensor:
        """A draw from what top-k, top-p and min-p keep."""
        seed_X1, position_X1 = self._integers_2B[0, row_X, None], position_X[:, None]
        for scaled_XC, ids_XC, more in self._attempts(logits_XV, row_X):
            tokens_X = draw(scaled_XC, ids_XC, seed_X1, position_X1)
            # asked after the draw: where it waits for a device, that has nothing left to do
            if more is None or not bool(more):
                break
        return tokens_X

    def candidates(self, logits_XV: Tensor, row_X: Tensor) -> tuple[Tensor, Tensor]:
        """Scaled logits and ids [X, C] of what top-k, top-p and min-p keep, the rest of the C at -inf."""
        return next((s, i) for s, i, more in self._attempts(logits_XV, row_X) if more is None or not bool(more))

    def _attempts(self, logits_XV: Tensor, row_X: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Candidates, each time more of them, and whether ids beyond them might be kept too; None: they might not."""
        temperature_X1, top_p_X1, min_p_X1 = self._numbers_6B[:3, row_X, None]
        top_k_X1 = self._integers_2B[1, row_X, None]
        V = logits_XV.shape[1]
        # with top-k on, the probabilities are those of the k, as in transformers; else of the whole row
        whole = any(k >= V for k in self._top_ks)
        lse_X1 = (logits_XV / temperature_X1).logsumexp(-1, keepdim=True) if whole else torch.zeros_like(temperature_X1)
        size = min(V, max([CANDIDATES, *(k for k in self._top_ks if k < V)]))
        while True:
            scaled_XC, ids_XC = largest(logits_XV, size)
            scaled_XC = scaled_XC / temperature_X1
            within_XC = torch.arange(size, device=scaled_XC.device) < top_k_X1
            kept_XC = scaled_XC.masked_fill(~within_XC, -torch.inf)
            p_XC = (kept_XC - torch.where(top_k_X1 < V, kept_XC.logsumexp(-1, keepdim=True), lse_X1)).exp()
            before_XC = p_XC.cumsum(-1) - p_XC
            keep_XC = within_XC & (before_XC < top_p_X1) & (p_XC >= min_p_X1 * p_XC[:, :1])
            keep_XC[:, 0] = True
            # the last candidate is kept, by more than top-k: what lies beyond might be, too
            last = size == V or all(k <= size for k in self._top_ks)
            more = None if last else (keep_XC[:, -1:] & (top_k_X1 > size)).any()
            yield scaled_XC.masked_fill(~keep_XC, -torch.inf), ids_XC, more
            size = min(V, size * 8)

    def logprobs(self, logits_XV: Tensor, tokens_X: Tensor, rows: Sequence[int]) -> Tensor:
        """Log-probabilities [X] of drawn tokens under the distributions they were drawn from; 0 where nothing is drawn.

        `logits_XV` are those that the call which drew them has changed.
        """
        row_X = upload(rows, logits_XV.device)
        found_X = torch.zeros(len(rows), device=logits_XV.device)
        for kind in ("filtered", "open"):
            where = [x for x, row in enumerate(rows) if self._kinds[row] == kind]
            if not where:
                continue
            scaled_XC, at_X1 = logits_XV[where], tokens_X[where, None]
            if kind == "filtered":
                scaled_XC, ids_XC = self.candidates(scaled_XC, row_X[where])
                at_X1 = (ids_XC == at_X1).int().argmax(-1, keepdim=True)
            else:
                scaled_XC = scaled_XC / self._numbers_6B[0, row_X[where], None]
            found_X[where] = scaled_XC.log_softmax(-1).gather(1, at_X1)[:, 0]
        return found_X


def _whole(value: object, low: int = 0, high: int = 2**62) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _number(value: object, low: float, high: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
