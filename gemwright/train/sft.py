"""Supervised fine-tuning: all weights, LoRA, or LoRA over a quantized base.

Read from top to bottom: the run, its loss, its data, its model, what is saved; the options are in `options.py`. Which
tokens carry loss is `data/rows.py`'s affair (assistant turns, completions, or plain text), the packing
`data/loader.py`'s, the loop `trainer.py`'s. The head stays tied: full fine-tuning trains the one matrix of embedding
and head, LoRA leaves it as it is.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemwright.adapter import PRESETS, LoraConfig
from gemwright.checkpoint import EMBEDDING, Checkpoint
from gemwright.data.batch import Batch
from gemwright.data.loader import Batching, Loader
from gemwright.data.prepare import tokenize
from gemwright.data.rows import Format
from gemwright.data.sources import open_source
from gemwright.data.store import Documents
from gemwright.hub import resolve
from gemwright.loader import load_model
from gemwright.lora import add_lora
from gemwright.model import Gemma2
from gemwright.ops.attention import Attention
from gemwright.ops.loss import cross_entropy
from gemwright.quant import nf4
from gemwright.tokenizer import Tokenizer
from gemwright.train.card import push, write_card
from gemwright.train.distributed import World
from gemwright.train.export import Export, adapter, whole_model
from gemwright.train.options import SFT_FREE, DataOptions, SftConfig
from gemwright.train.speed import choose_precision
from gemwright.train.trainer import Outcome, Trainer


def sft(config: SftConfig) -> Outcome:
    """Fine-tune; the model or adapter is in `output_dir` at the end.

    Raises ValueError, OSError and their kinds for everything that the user can mend, before anything is trained.
    """
    with World.join(config.device, offload=config.cpu_offload) as world:
        base = resolve(config.model_name, revision=config.model_revision, offline=config.offline)
        if config.attn_implementation == "eager" and world.leads:
            print("attn_implementation: eager, computed exactly by a faster path in linear memory", file=sys.stderr)
        tokenizer = Tokenizer.load(base)
        train = loader(config, tokenizer, world)
        held_out = evaluation(config, tokenizer, world)
        if world.leads:
            print(f"data: {train.report()}; {train.steps} updates an epoch", file=sys.stderr)
        torch.manual_seed(config.seed)  # the adapter's fresh factors, the same on every rank
        model = load(config, base, world)
        trainer = Trainer(
            model, loss, train, config,
            total=config.updates(train.steps), world=world, export=export(model, config, base),
            eval_data=held_out, free=SFT_FREE, settings={"base": fingerprint(base)},
        )  # fmt: skip
        outcome = trainer.train()
        if outcome == "done" and world.leads:
            out = Path(config.output_dir).expanduser()
            what = "LoRA fine-tuning" if config.use_peft else "Fine-tuning of all weights"
            data = sorted({name for name in (config.dataset_name, config.eval_dataset_name) if name})
            settings = dataclasses.asdict(config)
            write_card(
                out, base=config.model_name, data=data, method=f"{what} on supervised data", settings=settings,
                adapter=config.use_peft,
            )  # fmt: skip
            if config.push_to_hub:
                push(out, config.hub_model_id, private=config.hub_private_repo)
        return outcome


def loss(model: Gemma2, batch: Batch) -> tuple[Tensor, Tensor, Mapping[str, Tensor]]:
    """Cross-entropy of the targets with weight; accuracy is the share of them that are the likeliest token."""
    hidden_BTD = model(batch.tokens_BT, batch.pos_BT, batch.doc_BT)
    total, count, correct = cross_entropy(
        hidden_BTD,
        model.lm_head.weight,
        batch.targets_BT,
        batch.weights_BT,
        softcap=model.config.final_logit_softcapping,
    )
    return total, count, {"accuracy": correct}


def documents(
    options: DataOptions, name: str, split: str | None, tokenizer: Tokenizer, world: World, *, cache: Path
) -> Documents:
    """The tokenised documents of a data set: made by the first rank, mapped by all."""
    format = Format(
        kind=options.dataset_kind, text_field=options.dataset_text_field, answers=options.answers,
        fold_system=options.fold_system,
    )  # fmt: skip
    source = open_source(name, config=options.dataset_config, split=split)
    with world.first():
        return tokenize(source, tokenizer, format, cache=cache)


def loader(config: SftConfig, tokenizer: Tokenizer, world: World) -> Loader:
    """Batches to train on, without end."""
    batching = Batching(
        length=config.max_seq_length, rows=config.per_device_train_batch_size, seed=config.seed,
        accumulation=config.gradient_accumulation_steps, rank=world.rank, world=world.size, packing=config.packing,
        overlong=config.overlong,
    )  # fmt: skip
    name, split = config.dataset_name, config.dataset_train_split
    return Loader(documents(config, name, split, tokenizer, world, cache=config.token_folder), batching, epochs=None)


def evaluation(config: SftConfig, tokenizer: Tokenizer, world: World) -> Loader | None:
    """Batches to evaluate on, where there is data for it."""
    if config.eval_name is None:
        return None
    batching = Batching(
        length=config.max_seq_length, rows=config.per_device_eval_batch_size, rank=world.rank, world=world.size,
        shuffle=False, packing=config.packing, overlong=config.overlong,
    )  # fmt: skip
    name, split = config.eval_name, config.dataset_test_split
    return Loader(documents(config, name, split, tokenizer, world, cache=config.token_folder), batching)


def load(config: SftConfig, base: Path, world: World) -> Gemma2:
    """The base with the adapter, or all of it ready to train; on the device, or in main memory to be sharded."""
    precision = choose_precision(config, world.device)
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    sharded = world.mesh is not None
    # shards of trained weights are fp32 masters, made block by block; until then the stored dtype is enough
    model = load_model(
        base,
        device=torch.device("cpu") if sharded else world.device,
        dtype="auto" if sharded and not config.use_peft and dtype == torch.bfloat16 else dtype,
        pack=False,
        swaps={r".*_proj": nf4.make} if config.load_in_4bit else None,
    )
    model.attention = Attention.resolve(
        "auto" if config.attn_implementation == "eager" else config.attn_implementation,
        device=world.device.type, dtype=dtype, cap=model.config.attn_logit_softcapping,
        window=model.config.sliding_window,
    )  # fmt: skip
    if config.use_peft:
        add_lora(model, lora_config(config))
    else:
        model.requires_grad_(True)
    return model


def lora_config(config: SftConfig) -> LoraConfig:
    """The adapter's shape."""
    names = config.lora_target_modules
    preset = len(names) == 1 and names[0] in PRESETS
    return LoraConfig(
        rank=config.lora_r, alpha=config.lora_alpha, dropout=config.lora_dropout, use_rslora=config.use_rslora,
        targets=names[0] if preset else names,
    )  # fmt: skip


def export(model: Gemma2, config: SftConfig, base: Path) -> Export:
    """The adapter, or the whole model in the dtype that the base is stored in, with its tokenizer and configs."""
    if config.use_peft:
        return adapter(model, lora_config(config), base=config.model_name)
    source = Checkpoint(base)
    generation = source.generation_config or None
    dtype = source.dtype(EMBEDDING)
    return whole_model(model, config=source.config, dtype=dtype, generation_config=generation, copy_from=base)


def fingerprint(base: Path) -> dict[str, Any]:
    """What tells one base from another without reading it all: its config, and the sizes of its weights' files."""
    sizes = {path.name: path.stat().st_size for path in sorted(base.glob("*.safetensors"))}
    return {"config": Checkpoint(base).config, "files": sizes}
