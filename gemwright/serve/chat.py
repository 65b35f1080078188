"""POST /v1/chat/completions: a conversation answered, as words or as calls of the client's tools.

Gemma 2 has no system role: system and developer messages at the start are put in front of the first user turn. Calls
come whole: a stream sends words as they come, up to the marker of the first call, and the calls at the end.
"""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Final

from fastapi.concurrency import run_in_threadpool

from gemwright import prompt, tools
from gemwright.engine.request import Request
from gemwright.serve.constraints import compiled, constraint
from gemwright.serve.errors import ApiError, invalid
from gemwright.serve.replies import Sample, chat_logprobs, follow, usage
from gemwright.serve.schema import ChatBody, Message
from gemwright.serve.service import Service
from gemwright.serve.stream import DONE, data
from gemwright.serve.worker import Job


class Chat:
    """One request: its samples, and the answer in the making."""

    field: Final = "messages"
    done: Final = DONE
    frame = staticmethod(data)

    def __init__(self, service: Service, body: ChatBody, ident: str) -> None:
        self.service, self.body = service, body
        self.adapter = service.adapter(body.model)
        self.tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
        choice = body.tool_choice or "auto"
        self.choice: tools.ToolChoice = choice if isinstance(choice, str) else choice.model_dump()
        self.head = {
            "id": f"chatcmpl-{ident}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": body.model or service.settings.name,
        }

    async def prepare(self) -> list[Request]:
        """The engine's requests. ApiError 400."""
        body, service = self.body, self.service
        ids = await turns(service, body.messages, self.tools, self.choice)
        try:
            called = tools.constraint(self.tools, self.choice, parallel=body.parallel_tool_calls)
        except ValueError as error:
            raise invalid(error) from error
        wanted = called or constraint(body)
        await compiled(service.lm.grammars, wanted)
        self.params = service.params(body, {"max_new_tokens": service.room(len(ids))})
        self.samples = {(0, index): Sample(service.lm, self.params, len(ids)) for index in range(self.params.n)}
        return [Request(tokens=ids, params=self.params, adapter=self.adapter, constraint=wanted)]

    async def whole(self, job: Job) -> dict[str, Any]:
        async for _ in follow(job, self.samples):
            pass
        choices = []
        for (_, index), sample in self.samples.items():
            words, calls = await self._parsed(sample)
            message: dict[str, Any] = {
                "role": "assistant",
                "content": words or None if calls else words,
                "refusal": None,
            }
            if calls:
                message["tool_calls"] = calls
            choices.append(self._choice(index, sample, "message", message, calls))
        return {**self.head, "choices": choices, "usage": usage(self.samples)}

    async def chunks(self, job: Job) -> AsyncIterator[dict[str, Any]]:
        options = self.body.stream_options
        more = {"usage": None} if options is not None and options.include_usage else {}
        head = self.head | {"object": "chat.completion.chunk"}
        sent = dict.fromkeys(self.samples, 0)
        """Characters of each sample's words that are out."""
        for _, index in self.samples:
            first = {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None}
            yield {**head, "choices": [{**first, "finish_reason": None}], **more}
        async for pieces in follow(job, self.samples):
            for key in pieces:
                sample, calls = self.samples[key], list[tools.Call]()
                end = self._certain(sample.text, sent[key])
                if sample.done:
                    _, calls = await self._parsed(sample)
                    end = end if calls else len(sample.text)
                if end > sent[key] or sample.done:
                    delta: dict[str, Any] = {"content": sample.text[sent[key] : end]} if end > sent[key] else {}
                    sent[key] = end
                    if calls:
                        delta["tool_calls"] = [{"index": number, **call} for number, call in enumerate(calls)]
                    yield {**head, "choices": [self._choice(key[1], sample, "delta", delta, calls)], **more}
        if more:
            yield {**head, "choices": [], "usage": usage(self.samples)}

    def _choice(
        self, index: int, sample: Sample, name: str, value: Mapping[str, Any], calls: Sequence[tools.Call]
    ) -> dict[str, Any]:
        """A choice with the log-probabilities since the last one, without those of a stop token."""
        scores = None
        if self.params.logprobs is not None:
            stops = self.service.lm.stop_ids
            scores = chat_logprobs([score for score in sample.take() if score.id not in stops], self.service.texts)
        finish = "tool_calls" if calls and sample.finish == "stop" else sample.finish
        return {"index": index, name: value, "logprobs": scores, "finish_reason": finish}

    async def _parsed(self, sample: Sample) -> tuple[str, list[tools.Call]]:
        """Words and calls of a finished answer; one that was cut off inside a call is words as it is."""
        if not self.body.callable:
            return sample.text, []
        try:
            return await run_in_threadpool(tools.parse, sample.text, self.tools)
        except ValueError:
            return sample.text, []

    def _certain(self, text: str, start: int) -> int:
        """Where the words end that can be sent: before a call, its beginning, and the space in front of it."""
        if not self.body.callable:
            return len(text)
        end = text.find(tools.OPEN, start)
        if end < 0:
            tails = (n for n in range(len(tools.OPEN) - 1, 0, -1) if text.endswith(tools.OPEN[:n]))
            end = len(text) - next(tails, 0)
        return max(start, len(text[:end].rstrip()))


async def turns(
    service: Service,
    messages: Sequence[Message],
    functions: Sequence[tools.Tool] = (),
    choice: tools.ToolChoice = "auto",
) -> list[int]:
    """Token ids of a conversation, rendered in a thread. ApiError 400."""
    given = [message.model_dump(exclude_none=True) | {"content": message.text} for message in messages]
    if given[-1]["role"] == "assistant":
        said = "messages: the last one has to be from the user or a tool"
        raise ApiError(400, said, param="messages", code="invalid_value")
    lead = next((n for n, message in enumerate(given) if message["role"] not in ("system", "developer")), len(given))
    system = "\n\n".join(message["content"] for message in given[:lead])
    tokenizer = service.lm.tokenizer

    def render() -> list[int]:
        return prompt.render(tools.render_tools(given[lead:], functions, choice), tokenizer, system=system)

    try:
        return await run_in_threadpool(render)
    except ValueError as error:
        # numbers are those of the body, which has the system text among its messages
        said = re.sub(r"messages\[(\d+)\]", lambda match: f"messages[{int(match[1]) + lead}]", str(error))
        found = invalid(ValueError(said))
        named = found.param is not None and found.param.startswith(("messages", "tool"))
        raise ApiError(400, said, param=found.param if named else "messages", code="invalid_value") from error
