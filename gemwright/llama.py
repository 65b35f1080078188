"""A Llama as a plain function over its tensors: what is adopted, what calibrates it, and the teacher that heals it.

Legend: B rows, T tokens, N query heads, K key/value heads, H head dim, D model.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from gemwright.cache import Cache
from gemwright.config import ModelConfig
from gemwright.ops.attention import Attend, Visibility, reference
from gemwright.ops.rope import rope_tables, rotate

EMBEDDING: Final = "model.embed_tokens.weight"
# Norms: Gemma 2's name -> Llama's. Llama's "post attention" norm stands in front of the feed-forward.
NORMS: Final = {"input_layernorm": "input_layernorm", "pre_feedforward_layernorm": "post_attention_layernorm"}


POST_NORMS: Final = ("post_attention_layernorm", "post_feedforward_layernorm")
"""Gemma 2's alone: behind each sub-layer."""


class Source(Protocol):
    """Tensors by Hugging Face's Llama names: a `Gguf` or a `Checkpoint`."""

    def tensor(self, name: str, rows: slice | None = None) -> Tensor: ...


def llama_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """RMSNorm as Llama has it: cast first, then multiply."""
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight_D


def before_attention(
    x_BTD: Tensor, w: dict[str, Tensor], tables: tuple[Tensor, Tensor], head_dim: int, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A Llama layer up to its attention: the normed input, queries, keys and values by head."""
    a_in = llama_norm(x_BTD, w["input_layernorm.weight"], eps)
    q, k, v = (F.linear(a_in, w[f"self_attn.{n}_proj.weight"]).view(*x_BTD.shape[:2], -1, head_dim) for n in "qkv")
    return a_in, rotate(q, tables), rotate(k, tables), v


def after_attention(
    x_BTD: Tensor, mixed: Tensor, w: dict[str, Tensor], eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A Llama layer from its attention on: the new stream, attention's output, the feed-forward's input and output."""
    a_out = F.linear(mixed, w["self_attn.o_proj.weight"])
    x_BTD = x_BTD + a_out
    f_in = llama_norm(x_BTD, w["post_attention_layernorm.weight"], eps)
    gate, up = (F.linear(f_in, w[f"mlp.{n}_proj.weight"]) for n in ("gate", "up"))
    f_out = F.linear(F.silu(gate) * up, w["mlp.down_proj.weight"])
    return x_BTD + f_out, a_out, f_in, f_out


@dataclass(frozen=True)
class LlamaLayer:
    """What one layer of the source did: the normed inputs and the outputs of both sub-layers, all [B, T, D]."""

    attention_in: Tensor
    mixed: Tensor
    """What attention's output projection reads, [B, T, N * H]."""
    attention_out: Tensor
    feedforward_in: Tensor
    feedforward_out: Tensor


class Llama:
    """The source as a plain function over its tensors: calibrates the post-norms, and is the teacher that heals.

    Args:
        source: its tensors.
        config: the adopted configuration, which has the same shapes.
        dtype, device: of the weights, and so of the computation.
        attend: the attention to use where a cache has none of its own; it is called without a cap.
    """

    def __init__(
        self,
        source: Source,
        config: ModelConfig,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        attend: Attend = reference,
    ) -> None:
        names = [n for n in config.parameter_shapes() if n.removesuffix(".weight").rpartition(".")[2] not in NORMS]
        names = [n for n in names if not n.endswith("post_feedforward_layernorm.weight")]
        names += [f"model.layers.{i}.input_layernorm.weight" for i in range(config.num_hidden_layers)]
        self.weights = {name: source.tensor(name).to(device, dtype) for name in names}
        self.weights_of_layer = [
            {
                n.removeprefix(f"model.layers.{i}."): w
                for n, w in self.weights.items()
                if n.startswith(f"model.layers.{i}.")
            }
            for i in range(config.num_hidden_layers)
        ]
        self.config, self.attend = config, attend
        self._before, self._after = before_attention, after_attention

    @property
    def head(self) -> Tensor:
        """The tied output head [V, D]."""
        return self.weights[EMBEDDING]

    def replaced(self, changes: Mapping[str, Tensor]) -> Llama:
        """The same source with other tensors in some places; the rest is shared."""
        other = copy.copy(self)
        other.weights = {**self.weights, **changes}
        other.weights_of_layer = [
            {name: other.weights[f"model.layers.{i}.{name}"] for name in held}
            for i, held in enumerate(self.weights_of_layer)
        ]
        return other

    def compile(self) -> None:
        """Compile what stands between two attentions, once for all layers: worth its seconds for a long run on CUDA."""
        self._before, self._after = (torch.compile(f, dynamic=False) for f in (before_attention, after_attention))

    def layers(
        self, tokens_BT: Tensor, pos_BT: Tensor | None = None, doc_BT: Tensor | None = None, cache: Cache | None = None
    ) -> Iterator[LlamaLayer | Tensor]:
        """Each layer's record in turn, then the final hidden states [B, T, D]; arguments as of `Gemma2.forward`.

        Without positions each row is one text from its beginning.
        """
        c = self.config
        if pos_BT is None:
            pos_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device).expand_as(tokens_BT)
        see = Visibility(pos_BT, pos_BT if cache is None else cache.advance(pos_BT)[1], doc_BT, doc_BT)
        tables = rope_tables(pos_BT, c.head_dim, c.rope_theta)
        attend = (cache.attend if cache is not None else None) or self.attend
        x = F.embedding(tokens_BT, self.head)
        for i in range(c.num_hidden_layers):
            w = self.weights_of_layer[i]
            a_in, q, k, v = self._before(x, w, tables, c.head_dim, c.rms_norm_eps)
            if cache is not None:
                k, v = cache.write(i, k, v)
            mixed = attend(q, k, v, see, scale=c.scale, cap=None).flatten(2)
            x, a_out, f_in, f_out = self._after(x, mixed, w, c.rms_norm_eps)
            yield LlamaLayer(a_in, mixed, a_out, f_in, f_out)
        yield llama_norm(x, self.weights["model.norm.weight"], c.rms_norm_eps)

    def __call__(
        self, tokens_BT: Tensor, pos_BT: Tensor | None = None, doc_BT: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        """The final hidden states [B, T, D] alone; no layer's record outlives it."""
        last = None
        for last in self.layers(tokens_BT, pos_BT, doc_BT, cache):  # noqa: B007
            pass
        assert isinstance(last, Tensor)
        return last
