"""The machine under a benchmark: its ceilings, and how a measurement is taken on it.

A speed means little without what the processor could have done in the same minutes, so every bench measures these
beside its own numbers: bytes read from memory a second (what decoding at batch 1 is bound by) and floating-point
operations a second of the matrix products torch offers (what reading a prompt is bound by).

Each measurement runs in a process of its own with its threads, one thread a core: memory is given back, nothing
is warm from a rival, and rivals can take turns (A B C A B C), so that a slow minute hurts all of them alike.

    python bench/machine.py [--threads 2]
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import tyro
from torch.nn import functional as F

READ_BYTES: Final = 2**30
"""Buffer of the bandwidth measurement: far beyond any cache."""
ROWS, INNER, OUTER = 512, 2304, 2304
"""A prompt of 512 tokens against one attention projection of the 2B shape."""


def cores() -> int:
    """Processors this process may run on."""
    return len(os.sched_getaffinity(0))


def pinned(threads: int) -> dict[str, str]:
    """The environment of a measurement: this one, with `threads` OpenMP threads.

    They are not bound to cores: torch and llama.cpp each bring an OpenMP runtime, the second reads the places from the
    mask that the first has narrowed, and binds all its threads to one core (seen: half the speed of both).
    """
    return {**os.environ, "OMP_NUM_THREADS": str(threads)}


def in_subprocess(script: Path, arguments: list[str], *, threads: int) -> dict[str, Any]:
    """Run a bench script pinned and alone; the JSON object on its last line. Raises RuntimeError with its stderr."""
    command = [sys.executable, str(script), *arguments]
    done = subprocess.run(command, env=pinned(threads), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: exit {done.returncode}\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def seconds(call: Callable[[], object], *, repeats: int = 5) -> float:
    """Median seconds of `call`, after one call to warm up."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def memory(field: str) -> int:
    """Bytes of this process: `VmRSS` now, or `VmHWM` at its peak.

    Not getrusage's ru_maxrss, which a child inherits from the parent it was forked from.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"field: got {field!r}, allowed is a size in /proc/self/status")


def forget_peak() -> None:
    """Let `VmHWM` start again from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


@dataclass(frozen=True)
class Ceilings:
    """What the processor can do: GB/s read, GFLOP/s of a [512, 2304] x [2304, 2304] product.

    `packed` is oneDNN's linear with its weight laid out beforehand; None where oneDNN has no such kernel here.
    """

    read: float
    fp32: float
    fp32_packed: float | None
    bf16: float
    bf16_packed: float | None

    def __str__(self) -> str:
        """One sentence for a report."""
        gflops = {
            "fp32": self.fp32,
            "fp32 packed": self.fp32_packed,
            "bf16": self.bf16,
            "bf16 packed": self.bf16_packed,
        }
        named = (f"{name} {value:.0f}" if value else f"{name} -" for name, value in gflops.items())
        return f"read {self.read:.1f} GB/s; GFLOP/s: {', '.join(named)}"

    @classmethod
    def median(cls, rounds: list[Ceilings]) -> Ceilings:
        """Each ceiling's median over rounds."""
        return cls._joined(rounds, statistics.median)

    @classmethod
    def most(cls, rounds: list[Ceilings]) -> Ceilings:
        """The most that was seen: a shared processor's matrix unit may do two fifths of it for a minute."""
        return cls._joined(rounds, max)

    @classmethod
    def _joined(cls, rounds: list[Ceilings], join: Callable[[list[float]], float]) -> Ceilings:
        names = [field.name for field in dataclasses.fields(cls)]
        columns: dict[str, list[Any]] = {name: [getattr(each, name) for each in rounds] for name in names}
        joined: dict[str, Any] = {name: None if None in xs else join(xs) for name, xs in columns.items()}
        return cls(**joined)


def measure(threads: int) -> Ceilings:
    """Measure the ceilings with `threads` threads; a few seconds, 1 GiB."""
    torch.set_num_threads(threads)
    buffer = torch.ones(READ_BYTES // 4)
    read = READ_BYTES / seconds(buffer.sum) / 1e9
    del buffer
    x, weight = torch.randn(ROWS, INNER), torch.randn(OUTER, INNER)
    x16, weight16 = x.bfloat16(), weight.bfloat16()
    return Ceilings(
        read=read,
        fp32=_gflops(lambda: F.linear(x, weight)),
        fp32_packed=_packed_gflops(x, weight),
        bf16=_gflops(lambda: F.linear(x16, weight16)),
        bf16_packed=_packed_gflops(x16, weight16),
    )


def _gflops(product: Callable[[], object]) -> float:
    return 2 * ROWS * INNER * OUTER / seconds(product, repeats=3) / 1e9


def _packed_gflops(x: torch.Tensor, weight: torch.Tensor) -> float | None:
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
    except RuntimeError:  # oneDNN: "bf16 path needs the cpu support avx_ne_convert or avx512bw, ..."
        return None
    return _gflops(lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], ""))


def describe(threads: int) -> str:
    """The machine in one line: processor, vector instructions, cores, threads, versions, day."""
    info = Path("/proc/cpuinfo").read_text().splitlines()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in info)}
    model = fields.get("model name", platform.machine())
    family = f"family {fields.get('cpu family', '?')} model {fields.get('model', '?')}"
    vectors = torch.backends.cpu.get_cpu_capability()
    bf16 = "bf16" if {"avx512_bf16", "amx_bf16"} & set(fields.get("flags", "").split()) else "no bf16"
    return (
        f"{model} ({family}, {vectors}, {bf16} instructions), {cores()} cores, {threads} threads, "
        f"torch {torch.__version__}, {datetime.date.today().isoformat()}"
    )


def publish(document: Path, section: str, text: str) -> None:
    """Replace a section of a Markdown document, between two comments that name it; append it where it is new."""
    begin, end = f"<!-- {section} -->", f"<!-- end of {section} -->"
    old = document.read_text() if document.exists() else "# Benchmarks\n"
    block = f"{begin}\n{text.strip()}\n{end}\n"
    head, found, tail = old.partition(f"{begin}\n")
    rest = tail.partition(f"{end}\n")[2] if found else ""
    document.parent.mkdir(parents=True, exist_ok=True)
    document.write_text((head if found else f"{head.rstrip()}\n\n") + block + rest)


def ceilings(threads: int) -> Ceilings:
    """`measure` in a process of its own, pinned."""
    return Ceilings(**in_subprocess(Path(__file__), ["--threads", str(threads), "--json"], threads=threads))


def main(threads: int = cores(), json: bool = False) -> None:
    """Print this machine's line and ceilings.

    Args:
        threads: threads to measure with.
        json: print the ceilings alone, as one JSON line, measured in this process.
    """
    if json:
        print(_line(measure(threads)))
    else:
        print(describe(threads), ceilings(threads), sep="\n")


def _line(result: Ceilings) -> str:
    return json.dumps(dataclasses.asdict(result))


if __name__ == "__main__":
    tyro.cli(main)
