"""The engine on CUDA against the plain loop, token for token in fp32, and its recorded passes against plain ones.

The kernels themselves are tested in test_decode_kernels.py. Here: random arrivals past the window, drafts, samples,
preemption, adapters, changed weights, many lengths. Without a GPU the recorded pass is computed by Triton's interpreter
once, where that runs: its inputs, its weights in one matrix, and its arithmetic.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_engine import CONTROLS, STOP, drain, make, plain, prompts, tokens
from triton_fixtures import interprets

from gemwright.engine import captured
from gemwright.engine.captured import Steps
from gemwright.engine.engine import Engine
from gemwright.engine.paged import Chunk, PagedCache, read
from gemwright.engine.request import Request
from gemwright.engine.scheduler import GLOBAL, LOCAL, Kind, Table
from gemwright.engine.speculative import DraftModel, PromptLookup
from gemwright.model import Gemma2
from gemwright.sampling import SamplingParams


@pytest.fixture(autouse=True)
def _exact_products() -> Iterator[None]:
    """fp32 products in fp32, not in tf32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def on_gpu(**changes: Any) -> tuple[Gemma2, Gemma2]:
    """The same model on CPU, for the plain loop, and on the GPU."""
    model = make(**changes)
    return model, copy.deepcopy(model).cuda()


def table(pages: list[int], first: int = 0) -> dict[Kind, Table]:
    return {kind: Table(first, pages, 0) for kind in (GLOBAL, LOCAL)}


def chunks_of(text: list[int], start: int, sizes: list[int], pages: list[list[int]]) -> list[Chunk]:
    return [Chunk(text[start : start + n], start, table(p)) for n, p in zip(sizes, pages, strict=True)]


def recorded_equals_plain(model: Gemma2, steps: Steps, other: PagedCache, sizes: list[int]) -> None:
    """Passes of these sizes, over one cache recorded and over another plain: hidden states, logits, likeliest ids."""
    (text,) = prompts(1, 120, 120)
    pages = [[5, 0, 3], [1, 2, 4], [6, 7, 8]][: len(sizes)]
    for start in (0, 5, 70 - max(sizes)):
        chunks = chunks_of(text, start, sizes, pages)
        with torch.inference_mode():
            want = torch.cat(read(model, other, chunks))
            passed = steps.decode(chunks)
            assert len(passed.hidden_XD) == sum(sizes)
            torch.testing.assert_close(passed.hidden_XD, want, atol=2e-4, rtol=2e-4)
            torch.testing.assert_close(passed.logits_XV, model.logits(want), atol=2e-4, rtol=2e-4)
            assert torch.equal(passed.likeliest_X, passed.logits_XV.argmax(-1))
            rows = passed.rows([sum(sizes) - 1])
            assert torch.equal(rows[0], passed.logits_XV[-1:])


def prompts_are_read_alike(model: Gemma2, steps: Steps, other: PagedCache) -> None:
    """Chunks of unlike lengths, the second of two of one text, in one recorded pass."""
    (text,) = prompts(1, 120, 120)
    pages = [[0, 1, 2, 3], [4, 5, 6], [7, 8]]
    for start, sizes in ((0, (45, 17, 32)), (40, (33, 40, 5))):
        chunks = chunks_of(text, start, list(sizes), pages)
        with torch.inference_mode():
            want, got = [read(model, other, [chunk])[0] for chunk in chunks], steps.read(chunks)
        for mine, theirs in zip(got, want, strict=True):
            torch.testing.assert_close(mine, theirs, atol=2e-4, rtol=2e-4)


