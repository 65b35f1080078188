"""Heal the adopted model: distil the source into it, and keep what was learned in a delta of at most 16 MiB.

    python recipes/mini/data.py --out DIR
    python recipes/mini/answer.py --data DIR
    python recipes/mini/heal.py train --data DIR --out DIR/run --minutes 60
    python recipes/mini/heal.py evaluate --data DIR --delta DIR/run/delta.safetensors

The student is SmolLM2-135M-Instruct put into the Gemma 2 architecture (`gemwright/adopt.py`); the
teacher is the source itself. Local layers first learn to do without the first token (`windows.py`). The loss is the
mean of KL(teacher || student) over the tokens where both predict the same (`pairs.py`). It begins off-policy, with
prose and the teacher's answers. At each of `--marks` the student answers prompts itself at temperature 1, and these
documents take part from then on: on-policy distillation (GKD, arXiv 2306.13649) with forward KL, in rounds.

Updates are learned whole at first, which is faster, and from FACTORED on as the low-rank factors that the delta holds,
rounded to its 8 and 4 bits in every step.

The rate follows the wall clock (warm-up, then a linear decay to 0), so that a run fits its time; compilation comes
before. `state.safetensors` is written now and then, and a run that finds one goes on from there.

Legend: B rows, T tokens, D model.
"""

from __future__ import annotations

import argparse
import json
import queue
import random
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data import Tokens, tokenizer
from data import rows as json_rows
from pairs import LENGTHS, Mixture, Row, Turns, chats, pieces, rows
from safetensors import safe_open
from safetensors.torch import save_file
from sample import END, Clock, sample
from student import Loaded, Student, adopted, load_delta, save_delta, through
from torch import Tensor
from windows import teach_windows

from gemwright.adopt import adopted_config, model_of
from gemwright.ballast import ballast
from gemwright.bundled import base_path
from gemwright.delta import steps
from gemwright.engine.engine import Engine
from gemwright.engine.rollout import rollout as engine_rollout
from gemwright.engine.rollout import twin
from gemwright.gguf import Gguf
from gemwright.llama import Llama
from gemwright.lowering import lowering
from gemwright.model import Gemma2
from gemwright.ops.attention import BACKENDS, Attention
from gemwright.ops.cpu import has_fast_bf16, keep_memory
from gemwright.ops.divergence import divergence
from gemwright.ops.head import Head, chunks
from gemwright.ops.loss import linear_logprob
from gemwright.sampling import SamplingParams
from gemwright.train.speed import compile_blocks

SHARES = {"prose": 0.5, "chats": 0.5}
OWN_SHARE = 0.5
FACTORED = 0.6
"""Progress at which the updates become factors."""
WATCHED = 0.04
"""Progress before it in which gradients are watched, which choose the factors."""
NEW_TOKENS = 256
ENGINE_ROWS = 64
WARMUP = 20
LONG = 4096
"""Positions before it are not counted in the held-out texts of 8192 tokens."""
WINDOW_TEXTS = 13
"""Pieces of 8192 tokens from which local layers learn to do without the first token."""
BETAS = (0.9, 0.98)


@dataclass
class Pair:
    """Student and teacher on one device."""

    student: Student
    llama: Llama
    turns: Turns
    device: torch.device

    @property
    def model(self) -> Gemma2:
        return self.student.model

    @property
    def head(self) -> Head:
        """The student's; the teacher's has no cap."""
        return Head(self.model.lm_head.weight.detach(), self.model.config.final_logit_softcapping)

    def hidden(self, row: Row) -> tuple[Tensor, Tensor]:
        """Hidden states of both, [T, D], the teacher's at each student token's partner."""
        with torch.no_grad():
            theirs_TD = self.llama(*row.teacher)[0][row.partner_T]
        return self.model(*row.student)[0], theirs_TD

    def kl(self, row: Row) -> Tensor:
        """Mean KL(teacher || student) over the tokens where both predict the same."""
        ours_TD, theirs_TD = self.hidden(row)
        sides = ours_TD[row.taken_X], self.head, theirs_TD[row.taken_X], Head(self.llama.head, None)
        return divergence("forward_kl", *sides)[0] / len(row.taken_X)


def prefetched(stream: Iterable[Row], device: torch.device) -> Iterator[Row]:
    """Rows made in a thread, three ahead, and moved to the device."""
    ready: queue.Queue[Row | None] = queue.Queue(maxsize=3)

    def fill() -> None:
        for row in stream:
            ready.put(row)
        ready.put(None)

    threading.Thread(target=fill, daemon=True).start()
    while (row := ready.get()) is not None:
        yield row.to(device)


