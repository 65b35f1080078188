"""KVCache: however a text is cut into chunks, rows moved or drafts rejected, the logits are those of one whole forward.

Legend: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import TOLERANCE, debug, forward, oracle_logits, ours, pair, positions, read, relative, tokens, weights
from torch import Tensor

from gemwright import cache as cache_module
from gemwright.cache import KVCache
from gemwright.config import GLOBAL, LOCAL, ModelConfig
from gemwright.model import Gemma2
from gemwright.ops.attention import EMPTY, PADDING

CONFIG = debug()  # window 8


@pytest.fixture(scope="module")
def model() -> Gemma2:
    return ours(CONFIG, weights(CONFIG))


def cache_of(rows: int, length: int, chunk: int, config: ModelConfig = CONFIG) -> KVCache:
    return KVCache(config, rows, length, chunk=chunk, dtype=torch.float32)


@pytest.mark.parametrize("sizes", [[1], [5], [64], [3, 1, 1, 7], [16, 1]], ids=str)
def test_far_past_the_window(sizes: list[int]) -> None:
    """60 tokens with a window of 8: the ring is overwritten several times, in chunks that do and do not divide it."""
    a, b = pair(CONFIG)
    text = tokens(CONFIG, 2, 60)
    assert relative(read(a, text, sizes), oracle_logits(b, text)) < TOLERANCE


@settings(max_examples=15, deadline=None, derandomize=True)
@given(sizes=st.lists(st.integers(1, 11), min_size=1, max_size=8), window=st.integers(1, 12))
def test_invariant_to_chunking(sizes: list[int], window: int) -> None:
    config = debug(sliding_window=window, num_hidden_layers=2)
    model = ours(config, weights(config))
    text = tokens(config, 1, 30)
    assert relative(read(model, text, sizes), forward(model, text)) < TOLERANCE


def test_one_slot_too_few_is_seen(model: Gemma2, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ring is as small as it may be: with one slot fewer a chunk's first query loses a key of its window."""
    text = tokens(CONFIG, 2, 40)
    want = forward(model, text)
    for sizes in ([5], [1]):
        assert relative(read(model, text, sizes), want) < TOLERANCE

    class Short(cache_module._Ring):
        def __init__(self, rows: int, capacity: int, device: torch.device) -> None:
            super().__init__(rows, capacity if capacity == text.shape[1] else capacity - 1, device)

    monkeypatch.setattr(cache_module, "_Ring", Short)
    for sizes in ([5], [1]):
        assert relative(read(model, text, sizes), want) > 100 * TOLERANCE


@pytest.mark.parametrize("draft", [1, 3, 4])
@pytest.mark.parametrize("start", [3, 8, 29])
def test_rejected_draft_leaves_no_trace(model: Gemma2, start: int, draft: int) -> None:
    """Tokens written past `start` and written over again: what follows equals a run that never saw them."""
    text = tokens(CONFIG, 2, 45)
    cache = cache_of(2, 64, chunk=4)
    read(model, text[:, :start], [4], cache=cache)
    wrong = tokens(CONFIG, 2, draft, seed=9)
    model(wrong, torch.arange(start, start + draft).expand(2, -1), cache=cache)
    got = read(model, text, [2, 1, 4], cache=cache, start=start)
    assert relative(got, forward(model, text)[:, start:]) < TOLERANCE


def test_rows_of_their_own_lengths(model: Gemma2) -> None:
    """Ragged rows past their rings: read with padding on the right, decoded each at its own position, one with a pause.

    Padding that took a slot of the ring would cost a live key of the row that waits.
    """
    text, lengths = tokens(CONFIG, 3, 40), [20, 7, 13]
    want = forward(model, text)
    cache = cache_of(3, 64, chunk=4)
    pos = positions(3, 20).where(positions(3, 20) < torch.tensor(lengths)[:, None], PADDING)
    for start in range(0, 20, 4):
        chunk = slice(start, start + 4)
        model(text[:, chunk], pos[:, chunk], cache=cache)
    at = torch.tensor(lengths)
    for step in range(18):
        active = torch.tensor([True, not 9 <= step < 13, True])
        pos_B1 = at.where(active, PADDING)[:, None]
        logits = model.logits(model(text[torch.arange(3), at][:, None], pos_B1, cache=cache))[:, 0]
        for row in active.nonzero().flatten().tolist():
            assert relative(logits[row], want[row, at[row]]) < TOLERANCE
        at += active


def test_reset_of_one_row(model: Gemma2) -> None:
    """A row that is reset takes another text; its neighbour goes on as if nothing had happened."""
    text, other = tokens(CONFIG, 2, 40), tokens(CONFIG, 1, 40, seed=5)
    cache = cache_of(2, 64, chunk=30)
    read(model, text[:, :30], [30], cache=cache)
    cache.reset(0)
    with pytest.raises(AssertionError, match="row 0 no longer holds"):
        cache.copy(0, 1, 5)
    pos = torch.stack([torch.arange(10), torch.arange(30, 40)])
    logits = model.logits(model(torch.stack([other[0, :10], text[1, 30:]]), pos, cache=cache))
    assert relative(logits[0], forward(model, other)[0, :10]) < TOLERANCE
    assert relative(logits[1], forward(model, text)[1, 30:]) < TOLERANCE


def test_reset_of_all_rows(model: Gemma2) -> None:
    text, other = tokens(CONFIG, 2, 40), tokens(CONFIG, 2, 12, seed=5)
    cache = cache_of(2, 64, chunk=8)
    read(model, text, [8], cache=cache)
    cache.reset()
    keys_BS, _ = cache.advance(positions(2, 3))
    assert keys_BS.shape == (2, 3)  # only live slots are attended to
    cache.reset()
    assert relative(read(model, other, [5, 2], cache=cache), forward(model, other)) < TOLERANCE


