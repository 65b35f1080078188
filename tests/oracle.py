"""The oracle: transformers' Gemma2ForCausalLM, eager, fp32, on the same weights as ours.

Weights are drawn wide, so that scores and logits pass their caps and every layer's output counts beside the embedding.
An entry is one way through our model, named in `ENTRIES`; each gives logits that must equal the oracle's whole-sequence
forward at the tokens that are no padding.

Legend: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain, repeat
from typing import Any, Final, TypeAlias

import torch
import transformers
from torch import Tensor

from gemwright.cache import KVCache
from gemwright.config import ModelConfig
from gemwright.model import Gemma2
from gemwright.ops.attention import PADDING, Attention

TOLERANCE: Final = 1e-4
"""Relative to the largest magnitude of the oracle's tensor."""
Oracle: TypeAlias = Any
"""A `transformers.Gemma2ForCausalLM`, whose own annotations are not read."""


def debug(**changes: object) -> ModelConfig:
    """The debug preset with some fields replaced; the layer types follow the number of layers."""
    base = {k: v for k, v in ModelConfig.preset("debug").to_hf().items() if k != "layer_types"}
    if "rope_theta" in changes:
        base.pop("rope_parameters")
    return ModelConfig.from_hf({**base, **changes})


def weights(config: ModelConfig, *, seed: int = 0) -> dict[str, Tensor]:
    """Random weights: queries and keys wide enough for scores past 50, embeddings for logits past 30."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in config.parameter_shapes().items():
        x = torch.randn(shape, generator=generator)
        leaf = name.removesuffix(".weight").rpartition(".")[2]
        if leaf in ("q_proj", "k_proj"):
            x *= 6.5 / config.hidden_size**0.5
        elif leaf == "embed_tokens":
            x *= 14 / config.hidden_size**0.5
        elif leaf.startswith("post_"):
            x = 5 + x  # the residual stream has an RMS of 14
        elif len(shape) == 1:
            x *= 0.3
        else:
            x /= shape[1] ** 0.5
        state[name] = x
    return state


def ours(config: ModelConfig, state: Mapping[str, Tensor], attention: str = "blocked") -> Gemma2:
    """Our model on these weights, one backend in every phase."""
    model = Gemma2(config, Attention(attention, attention, attention)).eval().requires_grad_(False)
    model.load_state_dict({**state, "lm_head.weight": state["model.embed_tokens.weight"]})
    return model


def oracle(config: ModelConfig, state: Mapping[str, Tensor]) -> Oracle:
    """The oracle on these weights."""
    raw = transformers.Gemma2Config(**config.to_hf())
    raw._attn_implementation = "eager"
    model: Oracle = transformers.Gemma2ForCausalLM(raw).eval().requires_grad_(False)
    model.load_state_dict({**state, "lm_head.weight": state["model.embed_tokens.weight"]})
    assert model.config._attn_implementation == "eager"
    return model


def pair(config: ModelConfig, attention: str = "blocked", *, seed: int = 0) -> tuple[Gemma2, Oracle]:
    """Our model and the oracle on the same weights."""
    state = weights(config, seed=seed)
    return ours(config, state, attention), oracle(config, state)


def oracle_logits(model: Oracle, tokens_BT: Tensor) -> Tensor:
    """Logits [B, T, V] of whole sequences."""
    with torch.no_grad():
        logits_BTV: Tensor = model(tokens_BT, use_cache=False).logits
    return logits_BTV


def tokens(config: ModelConfig, rows: int, length: int, *, seed: int = 1) -> Tensor:
    """Random ids [B, T]."""
    return torch.randint(config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


def relative(got: Tensor, want: Tensor) -> float:
    """Largest difference over the largest magnitude; NaN or infinity anywhere in `got` counts as infinite."""
    assert got.shape == want.shape, (got.shape, want.shape)
    got, want = got.detach().double(), want.detach().double()
    if not got.isfinite().all():
        return float("inf")
    return float((got - want).abs().max() / want.abs().max())


def distance(got: Tensor, want: Tensor) -> float:
    """The larger of the relative differences of logits and of log-probabilities."""
    return max(relative(got, want), relative(got.log_softmax(-1), want.log_softmax(-1)))


def noise(got: Tensor, want: Tensor) -> float:
    """Root mean square of the difference of log-probabilities, for bf16: the largest one is a matter of luck."""
    assert got.shape == want.shape, (got.shape, want.shape)
    return float((got.double().log_softmax(-1) - want.double().log_softmax(-1)).square().mean().sqrt())


def positions(rows: int, length: int) -> Tensor:
    """0 .. T-1 in every row."""
    return torch.arange(length).expand(rows, length)


def read(
    model: Gemma2, tokens_BT: Tensor, sizes: Sequence[int], *, cache: KVCache | None = None, start: int = 0
) -> Tensor:
    """Logits [B, T - start, V], read through a cache in chunks of these sizes, the last of which repeats."""
    B, T = tokens_BT.shape
    cache = cache or KVCache(model.config, B, T, chunk=max(sizes), dtype=torch.float32, device=tokens_BT.device)
    parts = []
    for size in chain(sizes, repeat(sizes[-1])):
        end = min(T, start + size)
        parts.append(model(tokens_BT[:, start:end], torch.arange(start, end).expand(B, -1), cache=cache))
        start = end
        if start == T:
            break
    return model.logits(torch.cat(parts, dim=1))


def forward(model: Gemma2, tokens_BT: Tensor) -> Tensor:
    return model.logits(model(tokens_BT, positions(*tokens_BT.shape)))


def prefill(model: Gemma2, tokens_BT: Tensor) -> Tensor:
    return read(model, tokens_BT, [5])


def decode(model: Gemma2, tokens_BT: Tensor) -> Tensor:
    return read(model, tokens_BT, [1])


def mixed(model: Gemma2, tokens_BT: Tensor) -> Tensor:
    return read(model, tokens_BT, [1, 7, 2, 1, 4, 3])


def drafts(model: Gemma2, tokens_BT: Tensor) -> Tensor:
    """Before each chunk of true tokens a wrong draft is written at its place and beyond, and rejected."""
    B, T = tokens_BT.shape
    cache = KVCache(model.config, B, T + 4, chunk=4, dtype=torch.float32)
    parts = []
    for start in range(0, T, 3):
        draft_B4 = tokens_BT.new_full((B, 4), 7)
        model(draft_B4, torch.arange(start, start + 4).expand(B, -1), cache=cache)
        end = min(T, start + 3)
        parts.append(model(tokens_BT[:, start:end], torch.arange(start, end).expand(B, -1), cache=cache))
    return model.logits(torch.cat(parts, dim=1))


def padded(model: Gemma2, tokens_BT: Tensor, *, left: bool, cached: bool) -> Tensor:
    """The rows among padding on one side, in a batch with a second, shorter copy of each row."""
    B, T = tokens_BT.shape
    short, width = T - 6, T + 3
    batch, pos = tokens_BT.new_full((2 * B, width), 9), torch.full((2 * B, width), PADDING)
    spans = []
    for row in range(2 * B):
        length = T if row < B else short
        start = width - length if left else 0
        spans.append(slice(start, start + length))
        batch[row, spans[-1]], pos[row, spans[-1]] = tokens_BT[row % B, :length], torch.arange(length)
    if cached:
        cache = KVCache(model.config, 2 * B, width, chunk=4, dtype=torch.float32)
        cut = [slice(i, i + 4) for i in range(0, width, 4)]
        hidden = torch.cat([model(batch[:, c], pos[:, c], cache=cache) for c in cut], dim=1)
    else:
        hidden = model(batch, pos)
    logits = model.logits(hidden)
    assert logits.isfinite().all()
    full = torch.stack([logits[row, spans[row]] for row in range(B)])
    prefix = torch.stack([logits[B + row, spans[B + row]] for row in range(B)])
    assert relative(prefix, full[:, :short]) < TOLERANCE
    return full


def packed(model: Gemma2, tokens_BT: Tensor) -> Tensor:
    """All rows as documents of one packed row."""
    B, T = tokens_BT.shape
    docs = torch.arange(B).repeat_interleave(T)
    hidden = model(tokens_BT.reshape(1, -1), positions(B, T).reshape(1, -1), docs[None])
    return model.logits(hidden).view(B, T, -1)


ENTRIES: Final[dict[str, Callable[[Gemma2, Tensor], Tensor]]] = {
    "forward": forward,
    "prefill": prefill,
    "decode": decode,
    "mixed": mixed,
    "drafts": drafts,
    "left": lambda model, x: padded(model, x, left=True, cached=False),
    "right": lambda model, x: padded(model, x, left=False, cached=False),
    "left_cached": lambda model, x: padded(model, x, left=True, cached=True),
    "right_cached": lambda model, x: padded(model, x, left=False, cached=True),
    "packed": packed,
}
