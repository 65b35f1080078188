"""Heal the adopted model: distil the source into it, and keep what was learned in a delta of at most 16 MiB.

    python recipes/mini/data.py prepare --out DIR;  python recipes/mini/data.py answer --out DIR
    python recipes/mini/heal.py train --data DIR --out DIR/run --minutes 60
    python recipes/mini/heal.py evaluate --data DIR --delta DIR/run/delta.safetensors

The student is SmolLM2-135M-Instruct put into the Gemma 2 architecture (`gemwright/adopt.py`); the teacher is the
source itself. On prose both read the same tokens after `<bos>`. On chats the student reads Gemma's turns and the
teacher its own ChatML with its default system text; the loss is taken where both predict the same token.

    loss = mean over tokens of KL(teacher || student) + c(t) * mean over norms of |h_s - h_t|^2 / |h_t|^2

h is the normed input of a sub-layer: student and teacher start from the same linears, so every sub-layer should read
the same input; this settles the new post-norms long before the logits alone would. c falls to zero at two thirds.
Trained are the norms, whole, each at a rate in proportion to its gain (post-norm gains reach 500), and a low-rank
update of every linear. The rate follows the wall clock (warm-up, constant, linear decay), so a run fits its time.

On a virtual machine page faults can cost more than the arithmetic; keep freed memory in the process:
MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=1000000000000 MALLOC_TOP_PAD_=268435456.

Legend: B rows, T tokens, D model, X aligned tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from data import load_chats, load_prose
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from gemwright.adopt import Llama, LlamaLayer, adopted_config, adopted_tensors, calibrate, gemma_tokenizer
from gemwright.bundled import base_path, delta_metadata
from gemwright.config import ModelConfig
from gemwright.gguf import Gguf
from gemwright.lora import LoraConfig, LoRALinear, add_lora
from gemwright.model import Gemma2
from gemwright.ops.attention import PADDING, Attention
from gemwright.ops.divergence import divergence
from gemwright.ops.head import Head
from gemwright.ops.norm import RMSNorm

RANK = 26  # 10176 numbers a rank and layer: 15.1 MiB in bf16
ROWS, LENGTH = 2, 512
LORA_RATE, NORM_RATE = 1.5e-3, 6e-3  # norms: times the mean gain
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"  # the source's own default


@dataclass
class Example:
    """One document as student and teacher read it, and the positions where both predict the same next token."""

    student: list[int]
    teacher: list[int]
    student_at: list[int]
    teacher_at: list[int]


def prose_examples(texts: Iterator[str], tokenizer: Tokenizer, length: int = LENGTH) -> Iterator[Example]:
    """Pieces of `length` tokens, each after a <bos> (0)."""
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        for start in range(0, len(ids) - 32, length - 1):
            piece = [0, *ids[start : start + length - 1]]
            at = list(range(len(piece) - 1))
            yield Example(piece, piece, at, at)


def chat_examples(
    chats: Iterator[list[dict[str, str]]], tokenizer: Tokenizer, *, questions: bool, length: int = LENGTH
) -> Iterator[Example]:
    """Chats of at most `length` tokens; aligned on every answer's tokens and its end of turn (2), or the user's too."""

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    for messages in chats:
        student, teacher = [0], [1, *ids("system\n" + SYSTEM), 2, *ids("\n")]
        student_at: list[int] = []
        teacher_at: list[int] = []
        for message in messages:
            answer = message["role"] == "assistant"
            body = ids(message["content"].strip())
            student += [1, *ids("model\n" if answer else "user\n")]
            teacher += [1, *ids("assistant\n" if answer else "user\n")]
            if answer or questions:
                student_at += range(len(student) - 1, len(student) + len(body))
                teacher_at += range(len(teacher) - 1, len(teacher) + len(body))
            student += [*body, 2, *ids("\n")]
            teacher += [*body, 2, *ids("\n")]
        if student_at and len(student) <= length:
            yield Example(student, teacher, student_at, teacher_at)


@dataclass
class Rows:
    """Packed documents [B, T]: tokens, positions (-1 padding), document numbers; flat indices of the aligned tokens."""

    tokens: Tensor
    pos: Tensor
    doc: Tensor
    at: Tensor


def pack(rows: list[list[tuple[list[int], list[int]]]]) -> Rows:
    """Lay (tokens, aligned positions) documents out in rows."""
    width = max(sum(len(tokens) for tokens, _ in row) for row in rows)
    out = torch.zeros(3, len(rows), width, dtype=torch.int64)
    out[1] = PADDING
    at: list[int] = []
    for b, row in enumerate(rows):
        start = 0
        for number, (tokens, where) in enumerate(row):
            end = start + len(tokens)
            out[0, b, start:end] = torch.tensor(tokens)
            out[1, b, start:end] = torch.arange(len(tokens))
            out[2, b, start:end] = number
            at += [b * width + start + i for i in where]
            start = end
    return Rows(out[0], out[1], out[2], torch.tensor(at))


def batches(examples: Iterator[Example], rows: int = ROWS, length: int = LENGTH) -> Iterator[tuple[Rows, Rows]]:
    """Student and teacher rows, filled in order of arrival."""
    full: list[list[Example]] = [[]]
    for example in examples:
        if sum(len(e.student) for e in full[-1]) + len(example.student) > length:
            full.append([])
        if len(full) > rows:
            yield _pack_both(full[:rows])
            full = full[rows:]
        full[-1].append(example)


def _pack_both(rows: list[list[Example]]) -> tuple[Rows, Rows]:
    student = pack([[(e.student, e.student_at) for e in row] for row in rows])
    teacher = pack([[(e.teacher, e.teacher_at) for e in row] for row in rows])
    return student, teacher


def mixed(folder: Path, tokenizer: Tokenizer) -> Iterator[Example]:
    """Prose and chats by turns, 3 tokens of prose to 2 of chats; either starts again when it is used up."""
    sources: list[Callable[[], Iterator[Example]]] = [
        lambda: prose_examples(load_prose(folder, "train"), tokenizer),
        lambda: chat_examples(load_chats(folder, "train"), tokenizer, questions=True),
    ]
    streams, spent = [make() for make in sources], [0, 0]
    while True:
        which = spent.index(min(spent))
        example = next(streams[which], None)
        if example is None:
            streams[which] = sources[which]()
            continue
        spent[which] += len(example.student_at) * (2, 3)[which]
        yield example


class Inputs:
    """Records the normed input of every sub-layer of the student during a forward pass, until closed."""

    def __init__(self, model: Gemma2) -> None:
        self.seen: list[Tensor] = []
        self.hooks = [
            module.register_forward_hook(lambda _module, _args, out: self.seen.append(out))
            for name, module in model.named_modules()
            if name.endswith((".input_layernorm", ".pre_feedforward_layernorm"))
        ]

    def take(self) -> list[Tensor]:
        """What the last pass recorded, in the order of the layers."""
        seen, self.seen = self.seen, []
        return seen

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()


def adopted(source: Gguf, llama: Llama, config: ModelConfig, calibration: Tensor) -> Gemma2:
    """The adopted student in fp32."""
    model = Gemma2(config, Attention.resolve(device="cpu", dtype=torch.float32, cap=50.0, window=config.sliding_window))
    state = dict(adopted_tensors(source, config, calibrate(llama, calibration)))
    missing, surplus = model.load_state_dict(state, strict=False)
    assert (missing, surplus) == (["lm_head.weight"], []), (missing, surplus)
    return model


def parameter_groups(model: Gemma2) -> list[dict[str, Any]]:
    """Everything frozen but the low-rank updates and the norms; a norm's rate is in proportion to its gain."""
    model.requires_grad_(False)
    lora, groups = [], []
    for module in model.modules():
        if isinstance(module, LoRALinear):
            lora += [module.lora_A.requires_grad_(True), module.lora_B.requires_grad_(True)]
        elif isinstance(module, RMSNorm):
            rate = NORM_RATE * float((1 + module.weight).abs().mean())
            groups.append({"params": [module.weight.requires_grad_(True)], "rate": rate})
    return [{"params": lora, "rate": LORA_RATE}, *groups]


