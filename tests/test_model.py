"""Gemma2 against the oracle on unusual shapes, and what the module promises about its parameters and dtypes.

Legend: B rows, T tokens, D model, V vocabulary.
"""

from __future__ import annotations

import math

import pytest
import torch
from oracle import (
    ENTRIES,
    TOLERANCE,
    debug,
    distance,
    forward,
    oracle_logits,
    ours,
    pair,
    positions,
    read,
    relative,
    tokens,
    weights,
)
from torch import nn
from torch.nn import functional as F

from gemwright.cache import KVCache
from gemwright.config import GLOBAL, LOCAL, ModelConfig
from gemwright.model import Gemma2
from gemwright.ops.attention import PADDING, Attention
from gemwright.ops.norm import RMSNorm
from gemwright.ops.rope import rope_tables, rotate

T = 22
SHAPES: dict[str, dict[str, object]] = {
    "one_layer": {"num_hidden_layers": 1},
    "five_layers": {"num_hidden_layers": 5},
    "heads_wider_than_hidden": {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 20},
    "heads_narrower_than_hidden": {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 6},
    "one_kv_head": {"num_key_value_heads": 1},
    "as_many_kv_heads": {"num_key_value_heads": 4},
    "no_caps": {"attn_logit_softcapping": None, "final_logit_softcapping": None},
    "tight_caps": {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 8.0},
    "cap_past_the_safe_one": {"attn_logit_softcapping": 90.0},
    "window_1": {"sliding_window": 1},
    "window_3": {"sliding_window": 3},
    "window_T": {"sliding_window": T},
    "window_past_T": {"sliding_window": 4 * T},
    "all_local": {"layer_types": [LOCAL] * 3},
    "all_global": {"layer_types": [GLOBAL] * 3},
    "reversed": {"layer_types": [GLOBAL, LOCAL, GLOBAL]},
    "last_local": {"layer_types": [GLOBAL, GLOBAL, LOCAL]},
    "scalar_not_square": {"query_pre_attn_scalar": 7},
    "scalar_small": {"query_pre_attn_scalar": 1},
    "rope_small": {"rope_theta": 100.0},
    "rope_large": {"rope_theta": 1e6},
    "eps_large": {"rms_norm_eps": 1e-2},
    "odd_feed_forward": {"intermediate_size": 31, "vocab_size": 131, "eos_token_id": [1, 107]},
}


@pytest.mark.parametrize("entry", ["forward", "mixed", "left_cached", "packed"])
@pytest.mark.parametrize("shape", SHAPES)
def test_shape(shape: str, entry: str) -> None:
    config = debug(**SHAPES[shape])
    a, b = pair(config, seed=2)
    text = tokens(config, 2, T)
    assert distance(ENTRIES[entry](a, text), oracle_logits(b, text)) < TOLERANCE


@pytest.mark.parametrize("entry", ENTRIES)
def test_reference_backend(entry: str) -> None:
    a, b = pair(debug(), "reference")
    text = tokens(debug(), 2, T)
    assert distance(ENTRIES[entry](a, text), oracle_logits(b, text)) < TOLERANCE


def test_shape_of_27b_in_small() -> None:
    """What sets 27B apart: heads x head size below hidden, and a scale of hidden / heads instead of the head size."""
    big = ModelConfig.preset("gemma-2-27b")
    config = debug(hidden_size=72, num_attention_heads=4, num_key_value_heads=2, head_dim=16, query_pre_attn_scalar=18)
    assert big.num_attention_heads * big.head_dim < big.hidden_size
    assert config.num_attention_heads * config.head_dim < config.hidden_size
    assert big.query_pre_attn_scalar == big.hidden_size / big.num_attention_heads
    a, b = pair(config)
    text = tokens(config, 2, T)
    assert distance(forward(a, text), oracle_logits(b, text)) < TOLERANCE


def test_gradients_equal_the_oracles() -> None:
    """Every parameter's gradient of a cross-entropy through caps, window, norms and the tied head, padding left out."""
    config = debug()
    a, b = pair(config)
    a.requires_grad_()
    b.requires_grad_()
    text = tokens(config, 2, T)
    target = text.roll(-1, dims=1)
    theirs = F.cross_entropy(b(text, use_cache=False).logits.flatten(0, 1), target.flatten())
    want = dict(zip(dict(b.named_parameters()), torch.autograd.grad(theirs, list(b.parameters())), strict=True))
    padded, pos = F.pad(text, (3, 0)), F.pad(positions(2, T), (3, 0), value=PADDING)
    mine = F.cross_entropy(a.logits(a(padded, pos)[:, 3:]).flatten(0, 1), target.flatten())
    got = dict(zip(dict(a.named_parameters()), torch.autograd.grad(mine, list(a.parameters())), strict=True))
    assert relative(mine, theirs) < 1e-5
    assert got.keys() == want.keys()
    for name in want:
        assert relative(got[name], want[name]) < 10 * TOLERANCE, name


def test_bf16_is_near_the_oracle_in_bf16() -> None:
    """Narrow weights, so that rounding does not drown the model: as near to fp32, in KL, as the oracle in bf16."""
    config = debug()
    state = {name: w * (0.2 if "proj" in name or "embed" in name else 1) for name, w in weights(config).items()}
    text = tokens(config, 2, T)
    truth = forward(ours(config, state), text).log_softmax(-1)

    a = ours(config, state).to(torch.bfloat16)
    _, b = pair(config)
    b.load_state_dict({**state, "lm_head.weight": state["model.embed_tokens.weight"]})
    b = b.to(torch.bfloat16)
    mine = a.logits(a(text, positions(2, T)))
    assert mine.dtype == torch.float32
    theirs = oracle_logits(b, text).float()

    def kl(logits: torch.Tensor) -> float:
        return float((truth.exp() * (truth - logits.log_softmax(-1))).sum(-1).mean())

    assert kl(mine) < 1.5 * kl(theirs) + 1e-4
    assert kl(mine) < 0.01


