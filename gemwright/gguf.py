"""GGUF files, llama.cpp's container, read as Hugging Face checkpoints: names, config, weights, tokenizer.

A GGUF file keeps the same matrices as a Hugging Face folder, with four differences that are undone here:

names       `blk.3.attn_q.weight` for `model.layers.3.self_attn.q_proj.weight`: the table `NAMES`.
types       most matrices are quantised in blocks along a row; `Gguf.tensor` returns float32, a bounded number of rows
            at a time, so that beside the result only a few MiB are needed.
Q and K     the "llama" architecture stores the H rows of each head interleaved (0, H/2, 1, H/2 + 1, ...), because
            llama.cpp rotates neighbours there; Hugging Face rotates halves. "gemma2" is stored unpermuted.
norms       "gemma2" norms are stored as w + 1 and multiply directly; Hugging Face stores w.

Sources: llama.cpp, `conversion/llama.py`, `conversion/gemma.py` and `src/models/gemma2.cpp`; the container itself is
read by llama.cpp's own `gguf` package. The file stays memory-mapped as long as its `Gguf` lives.
"""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGUFReader, ReaderTensor
from gguf.quants import dequantize
from torch import Tensor

from gemwright.gguf_tokenizer import GgufError, adds_bos, array, field, rebuild, special_ids

__all__ = ["Gguf", "GgufError"]

_BLOCK_ELEMENTS = 1 << 22  # elements dequantised at once: 16 MiB of float32

_LAYER = "model.layers.{}."
_SHARED = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "blk.{}.attn_norm": _LAYER + "input_layernorm",
    "blk.{}.attn_q": _LAYER + "self_attn.q_proj",
    "blk.{}.attn_k": _LAYER + "self_attn.k_proj",
    "blk.{}.attn_v": _LAYER + "self_attn.v_proj",
    "blk.{}.attn_output": _LAYER + "self_attn.o_proj",
    "blk.{}.ffn_gate": _LAYER + "mlp.gate_proj",
    "blk.{}.ffn_up": _LAYER + "mlp.up_proj",
    "blk.{}.ffn_down": _LAYER + "mlp.down_proj",
}
_LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "mlp_bias": False}
# GGUF name -> Hugging Face name, both without ".weight", for each architecture that is read. No others may occur.
NAMES: dict[str, dict[str, str]] = {
    "llama": _SHARED
    | {
        "output": "lm_head",  # absent where the head is tied to the embedding
        "blk.{}.ffn_norm": _LAYER + "post_attention_layernorm",
    },
    "gemma2": _SHARED
    | {
        "blk.{}.post_attention_norm": _LAYER + "post_attention_layernorm",
        "blk.{}.ffn_norm": _LAYER + "pre_feedforward_layernorm",
        "blk.{}.post_ffw_norm": _LAYER + "post_feedforward_layernorm",
    },
}


class _Reader(GGUFReader):
    """The package's reader with its one access to the file replaced.

    Every read is held inside the file (the original's slices past the end come back short, in silence, and a counter
    that lies keeps it looping); plain arrays also take a third of the time of memmap slices (5.8 s for 49152 tokens).
    """

    def _get(
        self,
        offset: int,
        dtype: npt.DTypeLike,
        count: int = 1,
        override_order: Literal["I", "S", "<"] | None = None,
    ) -> npt.NDArray[Any]:
        kind = np.dtype(dtype)
        end = offset + kind.itemsize * int(count)
        if end > len(self.data):
            raise GgufError(f"truncated or damaged: it announces {end} bytes or more and has {len(self.data)}")
        return self.data.view(np.ndarray)[offset:end].view(kind.newbyteorder(override_order or self.byte_order))


