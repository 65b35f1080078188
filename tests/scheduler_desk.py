"""Desk plays the engine without tensors, and checks what every plan and every table must keep.

A key is modelled by everything that a real one depends on: the key before it, the token, the version of the weights.
Keys are written where the tables say, drafts that are rejected later among them, and every query must find the keys of
its own text at every position it sees.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from gemwright.engine.pages import digest
from gemwright.engine.scheduler import LOCAL, Kind, Plan, Scheduler, Seq, Work


class Desk:
    """An engine without a model: runs plans, and checks what every plan and every table must keep."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.version = 0
        self.cache: dict[tuple[Kind, int, int], int] = {}  # (kind, page, offset) -> key
        self.keys: dict[Seq, list[int]] = {}  # of the computed positions
        self.deadline: dict[Seq, int] = {}  # the step that must compute the first token
        self.steps = 0
        self.seqs: list[Seq] = []

    def add(self, tokens: Sequence[int], new: int, **fields: object) -> Seq:
        seq = Seq(str(len(self.seqs)), list(tokens), len(tokens), len(tokens) + new, **fields)  # type: ignore[arg-type]
        self.scheduler.add(seq)
        self.seqs.append(seq)
        return seq

    def key(self, before: Sequence[int], seed: bytes, token: int) -> int:
        return hash((before[-1] if before else seed, token, self.version))

    def slot(self, seq: Seq, kind: Kind, position: int) -> tuple[Kind, int, int]:
        table, page = seq.tables[kind], self.scheduler.page
        assert position // page >= table.first, f"{seq.id} no longer holds position {position} in {kind} layers"
        return kind, table.pages[position // page - table.first], position % page

    def step(self, drafts: int = 0, accept: int = 0) -> Plan:
        """One round. Each decoding sequence proposes `drafts` tokens; of those planned about `accept` are right."""
        s = self.scheduler
        for seq in s.running:
            if seq.remaining == 1:
                seq.drafts = [3 + i % 2 for i in range(drafts)]
        before = {seq: seq.remaining for seq in s.running}
        self.steps += 1
        plan = s.step()
        self.check_plan(plan, before)
        for work in plan.work:
            self.compute(work)
        for work in plan.work:
            self.take(work, accept)
        return plan

    def compute(self, work: Work) -> None:
        """Write the keys of a piece of work, and look at what its queries see."""
        s, seq = self.scheduler, work.seq
        keys = self.keys[seq]
        assert len(keys) == work.start == seq.computed, "computed twice, or not at all"
        text = seq.tokens + seq.drafts
        for position in range(work.start, work.start + work.count):
            keys.append(self.key(keys, seq.seed, text[position]))
            for kind in s.pools:
                self.cache[self.slot(seq, kind, position)] = keys[position]
                for seen in range(max(0, position - s.window + 1) if kind == LOCAL else 0, position + 1):
                    assert self.cache[self.slot(seq, kind, seen)] == keys[seen], (seq.id, kind, position, seen)

    def take(self, work: Work, accept: int) -> None:
        seq, end = work.seq, work.start + work.count
        accepted = work.count
        if end >= len(seq.tokens):  # a token is sampled after the last one and after each accepted draft
            right = (accept + seq.arrival) % (len(seq.drafts) + 1)
            accepted -= len(seq.drafts) - right
            assert self.steps <= self.deadline[seq] or len(seq.tokens) > seq.prompt, f"{seq.id} waited too long"
            if len(seq.tokens) < seq.limit:
                seq.tokens += [*seq.drafts[:right], 3 + len(seq.tokens) % 2]
            assert len(seq.tokens) <= seq.limit, (seq.id, len(seq.tokens), seq.limit)
        self.scheduler.commit(work, accepted)
        del self.keys[seq][seq.computed :]
        if len(seq.tokens) == seq.limit and end >= seq.prompt and seq.computed >= len(seq.tokens) - 1:
            self.scheduler.finish(seq)

    def check_plan(self, plan: Plan, before: dict[Seq, int]) -> None:
        s, work = self.scheduler, {w.seq: w for w in plan.work}
        assert plan.work or not (s.waiting or s.running), "nothing moves"
        assert len(work) == len(plan.work) <= len(s.running) <= s.rows
        assert sum(w.count for w in plan.work) <= s.budget
        decodes = [w for w in plan.work if before.get(w.seq) == 1]
        prompts = plan.work[len(decodes) :]
        assert plan.work[: len(decodes)] == decodes == sorted(decodes, key=lambda w: w.seq.arrival)
        assert not any(w.seq in before for w in prompts[1:]), "two prompts are partly read"
        drafted = sum(w.count - 1 for w in decodes)
        assert all(w.count == 1 + len(w.seq.drafts) for w in decodes)
        assert drafted <= (s.budget - len(decodes)) // (2 if prompts else 1)
        cut = [w.count < w.seq.remaining for w in prompts]
        assert not any(cut[:-1]) and (not cut or not cut[-1] or sum(w.count for w in plan.work) == s.budget)
        for seq in plan.preempted:
            assert seq.state == "waiting" and not seq.tables and not seq.computed and len(seq.tokens) > seq.prompt
            self.keys.pop(seq)
        stalled = [seq for seq in s.running if seq not in work and before[seq] == 1]
        for seq in stalled:
            assert not all(pool.free for pool in s.pools.values())
            assert all(other.arrival <= seq.arrival for other in s.running if len(other.tokens) > other.prompt)
        admitted = [w.seq for w in prompts if w.seq not in before]
        assert {*before, *admitted} == {*s.running, *plan.preempted}
        assert not admitted or not (stalled or plan.preempted)
        share = -(-(s.budget - s.rows + 1) // 2)
        ahead = sum(left for left in before.values() if left > 1)
        for seq in admitted:
            self.check_admission(seq)
            ahead += seq.remaining
            self.deadline[seq] = self.steps - 1 + -(-ahead // share)

    def check_admission(self, seq: Seq) -> None:
        s = self.scheduler
        for other in s.waiting:
            if other.arrival < seq.arrival:
                assert other.after and other.after.state != "done" and other.after.computed < other.after.prompt
        most = len(seq.tokens) - 1 if seq.reuse is None or len(seq.tokens) > seq.prompt else seq.reuse
        assert seq.cached == seq.computed <= min(most, len(seq.tokens) - 1)
        keys: list[int] = []
        for token in seq.tokens[: seq.cached]:  # what the present weights make of the text
            keys.append(self.key(keys, seq.seed, token))
        self.keys[seq] = keys

    def check_pools(self) -> None:
        s = self.scheduler
        for kind, pool in s.pools.items():
            held = Counter(page for seq in s.running for page in seq.tables[kind].pages)
            assert [held[page] for page in range(pool.total)] == pool.references
            free = [*pool._blank, *pool._idle]
            assert sorted([*free, *held]) == list(range(pool.total))
            assert pool.free + pool.used == pool.total and pool.used == len(held)
            assert {page: name for name, page in pool._index.items()} == pool._digests
            young = Counter(page for seq in s.running if not seq.stale for page in seq.tables[kind].pages)
            assert all(page in pool._digests for page in [*pool._idle, *(page for page, n in young.items() if n > 1)])
        for seq in self.seqs:
            assert (seq in s.waiting, seq in s.running) == (seq.state == "waiting", seq.state == "running")
            assert seq.state == "running" or not seq.tables
        for seq in s.running:
            for kind, table in seq.tables.items():
                assert table.first == (max(0, seq.computed - s.window + 1) // s.page if kind == LOCAL else 0)
        assert [q.arrival for q in s.waiting] == sorted(q.arrival for q in s.waiting)

    def check_index(self) -> None:
        """What the index finds under the name of a text are the keys of that text."""
        s = self.scheduler
        for seq in self.seqs:
            name, keys = seq.seed, list[int]()
            for at in range(0, len(seq.tokens) - s.page + 1, s.page):
                name = digest(name, seq.tokens[at : at + s.page])
                for token in seq.tokens[at : at + s.page]:
                    keys.append(self.key(keys, seq.seed, token))
                for kind, pool in s.pools.items():
                    if (page := pool.find(name)) is not None:
                        assert [self.cache[kind, page, i] for i in range(s.page)] == keys[at:], (seq.id, kind, at)

    def run(self, drafts: int = 0, accept: int = 0) -> int:
        """Steps until nobody is left."""
        start, most = self.steps, self.steps + 50 + 10 * sum(seq.limit for seq in self.seqs)
        while self.scheduler.waiting or self.scheduler.running:
            assert self.steps < most, "somebody never ends"
            self.step(drafts, accept)
            self.check_pools()
        return self.steps - start
