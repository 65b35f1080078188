"""Ballast: norms that pass a sub-layer's output at its own size.

Legend: B rows, T tokens, D model, L layers.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from adopt_fixtures import LLAMA, Weights
from safetensors.torch import load_file, save_file
from torch import Tensor

from gemwright.adopt import adopted_config, adopted_tensors, calibrate, carried, distance, model_of
from gemwright.ballast import ATTENTION, FEED_FORWARD, GELU_AT_MINIMUM, GELU_MINIMUM, Ballast, ballast
from gemwright.llama import EMBEDDING, Llama
from gemwright.model import Block, Gemma2

D, V = 64, 300
CONFIG = replace(
    adopted_config({**LLAMA, "hidden_size": D, "intermediate_size": 160}),
    final_logit_softcapping=None,  # what the cap costs is lowering's matter
)


def source(mean: float = 2.0) -> Weights:
    """A Llama whose stream has a mean, and whose outputs have many sizes."""
    generator = torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = {}
    side_D = torch.nn.functional.normalize(torch.randn(D, generator=generator), dim=0)
    for name, shape in CONFIG.parameter_shapes().items():
        state[name] = (
            torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) / shape[1] ** 0.5
        )
        if "gate_proj" in name:  # tokens on the one side of a plane open all gates, those on the other side none
            state[name] += 4 * side_D
    state[EMBEDDING] *= torch.randn(V, 1, generator=generator).abs() + 0.3
    state[EMBEDDING] += mean * torch.randn(D, generator=generator) * state[EMBEDDING].norm(dim=1, keepdim=True) / D**0.5
    return Weights(state)


def text(seed: int) -> Tensor:
    return torch.randint(V, (8, 120), generator=torch.Generator().manual_seed(seed))


def adopted(llama: Llama, weights: Weights) -> Gemma2:
    return model_of(CONFIG, dict(adopted_tensors(weights, CONFIG, calibrate(llama, text(0)))))


@pytest.fixture(scope="module")
def fitted() -> tuple[Llama, Gemma2, Gemma2, Ballast]:
    """A source, the adopted model without and with a ballast, and the ballast."""
    weights = source()
    llama = Llama(weights, CONFIG)
    plain, model = adopted(llama, weights), adopted(llama, weights)
    return llama, plain, model, ballast(model, text(0))


def test_the_constants_are_those_of_the_activation() -> None:
    x = torch.linspace(-1, -0.5, 100001, dtype=torch.float64)
    y = torch.nn.functional.gelu(x, approximate="tanh")
    assert float(x[y.argmin()]) == pytest.approx(GELU_MINIMUM, abs=1e-4)
    assert float(y.min()) == pytest.approx(GELU_AT_MINIMUM, abs=1e-5)


def test_the_model_comes_nearer_to_its_source(fitted: tuple[Llama, Gemma2, Gemma2, Ballast]) -> None:
    llama, plain, model, _ = fitted
    assert distance(llama, model, text(1)) < 0.4 * distance(llama, plain, text(1))


def test_outputs_pass_at_their_own_size(fitted: tuple[Llama, Gemma2, Gemma2, Ballast]) -> None:
    """On unseen text each norm's output is sqrt(D) times its input, but for the dimension that is given up."""
    _, _, model, found = fitted
    at, caught = int(found.dimension), []
    for block in model.model.layers:
        assert isinstance(block, Block)
        for norm in (block.post_attention_layernorm, block.post_feedforward_layernorm):
            caught.append(norm.register_forward_hook(lambda norm, args, out: seen.append((args[0], out))))
    seen: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        model(text(1), torch.arange(120).expand(8, -1))
    for hook in caught:
        hook.remove()
    assert len(seen) == 2 * CONFIG.num_hidden_layers
    for half, (out, passed) in enumerate(seen):
        size = float(found.size_L2[half // 2, half % 2])
        assert float((out[..., at] / size - 1).abs().mean()) < (0.05 if half % 2 else 0.1)
        assert float(passed[..., at].abs().max()) == 0
        rest = torch.arange(D) != at
        torch.testing.assert_close(
            passed[..., rest].norm() / out[..., rest].norm(), torch.tensor(8.0), rtol=0.1, atol=0
        )


def test_what_is_touched(fitted: tuple[Llama, Gemma2, Gemma2, Ballast]) -> None:
    """The seven modules of a layer that carry it, in a few rows and columns; nothing of what it is given."""
    _, plain, model, found = fitted
    before = {name: weight.bfloat16().float() for name, weight in plain.named_parameters()}
    for name, weight in model.named_parameters():
        was = before[name].clone()
        applied = found.apply(name, before[name])
        assert torch.equal(before[name], was)
        assert torch.equal(applied.bfloat16().float(), weight)
        assert torch.equal(applied, was) == (name.split(".")[-2] not in (*ATTENTION, *FEED_FORWARD))
        if "mlp" in name or "_proj" in name:
            assert int((applied != was).any(1).sum()) <= (len(was) if "o_proj" in name or "down_proj" in name else 2)
            assert int((applied != was).any(0).sum()) <= (was.shape[1] if len(was) else 0)


def test_a_file_holds_it(fitted: tuple[Llama, Gemma2, Gemma2, Ballast], tmp_path: Path) -> None:
    _, plain, _, found = fitted
    save_file(found.state(), tmp_path / "ballast.safetensors")
    again = Ballast.of(load_file(tmp_path / "ballast.safetensors"), CONFIG)
    assert again is not None
    for name, weight in plain.named_parameters():
        assert torch.equal(again.apply(name, weight), found.apply(name, weight))
    assert Ballast.of({"model.norm.weight": torch.ones(D)}, CONFIG) is None


def test_constant_gains_stay_where_they_are_nearer() -> None:
    """Without a mean there is no f: normed inputs of all directions have no common product."""
    weights = source(mean=0.0)
    llama = Llama(weights, CONFIG)
    model, kl = carried(weights, llama, text(0))
    gains = model.get_parameter("model.layers.1.post_feedforward_layernorm.weight")
    assert bool((gains == gains[0]).all())
    assert kl == pytest.approx(distance(llama, model, text(0)[-1:]))
    weights = source()
    llama = Llama(weights, CONFIG)
    model, kl = carried(weights, llama, text(0))
    gains = model.get_parameter("model.layers.1.post_feedforward_layernorm.weight")
    assert int((gains == -1).sum()) == 1
    assert kl == pytest.approx(distance(llama, model, text(0)[-1:]))
