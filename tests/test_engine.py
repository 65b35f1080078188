"""Engine against the plain loop: random arrivals, little cache, shared prefixes, drafts, adapters, faults; fp32.

Every engine here has a cache and a budget small enough that prompts are chunked, pages run out and sequences wait.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from gemwright.config import ModelConfig
from gemwright.engine import native_steps
from gemwright.engine.engine import Engine
from gemwright.engine.request import Request, TokenEvent
from gemwright.engine.rollout import rollout, twin
from gemwright.engine.speculative import DraftModel, PromptLookup
from gemwright.generate import ContextError, Generation, loglikelihood
from gemwright.model import Gemma2
from gemwright.ops import native
from gemwright.ops.attention import Attention
from gemwright.sampling import SamplingParams

STOP = frozenset({7})
BLOCKED = Attention("blocked", "blocked", "blocked")


def make(layers: int = 3, window: int = 40, seed: int = 0, **changes: Any) -> Gemma2:
    """Weights large enough that caps are passed and the likeliest token is clear."""
    torch.manual_seed(seed)
    config = dataclasses.replace(
        ModelConfig.preset("debug"), num_hidden_layers=layers, sliding_window=window, layer_types=(), **changes
    )
    model = Gemma2(config, BLOCKED).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.copy_(torch.randn_like(parameter) * (0.3 if "norm" in name else 0.2))
    return model


@pytest.fixture(scope="module")
def model() -> Gemma2:
    return make()


@pytest.fixture(params=["one call", "in place", "gathered"])
def _path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ways of making a pass: whole in native code; pages read by the native kernel; one gathered tensor a layer."""
    if request.param == "gathered":
        monkeypatch.setattr(native, "library", lambda: None)
    elif native.library() is None:
        pytest.skip("no C compiler: the native kernels are not there")
    monkeypatch.setattr(native_steps, "most_rows", lambda _: 1000 if request.param == "one call" else 0)


def plain(model: Gemma2, prompt: Sequence[int], params: SamplingParams) -> list[int]:
    """What the plain loop yields for a prompt alone."""
    return [token.id for (token,) in Generation(model, [list(prompt)], [params], stop_ids=STOP)]


def prompts(count: int, low: int, high: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(8, 384) for _ in range(rng.randint(low, high))] for _ in range(count)]


def drain(
    engine: Engine, *at_once: Request, arrivals: Iterator[Request] | None = None
) -> dict[tuple[str, int], list[TokenEvent]]:
    """Step until all is done, letting one more request in at each step."""
    found: dict[tuple[str, int], list[TokenEvent]] = {}
    for request in at_once:
        engine.submit(request)
    while True:
        if (arrival := next(arrivals or iter(()), None)) is not None:
            engine.submit(arrival)
        elif not engine.busy:
            return found
        for event in engine.step():
            found.setdefault((event.id, event.index), []).append(event)


def tokens(events: list[TokenEvent]) -> list[int]:
    return [event.token for event in events if event.token is not None]


CONTROLS = [
    SamplingParams(max_new_tokens=30, temperature=0),
    SamplingParams(max_new_tokens=25, temperature=0.8, top_p=0.9, seed=5, repetition_penalty=1.2),
    SamplingParams(max_new_tokens=40, temperature=1.0, top_k=20, seed=6, frequency_penalty=0.5, presence_penalty=0.3),
    SamplingParams(max_new_tokens=3, min_new_tokens=2, temperature=0, stop_ids=frozenset(range(0, 384, 5))),
]


@pytest.mark.usefixtures("_path")
@pytest.mark.parametrize("window", [8, 40])
def test_random_arrivals_equal_the_plain_loop(window: int) -> None:
    """12 requests arrive one a step at 4 rows and pages for two of them at their ends; lengths far past the window."""
    model = make(window=window)
    texts = prompts(6, 60, 100) + prompts(6, 1, 20)
    engine = Engine(model, rows=4, budget=24, cache_tokens=160)
    engine.stop_ids = STOP
    params = [dataclasses.replace(CONTROLS[i % 4], max_new_tokens=50) for i in range(12)]
    requests = (Request(id=str(i), tokens=t, params=p) for i, (t, p) in enumerate(zip(texts, params, strict=True)))
    found = drain(engine, arrivals=requests)
    for i, (text, p) in enumerate(zip(texts, params, strict=True)):
        assert tokens(found[str(i), 0]) == plain(model, text, p), i
        assert [event.finish is not None for event in found[str(i), 0]].count(True) == 1
    assert engine.stats.preemptions > 0, "the cache was not small enough to bite"
    assert engine.stats.running == engine.stats.waiting == 0


