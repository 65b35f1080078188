"""Lowering: what softmax does not see, and what the first layer reads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from adopt_fixtures import LLAMA, Weights
from safetensors.torch import load_file, save_file
from torch import Tensor

from gemwright.adopt import adopted_config, adopted_tensors
from gemwright.config import ModelConfig
from gemwright.llama import EMBEDDING, Llama, LlamaLayer
from gemwright.lowering import Lowering, lowering

CONFIG = adopted_config({**LLAMA, "hidden_size": 32, "intermediate_size": 64})


def source(config: ModelConfig = CONFIG, gain: float = 6.0) -> Weights:
    """A Llama whose hidden states have a large mean: logits of a token lie together, far from zero."""
    generator = torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = {}
    for name, shape in config.parameter_shapes().items():
        if len(shape) == 1:
            state[name] = torch.ones(shape)
        else:
            state[name] = torch.randn(shape, generator=generator) / shape[1] ** 0.5
    offset_D = torch.randn(config.hidden_size, generator=generator)
    for i in range(config.num_hidden_layers):  # silu(x) x has a mean, so each layer adds the same offset
        mlp = f"model.layers.{i}.mlp"
        state[f"{mlp}.up_proj.weight"] = state[f"{mlp}.gate_proj.weight"].clone()
        state[f"{mlp}.down_proj.weight"] *= 10
        state[f"{mlp}.down_proj.weight"] += 0.3 * offset_D[:, None]
    state[EMBEDDING] += 0.5 * offset_D / offset_D.norm()
    state["model.norm.weight"] *= gain
    return Weights(state)


def text(seed: int) -> Tensor:
    return torch.randint(300, (4, 200), generator=torch.Generator().manual_seed(seed))


def read(llama: Llama) -> tuple[LlamaLayer, Tensor]:
    """The first layer's record and the logits of unseen text."""
    first, *_, hidden = llama.layers(text(1), torch.arange(200).expand(4, -1))
    assert isinstance(first, LlamaLayer)
    assert isinstance(hidden, Tensor)
    return first, hidden @ llama.head.T


def lowered(llama: Llama, lower: Lowering) -> Llama:
    return llama.replaced({name: lower.apply(name, weight) for name, weight in llama.weights.items()})


def test_the_cap_costs_less_and_nothing_else_is_lost() -> None:
    llama = Llama(source(), CONFIG)
    lower = lowering(llama, text(0))
    assert lower is not None
    (first, plain), (other, shifted) = read(llama), read(lowered(llama, lower))
    truth = plain.log_softmax(-1)

    def kl(logits: Tensor) -> float:
        return float((truth.exp() * (truth - logits.log_softmax(-1))).sum(-1).mean())

    capped, capped_after = (kl(30 * torch.tanh(x / 30)) for x in (plain, shifted))
    assert kl(shifted) < 0.2 * capped
    assert capped_after < 0.3 * capped
    assert 0 < float(shifted.amax(-1).median()) < 10 < float(plain.amax(-1).median())
    for linear, field in (("self_attn.q_proj", "attention_in"), ("mlp.up_proj", "feedforward_in")):
        name = f"model.layers.0.{linear}.weight"
        was = getattr(first, field) @ llama.weights[name].T
        now = getattr(other, field) @ lower.apply(name, llama.weights[name]).T
        untouched = getattr(other, field) @ llama.weights[name].T
        assert (now - was).norm() < 0.6 * (untouched - was).norm()


def test_what_is_touched() -> None:
    """Every row of the embedding by one vector, five linears of the first layer; an adopted model by the same."""
    llama = Llama(source(), CONFIG)
    lower = lowering(llama, text(0))
    assert lower is not None
    plain = dict(adopted_tensors(source(), CONFIG, {}))
    found = dict(adopted_tensors(source(), CONFIG, {}, lower))
    changed = {name for name, tensor in found.items() if not torch.equal(tensor, plain[name])}
    linears = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    assert changed == {EMBEDDING, *(f"model.layers.0.{linear}.weight" for linear in linears)}
    torch.testing.assert_close(found[EMBEDDING] - plain[EMBEDDING], lower.shift_D.expand(300, -1), atol=1e-5, rtol=0)
    name = "model.layers.0.mlp.gate_proj.weight"
    turn = lower.turns["feedforward_in"]
    turn_DD = turn.scale * torch.eye(32) + turn.left_Dr @ turn.right_rD
    torch.testing.assert_close(found[name] * 1.702, llama.weights[name] @ turn_DD, atol=1e-5, rtol=1e-5)


def test_a_file_holds_it(tmp_path: Path) -> None:
    llama = Llama(source(), CONFIG)
    lower = lowering(llama, text(0))
    assert lower is not None
    save_file(lower.state(), tmp_path / "lower.safetensors")
    again = Lowering.of(load_file(tmp_path / "lower.safetensors"))
    assert again is not None
    for name, weight in llama.weights.items():
        assert torch.equal(again.apply(name, weight), lower.apply(name, weight))
    assert Lowering.of({"model.norm.weight": torch.ones(32)}) is None


@pytest.mark.parametrize(
    ("config", "gain"),
    [(replace(CONFIG, final_logit_softcapping=None), 6.0), (CONFIG, 0.1)],
    ids=["no cap", "small logits"],
)
def test_where_nothing_is_to_be_won_nothing_is_touched(config: ModelConfig, gain: float) -> None:
    assert lowering(Llama(source(config, gain), config), text(0)) is None
