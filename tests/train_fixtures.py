"""Small runs for the tests of training: a debug model, documents in memory, and processes that start quickly.

Processes come from a fork server that has imported torch once. A rank gets the variables that torchrun sets.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import random
import socket
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemwright.adapter import LoraConfig
from gemwright.checkpoint import EMBEDDING
from gemwright.config import ModelConfig
from gemwright.data.loader import Batching, Loader
from gemwright.data.rows import Document
from gemwright.data.store import Documents, in_memory
from gemwright.lora import add_lora
from gemwright.model import Gemma2
from gemwright.ops.attention import Attention
from gemwright.quant.nf4 import make as make_nf4
from gemwright.swap import swap
from gemwright.train.distributed import World
from gemwright.train.export import adapter, whole_model
from gemwright.train.options import TrainConfig
from gemwright.train.sft import loss
from gemwright.train.trainer import Loss, Outcome, Trainer

PATIENCE = 120
"""Seconds that a process may take."""
LENGTH = 20
"""Places of a row, past the debug model's window of 8."""


def documents(count: int = 40, *, seed: int = 0) -> Documents:
    """Random documents of 2 to 30 tokens, half of whose targets carry loss, the last always. Never the padding id 0,
    for which transformers' embedding has no gradient."""
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        size = draw.randint(2, 30)
        weights = [0, *(draw.randint(0, 1) for _ in range(size - 2)), 1]
        made.append(Document([draw.randrange(1, 384) for _ in range(size)], weights))
    return in_memory(made)


def options(out: Path, **changes: Any) -> TrainConfig:
    """Six updates of two rows, logged and saved every second. With Adam's usual 1e-8 an element whose gradient is
    rounding alone moves as far as any other, and two exact loops part within a few updates."""
    defaults = dict(
        output_dir=str(out), per_device_train_batch_size=2, max_steps=6, learning_rate=3e-3, logging_steps=2,
        save_steps=2, lr_scheduler_type="cosine", warmup_steps=2, weight_decay=0.1, dtype="float32", seed=3,
        adam_epsilon=1e-4,
    )  # fmt: skip
    return TrainConfig(**{**defaults, **changes})


def debug(**changes: Any) -> ModelConfig:
    """The debug preset with some fields replaced."""
    return replace(ModelConfig.preset("debug"), layer_types=(), **changes)


def weights(config: ModelConfig) -> dict[str, Tensor]:
    """Random weights: queries and keys wide enough for scores past their cap, logits up to a third of theirs, so that
    the loss is one of a model and an update does not magnify rounding."""
    generator = torch.Generator().manual_seed(0)
    widths = {"q_proj": 6.5, "k_proj": 6.5, "embed_tokens": 3.5}
    state = {}
    for name, shape in config.parameter_shapes().items():
        width = widths.get(name.removesuffix(".weight").rpartition(".")[2], 1.0) / shape[-1] ** 0.5
        state[name] = torch.randn(shape, generator=generator) * (width if len(shape) > 1 else 0.3)
    return state


def model(lora: LoraConfig | None = None, config: ModelConfig | None = None, *, nf4: bool = False) -> Gemma2:
    """The debug model on these weights, ready to train; the same at every call."""
    made = Gemma2(config or debug(), Attention("blocked", "blocked", "blocked"))
    state = weights(made.config)
    made.load_state_dict({**state, "lm_head.weight": state[EMBEDDING]})
    made.requires_grad_(lora is None)
    if nf4:
        swap(made, {r".*_proj": make_nf4})
    if lora is not None:
        torch.manual_seed(5)
        add_lora(made, lora)
    return made


def trainer(
    config: TrainConfig,
    world: World,
    *,
    lora: LoraConfig | None = None,
    made: Gemma2 | None = None,
    algorithm: Loss[Any] = loss,
    evaluate: bool = False,
    packing: bool = True,
    nf4: bool = False,
) -> Trainer:
    """A trainer over `documents()`."""
    made = made or model(lora, nf4=nf4)
    if config.dtype == "bfloat16":
        made.bfloat16()
    batching = Batching(
        length=LENGTH, rows=config.per_device_train_batch_size, accumulation=config.gradient_accumulation_steps,
        rank=world.rank, world=world.size, seed=config.seed, packing=packing,
    )  # fmt: skip
    held_out = Batching(length=LENGTH, rows=2, rank=world.rank, world=world.size, shuffle=False)
    export = (
        whole_model(made, config=made.config.to_hf(), dtype=torch.float32)
        if lora is None
        else adapter(made, lora, base="base")
    )
    return Trainer(
        made, algorithm, Loader(documents(), batching, epochs=None), config,
        total=config.max_steps or 6, world=world, export=export,
        eval_data=Loader(documents(7, seed=9), held_out) if evaluate else None,
    )  # fmt: skip


def run(config: TrainConfig, **kwargs: Any) -> Outcome:
    """One run from beginning to end, or to where it is stopped, as this process's rank."""
    torch.set_num_threads(1)
    with World.join("cpu", offload=config.cpu_offload) as world:
        return trainer(config, world, **kwargs).train()


def _rank(
    rank: int, world: int, port: int, work: Callable[..., object], arguments: tuple[Any, ...], named: dict[str, Any]
) -> None:
    faulthandler.dump_traceback_later(PATIENCE, exit=True)  # where it hangs, instead of hanging
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    work(*arguments, **named)


def start(
    work: Callable[..., object], *arguments: Any, rank: int = 0, world: int = 1, port: int = 0, **named: Any
) -> BaseProcess:
    """Call a function of this module in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["gemwright.train.sft", "torch.distributed.fsdp"])
    process = context.Process(target=_rank, args=(rank, world, port, work, arguments, named))
    process.start()
    return process


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def gather(work: Callable[..., object], *arguments: Any, world: int = 2, **named: Any) -> list[BaseProcess]:
    """Call a function on every rank."""
    port = free_port()
    return [start(work, *arguments, rank=rank, world=world, port=port, **named) for rank in range(world)]


def together(work: Callable[..., object], *arguments: Any, world: int = 2, **named: Any) -> None:
    """Call a function on every rank, and wait; AssertionError where one fails."""
    ranks = gather(work, *arguments, world=world, **named)
    for process in ranks:
        process.join()
    codes = [process.exitcode for process in ranks]
    assert codes == [0] * world, codes


def run_all(jobs: list[tuple[TrainConfig, dict[str, Any]]]) -> None:
    """Several runs one after the other by processes that have met once."""
    torch.set_num_threads(1)
    with World.join("cpu") as world:
        for config, kwargs in jobs:
            trainer(config, replace(world, offload=config.cpu_offload), **kwargs).train()
