"""gemwright chat: a conversation in the terminal.

`Chat` holds the conversation and does what its commands say; it reads nothing. Two fronts feed it: a prompt_toolkit
session on a terminal, and plain lines where input or output is a pipe (one message a line; answers to stdout, the rest
to stderr), which makes it scriptable and testable.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tyro.conf import OmitArgPrefixes

from gemwright.cli.options import Flag, Loading, Model, Sampling, Text

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession

    from gemwright.lm import LM, Completion

LONGEST_ANSWER: Final = 1024
"""Tokens of an answer where --max-new-tokens is not given and the context has room."""
NEARLY_FULL: Final = 0.8
"""Share of the context from which on every answer is followed by a warning."""
ROOM: Final = "/reset starts anew, /save FILE keeps what was said"
HELP: Final = """\
/help           this list
/reset          forget the conversation
/retry          answer the last message anew
/system TEXT    put a text in front of the first message; without TEXT, show it; "none" takes it away
/save FILE      write the conversation: .md for reading, else JSON
/load FILE      go on with a conversation from a JSON file
/exit           leave (as Ctrl-D does)
Enter sends; Alt-Enter, or a backslash at the end of a line, starts a new line; Ctrl-C stops an answer."""

_CONTROLS: Final = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}


@dataclass(frozen=True)
class Options:
    """Talk with a model in the terminal.

    Without MODEL, a small bundled model answers. In the chat, /help lists the commands. Piped input is read one message
    a line, and answers alone go to stdout.

    For example:

      gemwright chat

      gemwright chat google/gemma-2-2b-it --system "Answer in one sentence."

      echo "Why is the sky blue?" | gemwright chat FOLDER --temperature 0
    """

    model: Model = None
    """Folder or hub name."""
    system: Text = None
    """Text put in front of the first user turn (Gemma 2 has no system role)."""
    json: Flag = False
    """Print each answer as one JSON object a line, with its counts."""
    sampling: OmitArgPrefixes[Sampling] = field(default_factory=Sampling)
    loading: OmitArgPrefixes[Loading] = field(default_factory=Loading)


def run(options: Options) -> int:
    """Chat until the input ends; 0."""
    lm = options.loading.load(options.model)
    terminal = sys.stdin.isatty() and sys.stdout.isatty() and not options.json
    screen = Screen(terminal=terminal, as_json=options.json)
    chat = Chat(lm, screen, system=options.system, sampling=options.sampling.given())
    chat.check()
    screen.note(_introduction(lm, options.model))
    screen.note("/help lists the commands, Ctrl-D leaves.\n" if terminal else "")
    for message in _typed() if terminal else (line.rstrip("\r\n") for line in sys.stdin):
        if not chat.take(message):
            break
    return 0


def _introduction(lm: LM, name: str | None) -> str:
    """What this model is."""
    parameters = lm.config.num_parameters()
    size = f"{parameters / 1e9:.1f}B" if parameters >= 1e9 else f"{parameters / 1e6:.1f}M"
    dtype = str(lm.dtype).removeprefix("torch.")
    shape = f"{size} parameters, {dtype} on {lm.device.type}, context {lm.config.max_position_embeddings} tokens"
    if name is not None:
        return f"{name}: {shape}."
    return (
        f"The bundled model: SmolLM2-135M-Instruct in the Gemma 2 architecture ({shape}).\n"
        "It is small: it chats, and it is often wrong. For a real Gemma 2: gemwright chat google/gemma-2-2b-it"
    )


class Screen:
    """Where the chat writes: all on a terminal, notes dim; else answers to stdout, notes to stderr."""

    def __init__(self, *, terminal: bool, as_json: bool = False) -> None:
        self.terminal, self.as_json = terminal, as_json
        self.dim = terminal and "NO_COLOR" not in os.environ

    def note(self, text: str) -> None:
        """Something that is not an answer."""
        if text:
            print(f"\x1b[2m{text}\x1b[0m" if self.dim else text, file=sys.stdout if self.terminal else sys.stderr)

    def piece(self, text: str) -> None:
        """A piece of an answer; on a terminal without control characters, which would be obeyed there."""
        if not self.as_json:
            print(text.translate(_CONTROLS) if self.terminal else text, end="", flush=True)

    def end(self, completion: Completion, seconds: float) -> None:
        """The end of an answer."""
        if not self.as_json:
            print(flush=True)
            return
        answer = {
            "text": completion.text,
            "finish_reason": completion.finish_reason,
            "prompt_tokens": completion.prompt_tokens,
            "new_tokens": len(completion.tokens),
            "seconds": round(seconds, 3),
            "tokens_per_second": round(len(completion.tokens) / seconds, 1),
        }
        print(json.dumps(answer, ensure_ascii=False), flush=True)


class Chat:
    """The conversation, and what its commands do."""

    def __init__(self, lm: LM, screen: Screen, *, system: str | None, sampling: dict[str, Any]) -> None:
        self.lm, self.screen, self.system, self.sampling = lm, screen, system, sampling
        self.messages: list[dict[str, str]] = []
        self.retries = 0
        self.commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: screen.note(HELP),
            "/reset": lambda _: self.reset(),
            "/retry": lambda _: self.retry(),
            "/system": self.set_system,
            "/save": self.save,
            "/load": self.load,
        }

    def check(self) -> None:
        """ValueError where the model has no turn format."""
        self.lm.encode([{"role": "user", "content": "Hello"}], system=self.system)

    def take(self, text: str) -> bool:
        """Answer a message or obey a command; False to leave. What fails leaves the conversation as it was."""
        from gemwright.generate import ContextError

        if not text.strip():
            return True
        name, _, argument = text.strip().partition(" ")
        if name in ("/exit", "/quit"):
            return False
        try:
            if name in self.commands:
                self.commands[name](argument.strip())
            elif name.startswith("/") and name[1:].isalpha():
                self.screen.note(f"no command {name}; /help lists them")
            else:
                self.ask([*self.messages, {"role": "user", "content": text}])
        except ContextError as error:
            self.screen.note(f"{error}. The message was taken back: {ROOM}")
        except (ValueError, OSError) as error:
            self.screen.note(str(error))
        except KeyboardInterrupt:
            if not self.screen.terminal:
                raise
            self.screen.note("(stopped before a word: the message was taken back)")
        return True

    def ask(self, messages: list[dict[str, str]]) -> None:
        """Stream the answer to messages that end with the user's; Ctrl-C ends it and keeps what there is."""
        context = self.lm.config.max_position_embeddings
        prompt = len(self.lm.encode(messages, system=self.system))
        sampling = {"max_new_tokens": max(1, min(LONGEST_ANSWER, context - prompt)), **self.sampling}
        if "seed" in sampling:
            sampling["seed"] += self.retries
        start = time.perf_counter()
        stream = self.lm.stream(messages, system=self.system, **sampling)
        stopped = False
        try:
            for piece in stream:
                self.screen.piece(piece)
        except KeyboardInterrupt:
            stopped = True
            if not self.screen.terminal or not stream.completion.text.strip():
                raise
        completion, seconds = stream.completion, time.perf_counter() - start
        self.messages = [*messages, {"role": "assistant", "content": completion.text}]
        self.screen.end(completion, seconds)
        self.screen.note(self._remarks(completion, stopped, seconds, context))

    def _remarks(self, completion: Completion, stopped: bool, seconds: float, context: int) -> str:
        new = len(completion.tokens)
        parts = [f"{completion.prompt_tokens} tokens read", f"{new} written, {new / seconds:.1f} tokens/s"]
        if stopped:
            parts.append("stopped")
        elif completion.finish_reason == "length":
            parts.append("cut at the limit (--max-new-tokens, or the end of the context)")
        line = f"({'; '.join(parts)})"
        used = completion.prompt_tokens + new
        if used > NEARLY_FULL * context:
            line += f"\n{used} of {context} tokens of context are used: {ROOM}"
        return line

    def reset(self) -> None:
        """Forget the conversation."""
        self.messages, self.retries = [], 0
        self.screen.note("a new conversation")

    def retry(self) -> None:
        """Answer the last user message anew."""
        answered = bool(self.messages) and self.messages[-1]["role"] != "user"
        messages = self.messages[:-1] if answered else self.messages
        if not messages:
            raise ValueError("/retry: there is no message to answer yet")
        self.retries += 1
        self.ask(messages)

    def set_system(self, text: str) -> None:
        """Set, show or remove the system text; it acts on the whole conversation."""
        if text:
            self.system = None if text == "none" else text
        self.screen.note(f"system text: {self.system or 'none'}")

    def save(self, file: str) -> None:
        """Write the conversation by one rename."""
        path = _path("/save", file)
        if path.suffix.lower() == ".md":
            turns = [("system", self.system)] if self.system else []
            turns += [(message["role"], message["content"]) for message in self.messages]
            text = "\n\n".join(f"**{role}**\n\n{content}" for role, content in turns) + "\n"
        else:
            record = {"model": str(self.lm.folder), "system": self.system, "messages": self.messages}
            text = json.dumps(record, ensure_ascii=False, indent=2) + "\n"
        partial = path.with_name(f".{path.name}.partial")
        try:
            partial.write_text(text, encoding="utf-8")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        self.screen.note(f"{len(self.messages)} messages written to {path}")

    def load(self, file: str) -> None:
        """Go on with a saved conversation."""
        from gemwright.cli.generate import read_messages

        path = _path("/load", file)
        messages = read_messages(str(path))
        record = json.loads(path.read_text(encoding="utf-8"))
        system = record.get("system") if isinstance(record, dict) else None
        if not (system is None or isinstance(system, str)):
            raise ValueError(f"{path}: system is {system!r}, allowed is a string or null")
        if messages:
            self.lm.encode(messages, system=system)  # raises on roles and contents out of order
        self.messages, self.system, self.retries = messages, system, 0
        waiting = bool(messages) and messages[-1]["role"] == "user"
        self.screen.note(f"{len(messages)} messages from {path}{'; /retry answers the last' if waiting else ''}")


def _path(command: str, file: str) -> Path:
    if not file:
        raise ValueError(f"{command}: name a file, for example {command} talk.json")
    return Path(file).expanduser()


def _history() -> Path:
    """The file of typed lines, in the user's state folder (XDG base directory specification)."""
    folder = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "gemwright"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder / "chat_history"


def _typed() -> Iterator[str]:
    """Messages typed on a terminal, until Ctrl-D; Ctrl-C at the prompt clears the line."""
    session = prompt_session()
    while True:
        try:
            yield session.prompt("> ")
        except KeyboardInterrupt:
            continue
        except EOFError:
            return


def prompt_session(**streams: Any) -> PromptSession[str]:
    """The line editor: Enter sends, Alt-Enter or a trailing backslash starts a new line, pasted lines stay together."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.history import FileHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    commands = [line.split()[0] for line in HELP.splitlines() if line.startswith("/")]
    return PromptSession(
        history=FileHistory(str(_history())),
        key_bindings=keys,
        multiline=True,
        prompt_continuation="  ",
        completer=WordCompleter(commands, sentence=True),
        complete_while_typing=False,
        **streams,
    )
