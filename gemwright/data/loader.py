"""Loader: batches in a fixed order, which every rank computes for itself, with a state to resume from.

The pieces of the documents are packed into rows once; an epoch is a permutation of the rows by (seed, epoch). Rows are
dealt out in this order, `rows` to a batch, one batch to each rank in turn:

    step      0                                  1
    batch     0       1       2       3          4  ...
    rank      0       1       0       1          0          world 2, accumulation 2

so two ranks together see, step by step, what one rank sees with twice the accumulation. An epoch that does not divide
into steps ends with a step filled up with empty rows (padding only, count 0): every document is seen once an epoch and
all ranks do the same number of passes. `drop_last` leaves that step out.

The state is the epoch, the number of rows dealt out in it, and what the order hangs on, which is compared when the
state is loaded. The batches after it are the same bit for bit; at the end of a step it may go to another number of
ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from gemwright.data.batch import Batch, collate
from gemwright.data.pack import Int64, Overlong, Pieces, Rows, best_fit, cut, one_each, permutation
from gemwright.data.rows import Document
from gemwright.data.store import Documents

_ORDER: Final = ("length", "seed", "shuffle", "packing", "overlong")
"""Fields that decide which rows there are and how they follow each other."""


@dataclass(frozen=True, kw_only=True)
class Batching:
    """How documents become batches."""

    length: int
    """Places of a row."""
    rows: int
    """Rows of a batch, on each rank."""
    accumulation: int = 1
    """Batches of a rank in one step."""
    rank: int = 0
    world: int = 1
    seed: int = 0
    shuffle: bool = True
    """Another order of rows in every epoch; without it, the order of the data."""
    packing: bool = True
    """Many documents in a row of exactly `length` places; otherwise one in a row, a batch as wide as its widest."""
    overlong: Overlong = "truncate"
    """Documents of more than `length` + 1 tokens: cut off, left out, or split into pieces."""
    drop_last: bool = False
    """Leave out an epoch's last step if it is not full."""

    def __post_init__(self) -> None:
        for field, least in {"length": 1, "rows": 1, "accumulation": 1, "world": 1, "seed": 0, "rank": 0}.items():
            value = getattr(self, field)
            if value < least or (field == "rank" and value >= self.world):
                allowed = f"0 to {self.world - 1}" if field == "rank" else f"{least} or more"
                raise ValueError(f"{field}: {value}; allowed: {allowed}")

    @property
    def deal(self) -> int:
        """Rows of one batch on every rank."""
        return self.rows * self.world

    @property
    def step_rows(self) -> int:
        """Rows of one step, over all ranks."""
        return self.deal * self.accumulation


class TooSmall(ValueError):
    """Not one document to train on, or with `drop_last` not one full step."""


