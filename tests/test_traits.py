"""Each trait of Gemma 2, through each way into the model: ours equals the oracle, and changing the trait moves both.

A change is made in the config where it is a number there, else in the arithmetic of both models. Either way the changed
models still agree with each other, and both differ from the unchanged ones: a trait that one of them lost would show.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from oracle import (
    ENTRIES,
    TOLERANCE,
    Oracle,
    debug,
    distance,
    oracle,
    oracle_logits,
    ours,
    pair,
    relative,
    tokens,
    weights,
)
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.gemma2 import modeling_gemma2

from gemwright.config import GLOBAL, LOCAL
from gemwright.model import Gemma2
from gemwright.ops.attention import Visibility, reference
from gemwright.ops.norm import RMSNorm
from gemwright.ops.rope import rope_tables

T = 20
"""Tokens: past the debug preset's window of 8, and past every ring of it."""
WAYS = [entry for entry in ENTRIES if entry not in ("mixed", "right", "left_cached")]
"""The entries that each trait goes through; the plain model goes through all."""
MOVED = 20 * TOLERANCE
"""A changed trait moves the output by at least this much."""

Patch = pytest.MonkeyPatch
Change = Callable[[Gemma2, Oracle, Patch], None]

CONFIG_TRAITS: dict[str, dict[str, object]] = {
    "attention_cap_off": {"attn_logit_softcapping": None},
    "attention_cap": {"attn_logit_softcapping": 40.0},
    "final_cap_off": {"final_logit_softcapping": None},
    "final_cap": {"final_logit_softcapping": 25.0},
    "window_one_less": {"sliding_window": 7},
    "window_one_more": {"sliding_window": 9},
    "query_scale": {"query_pre_attn_scalar": 16},
    "rope_theta": {"rope_theta": 500.0},
    "eps": {"rms_norm_eps": 0.1},
    "layer_order": {"layer_types": [GLOBAL, LOCAL, GLOBAL]},
    "all_global": {"layer_types": [GLOBAL] * 3},
    "all_local": {"layer_types": [LOCAL] * 3},
}


def _norm_without_one(a: Gemma2, b: Oracle, patch: Patch) -> None:
    def forward(norm: RMSNorm | modeling_gemma2.Gemma2RMSNorm, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], norm.weight, norm.eps)

    patch.setattr(RMSNorm, "forward", forward)
    patch.setattr(modeling_gemma2.Gemma2RMSNorm, "forward", forward)


def _embedding_scale_doubled(a: Gemma2, b: Oracle, patch: Patch) -> None:
    """Doubled, not removed: a smaller scale makes the oracle move by 3e-4 when its weights move by a rounding."""
    for embedding in (a.model.embed_tokens, b.model.embed_tokens):
        embedding.register_forward_hook(lambda module, args, x: x * 2)


def _silu(a: Gemma2, b: Oracle, patch: Patch) -> None:
    patch.setattr("gemwright.model.gated_gelu", lambda gate, up: F.silu(gate) * up)
    for layer in b.model.layers:
        layer.mlp.act_fn = nn.SiLU()


def _without(norm: str, a: Gemma2, b: Oracle, patch: Patch) -> None:
    for layer in (*a.model.layers, *b.model.layers):
        setattr(layer, norm, nn.Identity())


def _untied(a: Gemma2, b: Oracle, patch: Patch) -> None:
    other = torch.randn_like(a.lm_head.weight) * a.lm_head.weight.std()
    a.lm_head.weight, b.lm_head.weight = nn.Parameter(other), nn.Parameter(other)


ARITHMETIC_TRAITS: dict[str, Change] = {
    "norm_one_plus_weight": _norm_without_one,
    "embedding_scale": _embedding_scale_doubled,
    "activation": _silu,
    "input_norm": partial(_without, "input_layernorm"),
    "post_attention_norm": partial(_without, "post_attention_layernorm"),
    "pre_feedforward_norm": partial(_without, "pre_feedforward_layernorm"),
    "post_feedforward_norm": partial(_without, "post_feedforward_layernorm"),
    "tied_head": _untied,
}


@pytest.fixture(scope="module")
def prompt() -> Tensor:
    return tokens(debug(), 2, T)


@pytest.fixture(scope="module")
def plain(prompt: Tensor) -> Tensor:
    """The oracle's logits with every trait in place."""
    return oracle_logits(pair(debug())[1], prompt)


