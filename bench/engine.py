"""The engine beside the plain loop, transformers and llama.cpp, on the bundled model: many sequences and one.

Each case runs in a process of its own and prints one JSON line; rounds interleave the cases, every number is a median
over rounds. `loop` is `generate.py`, which schedules nothing: what the engine needs beyond it is its overhead. Time
outside the linears is a step's time less that of its linears alone, run back to back on the same rows.

    python bench/engine.py [--update]                      # 15 minutes on 2 cores
    python bench/engine.py --rounds 1 --new 16 --only throughput
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import machine
import numpy as np
import peers
import torch
import tyro
from machine import Ceilings

ROOT: Final = Path(__file__).resolve().parent.parent
EDIT: Final = (
    "Repeat this text word for word, and put 'river' for 'lake': The lake is long and cold. In summer the boats cross "
    "the lake from the village to the forest, and in winter the children walk over the lake to school. Nobody knows "
    "how deep the lake is. An old story says that a bell lies at the bottom of the lake, and rings before a storm."
)
FREE: Final = "Tell me a story about a fox who learns to read."
SCHEMA: Final = json.dumps(
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 30},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "hobbies": {"type": "array", "items": {"type": "string", "maxLength": 20}, "minItems": 2, "maxItems": 6},
            "story": {"type": "string", "maxLength": 400},
        },
        "required": ["name", "age", "hobbies", "story"],
        "additionalProperties": False,
    }
)
ASKED: Final = {
    "overhead": "at most 0.3 ms",
    "transformers 32": "1.5",
    "transformers 1": "1.5",
    "llama.cpp 32": "0.7",
    "second turn": "at most 0.20",
    "lookup, editing": "1.5",
    "constrained": "0.85",
}

Part = Literal["throughput", "turns", "lookup", "constrained"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure the engine on the bundled model."""

    work: Path = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "gemwright-bench"
    """Scratch folder for llama.cpp's copy of the model."""
    prompt: int = 128
    new: int = 64
    rounds: int = 3
    threads: int = machine.cores()
    only: tuple[Part, ...] = ("throughput", "turns", "lookup", "constrained")
    peers: tuple[str, ...] = ("llama.cpp", "transformers")
    update: bool = False
    """Replace this bench's section in docs/benchmarks.md."""


def bundled_folder(work: Path) -> Path:
    """The bundled model as a folder that holds llama.cpp's copy of it, too."""
    from gemwright import bundled

    source, folder = bundled.folder(), work / "bundled"
    folder.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if not (folder / file.name).exists():
            (folder / file.name).symlink_to(file)
    if not (folder / peers.GGUF_FILE).exists():
        peers.write_gguf(folder)
    return folder


def texts(vocab: int, batch: int, prompt: int) -> list[list[int]]:
    """Random prompts, the same in every runner."""
    found: list[list[int]] = np.random.default_rng(0).integers(3, vocab, (batch, prompt)).tolist()
    return found


# --- throughput ------------------------------------------------------------------------------------------------------


def run_loop(folder: Path, batch: int, prompt: int, new: int) -> list[float]:
    """Seconds of each step of the plain loop; the first reads the prompts."""
    import gemwright
    from gemwright.generate import Generation
    from gemwright.sampling import SamplingParams

    lm = gemwright.load(folder, device="cpu")
    params = [SamplingParams(max_new_tokens=new, temperature=0, stop_ids=frozenset())] * batch
    prompts = texts(lm.config.vocab_size, batch, prompt)
    list(Generation(lm.model, [p[:8] for p in prompts], [SamplingParams(max_new_tokens=2, temperature=0)] * batch))
    return _steps(iter(Generation(lm.model, prompts, params)).__next__, new)


def run_engine(folder: Path, batch: int, prompt: int, new: int) -> list[float]:
    """The same of the engine; the first "step" lasts until every request has its first token."""
    import gemwright
    from gemwright.engine.engine import Engine
    from gemwright.engine.request import Request
    from gemwright.sampling import SamplingParams

    lm = gemwright.load(folder, device="cpu")
    engine = Engine(lm, rows=batch, budget=max(512, 2 * batch))

    def submit(ids: list[list[int]], count: int) -> None:
        params = SamplingParams(max_new_tokens=count, temperature=0, stop_ids=frozenset())
        for i, one in enumerate(ids):
            engine.submit(Request(id=str(i), tokens=one, params=params))

    prompts = texts(lm.config.vocab_size, batch, prompt)
    submit([p[:8] for p in prompts], 2)
    while engine.busy:
        engine.step()
    submit(prompts, new)
    waiting = set(map(str, range(batch)))

    def step() -> None:
        waiting.difference_update(event.id for event in engine.step())
        while waiting:
            waiting.difference_update(event.id for event in engine.step())

    return _steps(step, new)


