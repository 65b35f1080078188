"""Rows: what the columns of a row mean, and the document of tokens and loss weights that it becomes.

Columns are TRL's; the first row decides the kind, and every other row must be of the same.

    messages                 a conversation: loss on the assistant's turns
    prompt + completion      both text, or both lists of messages: loss on the completion
    text                     loss on everything (the column may have another name)
    chosen + rejected        preferences, with or without prompt; for the algorithms that compare answers
    prompt                   for those that generate the answer themselves

**What carries loss** is stated here and nowhere else. A weight belongs to a token as a target: weight 1 means that the
model learns to predict it.

- A conversation is rendered as the run path renders it (`prompt.render`: the folder's chat template, or Gemma 2's
  turns, BOS once). The model writes the text of its turn and the control token that ends it, so these have weight 1.
  The newline after `<end_of_turn>` is written by the template, never by the model: weight 0. After the last answer the
  model ends its generation with `<end_of_turn><eos>` (arXiv 2408.00118, section 4), and for the next turn the `<eos>`
  is dropped; so the document ends there: the template's newline is left out and `<eos>` with weight 1 put in its
  place, unless the turn ends with the EOS token already. Messages after the last answer are left out.

      <bos><start_of_turn>user\\nHi<end_of_turn>\\n<start_of_turn>model\\nHello<end_of_turn><eos>
       0    0              0   0 0 0            0  0              0    0  1    1            1

- Text: BOS as the tokenizer's configuration says, then `<eos>`; weight 1 on all but the first token.
- A completion of text: prompt and completion are encoded together where the prompt's tokens stay as they are, else
  one after the other, as in generation; weight 1 on the completion and `<eos>`.
- `<eos>` is not doubled where the text spells it at its end.

**Answers in a template's text** are found by rendering prefixes: the conversation up to an answer, with the opening of
the model's turn, must be a prefix of the whole, and so must the conversation up to the answer's end. A template that
rewrites earlier turns fails that and is refused. A vocabulary may merge characters across the seam between the opening
and the answer; generation cannot, so opening and answer are then encoded apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple, get_args

from gemwright.data.sources import Row, Source
from gemwright.prompt import render
from gemwright.tokenizer import Tokenizer

Kind = Literal["messages", "prompt_completion", "text", "preference", "prompt"]
ASSISTANT: Final = ("assistant", "model")


@dataclass(frozen=True, kw_only=True)
class Format:
    """How rows become documents."""

    kind: Kind | None = None
    """What the columns hold; None takes it from their names."""
    text_field: str = "text"
    """Column of plain text."""
    answers: Literal["all", "last"] = "all"
    """Which of a conversation's answers carry loss."""
    fold_system: bool = False
    """Put a leading system message in front of the first user turn, with a blank line between. Gemma 2 has no system
    role: without this its template refuses such a row."""
    control_tokens: bool = True
    """In text, and in prompts and completions of text, read spelled-out control tokens as control tokens, as TRL does.
    Messages never spell one."""

    def __post_init__(self) -> None:
        for field, allowed in {"kind": (None, *get_args(Kind)), "answers": ("all", "last")}.items():
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field}: {getattr(self, field)!r}; allowed: {', '.join(map(str, allowed))}")


class Document(NamedTuple):
    """Tokens, and the weight, 0 or 1, that each has as a target; the first is never one."""

    tokens: Sequence[int]
    weights: Sequence[int]


def kinds(columns: Sequence[str], format: Format) -> list[Kind]:
    """Every kind that the columns can be read as."""
    has = set(columns)
    found: dict[Kind, bool] = {
        "messages": "messages" in has,
        "prompt_completion": {"prompt", "completion"} <= has,
        "text": format.text_field in has,
        "preference": {"chosen", "rejected"} <= has,
    }
    several: list[Kind] = [kind for kind, there in found.items() if there]
    return several or (["prompt"] if "prompt" in has else [])


def detect(source: Source, format: Format) -> Kind:
    """The kind of a source's rows, from the first one.

    Raises:
        ValueError: no rows, columns that mean nothing or more than one thing, or not what `format.kind` wants.
    """
    row = next(source.rows(), None)
    if row is None:
        raise ValueError(f"data: {source.name}: there are no rows")
    found = kinds(list(row.data), format)
    came = ", ".join(map(str, row.data)) or "none"
    if format.kind is not None:
        if format.kind not in (*found, *(("prompt",) if "prompt" in row.data else ())):
            raise ValueError(f"{row.where}: columns are {came}, which are not of the kind {format.kind}")
        return format.kind
    if not found:
        allowed = f"messages, prompt + completion, {format.text_field}, chosen + rejected, or prompt"
        raise ValueError(f"{row.where}: columns are {came}; allowed: {allowed}")
    if len(found) > 1:
        raise ValueError(f"{row.where}: columns are {came}, which may be {' or '.join(found)}; choose with kind")
    return found[0]


