"""Post-norms made nearly linear: the read-out, the constant, and a whole model nearer to its source."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from gemwright.adopt import Llama, adopted_config, adopted_tensors, calibrate
from gemwright.delta import compress, healed, update
from gemwright.linearise import constant, linearise, readout
from gemwright.model import Gemma2

RAW = dict(
    model_type="llama", vocab_size=97, hidden_size=96, intermediate_size=80, num_hidden_layers=3,
    num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-5, rope_theta=1e4,
    tie_word_embeddings=True, hidden_act="silu",
)  # fmt: skip


class Weights:
    """A random Llama whose streams have a large common part, as those of trained ones do."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(5)
        self.state: dict[str, Tensor] = {}
        for name, shape in adopted_config(RAW).parameter_shapes().items():
            self.state[name] = torch.randn(shape, generator=generator) / math.sqrt(shape[-1])
            if len(shape) == 1:
                self.state[name] = 1 + 0.2 * torch.randn(shape, generator=generator)
            if "gate_proj" in name or "up_proj" in name:
                self.state[name] *= 3  # outputs of all sizes
        self.state["model.embed_tokens.weight"] *= 4
        self.state["model.embed_tokens.weight"][:, :8] += 6

    def tensor(self, name: str, rows: slice | None = None) -> Tensor:
        return self.state[name] if rows is None else self.state[name][rows]


def test_a_read_out_is_one_where_the_inputs_have_a_common_part() -> None:
    h_XI = torch.randn(400, 20, generator=torch.Generator().manual_seed(1))
    h_XI[:, :5] += 4
    read_X = h_XI @ readout(h_XI)
    assert abs(float(read_X.mean()) - 1) < 0.02
    assert float(read_X.std()) < 0.15


def test_the_constant_keeps_the_sizes_that_a_norm_loses() -> None:
    """With a perfect read-out the largest constant wins; post(out) is then `out` for small and large outputs alike."""
    out_XD = torch.randn(200, 16, generator=torch.Generator().manual_seed(2)) * torch.logspace(-1, 1, 200)[:, None]
    size, gain = constant(out_XD, torch.ones(200), torch.full((200,), 50.0), j=3)
    out_XD[:, 3] = size
    post_XD = out_XD / out_XD.square().mean(1, keepdim=True).sqrt() * gain
    post_XD[:, 3], out_XD[:, 3] = 0, 0
    assert float((post_XD - out_XD).norm() / out_XD.norm()) < 0.01
    plain_XD = F.normalize(out_XD, dim=1) * out_XD.norm(dim=1).median()
    assert float((plain_XD - out_XD).norm() / out_XD.norm()) > 0.5


def test_a_linearised_model_is_nearer_to_its_source() -> None:
    """KL to the source on other tokens, against adoption with one gain for each norm."""
    source, config = Weights(), adopted_config(RAW)
    llama = Llama(source, config)
    fit_BT, other_BT = torch.randint(0, 97, (2, 96, 32), generator=torch.Generator().manual_seed(3))
    pos_BT = torch.arange(32).expand_as(other_BT)
    log_p = (llama(other_BT, pos_BT) @ llama.head.T).log_softmax(-1)

    def kl(state: dict[str, Tensor]) -> float:
        model = Gemma2(config)
        model.load_state_dict(state | {"lm_head.weight": state["model.embed_tokens.weight"]})
        with torch.no_grad():
            log_q = model.logits(model(other_BT, pos_BT)).log_softmax(-1)
        return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())

    plain = dict(adopted_tensors(source, config, calibrate(llama, fit_BT)))
    found = linearise(llama, fit_BT)
    state = dict(adopted_tensors(source, config, found.norms))
    name, column_D, row_I = found.shift
    state[f"{name}.weight"] = state[f"{name}.weight"] + torch.outer(column_D, row_I)
    for name, row_I in found.rows.items():
        state[f"{name}.weight"] = state[f"{name}.weight"].index_copy(0, torch.tensor([found.dimension]), row_I[None])
    assert kl(state) < 0.1 * kl(plain), (kl(state), kl(plain))  # measured 0.08 and 1.86
    assert all(float(found.norms[n][found.dimension]) == -1 for n in found.norms if ".post_" in n)


def test_a_delta_is_the_best_low_rank_update_within_int8() -> None:
    generator = torch.Generator().manual_seed(4)
    low_OI = torch.randn(40, 6, generator=generator) @ torch.randn(6, 30, generator=generator)
    parts = compress(low_OI, 6)
    assert {n: p.dtype for n, p in parts.items()} == {
        "lora_A": torch.int8, "lora_B": torch.int8, "scale": torch.float32,
    }  # fmt: skip
    assert float((update(parts) - low_OI).norm() / low_OI.norm()) < 0.01
    weight_OI = torch.randn(40, 30, generator=generator)
    row_I = torch.arange(30.0)
    got_OI = healed(weight_OI, parts | {"row": row_I}, dimension=7)
    assert torch.equal(got_OI[7], row_I)
    assert torch.equal(got_OI[8], (weight_OI + update(parts))[8])
