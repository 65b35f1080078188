"""A source of tensors for the tests of adoption."""

from __future__ import annotations

from torch import Tensor


class Weights:
    """A `Source` over a state dict."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = state

    def tensor(self, name: str, rows: slice | None = None) -> Tensor:
        return self.state[name] if rows is None else self.state[name][rows]
