"""A small Llama, and a source of tensors, for the tests of adoption."""

from __future__ import annotations

from typing import Any

from torch import Tensor

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 300,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
"""Of a small Llama's configuration, all but its widths."""


class Weights:
    """A `Source` over a state dict."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = state

    def tensor(self, name: str, rows: slice | None = None) -> Tensor:
        return self.state[name] if rows is None else self.state[name][rows]