@pytest.mark.usefixtures("_path")
def test_a_second_turn_reads_only_what_is_new(model: Gemma2) -> None:
    """The prefix is found page by page, past the window of 40; the answer is the plain loop's."""
    engine = Engine(model, rows=2, budget=64, cache_tokens=1024)
    (first,) = prompts(1, 150, 150)
    drain(engine, Request(tokens=first, params=CONTROLS[0]))
    read = engine.stats.prompt_tokens
    second = [*first, *plain(model, first, CONTROLS[0]), 9, 10, 11]
    (events,) = drain(engine, Request(tokens=second, params=CONTROLS[0])).values()
    assert events[0].cached_tokens == len(second[: len(second) - 1]) // 32 * 32
    assert engine.stats.prompt_tokens - read == len(second) - events[0].cached_tokens
    assert tokens(events) == plain(model, second, CONTROLS[0])


def test_a_stream_that_is_dropped_during_a_step_of_another_ends_after_it(model: Gemma2) -> None:
    """The collector may close it at any line; the step goes on with the sequences it has begun with."""
    engine = Engine(model, rows=4, budget=64)
    one, two = prompts(2, 20, 20)
    dropped = engine.stream([Request(id="dropped", tokens=one, params=CONTROLS[0])])
    next(dropped)
    forward = engine._forward

    def interrupted(works: list[Any]) -> Any:
        dropped.close()
        return forward(works)

    engine._forward = interrupted  # type: ignore[method-assign]
    events = list(engine.stream([Request(id="kept", tokens=two, params=CONTROLS[0])]))
    assert {event.id for event in events} == {"kept"}
    assert tokens(events) == plain(model, two, CONTROLS[0])[: len(tokens(events))]
    assert not engine.busy
    assert engine.stats.cancelled == 1
    assert engine.stats.errors == 0


def test_samples_share_the_prompt_and_differ(model: Gemma2) -> None:
    """n = 3: the prompt's full pages are read once; sample 0 is the plain request."""
    engine = Engine(model, rows=4, budget=200)
    (text,) = prompts(1, 100, 100)
    params = SamplingParams(max_new_tokens=12, seed=3, n=3)
    found = drain(engine, Request(id="a", tokens=text, params=params))
    assert tokens(found["a", 0]) == plain(model, text, dataclasses.replace(params, n=1))
    assert len({tuple(tokens(found["a", i])) for i in range(3)}) == 3
    assert [found["a", i][0].cached_tokens for i in range(3)] == [0, 96, 96]


@pytest.mark.usefixtures("_path")
@pytest.mark.parametrize("params", CONTROLS[:3], ids=["greedy", "filtered", "penalties"])
def test_drafts_change_nothing(model: Gemma2, params: SamplingParams) -> None:
    """Prompt lookup on repeating text, a draft model that is the target, and one that guesses wrong."""
    texts = [(t * 20)[:90] for t in prompts(3, 4, 9)]
    params = dataclasses.replace(params, max_new_tokens=40)
    wanted = [plain(model, text, params) for text in texts]
    twin, stranger = DraftModel(model, rows=3), DraftModel(make(layers=1, seed=1), rows=3)
    for proposer in (PromptLookup(), twin, stranger):
        engine = Engine(model, rows=3, budget=48, cache_tokens=600, proposer=proposer)
        engine.stop_ids = STOP
        found = drain(engine, *(Request(id=str(i), tokens=text, params=params) for i, text in enumerate(texts)))
        assert [tokens(found[str(i), 0]) for i in range(3)] == wanted, proposer
        if proposer is twin:
            assert engine.stats.accepted_tokens > 0.9 * engine.stats.drafted_tokens > 0
    assert not twin._rows, "rows of ended sequences are given back"


