"""Rollouts: what a policy that is being trained generates, with what a policy gradient needs to know of it.

The trainer owns the module; the engine runs over `twin`, which shares its parameters. After each update the trainer
calls `engine.refresh()`, and, where memory is short, `engine.release()` before it steps.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

from gemwright.engine.engine import Engine
from gemwright.engine.request import Finish, Request
from gemwright.model import Gemma2
from gemwright.ops.linear import cpu_linear
from gemwright.sampling import SamplingParams
from gemwright.swap import swap


@dataclass(frozen=True)
class Rollout:
    """One answer of the policy."""

    prompt: list[int]
    tokens: list[int]
    """With the stop id that ended it: ending is an action, too."""
    logprobs: list[float]
    """Of each token under the distribution it was drawn from, in nats."""
    version: int
    """Which weights drew it: counts the engine's refreshes."""
    finish: Finish


def rollout(engine: Engine, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[list[Rollout]]:
    """For each prompt its n answers. RuntimeError where the engine fails on one."""
    version = engine.version
    requests = [
        Request(id=f"rollout-{i}", tokens=prompt, params=params, policy_logprobs=True)
        for i, prompt in enumerate(prompts)
    ]
    empty = Rollout([], [], [], version, "cancelled")
    found = {
        (request.id, n): replace(empty, prompt=list(request.tokens), tokens=[], logprobs=[])
        for request in requests
        for n in range(params.n)
    }
    for event in engine.stream(requests):
        if event.finish == "error":
            raise RuntimeError(f"rollout: prompt {event.id.removeprefix('rollout-')} failed: {event.error}")
        one = found[event.id, event.index]
        if event.token is not None and event.policy_logprob is not None:
            one.tokens.append(event.token)
            one.logprobs.append(event.policy_logprob)
        if event.finish is not None:
            found[event.id, event.index] = replace(one, finish=event.finish)
    assert engine.version == version, "the weights changed while the policy was generating"
    return [[found[request.id, n] for n in range(params.n)] for request in requests]


def twin(model: Gemma2) -> Gemma2:
    """A model in evaluation mode that shares another's parameters, its linears in the form that is read fastest.

    Where that form is a copy (packed weights), call this again after an update; elsewhere the twin follows by itself.
    """
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    other = copy.deepcopy(model, shared)
    for module in other.modules():
        module.__dict__.pop("forward", None)  # what training has put around a block: compilation, recomputation
    if model.model.embed_tokens.weight.device.type == "cpu":
        swap(other, {".*": lambda _, linear: cpu_linear(linear, keep=True)})
    return other.eval()
