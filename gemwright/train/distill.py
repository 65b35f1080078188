"""Distillation: a student learns a teacher's distribution over the whole vocabulary, token by token.

    sum over targets of  (1 - ce_weight) D(P, Q) - ce_weight log Q(target)

P is the teacher's distribution at a place, Q the student's, D one of `ops/divergence.py` (forward KL is how Gemma 2's
2B and 9B were made, arXiv 2408.00118). Neither side's logits ever exist as a whole: the teacher gives final hidden
states and its head, computed on the spot (`teacher.py`) or read from a cache (`teacher_cache.py`). Which tokens are
targets is the data's affair, as in fine-tuning; with `lmbda` some batches are the student's own generations
(`on_policy.py`), on which the loss is the same.

An evaluation reports KL(P, Q) at temperature 1 and cross-entropy beside the loss, whatever is trained.

Legend: B rows, T places, D model, V vocabulary, X places that carry loss, K stored ids.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemwright.checkpoint import Checkpoint
from gemwright.config import ModelConfig
from gemwright.data.loader import Loader
from gemwright.data.store import tokenizer_digest
from gemwright.hub import resolve
from gemwright.model import Gemma2
from gemwright.ops.divergence import divergence, sparse_kl
from gemwright.ops.head import Head
from gemwright.ops.loss import cross_entropy
from gemwright.prompt import stop_ids
from gemwright.tokenizer import Tokenizer
from gemwright.train import sft
from gemwright.train.card import push, write_card
from gemwright.train.distill_options import DISTILL_FREE, DistillConfig
from gemwright.train.distributed import World
from gemwright.train.export import Export, whole_model
from gemwright.train.lessons import Lessons, Taught
from gemwright.train.on_policy import OnPolicy, Speaker
from gemwright.train.pretrain import fresh, read_config
from gemwright.train.speed import choose_precision
from gemwright.train.teacher import Teacher, load_teacher
from gemwright.train.teacher_cache import Hidden, Targets, TeacherCache, data_key, teacher_key
from gemwright.train.token_ids import read_map, same_ids
from gemwright.train.trainer import Outcome, Trainer


def distill(config: DistillConfig) -> Outcome:
    """Distil; the student, or its adapter, is in `output_dir` at the end. Errors as for `sft`, all before training."""
    with World.join(config.device, offload=config.cpu_offload) as world:
        folders = Folders.find(config)
        tokenizer = Tokenizer.load(folders.tokenizer)
        train, held_out = sft.loader(config, tokenizer, world), sft.evaluation(config, tokenizer, world)
        if world.leads:
            print(f"data: {train.report()}; {train.steps} updates an epoch", file=sys.stderr)
        student = Student.make(config, folders, tokenizer, world)
        teaching = Teaching.make(config, folders, tokenizer, student.shape, train, held_out, world)
        generated = on_policy(config, Lessons(train, teaching.train), student, teaching, tokenizer, world)
        trainer = Trainer(
            student.model, Distillation(config, teaching), generated or Lessons(train, teaching.train), config,
            total=config.updates(train.steps), world=world, export=student.export,
            eval_data=None if held_out is None else Lessons(held_out, teaching.held_out),
            settings={"student": student.origin, "taught": teaching.key}, free=DISTILL_FREE,
            notes=generated.notes if generated else dict,
        )  # fmt: skip
        outcome = trainer.train()
        if outcome == "done" and world.leads:
            _describe(config)
        return outcome


# --- the loss --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Distillation:
    """The loss: sum over targets, their count, and in an evaluation KL and cross-entropy beside it."""

    config: DistillConfig
    teaching: Teaching

    def __call__(self, model: Gemma2, taught: Taught) -> tuple[Tensor, Tensor, Mapping[str, Tensor]]:
        config, batch = self.config, taught.batch
        learned_BT = batch.weights_BT > 0
        targets = taught.targets or Hidden(self.teaching.ask().hidden(batch))
        hidden_XD = model(batch.tokens_BT, batch.pos_BT, batch.doc_BT)[learned_BT]
        weights_X = batch.weights_BT[learned_BT]
        student = Head(model.lm_head.weight, model.config.final_logit_softcapping)  # FSDP: only after the forward pass
        total, count = self.compare(config.divergence, config.temperature, hidden_XD, student, targets, weights_X)
        metrics: dict[str, Tensor] = {}
        if config.ce_weight or not model.training:
            cross, _, correct = cross_entropy(
                hidden_XD, student.weight_VD, batch.targets_BT[learned_BT], weights_X, softcap=student.softcap
            )
            total = (1 - config.ce_weight) * total + config.ce_weight * cross
            metrics = {"cross_entropy": cross, "accuracy": correct}
        if not model.training:
            at = config.temperature if self.teaching.sampled else 1.0  # drawn ids serve the temperature they came from
            metrics["kl"], _ = self.compare("forward_kl", at, hidden_XD, student, targets, weights_X)
        return total, count, metrics

    def compare(
        self, kind: str, temperature: float, hidden_XD: Tensor, student: Head, targets: Targets, weights_X: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Sum of weight * divergence over the targets, and of the weights."""
        vocab = self.teaching.vocab
        student = replace(student, temperature=temperature)
        if isinstance(targets, Hidden):
            teacher = replace(self.teaching.head, temperature=temperature)
            return divergence(
                kind, hidden_XD, student, targets.hidden_XD, teacher, weights_X, beta=self.config.beta, vocab=vocab
            )
        if vocab is not None:
            student = replace(student, weight_VD=student.weight_VD[:vocab])
        mass_XK = targets.counts_XK / targets.counts_XK.sum(-1, keepdim=True)
        log_p_XK = targets.log_p_XK if kind == "forward_kl" else torch.zeros_like(mass_XK)
        return sparse_kl(hidden_XD, student, targets.ids_XK, mass_XK, weights_X, log_p_XK=log_p_XK)


