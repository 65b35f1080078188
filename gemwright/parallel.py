"""Tensor parallelism for inference: every rank holds a slice of each linear, and all ranks compute every token.

    torchrun --nproc-per-node 2 script.py

    with TensorParallel.join() as parallel:
        model = load_model(folder, device=parallel.device, parallel=parallel)
        cache = KVCache(shard_config(model.config, parallel.world), rows, length)

The weights of q, k, v, gate and up are cut by rows (whole heads), those of o and down by columns, and the partial
results of the latter are summed over the ranks: two sums a layer, nothing else is exchanged (Megatron-LM, arXiv
1909.08053). Embedding, norms and head are on every rank, so every rank has the same hidden states and logits, bit for
bit, and draws the same tokens. A rank maps its own slices alone; they are cut first, then packed.

Plain slices, not DTensor: an inference-only rank needs one sum after two linears, and a packed or quantized weight is
no tensor that DTensor could cut. The model knows nothing of it: projections are viewed with as many heads as they make.

The sum is taken in the dtype of the activations. Two ranks lose nothing by that (one addition is rounded correctly, so
it equals an fp32 sum that is rounded), eight ranks add at most about the rounding that the partial results have
already; an fp32 sum would move twice the bytes.

Rank 0 speaks to the outside; `Mirror` lets the other ranks repeat its calls.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gemwright.checkpoint import Checkpoint
from gemwright.config import ModelConfig
from gemwright.model import Gemma2
from gemwright.swap import put

BY_ROWS: Final = frozenset(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"))
BY_COLUMNS: Final = frozenset(("o_proj", "down_proj"))
PATIENCE: Final = timedelta(days=365)
"""How long a rank waits for rank 0's next call: a server may be idle for as long as it likes."""


