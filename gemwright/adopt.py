"""adopt: put a Llama-style model into the Gemma 2 architecture, as close as its traits allow.

What carries over exactly: the linears, the embedding, rotary base, eps, and the norms before attention and feed-forward
(Gemma multiplies by 1 + w, so w - 1). Gemma 2 scales the embedding by sqrt(D), so its residual stream is sqrt(D) times
the source's; the norms in front of every sub-layer cancel that.

What does not, and how close it comes:

* SiLU becomes GELU. silu(x) = x sigmoid(x) and gelu(x) is nearly x sigmoid(1.702 x) (arXiv 1606.08415), so
  silu(g) u is nearly gelu(g / 1.702) 1.702 u: the gate's rows are divided by 1.702 and the up rows multiplied.
  Measured on SmolLM2-135M: KL to the source 1.84 nats a token instead of 2.39 before any training.
* Each sub-layer's output passes a norm that the source lacks. A ballast makes that norm pass outputs at nearly their
  own size (`ballast.py`): 0.07 nats, bf16 and caps included, where norms of constant gain, sqrt(D) times the median RMS
  of the source's outputs, stand at 1.6. Where it does not bring a model nearer to its source, constant gains stay.
* The final cap of 30 bends the source's largest logits; they are lowered first (`lowering.py`). Measured on
  SmolLM2-135M, the cap costs 0.51 and 0.31 nats a token on prose and on answers as it is, and 0.04 and 0.06 after that.
* A gain is stored as its distance from 1, in bf16, whose steps there are 0.004. SmolLM2's norms have gains down to
  0.0001, for features that are large, and rounding them costs 0.35 nats. The columns of the linears that read a norm
  take up what rounding did to its gain.
* The attention cap of 50, and a window of 4096 on even layers, which a context of 4096 or less does not feel.

Legend: B rows, T tokens, D model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from tokenizers import Tokenizer as LibraryTokenizer
from torch import Tensor
from tqdm import tqdm

from gemwright.ballast import ballast
from gemwright.cache import KVCache
from gemwright.checkpoint import Checkpoint, refuse, write
from gemwright.config import GLOBAL, ModelConfig
from gemwright.gguf import Gguf
from gemwright.llama import EMBEDDING, NORMS, POST_NORMS, Llama, LlamaLayer, Source
from gemwright.lowering import Lowering, lowering
from gemwright.model import Gemma2
from gemwright.ops.divergence import divergence
from gemwright.ops.head import Head
from gemwright.weights import read_json

GELU_OF_SILU: Final = 1.702
TURN_TOKENS: Final = {"<|im_start|>": "<start_of_turn>", "<|im_end|>": "<end_of_turn>", "<|endoftext|>": "<bos>"}
"""ChatML's control tokens and Gemma's with the same role; the turn format is the same but for their names."""

SMALLEST_GAIN: Final = 2.0**-7
"""The nearest to 0 that both 1 + w and 1 - w can be for a w in bf16."""
READ_NORM: Final = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "input_layernorm"),
    **dict.fromkeys(("gate_proj", "up_proj"), "pre_feedforward_layernorm"),
}
"""The norm in front of a linear."""


class AdoptError(ValueError):
    """A source that Gemma 2's architecture cannot hold."""


def adopted_config(llama: Mapping[str, Any]) -> ModelConfig:
    """The Gemma 2 configuration for a Llama one; raises AdoptError naming the field that cannot be carried over."""
    allowed: dict[str, tuple[Any, ...]] = {
        "model_type": ("llama",),
        "hidden_act": (None, "silu"),
        "attention_bias": (None, False),
        "mlp_bias": (None, False),
        "tie_word_embeddings": (True,),
        "rope_scaling": (None,),
    }
    for field, values in allowed.items():
        if llama.get(field) not in values:
            raise AdoptError(f"{field}: got {llama.get(field)!r}, allowed is {' or '.join(map(repr, values))}")
    head_dim = llama.get("head_dim") or llama["hidden_size"] // llama["num_attention_heads"]
    rope = llama.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":  # transformers 5's spelling of rope_scaling
        raise AdoptError(f"rope_parameters: got {rope!r}, allowed is rope_type 'default'")
    eos = llama.get("eos_token_id")
    return ModelConfig(
        vocab_size=llama["vocab_size"],
        hidden_size=llama["hidden_size"],
        intermediate_size=llama["intermediate_size"],
        num_hidden_layers=llama["num_hidden_layers"],
        num_attention_heads=llama["num_attention_heads"],
        num_key_value_heads=llama.get("num_key_value_heads") or llama["num_attention_heads"],
        head_dim=head_dim,
        query_pre_attn_scalar=head_dim,
        rope_theta=float(llama.get("rope_theta") or rope.get("rope_theta") or 10000.0),
        rms_norm_eps=llama["rms_norm_eps"],
        max_position_embeddings=llama["max_position_embeddings"],
        pad_token_id=llama.get("pad_token_id"),
        bos_token_id=llama.get("bos_token_id"),
        eos_token_id=tuple(eos) if isinstance(eos, list) else eos,
    )


