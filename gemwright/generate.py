"""The plain loop: one batch of prompts, read in chunks, then a token a step. The oracle of faster engines.

Rows of different length are padded on the right with position -1, so a row's result does not depend on its company. The
head, 256k wide, meets only the rows that are wanted: the last position of each prompt, and prompt positions whose
log-probabilities were asked for.

Legend: B rows, T tokens of a chunk, X tokens, D model, V vocabulary, C candidates reported.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor

from gemwright.cache import KVCache
from gemwright.model import Gemma2
from gemwright.ops.attention import PADDING
from gemwright.ops.head import chunks
from gemwright.sampling import History, Sampler, SamplingParams

CHUNK: Final = 512
"""Prompt tokens read in one forward pass."""
DEFAULT_NEW_TOKENS: Final = 256

Finish = Literal["stop", "length"]


class ContextError(ValueError):
    """Prompt and answer do not fit the context; the message has the counts."""


@dataclass(frozen=True)
class TokenLogprob:
    """A token's log-probability under the model (capped logits, no temperature), and the likeliest tokens there."""

    id: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class Token:
    """One new token of one row. `finish` is set on a row's last; a stop id is reported and is not part of the text."""

    row: int
    id: int
    finish: Finish | None
    logprob: TokenLogprob | None


class Generation:
    """Generates for a batch of prompts; iterate over it for the tokens of each step. Ended rows stay as padding.

    Raises ValueError (ids, n) or ContextError before anything is computed.
    """

    def __init__(
        self,
        model: Gemma2,
        prompts: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
        *,
        stop_ids: frozenset[int] = frozenset(),
        chunk: int = CHUNK,
    ) -> None:
        assert len(prompts) == len(params), (len(prompts), len(params))
        for p in params:
            p.check(model.config.vocab_size)
            if p.n > 1:
                raise ValueError(f"n: got {p.n}, allowed is 1 in the plain loop, which gives each prompt one row")
        self.model, self.prompts, self.params = model, prompts, params
        self.budgets = [budget(model, prompt, p.max_new_tokens) for prompt, p in zip(prompts, params, strict=True)]
        self.stop_ids = [stop_ids if p.stop_ids is None else p.stop_ids for p in params]
        self.device = model.model.embed_tokens.weight.device
        self.chunk = min(chunk, max(map(len, prompts)))
        self.done = [False] * len(prompts)
        self.prompt_logprobs: list[list[TokenLogprob] | None] = [
            [] if p.prompt_logprobs is not None else None for p in params
        ]

    def stop(self, row: int) -> None:
        """End a row before the next step."""
        self.done[row] = True

    @torch.inference_mode()
    def __iter__(self) -> Iterator[list[Token]]:
        model, B = self.model, len(self.prompts)
        lengths_B = torch.tensor([len(prompt) for prompt in self.prompts], device=self.device)
        longest = max(len(p) + n for p, n in zip(self.prompts, self.budgets, strict=True))
        dtype = model.model.embed_tokens.weight.dtype
        cache = KVCache(model.config, B, longest, chunk=self.chunk, dtype=dtype, device=self.device)
        sampler = Sampler(self.params, self.device)
        histories = [
            History(prompt) if p.penalised else None for prompt, p in zip(self.prompts, self.params, strict=True)
        ]
        reported = any(p.logprobs is not None for p in self.params)
        hidden_BD = self._read(cache)
        for step in range(max(self.budgets)):
            logits_BV = model.logits(hidden_BD)
            raw_BV = logits_BV.clone() if reported else logits_BV
            banned = {row: self.stop_ids[row] for row, p in enumerate(self.params) if step < p.min_new_tokens}
            tokens_B = sampler(logits_BV, lengths_B + step, histories=histories, banned=banned)
            yield self._report(step, tokens_B, raw_BV)
            if all(self.done):
                return
            for history, token in zip(histories, tokens_B.tolist(), strict=True):
                if history is not None:
                    history.push(token)
            ended_B = torch.tensor(self.done, device=self.device)
            pos_B = torch.where(ended_B, PADDING, lengths_B + step)
            hidden_BD = model(tokens_B[:, None], pos_B[:, None], cache=cache)[:, 0]

    def _read(self, cache: KVCache) -> Tensor:
        """Read the prompts chunk by chunk; hidden states [B, D] of each one's last token."""
        lengths = [len(prompt) for prompt in self.prompts]
        last: dict[int, Tensor] = {}
        for start in range(0, max(lengths), self.chunk):
            width = min(self.chunk, max(lengths) - start)
            tokens_BT, pos_BT = pad([p[start : start + width] for p in self.prompts], start, width, self.device)
            hidden_BTD = self.model(tokens_BT, pos_BT, cache=cache)
            for row, length in enumerate(lengths):
                if start < length <= start + width:
                    last[row] = hidden_BTD[row, length - 1 - start]
                self._score_prompt(row, start, hidden_BTD[row])
        return torch.stack([last[row] for row in range(len(lengths))])

    def _score_prompt(self, row: int, start: int, hidden_TD: Tensor) -> None:
        """Log-probabilities of the prompt tokens that follow the chunk's positions."""
        found, top = self.prompt_logprobs[row], self.params[row].prompt_logprobs
        targets = self.prompts[row][start + 1 : start + 1 + len(hidden_TD)]
        if found is not None and top is not None and targets:
            found += token_logprobs(self.model, hidden_TD[: len(targets)], targets, top)

    def _report(self, step: int, tokens_B: Tensor, logits_BV: Tensor) -> list[Token]:
        """The step's tokens of the rows still running; marks the rows that end here."""
        events = []
        for row, token in enumerate(tokens_B.tolist()):
            if self.done[row]:
                continue
            finish: Finish | None = None
            if token in self.stop_ids[row]:
                finish = "stop"
            elif step + 1 == self.budgets[row]:
                finish = "length"
            self.done[row] = finish is not None
            top = self.params[row].logprobs
            logprob = None if top is None else top_logprobs(logits_BV[row : row + 1], [token], top)[0]
            events.append(Token(row, token, finish, logprob))
        return events