class Gguf:
    """One GGUF file of a known architecture, its tensors under Hugging Face names.

    Raises FileNotFoundError, and GgufError for what is no GGUF file, is truncated, is of another architecture, or
    lacks or exceeds the tensors of its architecture (all named in one error).
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path}: no such file")
        try:
            reader = _Reader(self.path)
            self.metadata: dict[str, Any] = {name: part.contents() for name, part in reader.fields.items()}
        # What the reader meets in a damaged file: its own ValueErrors, unknown types, duplicate keys, nested arrays.
        except (ValueError, KeyError, IndexError, OverflowError, RecursionError) as error:
            raise GgufError(f"{self.path}: not a readable GGUF file: {error}") from error
        if reader.byte_order == "S":
            raise GgufError(f"{self.path}: written in the other byte order")
        self.architecture: str = field(self.metadata, "general.architecture", str)
        if self.architecture not in NAMES:
            raise GgufError(f"{self.path}: architecture {self.architecture!r}; {' and '.join(NAMES)} are read")
        self._tensors = self._named({tensor.name: tensor for tensor in reader.tensors})

    def _named(self, found: dict[str, ReaderTensor]) -> dict[str, ReaderTensor]:
        """The file's tensors by Hugging Face name, checked to be exactly the architecture's."""
        layers = self._int("block_count")
        if layers > len(found):  # before a table is made for them
            raise GgufError(f"{self.path}: {layers} layers are announced, with {len(found)} tensors")
        expected = {
            theirs.format(layer) + ".weight": ours.format(layer) + ".weight"
            for theirs, ours in NAMES[self.architecture].items()
            for layer in (range(layers) if "{}" in theirs else [0])
        }
        # rope_freqs holds Llama 3.1's frequency factors, which would change every rotation: surplus, hence refused.
        missing = sorted(expected.keys() - found.keys() - {"output.weight"})
        surplus = sorted(found.keys() - expected.keys())
        if missing or surplus:
            raise GgufError(f"{self.path}: tensors missing: {missing or 'none'}; not understood: {surplus or 'none'}")
        for name, tensor in found.items():
            if len(tensor.shape) != (1 if name.endswith("norm.weight") else 2) or 0 in tensor.shape:
                raise GgufError(f"{self.path}: {name} has shape {tensor.shape.tolist()[::-1]}")
        return {ours: found[theirs] for theirs, ours in expected.items() if theirs in found}

    def _int(self, key: str, default: int | None = None) -> int:
        """A positive integer of the architecture's metadata, or the default where the key is absent."""
        name = f"{self.architecture}.{key}"
        value = default if default is not None and name not in self.metadata else field(self.metadata, name, int)
        if value < 1:
            raise GgufError(f"{self.path}: metadata key {name!r} is {value}; it must be positive")
        return value

    def _float(self, key: str, default: float | None = None) -> float:
        """A float of the architecture's metadata, as the shortest decimal of its float32: 1e-05, not 9.99999974e-06."""
        name = f"{self.architecture}.{key}"
        if default is not None and name not in self.metadata:
            return default
        return float(str(np.float32(field(self.metadata, name, float))))

    @property
    def _heads(self) -> tuple[int, int, int]:
        """Query heads, key/value heads, head size."""
        heads = self._int("attention.head_count")
        head_dim = self._int("attention.key_length", self._int("embedding_length") // heads)
        return heads, self._int("attention.head_count_kv", heads), head_dim

    def names(self) -> list[str]:
        """Hugging Face names of the tensors; `lm_head.weight` is among them only where the head is untied."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor as `tensor` returns it; KeyError for an unknown name."""
        return tuple(int(size) for size in reversed(self._tensors[name].shape))

    def tensor(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor by Hugging Face name, dequantised to float32, in memory of its own.

        `rows` picks a contiguous range of the first axis; only these rows are dequantised. KeyError for an unknown
        name; GgufError for a quantisation that the `gguf` package cannot undo, or for Q or K rows that are not
        heads x head size.
        """
        stored = self._tensors[name]
        shape = self.shape(name)
        start, stop, step = (rows or slice(None)).indices(shape[0])
        if step != 1:
            raise ValueError(f"rows must be contiguous, got {rows}")
        source = self._file_rows(name, shape)[start : max(start, stop)]
        out = np.empty((len(source), *shape[1:]), dtype=np.float32)
        block = max(1, _BLOCK_ELEMENTS // shape[-1])
        try:
            if len(shape) == 1:
                out[:] = dequantize(stored.data, stored.tensor_type)[source]
            else:
                for first in range(0, len(source), block):
                    part = stored.data[source[first : first + block]]
                    out[first : first + block] = dequantize(part, stored.tensor_type)
        except NotImplementedError as error:
            raise GgufError(f"{self.path}: {name}: {error}") from error
        if self.architecture == "gemma2" and name.endswith("norm.weight"):
            out -= 1.0
        return torch.from_numpy(out)

    def _file_rows(self, name: str, shape: tuple[int, ...]) -> npt.NDArray[np.int64]:
        """The file's row of each Hugging Face row: row (head, half, i) lies at (head, i, half) in permuted tensors."""
        rows = np.arange(shape[0])
        projection = name.removesuffix(".weight").rpartition(".")[2]
        if self.architecture != "llama" or projection not in ("q_proj", "k_proj"):
            return rows
        heads, kv_heads, head_dim = self._heads
        count = heads if projection == "q_proj" else kv_heads
        if shape[0] != count * head_dim or head_dim % 2:
            raise GgufError(f"{self.path}: {name} has {shape[0]} rows for {count} heads of {head_dim}")
        return rows.reshape(count, head_dim // 2, 2).swapaxes(1, 2).reshape(-1)

    def hf_config(self) -> dict[str, Any]:
        """The keys of transformers' LlamaConfig or Gemma2Config; defaults of absent keys are llama.cpp's.

        GgufError where a key is missing or asks for arithmetic that the Hugging Face architecture does not have.
        """
        heads, kv_heads, head_dim = self._heads
        for key in ("attention.value_length", "rope.dimension_count"):
            if self._int(key, head_dim) != head_dim:
                raise GgufError(f"{self.path}: {self.architecture}.{key} is {self._int(key)}; it must be {head_dim}")
        for key in ("rope.scaling.type", "attention.sliding_window_pattern", "attention.scale", "logit_scale"):
            value = self.metadata.get(f"{self.architecture}.{key}", "none")
            if value != "none":
                raise GgufError(f"{self.path}: {self.architecture}.{key} is {value!r}, which is not read here")
        vocab_size, hidden_size = self.shape("model.embed_tokens.weight")
        if hidden_size != self._int("embedding_length"):
            raise GgufError(f"{self.path}: {self.architecture}.embedding_length is not the embedding's {hidden_size}")
        ids = special_ids(self.metadata, vocab_size, ["eos"])
        ends = sorted({ids["eos"], ids.get("eot", ids["eos"])})  # a chat model also ends at its end of turn
        config = {
            "vocab_size": vocab_size,
            "hidden_size": hidden_size,
            "intermediate_size": self._int("feed_forward_length"),
            "num_hidden_layers": self._int("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            "rope_theta": self._float("rope.freq_base", 10000.0),
            "rms_norm_eps": self._float("attention.layer_norm_rms_epsilon"),
            "max_position_embeddings": self._int("context_length"),
            "attention_bias": False,
            "bos_token_id": ids.get("bos"),
            "eos_token_id": ends if len(ends) > 1 else ends[0],
            "pad_token_id": ids.get("padding"),
            "tie_word_embeddings": "lm_head.weight" not in self._tensors,
        }
        return config | (self._gemma2(config) if self.architecture == "gemma2" else _LLAMA)

    def _gemma2(self, config: dict[str, Any]) -> dict[str, Any]:
        layers, hidden, heads = (config[key] for key in ("num_hidden_layers", "hidden_size", "num_attention_heads"))
        return {
            "architectures": ["Gemma2ForCausalLM"],
            "model_type": "gemma2",
            "hidden_activation": "gelu_pytorch_tanh",
            # The file does not say. llama.cpp (src/models/gemma2.cpp) knows 27B by its 46 layers and takes
            # hidden / heads = 144 there, the head size everywhere else; any file it runs well obeys that.
            "query_pre_attn_scalar": hidden // heads if layers == 46 else config["head_dim"],
            "sliding_window": self._int("attention.sliding_window", 4096),
            "layer_types": ["full_attention" if layer % 2 else "sliding_attention" for layer in range(layers)],
            "attn_logit_softcapping": self._float("attn_logit_softcapping", 50.0),
            "final_logit_softcapping": self._float("final_logit_softcapping", 30.0),
        }

    @property
    def chat_template(self) -> str | None:
        """The jinja chat template, None where the file has none."""
        key = "tokenizer.chat_template"
        return field(self.metadata, key, str) if key in self.metadata else None

    def tokenizer_json(self) -> str:
        """The tokenizer as a `tokenizer.json` of the tokenizers library; GgufError for a kind that is not read."""
        return rebuild(self.metadata).to_str()

    def tokenizer_config(self) -> dict[str, Any]:
        """What stands beside it in a `tokenizer_config.json`: special tokens, BOS, chat template."""
        tokens = array(self.metadata, "tokenizer.ggml.tokens", str)
        ids = special_ids(self.metadata, len(tokens))
        roles = {"bos": "bos", "eos": "eos", "padding": "pad", "unknown": "unk"}
        named = {f"{ours}_token": tokens[ids[role]] for role, ours in roles.items() if role in ids}
        template = {} if self.chat_template is None else {"chat_template": self.chat_template}
        return (
            {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": adds_bos(self.metadata)} | named | template
        )
