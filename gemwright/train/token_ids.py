"""Whether two models mean the same by a token id, which a distillation over the whole vocabulary hangs on.

That two vocabularies are equally wide says nothing. So texts of many kinds, and texts that tokens of the student spell,
are encoded by both; control tokens, which no text spells, are compared by name. Where some were renamed, or lie at
other ids, a map says so: the teacher then reads, and its head answers, in the student's ids.

Rows of a table past the tokenizer's tokens are padding (Gemma's 256000 tokens lie in tables of 256000 or 256128 rows):
they are cut off on the wider side.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from gemwright.tokenizer import Tokenizer
from gemwright.weights import read_json

PROBES: Final = (
    "The quick brown fox jumps over the lazy dog.", "  two spaces,\ttabs\n\n\nand lines\r\n", "1234567890 3.14159 2024",
    "def f(x: int) -> int:\n    return x**2 + 1\n", "🙂🎉 ½ ∑ €",
    "Zwölf Boxkämpfer, l'été, señor, 東京, Привет, مرحبا, हिन्दी",
    "don't WON'T I'll {\"key\": [1, 2]} <b>html</b> https://example.org/a?b=c",
)  # fmt: skip
SPELLED: Final = 256
"""Tokens of the student, evenly spaced, whose own text is encoded by both."""


@dataclass(frozen=True)
class SameIds:
    """How the teacher's ids follow from the student's."""

    width: int
    """Ids that both heads have and that count; wider tables are cut off here."""
    moved: Mapping[int, int]
    """Student's id -> teacher's, where they differ."""

    def teacher_ids(self) -> list[int]:
        """The teacher's id of each of the student's."""
        return [self.moved.get(i, i) for i in range(self.width)]


def same_ids(
    student: Tokenizer, teacher: Tokenizer, widths: tuple[int, int], renamed: Mapping[str, Any] | None = None
) -> SameIds:
    """Compare the ids of two models whose tables have `widths` rows (student, teacher).

    Raises ValueError that names the first text or token on which they differ.
    """
    width = min(widths)
    for side, tokenizer in {"student": student, "teacher": teacher}.items():
        if tokenizer.vocab_size > width:
            raise ValueError(
                f"teacher: the {side}'s tokenizer has {tokenizer.vocab_size} ids, the heads have {widths[0]} rows "
                f"(student) and {widths[1]} (teacher); allowed are heads that both hold every id"
            )
    pairs = _pairs(student, teacher, renamed or {})
    moved = {i: j for i, j in pairs.values() if i != j}
    if set(moved) != set(moved.values()):
        odd = sorted(set(moved) ^ set(moved.values()))[0]
        raise ValueError(f"token_map: id {odd} stands on one side only, allowed is a map that exchanges ids")
    for name, i in student.specials.items():
        if name not in pairs and teacher.id(name) != i:
            raise ValueError(
                f"teacher: control token {name!r} has id {i} for the student and {teacher.id(name)} for the teacher; "
                "where it was renamed, token_map says so"
            )
    spelled = [i for i in range(0, student.vocab_size, max(1, student.vocab_size // SPELLED)) if i not in moved]
    for text in (*PROBES, *(student.decode([i]) for i in spelled)):
        ours, theirs = [moved.get(i, i) for i in student.encode(text, bos=False)], teacher.encode(text, bos=False)
        if ours != theirs:
            raise ValueError(
                f"teacher: other token ids: {text[:40]!r} is {ours[:8]} for the student, {theirs[:8]} for the teacher; "
                "allowed is a teacher with the student's tokenizer"
            )
    return SameIds(width, moved)


def read_map(path: str | None) -> dict[str, Any]:
    """The map of a file, {} without one."""
    return {} if path is None else read_json(Path(path).expanduser())


def _pairs(student: Tokenizer, teacher: Tokenizer, renamed: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Ids of both sides for each token that the map names."""
    pairs = {}
    for name, value in renamed.items():
        ours = student.id(name)
        theirs = teacher.id(value) if isinstance(value, str) else value
        if ours is None:
            raise ValueError(f"token_map: {name!r} is no token of the student")
        if not isinstance(theirs, int) or isinstance(theirs, bool) or not 0 <= theirs < teacher.vocab_size:
            raise ValueError(f"token_map: {name!r} is {value!r}, allowed is a token of the teacher or its id")
        pairs[name] = ours, theirs
    return pairs
