"""Engine: many sequences at once over one model, tokens in and tokens out.

A step asks the scheduler what to compute, runs it in as few forward passes as its shapes allow, samples, and reports
one event a token. Rows that decode (with their drafts) make one pass, in which every token is a row of its own: they
read their pages where they lie, and nothing is padded; on CUDA it is a recorded graph. Prompt chunks of like length
share a pass.

Drafts are verified by sampling: the noise is a function of (seed, position), so the token that would have been drawn
without the draft is drawn with it, and a draft is kept as long as it equals that token. What a request yields is
therefore what the plain loop of `generate.py` yields, up to rounding (the oracle of the tests).

An exception in a pass is retried sequence by sequence; only the one that fails alone ends, with an error event.

Not thread-safe: one thread owns an engine.

Legend: B rows, T tokens of a pass, X rows of logits, D model, V vocabulary.
"""

from __future__ import annotations

import itertools
import logging
import secrets
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from gemwright.engine.captured import Passed, Steps
from gemwright.engine.native_steps import NativeSteps
from gemwright.engine.paged import Chunk, PagedCache, count_pages, read
from gemwright.engine.pages import PAGE
from gemwright.engine.request import Pooling, Request, Stats, TokenEvent
from gemwright.engine.scheduler import GLOBAL, LOCAL, Scheduler, Work
from gemwright.engine.speculative import Proposer
from gemwright.engine.structured import Grammars
from gemwright.engine.track import Drawn, Track, allowed
from gemwright.generate import budget as check_prompt
from gemwright.generate import top_logprobs
from gemwright.lora import AdapterSlots
from gemwright.model import Gemma2
from gemwright.ops import gpu
from gemwright.parallel import TensorParallel
from gemwright.sampling import Sampler

log = logging.getLogger(__name__)

PADDED: Final = 1.25
"""Prompt chunks share a pass while padding makes it at most this much larger."""


class Front(Protocol):
    """What the engine asks of an LM."""

    model: Gemma2
    stop_ids: frozenset[int]

    @property
    def grammars(self) -> Grammars: ...
    def generate(self, prompts: Any, *, engine: Engine, **options: Any) -> Any: ...


