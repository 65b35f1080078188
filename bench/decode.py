"""Reading a prompt and decoding at batch 1, side by side with llama.cpp and transformers, on the 2B shape.

Random bf16 weights (speed does not depend on their values), the same in every runner: the runners' logits after the
prompt must agree, else the comparison is void and the bench fails. Rounds interleave, each run is a process of its
own; every number is a median over rounds, with the smallest and largest beside it.

Decoding reads every weight once a token, so its ceiling is the read bandwidth: the share is
2 bytes x parameters x tokens/s over the bandwidth measured in the same round.

    python bench/decode.py [--update]                                   # half an hour on 2 cores
    python bench/decode.py --layers 2 --prompt 64 --new 4 --rounds 1    # a trial of the bench itself
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import machine
import numpy as np
import peers
import tyro
from machine import Ceilings

from gemwright.checkpoint import Checkpoint
from gemwright.config import ModelConfig

ROOT: Final = Path(__file__).resolve().parent.parent
OURS: Final = "gemwright"
UNPACKED: Final = "gemwright-unpacked"
BOUNDS: Final = {"llama.cpp": (1.5, 0.9), "transformers": (1.8, 1.5)}
"""What is asked for: our speed over a peer's, for the prompt and for decoding."""
LOAD_BOUNDS: Final = {UNPACKED: 1.15, OURS: 1.3}
"""Peak memory over the weights' bytes."""
AGREEMENT: Final = 0.99
"""Least correlation of two runners' logits: bf16 rounds differently in each, another model would be near 0."""

Run = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compare runners on a random Gemma 2."""

    work: Path = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "gemwright-bench"
    """Scratch folder for the models; the 2B shape takes 10.5 GB in it."""
    preset: str = "gemma-2-2b"
    layers: int | None = None
    """Layers instead of the preset's."""
    prompt: int = 512
    new: int = 32
    rounds: int = 3
    threads: int = machine.cores()
    runners: tuple[str, ...] = (OURS, "llama.cpp", "transformers")
    """Out of the keys of peers.PEERS; `transformers-fp32` is worth adding where bf16 is emulated."""
    update: bool = False
    """Replace this bench's section in docs/benchmarks.md."""

    def __post_init__(self) -> None:
        if OURS not in self.runners or not set(self.runners) <= peers.PEERS.keys():
            raise ValueError(f"runners: got {self.runners}, allowed are {OURS} and any of {', '.join(peers.PEERS)}")
        if min(self.prompt, self.new, self.rounds, self.threads) < 1:
            raise ValueError("prompt, new, rounds, threads: allowed is 1 or more of each")


