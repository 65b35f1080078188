"""One attention layer of the 2B shape, 8 query and 4 key/value heads of 256, bf16: blocked against two others.

eager    the plain definition as transformers runs it for Gemma 2: keys and values repeated over their group, the whole
         score matrix, capped, masked, softmax in fp32.
sdpa     torch's fused `scaled_dot_product_attention`, causal. It has no cap and no window: not a way to run
         Gemma 2, but the speed of a fused kernel that does less.
blocked  `gemwright.ops.attention_blocked`.

Each case runs in a process of its own: the median seconds of a few calls, after one that measures memory (the peak
of the process over what it held before: masks, outputs, gradients and workspace, not q, k and v).

    python bench/attention.py [--update]
    python bench/attention.py --lengths 128 256 --rounds 1      # a trial of the bench itself
"""

from __future__ import annotations

import json
import statistics
import sys
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

from gemwright.ops.attention import Visibility
from gemwright.ops.attention_blocked import blocked

ROOT: Final = Path(__file__).resolve().parent.parent
HEADS, KV_HEADS, HEAD_DIM = 8, 4, 256
SCALE, CAP = HEAD_DIM**-0.5, 50.0
WINDOW: Final = 4096
METHODS: Final = ("eager", "blocked", "sdpa")
BUDGET: Final = 20.0
"""Seconds of repeated calls in one process, and beyond which a case is not run in the further rounds."""


def eager(q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, mask_TS: Tensor) -> Tensor:
    """Soft-capped attention with every score in memory; `mask_TS` is added: 0 or the dtype's minimum."""
    k_BNSH, v_BNSH = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (k_BKSH, v_BKSH))
    scores_BNTS = q_BNTH @ k_BNSH.mT * SCALE
    scores_BNTS = torch.tanh(scores_BNTS / CAP) * CAP + mask_TS
    weights_BNTS = torch.softmax(scores_BNTS, dim=-1, dtype=torch.float32).to(q_BNTH.dtype)
    return weights_BNTS @ v_BNSH


def attention(method: str, length: int, window: int | None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A method as a function of q, k, v, all [1, T, heads, H]; what all layers of a pass share is made here."""
    pos_BT = torch.arange(length)[None]
    see = Visibility(pos_BT, pos_BT, window=window)
    if method == "blocked":
        return lambda q, k, v: blocked(q, k, v, see, scale=SCALE, cap=CAP)
    if method == "sdpa":
        return lambda q, k, v: F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, scale=SCALE, enable_gqa=True
        )
    assert method == "eager", method
    mask_TS = torch.zeros(length, length, dtype=torch.bfloat16)
    mask_TS.masked_fill_(~see.mask()[0], torch.finfo(torch.bfloat16).min)
    return lambda q, k, v: eager(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask_TS)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One cell of the table."""

    method: str
    length: int
    window: int | None
    backward: bool


def measure(case: Case, threads: int) -> dict[str, float]:
    """Median seconds of a call, and bytes at the peak of the first one over what was resident before."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    sizes = ((HEADS, case.backward), (KV_HEADS, case.backward), (KV_HEADS, case.backward))
    q, k, v = (torch.randn(1, case.length, n, HEAD_DIM).bfloat16().requires_grad_(grad) for n, grad in sizes)
    machine.forget_peak()
    before = machine.memory("VmRSS")
    attend = attention(case.method, case.length, case.window)

    def call() -> None:
        out = attend(q, k, v)
        if case.backward:
            torch.autograd.grad(out, (q, k, v), torch.ones_like(out))

    times: list[float] = []
    peak = 0
    while len(times) < 6 and sum(times) < BUDGET:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
        peak = peak or machine.memory("VmHWM")
    return {"seconds": statistics.median(times[1:] or times), "bytes": peak - before}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compare attention implementations."""

    lengths: tuple[int, ...] = (512, 2048, 8192)
    rounds: int = 3
    threads: int = machine.cores()
    update: bool = False
    """Replace this bench's section in docs/benchmarks.md."""
    case: str | None = None
    """Measure this case alone (a JSON object), and print one JSON line."""

    def __post_init__(self) -> None:
        if min(*self.lengths, self.rounds, self.threads) < 1:
            raise ValueError("lengths, rounds, threads: allowed is 1 or more of each")


def cases(lengths: tuple[int, ...]) -> list[tuple[int, int | None, bool]]:
    """Length, window and whether backward runs too; the window only where it bites."""
    windows: dict[int, tuple[int | None, ...]] = {T: (None, WINDOW) if T > WINDOW else (None,) for T in lengths}
    return [(T, window, backward) for T in lengths for window in windows[T] for backward in (False, True)]


def one_case(case: Case, threads: int) -> dict[str, float]:
    """One case's result, from a process of its own."""
    flags = ["--case", json.dumps(vars(case)), "--threads", str(threads)]
    result: dict[str, float] = machine.in_subprocess(Path(__file__), flags, threads=threads)
    print(f"{case}: {result['seconds'] * 1e3:.0f} ms, {result['bytes'] / 1e6:.0f} MB", file=sys.stderr)
    return result


def row(results: dict[str, list[dict[str, float]]]) -> str:
    """The cells of one row: milliseconds (MB) of each method, and the ratios that are asked about."""
    ms = {name: 1e3 * statistics.median(each["seconds"] for each in runs) for name, runs in results.items()}
    mb = {name: statistics.median(each["bytes"] for each in runs) / 1e6 for name, runs in results.items()}
    cells = [f"{ms[name]:.0f} ({mb[name]:.0f})" for name in METHODS]
    return " | ".join([*cells, *(f"{ms['blocked'] / ms[other]:.2f}" for other in ("sdpa", "eager"))])


def main(options: Options) -> None:
    """Run every case in interleaved rounds, print the report, publish it where that was asked for."""
    ceilings = []
    table: dict[tuple[int, int | None, bool], dict[str, list[dict[str, float]]]]
    table = {key: {method: [] for method in METHODS} for key in cases(options.lengths)}
    for _ in range(options.rounds):
        ceilings.append(machine.ceilings(options.threads))
        for (length, window, backward), results in table.items():
            for method, runs in results.items():
                if not runs or runs[0]["seconds"] < BUDGET:
                    case = Case(method=method, length=length, window=window, backward=backward)
                    runs.append(one_case(case, options.threads))
    lines = [
        "| length | window | pass | eager | blocked | sdpa, no cap, no window | blocked / sdpa | blocked / eager |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (length, window, backward), results in table.items():
        name = "forward + backward" if backward else "forward"
        lines.append(f"| {length} | {window or 'none'} | {name} | {row(results)} |")
    report = "\n\n".join(
        [
            "## Attention",
            f"{machine.describe(options.threads)}. {machine.Ceilings.median(ceilings)}.",
            f"`{' '.join(['python', 'bench/attention.py', *sys.argv[1:]])}`: {HEADS} query and {KV_HEADS} key/value "
            f"heads of {HEAD_DIM}, bf16, batch 1; milliseconds and, in brackets, MB at the peak beside q, k and v; "
            f"medians of {options.rounds} interleaved rounds (one where a call takes more than {BUDGET:.0f} s).",
            "\n".join(lines),
        ]
    )
    print(report)
    if options.update:
        machine.publish(ROOT / "docs" / "benchmarks.md", "bench/attention.py", report)


def _entry(options: Options) -> None:
    if options.case is None:
        main(options)
    else:
        fields: dict[str, Any] = json.loads(options.case)
        print(json.dumps(measure(Case(**fields), options.threads)))


if __name__ == "__main__":
    _entry(tyro.cli(Options))
