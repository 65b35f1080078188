"""swap: the one mechanism that changes a model. Named linears are replaced by other modules with the same call.

Quantization, packing and LoRA all use it, so no subclass of the model and no flag inside it exist.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from torch import nn

Make = Callable[[str, nn.Linear], nn.Module]
"""Given a linear's full name and the linear, the module that takes its place."""


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place that a full name says, whatever is there."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def maker(name: str, makers: Mapping[str, Make]) -> str | None:
    """The first pattern that matches a linear's full name."""
    return next((pattern for pattern in makers if re.fullmatch(pattern, name)), None)


def swap(model: nn.Module, makers: Mapping[str, Make]) -> list[str]:
    """Replace every `nn.Linear` whose full name matches a regular expression (first match wins); names replaced.

    Raises ValueError for a pattern that matches nothing: a misspelt target would otherwise change nothing in silence.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    used: set[str] = set()
    replaced = []
    for name, linear in linears.items():
        pattern = maker(name, makers)
        if pattern is None:
            continue
        put(model, name, makers[pattern](name, linear))
        used.add(pattern)
        replaced.append(name)
    if unused := set(makers) - used:
        raise ValueError(
            f"swap: no linear matches {sorted(unused)}; the linears are named like {next(iter(linears))!r}"
        )
    return replaced
