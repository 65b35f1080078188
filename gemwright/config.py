"""ModelConfig: the shape of a Gemma 2 model, in Hugging Face's field names.

A `config.json` is an input from outside. `from_hf` reads the fields that this model computes with, in every spelling
found in published folders; ignores a listed set of keys that do not touch the arithmetic; and raises on the rest, since
a key that changes the arithmetic and is not understood would give wrong logits without a word.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

LOCAL: Final = "sliding_attention"
GLOBAL: Final = "full_attention"
DTYPES: Final = ("bfloat16", "float32", "float16")


class ConfigError(ValueError):
    """A model configuration that is inconsistent, or asks for arithmetic that this model does not have."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape and constants of one model; the defaults are Gemma 2 2B (arXiv 2408.00118, table 1)."""

    vocab_size: int = 256000
    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 26
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 256
    query_pre_attn_scalar: float = 256
    """Queries are scaled by its inverse square root; 27B has 144, which is not its head size."""
    sliding_window: int = 4096
    """Positions that a local layer sees, itself included."""
    layer_types: tuple[str, ...] = ()
    """`sliding_attention` or `full_attention` per layer; empty means alternating, layer 0 local."""
    attn_logit_softcapping: float | None = 50.0
    final_logit_softcapping: float | None = 30.0
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 8192
    pad_token_id: int | None = 0
    bos_token_id: int | None = 2
    eos_token_id: int | tuple[int, ...] | None = 1
    initializer_range: float = 0.02
    dtype: str = "bfloat16"
    """Storage dtype of the checkpoint."""

    def __post_init__(self) -> None:
        if not self.layer_types:
            alternating = tuple(LOCAL if i % 2 == 0 else GLOBAL for i in range(self.num_hidden_layers))
            object.__setattr__(self, "layer_types", alternating)
        _check(self)

    @property
    def scale(self) -> float:
        """Factor on the attention scores, applied before the cap."""
        return 1.0 / math.sqrt(self.query_pre_attn_scalar)

    @property
    def group_size(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_attention_heads // self.num_key_value_heads

    def window(self, layer: int) -> int | None:
        """Window of a layer in positions, or None where it is global."""
        return self.sliding_window if self.layer_types[layer] == LOCAL else None

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The end ids as a tuple, whichever of the three spellings the config used."""
        if self.eos_token_id is None:
            return ()
        return self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of a checkpoint by Hugging Face name; the tied `lm_head.weight` is not stored."""
        D, F, H = self.hidden_size, self.intermediate_size, self.head_dim
        N, K = self.num_attention_heads, self.num_key_value_heads
        block: dict[str, tuple[int, ...]] = {
            "input_layernorm": (D,),
            "self_attn.q_proj": (N * H, D),
            "self_attn.k_proj": (K * H, D),
            "self_attn.v_proj": (K * H, D),
            "self_attn.o_proj": (D, N * H),
            "post_attention_layernorm": (D,),
            "pre_feedforward_layernorm": (D,),
            "mlp.gate_proj": (F, D),
            "mlp.up_proj": (F, D),
            "mlp.down_proj": (D, F),
            "post_feedforward_layernorm": (D,),
        }
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, D)}
        for i in range(self.num_hidden_layers):
            shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in block.items()}
        return shapes | {"model.norm.weight": (D,)}

    def num_parameters(self) -> int:
        """Parameters, the tied embedding counted once."""
        return sum(math.prod(shape) for shape in self.parameter_shapes().values())

    def kv_bytes(self, tokens: int, *, itemsize: int = 2) -> int:
        """Bytes that keys and values of one sequence of `tokens` take when local layers keep their window only."""
        kept = sum(min(tokens, self.window(i) or tokens) for i in range(self.num_hidden_layers))
        return kept * 2 * self.num_key_value_heads * self.head_dim * itemsize

    @classmethod
    def preset(cls, name: str) -> ModelConfig:
        """A published shape, or `debug`: small, with a window and heads that make every trait bite."""
        if name not in PRESETS:
            raise ConfigError(f"preset: got {name!r}, allowed are {', '.join(PRESETS)}")
        return cls(**PRESETS[name])

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """Read a Hugging Face `config.json` of model_type gemma2.

        Raises ConfigError with the field, its value and what is allowed.
        """
        if raw.get("model_type") != "gemma2":
            raise ConfigError(f"model_type: got {raw.get('model_type')!r}, allowed is 'gemma2'")
        known = {field.name for field in dataclasses.fields(cls)}
        values: dict[str, Any] = {key: value for key, value in raw.items() if key in known}
        rest = {key: value for key, value in raw.items() if key not in known and key not in NEUTRAL}
        _read_rope(values, rest)
        if "torch_dtype" in rest:  # the older spelling of `dtype`
            values.setdefault("dtype", rest.pop("torch_dtype"))
        values["dtype"] = str(values.get("dtype") or "bfloat16").removeprefix("torch.")
        # transformers computes with hidden_activation alone; hidden_act speaks only where that is absent
        activation = rest.pop("hidden_activation", None) or rest.get("hidden_act") or "gelu_pytorch_tanh"
        rest.pop("hidden_act", None)
        rest["hidden_activation"] = activation
        for key in ("layer_types", "eos_token_id"):
            if isinstance(values.get(key), list):
                values[key] = tuple(values[key])
        if values.get("layer_types") is None:
            values.pop("layer_types", None)
        _refuse(rest)
        return cls(**values)

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` that transformers loads as Gemma2ForCausalLM."""
        values = dataclasses.asdict(self)
        values["layer_types"] = list(self.layer_types)
        if isinstance(self.eos_token_id, tuple):
            values["eos_token_id"] = list(self.eos_token_id)
        # transformers 5 refuses 50 for 50.0 and 256.0 for 256
        for key in ("attn_logit_softcapping", "final_logit_softcapping", "rms_norm_eps", "initializer_range"):
            values[key] = None if values[key] is None else float(values[key])
        if self.query_pre_attn_scalar == int(self.query_pre_attn_scalar):
            values["query_pre_attn_scalar"] = int(self.query_pre_attn_scalar)
        # both spellings: transformers 4 reads rope_theta, 5 reads rope_parameters
        values["rope_parameters"] = {"rope_type": "default", "rope_theta": self.rope_theta}
        return {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", **values, **REQUIRED}


# Keys that select no other arithmetic at inference: book-keeping, and defaults of transformers' base class.
NEUTRAL: Final = frozenset(
    """_attn_implementation _name_or_path architectures attn_implementation cache_implementation chunk_size_feed_forward
    id2label label2id max_length model_type num_labels output_attentions output_hidden_states problem_type return_dict
    transformers_version unsloth_fixed unsloth_version use_cache torchscript _commit_hash tokenizer_class
    prefix finetuning_task is_decoder is_encoder_decoder return_dict_in_generate trust_remote_code
    finetuned_from license tags""".split()
)

# Keys that would change the arithmetic, each with the one value that this model computes.
REQUIRED: Final[dict[str, Any]] = {
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": True,
    "use_bidirectional_attention": None,
}

PRESETS: Final[dict[str, dict[str, Any]]] = {
    "gemma-2-2b": {},
    "gemma-2-9b": dict(
        hidden_size=3584, intermediate_size=14336, num_hidden_layers=42, num_attention_heads=16, num_key_value_heads=8
    ),
    "gemma-2-27b": dict(
        hidden_size=4608,
        intermediate_size=36864,
        num_hidden_layers=46,
        num_attention_heads=32,
        num_key_value_heads=16,
        head_dim=128,
        query_pre_attn_scalar=144,
    ),
    "debug": dict(
        vocab_size=384,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        query_pre_attn_scalar=12,
        sliding_window=8,
        max_position_embeddings=256,
        dtype="float32",
    ),
}


def _read_rope(values: dict[str, Any], rest: dict[str, Any]) -> None:
    """Move `rope_parameters` (transformers 5) or `rope_theta` (4) into `values`; refuse any scaling."""
    rope = rest.pop("rope_parameters", None) or {}
    scaling = rest.pop("rope_scaling", None)
    kind = scaling.get("rope_type", scaling.get("type")) if isinstance(scaling, Mapping) else scaling
    if scaling is not None and kind != "default":
        raise ConfigError(f"rope_scaling: got {scaling!r}, allowed is null (Gemma 2 does not scale its positions)")
    if not isinstance(rope, Mapping):
        raise ConfigError(f"rope_parameters: got {rope!r}, allowed is an object with rope_type and rope_theta")
    surplus = {k: v for k, v in rope.items() if k not in ("rope_type", "rope_theta")}
    if rope.get("rope_type", "default") != "default" or surplus not in ({}, {"partial_rotary_factor": 1.0}):
        raise ConfigError(f"rope_parameters: got {dict(rope)!r}, allowed is rope_type 'default' with rope_theta")
    if "rope_theta" in rope:
        if values.get("rope_theta", rope["rope_theta"]) != rope["rope_theta"]:
            raise ConfigError(f"rope_theta: got {values['rope_theta']} beside rope_parameters {rope['rope_theta']}")
        values["rope_theta"] = rope["rope_theta"]


def _refuse(rest: Mapping[str, Any]) -> None:
    """Raise on the keys left over that ask for other arithmetic."""
    for key, value in rest.items():
        if key in REQUIRED:
            if (value or None) != (REQUIRED[key] or None):  # null, false and 0 all say "no"
                raise ConfigError(f"{key}: got {value!r}, allowed is {REQUIRED[key]!r}")
        elif key == "quantization_config":
            raise ConfigError("quantization_config: pre-quantized folders are not supported, use the bf16 folder")
        elif value not in (None, False):
            raise ConfigError(f"{key}: got {value!r}; this key is not known and may change the arithmetic")


def _check(c: ModelConfig) -> None:
    """Raise ConfigError unless the shape is consistent."""

    def need(ok: bool, field: str, allowed: str) -> None:
        if not ok:
            raise ConfigError(f"{field}: got {getattr(c, field)!r}, allowed is {allowed}")

    for field in (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
        "sliding_window max_position_embeddings"
    ).split():
        value = getattr(c, field)
        need(isinstance(value, int) and not isinstance(value, bool) and value > 0, field, "a positive integer")
    for field in ("query_pre_attn_scalar", "rope_theta", "rms_norm_eps"):
        need(_is_positive(getattr(c, field)), field, "a positive number")
    for field in ("attn_logit_softcapping", "final_logit_softcapping"):
        need(getattr(c, field) is None or _is_positive(getattr(c, field)), field, "a positive number or null")
    need(c.head_dim % 2 == 0, "head_dim", "an even number (rotary embedding turns pairs)")
    need(
        c.num_attention_heads % c.num_key_value_heads == 0,
        "num_attention_heads",
        f"a multiple of num_key_value_heads ({c.num_key_value_heads})",
    )
    need(
        isinstance(c.layer_types, tuple)
        and len(c.layer_types) == c.num_hidden_layers
        and all(kind in (LOCAL, GLOBAL) for kind in c.layer_types),
        "layer_types",
        f"{c.num_hidden_layers} values out of {LOCAL!r} and {GLOBAL!r}",
    )
    need(c.dtype in DTYPES, "dtype", " or ".join(DTYPES))
    for field in ("pad_token_id", "bos_token_id", "eos_token_id"):
        value = getattr(c, field)
        ids = value if isinstance(value, tuple) else (value,)
        ok = all(i is None or (type(i) is int and 0 <= i < c.vocab_size) for i in ids)
        need(ok, field, f"an id in 0..{c.vocab_size - 1} or null")


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
