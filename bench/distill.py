"""Distillation on this processor: the divergence at the head, the teacher's cache, and on-policy updates beside TRL's.

KL         forward KL and its gradients between two capped heads, head trained. dense: torch, whole logits in the
           weight's dtype, then fp32. TRL: `GKDTrainer.generalized_jsd_loss` (beta 0) over the same logits. ours:
           `gemwright.ops.divergence`. Memory is the peak of the process over what it held before.
cache      what `gemwright cache-teacher` stores of random tokens: bytes a token beside the theory (hidden: width x 2;
           drawn: 10 bytes an id that differs, and 4), and tokens a second beside the teacher's forward pass alone.
on-policy  updates of a small student on answers of its own, all of `new` tokens: TRL's own generation and loss in a
           plain loop over transformers' model (without its Trainer), against the batches and the loss of
           `gemwright distill`. The two optimizers step alike.

Every case runs in a process of its own; rivals take turns.

    python bench/distill.py [--update] [--parts kl cache on-policy]
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import machine
import torch
import tyro
from torch import Tensor
from torch.nn import functional as F

from gemwright.config import ModelConfig
from gemwright.data.loader import Batching, Loader
from gemwright.data.rows import Document
from gemwright.data.store import in_memory
from gemwright.model import Gemma2
from gemwright.ops.attention import Attention
from gemwright.ops.cpu import keep_memory
from gemwright.ops.divergence import divergence
from gemwright.ops.head import Head
from gemwright.train.distill import Distillation, Teaching
from gemwright.train.distill_options import DistillConfig
from gemwright.train.distributed import World
from gemwright.train.drawn import Sampling
from gemwright.train.lessons import Lessons, Taught
from gemwright.train.on_policy import OnPolicy, Speaker
from gemwright.train.optimizer import AdamW
from gemwright.train.teacher import Teacher
from gemwright.train.teacher_cache import make

ROOT: Final = Path(__file__).resolve().parent.parent
CAP: Final = 30.0
CPU: Final = torch.device("cpu")
Part = Literal["kl", "cache", "on-policy"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure distillation."""

    parts: tuple[Part, ...] = ("kl", "cache", "on-policy")
    vocabularies: tuple[int, ...] = (49152, 256000)
    width: int = 2304
    tokens: int = 512
    """Of the KL."""
    prompt: int = 64
    new: int = 64
    """Tokens of a prompt and of an answer on-policy."""
    batch: int = 8
    updates: int = 3
    """Updates that are timed on-policy, after one to warm up."""
    rounds: int = 2
    threads: int = machine.cores()
    update: bool = False
    """Replace the parts' sections in docs/benchmarks.md."""
    case: str | None = None
    """Measure this case alone (a JSON object), and print one JSON line."""


# --- KL --------------------------------------------------------------------------------------------------------------


def kl(options: Options, method: str, vocab: int) -> dict[str, float]:
    """Seconds and bytes of the loss with its gradients."""
    torch.manual_seed(0)
    scale = 3 * options.width**-0.5
    made = [torch.empty(vocab, options.width, dtype=torch.bfloat16).normal_(0, scale) for _ in range(2)]
    hidden = [torch.randn(options.tokens, options.width, dtype=torch.bfloat16) for _ in range(2)]
    weight_VD, hidden_XD = made[0].requires_grad_(), hidden[0].requires_grad_()

    def logits(hidden_XD: Tensor, weight_VD: Tensor) -> Tensor:
        return CAP * torch.tanh(F.linear(hidden_XD, weight_VD).float() / CAP)

    def mean() -> Tensor:
        if method == "ours":
            total, count = divergence("forward_kl", hidden_XD, Head(weight_VD, CAP), hidden[1], Head(made[1], CAP))
            return total / count
        with torch.no_grad():
            theirs_XV = logits(hidden[1], made[1])
        if method == "TRL":
            from trl.experimental.gkd import GKDTrainer

            ours_XV, labels_X = logits(hidden_XD, weight_VD), torch.zeros(1, options.tokens, dtype=torch.long)
            loss: Tensor = GKDTrainer.generalized_jsd_loss(ours_XV[None], theirs_XV[None], labels_X, beta=0)
            return loss
        log_q_XV, log_p_XV = (x.log_softmax(-1) for x in (logits(hidden_XD, weight_VD), theirs_XV))
        return F.kl_div(log_q_XV, log_p_XV, log_target=True, reduction="sum") / options.tokens

    if method == "TRL":  # the import is not the loss's memory
        import trl.experimental.gkd  # noqa: F401
    machine.forget_peak()
    times: list[float] = []
    before, peak, value = machine.memory("VmRSS"), 0, 0.0
    while len(times) < 3 and sum(times) < 20:
        start = time.perf_counter()
        loss = mean()
        torch.autograd.grad(loss, (hidden_XD, weight_VD))
        times.append(time.perf_counter() - start)
        peak, value = peak or machine.memory("VmHWM"), float(loss.detach())
        del loss
    return {"seconds": min(times[1:] or times), "bytes": peak - before, "kl": value, "gradient": weight_VD.nbytes}


