"""ModelConfig reads every published spelling of a config, and refuses what would change the arithmetic."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import transformers

from gemwright.config import GLOBAL, LOCAL, PRESETS, ConfigError, ModelConfig

MIB = 2**20
COMMON: dict[str, Any] = {
    "architectures": ["Gemma2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": 50.0,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": 1,
    "final_logit_softcapping": 30.0,
    "initializer_range": 0.02,
    "max_position_embeddings": 8192,
    "model_type": "gemma2",
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "use_cache": True,
    "vocab_size": 256000,
}
SHAPE_2B = {
    "head_dim": 256,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_attention_heads": 8,
    "num_hidden_layers": 26,
    "num_key_value_heads": 4,
}
SHAPE_9B = {
    "head_dim": 256,
    "hidden_size": 3584,
    "intermediate_size": 14336,
    "num_attention_heads": 16,
    "num_hidden_layers": 42,
    "num_key_value_heads": 8,
}
SHAPE_27B = {
    "head_dim": 128,
    "hidden_size": 4608,
    "intermediate_size": 36864,
    "num_attention_heads": 32,
    "num_hidden_layers": 46,
    "num_key_value_heads": 16,
    "query_pre_attn_scalar": 144,
}
ACTIVATION = {"hidden_activation": "gelu_pytorch_tanh"}
# The spellings of mid-2024 (transformers 4.42), of late 2024, and of transformers 5.
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "2b_first": (
        "gemma-2-2b",
        {**COMMON, **SHAPE_2B, **ACTIVATION, "hidden_act": "gelu_pytorch_tanh", "torch_dtype": "float32"},
    ),
    "2b_it": ("gemma-2-2b", {**COMMON, **SHAPE_2B, **ACTIVATION, "torch_dtype": "bfloat16", "eos_token_id": [1, 107]}),
    "9b": (
        "gemma-2-9b",
        {
            **COMMON,
            **SHAPE_9B,
            **ACTIVATION,
            "torch_dtype": "float32",
            "sliding_window_size": None,
            "_name_or_path": "x",
        },
    ),
    "27b": (
        "gemma-2-27b",
        {
            **COMMON,
            **SHAPE_27B,
            "hidden_act": "gelu_pytorch_tanh",
            "torch_dtype": "bfloat16",
            "_attn_implementation": "",
        },
    ),
    "27b_new": (
        "gemma-2-27b",
        {k: v for k, v in {**COMMON, **SHAPE_27B, **ACTIVATION}.items() if k != "rope_theta"}
        | {
            "dtype": "bfloat16",
            "layer_types": [LOCAL, GLOBAL] * 23,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "use_bidirectional_attention": None,
            "tie_word_embeddings": True,
            "transformers_version": "5.0.0",
        },
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_spellings_are_the_presets(name: str) -> None:
    preset, raw = PUBLISHED[name]
    before = copy.deepcopy(raw)
    got, want = ModelConfig.from_hf(raw), ModelConfig.preset(preset)
    assert raw == before  # an input is read, not edited
    eos = (1, 107) if isinstance(raw["eos_token_id"], list) else 1
    assert got.eos_token_id == eos
    assert got.dtype == raw.get("torch_dtype", raw.get("dtype"))
    fields = set(want.__dataclass_fields__) - {"eos_token_id", "dtype"}
    assert {f: getattr(got, f) for f in fields} == {f: getattr(want, f) for f in fields}


@pytest.mark.parametrize(
    ("name", "parameters", "kv_token", "kv_full", "kv_window"),
    [
        ("gemma-2-2b", 2_614_341_888, 104, 832, 624),
        ("gemma-2-9b", 9_241_705_984, 336, 2688, 2016),
        ("gemma-2-27b", 27_227_128_320, 368, 2944, 2208),
    ],
)
def test_preset_sizes(name: str, parameters: int, kv_token: int, kv_full: int, kv_window: int) -> None:
    """The released models' parameter counts, and KV in KiB a token and MiB at 8192 tokens, whole and window-aware."""
    config = ModelConfig.preset(name)
    assert config.num_parameters() == parameters
    assert config.kv_bytes(1) == kv_token * 1024
    assert config.kv_bytes(8192) == kv_window * MIB
    all_global = ModelConfig(**{**PRESETS[name], "layer_types": (GLOBAL,) * config.num_hidden_layers})
    assert all_global.kv_bytes(8192) == kv_full * MIB
    assert config.kv_bytes(100, itemsize=4) == 100 * kv_token * 1024 * 2


