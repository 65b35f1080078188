"""Training a model of the 2B shape on one GPU, full and LoRA, beside transformers; and the losses at the head alone.

Weights are random and made on the device, the same for every runner; so are the tokens (Zipf over a thousand ids, one
document of 8192) and the adapters' first factors. Ours are the trainer's own parts: compiled blocks, attention in
Triton, the chunked loss, AdamW over fp32 masters. transformers runs eager attention under its own gradient
checkpointing (without it, 26 layers of scores would take 100 GiB); full fine-tuning there keeps no masters (AdamW in
bf16), since with them it does not fit: its speed and memory compare, its course only about. Adapters are PEFT's there.

Every part is a process with a limit of its own, and what it printed until then counts. The tiles of the attention
kernels may be those that bench/attention_gpu.py found and wrote.

    python bench/train_gpu.py [--budget 150] [--parts full lora ...] [--attention flex] [--tiles attention_gpu.json]
    python bench/train_gpu.py --device cpu --layers 2 --length 64 --shrink 64 --steps 3      # a trial of the bench
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import attention_gpu
import torch
from torch import Tensor

from gemwright.config import ModelConfig
from gemwright.lora import LoraConfig, LoRALinear, add_lora
from gemwright.model import Gemma2
from gemwright.ops.attention import BACKENDS, Attention, Visibility
from gemwright.ops.divergence import divergence
from gemwright.ops.head import Head
from gemwright.ops.loss import cross_entropy
from gemwright.train.optimizer import AdamW
from gemwright.train.speed import Work, compile_blocks, peak_flops, recompute_blocks

LIMITS: Final = {
    "full": 45, "loss": 20, "lora": 60, "eager-lora": 40, "lora-uncompiled": 40, "eager-full": 40,
    "flex-lora": 40, "full-recompute": 45,
}  # fmt: skip
"""Parts in the order of their importance, and the seconds that each may take."""
RATES: Final = {"full": 1e-4, "lora": 1e-3}
LORA: Final = LoraConfig(rank=16, alpha=32, dropout=0.0, targets="all-linear")


def say(**facts: Any) -> None:
    """One line of JSON for the process that waits."""
    print(json.dumps(facts), flush=True)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is trained: the 2B shape, or one that is shrunk to try the bench itself."""

    device: str
    layers: int
    length: int
    shrink: int
    steps: int
    attention: str
    tiles: str

    def config(self) -> ModelConfig:
        """Head count and widths of 2B, divided."""
        full = ModelConfig.preset("gemma-2-2b")
        by = self.shrink
        return dataclasses.replace(
            full, num_hidden_layers=self.layers, layer_types=(), hidden_size=full.hidden_size // by,
            intermediate_size=full.intermediate_size // by, vocab_size=full.vocab_size // by,
            head_dim=full.head_dim // by * 2 if by > 1 else full.head_dim,
        )  # fmt: skip

    def parameter(self, index: int, shape: tuple[int, ...]) -> Tensor:
        """Fresh weights of one parameter, in bf16; norm gains are zero."""
        generator = torch.Generator(self.device).manual_seed(index)
        if len(shape) == 1:
            return torch.zeros(shape, dtype=torch.bfloat16, device=self.device)
        made = torch.empty(shape, dtype=torch.bfloat16, device=self.device)
        return made.normal_(std=0.02, generator=generator)

    def tokens(self) -> Iterator[Tensor]:
        """Ids [1, length + 1] of each step."""
        ids = min(1000, self.config().vocab_size - 1)
        odds = 1 / torch.arange(1, ids + 1)
        generator = torch.Generator().manual_seed(1)
        while True:
            yield 1 + torch.multinomial(odds, self.length + 1, replacement=True, generator=generator)[None]

    def backend(self) -> str:
        """What attention runs on: as asked, with the tiles that were found; flex, and a line, where triton fails."""
        if self.device == "cpu":
            return "blocked"
        if self.attention != "triton":
            return self.attention
        try:
            if self.tiles:
                attention_gpu.take(Path(self.tiles))
            pos_BT = torch.arange(300, device=self.device)[None]
            q, k, v = (torch.randn(1, 300, n, 256, device=self.device).bfloat16().requires_grad_() for n in (8, 4, 4))
            out = BACKENDS["triton"].load()(q, k, v, Visibility(pos_BT, pos_BT, window=100), scale=0.06, cap=50.0)
            torch.autograd.grad(out.sum(), (q, k, v))
            self.sync()
        except Exception as error:  # what is compared is training; the kernels have a bench of their own
            say(attention="flex", fault=f"{type(error).__name__}: {str(error)[-300:]}")
            return "flex"
        return "triton"

    def sync(self) -> None:
        """Wait for the device."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def peak(self) -> int:
        """Bytes at the peak."""
        return torch.cuda.max_memory_allocated() if self.device == "cuda" else 0


@dataclasses.dataclass(frozen=True)
class Row:
    """What `Work.flops` asks of a batch."""

    pos_BT: Tensor
    count: int
    tokens: int


def ours(sizes: Sizes, *, lora: bool, recompute: bool = False, compiled: bool = True) -> None:
    """Full fine-tuning or LoRA with the trainer's own parts."""
    config = sizes.config()
    with torch.device("meta"):
        model = Gemma2(config)
    for index, (name, shape) in enumerate(config.parameter_shapes().items()):
        parent, _, leaf = name.rpartition(".")
        parameter = torch.nn.Parameter(sizes.parameter(index, shape), requires_grad=not lora)
        setattr(model.get_submodule(parent), leaf, parameter)
    model.tie()
    backend = sizes.backend()
    model.attention = Attention(backend, backend, backend)
    if lora:
        add_lora(model, LORA)
        factors(dict(model.named_modules()))
    if compiled and sizes.device == "cuda":
        compile_blocks(model)
    if recompute:
        recompute_blocks(model)
    optimizer = AdamW(model.named_parameters())
    pos_BT = torch.arange(sizes.length)[None]
    flops = Work.of(model).flops(Row(pos_BT, sizes.length, sizes.length))
    pos_BT = pos_BT.to(sizes.device)
    phases: dict[str, float] = {}
    say(made=torch.cuda.memory_allocated() if sizes.device == "cuda" else 0)

    def step(read_BT: Tensor, targets_BT: Tensor) -> Tensor:
        start = time.perf_counter()
        hidden_BTD = model(read_BT, pos_BT)
        first = not phases
        phases["forward"] = time.perf_counter() - start
        total, count, _ = cross_entropy(
            hidden_BTD, model.lm_head.weight, targets_BT, softcap=config.final_logit_softcapping
        )
        phases["loss"] = time.perf_counter() - start
        total.backward()  # type: ignore[no-untyped-call]
        phases["backward"] = time.perf_counter() - start
        if first:  # compilation: where it waits, should it not end
            say(first=phases)
        norm = float(optimizer.squares()) ** 0.5 / float(count)  # the trainer waits here as well
        optimizer.update(RATES["lora" if lora else "full"], min(1.0, 1 / (norm + 1e-6)) / float(count))
        return total.detach() / count

    timed(sizes, step, flops)


