"""Distillation on one GPU: a teacher of the 9B shape beside a student of the 2B shape, and the KL at the head alone.

Weights are random and made on the device; tokens are random, one document of `length`. The step is the trainer's own
parts: the teacher's hidden states without a gradient, the student under recomputation, the chunked divergence between
the two heads, AdamW over fp32 masters. What must fit at once:

    teacher, bf16                                   9.24e9 x 2   18.5 GB
    student, bf16, with gradients in bf16           2.61e9 x 4   10.5 GB
    masters and both moments, fp32                  2.61e9 x 12  31.4 GB
    the head's gradient, the embedding's, its fp32 copy           4.7 GB
    logits of a chunk, inputs of 26 blocks, one block             about 2.5 GB
                                                        together about 67 GB of the 85 (79 GiB) of an H100

The KL alone is compared with dense torch, which holds the logits of both sides in fp32.

    python bench/distill_gpu.py [--parts kl step compiled] [--length 4096]
    python bench/distill_gpu.py --device cpu --length 64 --shrink 64 --steps 2      # a trial of the bench itself
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional as F

from gemwright.config import ModelConfig
from gemwright.model import Gemma2
from gemwright.ops.attention import Attention
from gemwright.ops.divergence import divergence
from gemwright.ops.head import Head
from gemwright.train.optimizer import AdamW
from gemwright.train.speed import compile_blocks, recompute_blocks

STUDENT, TEACHER, CAP = "gemma-2-2b", "gemma-2-9b", 30.0
PARTS: Final = ("kl", "step", "compiled")
"""The KL alone (first: dense wants the room), the step as it is, and the step with the student's blocks compiled."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is measured; `shrink` divides widths to try the bench itself."""

    device: str
    length: int
    shrink: int
    steps: int

    def config(self, preset: str) -> ModelConfig:
        """A published shape, divided."""
        full, by = ModelConfig.preset(preset), self.shrink
        if by == 1:
            return full
        return dataclasses.replace(
            full, num_hidden_layers=3, layer_types=(), hidden_size=full.hidden_size // by * 2, head_dim=16,
            intermediate_size=full.intermediate_size // by, vocab_size=full.vocab_size // by,
        )  # fmt: skip

    def model(self, preset: str, *, trained: bool) -> Gemma2:
        """Random bf16 weights on the device."""
        config = self.config(preset)
        backend = "flex" if self.device == "cuda" else "blocked"
        with torch.device("meta"):
            model = Gemma2(config, Attention(backend, backend, backend))
        generator = torch.Generator(self.device).manual_seed(0)
        for name, shape in config.parameter_shapes().items():
            made = torch.zeros(shape, dtype=torch.bfloat16, device=self.device)
            if len(shape) > 1:
                made.normal_(std=0.02, generator=generator)
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, torch.nn.Parameter(made, requires_grad=trained))
        model.tie()
        return model.train(trained)

    def now(self) -> float:
        """Seconds, with the device's work done."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def peak(self, call: Callable[[], object]) -> int:
        """Bytes at the peak of a call over those held before it."""
        if self.device != "cuda":
            call()
            return 0
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def kl(sizes: Sizes) -> dict[str, Any]:
    """The KL and its gradients between a student's and a teacher's head, chunked and dense."""
    ours, theirs = sizes.config(STUDENT), sizes.config(TEACHER)

    def made(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, device=sizes.device, dtype=torch.bfloat16) * scale

    hidden, teacher_hidden = made(sizes.length, ours.hidden_size), made(sizes.length, theirs.hidden_size)
    weight, teacher_weight = (made(c.vocab_size, c.hidden_size, scale=2 * c.hidden_size**-0.5) for c in (ours, theirs))
    hidden.requires_grad_()
    weight.requires_grad_()

    def chunked() -> float:
        total, count = divergence("forward_kl", hidden, Head(weight, CAP), teacher_hidden, Head(teacher_weight, CAP))
        torch.autograd.grad(total / count, (hidden, weight))
        return float(total.detach() / count)

    def log_probs(hidden_XD: Tensor, weight_VD: Tensor) -> Tensor:
        return (CAP * torch.tanh(F.linear(hidden_XD, weight_VD).float() / CAP)).log_softmax(-1)

    def dense() -> float:
        log_p = log_probs(teacher_hidden, teacher_weight)
        mean = F.kl_div(log_probs(hidden, weight), log_p, log_target=True, reduction="sum") / sizes.length
        torch.autograd.grad(mean, (hidden, weight))
        return float(mean.detach())

    found: dict[str, Any] = {"gradient_mb": round(weight.nbytes / 1e6)}
    for name, call in {"chunked": chunked, "dense": dense}.items():
        try:
            value = call()  # compiles
            memory = sizes.peak(call)
            times = []
            for _ in range(3):
                start = sizes.now()
                call()
                times.append(sizes.now() - start)
            found[name] = {
                "kl": round(value, 4),
                "ms": round(1e3 * statistics.median(times), 1),
                "mb": round(memory / 1e6),
            }
        except torch.cuda.OutOfMemoryError:
            found[name] = "out of memory"
        if sizes.device == "cuda":
            torch.cuda.empty_cache()
    return found


@dataclasses.dataclass(frozen=True)
class Pair:
    """Teacher and student on the device, and the student's optimizer."""

    sizes: Sizes
    teacher: Gemma2
    student: Gemma2
    optimizer: AdamW

    @classmethod
    def make(cls, sizes: Sizes) -> Pair:
        """Random weights."""
        teacher, student = sizes.model(TEACHER, trained=False), sizes.model(STUDENT, trained=True)
        return cls(sizes, teacher, student, AdamW(student.named_parameters()))

    def wrap(self, *, compiled: bool) -> None:
        """Let the student's blocks be computed again in backward, compiled or not."""
        for block in self.student.model.layers:
            block.__dict__.pop("forward", None)
        if compiled:
            compile_blocks(self.student)
        recompute_blocks(self.student)

    def update(self, tokens_BT: Tensor, pos_BT: Tensor) -> tuple[float, dict[str, float]]:
        """One update: the divergence, and the seconds of each part."""
        seconds: dict[str, float] = {}
        clock = [self.sizes.now()]

        def lap(name: str) -> None:
            clock.append(self.sizes.now())
            seconds[name] = clock[-1] - clock[-2]

        ours = self.student.lm_head.weight
        theirs = Head(self.teacher.model.embed_tokens.weight.detach(), CAP)
        with torch.no_grad():
            taught_BTD = self.teacher(tokens_BT, pos_BT)
        lap("teacher")
        hidden_BTD = self.student(tokens_BT, pos_BT)
        lap("student forward")
        total, count = divergence("forward_kl", hidden_BTD, Head(ours, CAP), taught_BTD, theirs)
        lap("divergence")
        total.backward()  # type: ignore[no-untyped-call]
        lap("backward")
        norm = float(self.optimizer.squares()) ** 0.5 / float(count)
        self.optimizer.update(1e-4, min(1.0, 1 / (norm + 1e-6)) / float(count))
        lap("optimizer")
        seconds["step"] = clock[-1] - clock[0]
        return float(total.detach() / count), seconds


