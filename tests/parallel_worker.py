"""What every rank of test_parallel.py runs, started by torchrun: results go to OUT/RANK.safetensors and OUT/RANK.json.

    torchrun --standalone --nproc-per-node 2 tests/parallel_worker.py OUT FOLDER...

A folder holds a model, and `adapter` in it a PEFT adapter. This file imports no oracle, so that a rank starts quickly.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from gemwright.cache import KVCache
from gemwright.engine.engine import Engine
from gemwright.engine.request import Request
from gemwright.loader import load_model
from gemwright.lora import AdapterSlots
from gemwright.model import Gemma2
from gemwright.parallel import Mirror, TensorParallel, shard_config
from gemwright.sampling import SamplingParams

ROWS, LENGTH = 2, 20


def prompt(vocab: int) -> Tensor:
    """The tokens that one rank and two ranks read."""
    return torch.randint(vocab, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def logits(model: Gemma2, world: int, chunk: int | None) -> Tensor:
    """Logits [B, T, V] without a cache, or through one in chunks."""
    tokens_BT = prompt(model.config.vocab_size)
    pos_BT = torch.arange(LENGTH).expand(ROWS, LENGTH)
    if chunk is None:
        return model.logits(model(tokens_BT, pos_BT))
    dtype = model.model.embed_tokens.weight.dtype
    cache = KVCache(shard_config(model.config, world), ROWS, LENGTH, chunk=chunk, dtype=dtype)
    cut = [slice(i, i + chunk) for i in range(0, LENGTH, chunk)]
    return model.logits(torch.cat([model(tokens_BT[:, c], pos_BT[:, c], cache=cache) for c in cut], dim=1))


def measure(folder: Path, parallel: TensorParallel | None) -> dict[str, Tensor]:
    """Logits through every way, with the model packed and not, and with an adapter in one of two rows."""
    world = 1 if parallel is None else parallel.world
    found = {}
    for pack in (False, True):
        model = load_model(folder, device=torch.device("cpu"), pack=pack, parallel=parallel)
        for chunk in (None, 5, 1):
            found[f"{folder.name} pack={pack} chunk={chunk}"] = logits(model, world, chunk)
    if (folder / "adapter").is_dir():
        slots = AdapterSlots(model)
        slots.load("a", folder / "adapter")
        slots.select([None, "a"])
        found[f"{folder.name} adapter"] = logits(model, world, None)
        slots.unload("a")
        found[f"{folder.name} unloaded"] = logits(model, world, None)
    return found


def generated(model: Gemma2, parallel: TensorParallel | None) -> list[list[int]]:
    """What the engine makes of prompts past the window, greedy and drawn, with little cache."""
    engine = Engine(model, rows=2, budget=16, cache_tokens=192, parallel=parallel)
    params = [SamplingParams(max_new_tokens=24, temperature=0), SamplingParams(max_new_tokens=24, seed=5, top_p=0.9)]
    requests = [
        Request(id=str(i), tokens=row, params=params[i % 2])
        for i, row in enumerate([*prompt(model.config.vocab_size).tolist(), [5, 6, 7], [8] * 30])
    ]
    found: dict[str, list[int]] = {}
    for event in engine.stream(requests):
        if event.token is not None:
            found.setdefault(event.id, []).append(event.token)
    return [found[request.id or ""] for request in requests]


def mirrored(parallel: TensorParallel) -> list[Any]:
    """What a rank saw when rank 0 made these calls."""
    seen: list[Any] = []

    def add(number: int, text: str = "") -> int:
        if number < 0:
            raise ValueError(f"number: got {number}")
        seen.append([number, text])
        return number

    mirror = Mirror(parallel, {"add": add, "least": lambda: seen.append(parallel.least(7 - parallel.rank))})
    if parallel.rank:
        mirror.follow()
    else:
        assert mirror.first("add", number=1, text="\u00e4\U0001f600" * 1000) == 1
        try:
            mirror.first("add", number=-1)
        except ValueError:
            seen.append("refused here, unknown there")
        mirror.together("least")
        mirror.together("add", number=2)
        mirror.close()
    return seen


def main(out: Path, folders: list[Path]) -> None:
    torch.set_num_threads(1)
    with TensorParallel.join("cpu") as parallel:
        found = {name: t for folder in folders for name, t in measure(folder, parallel).items()}
        model = load_model(folders[0], device=parallel.device, pack=False, parallel=parallel)
        again = Engine(model, rows=2, budget=16, parallel=parallel)
        unseeded = [e.token for e in again.stream([Request(tokens=[5, 6], params=SamplingParams(max_new_tokens=12))])]
        facts = {
            "rank": [parallel.rank, parallel.world],
            "heads": model.config.num_key_value_heads,
            "shapes": {name: list(p.shape) for name, p in model.named_parameters()},
            "generated": generated(model, parallel),
            "unseeded": unseeded,
            "mirrored": mirrored(parallel),
            "broadcast": parallel.broadcast({"none": None, "half": 0.5} if parallel.rank == 0 else None),
        }
        parts = {f"weight {name}": p.contiguous() for name, p in model.named_parameters() if ".layers.0." in name}
        save_file(found | parts, out / f"{parallel.rank}.safetensors")
        (out / f"{parallel.rank}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]])