# --- a small model ---------------------------------------------------------------------------------------------------


def shape() -> ModelConfig:
    """About 30 M parameters."""
    return dataclasses.replace(
        ModelConfig.preset("debug"), layer_types=(), vocab_size=32768, hidden_size=384, intermediate_size=1152,
        num_hidden_layers=10, num_attention_heads=6, num_key_value_heads=2, head_dim=64, query_pre_attn_scalar=64,
        sliding_window=4096, max_position_embeddings=1024, eos_token_id=None,
    )  # fmt: skip


def weights(seed: int) -> dict[str, Tensor]:
    """Random bf16 weights by name."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(size, generator=generator) * (0.05 if len(size) > 1 else 0)).bfloat16()
        for name, size in shape().parameter_shapes().items()
    }


def small(seed: int) -> Gemma2:
    """Ours on these weights."""
    config, state = shape(), weights(seed)
    chosen = Attention.resolve(
        device="cpu", dtype=torch.bfloat16, cap=config.attn_logit_softcapping, window=config.sliding_window
    )
    model = Gemma2(config, chosen).bfloat16()
    model.load_state_dict({**state, "lm_head.weight": state["model.embed_tokens.weight"]})
    return model


def documents(options: Options, count: int) -> list[Document]:
    """Random prompts, each with a place to answer."""
    generator = torch.Generator().manual_seed(9)
    rows = torch.randint(10, shape().vocab_size, (count, options.prompt + 1), generator=generator).tolist()
    return [Document(row, [0] * options.prompt + [1]) for row in rows]


def teacher_of(model: Gemma2) -> Teacher:
    """A model as a teacher."""
    frozen = model.eval().requires_grad_(False)
    return Teacher(frozen, Head(frozen.lm_head.weight, CAP), "bench", frozen)


# --- the cache -------------------------------------------------------------------------------------------------------


def cache(options: Options, kind: str) -> dict[str, float]:
    """Bytes and tokens a second of a cache, and of the teacher's forward pass alone."""
    generator = torch.Generator().manual_seed(3)
    rows = torch.randint(10, shape().vocab_size, (40, 513), generator=generator).tolist()
    loader = Loader(in_memory([Document(row, [0] + [1] * 512) for row in rows]), Batching(length=512, rows=8))
    teacher = teacher_of(small(1))
    sampling = None if kind == "hidden" else Sampling(draws=int(kind))
    batch = next(loader)
    teacher.hidden(batch)
    start = time.perf_counter()
    teacher.hidden(batch)
    forward = batch.tokens / (time.perf_counter() - start)
    with tempfile.TemporaryDirectory() as folder:
        done = make(Path(folder), loader, teacher, {}, sampling=sampling, progress=False)
        ids = 0
        if sampling is not None:
            from safetensors.torch import load_file

            ids = sum(len(load_file(path)["ids"]) for path in Path(folder).glob("*.safetensors"))
    theory = 2.0 * shape().hidden_size if sampling is None else 10 * ids / done.tokens + 4
    rate = done.made_tokens / done.seconds
    return {"bytes": done.bytes / done.tokens, "theory": theory, "rate": rate, "forward": forward}


# --- on-policy -------------------------------------------------------------------------------------------------------


