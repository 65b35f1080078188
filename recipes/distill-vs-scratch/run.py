"""Distilled or from scratch: the report's comparison (arXiv 2408.00118, tables 6 and 7), in small.

    python recipes/distill-vs-scratch/prepare.py --out DIR
    python recipes/distill-vs-scratch/run.py --data DIR --out DIR/runs
    python recipes/distill-vs-scratch/picture.py DIR/runs/results.jsonl recipes/distill-vs-scratch

A teacher of 12 million parameters learns all the text. Then one student of 5 million parameters learns half of it, in
four ways, each from three seeds of its first weights and of the order of the text:

    scratch     `gemwright pretrain`: cross-entropy, the text once
    local       `gemwright distill`: forward KL to the teacher, which runs beside it; the same text, once
    cached      the same, after `gemwright cache-teacher` has stored the teacher's final hidden states
    compute     `gemwright pretrain` for as many multiplications as `local` takes with the teacher's: the text 1.8 times

With one seed all ways start from the same weights and read the same rows in the same order. A line of results.jsonl is
written as each run ends; what is done already is not done again. Runs go side by side in `--jobs` processes.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch

from gemwright.config import ModelConfig
from gemwright.model import Gemma2
from gemwright.train.cache_teacher import cache_teacher
from gemwright.train.distill import distill
from gemwright.train.distill_options import CacheTeacherConfig, DistillConfig
from gemwright.train.options import PretrainConfig
from gemwright.train.pretrain import pretrain
from gemwright.train.progress import LOG, records
from gemwright.train.speed import Work
from gemwright.train.trainer import Outcome

SEEDS = (0, 1, 2)
LENGTH = 256
VOCABULARY = 8192  # as prepare.py learns it
SHARED = {
    "vocab_size": VOCABULARY, "head_dim": 64, "query_pre_attn_scalar": 64, "max_position_embeddings": LENGTH,
    "sliding_window": 128, "dtype": "float32",
}  # fmt: skip
STUDENT = SHARED | {
    "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
TEACHER = SHARED | {
    "hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 4, "num_attention_heads": 6,
    "num_key_value_heads": 3, "dtype": "bfloat16",
}  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where things lie, and what all runs share."""

    data: Path
    out: Path
    device: str
    rows: int
    graphs: bool

    def options(self, name: str, seed: int, *, rate: float, epochs: float) -> dict[str, Any]:
        """Options of the trainer."""
        return dict(
            output_dir=str(self.out / name), resume=True, seed=seed, device=self.device, max_seq_length=LENGTH,
            eval_dataset_name=str(self.data / "heldout.jsonl"), token_cache=str(self.data / "tokens"),
            num_train_epochs=epochs, per_device_train_batch_size=self.rows, per_device_eval_batch_size=self.rows,
            learning_rate=rate, lr_scheduler_type="cosine", min_lr_ratio=0.1, warmup_ratio=0.03, adam_beta2=0.95,
            weight_decay=0.1, logging_steps=40, eval_steps=160, save_steps=160, cuda_graphs=self.graphs,
        )  # fmt: skip

    def scratch(self, name: str, seed: int, shape: str, text: str, *, rate: float, epochs: float) -> Outcome:
        """A run of `gemwright pretrain`."""
        options = self.options(name, seed, rate=rate, epochs=epochs)
        return pretrain(
            PretrainConfig(
                model_config=str(self.out / f"{shape}.json"), tokenizer=str(self.data / "tokenizer"),
                dataset_name=str(self.data / text), **options,
            )
        )  # fmt: skip

    def distilled(self, name: str, seed: int, *, rate: float, source: dict[str, Any]) -> Outcome:
        """A run of `gemwright distill`; `source` is the teacher, or its cache."""
        options = self.options(name, seed, rate=rate, epochs=1)
        return distill(
            DistillConfig(
                model_name=str(self.out / "student.json"), tokenizer=str(self.data / "tokenizer"),
                dataset_name=str(self.data / "student.jsonl"), overlong="split", packing=True, **source, **options,
            )
        )  # fmt: skip

    def cache(self) -> None:
        """`gemwright cache-teacher`."""
        cache_teacher(
            CacheTeacherConfig(
                teacher=str(self.out / "teacher"), dataset_name=str(self.data / "student.jsonl"),
                eval_dataset_name=str(self.data / "heldout.jsonl"), output=str(self.out / "cache"),
                max_seq_length=LENGTH, overlong="split", batch_size=self.rows, device=self.device,
                token_cache=str(self.data / "tokens"),
            )
        )  # fmt: skip


