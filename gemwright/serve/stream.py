"""EventStream: server-sent events over a job, for a reader that may be slow or go away.

A silent stream carries a comment now and then, so that nobody between here and the reader takes it for dead. What goes
wrong after the first byte is told in an event {"error": ...}, since the status has been sent.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Final, Protocol

from fastapi.responses import Response

from gemwright.engine.request import Request
from gemwright.serve.errors import ApiError, internal
from gemwright.serve.gate import Event, Gone, Receive, Send, attended
from gemwright.serve.logs import request_id
from gemwright.serve.replies import Samples
from gemwright.serve.schema import Controls
from gemwright.serve.service import Service
from gemwright.serve.worker import Job, Lagging

log = logging.getLogger(__name__)

QUIET_SECONDS: Final = 15.0
DONE: Final = b"data: [DONE]\n\n"


def data(value: Any) -> bytes:
    """One event."""
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


class Asked(Protocol):
    """A request for text on some route, and its answer in the making."""

    @property
    def service(self) -> Service: ...
    @property
    def body(self) -> Controls: ...
    @property
    def field(self) -> str:
        """What the route calls its input, for errors."""

    @property
    def samples(self) -> Samples: ...
    async def prepare(self) -> Sequence[Request]: ...
    async def whole(self, job: Job) -> dict[str, Any]: ...
    def chunks(self, job: Job) -> AsyncIterator[dict[str, Any]]: ...
    def frame(self, event: Any, /) -> bytes:
        """A chunk, or an error, as it goes over the wire."""

    @property
    def done(self) -> bytes:
        """What ends a stream that went well."""


class EventStream(Response):
    """Sends chunks as they come; closes the job and calls `at_end`, whichever side ends it."""

    media_type = "text/event-stream"

    def __init__(self, asked: Asked, job: Job, at_end: Callable[[], None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._asked, self._worker, self._job, self._at_end = asked, asked.service.worker, job, at_end
        self._quiet = True

    async def __call__(self, scope: Event, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await attended(receive, self._write(send))
        finally:
            self._worker.close(self._job)
            self._at_end()

    async def _write(self, send: Send) -> None:
        last, frame = self._asked.done, self._asked.frame
        pings = asyncio.ensure_future(self._ping(send))
        try:
            async for chunk in self._asked.chunks(self._job):
                self._quiet = False
                await self._put(send, frame(chunk))
        except Gone:
            raise
        except (ApiError, Lagging) as error:
            log.warning("a stream ended early: %s", error)
            last = frame(error.body if isinstance(error, ApiError) else ApiError(429, str(error)).body)
        except Exception:
            log.exception("a stream failed")
            last = frame(internal(request_id.get() or "none").body)
        finally:
            pings.cancel()
        await self._put(send, last, more=False)

    async def _ping(self, send: Send) -> None:
        while True:
            await asyncio.sleep(QUIET_SECONDS)
            if self._quiet:
                await self._put(send, b": waiting\n\n")
            self._quiet = True

    async def _put(self, send: Send, body: bytes, *, more: bool = True) -> None:
        seconds = self._worker.settings.stall_seconds
        try:
            async with asyncio.timeout(seconds):
                await send({"type": "http.response.body", "body": body, "more_body": more})
        except TimeoutError:
            log.warning("the reader of a stream took nothing for %g s", seconds)
            raise Gone from None
