"""Ranks: one model held by several processes of a torchrun, of which the first is the server.

Every rank has an engine over its part of the model. The first one's calls (a request, a cancellation, a step) are
repeated by the others in the same order, so all schedule the same and draw the same tokens. What a rank would draw for
itself is settled before: a request without a seed gets one.
"""

from __future__ import annotations

import dataclasses
import secrets
import signal
from collections.abc import Callable
from typing import Any

from gemwright.engine.engine import Engine
from gemwright.engine.request import Request, TokenEvent
from gemwright.engine.structured import Constraint
from gemwright.lm import LM
from gemwright.parallel import Mirror, TensorParallel
from gemwright.sampling import SamplingParams


class Ranked(Engine):
    """An engine whose calls on the first rank reach those of the others."""

    def __init__(self, lm: LM, *, parallel: TensorParallel, **size: Any) -> None:
        """`size`: rows, budget, cache_tokens as for `Engine`, the same on every rank."""
        super().__init__(lm, parallel=parallel, **size)
        calls: dict[str, Callable[..., Any]] = {"submit": self._submit, "cancel": super().cancel, "step": super().step}
        self.mirror = Mirror(parallel, calls)

    def _submit(self, request: dict[str, Any]) -> str:
        return super().submit(received(request))

    def submit(self, request: Request) -> str:
        params = request.params
        if params.seed is None:
            request = dataclasses.replace(request, params=dataclasses.replace(params, seed=secrets.randbits(63)))
        ident: str = self.mirror.first("submit", request=sent(request))
        return ident

    def cancel(self, ident: str, index: int | None = None) -> None:
        self.mirror.first("cancel", ident=ident, index=index)

    def step(self) -> list[TokenEvent]:
        events: list[TokenEvent] = self.mirror.together("step")
        return events


def close(engine: Engine | None) -> None:
    """Let the other ranks go, if there are any, after the engine's last step."""
    if isinstance(engine, Ranked):
        engine.mirror.close()


def follow(engine: Engine) -> int:
    """What the other ranks do: repeat the first one's calls until it closes. Signals are the first one's affair."""
    assert isinstance(engine, Ranked), engine
    for number in (signal.SIGTERM, signal.SIGINT):  # torchrun sends them to all
        signal.signal(number, signal.SIG_IGN)
    engine.mirror.follow()
    return 0


def sent(request: Request) -> dict[str, Any]:
    """A request as JSON data."""
    told = dataclasses.asdict(dataclasses.replace(request, tokens=list(request.tokens)))
    stop_ids = request.params.stop_ids
    told["params"]["stop_ids"] = None if stop_ids is None else sorted(stop_ids)
    return told


def received(told: dict[str, Any]) -> Request:
    """`sent`, undone."""
    params = told["params"] | {"logit_bias": dict(told["params"]["logit_bias"])}
    constraint = told["constraint"]
    return Request(
        **told
        | {
            "params": SamplingParams(**params),
            "constraint": None if constraint is None else Constraint(**constraint),
        }
    )
