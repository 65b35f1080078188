"""Batches with what the teacher says of them, where that is known beforehand.

Legend: B rows, T places.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gemwright.data.batch import Batch
from gemwright.data.loader import Loader
from gemwright.train.teacher_cache import Targets, TeacherCache


@dataclass(frozen=True, eq=False)
class Taught:
    """A batch, and what the teacher says of it where that is known beforehand."""

    batch: Batch
    targets: Targets | None = None

    @property
    def pos_BT(self) -> Tensor:  # noqa: N802
        """Positions, as the batch has them."""
        return self.batch.pos_BT

    @property
    def count(self) -> int:
        """Targets that carry loss."""
        return self.batch.count

    @property
    def tokens(self) -> int:
        """Tokens that are not padding."""
        return self.batch.tokens

    def to(self, device: torch.device | str) -> Taught:
        """The same on another device."""
        return Taught(self.batch.to(device), None if self.targets is None else self.targets.to(device))


class Lessons:
    """A loader's batches, each with what a cache says of it."""

    def __init__(self, loader: Loader, cache: TeacherCache | None) -> None:
        self.loader, self.cache = loader, cache

    def __iter__(self) -> Iterator[Taught]:
        return self

    def __next__(self) -> Taught:
        batch = next(self.loader)
        return Taught(batch, None if self.cache is None else self.cache.read(batch))

    def rewind(self) -> None:
        """Back to the first batch."""
        self.loader.rewind()

    def state_dict(self) -> dict[str, Any]:
        """The loader's state."""
        return self.loader.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the state was taken."""
        self.loader.load_state_dict(state)
