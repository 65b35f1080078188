"""gemwright bench engine: throughput and latency of the engine at given sizes, beside what the machine could do."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from tyro.conf import OmitArgPrefixes

from gemwright.cli.options import Flag, Loading, Model

if TYPE_CHECKING:
    from gemwright.lm import LM

BUFFER_BYTES = 512 * 2**20
"""Read to measure the bandwidth: far beyond any cache."""


@dataclass(frozen=True)
class Options:
    """Measure the engine: prompts of random ids are answered all at once.

    Reading is bound by arithmetic, decoding a few sequences by the bandwidth of the memory that holds the weights; both
    ceilings are measured beside, and shares of them are printed. Numbers are medians over the rounds.

    For example:

      gemwright bench engine --batch 32 --prompt 128 --new 128

      gemwright bench engine google/gemma-2-2b-it --batch 1 --prompt 512 --new 64 --json
    """

    model: Model = None
    """Folder or hub name."""
    batch: int = 8
    """Requests, all in flight at once."""
    prompt: int = 128
    """Tokens of each prompt."""
    new: int = 64
    """Tokens generated for each."""
    rounds: int = 3
    json: Flag = False
    """Print one JSON object."""
    loading: OmitArgPrefixes[Loading] = field(default_factory=Loading)

    def __post_init__(self) -> None:
        for name in ("batch", "prompt", "new", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name}: got {getattr(self, name)}, allowed is 1 or more")


@dataclass(frozen=True)
class Result:
    """Medians over the rounds."""

    prompt_tokens_per_s: float
    decode_tokens_per_s: float
    first_token_ms: float
    """Until the last of the batch has its first token."""
    step_ms: float
    """Median time between two tokens of a sequence."""
    step_p99_ms: float
    read_gb_per_s: float
    """Bandwidth measured beside."""
    gflops: float
    """Rate of a 512-row product with the model's own widest projection, measured beside."""
    bandwidth_share: float
    """Bytes of weights that a decoding step must read, a second, over the bandwidth."""
    arithmetic_share: float
    """Multiplications of reading the prompts, a second, over that rate."""


def run(options: Options) -> int:
    """Measure and print."""
    lm = options.loading.load(options.model)
    result = measure(lm, batch=options.batch, prompt=options.prompt, new=options.new, rounds=options.rounds)
    if options.json:
        print(json.dumps({"model": str(lm.folder), "batch": options.batch, **asdict(result)}))
        return 0
    print(f"{lm.folder}, {str(lm.dtype).removeprefix('torch.')} on {lm.device}")
    print(f"{options.batch} prompts of {options.prompt} tokens, {options.new} new tokens each, {options.rounds} rounds")
    read, decoded = 100 * result.arithmetic_share, 100 * result.bandwidth_share
    print(f"reading   {result.prompt_tokens_per_s:9.1f} tokens/s   {read:5.1f} % of the matmul rate")
    print(f"decoding  {result.decode_tokens_per_s:9.1f} tokens/s   {decoded:5.1f} % of the bandwidth")
    print(f"latency   {result.first_token_ms:9.1f} ms to the last first token")
    print(f"          {result.step_ms:9.1f} ms a token (median), {result.step_p99_ms:.1f} (99th percentile)")
    print(f"measured beside: {result.read_gb_per_s:.1f} GB/s read, {result.gflops:.0f} GFLOP/s")
    return 0


def measure(lm: LM, *, batch: int, prompt: int, new: int, rounds: int) -> Result:
    """Run the rounds, ceilings measured in each."""
    from gemwright.engine.engine import Engine

    engine = Engine(lm, rows=batch, budget=max(512, 2 * batch), cache_tokens=batch * (prompt + new + 64))
    _round(engine, 1, min(prompt, 32), 4)  # every weight touched, kernels built
    columns: dict[str, list[float]] = {name: [] for name in Result.__dataclass_fields__}
    config = lm.config
    inner = config.num_parameters() - config.vocab_size * config.hidden_size
    size = lm.dtype.itemsize
    for number in range(rounds):
        print(f"round {number + 1} of {rounds}", end="\r", file=sys.stderr, flush=True)
        engine.refresh()
        first, steps = _round(engine, batch, prompt, new)
        read, gflops = _bandwidth(lm), _matmul_rate(lm)
        step = statistics.median(steps) if steps else float("nan")
        row = {
            "prompt_tokens_per_s": batch * prompt / first,
            "decode_tokens_per_s": batch / step,
            "first_token_ms": 1e3 * first,
            "step_ms": 1e3 * step,
            "step_p99_ms": 1e3 * (statistics.quantiles(steps, n=100)[98] if len(steps) > 1 else step),
            "read_gb_per_s": read,
            "gflops": gflops,
            # a step reads every projection and, for the logits, the whole table
            "bandwidth_share": size * config.num_parameters() / step / (read * 1e9),
            "arithmetic_share": 2 * inner * batch * prompt / first / (gflops * 1e9),
        }
        for name, value in row.items():
            columns[name].append(value)
    print(" " * 20, end="\r", file=sys.stderr)
    return Result(**{name: statistics.median(values) for name, values in columns.items()})


def _round(engine: Any, batch: int, prompt: int, new: int) -> tuple[float, list[float]]:
    """Seconds until every request has its first token, and of each step after that."""
    import torch

    from gemwright.engine.request import Request
    from gemwright.sampling import SamplingParams

    params = SamplingParams(max_new_tokens=new, temperature=0, stop_ids=frozenset())
    for ids in torch.randint(3, engine.config.vocab_size, (batch, prompt)).tolist():
        engine.submit(Request(tokens=ids, params=params))
    waiting, steps = batch, []
    begin = last = time.perf_counter()
    started: set[str] = set()
    while engine.busy:
        for event in engine.step():
            started.add(event.id)
        now = time.perf_counter()
        if waiting and len(started) == batch:
            waiting, first = 0, now - begin
        elif not waiting:
            steps.append(now - last)
        last = now
    return first, steps


def _seconds(call: Callable[[], object]) -> float:
    call()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def _bandwidth(lm: LM) -> float:
    import torch

    buffer = torch.ones(BUFFER_BYTES // 4, device=lm.device)
    return BUFFER_BYTES / _seconds(lambda: float(buffer.sum())) / 1e9


def _matmul_rate(lm: LM) -> float:
    import torch

    linear = lm.model.model.layers[0].get_submodule("mlp.gate_proj")
    x_XD = torch.randn(512, lm.config.hidden_size, device=lm.device, dtype=lm.dtype)
    with torch.inference_mode():
        spent = _seconds(lambda: float(linear(x_XD)[0, 0]))
    return 2 * x_XD.numel() * lm.config.intermediate_size / spent / 1e9