@pytest.mark.parametrize("length", [5, 9, 21])
def test_copy_of_a_prefix(model: Gemma2, length: int) -> None:
    """A row continues from another row's prefix; the source goes on too. What the target held is gone."""
    text = tokens(CONFIG, 1, 40)
    branch = torch.cat([text[:, :length], tokens(CONFIG, 1, 40 - length, seed=4)], dim=1)
    cache = cache_of(2, 64, chunk=24)
    held = length + 3  # the source has gone on a little
    first = torch.cat([text[:, :held], tokens(CONFIG, 1, held, seed=8)])
    read(model, first, [24], cache=cache)
    cache.copy(0, 1, length)
    with pytest.raises(AssertionError, match="row 1 no longer holds"):
        cache.copy(1, 0, length + 1)  # what the source held past `length` was not given
    want = torch.cat([forward(model, text), forward(model, branch)])
    pos = torch.stack([torch.arange(held, held + 10), torch.arange(length, length + 10)])
    both = torch.stack([text[0, held : held + 10], branch[0, length : length + 10]])
    logits = model.logits(model(both, pos, cache=cache))
    assert relative(logits[0], want[0, held : held + 10]) < TOLERANCE
    assert relative(logits[1], want[1, length : length + 10]) < TOLERANCE


def test_copy_of_what_was_overwritten_is_refused(model: Gemma2) -> None:
    cache = cache_of(2, 64, chunk=4)
    read(model, tokens(CONFIG, 2, 40), [4], cache=cache)
    cache.copy(0, 1, 40)
    with pytest.raises(AssertionError, match="no longer holds the window before position 20"):
        cache.copy(0, 1, 20)


@pytest.mark.parametrize("pad", ["left", "middle"])
def test_padding_is_never_written(pad: str) -> None:
    """Padding tokens change no slot that is read, wherever they stand in the chunk."""
    cache = cache_of(1, 16, chunk=4)
    pos = {"left": [[PADDING, PADDING, 0, 1]], "middle": [[0, PADDING, PADDING, 1]]}[pad]
    for keys_BS in cache.advance(torch.tensor(pos)):
        assert keys_BS.tolist() == [[0, 1]]
    k_B4KH = torch.arange(1.0, 5.0)[None, :, None, None].expand(1, 4, 2, 16)
    k_BSKH, _ = cache.write(0, k_B4KH, k_B4KH)
    assert k_BSKH[0, :, 0, 0].tolist() == ([3.0, 4.0] if pad == "left" else [1.0, 4.0])


def test_slots_are_positions_modulo_capacity() -> None:
    """By hand: window 8 and chunks of 4 give a ring of 11, so position 12 lies in slot 1."""
    cache = cache_of(1, 32, chunk=4)
    for start in (0, 4, 8):
        local_BS, global_BS = cache.advance(torch.arange(start, start + 4)[None])
    assert local_BS.tolist() == [[11, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]]
    assert global_BS.tolist() == [list(range(12))]
    cache.advance(torch.tensor([[12, 13]]))
    assert cache.local.pos_BS[0, :4].tolist() == [11, 12, 13, 3]
    assert cache.local.pos_BS[0, -1] == EMPTY


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda c: c.advance(positions(1, 5)), "5 tokens in one pass, the cache was made for chunks of 4"),
        (lambda c: c.advance(torch.tensor([[32]])), "position 32, the cache holds 32"),
        (lambda c: KVCache(CONFIG, 0, 8), r"\(0, 8, 512\)"),
    ],
)
def test_broken_invariants_are_asserted(act: Callable[[KVCache], object], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        act(cache_of(1, 32, chunk=4))


@pytest.mark.parametrize(("chunk", "length"), [(1, 64), (16, 64), (64, 4)])
@pytest.mark.parametrize("kinds", [[LOCAL, GLOBAL, LOCAL], [LOCAL] * 3, [GLOBAL] * 3])
def test_bytes(kinds: list[str], chunk: int, length: int) -> None:
    """Keys and values take what the config says for the window, chunk - 1 local slots and a spare slot a layer more."""
    config = debug(layer_types=kinds)
    slots = sum(min(8 + chunk - 1, length) if kind == LOCAL else length for kind in kinds)
    slot_bytes = 2 * 2 * 16 * 4  # keys and values, two heads of 16 in fp32
    assert cache_of(1, length, chunk, config).nbytes == (slots + len(kinds)) * slot_bytes
    if chunk == 1:
        assert slots * slot_bytes == config.kv_bytes(length, itemsize=4)


def test_bf16_storage_is_near(model: Gemma2) -> None:
    """A bf16 cache under an fp32 model rounds keys and values, and nothing else: the logits stay near."""
    text = tokens(CONFIG, 1, 30)
    keep = KVCache(CONFIG, 1, 30, chunk=5, dtype=torch.bfloat16)
    got, want = read(model, text, [5], cache=keep), forward(model, text)
    assert 1e-4 < relative(got, want) < 0.3


def test_views_are_of_the_storage() -> None:
    """What is attended to is no copy: a long cache costs no memory a step."""
    cache = cache_of(1, 32, chunk=4)
    cache.advance(positions(1, 4))
    k_B4KH = torch.randn(1, 4, 2, 16)
    k_BSKH: Tensor = cache.write(1, k_B4KH, k_B4KH)[0]
    assert torch.equal(k_BSKH, k_B4KH)
    assert k_BSKH.untyped_storage().data_ptr() == cache._k_BKSH[1].untyped_storage().data_ptr()
