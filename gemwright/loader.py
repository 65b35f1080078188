"""load_model: a checkpoint folder becomes a model on a device, exactly and without a second copy of it in memory.

The model is made on the meta device, so nothing is initialised; each tensor is mapped from its file, checked, moved or
packed, and let go before the next. On CPU in the stored dtype the parameters are the file's own pages.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

from gemwright.checkpoint import EMBEDDING, Checkpoint
from gemwright.config import ModelConfig
from gemwright.model import Gemma2
from gemwright.ops.attention import Attention
from gemwright.ops.linear import cpu_linear
from gemwright.parallel import TensorParallel, shard_config
from gemwright.swap import Make, maker, put

log = logging.getLogger(__name__)

SMALL: Final = 2**30
"""Bytes of a model up to which linears that are packed keep their weights as they lie, too: a larger model waits for
its memory in a decoding step, not for the calls that `engine.native_steps` spares."""
FP16_HIDDEN_LIMIT = 4608
"""From this hidden size on (27B) the residual stream passes 65504, fp16's largest number."""


def choose_device(device: str | int | torch.device = "auto") -> torch.device:
    """`auto`: CUDA where there is one, else CPU. Apple's `mps` must be asked for: it runs the reference attention."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    except RuntimeError:
        raise ValueError(f"device: got {device!r}, allowed are auto, cpu, cuda, cuda:N, mps") from None
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: got {device!r}, but torch sees no CUDA device here; use auto or cpu")
    if chosen.type == "mps":
        log.warning("device mps: attention runs its reference path")
    return chosen


def choose_dtype(
    dtype: str | torch.dtype, checkpoint: Checkpoint, config: ModelConfig, device: torch.device
) -> torch.dtype:
    """`auto`: the dtype that the weights are stored in, but fp32 for fp16 weights on a CPU, which lacks fp16 units.

    fp16 is refused where the activations overflow it.
    """
    names = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
    chosen: torch.dtype
    if dtype == "auto":
        chosen = checkpoint.dtype(EMBEDDING)
        if chosen == torch.float16 and device.type == "cpu":
            chosen = torch.float32
    else:
        name = str(dtype).removeprefix("torch.")
        if name not in names:
            raise ValueError(f"dtype: got {dtype!r}, allowed are auto, {', '.join(names)}")
        chosen = names[name]
    if chosen == torch.float16 and config.hidden_size >= FP16_HIDDEN_LIMIT:
        raise ValueError(
            f"dtype: got float16 for hidden size {config.hidden_size}; activations of this model pass 65504, the "
            "largest fp16 number, and become infinite; allowed are bfloat16 and float32"
        )
    return chosen


def load_model(
    folder: str | Path,
    *,
    device: torch.device,
    dtype: str | torch.dtype = "auto",
    attention: str = "auto",
    pack: bool = True,
    parallel: TensorParallel | None = None,
    swaps: Mapping[str, Make] | None = None,
) -> Gemma2:
    """Gemma2 in evaluation mode with the weights of a local folder.

    Args:
        folder: a checkpoint in Hugging Face layout.
        device: where the parameters go.
        dtype: torch dtype or its name; `auto` is the stored one.
        attention: backend name for every phase, or `auto`.
        pack: on CPU, bring the linears into the form that is read fastest; such a model cannot be trained.
        parallel: this process's place among those that hold the model together; only its slices are read.
        swaps: as for `swap.swap`, of the projections: each is replaced before the next is read, so that a quantized
            model never has its full weights beside it.
    Raises:
        CheckpointError: the folder is damaged or incomplete.
        ConfigError: the configuration asks for arithmetic that Gemma 2 does not have.
        ValueError: device, dtype or attention that cannot be exact here, heads that the ranks do not divide.
    """
    checkpoint = Checkpoint(folder)
    config = ModelConfig.from_hf(checkpoint.config)
    checkpoint.check(config.parameter_shapes())
    dtype = choose_dtype(dtype, checkpoint, config, device)
    chosen = Attention.resolve(
        attention, device=device.type, dtype=dtype, cap=config.attn_logit_softcapping, window=config.sliding_window
    )
    with torch.device("meta"):
        model = Gemma2(config if parallel is None else shard_config(config, parallel.world), chosen)
    model.config = config
    small = parallel is None and config.num_parameters() * dtype.itemsize <= SMALL
    used = set()
    for name in config.parameter_shapes():
        if name == EMBEDDING:
            tensor = checkpoint.tensor(name, slice(0, config.vocab_size))
        else:
            tensor = checkpoint.tensor(name) if parallel is None else parallel.read(checkpoint, config, name)
        _assign(model, name, tensor.to(device, dtype))
        linear = name.removesuffix(".weight")
        if swaps and linear.endswith("_proj") and (pattern := maker(linear, swaps)) is not None:
            put(model, linear, swaps[pattern](linear, _linear(model, linear)))
            used.add(pattern)
        elif pack and device.type == "cpu" and linear.endswith("_proj"):
            _pack(model, linear, keep=small)
    if unused := set(swaps or ()) - used:
        raise ValueError(f"swaps: no projection matches {sorted(unused)}")
    model.tie()
    if pack and device.type == "cpu":
        _pack(model, "lm_head")
    if parallel is not None:
        parallel.wrap(model)
    log.info("loaded %s: %s on %s", folder, str(dtype).removeprefix("torch."), device)
    return model.eval()


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, nn.Parameter(tensor, requires_grad=False))


def _pack(model: nn.Module, name: str, *, keep: bool = False) -> None:
    put(model, name, cpu_linear(_linear(model, name), keep=keep))


def _linear(model: nn.Module, name: str) -> nn.Linear:
    linear = model.get_submodule(name)
    assert isinstance(linear, nn.Linear), name
    return linear