def ours(options: Options) -> dict[str, float]:
    """Updates by the parts of `gemwright distill`."""
    keep_memory()  # as the trainer does
    student, world = small(0).requires_grad_(True), World(0, 1, CPU)
    teacher = teacher_of(small(1))
    config = DistillConfig(
        model_name="-", teacher="-", dataset_name="-", output_dir="-", lmbda=1.0, max_new_tokens=options.new,
        max_seq_length=options.prompt + options.new, per_device_train_batch_size=options.batch, dtype="bfloat16",
    )  # fmt: skip
    batching = Batching(length=config.max_seq_length, rows=options.batch, packing=False, shuffle=False)
    loader = Loader(in_memory(documents(options, options.batch * (options.updates + 1))), batching, epochs=None)
    speaker = Speaker(student, world, learns=True, dtype=torch.bfloat16)
    data = OnPolicy(Lessons(loader, None), config, world, student=speaker, teacher=None, stop_ids=frozenset())
    loss = Distillation(config, Teaching(teacher.head, None, {}, teacher))
    optimizer = AdamW(student.named_parameters())
    tokens = generating = 0.0
    start = 0.0
    for update in range(options.updates + 1):
        if update == 1:
            start, tokens, generating = time.perf_counter(), 0.0, 0.0
        taught: Taught = next(data)
        generating += data.counts.seconds
        data.notes()
        student.train()
        total, count, _ = loss(student, taught)
        total.backward()  # type: ignore[no-untyped-call]
        optimizer.update(1e-5, 1 / float(count))
        tokens += float(count)
    seconds = time.perf_counter() - start
    return {"rate": tokens / seconds, "share": generating / seconds, "generated": tokens / generating}


