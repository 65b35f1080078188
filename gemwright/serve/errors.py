"""Errors as OpenAI's API words them: {"error": {"message", "type", "param", "code"}} with a fitting status, never 422.

What a client did wrong is told with the field's name; what went wrong here is told by the request's id alone, and the
trace stays in the log.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

from fastapi.exceptions import HTTPException
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from gemwright.generate import ContextError

FIELDS: Final = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens"}
"""Names of the library -> names in the API."""
_NAMED: Final = re.compile(r"([a-z_]+(?:\[\d+\])?(?:\.[\w\[\]]+)*): ")


class ErrorDetail(BaseModel):
    """What happened, for people (`message`) and for programs (the rest)."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every answer with a status from 400 on."""

    error: ErrorDetail


class ApiError(HTTPException):
    """An answer with an error status; raised anywhere in a request's handling."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.param, self.code = param, code

    def renamed(self, names: Mapping[str, str]) -> ApiError:
        """The same for a route that calls its fields otherwise."""
        name = re.split(r"[.\[]", self.param or "", maxsplit=1)[0]
        if name not in names:
            return self
        message = str(self.detail).removeprefix(f"{self.param}: ")
        return ApiError(self.status_code, f"{names[name]}: {message}", param=names[name], code=self.code)

    @property
    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error"
        if self.status_code == 429:
            kind = "rate_limit_error"
        elif self.status_code >= 500:
            kind = "server_error"
        return {"error": {"message": self.detail, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status_code, self.headers)


def busy(message: str) -> ApiError:
    """429: what waits already is as much as may wait."""
    return ApiError(429, message, code="rate_limit_exceeded", headers={"Retry-After": "1"})


def unavailable(state: Literal["loading", "draining", "stopped"]) -> ApiError:
    """503: the model is not there yet, or the server is about to go."""
    return ApiError(503, f"the server is {state}; try again", code=state, headers={"Retry-After": "5"})


def internal(request_id: str) -> ApiError:
    """500: the log has the trace under this id."""
    return ApiError(500, f"the server failed on this request; the log tells why under its id, {request_id}")


def invalid(error: ValueError, *, prompt: str = "prompt") -> ApiError:
    """400 for a ValueError of the library, whose message begins with the field's name; `prompt` names the input."""
    message = str(error)
    if isinstance(error, ContextError):
        return ApiError(400, message, param=prompt, code="context_length_exceeded")
    match = _NAMED.match(message)
    if match is None:
        return ApiError(400, message)
    name = match[1]
    param = FIELDS.get(name, name)
    return ApiError(400, param + message[len(name) :], param=param, code="invalid_value")


def from_validation(errors: Sequence[Mapping[str, Any]], body: object) -> ApiError:
    """400 for the first field that pydantic refuses, with its place in the body."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return ApiError(
            400, f"body: not JSON: {first['ctx']['error']} at character {first['loc'][-1]}", code="bad_json"
        )

    def exactness(error: Mapping[str, Any]) -> tuple[int, bool]:
        return len(place(error["loc"], body)), not error["type"].endswith("_type")

    # of a union's branches, the one that came furthest is the one that was meant
    error = max((e for e in errors if e["loc"][:2] == first["loc"][:2]), key=exactness)
    said = str(error["msg"]).removeprefix("Value error, ")
    param = spell(place(error["loc"], body))
    if error["type"] == "value_error":  # of a validator in `schema`, which begins with the field where there is one
        match = _NAMED.match(said)
        name = ".".join(filter(None, (param, match and match[1]))) or None
        message = f"{param}.{said}" if param and match else f"{param}: {said}" if param else said
        return ApiError(400, message, param=name, code="invalid_value")
    if not param:
        return ApiError(400, "body: allowed is a JSON object, with Content-Type: application/json", code="bad_json")
    if error["type"] == "extra_forbidden":
        return ApiError(400, f"{param}: not supported here", param=param, code="unknown_parameter")
    if error["type"] == "missing":
        return ApiError(400, f"{param}: missing", param=param, code="missing_required_parameter")
    got = error.get("input")
    shown = f"{got!r:.80}" if isinstance(got, (str, int, float, type(None))) else f"a {type(got).__name__}"
    return ApiError(400, f"{param}: got {shown}: {said}", param=param, code="invalid_value")


def place(location: Sequence[str | int], body: object) -> list[str | int]:
    """The keys and indices of pydantic's ("body", ...) that lead into the body; names of a union's branches do not."""
    path: list[str | int] = []
    value = body
    for number, part in enumerate(location[1:], 2):
        if isinstance(value, list) and isinstance(part, int) and part < len(value):
            path.append(part)
            value = value[part]
        elif isinstance(value, dict) and (part in value or number == len(location)):
            path.append(part)
            value = value.get(part)
    return path


def spell(path: Sequence[str | int]) -> str:
    """messages[0].content"""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")