@pytest.mark.parametrize("top", [0, 2])
def test_logprobs_are_the_plain_loops(model: Gemma2, top: int) -> None:
    """Of new tokens and of the prompt's, read in chunks, with and without a prefix in the cache."""
    (text,) = prompts(1, 70, 70)
    params = SamplingParams(max_new_tokens=8, temperature=0, logprobs=3, prompt_logprobs=top)
    loop = Generation(model, [text], [params])
    wanted = [token.logprob for (token,) in loop]
    (scores,) = loop.prompt_logprobs
    assert scores is not None
    engine = Engine(model, rows=2, budget=16)
    for _ in range(2):
        (events,) = drain(engine, Request(tokens=text, params=params)).values()
        for got, want in zip([e.logprob for e in events] + events[0].prompt_logprobs, wanted + scores, strict=True):  # type: ignore[operator]
            assert got is not None
            assert want is not None
            assert got.id == want.id
            assert got.logprob == pytest.approx(want.logprob, abs=1e-4)
            assert [i for i, _ in got.top] == [i for i, _ in want.top]


def test_scores_and_embeddings(model: Gemma2) -> None:
    """Scores are the plain loop's, a shared context is read once; embeddings are the forward pass's states."""
    (context,) = prompts(1, 90, 90)
    pairs = [(context, end) for end in prompts(5, 1, 6, seed=1)] + [(p[:-4], p[-4:]) for p in prompts(3, 6, 80, seed=2)]
    engine = Engine(model, rows=4, budget=100)
    for (got, is_greedy), (want, was_greedy) in zip(engine.score(pairs), loglikelihood(model, pairs), strict=True):
        assert got == pytest.approx(want, abs=1e-4)
        assert is_greedy == was_greedy
    apart = sum(len(c) + len(e) - 1 for c, e in pairs)
    assert engine.stats.prompt_tokens <= apart - 4 * 64, "four of five contexts were found"
    text = pairs[-1][0]
    hidden_TD = model(torch.tensor([text]), torch.arange(len(text))[None])[0]
    torch.testing.assert_close(engine.embed([text], normalize=False)[0], hidden_TD.mean(0), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        engine.embed([text], pooling="last")[0],
        torch.nn.functional.normalize(hidden_TD[-1], dim=0),
        atol=1e-4,
        rtol=1e-4,
    )


