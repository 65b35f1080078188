"""Text Generation Inference's own routes: POST /generate and /generate_stream, GET /info.

For clients of the server that Gemma 2 was released with. As there, an answer is greedy unless `do_sample` or a sampling
control asks otherwise, and the model's generation_config is not consulted. Different from there: a stop string is not
part of the text, and errors have OpenAI's shape, as everywhere on this server.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Annotated, Any, Final, Literal

from pydantic import Field, model_validator

from gemwright import __version__
from gemwright.engine.request import Request
from gemwright.generate import TokenLogprob
from gemwright.serve.constraints import compiled, constraint
from gemwright.serve.errors import ApiError
from gemwright.serve.replies import Sample, follow
from gemwright.serve.schema import STOPS, Body, Controls, StopText
from gemwright.serve.service import Service
from gemwright.serve.worker import Job

NAMES: Final = {
    "max_tokens": "parameters.max_new_tokens",
    "logprobs": "parameters.top_n_tokens",
    "guided_json": "parameters.grammar.value",
    "guided_regex": "parameters.grammar.value",
    **{name: f"parameters.{name}" for name in ("temperature", "top_k", "top_p", "repetition_penalty", "stop", "seed")},
}
"""Fields of the other routes -> TGI's."""
NEUTRAL: Final = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
"""In place of what the model's generation_config says."""


class Grammar(Body):
    """A JSON schema, as an object or as its text, or a regex."""

    type: Literal["json", "regex"]
    value: str | dict[str, Any]

    @model_validator(mode="after")
    def _fits(self) -> Grammar:
        if self.type == "json" and isinstance(self.value, str):
            try:
                self.value = json.loads(self.value)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"value: not JSON: {error}") from error
        if isinstance(self.value, dict) != (self.type == "json"):
            raise ValueError("value: allowed are a JSON schema with type json, and a text with type regex")
        return self


class Parameters(Body):
    """What of TGI's parameters is meant here; `truncate`, `typical_p` and the like are refused by name."""

    max_new_tokens: int = 100
    do_sample: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: Annotated[list[StopText], Field(max_length=STOPS)] | None = None
    return_full_text: bool = False
    details: bool = False
    decoder_input_details: bool = False
    """With `details`: the prompt's tokens and their log-probabilities, too."""
    top_n_tokens: int | None = None
    grammar: Grammar | None = None
    adapter_id: str | None = None
    best_of: Literal[1] | None = None
    watermark: Literal[False] = False


class GenerateBody(Body):
    """POST /generate and /generate_stream."""

    inputs: str
    parameters: Parameters = Field(default_factory=Parameters)

    def controls(self) -> Controls:
        """The same wish in the fields of the other routes."""
        own = self.parameters
        same = {"temperature", "top_k", "top_p", "repetition_penalty", "frequency_penalty", "seed", "stop"}
        given = own.model_dump(include=same, exclude_none=True)
        if own.do_sample or given.keys() & {"temperature", "top_k", "top_p"}:
            given = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, **given}
        else:
            given["temperature"] = 0.0
        if own.grammar is not None:
            given["guided_json" if own.grammar.type == "json" else "guided_regex"] = own.grammar.value
        return Controls.model_validate({"model": own.adapter_id, **given})


