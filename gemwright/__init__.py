"""Gemwright: the whole Gemma 2 recipe, exactly and fast.

    import gemwright
    lm = gemwright.load("google/gemma-2-2b-it")
    print(lm.generate("Once upon", max_new_tokens=64).text)

A public name is imported where it is first used: `import gemwright` alone does not load torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gemwright.checkpoint import Checkpoint
    from gemwright.config import ModelConfig
    from gemwright.engine.engine import Engine
    from gemwright.engine.request import Request
    from gemwright.engine.structured import Constraint
    from gemwright.lm import LM, load, pipeline
    from gemwright.sampling import SamplingParams

__version__ = "0.1.0"
__all__ = [
    "LM",
    "Checkpoint",
    "Constraint",
    "Engine",
    "ModelConfig",
    "Request",
    "SamplingParams",
    "__version__",
    "load",
    "pipeline",
]

_MODULES = {
    "Checkpoint": "checkpoint",
    "Constraint": "engine.structured",
    "Engine": "engine.engine",
    "LM": "lm",
    "ModelConfig": "config",
    "Request": "engine.request",
    "SamplingParams": "sampling",
    "load": "lm",
    "pipeline": "lm",
}


def __getattr__(name: str) -> object:
    """Import a public name on first use and keep it (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module 'gemwright' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"gemwright.{_MODULES[name]}"), name)
    globals()[name] = value
    return value
