"""The peers of the speed benches: one random Gemma 2 in two formats, and every runner of it behind two methods.

`write` makes a folder in Hugging Face layout and the same bf16 weights as a GGUF file for llama.cpp: norms + 1, no
tokenizer (vocabulary "none": ids go in, logits come out). `run` loads one of them with one runner, reads a prompt of
ids, decodes greedily, and prints one JSON line with its seconds and some of its logits, from which a bench sees that
all runners computed the same model.

A runner is `feed(ids)`, the logits after the last id, and `reset()`; what is timed is therefore the same code for all.

    python bench/peers.py write --work DIR [--preset gemma-2-2b] [--layers 2]
    python bench/peers.py run --peer llama.cpp --model DIR [--prompt 512] [--new 32]
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib
import json
import os
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

import gguf
import numpy as np
import numpy.typing as npt
import torch
import tyro
from machine import cores, memory
from torch import Tensor

from gemwright.checkpoint import Checkpoint, write
from gemwright.config import ModelConfig
from gemwright.gguf import NAMES

Logits = npt.NDArray[np.float32]

GGUF_FILE: Final = "model-bf16.gguf"
SHARD_BYTES: Final = 10**9
PROBES: Final = 512
"""Logits, evenly spread over the vocabulary, by which runners are compared."""
WARM_UP: Final = 16
"""Ids fed, and one decoded, before the clock starts: every weight is touched, kernels are chosen."""


def random_tensors(config: ModelConfig, *, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a checkpoint, normal with deviation 0.02, each from a seed of its own."""
    for name, shape in config.parameter_shapes().items():
        generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
        yield name, torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)


