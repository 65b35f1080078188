"""The pass in one native call against the model's own forward pass over the same cache; how the engine takes it."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import Tensor, nn

from gemwright.config import ModelConfig
from gemwright.engine import native_steps
from gemwright.engine.engine import Engine
from gemwright.engine.native_steps import NativeSteps
from gemwright.engine.paged import Chunk, PagedCache, read
from gemwright.engine.request import Request
from gemwright.engine.rollout import twin
from gemwright.engine.scheduler import GLOBAL, LOCAL, Kind, Table
from gemwright.model import Gemma2
from gemwright.ops import linear, native
from gemwright.ops.attention import Attention
from gemwright.ops.linear import cpu_linear
from gemwright.sampling import SamplingParams
from gemwright.swap import swap

pytestmark = pytest.mark.skipif(native.library() is None, reason="needs a C compiler")
ODD = {"hidden_size": 50, "intermediate_size": 70, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 10}
EVEN = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
PAGES: dict[Kind, int] = {GLOBAL: 40, LOCAL: 40}


def make(dtype: torch.dtype, **changes: object) -> Gemma2:
    """Three layers whose window of 40 is passed and whose caps are reached."""
    torch.manual_seed(0)
    preset = ModelConfig.preset("debug")
    changes = {"num_hidden_layers": 3, "sliding_window": 40, "layer_types": (), **changes}
    model = Gemma2(dataclasses.replace(preset, **changes), Attention("blocked", "blocked", "blocked"))  # type: ignore[arg-type]
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.2
    return model.to(dtype).eval().requires_grad_(False)


def chunks(*lengths: int) -> list[Chunk]:
    """Sequences whose tokens up to the last few are read already, on pages of their own; the window's page is left."""
    free, made = iter(torch.randperm(40, generator=torch.Generator().manual_seed(1)).tolist()), []
    for length in lengths:
        pages = [next(free) for _ in range(-(-(length + 3) // 32))]
        whole = Table(0, pages, 0)
        gone = max(0, (length - 39) // 32)
        made.append(Chunk([5, 6, 7][: length % 3 + 1], length, {GLOBAL: whole, LOCAL: Table(gone, pages[gone:], 0)}))
    return made


def filled(model: Gemma2) -> PagedCache:
    """A cache that holds something everywhere."""
    cache = PagedCache(model, PAGES)
    for store in (*cache.k_PKsH, *cache.v_PKsH):
        store.copy_(torch.randn(store.shape, generator=torch.Generator().manual_seed(2)))
    return cache


@pytest.mark.parametrize("shape", [ODD, EVEN], ids=["odd", "even"])
@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_the_pass_is_the_models(dtype: torch.dtype, cap: float | None, shape: dict[str, int]) -> None:
    """Hidden states, and the keys and values it leaves; every row's page is another."""
    with torch.inference_mode(False):
        model = make(dtype, attn_logit_softcapping=cap, **shape)
    ours, plain = filled(model), filled(model)
    work = chunks(1, 31, 32, 100, 77, 40)
    got = NativeSteps(model, ours).decode(work)
    want = torch.cat(read(model, plain, work))
    wide = copy.deepcopy(model).float()
    exact = torch.cat(read(wide, filled(wide), work)).double()

    def error(x: Tensor) -> float:
        return float((x.double() - exact).norm() / exact.norm())

    assert got.shape == want.shape == (sum(len(c.tokens) for c in work), model.config.hidden_size)
    assert error(got) <= 1.2 * error(want) + 1e-5
    for mine, theirs in zip((*ours.k_PKsH, *ours.v_PKsH), (*plain.k_PKsH, *plain.v_PKsH), strict=True):
        torch.testing.assert_close(mine[:-1], theirs[:-1], rtol=0.05, atol=0.02)


@torch.inference_mode()
def test_a_page_that_is_not_there_is_an_error() -> None:
    with torch.inference_mode(False):
        model = make(torch.float32)
    steps = NativeSteps(model, filled(model))
    for table in (Table(0, [0], 0), Table(0, [0, 40], 0), Table(2, [0, 1], 0)):
        with pytest.raises(AssertionError, match="not in its table"):
            steps.decode([Chunk([5], 40, {GLOBAL: table, LOCAL: table})])


@pytest.mark.skipif(not native.has_tiles(), reason="this processor has no matrix tiles (AMX)")
@torch.inference_mode()
def test_prompts_attend_to_gathered_keys_where_that_is_faster() -> None:
    """Chunks of several lengths, the first of their sequence and later ones, on both ways of reading the pages."""
    with torch.inference_mode(False):
        model = make(torch.bfloat16, **EVEN)
    starts, counts = (0, 37, 64), (40, 20, 59)
    ids, tables = iter(range(40)), []
    for start, count in zip(starts, counts, strict=True):
        tables.append(Table(0, [next(ids) for _ in range(-(-(start + count) // 32))], 0))
    work = [
        Chunk([*range(5, 5 + count)], start, {GLOBAL: table, LOCAL: table})
        for start, count, table in zip(starts, counts, tables, strict=True)
    ]
    found = []
    for gathers in (True, False):
        cache = filled(model)
        assert cache.gathers
        cache.gathers = gathers
        found.append(torch.cat(read(model, cache, work)).float())
    assert found[0].shape == (sum(counts), model.config.hidden_size)
    assert float((found[0] - found[1]).norm() / found[1].norm()) < 0.03


@pytest.mark.parametrize("gathers", [True, False])
@torch.inference_mode()
def test_what_other_rows_left_in_a_page_is_not_read(gathers: bool) -> None:
    with torch.inference_mode(False):
        model = make(torch.bfloat16, **EVEN)
    cache = PagedCache(model, PAGES)
    cache.gathers = gathers
    for store in (*cache.k_PKsH, *cache.v_PKsH):
        store.fill_(torch.nan)
    table = Table(0, [3, 4], 0)
    (hidden,) = read(model, cache, [Chunk([*range(5, 45)], 0, {GLOBAL: table, LOCAL: table})])
    assert hidden.isfinite().all()


def test_only_plain_models_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are found in every form that holds them as they lie, and only there."""
    model = make(torch.bfloat16)
    assert NativeSteps(model, PagedCache(model, PAGES)).rows == linear.most_rows(torch.bfloat16)
    assert NativeSteps(twin(model), PagedCache(model, PAGES)).rows == linear.most_rows(torch.bfloat16)
    packed = copy.deepcopy(model)
    swap(packed, {".*": lambda _, module: cpu_linear(module)})
    kept = not any(isinstance(module, linear.PackedLinear) for module in packed.modules())
    assert (NativeSteps(packed, PagedCache(packed, PAGES)).rows > 0) == kept
    mixed = copy.deepcopy(model)
    mixed.model.norm.float()
    assert NativeSteps(mixed, PagedCache(mixed, PAGES)).rows == 0
    biased = copy.deepcopy(model)
    biased.model.layers[1].mlp.down_proj = nn.Linear(biased.config.intermediate_size, biased.config.hidden_size)  # type: ignore[union-attr]
    assert NativeSteps(biased, PagedCache(biased, PAGES)).rows == 0
    monkeypatch.setattr(native, "library", lambda: None)
    assert NativeSteps(model, PagedCache(model, PAGES)).rows == 0


def test_the_engine_follows_weights_that_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights changed in place are read as they are; where other tensors took their place, after `refresh`."""
    monkeypatch.setattr(native_steps, "most_rows", lambda _: 100)
    model = make(torch.float32)
    engine = Engine(model, rows=2, budget=32)

    def answer(engine: Engine) -> list[int | None]:
        params = SamplingParams(max_new_tokens=12, temperature=0)
        return [event.token for event in engine.stream([Request(tokens=[9, 8, 7], params=params)])]

    answer(engine)
    for change in ("in place", "replaced"):
        torch.manual_seed(len(change))
        for parameter in model.parameters():
            value = torch.randn_like(parameter) * 0.2
            if change == "in place":
                parameter.copy_(value)
            else:
                parameter.data = value
        engine.refresh()
        assert answer(engine) == answer(Engine(copy.deepcopy(model), rows=2, budget=32)), change