def adopted_tensor(source: Source, name: str) -> Tensor:
    """One tensor of the adopted model by its Gemma 2 name, in fp32; the post-norms come from `calibrate`."""
    head, _, leaf = name.removesuffix(".weight").rpartition(".")
    if leaf in NORMS:
        return stored_gain(source.tensor(f"{head}.{NORMS[leaf]}.weight").float()) - 1
    weight = source.tensor(name).float()
    if name == "model.norm.weight":
        return weight - 1
    if (norm := READ_NORM.get(leaf)) is not None:
        layer = head.rpartition(".")[0]
        gain_D = source.tensor(f"{layer}.{NORMS[norm]}.weight").float()
        weight = weight * (gain_D / stored_gain(gain_D))
    if leaf == "gate_proj":
        return weight / GELU_OF_SILU
    if leaf == "up_proj":
        return weight * GELU_OF_SILU
    return weight


def stored_gain(gain_D: Tensor) -> Tensor:
    """What a norm's gain becomes when gain - 1 is stored in bf16, and never 0."""
    stored_D = 1 + (gain_D - 1).bfloat16().float()
    return torch.where(stored_D == 0, torch.where(gain_D < 0, -SMALLEST_GAIN, SMALLEST_GAIN), stored_D)


@torch.no_grad()
def calibrate(llama: Llama, tokens_BT: Tensor) -> dict[str, Tensor]:
    """Weights [D] of the post-norms: sqrt(D) x the median RMS of each sub-layer's output, minus one.

    The first position is left out: its outputs are the attention sink's, hundreds of times larger than the others.
    """
    D = llama.config.hidden_size
    weights = {}
    for i, layer in enumerate(llama.layers(tokens_BT)):
        if isinstance(layer, LlamaLayer):
            for norm, out_BTD in zip(POST_NORMS, (layer.attention_out, layer.feedforward_out), strict=True):
                rms = out_BTD[:, 1:].float().square().mean(-1).sqrt().median()
                weights[f"model.layers.{i}.{norm}.weight"] = (math.sqrt(D) * rms - 1).expand(D)
    return weights


