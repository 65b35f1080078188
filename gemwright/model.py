"""Gemma 2 (arXiv 2408.00118), the only model file.

Parameter names are Hugging Face's. The forward pass ends at the hidden states: logits are 256k wide, so `logits` is a
call of its own, for the rows that are wanted. The model holds no cache, no mask and no device: positions come in,
visibility follows from them, once for local and once for global layers.

Legend: B rows, T queries, S keys, D model, N query heads, K key/value heads, H head dim, F feed-forward, V vocabulary,
X any leading dimensions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from gemwright.cache import Cache
from gemwright.config import ModelConfig
from gemwright.ops.attention import Attend, Attention, Visibility, softcap
from gemwright.ops.gelu import gated_gelu
from gemwright.ops.norm import RMSNorm
from gemwright.ops.rope import rope_tables, rotate

Tables = tuple[Tensor, Tensor]


class SelfAttention(nn.Module):
    """Grouped-query attention with rotary positions, scores scaled by query_pre_attn_scalar and capped."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        D, H = config.hidden_size, config.head_dim
        N, K = config.num_attention_heads, config.num_key_value_heads
        self.layer, self.head_dim, self.scale, self.cap = layer, H, config.scale, config.attn_logit_softcapping
        self.q_proj = nn.Linear(D, N * H, bias=False)
        self.k_proj = nn.Linear(D, K * H, bias=False)
        self.v_proj = nn.Linear(D, K * H, bias=False)
        self.o_proj = nn.Linear(N * H, D, bias=False)

    def forward(self, x_BTD: Tensor, see: Visibility, tables: Tables, attend: Attend, cache: Cache | None) -> Tensor:
        heads = (*x_BTD.shape[:2], -1, self.head_dim)  # -1: a tensor-parallel rank holds some of the heads
        q_BTNH = rotate(self.q_proj(x_BTD).view(heads), tables)
        k_BSKH = rotate(self.k_proj(x_BTD).view(heads), tables)
        v_BSKH = self.v_proj(x_BTD).view(heads)
        if cache is not None:
            k_BSKH, v_BSKH = cache.write(self.layer, k_BSKH, v_BSKH)
        out_BTNH = attend(q_BTNH, k_BSKH, v_BSKH, see, scale=self.scale, cap=self.cap)
        return self.o_proj(out_BTNH.flatten(2))  # type: ignore[no-any-return]


class MLP(nn.Module):
    """Gated feed-forward: down(gelu_tanh(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D, Ff = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(D, Ff, bias=False)
        self.up_proj = nn.Linear(D, Ff, bias=False)
        self.down_proj = nn.Linear(Ff, D, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down_proj(gated_gelu(self.gate_proj(x_BTD), self.up_proj(x_BTD)))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Attention and feed-forward, each with a norm before and a norm after, added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        D, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(D, eps)
        self.self_attn = SelfAttention(config, layer)
        self.post_attention_layernorm = RMSNorm(D, eps)
        self.pre_feedforward_layernorm = RMSNorm(D, eps)
        self.mlp = MLP(config)
        self.post_feedforward_layernorm = RMSNorm(D, eps)

    def forward(self, x_BTD: Tensor, see: Visibility, tables: Tables, attend: Attend, cache: Cache | None) -> Tensor:
        attended_BTD = self.self_attn(self.input_layernorm(x_BTD), see, tables, attend, cache)
        x_BTD = x_BTD + self.post_attention_layernorm(attended_BTD)
        x_BTD = x_BTD + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x_BTD)))
        return x_BTD


class Decoder(nn.Module):
    """Embedding, blocks and final norm: what Hugging Face calls `model`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        # made without nn.Embedding's own draw, which on the meta device costs seconds of imports (torch 2.13)
        table_VD = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, _weight=table_VD)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Gemma2(nn.Module):
    """The causal language model. `attention` names the backend of each phase."""

    def __init__(self, config: ModelConfig, attention: Attention | None = None) -> None:
        super().__init__()
        self.config = config
        self.attention = attention or Attention()
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie()
        if not self.lm_head.weight.is_meta:
            nn.init.normal_(self.lm_head.weight, std=config.initializer_range)

    def tie(self) -> None:
        """Let the head share the embedding's parameter; to be called again after the embedding was replaced."""
        self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self, tokens_BT: Tensor, pos_BT: Tensor, doc_BT: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        """Hidden states [B, T, D] after the final norm.

        Args:
            tokens_BT: token ids.
            pos_BT: position of each token in its document; -1 marks padding, which is seen by nobody.
            doc_BT: document number of each token in packed rows; tokens see their own document only. Not with a cache.
            cache: keys and values of earlier tokens; the new ones are written to it.
        """
        assert doc_BT is None or cache is None, "packed documents are for training and are not cached"
        config = self.config
        x_BTD = self.embed(tokens_BT)
        local_BS, global_BS = (pos_BT, pos_BT) if cache is None else cache.advance(pos_BT)
        local = Visibility(pos_BT, local_BS, doc_BT, doc_BT, window=config.sliding_window)
        globe = Visibility(pos_BT, global_BS, doc_BT, doc_BT)
        tables = rope_tables(pos_BT, config.head_dim, config.rope_theta)
        phase = "train" if cache is None else "decode" if tokens_BT.shape[1] == 1 else "prefill"
        attend = (cache.attend if cache is not None else None) or self.attention.backend(phase)
        for i, block in enumerate(self.model.layers):
            x_BTD = block(x_BTD, globe if config.window(i) is None else local, tables, attend, cache)
        return self.model.norm(x_BTD)  # type: ignore[no-any-return]

    def embed(self, tokens_X: Tensor) -> Tensor:
        """Scaled embeddings [X, D] of token ids."""
        x_XD: Tensor = self.model.embed_tokens(tokens_X)
        # scaled in its own dtype: sqrt(2304) is 48.0, sqrt(3584) rounds to 59.75 in bf16
        return x_XD * x_XD.new_full((), math.sqrt(self.config.hidden_size))

    def logits(self, hidden_XD: Tensor) -> Tensor:
        """Next-token logits [X, V] in fp32, soft-capped: what temperature and log-softmax are applied to."""
        return softcap(self.lm_head(hidden_XD).float(), self.config.final_logit_softcapping)
