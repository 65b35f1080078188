"""Healing on this processor: a student of the bundled model's shape learns its Llama's distribution.

Student: Gemma 2 of SmolLM2-135M's shape (30 layers, width 576, 49152 ids); teacher: that Llama, in transformers; random
bf16 weights, a few rows of one document of `length` tokens. Both rivals see the same batches; an update is the
teacher's forward pass, the student's, the forward KL over the whole vocabulary, backward, clipping and AdamW.

ours      what `gemwright distill` is made of: its teacher, loss and optimizer, blocks compiled or not
plain     transformers' Gemma 2 (eager, as it asks to be trained) in a loop: logits of both sides, `F.kl_div`, the same
          optimizer; low-rank by peft

"low-rank" trains factors of rank `rank` at all linears over a frozen base and head. The first update, which compiles,
is not timed; a case is a process of its own, and rivals take turns.

    python bench/distill_healing.py [--update]
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import machine
import torch
import tyro
from torch import Tensor
from torch.nn import functional as F

from gemwright.adapter import LoraConfig
from gemwright.config import ModelConfig
from gemwright.data.batch import Batch
from gemwright.lora import add_lora
from gemwright.model import Gemma2
from gemwright.ops.attention import Attention
from gemwright.ops.cpu import keep_memory
from gemwright.train.distill import Distillation, Teaching
from gemwright.train.distill_options import DistillConfig
from gemwright.train.lessons import Taught
from gemwright.train.optimizer import AdamW
from gemwright.train.speed import compile_blocks
from gemwright.train.teacher import load_teacher

ROOT: Final = Path(__file__).resolve().parent.parent
ASKED: Final = {"all weights": 1.5, "low-rank": 2.0}
"""What is asked for: our tokens a second over the plain loop's."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure healing."""

    rows: int = 2
    length: int = 512
    layers: int = 30
    updates: int = 3
    """That are timed."""
    rank: int = 32
    rounds: int = 2
    threads: int = machine.cores()
    update: bool = False
    """Replace this bench's section in docs/benchmarks.md."""
    case: str | None = None
    """Measure this case alone (a JSON object), and print one JSON line."""


def shape(options: Options) -> ModelConfig:
    """The student's."""
    return ModelConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=options.layers,
        num_attention_heads=9, num_key_value_heads=3, head_dim=64, query_pre_attn_scalar=64,
        max_position_embeddings=8192,
    )  # fmt: skip


