"""POST /v1/completions: texts or token ids continued, with the prompt's own log-probabilities where they are asked for.

What lm-evaluation-harness relies on: with `echo` and `logprobs` the entries are one for each prompt token (the first
without a value, since nothing predicts it) and one for each token drawn, a stop token among them.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any, Final

from gemwright.engine.request import Request
from gemwright.sampling import SamplingParams
from gemwright.serve.constraints import compiled, constraint
from gemwright.serve.errors import invalid
from gemwright.serve.replies import LegacyLogprobs, Sample, follow, usage
from gemwright.serve.schema import CompletionBody
from gemwright.serve.service import Service
from gemwright.serve.stream import DONE, data
from gemwright.serve.worker import Job


class Completions:
    """One request: its prompts, its samples, and the answer in the making."""

    field: Final = "prompt"
    done: Final = DONE
    frame = staticmethod(data)

    def __init__(self, service: Service, body: CompletionBody, ident: str) -> None:
        self.service, self.body = service, body
        self.adapter = service.adapter(body.model)
        self.params: SamplingParams = service.params(body)
        self.head = {
            "id": f"cmpl-{ident}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": body.model or service.settings.name,
        }

    async def prepare(self) -> list[Request]:
        """The engine's requests. ApiError 400."""
        wanted = constraint(self.body)
        await compiled(self.service.lm.grammars, wanted)
        prompt = self.body.prompt
        one = isinstance(prompt, str) or isinstance(prompt[0], int)
        self.prompts: list[Any] = [prompt] if one else list(prompt)
        self.ids = await self.service.ids(self.prompts, field="prompt")
        scored = self.body.max_tokens == 0
        requests = [
            Request(
                tokens=ids,
                params=self.params,
                adapter=self.adapter,
                constraint=None if scored else wanted,
                score_from=1 if scored else None,
            )
            for ids in self.ids
        ]
        if scored and (short := [n for n, ids in enumerate(self.ids) if len(ids) < 2]):
            raise invalid(ValueError(f"prompt[{short[0]}]: has {len(self.ids[short[0]])} tokens; to score: at least 2"))
        self.samples = {
            (number, index): Sample(self.service.lm, self.params, len(ids))
            for number, ids in enumerate(self.ids)
            for index in range(self.params.n)
        }
        self.legacy = {key: LegacyLogprobs(self.service.lm.tokenizer, self.service.texts) for key in self.samples}
        self.echoes = dict.fromkeys(self.samples, self.body.echo)
        """Samples whose prompt is still to be echoed."""
        return requests

    def choice(self, key: tuple[int, int], text: str) -> dict[str, Any]:
        """What is new of a sample; the echo comes with the first part of it."""
        sample, number = self.samples[key], key[0]
        first = None
        scores = sample.take()
        if self.echoes[key]:
            self.echoes[key] = False
            prompt = self.prompts[number]
            text = (prompt if isinstance(prompt, str) else self.service.lm.tokenizer.decode(prompt)) + text
            first = self.ids[number][0]
            scores = (self.samples[number, 0].answer.prompt_logprobs or []) + scores
        finish = "length" if self.body.max_tokens == 0 else sample.finish
        return {
            "index": number * self.params.n + key[1],
            "text": text,
            "logprobs": None if self.params.logprobs is None else self.legacy[key](scores, first=first),
            "finish_reason": finish,
        }

    async def whole(self, job: Job) -> dict[str, Any]:
        async for _ in follow(job, self.samples):
            pass
        choices = [self.choice(key, sample.text) for key, sample in self.samples.items()]
        return {**self.head, "choices": choices, "usage": usage(self.samples)}

    async def chunks(self, job: Job) -> AsyncIterator[dict[str, Any]]:
        options = self.body.stream_options
        more = {"usage": None} if options is not None and options.include_usage else {}
        async for pieces in follow(job, self.samples):
            for key, text in pieces.items():
                if text or self.samples[key].done or self.echoes[key]:
                    yield {**self.head, "choices": [self.choice(key, text)], **more}
        if more:
            yield {**self.head, "choices": [], "usage": usage(self.samples)}