@pytest.mark.gpu if torch.cuda.is_available() else pytest.mark.skipif(not interprets(), reason="needs an interpreter")
@pytest.mark.parametrize("one_row", [False, True])
@pytest.mark.parametrize("fused", [True, False])
def test_a_recorded_pass_is_the_models_own(fused: bool, one_row: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through fused kernels and through the model's forward pass; rows that pad change nothing; tables that change."""
    model = make(layers=2)
    if torch.cuda.is_available():
        model = model.cuda()
    else:
        kernel = importlib.import_module("gemwright.ops.attention_decode").paged_attention
        monkeypatch.setattr(captured, "paged_attention", lambda cuda: kernel)
        monkeypatch.setattr(Steps, "_replay", Steps.compute)
    if not fused:
        monkeypatch.setattr(Steps, "_weights", lambda self: [])
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    cache, other = (PagedCache(model, {GLOBAL: 9, LOCAL: 9}) for _ in range(2))
    steps = Steps(model, cache, context=256)
    assert steps.fused == fused and steps.valid()
    steps.one_row = one_row
    for sizes in ([1], [3, 1, 1]):
        recorded_equals_plain(model, steps, other, sizes)
    if torch.cuda.is_available() or (fused and not one_row):  # the interpreter takes half a minute
        prompts_are_read_alike(model, steps, other)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name]), "the weights are the same, wherever they lie"
    assert Steps(model, cache, context=256).valid(), "joined weights are found joined"
    model.model.layers[0].get_submodule("mlp.up_proj").weight.data = torch.ones(2, 2)
    assert not steps.valid()


@pytest.mark.gpu
@pytest.mark.parametrize("window", [8, 40])
def test_random_arrivals_equal_the_plain_loop(window: int) -> None:
    """12 requests arrive one a step at 4 rows and pages for two of them at their ends; lengths far past the window."""
    model, other = on_gpu(window=window)
    texts = prompts(6, 60, 100) + prompts(6, 1, 20)
    engine = Engine(other, rows=4, budget=24, cache_tokens=160)
    engine.stop_ids = STOP
    params = [dataclasses.replace(CONTROLS[i % 4], max_new_tokens=50) for i in range(12)]
    requests = (Request(id=str(i), tokens=t, params=p) for i, (t, p) in enumerate(zip(texts, params, strict=True)))
    found = drain(engine, arrivals=requests)
    for i, (text, p) in enumerate(zip(texts, params, strict=True)):
        assert tokens(found[str(i), 0]) == plain(model, text, p), i
    assert engine.stats.preemptions > 0, "the cache was not small enough to bite"
    assert engine._steps is not None and engine._steps._graphs, "nothing was recorded"


@pytest.mark.gpu
@pytest.mark.parametrize("params", CONTROLS[:3], ids=["greedy", "filtered", "penalties"])
def test_drafts_change_nothing(params: SamplingParams) -> None:
    model, other = on_gpu()
    texts = [(t * 20)[:90] for t in prompts(3, 4, 9)]
    params = dataclasses.replace(params, max_new_tokens=40)
    wanted = [plain(model, text, params) for text in texts]
    for proposer in (PromptLookup(), DraftModel(other, rows=3)):
        engine = Engine(other, rows=3, budget=48, cache_tokens=600, proposer=proposer)
        engine.stop_ids = STOP
        found = drain(engine, *(Request(id=str(i), tokens=text, params=params) for i, text in enumerate(texts)))
        assert [tokens(found[str(i), 0]) for i in range(3)] == wanted, proposer


@pytest.mark.gpu
def test_samples_scores_and_log_probabilities() -> None:
    """n = 3 share the prompt; scores, log-probabilities and pooled states survive the next pass."""
    model, other = on_gpu()
    (text,) = prompts(1, 100, 100)
    engine, cpu = Engine(other, rows=4, budget=200), Engine(model, rows=4, budget=200)
    params = SamplingParams(max_new_tokens=12, seed=3, n=3, logprobs=2)
    found, wanted = (drain(e, Request(id="a", tokens=text, params=params)) for e in (engine, cpu))
    for key, events in wanted.items():
        assert tokens(found[key]) == tokens(events)
        for got, want in zip(found[key], events, strict=True):
            assert got.logprob is not None and want.logprob is not None
            assert got.logprob.logprob == pytest.approx(want.logprob.logprob, abs=1e-3)
    pairs = [(text, end) for end in prompts(4, 1, 6, seed=1)]
    for (got_score, _), (want_score, _) in zip(engine.score(pairs), cpu.score(pairs), strict=True):
        assert got_score == pytest.approx(want_score, abs=1e-3)
    short = prompts(3, 2, 12, seed=5)  # chunks so short that they are recorded passes
    for pooling in ("mean", "last"):
        got_D, want_D = (e.embed(short, pooling=pooling) for e in (engine, cpu))
        torch.testing.assert_close(got_D.cpu(), want_D, atol=1e-4, rtol=1e-4)