def run_transformers(folder: Path, batch: int, prompt: int, new: int) -> list[float]:
    """The same of transformers' Gemma2ForCausalLM in bf16, a token a call over its own cache (no padding is needed)."""
    transformers: Any = importlib.import_module("transformers")
    model = transformers.Gemma2ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager")
    cache = transformers.DynamicCache(config=model.config)
    tokens = torch.tensor(texts(model.config.vocab_size, batch, prompt))
    model(tokens[:, :8], logits_to_keep=1)

    def step() -> None:
        nonlocal tokens
        out = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        tokens = out.logits[:, -1].argmax(-1, keepdim=True)

    return _steps(step, new)


def run_llama(folder: Path, batch: int, prompt: int, new: int) -> list[float]:
    """The same of llama.cpp: one batch of a token for each sequence a step, greedy over its logits."""
    api: Any = importlib.import_module("llama_cpp")
    quiet = api.llama_log_callback(lambda level, text, data: None)
    api.llama_log_set(quiet, ctypes.c_void_p(0))
    model = api.llama_model_load_from_file(str(folder / peers.GGUF_FILE).encode(), api.llama_model_default_params())
    params = api.llama_context_default_params()
    params.n_ctx, params.n_seq_max, params.n_batch = batch * (prompt + new + 16), batch, max(512, batch)
    params.n_threads = params.n_threads_batch = torch.get_num_threads()
    params.kv_unified = True
    context = api.llama_init_from_model(model, params)
    vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
    buffer = api.llama_batch_init(params.n_batch, 0, 1)

    def decode(rows: list[tuple[int, int, int, bool]]) -> None:
        """Rows of (token, position, sequence, wants logits)."""
        for i, (token, position, sequence, wanted) in enumerate(rows):
            buffer.token[i], buffer.pos[i], buffer.logits[i] = token, position, wanted
            buffer.n_seq_id[i], buffer.seq_id[i][0] = 1, sequence
        buffer.n_tokens = len(rows)
        status = api.llama_decode(context, buffer)
        assert status == 0, f"llama_decode: {status}"

    def likeliest(row: int) -> int:
        return int(np.ctypeslib.as_array(api.llama_get_logits_ith(context, row), (vocab,)).argmax())

    decode([(3, 0, 0, True)])
    api.llama_memory_clear(api.llama_get_memory(context), True)
    prompts = texts(vocab, batch, prompt)
    length, last = prompt, [0] * batch

    def step() -> None:
        nonlocal length
        if not any(last):
            for sequence, ids in enumerate(prompts):
                decode([(token, at, sequence, at == prompt - 1) for at, token in enumerate(ids)])
                last[sequence] = likeliest(prompt - 1)
            return
        decode([(token, length, sequence, True) for sequence, token in enumerate(last)])
        last[:] = [likeliest(row) for row in range(batch)]
        length += 1

    return _steps(step, new)


def _steps(step: Callable[[], object], count: int) -> list[float]:
    times = []
    for _ in range(count):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return times


def linears(folder: Path, batch: int) -> float:
    """Seconds of a decoding step's linears alone."""
    import gemwright

    model = gemwright.load(folder, device="cpu").model
    names = [name for name, _ in model.named_modules() if name.endswith("_proj")] + ["lm_head"]
    todo: list[tuple[Any, torch.Tensor]] = []
    for name in names:
        module: Any = model.get_submodule(name)
        todo.append((module, torch.randn(batch, module.in_features).bfloat16()))
    return machine.seconds(lambda: [module(x) for module, x in todo], repeats=9)


RUNNERS: Final[dict[str, Callable[[Path, int, int, int], list[float]]]] = {
    "loop": run_loop,
    "engine": run_engine,
    "transformers": run_transformers,
    "llama.cpp": run_llama,
}