def one_run(runner: str, folder: Path, *, prompt: int, new: int, threads: int) -> Run:
    """One runner's result, from a process of its own."""
    sizes = {"prompt": prompt, "new": new, "threads": threads}
    flags = [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
    script = Path(peers.__file__)
    result = machine.in_subprocess(script, ["run", "--peer", runner, "--model", str(folder), *flags], threads=threads)
    print(f"{runner}: {prompt / result['prefill_s']:.1f} / {new / result['decode_s']:.2f} tokens/s", file=sys.stderr)
    return result


def check_agreement(runs: dict[str, list[Run]]) -> float:
    """The least correlation of any runner's logits with the first one's; raises RuntimeError below AGREEMENT."""
    (first, base), *others = ((name, results[0]["logits"]) for name, results in runs.items())
    least = 1.0
    for name, logits in others:
        correlation = float(np.corrcoef(base, logits)[0, 1])
        least = min(least, correlation)
        if not correlation >= AGREEMENT:
            raise RuntimeError(f"logits of {name} and {first} correlate by {correlation:.4f}: not the same model")
    return least


def spread(values: Sequence[float], digits: int) -> str:
    """Median (smallest to largest)."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def speed_table(options: Options, runs: dict[str, list[Run]], ceilings: list[Ceilings], nbytes: int) -> str:
    """Tokens per second of every runner, and decoding as a share of the bandwidth of the same round."""
    lines = [
        f"| runner | prompt of {options.prompt}, tokens/s | decoding, tokens/s | share of read bandwidth |",
        "|---|---|---|---|",
    ]
    for results in runs.values():
        prompt = spread([options.prompt / each["prefill_s"] for each in results], 1)
        decode = [options.new / each["decode_s"] for each in results]
        shares = [rate * nbytes / (each.read * 1e9) for rate, each in zip(decode, ceilings, strict=True)]
        lines.append(
            f"| {results[0]['peer']} | {prompt} | {spread(decode, 2)} | {100 * statistics.median(shares):.0f} % |"
        )
    return "\n".join(lines)


def ratio_table(runs: dict[str, list[Run]]) -> str:
    """Our speed over each peer's: median over rounds of the ratio within a round, beside what is asked for."""
    lines = ["| gemwright over | prompt | asked | decoding | asked |", "|---|---|---|---|---|"]
    for peer in [name for name in runs if name != OURS]:
        cells = []
        for phase, key in enumerate(("prefill_s", "decode_s")):
            ratios = [theirs[key] / ours[key] for ours, theirs in zip(runs[OURS], runs[peer], strict=True)]
            bound = f"{BOUNDS[peer][phase]}" if peer in BOUNDS else "-"
            cells += [f"{statistics.median(ratios):.2f}", bound]
        lines.append(f"| {runs[peer][0]['peer']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def memory_table(runs: dict[str, list[Run]], nbytes: int) -> str:
    """Peak resident memory of the process, mapped pages included, over the bytes of the weights."""
    lines = ["| runner | peak while loading | at the end | asked | seconds to load |", "|---|---|---|---|---|"]
    for name, results in runs.items():
        load, end = (max(each[key] for each in results) / nbytes for key in ("load_peak", "run_peak"))
        seconds = statistics.median(each["load_s"] for each in results)
        lines.append(
            f"| {results[0]['peer']} | {load:.2f} x | {end:.2f} x | {LOAD_BOUNDS.get(name, '-')} | {seconds:.1f} |"
        )
    return "\n".join(lines)


def main(options: Options) -> None:
    """Run the rounds, print the report, and put it into docs/benchmarks.md where that was asked for."""
    folder = peers.prepare(options.work, options.preset, options.layers)
    config = ModelConfig.from_hf(Checkpoint(folder).config)
    nbytes = 2 * config.num_parameters()
    runs: dict[str, list[Run]] = {name: [] for name in options.runners}
    ceilings = []
    for _ in range(options.rounds):
        ceilings.append(machine.ceilings(options.threads))
        print(ceilings[-1], file=sys.stderr)
        for name, results in runs.items():
            results.append(one_run(name, folder, prompt=options.prompt, new=options.new, threads=options.threads))
        agreement = check_agreement(runs)
    unpacked = one_run(UNPACKED, folder, prompt=peers.WARM_UP, new=1, threads=options.threads)
    report = "\n\n".join(
        [
            "## Reading and decoding",
            f"{machine.describe(options.threads)}. {Ceilings.median(ceilings)}.",
            f"`{' '.join(['python', 'bench/decode.py', *sys.argv[1:]])}`: {options.preset}, {config.num_hidden_layers} "
            f"layers, {nbytes / 1e9:.2f} GB of bf16 weights, batch 1, {options.new} tokens decoded after a prompt of "
            f"{options.prompt}; {options.rounds} interleaved rounds, medians (smallest to largest). "
            f"Logits of all runners correlate by {agreement:.4f} or more.",
            speed_table(options, runs, ceilings, nbytes),
            ratio_table(runs),
            "Peak resident memory over the weights' bytes, Python and torch included; mapped pages count once touched.",
            memory_table({**runs, UNPACKED: [unpacked]}, nbytes),
        ]
    )
    print(report)
    if options.update:
        machine.publish(ROOT / "docs" / "benchmarks.md", "bench/decode.py", report)


if __name__ == "__main__":
    main(tyro.cli(Options))
