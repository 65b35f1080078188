"""A pass of the whole model over rows of one token each, in one call of `native_pass.c` through ctypes.

A decoding step of a small model is hundreds of calls, each shorter than what Python and torch need to make it. Here the
arithmetic of `model.py` runs over the pages of a cache without coming back in between.

Legend: X rows, D model, N query heads, K key/value heads, H head dim, F feed-forward, V vocabulary, P pages, s
positions in a page, n pages in a row's table.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from ctypes import c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from gemwright.config import ModelConfig
from gemwright.ops import native
from gemwright.ops.rope import rope_tables

WEIGHTS: Final = (
    "input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "post_attention_layernorm", "pre_feedforward_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    "post_feedforward_layernorm",
)  # fmt: skip
"""A block's parts, in the order of the struct."""


class _Block(ctypes.Structure):
    """The struct of the same name in native_pass.c."""

    _fields_ = (
        *((name.rpartition(".")[2], c_void_p) for name in WEIGHTS),
        *((name, c_void_p) for name in ("keys", "values")),
        *((name, c_int64) for name in ("kind", "window")),
    )


class _Places(ctypes.Structure):
    """The struct of the same name in native_pass.c."""

    _fields_ = (*((name, c_void_p) for name in ("table", "first")), *((name, c_int64) for name in ("width", "pages")))


class _Pass(ctypes.Structure):
    """The struct of the same name in native_pass.c."""

    _fields_ = (
        *((name, c_void_p) for name in ("blocks", "places", "last", "cosines", "sines", "pos", "x", "out")),
        *((name, c_int64) for name in ("L", "M", "D", "N", "K", "H", "F", "page")),
        *((name, c_float) for name in ("eps", "scale", "cap")),
        *((name, c_int32) for name in ("bf16", "threads")),
    )


@dataclass(frozen=True, eq=False)
class Weights:
    """Weights as they lie: of each block by `WEIGHTS`, and the final norm's; contiguous, on CPU, of one dtype."""

    blocks: list[list[Tensor]]
    last_D: Tensor


class ModelPass:
    """One model over one store of pages.

    Args:
        config: heads and sizes are those of the weights.
        stores: keys and values of each layer, [P + 1, K, s, H]; the last page is not read or written.
        kinds: of each layer, whose tables it follows: an index of `tables` in a call.
    Raises:
        AssertionError: weights or stores of another shape, dtype or layout.
    """

    def __init__(
        self, config: ModelConfig, weights: Weights, stores: Sequence[tuple[Tensor, Tensor]], kinds: Sequence[int]
    ) -> None:
        D, F, H = config.hidden_size, config.intermediate_size, config.head_dim
        N, K = config.num_attention_heads, config.num_key_value_heads
        shapes = ((D,), (N * H, D), (K * H, D), (K * H, D), (D, N * H), (D,), (D,), (F, D), (F, D), (D, F), (D,))
        self.config, self._held = config, (weights, stores)
        self.bf16 = weights.last_D.dtype is torch.bfloat16
        self._blocks = (_Block * len(weights.blocks))()
        self.page = stores[0][0].shape[2]
        self.pages: dict[int, int] = {}
        for i, (block, (k_PKsH, v_PKsH), kind) in enumerate(zip(weights.blocks, stores, kinds, strict=True)):
            for weight, shape in zip((*block, weights.last_D), (*shapes, (D,)), strict=True):
                assert weight.shape == shape and weight.is_contiguous() and weight.is_cpu, (weight.shape, shape)
                assert weight.dtype is weights.last_D.dtype, weight.dtype
            for store in (k_PKsH, v_PKsH):
                assert store.shape[1:] == (K, self.page, H) and store.is_contiguous(), store.shape
                assert store.dtype is weights.last_D.dtype, store.dtype
            self.pages[kind] = len(k_PKsH) - 1
            pointers = (tensor.data_ptr() for tensor in (*block, k_PKsH, v_PKsH))
            self._blocks[i] = _Block(*pointers, kind, config.window(i) or 0)

    def __call__(self, x_XD: Tensor, pos_X: Tensor, tables: Mapping[int, tuple[Tensor, Tensor]]) -> Tensor:
        """Final hidden states [X, D] of embedded tokens, whose keys and values are written to their pages.

        Args:
            x_XD: embedded and scaled; overwritten.
            pos_X: int32, none of them padding.
            tables: of each kind, page ids [X, n] and first pages [X], int32, as `native.paged_attention` has them.
        Raises:
            AssertionError: a row's pages are not in its table or not in the store.
        """
        config, X = self.config, len(x_XD)
        assert x_XD.shape == (X, config.hidden_size) and x_XD.is_contiguous() and pos_X.shape == (X,), x_XD.shape
        assert (x_XD.dtype is torch.bfloat16) is self.bf16 and tables.keys() == self.pages.keys(), x_XD.dtype
        places = (_Places * (max(tables) + 1))()
        for kind, (table_Xn, first_X) in tables.items():
            for index in (table_Xn, first_X, pos_X):
                assert index.dtype is torch.int32 and index.is_contiguous() and len(index) == X, index.dtype
            places[kind] = _Places(table_Xn.data_ptr(), first_X.data_ptr(), table_Xn.shape[1], self.pages[kind])
        cosines, sines = rope_tables(pos_X[:, None], config.head_dim, config.rope_theta)
        out_XD = torch.empty_like(x_XD)
        call = _Pass(
            ctypes.addressof(self._blocks), ctypes.addressof(places), self._held[0].last_D.data_ptr(),
            cosines.data_ptr(), sines.data_ptr(), pos_X.data_ptr(), x_XD.data_ptr(), out_XD.data_ptr(),
            len(self._blocks), X, config.hidden_size, config.num_attention_heads, config.num_key_value_heads,
            config.head_dim, config.intermediate_size, self.page, config.rms_norm_eps, config.scale,
            config.attn_logit_softcapping or 0.0, self.bf16, torch.get_num_threads(),
        )  # fmt: skip
        missing = native.kernels().model_pass(ctypes.addressof(call))
        assert missing == 0, "a row's page is not in its table, or not in the store"
        return out_XD