def factors(modules: dict[str, torch.nn.Module]) -> None:
    """The same first factors in every runner: A from its name's length and place, B zero."""
    for index, (name, module) in enumerate(sorted(modules.items())):
        if isinstance(module, LoRALinear):
            generator = torch.Generator(module.lora_A.device).manual_seed(len(name) + index)
            torch.nn.init.normal_(module.lora_A, std=module.in_features**-0.5, generator=generator)


def theirs(sizes: Sizes, *, lora: bool, attention: str) -> None:
    """transformers' model in a plain loop; AdamW in bf16, or over PEFT's fp32 factors."""
    import transformers

    config = sizes.config()
    raw = transformers.Gemma2Config(**{k: v for k, v in config.to_hf().items() if k not in ("torch_dtype", "dtype")})
    with torch.device(sizes.device):
        model: Any = transformers.AutoModelForCausalLM.from_config(
            raw, dtype=torch.bfloat16, attn_implementation=attention
        )
    with torch.no_grad():
        for index, (name, shape) in enumerate(config.parameter_shapes().items()):
            model.get_parameter(name).copy_(sizes.parameter(index, shape))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    if lora:
        model = with_peft(model, config)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=0.0, fused=True)
    rate = RATES["lora" if lora else "full"]

    def step(read_BT: Tensor, targets_BT: Tensor) -> Tensor:
        logits_BTV = model(read_BT, use_cache=False).logits.float()
        loss = torch.nn.functional.cross_entropy(logits_BTV[0], targets_BT[0])
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    timed(sizes, step, 0.0)


