"""Scheduler: random traffic against a model of the cache's content (scheduler_desk.py), and examples made by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from scheduler_desk import Desk

from gemwright.engine.scheduler import GLOBAL, LOCAL, Plan, Scheduler


def fits(scheduler: Scheduler, tokens: int) -> bool:
    try:
        scheduler.check(tokens)
    except ValueError:
        return False
    return True


class Traffic(RuleBasedStateMachine):
    """Random arrivals, lengths, shared prefixes, drafts, cancels and changes of weights over tiny pools."""

    @initialize(
        rows=st.integers(2, 5),
        more=st.integers(1, 12),
        page=st.integers(1, 4),
        pages=st.tuples(st.sampled_from([0, *range(9, 30)]), st.sampled_from([0, *range(9, 30)])).filter(any),
        window=st.integers(1, 11),
    )
    def start(self, rows: int, more: int, page: int, pages: tuple[int, int], window: int) -> None:
        scheduler = Scheduler(
            rows=rows, budget=rows + more, page=page, global_pages=pages[0], local_pages=pages[1], window=window
        )
        self.desk = Desk(scheduler)
        self.most = max(tokens for tokens in range(60) if fits(scheduler, tokens))

    @rule(
        arrivals=st.lists(
            st.fixed_dictionaries(
                {
                    "stem": st.integers(0, 1),
                    "shared": st.sampled_from([0, 2, 5, 8, 9, 12, 20, 40]),
                    "tail": st.lists(st.integers(0, 1), max_size=4),
                    "new": st.sampled_from([0, 1, 3, 8, 12, 24]),
                    "seed": st.sampled_from([b"", b"", b"adapter"]),
                    "reuse": st.sampled_from([None, None, 0, 3]),
                    "follow": st.sampled_from([False, False, True]),
                }
            ),
            min_size=1,
            max_size=6,
        )
    )
    def add(self, arrivals: list[dict[str, Any]]) -> None:
        for a in arrivals:
            tokens = ([5 + a["stem"] + i % 3 for i in range(a["shared"])] + (a["tail"] or [1]))[: self.most]
            after = self.desk.seqs[-1] if a["follow"] and self.desk.seqs else None
            new = min(a["new"], self.most - len(tokens))
            self.desk.add(tokens, new, seed=a["seed"], reuse=a["reuse"], after=after)

    @rule(drafts=st.integers(0, 4), accept=st.integers(0, 4), times=st.integers(1, 5))
    def step(self, drafts: int, accept: int, times: int) -> None:
        for _ in range(times):
            self.desk.step(drafts, accept)
            self.desk.check_pools()

    @precondition(lambda self: self.desk.seqs)
    @rule(which=st.integers(0, 50))
    def cancel(self, which: int) -> None:
        seq = self.desk.seqs[-1 - which % len(self.desk.seqs)]
        self.desk.scheduler.cancel(seq)
        assert seq.state == "done" and not seq.tables

    @rule()
    def forget(self) -> None:
        self.desk.version += 1
        self.desk.scheduler.forget()

    @invariant()
    def bookkeeping(self) -> None:
        if hasattr(self, "desk"):
            self.desk.check_pools()
            self.desk.check_index()

    def teardown(self) -> None:
        if hasattr(self, "desk"):
            self.desk.run(drafts=2, accept=1)
            assert all(seq.state == "done" for seq in self.desk.seqs)


def test_random_traffic() -> None:
    config = settings(
        max_examples=100, stateful_step_count=15, deadline=None, derandomize=True, report_multiple_bugs=False
    )
    run_state_machine_as_test(Traffic, settings=config)


@pytest.mark.slow
def test_much_random_traffic() -> None:
    config = settings(max_examples=1500, stateful_step_count=30, deadline=None)
    run_state_machine_as_test(Traffic, settings=config)


def desk(
    *, rows: int = 4, budget: int = 16, page: int = 4, pages: int = 40, local: int = 0, window: int | None = None
) -> Desk:
    sizes = dict(global_pages=pages, local_pages=local)
    return Desk(Scheduler(rows=rows, budget=budget, page=page, window=window, **sizes))


def until(desk: Desk, happened: Callable[[], bool], drafts: int = 0) -> None:
    for _ in range(99):
        if happened():
            return
        desk.step(drafts)
    raise AssertionError("it does not happen")


def counts(plan: Plan) -> dict[str, int]:
    return {work.seq.id: work.count for work in plan.work}


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    arrivals=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 30), st.integers(1, 12)), min_size=1, max_size=12),
    more=st.integers(1, 10),
    drafts=st.integers(0, 3),
)
def test_first_token_after_arrival(arrivals: list[tuple[int, int, int]], more: int, drafts: int) -> None:
    """With rows and pages for all: ceil(W / P) steps from arrival, W its prompt and the unread ones before it."""
    rows = len(arrivals)
    d = desk(rows=rows, budget=rows + more, pages=1000)
    share = -(-(more + 1) // 2) if drafts else more + 1
    due = []
    for i, (pause, prompt, new) in enumerate(arrivals):
        for _ in range(pause):
            d.step(drafts, i)
        seq = d.add([i] * prompt, new, reuse=0)
        unread = [s.remaining for s in d.seqs if (s.state != "done" and s.remaining > 1) or s is seq]
        due.append((seq, d.steps + -(-sum(unread) // share)))
        assert d.scheduler.waiting
    while d.scheduler.waiting or d.scheduler.running:
        d.step(drafts, d.steps)
        assert all(len(seq.tokens) > seq.prompt for seq, step in due if d.steps >= step)


@pytest.mark.parametrize(("drafts", "steps"), [(0, 5), (9, 7)])  # ceil(21 / 5), ceil(21 / 3)
def test_the_bound_is_met_under_full_load(drafts: int, steps: int) -> None:
    """Three sequences decode and a prompt of 21 finds what they leave: all but 3 of the budget, or half of that."""
    d = desk(rows=4, budget=8, pages=200)
    for i in range(3):
        d.add([i], 90)
    d.step()
    seq = d.add([7] * 21, 1)
    start = d.steps
    until(d, lambda: seq.state == "done", drafts)
    assert d.steps - start == steps


def test_order_within_the_budget() -> None:
    """Decoding sequences, then their drafts from half of what is left, then prompts; nobody passes the queue's head."""
    d = desk(rows=4, budget=10)
    d.add([1], 30)
    d.add([2], 30)
    assert counts(d.step()) == {"0": 1, "1": 1}
    assert counts(d.step(drafts=6)) == {"0": 7, "1": 3}
    d.add([3] * 11, 5)
    d.add([4], 5)
    assert counts(d.step(drafts=6)) == {"0": 5, "1": 1, "2": 4}
    assert counts(d.step()) == {"0": 1, "1": 1, "2": 7, "3": 1}
    assert counts(d.step(drafts=1)) == {"0": 2, "1": 2, "2": 2, "3": 2}