class Engine:
    """Continuous batching over a Gemma2."""

    def __init__(
        self,
        source: Gemma2 | Front,
        *,
        rows: int = 32,
        budget: int = 512,
        cache_tokens: int | None = None,
        proposer: Proposer | None = None,
        parallel: TensorParallel | None = None,
    ) -> None:
        """
        Args:
            source: an LM, or a bare model: then there are no constraints, and only a request's own stop ids.
            rows: most sequences that run at the same time.
            budget: most tokens that go through the model in a step; more than `rows`.
            cache_tokens: positions that the cache holds in all; None: rows x context, or a share of the free memory.
            proposer: makes drafts (`engine.speculative`); None: no speculation.
            parallel: the ranks that hold the model together; each makes the same calls in the same order.
        """
        if budget <= rows:
            raise ValueError(f"budget: got {budget}, allowed is more than rows ({rows})")
        self.front = None if isinstance(source, Gemma2) else source
        self.model = model = source if isinstance(source, Gemma2) else source.model
        self.stop_ids = self.front.stop_ids if self.front is not None else frozenset()
        self.config = model.config
        self.proposer, self.parallel = proposer, parallel
        self.device = model.model.embed_tokens.weight.device
        self.dtype = model.model.embed_tokens.weight.dtype
        self.slots = AdapterSlots(model)
        self.version = 0
        self.stats = Stats()
        self._cache: PagedCache | None = None
        self._steps: Steps | None = None
        self._native: NativeSteps | None = None
        least = parallel.least if parallel is not None else int
        self._pages = count_pages(model, rows, budget, cache_tokens, least)
        self.scheduler = Scheduler(
            rows=rows,
            budget=budget,
            global_pages=self._pages[GLOBAL],
            local_pages=self._pages[LOCAL],
            window=self.config.sliding_window,
        )
        self._requests: dict[str, list[Track]] = {}
        self._tracks: dict[str, Track] = {}  # by the sequence's id
        self._outbox: list[TokenEvent] = []
        self._held: dict[str, list[TokenEvent]] = {}
        self._left: list[str] | None = None
        """While a step runs: requests whose streams were closed meanwhile."""
        self._numbers = itertools.count()
        self._sampler: tuple[list[Track], Sampler] | None = None

    # --- requests ----------------------------------------------------------------------------------------------------

    def check(self, request: Request) -> int:
        """How many tokens may follow; raises ValueError or ContextError, with field and reason, where it cannot run."""
        if request.id in self._requests:
            raise ValueError(f"id: got {request.id!r}, which is in flight")
        if request.adapter is not None and request.adapter not in self.slots.names:
            raise ValueError(f"adapter: got {request.adapter!r}, loaded are {', '.join(self.slots.names) or 'none'}")
        if request.score_from is not None:
            new_tokens = check_prompt(self.model, request.tokens[:-1], 0)
        else:
            wanted = 0 if request.embed is not None else request.params.max_new_tokens
            new_tokens = check_prompt(self.model, request.tokens, wanted)
        request.params.check(self.config.vocab_size)
        self.scheduler.check(len(request.tokens) + new_tokens)
        if request.constraint is not None:
            if self.front is None:
                raise ValueError("constraint: an engine over a bare model has no tokenizer to constrain; give it an LM")
            self.front.grammars.compile(request.constraint)
        return new_tokens

    def submit(self, request: Request) -> str:
        """Take a request in; its id. Raises as `check`, before anything runs."""
        new_tokens = self.check(request)
        ident = request.id if request.id is not None else f"request-{next(self._numbers)}"
        first = self._requests.get(request.after or "", [None])[0]
        after = None if first is None or first.done else first.seq
        if self.parallel is not None and request.params.seed is None:
            seed = self.parallel.broadcast(secrets.randbits(63))
            request = replace(request, params=replace(request.params, seed=seed))
        tracks = Track.make(request, ident, new_tokens, self.stop_ids, self._seed(request), after)
        if request.constraint is not None and self.front is not None:
            grammar = self.front.grammars.compile(request.constraint)
            for track in tracks:
                track.matcher = grammar.start(track.stop_ids)
        self._requests[ident] = tracks
        for track in tracks:
            self._tracks[track.seq.id] = track
            self.scheduler.add(track.seq)
        return ident

    def _seed(self, request: Request) -> bytes:
        """Keys made by other weights are other keys: what the prefix hash starts from."""
        return f"{self.version} {request.adapter or ''} {self.slots.generation(request.adapter)}".encode()

    def cancel(self, ident: str, index: int | None = None) -> None:
        """End a request, or one of its samples; its pages are free at once, the next step reports it. Unknown ids are
        those that have ended."""
        for track in list(self._requests.get(ident, ())):
            if not track.done and index in (None, track.index):
                self._end(track)
                self.scheduler.cancel(track.seq)
                self.stats.cancelled += 1
                self._outbox.append(TokenEvent(id=ident, index=track.index, finish="cancelled"))

    @property
    def busy(self) -> bool:
        """Whether a step has anything to do or to report."""
        return bool(self._tracks or self._outbox)

    # --- stepping ----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> list[TokenEvent]:
        """Compute one step; the events it made."""
        self._left = []
        try:
            if self.device.type != "cuda":
                events = self._step()
            else:
                with torch.cuda.device(self.device):  # where kernels are launched
                    events = self._step()
        finally:
            left, self._left = self._left, None
            self._leave(left)
        return [event for event in events if event.id not in left] if left else events

    def _step(self) -> list[TokenEvent]:
        events, self._outbox = self._outbox, []
        if not self._tracks:
            self._gauge()
            return events
        if self.proposer is not None:
            self.proposer.propose([track for track in self._tracks.values() if track.decoding])
        plan = self.scheduler.step()
        if plan.work:
            self._prepare()
            for works in self._passes(plan.work):
                events += self._run(works)
        self.stats.steps += 1
        self._gauge()
        return events

    def _prepare(self) -> None:
        """Have the cache, and what makes whole passes in native code or records them; collectives stay outside."""
        if self._cache is None:
            self._cache = PagedCache(self.model, self._pages)
        if self._native is None and self.device.type == "cpu" and self.parallel is None:
            self._native = NativeSteps(self.model, self._cache)
        if self._steps is None and self._cache.in_place and self.device.type == "cuda" and self.parallel is None:
            self._steps = Steps(self.model, self._cache, context=self.config.max_position_embeddings)

    def _gauge(self) -> None:
        for name, value in self.scheduler.stats().items():
            setattr(self.stats, name, value)

    def _passes(self, work: list[Work]) -> Iterator[list[Work]]:
        """Split a step's work into passes: the short rows together, prompt chunks with others of like length."""
        assert self._cache is not None
        short = [w for w in work if self._cache.short(w.count)]
        if short:
            yield short
        group: list[Work] = []
        long = [w for w in work if not self._cache.short(w.count)]
        adapted = any(self._tracks[w.seq.id].request.adapter for w in long)
        if self._steps is not None and self._steps.reads([w.count for w in long]) and not adapted:
            group, long = long, []  # lengths need not be alike
        for w in sorted(long, key=lambda w: -w.count):
            if group and group[0].count * (len(group) + 1) > PADDED * (sum(g.count for g in group) + w.count):
                yield group
                group = []
            group.append(w)
        if group:
            yield group

    def _run(self, works: list[Work]) -> list[TokenEvent]:
        """One pass and what follows from it; both catch what fails, so that one sequence never ends its neighbours."""
        try:
            drawn = self._forward(works)
        except Exception as error:
            if len(works) > 1:
                log.exception("a pass of %d sequences failed; each is run alone", len(works))
                return [event for work in works for event in self._run([work])]
            return [self._fail(works[0], error)]
        events: list[TokenEvent] = []
        for work in works:
            try:
                events += self._settle(work, drawn.get(work.seq.id))
            except Exception as error:
                events.append(self._fail(work, error))
        return events

    def _fail(self, work: Work, error: Exception) -> TokenEvent:
        track = self._tracks[work.seq.id]
        log.error("request %s failed", track.id, exc_info=error)
        self._end(track)
        self.scheduler.cancel(track.seq)
        self.stats.errors += 1
        return TokenEvent(id=track.id, index=track.index, finish="error", error=f"{type(error).__name__}: {error}")

    def _forward(self, works: list[Work]) -> dict[str, list[Drawn]]:
        """The forward pass, what is gathered from it, and the tokens drawn, by sequence id."""
        rows: list[tuple[Track, int]] = []
        wanted: list[Tensor] = []
        places: list[int] = []
        hidden, passed = self._hidden(works)
        at = 0
        for work, hidden_TD in zip(works, hidden, strict=True):
            track = self._tracks[work.seq.id]
            if track.observes:
                track.observe(self.model, work.start, hidden_TD)
            last = len(track.seq.tokens) - 1 - work.start
            if last < work.count and track.samples:
                rows += [(track, j) for j in range(work.count - last)]
                if passed is None:
                    wanted.append(hidden_TD[last:])
                places += range(at + last, at + work.count)
            at += work.count
        if not rows:
            return {}
        if passed is None:
            return self._sample(rows, self.model.logits(torch.cat(wanted)))
        return self._sample(rows, *passed.rows(places))

    def _settle(self, work: Work, drawn: list[Drawn] | None) -> list[TokenEvent]:
        """Take a sequence's tokens in; its events."""
        track, stats = self._tracks[work.seq.id], self.stats
        made = track.take(work, drawn)
        stats.prompt_tokens += made.prompt_tokens
        stats.generated_tokens += made.generated
        if made.drafted:
            assert self.proposer is not None
            stats.drafted_tokens += made.drafted
            stats.accepted_tokens += made.accepted
            self.proposer.learn(track, made.drafted, made.accepted)
        self.scheduler.commit(work, made.computed)
        if made.finished:
            self._end(track)
            self.scheduler.finish(track.seq)
        return made.events

    def _hidden(self, works: list[Work]) -> tuple[Sequence[Tensor], Passed | None]:
        """Hidden states [count, D] of each work's tokens; all that a recorded pass made, where one serves."""
        assert self._cache is not None
        chunks = [Chunk((w.seq.tokens[w.start :] + w.seq.drafts)[: w.count], w.start, w.seq.tables) for w in works]
        adapters = [self._tracks[w.seq.id].request.adapter for w in works]
        counts = [work.count for work in works]
        short = all(map(self._cache.short, counts))
        if self._native is not None and short and not any(adapters) and sum(counts) <= self._native.rows:
            return torch.split(self._native.decode(chunks), counts), None
        if self._steps is not None and not any(adapters):
            self.slots.select(())
            if short and self._steps.decodes(sum(counts)):
                passed = self._steps.decode(chunks)
                return torch.split(passed.hidden_XD, counts), passed
            if self._steps.reads(counts):
                return self._steps.read(chunks), None
        select = lambda owners: self.slots.select([adapters[i] for i in owners])  # noqa: E731
        return read(self.model, self._cache, chunks, select), None

    def _end(self, track: Track) -> None:
        track.done = True
        if self.proposer is not None:
            self.proposer.drop(track)
        del self._tracks[track.seq.id]
        if all(other.done for other in self._requests[track.id]):
            del self._requests[track.id]

    # --- sampling ----------------------------------------------------------------------------------------------------

    def _sample(
        self, rows: list[tuple[Track, int]], logits_XV: Tensor, likeliest_X: Tensor | None = None
    ) -> dict[str, list[Drawn]]:
        """Draw the token that follows each row: (track, how many of its drafts stand before it). By sequence id."""
        # the sampler works in place: what is reported of the model's own logits is taken before
        asked = {i: track.params.logprobs for i, (track, _) in enumerate(rows) if track.params.logprobs is not None}
        own = {i: logits_XV[i : i + 1].clone() for i in asked}
        tracks = list({track.seq.id: track for track, _ in rows}.values())
        if self._sampler is None or self._sampler[0] != tracks:
            self._sampler = tracks, Sampler([track.params for track in tracks], self.device)
        sampler = self._sampler[1]
        numbers = {track.seq.id: number for number, track in enumerate(tracks)}
        owner_X = [numbers[track.seq.id] for track, _ in rows]
        tokens_X = sampler(
            logits_XV,
            gpu.upload([len(track.seq.tokens) + j for track, j in rows], self.device),
            rows=owner_X,
            histories=[track.past(track.seq.drafts[:j]) for track, j in rows],
            banned={
                i: track.stop_ids
                for i, (track, j) in enumerate(rows)
                if track.generated + j < track.params.min_new_tokens
            },
            allowed=allowed(rows, self.config.vocab_size),
            likeliest_X=likeliest_X,
        )
        policy = [None] * len(rows)
        if any(track.request.policy_logprobs for track, _ in rows):
            policy = sampler.logprobs(logits_XV, tokens_X, owner_X).tolist()
        drawn: dict[str, list[Drawn]] = {}
        for i, ((track, _), token) in enumerate(zip(rows, tokens_X.tolist(), strict=True)):
            logprob = top_logprobs(own[i], [token], asked[i])[0] if i in asked else None
            drawn.setdefault(track.seq.id, []).append(Drawn(token, logprob, policy[i]))
        return drawn

    # --- whole answers -----------------------------------------------------------------------------------------------

    def stream(self, requests: Sequence[Request]) -> Generator[TokenEvent]:
        """Submit requests and yield their events until all have ended; those that are left are cancelled on close.

        Streams may be open side by side: what a step makes for another stream is kept for it.
        """
        idents: list[str] = []
        try:
            for request in requests:
                idents.append(self.submit(request))
                self._held[idents[-1]] = []
            while any(ident in self._requests or self._held[ident] for ident in idents):
                for ident in idents:
                    yield from self._held[ident]
                    self._held[ident] = []
                for event in self.step():
                    if event.id in self._held:
                        self._held[event.id].append(event)
                    else:
                        self._outbox.append(event)
        finally:
            if self._left is None:
                self._leave(idents)
            else:  # the collector came upon a stream that was dropped, in the middle of another one's step
                self._left += idents

    def _leave(self, idents: Sequence[str]) -> None:
        """End requests that nobody listens to any more."""
        for ident in idents:
            self.cancel(ident)
            self._held.pop(ident, None)
        self._outbox = [event for event in self._outbox if event.id not in idents]

    def generate(self, prompts: Any, **options: Any) -> Any:
        """Answers in text, as `LM.generate` gives them, through this engine. ValueError over a bare model."""
        if self.front is None:
            raise ValueError("generate: an engine over a bare model takes tokens (submit, stream); text needs an LM")
        return self.front.generate(prompts, engine=self, **options)

    def score(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[tuple[float, bool]]:
        """For each (context, continuation) in ids: the continuation's summed log-probability; is it the greedy one.

        What contexts share is read once. Raises ValueError for an empty side, ContextError past the context.
        """
        for context, continuation in pairs:
            if not context or not continuation:
                raise ValueError(f"score: {len(context)} and {len(continuation)} tokens, allowed is at least one each")
        texts = [[*context, *continuation] for context, continuation in pairs]
        requests: dict[str, int] = {}
        wanted: list[Request] = []
        leader = Request(tokens=[])
        for i in sorted(range(len(pairs)), key=texts.__getitem__):
            ident = f"score-{next(self._numbers)}"
            requests[ident] = i
            # sorted, those that begin alike follow each other: the first reads for all
            shared = _common(leader.tokens, texts[i])
            follows = shared >= max(PAGE, len(texts[i]) // 2)
            after = leader.id if follows else None
            wanted.append(Request(id=ident, tokens=texts[i], score_from=len(pairs[i][0]), after=after))
            leader = leader if follows else wanted[-1]
        found: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
        for event in self.stream(wanted):
            if event.error is not None or event.prompt_logprobs is None:
                raise RuntimeError(f"score: pair {requests[event.id]} failed: {event.error or event.finish}")
            scores = event.prompt_logprobs
            found[requests[event.id]] = sum(s.logprob for s in scores), all(s.top[0][0] == s.id for s in scores)
        return found

    def embed(self, rows: Sequence[Sequence[int]], *, pooling: Pooling = "mean", normalize: bool = True) -> Tensor:
        """Embeddings [rows, D] in fp32: final hidden states, the mean over the tokens or the last, of length 1."""
        wanted = [Request(id=f"embed-{next(self._numbers)}", tokens=row, embed=pooling) for row in rows]
        found = {event.id: event for event in self.stream(wanted)}
        states = []
        for request in wanted:
            event = found[request.id or ""]
            if event.embedding_D is None:
                raise RuntimeError(f"embed: {event.error or event.finish}")
            states.append(event.embedding_D)
        states_BD = torch.stack(states)
        return torch.nn.functional.normalize(states_BD, dim=-1) if normalize else states_BD

    # --- weights that change -----------------------------------------------------------------------------------------

    def refresh(self, model: Gemma2 | None = None) -> None:
        """The weights changed: nothing that was computed with the old ones serves a new request.

        `model`: where changed weights were packed anew, the model to go on with (`engine.rollout.twin`).
        """
        if model is not None:
            if self._tracks or self.adapters:
                raise RuntimeError(f"refresh: {len(self._tracks)} sequences and {self.adapters} are of the old model")
            self.model, self.slots = model, AdapterSlots(model)
        if model is not None or not all(steps.valid() for steps in (self._steps, self._native) if steps is not None):
            self._steps = self._native = None
        self.version += 1
        self.scheduler.forget()

    def release(self) -> None:
        """Free the cache's memory until the next step. RuntimeError while requests are in flight."""
        if self._tracks:
            raise RuntimeError(f"release: {len(self._tracks)} sequences are in flight")
        self.scheduler.forget()
        self._cache = self._steps = self._native = None

    def load_adapter(self, name: str, folder: str | Path) -> None:
        """Load a PEFT folder, for requests that name it. ValueError where it does not fit the model."""
        self.slots.load(name, folder)

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter. ValueError while requests that name it are in flight."""
        if users := sum(track.request.adapter == name for track in self._tracks.values()):
            raise ValueError(f"adapter {name!r}: {users} sequences that use it are in flight")
        self.slots.unload(name)

    @property
    def adapters(self) -> list[str]:
        """Names of the loaded adapters."""
        return list(self.slots.names)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the prefix that two texts share."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