def read(source: Source, kind: Kind, format: Format) -> Iterator[Row]:
    """The rows of a source, each checked against the kind.

    Raises:
        ValueError: names file, row and field, what came and what is allowed.
    """
    known: set[frozenset[str]] = set()
    for row in source.rows():
        columns = frozenset(row.data)
        if columns not in known:
            if kind not in (found := kinds(list(columns), format)) and not (kind == "prompt" and "prompt" in columns):
                came = ", ".join(found) or f"none (columns {', '.join(sorted(map(str, columns))) or 'none'})"
                raise ValueError(f"{row.where}: the kind is {came}, where the first row's is {kind}; mixed columns")
            if format.kind is None and len(found) > 1:
                raise ValueError(f"{row.where}: the columns may be {' or '.join(found)}; choose with kind")
            known.add(columns)
        _check(row, kind, format)
        yield row


def _check(row: Row, kind: Kind, format: Format) -> None:
    """Types and turns of one row."""
    if kind == "messages":
        _check_messages(row, "messages")
        _check_answer(row, "messages")
    elif kind == "text":
        _check_text(row, format.text_field)
    else:
        fields = {"prompt_completion": ["prompt", "completion"], "preference": ["chosen", "rejected"]}.get(kind, [])
        fields += ["prompt"] if kind != "prompt_completion" and "prompt" in row.data else []
        shapes = {field: isinstance(row.data[field], str) for field in fields}
        if len(set(shapes.values())) > 1:
            came = ", ".join(f"{field} is {row.data[field]!r:.40}" for field in fields)
            raise ValueError(f"{row.where}: {came}; allowed: all strings, or all lists of messages")
        for field, text in shapes.items():
            if not text:
                _check_messages(row, field)
            if not text and field != "prompt":
                _check_answer(row, field)


def _check_text(row: Row, field: str) -> None:
    if not isinstance(row.data[field], str):
        raise ValueError(f"{row.where}: {field} is {row.data[field]!r:.80}; allowed: a string")


def _check_messages(row: Row, field: str) -> None:
    value = row.data[field]
    if not isinstance(value, list) or not value:
        allowed = "a non-empty list of messages" + " or a string" * (field != "messages")
        raise ValueError(f"{row.where}: {field} is {value!r:.80}; allowed: {allowed}")
    for index, message in enumerate(value):
        if not isinstance(message, Mapping):
            raise ValueError(f"{row.where}: {field}[{index}] is {message!r:.80}; allowed: a role and a content")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                came = f"{message[key]!r:.80}" if key in message else "missing"
                raise ValueError(f"{row.where}: {field}[{index}].{key} is {came}; allowed: a string")


def _check_answer(row: Row, field: str) -> None:
    roles = [message["role"] for message in row.data[field]]
    if not any(role in ASSISTANT for role in roles):
        raise ValueError(f"{row.where}: {field} has roles {', '.join(roles)}; at least one turn must be assistant")


def encode(row: Row, kind: Kind, tokenizer: Tokenizer, format: Format) -> Document | None:
    """The document of a checked row; None where nothing is to be learned: empty text, or answers without text.

    Raises:
        ValueError: a role out of order, a template that fails on the row or rewrites turns, a kind without loss of its
            own (preference, prompt); names file, row and field.
    """
    try:
        if kind == "text":
            return _text(row.data[format.text_field], tokenizer, format)
        if kind == "messages":
            return _conversation(row.data["messages"], 0, tokenizer, format)
        if kind == "prompt_completion":
            prompt, completion = row.data["prompt"], row.data["completion"]
            if isinstance(prompt, str):
                return _completion(prompt, completion, tokenizer, format)
            if completion[0]["role"] not in ASSISTANT:
                raise ValueError(f"completion[0].role is {completion[0]['role']!r}; allowed: assistant")
            return _conversation([*prompt, *completion], len(prompt), tokenizer, format)
    except ValueError as error:
        raise ValueError(f"{row.where}: {error}") from error
    raise ValueError(f"{row.where}: rows are of the kind {kind}; allowed here: messages, prompt + completion, text")


