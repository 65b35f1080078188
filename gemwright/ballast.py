"""Ballast: the norms behind an adopted model's sub-layers made to pass each output at its own size.

A Llama adds a sub-layer's output to the stream as it is. Gemma 2 norms it first, which takes away how large it was. So
one dimension of the stream is given up, and every sub-layer writes a large constant c there, its ballast: the norm then
divides by sqrt(|out|^2 + c^2), nearly c whatever the token, and its gain multiplies by c. The gain of the dimension
itself is 0, so that the constant goes no further.

No weight of Gemma 2 has a bias, so a constant has to be read from the inputs. Least squares finds a vector f with which
the normed inputs of all tokens have a product near 1 (within 2.5 % on SmolLM2-135M). It reaches the output so:

* Attention: one feature of one value head becomes f. The weights of attention add up to 1, so its mixture is a mean of
  numbers near 1.
* Feed-forward: two hidden units. gelu has a minimum, where it is flat, so gelu(minimum f) f is nearly gelu(minimum) f;
  and gelu(8 f) f is 8 f^2. 2 f - f^2 = 1 - (1 - f)^2, which is as good as 1.

What is given up is what matters least: the dimension that is written least, the quietest feature and units.

Legend: B rows, T tokens, X tokens of all rows, L layers, D model, N query heads, K key/value heads, G query heads of a
key/value head, H head dim, I hidden units.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from tqdm import tqdm

from gemwright.config import ModelConfig
from gemwright.llama import POST_NORMS
from gemwright.model import Block, Gemma2
from gemwright.ops.attention import Visibility
from gemwright.ops.gelu import gated_gelu
from gemwright.ops.rope import rope_tables

STATE: Final = "ballast"
"""What the names of its tensors begin with, in a file."""
GELU_MINIMUM: Final = -0.75246
GELU_AT_MINIMUM: Final = -0.17004
"""Where gelu_tanh is smallest, and how small."""
STRAIGHT: Final = 8.0
"""Where gelu is the identity."""
MARGIN: Final = 4.0
"""Of the ballast over the largest output but one in a thousand."""
FIRST_SHARE: Final = 0.25
"""Of the fit's weight, that of the first position: a row's attention sink, whose states are like no others."""
RIDGE: Final = 1e-5
"""Of the fit, beside features scaled to a second moment of 1; 1e-3 does as well."""
ATTENTION: Final = ("v_proj", "o_proj", "post_attention_layernorm")
FEED_FORWARD: Final = ("gate_proj", "up_proj", "down_proj", "post_feedforward_layernorm")
"""Modules of a block that carry its ballast, by the last part of their names."""


@dataclass(frozen=True)
class Ballast:
    """What a model carries: f, what was given up for it, and the constants; of a layer attention first."""

    config: ModelConfig
    dimension: Tensor
    near_one_L2D: Tensor
    """Numbers that bf16 holds."""
    feature_L: Tensor
    """Of the K * H features of the values."""
    units_L2: Tensor
    size_L2: Tensor

    @classmethod
    def empty(cls, config: ModelConfig, device: torch.device) -> Ballast:
        """One to be filled layer by layer."""
        L, D = config.num_hidden_layers, config.hidden_size
        with device:
            whole = [torch.zeros(size, dtype=torch.int64) for size in ((), (L,), (L, 2))]
            return cls(config, whole[0], torch.zeros(L, 2, D), whole[1], whole[2], torch.zeros(L, 2))

    def apply(self, name: str, weight: Tensor) -> Tensor:
        """A tensor of the adopted model, by its name, with the ballast in it."""
        parts = name.split(".")
        leaf = parts[-2]
        if leaf not in (*ATTENTION, *FEED_FORWARD):
            return weight
        layer, half, weight, at = int(parts[2]), int(leaf in FEED_FORWARD), weight.clone(), self.dimension
        near_one_D, size = self.near_one_L2D[layer, half], self.size_L2[layer, half]
        once, squared = self.units_L2[layer].unbind()
        if leaf in POST_NORMS:
            weight[:] = size - 1
            weight[at] = -1
        elif leaf == "v_proj":
            weight[self.feature_L[layer]] = near_one_D
        elif leaf == "o_proj":
            K, H = self.config.num_key_value_heads, self.config.head_dim
            read_DKGH = weight.view(len(weight), K, -1, H)
            head, feature = self.feature_L[layer] // H, self.feature_L[layer] % H
            read_DKGH[:, head, :, feature] = 0
            read_DKGH[at] = 0
            read_DKGH[at, head, :, feature] = size / read_DKGH.shape[2]
        elif leaf == "gate_proj":
            weight[once], weight[squared] = GELU_MINIMUM * near_one_D, STRAIGHT * near_one_D
        elif leaf == "up_proj":
            weight[once], weight[squared] = near_one_D / GELU_AT_MINIMUM, near_one_D / STRAIGHT
        else:
            weight[:, self.units_L2[layer]] = 0
            weight[at] = 0
            weight[at, once], weight[at, squared] = 2 * size, -size
        return weight

    def state(self) -> dict[str, Tensor]:
        """Its tensors by name, as a file of safetensors holds them."""
        held = {
            "dimension": self.dimension, "near_one": self.near_one_L2D.bfloat16(), "feature": self.feature_L,
            "units": self.units_L2, "size": self.size_L2,
        }  # fmt: skip
        return {f"{STATE}.{name}": tensor.contiguous() for name, tensor in held.items()}

    @classmethod
    def of(cls, state: Mapping[str, Tensor], config: ModelConfig) -> Ballast | None:
        """The one among a file's tensors; None where there is none."""
        if f"{STATE}.size" not in state:
            return None
        names = ("dimension", "near_one", "feature", "units", "size")
        dimension, near_one_L2D, feature_L, units_L2, size_L2 = (state[f"{STATE}.{name}"] for name in names)
        return cls(config, dimension, near_one_L2D.float(), feature_L, units_L2, size_L2)