def evaluate(pair: Pair, documents: list[Tokens], length: int, limit: int, first: int) -> dict[str, Any]:
    """Mean KL(teacher || student) and cross-entropies, nats a token, over answers and prose from position `first` on.

    Runs with gradients on, so that it shares the compiled code of training; nothing is kept.
    """
    total = {"kl": 0.0, "student_ce": 0.0, "teacher_ce": 0.0}
    count, targets, agree = 0, 0, 0
    for row in prefetched(rows(iter(documents), pair.turns, length), pair.device):
        weight_T = row.answer_T * (row.student[1][0] >= first)
        with torch.enable_grad():
            ours_TD, theirs_TD = (h.detach() for h in pair.hidden(row))
        theirs = Head(pair.llama.head, None)
        total["kl"] += float(divergence("forward_kl", ours_TD, pair.head, theirs_TD, theirs, weight_T)[0])
        count += int(weight_T.sum())
        known = (weight_T > 0) & (row.target_T >= 0)
        target_X, ours_XD, theirs_XD = row.target_T[known], ours_TD[known], theirs_TD[known]
        for name, hidden_XD, head in (("student", ours_XD, pair.head), ("teacher", theirs_XD, theirs)):
            total[f"{name}_ce"] -= float(
                linear_logprob(hidden_XD, head.weight_VD, target_X, softcap=head.softcap)[0].sum()
            )
        for part in chunks(len(target_X), len(theirs.weight_VD)):
            tops = [
                (h_XD[part] @ head.weight_VD.T).argmax(-1) for h_XD, head in ((ours_XD, pair.head), (theirs_XD, theirs))
            ]
            agree += int((tops[0] == tops[1]).sum())
        targets += len(target_X)
        if count >= limit:
            break
    means = {"kl": total["kl"] / count, "agree": agree / targets}
    return means | {k: v / targets for k, v in total.items() if k != "kl"} | {"tokens": count}


