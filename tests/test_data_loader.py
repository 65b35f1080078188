"""Loader and Stream: resuming at any batch, any number of ranks, epochs, and the steps at their ends."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import tokenizer_fixtures
import torch

from gemwright.data.batch import Batch
from gemwright.data.loader import Batching, Loader, TooSmall
from gemwright.data.prepare import tokenize
from gemwright.data.rows import Document, Format
from gemwright.data.sources import open_source
from gemwright.data.store import Documents, in_memory
from gemwright.data.stream import Stream
from gemwright.tokenizer import Tokenizer

BASE = Batching(length=12, rows=2, seed=3)


def numbered(count: int = 40) -> Documents:
    """Document d has 2 to 13 tokens of the value d."""
    sizes = [2 + d * 7 % 12 for d in range(count)]
    return in_memory(Document([d] * n, [0] + [1] * (n - 1)) for d, n in enumerate(sizes))


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(getattr(a, field.name), getattr(b, field.name)) for field in fields(Batch))


def all_same(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) > 0 and all(map(same, a, b))


def seen(batches: list[Batch]) -> Counter[int]:
    """How often each document is read as a whole: tokens of its number, over its places."""
    places: Counter[int] = Counter()
    for batch in batches:
        places.update(batch.tokens_BT[batch.pos_BT >= 0].tolist())
    return Counter({d: n / (1 + d * 7 % 12) for d, n in places.items()})


@pytest.mark.parametrize("packing", [True, False])
def test_every_document_once_an_epoch(packing: bool) -> None:
    loader = Loader(numbered(), replace(BASE, packing=packing, accumulation=3), epochs=2)
    batches = list(loader)
    assert len(batches) == 2 * 3 * loader.steps
    first, second = batches[: 3 * loader.steps], batches[3 * loader.steps :]
    assert seen(first) == seen(second) == dict.fromkeys(range(40), 1.0)
    assert not all(same(a, b) for a, b in zip(first, second, strict=True)), "epochs are shuffled apart"
    assert all(batch.tokens_BT.shape == (2, 12) for batch in batches) == packing
    loader.rewind()
    assert all_same(list(loader), batches)


def test_the_last_step() -> None:
    """7 rows in steps of 2 x 2: a second step of 3 rows and an empty one, or, dropped, one step."""
    held = in_memory(Document([5] * 12, [1] * 12) for _ in range(7))
    batching = replace(BASE, accumulation=2)
    assert [batch.count for batch in Loader(held, batching)] == [22, 22, 22, 11]
    loader = Loader(held, replace(batching, drop_last=True))
    assert [batch.count for batch in loader] == [22, 22]
    assert [len(document.tokens) for document in loader.rest()] == [12] * 3
    short = Loader(in_memory(Document([5] * 12, [1] * 12) for _ in range(5)), batching)
    assert [batch.count for batch in short] == [22, 22, 11, 0]
    with pytest.raises(TooSmall, match="data: 7 rows; with drop_last a step needs 8"):
        Loader(held, replace(batching, rows=4, drop_last=True))


def test_order_of_the_data_without_shuffling() -> None:
    loader = Loader(numbered(9), replace(BASE, shuffle=False, packing=False, rows=3))
    assert [batch.tokens_BT[:, 0].tolist() for batch in loader] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


@pytest.mark.parametrize("packing", [True, False])
def test_resume_at_every_batch(packing: bool) -> None:
    """A state that went through JSON continues bit for bit, over the ends of epochs too."""
    batching = replace(BASE, packing=packing, accumulation=2)
    loader = Loader(numbered(), batching, epochs=3)
    states, batches = [json.dumps(loader.state_dict())], []
    for batch in loader:
        batches.append(batch)
        states.append(json.dumps(loader.state_dict()))
    for at in range(len(batches)):
        resumed = Loader(numbered(), batching, epochs=3)
        resumed.load_state_dict(json.loads(states[at]))
        assert same(next(resumed), batches[at])
    resumed.load_state_dict(json.loads(states[5]))
    assert all_same(list(resumed), batches[5:])
    resumed.load_state_dict(json.loads(states[-1]))
    assert list(resumed) == []


@pytest.mark.parametrize("packing", [True, False])
def test_ranks_together_see_what_one_sees(packing: bool) -> None:
    one = list(Loader(numbered(), replace(BASE, packing=packing, accumulation=4), epochs=2))
    for world, accumulation in ((2, 2), (4, 1)):
        ranks = [
            list(
                Loader(
                    numbered(), replace(BASE, packing=packing, accumulation=accumulation, rank=r, world=world), epochs=2
                )
            )
            for r in range(world)
        ]
        assert all_same([batch for turn in zip(*ranks, strict=True) for batch in turn], one)


def test_resume_with_another_number_of_ranks() -> None:
    one = list(Loader(numbered(), replace(BASE, accumulation=2)))
    every = Loader(numbered(), replace(BASE, rows=1, world=3))
    every.load_state_dict({**every.state_dict(), "row": 300})  # the end of the epoch, rounded up elsewhere
    assert list(every) == []
    saved = Loader(numbered(), replace(BASE, world=2, rank=1))
    next(saved)  # one step
    resumed = Loader(numbered(), replace(BASE, accumulation=2))
    resumed.load_state_dict(saved.state_dict())
    assert all_same(list(resumed), one[2:])
    middle = Loader(numbered(), replace(BASE, accumulation=2))
    next(middle)
    with pytest.raises(ValueError, match="row: 2 is no multiple of 2 rows on each of 2 ranks"):
        saved.load_state_dict(middle.state_dict())


def test_a_state_of_other_data_or_order_is_refused() -> None:
    state = Loader(numbered(), BASE).state_dict()
    with pytest.raises(ValueError, match=r"another order .*: seed was 3, is 4; packing was True, is False"):
        Loader(numbered(), replace(BASE, seed=4, packing=False)).load_state_dict(state)
    with pytest.raises(ValueError, match=r"another order .*: data was '"):
        Loader(numbered(39), BASE).load_state_dict(state)


def test_what_is_left_out_is_counted() -> None:
    """Truncated behind a long prompt, nothing carries loss; a document of one token has nothing to predict."""
    held = in_memory(
        [
            Document([1] * 20, [0] * 15 + [1] * 5),
            Document([2] * 20, [1] * 20),
            Document([3], [1]),
            Document([4] * 3, [1] * 3),
        ],
        {"left_out": 6},
    )
    loader = Loader(held, BASE)
    (batch,) = loader
    assert Counter(batch.tokens_BT[batch.pos_BT >= 0].tolist()) == {2: 12, 4: 2}
    assert loader.report() == (
        "4 documents, 2 longer than 13 tokens truncated (14 tokens left out), 6 rows with nothing to learn left out, "
        "1 of one token left out, 1 without loss after that left out"
    )
    batches = Loader(held, replace(BASE, overlong="split"))
    numbers = {int(number) for batch in batches for number in batch.doc_BT[batch.pos_BT >= 0]}
    assert numbers == {1, 2, 3, 4}, "the head of the first, piece 0, carries no loss"
    with pytest.raises(TooSmall, match="data: no document to train on; 1 documents, 1 longer than 13 tokens dropped"):
        Loader(in_memory([Document([1] * 20, [1] * 20)]), replace(BASE, overlong="drop"))


def test_document_numbers_do_not_hang_on_the_order() -> None:
    """(doc, pos) names the same token for another seed and without packing: stored teacher outputs rest on it."""
    places: list[dict[tuple[int, int], int]] = []
    for batching in (BASE, replace(BASE, seed=9), replace(BASE, packing=False, shuffle=False)):
        found: dict[tuple[int, int], int] = {}
        for batch in Loader(numbered(), replace(batching, overlong="split", length=5)):
            real = batch.pos_BT >= 0
            keys = zip(batch.doc_BT[real].tolist(), batch.pos_BT[real].tolist(), strict=True)
            found |= dict(zip(keys, batch.tokens_BT[real].tolist(), strict=True))
        places.append(found)
    assert places[0] == places[1] == places[2]


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [("rows", 0, "1 or more"), ("length", 0, "1 or more"), ("rank", 2, "0 to 1"), ("seed", -1, "0 or more")],
)
def test_bad_batching(field: str, value: int, allowed: str) -> None:
    options: dict[str, Any] = {"length": 4, "rows": 1, "world": 2, field: value}
    with pytest.raises(ValueError, match=f"{field}: {value}; allowed: {allowed}"):
        Batching(**options)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(tokenizer_fixtures.gemma(tmp_path_factory.mktemp("tokens")))


@pytest.fixture(scope="module")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 texts of many lengths, some of them empty."""
    path = tmp_path_factory.mktemp("prose") / "prose.jsonl"
    texts = [" ".join(["the", "end", "of", str(n), "turns"][: n % 6] * (n % 4)) for n in range(60)]
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    return path