class Generate:
    """One request and its answer in the making."""

    field: Final = "inputs"
    done: Final = b""

    def __init__(self, service: Service, asked: GenerateBody, *, stream: bool) -> None:
        self.service, self.asked = service, asked
        self.body = asked.controls().model_copy(update={"stream": stream})
        self.adapter = service.adapter(self.body.model)

    async def prepare(self) -> list[Request]:
        """The engine's request. ApiError 400."""
        own, service = self.asked.parameters, self.service
        try:
            wanted = constraint(self.body)
            await compiled(service.lm.grammars, wanted)
        except ApiError as error:
            raise error.renamed(NAMES) from error
        more: dict[str, Any] = {"max_new_tokens": own.max_new_tokens, "logprobs": own.top_n_tokens or 0}
        if own.details and own.decoder_input_details:
            more["prompt_logprobs"] = 0
        try:
            self.params = service.params(self.body, NEUTRAL | more)
        except ApiError as error:
            raise error.renamed(NAMES) from error
        (self.ids,) = await service.ids([self.asked.inputs], field="inputs")
        self.samples = {(0, 0): Sample(service.lm, self.params, len(self.ids))}
        return [Request(tokens=self.ids, params=self.params, adapter=self.adapter, constraint=wanted)]

    async def whole(self, job: Job) -> dict[str, Any]:
        async for _ in follow(job, self.samples):
            pass
        answer: dict[str, Any] = {"generated_text": self._text()}
        if self.asked.parameters.details:
            scores = self._sample.take()
            answer["details"] = self._details() | {
                "prefill": self._prefill(),
                "tokens": [self._token(score) for score in scores],
                **self._tops(scores),
            }
        return answer

    async def chunks(self, job: Job) -> AsyncIterator[dict[str, Any]]:
        """An event for each token; text that several tokens make together comes with the last of them."""
        index = 0
        async for pieces in follow(job, self.samples):
            scores, piece = self._sample.take(), pieces.get((0, 0), "")
            for number, score in enumerate(scores, 1):
                index += 1
                last = number == len(scores)
                token = self._token(score)
                if not token["special"]:
                    token["text"] = piece if last else ""
                event: dict[str, Any] = {"index": index, "token": token, "generated_text": None, "details": None}
                if self.asked.parameters.top_n_tokens:
                    event["top_tokens"] = self._tops([score])["top_tokens"][0]
                if last and self._sample.done:
                    event |= {"generated_text": self._text(), "details": self._details()}
                yield event

    @staticmethod
    def frame(event: dict[str, Any]) -> bytes:
        return f"data:{json.dumps(event, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()

    @property
    def _sample(self) -> Sample:
        return self.samples[0, 0]

    def _text(self) -> str:
        return (self.asked.inputs if self.asked.parameters.return_full_text else "") + self._sample.text

    def _details(self) -> dict[str, Any]:
        sample = self._sample
        finish = "length" if sample.finish == "length" else "stop_sequence" if sample.answer.stopped else "eos_token"
        count = len(self._sample.scores)
        return {
            "finish_reason": finish, "generated_tokens": count, "seed": self.params.seed, "input_length": len(self.ids)
        }  # fmt: skip

    def _prefill(self) -> list[dict[str, Any]]:
        scores = self._sample.answer.prompt_logprobs
        if scores is None:
            return []
        first: dict[str, Any] = {"id": self.ids[0], "text": self.service.texts(self.ids[0])[0], "logprob": None}
        return [first, *({"id": s.id, "text": self.service.texts(s.id)[0], "logprob": s.logprob} for s in scores)]

    def _token(self, score: TokenLogprob) -> dict[str, Any]:
        return self._entry(score.id, score.logprob)

    def _entry(self, i: int, logprob: float) -> dict[str, Any]:
        special = i in self.service.lm.stop_ids or i in self.service.lm.tokenizer.special_ids
        return {"id": i, "text": self.service.texts(i)[0], "logprob": logprob, "special": special}

    def _tops(self, scores: list[TokenLogprob]) -> dict[str, Any]:
        if not self.asked.parameters.top_n_tokens:
            return {}
        return {"top_tokens": [[self._entry(i, logprob) for i, logprob in score.top] for score in scores]}


def info(service: Service) -> dict[str, Any]:
    """What /info tells."""
    lm, settings = service.lm, service.settings
    return {
        "model_id": settings.name,
        "model_sha": None,
        "model_dtype": str(lm.dtype),
        "model_device_type": lm.device.type,
        "model_pipeline_tag": "text-generation",
        "max_concurrent_requests": settings.max_requests,
        "max_best_of": 1,
        "max_stop_sequences": STOPS,
        "max_input_tokens": lm.config.max_position_embeddings - 1,
        "max_total_tokens": lm.config.max_position_embeddings,
        "router": "gemwright",
        "version": __version__,
        "sha": None,
        "docker_label": None,
    }