def delta_state(model: Gemma2) -> dict[str, Tensor]:
    """What was trained: norms in fp32, low-rank factors in bf16, by the names of the model that is healed."""
    trained = {n.replace(".base.", "."): p for n, p in model.named_parameters() if p.requires_grad}
    return {n: (p if p.dim() == 1 else p.bfloat16()).detach().contiguous() for n, p in trained.items()}


def load_delta(model: Gemma2, delta: dict[str, Tensor]) -> None:
    """Put a saved delta into a student that has its low-rank layers."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in delta.items():
            parameters[name].copy_(value)


def forward_kl(model: Gemma2, h_s: Tensor, llama: Llama, h_t: Tensor) -> Tensor:
    """Sum over aligned tokens of KL(teacher || student); the teacher's head has no cap."""
    student = Head(model.lm_head.weight, model.config.final_logit_softcapping)
    return divergence("forward_kl", h_s, student, h_t, Head(llama.head, None))[0]


@torch.no_grad()
def evaluate(model: Gemma2, llama: Llama, examples: Iterator[Example], tokens: int) -> dict[str, float]:
    """Mean KL(teacher || student) and cross-entropies (nats a token) over about `tokens` aligned tokens."""
    total = {"kl": 0.0, "student_ce": 0.0, "teacher_ce": 0.0}
    count = 0
    for student, teacher in batches(examples):
        *_, t_hidden = llama.layers(teacher.tokens, teacher.pos, teacher.doc)
        assert isinstance(t_hidden, Tensor)
        h_s, h_t = (
            model(student.tokens, student.pos, student.doc).flatten(0, 1)[student.at],
            t_hidden.flatten(0, 1)[teacher.at],
        )
        total["kl"] += float(forward_kl(model, h_s, llama, h_t))
        targets = student.tokens.flatten()[student.at + 1, None]
        log_q = model.logits(h_s).log_softmax(-1).gather(-1, targets)
        log_p = (h_t @ llama.head.T).log_softmax(-1).gather(-1, targets)
        total["student_ce"] -= float(log_q.sum())
        total["teacher_ce"] -= float(log_p.sum())
        count += len(student.at)
        if count >= tokens:
            break
    return {key: value / count for key, value in total.items()} | {"tokens": count}


