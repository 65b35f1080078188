"""The server beside its own engine, transformers' server and llama.cpp's, on the bundled model over real sockets.

`engine` takes the same prompts in the server's place, without HTTP, JSON and text: what the server adds is its cost.
All answers are greedy and as long as asked. The client is `gemwright bench serve` (a closed load); each server runs in
a process of its own, one at a time, rounds interleaved, numbers are medians over rounds.

transformers' server runs with continuous batching over a cache of the size that is needed; llama.cpp's is the program
`llama-server`, which its Python package does not bring, though its source archive has what to build it from: where
--llama-server is not given, it is left out.

    python bench/serve.py --llama-server PATH [--update]
    python bench/serve.py --rounds 1 --new 8 --load 1 8 --peers     # a trial: the server and its engine alone
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import gguf
import machine
import peers
import psutil
import tyro
from engine import bundled_folder
from machine import Ceilings

from gemwright.cli import bench_serve
from gemwright.config import ModelConfig

ROOT: Final = Path(__file__).resolve().parent.parent
TEXT_GGUF: Final = "model-bf16-text.gguf"
OURS: Final = "gemwright"
ROWS: Final = 32
BLOCK: Final = 32
"""Positions in a page of transformers' cache."""
PER_PLACE: Final = 2
"""Requests for each one in flight."""
ASKED: Final = {"engine": "0.9", "transformers": "1.5", "llama.cpp": "0.7"}
"""Least throughput of the server over another's at 8 and 32."""

Result = dict[str, Any]
Runs = dict[tuple[str, int], list[Result]]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure the server on the bundled model."""

    work: Path = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "gemwright-bench"
    """Scratch folder for llama.cpp's copy of the model."""
    load: tuple[int, ...] = (1, 8, 32)
    """Requests in flight."""
    words: int = 96
    new: int = 64
    rounds: int = 3
    threads: int = machine.cores()
    peers: tuple[str, ...] = ("llama.cpp", "transformers")
    llama_server: Path | None = None
    """llama.cpp's server program."""
    update: bool = False
    """Replace this bench's section in docs/benchmarks.md."""


