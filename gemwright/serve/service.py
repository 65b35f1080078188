"""Service: from a request's body to engine requests. Names, prompts, sampling controls, constraints."""

from __future__ import annotations

import time
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any, Final

from fastapi.concurrency import run_in_threadpool

from gemwright.engine.engine import Engine
from gemwright.engine.pages import PAGE
from gemwright.engine.scheduler import GLOBAL
from gemwright.lm import LM
from gemwright.sampling import SamplingParams
from gemwright.serve.errors import ApiError, invalid
from gemwright.serve.replies import Samples, Texts, usage
from gemwright.serve.schema import Controls
from gemwright.serve.settings import Settings
from gemwright.serve.worker import Job, Worker

ALIAS: Final = "tgi"
"""The model's name in the client code that Gemma 2 was released with."""


class Service:
    """What the routes share."""

    def __init__(self, worker: Worker, settings: Settings) -> None:
        self.worker, self.settings = worker, settings
        self.created = int(time.time())
        self._texts: Texts | None = None

    @property
    def lm(self) -> LM:
        return self.worker.loaded[0]

    @property
    def engine(self) -> Engine:
        return self.worker.loaded[1]

    @property
    def texts(self) -> Texts:
        if self._texts is None:
            self._texts = Texts(self.lm.tokenizer)
        return self._texts

    @property
    def names(self) -> list[str]:
        """The model, then its adapters."""
        return [self.settings.name, *self.engine.adapters]

    def adapter(self, model: str | None) -> str | None:
        """The adapter that a model's name means; None: the model itself. ApiError 404 for other names."""
        if model in (None, self.settings.name, ALIAS):
            return None
        if model in self.engine.adapters:
            return model
        said = f"model: got {model!r:.80}, served are {', '.join(self.names)}"
        raise ApiError(404, said, param="model", code="model_not_found")

    def params(self, controls: Controls, defaults: Mapping[str, Any] | None = None) -> SamplingParams:
        """Sampling controls: the body's, else the model's own. ApiError 400."""
        try:
            return self.lm.params(**{**(defaults or {}), **controls.sampling()})
        except ValueError as error:
            raise invalid(error) from error

    def room(self, prompt_tokens: int) -> int:
        """New tokens for which context and cache have room after a prompt; at least 1, which the engine may refuse."""
        context = self.lm.config.max_position_embeddings
        pool = self.engine.scheduler.pools.get(GLOBAL)
        return max(1, (context if pool is None else min(context, pool.total * PAGE)) - prompt_tokens)

    async def ids(
        self, texts: Sequence[str | Sequence[int]], *, field: str, bos: bool | None = None
    ) -> list[list[int]]:
        """Token ids of texts, in a thread: a long one would hold up every stream. ApiError 400 names the field.

        A text gets a BOS as the model's tokenizer says (`bos` None); ids are taken as they are.
        """
        encode = self.lm.tokenizer.encode

        def work() -> list[list[int]]:
            return [encode(text, bos=bos) if isinstance(text, str) else list(text) for text in texts]

        try:
            return await run_in_threadpool(work)
        except ValueError as error:
            raise ApiError(400, f"{field}: {error}", param=field, code="invalid_value") from error

    def card(self, name: str) -> dict[str, Any]:
        """What /v1/models tells of a name."""
        context = self.lm.config.max_position_embeddings
        card = {
            "id": name,
            "object": "model",
            "created": self.created,
            "owned_by": "gemwright",
            "max_model_len": context,
        }
        return card if name not in self.engine.adapters else card | {"parent": self.settings.name}

    def report(self, scope: MutableMapping[str, Any], controls: Controls, job: Job, samples: Samples) -> None:
        """What the log and the trace tell of a request that generated."""
        counts = usage(samples)
        fields = scope["gemwright.fields"]
        fields["model"] = controls.model or self.settings.name
        fields |= {name: counts[name] for name in ("prompt_tokens", "completion_tokens")}
        fields |= counts["prompt_tokens_details"]
        if job.first_token is not None:
            fields["first_token"] = round(job.first_token, 4)
        if controls.user is not None:
            fields["user"] = controls.user