def rate(progress: float, step: int) -> float:
    """Warm-up over 10 steps, then a linear decay to 0 at the end of the time.

    A long constant phase stalled at KL 0.44.
    """
    return min(1.0, (step + 1) / 10, max(0.0, 1 - progress))


def losses(model: Gemma2, llama: Llama, inputs: Inputs, student: Rows, teacher: Rows) -> tuple[Tensor, Tensor]:
    """KL to the teacher per aligned token, and the mean relative distance of the sub-layers' inputs."""
    with torch.no_grad():
        *layers, t_hidden = llama.layers(teacher.tokens, teacher.pos, teacher.doc)
    assert isinstance(t_hidden, Tensor)
    h_s = model(student.tokens, student.pos, student.doc).flatten(0, 1)[student.at]
    h_t = t_hidden.flatten(0, 1)[teacher.at]
    kl = forward_kl(model, h_s, llama, h_t) / len(student.at)
    wanted = [
        h for layer in layers if isinstance(layer, LlamaLayer) for h in (layer.attention_in, layer.feedforward_in)
    ]
    match = kl.new_zeros(())
    for seen, want in zip(inputs.take(), wanted, strict=True):
        a, b = seen.flatten(0, 1)[student.at], want.flatten(0, 1)[teacher.at]
        match = match + ((a - b).square().sum(-1) / b.square().sum(-1)).mean() / len(wanted)
    return kl, match