def stream(prose: Path, tokenizer: Tokenizer, **options: Any) -> Stream:
    batching = replace(BASE, overlong="split", accumulation=2, **options)
    return Stream(open_source(prose), tokenizer, Format(), batching, epochs=2, part_tokens=150)


def places(batches: Iterator[Batch] | list[Batch]) -> Counter[tuple[int, int]]:
    """Every (token, next token) with loss."""
    found: Counter[tuple[int, int]] = Counter()
    for batch in batches:
        real = batch.weights_BT > 0
        found.update(zip(batch.tokens_BT[real].tolist(), batch.targets_BT[real].tolist(), strict=True))
    return found


def test_a_stream_reads_everything_once_an_epoch(prose: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The same targets as the whole set tokenised beforehand, and only each epoch's last step is filled up."""
    batches = list(stream(prose, tokenizer))
    stored = tokenize(open_source(prose), tokenizer, Format(), cache=tmp_path, progress=False)
    due = places(Loader(stored, replace(BASE, overlong="split")))
    assert places(batches) == due + due
    empty = [at for at, batch in enumerate(batches) if not bool((batch.pos_BT[:, 0] >= 0).all())]
    assert len(empty) <= 4 < len(batches) / 4
    again = stream(prose, tokenizer)
    assert again.report() == "part 0: not read yet"
    assert same(next(again), batches[0])
    assert again.report().startswith("part 0: ")
    assert "rows with nothing to learn left out" in again.report()
    assert all_same(list(again), batches[1:])


def test_a_stream_resumes_at_every_batch(prose: Path, tokenizer: Tokenizer) -> None:
    whole = stream(prose, tokenizer)
    states, batches = [json.dumps(whole.state_dict())], []
    for batch in whole:
        batches.append(batch)
        states.append(json.dumps(whole.state_dict()))
    assert any(json.loads(state)["carry"] for state in states)
    resumed = stream(prose, tokenizer)
    for at in range(len(batches)):
        resumed.load_state_dict(json.loads(states[at]))
        assert same(next(resumed), batches[at])
    resumed.load_state_dict(json.loads(states[3]))
    assert all_same(list(resumed), batches[3:])
    resumed.load_state_dict(json.loads(states[-1]))
    assert list(resumed) == []


def test_ranks_share_a_stream(prose: Path, tokenizer: Tokenizer) -> None:
    batching = replace(BASE, overlong="split")
    one, *two = (
        list(Stream(open_source(prose), tokenizer, Format(), chosen, part_tokens=150))
        for chosen in (replace(batching, accumulation=2), *(replace(batching, world=2, rank=r) for r in range(2)))
    )
    assert all_same([batch for turn in zip(*two, strict=True) for batch in turn], one)


def test_bad_rows_end_a_stream_when_they_are_reached(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "the end of a turn"}\n' * 50 + '{"text": 3}', encoding="utf-8")
    batches = Stream(open_source(path), tokenizer, Format(), replace(BASE, rows=1), part_tokens=20)
    assert next(batches).count > 0
    with pytest.raises(ValueError, match=r"d\.jsonl:51: text is 3; allowed: a string"):
        list(batches)
    path.write_text('{"text": ""}\n', encoding="utf-8")
    with pytest.raises(TooSmall, match="no document to train on"):
        next(Stream(open_source(path), tokenizer, Format(), BASE, epochs=None))
