"""The scheduler: which tokens of which sequences go through the model next, and on which pages their keys lie.

Plain Python over page numbers and counts; tensors, sampling and text are the engine's. A round is
`plan = scheduler.step()`, the model over `plan.work`, then `scheduler.commit(work, accepted)` for each.

A sequence has a table of pages per kind of layer: position p lies at offset p % page of page
`pages[p // page - first]`. Global layers keep every page from position 0. A local layer's query at position q sees keys
from q - window + 1 on, so pages wholly before that are released as the sequence advances (the prefix index still finds
them until their memory is needed).

Prefix reuse at n positions, a multiple of the page, needs the global pages of [0, n), but only those local pages that
the query at n or a later one still sees. Only full, computed pages are shared, so nobody writes to a shared one.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from gemwright.engine.pages import PAGE, Pool, digest

Kind = Literal["global", "local"]
GLOBAL: Final = "global"
LOCAL: Final = "local"


@dataclass(eq=False, slots=True)
class Table:
    """Where a sequence's positions lie in the layers of one kind."""

    first: int
    """Which page of the sequence pages[0] is."""
    pages: list[int]
    published: int
    """The sequence's pages before this one are in the index, or were offered to it."""

    @property
    def end(self) -> int:
        """One past the sequence's last page here."""
        return self.first + len(self.pages)


@dataclass(eq=False)
class Seq:
    """A sequence on its way through the engine."""

    id: str
    tokens: list[int]
    """Prompt and accepted output; the engine appends."""
    prompt: int
    """Length of the prompt."""
    limit: int
    """Most tokens it will ever have."""
    seed: bytes = b""
    """Sequences share pages only with those of the same seed (adapter, version of the weights)."""
    reuse: int | None = None
    """Most positions that prefix reuse may cover before the first new token; None: all but the prompt's last."""
    after: Seq | None = None
    """Not admitted before this one has its prompt computed or is done: n samples of one prompt read it once."""
    drafts: list[int] = field(default_factory=list)
    """Proposed tokens to follow the last one. The engine sets them before a step, the step may shorten them."""
    computed: int = 0
    """Positions whose keys are in the cache."""
    cached: int = 0
    """Of these, found by prefix reuse at admission."""
    tables: dict[Kind, Table] = field(default_factory=dict)
    """Empty unless running; made anew by each admission."""
    state: Literal["waiting", "running", "done"] = "waiting"

    arrival: int = field(default=-1, repr=False)
    """Place in the order of `add`; this and what follows is the scheduler's."""
    room: int = field(default=0, repr=False)
    """Positions before this one have a page in every kind of layer, or had one."""
    digests: list[bytes] = field(default_factory=list, repr=False)
    stale: bool = field(default=False, repr=False)
    """Some of its keys are older than the last `forget`, so its pages are not offered to the index."""

    @property
    def remaining(self) -> int:
        """Tokens that have not gone through the model: 1 while it decodes, more for a prompt or a recomputation."""
        return len(self.tokens) - self.computed


@dataclass(slots=True)
class Work:
    """Tokens [start, start + count) of seq.tokens + seq.drafts go through the model; start is seq.computed."""

    seq: Seq
    start: int
    count: int


@dataclass(slots=True)
class Plan:
    """A step: first the sequences that decode, in order of arrival, then prompts, in order of admission."""

    work: list[Work] = field(default_factory=list)
    preempted: list[Seq] = field(default_factory=list)


