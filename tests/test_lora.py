"""LoRA: a fresh adapter is the identity, a trained one equals its fused weight, and only it is trained."""

from __future__ import annotations

import pytest
import torch
from oracle import debug, forward, ours, positions, relative, tokens, weights
from torch import nn

from gemwright.lora import ALL_LINEAR, LoRALinear, add_lora, fuse

CONFIG = debug()
RANK = 3


def test_a_fresh_adapter_is_the_identity() -> None:
    model, text = ours(CONFIG, weights(CONFIG)), tokens(CONFIG, 2, 12)
    want = forward(model, text)
    names = add_lora(model, RANK, scale=2.0)
    assert len(names) == 7 * CONFIG.num_hidden_layers
    assert "lm_head" not in names
    assert torch.equal(forward(model, text), want)


@pytest.mark.parametrize("scale", [1.0, 0.25, 2.0])
def test_fuse_equals_apply(scale: float) -> None:
    state, text = weights(CONFIG), tokens(CONFIG, 2, 12)
    model = ours(CONFIG, state)
    plain = forward(model, text)
    for name in add_lora(model, RANK, scale=scale):
        layer = model.get_submodule(name)
        assert isinstance(layer, LoRALinear)
        nn.init.normal_(layer.lora_B, std=0.05)
        fused = fuse(state[f"{name}.weight"], layer.lora_A, layer.lora_B, scale=scale)
        by_hand = state[f"{name}.weight"] + scale * layer.lora_B @ layer.lora_A
        torch.testing.assert_close(fused, by_hand)
        state[f"{name}.weight"] = fused.detach()
    want = forward(ours(CONFIG, state), text)
    assert relative(want, plain) > 1e-2  # the adapters do change the model
    assert relative(forward(model, text), want) < 1e-4


def test_fuse_rounds_once() -> None:
    """bf16 factors: product and sum are exact to fp32, and the weight is the nearest bf16 to W + s B A."""
    weight, a, b = (torch.randn(shape).bfloat16() for shape in ((40, 30), (4, 30), (40, 4)))
    fused = fuse(weight, a, b, scale=0.5)
    assert fused.dtype == torch.bfloat16
    assert torch.equal(fused, (weight.double() + 0.5 * b.double() @ a.double()).bfloat16())
    assert not torch.equal(fused, weight + 0.5 * (b @ a))  # two roundings more


def test_only_the_adapter_learns() -> None:
    model = ours(CONFIG, weights(CONFIG)).requires_grad_()
    add_lora(model, RANK, targets=r".*\.q_proj")
    hidden = model(tokens(CONFIG, 1, 9), positions(1, 9))
    linears = [m for m in model.modules() if isinstance(m, LoRALinear)]
    assert len(linears) == CONFIG.num_hidden_layers
    for layer in linears:
        assert not layer.base.weight.requires_grad
        grad_a, grad_b = torch.autograd.grad(hidden.square().sum(), [layer.lora_A, layer.lora_B], retain_graph=True)
        assert not grad_a.any()  # B is 0, so A has no gradient yet
        assert grad_b.any()
        assert layer.lora_A.dtype == layer.base.weight.dtype


def test_adapter_takes_the_dtype_of_its_linear() -> None:
    layer = LoRALinear(nn.Linear(8, 6, bias=False, dtype=torch.bfloat16), RANK)
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    assert layer.lora_A.shape == (RANK, 8)
    assert layer.lora_B.shape == (6, RANK)
    wide = LoRALinear(nn.Linear(4096, 2, bias=False), 64)
    assert float(wide.lora_A.detach().std()) == pytest.approx(1 / 64, rel=0.02)


def test_targets_without_a_match_are_an_error() -> None:
    model = ours(CONFIG, weights(CONFIG))
    with pytest.raises(ValueError, match="no linear matches"):
        add_lora(model, RANK, targets="q_proj")
    add_lora(model, RANK, targets=ALL_LINEAR)
    with pytest.raises(ValueError, match="no linear matches"):
        add_lora(model, RANK)  # an adapter on an adapter: its inner linears are named `.base`