@torch.no_grad()
def ballast(model: Gemma2, tokens_BT: Tensor, *, progress: bool = False) -> Ballast:
    """Fits the ballast and puts it into the model.

    Args:
        model: adopted, in fp32. Its weights are rounded to bf16, as they will be written, and changed; each layer is
            fitted to what the layers before it now do.
        tokens_BT: rows of text from their first token on; some thousand tokens.
        progress: show a bar on stderr.
    """
    config, found = model.config, Ballast.empty(model.config, model.lm_head.weight.device)
    for weight in model.parameters():
        weight.copy_(weight.bfloat16())
    found.dimension.copy_(_quietest_dimension(model))
    pos_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device).expand_as(tokens_BT)
    tables, attend = rope_tables(pos_BT, config.head_dim, config.rope_theta), model.attention.backend("prefill")
    x_BTD = model.embed(tokens_BT)
    layers = tqdm(model.model.layers, "fitting layers", disable=None if progress else True, leave=False)
    for i, block in enumerate(layers):
        assert isinstance(block, Block)
        see = Visibility(pos_BT, pos_BT, window=config.window(i))
        in_BTD = block.input_layernorm(x_BTD)
        found.near_one_L2D[i, 0] = _near_one(in_BTD)
        found.size_L2[i, 0] = _size(block.self_attn(in_BTD, see, tables, attend, None), found.dimension)
        found.feature_L[i] = _quietest_feature(block, in_BTD, config)
        _put(found, i, block, ATTENTION)
        x_BTD = x_BTD + block.post_attention_layernorm(block.self_attn(in_BTD, see, tables, attend, None))
        in_BTD = block.pre_feedforward_layernorm(x_BTD)
        found.near_one_L2D[i, 1] = _near_one(in_BTD)
        found.size_L2[i, 1] = _size(block.mlp(in_BTD), found.dimension)
        found.units_L2[i] = _quietest_units(block, in_BTD)
        _put(found, i, block, FEED_FORWARD)
        x_BTD = x_BTD + block.post_feedforward_layernorm(block.mlp(in_BTD))
    return found


def _put(ballast: Ballast, layer: int, block: Block, leaves: tuple[str, ...]) -> None:
    """A layer's part into its weights, rounded."""
    for name, weight in block.named_parameters():
        if name.split(".")[-2] in leaves:
            weight.copy_(ballast.apply(f"model.layers.{layer}.{name}", weight).bfloat16())


def _near_one(in_BTD: Tensor) -> Tensor:
    """f: least squares for in . f = 1, in numbers that bf16 holds."""
    B, T, D = in_BTD.shape
    weight_BT1 = in_BTD.new_ones(B, T, 1)
    weight_BT1[:, 0] = FIRST_SHARE * T
    in_XD, weighed_XD = in_BTD.flatten(0, 1), (in_BTD * weight_BT1).flatten(0, 1)
    moment_DD, mean_D = (in_XD.mT @ weighed_XD).double(), weighed_XD.sum(0).double()
    scale_D = moment_DD.diagonal().clamp(min=1e-12).rsqrt()
    scaled_DD = moment_DD * scale_D * scale_D[:, None] + RIDGE * torch.eye(D, device=in_BTD.device)
    near_one_D: Tensor = torch.linalg.solve(scaled_DD, mean_D * scale_D) * scale_D
    return near_one_D.bfloat16().float()


def _size(out_BTD: Tensor, dimension: Tensor) -> Tensor:
    """The constant: larger than nearly all outputs, and not smaller than any."""
    rest_D = torch.arange(out_BTD.shape[-1], device=out_BTD.device) != dimension
    norm_BT = (out_BTD * rest_D).norm(dim=-1)
    usual_X = norm_BT[:, 1:].flatten().sort().values
    return torch.maximum(MARGIN * usual_X[int(0.999 * (len(usual_X) - 1))], norm_BT.max())


def _quietest_dimension(model: Gemma2) -> Tensor:
    """Where the sub-layers write least."""
    shares = []
    for block in model.model.layers:
        assert isinstance(block, Block)
        for linear in (block.self_attn.o_proj, block.mlp.down_proj):
            energy_D = linear.weight.square().sum(1)
            shares.append(energy_D / energy_D.mean())
    quietest: Tensor = torch.stack(shares).mean(0).argmin()
    return quietest


def _quietest_feature(block: Block, in_BTD: Tensor, config: ModelConfig) -> Tensor:
    """Of the K * H features of the values that which moves attention's output least."""
    value_X = block.self_attn.v_proj(in_BTD)[:, 1:].square().mean((0, 1))
    heads = (config.hidden_size, config.num_key_value_heads, -1, config.head_dim)
    read_X = block.self_attn.o_proj.weight.view(heads).square().sum((0, 2)).flatten()
    quietest: Tensor = (value_X * read_X).argmin()
    return quietest


def _quietest_units(block: Block, in_BTD: Tensor) -> Tensor:
    """The two hidden units that move the feed-forward's output least."""
    mlp = block.mlp
    hidden_BTI = gated_gelu(mlp.gate_proj(in_BTD), mlp.up_proj(in_BTD))
    moved_I = hidden_BTI[:, 1:].square().mean((0, 1)) * mlp.down_proj.weight.square().sum(0)
    quietest_2: Tensor = moved_I.topk(2, largest=False).indices
    return quietest_2
