"""Replies: samples while they grow, their log-probabilities in OpenAI's two shapes, and counts.

A token's text is that of its bytes; where they are no text by themselves (half a character) it is written
`bytes:\\xe2\\x82`, as OpenAI does, so that two such tokens never look alike.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from gemwright.engine.request import TokenEvent
from gemwright.generate import TokenLogprob
from gemwright.lm import LM, Answer
from gemwright.sampling import SamplingParams
from gemwright.serve.errors import internal, unavailable
from gemwright.serve.logs import request_id
from gemwright.serve.worker import Job
from gemwright.tokenizer import TextStream, Tokenizer


class Texts:
    """Tokens as text and as bytes, remembered: a log-probability names up to a hundred."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, tuple[str, bytes]] = {}

    def __call__(self, i: int) -> tuple[str, bytes]:
        if i not in self._known:
            raw = self._tokenizer.token_bytes(i)
            try:
                text = raw.decode()
            except UnicodeDecodeError:
                text = "bytes:" + "".join(f"\\x{b:02x}" for b in raw)
            self._known[i] = text, raw
        return self._known[i]


class Sample:
    """One choice of an answer: its text, its log-probabilities, its end."""

    def __init__(self, lm: LM, params: SamplingParams, prompt_tokens: int) -> None:
        self.answer = Answer(lm.tokenizer, params, prompt_tokens)
        self.scores: list[TokenLogprob] = []
        """Of every token drawn, the one that ended the answer with them; `taken` of them have been sent."""
        self.taken = 0
        self.text = ""
        self.done = False

    def push(self, event: TokenEvent) -> str:
        """Take an event in; the text that is now certain. ApiError: the engine or the server gave up on it."""
        if event.finish == "error":
            raise internal(request_id.get() or "none")
        if event.finish == "cancelled":
            raise unavailable("draining")
        if self.done:
            return ""
        piece = self.answer.push(event)
        if event.logprob is not None:
            self.scores.append(event.logprob)
        self.text += piece
        self.done = event.finish is not None or self.answer.stopped
        return piece

    def take(self) -> list[TokenLogprob]:
        """The log-probabilities since the last call."""
        new, self.taken = self.scores[self.taken :], len(self.scores)
        return new

    @property
    def finish(self) -> str | None:
        return self.answer.finish if self.done else None


Samples = Mapping[tuple[int, int], Sample]
"""By the number of the request in its job, and the sample's index."""


async def follow(job: Job, samples: Samples) -> AsyncIterator[dict[tuple[int, int], str]]:
    """New text by sample, for those that have changed, until all are done."""
    while not all(sample.done for sample in samples.values()) and (batch := await job.read()):
        pieces: dict[tuple[int, int], str] = {}
        for number, event in batch:
            key = number, event.index
            if not samples[key].done:
                pieces[key] = pieces.get(key, "") + samples[key].push(event)
                if samples[key].done and event.finish is None:  # a stop string, which the engine does not know
                    job.stop(key)
        yield pieces


def usage(samples: Samples) -> dict[str, Any]:
    """Tokens read and written; each prompt counts once, whatever its n."""
    firsts = [sample.answer for (_, index), sample in samples.items() if index == 0]
    prompt = sum(answer.prompt_tokens for answer in firsts)
    completion = sum(len(sample.answer.tokens) for sample in samples.values())
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(answer.cached_tokens for answer in firsts)},
    }


def chat_logprobs(scores: Sequence[TokenLogprob], texts: Texts) -> dict[str, Any]:
    """The shape of chat completions."""

    def entry(i: int, logprob: float) -> dict[str, Any]:
        text, raw = texts(i)
        return {"token": text, "logprob": logprob, "bytes": list(raw)}

    content = [{**entry(s.id, s.logprob), "top_logprobs": [entry(i, logprob) for i, logprob in s.top]} for s in scores]
    return {"content": content, "refusal": None}


class LegacyLogprobs:
    """The shape of completions, which counts characters of the text before each token."""

    def __init__(self, tokenizer: Tokenizer, texts: Texts) -> None:
        self._texts, self._tokenizer = texts, tokenizer
        self._stream = TextStream(tokenizer)
        self._offset = 0

    def __call__(self, scores: Sequence[TokenLogprob], *, first: int | None = None) -> dict[str, Any]:
        """The next tokens; `first` is a prompt's first token, which nothing predicts."""
        ids = [*([] if first is None else [first]), *(score.id for score in scores)]
        nothing = [None] * (len(ids) - len(scores))
        return {
            "tokens": [self._texts(i)[0] for i in ids],
            "token_logprobs": [*nothing, *(score.logprob for score in scores)],
            "top_logprobs": [*nothing, *(self._top(score) for score in scores)],
            "text_offset": [self._count(i) for i in ids],
        }

    def _top(self, score: TokenLogprob) -> dict[str, float]:
        """By text; of two tokens with the same one the likelier stays."""
        found: dict[str, float] = {}
        for i, logprob in [*score.top, (score.id, score.logprob)]:
            found.setdefault(self._texts(i)[0], logprob)
        return found

    def _count(self, i: int) -> int:
        offset = self._offset
        self._offset += len(self._stream.push([i] if i < self._tokenizer.vocab_size else []))
        return offset
