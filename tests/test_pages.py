"""Pool: who holds a page, which pages the index finds, and which is given away next."""

from __future__ import annotations

import pytest

from gemwright.engine.pages import Pool, digest

NAMES = [digest(b"", [i]) for i in range(4)]


def filled(total: int) -> tuple[Pool, list[int]]:
    """A pool of which every page is held and published."""
    pool = Pool(total)
    pages = [pool.take() for _ in range(total)]
    for page, name in zip(pages, NAMES, strict=False):
        pool.publish(page, name)
    return pool, pages


def test_digest_tells_texts_and_seeds_apart() -> None:
    texts = [(b"", [1, 2]), (b"", [2, 1]), (b"", [1, 258]), (b"a", [1, 2]), (digest(b"", [1, 2]), [1, 2])]
    assert len({digest(*text) for text in texts}) == len(texts)
    assert digest(b"a", [1, 2]) == digest(b"a", (1, 2))


def test_the_least_recently_used_idle_page_goes_first_and_blank_ones_before_it() -> None:
    pool, (a, b, c) = filled(3)
    for page in (b, a, c):
        pool.release(page)
    assert (pool.free, pool.used) == (3, 0)
    assert pool.find(NAMES[1]) == b
    pool.share(b)  # used again: now the most recent
    pool.release(b)
    assert [pool.take() for _ in range(3)] == [a, c, b]
    assert [pool.find(name) for name in NAMES[:3]] == [None] * 3
    pool.release(c)  # no longer in the index, so blank
    pool.publish(a, NAMES[0])
    pool.release(a)
    assert [pool.take(), pool.take()] == [c, a]
    assert pool.free == 0
    with pytest.raises(AssertionError, match="none of 3 pages is free"):
        pool.take()


def test_a_shared_page_is_free_after_its_last_holder() -> None:
    pool, (a,) = filled(1)
    pool.share(a)
    pool.release(a)
    assert (pool.used, pool.references) == (1, [1])
    pool.release(a)
    assert (pool.used, pool.references) == (0, [0])
    pool.share(a)
    assert (pool.used, pool.find(NAMES[0])) == (1, a)
    pool.release(a)
    with pytest.raises(AssertionError, match="no holder"):
        pool.release(a)


def test_of_two_pages_with_one_text_the_first_is_found() -> None:
    pool, (a, b) = Pool(2), (1, 0)
    assert {pool.take(), pool.take()} == {a, b}
    pool.publish(a, NAMES[0])
    pool.publish(b, NAMES[0])
    assert pool.find(NAMES[0]) == a
    with pytest.raises(AssertionError, match="not in the index"):
        pool.share(b)
    pool.release(a)
    pool.release(b)
    assert pool.take() == b  # blank, although a was released before it
    assert pool.find(NAMES[0]) == a


def test_forgotten_pages_are_not_found() -> None:
    pool, (a, b, c) = filled(3)
    pool.release(b)
    assert [pool.find(name) for name in NAMES[:3]] == [a, b, c]
    pool.forget()
    assert [pool.find(name) for name in NAMES[:3]] == [None] * 3
    assert (pool.free, pool.references[a], pool.references[c]) == (1, 1, 1)
    pool.release(a)
    pool.release(c)
    assert sorted(pool.take() for _ in range(3)) == sorted((a, b, c))
