"""Distilled or from scratch: the report's comparison (arXiv 2408.00118, tables 6 and 7), in small.

    python recipes/mini/data.py --out DIR
    python recipes/distill-vs-scratch/run.py --data DIR --out DIR/versus
    python recipes/distill-vs-scratch/picture.py DIR/versus/results.jsonl recipes/distill-vs-scratch

One student, a fresh Gemma 2 of 7.3 million parameters, learns the same prose in the same order, in four ways, each from
three seeds of its first weights:

    scratch     cross-entropy
    local       forward KL to a teacher of 135 million parameters that runs beside it: SmolLM2-135M-Instruct
    cached      the same, the teacher's final hidden states having been stored beforehand
    compute     cross-entropy on the same text and what follows it, for as many seconds as `local` took

A line of results.jsonl is written as each run ends; runs that are in the file already are skipped.

Legend: B rows, T tokens, D model.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemwright.adopt import Llama, adopted_config
from gemwright.bundled import base_path
from gemwright.config import ModelConfig
from gemwright.gguf import Gguf
from gemwright.model import Gemma2
from gemwright.ops.attention import BACKENDS, Attention
from gemwright.ops.divergence import divergence
from gemwright.ops.head import Head
from gemwright.ops.loss import cross_entropy

sys.path.append(str(Path(__file__).resolve().parent.parent / "mini"))
from data import tokenizer
from pairs import Turns, pieces

WAYS = ("scratch", "local", "cached", "compute")
SEEDS = (0, 1, 2)
LENGTH = 512
RATE, WARMUP = 2e-3, 0.03
STUDENT = ModelConfig(
    vocab_size=49152,
    hidden_size=128,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    query_pre_attn_scalar=32,
    max_position_embeddings=LENGTH,
)


@dataclass
class Bench:
    """What all runs share: the teacher, the text as rows [N, T] in a fixed order, and held-out rows."""

    teacher: Llama
    train_NT: Tensor
    heldout_NT: Tensor
    rows: int
    backend: str
    device: torch.device

    def batches(self, steps: int) -> Iterator[Tensor]:
        """Batches [B, T] in order, from the beginning again when the text is used up."""
        for step in range(steps):
            at = torch.arange(step * self.rows, (step + 1) * self.rows) % len(self.train_NT)
            yield self.train_NT[at].to(self.device)

    def positions(self, tokens_BT: Tensor) -> Tensor:
        return torch.arange(tokens_BT.shape[1], device=self.device).expand_as(tokens_BT)

    @torch.no_grad()
    def taught(self, tokens_BT: Tensor) -> Tensor:
        """The teacher's hidden states."""
        return self.teacher(tokens_BT, self.positions(tokens_BT))


def student(bench: Bench, seed: int) -> Gemma2:
    """Fresh weights, as transformers has them: normal matrices, norms at the identity."""
    torch.manual_seed(seed)
    model = Gemma2(STUDENT, Attention(train=bench.backend))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=STUDENT.initializer_range)
    return model.to(bench.device)


def loss(bench: Bench, model: Gemma2, tokens_BT: Tensor, taught_BTD: Tensor | None) -> Tensor:
    """Mean over tokens: cross-entropy, or where there is a teacher the KL to it."""
    with torch.autocast(bench.device.type, torch.bfloat16, enabled=bench.device.type == "cuda"):
        hidden_BTD = model(tokens_BT, bench.positions(tokens_BT))[:, :-1]
        head = Head(model.lm_head.weight, STUDENT.final_logit_softcapping)
        if taught_BTD is None:
            total, count, *_ = cross_entropy(hidden_BTD, head.weight_VD, tokens_BT[:, 1:], softcap=head.softcap)
        else:
            theirs = Head(bench.teacher.head, None)
            total, count = divergence("forward_kl", hidden_BTD, head, taught_BTD[:, :-1], theirs)
    return total / count


