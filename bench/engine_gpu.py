"""The engine on a GPU: the 2B shape in bf16 with random weights made on the device, no file and no text.

Parts, each in a process of its own with a time limit, so that one that fails costs the others nothing:

    machine      bandwidth and matmul rate: what the rest is measured against
    one          batch 1: milliseconds of a recorded pass in its variants, and tokens a second through the engine
    many         512 requests (prompts up to 512 tokens, answers of 128 to 512): tokens a second through the engine
    static       transformers' generate with a compiled static cache, batch 1
    continuous   transformers' generate_batch over the same 512 requests

    python bench/engine_gpu.py [--parts machine one many] [--out DIR] [--update]

`--out` receives the numbers and what explains them (kernel times, the engine's Python profile) as JSON, the output of a
part that failed, and the section for docs/benchmarks.md, which `--update` puts there.
"""

from __future__ import annotations

import argparse
import cProfile
import dataclasses
import datetime
import io
import json
import logging
import pstats
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from gemwright.config import ModelConfig
from gemwright.engine.captured import DECODE, PROMPT, ROW
from gemwright.engine.engine import Engine
from gemwright.engine.request import Request
from gemwright.model import Gemma2
from gemwright.ops.attention import Attention
from gemwright.sampling import SamplingParams

LIMITS: Final = {"machine": 40, "one": 80, "many": 100, "static": 150, "continuous": 150}
"""Seconds."""
TILES: Final = [
    dict(ROWS=rows, WIDTH=width, STAGES=stages, num_warps=warps)
    for rows, width, stages, warps in ((2, 1024, 3, 4), (4, 512, 4, 2), (2, 256, 6, 1), (2, 512, 5, 2), (1, 512, 5, 2))
]
"""Of the one-row product, tried beside its own."""
SPEC: Final = {"H100": 3.35e12, "H200": 4.8e12}
"""Bytes a second by the data sheets."""


def random_model(preset: str = "gemma-2-2b") -> Gemma2:
    """A preset's shape with normal weights of deviation 0.02 in bf16 on the GPU."""
    config = ModelConfig.preset(preset)
    chosen = Attention.resolve(
        device="cuda", dtype=torch.bfloat16, cap=config.attn_logit_softcapping, window=config.sliding_window
    )
    with torch.device("meta"):
        model = Gemma2(config, chosen)
    for name, shape in config.parameter_shapes().items():
        weight = torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_(0, 0.02)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, torch.nn.Parameter(weight, requires_grad=False))
    model.tie()
    return model.eval()


def milliseconds(call: Callable[[], object], repeats: int = 30) -> float:
    """Median device time of a call, by events."""
    for _ in range(3):
        call()
    times: list[float] = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times)[len(times) // 2]


# --- parts -----------------------------------------------------------------------------------------------------------


def machine() -> dict[str, float]:
    """Bytes a second of a large copy (read and written) and of reading alone; FLOP/s of a large product."""
    a = torch.randn(2**31, device="cuda", dtype=torch.bfloat16)
    b = torch.empty_like(a)
    copied = 2 * a.nbytes / milliseconds(lambda: b.copy_(a), 10) * 1e3
    read = a.nbytes / milliseconds(lambda: a.view(torch.float32).sum(), 10) * 1e3
    x, y = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in "xy")
    return {"copy": copied, "read": read, "flops": 2 * 8192**3 / milliseconds(lambda: x @ y, 10) * 1e3}