def test_query_scale_of_27b_is_not_its_head_size() -> None:
    assert ModelConfig.preset("gemma-2-27b").scale == pytest.approx(1 / 12)
    assert ModelConfig.preset("gemma-2-9b").scale == pytest.approx(1 / 16)


def test_layer_zero_is_local() -> None:
    config = ModelConfig.preset("gemma-2-9b")
    assert [config.window(i) for i in range(4)] == [4096, None, 4096, None]
    with pytest.raises(ConfigError, match="layer_types"):
        ModelConfig(num_hidden_layers=3, layer_types=(LOCAL, GLOBAL))


@pytest.mark.parametrize("preset", PRESETS)
def test_round_trip(preset: str) -> None:
    config = ModelConfig.preset(preset)
    assert ModelConfig.from_hf(config.to_hf()) == config
    odd = ModelConfig(**{**PRESETS[preset], "eos_token_id": (1, 107), "final_logit_softcapping": None})
    assert ModelConfig.from_hf(odd.to_hf()) == odd


@pytest.mark.parametrize("preset", PRESETS)
def test_transformers_reads_what_is_written_and_writes_what_is_read(preset: str) -> None:
    config = ModelConfig(**{**PRESETS[preset], "rope_theta": 12345.0, "sliding_window": 77})
    theirs = transformers.Gemma2Config(**config.to_hf())
    assert theirs.rope_parameters["rope_theta"] == 12345.0
    assert theirs.layer_types == list(config.layer_types)
    for field in ("sliding_window", "query_pre_attn_scalar", "head_dim", "attn_logit_softcapping", "rms_norm_eps"):
        assert getattr(theirs, field) == getattr(config, field)
    assert ModelConfig.from_hf(theirs.to_dict()) == config
    assert ModelConfig.from_hf(theirs.to_diff_dict()) == config


def test_written_numbers_have_the_types_that_transformers_demands() -> None:
    """A regression: 50 for 50.0 or 256.0 for 256, harmless here, made transformers 5 refuse the written config."""
    config = ModelConfig(attn_logit_softcapping=50, final_logit_softcapping=30, query_pre_attn_scalar=256.0)
    theirs = transformers.Gemma2Config(**config.to_hf())
    assert (theirs.attn_logit_softcapping, theirs.query_pre_attn_scalar) == (50.0, 256)
    assert ModelConfig.from_hf(theirs.to_dict()) == ModelConfig.from_hf(config.to_hf()) == config