@pytest.mark.parametrize("entry", ENTRIES)
def test_plain_model_equals_the_oracle(entry: str, prompt: Tensor, plain: Tensor) -> None:
    assert distance(ENTRIES[entry](ours(debug(), weights(debug())), prompt), plain) < TOLERANCE


@pytest.mark.parametrize("entry", WAYS)
@pytest.mark.parametrize("trait", CONFIG_TRAITS)
def test_config_trait(trait: str, entry: str, prompt: Tensor, plain: Tensor) -> None:
    a, b = pair(debug(**CONFIG_TRAITS[trait]))
    want, got = oracle_logits(b, prompt), ENTRIES[entry](a, prompt)
    assert distance(want, plain) > MOVED
    assert distance(got, plain) > MOVED
    assert distance(got, want) < TOLERANCE


@pytest.mark.parametrize("entry", WAYS)
@pytest.mark.parametrize("trait", ARITHMETIC_TRAITS)
def test_arithmetic_trait(trait: str, entry: str, prompt: Tensor, plain: Tensor, monkeypatch: Patch) -> None:
    a, b = pair(debug())
    ARITHMETIC_TRAITS[trait](a, b, monkeypatch)
    want, got = oracle_logits(b, prompt), ENTRIES[entry](a, prompt)
    assert distance(want, plain) > MOVED
    assert distance(got, plain) > MOVED
    assert distance(got, want) < TOLERANCE


@pytest.mark.parametrize("entry", ["forward", "prefill", "packed"])
def test_grouped_heads_share_neighbours(entry: str, prompt: Tensor, plain: Tensor) -> None:
    """Query heads 2i and 2i + 1 read key head i: [a a b b] is the model with key heads [a b], [a b a b] is another."""
    config, K = debug(num_key_value_heads=4), debug().num_key_value_heads

    def expanded(repeat: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        state = weights(debug())
        for name, w in state.items():
            if "k_proj" in name or "v_proj" in name:
                state[name] = repeat(w.view(K, -1, w.shape[1])).flatten(0, 1)
        return state

    neighbours = expanded(lambda w: w.repeat_interleave(2, dim=0))
    assert distance(ENTRIES[entry](ours(config, neighbours), prompt), plain) < TOLERANCE
    in_turn = expanded(lambda w: w.repeat(2, 1, 1))
    want, got = oracle_logits(oracle(config, in_turn), prompt), ENTRIES[entry](ours(config, in_turn), prompt)
    assert distance(want, plain) > MOVED
    assert distance(got, want) < TOLERANCE


def test_exact_gelu_is_told_apart(prompt: Tensor, plain: Tensor) -> None:
    """The tanh form differs from the exact GELU by less than 1e-3 a value; the tolerance still sees it."""
    _, b = pair(debug())
    for layer in b.model.layers:
        layer.mlp.act_fn = nn.GELU()
    assert distance(oracle_logits(b, prompt), plain) > 2 * TOLERANCE


def test_embedding_scale_does_not_leak_into_the_head(prompt: Tensor) -> None:
    a, _ = pair(debug())
    hidden = torch.randn(5, 48)
    want = 30 * torch.tanh(hidden @ a.model.embed_tokens.weight.T / 30)
    assert relative(a.logits(hidden), want) < 1e-6


def test_caps_and_window_bite(prompt: Tensor) -> None:
    """The premise of all above: scores past the cap in every layer, logits past theirs, more tokens than the window."""
    config = debug()
    a, b = pair(config)
    scores: list[float] = []

    def spy(q: Tensor, k: Tensor, v: Tensor, see: Visibility, *, scale: float, cap: float | None) -> Tensor:
        raw = torch.einsum("btnh,bsnh->bnts", q, k.repeat_interleave(config.group_size, dim=2)) * scale
        scores.append(float(raw.abs().quantile(0.9)))
        return reference(q, k, v, see, scale=scale, cap=cap)

    x = a.model.embed_tokens(prompt) * config.hidden_size**0.5
    pos = torch.arange(T).expand(2, T)
    for block in a.model.layers:
        x = block(x, Visibility(pos, pos), rope_tables(pos, config.head_dim, config.rope_theta), spy, None)
    raw_logits = b.lm_head(b.model(prompt).last_hidden_state)
    assert config.attn_logit_softcapping is not None
    assert config.final_logit_softcapping is not None
    assert min(scores) > config.attn_logit_softcapping, scores
    assert float(raw_logits.abs().max()) > 2 * config.final_logit_softcapping
    assert config.sliding_window < T
