"""A tiny Gemma 2 folder made on the spot: random weights that make caps and window bite, and a Gemma-like tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import tokenizer_fixtures
from gemwright.checkpoint import write
from gemwright.tokenizer import Tokenizer
from oracle import debug, weights


def tiny(
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    generation_config: dict[str, Any] | None = None,
    **changes: object,
) -> Path:
    """A checkpoint folder of debug size whose vocabulary is the tokenizer's."""
    words = tokenizer_fixtures.gemma(folder.parent / f"{folder.name}-tokenizer")
    vocab = Tokenizer.load(words).vocab_size
    config = debug(**{"vocab_size": vocab, "eos_token_id": 1, **changes})
    state = {name: x.to(dtype) for name, x in weights(config).items()}
    generation = {"eos_token_id": [1, 107]} if generation_config is None else generation_config
    raw = {**config.to_hf(), "dtype": str(dtype).removeprefix("torch.")}
    return write(folder, state.items(), config=raw, generation_config=generation, copy_from=words)
