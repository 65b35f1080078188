"""Settings of a server: its names, its limits and who may ask. Nothing here is read from the environment."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

ENVIRONMENT: Final = "GEMWRIGHT_API_KEYS"
"""Variable that `read_keys` is given by the command line: keys, separated by commas."""


class Keys:
    """API keys, held as digests: comparing takes the same time whichever key comes and however it differs."""

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def __len__(self) -> int:
        return len(self._digests)

    def admit(self, key: bytes) -> bool:
        digest = hashlib.sha256(key).digest()
        found = [hmac.compare_digest(digest, known) for known in self._digests]  # all of them, also after a match
        return any(found)


def read_keys(file: str | Path | None, variable: str | None) -> Keys:
    """Keys of a file (one a line; # begins a comment line) and of a variable's value.

    Raises ValueError where one is shorter than 8 characters or not printable ASCII, or where the file has none.
    """
    lines = [] if file is None else [line.strip() for line in Path(file).read_text(encoding="utf-8").splitlines()]
    keys = [line for line in lines if line and not line.startswith("#")]
    if file is not None and not keys:
        raise ValueError(f"{file}: no key in it; allowed is one a line")
    keys += [key for part in (variable or "").split(",") if (key := part.strip())]
    for number, key in enumerate(keys, 1):
        if len(key) < 8 or not (key.isascii() and key.isprintable()):
            raise ValueError(f"key {number}: allowed are printable ASCII characters, at least 8 of them")
    return Keys(keys)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a server allows. Times in seconds, sizes in bytes."""

    name: str = "gemwright"
    """The model's name in /v1/models; "tgi" is accepted, too."""
    keys: Keys = field(default_factory=Keys)
    """Without keys everybody is served."""
    metrics_key: bool = False
    """/metrics needs a key, too."""
    origins: tuple[str, ...] = ()
    """Web origins whose pages may call this server (CORS); * for all."""
    hosts: tuple[str, ...] = ()
    """Host names under which the server answers; none: any. Keeps a foreign page from reaching a server on loopback
    through a name that it makes resolve there (DNS rebinding)."""
    predict_route: str | None = None
    """Path of Vertex AI's predictions; None: no such route."""
    health_route: str | None = None
    """Path at which Vertex AI asks for readiness."""
    max_requests: int = 256
    """Samples accepted at a time, running and waiting."""
    max_waiting_tokens: int = 131_072
    """Prompt tokens that wait for their first new token; one request alone may have more."""
    max_body: int = 4 * 2**20
    body_seconds: float = 30.0
    """A body must have come by then."""
    stall_seconds: float = 60.0
    """A stream whose reader takes nothing for so long is given up."""
    backlog: int = 4096
    """Tokens of a stream that may wait for its reader; one that is further behind is given up."""
    drain_seconds: float = 30.0
    """After the first SIGTERM, requests in flight have so long to end."""
    max_failures: int = 3
    """Engine steps that fail one after another before the server leaves."""

    def __post_init__(self) -> None:
        for name in ("max_requests", "max_waiting_tokens", "max_body", "backlog", "max_failures"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, allowed is >= 1")
        for name in ("body_seconds", "stall_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, allowed is > 0")
        for name in ("predict_route", "health_route"):
            route = getattr(self, name)
            if route is not None and not (route.startswith("/") and not set(route) & set("{}?#")):
                raise ValueError(f"{name}: got {route!r}, allowed is a path that begins with /")
        if not self.drain_seconds >= 0:
            raise ValueError(f"drain_seconds: got {self.drain_seconds!r}, allowed is >= 0")
