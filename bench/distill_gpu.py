"""Distillation on one GPU: a teacher of the 9B shape beside a student of the 2B shape, and the KL at the head alone.

Weights are random and made on the device; tokens are random, one document of `length`. The step is the trainer's own
parts: the teacher's hidden states without a gradient, the student under recomputation, the chunked divergence between
the two heads, AdamW over fp32 masters. What must fit at once:

    teacher, bf16                                   9.24e9 x 2   18.5 GB
    student, bf16, with gradients in bf16           2.61e9 x 4   10.5 GB
    masters and both moments, fp32                  2.61e9 x 12  31.4 GB
    the head's gradient, logits of a chunk, activations           about 5 GB

The KL alone is compared with dense torch, which holds the logits of both sides in fp32.

    python bench/distill_gpu.py [--parts kl step] [--length 4096]
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
from gemwright.train.speed import recompute_blocks

STUDENT, TEACHER, CAP = "gemma-2-2b", "gemma-2-9b", 30.0
BUDGET: Final = 45.0
"""Seconds after which no further step begins."""


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


def step(sizes: Sizes) -> dict[str, Any]:
    """Updates of the student beside the teacher: seconds of each part, tokens a second, bytes at the peak."""
    begin = time.perf_counter()
    teacher, student = sizes.model(TEACHER, trained=False), sizes.model(STUDENT, trained=True)
    recompute_blocks(student)
    optimizer = AdamW(student.named_parameters())
    there = Head(teacher.model.embed_tokens.weight.detach(), CAP)
    pos_BT = torch.arange(sizes.length, device=sizes.device)[None]
    generator = torch.Generator(sizes.device).manual_seed(1)
    vocab = len(there.weight_VD)
    seconds: dict[str, list[float]] = {}
    losses: list[float] = []
    if sizes.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    ready = time.perf_counter() - begin
    for _ in range(sizes.steps):
        if losses and time.perf_counter() - begin > BUDGET:
            break
        tokens_BT = torch.randint(1, vocab, (1, sizes.length), device=sizes.device, generator=generator)
        clock = [sizes.now()]

        def lap(name: str, clock: list[float] = clock) -> None:
            clock.append(sizes.now())
            seconds.setdefault(name, []).append(clock[-1] - clock[-2])

        with torch.no_grad():
            taught_BTD = teacher(tokens_BT, pos_BT)
        lap("teacher")
        hidden_BTD = student(tokens_BT, pos_BT)
        lap("student forward")
        total, count = divergence("forward_kl", hidden_BTD, Head(student.lm_head.weight, CAP), taught_BTD, there)
        lap("divergence")
        total.backward()  # type: ignore[no-untyped-call]
        lap("backward")
        norm = float(optimizer.squares()) ** 0.5 / float(count)
        optimizer.update(1e-4, min(1.0, 1 / (norm + 1e-6)) / float(count))
        lap("optimizer")
        seconds.setdefault("step", []).append(clock[-1] - clock[0])
        losses.append(float(total.detach() / count))
    warm = {name: statistics.median(times[1:] or times) for name, times in seconds.items()}
    return {
        "steps": len(losses),
        "first_kl": round(losses[0], 4),
        "last_kl": round(losses[-1], 4),
        "making_s": round(ready, 1),
        "first_step_s": round(seconds["step"][0], 1),
        "tokens_per_second": round(sizes.length / warm["step"], 1),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if sizes.device == "cuda" else None,
        "device_gib": round(torch.cuda.mem_get_info()[1] / 2**30, 1) if sizes.device == "cuda" else None,
        "ms": {name: round(1e3 * value, 1) for name, value in warm.items()},
    }


def main() -> None:
    """Run the parts; a line of JSON each, a table at the end, the same in $OUT/distill_gpu.json."""
    parser = argparse.ArgumentParser(description="Distillation on one GPU.")
    parser.add_argument("--parts", nargs="+", default=["kl", "step"], choices=["kl", "step"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--shrink", type=int, default=1)
    parser.add_argument("--steps", type=int, default=6)
    options = parser.parse_args()
    sizes = Sizes(options.device, options.length, options.shrink, options.steps)
    parts: dict[str, Callable[[Sizes], dict[str, Any]]] = {"kl": kl, "step": step}
    found = {}
    for name in options.parts:
        start = time.perf_counter()
        found[name] = parts[name](sizes) | {"seconds": round(time.perf_counter() - start, 1)}
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
