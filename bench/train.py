"""Training a 30M model, 8 rows of 512 tokens, side by side with transformers' Trainer, as it comes and compiled.

The same first weights, batches, AdamW and clipping in every runner, so the same losses: where they part, the comparison
is void and the bench fails. Rounds interleave, each run is a process of its own; every number is a median over rounds,
with the smallest and largest beside it. A step's time is the median over the run without its first steps, which
compile.

The Trainer's own `torch_compile=True` cannot be measured in bf16: accelerate enters autocast inside the compiled graph,
and its first backward leaves NaN in the gradient of a global layer's queries and of all before them, from
two layers and 8 x 512 tokens on (torch 2.13, transformers 5.23); the Trainer logs the NaN losses that follow as 0. The
same graph with autocast around it is right. So the model's forward is compiled before the Trainer wraps it.

    python bench/train.py [--update]                                        # an hour on 2 cores
    python bench/train.py --layers 1 --rows 1 --length 64 --steps 4 --rounds 1   # a trial of the bench itself
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import machine
import torch
import tyro
from torch import Tensor

from gemwright.checkpoint import write
from gemwright.config import ModelConfig
from gemwright.data.batch import Batch
from gemwright.ops.attention import Attention

ROOT: Final = Path(__file__).resolve().parent.parent
OURS: Final = "gemwright"
RUNNERS: Final = {
    OURS: "gemwright, compiled",
    "gemwright-eager": "gemwright, not compiled",
    "transformers": "transformers' Trainer as it comes",
    "transformers-compiled": "transformers' Trainer, forward compiled",
}
ASKED: Final = {"transformers": 2.5, "transformers-compiled": 1.2}
"""What is asked for: our tokens a second over a peer's."""
AGREEMENT: Final = {"float32": 2e-3, "bfloat16": 2e-2}
"""Largest relative difference of two runners' losses at any step."""
WARM_UP: Final = 2
"""Steps that are not timed."""
RATE: Final = 1e-3

Run = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is trained."""

    layers: int = 5
    """Layers of hidden size 512 over a vocabulary of 32000: 5 make 32M parameters."""
    rows: int = 8
    length: int = 512
    steps: int = 12
    dtype: str = "float32"
    """float32, or bfloat16: fp32 masters here, autocast there."""

    def config(self) -> ModelConfig:
        """The shape."""
        return ModelConfig(
            vocab_size=32000, hidden_size=512, intermediate_size=1536, num_hidden_layers=self.layers,
            num_attention_heads=4, num_key_value_heads=2, head_dim=128, query_pre_attn_scalar=128, sliding_window=256,
            max_position_embeddings=4096, dtype="float32",
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Options(Sizes):
    """Compare training loops."""

    rounds: int = 3
    threads: int = machine.cores()
    runners: tuple[str, ...] = tuple(RUNNERS)
    update: bool = False
    """Replace this bench's section in docs/benchmarks.md."""

    def __post_init__(self) -> None:
        if OURS not in self.runners or not set(self.runners) <= RUNNERS.keys():
            raise ValueError(f"runners: got {self.runners}, allowed are {OURS} and any of {', '.join(RUNNERS)}")
        if self.dtype not in AGREEMENT:
            raise ValueError(f"dtype: got {self.dtype!r}, allowed are {', '.join(AGREEMENT)}")
        if min(self.layers, self.rows, self.length, self.rounds, self.threads) < 1 or self.steps <= WARM_UP:
            raise ValueError(f"layers, rows, length, rounds, threads: allowed is 1 or more; steps: more than {WARM_UP}")


def tokens(sizes: Sizes) -> Tensor:
    """Ids [steps, rows, length + 1], frequent ones first as in text (Zipf)."""
    generator = torch.Generator().manual_seed(1)
    odds_V = 1 / torch.arange(1, sizes.config().vocab_size, dtype=torch.float64)
    shape = (sizes.steps, sizes.rows, sizes.length + 1)
    ids = torch.multinomial(odds_V, shape[0] * shape[1] * shape[2], replacement=True, generator=generator)
    return ids.view(shape) + 1


