"""Packing: which part of which document lies in which row. Arithmetic on lengths; no tokens, no torch.

A document of n tokens has n - 1 targets and takes n - 1 places: place i reads token i and predicts token i + 1, so the
last token is never read. A row has T places.

Over-long documents, those of more than T + 1 tokens, are truncated, dropped, or split into pieces of T + 1 tokens that
overlap by one, so that every target stays. `Pieces` are numbered in the order of the documents, whatever is packed
where; the number is the same for every seed.

Rows are filled by best fit, online: a piece goes into the fullest open row that still has room; when too many rows are
open, the fullest is closed. Best fit never cuts a document for the sake of packing (arXiv 2404.10830). Packing happens
once; an epoch permutes the rows, so that the number of steps is known beforehand.

All of this takes about 60 bytes and some microseconds a piece.

Permutations are the order of raw random words: numpy promises those, and not `permutation`, to stay as they are.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import Final, Literal, get_args

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]
Overlong = Literal["truncate", "drop", "split"]
OPEN_ROWS: Final = 512


@dataclass(frozen=True)
class Pieces:
    """Tokens [start, stop) of a document, for each piece; and what happened to the documents."""

    document: Int64
    start: Int64
    stop: Int64
    overlong: int
    """Documents of more than T + 1 tokens."""
    tokens_lost: int
    """Tokens of theirs that are in no piece."""
    too_short: int
    """Documents of fewer than two tokens: there is nothing to predict."""

    def __len__(self) -> int:
        return len(self.document)

    def __getitem__(self, piece: int) -> tuple[int, int, int]:
        """Document, start and stop."""
        return int(self.document[piece]), int(self.start[piece]), int(self.stop[piece])

    def sizes(self, which: Int64) -> Int64:
        """Places that each of some pieces takes."""
        return self.stop[which] - self.start[which] - 1


@dataclass(frozen=True)
class Rows:
    """Row r holds the pieces items[starts[r] : starts[r + 1]], in ascending order."""

    items: Int64
    starts: Int64

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> Int64:
        return self.items[self.starts[row] : self.starts[row + 1]]


def permutation(count: int, *key: int) -> Int64:
    """A permutation of range(count) from a key of non-negative integers."""
    words = np.random.PCG64(np.random.SeedSequence(key)).random_raw(count)
    return np.argsort(words, kind="stable").astype(np.int64)


def cut(lengths: Int64, length: int, overlong: Overlong) -> Pieces:
    """Pieces of at most `length` + 1 tokens from documents of `lengths` tokens."""
    if overlong not in get_args(Overlong):
        raise ValueError(f"overlong: {overlong!r}; allowed: {', '.join(get_args(Overlong))}")
    if length < 1:
        raise ValueError(f"length: {length}; allowed: 1 or more")
    document = np.flatnonzero(lengths > 1).astype(np.int64)
    long = lengths > length + 1
    if overlong == "drop":
        document = document[~long[document]]
    counts = -(-(lengths[document] - 1) // length) if overlong == "split" else np.ones_like(document)
    first = np.cumsum(counts) - counts
    start = (np.arange(counts.sum()) - np.repeat(first, counts)) * length
    document = np.repeat(document, counts)
    stop = np.minimum(start + length + 1, lengths[document])
    lost = {"drop": int(lengths[long].sum()), "truncate": int((lengths[long] - length - 1).sum()), "split": 0}
    return Pieces(document, start, stop, int(long.sum()), lost[overlong], int((lengths < 2).sum()))


def one_each(pieces: Int64) -> Rows:
    """Every piece in a row of its own."""
    return Rows(pieces, np.arange(len(pieces) + 1))


def best_fit(pieces: Int64, sizes: Int64, length: int, open_rows: int = OPEN_ROWS) -> Rows:
    """Rows of `length` places from pieces, taken in the order given; rows are in the order of their first piece.

    `sizes` are those of the pieces given. The same input gives the same rows.
    """
    assert len(sizes) == 0 or 1 <= sizes.min() <= sizes.max() <= length, (sizes.min(), sizes.max(), length)
    row_of = np.empty(len(pieces), np.int64)
    room: list[tuple[int, int]] = []  # of the open rows: places left, row; ascending
    rows = 0
    for index, size in enumerate(array("q", sizes.tobytes())):
        at = bisect_left(room, (size, -1))
        if at < len(room):
            left, row = room.pop(at)
        else:
            left, row, rows = length, rows, rows + 1
            if len(room) == open_rows:
                del room[0]
        row_of[index] = row
        if left > size:
            insort(room, (left - size, row))
    order = np.lexsort((pieces, row_of))
    return Rows(pieces[order], np.concatenate([np.zeros(1, np.int64), np.cumsum(np.bincount(row_of, minlength=rows))]))
