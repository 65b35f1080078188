"""Pre-training from fresh weights, on text that is tokenised as it is read or on tokenised shards.

Weights start as transformers has them for Gemma 2: matrices normal with the config's `initializer_range`, norm gains at
the identity. The loss is that of fine-tuning, with every token a target.
"""

from __future__ import annotations

import dataclasses
import glob
import json
import sys
from pathlib import Path
from typing import Any

import torch

from gemwright.config import ModelConfig
from gemwright.data.loader import Batching, Loader
from gemwright.data.prepare import tokenize
from gemwright.data.rows import Format
from gemwright.data.sources import open_source
from gemwright.data.store import open_shards
from gemwright.data.stream import Stream
from gemwright.hub import resolve
from gemwright.model import Gemma2
from gemwright.ops.attention import Attention
from gemwright.tokenizer import Tokenizer
from gemwright.train.card import push, write_card
from gemwright.train.distributed import World
from gemwright.train.export import whole_model
from gemwright.train.options import PRETRAIN_FREE, PretrainConfig, TrainConfig
from gemwright.train.sft import loss
from gemwright.train.speed import choose_precision
from gemwright.train.trainer import Outcome, Trainer


def pretrain(config: PretrainConfig) -> Outcome:
    """Train from fresh weights; the model is in `output_dir` at the end. Errors as for `sft`."""
    with World.join(config.device, offload=config.cpu_offload) as world:
        folder = resolve(config.tokenizer, offline=config.offline)
        tokenizer = Tokenizer.load(folder)
        shape = read_config(config.model_config, tokenizer)
        data = _data(config, tokenizer, world)
        if world.leads:
            print(f"model: {shape.num_parameters():,} parameters", file=sys.stderr)
        model = fresh(shape, config, world, attention=config.attn_implementation)
        dtype = getattr(torch, shape.dtype)
        trainer = Trainer(
            model, loss, data, config,
            total=config.updates(data.steps if isinstance(data, Loader) else 0),
            world=world, eval_data=_evaluation(config, tokenizer, world), free=PRETRAIN_FREE,
            export=whole_model(model, config=shape.to_hf(), dtype=dtype, copy_from=folder),
            settings={"shape": dataclasses.asdict(shape)},
        )  # fmt: skip
        outcome = trainer.train()
        if outcome == "done" and world.leads:
            out = Path(config.output_dir).expanduser()
            source = config.dataset_name or config.shards or ""
            write_card(out, base=None, data=[source], method="Pre-training", settings=dataclasses.asdict(config))
            if config.push_to_hub:
                push(out, config.hub_model_id, private=config.hub_private_repo)
        return outcome


def read_config(name: str, tokenizer: Tokenizer) -> ModelConfig:
    """The shape behind a preset's name or a file. Raises ValueError where the vocabulary has no room for the tokens."""
    path = Path(name).expanduser()
    if path.suffix in (".json", ".yaml", ".yml"):
        raw = _read(path)
        own: dict[str, Any] = {"vocab_size": tokenizer.vocab_size, **raw, "model_type": "gemma2"}
        config = ModelConfig.from_hf(own)
    else:
        config = dataclasses.replace(ModelConfig.preset(name), vocab_size=tokenizer.vocab_size)
    if config.vocab_size < tokenizer.vocab_size:
        raise ValueError(f"vocab_size: got {config.vocab_size}, the tokenizer has {tokenizer.vocab_size} ids")
    return config


def _read(path: Path) -> dict[str, Any]:
    import yaml

    text = path.read_text(encoding="utf-8")
    try:
        raw = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: holds a {type(raw).__name__}, allowed is an object of config.json's fields")
    return raw


def fresh(shape: ModelConfig, config: TrainConfig, world: World, *, attention: str) -> Gemma2:
    """Fresh weights from the seed, the same on every rank; on the device, or in main memory to be sharded."""
    precision = choose_precision(config, world.device)
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    backends = Attention.resolve(
        attention, device=world.device.type, dtype=dtype, cap=shape.attn_logit_softcapping,
        window=shape.sliding_window,
    )  # fmt: skip
    model = Gemma2(shape, backends)
    generator = torch.Generator().manual_seed(config.seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=shape.initializer_range, generator=generator)
    return model if world.mesh is not None else model.to(world.device, dtype)


def _data(config: PretrainConfig, tokenizer: Tokenizer, world: World) -> Loader | Stream:
    batching = Batching(
        length=config.max_seq_length, rows=config.per_device_train_batch_size, seed=config.seed,
        accumulation=config.gradient_accumulation_steps, rank=world.rank, world=world.size, overlong="split",
    )  # fmt: skip
    if config.shards is not None:
        return Loader(open_shards(Path(config.shards).expanduser(), tokenizer), batching, epochs=None)
    assert config.dataset_name is not None
    format = Format(kind="text", text_field=config.dataset_text_field, control_tokens=False)
    remote = not Path(config.dataset_name).exists() and not glob.has_magic(config.dataset_name)
    source = open_source(
        config.dataset_name,
        config=config.dataset_config,
        split=config.dataset_train_split,
        streaming=config.streaming and remote,
    )
    if config.streaming:
        return Stream(source, tokenizer, format, batching, epochs=None)
    with world.first():
        documents = tokenize(source, tokenizer, format, cache=config.token_folder)
    return Loader(documents, batching, epochs=None)


def _evaluation(config: PretrainConfig, tokenizer: Tokenizer, world: World) -> Loader | None:
    if config.eval_dataset_name is None:
        return None
    batching = Batching(
        length=config.max_seq_length, rows=config.per_device_eval_batch_size, rank=world.rank, world=world.size,
        shuffle=False, overlong="split",
    )  # fmt: skip
    format = Format(kind="text", text_field=config.dataset_text_field, control_tokens=False)
    with world.first():
        documents = tokenize(open_source(config.eval_dataset_name), tokenizer, format, cache=config.token_folder)
    return Loader(documents, batching)