def prepare(folder: Path, sizes: Sizes) -> None:
    """First weights, the same for every runner."""
    generator = torch.Generator().manual_seed(0)
    config = sizes.config()

    def weights() -> Iterator[tuple[str, Tensor]]:
        for name, shape in config.parameter_shapes().items():
            yield name, torch.randn(shape, generator=generator) * 0.02 * (len(shape) > 1)

    write(folder, weights(), config=config.to_hf())


class Batches:
    """Ours: the same ids as batches; `at` holds when each was asked for, so a step lies between two of them."""

    def __init__(self, sizes: Sizes) -> None:
        self.ids, self.at = tokens(sizes), list[float]()

    def __next__(self) -> Batch:
        self.at.append(time.perf_counter())
        ids_BT = self.ids[len(self.at) - 1]
        B, T = ids_BT.shape[0], ids_BT.shape[1] - 1
        weights_BT = torch.ones(B, T)
        weights_BT[:, -1] = 0  # transformers shifts inside a row of T tokens: its last predicts nothing
        pos_BT = torch.arange(T).expand(B, T)
        return Batch(ids_BT[:, :-1], ids_BT[:, 1:], weights_BT, pos_BT, torch.zeros_like(pos_BT))

    def rewind(self) -> None:
        self.at.clear()

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        raise NotImplementedError("a bench is not resumed")


def ours(folder: Path, sizes: Sizes, *, compiled: bool) -> Run:
    """Our loop, checkpoint left out of the timing."""
    from gemwright.loader import load_model
    from gemwright.train.distributed import World
    from gemwright.train.export import Export
    from gemwright.train.options import TrainConfig
    from gemwright.train.progress import LOG, records
    from gemwright.train.sft import loss
    from gemwright.train.trainer import Trainer

    config = TrainConfig(
        output_dir=str(folder / "run"), max_steps=sizes.steps, learning_rate=RATE, lr_scheduler_type="constant",
        logging_steps=1, dtype="bfloat16" if sizes.dtype == "bfloat16" else "float32",
        compile="on" if compiled else "off", device="cpu", save_steps=10**6, per_device_train_batch_size=sizes.rows,
    )  # fmt: skip
    model = load_model(folder, device=torch.device("cpu"), dtype=sizes.dtype, pack=False).requires_grad_(True)
    model.attention = Attention("blocked", "blocked", "blocked")
    batches = Batches(sizes)

    def nothing(path: Path, drawn: Iterator[tuple[str, Tensor]]) -> None:
        batches.at.append(time.perf_counter())  # the end of the last step
        path.mkdir()

    export = Export([], nothing)
    world = World(0, 1, torch.device("cpu"))
    Trainer(model, loss, batches, config, total=sizes.steps, world=world, export=export).train()
    losses = [line["loss"] for line in records(folder / "run" / LOG) if "loss" in line]
    return _run(batches.at, losses, sizes)


