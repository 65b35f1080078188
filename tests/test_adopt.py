"""Adopting a Llama: what is carried over exactly, what is calibrated, what is refused.

The oracle is transformers' LlamaForCausalLM with small random weights.

Legend: B rows, T tokens, D model.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from adopt_fixtures import Weights
from oracle import oracle_logits, ours, positions, relative, tokens
from tokenizers.models import BPE
from torch import Tensor, nn
from torch.nn import functional as F

from gemwright.adopt import (
    GELU_OF_SILU,
    AdoptError,
    adopted_config,
    adopted_tensor,
    adopted_tensors,
    calibrate,
    gemma_tokenizer,
    own_text,
    read_text,
    stored_gain,
    text_rows,
)
from gemwright.config import GLOBAL, LOCAL, ModelConfig
from gemwright.llama import POST_NORMS, Llama, LlamaLayer

T = 24
RAW: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}


@pytest.fixture(scope="module")
def theirs() -> Any:
    """A random Llama, its norms and outputs of all sizes."""
    rope = {"rope_type": "default", "rope_theta": RAW["rope_theta"]}
    config = transformers.LlamaConfig(**{**RAW, "rope_parameters": rope})
    config._attn_implementation = "eager"
    torch.manual_seed(3)
    model = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    for name, p in model.named_parameters():
        nn.init.normal_(p, mean=1.0, std=0.3) if "norm" in name else nn.init.normal_(p, std=1.5 / p.shape[1] ** 0.5)
    return model


@pytest.fixture(scope="module")
def source(theirs: Any) -> Weights:
    return Weights({k: v for k, v in theirs.state_dict().items() if k != "lm_head.weight"})


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return adopted_config(RAW)


@pytest.fixture(scope="module")
def text(config: ModelConfig) -> Tensor:
    return tokens(config, 2, T)


def test_config_carries_the_shape_and_constants(config: ModelConfig) -> None:
    assert (config.head_dim, config.query_pre_attn_scalar) == (8, 8)
    assert (config.rope_theta, config.rms_norm_eps) == (100000.0, 1e-5)
    assert (config.attn_logit_softcapping, config.final_logit_softcapping, config.sliding_window) == (50.0, 30.0, 4096)
    assert config.layer_types == (LOCAL, GLOBAL, LOCAL)
    for field in ("vocab_size", "hidden_size", "intermediate_size", "num_key_value_heads", "eos_token_id"):
        assert getattr(config, field) == RAW[field]
    new = {k: v for k, v in RAW.items() if k != "rope_theta"} | {"rope_parameters": {"rope_theta": 5e5}, "head_dim": 16}
    assert (adopted_config(new).rope_theta, adopted_config(new).head_dim) == (5e5, 16)
    assert adopted_config({**RAW, "eos_token_id": [2, 3]}).eos_ids == (2, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mistral"}, "model_type: got 'mistral', allowed is 'llama'"),
        ({"hidden_act": "relu"}, "hidden_act: got 'relu'"),
        ({"attention_bias": True}, "attention_bias: got True"),
        ({"mlp_bias": True}, "mlp_bias: got True"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings: got False, allowed is True"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling: got .*llama3"),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "rope_theta": 1e4}},
            "rope_parameters: got .*llama3",
        ),
    ],
)
def test_what_cannot_be_carried_over_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(AdoptError, match=message):
        adopted_config({**RAW, **change})


def test_llama_equals_the_oracle(source: Weights, theirs: Any, config: ModelConfig, text: Tensor) -> None:
    """Every layer's residual stream, the outputs of its two sub-layers, and the logits."""
    want = theirs(text, output_hidden_states=True)
    caught: dict[int, list[Tensor]] = {i: [] for i in range(3)}
    hooks = []
    for i, layer in enumerate(theirs.model.layers):
        for part in (layer.self_attn, layer.mlp):
            hooks.append(
                part.register_forward_hook(
                    lambda module, args, out, i=i: caught[i].append(out[0] if isinstance(out, tuple) else out)
                )
            )
    theirs(text)
    for hook in hooks:
        hook.remove()
    llama = Llama(source, config)
    *layers, last = llama.layers(text, positions(2, T))
    x = F.embedding(text, llama.head)
    for i, layer in enumerate(layers):
        assert isinstance(layer, LlamaLayer)
        assert relative(layer.attention_out, caught[i][0]) < 1e-5
        assert relative(layer.feedforward_out, caught[i][1]) < 1e-5
        assert relative(x, want.hidden_states[i]) < 1e-5
        x = x + layer.attention_out + layer.feedforward_out
    assert isinstance(last, Tensor)
    assert relative(last @ llama.head.T, want.logits) < 1e-5


