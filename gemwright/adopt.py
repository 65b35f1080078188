"""adopt: put a Llama-style model into the Gemma 2 architecture, as close as its traits allow, ready to be healed.

What carries over exactly: the linears, the embedding, rotary base, eps, and the norms before attention and feed-forward
(Gemma multiplies by 1 + w, so w - 1). Gemma 2 scales the embedding by sqrt(D), so its residual stream is sqrt(D) times
the source's; the norms in front of every sub-layer cancel that.

What does not, and how close it comes:

* SiLU becomes GELU. silu(x) = x sigmoid(x) and gelu(x) is nearly x sigmoid(1.702 x) (arXiv 1606.08415), so
  silu(g) u is nearly gelu(g / 1.702) 1.702 u: the gate's rows are divided by 1.702 and the up rows multiplied.
  Measured on SmolLM2-135M: KL to the source 1.84 nats a token instead of 2.39 before any training.
* Each sub-layer's output passes a norm that the source lacks. Its gain is constant: sqrt(D) times the median over
  calibration tokens of the RMS of the source's output there. The token-dependent size of the outputs is lost.
* The final cap of 30 bends the source's largest logits; they are lowered first (`lowering.py`). Measured on
  SmolLM2-135M, the cap costs 0.51 and 0.31 nats a token on prose and on answers as it is, and 0.04 and 0.06 after that.
* The attention cap of 50, and a window of 4096 on even layers, which a context of 4096 or less does not feel.

Legend: B rows, T tokens, D model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from tokenizers import Tokenizer as LibraryTokenizer
from torch import Tensor
from tqdm import tqdm

from gemwright.checkpoint import Checkpoint, write
from gemwright.config import ModelConfig
from gemwright.gguf import Gguf
from gemwright.llama import NORMS, Llama, LlamaLayer, Source
from gemwright.lowering import Lowering, lowering
from gemwright.weights import read_json

GELU_OF_SILU: Final = 1.702
TURN_TOKENS: Final = {"<|im_start|>": "<start_of_turn>", "<|im_end|>": "<end_of_turn>", "<|endoftext|>": "<bos>"}
"""ChatML's control tokens and Gemma's with the same role; the turn format is the same but for their names."""

POST_NORMS: Final = ("post_attention_layernorm", "post_feedforward_layernorm")


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
        return source.tensor(f"{head}.{NORMS[leaf]}.weight").float() - 1
    weight = source.tensor(name).float()
    if name == "model.norm.weight":
        return weight - 1
    if leaf == "gate_proj":
        return weight / GELU_OF_SILU
    if leaf == "up_proj":
        return weight * GELU_OF_SILU
    return weight


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


# Plain prose on everyday things, written for this: the medians that calibrate the post-norms need a few hundred tokens
# of ordinary text, and a fixed one makes the result repeatable.
CALIBRATION: Final = """\
The ferry leaves the harbour at six in the morning, when the streets are still dark and the bakers are the only people
awake. It carries letters, bread, two or three fishermen and, in summer, a crowd of visitors with heavy bags. The
crossing takes an hour. On a calm day you can read a newspaper on deck; in a storm everybody sits below and waits.

Water boils at one hundred degrees at sea level, but at a lower temperature in the mountains, because the air presses on
it less. That is why a cook high above the valley needs more time for beans than a cook on the coast. The same rule
explains the pressure cooker: it closes the steam in, raises the pressure, and so lets the water grow hotter.

"Have you seen my keys?" asked Maria. Her brother looked up from his book. "On the shelf by the door, where you always
leave them," he said. She laughed, took them, and ran down the stairs. The bus was already at the corner, and the
driver, who knew her well, waited a moment longer than he had to.

To mend a flat tyre, first take the wheel off and let out what air is left. Press the edge of the tyre inwards all
around, then lift it over the rim with two levers. Pull out the tube, pump it up a little, and listen for the hole, or
hold it under water and look for bubbles. Dry the place, roughen it, spread the glue thinly, wait five minutes, and
press the patch on firmly.

In the year 1815 a mountain on an island far to the south threw so much ash into the air that the next summer hardly
came. Snow fell in June, the harvest failed in many countries, and bread became dear. Few people then knew the reason.
It took a hundred years until somebody put the old reports together and understood what had happened.

A triangle has three sides and three angles, and in a plane the angles add up to 180 degrees. If two sides are equally
long, the angles opposite to them are equal as well. For example, with sides of 3, 4 and 5 the largest angle is a right
one, since 9 + 16 = 25; builders have used a rope with twelve knots in this way for thousands of years.

Our garden is small, but there is room for an apple tree, some herbs and a bench. In spring the blackbirds come first,
then the bees. My grandmother used to say that one should plant a tree even if one will not eat its fruit, because
somebody else planted the trees whose fruit one eats now. I did not understand her when I was a child.

def mean(values):
    total = 0.0
    for value in values:
        total += value
    return total / len(values)
"""
CALIBRATION_LENGTH: Final = 256
"""Tokens of one row of calibration text."""


def adopt(
    source: str | Path,
    out: str | Path,
    *,
    calibration: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> ModelConfig:
    """Put a Llama-style checkpoint into the Gemma 2 architecture, as a folder in bf16; returns its configuration.

    Args:
        source: a GGUF file, or a Hugging Face folder of model_type llama.
        out: the folder to write, by one atomic rename.
        calibration: text on which the post-norms' gains and the logits are measured; None takes CALIBRATION.
        overwrite: replace a checkpoint that is there.
        progress: show a bar on stderr.

    The source is held in fp32 while it calibrates. Raises AdoptError, GgufError, CheckpointError or an OSError.
    """
    tensors, llama_config, tokenizer_json, settings = _open(Path(source).expanduser())
    spoken, gemma_settings = gemma_tokenizer(tokenizer_json)
    settings = gemma_settings if spoken != tokenizer_json else settings | gemma_settings
    tokenizer = LibraryTokenizer.from_str(spoken)
    bos, eos, pad = special_ids(tokenizer, settings)
    config = replace(adopted_config(llama_config), bos_token_id=bos, eos_token_id=eos, pad_token_id=pad)
    ids = tokenizer.encode(CALIBRATION if calibration is None else calibration, add_special_tokens=False).ids
    first = [] if config.bos_token_id is None else [config.bos_token_id]
    width = min(CALIBRATION_LENGTH, len(ids) + len(first))
    step = width - len(first)
    rows = [first + ids[at : at + step] for at in range(0, len(ids) - step + 1, step)]
    if step < 16 - len(first):
        raise AdoptError(f"calibration: got {len(ids)} tokens, allowed are 16 or more")
    llama, tokens_BT = Llama(tensors, config), torch.tensor(rows)
    each = tqdm(
        adopted_tensors(tensors, config, calibrate(llama, tokens_BT), lowering(llama, tokens_BT)),
        total=len(config.parameter_shapes()),
        desc="adopting",
        unit="tensor",
        disable=None if progress else True,
        leave=False,
    )
    generation = {"bos_token_id": config.bos_token_id, "eos_token_id": list(config.eos_ids)}
    files = {"tokenizer.json": spoken.encode(), "tokenizer_config.json": json.dumps(settings, indent=2).encode()}
    written = ((name, tensor.to(torch.bfloat16)) for name, tensor in each)
    write(out, written, config=config.to_hf(), generation_config=generation, extra_files=files, overwrite=overwrite)
    return config


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
