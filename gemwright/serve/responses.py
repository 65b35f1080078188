"""POST /v1/responses: the text half of OpenAI's Responses API, as another spelling of a chat completion.

Text in, text out, streamed as events or whole. Nothing is stored here, so `store` and `previous_response_id` are
refused, as tools, images and reasoning are.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any, Final, Literal

from pydantic import Field, model_validator

from gemwright.engine.request import Request
from gemwright.serve.chat import Chat
from gemwright.serve.errors import ApiError
from gemwright.serve.replies import follow, usage
from gemwright.serve.schema import MESSAGES, Body, ChatBody, Metadata
from gemwright.serve.service import Service
from gemwright.serve.worker import Job

NAMES: Final = {"messages": "input", "max_tokens": "max_output_tokens", "response_format": "text.format.schema"}
"""Fields of a chat completion -> of a response."""


class InputPart(Body):
    type: Literal["input_text", "output_text"]
    text: str
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    logprobs: Annotated[list[Any], Field(max_length=0)] | None = None


class InputMessage(Body):
    """One turn; an assistant's comes back as this server gave it."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[InputPart]
    id: str | None = None
    status: Literal["completed", "incomplete"] | None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class TextFormat(Body):
    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str = "answer"
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool = True

    @model_validator(mode="after")
    def _whole(self) -> TextFormat:
        if (self.type == "json_schema") != (self.schema_ is not None):
            raise ValueError("schema: needed with type json_schema, and allowed with it alone")
        return self

    def response_format(self) -> dict[str, Any]:
        """As chat completions spell it."""
        if self.schema_ is None:
            return {"type": self.type}
        return {"type": self.type, "json_schema": {"name": self.name, "schema": self.schema_, "strict": self.strict}}


class TextOptions(Body):
    format: TextFormat = Field(default_factory=TextFormat)


class ResponsesBody(Body):
    """POST /v1/responses."""

    input: str | Annotated[list[InputMessage], Field(min_length=1, max_length=MESSAGES - 1)]
    """One message fewer than a chat may have, since `instructions` become one."""
    model: str | None = None
    instructions: str | None = None
    """A system text in front of the conversation."""
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stream: bool = False
    text: TextOptions = Field(default_factory=TextOptions)
    metadata: Metadata | None = None
    """Comes back with the answer."""
    store: Literal[False] = False
    truncation: Literal["disabled"] = "disabled"
    user: Annotated[str, Field(max_length=512)] | None = None

    def chat(self) -> ChatBody:
        """The same wish as a chat completion."""
        turns = [{"role": "user", "content": self.input}] if isinstance(self.input, str) else []
        if not isinstance(self.input, str):
            turns = [{"role": turn.role, "content": turn.text} for turn in self.input]
        if self.instructions is not None:
            turns.insert(0, {"role": "system", "content": self.instructions})
        given = self.model_dump(include={"model", "temperature", "top_p", "stream", "user"})
        more = {"max_tokens": self.max_output_tokens, "response_format": self.text.format.response_format()}
        return ChatBody.model_validate(given | more | {"messages": turns})


class Responses:
    """One request and its answer in the making; the work is a Chat's."""

    field: Final = "input"
    done: Final = b""

    def __init__(self, service: Service, body: ResponsesBody, ident: str) -> None:
        self.asked, self._chat = body, Chat(service, body.chat(), ident)
        self.service, self.body = service, self._chat.body
        self._ident, self._created, self._number = ident, int(time.time()), 0

    async def prepare(self) -> list[Request]:
        """The engine's request. ApiError 400."""
        try:
            requests = await self._chat.prepare()
        except ApiError as error:
            raise error.renamed(NAMES) from error
        self.samples = self._chat.samples
        return requests

    async def whole(self, job: Job) -> dict[str, Any]:
        async for _ in follow(job, self.samples):
            pass
        return self._response()

    async def chunks(self, job: Job) -> AsyncIterator[dict[str, Any]]:
        at = {"item_id": f"msg_{self._ident}", "output_index": 0}
        inside = at | {"content_index": 0}
        begun = self._response() | {"status": "in_progress", "output": [], "usage": None, "incomplete_details": None}
        yield self._event("response.created", response=begun)
        yield self._event("response.in_progress", response=begun)
        item = self._item() | {"status": "in_progress", "content": []}
        yield self._event("response.output_item.added", output_index=0, item=item)
        yield self._event("response.content_part.added", **inside, part=self._part(""))
        async for pieces in follow(job, self.samples):
            if piece := pieces.get((0, 0)):
                yield self._event("response.output_text.delta", **inside, delta=piece, logprobs=[])
        text = self.samples[0, 0].text
        yield self._event("response.output_text.done", **inside, text=text, logprobs=[])
        yield self._event("response.content_part.done", **inside, part=self._part(text))
        yield self._event("response.output_item.done", output_index=0, item=self._item())
        response = self._response()
        yield self._event(f"response.{response['status']}", response=response)

    @staticmethod
    def frame(event: dict[str, Any]) -> bytes:
        """An event with its name, as this API's clients read it."""
        text = json.dumps(event, ensure_ascii=False, separators=(",", ":"))
        return f"event: {event.get('type', 'error')}\ndata: {text}\n\n".encode()

    def _event(self, name: str, **more: Any) -> dict[str, Any]:
        self._number += 1
        return {"type": name, "sequence_number": self._number - 1, **more}

    def _part(self, text: str) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def _item(self) -> dict[str, Any]:
        sample = self.samples[0, 0]
        return {
            "id": f"msg_{self._ident}",
            "type": "message",
            "role": "assistant",
            "status": "incomplete" if sample.finish == "length" else "completed",
            "content": [self._part(sample.text)],
        }

    def _response(self) -> dict[str, Any]:
        body, item, counts = self.asked, self._item(), usage(self.samples)
        cut = item["status"] == "incomplete"
        return {
            "id": f"resp_{self._ident}",
            "object": "response",
            "created_at": self._created,
            "status": item["status"],
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": body.model or self.service.settings.name,
            "output": [item],
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "temperature": self._chat.params.temperature,
            "text": {"format": body.text.format.model_dump(by_alias=True, exclude_none=True, exclude_unset=True)},
            "tool_choice": "none",
            "tools": [],
            "top_p": self._chat.params.top_p,
            "truncation": "disabled",
            "metadata": body.metadata or {},
            "user": body.user,
            "usage": {
                "input_tokens": counts["prompt_tokens"],
                "input_tokens_details": counts["prompt_tokens_details"],
                "output_tokens": counts["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": counts["total_tokens"],
            },
        }