def one() -> dict[str, Any]:
    """Batch 1: a recorded pass in its variants, and the engine's steps with the best of them."""
    from gemwright.engine import captured
    from gemwright.ops import decode_kernels

    model = random_model()
    found: dict[str, Any] = {}
    engine = Engine(model, rows=1, cache_tokens=16384)
    ids = random.Random(0).choices(range(3, 250_000), k=128)
    params = SamplingParams(max_new_tokens=200, temperature=0, stop_ids=frozenset())
    run(engine, [Request(tokens=ids, params=dataclasses.replace(params, max_new_tokens=4))])
    steps = engine._steps
    assert steps is not None and steps.fused, "the pass is not the fused one"
    layers = steps.layers
    variants: dict[str, tuple[Any, bool, dict[str, int]]] = {
        "fused, own one-row product": (layers, True, decode_kernels.TILE),
        "fused": (layers, False, decode_kernels.TILE),
        "the model's": ([], False, decode_kernels.TILE),
    }
    for tile in TILES:
        variants["fused, own {ROWS}x{WIDTH}/{STAGES}/{num_warps}".format(**tile)] = (layers, True, tile)
    for name, (weights, one_row, tile) in variants.items():
        steps.layers, steps.one_row = weights, one_row
        decode_kernels.TILE = tile
        try:
            with torch.inference_mode():
                graph, _ = steps.record(1, 1)
                found[f"pass, {name}"] = milliseconds(graph.replay)
        except Exception as error:
            print(f"variant {name!r} failed: {type(error).__name__}: {str(error)[:500]}")
    own = {name: ms for name, ms in found.items() if "own" in name}
    best = min(own, key=own.__getitem__)
    steps.layers, steps.one_row, decode_kernels.TILE = layers, own[best] <= found["pass, fused"], variants[best[6:]][2]
    found["best"] = best
    steps.forget()
    with torch.inference_mode():
        found["pass, not recorded"] = milliseconds(lambda: steps.compute(1, 1), 10)
    run(engine, [Request(tokens=ids, params=params)])
    times = run(engine, [Request(tokens=ids, params=params)])[1]
    found["step"] = 1e3 * sorted(times)[len(times) // 2]
    long = random.Random(1).choices(range(3, 250_000), k=7000)
    times = run(engine, [Request(tokens=long, params=dataclasses.replace(params, max_new_tokens=64))])[1]
    found["step at 7000"] = 1e3 * sorted(times[5:])[len(times[5:]) // 2]
    sampled = dataclasses.replace(params, temperature=0.8, top_k=50, top_p=0.95, seed=1, max_new_tokens=64)
    times = run(engine, [Request(tokens=ids, params=sampled)])[1]
    found["step, top-k and top-p"] = 1e3 * sorted(times)[len(times) // 2]
    found["agreement"] = agreement(model, captured, engine)
    found["kernels"] = kernel_times(steps._graphs[1, 1][0].replay)
    print("\n".join(found["kernels"][:16]), flush=True)
    return found


def agreement(model: Gemma2, captured: Any, engine: Engine) -> float:
    """Relative error of a recorded pass against the model's own forward pass, both bf16, over the same pages."""
    from gemwright.engine.paged import Chunk, PagedCache, read
    from gemwright.engine.scheduler import GLOBAL, LOCAL, Kind, Table

    caches = [PagedCache(model, {GLOBAL: 40, LOCAL: 40}) for _ in range(2)]
    ids = random.Random(2).choices(range(3, 250_000), k=300)
    tables: dict[Kind, Table] = {kind: Table(0, list(range(20, 30)), 0) for kind in (GLOBAL, LOCAL)}
    steps = captured.Steps(model, caches[0], context=8192)
    with torch.inference_mode():
        for cache in caches:
            read(model, cache, [Chunk(ids[:-1], 0, tables)])
        last = [Chunk(ids[-1:], len(ids) - 1, tables)]
        got, (want,) = steps.decode(last).logits_XV, read(model, caches[1], last)
        want = model.logits(want)
    return float((got - want).norm() / want.norm())


def load() -> list[tuple[list[int], int]]:
    """512 requests: prompts of 64 to 512 ids, answers of 128 to 512."""
    rng = random.Random(0)
    return [(rng.choices(range(3, 250_000), k=rng.randint(64, 512)), rng.randint(128, 512)) for _ in range(512)]


def many() -> dict[str, Any]:
    """512 requests at once through the engine."""
    model = random_model()
    found: dict[str, Any] = {}
    for rows, budget in ((256, 2048), (512, 4096)):
        engine = Engine(model, rows=rows, budget=budget)
        warm = [Request(tokens=ids, params=greedy(3)) for ids, _ in load()[:rows]]
        run(engine, warm)
        steps = engine._steps
        assert steps is not None
        with torch.inference_mode():
            begin = time.perf_counter()
            # the largest first: it makes room for the logits of all
            sizes = [(size, 1) for size in reversed(DECODE) if size <= rows]
            sizes += [(size, ROW) for size in PROMPT if size * ROW <= budget]
            for size in sizes:
                steps.record_ahead(*size)
            print(f"{len(steps._graphs)} graphs, {time.perf_counter() - begin:.1f} s", flush=True)
        engine.refresh()
        requests = [Request(tokens=ids, params=greedy(new)) for ids, new in load()]
        begin = time.perf_counter()
        made, times = run(engine, requests, limit=40)
        spent = time.perf_counter() - begin
        found[str(rows)] = {
            "tokens_per_s": made / spent, "tokens": made, "seconds": spent, "steps": len(times),
            "median_step_ms": 1e3 * sorted(times)[len(times) // 2], "preemptions": engine.stats.preemptions,
            "errors": engine.stats.errors,
        }  # fmt: skip
        print(found, flush=True)
        if rows == 256:
            found["profile"] = profiled(engine)
        engine.release()
        del engine, steps
        torch.cuda.empty_cache()
    return found


def profiled(engine: Engine) -> dict[str, list[str]]:
    """Where the steps of 256 decoding rows spend their time: kernels of one pass, and Python."""
    requests = [Request(tokens=ids[:300], params=greedy(60)) for ids, _ in load()[:256]]
    for request in requests:
        engine.submit(request)
    for _ in range(45):
        engine.step()
    profile = cProfile.Profile()
    profile.enable()
    for _ in range(10):
        engine.step()
    profile.disable()
    text = io.StringIO()
    pstats.Stats(profile, stream=text).sort_stats("tottime").print_stats(35)
    found = {"python": text.getvalue().splitlines()}
    steps = engine._steps
    if steps is not None and steps._graphs:
        rows = max(rows for rows, tokens in steps._graphs if tokens == 1)
        graph = steps._graphs[rows, 1][0]
        found["kernels"] = kernel_times(graph.replay)
        print("\n".join(found["kernels"][:12]), flush=True)
        print(f"pass of {rows} rows: {milliseconds(graph.replay, 10):.2f} ms", flush=True)
        for size in sorted(size for size in steps._graphs if size[1] > 1):
            print(f"prompt of {size}: {milliseconds(steps._graphs[size][0].replay, 5):.2f} ms", flush=True)
    while engine.busy:
        engine.step()
    return found


def kernel_times(call: Callable[[], object]) -> list[str]:
    """A table of kernels by time."""
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        call()
        torch.cuda.synchronize()
    found: dict[str, list[float]] = {}
    for event in recorded.events() or ():
        found.setdefault(event.name, []).append(event.device_time_total)
    rows = sorted(found.items(), key=lambda row: -sum(row[1]))
    lines = [f"{sum(us):9.1f} us {len(us):5d} x {sum(us) / len(us):8.2f}  {name[:110]}" for name, us in rows[:40]]
    return [f"{sum(map(sum, found.values())):9.1f} us in kernels", *lines]


def greedy(new: int) -> SamplingParams:
    return SamplingParams(max_new_tokens=new, temperature=0, stop_ids=frozenset())


def run(engine: Engine, requests: Sequence[Request], limit: float = 60) -> tuple[int, list[float]]:
    """Tokens made, and the seconds of each step that made some."""
    idents = [engine.submit(request) for request in requests]
    made, times, begin = 0, [], time.perf_counter()
    while engine.busy and time.perf_counter() - begin < limit:
        start = time.perf_counter()
        events = engine.step()
        errors = [event.error for event in events if event.error]
        assert not errors, errors[0]
        if count := sum(event.token is not None for event in events):
            made += count
            times.append(time.perf_counter() - start)
    assert times, "no token was made"
    for ident in idents if engine.busy else ():
        engine.cancel(ident)
    engine.step()
    return made, times


# --- peers -----------------------------------------------------------------------------------------------------------


def transformers_model(attention: str) -> Any:
    """transformers' Gemma 2 of the same shape, random weights in bf16 on the GPU."""
    import transformers

    config = transformers.Gemma2Config(**ModelConfig.preset("gemma-2-2b").to_hf())
    config._attn_implementation = attention
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = transformers.Gemma2ForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return model.eval()


def static() -> dict[str, Any]:
    """generate with cache_implementation="static", whose decoding step transformers compiles."""
    model = transformers_model("eager")
    ids = torch.randint(3, 250_000, (1, 128), device="cuda")

    def generate(new: int) -> float:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False,
                cache_implementation="static",
            )  # fmt: skip
        torch.cuda.synchronize()
        return time.perf_counter() - begin

    compiled = generate(200)
    again, short = generate(200), generate(8)
    return {"first_call_s": compiled, "step": 1e3 * (again - short) / 192, "tokens_per_s": 192 / (again - short)}


def continuous() -> dict[str, Any]:
    """generate_batch: as many of the 512 requests as its time limit allows."""
    import transformers

    errors = []
    for attention in ("paged|eager", "eager_paged", "sdpa_paged", "paged|sdpa"):
        try:
            model = transformers_model(attention)
            config = transformers.GenerationConfig(max_new_tokens=256, do_sample=False, eos_token_id=-1, pad_token_id=0)
            model.generate_batch(inputs=[ids for ids, _ in load()[:2]], generation_config=config, progress_bar=False)
            begin = time.perf_counter()
            # it takes one length for all answers: the load's mean
            inputs = [ids for ids, _ in load()[:256]]
            answers = model.generate_batch(inputs=inputs, generation_config=config, progress_bar=False)
            spent = time.perf_counter() - begin
            made = sum(len(answer.generated_tokens) for answer in answers.values())
            return {"tokens_per_s": made / spent, "tokens": made, "seconds": spent, "attention": attention}
        except Exception as error:
            errors.append(f"{attention}: {type(error).__name__}: {str(error)[:300]}")
            torch.cuda.empty_cache()
    raise RuntimeError("; ".join(errors))


# --- report ----------------------------------------------------------------------------------------------------------

PARTS: Final[dict[str, Callable[[], dict[str, Any]]]] = {
    "machine": machine, "one": one, "many": many, "static": static, "continuous": continuous,
}  # fmt: skip


def report(found: dict[str, Any]) -> str:
    """The section of docs/benchmarks.md."""
    name = torch.cuda.get_device_name()
    size = 2 * ModelConfig.preset("gemma-2-2b").num_parameters()
    ceiling, spec = found.get("machine", {}), next((v for k, v in SPEC.items() if k in name), float("nan"))
    read = max(ceiling.get("read", float("nan")), ceiling.get("copy", 0.0))
    lines = [
        "## The engine on a GPU",
        "",
        f"{name}, torch {torch.__version__}, {datetime.date.today().isoformat()}; 2B shape, bf16, random weights. "
        f"Measured beside: {read / 1e12:.2f} TB/s, {ceiling.get('flops', float('nan')) / 1e12:.0f} TFLOP/s.",
        "",
        "| batch 1, prompt of 128 | ms a token | tokens/s | of the measured bandwidth | of the data sheet's |",
        "|---|---|---|---|---|",
    ]
    steps = {name: ms for name, ms in found.get("one", {}).items() if name.startswith(("step", "pass"))}
    if "step" in found.get("static", {}):
        steps["transformers, static cache, compiled"] = found["static"]["step"]
    for name, ms in steps.items():
        rate = size / ms * 1e3
        lines.append(f"| {name} | {ms:.2f} | {1e3 / ms:.0f} | {100 * rate / read:.0f} % | {100 * rate / spec:.0f} % |")
    lines += ["", "| 512 requests | tokens/s | seconds | steps |", "|---|---|---|---|"]
    for rows, result in found.get("many", {}).items():
        if rows.isdecimal():
            lines.append(
                f"| engine, {rows} rows | {result['tokens_per_s']:.0f} | {result['seconds']:.1f} | {result['steps']} |"
            )
    if "tokens_per_s" in found.get("continuous", {}):
        result = found["continuous"]
        lines.append(f"| transformers, generate_batch | {result['tokens_per_s']:.0f} | {result['seconds']:.1f} | - |")
    lines += ["", *(f"{part}: {result['failed']}" for part, result in found.items() if "failed" in result)]
    return "\n".join(lines)


def in_time(part: str, out: Path) -> dict[str, Any]:
    """A part in its own process: its result, or why there is none."""
    command = [sys.executable, __file__, "--part", part]
    begin = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMITS[part])
        text, failed = done.stdout + done.stderr, done.returncode != 0
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1][:300]
    except subprocess.TimeoutExpired as late:
        text = "".join((x.decode() if isinstance(x, bytes) else x or "") for x in (late.stdout, late.stderr))
        failed, reason = True, f"not done after {LIMITS[part]} s"
    print(f"--- {part}: {time.perf_counter() - begin:.0f} s", flush=True)
    if failed:
        (out / f"{part}.log").write_text(text)
        print(text[-1500:], flush=True)
        return {"failed": reason}
    *said, last = done.stdout.splitlines()
    print("\n".join([*said, done.stderr[-1000:]]), flush=True)
    result: dict[str, Any] = json.loads(last)
    return result


def main() -> None:
    """Run the parts, print the report."""
    parser = argparse.ArgumentParser(description="The engine on a GPU.")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--part", choices=list(PARTS), help="run one part here, print its JSON line")
    parser.add_argument("--out", type=Path, default=Path("/tmp/gemwright-engine-gpu"))
    parser.add_argument("--update", action="store_true", help="put the section into docs/benchmarks.md")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    options.out.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(level=logging.WARNING)
    if options.part:
        print(json.dumps(PARTS[options.part]()))
        return
    found = {part: in_time(part, options.out) for part in options.parts}
    text = report(found)
    (options.out / "engine_gpu.json").write_text(json.dumps(found, indent=1))
    (options.out / "engine_gpu.md").write_text(text)
    print(text)
    if options.update:
        from machine import publish

        publish(Path(__file__).resolve().parent.parent / "docs" / "benchmarks.md", "bench/engine_gpu.py", text)


if __name__ == "__main__":
    main()