# --- what the engine is for ------------------------------------------------------------------------------------------


def turns(folder: Path) -> dict[str, float]:
    """Seconds to the first token of a 2000-token conversation, and of its next turn; then of that turn read afresh."""
    import gemwright
    from gemwright.engine.engine import Engine
    from gemwright.engine.request import Request
    from gemwright.sampling import SamplingParams

    lm = gemwright.load(folder, device="cpu")
    (first,) = texts(lm.config.vocab_size, 1, 2000)

    def until_first(engine: Engine, ids: list[int]) -> float:
        start = time.perf_counter()
        for _ in engine.stream([Request(tokens=ids, params=SamplingParams(max_new_tokens=1, temperature=0))]):
            pass
        return time.perf_counter() - start

    engine = Engine(lm, rows=1)
    until_first(engine, first[:64])
    before = until_first(engine, first)
    second = [*first, *texts(lm.config.vocab_size, 1, 2048)[0][2000:]]
    found = until_first(engine, second)
    return {"first": before, "second": found, "afresh": until_first(Engine(lm, rows=1), second)}


def lookup(folder: Path, new: int) -> dict[str, float]:
    """Tokens a second, with prompt lookup and without, of editing a text and of free writing."""
    import gemwright
    from gemwright.engine.engine import Engine
    from gemwright.engine.speculative import PromptLookup

    lm = gemwright.load(folder, device="cpu")
    found = {}
    for name, text, start in (("editing", EDIT, EDIT.partition(": ")[2][:80]), ("free", FREE, "")):
        for way, proposer in (("plain", None), ("lookup", PromptLookup())):
            engine = Engine(lm, rows=1, proposer=proposer)
            prompt = lm.tokenizer.decode(lm.encode([{"role": "user", "content": text}])[1:], skip_special=False) + start
            lm.generate(prompt, engine=engine, max_new_tokens=2, temperature=0)
            begin = time.perf_counter()
            answer = lm.generate(prompt, engine=engine, max_new_tokens=new, min_new_tokens=new, temperature=0)
            found[f"{name} {way}"] = len(answer.tokens) / (time.perf_counter() - begin)
    return found


def constrained(folder: Path, new: int) -> dict[str, float]:
    """Tokens a second of 8 answers at once, free and under a JSON schema, while none of them has ended."""
    import gemwright
    from gemwright.engine.engine import Engine
    from gemwright.engine.request import Request
    from gemwright.engine.structured import Constraint
    from gemwright.sampling import SamplingParams

    lm = gemwright.load(folder, device="cpu")
    engine = Engine(lm, rows=8)
    prompts = [lm.encode([{"role": "user", "content": f"Invent person {i}."}]) for i in range(8)]
    found = {}
    for name, limit in (("free", None), ("constrained", Constraint.of("json_schema", SCHEMA))):
        for warm in (True, False):
            for i, prompt in enumerate(prompts):
                params = SamplingParams(max_new_tokens=2 if warm else new, temperature=1.0, seed=i)
                engine.submit(Request(tokens=prompt, params=params, constraint=limit))
            times = []
            while engine.busy:
                begin = time.perf_counter()
                made = len(engine.step())
                if made == len(prompts):
                    times.append(time.perf_counter() - begin)
        found[name] = len(prompts) / statistics.median(times)
    return found


# --- report ----------------------------------------------------------------------------------------------------------


def case(
    name: str, model: Path, batch: int = 1, prompt: int = 128, new: int = 64, threads: int = machine.cores()
) -> None:
    """Run one case and print its JSON line."""
    torch.set_num_threads(threads)
    with torch.inference_mode():
        if name in RUNNERS:
            times = RUNNERS[name](model, batch, prompt, new)
            result: dict[str, Any] = {"first": times[0], "step": statistics.median(times[1:])}
        else:
            others: dict[str, Callable[[], dict[str, float]]] = {
                "linears": lambda: {"seconds": linears(model, batch)},
                "turns": lambda: turns(model),
                "lookup": lambda: lookup(model, 2 * new),
                "constrained": lambda: constrained(model, 2 * new),
            }
            result = others[name]()
    print(json.dumps(result))


