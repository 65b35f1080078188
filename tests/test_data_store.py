"""Stores: a source is tokenised once, what is read back is what was encoded, damage and other tokenizers are named."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import tokenizer_fixtures

from gemwright.data import prepare
from gemwright.data.prepare import tokenize
from gemwright.data.rows import Document, Format, encode
from gemwright.data.sources import Row, open_source
from gemwright.data.store import Documents, open_shards, write_shards
from gemwright.tokenizer import Tokenizer

CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there"}]}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(tokenizer_fixtures.gemma(tmp_path_factory.mktemp("tokens")))


def texts(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def content(found: Documents) -> list[tuple[list[int], list[float]]]:
    """Tokens and weights of every document; the first weight is nobody's."""
    parts = [found.piece(number, 0, int(length)) for number, length in enumerate(found.lengths)]
    return [(tokens.tolist(), weights[1:].tolist()) for tokens, weights in parts]


def due(row: Mapping[str, object], kind: str, tokenizer: Tokenizer) -> tuple[list[int], list[float]]:
    document = encode(Row("", row), kind, tokenizer, Format())  # type: ignore[arg-type]
    assert document is not None
    return list(document.tokens), [float(weight) for weight in document.weights[1:]]


def test_a_source_is_tokenised_once(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    path = texts(
        tmp_path / "d.jsonl", CHAT, {"messages": [CHAT["messages"][0], {**CHAT["messages"][1], "content": ""}]}, CHAT
    )
    first = tokenize(open_source(path), tokenizer, Format(), cache=tmp_path / "cache", progress=False)
    assert content(first) == [due(CHAT, "messages", tokenizer)] * 2
    assert first.info == {"left_out": 1}
    (folder,) = (tmp_path / "cache").iterdir()
    assert not folder.name.startswith(".")
    with monkeypatch.context() as patched:
        patched.setattr(prepare, "encode", None)  # a second encoding would fail
        second = tokenize(open_source(path), tokenizer, Format(), cache=tmp_path / "cache", progress=False)
    assert content(second) == content(first)
    assert (second.fingerprint, second.info) == (first.fingerprint, first.info)
    assert isinstance(second.shards[0].tokens, np.memmap)


def test_processes_keep_the_order(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = texts(tmp_path / "d.jsonl", *({"text": "the end " * (n % 5)} for n in range(150)))
    one, two = (
        tokenize(open_source(path), tokenizer, Format(), cache=tmp_path / str(n), workers=n, progress=False)
        for n in (1, 2)
    )
    assert (one.fingerprint, one.info) == (two.fingerprint, two.info)
    texts(path, *[{"text": "a"}] * 70, {"text": "\ud800"})
    with pytest.raises(ValueError, match=r"d\.jsonl:71: text: surrogates not allowed"):
        tokenize(open_source(path), tokenizer, Format(), cache=tmp_path / "3", workers=2, progress=False)


def test_the_cache_follows_data_format_and_tokenizer(tmp_path: Path, tokenizer: Tokenizer) -> None:
    def folders() -> int:
        return len(list((tmp_path / "cache").iterdir()))

    def again(tokenizer: Tokenizer = tokenizer, format: Format = Format()) -> Documents:  # noqa: B008 - frozen
        return tokenize(open_source(path), tokenizer, format, cache=tmp_path / "cache", progress=False)

    path = texts(tmp_path / "d.jsonl", {"text": "the end<eos>"})
    before = again()
    assert again(format=Format(control_tokens=False)).fingerprint != before.fingerprint
    config = {**tokenizer_fixtures.CONFIG, "add_bos_token": False}
    other = Tokenizer.load(tokenizer_fixtures.gemma(tmp_path / "other", config=config))
    assert content(again(other)) == [due({"text": "the end<eos>"}, "text", other)] != content(before)
    texts(path, {"text": "the start"})
    assert again().fingerprint != before.fingerprint
    assert folders() == 4


def test_bad_rows_and_full_disks_leave_nothing(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = texts(tmp_path / "d.jsonl", {"text": "the end"}, {"text": 3})
    with pytest.raises(ValueError, match=r"d\.jsonl:2: text is 3"):
        tokenize(open_source(path), tokenizer, Format(), cache=tmp_path / "cache", progress=False)
    assert list((tmp_path / "cache").iterdir()) == []
    texts(path, {"text": ""}, {"text": ""})
    with pytest.raises(ValueError, match="there is nothing to learn from"):
        tokenize(open_source(path), tokenizer, Format(), cache=tmp_path / "cache", progress=False)
    texts(path)
    with pytest.raises(ValueError, match=r"data: .*d\.jsonl: there are no rows"):
        tokenize(open_source(path), tokenizer, Format(), cache=tmp_path / "cache", progress=False)
    texts(path, {"text": "the end"})
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        tokenize(open_source(path), tokenizer, Format(), cache=tmp_path / "cache", progress=False)
    assert list((tmp_path / "cache").iterdir()) == []


def test_two_writers_of_one_cache(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """The second to finish finds the folder there, and leaves it as it is."""
    one = [Document([2, 5, 1], [0, 1, 1])]

    def documents() -> list[Document]:
        write_shards(tmp_path / "tokens", one, tokenizer)
        return one

    write_shards(tmp_path / "tokens", (document for document in documents()), tokenizer)
    assert [path.name for path in tmp_path.iterdir()] == ["tokens"]
    assert content(open_shards(tmp_path / "tokens", tokenizer)) == [([2, 5, 1], [1, 1])]


def test_shards(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Documents over several shards keep their order and numbers; plain text needs no file of weights."""
    documents = [Document([2, *range(n), 1], [0] + [1] * (n + 1)) for n in range(9)]
    documents.append(Document([2, 5, 6, 1], [0, 0, 1, 1]))
    write_shards(tmp_path / "shards", documents, tokenizer, shard_tokens=16)
    names = sorted(path.name for path in (tmp_path / "shards").iterdir() if path.suffix == ".bin")
    assert [name for name in names if "weights" in name] == ["shard-00002.weights.bin"]
    assert [name for name in names if name.count(".") == 1] == [f"shard-{n:05d}.bin" for n in range(3)]
    found = open_shards(tmp_path / "shards", tokenizer)
    assert content(found) == [(list(t), [float(w) for w in ws[1:]]) for t, ws in documents]
    assert {shard.tokens.dtype for shard in found.shards} == {np.dtype("<u2")}
    write_shards(tmp_path / "one", documents, tokenizer)
    assert content(open_shards(tmp_path / "one", tokenizer)) == content(found)


@pytest.mark.parametrize("suffix", [".bin", ".npy"])
def test_token_files_from_elsewhere(suffix: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    """A sidecar of two keys tells documents apart: at each BOS, or after each EOS."""
    tokens = np.array([2, 7, 8, 1, 2, 9, 1, 2, 4], np.uint32)
    path = tmp_path / f"t{suffix}"
    if suffix == ".npy":
        np.save(path, tokens)
    else:
        tokens.tofile(path)
    (tmp_path / "t.json").write_text('{"dtype": "uint32", "bos_id": 2}', encoding="utf-8")
    whole = [([2, 7, 8, 1], [1.0] * 3), ([2, 9, 1], [1.0] * 2), ([2, 4], [1.0])]
    assert content(open_shards(path, tokenizer)) == whole
    (tmp_path / "t.json").write_text('{"dtype": "uint32", "eos_id": 1}', encoding="utf-8")
    assert content(open_shards([path], tokenizer)) == whole


def test_uint32_where_the_vocabulary_needs_it(tmp_path: Path, tokenizer: Tokenizer) -> None:
    wide = Tokenizer.load(tokenizer.folder)
    wide.vocab_size = 256_000
    write_shards(tmp_path / "s", [Document([2, 255_999], [0, 1])], wide)
    assert content(open_shards(tmp_path / "s", wide)) == [([2, 255_999], [1.0])]
    with pytest.raises(ValueError, match="document 0: token id 255999; the vocabulary has"):
        content(open_shards(tmp_path / "s", tokenizer))


def test_damage_is_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    good = tmp_path / "good"
    write_shards(good, [Document([2, 5, 1], [0, 0, 1]), Document([2, 6, 1], [0, 1, 1])], tokenizer)
    sidecar = json.loads((good / "shard-00000.json").read_text(encoding="utf-8"))

    def opened(**files: bytes | None) -> str:
        folder = tmp_path / "bad"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(good, folder)
        for name, data in files.items():
            path = folder / f"shard-00000.{name.replace('_', '.')}"
            path.write_bytes(data) if data is not None else path.unlink()
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            open_shards(folder, tokenizer)
        return str(caught.value)

    assert "shard-00000.bin: uint16 of shape (5,); due: 6 of uint16" in opened(bin=bytes(10))
    assert "shard-00000.bin: not tokens of dtype uint16" in opened(bin=bytes(11))
    assert "its starts or weights do not fit its 6 tokens: a damaged shard" in opened(weights_bin=bytes(5))
    assert "its starts or weights do not fit" in opened(starts_bin=np.array([0, 4, 3, 6]).tobytes())
    assert "its sidecar shard-00000.json is missing" in opened(json=None)
    assert "shard-00000.json: not JSON" in opened(json=b"{")
    assert "allowed: an object with dtype uint16 or uint32" in opened(json=b'{"dtype": "int64"}')
    assert "bos_id is 5, the tokenizer's is 2" in opened(json=json.dumps(sidecar | {"bos_id": 5}).encode())
    assert "tokenizer is 'x', the tokenizer's is" in opened(json=json.dumps(sidecar | {"tokenizer": "x"}).encode())
    assert "bos_id or eos_id must tell documents apart" in opened(starts_bin=None, json=b'{"dtype": "uint16"}')
    with pytest.raises(FileNotFoundError, match=r"no token files \(.bin or .npy\)"):
        open_shards(tmp_path, tokenizer)
