"""Documents as student and teacher read them, packed into rows of a fixed length.

On prose both read the same tokens after <bos>. On chats the student reads Gemma's turns and the teacher its own ChatML
with its default system text. The control tokens are the same ids, so a chat is stored once, as the student reads it:

    student   0            1 user \\n QUESTION 2 \\n  1 model \\n ANSWER 2 \\n
    teacher   1 SYSTEM 2 \\n 1 user \\n QUESTION 2 \\n  1 assistant \\n ANSWER 2 \\n

and losses are taken where both predict the same next token: inside questions and answers, and at their ends.

Legend: T tokens of a row.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from data import Tokens, read_tokens
from tokenizers import Tokenizer
from torch import Tensor

from gemwright.ops.attention import PADDING

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"  # the source's own default
LENGTHS = ((1024, 0.80), (2048, 0.05), (8192, 0.15))
"""Lengths of the pieces that prose is cut into, and how often each comes."""
OPEN = 3
"""Rows that are filled at once, so that a long document leaves none half empty."""


class Turns:
    """The constant tokens around a chat's texts."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        def ids(text: str) -> list[int]:
            return list(tokenizer.encode(text, add_special_tokens=False).ids)

        self.user, self.model, self.assistant, self.newline = (
            ids(t) for t in ("user\n", "model\n", "assistant\n", "\n")
        )
        self.system = [1, *ids("system\n" + SYSTEM), 2, *self.newline]
        self.paragraph = ids("\n\n")
        self.ids = ids

    def question(self, text: str) -> list[int]:
        """A user's turn and the head of the answer, as the student reads them."""
        return [1, *self.user, *self.ids(text.strip()), 2, *self.newline, 1, *self.model]

    def pair(self, document: Tokens) -> Pair:
        """A document as both read it."""
        if len(document) < 2 or document[1] != 1:
            same = np.arange(len(document))
            same[-1] = -1
            return Pair(document, document, same, same >= 0)
        ends = [*np.flatnonzero(document == 2).tolist(), len(document)]
        theirs, partner, answers = [self.system], [np.full(1, -1)], [np.zeros(1, bool)]
        at, length = 1, len(self.system)
        for end in ends:
            if end <= at:
                continue
            answer = document[at + 1 : at + 1 + len(self.model)].tolist() == self.model
            head = 1 + len(self.model if answer else self.user)
            tail = document[end : end + 1 + len(self.newline)]
            opening = [1, *(self.assistant if answer else self.user)]
            body = document[at + head : end]
            theirs += [opening, body.tolist(), tail.tolist()]
            length += len(opening)
            # the last token of the opening and those of the body predict what follows
            partner += [np.full(head - 1, -1), np.arange(length - 1, length + len(body)), np.full(len(tail), -1)]
            answers.append(np.full(head + len(body) + len(tail), answer))
            length += len(body) + len(tail)
            at = end + len(tail)
        both = np.concatenate(partner)
        return Pair(document, np.concatenate(theirs).astype(np.uint16), both, np.concatenate(answers) & (both >= 0))


@dataclass(frozen=True)
class Pair:
    """A document of T student tokens and U teacher tokens."""

    student: Tokens
    teacher: Tokens
    partner: npt.NDArray[np.int64]
    """For each student token the index of the teacher token that predicts the same, or -1, [T]."""
    answer: npt.NDArray[np.bool_]
    """Whether it has one and lies in an answer, or in prose, [T]."""


@dataclass
class Row:
    """Packed documents: tokens, positions (-1 padding) and document numbers of both sides, [1, T] each."""

    student: tuple[Tensor, Tensor, Tensor]
    teacher: tuple[Tensor, Tensor, Tensor]
    partner_T: Tensor
    """Index in the teacher's row of the token that predicts the same; 0 where there is none."""
    taken_X: Tensor
    """Indices of the student's tokens where a loss is taken: known here, so that a GPU is not waited for."""
    answer_T: Tensor
    """1 where it lies in an answer, or in prose."""
    target_T: Tensor
    """The next token of the same document, or -1."""

    def to(self, device: torch.device) -> Row:
        """The row on a device, without waiting for it."""

        def move(x: Tensor) -> Tensor:
            return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)

        sides = (tuple(move(x) for x in side) for side in (self.student, self.teacher))
        flat = (move(x) for x in (self.partner_T, self.taken_X, self.answer_T, self.target_T))
        return Row(*sides, *flat)  # type: ignore[arg-type]


