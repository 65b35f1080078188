"""Batch: rows of documents as the model and the losses read them.

Place t of a row reads tokens_BT[b, t] and predicts targets_BT[b, t], the next token of the same document. Documents
lie side by side; doc_BT numbers them in ascending order, pos_BT counts from 0 inside each. Padding at a row's end:
position -1, weight 0, token and target 0, the number of the document before it.

    tokens   2  10  11  |  2  20  |  0
    targets  10 11   1  | 20   1  |  0
    weights  1   1   1  |  1   1  |  0
    pos      0   1   2  |  0   1  | -1
    doc      4   4   4  |  9   9  |  9

Legend: B rows, T places.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from gemwright.data.pack import Int64, Pieces
from gemwright.data.store import Documents
from gemwright.ops.attention import PADDING


@dataclass(frozen=True, eq=False)
class Batch:
    """Packed documents, all [B, T]: int64, the weights fp32."""

    tokens_BT: Tensor
    targets_BT: Tensor
    weights_BT: Tensor
    """Of each target in the loss; 0: none."""
    pos_BT: Tensor
    doc_BT: Tensor
    """Numbers of pieces, the same whatever seed, shuffling or packing: (doc, pos) names a place of the data set."""

    @property
    def count(self) -> int:
        """Targets that carry loss."""
        return int((self.weights_BT > 0).sum())

    @property
    def tokens(self) -> int:
        """Tokens that are not padding."""
        return int((self.pos_BT != PADDING).sum())

    def to(self, device: torch.device | str) -> Batch:
        """The same on another device; from pinned memory without waiting."""
        return replace(self, **{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})


def collate(documents: Documents, pieces: Pieces, rows: Sequence[Int64], width: int | None) -> Batch:
    """The batch of some rows, each given by the numbers of its pieces; `width` None: as wide as the widest."""
    if width is None:
        width = max(1, *(int(pieces.sizes(row).sum()) for row in rows))
    tokens, targets, doc = (np.zeros((len(rows), width), np.int64) for _ in range(3))
    weights, pos = np.zeros((len(rows), width), np.float32), np.full((len(rows), width), PADDING, np.int64)
    for b, row in enumerate(rows):
        at = 0
        for piece in row:
            read, weight = documents.piece(*pieces[piece])
            size = len(read) - 1
            here = slice(at, at + size)
            tokens[b, here], targets[b, here], weights[b, here] = read[:-1], read[1:], weight[1:]
            pos[b, here] = np.arange(size)
            doc[b, at:] = piece
            at += size
    return Batch(*map(torch.from_numpy, (tokens, targets, weights, pos, doc)))