def test_cancel_frees_pages_within_the_call(model: Gemma2) -> None:
    engine = Engine(model, rows=2, budget=64)
    texts = prompts(3, 60, 60)
    for i, text in enumerate(texts):
        engine.submit(Request(id=str(i), tokens=text, params=CONTROLS[0]))
    engine.step()
    engine.step()
    engine.cancel("0")
    used = engine.scheduler.pools["global"].used
    assert used == -(-(60 + 2) // 32), "only request 1 holds pages"
    found = drain(engine)
    assert [event.finish for event in found["0", 0]] == ["cancelled"]
    assert tokens(found["2", 0]) == plain(model, texts[2], CONTROLS[0])
    engine.cancel("0")


class _Broken:
    """A matcher that fails when it is asked."""

    def __getattr__(self, name: str) -> Any:
        raise ArithmeticError("broken on purpose")


def test_one_that_fails_ends_alone(model: Gemma2, caplog: pytest.LogCaptureFixture) -> None:
    engine = Engine(model, rows=4, budget=64)
    texts = prompts(3, 20, 30)
    for i, text in enumerate(texts):
        engine.submit(Request(id=str(i), tokens=text, params=CONTROLS[0]))
    engine._requests["1"][0].matcher = _Broken()
    found = drain(engine)
    assert found["1", 0][-1].finish == "error"
    assert "broken on purpose" in (found["1", 0][-1].error or "")
    for i in (0, 2):
        assert tokens(found[str(i), 0])[:30] == plain(model, texts[i], CONTROLS[0])
    assert engine.stats.errors == 1
    assert "request 1 failed" in caplog.text


def test_changed_weights_find_no_old_keys() -> None:
    """After refresh the same prompt is read again, and yields what the new weights yield; release frees the cache."""
    model = make(seed=2)
    (text,) = prompts(1, 100, 100)
    engine = Engine(model, rows=2, budget=128)
    drain(engine, Request(tokens=text, params=CONTROLS[0]))
    engine.submit(Request(id="a", tokens=text))
    with pytest.raises(RuntimeError, match="in flight"):
        engine.release()
    engine.cancel("a")
    engine.release()
    assert engine._cache is None
    for parameter in model.parameters():
        parameter.mul_(1.1)
    engine.refresh()
    (events,) = (e for (ident, _), e in drain(engine, Request(tokens=text, params=CONTROLS[0])).items() if ident != "a")
    assert events[0].cached_tokens == 0
    assert tokens(events) == plain(model, text, CONTROLS[0])


def test_bad_requests_never_enter(model: Gemma2) -> None:
    engine = Engine(model, rows=2, budget=64, cache_tokens=128)
    bad: list[tuple[dict[str, Any], str]] = [
        (dict(tokens=[]), "prompt: got no tokens"),
        (dict(tokens=[1, 384]), "token id 384"),
        (dict(tokens=[1] * 300), "the context holds 256"),
        (dict(tokens=[1] * 100, params=SamplingParams(max_new_tokens=100)), "pages"),
        (dict(tokens=[1, 2], adapter="x"), "adapter: got 'x', loaded are none"),
        (dict(tokens=[1, 2], score_from=2), "score_from: got 2"),
        (dict(tokens=[1, 2], embed="mean", params=SamplingParams(n=2)), "n: got 2"),
        (dict(tokens=[1, 2], constraint=object(), params=CONTROLS[0]), "constraint: an engine over a bare model"),
    ]
    for fields, message in bad:
        with pytest.raises(ValueError, match=message):
            engine.submit(Request(**fields))
    engine.submit(Request(id="a", tokens=[1, 2], params=CONTROLS[0]))
    with pytest.raises(ValueError, match="id: got 'a'"):
        engine.submit(Request(id="a", tokens=[1, 2], params=CONTROLS[0]))
    with pytest.raises(ValueError, match="budget: got 2"):
        Engine(model, rows=2, budget=2)
    with pytest.raises(ContextError):
        engine.score([([1] * 200, [1] * 58)])
    engine.cancel("a")
    assert [event.finish for event in engine.step()] == ["cancelled"]
    assert not engine.busy


def test_rollouts_know_their_policy() -> None:
    """Log-probabilities are those of the distribution drawn from; a twin follows the trainer's parameters."""
    model = make(seed=3)
    model.requires_grad_(True).train()
    engine = Engine(twin(model), rows=4, budget=64)
    texts = prompts(2, 20, 40)
    for version, params in enumerate([SamplingParams(max_new_tokens=6, seed=1, n=2), CONTROLS[1], CONTROLS[2]]):
        for text, answers in zip(texts, rollout(engine, texts, params), strict=True):
            assert len(answers) == params.n
            for answer in answers:
                assert answer.version == version
                want = policy(model, text, answer.tokens, params)
                assert answer.logprobs == pytest.approx(want, abs=2e-3)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.02)
        engine.refresh(twin(model))


def policy(model: Gemma2, prompt: list[int], answer: list[int], params: SamplingParams) -> list[float]:
    """Log-probabilities under penalties, temperature, top-k and top-p, written out for one row."""
    found = []
    ids = torch.tensor([prompt + answer])
    with torch.no_grad():
        logits_TV = model.logits(model(ids, torch.arange(ids.shape[1])[None])[0])
    for i, token in enumerate(answer):
        row = logits_TV[len(prompt) + i - 1].clone()
        for seen in set(prompt + answer[:i]):
            row[seen] = (
                row[seen] / params.repetition_penalty if row[seen] > 0 else row[seen] * params.repetition_penalty
            )
        for seen in set(answer[:i]):
            row[seen] -= params.frequency_penalty * answer[:i].count(seen) + params.presence_penalty
        row /= params.temperature
        order = row.argsort(descending=True)
        keep = order[: params.top_k or len(order)]
        p = row[keep].softmax(-1)
        keep = keep[p.cumsum(-1) - p < params.top_p]
        found.append(float(row[keep].log_softmax(-1)[keep.tolist().index(token)]))
    return found
