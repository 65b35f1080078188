"""A loss and its gradient at the output head: the naive way, chunked with torch's own parts, and `gemwright.ops`.

naive    the whole logits in the weight's dtype, then in fp32: capped, log-softmax, autograd.
chunked  the same for 256 tokens at a time, each chunk under `torch.utils.checkpoint`.
ours     `gemwright.ops.loss.cross_entropy`, `gemwright.ops.divergence.divergence`.

Cross-entropy, and forward KL from a teacher of the student's shape; the head trained or frozen. Random weights.

Each case runs in a process of its own: the median seconds of a few calls, after one that measures memory (the peak of
the process over what it held before: gradients and workspace, not hidden states and weights). The share is that of
the products alone (logits, gradient of hidden states and of a trained weight, the teacher's logits; what is computed
twice counts once) at the speed of a [512, 2304] x [2304, 2304] product measured beside them.

A processor that emulates bf16 needs hours for the naive products (0.3 GFLOP/s seen on AVX2): there bf16 is ours alone.

    python bench/loss.py [--update]
    python bench/loss.py --shapes 16384,256 --tokens 512 --rounds 1      # a trial of the bench itself
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Final, Literal

import machine
import psutil
import torch
import tyro
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gemwright.ops.cpu import has_fast_bf16
from gemwright.ops.divergence import divergence
from gemwright.ops.head import Head
from gemwright.ops.loss import cross_entropy

ROOT: Final = Path(__file__).resolve().parent.parent
CAP: Final = 30.0
METHODS: Final = ("naive", "chunked", "ours")
LOSSES: Final = ("cross-entropy", "forward KL")
CHUNK: Final = 256
BUDGET: Final = 20.0
"""Seconds of repeated calls in one process, and beyond which a case is not run in the further rounds."""

SMALL: Final = 1024
"""Ids of a head that warms the process up."""

Loss = Callable[[Tensor, Tensor], Tensor]
"""A loss of hidden states [X, D] and weight [V, D]: a sum over tokens."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One cell of the table."""

    loss: str
    method: str
    vocab: int
    width: int
    tokens: int
    frozen: bool
    dtype: str

    def flops(self) -> float:
        """Operations of the products that cannot be saved."""
        products = 2 + (not self.frozen) + (self.loss == "forward KL")
        return 2.0 * self.tokens * self.vocab * self.width * products

    def gradient_bytes(self) -> int:
        """Bytes of the weight's gradient in its own dtype."""
        return self.vocab * self.width * {"bfloat16": 2, "float32": 4}[self.dtype]

    def runs(self) -> bool:
        """Whether it can be run here: bf16 matmuls that end, and a peak that fits the memory that is free."""
        if self.method != "ours" and self.dtype == "bfloat16" and not has_fast_bf16():
            return False
        # seen: up to eight fp32 tensors of logits with one side, twelve with two, and three of the weight's size
        whole = (8 if self.loss == "cross-entropy" else 12) if self.method == "naive" else 0
        need = 4 * self.tokens * self.vocab * whole + 3 * self.gradient_bytes()
        return need < int(psutil.virtual_memory().available)


def log_probs(hidden_XD: Tensor, weight_VD: Tensor) -> Tensor:
    """Log-probabilities [X, V] in fp32 from logits in the inputs' dtype."""
    return (CAP * torch.tanh(F.linear(hidden_XD, weight_VD).float() / CAP)).log_softmax(-1)


def naive(case: Case, targets_X: Tensor, teacher_XD: Tensor) -> Callable[[Tensor, Tensor, slice], Tensor]:
    """The loss of some of the tokens, whole; the teacher shares the weight, detached."""

    def of(hidden_XD: Tensor, weight_VD: Tensor, part: slice) -> Tensor:
        log_q_XV = log_probs(hidden_XD[part], weight_VD)
        if case.loss == "cross-entropy":
            return F.nll_loss(log_q_XV, targets_X[part], reduction="sum")
        log_p_XV = log_probs(teacher_XD[part], weight_VD.detach())
        return F.kl_div(log_q_XV, log_p_XV, log_target=True, reduction="sum")

    return of