def test_embedding_scale_is_rounded_to_the_dtype() -> None:
    """sqrt(3584) is 59.866, and 59.75 in bf16: what the released weights were trained with."""
    config = debug(hidden_size=3584, num_hidden_layers=1, vocab_size=8)
    assert float(torch.tensor(math.sqrt(3584), dtype=torch.bfloat16)) == 59.75
    model = Gemma2(config).to(torch.bfloat16).requires_grad_(False)
    seen: list[torch.Tensor] = []
    model.model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(torch.tensor([[3]]), torch.tensor([[0]]))
    assert torch.equal(seen[0][0, 0], model.model.embed_tokens.weight[3] * 59.75)


def test_head_is_the_embedding() -> None:
    model = Gemma2(debug())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    names = {name for name, _ in model.named_parameters()}
    assert names == set(debug().parameter_shapes())
    assert sum(p.numel() for p in model.parameters()) == debug().num_parameters()
    model.model.embed_tokens = nn.Embedding(384, 48)
    model.tie()
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_only_plain_modules() -> None:
    """Only linears, an embedding and norms hold parameters, so that any of them can be swapped."""
    kinds = {type(m) for m in Gemma2(debug()).modules() if list(m.parameters(recurse=False))}
    assert kinds == {nn.Linear, nn.Embedding, RMSNorm}


def test_logits_of_some_rows_alone() -> None:
    """The head is a call of its own: the wanted rows give what they give in the whole."""
    model = ours(debug(), weights(debug()))
    hidden = model(tokens(debug(), 2, T), positions(2, T))
    assert relative(model.logits(hidden[:, -1]), model.logits(hidden)[:, -1]) < 1e-6
    assert float(model.logits(hidden).abs().max()) <= 30


def test_documents_are_not_cached() -> None:
    model = ours(debug(), weights(debug()))
    cache = KVCache(debug(), 1, 8, dtype=torch.float32)
    with pytest.raises(AssertionError, match="packed documents"):
        model(tokens(debug(), 1, 4), positions(1, 4), torch.zeros(1, 4), cache)


def test_padding_rows_are_zero_and_finite() -> None:
    """A row of nothing but padding passes through every layer without a NaN, forward and backward."""
    model = ours(debug(), weights(debug())).requires_grad_()
    pos = torch.stack([torch.arange(5), torch.full((5,), PADDING)])
    hidden = model(tokens(debug(), 2, 5), pos)
    assert hidden.isfinite().all()
    gradients = torch.autograd.grad(hidden[0].sum(), list(model.parameters()))
    assert all(g.isfinite().all() for g in gradients)


def test_each_phase_has_its_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """No cache: train; many queries: prefill; one: decode."""
    asked: list[str] = []
    backend = Attention.backend

    def spy(self: Attention, phase: str) -> object:
        asked.append(phase)
        return backend(self, phase)

    monkeypatch.setattr(Attention, "backend", spy)
    model = ours(debug(), weights(debug()))
    text = tokens(debug(), 1, 5)
    forward(model, text)
    read(model, text, [4, 1])
    assert asked == ["train", "prefill", "decode"]


def test_positions_not_indices() -> None:
    """Rotary angles and windows come from the positions given: a text shifted by any number gives the same logits."""
    model = ours(debug(), weights(debug()))
    text = tokens(debug(), 1, T)
    shifted = model.logits(model(text, positions(1, T) + 1000))
    assert relative(shifted, forward(model, text)) < 1e-3  # angles of 1000 radians have 6e-5 of rounding


def test_rope_at_the_last_position() -> None:
    """Against fp64: position 8191 turned in fp32 keeps 1e-3, where a bf16 position would be off by whole turns."""
    x = torch.randn(1, 1, 1, 256)
    pos = torch.tensor([[8191]])
    angle = 8191 / 10000 ** (torch.arange(128, dtype=torch.float64) * 2 / 256)
    left, right = x[0, 0, 0].double().chunk(2)
    want = torch.cat((left * angle.cos() - right * angle.sin(), right * angle.cos() + left * angle.sin()))
    assert relative(rotate(x, rope_tables(pos, 256, 10000.0))[0, 0, 0], want) < 1e-3


def test_norm_multiplies_before_it_casts() -> None:
    """Gemma casts after the gain, Llama before: in bf16 the two differ, and the wider one is right."""
    norm = RMSNorm(64, 1e-6).to(torch.bfloat16)
    nn.init.normal_(norm.weight, std=0.3)
    x = torch.randn(50, 64).to(torch.bfloat16)
    normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
    assert torch.equal(norm(x), (normed * (1 + norm.weight.float())).to(torch.bfloat16))
    assert not torch.equal(norm(x), normed.to(torch.bfloat16) * (1 + norm.weight))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["flex", "blocked", "reference"])
@pytest.mark.parametrize("entry", ["forward", "prefill", "mixed", "packed"])
def test_parity_on_cuda(entry: str, name: str) -> None:
    """The whole model in fp32 on a GPU against the oracle on CPU."""
    a, b = pair(debug(), name)
    text = tokens(debug(), 2, T)
    want = oracle_logits(b, text)
    torch.set_default_device("cuda")
    try:
        got = ENTRIES[entry](a.cuda(), text.cuda())
    finally:
        torch.set_default_device("cpu")
    assert distance(got.cpu(), want) < TOLERANCE