# --- teacher and data ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Folders:
    """What the names of a run stand for."""

    student: Path | None
    teacher: Path | None
    tokenizer: Path

    @classmethod
    def find(cls, config: DistillConfig) -> Folders:
        """Resolve names; None for a fresh student, and for a teacher that is not given."""
        student = None
        if not config.fresh:
            student = resolve(config.model_name, revision=config.model_revision, offline=config.offline)
        teacher = None if config.teacher is None else resolve(config.teacher, offline=config.offline)
        named = None if config.tokenizer is None else resolve(config.tokenizer, offline=config.offline)
        tokenizer = student or named or teacher
        if tokenizer is None:
            raise ValueError("tokenizer: not given; a fresh student that learns from a cache alone needs one")
        return cls(student, teacher, tokenizer)


@dataclass(frozen=True, eq=False)
class Teaching:
    """Where the teacher's targets come from: a cache, the teacher itself, or both."""

    head: Head
    vocab: int | None
    """Ids that both heads have, where one table is wider."""
    key: Mapping[str, Any]
    """What a resumed run must share."""
    teacher: Teacher | None
    train: TeacherCache | None = None
    held_out: TeacherCache | None = None

    @property
    def sampled(self) -> bool:
        """Whether the targets are drawn ids."""
        return self.train is not None and self.train.sampled

    def ask(self) -> Teacher:
        """The teacher itself."""
        assert self.teacher is not None, "a batch without cached targets, and no teacher"
        return self.teacher

    @classmethod
    def make(
        cls, config: DistillConfig, folders: Folders, tokenizer: Tokenizer, shape: ModelConfig, train: Loader,
        held_out: Loader | None, world: World,
    ) -> Teaching:  # fmt: skip
        """Load the teacher where it is needed, open the caches where they are given.

        Raises ValueError for a teacher of other ids, a cache of something else, or one that the divergence cannot use.
        """
        teacher, caches = None, []
        if folders.teacher is not None:
            teacher = speaking(folders.teacher, config, tokenizer, shape.vocab_size, world)
        if config.teacher_cache is not None:
            known = {} if teacher is None else teacher_key(teacher)
            for part, loader in {"train": train, "eval": held_out}.items():
                if loader is not None:
                    now = {**data_key(loader, tokenizer_digest(tokenizer)), **known}
                    caches.append(TeacherCache(Path(config.teacher_cache).expanduser() / part, loader, now))
            if caches[0].sampled:
                _check_samples(config, caches[0])
        head = teacher.head if teacher is not None else caches[0].head(world.device)
        width = len(head.weight_VD)
        key = caches[0].key if caches else {"kind": "asked", "teacher": teacher and teacher.fingerprint}
        return cls(
            head, None if width == shape.vocab_size else min(width, shape.vocab_size),
            {name: value for name, value in key.items() if name != "shards"}, teacher, *caches,
        )  # fmt: skip


