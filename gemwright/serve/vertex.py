"""Vertex AI's prediction route: {"instances": [...], "parameters": {...}} -> {"predictions": [...]}.

Each instance is a body of this server's own routes (with "messages" a chat completion, with "prompt" a completion,
with "inputs" TGI's), and its prediction is that route's answer. `parameters` are fields for every instance. Where the
routes lie is told by Vertex AI through AIP_PREDICT_ROUTE, AIP_HEALTH_ROUTE and AIP_HTTP_PORT.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Annotated, Any, Final

from pydantic import Field, ValidationError

from gemwright.serve.chat import Chat
from gemwright.serve.completions import Completions
from gemwright.serve.errors import ApiError, from_validation
from gemwright.serve.schema import Body, ChatBody, CompletionBody
from gemwright.serve.service import Service
from gemwright.serve.tgi import Generate, GenerateBody

INSTANCES: Final = 128


class PredictBody(Body):
    """POST to AIP_PREDICT_ROUTE."""

    instances: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=INSTANCES)]
    parameters: dict[str, Any] = Field(default_factory=dict)


async def predict(service: Service, body: PredictBody, ident: str) -> dict[str, Any]:
    """All instances together; the first error ends them all. ApiError as the routes raise it."""
    asked = [_asked(service, body, number, ident) for number in range(len(body.instances))]
    tasks: list[asyncio.Task[dict[str, Any]]] = []
    try:
        async with asyncio.TaskGroup() as group:
            tasks += [group.create_task(_answer(one)) for one in asked]
    except* ApiError as errors:
        first: BaseException = errors
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise first from None
    return {"predictions": [task.result() for task in tasks], "model": service.settings.name}


def _asked(service: Service, body: PredictBody, number: int, ident: str) -> Chat | Completions | Generate:
    own: Mapping[str, Any] = body.instances[number]
    if own.get("stream") or body.parameters.get("stream"):
        raise ApiError(400, "stream: not supported in a prediction", param="stream", code="unknown_parameter")
    try:
        if "messages" in own:
            return Chat(service, ChatBody.model_validate({**body.parameters, **own}), f"{ident}-{number}")
        if "inputs" in own:
            return Generate(service, GenerateBody.model_validate({"parameters": body.parameters, **own}), stream=False)
        return Completions(service, CompletionBody.model_validate({**body.parameters, **own}), f"{ident}-{number}")
    except ValidationError as error:
        where = ("body", "instances", number)
        errors = [{**one, "loc": (*where, *one["loc"])} for one in error.errors()]
        merged = [{**body.parameters, **instance} for instance in body.instances]
        raise from_validation(errors, {"instances": merged}) from error


async def _answer(asked: Chat | Completions | Generate) -> dict[str, Any]:
    requests = await asked.prepare()
    async with asked.service.worker.job(requests) as job:
        return await asked.whole(job)
