"""Prompts: a conversation to the token ids that a chat model was trained on.

Gemma 2's turn format, the built-in default where a tokenizer has the turn tokens and its folder no template:

    <bos><start_of_turn>user\\n{text}<end_of_turn>\\n<start_of_turn>model\\n{text}<end_of_turn>\\n ...

Contents are trimmed, the role `assistant` is written `model`, the roles alternate from `user`, and no system role
exists: byte for byte what the published template does. A folder's own `chat_template` is run instead, in jinja's
sandbox, with the names that transformers gives it. Either way the BOS is the template's affair and none is added to it.

What people type stays text. A control token spelled in a message is hidden before rendering (its first character
becomes a private-use one that occurs nowhere else), so every control token in the rendered text is the template's own:

- nothing was hidden, the ordinary case: the whole text is encoded with control tokens, which is what transformers does;
- otherwise the text is split at the template's control tokens, and what lies between is restored and encoded as plain
  text. The ids are the same but for tokenizers that treat the start of a text apart from the start of a segment.

The limit of that: a template that looks for a control token inside a message (`'</think>' in content`) no longer sees
it if the vocabulary marks it special. A role must be a plain word, since some templates make a token of it.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, Final, NoReturn, Protocol

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from gemwright.tokenizer import TURN_TOKENS, Tokenizer

TEMPLATE_SECONDS: Final = 5.0
TEMPLATE_CHARACTERS: Final = 16 * 2**20
"""Bounds of one rendering by a folder's template, and of each string, list and integer (in bits) built by operators.
They stop runaway loops and growth; a single filter on large arguments runs to its end first."""
_DEADLINE: Final = "the deadline"  # a space in its name: no template can set it
_PRIVATE_USE: Final = range(0xF0000, 0xFFFFE)

Message = Mapping[str, Any]


class HasEos(Protocol):
    """A model configuration, as far as stopping goes."""

    @property
    def eos_token_id(self) -> int | tuple[int, ...] | None: ...


def render(
    messages: Sequence[Message], tokenizer: Tokenizer, *, system: str | None = None, add_generation_prompt: bool = True
) -> list[int]:
    """Token ids of a conversation.

    Args:
        messages: `{"role": ..., "content": ...}` in order; other keys go to a folder's own template.
        system: put in front of the first user turn, with a blank line between, whatever the template; Gemma 2 has no
            system role. Empty is the same as None.
        add_generation_prompt: end with the opening of the model's turn.

    Raises:
        ValueError: a malformed message, a role out of order (names the turn), an error in the folder's template, or a
            tokenizer without turn tokens or template: a base model, which takes text prompts.
    """
    chat = _checked(messages, system)
    guard = _Guard(tokenizer.specials, json.dumps([chat, tokenizer.chat_template], ensure_ascii=False, default=str))
    try:
        text = _text(guard.hide(chat), tokenizer, add_generation_prompt)
    except ValueError as error:
        raise ValueError(guard.show(str(error))) from error
    if not guard.used:
        return tokenizer.encode(text, bos=False, special=True)
    ids: list[int] = []
    for part in guard.split(text):
        control = tokenizer.specials.get(part)
        ids += [control] if control is not None else tokenizer.encode(guard.show(part), bos=False)
    return ids


def render_text(
    messages: Sequence[Message], tokenizer: Tokenizer, *, system: str | None = None, add_generation_prompt: bool = True
) -> str:
    """The text of a conversation, to be read; `render` gives the ids, which text alone cannot when a message spells a
    control token. Arguments and errors as for `render`."""
    return _text(_checked(messages, system), tokenizer, add_generation_prompt)


def stop_ids(config: HasEos, generation_config: Mapping[str, Any], tokenizer: Tokenizer) -> frozenset[int]:
    """Ids that end a generation: the union of both configurations' `eos_token_id`, and `<end_of_turn>` where it exists.

    Gemma 2's config says 1, its generation_config [1, 107]; a chat that knows only 1 never ends a turn.
    """
    given = {"config": config.eos_token_id, "generation_config": generation_config.get("eos_token_id")}
    found = {i for i in (tokenizer.id(TURN_TOKENS[1]),) if i is not None}
    for name, value in given.items():
        ids = () if value is None else value if isinstance(value, (list, tuple)) else (value,)
        for i in ids:
            if isinstance(i, bool) or not isinstance(i, int) or i < 0:
                raise ValueError(f"{name}: eos_token_id is {value!r}; allowed: token ids (0 or more), one or a list")
            found.add(i)
    return frozenset(found)


def _checked(messages: Sequence[Message], system: str | None) -> list[dict[str, Any]]:
    """Copies of the messages (keys that are None dropped, as transformers does), `system` put in place."""
    if isinstance(messages, (str, Mapping)) or not messages:
        raise ValueError(f"messages: {messages!r:.80}; allowed: a non-empty list of role-and-content messages")
    chat = []
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ValueError(f"messages[{index}]: a {type(message).__name__}; allowed: a mapping with role and content")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise ValueError(f"messages[{index}]: {key} is {message.get(key)!r:.80}; allowed: a string")
        if not re.fullmatch(r"[\w.-]+", message["role"]):
            raise ValueError(f"messages[{index}]: role is {message['role']!r:.80}; allowed: a word")
        chat.append({key: value for key, value in message.items() if value is not None})
    if system and system.strip():
        first = next((message for message in chat if message["role"] == "user"), None)
        if first is None:
            raise ValueError("system: there is no user turn to put it in front of")
        first["content"] = f"{system.strip()}\n\n{first['content'].lstrip()}"
    return chat


def _text(chat: list[dict[str, Any]], tokenizer: Tokenizer, add_generation_prompt: bool) -> str:
    misplaced = _misplaced([message["role"] for message in chat])
    if tokenizer.chat_template is not None:
        values = {**tokenizer.names, "messages": chat, "tools": None, "documents": None}
        try:
            return _run(tokenizer.chat_template, {**values, "add_generation_prompt": add_generation_prompt})
        except ValueError as error:
            raise ValueError(f"{error} ({misplaced})" if misplaced else str(error)) from error
    if any(tokenizer.id(token) is None for token in TURN_TOKENS):
        raise ValueError(
            f"{tokenizer.folder}: no chat_template and no {' or '.join(TURN_TOKENS)}: this is a base model; "
            "give it a text prompt instead of messages"
        )
    if misplaced:
        raise ValueError(misplaced)
    start, end = TURN_TOKENS
    turns = (("model" if index % 2 else "user", message["content"].strip()) for index, message in enumerate(chat))
    body = "".join(f"{start}{role}\n{content}{end}\n" for role, content in turns)
    return tokenizer.names.get("bos_token", "") + body + (f"{start}model\n" if add_generation_prompt else "")


def _misplaced(roles: Sequence[str]) -> str | None:
    """The first turn that breaks user, assistant, user, ...: what came, what is allowed. None if all are in order."""
    for index, role in enumerate(roles):
        allowed = ("assistant", "model") if index % 2 else ("user",)
        if role not in allowed:
            hint = "; Gemma 2 has no system role: pass the text as system=, for the first user turn" * (
                role == "system"
            )
            return f"messages[{index}]: role is {role!r}; allowed here: {' or '.join(map(repr, allowed))}{hint}"
    return None


class _Guard:
    """Hides the control tokens that messages spell, so that a template's own can be told from them."""

    def __init__(self, specials: Mapping[str, int], everything: str) -> None:
        free = (chr(code) for code in _PRIVATE_USE if chr(code) not in everything)
        self._mask = {first: next(free) for first in sorted({token[0] for token in specials})}
        self._shown = str.maketrans({mask: first for first, mask in self._mask.items()})
        any_token = "|".join(re.escape(token) for token in sorted(specials, key=len, reverse=True)) or "(?!)"
        self._token = re.compile(f"({any_token})")
        self._start = re.compile(f"(?={any_token})[\\s\\S]")  # overlapping spellings are all broken
        self.used = False

    def hide(self, value: Any) -> Any:
        """Plain JSON data with every string guarded; anything else has no place in a sandbox."""
        if isinstance(value, str):
            hidden = self._start.sub(lambda match: self._mask[match[0]], str(value))
            self.used |= hidden != value
            return hidden
        if isinstance(value, Mapping):
            return {self.hide(key): self.hide(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.hide(item) for item in value]
        if value is None or isinstance(value, (bool, int, float)):
            return value
        raise ValueError(f"messages: a {type(value).__name__} inside; allowed: JSON data")

    def show(self, text: str) -> str:
        return text.translate(self._shown)

    def split(self, text: str) -> Iterator[str]:
        """Control tokens and the text between them, in order."""
        return filter(None, self._token.split(text))


def _run(template: str, values: Mapping[str, Any]) -> str:
    """Renders a folder's template within the bounds; ValueError names whatever goes wrong in it."""
    try:
        return _join(_compiled(template).generate({**values, _DEADLINE: time.monotonic() + TEMPLATE_SECONDS}))
    except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        line = f" (line {error.lineno})" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        raise ValueError(f"chat_template: {error or type(error).__name__}{line}") from error
    except (RecursionError, MemoryError) as error:
        raise ValueError(f"chat_template: {type(error).__name__}: it nests or grows without bound") from error


@lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    environment = _Sandbox()
    return environment.from_string(_Bounds().visit(environment.parse(template)))


def _join(pieces: Iterator[str]) -> str:
    text: list[str] = []
    size = 0
    for piece in pieces:
        size += len(piece)
        if size > TEMPLATE_CHARACTERS:
            raise jinja2.TemplateError(f"the output passes {TEMPLATE_CHARACTERS} characters")
        text.append(piece)
    return "".join(text)


def _raise_exception(message: object) -> NoReturn:
    raise jinja2.TemplateError(str(message))


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """Plain JSON, where jinja's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


class _Generation(Extension):
    """`{% generation %}`: marks the model's own words for training; here its body is just rendered."""

    tags = {"generation"}  # noqa: RUF012 - jinja types it as a set

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Transformers' names and settings, a clock for loops, and bounded operators."""

    intercepted_binops = frozenset({"+", "*", "**"})

    def __init__(self) -> None:
        extensions = [_Generation, "jinja2.ext.loopcontrols"]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        self.filters["tojson"] = _tojson
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda form: datetime.now().strftime(form)

    @jinja2.pass_context
    def tick(self, context: Context) -> None:
        """Called at the head of every loop and macro body."""
        if time.monotonic() > context.resolve(_DEADLINE):
            raise jinja2.TemplateError(f"it runs longer than {TEMPLATE_SECONDS} s")

    def bounded(self, value: Any) -> Any:
        if isinstance(value, (str, list, tuple)) and len(value) > TEMPLATE_CHARACTERS:
            raise jinja2.TemplateError(f"a value passes {TEMPLATE_CHARACTERS} characters or items")
        return value

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator != "+" and _product_size(operator, left, right) > TEMPLATE_CHARACTERS:
            raise jinja2.TemplateError(f"the result of {operator} passes {TEMPLATE_CHARACTERS} characters or bits")
        return self.bounded(super().call_binop(context, operator, left, right))


def _product_size(operator: str, left: Any, right: Any) -> int:
    """Upper bound of the characters, items or bits that `left * right` or `left ** right` makes."""
    if isinstance(left, int) and isinstance(right, int):
        return left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
    sequence, count = (left, right) if isinstance(right, int) else (right, left)
    return len(sequence) * max(count, 0) if isinstance(count, int) and isinstance(sequence, (str, list, tuple)) else 0


class _Bounds(NodeTransformer):
    """Puts `environment.tick()` at the head of every loop and macro body, and a bound around every `~`."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802 - jinja's visitor protocol
        self.generic_visit(node)
        tick = nodes.Call(nodes.EnvironmentAttribute("tick"), [], [], None, None)
        node.body.insert(0, nodes.ExprStmt(tick, lineno=node.lineno))
        return node

    visit_Macro = visit_CallBlock = visit_For

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return nodes.Call(nodes.EnvironmentAttribute("bounded"), [node], [], None, None, lineno=node.lineno)
