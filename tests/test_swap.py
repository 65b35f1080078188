"""swap replaces the named linears and nothing else, and a pattern that matches nothing is an error."""

from __future__ import annotations

import pytest
import torch
from oracle import debug, forward, ours, relative, tokens, weights
from torch import Tensor, nn

from gemwright.swap import swap


class Doubled(nn.Module):
    """A linear whose output is doubled, so that a swap is seen in the numbers."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.linear(x)  # type: ignore[no-any-return]


def test_only_the_named_linears_change() -> None:
    config = debug()
    model, text = ours(config, weights(config)), tokens(debug(), 1, 12)
    state = weights(config)
    state["model.layers.1.self_attn.v_proj.weight"] *= 2
    want = forward(ours(config, state), text)
    names: list[str] = []

    def make(name: str, linear: nn.Linear) -> nn.Module:
        names.append(name)
        return Doubled(linear)

    assert swap(model, {r"model\.layers\.1\.self_attn\.v_proj": make}) == names
    assert names == ["model.layers.1.self_attn.v_proj"]
    assert relative(forward(model, text), want) < 1e-6


def test_the_head_alone() -> None:
    """The head shares the embedding's parameter; swapping it leaves the embedding as it is."""
    config = debug()
    model = ours(config, weights(config))
    assert swap(model, {"lm_head": lambda _, linear: Doubled(linear)}) == ["lm_head"]
    hidden = torch.randn(3, 48)
    want = 30 * torch.tanh(2 * hidden @ model.model.embed_tokens.weight.T / 30)
    assert relative(model.logits(hidden), want) < 1e-6


def test_first_pattern_wins_and_whole_names_match() -> None:
    model = ours(debug(), weights(debug()))
    seen: dict[str, list[str]] = {"first": [], "second": []}

    def make(key: str, name: str, linear: nn.Linear) -> nn.Module:
        seen[key].append(name)
        return linear

    swap(
        model,
        {
            r"model\.layers\.0\.mlp\.\w+": lambda name, linear: make("first", name, linear),
            r".*\.(gate|up|down)_proj": lambda name, linear: make("second", name, linear),
        },
    )
    assert seen["first"] == [f"model.layers.0.mlp.{x}_proj" for x in ("gate", "up", "down")]
    assert seen["second"] == [f"model.layers.{i}.mlp.{x}_proj" for i in (1, 2) for x in ("gate", "up", "down")]
    for part in ("q_proj", r"model\.layers\.0\.mlp"):  # the end or the head of a name is no name
        with pytest.raises(ValueError, match="no linear matches"):
            swap(model, {part: lambda _, linear: linear})


def test_a_pattern_without_a_match_is_an_error() -> None:
    model = ours(debug(), weights(debug()))
    with pytest.raises(
        ValueError, match=r"no linear matches \['model\.layers\.9.*named like 'model.layers.0.self_attn"
    ):
        swap(model, {".*o_proj": lambda _, linear: linear, "model.layers.9.*": lambda _, linear: linear})