def weights(config: ModelConfig) -> dict[str, Tensor]:
    """The student's first weights, random."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: (torch.randn(size, generator=generator) * (0.03 if len(size) > 1 else 0)).bfloat16()
        for name, size in config.parameter_shapes().items()
    }


def llama(config: ModelConfig) -> Any:
    """The teacher."""
    import transformers

    torch.manual_seed(1)
    raw = transformers.LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers, num_attention_heads=9, num_key_value_heads=3,
        max_position_embeddings=8192, tie_word_embeddings=True, initializer_range=0.03,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(raw).bfloat16().eval().requires_grad_(False)


def batches(options: Options, vocab: int) -> list[Batch]:
    """Random tokens, a batch an update; every token is a target."""
    generator = torch.Generator().manual_seed(2)
    size = (options.rows, options.length)
    pos_BT = torch.arange(options.length).expand(size)
    doc_BT = torch.arange(options.rows)[:, None].expand(size)
    made = []
    for _ in range(options.updates + 1):
        tokens_BT = torch.randint(1, vocab, size, generator=generator)
        made.append(Batch(tokens_BT, tokens_BT.roll(-1, 1), torch.ones(size), pos_BT, doc_BT))
    return made


def ours(options: Options, *, low_rank: bool, compiled: bool) -> tuple[Callable[[Batch], Tensor], AdamW]:
    """The loss, summed, of a batch; and the optimizer of what it trains."""
    keep_memory()
    config = shape(options)
    with tempfile.TemporaryDirectory() as folder:
        llama(config).save_pretrained(folder)
        teacher = load_teacher(Path(folder), device=torch.device("cpu"), dtype="bfloat16")
    student = Gemma2(config, Attention("blocked", "blocked", "blocked")).bfloat16()
    state = weights(config)
    student.load_state_dict({**state, "lm_head.weight": state["model.embed_tokens.weight"]})
    student.requires_grad_(not low_rank)
    if low_rank:
        add_lora(student, LoraConfig(rank=options.rank, alpha=options.rank, targets="all-linear"))
    if compiled:
        compile_blocks(student)
    student.train()
    told = DistillConfig(model_name="-", teacher="-", dataset_name="-", output_dir="-", dtype="bfloat16")
    loss = Distillation(told, Teaching(teacher.head, None, {}, teacher))
    return lambda batch: loss(student, Taught(batch))[0], AdamW(student.named_parameters())


def plain(options: Options, *, low_rank: bool) -> tuple[Callable[[Batch], Tensor], AdamW]:
    """The same by transformers, and peft."""
    import transformers

    config, teacher = shape(options), llama(shape(options))
    raw = transformers.Gemma2Config(**config.to_hf())
    raw._attn_implementation = "eager"
    student: Any = transformers.Gemma2ForCausalLM(raw).bfloat16()
    state = weights(config)
    student.load_state_dict({**state, "lm_head.weight": state["model.embed_tokens.weight"]})
    if low_rank:
        import peft

        lora = peft.LoraConfig(r=options.rank, lora_alpha=options.rank, target_modules="all-linear")
        student = peft.get_peft_model(student, lora)
    student.train()

    def loss(batch: Batch) -> Tensor:
        with torch.no_grad():
            log_p_BTV = teacher(batch.tokens_BT, use_cache=False).logits.float().log_softmax(-1)
        log_q_BTV = student(batch.tokens_BT, use_cache=False).logits.float().log_softmax(-1)
        return F.kl_div(log_q_BTV, log_p_BTV, log_target=True, reduction="sum")

    return loss, AdamW(student.named_parameters())


def measure(options: Options, case: dict[str, Any]) -> dict[str, float]:
    """Tokens a second, bytes at the peak, and the first divergence, nats a token."""
    torch.set_num_threads(options.threads)
    low_rank = case["trained"] == "low-rank"
    if case["rival"] == "plain":
        loss, optimizer = plain(options, low_rank=low_rank)
    else:
        loss, optimizer = ours(options, low_rank=low_rank, compiled=case["rival"] == "compiled")
    machine.forget_peak()
    count, first = options.rows * options.length, 0.0
    times = []
    for number, batch in enumerate(batches(options, shape(options).vocab_size)):
        start = time.perf_counter()
        total = loss(batch)
        total.backward()  # type: ignore[no-untyped-call]
        norm = float(optimizer.squares()) ** 0.5 / count
        optimizer.update(1e-4, min(1.0, 1 / norm) / count)
        times.append(time.perf_counter() - start)
        first = first if number else float(total.detach()) / count
    rate = count / statistics.median(times[1:])
    return {"rate": rate, "bytes": machine.memory("VmHWM"), "kl": first, "first_seconds": times[0]}


def main(options: Options) -> None:
    """Run all cases in turn; print the report, and publish it where that was asked for."""
    rivals = {"plain": "plain loop", "eager": "ours, not compiled", "compiled": "ours, compiled"}
    cases = [{"trained": trained, "rival": rival} for trained in ASKED for rival in rivals]
    runs: dict[tuple[str, str], list[dict[str, float]]] = {}
    ceilings = machine.ceilings(options.threads)
    flags = [
        f"--{name}={getattr(options, name)}" for name in ("rows", "length", "layers", "updates", "rank", "threads")
    ]
    for _ in range(options.rounds):
        for case in cases:
            done = machine.in_subprocess(Path(__file__), ["--case", json.dumps(case), *flags], threads=options.threads)
            print(case, {name: round(value, 3) for name, value in done.items()}, file=sys.stderr, flush=True)
            runs.setdefault((case["trained"], case["rival"]), []).append(done)
    lines = ["| trained | | tokens/s | over the plain loop (asked) | peak, GB |", "|---|---|---|---|---|"]
    for trained, asked in ASKED.items():
        firsts = [run["kl"] for rival in rivals for run in runs[trained, rival]]
        assert max(firsts) - min(firsts) < 0.02 * min(firsts), firsts
        rates = {rival: statistics.median(run["rate"] for run in runs[trained, rival]) for rival in rivals}
        for rival, name in rivals.items():
            ratio = "" if rival == "plain" else f"{rates[rival] / rates['plain']:.2f} ({asked})"
            peak = max(run["bytes"] for run in runs[trained, rival]) / 1e9
            lines.append(f"| {trained} | {name} | {rates[rival]:.0f} | {ratio} | {peak:.1f} |")
    command = " ".join(["python", "bench/distill_healing.py", *sys.argv[1:]])
    about = (
        f"`{command}`: medians of {options.rounds} rounds, {options.rows} x {options.length} tokens an update, "
        f"rank {options.rank} where low-rank."
    )
    head = f"{machine.describe(options.threads)}. {ceilings}."
    report = "\n\n".join(["## Healing", head, about, "\n".join(lines)])
    print(report)
    if options.update:
        machine.publish(ROOT / "docs" / "benchmarks.md", "bench/distill_healing.py", report)


def _entry(options: Options) -> None:
    if options.case is None:
        main(options)
    else:
        print(json.dumps(measure(options, json.loads(options.case))))


if __name__ == "__main__":
    _entry(tyro.cli(Options))