def no_tokenizer(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    """Ids go in, logits come out."""
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(config.vocab_size)


def write_gguf(
    folder: Path,
    name: str = GGUF_FILE,
    tokenizer: Callable[[gguf.GGUFWriter, ModelConfig], None] = no_tokenizer,
) -> Path:
    """Write a checkpoint's weights as `name` in its folder: matrices in bf16, norms in fp32, tensor by tensor."""
    checkpoint = Checkpoint(folder)
    config = ModelConfig.from_hf(checkpoint.config)
    path, partial = folder / name, folder / f"{name}.partial"
    writer = gguf.GGUFWriter(partial, "gemma2")
    _write_metadata(writer, config)
    tokenizer(writer, config)
    names = {
        theirs.format(i) + ".weight": ours.format(i) + ".weight"
        for theirs, ours in NAMES["gemma2"].items()
        for i in (range(config.num_hidden_layers) if "{}" in theirs else [0])
    }
    for theirs, ours in names.items():
        shape = checkpoint.shape(ours)
        matrix = len(shape) == 2
        count, dtype = int(np.prod(shape)), np.dtype(np.int16 if matrix else np.float32)
        kind = gguf.GGMLQuantizationType.BF16 if matrix else gguf.GGMLQuantizationType.F32
        writer.add_tensor_info(theirs, shape, dtype, count * dtype.itemsize, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for ours in names.values():
        x = checkpoint.tensor(ours)
        writer.write_tensor_data((x.view(torch.int16) if x.dim() == 2 else x.float() + 1).numpy())
    writer.close()
    os.replace(partial, path)
    return path


def _write_metadata(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    assert config.attn_logit_softcapping is not None, "llama.cpp takes an absent cap for 50"
    assert config.final_logit_softcapping is not None, "llama.cpp takes an absent cap for 30"
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_sliding_window(config.sliding_window)
    writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    writer.add_final_logit_softcapping(config.final_logit_softcapping)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)


def prepare(work: Path, preset: str = "gemma-2-2b", layers: int | None = None) -> Path:
    """The model folder of a shape under `work`, written if it is not there."""
    config = dataclasses.replace(ModelConfig.preset(preset), dtype="bfloat16")
    if layers is not None:
        config = dataclasses.replace(config, num_hidden_layers=layers, layer_types=())
    folder = work / f"{preset}-{config.num_hidden_layers}-layers"
    if not folder.exists():
        write(folder, random_tensors(config), config=config.to_hf(), max_shard_bytes=SHARD_BYTES)
    if not (folder / GGUF_FILE).exists():
        write_gguf(folder)
    return folder


class Peer(Protocol):
    """A runner with a loaded model and one sequence."""

    version: str

    def feed(self, ids: Sequence[int]) -> Logits:
        """Append ids to the sequence; the logits [V] after the last."""
        ...

    def reset(self) -> None:
        """Forget the sequence."""
        ...


class LlamaCpp:
    """llama.cpp through llama-cpp-python's low-level calls: defaults, but for threads and context length."""

    def __init__(self, folder: Path, context: int, threads: int) -> None:
        llama_cpp: Any = importlib.import_module("llama_cpp")  # no types, and needed by this runner alone
        self.api = llama_cpp
        self.version = f"llama.cpp (llama-cpp-python {llama_cpp.__version__})"
        self.quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)  # held: C keeps the pointer
        llama_cpp.llama_log_set(self.quiet, ctypes.c_void_p(0))
        path = str(folder / GGUF_FILE).encode()
        self.model = llama_cpp.llama_model_load_from_file(path, llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_threads, params.n_threads_batch = context, threads, threads
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        assert self.context, f"llama.cpp did not load {path!r}"
        self.batch, self.vocab = params.n_batch, ModelConfig.from_hf(Checkpoint(folder).config).vocab_size

    def feed(self, ids: Sequence[int]) -> Logits:
        for start in range(0, len(ids), self.batch):
            part = ids[start : start + self.batch]
            tokens = (self.api.llama_token * len(part))(*part)
            status = self.api.llama_decode(self.context, self.api.llama_batch_get_one(tokens, len(part)))
            assert status == 0, f"llama_decode: {status}"
        row = self.api.llama_get_logits_ith(self.context, -1)
        return np.ctypeslib.as_array(row, (self.vocab,)).copy()

    def reset(self) -> None:
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)


class Transformers:
    """transformers' Gemma2ForCausalLM: eager attention (its own choice for Gemma 2), its default cache."""

    def __init__(self, folder: Path, context: int, threads: int, *, dtype: torch.dtype = torch.bfloat16) -> None:
        transformers: Any = importlib.import_module("transformers")
        self.version = f"transformers {transformers.__version__}, {str(dtype).removeprefix('torch.')}"
        self.model = transformers.Gemma2ForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
        self.make_cache: Callable[[], Any] = lambda: transformers.DynamicCache(config=self.model.config)
        self.reset()

    def feed(self, ids: Sequence[int]) -> Logits:
        tokens = torch.tensor([ids])
        logits: Tensor = self.model(tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits
        return logits[0, -1].float().numpy()

    def reset(self) -> None:
        self.cache: Any = self.make_cache()


class Gemwright:
    """This package: the loaded model and its cache, as `generate` drives them."""

    def __init__(self, folder: Path, context: int, threads: int, *, pack: bool = True) -> None:
        from gemwright.cache import KVCache
        from gemwright.loader import load_model

        self.version = f"gemwright, {'packed' if pack else 'unpacked'}"
        self.model = load_model(folder, device=torch.device("cpu"), dtype=torch.bfloat16, pack=pack)
        self.cache = KVCache(self.model.config, 1, context)
        self.length = 0

    def feed(self, ids: Sequence[int]) -> Logits:
        for start in range(0, len(ids), self.cache.chunk):
            tokens = torch.tensor([ids[start : start + self.cache.chunk]])
            pos = torch.arange(self.length, self.length + tokens.shape[1])[None]
            hidden = self.model(tokens, pos, cache=self.cache)
            self.length += tokens.shape[1]
        logits: Logits = self.model.logits(hidden[0, -1]).numpy()
        return logits

    def reset(self) -> None:
        self.cache.reset()
        self.length = 0


PEERS: Final[dict[str, Callable[[Path, int, int], Peer]]] = {
    "gemwright": Gemwright,
    "gemwright-unpacked": lambda folder, context, threads: Gemwright(folder, context, threads, pack=False),
    "llama.cpp": LlamaCpp,
    "transformers": Transformers,
    "transformers-fp32": lambda f, c, t: Transformers(f, c, t, dtype=torch.float32),
}


def run(peer: str, model: Path, prompt: int = 512, new: int = 32, threads: int = cores()) -> None:
    """Load, read a prompt, decode; print one JSON line.

    Args:
        peer: name of the runner, a key of PEERS.
        model: folder made by `write`.
        prompt: ids to read.
        new: ids to decode after it.
        threads: threads of the runner.
    """
    if peer not in PEERS:
        raise ValueError(f"peer: got {peer!r}, allowed are {', '.join(PEERS)}")
    torch.set_num_threads(threads)
    vocab = ModelConfig.from_hf(Checkpoint(model).config).vocab_size
    ids: list[int] = np.random.default_rng(0).integers(3, vocab, prompt).tolist()
    with torch.inference_mode():
        start = time.perf_counter()
        runner = PEERS[peer](model, prompt + new + WARM_UP, threads)
        loaded, load_peak = time.perf_counter(), memory("VmHWM")
        runner.feed(ids[:WARM_UP])
        runner.feed(ids[:1])
        runner.reset()
        begin = time.perf_counter()
        logits = first = runner.feed(ids)
        read = time.perf_counter()
        for _ in range(new):
            logits = runner.feed([int(logits.argmax())])
        end = time.perf_counter()
    result = {
        "peer": runner.version,
        "load_s": loaded - start,
        "prefill_s": read - begin,
        "decode_s": end - read,
        "load_peak": load_peak,
        "run_peak": memory("VmHWM"),
        "logits": first[np.linspace(0, vocab - 1, PROBES, dtype=int)].tolist(),
    }
    print(json.dumps(result))


def _write(work: Path, preset: str = "gemma-2-2b", layers: int | None = None) -> None:
    """Write the random model in both formats, if it is not there; print its folder.

    Args:
        work: scratch folder; the 2B shape takes 10.5 GB in it.
        preset: shape, a preset of ModelConfig.
        layers: number of layers instead of the preset's, for a trial of the bench itself.
    """
    print(prepare(work, preset, layers))


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"write": _write, "run": run})
