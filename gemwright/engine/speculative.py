"""Speculation: guesses of the next tokens, which one forward pass verifies together.

The engine draws each position's token with noise keyed by (seed, position) whether or not a guess lies there, and keeps
a guess only where it equals the token drawn. So any guess is exact, in greedy decoding and in distribution, and a
proposer can only win or lose time. How many tokens are worth guessing is learned for each sequence: more after a guess
that was taken whole, fewer after one that was not, and none for a growing while after useless ones.

`PromptLookup` guesses that what followed the last few tokens earlier in the text follows again (editing, quoting,
code). `DraftModel` asks a smaller model of the same vocabulary, which draws with the same noise, so that its guesses
agree wherever the two distributions are close.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

import torch
from torch import Tensor

from gemwright.engine.paged import Chunk, PagedCache, read
from gemwright.engine.pages import PAGE
from gemwright.engine.scheduler import GLOBAL, LOCAL, Kind, Table
from gemwright.engine.track import Track
from gemwright.generate import CHUNK
from gemwright.model import Gemma2
from gemwright.sampling import Sampler

NGRAM: Final = 3
"""Tokens that must repeat before what followed them is guessed."""
PAUSE_LIMIT: Final = 64
"""Most tokens for which guessing rests after failures in a row."""


class Proposer(Protocol):
    """Sets `seq.drafts` of decoding sequences, and learns from what became of them."""

    def propose(self, tracks: Sequence[Track]) -> None: ...
    def learn(self, track: Track, drafted: int, accepted: int) -> None: ...
    def drop(self, track: Track) -> None: ...


@dataclass
class Length:
    """How many tokens to guess for one sequence: doubled by success, halved by failure, with growing pauses."""

    most: int
    tokens: int = 4
    pause: int = 0
    _next_pause: int = 1

    def allowed(self) -> int:
        """Tokens to guess now; counts a pause down."""
        if self.pause:
            self.pause -= 1
            return 0
        return self.tokens

    def learn(self, drafted: int, accepted: int) -> None:
        if accepted == drafted:
            self.tokens = min(self.most, self.tokens * 2)
        else:
            self.tokens = max(1, min(self.tokens // 2, accepted + 1))
        if accepted:
            self._next_pause = 1
        else:
            self.pause, self._next_pause = self._next_pause, min(PAUSE_LIMIT, 2 * self._next_pause)


@dataclass
class _Text:
    """Where each n-gram of a sequence ended last, indexed as far as `read`."""

    length: Length
    ends: dict[tuple[int, ...], int] = field(default_factory=dict)
    read: int = 0


class PromptLookup:
    """Guesses by repetition: the continuation of the latest earlier occurrence of the last NGRAM tokens."""

    def __init__(self, max_drafts: int = 10) -> None:
        if max_drafts < 1:
            raise ValueError(f"max_drafts: got {max_drafts}, allowed is at least 1")
        self.max_drafts = max_drafts
        self._texts: dict[str, _Text] = {}

    def propose(self, tracks: Sequence[Track]) -> None:
        for track in tracks:
            seq = track.seq
            text = self._texts.setdefault(seq.id, _Text(Length(self.max_drafts)))
            found = self._find(text, seq.tokens)
            # the last token of the limit is drawn, never guessed
            room = min(text.length.allowed() if found else 0, seq.limit - len(seq.tokens) - 1)
            seq.drafts = seq.tokens[found : found + room] if room > 0 else []

    @staticmethod
    def _find(text: _Text, tokens: list[int]) -> int:
        """Index that followed the last n-gram when it stood there before; 0 where it is new."""
        # the n-gram at the very end is looked up and not yet indexed
        for end in range(max(text.read, NGRAM), len(tokens)):
            text.ends[tuple(tokens[end - NGRAM : end])] = end
        text.read = len(tokens)
        return text.ends.get(tuple(tokens[-NGRAM:]), 0)

    def learn(self, track: Track, drafted: int, accepted: int) -> None:
        self._texts[track.seq.id].length.learn(drafted, accepted)

    def drop(self, track: Track) -> None:
        self._texts.pop(track.seq.id, None)


@dataclass
class _Row:
    """A sequence as the draft model knows it."""

    length: Length
    tables: dict[Kind, Table]
    read: int = 0
    """Positions whose keys are right: of tokens, and of guesses that were taken."""
    base: int = 0
    guesses: list[int] = field(default_factory=list)
    """The last guesses, which followed the sequence's first `base` tokens."""