def test_drafts_stop_at_the_limit_and_at_the_last_free_page() -> None:
    d = desk(page=4, pages=3)
    d.add([1, 2, 3], 6)
    assert counts(d.step()) == {"0": 3}
    assert counts(d.step(drafts=9)) == {"0": 5}  # the fifth draft could not be followed by a token
    d = desk(page=4, pages=4)
    d.add([1, 2, 3], 6)
    d.add([1, 2, 3], 6)
    d.step()
    assert counts(d.step(drafts=9)) == {"0": 5, "1": 5}


def test_a_hit_past_the_window_needs_only_the_local_pages_inside_it() -> None:
    """40 positions are computed with a window of 8, so most local pages are free, and some of them are used again."""
    d = desk(budget=16, page=4, pages=40, local=12, window=8)
    text = list(range(10, 50))
    first = d.add(text, 1)
    d.run()
    local = d.scheduler.pools[LOCAL]

    def found() -> list[int]:
        return [i for i, name in enumerate(first.digests) if local.find(name) is not None]

    assert found() == list(range(10))
    d.add([9] * 24, 0)
    d.run()
    assert found() == [4, 5, 6, 7, 8, 9]  # two pages were blank, four are emptied, longest out of the window first
    second = d.add([*text[:32], 1, 2], 2)
    d.step()
    assert second.cached == 32
    assert second.tables[LOCAL].first == 6 and len(second.tables[GLOBAL].pages) == 9
    d.run()
    d.add([8] * 44, 0)
    d.run()
    third = d.add([*text[:32], 1, 2], 1)
    d.step()
    assert third.cached == 0 and not set(found()) & {6, 7}
    assert d.scheduler.cached_tokens == 32