def main(options: Options) -> None:
    """Run the rounds, print the report, and put it into docs/benchmarks.md where that was asked for."""
    folder = bundled_folder(options.work)
    runners = ["loop", "engine", *options.peers]
    cases = (
        [(name, batch) for batch in (1, 32) for name in [*runners, "linears"]] if "throughput" in options.only else []
    )
    cases += [(name, 1) for name in ("turns", "lookup", "constrained") if name in options.only]
    runs: dict[tuple[str, int], list[dict[str, float]]] = {one: [] for one in cases}
    ceilings = []
    for _ in range(options.rounds):
        ceilings.append(machine.ceilings(options.threads))
        print(ceilings[-1], file=sys.stderr)
        for name, batch in cases:
            sizes = {"batch": batch, "prompt": options.prompt, "new": options.new, "threads": options.threads}
            flags = [word for key, size in sizes.items() for word in (f"--{key}", str(size))]
            arguments = ["case", "--name", name, "--model", str(folder), *flags]
            runs[name, batch].append(machine.in_subprocess(Path(__file__), arguments, threads=options.threads))
            print(name, batch, runs[name, batch][-1], file=sys.stderr)
    parts = [
        "## The engine",
        f"{machine.describe(options.threads)}. {Ceilings.median(ceilings)}.",
        f"`{' '.join(['python', 'bench/engine.py', *sys.argv[1:]])}`: the bundled model, bf16, prompts of "
        f"{options.prompt}, {options.new} new tokens each; {options.rounds} interleaved rounds, medians.",
    ]
    if "throughput" in options.only:
        parts += [throughput_table(runs, runners), overhead_table(runs)]
    parts += [ratio_table(runs)]
    report = "\n\n".join(parts)
    print(report)
    if options.update:
        machine.publish(ROOT / "docs" / "benchmarks.md", "bench/engine.py", report)


Runs = dict[tuple[str, int], list[dict[str, float]]]


def middle(runs: Runs, name: str, batch: int, key: str) -> float:
    return statistics.median(run[key] for run in runs[name, batch])


def throughput_table(runs: Runs, runners: list[str]) -> str:
    """Decoding rates of all runners."""
    lines = ["| runner | batch 1, tokens/s | batch 32, tokens/s | prompts of the 32, s |", "|---|---|---|---|"]
    for name in runners:
        rates = [f"{batch / middle(runs, name, batch, 'step'):.1f}" for batch in (1, 32)]
        lines.append(f"| {name} | {' | '.join(rates)} | {middle(runs, name, 32, 'first'):.2f} |")
    return "\n".join(lines)


def overhead_table(runs: Runs) -> str:
    """Where a decoding step's time goes."""
    lines = ["| batch | step, ms | its linears | outside | over the plain loop |", "|---|---|---|---|---|"]
    for batch in (1, 32):
        step, inside = 1e3 * middle(runs, "engine", batch, "step"), 1e3 * middle(runs, "linears", batch, "seconds")
        over = step - 1e3 * middle(runs, "loop", batch, "step")
        lines.append(f"| {batch} | {step:.2f} | {inside:.2f} | {step - inside:.2f} | {over:+.2f} |")
    return "\n".join(lines)


def ratio_table(runs: Runs) -> str:
    """What was asked for, and what came."""
    found: dict[str, float] = {}
    for name, batch in runs:
        if name in ("transformers", "llama.cpp"):
            found[f"{name} {batch}"] = middle(runs, name, batch, "step") / middle(runs, "engine", batch, "step")
    if ("turns", 1) in runs:
        found["second turn"] = middle(runs, "turns", 1, "second") / middle(runs, "turns", 1, "afresh")
    if ("lookup", 1) in runs:
        for kind in ("editing", "free"):
            rates = [middle(runs, "lookup", 1, f"{kind} {way}") for way in ("lookup", "plain")]
            found[f"lookup, {kind}"] = rates[0] / rates[1]
    if ("constrained", 1) in runs:
        found["constrained"] = middle(runs, "constrained", 1, "constrained") / middle(runs, "constrained", 1, "free")
    lines = ["| ratio | came | asked |", "|---|---|---|"]
    return "\n".join(lines + [f"| {name} | {value:.2f} | {ASKED.get(name, '-')} |" for name, value in found.items()])


if __name__ == "__main__":
    if sys.argv[1:2] == ["case"]:
        tyro.cli(case, args=sys.argv[2:])
    else:
        main(tyro.cli(Options))