def test_llama_reads_packed_documents(source: Weights, theirs: Any, config: ModelConfig, text: Tensor) -> None:
    docs = torch.arange(2).repeat_interleave(T)[None]
    *_, last = Llama(source, config).layers(text.reshape(1, -1), positions(2, T).reshape(1, -1), docs)
    assert isinstance(last, Tensor)
    assert relative((last @ theirs.lm_head.weight.T).view(2, T, -1), theirs(text).logits) < 1e-5


def test_tensors(source: Weights, config: ModelConfig) -> None:
    """Every tensor of the adopted model from the source's, by the rules written out here once more by hand."""
    post = {f"model.layers.{i}.{norm}.weight": torch.full((48,), 7.0 + i) for i in range(3) for norm in POST_NORMS}
    got = dict(adopted_tensors(source, config, post))
    assert {name: tuple(w.shape) for name, w in got.items()} == config.parameter_shapes()
    s = source.state
    for i in range(3):
        at = f"model.layers.{i}"
        readers = {
            "input_layernorm": ("input_layernorm", {f"self_attn.{n}_proj": 1.0 for n in "qkv"}),
            "pre_feedforward_layernorm": (
                "post_attention_layernorm",
                {"mlp.gate_proj": 1 / GELU_OF_SILU, "mlp.up_proj": GELU_OF_SILU},
            ),
        }
        for norm, (theirs, linears) in readers.items():
            stored, gain = got[f"{at}.{norm}.weight"], s[f"{at}.{theirs}.weight"]
            assert torch.equal(stored, stored.bfloat16().float())
            torch.testing.assert_close(1 + stored, gain, atol=2**-8, rtol=0)
            for linear, factor in linears.items():  # norm and linear together are the source's
                name = f"{at}.{linear}.weight"
                torch.testing.assert_close(got[name] * (1 + stored), s[name] * gain * factor)
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            assert torch.equal(got[f"{at}.{name}.weight"], s[f"{at}.{name}.weight"])
        assert torch.equal(got[f"{at}.post_attention_layernorm.weight"], torch.full((48,), 7.0 + i))
    assert torch.equal(got["model.embed_tokens.weight"], s["model.embed_tokens.weight"])
    torch.testing.assert_close(got["model.norm.weight"], s["model.norm.weight"] - 1)
    half = Weights({k: v.bfloat16() for k, v in s.items()})
    assert adopted_tensor(half, "model.norm.weight").dtype == torch.float32


def test_no_gain_is_lost() -> None:
    """Gains near 0, whose distance from 1 is rounded away, keep their sign and are never stored as 0."""
    gain = torch.tensor([0.0001, -0.0001, 0.001, 0.0, 0.5, 2.7, -1.3])
    stored = stored_gain(gain)
    assert torch.equal(stored - 1, (stored - 1).bfloat16().float())
    assert bool((stored != 0).all())
    assert bool((stored * gain >= 0).all())
    torch.testing.assert_close(stored[4:], gain[4:], rtol=2**-8, atol=0)


def test_calibration_is_the_median_size_of_each_output(
    source: Weights, theirs: Any, config: ModelConfig, text: Tensor
) -> None:
    """sqrt(D) times the median RMS over all positions but the first, minus one, from the oracle's own sub-layers."""
    sizes: dict[str, float] = {}

    def catch(name: str) -> Any:
        def hook(module: nn.Module, args: object, out: Any) -> None:
            x = (out[0] if isinstance(out, tuple) else out)[:, 1:]
            sizes[name] = float(x.square().mean(-1).sqrt().median())

        return hook

    hooks = []
    for i, layer in enumerate(theirs.model.layers):
        for norm, part in zip(POST_NORMS, (layer.self_attn, layer.mlp), strict=True):
            hooks.append(part.register_forward_hook(catch(f"model.layers.{i}.{norm}.weight")))
    theirs(text)
    for hook in hooks:
        hook.remove()
    got = calibrate(Llama(source, config), text)
    assert got.keys() == sizes.keys()
    for name, size in sizes.items():
        torch.testing.assert_close(got[name], torch.full((48,), math.sqrt(48) * size - 1), rtol=1e-4, atol=1e-5)


def test_adopted_model_is_the_source_where_the_architectures_meet(
    source: Weights, theirs: Any, config: ModelConfig, text: Tensor
) -> None:
    """With GELU in the source and outputs of one size, nothing is lost but the final cap: undone, the logits agree.

    The source's outputs are put on one size by a norm behind each sub-layer, as the adopted model has it.
    """
    post = calibrate(Llama(source, config), text)
    adopted = ours(
        ModelConfig.from_hf({**config.to_hf(), "attn_logit_softcapping": None}),
        dict(adopted_tensors(source, config, post)),
    )
    state = theirs.state_dict()
    same = transformers.LlamaForCausalLM(theirs.config).eval().requires_grad_(False)
    same.load_state_dict(state)

    def sized(name: str) -> Any:
        def hook(module: nn.Module, args: object, out: Any) -> Any:
            x = out[0] if isinstance(out, tuple) else out
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-12) * (1 + post[name]) / math.sqrt(48)
            return (x, *out[1:]) if isinstance(out, tuple) else x

        return hook

    for i, layer in enumerate(same.model.layers):
        layer.mlp.act_fn = Gelu()
        for norm, part in zip(POST_NORMS, (layer.self_attn, layer.mlp), strict=True):
            part.register_forward_hook(sized(f"model.layers.{i}.{norm}.weight"))
    want = oracle_logits(same, text)
    got = adopted.logits(adopted(text, positions(2, T)))
    assert relative(30 * torch.atanh(got.double() / 30), want.double()) < 2e-3