def work(shape: dict[str, Any]) -> float:
    """Multiplications and additions of training on a token: a third of them is the forward pass."""
    with torch.device("meta"):
        model = Gemma2(ModelConfig.from_hf(shape | {"model_type": "gemma2"}))
    row = SimpleNamespace(pos_BT=torch.arange(LENGTH)[None], count=LENGTH, tokens=LENGTH)
    return Work.of(model).flops(cast(Any, row)) / LENGTH


COMPUTE = 1 + work(TEACHER) / 3 / work(STUDENT)
"""What a distilled run multiplies, its teacher included, as a multiple of the run from scratch."""


def run(place: Place, way: str, seed: int, epochs: float) -> dict[str, Any]:
    """One run, and its curve of held-out cross-entropy, nats a token."""
    begun, name = time.time(), f"{way}-{seed}"
    torch.set_float32_matmul_precision("high")
    if way == "teacher":
        name = way
        outcome = place.scratch(name, seed, "teacher", "teacher.jsonl", rate=1e-3, epochs=epochs)
    elif way == "cache":
        place.cache()
        return {"way": way, "seed": seed, "wall": time.time() - begun}
    elif way in ("scratch", "compute"):
        epochs = 1 if way == "scratch" else COMPUTE
        outcome = place.scratch(name, seed, "student", "student.jsonl", rate=2e-3, epochs=epochs)
    else:
        source = {
            "local": {"teacher": str(place.out / "teacher")},
            "cached": {"teacher_cache": str(place.out / "cache")},
        }
        outcome = place.distilled(name, seed, rate=2e-3, source=source[way])
    if outcome != "done":
        raise InterruptedError(f"{name} was told to stop, and goes on when this is called again")
    log = records(place.out / name / LOG)
    tokens = {line["step"]: line["tokens"] for line in log if "tokens" in line}
    curve = [
        {"tokens": tokens[line["step"]], "ce": line.get("eval_cross_entropy", line["eval_loss"])}
        for line in log
        if "eval_loss" in line
    ]
    seconds = next(line["seconds"] for line in reversed(log) if "seconds" in line)
    end = curve[-1]
    return {
        "way": way, "seed": seed, **end, "ppl": math.exp(end["ce"]), "work": 1 if way == "scratch" else COMPUTE,
        "seconds": seconds, "wall": round(time.time() - begun, 1), "curve": curve,
    }  # fmt: skip


NEEDS = {"local": "teacher", "cache": "teacher", "cached": "cache"}
"""What must be done before."""


def run_all(place: Place, epochs: float, jobs: int) -> bool:
    """Do what is not done, `jobs` runs side by side; whether all went well. After a failure nothing new begins."""
    file = place.out / "results.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    done = {(row["way"], row["seed"]) for row in rows}
    ways = ("scratch", "cached", "compute", "local")
    plan = [("teacher", 0), ("cache", 0), *((way, seed) for way in ways for seed in SEEDS)]
    waiting = [task for task in plan if task not in done]
    running: dict[Future[dict[str, Any]], tuple[str, int]] = {}
    failed = False
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        while True:
            for task in list(waiting):
                if (NEEDS.get(task[0], ""), 0) in done | {("", 0)} and len(running) < jobs:
                    waiting.remove(task)
                    running[pool.submit(run, place, *task, epochs)] = task
            if not running:
                return not failed
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                task = running.pop(future)
                if error := future.exception():
                    failed = True
                    waiting.clear()
                    print(f"{task}: {type(error).__name__}: {error}", flush=True)
                    continue
                done.add(task)
                with file.open("a") as lines:
                    lines.write(json.dumps(future.result()) + "\n")
                print({key: value for key, value in future.result().items() if key != "curve"}, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that prepare.py filled")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=32, help=f"of {LENGTH} tokens in an update")
    parser.add_argument("--epochs", type=float, default=1, help="times that the teacher reads its text")
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--graphs", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available(), help="CUDA graphs"
    )
    parser.add_argument("--jobs", type=int, default=5 if torch.cuda.is_available() else 1, help="runs side by side")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, shape in {"student": STUDENT, "teacher": TEACHER}.items():
        (args.out / f"{name}.json").write_text(json.dumps(shape))
    place = Place(args.data.resolve(), args.out.resolve(), args.device, args.rows, args.graphs)
    if not run_all(place, args.epochs, args.jobs):
        sys.exit(1)


if __name__ == "__main__":
    main()