def _text(text: str, tokenizer: Tokenizer, format: Format) -> Document | None:
    if not text:
        return None
    tokens = _ended(tokenizer.encode(text, special=format.control_tokens), tokenizer)
    return Document(tokens, [0] + [1] * (len(tokens) - 1))


def _completion(prompt: str, completion: str, tokenizer: Tokenizer, format: Format) -> Document | None:
    special = format.control_tokens
    if not completion:
        return None
    head = tokenizer.encode(prompt, special=special)
    tokens = tokenizer.encode(prompt + completion, special=special)
    if tokens[: len(head)] != head:
        tokens = head + tokenizer.encode(completion, bos=False, special=special)
    tokens = _ended(tokens, tokenizer)
    return Document(tokens, [0] * len(head) + [1] * (len(tokens) - len(head)))


def _ended(tokens: list[int], tokenizer: Tokenizer) -> list[int]:
    return tokens if tokens[-1:] == [tokenizer.eos_id] else [*tokens, tokenizer.eos_id]


def _conversation(
    messages: Sequence[Mapping[str, Any]], first: int, tokenizer: Tokenizer, format: Format
) -> Document | None:
    """The document of a conversation, with loss on the answers from message `first` on."""
    system: str | None = None
    if format.fold_system and messages[0]["role"] == "system":
        system, messages, first = messages[0]["content"], messages[1:], max(first - 1, 0)
    answers = [i for i, message in enumerate(messages) if i >= first and message["role"] in ASSISTANT]
    if not any(messages[i]["content"].strip() for i in answers):
        return None
    messages = messages[: answers[-1] + 1]
    whole = render(messages, tokenizer, system=system, add_generation_prompt=False)
    tokens: list[int] = []
    weights: list[int] = []
    done = 0  # of `whole`
    for i in answers:
        opening = render(messages[:i], tokenizer, system=system)
        last = i == answers[-1]
        closed = whole if last else render(messages[: i + 1], tokenizer, system=system, add_generation_prompt=False)
        if closed != whole[: len(closed)]:
            raise ValueError(
                f"chat_template: it writes messages[{i}] otherwise once more follow; its answers are unclear"
            )
        start, answer = _answer(opening, closed, tokenizer, i)
        length = _turn_length(answer, tokenizer)
        learned = int(format.answers == "all" or last)
        tokens += [*whole[done:start], *opening[start:], *answer]
        weights += [0] * (start - done + len(opening) - start)
        weights += [learned] * length + [0] * (len(answer) - length)
        done = len(closed)
        if last:  # the template's newline gives way to <eos>
            extra = len(answer) - length
            tokens, weights = tokens[: len(tokens) - extra], weights[: len(weights) - extra]
            if tokens[-1] != tokenizer.eos_id:
                tokens, weights = [*tokens, tokenizer.eos_id], [*weights, 1]
    return Document(tokens, weights)


def _answer(opening: list[int], closed: list[int], tokenizer: Tokenizer, index: int) -> tuple[int, list[int]]:
    """Where the two renderings part, and the tokens of the answer, that is of `closed` after `opening`."""
    if closed[: len(opening)] == opening:
        return len(opening), closed[len(opening) :]
    # merged across the seam: the text between two control tokens is split where the opening ends
    seam = max((n + 1 for n, token in enumerate(opening) if token in tokenizer.special_ids), default=0)
    end = next((n for n in range(seam, len(closed)) if closed[n] in tokenizer.special_ids), len(closed))
    head, text = tokenizer.decode(opening[seam:]), tokenizer.decode(closed[seam:end])
    answer = tokenizer.encode(text.removeprefix(head), bos=False)
    if opening[:seam] != closed[:seam] or not text.startswith(head):
        raise ValueError(f"chat_template: the model's turn does not open messages[{index}] as it opens a generation")
    if tokenizer.decode([*opening[seam:], *answer]) != text:
        raise ValueError(f"messages[{index}]: its tokens cannot be told from those of the turn's opening")
    return seam, answer + closed[end:]


def _turn_length(answer: Sequence[int], tokenizer: Tokenizer) -> int:
    """Tokens of an answer that the model writes: up to the control token that only white space follows, else all."""
    last = max((n for n, token in enumerate(answer) if token in tokenizer.special_ids), default=-1)
    return last + 1 if last >= 0 and not tokenizer.decode(answer[last + 1 :]).strip() else len(answer)