def theirs(folder: Path, sizes: Sizes, *, compiled: bool) -> Run:
    """transformers' Trainer with its defaults, rows in their order, logging every step as ours does."""
    import transformers

    ids = tokens(sizes)[:, :, :-1].reshape(-1, sizes.length)
    rows = [{"input_ids": row, "labels": row} for row in ids]
    model = transformers.Gemma2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if compiled:
        model.forward = torch.compile(model.forward)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "peer"), max_steps=sizes.steps, per_device_train_batch_size=sizes.rows,
        learning_rate=RATE, lr_scheduler_type="constant", logging_steps=1, report_to="none", save_strategy="no",
        use_cpu=True, bf16=sizes.dtype == "bfloat16", disable_tqdm=True,
    )  # fmt: skip
    at: list[float] = []

    class Clock(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            at.append(time.perf_counter())

        def on_train_end(self, *_: Any, **__: Any) -> None:
            at.append(time.perf_counter())

    class InOrder(transformers.Trainer):  # type: ignore[misc]
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(rows)

    trainer = InOrder(model=model, args=arguments, train_dataset=rows, callbacks=[Clock()])
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return _run(at, [float(loss) for loss in losses], sizes)


def _run(at: list[float], losses: list[float], sizes: Sizes) -> Run:
    seconds = [later - earlier for earlier, later in pairwise(at)]
    assert len(seconds) == len(losses) == sizes.steps, (len(seconds), len(losses), sizes.steps)
    return {
        "tokens_per_second": sizes.rows * sizes.length / statistics.median(seconds[WARM_UP:]),
        "warm_up": sum(seconds[:WARM_UP]),
        "peak": machine.memory("VmHWM"),
        "losses": losses,
    }


PEERS: Final[dict[str, Callable[[Path, Sizes], Run]]] = {
    OURS: lambda folder, sizes: ours(folder, sizes, compiled=True),
    "gemwright-eager": lambda folder, sizes: ours(folder, sizes, compiled=False),
    "transformers": lambda folder, sizes: theirs(folder, sizes, compiled=False),
    "transformers-compiled": lambda folder, sizes: theirs(folder, sizes, compiled=True),
}


@dataclass(frozen=True, kw_only=True)
class One(Sizes):
    """One runner, in this process; its result as a line of JSON."""

    runner: str
    threads: int


def one(options: One) -> None:
    """Run one runner and print what came out."""
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        prepare(folder, options)
        result = PEERS[options.runner](folder, options)
    print(json.dumps(result))


def check_agreement(runs: dict[str, list[Run]], dtype: str) -> float:
    """The largest relative difference of any runner's loss from ours; RuntimeError above AGREEMENT."""
    worst = 0.0
    for name, results in runs.items():
        for own, other in zip(runs[OURS][0]["losses"], results[-1]["losses"], strict=True):
            worst = max(worst, abs(own - other) / own)
        if not worst <= AGREEMENT[dtype]:
            raise RuntimeError(f"losses of {name} and {OURS} differ by {worst:.1e}: not the same training")
    return worst


def spread(values: list[float], digits: int) -> str:
    """Median (smallest to largest)."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def table(options: Options, runs: dict[str, list[Run]]) -> str:
    """Speed, memory and loss of every runner, and our speed over it within each round."""
    lines = [
        "| runner | tokens/s | peak memory, GiB | first two steps, s | last loss | gemwright over it | asked |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, results in runs.items():
        ratios = [a["tokens_per_second"] / b["tokens_per_second"] for a, b in zip(runs[OURS], results, strict=True)]
        cells = [
            RUNNERS[name],
            spread([each["tokens_per_second"] for each in results], 0),
            f"{statistics.median(each['peak'] for each in results) / 2**30:.2f}",
            f"{statistics.median(each['warm_up'] for each in results):.0f}",
            f"{results[0]['losses'][-1]:.4f}",
            f"{statistics.median(ratios):.2f}",
            f"{ASKED.get(name, '-')}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(options: Options) -> None:
    """Run the rounds, print the report, and put it into docs/benchmarks.md where that was asked for."""
    sizes = {"layers": options.layers, "rows": options.rows, "length": options.length, "steps": options.steps}
    flags = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    flags += ["--dtype", options.dtype, "--threads", str(options.threads)]
    runs: dict[str, list[Run]] = {name: [] for name in options.runners}
    for _ in range(options.rounds):
        for name, results in runs.items():
            arguments = ["one", "--runner", name, *flags]
            results.append(machine.in_subprocess(Path(__file__), arguments, threads=options.threads))
            print(f"{name}: {results[-1]['tokens_per_second']:.0f} tokens/s", file=sys.stderr)
        worst = check_agreement(runs, options.dtype)
    report = "\n\n".join(
        [
            "## Training",
            f"{machine.describe(options.threads)}.",
            f"`{' '.join(['python', 'bench/train.py', *sys.argv[1:]])}`: "
            f"{options.config().num_parameters() / 1e6:.1f}M parameters, {options.rows} x {options.length} tokens "
            f"a step, {options.dtype}, {options.steps} steps, {options.rounds} rounds that interleave, medians "
            f"(smallest to largest). Losses of all runners differ by at most {worst:.1e} of themselves at any step.",
            table(options, runs),
        ]
    )
    print(report)
    if options.update:
        machine.publish(ROOT / "docs" / "benchmarks.md", "bench/train.py", report)


if __name__ == "__main__":
    if sys.argv[1:2] == ["one"]:
        one(tyro.cli(One, args=sys.argv[2:]))
    else:
        main(tyro.cli(Options))