def loss_of(case: Case, targets_X: Tensor, teacher_XD: Tensor) -> Loss:
    """A method as a function of hidden states and weight."""
    whole = naive(case, targets_X, teacher_XD)
    if case.method == "naive":
        return lambda h, w: whole(h, w, slice(None))
    if case.method == "chunked":
        parts = [slice(i, i + CHUNK) for i in range(0, case.tokens, CHUNK)]
        return lambda h, w: torch.stack([checkpoint(whole, h, w, p, use_reentrant=False) for p in parts]).sum()
    assert case.method == "ours", case.method
    if case.loss == "cross-entropy":
        return lambda h, w: cross_entropy(h, w, targets_X, softcap=CAP)[0]
    return lambda h, w: divergence("forward_kl", h, Head(w, CAP), teacher_XD, Head(w.detach(), CAP))[0]


def measure(case: Case, threads: int) -> dict[str, float]:
    """Median seconds of a call, bytes at the peak of the first one over what was resident before, and the loss."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    if case.vocab > SMALL:  # libraries and their pages are no part of what a loss takes
        measure(replace(case, vocab=SMALL), threads)
    dtype = getattr(torch, case.dtype)
    weight_VD = torch.empty(case.vocab, case.width, dtype=dtype).normal_(0, 3 * case.width**-0.5)
    hidden_XD, teacher_XD = (torch.randn(case.tokens, case.width, dtype=dtype) for _ in range(2))
    hidden_XD.requires_grad_()
    weight_VD.requires_grad_(not case.frozen)
    loss = loss_of(case, torch.randint(case.vocab, (case.tokens,)), teacher_XD)
    wanted = (hidden_XD,) if case.frozen else (hidden_XD, weight_VD)
    machine.forget_peak()
    before = machine.memory("VmRSS")
    times: list[float] = []
    peak, value = 0, 0.0
    while len(times) < 6 and sum(times) < BUDGET:
        start = time.perf_counter()
        mean = loss(hidden_XD, weight_VD) / case.tokens
        torch.autograd.grad(mean, wanted)
        times.append(time.perf_counter() - start)
        peak, value = peak or machine.memory("VmHWM"), float(mean.detach())
    return {"seconds": statistics.median(times[1:] or times), "bytes": peak - before, "loss": value}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compare a loss and its gradient, computed in three ways."""

    shapes: tuple[str, ...] = ("49152,2304", "256000,2304")
    """Vocabulary and width of a head."""
    tokens: tuple[int, ...] = (512, 2048)
    dtypes: tuple[Literal["bfloat16", "float32"], ...] = ("bfloat16", "float32")
    heads: tuple[Literal["trained", "frozen"], ...] = ("trained", "frozen")
    rounds: int = 3
    threads: int = machine.cores()
    update: bool = False
    """Replace this bench's section in docs/benchmarks.md."""
    case: str | None = None
    """Measure this case alone (a JSON object), and print one JSON line."""

    def __post_init__(self) -> None:
        if min(*self.tokens, self.rounds, self.threads) < 1:
            raise ValueError("tokens, rounds, threads: allowed is 1 or more of each")
        for shape in self.shapes:
            if [part.isdecimal() for part in shape.split(",")] != [True, True]:
                raise ValueError(f"shapes: got {shape!r}, allowed is VOCABULARY,WIDTH")


def rows(options: Options) -> list[dict[str, Case]]:
    """The rows of the table: each method's case."""
    shapes = [[int(part) for part in shape.split(",")] for shape in options.shapes]
    return [
        {
            method: Case(
                loss=loss, method=method, vocab=shape[0], width=shape[1], tokens=tokens, frozen=frozen, dtype=dtype
            )
            for method in METHODS
        }
        for loss, dtype, shape, tokens, frozen in product(
            LOSSES, options.dtypes, shapes, options.tokens, [head == "frozen" for head in options.heads]
        )
    ]  # fmt: skip


