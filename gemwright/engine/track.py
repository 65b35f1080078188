"""Track: one sample of one request on its way through the engine, apart from scheduling and tensors of the batch.

Legend: T tokens of a pass, D model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gemwright.engine.request import Finish, Request, TokenEvent
from gemwright.engine.scheduler import Seq, Work
from gemwright.generate import TokenLogprob, token_logprobs
from gemwright.model import Gemma2
from gemwright.sampling import History, SamplingParams


@dataclass(frozen=True)
class Drawn:
    """A token that was sampled, and what is reported about it."""

    token: int
    logprob: TokenLogprob | None = None
    policy_logprob: float | None = None


@dataclass
class Made:
    """What a pass made of one sequence."""

    computed: int
    """Positions of the work that stay valid: all but those of rejected drafts."""
    events: list[TokenEvent] = field(default_factory=list)
    finished: bool = False
    prompt_tokens: int = 0
    generated: int = 0
    drafted: int = 0
    accepted: int = 0


@dataclass(eq=False)
class Track:
    """State of one sample: its sequence, its controls, and what has been gathered for its next event."""

    id: str
    index: int
    request: Request
    params: SamplingParams
    stop_ids: frozenset[int]
    seq: Seq
    history: History | None
    """Kept where the controls ask what came before."""
    matcher: Any = None
    done: bool = False
    scores: list[TokenLogprob] | None = None
    pooled_D: Tensor | None = None
    pooled: int = 0
    """Positions that a mean has taken in."""
    started: bool = False

    @classmethod
    def make(
        cls, request: Request, ident: str, new_tokens: int, stop_ids: frozenset[int], seed: bytes, after: Seq | None
    ) -> list[Track]:
        """The tracks of a request, one a sample; later samples wait until the first has read the prompt they share."""
        # the last token of a scored text is predicted and never read
        prompt = list(request.tokens if request.score_from is None else request.tokens[:-1])
        silent = request.score_from is not None or request.embed is not None
        if request.score_from is not None and not 1 <= request.score_from < len(request.tokens):
            raise ValueError(f"score_from: got {request.score_from}, allowed is 1..{len(request.tokens) - 1}")
        if silent and request.params.n > 1:
            raise ValueError(f"n: got {request.params.n}, allowed is 1 where nothing is generated")
        # a score or a log-probability of the prompt needs the hidden states, not only the keys, of its positions
        reuse = None
        if request.score_from is not None:
            reuse = request.score_from - 1
        elif request.params.prompt_logprobs is not None or request.embed == "mean":
            reuse = 0
        tracks: list[Track] = []
        for index in range(request.params.n):
            scored = request.score_from is not None or (index == 0 and request.params.prompt_logprobs is not None)
            seq = Seq(
                id=f"{ident}/{index}",
                tokens=list(prompt),
                prompt=len(prompt),
                limit=len(prompt) + (0 if silent else new_tokens),
                seed=seed,
                reuse=reuse if index == 0 else None,
                after=tracks[0].seq if tracks else after,
            )
            track = cls(
                id=ident,
                index=index,
                request=request,
                params=request.params.sample(index),
                stop_ids=stop_ids if request.params.stop_ids is None else request.params.stop_ids,
                seq=seq,
                history=History(prompt) if request.params.penalised else None,
                scores=[] if scored else None,
            )
            tracks.append(track)
        return tracks

    @property
    def samples(self) -> bool:
        """Whether tokens are generated, and not only a score or an embedding."""
        return self.request.score_from is None and self.request.embed is None

    @property
    def decoding(self) -> bool:
        """Whether the next pass reads one token of this sequence and samples its successor."""
        return self.samples and not self.done and self.seq.computed == len(self.seq.tokens) - 1 > 0

    @property
    def generated(self) -> int:
        """Tokens of the answer so far."""
        return len(self.seq.tokens) - self.seq.prompt

    def past(self, drafts: list[int]) -> History | None:
        """What came before the token that follows these drafts, where the controls ask for it."""
        return None if self.history is None else self.history.with_drafts(drafts)

    @property
    def observes(self) -> bool:
        """Whether hidden states are asked for, and not only the tokens drawn from them."""
        return self.scores is not None or self.request.embed is not None

    def observe(self, model: Gemma2, start: int, hidden_TD: Tensor) -> None:
        """Gather scores and pooled states from the hidden states of positions [start, start + T) of the prompt."""
        request, stop = self.request, start + len(hidden_TD)
        if self.scores is not None and self.generated == 0:
            # position p predicts token p + 1; what was gathered before is not gathered again
            first = (request.score_from or 1) - 1 + len(self.scores)
            if targets := request.tokens[first + 1 : stop + 1]:
                rows_XD = hidden_TD[first - start :][: len(targets)]
                # a score also says whether the token is the greedy one
                top = 1 if request.score_from is not None else self.params.prompt_logprobs or 0
                self.scores += token_logprobs(model, rows_XD, targets, top)
        if request.embed == "mean" and start == self.pooled:
            total_D = hidden_TD.float().sum(0)
            self.pooled_D = total_D if self.pooled_D is None else self.pooled_D + total_D
            self.pooled = stop
        elif request.embed == "last" and stop == self.seq.prompt:
            self.pooled_D = hidden_TD[-1].float()

    def take(self, work: Work, drawn: Sequence[Drawn] | None) -> Made:
        """Take in what a pass computed: extend the sequence by the drawn tokens up to the first rejected draft."""
        seq = self.seq
        read = max(0, min(work.start + work.count, seq.prompt) - work.start)
        if drawn is None:
            made = Made(computed=work.count, prompt_tokens=read)
            if not self.samples and work.start + work.count == len(seq.tokens):
                made.finished = True
                made.events = [self._event(finish="stop")]
            return made
        drafts = seq.drafts[: len(drawn) - 1]
        made = Made(computed=work.count - len(drafts), prompt_tokens=read, drafted=len(drafts))
        for j, one in enumerate(drawn):
            finish: Finish | None = None
            seq.tokens.append(one.token)
            if self.history is not None:
                self.history.push(one.token)
            made.generated += 1
            if one.token in self.stop_ids:
                finish = "stop"
            elif self.matcher is not None:
                self.matcher.accept(one.token)
            if finish is None and len(seq.tokens) == seq.limit:
                finish = "length"
            made.events.append(self._event(one, finish))
            if finish is None and self.matcher is not None and self.matcher.done:  # nothing but a stop id may follow
                finish = "stop"
                made.events.append(self._event(finish=finish))
            made.finished = finish is not None
            if made.finished or j == len(drafts) or drafts[j] != one.token:
                break
            made.accepted += 1
        made.computed += made.accepted
        seq.drafts = []
        return made

    def _event(self, drawn: Drawn | None = None, finish: Finish | None = None) -> TokenEvent:
        event = TokenEvent(
            id=self.id,
            index=self.index,
            token=None if drawn is None else drawn.token,
            finish=finish,
            logprob=None if drawn is None else drawn.logprob,
            policy_logprob=None if drawn is None else drawn.policy_logprob,
        )
        if self.started:
            return event
        self.started = True
        embedding_D = self.pooled_D
        if embedding_D is not None and self.request.embed == "mean":
            embedding_D = embedding_D / self.seq.prompt
        return dataclasses.replace(
            event, prompt_logprobs=self.scores, embedding_D=embedding_D, cached_tokens=self.seq.cached
        )


def allowed(rows: Sequence[tuple[Track, int]], vocab: int) -> tuple[list[int], Tensor] | None:
    """Which of these rows, (track, how many of its drafts stand before it), are under a grammar, and the bits of the
    ids that it allows there; None where none is."""
    limited = [i for i, (track, _) in enumerate(rows) if track.matcher is not None]
    if not limited:
        return None
    bits_YW = torch.empty(len(limited), -(-vocab // 32), dtype=torch.int32)
    for words_W, i in zip(bits_YW, limited, strict=True):
        track, j = rows[i]
        taken = track.matcher.accepts(track.seq.drafts[:j])
        for token in track.seq.drafts[:taken]:
            track.matcher.accept(token)
        track.matcher.mask(words_W)
        track.matcher.rollback(taken)
    return limited, bits_YW