def theirs(options: Options) -> dict[str, float]:
    """Updates by TRL's generation and loss over transformers' model."""
    import transformers
    from trl.experimental.gkd import GKDTrainer

    def model(seed: int) -> Any:
        raw = transformers.Gemma2Config(**shape().to_hf())
        raw._attn_implementation = "eager"
        made: Any = transformers.Gemma2ForCausalLM(raw).bfloat16()
        state = weights(seed)
        made.load_state_dict({**state, "lm_head.weight": state["model.embed_tokens.weight"]})
        return made

    student, teacher = model(0), model(1).eval().requires_grad_(False)
    generation = transformers.GenerationConfig(
        max_new_tokens=options.new, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, use_cache=True,
        pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    rows = documents(options, options.batch * (options.updates + 1))
    optimizer = AdamW(student.named_parameters())
    tokens = generating = start = 0.0
    for update in range(options.updates + 1):
        if update == 1:
            start, tokens, generating = time.perf_counter(), 0.0, 0.0
        chosen = rows[update * options.batch : (update + 1) * options.batch]
        prompts_BT = torch.tensor([row.tokens[: options.prompt] for row in chosen])
        asked = {"prompts": prompts_BT, "prompt_attention_mask": torch.ones_like(prompts_BT)}
        begin = time.perf_counter()
        student.eval()
        with torch.no_grad():
            ids_BT, mask_BT, labels_BT = GKDTrainer.generate_on_policy_outputs(student, asked, generation)
        generating += time.perf_counter() - begin
        student.train()
        logits_BTV = student(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits
        with torch.no_grad():
            teacher_BTV = teacher(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits
        loss = GKDTrainer.generalized_jsd_loss(logits_BTV[:, :-1], teacher_BTV[:, :-1], labels_BT[:, 1:], beta=0)
        loss.backward()
        optimizer.update(1e-5, 1.0)
        tokens += int((labels_BT[:, 1:] != -100).sum())
    seconds = time.perf_counter() - start
    return {"rate": tokens / seconds, "share": generating / seconds, "generated": tokens / generating}


# --- the report ------------------------------------------------------------------------------------------------------


def measure(options: Options, case: dict[str, Any]) -> dict[str, float]:
    """One case, in this process."""
    torch.set_num_threads(options.threads)
    if case["part"] == "kl":
        return kl(options, case["method"], case["vocab"])
    if case["part"] == "cache":
        return cache(options, case["kind"])
    return ours(options) if case["method"] == "ours" else theirs(options)


def found(options: Options, cases: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Each case's medians over interleaved rounds, every one in a process of its own."""
    results: list[list[dict[str, float]]] = [[] for _ in cases]
    flags = ["--threads", str(options.threads), "--tokens", str(options.tokens), "--width", str(options.width),
             "--updates", str(options.updates), "--new", str(options.new), "--batch", str(options.batch)]  # fmt: skip
    for _ in range(options.rounds):
        for case, runs in zip(cases, results, strict=True):
            arguments = ["--case", json.dumps(case), *flags]
            runs.append(machine.in_subprocess(Path(__file__), arguments, threads=options.threads))
            print(case, {name: round(value, 3) for name, value in runs[-1].items()}, file=sys.stderr)
    return [{name: statistics.median(run[name] for run in runs) for name in runs[0]} for runs in results]


def kl_table(options: Options) -> str:
    """Seconds and MB of each method."""
    methods = ("dense", "TRL", "ours")
    lines = [
        "| vocabulary | dense, s (MB) | TRL's loss | ours | ours, MB / weight's gradient | dense / ours | TRL / ours |",
        "|---|---|---|---|---|---|---|",
    ]
    for vocab in options.vocabularies:
        one = dict(zip(methods, found(options, [dict(part="kl", method=m, vocab=vocab) for m in methods]), strict=True))
        values = [run["kl"] for run in one.values()]
        assert max(values) - min(values) < 0.02 * min(values), values
        cells = [f"{one[m]['seconds']:.2f} ({one[m]['bytes'] / 1e6:.0f})" for m in methods]
        share = one["ours"]["bytes"] / one["ours"]["gradient"]
        ratios = [f"{one[m]['seconds'] / one['ours']['seconds']:.2f}" for m in methods[:2]]
        lines.append(f"| {vocab} | {' | '.join(cells)} | {share:.2f} | {' | '.join(ratios)} |")
    about = f"Forward KL with gradients, bf16, width {options.width}, {options.tokens} tokens, head trained:"
    return about + "\n\n" + "\n".join(lines)


def cache_table(options: Options) -> str:
    """Bytes a token and tokens a second of each kind."""
    kinds = ("hidden", "64", "256")
    lines = ["| kind | bytes a token | theory | tokens/s | teacher's forward alone |", "|---|---|---|---|---|"]
    for kind, one in zip(kinds, found(options, [dict(part="cache", kind=kind) for kind in kinds]), strict=True):
        name = "hidden states" if kind == "hidden" else f"{kind} ids drawn"
        lines.append(
            f"| {name} | {one['bytes']:.1f} | {one['theory']:.1f} | {one['rate']:.0f} | {one['forward']:.0f} |"
        )
    config = shape()
    about = (
        f"Caches, teacher of {config.num_parameters() / 1e6:.0f} M parameters, width {config.hidden_size}, vocabulary "
    )
    return (
        about
        + f"{config.vocab_size}, random weights (a flat distribution, so most drawn ids differ):\n\n"
        + "\n".join(lines)
    )


def policy_table(options: Options) -> str:
    """Tokens a second of whole updates, and of generation."""
    names = ("TRL", "ours")
    runs = found(options, [dict(part="on-policy", method=name) for name in names])
    lines = [
        "| | learned tokens/s | share of time generating | generated tokens/s while generating |", "|---|---|---|---|"
    ]  # fmt: skip
    for name, one in zip(names, runs, strict=True):
        lines.append(f"| {name} | {one['rate']:.1f} | {100 * one['share']:.0f} % | {one['generated']:.1f} |")
    ratio = runs[1]["rate"] / runs[0]["rate"]
    return (
        f"On-policy updates, the same model as student and (other weights) teacher, bf16, {options.batch} prompts of "
        f"{options.prompt} tokens, {options.new} new tokens each: ours / TRL {ratio:.2f}.\n\n" + "\n".join(lines)
    )


TABLES: Final = {
    "kl": ("the divergence at the head", kl_table),
    "cache": ("the teacher's cache", cache_table),
    "on-policy": ("on-policy updates", policy_table),
}


def main(options: Options) -> None:
    """Run the parts; print each one's report, and publish it where that was asked for, as it is done."""
    command = " ".join(["python", "bench/distill.py", *sys.argv[1:]])
    for part in options.parts:
        title, table = TABLES[part]
        ceilings, found = machine.ceilings(options.threads), table(options)
        head = f"{machine.describe(options.threads)}. {ceilings}.\n\n`{command}`: medians of {options.rounds} rounds."
        report = "\n\n".join([f"## Distillation: {title}", head, found])
        print(report, flush=True)
        if options.update:
            machine.publish(ROOT / "docs" / "benchmarks.md", f"bench/distill.py, {part}", report)


def _entry(options: Options) -> None:
    if options.case is None:
        main(options)
    else:
        print(json.dumps(measure(options, json.loads(options.case))))


if __name__ == "__main__":
    _entry(tyro.cli(Options))
