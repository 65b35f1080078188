"""The sampler against transformers' own logits processors, against exact distributions, and row by row."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from gemwright import sampling
from gemwright.sampling import Sampler, SamplingParams, defaults, gumbel

V = 700


def draw(logits_V: torch.Tensor, draws: int, **params: object) -> torch.Tensor:
    """Frequencies of many draws from one row, one position each."""
    sampler = Sampler([SamplingParams(seed=3, **params)] * draws)  # type: ignore[arg-type]
    tokens = sampler(logits_V.expand(draws, -1), torch.arange(draws))
    return torch.bincount(tokens, minlength=len(logits_V)) / draws


def oracle(logits_V: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> torch.Tensor:
    """Probabilities after transformers' warpers."""
    row: torch.Tensor = TemperatureLogitsWarper(temperature)(None, logits_V[None])
    if top_k:
        row = TopKLogitsWarper(top_k)(None, row)
    if top_p < 1:
        row = TopPLogitsWarper(top_p)(None, row)
    if min_p:
        row = MinPLogitsWarper(min_p)(None, row)
    probabilities: torch.Tensor = row.softmax(-1)[0]
    return probabilities


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [
        (1.0, 0, 1.0, 0.0),
        (0.7, 5, 1.0, 0.0),
        (1.3, 0, 0.8, 0.0),
        (1.0, 0, 1.0, 0.2),
        (0.9, 40, 0.7, 0.05),
        (3.0, 0, 0.99, 0.0),
    ],
)
def test_the_support_and_frequencies_are_transformers(
    temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    """Same candidates exactly; frequencies within five standard errors. The last case keeps more than the first 256."""
    logits_V = torch.randn(V) * 2
    want = oracle(logits_V, temperature, top_k, top_p, min_p)
    draws = 4000
    got = draw(logits_V, draws, temperature=temperature, top_k=top_k or None, top_p=top_p, min_p=min_p)
    assert not bool((got[want == 0] > 0).any()), "a token outside the kept set was drawn"
    assert bool(((got - want).abs() <= 5 * (want * (1 - want) / draws).sqrt() + 1e-3).all())
    sampler = Sampler([SamplingParams(temperature=temperature, top_k=top_k or None, top_p=top_p, min_p=min_p)])
    if sampler.filtered:
        kept, ids = sampler._candidates(logits_V[None] / temperature)
        assert set(ids[kept > -torch.inf].tolist()) == set(want.nonzero()[:, 0].tolist())


def test_temperature_zero_takes_the_likeliest_and_others_are_not_disturbed() -> None:
    logits_BV = torch.randn(3, V)
    params = [SamplingParams(temperature=0), SamplingParams(seed=1), SamplingParams(seed=2, top_p=0.5)]
    together = Sampler(params)(logits_BV, torch.tensor([4, 5, 6]))
    assert together[0] == logits_BV[0].argmax()
    for row in range(3):
        alone = Sampler(params[row : row + 1])(logits_BV[row : row + 1], torch.tensor([4 + row]))
        assert alone[0] == together[row], "a row's draw depends on its neighbours"


def test_noise_is_a_function_of_seed_position_and_id_and_is_gumbel() -> None:
    ids = torch.arange(200_000)
    zero = torch.tensor(0)
    noise = gumbel(zero, zero, ids)
    assert torch.equal(noise, gumbel(zero, zero, ids))
    assert abs(float(noise.mean()) - 0.5772) < 0.02  # Euler's constant
    assert abs(float(noise.var()) - math.pi**2 / 6) < 0.05
    for other in (gumbel(zero + 1, zero, ids), gumbel(zero, zero + 1, ids)):
        assert abs(float(torch.corrcoef(torch.stack([noise, other]))[0, 1])) < 0.01
    # neighbours must not be the same stream shifted: (seed, position + 1, id) is not (seed, position, id + 1)
    assert not torch.allclose(gumbel(zero, zero + 1, ids)[:-1], noise[1:])


def test_repetition_penalty_is_transformers() -> None:
    logits_BV = torch.randn(2, V) * 3
    history = torch.randint(V, (2, 50))
    want = RepetitionPenaltyLogitsProcessor(1.7)(history, logits_BV.clone()).argmax(-1)
    seen_BV = torch.zeros(2, V, dtype=torch.bool).scatter_(1, history, True)
    best = logits_BV.argmax(-1)
    seen_BV[torch.arange(2), best] = True  # the likeliest is penalised, so that the penalty shows
    history = torch.cat([history, best[:, None]], 1)
    want = RepetitionPenaltyLogitsProcessor(1.7)(history, logits_BV.clone()).argmax(-1)
    sampler = Sampler([SamplingParams(temperature=0, repetition_penalty=1.7)] * 2)
    got = sampler(logits_BV, torch.zeros(2, dtype=torch.int64), seen_BV=seen_BV)
    assert torch.equal(got, want)
    assert not torch.equal(got, best)


def test_banned_ids_never_come() -> None:
    logits_BV = torch.randn(1, V)
    banned_BV = torch.ones(1, V, dtype=torch.bool)
    banned_BV[0, 17] = False
    for params in (SamplingParams(temperature=0), SamplingParams(), SamplingParams(top_p=0.9)):
        assert Sampler([params])(logits_BV, torch.zeros(1, dtype=torch.int64), banned_BV=banned_BV).tolist() == [17]


def test_candidates_do_not_depend_on_how_many_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    logits_BV = torch.randn(4, V)
    params = [SamplingParams(seed=s, top_p=0.95, temperature=1.5) for s in range(4)]
    want = Sampler(params)(logits_BV, torch.arange(4))
    for size in (1, 3, 64, V):
        monkeypatch.setattr(sampling, "CANDIDATES", size)
        assert torch.equal(Sampler(params)(logits_BV, torch.arange(4)), want)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0), ("max_new_tokens", 1.5), ("min_new_tokens", -1), ("temperature", -0.1),
        ("temperature", math.nan), ("temperature", "hot"), ("top_k", -1), ("top_k", True), ("top_p", 0.0),
        ("top_p", 1.1), ("min_p", -0.5), ("repetition_penalty", 0.0), ("stop", ("",)), ("seed", 2**63), ("seed", 1.0),
        ("logprobs", -1), ("logprobs", 1000), ("prompt_logprobs", "all"),
    ],
)  # fmt: skip
def test_bad_values_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"{field}: got .*allowed is"):
        SamplingParams(**{field: value})  # type: ignore[arg-type]


def test_min_may_not_pass_max() -> None:
    with pytest.raises(ValueError, match="min_new_tokens: got 9, more than max_new_tokens 8"):
        SamplingParams(min_new_tokens=9, max_new_tokens=8)


def test_a_single_stop_string_is_one_string_and_not_its_letters() -> None:
    assert SamplingParams(stop="abc").stop == ("abc",)  # type: ignore[arg-type]


def test_defaults_come_from_the_folder() -> None:
    assert defaults({"temperature": 0.6, "top_p": 0.9, "cache_implementation": "hybrid"}) == {
        "temperature": 0.6,
        "top_p": 0.9,
    }
    assert defaults({"do_sample": False, "temperature": 0.6}) == {"temperature": 0.0}
    assert defaults({}) == {}