def steps(pair: Pair, until: float) -> dict[str, Any]:
    """Updates of the student beside the teacher, until a moment at the latest; tokens a second, bytes at the peak."""
    sizes = pair.sizes
    pos_BT = torch.arange(sizes.length, device=sizes.device)[None]
    generator = torch.Generator(sizes.device).manual_seed(1)
    if sizes.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    losses: list[float] = []
    laps: list[dict[str, float]] = []
    while len(losses) < sizes.steps and (not losses or time.perf_counter() < until):
        vocab = pair.teacher.config.vocab_size
        tokens_BT = torch.randint(1, vocab, (1, sizes.length), device=sizes.device, generator=generator)
        loss, seconds = pair.update(tokens_BT, pos_BT)
        losses.append(loss)
        laps.append(seconds)
    warm = {name: statistics.median(lap[name] for lap in laps[1:] or laps) for name in laps[0]}
    on_cuda = sizes.device == "cuda"
    return {
        "steps": len(losses),
        "first_kl": round(losses[0], 4),
        "last_kl": round(losses[-1], 4),
        "first_step_s": round(laps[0]["step"], 1),
        "tokens_per_second": round(sizes.length / warm["step"], 1),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if on_cuda else None,
        "device_gib": round(torch.cuda.mem_get_info()[1] / 2**30, 1) if on_cuda else None,
        "ms": {name: round(1e3 * value, 1) for name, value in warm.items()},
    }


def main() -> None:
    """Run the parts; a line of JSON each, a table at the end, the same in $OUT/distill_gpu.json."""
    begin = time.perf_counter()
    parser = argparse.ArgumentParser(description="Distillation on one GPU.")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--shrink", type=int, default=1)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--budget", type=float, default=55.0, help="seconds after which no further step begins")
    options = parser.parse_args()
    sizes = Sizes(options.device, options.length, options.shrink, options.steps)
    found: dict[str, Any] = {}
    pair: Pair | None = None
    for name in options.parts:
        start = time.perf_counter()
        if name == "kl":
            found[name] = kl(sizes)
        else:
            pair = pair or Pair.make(sizes)
            pair.wrap(compiled=name == "compiled")
            found[name] = steps(pair, begin + options.budget)
        found[name]["seconds"] = round(time.perf_counter() - start, 1)
        print(json.dumps({name: found[name]}), flush=True)
        if out := os.environ.get("OUT"):
            (Path(out) / "distill_gpu.json").write_text(json.dumps(found, indent=1))
    device = torch.cuda.get_device_name() if sizes.device == "cuda" else sizes.device
    print(f"| {device}, {sizes.length} tokens | |\n|---|---|")
    for name, values in found.items():
        for key, value in values.items():
            print(f"| {name}: {key} | {value} |")


if __name__ == "__main__":
    main()