def write_text_gguf(folder: Path) -> None:
    """llama.cpp's copy of the bundled model with its tokenizer, which is byte-level BPE."""

    def tokenizer(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
        spec = json.loads((folder / "tokenizer.json").read_text())
        special = {token["content"]: token["id"] for token in spec["added_tokens"]}
        by_id = {i: token for token, i in {**spec["model"]["vocab"], **special}.items()}
        control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list([by_id[i] for i in range(config.vocab_size)])
        writer.add_token_types([control if by_id[i] in special else normal for i in range(config.vocab_size)])
        writer.add_token_merges([" ".join(pair) for pair in spec["model"]["merges"]])
        writer.add_bos_token_id(special["<bos>"])
        writer.add_eos_token_id(special["<end_of_turn>"])
        writer.add_add_bos_token(True)

    if not (folder / TEXT_GGUF).exists():
        peers.write_gguf(folder, TEXT_GGUF, tokenizer)


def command(name: str, folder: Path, port: int, options: Options) -> list[str]:
    """The command line of a server."""
    if name == OURS:
        return [sys.executable, "-m", "gemwright", "serve", str(folder), "--port", str(port), "--rows", str(ROWS)]
    if name == "transformers":
        program = str(Path(sys.executable).with_name("transformers"))
        pages = ROWS * -(-context(options) // BLOCK)  # without a bound it takes what memory there is
        return [
            program, "serve", str(folder), "--continuous-batching", "--device", "cpu", "--dtype", "bfloat16",
            "--cb-block-size", str(BLOCK), "--cb-num-blocks", str(pages), "--cb-max-batch-tokens", "512",
            "--port", str(port),
        ]  # fmt: skip
    assert name == "llama.cpp" and options.llama_server is not None, name
    return [
        str(options.llama_server), "-m", str(folder / TEXT_GGUF), "--port", str(port), "-np", str(ROWS),
        "-c", str(ROWS * context(options)), "-t", str(options.threads), "--no-webui",
    ]  # fmt: skip


def context(options: Options) -> int:
    """Positions that one request needs at most."""
    return 4 * options.words + options.new


def fields(name: str, new: int) -> dict[str, Any]:
    """What each server needs to answer greedily and at full length."""
    if name == "transformers":
        return {"generation_config": json.dumps({"do_sample": False, "eos_token_id": -1}), "stream_options": None}
    return {"temperature": 0, **({"min_tokens": new} if name == OURS else {"ignore_eos": True})}


@contextmanager
def serving(name: str, folder: Path, options: Options) -> Iterator[tuple[str, int]]:
    """A server in a process of its own, once it answers; its URL and process id."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
    log = (options.work / f"{name}.log").open("w")
    process = subprocess.Popen(command(name, folder, port, options), env=environment, stdout=log, stderr=log)
    try:
        health = "ready" if name == OURS else "health"
        while True:
            if process.poll() is not None:
                raise RuntimeError(f"{name} ended with code {process.returncode}; see {log.name}")
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/{health}", timeout=5).close()
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1", process.pid
    finally:
        process.terminate()
        process.wait()
        log.close()


def over_http(name: str, folder: Path, load: int, options: Options) -> Result:
    """A server under load; `loop_cpu` and `client_cpu`: seconds of its first thread, and of this process."""
    with serving(name, folder, options) as (url, pid):
        chosen: dict[str, Any] = {"url": url, "model": str(folder) if name == "transformers" else "tgi"}
        chosen |= {"words": (options.words,), "concurrency": load}
        warm = bench_serve.Options(requests=2, new=2, extra=json.dumps(fields(name, 2)), **chosen)
        asyncio.run(bench_serve.drive(warm))
        extra = json.dumps(fields(name, options.new))
        wanted = bench_serve.Options(requests=PER_PLACE * load, new=options.new, extra=extra, seed=1, **chosen)
        before = first_thread(pid), time.process_time()
        result = bench_serve.summary(asyncio.run(bench_serve.drive(wanted)))
        spent = first_thread(pid) - before[0], time.process_time() - before[1]
        return result | {"loop_cpu": spent[0], "client_cpu": spent[1]}


def first_thread(pid: int) -> float:
    """Seconds of processor time that a process's first thread has had: of our server, the event loop's."""
    (found,) = [thread for thread in psutil.Process(pid).threads() if thread.id == pid]
    return float(found.user_time + found.system_time)


def engine_alone(folder: Path, load: int, words: int, new: int) -> Result:
    """The same load on the engine in this process."""
    import gemwright
    from gemwright.engine.engine import Engine
    from gemwright.engine.request import Request

    lm = gemwright.load(folder, device="cpu")
    engine = Engine(lm, rows=ROWS, budget=512)
    list(engine.stream([Request(tokens=[5] * 64, params=lm.params(max_new_tokens=2))]))
    params = lm.params(max_new_tokens=new, min_new_tokens=new, temperature=0)
    wanted = bench_serve.Options(requests=PER_PLACE * load, words=(words,), seed=1)
    waiting = [lm.encode(body["prompt"]) for body in bench_serve.bodies(wanted)]
    flying: dict[str, bench_serve.Record] = {}
    records = []
    begun = time.perf_counter()
    while waiting or flying:
        while waiting and len(flying) < load:
            tokens = waiting.pop(0)
            record = bench_serve.Record(time.perf_counter() - begun, prompt_tokens=len(tokens), new_tokens=new)
            flying[engine.submit(Request(tokens=tokens, params=params))] = record
        for event in engine.step():
            record = flying[event.id]
            record.end = time.perf_counter() - begun
            record.times.append(record.end)
            if event.finish is not None:
                records.append(flying.pop(event.id))
    return bench_serve.summary(records)


def case(model: Path, load: int, words: int, new: int, threads: int) -> None:
    """Run the engine's case and print its JSON line."""
    import torch

    torch.set_num_threads(threads)
    print(json.dumps(engine_alone(model, load, words, new)))


# --- report ----------------------------------------------------------------------------------------------------------


def middle(runs: Runs, name: str, load: int, key: str) -> float:
    """Median over rounds; `first_token_ms p50` is a part of a part."""
    part, _, percentile = key.partition(" ")
    return statistics.median(float(run[part][percentile] if percentile else run[part]) for run in runs[name, load])


def rate_table(runs: Runs) -> str:
    """Throughput and latency of all."""
    lines = [
        "| | in flight | new tokens/s | first token p50, ms | p99 | between tokens p50, ms | failed |",
        "|---|---|---|---|---|---|---|",
    ]
    columns = ("new_tokens_per_s", "first_token_ms p50", "first_token_ms p99", "between_tokens_ms p50")
    for name, load in runs:
        if all(run["failed"] == 0 for run in runs[name, load]):
            cells = [f"{middle(runs, name, load, key):.1f}" for key in columns]
        else:
            cells = ["-"] * len(columns)
        failed = sum(run["failed"] for run in runs[name, load])
        lines.append(f"| {name} | {load} | {' | '.join(cells)} | {failed} |")
    return "\n".join(lines)


def cost_table(runs: Runs, options: Options) -> str:
    """What HTTP, JSON and text take beside the engine: processor time of the server's event loop, and of the client."""
    lines = ["| in flight | server, ms a request | server, ms a token | client, ms a token |", "|---|---|---|---|"]
    for load in options.load:
        requests, tokens = PER_PLACE * load, PER_PLACE * load * options.new
        server, client = (1e3 * middle(runs, OURS, load, key) for key in ("loop_cpu", "client_cpu"))
        lines.append(f"| {load} | {server / requests:.1f} | {server / tokens:.2f} | {client / tokens:.2f} |")
    return "\n".join(lines)


def ratio_table(runs: Runs) -> str:
    """Our throughput over each other's: median over rounds of the ratio within a round."""
    lines = ["| gemwright serve over | in flight | came | asked |", "|---|---|---|---|"]
    key = "new_tokens_per_s"
    for name, load in runs:
        if name == OURS or load == 1:
            continue
        pairs = zip(runs[OURS, load], runs[name, load], strict=True)
        ratios = [ours[key] / theirs[key] for ours, theirs in pairs if theirs["failed"] == 0]
        came = f"{statistics.median(ratios):.2f}" if ratios else "requests failed"
        lines.append(f"| {name} | {load} | {came} | {ASKED[name]} |")
    return "\n".join(lines)


def main(options: Options) -> None:
    """Run the rounds, print the report, and put it into docs/benchmarks.md where that was asked for."""
    folder = bundled_folder(options.work)
    others = [name for name in options.peers if name != "llama.cpp" or options.llama_server is not None]
    if "llama.cpp" in others:
        write_text_gguf(folder)
    runs: Runs = {(name, load): [] for load in options.load for name in ("engine", OURS, *others)}
    ceilings = []
    for _ in range(options.rounds):
        ceilings.append(machine.ceilings(options.threads))
        for name, load in runs:
            if name == "engine":
                sizes = {"load": load, "words": options.words, "new": options.new, "threads": options.threads}
                flags = [word for key, size in sizes.items() for word in (f"--{key}", str(size))]
                arguments = ["case", "--model", str(folder), *flags]
                result: Result = machine.in_subprocess(Path(__file__), arguments, threads=options.threads)
            else:
                result = over_http(name, folder, load, options)
            runs[name, load].append(result)
            print(name, load, json.dumps(result), file=sys.stderr)
    report = "\n\n".join(
        [
            "## The server",
            f"{machine.describe(options.threads)}. {Ceilings.median(ceilings)}.",
            f"`{' '.join(['python', 'bench/serve.py', *sys.argv[1:]])}`: the bundled model, bf16, greedy, prompts of "
            f"{options.words} words, {options.new} new tokens, streamed, {PER_PLACE} requests for each in flight; "
            f"{options.rounds} interleaved rounds, medians. The client shares the cores with the server.",
            rate_table(runs),
            "What the server adds to its engine, and what the client takes of the same cores: processor time of the "
            "server's event loop (HTTP, JSON, text) and of the load generator, over requests and new tokens:",
            cost_table(runs, options),
            "Throughput:",
            ratio_table(runs),
        ]
    )
    print(report)
    if options.update:
        machine.publish(ROOT / "docs" / "benchmarks.md", "bench/serve.py", report)


if __name__ == "__main__":
    if sys.argv[1:2] == ["case"]:
        tyro.cli(case, args=sys.argv[2:])
    else:
        main(tyro.cli(Options))