def with_peft(model: Any, config: ModelConfig) -> Any:
    """PEFT's adapter with the first factors of `factors`."""
    import peft

    with torch.device("meta"):
        shell = Gemma2(config)
    add_lora(shell, LORA)
    places = sorted(dict(shell.named_modules()))
    made = peft.get_peft_model(
        model, peft.LoraConfig(r=LORA.rank, lora_alpha=int(LORA.alpha), lora_dropout=0.0, target_modules="all-linear")
    )
    for index, name in enumerate(places):
        if isinstance(shell.get_submodule(name), LoRALinear):
            weight = made.get_submodule(f"base_model.model.{name}").lora_A["default"].weight
            generator = torch.Generator(weight.device).manual_seed(len(name) + index)
            with torch.no_grad():
                drawn = torch.empty_like(weight, dtype=torch.float32)
                weight.copy_(drawn.normal_(std=weight.shape[1] ** -0.5, generator=generator))
    made.enable_input_require_grads()
    return made


def timed(sizes: Sizes, step: Callable[[Tensor, Tensor], Tensor], flops: float) -> None:
    """Run the steps; a line for each as it ends."""
    start = time.perf_counter()
    for _, tokens in zip(range(sizes.steps), sizes.tokens(), strict=False):
        read_BT, targets_BT = tokens[:, :-1].to(sizes.device), tokens[:, 1:].to(sizes.device)
        loss = step(read_BT, targets_BT)
        sizes.sync()
        now = time.perf_counter()
        say(loss=float(loss), seconds=now - start, peak=sizes.peak(), flops=flops)
        start = time.perf_counter()


def milliseconds(call: Callable[[], object], sizes: Sizes, repeats: int = 5) -> float:
    """Median of some calls after one."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        sizes.sync()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[1:])


def loss(sizes: Sizes) -> None:
    """Time and memory of a loss and its gradient at the head alone: ours, and the whole logits at once."""
    X = sizes.length
    for vocab, width in ((256_000 // sizes.shrink, 2304 // sizes.shrink), (49_152 // sizes.shrink, 576)):
        hidden, teacher = (torch.randn(X, width, device=sizes.device, dtype=torch.bfloat16) for _ in range(2))
        weight = torch.empty(vocab, width, device=sizes.device, dtype=torch.bfloat16).normal_(std=3 * width**-0.5)
        targets = torch.randint(vocab, (X,), device=sizes.device)
        hidden.requires_grad_()

        def cross(h: Tensor, w: Tensor, targets: Tensor = targets) -> Tensor:
            return cross_entropy(h, w, targets, softcap=30.0)[0]

        def kl(h: Tensor, w: Tensor, teacher: Tensor = teacher) -> Tensor:
            return divergence("forward_kl", h, Head(w, 30.0), teacher, Head(w.detach(), 30.0))[0]

        def naive(h: Tensor, w: Tensor, targets: Tensor = targets) -> Tensor:
            logits = 30 * torch.tanh(torch.nn.functional.linear(h, w).float() / 30)
            return torch.nn.functional.cross_entropy(logits, targets, reduction="sum")

        cases = {"cross-entropy": (cross, True), "cross-entropy, frozen head": (cross, False),
                 "forward KL": (kl, True), "naive cross-entropy": (naive, True)}  # fmt: skip
        for name, (function, trained) in cases.items():
            head = weight.detach().requires_grad_(trained)
            wanted = (hidden, head) if trained else (hidden,)

            def call(function: Any = function, head: Tensor = head, wanted: Any = wanted, h: Tensor = hidden) -> None:
                torch.autograd.grad(function(h, head), wanted)

            try:
                call()
                if sizes.device == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated() if sizes.device == "cuda" else 0
                spent = milliseconds(call, sizes, repeats=3)
            except torch.OutOfMemoryError:
                say(case=name, vocab=vocab, width=width, tokens=X, error="does not fit")
                continue
            say(case=name, vocab=vocab, width=width, tokens=X, milliseconds=spent, peak=sizes.peak() - before)


PARTS: Final[dict[str, Callable[[Sizes], None]]] = {
    "full": lambda sizes: ours(sizes, lora=False),
    "full-recompute": lambda sizes: ours(sizes, lora=False, recompute=True),
    "lora": lambda sizes: ours(sizes, lora=True),
    "lora-uncompiled": lambda sizes: ours(sizes, lora=True, compiled=False),
    "loss": loss,
    "eager-lora": lambda sizes: theirs(sizes, lora=True, attention="eager"),
    "eager-full": lambda sizes: theirs(sizes, lora=False, attention="eager"),
    "flex-lora": lambda sizes: theirs(sizes, lora=True, attention="flex_attention"),
}


def run_part(name: str, options: argparse.Namespace, limit: float) -> list[dict[str, Any]]:
    """The lines of a part that ran in a process of its own, for `limit` seconds at most."""
    flags = ["--part", name]
    for field in dataclasses.fields(Sizes):
        flags += [f"--{field.name}", str(getattr(options, field.name))]
    environment = {
        **os.environ, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "PYTHONPATH": os.pathsep.join(sys.path)
    }  # fmt: skip
    try:
        done = subprocess.run(
            [sys.executable, __file__, *flags],
            capture_output=True,
            text=True,
            timeout=limit,
            env=environment,
            check=False,
        )
        out, tail = done.stdout, f"exit {done.returncode}: {done.stderr.strip()[-600:]}" if done.returncode else ""
    except subprocess.TimeoutExpired as error:
        out = (error.stdout or b"").decode()
        tail = f"stopped after {limit:.0f} s: {(error.stderr or b'').decode().strip()[-300:]}"
    lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    return [*lines, *([{"stopped": tail}] if tail else [])]


def report(name: str, lines: list[dict[str, Any]], sizes: Sizes, peak_rate: float) -> None:
    """What a part found, in a few lines."""
    steps = [line for line in lines if "seconds" in line]
    if steps:
        spent = statistics.median(line["seconds"] for line in steps[2:] or steps)
        mfu = steps[0]["flops"] / spent / peak_rate if steps[0]["flops"] else 0.0
        curve = " ".join(f"{line['loss']:.4f}" for line in steps)
        print(
            f"{name}: {sizes.length / spent:.0f} tokens/s, MFU {100 * mfu:.1f} %, {1e3 * spent:.0f} ms a step, "
            f"peak {max(line['peak'] for line in steps) / 2**30:.1f} GiB, first two steps "
            f"{sum(line['seconds'] for line in steps[:2]):.0f} s\n  losses {curve}"
        )
    for line in lines:
        if "seconds" not in line:
            print(f"{name}: {json.dumps(line)}")
    sys.stdout.flush()


def draw(numbers: Path, picture: Path) -> None:
    """The courses of the loss, ours over theirs, from train_gpu.json."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.6))
    for part, lines in json.loads(numbers.read_text()).items():
        losses = [line["loss"] for line in lines if "seconds" in line] if part in LIMITS else []
        if losses:
            style = "--" if part.startswith(("eager", "flex")) else "-"
            axes.plot(range(1, len(losses) + 1), losses, style, marker="o", markersize=3, label=part)
    axes.set(xlabel="step of one row of 8192 tokens (eager: transformers)", ylabel="loss, nats")
    axes.legend()
    figure.tight_layout()
    figure.savefig(picture, dpi=110)


