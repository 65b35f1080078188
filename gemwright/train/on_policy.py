"""On-policy batches (GKD, arXiv 2306.13649): the data's prompts, answered by the model that is being trained.

With probability `lmbda` a batch of the data gives its prompts alone. The engine answers them over the live weights, and
the loss is the divergence over the whole vocabulary at every token that was generated, the one that ends the answer
among them; nothing is differentiated through the draw. Which tokens carry loss is known only then, and counted then.
With `seq_kd` the batches that are left are answered by the teacher instead.

A prompt is what stands before the first token with loss; of plain text, where that is nothing, the first
`prompt_tokens` tokens. An answer may take what is left of a row; a prompt that fills the student's context is left out
and counted. Counted, too, is an answer that ends at once: the student chose to end there, and learns from that token.

The draw's noise is a function of the seed, the batch, the rank and the prompt, so a resumed run generates the same.
Each rank answers its own prompts; of a sharded student it makes itself a whole copy for that time. The engine's keys
and values, and on CUDA its recorded passes, are let go before the update; on CUDA they stay where the device has room
for them beside the largest step seen so far (`Room`): weights change in place, so a pass that was recorded stays true.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import nn

from gemwright.data.batch import Batch, collate
from gemwright.data.pack import Int64, best_fit, cut, one_each
from gemwright.data.rows import Document
from gemwright.data.store import in_memory
from gemwright.engine.engine import Engine
from gemwright.engine.request import Request
from gemwright.engine.rollout import twin
from gemwright.lora import LoRALinear
from gemwright.model import Gemma2
from gemwright.sampling import SamplingParams
from gemwright.train.distill_options import DistillConfig
from gemwright.train.distributed import World
from gemwright.train.lessons import Lessons, Taught
from gemwright.train.room import Room

ROWS: Final = 32
"""Answers that grow at the same time."""
BUDGET: Final = 512
"""Tokens of one step of the engine."""


@dataclass
class Counts:
    """What was generated since the last record, on this rank."""

    answers: int = 0
    tokens: int = 0
    empty: int = 0
    """Answers that ended with their first token."""
    left_out: int = 0
    """Prompts that fill the context."""
    seconds: float = 0.0


class OnPolicy:
    """Batches of the data, some of which are answered by the student or the teacher."""

    def __init__(
        self, lessons: Lessons, config: DistillConfig, world: World, *,
        student: Speaker, teacher: Speaker | None, stop_ids: frozenset[int],
    ) -> None:  # fmt: skip
        self.lessons, self.config, self.world = lessons, config, world
        self.student, self.teacher, self.stop_ids = student, teacher, stop_ids
        self.batches = 0
        """Batches so far: what decisions and noise are keyed by."""
        self.counts, self._since = Counts(), time.perf_counter()

    def __iter__(self) -> Iterator[Taught]:
        return self

    def __next__(self) -> Taught:
        number = self.batches
        self.batches += 1
        share = _word(self.config.seed, number) / 2**64  # the same on every rank: none waits while another generates
        speaker = self.student if share < self.config.lmbda else self.teacher if self.config.seq_kd else None
        if speaker is None:
            return next(self.lessons)
        started = time.perf_counter()
        batch = self.answered(next(self.lessons.loader), speaker, number)
        self.counts.seconds += time.perf_counter() - started
        return Taught(batch)

    def answered(self, batch: Batch, speaker: Speaker, number: int) -> Batch:
        """The prompts of a batch with answers in place of its own; at most as many rows as it has."""
        context = speaker.model.config.max_position_embeddings
        length, packing = self.config.max_seq_length, self.config.packing
        found = list(prompts(batch, self.config.prompt_tokens))
        kept = [prompt for prompt in found if len(prompt) < min(length + 1, context)]
        self.counts.left_out += len(found) - len(kept)
        most = [min(self.config.max_new_tokens, min(length + 1, context) - len(prompt)) for prompt in kept]
        sizes = np.array([len(p) + n - 1 for p, n in zip(kept, most, strict=True)], np.int64)
        order = np.arange(len(kept))
        planned = best_fit(order, sizes, length) if packing else one_each(order)
        rows = [planned[i] for i in range(min(len(planned), len(batch.tokens_BT)))]
        chosen = [int(i) for row in rows for i in row]
        answers = self._generate(speaker, [kept[i] for i in chosen], [most[i] for i in chosen], number)
        made = [
            Document([*kept[i], *new], [0] * len(kept[i]) + [1] * len(new))
            for i, new in zip(chosen, answers, strict=True)
        ]
        place = {i: n for n, i in enumerate(chosen)}
        numbered: list[Int64] = [np.array([place[int(i)] for i in row], np.int64) for row in rows]
        numbered += [np.empty(0, np.int64)] * (len(batch.tokens_BT) - len(rows))
        documents = in_memory(made)
        return collate(documents, cut(documents.lengths, length, "truncate"), numbered, length if packing else None)

    def _generate(
        self, speaker: Speaker, asked: Sequence[Sequence[int]], most: Sequence[int], number: int
    ) -> list[list[int]]:
        """An answer to each prompt, with the id that ended it. RuntimeError where the engine fails on one."""
        config = self.config
        requests = [
            Request(
                id=f"on-policy-{i}",
                tokens=prompt,
                params=SamplingParams(
                    max_new_tokens=most[i],
                    temperature=config.sampling_temperature,
                    top_p=config.top_p,
                    stop_ids=self.stop_ids,
                    seed=_word(config.seed, number, self.world.rank, i) >> 1,
                ),
            )
            for i, prompt in enumerate(asked)
        ]
        answers: dict[str, list[int]] = {request.id or "": [] for request in requests}
        with speaker.awake(config.max_seq_length) as engine:
            for event in engine.stream(requests):
                if event.finish == "error":
                    raise RuntimeError(f"on-policy generation failed: {event.error}")
                if event.token is not None:
                    answers[event.id].append(event.token)
        counts = self.counts
        counts.answers += len(answers)
        counts.tokens += sum(map(len, answers.values()))
        counts.empty += sum(len(new) == 1 and new[0] in self.stop_ids for new in answers.values())
        return list(answers.values())

    def notes(self) -> dict[str, float]:
        """Of this rank since the last call: speed of generation, its share of the time, and what was counted."""
        counts, now = self.counts, time.perf_counter()
        elapsed = now - self._since
        self.counts, self._since = Counts(), now
        return {
            "generated_tokens": counts.tokens,
            "generated_tokens_per_second": round(counts.tokens / counts.seconds, 1) if counts.tokens else 0.0,
            "generating_share": round(counts.seconds / elapsed, 4),
            "answers": counts.answers,
            "empty_answers": counts.empty,
            "prompts_left_out": counts.left_out,
        }

    def rewind(self) -> None:
        """Back to the first batch."""
        self.lessons.rewind()
        self.batches = 0

    def state_dict(self) -> dict[str, Any]:
        """The loader's state, and how many batches there were."""
        return {"lessons": self.lessons.state_dict(), "batches": self.batches}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the state was taken."""
        self.lessons.load_state_dict(state["lessons"])
        self.batches = state["batches"]


def prompts(batch: Batch, text: int) -> Iterator[list[int]]:
    """What stands before the first target with loss in each document; at least `text` tokens where that is one."""
    for b in range(len(batch.tokens_BT)):
        starts = (batch.pos_BT[b] == 0).nonzero()[:, 0].tolist()
        ends = [*starts[1:], int((batch.pos_BT[b] >= 0).sum())] if starts else []
        for start, end in zip(starts, ends, strict=True):
            first = int((batch.weights_BT[b, start:end] > 0).nonzero()[0, 0])
            size = first + 1 if first else min(text, end - start)
            tokens: list[int] = batch.tokens_BT[b, start : start + size].tolist()
            yield tokens


def _word(*key: int) -> int:
    """64 random bits of a key."""
    return int(np.random.PCG64(np.random.SeedSequence(key)).random_raw())


# --- who answers -----------------------------------------------------------------------------------------------------


class Speaker:
    """An engine over a model: over the student's live weights, or over a teacher that stays as it is."""

    def __init__(self, model: Gemma2, world: World, *, learns: bool, dtype: torch.dtype) -> None:
        self.model, self.world, self.learns, self.dtype = model, world, learns, dtype
        self._engine: Engine | None = None
        self._room = Room(world.device)

    @contextmanager
    def awake(self, length: int) -> Iterator[Engine]:
        """The engine, up to date; its memory is let go at the end, or stays where there is room."""
        sharded = self.learns and self.world.mesh is not None
        self._room.enter()
        if self._engine is None:
            model = self.model if not self.learns else self._copy()
            self._engine = Engine(model, rows=ROWS, budget=BUDGET, cache_tokens=ROWS * (length + BUDGET))
        elif self.learns:
            copied = sharded or self.world.device.type == "cpu"  # elsewhere a twin follows by itself
            self._engine.refresh(self._copy() if copied else None)
        engine = self._engine
        if sharded:
            self._engine = None  # the whole copy goes, too
        try:
            yield engine
        finally:
            stays = self._room.leave() and not sharded
            if not stays and not engine.busy:
                engine.release()

    def _copy(self) -> Gemma2:
        if self.world.mesh is None:
            return twin(self.model)
        return twin(whole(self.model, self.world, self.dtype))


@torch.no_grad()
def whole(model: Gemma2, world: World, dtype: torch.dtype) -> Gemma2:
    """A copy of a sharded model with all its weights, an adapter folded in, in `dtype`; every rank must ask for it.

    Raises ValueError for linears that are neither plain nor LoRA over plain ones.
    """
    with torch.device("meta"):
        other = Gemma2(model.config, model.attention)
    for name in model.config.parameter_shapes():
        place = name.removesuffix(".weight")
        module = model.get_submodule(place)
        base = module.base if isinstance(module, LoRALinear) else module
        held = getattr(base, "weight", None)
        if not isinstance(held, torch.Tensor):
            raise ValueError(
                f"lmbda: {place} of a sharded student is a {type(base).__name__}, allowed is a plain linear"
            )
        weight = world.whole(held.detach()).to(dtype)
        if isinstance(module, LoRALinear):
            a_rD, b_Fr = (world.whole(factor.detach()) for factor in (module.lora_A, module.lora_B))
            weight = (weight + module.scale * (b_Fr @ a_rD)).to(dtype)
        other.get_submodule(place).weight = nn.Parameter(weight, requires_grad=False)
    other.tie()
    return other