def evaluated(
    pair: Pair, heldout: dict[str, list[Tokens]], length: int, limit: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each kind of held-out text with its numbers."""
    for name, documents in heldout.items():
        yield name, evaluate(pair, documents, length, limit, LONG if name == "long" else 0)


def rollout(pair: Pair, asked: list[dict[str, Any]], batch: int, seed: int) -> tuple[list[Tokens], str]:
    """What the student itself answers to prompts, at temperature 1, as documents; and the speed."""
    prompts = [[0, *pair.turns.question(row["turns"][0])] for row in asked]
    prompts = sorted((prompt for prompt in prompts if len(prompt) < 256), key=len)
    clock = Clock()
    if pair.device.type == "cuda":
        answers = in_batches(pair.model, prompts, batch, seed)
    else:
        answers = in_engine(pair.model, prompts, min(batch, ENGINE_ROWS))
    clock.tokens = sum(map(len, answers))
    documents = [np.array(prompt + answer, np.uint16) for prompt, answer in zip(prompts, answers, strict=True)]
    return documents, str(clock)


def in_batches(model: Gemma2, prompts: list[list[int]], batch: int, seed: int) -> list[list[int]]:
    """Answers of a thousand rows at once, whose steps one graph replays."""
    with torch.device("meta"):
        other = Gemma2(model.config, Attention(train="blocked", prefill="blocked", decode="blocked"))
    other.load_state_dict({n: p.detach() for n, p in model.named_parameters()}, strict=False, assign=True)
    other.tie()
    generator = torch.Generator(model.lm_head.weight.device).manual_seed(seed)
    answers: list[list[int]] = []
    for at in range(0, len(prompts), batch):
        part = prompts[at : at + batch]
        answers += sample(
            other, other.logits, other.config, part, [1.0] * len(part),
            new_tokens=NEW_TOKENS, generator=generator, dtype=other.lm_head.weight.dtype,
        )  # fmt: skip
    return answers


def in_engine(model: Gemma2, prompts: list[list[int]], rows: int) -> list[list[int]]:
    """Answers of the engine, which fills a row as soon as it is free."""
    engine = Engine(twin(model), rows=rows, budget=512, cache_tokens=rows * 1024)
    params = SamplingParams(max_new_tokens=NEW_TOKENS, stop_ids=frozenset({END}))
    return [one.tokens for (one,) in engine_rollout(engine, prompts, params)]


def rate(progress: float, step: int) -> float:
    """Share of the full rate, `step` steps after the optimizer was made."""
    return min(1.0, (step + 1) / WARMUP) * max(0.0, 1 - progress)


class Run:
    """One training run: resumes from its folder, writes state, delta and log there."""

    def __init__(self, pair: Pair, args: argparse.Namespace) -> None:
        self.pair, self.args, self.out = pair, args, args.out
        self.out.mkdir(parents=True, exist_ok=True)
        self.step, self.tokens, self.elapsed, self.rounds = 0, 0, 0.0, 0
        self.begin()

    def begin(self) -> None:
        """Train what the student's trained numbers are by now."""
        self.begun = self.step
        groups = self.pair.student.groups()
        self.optimizer = torch.optim.AdamW(groups, lr=self.args.rate, betas=BETAS, weight_decay=0.0, fused=True)
        print(f"{sum(p.numel() for p in self.pair.student.trained.values()):,} trained numbers", flush=True)

    def log(self, row: dict[str, Any]) -> None:
        """A line of log.jsonl, with where the run stands."""
        row = {"step": self.step, "seen": self.tokens, "seconds": round(self.elapsed, 2)} | row
        with (self.out / "log.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(" ".join(f"{k} {v:.5g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)

    @property
    def progress(self) -> float:
        """Share of the time that is over."""
        return float(self.elapsed / (self.args.minutes * 60))

    def update(self, row: Row) -> tuple[Tensor, Tensor]:
        """One step; the mean KL of its batch and the gradient's norm."""
        student, parameters = self.pair.student, list(self.pair.student.trained.values())
        for group in self.optimizer.param_groups:
            group["lr"] = self.args.rate * group["speed"] * rate(self.progress, self.step - self.begun)
        student.write()
        kl = self.pair.kl(row)
        kl.backward()  # type: ignore[no-untyped-call]
        student.collect()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        # a step that is not finite is not taken; the optimizer reads this on the device
        self.optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return kl.detach(), norm

    def train(self, heldout: dict[str, list[Tokens]]) -> None:
        """Until the time is over."""
        args, pair = self.args, self.pair
        mixture = Mixture(seed=self.step)
        mixture.set("prose", pieces(args.data, "train", pair.turns, LENGTHS, seed=self.step), SHARES["prose"])
        self.answered(mixture)
        asked = [row for row in json_rows(args.data / "prompts.jsonl") if row["split"] == "train"]
        random.Random(2).shuffle(asked)
        stream = prefetched(rows(iter(mixture), pair.turns, args.tokens), pair.device)
        self.warm_up(next(stream))
        last, shown, saved = time.monotonic(), 0.0, 0.0
        while self.progress < 1:
            if pair.student.rank is None and self.progress >= args.factored:
                pair.student.factor(args.rank)
                self.begin()
                self.log({"factored": args.rank})
                self.measure(heldout)
            marks = [mark for mark in args.marks if args.rollouts and mark <= self.progress]
            if len(marks) > self.rounds:
                self.rounds = len(marks)
                pair.student.write()
                part = asked[args.rollouts * (self.rounds - 1) : args.rollouts * self.rounds]
                own, speed = rollout(pair, part, args.batch, seed=self.rounds)
                mixture.set("own", own, OWN_SHARE)
                self.answered(mixture)
                self.log({"rollout": self.rounds, "documents": len(own), "speed": speed})
            if pair.student.rank is None and self.progress >= args.factored - WATCHED:
                pair.student.watch()
            kl, norm = self.update(next(stream))
            self.step, self.tokens = self.step + 1, self.tokens + args.tokens
            now = time.monotonic()
            self.elapsed, last = self.elapsed + now - last, now
            if self.step % 10 == 0:
                self.log({"kl": float(kl), "norm": float(norm), "tokens/s": self.tokens / self.elapsed})
            if self.elapsed - shown > args.evaluate_seconds:
                shown = self.elapsed
                self.measure(heldout)
            if self.elapsed - saved > args.save_seconds:
                saved = self.elapsed
                self.save()
        pair.student.write()
        self.save()

    def answered(self, mixture: Mixture) -> None:
        """Take in the teacher's answers that are there by now; `answer.py` may still be at work."""
        if found := chats(self.args.data, "train"):
            mixture.set("chats", found, SHARES["chats"])

    def warm_up(self, row: Row) -> None:
        """Compile everything: one step whose gradients are thrown away."""
        start = time.monotonic()
        self.pair.student.write()
        kl = self.pair.kl(row)
        kl.backward()  # type: ignore[no-untyped-call]
        self.pair.student.collect()
        self.optimizer.zero_grad(set_to_none=True)
        print(f"compiled and ran one step in {time.monotonic() - start:.1f} s, KL {float(kl.detach()):.3f}", flush=True)

    def measure(self, heldout: dict[str, list[Tokens]]) -> None:
        """Held-out numbers of the weights as they are, to the log: the curve's points."""
        self.pair.student.write()
        for name, found in evaluated(self.pair, heldout, self.args.tokens, self.args.glance):
            self.log({"heldout": name} | found)

    def save(self) -> None:
        """The trained numbers with the optimizer's, and counts."""
        state = self.pair.student.beginning()
        for name, parameter in self.pair.student.trained.items():
            kept = self.optimizer.state[parameter]
            state |= {f"value/{name}": parameter.detach(), f"size/{name}": self.pair.student.sizes[name]}
            state |= {f"{key}/{name}": value for key, value in kept.items()}
        counts = {key: str(getattr(self, key)) for key in ("step", "tokens", "elapsed", "rounds", "begun")}
        save_file(state, self.out / "state.new", metadata=counts)
        (self.out / "state.new").replace(self.out / "state.safetensors")

    def resume(self) -> None:
        """Go on from the state in the folder, if there is one."""
        path = self.out / "state.safetensors"
        if not path.exists():
            return
        with safe_open(path, framework="pt", device=str(self.pair.device)) as file:
            counts, student = file.metadata(), self.pair.student
            names = list(file.keys())
            factors = [name for name in names if name.startswith("value/") and name.endswith("lora_A")]
            if factors and (rank := file.get_slice(factors[0]).get_shape()[1]) != self.args.rank:
                sys.exit(f"--rank: got {self.args.rank}, the run in {self.out} has factors of rank {rank}")
            if factors and student.rank is None:
                student.factor(self.args.rank)
                self.begin()
            student.begin(*steps({n: file.get_tensor(n) for n in names if "/" not in n}, student.model.config))
            for name, parameter in student.trained.items():
                parameter.data.copy_(file.get_tensor(f"value/{name}"))
                student.sizes[name] = file.get_tensor(f"size/{name}")
                keys = ("step", "exp_avg", "exp_avg_sq")
                self.optimizer.state[parameter] = {key: file.get_tensor(f"{key}/{name}") for key in keys}
        self.step, self.tokens, self.rounds, self.begun = (
            int(counts[key]) for key in ("step", "tokens", "rounds", "begun")
        )
        self.elapsed = float(counts["elapsed"])
        print(f"resumed at step {self.step}", flush=True)


def build(args: argparse.Namespace) -> Pair:
    """Teacher, and student as it is adopted."""
    device = torch.device(args.device)
    if device.type == "cpu":
        keep_memory()
    dtype = torch.bfloat16 if device.type == "cuda" or has_fast_bf16() else torch.float32
    file = Gguf(base_path())
    source, config = Loaded(file, device), adopted_config(file.hf_config())
    backend = args.attention
    turns = Turns(tokenizer())
    exact = Llama(source, config, torch.float32, device, BACKENDS["blocked"].load())
    pieces_of_text = pieces(args.data, "train", turns, ((256, 1.0),), seed=7)[: args.calibration]
    calibration = [piece.tolist() for piece in pieces_of_text if len(piece) == 256]
    calibration_BT = torch.tensor(calibration, device=device)
    weights = adopted(source, exact, calibration_BT[:16])
    llama = Llama(source, config, dtype, device, BACKENDS[backend].load())
    with torch.device("meta"):
        model = Gemma2(config, Attention(train=backend, prefill="blocked", decode="blocked"))
    model = model.to_empty(device=device).to(dtype)
    model.tie()
    student = Student(model, weights, None if args.factored > 0 else args.rank)
    resumed = bool(args.out) and (args.out / "state.safetensors").exists()
    if args.start:
        student.start(load_delta(args.start))
    elif not resumed and not args.delta:
        lower = [step for step in (lowering(exact, calibration_BT),) if step is not None]
        student.begin(*lower, ballast(model_of(config, through(weights, lower)), calibration_BT))
    student.write()
    if args.windows and args.command == "train" and not resumed:
        length = 2 * config.sliding_window
        texts = [text for text in pieces(args.data, "train", turns, ((length, 1.0),), seed=11) if len(text) == length]
        if len(texts) < 2:
            sys.exit(f"--windows: got {len(texts)} texts of {length} tokens in {args.data}, allowed are 2 or more")
        some = [torch.from_numpy(text.astype(np.int64)).to(device) for text in texts[:WINDOW_TEXTS]]
        teach_windows(student, some, args.windows)
        student.write()
    if args.compile:
        llama.compile()
        compile_blocks(model)
    return Pair(student, llama, turns, device)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("train", "evaluate"))
    parser.add_argument("--data", type=Path, required=True, help="folder that data.py and answer.py filled")
    parser.add_argument("--out", type=Path, help="folder of the run (train); an interrupted run resumes")
    parser.add_argument("--minutes", type=float, default=60, help="length of the run in wall-clock minutes")
    parser.add_argument("--start", type=Path, help="delta that the run begins from; without it the adopted model")
    parser.add_argument("--delta", type=Path, help="evaluate this delta; without it the adopted model as it is")
    parser.add_argument(
        "--factored",
        type=float,
        default=FACTORED,
        help="progress at which updates become factors; 0: they are from the start",
    )
    parser.add_argument("--rank", type=int, default=93, help="of the delta's updates")
    parser.add_argument(
        "--windows",
        type=int,
        default=200,
        help="steps in which each local layer first learns to do without the first token; 0: none, as with a --start "
        "that has learned it",
    )
    parser.add_argument("--rate", type=float, default=2e-4, help="of AdamW, for numbers relative to their usual size")
    parser.add_argument("--tokens", type=int, default=16384, help="tokens of a step")
    parser.add_argument("--rollouts", type=int, default=4096, help="prompts of an on-policy round; 0: off-policy alone")
    parser.add_argument(
        "--marks",
        type=float,
        nargs="*",
        default=(0.4, 0.7),
        help="progress at which the student answers prompts itself",
    )
    parser.add_argument("--batch", type=int, default=1024, help="rows of a rollout's batch")
    parser.add_argument("--calibration", type=int, default=128, help="pieces of 256 tokens that adoption is fitted to")
    parser.add_argument(
        "--heldout",
        type=int,
        default=10**9,
        help="held-out tokens of each kind that what ships is measured on, at most",
    )
    parser.add_argument(
        "--glance", type=int, default=16384, help="held-out tokens of each kind that are measured while a run goes on"
    )
    parser.add_argument("--evaluate-seconds", type=float, default=20)
    parser.add_argument("--save-seconds", type=float, default=60)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    parser.add_argument("--attention", default="flex" if torch.cuda.is_available() else "blocked")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.command == "train" and args.out is None:
        sys.exit("train needs --out")
    if (args.start or (args.command == "train" and args.windows)) and args.factored <= 0:
        sys.exit(
            f"--factored: got {args.factored}, allowed with --start or --windows is a number above 0: "
            "updates are whole at first"
        )
    return args


def main() -> None:
    args = arguments()
    torch.manual_seed(0)
    started = time.monotonic()
    pair = build(args)
    torch.set_float32_matmul_precision("high")  # the updates' own products; the fit before is exact
    print(f"adopted in {time.monotonic() - started:.1f} s", flush=True)
    heldout = {
        "prose": pieces(args.data, "heldout", pair.turns, ((1024, 1.0),), seed=1),
        "answers": chats(args.data, "heldout"),
        "long": [p for p in pieces(args.data, "heldout", pair.turns, ((8192, 1.0),), seed=1) if len(p) > 5000],
    }
    if args.tokens <= LONG:
        heldout["long"] = []
    heldout = {name: documents for name, documents in heldout.items() if documents}
    if args.command == "train":
        run = Run(pair, args)
        run.resume()
        if run.step == 0:
            run.measure(heldout)
        run.train(heldout)
        run.measure(heldout)
        save_delta(args.out / "delta.safetensors", pair.student.delta(args.rank), args.rank)
    delta = args.out / "delta.safetensors" if args.command == "train" else args.delta
    if delta:
        pair.student.load(load_delta(delta))
        print(f"{delta}: {delta.stat().st_size / 2**20:.2f} MiB", flush=True)
    for name, found in evaluated(pair, heldout, args.tokens, args.heldout):
        print(name, json.dumps(found), flush=True)
        if args.command == "train":
            with (args.out / "shipped.jsonl").open("a") as file:
                file.write(json.dumps({"heldout": name} | found) + "\n")


if __name__ == "__main__":
    main()