@torch.no_grad()
def evaluate(bench: Bench, model: Gemma2) -> float:
    """Held-out cross-entropy, nats a token."""
    total, count = 0.0, 0
    for at in range(0, len(bench.heldout_NT), bench.rows):
        tokens_BT = bench.heldout_NT[at : at + bench.rows].to(bench.device)
        total += float(loss(bench, model, tokens_BT, None)) * len(tokens_BT)
        count += len(tokens_BT)
    return total / count


def rate(progress: float) -> float:
    """Warm-up, then a cosine to a tenth."""
    return min(1.0, progress / WARMUP) * (0.55 + 0.45 * math.cos(math.pi * progress))


def run(bench: Bench, way: str, seed: int, steps: int, cache: list[Tensor]) -> dict[str, Any]:
    """Train one student; its curve and its end."""
    model = student(bench, seed)
    fused = bench.device.type == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.01, fused=fused)
    curve, start, measuring = [], time.monotonic(), 0.0
    for step, tokens_BT in enumerate(bench.batches(steps)):
        for group in optimizer.param_groups:
            group["lr"] = RATE * rate((step + 1) / steps)
        taught_BTD = bench.taught(tokens_BT) if way == "local" else cache[step] if way == "cached" else None
        loss(bench, model, tokens_BT, taught_BTD).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % max(1, steps // 8) == 0 or step + 1 == steps:
            paused = time.monotonic()
            curve.append({"tokens": (step + 1) * tokens_BT.numel(), "ce": evaluate(bench, model)})
            measuring += time.monotonic() - paused
    seconds = time.monotonic() - start - measuring
    end = curve[-1]
    return {"way": way, "seed": seed, "seconds": seconds, "ppl": math.exp(end["ce"]), **end, "curve": curve}


def build(args: argparse.Namespace) -> Bench:
    """The teacher and the text."""
    device = torch.device(args.device)
    backend = "flex" if device.type == "cuda" else "blocked"
    source = Gguf(base_path())
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    teacher = Llama(source, adopted_config(source.hf_config()), dtype, device, BACKENDS[backend].load())
    if args.compile:
        teacher.compile()
    turns = Turns(tokenizer())

    def text(split: str) -> Tensor:
        found = pieces(args.data, split, turns, ((LENGTH, 1.0),), seed=0)
        return torch.tensor([piece.tolist() for piece in found if len(piece) == LENGTH])

    return Bench(teacher, text("train"), text("heldout")[: args.heldout], args.rows, backend, device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that recipes/mini/data.py filled")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=float, default=5.1e6, help="that each student reads, `compute` more")
    parser.add_argument("--rows", type=int, default=32, help=f"of {LENGTH} tokens in a batch")
    parser.add_argument("--heldout", type=int, default=384, help="held-out rows")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    bench = build(args)
    steps = round(args.tokens / (args.rows * LENGTH))
    print(
        f"{student(bench, 0).config.num_parameters():,} parameters, {steps} steps, {len(bench.train_NT)} rows",
        flush=True,
    )
    run(bench, "local", 0, 2, [])  # compiles
    file = args.out / "results.jsonl"
    done = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    cache: list[Tensor] = []
    for way in WAYS:
        if way == "cached":
            cache = [bench.taught(tokens_BT) for tokens_BT in bench.batches(steps)]
        seconds = {w: [row["seconds"] / row["tokens"] for row in done if row["way"] == w] for w in WAYS}
        longer = sum(seconds["local"]) / sum(seconds["scratch"]) if way == "compute" else 1
        for seed in SEEDS:
            if any((row["way"], row["seed"]) == (way, seed) for row in done):
                continue
            done.append(run(bench, way, seed, round(steps * longer), cache))
            with file.open("a") as lines:
                lines.write(json.dumps(done[-1]) + "\n")
            print({key: value for key, value in done[-1].items() if key != "curve"}, flush=True)


if __name__ == "__main__":
    main()
