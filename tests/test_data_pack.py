"""Packing: every target is in exactly one place, rows written out by hand, and documents that never see each other."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import folder_fixtures
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gemwright.data.batch import Batch, collate
from gemwright.data.pack import Overlong, best_fit, cut, one_each, permutation
from gemwright.data.rows import Document
from gemwright.data.store import in_memory
from gemwright.loader import load_model

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=60)


def documents(lengths: list[int]) -> list[Document]:
    """Document d is d * 100, d * 100 + 1, ...; every third token carries no loss."""
    return [
        Document([d * 100 + i for i in range(n)], [int(i % 3 > 0) for i in range(n)]) for d, n in enumerate(lengths)
    ]


def targets(batch: Batch) -> Counter[tuple[int, int, float]]:
    """Every (token, the next, weight) that is not padding."""
    real = batch.pos_BT >= 0
    triples = zip(*(x[real].tolist() for x in (batch.tokens_BT, batch.targets_BT, batch.weights_BT)), strict=True)
    return Counter(triples)


def test_rows_by_hand() -> None:
    """Sizes 5, 4, 3, 2, 2, 1 in rows of 6: best fit puts 1 beside 5, 2 beside 4, and 2 beside 3."""
    sizes = np.array([5, 4, 3, 2, 2, 1])
    found = best_fit(np.array([10, 11, 12, 13, 14, 15]), sizes, 6)
    assert [found[row].tolist() for row in range(len(found))] == [[10, 15], [11, 13], [12, 14]]
    # the fullest of two open rows is closed before a third is opened: nothing fits beside 5 any more
    found = best_fit(np.arange(6), sizes, 6, open_rows=2)
    assert [found[row].tolist() for row in range(len(found))] == [[0], [1, 3], [2, 4, 5]]


def test_batch_by_hand() -> None:
    held = in_memory([Document([2, 10, 11, 1], [0, 0, 1, 1]), Document([2, 20, 1], [0, 1, 1])])
    pieces = cut(held.lengths, 6, "truncate")
    batch = collate(held, pieces, [np.array([0, 1]), np.array([], np.int64)], 6)
    assert batch.tokens_BT.tolist() == [[2, 10, 11, 2, 20, 0], [0] * 6]
    assert batch.targets_BT.tolist() == [[10, 11, 1, 20, 1, 0], [0] * 6]
    assert batch.weights_BT.tolist() == [[0, 1, 1, 1, 1, 0], [0] * 6]
    assert batch.pos_BT.tolist() == [[0, 1, 2, 0, 1, -1], [-1] * 6]
    assert batch.doc_BT.tolist() == [[0, 0, 0, 1, 1, 1], [0] * 6]
    assert (batch.count, batch.tokens) == (4, 5)
    assert batch.weights_BT.dtype == torch.float32
    assert {x.dtype for x in (batch.tokens_BT, batch.targets_BT, batch.pos_BT, batch.doc_BT)} == {torch.int64}


@given(LENGTHS, st.integers(1, 12), st.integers(1, 4), st.integers(0, 3))
def test_packing_loses_nothing(lengths: list[int], length: int, open_rows: int, seed: int) -> None:
    """Split: the targets in the rows are those of the documents, each once, each after the token before it."""
    held = in_memory(documents(lengths))
    pieces = cut(held.lengths, length, "split")
    order = permutation(len(pieces), seed)
    for rows in (best_fit(order, pieces.sizes(order), length, open_rows), one_each(order)):
        batch = collate(held, pieces, [rows[row] for row in range(len(rows))], length) if len(rows) else None
        due: Counter[tuple[int, int, float]] = Counter()
        for tokens, weights in documents(lengths):
            due.update(zip(tokens, tokens[1:], map(float, weights[1:]), strict=False))
        assert (targets(batch) if batch else Counter()) == due
        if batch is None:
            continue
        # positions count from 0 inside each number, numbers ascend, padding lies at the end
        for pos, doc in zip(batch.pos_BT.tolist(), batch.doc_BT.tolist(), strict=True):
            size = sum(p >= 0 for p in pos)
            assert all(p == -1 for p in pos[size:])
            assert doc == sorted(doc)
            runs = {number: [p for p, d in zip(pos[:size], doc[:size], strict=True) if d == number] for number in doc}
            assert all(run == list(range(len(run))) for run in runs.values())


@given(LENGTHS, st.integers(1, 12))
def test_over_long_documents(lengths: list[int], length: int) -> None:
    """Truncated or dropped, and counted: a row reads at most `length` tokens and predicts one more."""
    long = [n for n in lengths if n > length + 1]
    truncated, dropped = (cut(np.array(lengths), length, how) for how in ("truncate", "drop"))
    assert [truncated[i] for i in range(len(truncated))] == [
        (d, 0, min(n, length + 1)) for d, n in enumerate(lengths) if n > 1
    ]
    assert [dropped[i] for i in range(len(dropped))] == [
        (d, 0, n) for d, n in enumerate(lengths) if 1 < n <= length + 1
    ]
    assert (truncated.overlong, truncated.tokens_lost) == (len(long), sum(long) - len(long) * (length + 1))
    assert (dropped.overlong, dropped.tokens_lost) == (len(long), sum(long))
    assert truncated.too_short == dropped.too_short == lengths.count(1)


def test_split_by_hand() -> None:
    """A document of 9 tokens in rows of 4 places: two pieces of 5 tokens that share one."""
    pieces = cut(np.array([9, 5, 6]), 4, "split")
    assert [pieces[i] for i in range(len(pieces))] == [(0, 0, 5), (0, 4, 9), (1, 0, 5), (2, 0, 5), (2, 4, 6)]
    assert (pieces.overlong, pieces.tokens_lost) == (2, 0)


def test_rows_are_well_filled() -> None:
    """Lengths spread as in chats: more than 97 % of the places are tokens; first come, first served gives 80."""
    generator = np.random.Generator(np.random.PCG64(0))
    sizes = np.minimum(generator.lognormal(5.5, 0.8, 4000).astype(np.int64) + 1, 1024)
    rows = best_fit(np.arange(len(sizes)), sizes, 1024)
    assert sizes.sum() / (len(rows) * 1024) > 0.97
    assert sorted(rows.items.tolist()) == list(range(len(sizes)))


def test_permutation_stays_as_it_is() -> None:
    """Written down once: another order would break the resuming of runs across versions."""
    assert permutation(8, 0, 1).tolist() == [7, 4, 5, 1, 6, 2, 0, 3]
    assert permutation(8, 1, 1).tolist() != permutation(8, 0, 1).tolist() != permutation(8, 0, 2).tolist()


def test_bad_options() -> None:
    bad: Overlong = "cut"  # type: ignore[assignment]
    with pytest.raises(ValueError, match="overlong: 'cut'; allowed: truncate, drop, split"):
        cut(np.array([3]), 4, bad)
    with pytest.raises(ValueError, match="length: 0; allowed: 1 or more"):
        cut(np.array([3]), 0, "drop")


def test_documents_never_see_each_other(tmp_path: Path) -> None:
    """Hidden states in a packed row are those of each document alone, windows and all."""
    config = folder_fixtures.gemma2(tmp_path / "m", sliding_window=5)
    model = load_model(tmp_path / "m", device=torch.device("cpu"), dtype=torch.float32)
    generator = np.random.Generator(np.random.PCG64(1))
    texts = [generator.integers(0, config.vocab_size, n).tolist() for n in (9, 4, 7, 12, 3)]
    held = in_memory(Document(tokens, [1] * len(tokens)) for tokens in texts)
    pieces = cut(held.lengths, 16, "truncate")
    rows = best_fit(np.arange(5), pieces.sizes(np.arange(5)), 16)
    assert len(rows) < 5
    batch = collate(held, pieces, [rows[row] for row in range(len(rows))], 16)
    with torch.no_grad():
        packed_BTD = model(batch.tokens_BT, batch.pos_BT, batch.doc_BT)
        for number, tokens in enumerate(texts):
            alone_BT = torch.tensor([tokens[:-1]])
            due = model(alone_BT, torch.arange(alone_BT.shape[1])[None])[0]
            here = (batch.doc_BT == number) & (batch.pos_BT >= 0)
            torch.testing.assert_close(packed_BTD[here], due, rtol=1e-4, atol=1e-5)
        together_BTD = model(batch.tokens_BT, batch.pos_BT, torch.zeros_like(batch.doc_BT))
    assert (together_BTD - packed_BTD).abs().max() > 0.1, "without the numbers they would"
