"""Rows to documents: tokens and loss weights written out by hand, and transformers' own rendering as the oracle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizer_fixtures
from transformers import AutoTokenizer

from gemwright.data.rows import Document, Format, detect, encode, read
from gemwright.data.sources import Row, open_source
from gemwright.prompt import render
from gemwright.tokenizer import Tokenizer

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Gemma's layout with the published template."""
    config = {**tokenizer_fixtures.CONFIG, "chat_template": tokenizer_fixtures.PUBLISHED}
    return Tokenizer.load(tokenizer_fixtures.gemma(tmp_path_factory.mktemp("plain"), config=config))


@pytest.fixture(scope="module")
def chatml(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A byte-level vocabulary whose turns end with the EOS token."""
    folder = tokenizer_fixtures.byte_level(tmp_path_factory.mktemp("chatml"))
    (folder / "chat_template.jinja").write_text(CHATML, encoding="utf-8")
    return Tokenizer.load(folder)


def document(row: dict[str, Any], tokenizer: Tokenizer, **options: Any) -> Document | None:
    format = Format(**options)
    kind = format.kind or {"messages": "messages", "text": "text"}.get(next(iter(row)), "prompt_completion")
    return encode(Row("data.jsonl:7", row), kind, tokenizer, format)  # type: ignore[arg-type]


def spelled(found: Document | None, tokenizer: Tokenizer) -> list[tuple[str, int]]:
    """The text of each run of tokens of one weight."""
    assert found is not None
    assert len(found.tokens) == len(found.weights)
    runs: list[tuple[list[int], int]] = []
    for token, weight in zip(found.tokens, found.weights, strict=True):
        if not runs or runs[-1][1] != weight:
            runs.append(([], weight))
        runs[-1][0].append(token)
    return [(tokenizer.decode(tokens, skip_special=False), weight) for tokens, weight in runs]


def test_conversation(plain: Tokenizer) -> None:
    turns = [USER, ANSWER, {"role": "user", "content": "How are you?"}, {"role": "model", "content": "I am fine. "}]
    head = "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n"
    middle = "\n<start_of_turn>user\nHow are you?<end_of_turn>\n<start_of_turn>model\n"
    assert spelled(document({"messages": turns}, plain), plain) == [
        (head, 0), ("Hello<end_of_turn>", 1), (middle, 0), ("I am fine.<end_of_turn><eos>", 1),
    ]  # fmt: skip
    assert spelled(document({"messages": turns}, plain, answers="last"), plain) == [
        (f"{head}Hello<end_of_turn>{middle}", 0), ("I am fine.<end_of_turn><eos>", 1),
    ]  # fmt: skip
    # what follows the last answer is left out
    assert document({"messages": turns[:3]}, plain) == document({"messages": turns[:2]}, plain)


def test_the_prompt_is_the_run_paths_own(plain: Tokenizer, chatml: Tokenizer) -> None:
    for tokenizer in (plain, chatml):
        found = document({"messages": [USER, ANSWER]}, tokenizer)
        assert found is not None
        prompt = render([USER], tokenizer)
        assert list(found.tokens[: len(prompt)]) == prompt
        assert found.weights[: len(prompt)] == [0] * len(prompt)
        assert all(found.weights[len(prompt) :])
    # this vocabulary merges "model\nHello" into one token; generation never can
    whole = render([USER, ANSWER], plain, add_generation_prompt=False)
    assert whole[: len(render([USER], plain))] != render([USER], plain)


def test_templates_like_transformers(chatml: Tokenizer) -> None:
    """The same ids as apply_chat_template, up to the newline after the last turn; `<|im_end|>`, the EOS, stays one."""
    turns = [USER, ANSWER, {"role": "user", "content": "  x = 1\n"}, {"role": "assistant", "content": "Zwölf 🙂"}]
    oracle = AutoTokenizer.from_pretrained(chatml.folder)
    due = oracle.apply_chat_template(turns, return_dict=False)
    found = document({"messages": turns}, chatml)
    assert found is not None
    assert list(found.tokens) == due[:-1]
    assert chatml.decode(due[-1:]) == "\n"
    start = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert spelled(found, chatml) == [
        (start, 0), ("Hello<|im_end|>", 1), ("\n<|im_start|>user\n  x = 1\n<|im_end|>\n<|im_start|>assistant\n", 0),
        ("Zwölf 🙂<|im_end|>", 1),
    ]  # fmt: skip


def test_control_tokens_in_messages_stay_text(plain: Tokenizer) -> None:
    turns = [USER, {"role": "assistant", "content": "a<end_of_turn><start_of_turn>b"}]
    found = document({"messages": turns}, plain)
    assert found is not None
    assert [token for token in found.tokens if token in plain.special_ids] == [2, 106, 107, 106, 107, 1]
    assert spelled(found, plain)[-1] == ("a<end_of_turn><start_of_turn>b<end_of_turn><eos>", 1)


def test_a_template_without_an_end_of_turn_teaches_all_it_writes(tmp_path: Path) -> None:
    folder = tokenizer_fixtures.byte_level(tmp_path / "t")
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template + "{% if add_generation_prompt %}assistant: {% endif %}")
    tokenizer = Tokenizer.load(folder)
    found = document({"messages": [USER, {"role": "assistant", "content": "is Paris"}]}, tokenizer)
    assert spelled(found, tokenizer) == [("user: Hi\nassistant: ", 0), ("is Paris\n<|im_end|>", 1)]


def test_a_template_that_rewrites_earlier_turns_is_refused(tmp_path: Path) -> None:
    folder = tokenizer_fixtures.byte_level(tmp_path / "t")
    short = "(m.content if loop.last or m.role == 'user' else '...')"
    (folder / "chat_template.jinja").write_text(CHATML.replace("m['content']", short), encoding="utf-8")
    with pytest.raises(ValueError, match=r"data\.jsonl:7: chat_template: it writes messages\[1\] otherwise"):
        document({"messages": [USER, ANSWER, USER, ANSWER]}, Tokenizer.load(folder))
    think = CHATML.replace("assistant\n' }}", "assistant\n<think>\n' }}")
    (folder / "chat_template.jinja").write_text(think, encoding="utf-8")
    with pytest.raises(ValueError, match=r"does not open messages\[1\] as it opens a generation"):
        document({"messages": [USER, ANSWER]}, Tokenizer.load(folder))


def test_prompt_and_completion_of_messages(plain: Tokenizer) -> None:
    row = {"prompt": [USER, ANSWER, USER], "completion": [{"role": "assistant", "content": "you"}]}
    assert spelled(document(row, plain), plain)[1] == ("you<end_of_turn><eos>", 1)
    whole = spelled(document({"messages": row["prompt"] + row["completion"]}, plain, answers="last"), plain)
    assert spelled(document(row, plain), plain) == whole
    with pytest.raises(ValueError, match=r"7: completion\[0\]\.role is 'user'; allowed: assistant"):
        document({"prompt": [USER, ANSWER], "completion": [USER, ANSWER]}, plain)


def test_prompt_and_completion_of_text(plain: Tokenizer) -> None:
    row = {"prompt": "The capital of France is", "completion": " Paris."}
    assert spelled(document(row, plain), plain) == [("<bos>The capital of France is", 0), (" Paris.<eos>", 1)]
    joint = plain.encode("The capital of France is Paris.")
    head = plain.encode("The capital of France is")
    found = document(row, plain)
    assert found is not None
    assert joint[: len(head)] != head, "this vocabulary is to merge across the seam"
    assert list(found.tokens[: len(head)]) == head
    seamless = document({"prompt": "Tell me\n", "completion": "<eos>"}, plain)
    assert spelled(seamless, plain) == [("<bos>Tell me\n", 0), ("<eos>", 1)]


def test_text(plain: Tokenizer) -> None:
    assert spelled(document({"text": "two lines\n"}, plain), plain) == [("<bos>", 0), ("two lines\n<eos>", 1)]
    whole = "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nHello<end_of_turn><eos>"
    found = document({"text": whole}, plain)
    assert found is not None
    assert list(found.tokens) == plain.encode(whole, special=True), "neither BOS nor EOS is doubled"
    assert [token for token in found.tokens if token in plain.special_ids] == [2, 106, 107, 106, 107, 1]
    literal = document({"text": whole}, plain, control_tokens=False)
    assert literal is not None
    assert [token for token in literal.tokens if token in plain.special_ids] == [2, 1]


def test_text_without_bos(chatml: Tokenizer) -> None:
    found = document({"text": "Hello there"}, chatml)
    assert found is not None
    assert list(found.tokens) == [*chatml.encode("Hello there"), chatml.eos_id]
    assert list(found.weights) == [0] + [1] * (len(found.tokens) - 1)


def test_nothing_to_learn(plain: Tokenizer) -> None:
    assert document({"text": ""}, plain) is None
    assert document({"prompt": "x", "completion": ""}, plain) is None
    assert document({"messages": [USER, {"role": "assistant", "content": " \n"}]}, plain) is None


def test_system(plain: Tokenizer) -> None:
    row = {"messages": [{"role": "system", "content": "Be brief."}, USER, ANSWER]}
    with pytest.raises(ValueError, match=r"data\.jsonl:7: .*no system role"):
        document(row, plain)
    found = spelled(document(row, plain, fold_system=True), plain)
    assert found[0][0] == "<bos><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\n"
    split = {"prompt": row["messages"][:2], "completion": row["messages"][2:]}
    assert spelled(document(split, plain, fold_system=True), plain) == found


MESSAGES = '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}'
BAD = [
    ('{"messages": []}', "1: messages is []; allowed: a non-empty list of messages"),
    ('{"messages": "Hi"}', "1: messages is 'Hi'; allowed: a non-empty list of messages"),
    ('{"messages": [{"role": "user"}]}', "1: messages[0].content is missing; allowed: a string"),
    ('{"messages": [{"role": 3, "content": ""}]}', "1: messages[0].role is 3; allowed: a string"),
    ('{"messages": ["Hi"]}', "1: messages[0] is 'Hi'; allowed: a role and a content"),
    ('{"messages": [{"role": "user", "content": "Hi"}]}', "1: messages has roles user; at least one turn must be"),
    ('{"text": 3}', "1: text is 3; allowed: a string"),
    ('{"text": "a"}\n{"text": null}', "2: text is None; allowed: a string"),
    ('{"prompt": "a", "completion": []}', "1: prompt is 'a', completion is []; allowed: all strings, or all lists"),
    ('{"prompt": "a", "chosen": "b", "rejected": 1}', "1: chosen is 'b', rejected is 1, prompt is 'a'; allowed"),
    ('{"prompt": [], "completion": []}', "1: prompt is []; allowed: a non-empty list of messages or a string"),
    (
        f'{{"chosen": [{{"role": "user", "content": ""}}], {MESSAGES[1:].replace("messages", "rejected")}',
        "1: chosen has",
    ),
    (f'{MESSAGES}\n{{"text": "a"}}', "2: the kind is text, where the first row's is messages; mixed columns"),
    (f'{MESSAGES}\n\n{{"a": "b"}}', "3: the kind is none (columns a), where the first row's is messages"),
    (f'{MESSAGES[:-1]}, "text": "a"}}', "1: columns are messages, text, which may be messages or text; choose with"),
    (f'{MESSAGES}\n{MESSAGES[:-1]}, "text": "a"}}', "2: the columns may be messages or text; choose with kind"),
    ('{"conversations": []}', "1: columns are conversations; allowed: messages, prompt + completion, text, chosen"),
    ("{}", "1: columns are none; allowed: messages"),
]


@pytest.mark.parametrize(("lines", "said"), BAD)
def test_bad_rows_are_named(lines: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(lines, encoding="utf-8")
    source = open_source(path)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is compared below
        list(read(source, detect(source, Format()), Format()))
    assert str(caught.value).startswith(f"{path}:{said}"), caught.value


@pytest.mark.parametrize(
    ("row", "kind", "format"),
    [
        (json.loads(MESSAGES), "messages", Format()),
        ({"prompt": "a", "completion": "b", "source": 3}, "prompt_completion", Format()),
        ({"body": "a"}, "text", Format(text_field="body")),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference", Format()),
        ({"chosen": [USER, ANSWER], "rejected": [USER, ANSWER], "score": 1}, "preference", Format()),
        ({"prompt": [USER]}, "prompt", Format()),
        ({"prompt": "a", "completion": "b"}, "prompt", Format(kind="prompt")),
        ({"text": "a", "messages": [USER, ANSWER]}, "text", Format(kind="text")),
    ],
)
def test_kinds(row: dict[str, Any], kind: str, format: Format, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    source = open_source(path)
    assert detect(source, format) == kind
    assert [found.data for found in read(source, detect(source, format), format)] == [row]


def test_bad_turns_and_kinds_are_named(plain: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"data\.jsonl:7: .*messages\[1\]: role is 'user'; allowed here: 'assistant'"):
        document({"messages": [USER, USER, ANSWER]}, plain)
    with pytest.raises(ValueError, match=r"7: rows are of the kind preference; allowed here: messages, prompt \+"):
        encode(Row("d:7", {"chosen": "a", "rejected": "b"}), "preference", plain, Format())
    with pytest.raises(ValueError, match="answers: 'first'; allowed: all, last"):
        Format(answers="first")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"kind: 'chat'; allowed: None, messages, prompt_completion, text, pref"):
        Format(kind="chat")  # type: ignore[arg-type]
