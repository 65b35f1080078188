"""Stream: batches of a source that is tokenised as it is read, for text too large to be tokenised beforehand.

The source is read in parts of so many tokens. Each part is packed, shuffled and dealt out by a Loader of its own, so
memory holds two parts: the one in use, and the next, which a thread reads meanwhile. Rows that do not fill a step are
handed to the next part; only an epoch's last step is filled up.

The state is where the current part starts in the source, what it was handed, and its Loader's state. Resuming reads
past the rows before it without tokenising them. Every rank tokenises everything, so that all agree on the order; with
many ranks, write shards.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Final, NamedTuple

from gemwright.data.batch import Batch
from gemwright.data.loader import Batching, Loader, TooSmall
from gemwright.data.prepare import encoded
from gemwright.data.rows import Document, Format, detect, read
from gemwright.data.sources import Source
from gemwright.data.store import in_memory
from gemwright.tokenizer import Tokenizer

PART_TOKENS: Final = 2**21
"""Seconds to tokenise, which the end of a run may wait for; and the reach of the shuffling."""


class _Part(NamedTuple):
    documents: list[Document]
    rows: int
    """Of the source, that it was read from."""
    last: bool
    """Of the epoch."""


class Stream:
    """Batches as a Loader gives them; iterates, and resumes, in the same way. How many there are is not known.

    Raises:
        ValueError: as `rows.read` and `rows.encode` do, when the row is reached; TooSmall for an epoch without a step.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer,
        format: Format,
        batching: Batching,
        *,
        epochs: int | None = 1,
        workers: int = 1,
        part_tokens: int = PART_TOKENS,
    ) -> None:
        self.source, self.tokenizer, self.format, self.batching = source, tokenizer, format, batching
        self.epochs, self.workers, self.part_tokens = epochs, workers, part_tokens
        self._kind = detect(source, format)
        self.rewind()

    def rewind(self) -> None:
        """Back to the first batch."""
        self._start(epoch=0, read=0, part=0, carry=[])

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        while True:
            if self._part is None:
                self._open()
            batch = next(self._loader, None) if self._loader else None
            if batch is not None:
                return batch
            self._close()

    def report(self) -> str:
        """What happened to the documents of the current part, in words."""
        return f"part {self._state['part']}: {self._loader.report() if self._loader else 'not read yet'}"

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON data; with the tokens that the current part was handed, fewer than one step's."""
        return {**self._state, "loader": None if self._loader is None else self._loader.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the state was taken. Raises ValueError as Loader does."""
        self._start(**{key: value for key, value in state.items() if key != "loader"})
        if state["loader"] is not None:
            self._open()
            if self._loader is None:
                raise ValueError("the data differs from where the state was taken: a part has no step any more")
            self._loader.load_state_dict(state["loader"])

    def _start(self, **state: Any) -> None:
        """Stand before the part that the state names; nothing is read yet."""
        self._state = state
        self._part: _Part | None = None
        self._loader: Loader | None = None
        self._dealt = state["read"] > 0  # anything in this epoch
        self._parts = _ahead(self._read(state["epoch"], state["read"]))

    def _read(self, epoch: int, skip: int) -> Iterator[_Part]:
        """Parts from row `skip` of an epoch on."""
        for _ in itertools.count() if self.epochs is None else range(epoch, self.epochs):
            part = _Part([], 0, True)
            tokens = 0
            rows = itertools.islice(read(self.source, self._kind, self.format), skip, None)
            for document in encoded(rows, self._kind, self.tokenizer, self.format, workers=self.workers):
                if tokens >= self.part_tokens:
                    yield part._replace(last=False)
                    part, tokens = _Part([], 0, True), 0
                part = part._replace(rows=part.rows + 1)
                if document is not None:
                    part.documents.append(document)
                    tokens += len(document.tokens)
            yield part
            skip = 0

    def _open(self) -> None:
        """Pack the next part together with what it is handed. StopIteration after the last epoch."""
        self._part = part = next(self._parts)
        documents = [*(Document(*document) for document in self._state["carry"]), *part.documents]
        last = part.last and not self.batching.drop_last
        batching = replace(self.batching, seed=self.batching.seed + self._state["part"], drop_last=not last)
        try:
            left_out = part.rows - len(part.documents)
            self._loader = Loader(in_memory(documents, {"left_out": left_out}), batching)
        except TooSmall:
            if part.last and not self._dealt:
                raise
            self._loader, self._rest = None, documents
        else:
            self._dealt, self._rest = True, self._loader.rest()

    def _close(self) -> None:
        """Stand before the part that follows."""
        assert self._part is not None
        state, part = self._state, self._part
        if part.last:
            self._state = {"epoch": state["epoch"] + 1, "read": 0, "part": state["part"] + 1, "carry": []}
            self._dealt = False
        else:
            carry = [[list(tokens), list(weights)] for tokens, weights in self._rest]
            read_ = state["read"] + part.rows
            self._state = {"epoch": state["epoch"], "read": read_, "part": state["part"] + 1, "carry": carry}
        self._part = self._loader = None


def _ahead(parts: Iterator[_Part]) -> Iterator[_Part]:
    """The same, each made in a thread while the one before it is in use."""
    with ThreadPoolExecutor(1, "gemwright-stream") as thread:
        future = thread.submit(next, parts, None)
        while (part := future.result()) is not None:
            future = thread.submit(next, parts, None)
            yield part
