"""The sampler against a slow one of its own: transformers' logits processors, OpenAI's formulas, noise in integers."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from test_draw import slow_gumbel
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from gemwright import sampling
from gemwright.sampling import BANNED, History, Sampler, SamplingParams, defaults

V = 700


def packed(ids: Iterable[int], width: int = V) -> Tensor:
    """One row of int32 words with these ids' bits."""
    words = np.zeros(-(-width // 32), np.uint32)
    for i in ids:
        words[i // 32] |= np.uint32(1 << i % 32)
    return torch.from_numpy(words.view(np.int32))


def warped(logits_V: Tensor, p: SamplingParams) -> Tensor:
    """Logits after transformers' warpers."""
    row: Tensor = TemperatureLogitsWarper(float(p.temperature))(None, logits_V[None])
    if p.top_k:
        row = TopKLogitsWarper(p.top_k)(None, row)
    if p.top_p < 1:
        row = TopPLogitsWarper(p.top_p)(None, row)
    if p.min_p:
        row = MinPLogitsWarper(p.min_p)(None, row)
    return row[0]


def slow(logits_V: Tensor, p: SamplingParams, prompt: Sequence[int], answer: Sequence[int], position: int,
         banned: Iterable[int] = (), allowed: Iterable[int] | None = None) -> int:  # fmt: skip
    """The next token, id by id."""
    row = logits_V.clone()
    for i, bias in dict(p.logit_bias).items():
        row[i] += bias
    if p.repetition_penalty != 1:
        row = RepetitionPenaltyLogitsProcessor(p.repetition_penalty)(torch.tensor([[*prompt, *answer]]), row[None])[0]
    for i, count in Counter(answer).items():
        row[i] = row[i] - count * p.frequency_penalty - p.presence_penalty
    row[list(banned)] = -torch.inf
    if allowed is not None:
        row[sorted(set(range(len(row))) - set(allowed))] = -torch.inf
    if p.temperature == 0:
        return int(row.argmax())
    seed = p.seed or 0
    kept = {i: s for i, s in enumerate(warped(row, p).tolist()) if s > -math.inf}
    return max(kept, key=lambda i: kept[i] + slow_gumbel(seed, position, i))


def some_params(rng: random.Random) -> SamplingParams:
    pick: dict[str, Any] = {
        "temperature": rng.choice([0.0, 0.5, 1.0, 1.7]),
        "top_k": rng.choice([None, 3, 200]),
        "top_p": rng.choice([1.0, 0.9, 0.4]),
        "min_p": rng.choice([0.0, 0.0, 0.1]),
        "repetition_penalty": rng.choice([1.0, 1.3, 0.8]),
        "frequency_penalty": rng.choice([0.0, 0.7, -1.0]),
        "presence_penalty": rng.choice([0.0, 1.5]),
        "logit_bias": rng.choice([{}, {rng.randrange(V): 8.0, rng.randrange(V): -100.0}]),
    }
    return SamplingParams(**pick, seed=rng.randrange(-(2**63), 2**63))


@pytest.mark.parametrize("seed", range(4))
def test_a_mixed_batch_is_the_slow_sampler(seed: int) -> None:
    """Requests of every kind in one call, some with drafts (several rows), stop ids banned, a grammar."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    params = [some_params(rng) for _ in range(14)]
    prompts = [[rng.randrange(V) for _ in range(rng.randrange(1, 40))] for _ in params]
    answers = [[rng.randrange(30) for _ in range(rng.randrange(90))] for _ in params]
    rows, texts, histories = [], [], []
    for request, p in enumerate(params):
        history = History(prompts[request])
        for token in answers[request]:
            history.push(token)
        drafts = [rng.randrange(30) for _ in range(rng.choice([0, 0, 3]))]
        for count in range(len(drafts) + 1):
            rows.append(request)
            texts.append(answers[request] + drafts[:count])
            histories.append(history.with_drafts(drafts[:count]) if p.penalised else None)
    logits_XV = torch.randn(len(rows), V) * 3
    positions = [len(prompts[request]) + len(text) for request, text in zip(rows, texts, strict=True)]
    banned = {x: [1, 107] for x in range(0, len(rows), 3)}
    allowed = {x: rng.sample(range(V), 40) for x in range(1, len(rows), 4)}
    want = [
        slow(logits_XV[x], params[rows[x]], prompts[rows[x]], texts[x], positions[x], banned.get(x, ()), allowed.get(x))
        for x in range(len(rows))
    ]
    got = Sampler(params)(
        logits_XV,
        torch.tensor(positions),
        rows=rows,
        histories=histories,
        banned=banned,
        allowed=([*allowed], torch.stack([packed(ids) for ids in allowed.values()])),
    )
    assert got.tolist() == want


def test_openai_penalties_and_bias_by_hand() -> None:
    """Answer 3, 3, 1 after prompt 0, 1: the prompt does not count. Bias comes first, then repetition."""
    history = History([0, 1])
    for token in (3, 3, 1):
        history.push(token)
    logits = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    params = SamplingParams(temperature=0, frequency_penalty=0.5, presence_penalty=0.25)
    assert Sampler([params])(logits, torch.tensor([5]), histories=[history]).tolist() == [2]
    assert logits.tolist() == [[1.0, 2.0 - 0.5 - 0.25, 3.0, 4.0 - 2 * 0.5 - 0.25]]
    logits = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    params = SamplingParams(temperature=0, logit_bias={3: -6, 0: 10}, repetition_penalty=2, presence_penalty=1)
    assert Sampler([params])(logits, torch.tensor([5]), histories=[history]).tolist() == [0]
    assert logits.tolist() == [[(1.0 + 10) / 2, 2.0 / 2 - 1, 3.0, (4.0 - 6) * 2 - 1]]


def test_rows_without_controls_are_not_touched() -> None:
    """A caller reports the model's own log-probabilities of such rows without a copy."""
    logits = torch.randn(2, V)
    before = logits.clone()
    Sampler([SamplingParams(seed=1), SamplingParams(temperature=0, top_p=0.5)])(logits, torch.tensor([1, 2]))
    assert torch.equal(logits, before)


def test_a_penalised_row_without_a_history_is_a_broken_invariant() -> None:
    with pytest.raises(AssertionError, match="1 rows are penalised, 0 have a history"):
        Sampler([SamplingParams(presence_penalty=1)])(torch.zeros(1, V), torch.tensor([0]))


def test_history_counts_the_answer_and_drafts_leave_it_alone() -> None:
    history = History([5, 6, 5])
    answer = [*range(100, 300), 6, 6]  # past the room that is kept ready
    for token in answer:
        history.push(token)
    drafted = history.with_drafts([6, 999])
    assert dict(zip(drafted.ids.tolist(), drafted.counts.tolist(), strict=True)) == {5: 0, **Counter([*answer, 6, 999])}
    assert dict(zip(history.ids.tolist(), history.counts.tolist(), strict=True)) == {5: 0, **Counter(answer)}
    history.push(7)
    assert 7 in history.ids and 7 not in drafted.ids


def test_a_rows_draw_does_not_depend_on_its_neighbours() -> None:
    logits_BV = torch.randn(3, V)
    params = [SamplingParams(temperature=0), SamplingParams(seed=1), SamplingParams(seed=2, top_p=0.5)]
    together = Sampler(params)(logits_BV, torch.tensor([4, 5, 6]))
    assert together[0] == logits_BV[0].argmax()
    for row in range(3):
        alone = Sampler(params[row : row + 1])(logits_BV[row : row + 1], torch.tensor([4 + row]))
        assert alone[0] == together[row], "a row's draw depends on its neighbours"


def test_a_banned_stop_id_yields_only_to_a_grammar_that_allows_nothing_else() -> None:
    position = torch.zeros(1, dtype=torch.int64)
    for params in (SamplingParams(temperature=0), SamplingParams(), SamplingParams(top_p=0.9, temperature=1e-4)):
        everything_else = {0: set(range(V)) - {17}}
        assert Sampler([params])(torch.randn(1, V), position, banned=everything_else).tolist() == [17]
        only = ([0], packed([33])[None])
        assert Sampler([params])(torch.randn(1, V), position, banned={0: [33]}, allowed=only).tolist() == [33]
    logits = torch.zeros(1, V)
    Sampler([SamplingParams()])(logits, position, banned={0: [4]})
    assert logits[0, 4] == BANNED


def test_candidates_do_not_depend_on_how_many_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    logits_BV = torch.randn(4, V)
    params = [SamplingParams(seed=s, top_p=0.95, temperature=1.5) for s in range(4)]
    want = Sampler(params)(logits_BV, torch.arange(4))
    for size in (1, 3, 64, V):
        monkeypatch.setattr(sampling, "CANDIDATES", size)
        assert torch.equal(Sampler(params)(logits_BV, torch.arange(4)), want)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(top_k=5, temperature=0.7), SamplingParams(top_p=0.8, temperature=1.3), SamplingParams(min_p=0.2),
        SamplingParams(top_k=40, top_p=0.7, min_p=0.05, temperature=0.9), SamplingParams(top_p=0.99, temperature=3),
        SamplingParams(top_k=300, top_p=0.5, temperature=2), SamplingParams(top_k=10**9, top_p=0.9),
    ],
)  # fmt: skip
def test_the_kept_set_is_transformers(params: SamplingParams) -> None:
    """The last three keep or need more than the first candidates. With top_k 300, top-p once counted the whole row's
    mass, because 300 passes the candidates of the first look."""
    logits_V = torch.randn(V) * 2
    kept, ids = Sampler([params]).candidates(logits_V[None], torch.tensor([0]))
    assert set(ids[kept > -torch.inf].tolist()) == set((warped(logits_V, params) > -torch.inf).nonzero()[:, 0].tolist())


@pytest.mark.slow
@pytest.mark.parametrize("controls", [{}, {"top_p": 0.8, "temperature": 1.3}, {"top_k": 40, "min_p": 0.02}])
def test_frequencies_are_the_distributions(controls: dict[str, Any]) -> None:
    """Over positions of one seed, and over the seeds of n answers: within five standard errors."""
    logits_V = torch.randn(V) * 2
    params = SamplingParams(seed=3, n=100, **controls)
    want = warped(logits_V, params).softmax(-1)
    draws = 20_000
    by_position = Sampler([params.sample(0)] * draws)(logits_V.expand(draws, V).contiguous(), torch.arange(draws))
    by_index = [
        Sampler([params.sample(i) for i in range(100)])(logits_V.expand(100, V).contiguous(), torch.full((100,), at))
        for at in range(draws // 100)
    ]
    for tokens in (by_position, torch.cat(by_index)):
        got = torch.bincount(tokens, minlength=V) / draws
        assert not bool((got[want == 0] > 0).any()), "a token outside the kept set was drawn"
        assert bool(((got - want).abs() <= 5 * (want * (1 - want) / draws).sqrt() + 1e-3).all())


def test_logprobs_are_those_of_the_distribution_drawn_from() -> None:
    params = [
        SamplingParams(temperature=0),
        SamplingParams(temperature=0.5, presence_penalty=2),
        SamplingParams(top_k=9),
    ]
    logits_XV, rows, history = torch.randn(4, V) * 3, [2, 0, 1, 1], History([])
    history.push(int(logits_XV[2].argmax()))
    sampler = Sampler(params)
    tokens_X = sampler(logits_XV, torch.arange(4), rows=rows, histories=[history] * 4)
    got = sampler.logprobs(logits_XV, tokens_X, rows)
    want = [warped(logits_XV[x], params[rows[x]]).log_softmax(-1)[tokens_X[x]] if rows[x] else 0.0 for x in range(4)]
    assert torch.allclose(got, torch.tensor(want), atol=1e-5)
    assert bool((got[[0, 2, 3]] < 0).all())


def test_n_answers_have_seeds_of_their_own_and_the_first_keeps_the_requests() -> None:
    params = SamplingParams(n=3, seed=11, top_p=0.9)
    samples = [params.sample(i) for i in range(3)]
    assert samples[0] == SamplingParams(seed=11, top_p=0.9)
    assert len({p.seed for p in samples}) == 3
    assert samples == [params.sample(i) for i in range(3)], "a seeded request is reproducible"
    fresh = SamplingParams(n=2)
    assert len({fresh.sample(0).seed, fresh.sample(0).seed, fresh.sample(1).seed}) == 3
    assert None not in {fresh.sample(0).seed, fresh.sample(1).seed}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0), ("max_new_tokens", 1.5), ("min_new_tokens", -1), ("temperature", -0.1),
        ("temperature", math.nan), ("temperature", math.inf), ("temperature", "hot"), ("top_k", -1), ("top_k", True),
        ("top_p", 0.0), ("top_p", 1.1), ("min_p", -0.5), ("repetition_penalty", 0.0), ("frequency_penalty", 2.1),
        ("frequency_penalty", None), ("presence_penalty", -3), ("presence_penalty", math.nan), ("logit_bias", {1: 101}),
        ("logit_bias", {-1: 1}), ("logit_bias", {"1": 1}), ("logit_bias", {1: "x"}), ("logit_bias", {"a": 1, 2: 1}),
        ("n", 0), ("n", 129), ("n", 1.0), ("stop", ("",)), ("stop_ids", {-1}), ("stop_ids", {"1"}), ("seed", 2**63),
        ("seed", 1.0), ("logprobs", -1), ("logprobs", 1000), ("prompt_logprobs", "all"),
    ],
)  # fmt: skip
def test_bad_values_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"{field}: got .*allowed is"):
        SamplingParams(**{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("controls", "message"),
    [
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens: got 9, more than max_new_tokens 8"),
        ({"n": 2, "temperature": 0}, "n: got 2, allowed is 1 at temperature 0"),
    ],
)
def test_contradictions_are_refused(controls: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**controls)


def test_ids_are_checked_against_the_vocabulary() -> None:
    SamplingParams(logit_bias={V - 1: 1}, stop_ids=frozenset({V - 1})).check(V)
    with pytest.raises(ValueError, match=rf"logit_bias: got token id {V}, allowed is 0..{V - 1}"):
        SamplingParams(logit_bias={V: 1}).check(V)
    with pytest.raises(ValueError, match=rf"stop_ids: got token id {V}, allowed is 0..{V - 1}"):
        SamplingParams(stop_ids=frozenset({3, V})).check(V)


def test_params_are_values() -> None:
    """Equal whatever the order of a mapping, and hashable: the engine keys by them."""
    one, other = (SamplingParams(logit_bias=bias, stop="abc") for bias in ({3: 1, 2: 5}, {2: 5, 3: 1}))  # type: ignore[arg-type]
    assert one == other and hash(one) == hash(other)
    assert one.logit_bias == ((2, 5), (3, 1))
    assert one.stop == ("abc",), "a single stop string is one string and not its letters"


def test_defaults_come_from_the_folder() -> None:
    assert defaults({"temperature": 0.6, "top_p": 0.9, "cache_implementation": "hybrid"}) == {
        "temperature": 0.6,
        "top_p": 0.9,
    }
    assert defaults({"do_sample": False, "temperature": 0.6}) == {"temperature": 0.0}
    assert defaults({}) == {}