def train(args: argparse.Namespace, model: Gemma2, llama: Llama, tokenizer: Tokenizer) -> None:
    """The loop: resumes from `state.pt` in the output folder, writes `delta.safetensors` and `log.jsonl`."""
    out: Path = args.out
    out.mkdir(parents=True, exist_ok=True)
    optimizer = torch.optim.AdamW(parameter_groups(model), betas=(0.9, 0.98), weight_decay=0.0)
    trained = [p for p in model.parameters() if p.requires_grad]
    print(f"{sum(p.numel() for p in trained):,} trained parameters", flush=True)
    inputs = Inputs(model)
    step, tokens, elapsed = 0, 0, 0.0
    stream = batches(mixed(args.data, tokenizer))
    if (out / "state.pt").exists():
        saved = torch.load(out / "state.pt", weights_only=True)
        load_delta(model, saved["parameters"])
        optimizer.load_state_dict(saved["optimizer"])
        step, tokens, elapsed = saved["step"], saved["tokens"], saved["elapsed"]
        for _ in range(step):
            next(stream)
        kept = (out / "log.jsonl").read_text().splitlines(keepends=True)[:step]
        (out / "log.jsonl").write_text("".join(kept))
        print(f"resumed at step {step}", flush=True)
    last = time.monotonic()
    while elapsed < args.minutes * 60:
        student, teacher = next(stream)
        progress = elapsed / (args.minutes * 60)
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * rate(progress, step)
        kl, match = losses(model, llama, inputs, student, teacher)
        weight = max(0.0, 1 - progress * 1.5)
        optimizer.zero_grad(set_to_none=True)
        (kl + weight * match).backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        if math.isfinite(float(norm)):
            optimizer.step()
        step, tokens = step + 1, tokens + len(student.at)
        now = time.monotonic()
        elapsed, last = elapsed + now - last, now
        row = {"step": step, "tokens": tokens, "minutes": elapsed / 60}
        row |= {"kl": float(kl.detach()), "match": float(match.detach()), "norm": float(norm)}
        with (out / "log.jsonl").open("a") as log:
            log.write(json.dumps(row) + "\n")
        if step % 5 == 0:
            print(" ".join(f"{k} {v:.4g}" for k, v in row.items()), f"tokens/s {tokens / elapsed:.0f}", flush=True)
        if step % 10 == 0 or elapsed >= args.minutes * 60:
            save(out, model, optimizer, step, tokens, elapsed)
    inputs.close()


def save(out: Path, model: Gemma2, optimizer: torch.optim.Optimizer, step: int, tokens: int, elapsed: float) -> None:
    """Delta and resume state, each by an atomic rename."""
    parameters = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    counts = {"step": step, "tokens": tokens, "elapsed": elapsed}
    torch.save({"parameters": parameters, "optimizer": optimizer.state_dict(), **counts}, out / "state.tmp")
    (out / "state.tmp").replace(out / "state.pt")
    save_file(delta_state(model), out / "delta.tmp", metadata=delta_metadata(RANK))
    (out / "delta.tmp").replace(out / "delta.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("train", "evaluate"))
    parser.add_argument("--data", type=Path, required=True, help="folder that data.py filled")
    parser.add_argument("--out", type=Path, help="folder of the run (train); an interrupted run resumes")
    parser.add_argument("--minutes", type=float, default=60, help="length of the run in wall-clock minutes")
    parser.add_argument("--delta", type=Path, help="evaluate this delta; without it the adopted model as it is")
    parser.add_argument("--tokens", type=int, default=20000, help="held-out tokens of each kind")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    source = Gguf(base_path())
    config = adopted_config(source.hf_config())
    llama = Llama(source, config)
    tokenizer = Tokenizer.from_str(gemma_tokenizer(source.tokenizer_json())[0])
    heldout: dict[str, Callable[[], Iterator[Example]]] = {
        "prose": lambda: prose_examples(load_prose(args.data, "heldout"), tokenizer),
        "answers": lambda: chat_examples(load_chats(args.data, "heldout"), tokenizer, questions=False),
    }
    pieces = (e.student for e in prose_examples(load_prose(args.data, "train"), tokenizer, 256))
    calibration = list(islice((piece for piece in pieces if len(piece) == 256), 8))
    model = adopted(source, llama, config, torch.tensor(calibration))
    if args.command == "train":
        if args.out is None:
            sys.exit("train needs --out")
        add_lora(model, LoraConfig(rank=RANK, alpha=RANK))
        train(args, model, llama, tokenizer)
    elif args.delta:
        add_lora(model, LoraConfig(rank=RANK, alpha=RANK))
        load_delta(model, load_file(args.delta))
    for name, examples in heldout.items():
        print(name, json.dumps(evaluate(model, llama, examples(), args.tokens)), flush=True)


if __name__ == "__main__":
    main()
