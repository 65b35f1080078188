"""gemwright info: what a model is made of, what it costs in bytes, and what of it fits this machine.

Everything but the stored bytes follows from `config.json`, so a folder without weights, or a preset's name, will do.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from gemwright.cli.options import Flag, Model, Text
from gemwright.config import PRESETS, ModelConfig

ITEMSIZE: Final = {"bfloat16": 2, "float32": 4}
USABLE: Final = 0.9
"""Share of the free memory that a model may take; the rest is for activations and everybody else."""
GIB: Final = 2**30


@dataclass(frozen=True)
class Options:
    """Show shapes, parameters, bytes, key-value cache, and what fits this machine.

    MODEL is a folder (config.json is enough), a hub name (config.json alone is fetched), or one of the published
    shapes: gemma-2-2b, gemma-2-9b, gemma-2-27b.

    For example:

      gemwright info gemma-2-9b

      gemwright info FOLDER --json
    """

    model: Model = None
    """Folder, hub name or published shape."""
    revision: Text = None
    """Branch, tag or commit of a hub name."""
    offline: Flag = False
    """Take a hub name from the cache only."""
    json: Flag = False
    """Print one JSON object with the same numbers."""


def run(options: Options) -> int:
    """Show; 0."""
    name, config, folder = _find(options)
    facts = describe(name, config, folder)
    print(json.dumps(facts) if options.json else "\n".join(_page(facts)))
    return 0


def _find(options: Options) -> tuple[str, ModelConfig, Path | None]:
    """Name, configuration, and the folder if there is one."""
    from gemwright.weights import read_json

    name = options.model
    if name in PRESETS and not Path(name).is_dir():
        return name, ModelConfig.preset(name), None
    if name is None:
        from gemwright import bundled

        folder = bundled.folder()
    elif Path(name).expanduser().is_dir():
        folder = Path(name).expanduser()
    else:
        folder = _hub_config(name, options)
    return name or "the bundled model", ModelConfig.from_hf(read_json(folder / "config.json")), folder


def _hub_config(name: str, options: Options) -> Path:
    """The folder of a hub model of which config.json alone was fetched."""
    from huggingface_hub import errors, hf_hub_download

    try:
        file = hf_hub_download(name, "config.json", revision=options.revision, local_files_only=options.offline)
    except (errors.HFValidationError, errors.HfHubHTTPError, errors.LocalEntryNotFoundError, OSError) as error:
        shapes = ", ".join(PRESETS)
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"{name}: no folder, none of the shapes {shapes}, and not had from the hub: {reason}"
        ) from error
    return Path(file).parent


def describe(name: str, config: ModelConfig, folder: Path | None) -> dict[str, Any]:
    """Everything that is shown, as JSON data; sizes in bytes."""
    from gemwright.checkpoint import Checkpoint, CheckpointError

    context = config.max_position_embeddings
    full = config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim * 2
    facts: dict[str, Any] = {
        "name": name,
        "shapes": {key: list(shape) for key, shape in _shapes(config)},
        "layers": config.num_hidden_layers,
        "local_layers": sum(config.window(i) is not None for i in range(config.num_hidden_layers)),
        "heads": [config.num_attention_heads, config.num_key_value_heads, config.head_dim],
        "query_pre_attn_scalar": config.query_pre_attn_scalar,
        "caps": [config.attn_logit_softcapping, config.final_logit_softcapping],
        "window": config.sliding_window,
        "context": context,
        "parameters": config.num_parameters(),
        "weight_bytes": {dtype: config.num_parameters() * size for dtype, size in ITEMSIZE.items()},
        "kv_bytes_per_token": full,
        "kv_bytes_8192_full": full * 8192,
        "kv_bytes_8192": config.kv_bytes(8192),
        "folder": None if folder is None else str(folder),
        "stored_bytes": None,
    }
    if folder is not None:
        try:
            checkpoint = Checkpoint(folder)
            facts["stored_bytes"] = sum(
                math.prod(checkpoint.shape(n)) * checkpoint.dtype(n).itemsize for n in checkpoint.names()
            )
        except CheckpointError as error:
            facts["stored_bytes_missing"] = str(error)
    return facts | {"machine": [_fit(config, *memory) for memory in _memories()]}


def _shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The shape of each kind of tensor, one line for all layers."""
    for name, shape in config.parameter_shapes().items():
        if ".layers." not in name:
            yield name, shape
        elif ".layers.0." in name:
            yield name.replace(".layers.0.", f".layers.0-{config.num_hidden_layers - 1}."), shape


