"""Gate: what every request passes first, as plain ASGI. Identity, host, key, body; at its end log, meters and trace.

The body is read here, up to its limit and within its time, so that a route never waits for a slow sender, and so that
somebody without a key is refused before it is read. Default is closed: without a key only `open_paths` answer.

Whatever a route raises ends here: in the log with its trace, in the answer as a status 500 with the request's id.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any, Final

from gemwright.serve import logs
from gemwright.serve.errors import ApiError, internal
from gemwright.serve.metrics import Meters
from gemwright.serve.settings import Settings
from gemwright.serve.tracing import Span, Tracer

log = logging.getLogger(__name__)

Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]
App = Callable[[Event, Receive, Send], Awaitable[None]]

_IDENT: Final = re.compile(r"[\w.:-]{1,128}", re.ASCII)
_PORT: Final = re.compile(r":\d+$")
CLOSE: Final = {"Connection": "close"}
"""With an answer to a body that is not read to its end: the connection cannot be used again."""


class Gone(Exception):
    """The client has closed the connection; nobody reads an answer."""


class Gate:
    """ASGI middleware around the routes."""

    def __init__(
        self, app: App, *, settings: Settings, meters: Meters, tracer: Tracer, open_paths: Collection[str]
    ) -> None:
        self.app, self.settings, self.meters, self.tracer = app, settings, meters, tracer
        self.open_paths = frozenset(open_paths)

    async def __call__(self, scope: Event, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in reversed(scope["headers"])}
        given = headers.get("x-request-id", "")
        ident = given if _IDENT.fullmatch(given) else uuid.uuid4().hex
        token = logs.request_id.set(ident)
        answer = _Answer(send, ident)
        fields: dict[str, Any] = {}
        scope["gemwright.fields"] = fields  # what a route adds to the log and the trace
        begun = time.monotonic()
        try:
            with self.tracer(f"{scope['method']} {scope['path']}", headers) as span:
                await self._handle(scope, headers, receive, answer)
                self._report(scope, answer.status, time.monotonic() - begun, fields, span)
        finally:
            logs.request_id.reset(token)

    async def _handle(self, scope: Event, headers: dict[str, str], receive: Receive, answer: _Answer) -> None:
        """Run the route; errors become answers as long as none has begun."""
        error: ApiError | None = None
        try:
            self._admit(scope, headers)
            body = await self._body(headers, receive)
            await self.app(scope, _replay(body, receive), answer.send)
        except ApiError as raised:
            error = raised
        except Gone:
            answer.status = answer.status or 499
        except Exception:
            log.exception("%s %s failed", scope["method"], scope["path"])
            error = internal(answer.ident)
        if error is not None and not answer.status:
            await error.response()(scope, receive, answer.send)

    def _admit(self, scope: Event, headers: dict[str, str]) -> None:
        if self.settings.hosts:
            name = _PORT.sub("", headers.get("host", ""))
            if name.lower() not in self.settings.hosts:
                raise ApiError(
                    400, f"host: got {name!r:.80}, which this server does not answer to", code="unknown_host"
                )
        if not self.settings.keys or scope["path"] in self.open_paths:
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not self.settings.keys.admit(key.strip().encode("latin-1")):
            said = "the API key is not known here" if key else "no API key: send Authorization: Bearer KEY"
            raise ApiError(401, said, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    async def _body(self, headers: dict[str, str], receive: Receive) -> bytes:
        limit, seconds = self.settings.max_body, self.settings.body_seconds
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length[:20]) > limit:
            raise _too_large(limit)
        body = bytearray()
        try:
            async with asyncio.timeout(seconds):
                while True:
                    event = await receive()
                    if event["type"] == "http.disconnect":
                        raise Gone
                    body += event.get("body", b"")
                    if len(body) > limit:
                        raise _too_large(limit)
                    if not event.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            said = f"the body did not come within {seconds:g} s"
            raise ApiError(408, said, code="body_timeout", headers=CLOSE) from None

    def _report(self, scope: Event, status: int, seconds: float, fields: dict[str, Any], span: Span | None) -> None:
        route = getattr(scope.get("route"), "path", None) or ("page" if status < 400 else "none")
        self.meters.requests.labels(route, str(status)).inc()
        self.meters.request.labels(route).observe(seconds)
        told = {"method": scope["method"], "path": scope["path"], "status": status, "seconds": round(seconds, 4)}
        level = logging.DEBUG if route in ("/health", "/ready", "/metrics") and status < 400 else logging.INFO
        log.log(level, "request", extra={"fields": told | fields})
        if span is not None:
            span.set_attribute("http.request.method", scope["method"])
            span.set_attribute("http.route", route)
            span.set_attribute("http.response.status_code", status)
            names = {"model": "gen_ai.request.model", "prompt_tokens": "gen_ai.usage.input_tokens"}
            names |= {"completion_tokens": "gen_ai.usage.output_tokens", "first_token": "gemwright.first_token_seconds"}
            for name in names.keys() & fields.keys():
                span.set_attribute(names[name], fields[name])


class _Answer:
    """Passes an answer on, adds the request's id, and remembers the status; 0 while nothing was sent."""

    def __init__(self, send: Send, ident: str) -> None:
        self._send, self.ident, self.status = send, ident, 0

    async def send(self, event: Event) -> None:
        if event["type"] == "http.response.start":
            self.status = event["status"]
            event["headers"] = [*event.get("headers", ()), (b"x-request-id", self.ident.encode())]
        await self._send(event)


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body as one event, then what comes: a disconnect."""
    rest = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_event() -> Event:
        return rest.pop() if rest else await receive()

    return next_event


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"body: larger than the {limit} bytes allowed", code="body_too_large", headers=CLOSE)


async def attended(receive: Receive, work: Awaitable[Any]) -> Any:
    """The result of `work`, which is cancelled when the client closes the connection; then raises Gone."""
    task = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(gone(receive))
    try:
        await asyncio.wait((task, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Gone
        return task.result()
    finally:
        task.cancel()
        leaving.cancel()
        await asyncio.gather(task, leaving, return_exceptions=True)


async def gone(receive: Receive) -> None:
    """Returns when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