class Scheduler:
    """Continuous batching under a budget of tokens a step, with chunked prompts, prefix reuse and preemption.

    A step gives, in this order: one token to each sequence that decodes; their drafts, oldest sequence first, from at
    most half of what is left while prompts want the rest; the prompt that is partly read; new sequences. Nobody is let
    in before that prompt is through, so there is never more than one.

    Admission is first come, first served: nobody passes the head of the queue, except while the head waits for its
    `after`. It takes a free row, and reserves the pages of the whole prompt, leaving one free page for each running
    sequence. Where the pages run out later, the youngest sequence that is younger than the one in need and has its
    first token is preempted: it loses its pages, waits again at its place in the order of arrival, and has all its
    tokens recomputed. If there is no such sequence, the one in need keeps its pages and sits the step out.

    So a sequence is never preempted between admission and its first token, and has it after at most

        ceil(W / P) steps,  P = ceil((budget - rows + 1) / 2)  (budget - rows + 1 where nobody drafts)

    counting the step that admits it, where W is the number of uncomputed tokens, its own and those of prompts admitted
    before it: at least P tokens of each step go to them. Where rows and pages suffice and no `after` is waited for, the
    same holds from its arrival, with the prompts that wait before it in W. The oldest sequence is never preempted, and
    waits for a page at most until those admitted after it have their first token; nobody is admitted meanwhile. Hence
    every sequence ends.

    A long prompt reserves no more than `span` local pages, which cover its window and the largest chunk: budget +
    window - 1 positions. Each of them that leaves the window pays for the next one. They do come back: sharing begins
    at admission, and nobody is admitted while the prompt is partly read.

    rows: most sequences that run at once. budget: most tokens a step, more than rows. page: positions a page holds.
    global_pages, local_pages: size of the pools; 0 where the model has no such layers. window: positions that a local
    query sees, itself among them. ValueError names the field that cannot be.
    """

    def __init__(
        self,
        *,
        rows: int,
        budget: int,
        page: int = PAGE,
        global_pages: int,
        local_pages: int,
        window: int | None,
    ) -> None:
        if rows < 1:
            raise ValueError(f"rows: {rows}, must be at least 1")
        if budget <= rows:
            raise ValueError(f"budget: {budget}, must be more than rows ({rows}): each running sequence gets a token")
        assert page > 0 and global_pages >= 0 and local_pages >= 0 and global_pages + local_pages > 0
        assert (window is not None and window > 0) or not local_pages, (window, local_pages)
        self.rows, self.budget, self.page = rows, budget, page
        self.window = window or 0
        sizes: dict[Kind, int] = {GLOBAL: global_pages, LOCAL: local_pages}
        self.pools = {kind: Pool(size) for kind, size in sizes.items() if size}
        # m positions touch at most (m - 2) // page + 2 pages
        self.span: dict[Kind, int] = {GLOBAL: global_pages, LOCAL: (budget + self.window - 3) // page + 2}
        self.waiting: list[Seq] = []  # in order of arrival, as is running
        self.running: list[Seq] = []
        self.cached_tokens = self.preemptions = 0
        self._arrivals = 0

    def stats(self) -> dict[str, int]:
        """Gauges, pages of both kinds together, and counters: prompt tokens found by prefix reuse, preemptions."""
        return {
            "waiting": len(self.waiting),
            "running": len(self.running),
            "pages_used": sum(pool.used for pool in self.pools.values()),
            "pages_total": sum(pool.total for pool in self.pools.values()),
            "cached_tokens": self.cached_tokens,
            "preemptions": self.preemptions,
        }

    def check(self, tokens: int) -> None:
        """ValueError when a sequence of that many tokens does not fit even alone."""
        need: dict[Kind, int] = {GLOBAL: self._pages(tokens), LOCAL: min(self._pages(tokens), self.span[LOCAL])}
        for kind, pool in self.pools.items():
            if need[kind] > pool.total:
                raise ValueError(
                    f"a sequence of {tokens} tokens needs {need[kind]} {kind} pages of {self.page} positions, "
                    f"the cache has {pool.total}: ask for fewer tokens or make the cache larger"
                )

    def add(self, seq: Seq) -> None:
        """Queue a new sequence. ValueError as `check` for its limit."""
        self.check(seq.limit)
        assert seq.arrival < 0 and 0 < seq.prompt == len(seq.tokens) <= seq.limit, (seq.id, seq.prompt, seq.limit)
        assert seq.after is None or seq.after.arrival >= 0, f"{seq.id} waits for {seq.after}, which was never added"
        seq.arrival, self._arrivals = self._arrivals, self._arrivals + 1
        self.waiting.append(seq)

    def cancel(self, seq: Seq) -> None:
        """End a sequence in any state; its pages are free when this returns. Work planned for it is not committed."""
        if seq.state == "running":
            self.finish(seq)
        elif seq.state == "waiting":
            _remove(self.waiting, seq)
            seq.state = "done"

    def finish(self, seq: Seq) -> None:
        """End a running sequence, after its last commit. The index finds its full pages until they are needed."""
        self._vacate(seq)
        seq.state = "done"

    def forget(self) -> None:
        """Empty the prefix index, because the weights changed. Sequences that run keep their keys to themselves."""
        for pool in self.pools.values():
            pool.forget()
        for seq in self.running:
            seq.stale = True

    def step(self) -> Plan:
        """What goes through the model next, with pages for all of it; there is work while there are sequences."""
        plan = Plan()
        for seq in [seq for seq in self.running if seq.computed == len(seq.tokens) - 1]:
            if seq.state == "waiting":
                continue  # an older one has preempted it
            if seq.computed < seq.room or self._secure(seq, plan):
                plan.work.append(self._work(seq, 1))
        prompts = [seq for seq in self.running if seq.computed < len(seq.tokens) - 1]
        contested = bool(prompts) or (bool(self.waiting) and len(self.running) < self.rows)
        left = self.budget - len(plan.work)
        left -= self._draft(plan.work, left // 2 if contested else left)
        for seq in prompts:
            if left:
                plan.work.append(self._work(seq, min(left, seq.remaining)))
                left -= plan.work[-1].count
        if not plan.preempted:
            self._admit(plan, left)
        return plan

    def commit(self, work: Work, accepted: int) -> None:
        """Take note of a pass over `work`: its first `accepted` positions are valid, the other drafts are rejected.

        The engine appends the accepted drafts (and the new token) to seq.tokens before. Full pages enter the prefix
        index, local pages that left the window of all coming queries are released.
        """
        seq = work.seq
        assert seq.state == "running" and work.start == seq.computed, (seq.id, seq.state, work.start, seq.computed)
        seq.computed += accepted
        assert 0 < accepted <= work.count and seq.computed <= len(seq.tokens), (seq.id, accepted, work, len(seq.tokens))
        full = seq.computed // self.page
        for kind, table in seq.tables.items():
            if table.published < full:
                self._publish(seq, kind)
            if table.first < self._first(kind, seq.computed):
                self._trim(seq, kind)

    def _pages(self, positions: int) -> int:
        """Pages that the first `positions` positions lie on."""
        return -(-positions // self.page)

    def _first(self, kind: Kind, position: int) -> int:
        """The first page that a query at `position` sees."""
        return 0 if kind == GLOBAL else max(0, position - self.window + 1) // self.page

    def _secure(self, seq: Seq, plan: Plan) -> bool:
        """Get the page for a decoding sequence's token, from younger sequences if need be."""
        self._extend(seq, seq.computed + 1)
        while seq.room <= seq.computed:
            younger = (s for s in reversed(self.running) if s.arrival > seq.arrival and len(s.tokens) > s.prompt)
            victim = next(younger, None)
            if victim is None:
                return False
            self._vacate(victim)
            victim.state, victim.computed, victim.drafts = "waiting", 0, []
            insort(self.waiting, victim, key=_arrival)
            plan.preempted.append(victim)
            self.preemptions += 1
            self._extend(seq, seq.computed + 1)
        return True

    def _extend(self, seq: Seq, stop: int) -> None:
        """Make room for the positions before `stop`, as far as free pages reach."""
        for kind, table in seq.tables.items():
            pool = self.pools[kind]
            while table.end * self.page < stop and pool.free:
                table.pages.append(pool.take())
        self._measure(seq)

    def _work(self, seq: Seq, count: int) -> Work:
        """Work with room for it, on pages that nobody shares."""
        start = seq.computed
        assert start + count <= seq.room, (seq.id, start, count, seq.room)
        for table in seq.tables.values():
            assert table.published * self.page <= start, f"{seq.id} would write position {start} to a shared page"
        return Work(seq, start, count)

    def _draft(self, decodes: Sequence[Work], most: int) -> int:
        """Shorten drafts to the budget, the limit and the free pages, and add them to the work; how many there are."""
        total = 0
        for work in decodes:
            seq = work.seq
            if seq.drafts:
                count = max(0, min(len(seq.drafts), most - total, seq.limit - len(seq.tokens) - 1))
                stop = work.start + 1 + count
                if stop > seq.room:
                    self._extend(seq, stop)
                count = min(stop, seq.room) - work.start - 1
                del seq.drafts[count:]
                work.count += count
                total += count
        return total

    def _admit(self, plan: Plan, left: int) -> None:
        """Let waiting sequences in, while there are tokens, rows and pages for them."""
        at = 0
        while left and at < len(self.waiting) and len(self.running) < self.rows:
            seq = self.waiting[at]
            if seq.after is not None and seq.after.state != "done" and seq.after.computed < seq.after.prompt:
                at += 1
                continue
            if not self._place(seq):
                return
            del self.waiting[at]
            insort(self.running, seq, key=_arrival)
            plan.work.append(self._work(seq, min(left, seq.remaining)))
            left -= plan.work[-1].count

    def _match(self, seq: Seq) -> int:
        """Pages of the longest prefix whose keys are at hand. One token at least stays, to be computed."""
        most = len(seq.tokens) - 1
        if seq.reuse is not None and len(seq.tokens) == seq.prompt:
            most = min(most, seq.reuse)
        most //= self.page
        self._name(seq, most)
        globe, local = self.pools.get(GLOBAL), self.pools.get(LOCAL)
        found = run = 0
        for pages, name in enumerate(seq.digests[:most], 1):
            if globe is not None and globe.find(name) is None:
                break
            run = run + 1 if local is None or local.find(name) is not None else 0
            if local is None or run >= pages - self._first(LOCAL, pages * self.page):
                found = pages
        return found

    def _place(self, seq: Seq) -> bool:
        """Give a sequence its tables, if there are pages for all its tokens."""
        found, end = self._match(seq), self._pages(len(seq.tokens))
        grants: list[tuple[Kind, int, list[int], int]] = []
        for kind, pool in self.pools.items():
            first = self._first(kind, found * self.page)
            hits = [page for name in seq.digests[first:found] if (page := pool.find(name)) is not None]
            idle = sum(not pool.references[page] for page in hits)  # free until now, like the fresh ones
            fresh = min(end - found, self.span[kind] - idle)
            if fresh + idle + len(self.running) > pool.free:
                return False
            grants.append((kind, first, hits, fresh))
        for kind, first, hits, fresh in grants:
            pool = self.pools[kind]
            for page in hits:
                pool.share(page)
            seq.tables[kind] = Table(first, hits + [pool.take() for _ in range(fresh)], published=found)
        seq.state, seq.stale = "running", False
        seq.computed = seq.cached = found * self.page
        self._measure(seq)
        if len(seq.tokens) == seq.prompt:
            self.cached_tokens += seq.cached
        return True

    def _measure(self, seq: Seq) -> None:
        """Note how far the tables reach."""
        seq.room = self.page * min(table.end for table in seq.tables.values())

    def _trim(self, seq: Seq, kind: Kind) -> None:
        """Release the pages that left the window. Those that come free pay for pages that its tokens need next."""
        table, pool = seq.tables[kind], self.pools[kind]
        gone = self._first(kind, seq.computed) - table.first
        free = pool.free
        for page in table.pages[:gone]:
            pool.release(page)
        del table.pages[:gone]
        table.first += gone
        more = min(pool.free - free, self._pages(len(seq.tokens)) - table.end)
        table.pages += [pool.take() for _ in range(more)]
        self._measure(seq)

    def _publish(self, seq: Seq, kind: Kind) -> None:
        """Offer a sequence's full pages to the index."""
        table, pool, full = seq.tables[kind], self.pools[kind], seq.computed // self.page
        if not seq.stale:
            self._name(seq, full)
            for i in range(table.published, full):
                pool.publish(table.pages[i - table.first], seq.digests[i])
        table.published = full

    def _name(self, seq: Seq, pages: int) -> None:
        """Have the digests of a sequence's first `pages` pages."""
        while len(seq.digests) < pages:
            at = len(seq.digests) * self.page
            parent = seq.digests[-1] if seq.digests else seq.seed
            seq.digests.append(digest(parent, seq.tokens[at : at + self.page]))

    def _vacate(self, seq: Seq) -> None:
        """Take a running sequence's row and pages; its last pages are the first to be given away."""
        assert seq.state == "running", (seq.id, seq.state)
        _remove(self.running, seq)
        for kind, table in seq.tables.items():
            for page in reversed(table.pages):
                self.pools[kind].release(page)
        seq.tables = {}


def _arrival(seq: Seq) -> int:
    return seq.arrival


def _remove(queue: list[Seq], seq: Seq) -> None:
    """Remove a sequence from a list that is in order of arrival."""
    at = bisect_left(queue, seq.arrival, key=_arrival)
    assert queue[at] is seq, (seq.id, queue[at].id)
    del queue[at]