@pytest.mark.parametrize("local", [6, 30])
def test_a_long_prompt_holds_span_local_pages(local: int) -> None:
    d = desk(rows=1, budget=6, page=2, pages=40, local=local, window=5)
    assert d.scheduler.span[LOCAL] == 6  # a window of 5 and a chunk of 6 are 10 positions, on at most 6 pages
    d.scheduler.check(80)
    seq = d.add(list(range(61)), 19)
    used = []
    while seq.state != "done":
        d.step(drafts=3, accept=2)
        used.append(d.scheduler.pools[LOCAL].used)
    assert max(used) == 6
    with pytest.raises(ValueError, match=r"a sequence of 61 tokens needs 6 local pages .* the cache has 5"):
        desk(rows=1, budget=6, page=2, local=5, window=5).scheduler.check(61)


def test_found_pages_pay_for_a_long_continuation() -> None:
    """The pool holds exactly one long sequence: pages of the window that are found again must not count twice."""
    d = desk(rows=1, budget=3, page=2, pages=20, local=4, window=4)
    text = list(range(12))
    d.add(text, 1)
    d.run()
    seq = d.add([*text, *range(20, 30)], 1)
    d.step()
    assert (seq.cached, seq.computed, d.scheduler.pools[LOCAL].used) == (12, 15, 4)
    d.run()
    assert d.add([*text, *range(20, 30), 1], 1) is d.scheduler.waiting[0]
    d.run()
    assert d.seqs[-1].cached == 22


def test_found_pages_that_others_hold_do_not_pay() -> None:
    """The second prompt leaves pages behind that the first sequence still reads: it has reserved its own."""
    d = desk(rows=2, budget=4, page=2, local=20, window=8)
    text = list(range(12))
    d.add(text, 20)
    until(d, lambda: d.seqs[0].computed >= 12)
    seq = d.add([*text, *range(20, 40)], 1)
    d.step()
    assert seq.cached == 12 and d.scheduler.span[LOCAL] == 6
    d.run()


def test_admission_leaves_a_page_for_each_running_sequence() -> None:
    for pages, state in ((7, "waiting"), (8, "running")):
        d = desk(page=2, pages=pages)
        d.add([1] * 4, 2)
        d.add([2] * 2, 2)
        d.step()
        assert d.seqs[1].state == "running"
        seq = d.add([3], 2)  # five pages are taken by then, it needs one, and two are to be left
        d.step()
        assert seq.state == state


def test_the_youngest_is_preempted_and_comes_back_first() -> None:
    d = desk(rows=3, budget=16, page=2, pages=9)
    a, b, c, e = (d.add([i] * 4, new) for i, new in enumerate((5, 5, 5, 1)))
    d.step()
    assert [seq.state for seq in (a, b, c, e)] == ["running"] * 3 + ["waiting"]
    d.step()
    d.step()
    tokens = list(c.tokens)
    plan = d.step()
    assert plan.preempted == [c] and d.scheduler.waiting == [c, e] and counts(plan) == {"0": 1, "1": 1}
    assert (c.tokens, c.computed, c.tables, d.scheduler.preemptions) == (tokens, 0, {}, 1)
    until(d, lambda: c.state == "running" or e.state == "running")
    assert c.state == "running"
    assert c.cached == 2  # of its three full pages the last two were needed elsewhere
    d.run()
    assert [len(seq.tokens) for seq in (a, b, c, e)] == [9, 9, 9, 5]
    assert d.scheduler.stats() == dict(
        waiting=0, running=0, pages_used=0, pages_total=9, cached_tokens=0, preemptions=1
    )


@pytest.mark.parametrize("forget", [False, True])
def test_a_preempted_sequence_starts_afresh(forget: bool) -> None:
    """It may find what it computed before, even if its prompt had to be read; unless the weights have changed."""
    d = desk(rows=2, page=2, pages=7)
    d.add([1] * 4, 7)
    seq = d.add([2] * 4, 5, reuse=0)
    d.step()
    if forget:
        d.version += 1
        d.scheduler.forget()
    until(d, lambda: d.scheduler.preemptions == 1)
    until(d, lambda: seq.state == "running")
    assert seq.cached == (0 if forget else 4)
    assert d.scheduler.pools[GLOBAL].find(seq.digests[1]) == seq.tables[GLOBAL].pages[1]


def test_an_older_sequence_waits_for_a_prompt_to_be_read() -> None:
    """The only younger sequence has no token yet: it is not preempted before it has one."""
    d = desk(rows=2, budget=3, page=2, pages=8)
    a, b = d.add([1, 2], 10), d.add([3] * 12, 2)
    plans = [d.step() for _ in range(7)]
    assert [counts(plan) for plan in plans] == [
        {"0": 2, "1": 1},
        {"0": 1, "1": 2},
        {"0": 1, "1": 2},
        {"1": 3},
        {"1": 3},
        {"1": 1},
        {"0": 1},
    ]
    assert plans[-1].preempted == [b] and (len(a.tokens), len(b.tokens)) == (6, 13)
    d.run()
    assert (len(a.tokens), len(b.tokens)) == (12, 14)


