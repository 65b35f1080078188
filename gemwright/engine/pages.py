"""Pages: the cache's memory in units that sequences share.

A page holds the keys and values of PAGE consecutive positions, in every layer of one kind. Once full it never changes,
so sequences that begin alike share it. A pool knows who holds what; it touches no tensor.

A full page is found again by its digest, a hash over its tokens and the digest of the page before it: equal digests
mean equal texts from position 0 on. It is cryptographic, so no prompt can be made that is served another one's keys.

A page is held (references > 0), or idle (nobody holds it, but the index still finds it), or blank. Idle pages count as
free: they are given away, least recently used first, when the blank ones are spent.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b
from typing import Final

PAGE: Final = 32
"""Positions a page holds."""


def digest(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Name of a full page: `parent` is the digest of the page before it, or the seed of the sequence."""
    return blake2b(parent + array("I", tokens).tobytes(), digest_size=32).digest()


class Pool:
    """The pages of one kind of layer, numbered from 0: who holds them, and which of them the index finds."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.references = [0] * total
        self._blank = list(range(total - 1, -1, -1))
        self._idle: dict[int, None] = {}  # in order of release
        self._index: dict[bytes, int] = {}
        self._digests: dict[int, bytes] = {}  # the index the other way round

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return len(self._blank) + len(self._idle)

    @property
    def used(self) -> int:
        """Pages that somebody holds."""
        return self.total - self.free

    def find(self, digest: bytes) -> int | None:
        """The page of that digest."""
        return self._index.get(digest)

    def take(self) -> int:
        """A blank page, held once; the least recently used idle page is emptied if there is no other."""
        assert self.free, f"none of {self.total} pages is free"
        if self._blank:
            page = self._blank.pop()
        else:
            page = next(iter(self._idle))
            del self._idle[page], self._index[self._digests.pop(page)]
        self.references[page] = 1
        return page

    def share(self, page: int) -> None:
        """One holder more of a page that the index finds."""
        assert page in self._digests, f"page {page} is not in the index"
        if not self.references[page]:
            del self._idle[page]
        self.references[page] += 1

    def release(self, page: int) -> None:
        """One holder less; the last one leaves the page idle if the index finds it, else blank."""
        assert self.references[page] > 0, f"page {page} has no holder"
        self.references[page] -= 1
        if not self.references[page]:
            if page in self._digests:
                self._idle[page] = None
            else:
                self._blank.append(page)

    def publish(self, page: int, digest: bytes) -> None:
        """Let the index find a full page. Where two sequences computed the same page, the first stays."""
        assert self.references[page] == 1 and page not in self._digests, (page, self.references[page])
        if self._index.setdefault(digest, page) == page:
            self._digests[page] = digest

    def forget(self) -> None:
        """Empty the index."""
        self._blank += self._idle
        self._idle.clear()
        self._index.clear()
        self._digests.clear()