class Gelu(nn.Module):
    """What SiLU becomes: gelu_tanh(x / 1.702) * 1.702, with the factor of the up rows taken along."""

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x / GELU_OF_SILU, approximate="tanh") * GELU_OF_SILU


def test_gelu_stands_in_for_silu() -> None:
    """silu(x) = 1.702 gelu(x / 1.702) within 0.036 everywhere; without the factor it is off by 0.2."""
    x = torch.linspace(-8, 8, 4001)
    assert float((F.silu(x) - Gelu()(x)).abs().max()) < 0.036
    assert float((F.silu(x) - F.gelu(x, approximate="tanh")).abs().max()) > 0.15


CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def chatml_json(special: list[str]) -> str:
    vocab = {token: i for i, token in enumerate([*special, "a", "b", "ab"])}
    tokenizer = tokenizers.Tokenizer(BPE(vocab, [("a", "b")]))
    tokenizer.add_special_tokens(special)
    return str(tokenizer.to_str())


def test_tokenizer_speaks_gemmas_turns() -> None:
    """ChatML's three control tokens keep their ids and take Gemma's names; all else encodes as before."""
    raw = chatml_json(CHATML)
    changed, config = gemma_tokenizer(raw)
    before, after = tokenizers.Tokenizer.from_str(raw), tokenizers.Tokenizer.from_str(changed)
    assert [after.token_to_id(t) for t in ("<bos>", "<start_of_turn>", "<end_of_turn>")] == [0, 1, 2]
    assert all(after.token_to_id(t) is None for t in CHATML)
    assert after.encode("<start_of_turn>ab<end_of_turn>").ids == before.encode("<|im_start|>ab<|im_end|>").ids
    assert after.decode([1, 5, 2]) == "ab"  # still special, so not printed
    assert (config["bos_token"], config["eos_token"], config["add_bos_token"]) == ("<bos>", "<end_of_turn>", True)


def test_other_tokenizers_stay_as_they_are() -> None:
    raw = chatml_json(CHATML[1:])
    changed, config = gemma_tokenizer(raw)
    assert json.loads(changed) == json.loads(raw)
    assert config == {"add_bos_token": True}


def test_rows_of_a_given_text() -> None:
    ids = list(range(2, 402))
    assert text_rows(ids, 0).tolist() == [[0, *ids[at : at + 49]] for at in range(0, 392, 49)]
    assert text_rows(ids, None).tolist() == [ids[at : at + 50] for at in range(0, 400, 50)]
    assert text_rows(ids * 20, 0).shape == (31, 256)
    with pytest.raises(AdoptError, match="calibration: got 100 tokens, allowed are 136 or more"):
        text_rows(ids[:100], 0)


def test_a_source_writes_from_its_own_distribution(source: Weights, config: ModelConfig) -> None:
    """The second token's frequencies over many rows are the softmax of the logits behind the first one."""
    llama = Llama(source, config)
    rows = own_text(llama, 5, rows=4000, length=3, progress=False)
    assert rows.shape == (4000, 3)
    assert bool((rows[:, 0] == 5).all())
    want = (llama(torch.tensor([[5]]))[0, 0] @ llama.head.T).softmax(-1)
    got = torch.bincount(rows[:, 1], minlength=131) / 4000
    likely = want > 0.005
    sigma = (want * (1 - want) / 4000).sqrt()
    assert float(((got - want).abs() / sigma)[likely].max()) < 4.5
    assert torch.equal(rows, own_text(llama, 5, rows=4000, length=3, progress=False))
    given = rows[:, 1].mode().values
    after = rows[rows[:, 1] == given][:, 2]
    want = (llama(torch.tensor([[5, int(given)]]))[0, 1] @ llama.head.T).softmax(-1)
    got = torch.bincount(after, minlength=131) / len(after)
    sigma = (want * (1 - want) / len(after)).sqrt()
    assert float(((got - want).abs() / sigma)[want > 0.02].max()) < 4.5


def test_calibration_text_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("äbc" * 10, encoding="utf-8")
    assert read_text(path, 4) == "äbcä"
    assert read_text(path) == "äbc" * 10