class Loader:
    """Batches of a data set, from the first epoch on or from where a loaded state stands. Raises TooSmall."""

    def __init__(self, documents: Documents, batching: Batching, *, epochs: int | None = 1) -> None:
        self.documents, self.batching, self.epochs = documents, batching, epochs
        lengths = documents.lengths
        self.pieces = cut(lengths, batching.length, batching.overlong)
        kept = _with_loss(documents, self.pieces, lengths > batching.length + 1)
        self.without_loss = len(self.pieces) - len(kept)
        """Pieces of over-long documents that have no target with loss, and are left out."""
        if len(kept) == 0:
            raise TooSmall(f"data: no document to train on; {self.report()}")
        order = kept[permutation(len(kept), batching.seed)] if batching.shuffle else kept
        sizes = self.pieces.sizes(order)
        self.rows: Rows = best_fit(order, sizes, batching.length) if batching.packing else one_each(order)
        whole, rest = divmod(len(self.rows), batching.step_rows)
        self.steps = whole + (rest > 0 and not batching.drop_last)
        """Steps of an epoch."""
        if self.steps == 0:
            raise TooSmall(f"data: {rest} rows; with drop_last a step needs {batching.step_rows}")
        self.fill = float(sizes.sum()) / (len(self.rows) * batching.length)
        """Share of the places that tokens take, when packed."""
        self._epoch, self._row = 0, 0
        self._order = self._permuted()

    def report(self) -> str:
        """What happened to the documents, in words."""
        pieces, batching = self.pieces, self.batching
        parts = [f"{len(self.documents.lengths)} documents"]
        if pieces.overlong:
            done = {"truncate": "truncated", "drop": "dropped", "split": "split"}[batching.overlong]
            lost = f" ({pieces.tokens_lost} tokens left out)" if pieces.tokens_lost else ""
            parts.append(f"{pieces.overlong} longer than {batching.length + 1} tokens {done}{lost}")
        for count, what in (
            (self.documents.info.get("left_out", 0), "rows with nothing to learn left out"),
            (pieces.too_short, "of one token left out"),
            (self.without_loss, "without loss after that left out"),
        ):
            parts += [f"{count} {what}"] if count else []
        return ", ".join(parts)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batching = self.batching
        if self._row >= self.steps * batching.step_rows:
            self._epoch, self._row = self._epoch + 1, 0
            self._order = self._permuted()
        if self.epochs is not None and self._epoch >= self.epochs:
            self._epoch, self._row = self.epochs, 0
            raise StopIteration
        first = self._row + batching.rank * batching.rows
        chosen = [self.rows[int(row)] for row in self._order[first : first + batching.rows]]
        chosen += [np.empty(0, np.int64)] * (batching.rows - len(chosen))
        self._row += batching.deal
        return collate(self.documents, self.pieces, chosen, batching.length if batching.packing else None)

    def _permuted(self) -> Int64:
        """The rows in the order of the epoch."""
        if not self.batching.shuffle:
            return np.arange(len(self.rows))
        return permutation(len(self.rows), self.batching.seed, self._epoch + 1)

    def rest(self) -> list[Document]:
        """What `drop_last` leaves out of the epoch: its pieces, as documents."""
        rows = self._order[self.steps * self.batching.step_rows :]
        parts = (self.documents.piece(*self.pieces[int(piece)]) for row in rows for piece in self.rows[int(row)])
        return [Document(tokens.tolist(), weights.astype(np.int64).tolist()) for tokens, weights in parts]

    def rewind(self) -> None:
        """Back to the first batch."""
        self._epoch, self._row = 0, 0
        self._order = self._permuted()

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON data: where the next batch begins, and what the order hangs on."""
        order = {field: getattr(self.batching, field) for field in _ORDER}
        return {"epoch": self._epoch, "row": self._row, "data": self.documents.fingerprint, **order}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the state was taken.

        Raises:
            ValueError: another data set or another order (every difference is named), or a state from the middle of a
                step for another number of ranks or rows.
        """
        own = self.state_dict()
        _same(own, state, ("data", *_ORDER))
        if state["row"] % self.batching.deal:
            deal = f"{self.batching.rows} rows on each of {self.batching.world} ranks"
            raise ValueError(f"row: {state['row']} is no multiple of {deal}; only the end of a step fits any number")
        self._epoch, self._row = state["epoch"], state["row"]
        self._order = self._permuted()


def _same(own: Mapping[str, Any], state: Mapping[str, Any], fields: tuple[str, ...]) -> None:
    if differing := [field for field in fields if state.get(field) != own[field]]:
        named = "; ".join(f"{field} was {state.get(field)!r}, is {own[field]!r}" for field in differing)
        raise ValueError(f"the data would come in another order than where the state was taken: {named}")


def _with_loss(documents: Documents, pieces: Pieces, long: Any) -> Int64:
    """Numbers of the pieces that have a target with loss; a whole document always has one."""
    everything = np.arange(len(pieces))
    if all(shard.weights is None for shard in documents.shards):
        return everything
    keep = np.ones(len(pieces), bool)
    for piece in np.flatnonzero(long[pieces.document]):
        _, weights = documents.piece(*pieces[int(piece)])
        keep[piece] = bool(weights[1:].any())
    return everything[keep]