def speaking(folder: Path, config: Any, tokenizer: Tokenizer, width: int | None, world: World) -> Teacher:
    """A teacher that reads and answers in the ids of a student whose tables have `width` rows (None: not known)."""
    teacher = load_teacher(folder, device=world.device, dtype=config.teacher_dtype)
    rows = len(teacher.head.weight_VD)
    ids = same_ids(tokenizer, Tokenizer.load(folder), (width or rows, rows), read_map(config.token_map))
    return teacher.speak(ids)


def on_policy(
    config: DistillConfig, lessons: Lessons, student: Student, teaching: Teaching, tokenizer: Tokenizer, world: World
) -> OnPolicy | None:
    """The batches of a run in which answers are generated; None where they never are."""
    if not config.generates:
        return None
    for name in ("sampling_temperature", "top_p"):
        if getattr(config, name) != 1 and world.leads:
            print(f"{name}: at {getattr(config, name)} answers are not the student's own distribution", file=sys.stderr)
    dtype = torch.bfloat16 if choose_precision(config, world.device) == "bfloat16" else torch.float32
    speaker = None
    if config.seq_kd:
        model = teaching.ask().model
        if model is None or teaching.ask().ids_V is not None:
            raise ValueError(
                "seq_kd: the teacher is no Gemma 2 with the student's own ids; `gemwright synthesize` lets any teacher "
                "answer beforehand"
            )
        speaker = Speaker(model, world, learns=False, dtype=dtype)
    return OnPolicy(
        lessons, config, world, student=Speaker(student.model, world, learns=True, dtype=dtype), teacher=speaker,
        stop_ids=stop_ids(student.shape, student.generation_config, tokenizer),
    )  # fmt: skip


def _check_samples(config: DistillConfig, cache: TeacherCache) -> None:
    if config.divergence not in ("forward_kl", "soft_cross_entropy"):
        raise ValueError(
            f"divergence: got {config.divergence}, but teacher_cache holds drawn ids; allowed are forward_kl and "
            "soft_cross_entropy, or a cache of hidden states"
        )
    if config.temperature != cache.key["temperature"]:
        raise ValueError(
            f"temperature: got {config.temperature}, but the ids of teacher_cache were drawn at "
            f"{cache.key['temperature']}; allowed is the same, or a cache of hidden states"
        )


# --- the student -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Student:
    """A model to train, how it is saved, and what it started from."""

    model: Gemma2
    export: Export
    origin: Mapping[str, Any]
    generation_config: Mapping[str, Any]

    @property
    def shape(self) -> ModelConfig:
        """Its configuration."""
        return self.model.config

    @classmethod
    def make(cls, config: DistillConfig, folders: Folders, tokenizer: Tokenizer, world: World) -> Student:
        """From a folder, all weights or an adapter; or fresh weights of a shape that a file tells."""
        torch.manual_seed(config.seed)  # an adapter's fresh factors, the same on every rank
        if folders.student is not None:
            model = sft.load(config, folders.student, world)
            saved = sft.export(model, config, folders.student)
            generation = Checkpoint(folders.student).generation_config
            return cls(model, saved, sft.fingerprint(folders.student), generation)
        if config.use_peft:
            raise ValueError("use_peft: given for a student of fresh weights; allowed with a folder or a hub name")
        shape = read_config(config.model_name, tokenizer)
        eager = config.attn_implementation == "eager"
        model = fresh(shape, config, world, attention="auto" if eager else config.attn_implementation)
        dtype = getattr(torch, shape.dtype)
        saved = whole_model(model, config=shape.to_hf(), dtype=dtype, copy_from=folders.tokenizer)
        return cls(model, saved, {"shape": dataclasses.asdict(shape)}, {})


def _describe(config: DistillConfig) -> None:
    out = Path(config.output_dir).expanduser()
    taught = config.teacher or f"the cache {config.teacher_cache}"
    method = f"Distillation ({config.divergence}) from {taught}"
    if config.lmbda:
        method += f", {100 * config.lmbda:g} % of the batches generated by the student itself"
    data = sorted({name for name in (config.dataset_name, config.eval_name) if name})
    write_card(
        out, base=None if config.fresh else config.model_name, data=data, method=method,
        settings=dataclasses.asdict(config), adapter=config.use_peft,
    )  # fmt: skip
    if config.push_to_hub:
        push(out, config.hub_model_id, private=config.hub_private_repo)
