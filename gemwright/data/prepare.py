"""A source, tokenised once: a folder of the cache, named by what it was made from, and memory-mapped from then on.

The name is a digest of the source (files by path, size and time of change; a dataset by its fingerprint), of the
tokenizer's files, of the format, and of VERSION. The order of documents is that of the rows, for any number of
processes.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Final

from tqdm import tqdm

from gemwright.data.rows import Document, Format, Kind, detect, encode, read
from gemwright.data.sources import Row, Source
from gemwright.data.store import Documents, open_shards, tokenizer_digest, write_shards
from gemwright.tokenizer import Tokenizer

VERSION: Final = 1
"""Of the shards' layout and of the rules for tokens and weights."""
_CHUNK: Final = 64


def tokenize(
    source: Source, tokenizer: Tokenizer, format: Format, *, cache: Path, workers: int = 1, progress: bool = True
) -> Documents:
    """The documents of a source, from the cache if they are there.

    Args:
        cache: folder that holds the caches of all sources.
        workers: processes that tokenise. With more than one, a script needs `if __name__ == "__main__":`.

    Several processes may call this at once, and the first to finish wins; better, one does so before the others.

    Raises:
        ValueError: bad rows (names file, row, field), or nothing in them to learn from.
        OSError: a full disk. Either way nothing is left behind.
    """
    key = {"source": source.identity(), "tokenizer": tokenizer_digest(tokenizer), "format": asdict(format)}
    digest = hashlib.sha256(json.dumps({"version": VERSION, **key}, sort_keys=True).encode()).hexdigest()
    target = cache / f"tokens-{digest[:20]}"
    if not target.is_dir():
        kind = detect(source, format)
        left_out = 0

        def documents() -> Iterator[Document]:
            nonlocal left_out
            rows = encoded(read(source, kind, format), kind, tokenizer, format, workers=workers)
            bar = tqdm(
                rows, total=source.total(), desc="tokenising", unit=" rows", unit_scale=True, delay=1,
                disable=None if progress else True, file=sys.stderr, leave=False,  # None: no bar where nobody watches
            )  # fmt: skip
            for document in bar:
                if document is None:
                    left_out += 1
                else:
                    yield document

        write_shards(target, documents(), tokenizer, count=lambda: {"left_out": left_out})
    return open_shards(target, tokenizer)


def encoded(
    rows: Iterator[Row], kind: Kind, tokenizer: Tokenizer, format: Format, *, workers: int = 1
) -> Iterator[Document | None]:
    """`rows.encode` of each row, in order; a few chunks of rows a process are in memory."""
    if workers == 1:
        yield from (encode(row, kind, tokenizer, format) for row in rows)
        return
    waiting: deque[Future[list[Document | None]]] = deque()
    # spawned, not forked: a fork copies the locks of the threads that torch and CUDA run
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        while chunk := list(islice(rows, _CHUNK)):
            waiting.append(pool.submit(_encode_chunk, chunk, kind, tokenizer.folder, tokenizer.chat_template, format))
            if len(waiting) > 4 * workers:
                yield from waiting.popleft().result()
        for future in waiting:
            yield from future.result()


def _encode_chunk(
    rows: list[Row], kind: Kind, folder: Path, chat_template: str | None, format: Format
) -> list[Document | None]:
    tokenizer = _load(folder)
    tokenizer.chat_template = chat_template
    return [encode(row, kind, tokenizer, format) for row in rows]


@lru_cache(maxsize=1)
def _load(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)