def adopted_tensors(
    source: Source, config: ModelConfig, post_norms: Mapping[str, Tensor], lower: Lowering | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the adopted model, one at a time, in fp32."""
    for name in config.parameter_shapes():
        tensor = post_norms[name] if name in post_norms else adopted_tensor(source, name)
        yield name, tensor if lower is None else lower.apply(name, tensor)


def gemma_tokenizer(tokenizer_json: str) -> tuple[str, dict[str, Any]]:
    """The source's tokenizer speaking Gemma's turns: (tokenizer.json, tokenizer_config.json).

    ChatML's three control tokens keep their ids and take the names of Gemma's; other tokenizers stay as they are.
    """
    tokenizer = json.loads(tokenizer_json)
    added = {token["content"] for token in tokenizer["added_tokens"]}
    if set(TURN_TOKENS) - added:
        return tokenizer_json, {"add_bos_token": True}
    for token in tokenizer["added_tokens"]:
        token["content"] = TURN_TOKENS.get(token["content"], token["content"])
    vocab = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {TURN_TOKENS.get(token, token): i for token, i in vocab.items()}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": True,
        "bos_token": "<bos>",
        "eos_token": "<end_of_turn>",
        "pad_token": "<end_of_turn>",
        "clean_up_tokenization_spaces": False,
    }
    return json.dumps(tokenizer, ensure_ascii=False), config


def read_text(path: Path, limit: int = 2**20) -> str:
    """Calibration text from a file, at most `limit` characters."""
    with path.open(encoding="utf-8") as file:
        return file.read(limit)


ROWS: Final = 48
LENGTH: Final = 256
"""Of the text that an adoption is fitted to, at most."""


@dataclass(frozen=True)
class Adopted:
    """What came of an adoption."""

    config: ModelConfig
    kl: float
    """Mean KL(source || adopted model), nats a token, on text that nothing was fitted to."""


@torch.no_grad()
def own_text(llama: Llama, first: int, *, rows: int = ROWS, length: int = LENGTH, progress: bool = True) -> Tensor:
    """What a source itself writes after a first token, at temperature 1: [B, T] of text like the one it knows.

    Models were quantized on such text before: arXiv 2305.17888.
    """
    device, length = llama.head.device, min(length, llama.config.max_position_embeddings)
    # a source's layers all see everything, whatever window the adopted model gets
    config = replace(llama.config, layer_types=(GLOBAL,) * llama.config.num_hidden_layers)
    cache = KVCache(config, rows, length, chunk=1, dtype=llama.head.dtype, device=device)
    tokens_BT = torch.full((rows, length), first, device=device)
    generator = torch.Generator(device).manual_seed(0)
    for at in tqdm(range(length - 1), desc="the source writes", disable=None if progress else True, leave=False):
        pos_B1 = torch.full((rows, 1), at, device=device)
        logits_BV = llama(tokens_BT[:, at : at + 1], pos_B1, cache=cache)[:, 0] @ llama.head.T
        tokens_BT[:, at + 1] = torch.multinomial(logits_BV.softmax(-1), 1, generator=generator)[:, 0]
    return tokens_BT


def text_rows(ids: list[int], first: int | None) -> Tensor:
    """Rows [B, T] of a given text, each from the first token on. AdoptError where it is too short."""
    lead = [] if first is None else [first]
    step = min(LENGTH, len(ids) // 8) - len(lead)
    if step < 16:
        raise AdoptError(f"calibration: got {len(ids)} tokens, allowed are {8 * (16 + len(lead))} or more")
    return torch.tensor([lead + ids[at : at + step] for at in range(0, len(ids) - step + 1, step)])


def model_of(config: ModelConfig, weights: Mapping[str, Tensor]) -> Gemma2:
    """A model in fp32 that holds copies of weights."""
    with torch.device("meta"):
        model = Gemma2(config)
    model = model.to_empty(device=weights[EMBEDDING].device).requires_grad_(False)
    model.tie()
    for name, parameter in model.named_parameters():
        parameter.copy_(weights[name])
    return model


@torch.no_grad()
def distance(llama: Llama, model: Gemma2, tokens_BT: Tensor) -> float:
    """Mean KL(source || model), nats a token, of all positions but the first."""
    pos_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device).expand_as(tokens_BT)
    theirs_XD, ours_XD = (hidden[:, 1:].flatten(0, 1) for hidden in (llama(tokens_BT), model(tokens_BT, pos_BT)))
    head = Head(model.lm_head.weight, model.config.final_logit_softcapping)
    return float(divergence("forward_kl", ours_XD, head, theirs_XD, Head(llama.head, None))[0]) / len(ours_XD)


@torch.no_grad()
def carried(source: Source, llama: Llama, tokens_BT: Tensor, *, progress: bool = False) -> tuple[Gemma2, float]:
    """The adopted model in fp32, on numbers that bf16 holds, and its distance on rows that it was not fitted to."""
    fit_BT, held_BT = tokens_BT[: -(len(tokens_BT) // 8)], tokens_BT[-(len(tokens_BT) // 8) :]
    gains = calibrate(llama, fit_BT[:8])
    weights = dict(adopted_tensors(source, llama.config, gains, lowering(llama, fit_BT)))
    model = model_of(llama.config, weights)
    plain = distance(llama, model, held_BT)
    ballast(model, fit_BT, progress=progress)
    if (kl := distance(llama, model, held_BT)) < plain:
        return model, kl
    return model_of(llama.config, weights), plain


def adopt(
    source: str | Path,
    out: str | Path,
    *,
    calibration: str | None = None,
    window: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Adopted:
    """Put a Llama-style checkpoint into the Gemma 2 architecture, as a folder in bf16.

    Args:
        source: a GGUF file, or a Hugging Face folder of model_type llama.
        out: the folder to write, by one atomic rename.
        calibration: text that ballast and lowering are fitted to, some thousand tokens; by default the source writes
            its own.
        window: positions that the even layers see; by default the source's context, as it has no windows. A window
            costs much past its end until the model is healed: heads rest on the first token, which is then out of
            sight (SmolLM2-135M with Gemma 2's 4096: 0.4 nats a token instead of 0.04).
        overwrite: replace a checkpoint that is there.
        progress: show bars on stderr.

    Source and model are held in fp32. Raises AdoptError, GgufError, CheckpointError or an OSError.
    """
    refuse(Path(out).expanduser().resolve(), overwrite)  # now, not after minutes
    if window is not None and window < 1:
        raise AdoptError(f"window: got {window}, allowed is 1 or more")
    tensors, llama_config, tokenizer_json, settings = _open(Path(source).expanduser())
    spoken, gemma_settings = gemma_tokenizer(tokenizer_json)
    settings = gemma_settings if spoken != tokenizer_json else settings | gemma_settings
    tokenizer = LibraryTokenizer.from_str(spoken)
    bos, eos, pad = special_ids(tokenizer, settings)
    config = adopted_config(llama_config)
    config = replace(
        config, bos_token_id=bos, eos_token_id=eos, pad_token_id=pad,
        sliding_window=window or config.max_position_embeddings,
    )  # fmt: skip
    if calibration is not None:
        tokens_BT = text_rows(tokenizer.encode(calibration, add_special_tokens=False).ids[: ROWS * LENGTH], bos)
    llama = Llama(tensors, config)
    if calibration is None:
        tokens_BT = own_text(llama, bos or 0, progress=progress)
    model, kl = carried(tensors, llama, tokens_BT, progress=progress)
    generation = {"bos_token_id": config.bos_token_id, "eos_token_id": list(config.eos_ids)}
    files = {"tokenizer.json": spoken.encode(), "tokenizer_config.json": json.dumps(settings, indent=2).encode()}
    weights = ((name, weight.to(torch.bfloat16)) for name, weight in model.named_parameters())
    write(out, weights, config=config.to_hf(), generation_config=generation, extra_files=files, overwrite=overwrite)
    return Adopted(config, kl)


def _open(source: Path) -> tuple[Source, dict[str, Any], str, dict[str, Any]]:
    """Tensors, Llama configuration, tokenizer.json and tokenizer_config.json of a GGUF file or a folder."""
    if source.is_file():
        gguf = Gguf(source)
        if gguf.architecture != "llama":
            raise AdoptError(f"{source}: architecture {gguf.architecture!r}, allowed is 'llama'")
        return gguf, gguf.hf_config(), gguf.tokenizer_json(), gguf.tokenizer_config()
    checkpoint = Checkpoint(source)
    if not (source / "tokenizer.json").is_file():
        raise AdoptError(f"{source}: no tokenizer.json, which the adopted model needs")
    settings = source / "tokenizer_config.json"
    return (
        checkpoint,
        {"tie_word_embeddings": False, **checkpoint.config},  # transformers' default where Llama's config is silent
        (source / "tokenizer.json").read_text(encoding="utf-8"),
        read_json(settings) if settings.is_file() else {},
    )


def special_ids(tokenizer: LibraryTokenizer, settings: Mapping[str, Any]) -> list[int | None]:
    """Ids of BOS, EOS and padding, as the adopted tokenizer's configuration names them.

    The source's own ids do not serve: SmolLM2 calls `<|im_start|>` its BOS, which becomes `<start_of_turn>` here.
    """
    named = [settings.get(f"{role}_token") for role in ("bos", "eos", "pad")]
    texts = [token["content"] if isinstance(token, Mapping) else token for token in named]
    return [None if text is None else tokenizer.token_to_id(text) for text in texts]