def test_rope_theta_may_stand_in_both_spellings_if_they_agree() -> None:
    raw = {**COMMON, **SHAPE_2B, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    assert ModelConfig.from_hf(raw).rope_theta == 10000.0
    raw["rope_parameters"] = {"rope_type": "default", "rope_theta": 20000.0}
    with pytest.raises(ConfigError, match="rope_theta: got 10000"):
        ModelConfig.from_hf(raw)


@pytest.mark.parametrize(
    "neutral",
    [
        {"transformers_version": "4.42.0", "_name_or_path": "google/gemma-2-9b", "unsloth_fixed": True},
        {"use_cache": False, "id2label": {"0": "A"}, "output_attentions": True, "cache_implementation": None},
        {"rope_scaling": None, "use_bidirectional_attention": False, "tie_word_embeddings": True},
        {"some_future_key": None, "another": False},
    ],
)
def test_neutral_keys_are_ignored(neutral: dict[str, Any]) -> None:
    assert ModelConfig.from_hf({**COMMON, **SHAPE_2B, **neutral}) == ModelConfig.preset("gemma-2-2b")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gemma"}, r"model_type: got 'gemma', allowed is 'gemma2'"),
        ({"model_type": None}, r"model_type: got None"),
        ({"hidden_activation": "gelu"}, r"hidden_activation: got 'gelu', allowed is 'gelu_pytorch_tanh'"),
        ({"hidden_act": "silu"}, r"hidden_activation: got 'silu'"),
        ({"attention_bias": True}, r"attention_bias: got True, allowed is False"),
        ({"attention_dropout": 0.1}, r"attention_dropout: got 0.1"),
        ({"tie_word_embeddings": False}, r"tie_word_embeddings: got False, allowed is True"),
        ({"use_bidirectional_attention": True}, r"use_bidirectional_attention: got True"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, r"rope_scaling: got .*linear"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, r"rope_parameters: got .*yarn"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, r"rope_parameters: got .*0\.5"),
        ({"rope_parameters": 3}, r"rope_parameters: got 3"),
        ({"quantization_config": {"bits": 4}}, r"quantization_config"),
        ({"attention_sinks": 4}, r"attention_sinks: got 4"),
        ({"num_experts": 8}, r"num_experts: got 8"),
        ({"dtype": "float64"}, r"dtype: got 'float64', allowed is bfloat16"),
        ({"head_dim": 15}, r"head_dim: got 15, allowed is an even number"),
        ({"num_key_value_heads": 3}, r"num_attention_heads: got 8, allowed is a multiple"),
        ({"layer_types": ["sliding_attention"]}, r"layer_types"),
        ({"layer_types": ["chunked_attention"] * 26}, r"layer_types"),
        ({"layer_types": 26}, r"layer_types: got 26"),
        ({"layer_types": [["full_attention"]] * 26}, r"layer_types"),
        ({"sliding_window": 0}, r"sliding_window: got 0"),
        ({"sliding_window": None}, r"sliding_window: got None"),
        ({"hidden_size": "2304"}, r"hidden_size: got '2304'"),
        ({"vocab_size": True}, r"vocab_size: got True"),
        ({"query_pre_attn_scalar": 0}, r"query_pre_attn_scalar: got 0"),
        ({"attn_logit_softcapping": -1.0}, r"attn_logit_softcapping: got -1.0"),
        ({"final_logit_softcapping": float("inf")}, r"final_logit_softcapping: got inf"),
        ({"rms_norm_eps": "1e-6"}, r"rms_norm_eps: got '1e-6'"),
        ({"eos_token_id": 256000}, r"eos_token_id: got 256000, allowed is an id in 0..255999"),
        ({"eos_token_id": [1, -5]}, r"eos_token_id"),
        ({"pad_token_id": True}, r"pad_token_id: got True"),
        ({"rope_scaling": "linear"}, r"rope_scaling: got 'linear'"),
    ],
)
def test_what_changes_the_arithmetic_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    raw = {**COMMON, **SHAPE_2B, **change}
    if "rope_parameters" in change:
        raw.pop("rope_theta")
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_hf(raw)


def test_preset_unknown() -> None:
    with pytest.raises(ConfigError, match=r"preset: got 'gemma-3', allowed are gemma-2-2b"):
        ModelConfig.preset("gemma-3")


def test_missing_fields_take_the_default_of_transformers() -> None:
    """transformers may leave defaults out of a file; ours must be its own, or the file would mean another model."""
    bare = transformers.Gemma2Config()
    got = ModelConfig.from_hf({"model_type": "gemma2"})
    for field in ModelConfig.__dataclass_fields__:
        if field in ("dtype", "rope_theta", "layer_types"):
            continue
        assert getattr(got, field) == getattr(bare, field), field
    assert got.rope_theta == bare.rope_parameters["rope_theta"]
    assert list(got.layer_types) == bare.layer_types