def _memories() -> Iterator[tuple[str, str, int, int]]:
    """Device type, its name, its memory in bytes and what of it is free, CPU first."""
    import psutil
    import torch

    memory = psutil.virtual_memory()
    yield "cpu", f"{torch.get_num_threads()} threads", memory.total, memory.available
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        yield "cuda", torch.cuda.get_device_name(i), total, free


def _fit(config: ModelConfig, device: str, name: str, total: int, free: int) -> dict[str, Any]:
    """What fits one device: per dtype the longest context beside the weights, 0 where the weights alone do not fit."""
    import torch

    from gemwright.ops.attention import Attention

    contexts = {}
    for dtype, size in ITEMSIZE.items():
        left = USABLE * free - config.num_parameters() * size
        low, high = 0, config.max_position_embeddings
        while low < high:  # bytes grow with the tokens: the largest count that fits
            middle = (low + high + 1) // 2
            low, high = (middle, high) if config.kv_bytes(middle, itemsize=size) <= left else (low, middle - 1)
        contexts[dtype] = low
    cap, window = config.attn_logit_softcapping, config.sliding_window
    chosen = Attention.resolve(device=device, dtype=torch.bfloat16, cap=cap, window=window)
    backends = {phase: getattr(chosen, phase) for phase in ("train", "prefill", "decode")}
    return {
        "device": device, "name": name, "total_bytes": total, "free_bytes": free,
        "context_that_fits": contexts, "attention": backends,
    }  # fmt: skip


def _page(facts: dict[str, Any]) -> Iterator[str]:
    """The facts for reading."""
    heads, kv_heads, head_dim = facts["heads"]
    caps = " and ".join("none" if cap is None else f"{cap:g}" for cap in facts["caps"])
    yield f"{facts['name']}\n"
    yield from _rows(
        {
            "parameters": f"{facts['parameters']:,} (tied head counted once)",
            "layers": f"{facts['layers']}, {facts['local_layers']} of them local with a window of {facts['window']}",
            "heads": f"{heads} query, {kv_heads} key/value, of {head_dim}; "
            f"queries scaled by {facts['query_pre_attn_scalar']:g} ** -0.5",
            "soft-caps": f"{caps} (attention, logits)",
            "context": f"{facts['context']} tokens",
        }
    )
    yield "\ntensors"
    yield from _rows({name: " x ".join(map(str, shape)) for name, shape in facts["shapes"].items()})
    yield "\nbytes"
    weights = ", ".join(f"{_size(size)} in {dtype}" for dtype, size in facts["weight_bytes"].items())
    missing = facts.get("stored_bytes_missing", "no folder: a published shape")
    yield from _rows(
        {
            "on disk": missing if facts["stored_bytes"] is None else _size(facts["stored_bytes"]),
            "weights": weights,
            "key-value cache": f"{facts['kv_bytes_per_token'] / 1024:g} KiB a token in bfloat16",
            "at 8192 tokens": f"{facts['kv_bytes_8192_full'] / 2**20:g} MiB if every layer kept everything, "
            f"{facts['kv_bytes_8192'] / 2**20:g} MiB as kept here",
        }
    )
    for machine in facts["machine"]:
        yield f"\nthis machine: {machine['device']} ({machine['name']})"
        fits = {
            dtype: f"fits, with a context of up to {tokens} tokens" if tokens else "does not fit"
            for dtype, tokens in machine["context_that_fits"].items()
        }
        free = f"{_size(machine['free_bytes'])} free of {_size(machine['total_bytes'])}"
        attention = ", ".join(f"{phase} {name}" for phase, name in machine["attention"].items())
        yield from _rows({"memory": free, **fits, "attention": attention})


def _rows(table: dict[str, str]) -> Iterator[str]:
    width = max(map(len, table))
    return (f"  {key:<{width}}  {value}" for key, value in table.items())


def _size(count: int) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB / 10 else f"{count / 2**20:.1f} MiB"
