"""A tiny Gemma 2 folder with a tokenizer, weights at random and every trait in place."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizer_fixtures
import torch
from torch import Tensor

from gemwright.checkpoint import write
from gemwright.config import ModelConfig
from gemwright.tokenizer import Tokenizer

WORDS = "The capital of France is Paris and of Italy Rome hello how are you fine thank".split()
GENERATION: dict[str, Any] = {"eos_token_id": [1, 107]}


def weights(config: ModelConfig, dtype: torch.dtype = torch.float32) -> Iterator[tuple[str, Tensor]]:
    """The same numbers at every call."""
    generator = torch.Generator().manual_seed(0)
    for name, shape in config.parameter_shapes().items():
        spread = 0.3 if len(shape) == 1 else 0.2
        yield name, (torch.randn(shape, generator=generator) * spread).to(dtype)


def gemma2(
    folder: Path, *, dtype: torch.dtype = torch.float32, generation: dict[str, Any] = GENERATION, **changes: Any
) -> ModelConfig:
    """Write the folder in a storage dtype, with changes to the debug configuration; returns that."""
    tokens = tokenizer_fixtures.gemma(
        folder.with_name(f"{folder.name}-tokens"),
        config={**tokenizer_fixtures.CONFIG, "chat_template": tokenizer_fixtures.PUBLISHED},
    )
    size = Tokenizer.load(tokens).vocab_size
    config = dataclasses.replace(ModelConfig.preset("debug"), **{"vocab_size": size, "layer_types": (), **changes})
    config = dataclasses.replace(config, dtype=str(dtype).removeprefix("torch."))
    write(folder, weights(config, dtype), config=config.to_hf(), generation_config=generation, copy_from=tokens)
    return config


def chats(path: Path, count: int = 12) -> Path:
    """Conversations of one or two turns, each row different."""
    rows = []
    for i in range(count):
        turns = [
            {"role": role, "content": " ".join(WORDS[(i + k + j) % len(WORDS)] for j in range(2 + i % 4))}
            for k in range(1 + i % 2)
            for role in ("user", "assistant")
        ]
        rows.append(json.dumps({"messages": turns}))
    path.write_text("\n".join(rows))
    return path