class DraftModel:
    """Guesses by a smaller Gemma 2 with the target's vocabulary, over pages of its own."""

    def __init__(self, model: Gemma2, *, rows: int = 32, max_drafts: int = 6) -> None:
        """`rows`: at least those of the engine."""
        if max_drafts < 1:
            raise ValueError(f"max_drafts: got {max_drafts}, allowed is at least 1")
        self.model, self.max_drafts = model, max_drafts
        self.context = model.config.max_position_embeddings
        self.device = model.model.embed_tokens.weight.device
        pages = -(-self.context // PAGE)
        self._cache = PagedCache(model, {GLOBAL: rows * pages, LOCAL: rows * pages})
        # every row has pages for the whole context; on CPU they cost nothing before they are written
        self._free = [list(range(row * pages, (row + 1) * pages)) for row in reversed(range(rows))]
        self._rows: dict[str, _Row] = {}

    def propose(self, tracks: Sequence[Track]) -> None:
        wanted: dict[Track, int] = {}
        for track in tracks:
            seq = track.seq
            row = self._rows.get(seq.id)
            if row is None:
                pages = self._free.pop()
                table = Table(first=0, pages=pages, published=0)
                row = self._rows[seq.id] = _Row(Length(self.max_drafts), {GLOBAL: table, LOCAL: table})
            taken = 0
            for guess, token in zip(row.guesses, seq.tokens[row.base :], strict=False):
                if guess != token:
                    break
                taken += 1
            row.read = min(row.read, row.base + taken)
            row.base, row.guesses, seq.drafts = len(seq.tokens), [], []
            room = min(seq.limit, self.context) - len(seq.tokens) - 1
            # a grammar's masks belong to the target: guesses without them would rarely be taken
            if track.matcher is None and (count := min(row.length.allowed(), room)) > 0:
                wanted[track] = count
        for step in range(max(wanted.values(), default=0)):
            going = [track for track, count in wanted.items() if count > step]
            for track, token in zip(going, self._next(going), strict=True):
                track.seq.drafts.append(token)
                self._rows[track.seq.id].guesses.append(token)

    def _next(self, tracks: list[Track]) -> list[int]:
        """The draft model's token after each sequence's tokens and guesses so far."""
        rows = [self._rows[track.seq.id] for track in tracks]
        texts = [track.seq.tokens + track.seq.drafts for track in tracks]
        hidden_BD: list[Tensor] = [torch.empty(0)] * len(tracks)
        while unread := [i for i, row in enumerate(rows) if row.read < len(texts[i])]:
            chunks = [Chunk(texts[i][rows[i].read :][:CHUNK], rows[i].read, rows[i].tables) for i in unread]
            for i, chunk, hidden_TD in zip(unread, chunks, read(self.model, self._cache, chunks), strict=True):
                rows[i].read += len(chunk.tokens)
                hidden_BD[i] = hidden_TD[-1]
        logits_BV = self.model.logits(torch.stack(hidden_BD))
        sampler = Sampler([track.params for track in tracks], self.device)
        position_B = torch.tensor([len(text) for text in texts], device=self.device)
        histories = [track.past(track.seq.drafts) for track in tracks]
        return sampler(logits_BV, position_B, histories=histories).tolist()

    def learn(self, track: Track, drafted: int, accepted: int) -> None:
        self._rows[track.seq.id].length.learn(drafted, accepted)

    def drop(self, track: Track) -> None:
        if (row := self._rows.pop(track.seq.id, None)) is not None:
            self._free.append(row.tables[GLOBAL].pages)
