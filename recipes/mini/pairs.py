"""Documents as student and teacher read them, packed into rows of a fixed length.

On prose both read the same tokens after <bos>. On chats the student reads Gemma's turns and the teacher its own ChatML
with its default system text. The control tokens are the same ids, so a chat is stored once, as the student reads it:

    student   0            1 user \\n QUESTION 2 \\n  1 model \\n ANSWER 2 \\n
    teacher   1 SYSTEM 2 \\n 1 user \\n QUESTION 2 \\n  1 assistant \\n ANSWER 2 \\n

and losses are taken where both predict the same next token: inside questions and answers, and at their ends.

Legend: T tokens of the student's row, U tokens of the teacher's.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from data import read_tokens
from tokenizers import Tokenizer
from torch import Tensor

from gemwright.ops.attention import PADDING

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"  # the source's own default
LENGTHS = ((1024, 0.90), (2048, 0.07), (8192, 0.03))
"""Lengths of the pieces that prose is cut into, and how often each comes."""
ROOM = 1.125
"""The teacher's row is so much longer: its system text stands in front of every chat."""


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

    def teacher(self, document: Sequence[int]) -> tuple[list[int], list[int]]:
        """The teacher's reading of a student's document, and for each student token its partner's index, or -1."""
        if len(document) < 2 or document[1] != 1:
            return list(document), [*range(len(document) - 1), -1]
        theirs, partner = list(self.system), [-1]
        at = 1
        while at < len(document):
            end = next((i for i in range(at, len(document)) if document[i] == 2), len(document))
            answer = list(document[at + 1 : at + 1 + len(self.model)]) == self.model
            head = 1 + len(self.model if answer else self.user)
            theirs += [1, *(self.assistant if answer else self.user)]
            partner += [-1] * (head - 1) + [len(theirs) - 1]
            body = document[at + head : end]
            partner += range(len(theirs), len(theirs) + len(body))
            tail = document[end : end + 1 + len(self.newline)]
            theirs += [*body, *tail]
            partner += [-1] * len(tail)
            at = end + 1 + len(self.newline)
        return theirs, partner


@dataclass
class Row:
    """Packed documents: tokens, positions (-1 padding) and document numbers of both sides, [1, T] and [1, U]."""

    student: tuple[Tensor, Tensor, Tensor]
    teacher: tuple[Tensor, Tensor, Tensor]
    partner_T: Tensor
    """Index in the teacher's row of the token that predicts the same; 0 where the weight is 0."""
    weight_T: Tensor
    """1 where a loss is taken."""
    answer_T: Tensor
    """1 where it lies in an answer, or in prose."""
    target_T: Tensor
    """The next token of the same document, or -1."""

    def to(self, device: torch.device) -> Row:
        """The row on a device, without waiting for it."""

        def move(x: Tensor) -> Tensor:
            return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)

        sides = (tuple(move(x) for x in side) for side in (self.student, self.teacher))
        flat = (move(x) for x in (self.partner_T, self.weight_T, self.answer_T, self.target_T))
        return Row(*sides, *flat)  # type: ignore[arg-type]


def rows(documents: Iterator[Sequence[int]], turns: Turns, length: int) -> Iterator[Row]:
    """Rows of `length` student tokens, filled in order of arrival; what is left at the end makes a last row."""
    held: list[tuple[Sequence[int], list[int], list[int]]] = []
    sizes = [0, 0]
    for document in documents:
        document = document[:length]
        theirs, partner = turns.teacher(document)
        if sizes[0] + len(document) > length or sizes[1] + len(theirs) > int(length * ROOM):
            yield _pack(held, turns, length)
            held, sizes = [], [0, 0]
        held.append((document, theirs, partner))
        sizes = [sizes[0] + len(document), sizes[1] + len(theirs)]
    if held:
        yield _pack(held, turns, length)


def _pack(held: list[tuple[Sequence[int], list[int], list[int]]], turns: Turns, length: int) -> Row:
    sides = []
    for documents, width in (([h[0] for h in held], length), ([h[1] for h in held], int(length * ROOM))):
        side = np.zeros((3, width), dtype=np.int64)
        side[1], side[2] = PADDING, len(held)
        start = 0
        for number, document in enumerate(documents):
            part = slice(start, start + len(document))
            side[:, part] = document, np.arange(len(document)), np.full(len(document), number)
            start += len(document)
        sides.append(side)
    flat = np.zeros((4, length), dtype=np.int64)
    flat[3] = -1
    start, their_start = 0, 0
    for document, theirs, partner in held:
        part = slice(start, start + len(document))
        partners = np.array(partner)
        flat[0, part] = np.where(partners < 0, 0, partners + their_start)
        flat[1, part] = partners >= 0
        flat[2, part] = _answers(document, turns) * (partners >= 0)
        flat[3, part][:-1] = document[1:]
        start, their_start = start + len(document), their_start + len(theirs)
    student, teacher = (tuple(torch.from_numpy(x)[None] for x in side) for side in sides)
    partner_T, weight_T, answer_T, target_T = torch.from_numpy(flat)
    return Row(student, teacher, partner_T, weight_T.float(), answer_T.float(), target_T)  # type: ignore[arg-type]


def _answers(document: Sequence[int], turns: Turns) -> np.ndarray:
    """1 on the tokens of answers, and on all of a document that is no chat."""
    if len(document) < 2 or document[1] != 1:
        return np.ones(len(document), dtype=np.int64)
    out, answer = np.zeros(len(document), dtype=np.int64), False
    for i, token in enumerate(document):
        if token == 1:
            answer = list(document[i + 1 : i + 1 + len(turns.model)]) == turns.model
        out[i] = answer
    return out


def pieces(folder: Path, split: str, turns: Turns, lengths: Sequence[tuple[int, float]], seed: int) -> list[list[int]]:
    """Prose: each source's documents, joined by empty lines and cut into pieces, shuffled over the sources."""
    rng = random.Random(seed)
    found = []
    for file in sorted((folder / "tokens").glob(f"{split}-*.bin")):
        if "-chats" in file.name:
            continue
        stream = [token for document in read_tokens([file]) for token in (*document[1:], *turns.paragraph)]
        at = 0
        while at < len(stream) - 64:
            length = rng.choices([n for n, _ in lengths], [share for _, share in lengths])[0]
            found.append([0, *stream[at : at + length - 1]])
            at += length - 1
    rng.shuffle(found)
    return found


def chats(folder: Path, split: str) -> list[list[int]]:
    """Conversations that the teacher answered."""
    return read_tokens(sorted((folder / "tokens").glob(f"{split}-chats*.bin")))


class Mixture:
    """Documents of several sources without end, each source's tokens in proportion to its share."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.sources: dict[str, tuple[list[list[int]], float]] = {}
        self.left: dict[str, list[int]] = {}
        self.spent: dict[str, float] = {}

    def set(self, name: str, documents: list[list[int]], share: float) -> None:
        """Put a source in, or in the place of its former documents."""
        assert documents and share > 0, (name, len(documents), share)
        self.sources[name], self.left[name] = (documents, share), []
        self.spent = dict.fromkeys(self.sources, 0.0)

    def __iter__(self) -> Iterator[list[int]]:
        while True:
            name = min(self.spent, key=self.spent.__getitem__)
            documents, share = self.sources[name]
            if not self.left[name]:
                self.left[name] = self.rng.sample(range(len(documents)), len(documents))
            document = documents[self.left[name].pop()]
            self.spent[name] += len(document) / share
            yield document
