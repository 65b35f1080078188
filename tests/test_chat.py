"""The chat: its conversation by pipe, its commands, its keys, and the whole program at a pseudo-terminal."""

from __future__ import annotations

import io
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import folder_fixtures
import pytest
import tokenizer_fixtures
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

import gemwright
from gemwright import cli
from gemwright.cli import chat as chat_verb
from gemwright.cli.chat import Chat, Screen
from gemwright.lm import LM

Run = Callable[..., tuple[int, str, str]]
USER = {"role": "user", "content": "Hello there"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chat") / "tiny"
    folder_fixtures.gemma2(path)
    return path


@pytest.fixture(scope="module")
def lm(folder: Path) -> LM:
    return gemwright.load(folder)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    def call(*arguments: str | Path, stdin: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code = cli.main(["chat", *map(str, arguments)])
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state"


def talk(lm: LM, *, terminal: bool = False, system: str | None = None, **sampling: Any) -> Chat:
    return Chat(lm, Screen(terminal=terminal), system=system, sampling={"max_new_tokens": 6, "seed": 1, **sampling})


def test_chat_by_pipe_answers_each_line(run: Run, folder: Path, lm: LM) -> None:
    """Answers go to stdout and equal the library's, each with the turns before it; everything else goes to stderr."""
    flags = ("--max-new-tokens", "6", "--temperature", "0", "--system", "Be brief.", "--json")
    code, out, err = run(folder, *flags, stdin="Hello there\n\nAnd you?\n/exit\nnever read\n")
    answers = [json.loads(line) for line in out.splitlines()]
    messages = [USER]
    for answer, question in zip(answers, ["And you?", ""], strict=True):
        expected = lm.generate(messages, system="Be brief.", max_new_tokens=6, temperature=0)
        assert answer["text"] == expected.text
        assert (answer["prompt_tokens"], answer["new_tokens"]) == (expected.prompt_tokens, len(expected.tokens))
        messages += [{"role": "assistant", "content": expected.text}, {"role": "user", "content": question}]
    assert code == 0
    assert err.startswith(f"{folder}: 0.1M parameters, float32 on cpu, context 256 tokens.")
    assert "tokens/s" in err


def test_chat_needs_a_chat_model(run: Run, tmp_path: Path) -> None:
    folder_fixtures.gemma2(tmp_path / "base")
    raw = json.loads((tmp_path / "base" / "tokenizer.json").read_text().replace("_of_turn>", "_of_text>"))
    (tmp_path / "base" / "tokenizer.json").write_text(json.dumps(raw))
    settings = tmp_path / "base" / "tokenizer_config.json"
    settings.write_text(json.dumps(tokenizer_fixtures.CONFIG))
    code, _, err = run(tmp_path / "base", stdin="Hello\n")
    assert (code, "this is a base model" in err) == (2, True)


def test_chat_saves_and_loads(lm: LM, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chat = talk(lm, system="Be brief.")
    chat.take("Hello there")
    for name in ("talk.json", "talk.md"):
        assert chat.take(f"/save {tmp_path / name}")
    saved = json.loads((tmp_path / "talk.json").read_text())
    assert saved == {"model": str(lm.folder), "system": "Be brief.", "messages": chat.messages}
    assert (
        (tmp_path / "talk.md").read_text().startswith("**system**\n\nBe brief.\n\n**user**\n\nHello there\n\n**assist")
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["talk.json", "talk.md"]
    other = talk(lm)
    other.take(f"/load {tmp_path / 'talk.json'}")
    assert (other.messages, other.system) == (chat.messages, "Be brief.")
    (tmp_path / "bad.json").write_text('[{"role": "model", "content": "x"}]')
    other.take(f"/load {tmp_path / 'bad.json'}")
    other.take("/load")
    other.take(f"/load {tmp_path / 'none.json'}")
    assert other.messages == chat.messages
    errors = capsys.readouterr().err
    assert "messages[0]: role is 'model'" in errors
    assert "/load: name a file" in errors
    assert "No such file" in errors


def test_chat_commands_change_the_conversation(lm: LM, capsys: pytest.CaptureFixture[str]) -> None:
    chat = talk(lm)
    chat.take("/retry")
    chat.take("Hello there")
    first = chat.messages
    chat.take("/retry")
    assert chat.messages[:1] == first[:1] == [USER]
    assert chat.messages[1] != first[1]  # another seed
    assert chat.messages[1]["content"] == lm.generate([USER], max_new_tokens=6, seed=2).text
    chat.take("/system Be brief.")
    chat.take("/system")
    chat.take("/reset")
    assert (chat.messages, chat.system) == ([], "Be brief.")
    chat.take("/system none")
    chat.take("/unknown")
    chat.take("/help")
    assert chat.system is None
    assert not chat.take("/exit")
    errors = capsys.readouterr().err
    for text in ("no message to answer", "system text: Be brief.", "no command /unknown", "/save FILE"):
        assert text in errors


def test_a_message_that_begins_with_a_path_is_a_message(lm: LM) -> None:
    chat = talk(lm)
    chat.take("/usr/bin is a folder")
    assert chat.messages[0]["content"] == "/usr/bin is a folder"


def test_chat_says_when_the_context_is_nearly_full_and_full(lm: LM, capsys: pytest.CaptureFixture[str]) -> None:
    chat = talk(lm)
    chat.take("a b c d e " * 21)
    assert "of 256 tokens of context are used: /reset" in capsys.readouterr().err
    before = chat.messages
    chat.take("a b c d e " * 30)
    errors = capsys.readouterr().err
    assert "the context holds 256" in errors
    assert "The message was taken back" in errors
    assert chat.messages == before


class Interrupted:
    """A stream in which Ctrl-C falls after some pieces."""

    def __init__(self, stream: Any, pieces: int) -> None:
        self.stream, self.pieces = stream, pieces

    def __iter__(self) -> Iterator[str]:
        for _, piece in zip(range(self.pieces), self.stream, strict=False):
            yield piece
        raise KeyboardInterrupt

    @property
    def completion(self) -> Any:
        return self.stream.completion


@pytest.mark.parametrize("pieces", [0, 3])
def test_ctrl_c_stops_the_answer_and_not_the_program(
    lm: LM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], pieces: int
) -> None:
    stream = LM.stream
    monkeypatch.setattr(LM, "stream", lambda *a, **k: Interrupted(stream(*a, **k), pieces))
    chat = talk(lm, terminal=True, max_new_tokens=40)
    assert chat.take("Hello there")
    out = capsys.readouterr().out
    if pieces:
        assert [message["role"] for message in chat.messages] == ["user", "assistant"]
        assert "; stopped)" in out
    else:
        assert chat.messages == []
        assert "the message was taken back" in out
    with pytest.raises(KeyboardInterrupt):  # in a pipe nobody is there to go on
        talk(lm).take("Hello there")


def test_a_terminal_gets_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    Screen(terminal=True).piece("a\x1b[2Jb\x9bc\r\n\td")
    assert capsys.readouterr().out == "a[2Jbc\n\td"
    Screen(terminal=False).piece("a\x1bb")
    assert capsys.readouterr().out == "a\x1bb"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("hello\r", "hello"),
        ("one\\\rtwo\r", "one\ntwo"),
        ("one\x1b\rtwo\r", "one\ntwo"),
        ("\x1b[200~one\ntwo\n\x1b[201~three\r", "one\ntwo\nthree"),
        ("a\\b\r", "a\\b"),
    ],
)
def test_keys_of_the_line_editor(state: Path, keys: str, message: str) -> None:
    with create_pipe_input() as pipe:
        pipe.send_text(keys)
        assert chat_verb.prompt_session(input=pipe, output=DummyOutput()).prompt() == message
    assert (state / "gemwright" / "chat_history").is_file()


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo-terminal")
def test_chat_on_a_terminal(folder: Path, state: Path) -> None:
    """The whole program at a real terminal: greeting, an answer with counts, Ctrl-C at the prompt, Ctrl-D leaves."""
    keyboard, terminal = os.openpty()
    command = [sys.executable, "-m", "gemwright", "chat", str(folder), "--max-new-tokens", "5"]
    environment = {**os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "NO_COLOR": "1"}
    chat = subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal, env=environment)
    os.close(terminal)
    seen = b""

    def until(text: bytes) -> None:
        nonlocal seen
        end = time.monotonic() + 60
        while text not in seen:
            ready, _, _ = select.select([keyboard], [], [], max(0.0, end - time.monotonic()))
            assert ready, (text, seen)
            seen += os.read(keyboard, 4096)
        seen = seen.partition(text)[2]

    until(b"Ctrl-D leaves.")
    until(b">")
    os.write(keyboard, b"Hello there\r")
    until(b"tokens/s")
    until(b">")
    os.write(keyboard, b"half a line\x03")
    until(b">")
    os.write(keyboard, b"\x04")
    assert chat.wait(timeout=120) == 0
    os.close(keyboard)