def shard_config(config: ModelConfig, world: int) -> ModelConfig:
    """The shape of one rank's part: what its linears and its cache have. The model's own config stays the whole's.

    Raises ValueError where heads, key/value heads or the feed-forward do not divide.
    """
    divided = ("num_key_value_heads", "num_attention_heads", "intermediate_size")
    common = math.gcd(*(getattr(config, field) for field in divided))
    for field in divided:
        if getattr(config, field) % world:
            allowed = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
            raise ValueError(
                f"{field}: got {getattr(config, field)}, which {world} ranks do not divide, and a rank holds whole "
                f"heads and equal parts; allowed numbers of ranks for this model are {allowed}"
            )
    return replace(config, **{field: getattr(config, field) // world for field in divided})


class ParallelLinear(nn.Module):
    """One rank's part of a linear: rows (dim 0) or columns (1) `span` of its weight; over columns, results are summed.

    Inside is a linear of any kind, over a weight that was cut. No gradient.
    """

    def __init__(self, linear: nn.Module, dim: int, span: slice) -> None:
        super().__init__()
        self.linear, self.dim, self.span = linear, dim, span

    @property
    def in_features(self) -> Any:
        """Width of what this rank's part reads."""
        return self.linear.in_features

    @property
    def out_features(self) -> Any:
        """Width of what this rank's part makes."""
        return self.linear.out_features

    def forward(self, x_XD: Tensor) -> Tensor:
        y_XF: Tensor = self.linear(x_XD)
        if self.dim == 1:
            dist.all_reduce(y_XF)
        return y_XF


@dataclass(frozen=True)
class TensorParallel:
    """This process's place among those that hold one model together. Made by `join`."""

    rank: int
    world: int
    device: torch.device
    control: dist.ProcessGroup
    """Messages between the processes: gloo, which waits without burning a core or a GPU."""

    @classmethod
    @contextmanager
    def join(cls, device: str = "auto") -> Iterator[TensorParallel]:
        """Meet the other processes of a `torchrun`; leave them at the end.

        It sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.

        Args:
            device: `cuda` (NCCL, the GPU numbered LOCAL_RANK), `cpu` (gloo), or `auto`: CUDA where there is one.
        Raises:
            ValueError: not started by torchrun, or no such device for this process.
        """
        missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise ValueError(f"{missing[0]}: not set; tensor parallelism starts with: torchrun --nproc-per-node N ...")
        place = _device(device, int(os.environ.get("LOCAL_RANK", "0")))
        on_gpu = place.type == "cuda"
        dist.init_process_group("nccl" if on_gpu else "gloo", device_id=place if on_gpu else None)
        try:
            control = dist.new_group(backend="gloo", timeout=PATIENCE)
            assert control is not None
            yield cls(dist.get_rank(), dist.get_world_size(), place, control)
        finally:
            dist.destroy_process_group()

    def part(self, config: ModelConfig, name: str) -> tuple[int, slice] | None:
        """The dimension and range of a tensor of the checkpoint that is this rank's; None: all of it."""
        leaf = name.removesuffix(".weight").rpartition(".")[2]
        if leaf not in BY_ROWS | BY_COLUMNS:
            return None
        dim = 0 if leaf in BY_ROWS else 1
        size = config.parameter_shapes()[name][dim] // self.world
        return dim, slice(self.rank * size, (self.rank + 1) * size)

    def read(self, checkpoint: Checkpoint, config: ModelConfig, name: str) -> Tensor:
        """This rank's part of a tensor: rows are mapped, columns copied."""
        match self.part(config, name):
            case None:
                return checkpoint.tensor(name)
            case 0, span:
                return checkpoint.tensor(name, span)
            case _, span:
                return checkpoint.tensor(name)[:, span].contiguous()

    def wrap(self, model: Gemma2) -> None:
        """Put a ParallelLinear around every linear whose weight was cut."""
        for name in model.config.parameter_shapes():
            if (part := self.part(model.config, name)) is not None:
                linear = name.removesuffix(".weight")
                put(model, linear, ParallelLinear(model.get_submodule(linear), *part))

    def least(self, number: int) -> int:
        """The smallest of the ranks' numbers: what is sized by free memory must be the same on every rank."""
        box = torch.tensor(number)
        dist.all_reduce(box, dist.ReduceOp.MIN, group=self.control)
        return int(box)

    def broadcast(self, message: Any = None) -> Any:
        """Rank 0's message, on every rank: anything that JSON can say. The others pass nothing, and wait."""
        raw = json.dumps(message, allow_nan=False).encode() if self.rank == 0 else b""
        length = torch.tensor(len(raw))
        dist.broadcast(length, 0, group=self.control)
        text = (
            torch.frombuffer(bytearray(raw), dtype=torch.uint8) if raw else torch.empty(int(length), dtype=torch.uint8)
        )
        dist.broadcast(text, 0, group=self.control)
        return json.loads(text.numpy().tobytes())


def _device(device: str, local_rank: int) -> torch.device:
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device: got {device!r}, allowed under torchrun are auto, cpu, cuda")
    count = torch.cuda.device_count()
    if device == "cpu" or (device == "auto" and not count):
        return torch.device("cpu")
    if local_rank >= count:
        raise ValueError(f"device: process {local_rank} of this machine has no GPU of its own, torch sees {count}")
    return torch.device("cuda", local_rank)


class Mirror:
    """Calls that rank 0 makes and the other ranks repeat, in the same order.

        mirror = Mirror(parallel, {"submit": submit, "step": engine.step})
        mirror.follow()                       # ranks above 0: until rank 0 closes
        mirror.first("submit", tokens=[...])  # rank 0
        mirror.together("step")

    Arguments travel as JSON. Whatever is drawn or measured (a seed, the size of a cache) must be settled before and
    be an argument, or `TensorParallel.least`, else the ranks drift apart. An exception on a following rank is not
    caught: that process ends, and torchrun ends the others.
    """

    def __init__(self, parallel: TensorParallel, calls: Mapping[str, Callable[..., Any]]) -> None:
        self.parallel, self.calls = parallel, calls

    def first(self, call: str, **arguments: Any) -> Any:
        """Call here, then on the others: for what runs no model. If it raises here, the others never hear of it."""
        result = self.calls[call](**arguments)
        self._send(call, arguments)
        return result

    def together(self, call: str, **arguments: Any) -> Any:
        """Call on every rank at the same time: for what runs the model, which needs all ranks."""
        self._send(call, arguments)
        return self.calls[call](**arguments)

    def _send(self, call: str, arguments: dict[str, Any]) -> None:
        assert self.parallel.rank == 0, self.parallel.rank
        assert call in self.calls, call
        self.parallel.broadcast([call, arguments])

    def follow(self) -> None:
        """Repeat rank 0's calls until it closes."""
        assert self.parallel.rank > 0, self.parallel.rank
        while (message := self.parallel.broadcast()) is not None:
            call, arguments = message
            self.calls[call](**arguments)

    def close(self) -> None:
        """Let the others return from `follow`."""
        self.parallel.broadcast(None)