def one_case(case: Case, threads: int) -> dict[str, float]:
    """One case's result, from a process of its own."""
    flags = ["--case", json.dumps(vars(case)), "--threads", str(threads)]
    result: dict[str, float] = machine.in_subprocess(Path(__file__), flags, threads=threads)
    print(f"{case}: {result['seconds']:.2f} s, {result['bytes'] / 1e6:.0f} MB", file=sys.stderr)
    return result


def line(row: dict[str, Case], results: dict[str, list[dict[str, float]]], ceilings: machine.Ceilings) -> str:
    """One row: seconds (MB) of each method, memory over the gradient's, time ratios, shares of the matmul rates."""
    found = {m: {k: statistics.median(r[k] for r in runs) for k in runs[0]} for m, runs in results.items() if runs}
    ours, case = found["ours"], row["ours"]
    for method, one in found.items():
        assert abs(one["loss"] - ours["loss"]) < 0.02 * abs(ours["loss"]), (method, one["loss"], ours["loss"])
    cells = [f"{found[m]['seconds']:.2f} ({found[m]['bytes'] / 1e6:.0f})" if m in found else "-" for m in METHODS]
    ratios = [f"{found[m]['seconds'] / ours['seconds']:.2f}" if m in found else "-" for m in METHODS[:2]]
    rate = case.flops() / ours["seconds"] / 1e9
    head = [case.loss, case.dtype, case.vocab, case.tokens, "frozen" if case.frozen else "trained"]
    memory = f"{ours['bytes'] / case.gradient_bytes():.2f}"
    shares = [f"{100 * rate / ceiling:.0f} %" for ceiling in (ceilings.bf16, ceilings.fp32)]
    return f"| {' | '.join(map(str, [*head, *cells, memory, *ratios, *shares]))} |"


def main(options: Options) -> None:
    """Run every case in interleaved rounds, print the report, publish it where that was asked for."""
    table = rows(options)
    results: list[dict[str, list[dict[str, float]]]] = [{method: [] for method in METHODS} for _ in table]
    measured = []
    for _ in range(options.rounds):
        for row, found in zip(table, results, strict=True):
            measured.append(machine.ceilings(options.threads))
            for method, runs in found.items():
                if row[method].runs() and (not runs or runs[0]["seconds"] < BUDGET):
                    runs.append(one_case(row[method], options.threads))
    ceilings = machine.Ceilings.most(measured)
    lines = [
        "| loss | dtype | vocabulary | tokens | head | naive | chunked | ours | ours, MB / weight's gradient "
        "| naive / ours | chunked / ours | share of bf16 matmul | of fp32 matmul |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
        *(line(row, found, ceilings) for row, found in zip(table, results, strict=True)),
    ]
    report = "\n\n".join(
        [
            "## Loss and gradient",
            f"{machine.describe(options.threads)}. {ceilings}.",
            f"`{' '.join(['python', 'bench/loss.py', *sys.argv[1:]])}`: seconds and, in brackets, MB at the peak "
            f"beside hidden states and weights; medians of {options.rounds} interleaved rounds (one where a call takes "
            f"more than {BUDGET:.0f} s). -: not run, bf16 matmuls being emulated or the free memory too small.",
            "\n".join(lines),
        ]
    )
    print(report)
    if options.update:
        machine.publish(ROOT / "docs" / "benchmarks.md", "bench/loss.py", report)


def _entry(options: Options) -> None:
    if options.case is None:
        main(options)
    else:
        fields: dict[str, Any] = json.loads(options.case)
        print(json.dumps(measure(Case(**fields), options.threads)))


if __name__ == "__main__":
    _entry(tyro.cli(Options))
