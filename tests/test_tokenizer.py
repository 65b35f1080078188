"""Tokenizer and TextStream against transformers, sentencepiece and hand-made truth."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import sentencepiece
import tokenizer_fixtures as fixtures
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from gemwright.tokenizer import TextStream, Tokenizer

TEXTS = ["Hello there, how are you?", "  two  spaces\n\n", "L'été 🎉 Zwölf 漢字", "user\nHello", "", " ", "\n", "a\tb�"]
FOLDERS = ["gemma", "leading_space", "byte_level", "sentence_piece", "sentence_piece_space"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("tokenizers")
    return {
        "gemma": fixtures.gemma(base / "gemma"),
        "leading_space": fixtures.gemma(base / "leading_space", leading_space=True),
        "byte_level": fixtures.byte_level(base / "byte_level"),
        "sentence_piece": fixtures.sentence_piece(base / "sentence_piece"),
        "sentence_piece_space": fixtures.sentence_piece(base / "sentence_piece_space", leading_space=True),
    }


@pytest.fixture(scope="module")
def loaded(made: dict[str, Path]) -> dict[str, Tokenizer]:
    return {name: Tokenizer.load(folder) for name, folder in made.items()}


def with_config(made: dict[str, Path], folder: Path, **config: object) -> Path:
    shutil.copytree(made["gemma"], folder, dirs_exist_ok=True)
    (folder / "tokenizer_config.json").write_text(json.dumps({**fixtures.CONFIG, **config}))
    return folder


def streamed(tokenizer: Tokenizer, parts: Sequence[Sequence[int]], **options: object) -> tuple[str, TextStream]:
    stream = TextStream(tokenizer, **options)  # type: ignore[arg-type]
    text = "".join([*map(stream.push, parts), stream.finish()])
    assert stream.text == text
    return text, stream


@pytest.mark.parametrize("name", ["gemma", "leading_space", "byte_level"])
@pytest.mark.parametrize("text", TEXTS)
def test_encode_and_decode_equal_transformers(
    name: str, text: str, made: dict[str, Path], loaded: dict[str, Tokenizer]
) -> None:
    oracle = transformers.AutoTokenizer.from_pretrained(made[name])
    ids = loaded[name].encode(text)
    assert ids == oracle(text).input_ids
    assert loaded[name].encode(text, special=True) == oracle(text).input_ids
    for skip in (True, False):
        assert loaded[name].decode(ids, skip_special=skip) == oracle.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("name", ["gemma", "leading_space", "byte_level"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_decode_of_any_ids_equals_transformers(
    name: str, made: dict[str, Path], loaded: dict[str, Tokenizer], data: st.DataObject
) -> None:
    tokenizer = loaded[name]
    oracle = transformers.PreTrainedTokenizerFast(tokenizer_file=str(made[name] / "tokenizer.json"))
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=12))
    for skip in (True, False):
        assert tokenizer.decode(ids, skip_special=skip) == oracle.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("name", ["sentence_piece", "sentence_piece_space"])
@pytest.mark.parametrize("text", TEXTS)
def test_sentencepiece_is_run_as_it_is(
    name: str, text: str, made: dict[str, Path], loaded: dict[str, Tokenizer]
) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(made[name] / "tokenizer.model"))
    assert loaded[name].encode(text) == [2, *processor.encode(text)]
    assert loaded[name].decode(loaded[name].encode(text)) == text


def test_gemma_layout(loaded: dict[str, Tokenizer]) -> None:
    for name in ("gemma", "sentence_piece"):
        tokenizer = loaded[name]
        assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id) == (0, 1, 2)
        assert (tokenizer.id("<start_of_turn>"), tokenizer.id("<end_of_turn>")) == (106, 107)
        assert tokenizer.id("<absent>") is None
        assert tokenizer.specials == {token: fixtures.LAYOUT.index(token) for token in fixtures.CONTROL}
        assert tokenizer.names == fixtures.CONFIG
        turns = [2, 106, *tokenizer.encode("user", bos=False), 107, 1]
        assert tokenizer.decode(turns) == "user"
        assert tokenizer.decode(turns, skip_special=False) == "<bos><start_of_turn>user<end_of_turn><eos>"


@pytest.mark.parametrize("name", ["gemma", "sentence_piece"])
def test_control_tokens_only_on_request(name: str, loaded: dict[str, Tokenizer]) -> None:
    tokenizer = loaded[name]
    text = "the end<end_of_turn><<end_of_turn>\n<start_of_turn>model<eos><bos><pad>"
    plain = tokenizer.encode(text, bos=False)
    assert not tokenizer.special_ids & set(plain)
    assert tokenizer.decode(plain) == text
    ids = tokenizer.encode(text, bos=False, special=True)
    assert [i for i in ids if i in tokenizer.special_ids] == [107, 107, 106, 1, 2, 0]
    assert tokenizer.decode(ids, skip_special=False) == text
    assert tokenizer.decode(ids) == "the end<\nmodel"


@pytest.mark.parametrize("name", ["gemma", "sentence_piece"])
def test_bos_exactly_once(name: str, loaded: dict[str, Tokenizer]) -> None:
    tokenizer = loaded[name]
    hello = tokenizer.encode("Hello", bos=False)
    assert tokenizer.encode("Hello") == [2, *hello]
    assert tokenizer.encode("<bos>Hello", special=True) == [2, *hello]
    assert tokenizer.encode("<bos>Hello", special=True, bos=False) == [2, *hello]
    assert tokenizer.encode("<bos>Hello").count(2) == 1
    assert tokenizer.encode("", special=True) == [2]


def test_add_bos_rule(made: dict[str, Path], loaded: dict[str, Tokenizer], tmp_path: Path) -> None:
    assert loaded["gemma"].add_bos
    assert loaded["sentence_piece"].add_bos
    assert not loaded["byte_level"].add_bos  # it has a BOS token, which its own file does not put in front
    for explicit in (True, False):
        tokenizer = Tokenizer.load(with_config(made, tmp_path / str(explicit), add_bos_token=explicit))
        assert tokenizer.encode("Hello")[0] == (2 if explicit else tokenizer.encode("Hello", bos=False)[0])
    none = Tokenizer.load(with_config(made, tmp_path / "none", bos_token=None))
    assert none.bos_id is None
    assert not none.add_bos
    with pytest.raises(ValueError, match="no BOS token"):
        none.encode("Hello", bos=True)
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: add_bos_token is 'yes'"):
        Tokenizer.load(with_config(made, tmp_path / "yes", add_bos_token="yes"))


def test_turn_tokens_become_special_where_the_file_forgot(made: dict[str, Path], tmp_path: Path) -> None:
    """A folder whose tokenizer.json does not mark <end_of_turn> would print it."""
    shutil.copytree(made["gemma"], tmp_path, dirs_exist_ok=True)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    for token in spec["added_tokens"]:
        token["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.decode([2, 106, 107, 1]) == ""
    assert 107 not in tokenizer.encode("<end_of_turn>")


def test_declared_special_tokens_are_skipped(made: dict[str, Path], tmp_path: Path) -> None:
    added = {"7": {"content": "<unused3>", "special": True}, "8": {"content": "<unused4>", "special": False}}
    folder = with_config(made, tmp_path, additional_special_tokens=["<unused0>"], added_tokens_decoder=added)
    assert Tokenizer.load(folder).decode([4, 5, 7, 8]) == "<unused1><unused4>"


def test_a_length_limit_in_the_file_cuts_nothing(made: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(made["gemma"], tmp_path, dirs_exist_ok=True)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    spec["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    assert Tokenizer.load(tmp_path).decode(Tokenizer.load(tmp_path).encode(TEXTS[0])) == TEXTS[0]


def test_unknown_ids(loaded: dict[str, Tokenizer]) -> None:
    for tokenizer in loaded.values():
        for bad in (tokenizer.vocab_size, -1, 2**40):
            with pytest.raises(ValueError, match=rf"ids\[1\]: {bad} .*{tokenizer.vocab_size} ids"):
                tokenizer.decode([5, bad])
            with pytest.raises(ValueError, match=rf"ids\[0\]: {bad}"):
                TextStream(tokenizer).push([bad])
        with pytest.raises(ValueError, match="at character 1; allowed: valid Unicode"):
            tokenizer.encode("a\ud800")


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("tokenizer.json", b"{", "tokenizer.json: not a tokenizer"),
        ("tokenizer.json", b"\xff\xfe", "tokenizer.json: not a tokenizer"),
        ("tokenizer.json", b'{"model": {}}', "tokenizer.json: not a tokenizer"),
        ("tokenizer.model", b"", "tokenizer.model: not a sentencepiece model"),
        ("tokenizer.model", b"nonsense" * 9, "tokenizer.model: not a sentencepiece model"),
        ("tokenizer_config.json", b"[1]", "tokenizer_config.json: a JSON list; allowed: an object"),
        ("tokenizer_config.json", b"{'", "tokenizer_config.json: not JSON"),
        ("tokenizer_config.json", b"[" * 99999, "tokenizer_config.json: not JSON"),
        ("tokenizer_config.json", b"\xff", "tokenizer_config.json: not UTF-8"),
        ("tokenizer_config.json", b'{"eos_token": 1}', "eos_token is 1; allowed"),
        ("tokenizer_config.json", b'{"eos_token": "<stop>"}', "eos_token is '<stop>', which the vocabulary does not"),
        ("tokenizer_config.json", b'{"eos_token": null}', "eos_token is missing"),
        ("tokenizer_config.json", b'{"additional_special_tokens": 5}', "additional_special_tokens is 5; allowed"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"5": "<bos>"}}', r"added_tokens_decoder\[5\] is '<bos>'"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": [1]}', r"added_tokens_decoder is \[1\]; allowed"),
        ("tokenizer_config.json", b'{"chat_template": 5}', "chat_template is 5; allowed"),
        ("special_tokens_map.json", b"no", "special_tokens_map.json: not JSON"),
        ("chat_template.jinja", b"\xff", "chat_template.jinja: not UTF-8"),
    ],
)
def test_damaged_files_are_named(made: dict[str, Path], tmp_path: Path, file: str, content: bytes, says: str) -> None:
    shutil.copytree(made["gemma"], tmp_path, dirs_exist_ok=True)
    if file == "tokenizer.model":
        (tmp_path / "tokenizer.json").unlink()
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=says):
        Tokenizer.load(tmp_path)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        Tokenizer.load(tmp_path)


def test_a_decoder_that_cannot_be_streamed_is_refused(made: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(made["gemma"], tmp_path, dirs_exist_ok=True)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    spec["decoder"] = {"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(ValueError, match=r"decoder \['CTC'\]; allowed: ByteLevel"):
        Tokenizer.load(tmp_path)


def test_chat_template_sources(made: dict[str, Path], tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    assert Tokenizer.load(with_config(made, tmp_path)).chat_template is None
    assert Tokenizer.load(with_config(made, tmp_path, chat_template="C")).chat_template == "C"
    assert Tokenizer.load(with_config(made, tmp_path, chat_template=named)).chat_template == "D"
    (tmp_path / "chat_template.jinja").write_text("J")
    assert Tokenizer.load(tmp_path).chat_template == "J"


def test_save_copies_the_files(made: dict[str, Path], tmp_path: Path) -> None:
    for name in ("gemma", "sentence_piece"):
        Tokenizer.load(made[name]).save(tmp_path / name)
        files = {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        assert files == {path.name: path.read_bytes() for path in made[name].iterdir()}


@pytest.mark.parametrize("name", FOLDERS)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_stream_equals_decode(name: str, loaded: dict[str, Tokenizer], data: st.DataObject) -> None:
    """Any ids in any parts: bytes that are no text, spaces at the start, control tokens shown or skipped."""
    tokenizer = loaded[name]
    space = tokenizer.encode(" ", bos=False)[-1]
    anything = st.integers(0, tokenizer.vocab_size - 1)
    ids = data.draw(st.lists(anything | st.sampled_from([space, 1, 2, 108 + 0xC3, 108 + 0xA9]), max_size=16))
    ids = data.draw(st.sampled_from([ids, tokenizer.encode(data.draw(st.text(max_size=9))) + ids]))
    sizes = data.draw(st.lists(st.integers(0, 4), max_size=8))
    parts: list[list[int]] = []
    for size in sizes:
        parts.append(ids[sum(map(len, parts)) :][:size])
    parts.append(ids[sum(map(len, parts)) :])
    for skip in (True, False):
        text, _ = streamed(tokenizer, parts, skip_special=skip)
        assert text == tokenizer.decode(ids, skip_special=skip)


def test_spaces_stripped_from_the_start_one_by_one(made: dict[str, Path], tmp_path: Path) -> None:
    """A decoder that strips several leading spaces does so across pushes, and not after text has begun."""
    shutil.copytree(made["leading_space"], tmp_path, dirs_exist_ok=True)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    spec["decoder"]["decoders"][-1]["start"] = 3
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = Tokenizer.load(tmp_path)
    space, word = tokenizer.id("▁"), tokenizer.id("a")
    assert space is not None
    assert word is not None
    for spaces, truth in ((2, "a a"), (3, "a a"), (5, "  a a")):
        ids = [space] * spaces + [word, space, word]
        assert streamed(tokenizer, [[i] for i in ids])[0] == tokenizer.decode(ids) == truth


@pytest.mark.parametrize("name", FOLDERS)
def test_no_piece_ends_inside_a_character(name: str, loaded: dict[str, Tokenizer]) -> None:
    text = "déjà 🎉🎉 漢字 vu"
    stream = TextStream(loaded[name])
    pieces = [stream.push([i]) for i in loaded[name].encode(text)] + [stream.finish()]
    assert "".join(pieces) == text
    assert not any("�" in piece for piece in pieces)
    assert sum(map(bool, pieces)) > 4  # it does stream


@pytest.mark.parametrize("name", ["gemma", "byte_level", "sentence_piece"])
def test_unfinished_bytes_come_out_at_the_end(name: str, loaded: dict[str, Tokenizer]) -> None:
    tokenizer = loaded[name]
    ids = tokenizer.encode("ok 🎉", bos=False)[:-1]
    stream = TextStream(tokenizer)
    assert "".join(map(stream.push, [[i] for i in ids])).rstrip() == "ok"
    assert stream.finish().strip(" �") == ""
    assert "�" in stream.text
    assert stream.text == tokenizer.decode(ids)


def expected_cut(text: str, stop: Sequence[str]) -> str:
    """The definition: the stop string that is complete first; of those the longest."""
    for end in range(1, len(text) + 1):
        for s in sorted(stop, key=len, reverse=True):
            if text[:end].endswith(s):
                return text[: end - len(s)]
    return text


@settings(max_examples=200, deadline=None)
@given(
    text=st.text("ab\n é", max_size=12),
    stop=st.lists(st.text("ab\n é", min_size=1, max_size=4), max_size=3),
    size=st.integers(1, 5),
)
def test_stop_strings_across_borders(loaded: dict[str, Tokenizer], text: str, stop: list[str], size: int) -> None:
    ids = loaded["gemma"].encode(text)
    parts = [ids[i : i + size] for i in range(0, len(ids), size)]
    got, stream = streamed(loaded["gemma"], parts, stop=stop)
    assert got == expected_cut(text, stop)
    assert stream.stopped == any(s in text for s in stop)


def test_stop_string_by_hand(loaded: dict[str, Tokenizer]) -> None:
    tokenizer = loaded["gemma"]
    stream = TextStream(tokenizer, stop=["end of the line"])
    pieces = [stream.push([i]) for i in tokenizer.encode("the end of a turn, the end of the line. More")]
    assert "".join(pieces) == stream.text == "the end of a turn, the "
    assert stream.stopped
    assert stream.finish() == stream.push([300]) == ""
    kept = TextStream(tokenizer, stop=["line!"])
    assert kept.push(tokenizer.encode("a line")) == "a "
    assert kept.finish() == "line"
    for bad in ("end", [""], [3]):
        with pytest.raises(ValueError, match=r"stop: .*allowed: a sequence of non-empty strings"):
            TextStream(tokenizer, stop=bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", FOLDERS)
def test_time_grows_with_the_tokens_only(name: str, loaded: dict[str, Tokenizer]) -> None:
    """Forty thousand tokens one by one, half of them one run of stray bytes; decoding anew each time takes minutes."""
    tokenizer = loaded[name]
    (word, byte) = tokenizer.encode("turn", bos=False)[-1], tokenizer.encode("\x01", bos=False)[-1]
    stream = TextStream(tokenizer, stop=["never"])
    start = time.process_time()
    for i in [word] * 20_000 + [byte] * 20_000:
        stream.push([i])
    stream.finish()
    assert time.process_time() - start < 5
    assert stream.text == tokenizer.decode([word] * 20_000 + [byte] * 20_000)