def rows(documents: Iterator[Tokens], turns: Turns, length: int) -> Iterator[Row]:
    """Rows of `length` tokens on both sides; what is left at the end makes the last ones.

    A document goes into the first of OPEN rows that has room, in order of arrival; where none has, the fullest one is
    done.
    """
    waiting: list[list[Pair]] = []
    for document in documents:
        pair = turns.pair(document[:length])
        if len(pair.teacher) > length:
            pair = turns.pair(document[: length * 3 // 4])  # leaves room for the teacher's system text
        place = next((held for held in waiting if _filled([*held, pair]) <= length), None)
        if place is None:
            if len(waiting) == OPEN:
                waiting.sort(key=_filled)
                yield _pack(waiting.pop(), length)
            waiting.append(place := [])
        place.append(pair)
    for held in waiting:
        yield _pack(held, length)


def _filled(held: list[Pair]) -> int:
    """Tokens of the longer side."""
    return max(sum(len(pair.student) for pair in held), sum(len(pair.teacher) for pair in held))


def _pack(held: list[Pair], length: int) -> Row:
    sides = np.zeros((2, 3, length), dtype=np.int64)
    sides[:, 1], sides[:, 2] = PADDING, len(held)
    flat = np.zeros((4, length), dtype=np.int64)
    flat[3] = -1
    starts = [0, 0]
    for number, pair in enumerate(held):
        for side, document in enumerate((pair.student, pair.teacher)):
            part = slice(starts[side], starts[side] + len(document))
            sides[side, 0, part], sides[side, 1, part], sides[side, 2, part] = (
                document,
                np.arange(len(document)),
                number,
            )
        part = slice(starts[0], starts[0] + len(pair.student))
        flat[0, part] = np.where(pair.partner < 0, 0, pair.partner + starts[1])
        flat[1, part], flat[2, part] = pair.partner >= 0, pair.answer
        flat[3, part.start : part.stop - 1] = pair.student[1:]
        starts = [starts[0] + len(pair.student), starts[1] + len(pair.teacher)]
    student, teacher = (tuple(torch.from_numpy(x)[None] for x in side) for side in sides)
    partner_T, taken_T, answer_T, target_T = torch.from_numpy(flat)
    return Row(student, teacher, partner_T, taken_T.nonzero()[:, 0], answer_T.float(), target_T)  # type: ignore[arg-type]


def pieces(folder: Path, split: str, turns: Turns, lengths: Sequence[tuple[int, float]], seed: int) -> list[Tokens]:
    """Prose: each source's documents, joined by empty lines and cut into pieces, shuffled over the sources."""
    rng = random.Random(seed)
    found: list[Tokens] = []
    bos, empty_line = np.zeros(1, np.uint16), np.array(turns.paragraph, np.uint16)
    for file in sorted((folder / "tokens").glob(f"{split}-*.bin")):
        if "-chats" in file.name:
            continue
        stream = np.concatenate([part for document in read_tokens([file]) for part in (document[1:], empty_line)])
        at = 0
        while at < len(stream) - 64:
            length = rng.choices([n for n, _ in lengths], [share for _, share in lengths])[0]
            found.append(np.concatenate([bos, stream[at : at + length - 1]]))
            at += length - 1
    rng.shuffle(found)
    return found


def chats(folder: Path, split: str) -> list[Tokens]:
    """Conversations that the teacher answered."""
    return read_tokens(sorted((folder / "tokens").glob(f"{split}-chats*.bin")))


class Mixture:
    """Documents of several sources without end, each source's tokens in proportion to its share."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.sources: dict[str, tuple[list[Tokens], float]] = {}
        self.left: dict[str, list[int]] = {}
        self.spent: dict[str, float] = {}

    def set(self, name: str, documents: list[Tokens], share: float) -> None:
        """Put a source in, or in the place of its former documents."""
        assert documents and share > 0, (name, len(documents), share)
        self.sources[name], self.left[name] = (documents, share), []
        self.spent = dict.fromkeys(self.sources, 0.0)

    def __iter__(self) -> Iterator[Tokens]:
        while True:
            name = min(self.spent, key=self.spent.__getitem__)
            documents, share = self.sources[name]
            if not self.left[name]:
                self.left[name] = self.rng.sample(range(len(documents)), len(documents))
            document = documents[self.left[name].pop()]
            self.spent[name] += len(document) / share
            yield document