def main() -> None:
    """Run the parts, each in its own process, while the budget lasts."""
    parser = argparse.ArgumentParser(description="Training the 2B shape on one GPU")
    parser.add_argument("--parts", nargs="+", default=list(LIMITS), choices=list(LIMITS))
    parser.add_argument("--budget", type=float, default=150, help="seconds of all parts together")
    parser.add_argument("--part", choices=list(LIMITS), help="one part, in this process")
    parser.add_argument("--attention", choices=("triton", "flex"), default="triton")
    parser.add_argument("--tiles", default="", help="what bench/attention_gpu.py wrote")
    for name, default in {"layers": 26, "length": 8192, "shrink": 1, "steps": 10}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--draw", nargs=2, type=Path, metavar=("JSON", "PNG"), help="the losses of a run, and no run")
    options = parser.parse_args()
    if options.draw:
        draw(*options.draw)
        return
    sizes = Sizes(*(getattr(options, field.name) for field in dataclasses.fields(Sizes)))
    if options.part:
        PARTS[options.part](sizes)
        return
    device = torch.device(options.device)
    peak_rate, origin = peak_flops(device, torch.bfloat16)
    name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}; MFU of {peak_rate / 1e12:.0f} TFLOP/s ({origin})", flush=True)
    if options.device == "cuda":
        torch.cuda.empty_cache()
    begun, found = time.monotonic(), {}
    for part in options.parts:
        left = options.budget - (time.monotonic() - begun)
        if left < 12:
            print(f"{part}: not run, {left:.0f} s are left")
            continue
        found[part] = run_part(part, options, min(LIMITS[part], left))
        report(part, found[part], sizes, peak_rate)
    if out := os.environ.get("OUT"):
        (Path(out) / "train_gpu.json").write_text(json.dumps({"attention": options.attention, **found}))
    print(f"attention: {options.attention}; {time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    main()
