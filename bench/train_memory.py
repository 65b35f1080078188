"""Memory of a training step from 1024 to 8192 tokens: a stack of the 2B shape, cut to two layers, beside transformers.

Two layers (one local, one global) of the full width, a vocabulary cut to 16000, one row, bf16, forward and backward.
What counts is the peak of the process over what model and gradients take: everything that grows with the length. Each
case is a process of its own. transformers runs eager attention, as for Gemma 2 it asks for, and whole logits.

    python bench/train_memory.py [--update]
    python bench/train_memory.py --lengths 64 128      # a trial of the bench itself
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

import machine
import psutil
import torch
import tyro

from gemwright.config import ModelConfig
from gemwright.model import Gemma2
from gemwright.ops.attention import Attention
from gemwright.ops.cpu import keep_memory
from gemwright.ops.loss import cross_entropy

ROOT: Final = Path(__file__).resolve().parent.parent
RUNNERS: Final = ("gemwright", "transformers")
LAYERS, VOCAB = 2, 16000


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compare the memory of a training step."""

    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192)
    threads: int = machine.cores()
    update: bool = False
    """Replace this bench's section in docs/benchmarks.md."""
    runner: Literal["gemwright", "transformers"] | None = None
    """Measure this runner alone at the first length, and print one JSON line."""


def config() -> ModelConfig:
    """Two layers of 2B."""
    full = ModelConfig.preset("gemma-2-2b")
    return replace(full, num_hidden_layers=LAYERS, layer_types=(), vocab_size=VOCAB)


def step(runner: str, length: int) -> dict[str, float]:
    """Bytes at the peak beside parameters and gradients, and the loss."""
    torch.manual_seed(0)
    tokens_BT = torch.randint(1, VOCAB, (1, length + 1))
    read_BT, targets_BT = tokens_BT[:, :-1], tokens_BT[:, 1:]
    model: Any
    if runner == "gemwright":
        keep_memory()  # as the trainer does
        model = Gemma2(config(), Attention("blocked", "blocked", "blocked")).bfloat16()
        pos_BT = torch.arange(length)[None]

        def loss() -> torch.Tensor:
            return cross_entropy(model(read_BT, pos_BT), model.lm_head.weight, targets_BT, softcap=30.0)[0] / length
    else:
        import transformers

        raw = {k: v for k, v in config().to_hf().items() if k not in ("torch_dtype", "dtype")}
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.Gemma2Config(**raw), dtype=torch.bfloat16, attn_implementation="eager"
        )

        def loss() -> torch.Tensor:
            logits_TV = model(read_BT, use_cache=False).logits[0].float()
            return torch.nn.functional.cross_entropy(logits_TV, targets_BT[0])

    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter).zero_()  # written, so that it is resident
    machine.forget_peak()
    before = machine.memory("VmRSS")
    value = loss()
    value.backward()  # type: ignore[no-untyped-call]
    return {"bytes": float(machine.memory("VmHWM") - before), "loss": float(value.detach())}


def need(length: int) -> float:
    """Bytes that eager attention is sure to take: of each score about 16 a layer, of each logit 12."""
    heads = config().num_attention_heads
    return 16.0 * LAYERS * heads * length**2 + 12.0 * length * VOCAB


def main(options: Options) -> None:
    """Run every case and print the table; publish it where that was asked for."""
    lines = ["| tokens | gemwright, MB | transformers eager, MB | ratio |", "|---|---|---|---|"]
    found: dict[tuple[str, int], dict[str, float]] = {}
    for length in options.lengths:
        for runner in RUNNERS:
            if runner == "transformers" and need(length) > 0.8 * psutil.virtual_memory().available:
                continue
            flags = ["--runner", runner, "--lengths", str(length), "--threads", str(options.threads)]
            found[runner, length] = machine.in_subprocess(Path(__file__), flags, threads=options.threads)
            print(f"{runner}, {length}: {found[runner, length]}", file=sys.stderr)
        cells, both = [str(length)], [found.get((runner, length)) for runner in RUNNERS]
        for one in both:
            cells.append(f"{one['bytes'] / 1e6:.0f}" if one else "does not fit")
        ours, theirs = both
        cells.append(f"{theirs['bytes'] / ours['bytes']:.1f}" if ours and theirs else "-")
        lines.append(f"| {' | '.join(cells)} |")
    ours_by = [found["gemwright", length]["bytes"] / length for length in options.lengths]
    report = "\n\n".join(
        [
            "## Memory of a training step",
            f"{machine.describe(options.threads)}.",
            f"`{' '.join(['python', 'bench/train_memory.py', *sys.argv[1:]])}`: {LAYERS} layers of the 2B shape, "
            f"{VOCAB} ids, one row, bf16; the peak beside parameters and gradients, forward and backward. Ours by the "
            f"token: {', '.join(f'{each / 1e3:.0f}' for each in ours_by)} kB.",
            "\n".join(lines),
        ]
    )
    print(report)
    if options.update:
        machine.publish(ROOT / "docs" / "benchmarks.md", "bench/train_memory.py", report)


if __name__ == "__main__":
    chosen = tyro.cli(Options)
    if chosen.runner is None:
        main(chosen)
    else:
        torch.set_num_threads(chosen.threads)
        print(json.dumps(step(chosen.runner, chosen.lengths[0])))