def budget(model: Gemma2, prompt: Sequence[int], max_new_tokens: int | None) -> int:
    """How many tokens may follow a prompt; raises where its ids or the counts do not fit. 0 asks for none."""
    context, vocab = model.config.max_position_embeddings, model.config.vocab_size
    if not prompt:
        raise ValueError("prompt: got no tokens, allowed is at least one (a BOS, for instance)")
    if wrong := [i for i in prompt if not 0 <= i < vocab]:
        raise ValueError(f"prompt: got token id {wrong[0]}, allowed is 0..{vocab - 1}")
    left = context - len(prompt)
    if left < (1 if max_new_tokens is None else max_new_tokens):
        wanted = "" if max_new_tokens is None else f" and max_new_tokens {max_new_tokens}"
        raise ContextError(f"prompt of {len(prompt)} tokens{wanted}: the context holds {context}; nothing was cut")
    return min(DEFAULT_NEW_TOKENS, left) if max_new_tokens is None else max_new_tokens


def pad(rows: Sequence[Sequence[int]], start: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens and positions [B, width] of rows that begin at position `start`, padded on the right."""
    tokens_BT = torch.zeros(len(rows), width, dtype=torch.int64)
    pos_BT = torch.full((len(rows), width), PADDING)
    for b, row in enumerate(rows):
        tokens_BT[b, : len(row)] = torch.tensor(row, dtype=torch.int64)
        pos_BT[b, : len(row)] = torch.arange(start, start + len(row))
    return tokens_BT.to(device), pos_BT.to(device)


def token_logprobs(model: Gemma2, hidden_XD: Tensor, targets: Sequence[int], top: int = 0) -> list[TokenLogprob]:
    """Log-probabilities of `targets`, each predicted from its hidden state; logits in chunks."""
    found: list[TokenLogprob] = []
    for part in chunks(len(targets), model.config.vocab_size):
        found += top_logprobs(model.logits(hidden_XD[part]), targets[part], top)
    return found


def top_logprobs(logits_XV: Tensor, targets: Sequence[int], top: int) -> list[TokenLogprob]:
    """Log-probabilities of `targets` and of the `top` likeliest tokens of each row of logits."""
    lse_X1 = logits_XV.logsumexp(-1, keepdim=True)
    chosen_X1 = logits_XV.gather(1, torch.tensor(targets, device=logits_XV.device)[:, None]) - lse_X1
    best = logits_XV.topk(min(top, logits_XV.shape[1]))
    values, ids = (best.values - lse_X1).tolist(), best.indices.tolist()
    rows = zip(targets, chosen_X1[:, 0].tolist(), ids, values, strict=True)
    return [TokenLogprob(t, lp, list(zip(i, v, strict=True))) for t, lp, i, v in rows]


@torch.inference_mode()
def loglikelihood(
    model: Gemma2, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], *, batch: int = 8
) -> list[tuple[float, bool]]:
    """For each (context, continuation) in ids: sum of the continuation's log-probabilities, and is it the greedy one.

    Rows of like length share a batch of `batch`. Raises ValueError for an empty side, ContextError past the context.
    """
    for context, continuation in pairs:
        if not context or not continuation:
            raise ValueError(
                f"loglikelihood: {len(context)} and {len(continuation)} tokens, allowed is at least one each"
            )
        # the last token of a continuation is predicted and never read
        budget(model, [*context, *continuation[:-1]], 0)
    order = sorted(range(len(pairs)), key=lambda i: sum(map(len, pairs[i])))
    device = model.model.embed_tokens.weight.device
    results: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        rows = [[*pairs[i][0], *pairs[i][1]][:-1] for i in part]
        hidden_BTD = model(*pad(rows, 0, max(map(len, rows)), device))
        for b, i in enumerate(part):
            context, continuation = pairs[i]
            first = len(context) - 1
            scores = token_logprobs(model, hidden_BTD[b, first : first + len(continuation)], continuation, top=1)
            results[i] = sum(s.logprob for s in scores), all(s.top[0][0] == s.id for s in scores)
    return results