def test_found_pages_that_were_free_count_as_taken() -> None:
    d = desk(page=2, pages=8)
    d.add([1] * 7, 0)
    d.run()
    d.add([2] * 8, 6)
    d.step()
    assert d.scheduler.pools[GLOBAL].free == 4
    seq = d.add([1] * 9, 0)  # three found pages and two new ones
    d.step()
    assert d.scheduler.waiting == [seq]
    d.run()
    assert seq.state == "done"


def test_samples_of_one_prompt_read_it_once() -> None:
    d = desk(budget=6)
    leader = d.add(range(10), 3)
    followers = [d.add(range(10), 3, after=leader) for _ in range(2)]
    d.add([50] * 5, 1)
    assert counts(d.step()) == {"0": 6}
    assert counts(d.step()) == {"0": 4, "3": 2}  # who waits for another lets the next one pass
    assert counts(d.step()) == {"0": 1, "3": 3, "1": 2}
    assert [seq.cached for seq in followers] == [8, 0]
    assert counts(d.step()) == {"0": 1, "1": 1, "2": 2}
    assert [seq.cached for seq in followers] == [8, 8]
    d.run()
    leader = d.add([9] * 10, 3)
    follower = d.add([9] * 10, 3, after=leader)
    d.scheduler.cancel(leader)
    assert counts(d.step()) == {follower.id: 6}


def test_cancel_frees_at_once_in_any_state() -> None:
    d = desk(rows=2, budget=6, pages=8, local=8, window=3)
    reading, waiting = d.add([1] * 20, 1), d.add([2] * 20, 1)
    d.step()
    assert (d.scheduler.running, d.scheduler.waiting) == ([reading], [waiting])
    d.scheduler.cancel(waiting)
    d.scheduler.cancel(reading)
    d.scheduler.cancel(reading)
    assert [pool.free for pool in d.scheduler.pools.values()] == [8, 8]
    assert d.scheduler.step() == Plan()
    again = d.add([1] * 20, 1)
    d.step()
    assert again.cached == 4  # what the cancelled one had computed is found


def test_of_two_that_compute_one_page_the_first_is_kept() -> None:
    d = desk(budget=32)
    a, b = d.add([1] * 8, 2), d.add([1] * 8, 2)
    d.step()
    pool = d.scheduler.pools[GLOBAL]
    assert [pool.find(name) for name in a.digests] == a.tables[GLOBAL].pages[:2]
    assert not set(a.tables[GLOBAL].pages) & set(b.tables[GLOBAL].pages)
    d.run()
    assert len(pool._idle) == 2


def test_reuse_and_seed_bound_what_is_found() -> None:
    d = desk()
    d.add([1] * 13, 4)
    d.run()
    for want, fields in ((12, {}), (0, {"reuse": 0}), (4, {"reuse": 7}), (0, {"seed": b"adapter"})):
        seq = d.add([1] * 13, 2, **fields)
        d.step()
        assert seq.cached == want, fields
        d.run()
    seq = d.add([1] * 12, 1)  # the last token must be computed
    d.step()
    assert seq.cached == 8


def test_forget_hides_old_keys_and_those_that_build_on_them() -> None:
    d = desk()
    running = d.add([1] * 9, 20)
    d.step()
    d.version += 1
    d.scheduler.forget()
    for _ in range(8):
        d.step()
    seq = d.add([1] * 9, 1)
    d.step()
    assert running.computed > 16 and seq.cached == 0
    assert d.add(running.tokens[:17], 1) and d.step() and d.seqs[-1].cached == 8  # of `seq`
    d.run()


def test_what_cannot_be_is_refused() -> None:
    d = desk(pages=5)
    d.scheduler.check(20)
    with pytest.raises(ValueError, match=r"21 tokens needs 6 global pages of 4 positions, the cache has 5"):
        d.add([1] * 20, 1)
    assert not d.scheduler.waiting
    with pytest.raises(ValueError, match=r"budget: 4, must be more than rows \(4\)"):
        desk(rows=4, budget=4)
    with pytest.raises(ValueError, match=r"rows: 0"):
        desk(rows=0)