@pytest.mark.gpu
def test_changed_weights_and_released_memory() -> None:
    """In place the graphs stay; moved weights are recorded anew; after a release the cache is made anew."""
    model, other = on_gpu(seed=2)
    (text,) = prompts(1, 70, 70)
    engine = Engine(other, rows=2, budget=128)

    def check() -> None:
        (events,) = drain(engine, Request(tokens=text, params=CONTROLS[0])).values()
        assert tokens(events)[:30] == plain(model, text, CONTROLS[0])

    check()
    steps = engine._steps
    for one in (model, other):
        for parameter in one.parameters():
            parameter.mul_(1.1)
    engine.refresh()
    assert engine._steps is steps is not None
    check()
    for parameter in other.parameters():
        parameter.data = parameter.data.clone()
    engine.refresh()
    assert engine._steps is None
    check()
    engine.release()
    check()


@pytest.mark.gpu
def test_adapters_beside_rows_without(tmp_path: Path) -> None:
    """Rows with an adapter run unrecorded, the others as before; loading one leaves the base's answers alone."""
    from gemwright.lora import LoraConfig, add_lora, save_adapter

    model, other = on_gpu(seed=4)
    trained = copy.deepcopy(model)
    add_lora(trained, LoraConfig(rank=4, alpha=8, targets=["q_proj", "up_proj"]))
    for name, parameter in trained.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    save_adapter(trained, tmp_path / "one")
    engines = Engine(other, rows=4, budget=64), Engine(model, rows=4, budget=64)
    texts = prompts(4, 20, 50)
    found = []
    for engine in engines:
        before = drain(engine, Request(id="before", tokens=texts[0], params=CONTROLS[0]))
        engine.load_adapter("one", tmp_path / "one")
        requests = [
            Request(id=str(i), tokens=text, params=CONTROLS[0], adapter="one" if i % 2 else None)
            for i, text in enumerate(texts)
        ]
        found.append({key: tokens(events) for key, events in {**before, **drain(engine, *requests)}.items()})
    assert found[0] == found[1]
    assert found[0]["before", 0] == found[0]["0", 0]


@pytest.mark.gpu
def test_many_lengths_and_batches_run() -> None:
    """70 prompts of 70 lengths, in batches of every size up to 24: nothing is compiled without end, nothing fails."""
    model, other = on_gpu(layers=2)
    engine = Engine(other, rows=24, budget=150)
    params = SamplingParams(max_new_tokens=6, temperature=0, stop_ids=frozenset())
    texts = [prompts(1, n, n, seed=n)[0] for n in range(1, 141, 2)]
    requests = (Request(id=str(i), tokens=text, params=params) for i, text in enumerate(texts))
    found = drain(engine, arrivals=requests)
    assert engine.stats.errors == 0
    for i in (0, 20, 69):
        assert tokens(found[str(i), 0]) == plain(model, texts[i], params)
    assert engine._steps is not None
    assert len(engine._steps._graphs) <= len(captured.DECODE) + len(captured.PROMPT)


@pytest.mark.gpu
def test_passes_recorded_ahead_touch_no_page() -> None:
    """Bug caught: recorded over the inputs of another number of rows, a pass took token ids for page numbers."""
    _, other = on_gpu(layers=2)
    cache = PagedCache(other, {GLOBAL: 9, LOCAL: 9})
    steps = Steps(other, cache, context=256)
    with torch.inference_mode():
        steps.decode(chunks_of(prompts(1, 9, 9)[0], 0, [9], [[5, 0, 3]]))
        before = [store[:-1].clone() for store in (*cache.k_PKsH, *cache.v_PKsH)]
        for size in ((64, 1), (2, 1), (6, captured.ROW), (1, captured.ROW)):
            steps.record_ahead(*size)
            assert size in steps._graphs
    for store, then in zip((*cache.k_PKsH, *cache.v_PKsH), before, strict=True):
        assert torch.equal(store[:-1], then)
