"""What makes a step fast or small, put on a model from outside; and what its speed is measured by.

Blocks are compiled one by one. Left out of the graph are attention, whose backends plan in Python (blocked) or are
compiled already, and quantized linears: the compiler would keep for backward the weight that they make anew.
All blocks share one code object, and their weights are inputs of it, so it is compiled once. Recomputation (arXiv
1604.06174) keeps a block's input alone and runs the block again in backward; it is put around the compiled block, so
that random states and saved tensors are its own.

MFU (arXiv 2204.02311, appendix B) counts the multiplications that training needs, recomputation not among them: for
each token 2 x weights forward, 2 x backward to the inputs, 2 x backward to the weights where they are trained, and for
each key that a query sees 4 x heads x head dim forward and twice that backward.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from types import MethodType
from typing import TYPE_CHECKING, Any, Final, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gemwright.model import Gemma2
from gemwright.ops.cpu import has_fast_bf16
from gemwright.quant.nf4 import Nf4Linear

if TYPE_CHECKING:
    from gemwright.train.options import Compile, TrainConfig

COMPILE_UPDATES: Final = 200
"""`auto` compiles runs of at least so many updates: it takes about a minute (42 s on two cores, cold)."""

PEAKS: Final = {
    "B200": 2.25e15, "H200": 9.89e14, "H100 PCIe": 7.56e14, "H100": 9.89e14, "A100": 3.12e14, "L40S": 3.62e14,
    "L4": 1.21e14, "A10": 1.25e14, "RTX 4090": 1.65e14, "RTX 3090": 7.1e13,
}  # fmt: skip
"""Dense bf16 FLOP/s with fp32 sums, by a part of the device's name; from the makers' data sheets."""


class Measured(Protocol):
    """What a batch tells about its size."""

    @property
    def pos_BT(self) -> Tensor: ...  # noqa: N802
    @property
    def count(self) -> int:
        """Places whose logits are computed."""

    @property
    def tokens(self) -> int:
        """Tokens that are not padding."""


def recompute_blocks(model: Gemma2) -> None:
    """Keep each block's input alone, and run the block again in backward."""
    for block in model.model.layers:
        _replace_forward(block, partial(checkpoint, block.forward, use_reentrant=False))


def compile_blocks(model: Gemma2) -> None:
    """Compile the blocks, attention and quantized linears excepted."""
    opaque = cache(torch.compiler.disable)

    def run(compiled: Callable[..., Tensor], x_BTD: Tensor, see: Any, tables: Any, attend: Any, kv: Any) -> Tensor:
        if torch.is_grad_enabled() and not x_BTD.requires_grad:  # the first over a frozen embedding: not a case apart
            x_BTD = x_BTD.detach().requires_grad_()
        return compiled(x_BTD, see, tables, opaque(attend), kv)

    for module in model.modules():
        if isinstance(module, Nf4Linear):
            _replace_forward(module, MethodType(opaque(Nf4Linear.forward), module))  # one function for all of them
    for block in model.model.layers:
        _replace_forward(block, partial(run, torch.compile(block.forward)))


def record_passes(model: Gemma2) -> None:
    """Run training's passes as two CUDA graphs, forward and backward: one launch each instead of hundreds.

    They are recorded for the shape of the first batch that is trained on; a batch of another shape, or an evaluation,
    runs as before. They keep the memory of their activations, and read parameters where they lie, which may change in
    place alone. The gradients lie in memory that the next backward pass overwrites.
    """
    plain = model.forward
    recorded: dict[torch.Size, Callable[..., Tensor]] = {}

    def forward(tokens_BT: Tensor, pos_BT: Tensor, doc_BT: Tensor | None = None, cache: Any = None) -> Tensor:
        if not model.training or not torch.is_grad_enabled() or doc_BT is None or cache is not None:
            return plain(tokens_BT, pos_BT, doc_BT, cache)
        if not recorded:
            _replace_forward(model, plain)
            sample = tuple(x.clone() for x in (tokens_BT, pos_BT, doc_BT))
            torch.cuda.make_graphed_callables(model, sample)
            recorded[tokens_BT.shape] = model.forward
            _replace_forward(model, forward)
        return recorded.get(tokens_BT.shape, plain)(tokens_BT, pos_BT, doc_BT)

    _replace_forward(model, forward)


def check_recording(config: TrainConfig, device: torch.device, precision: str, *, sharded: bool, adapted: bool) -> None:
    """ValueError where passes cannot be recorded, with the option that stands in the way."""
    summed = config.gradient_accumulation_steps > 1 and precision == "float32"
    for hinders, what in (
        (device.type != "cuda", f"device {device.type}: graphs are CUDA's"),
        (sharded, "several processes, or cpu_offload: their collectives are not recorded"),
        (adapted, "frozen weights: a run with an adapter failed on the GPU where it was tried (torch 2.11)"),
        (config.gradient_checkpointing, "gradient_checkpointing: it asks for random states"),
        (precision == "autocast", "dtype autocast: it casts weights outside the graph"),
        (summed, "gradient_accumulation_steps with dtype float32: the next batch would overwrite the gradients"),
    ):
        if hinders:
            raise ValueError(f"cuda_graphs: given beside {what}")


def _replace_forward(module: nn.Module, forward: Callable[..., Tensor]) -> None:
    """An instance's own `forward`: the module's class, its names and the hooks around the call stay."""
    module.__dict__["forward"] = forward


def choose_precision(config: TrainConfig, device: torch.device) -> str:
    """bfloat16, float32 or autocast; auto is bfloat16 where the device multiplies it natively."""
    if config.bf16 or config.dtype != "auto":
        return "bfloat16" if config.bf16 else config.dtype
    return "bfloat16" if device.type == "cuda" or (device.type == "cpu" and has_fast_bf16()) else "float32"


def pays_to_compile(choice: Compile, device: torch.device, updates: int) -> bool:
    """`on` and `off` are taken as they are; `auto` compiles long runs where there is a compiler."""
    if choice == "auto":
        there = device.type == "cuda" or (device.type == "cpu" and shutil.which("g++") is not None)
        return there and updates >= COMPILE_UPDATES
    return choice == "on"


@dataclass(frozen=True)
class Work:
    """Multiplications and additions that training a model takes: per token, per target, per visible key."""

    token: float
    target: float
    key: float
    windows: tuple[int | None, ...]

    @classmethod
    def of(cls, model: Gemma2) -> Work:
        """Of a model whose parameters have their final requires_grad."""
        head = model.lm_head.weight
        token = 0.0
        for parameter in model.parameters():
            if parameter.ndim > 1 and parameter is not model.model.embed_tokens.weight:
                token += (6 if parameter.requires_grad else 4) * parameter.numel()
        for module in model.modules():
            if isinstance(module, Nf4Linear):
                token += 4 * module.in_features * module.out_features
        config = model.config
        windows = tuple(config.window(i) for i in range(config.num_hidden_layers))
        key = 12 * config.num_attention_heads * config.head_dim
        return cls(token, (6 if head.requires_grad else 4) * head.numel(), key, windows)

    def flops(self, batch: Measured) -> float:
        """Of one batch, forward and backward."""
        seen_BT = batch.pos_BT + 1  # padding has position -1
        keys = {window: float((seen_BT.clamp(max=window) if window else seen_BT).sum()) for window in set(self.windows)}
        attended = self.key * sum(keys[window] for window in self.windows)
        return self.token * batch.tokens + self.target * batch.count + attended


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """FLOP/s that MFU is a share of, and where the number is from: the data sheet, else a matmul measured now."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        known = next((peak for part, peak in PEAKS.items() if part in name), None)
        if known is not None:
            return known, f"{name}, data sheet"
    if device.type == "cpu" and not has_fast_bf16():
        dtype = torch.float32  # bf16 is emulated there, many times slower than what the same products could take
    size = 4096 if device.type == "cuda" else 1024
    a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    seconds = min(_seconds(a, b) for _ in range(4))
    return 2 * size**3 / seconds, f"a {size} x {size} {str(dtype).removeprefix('torch.')} matmul, measured"


def _seconds(a: Tensor, b: Tensor) -> float:
    start = time.perf_counter()
    (a @ b)[0, 0].item()
    return time.perf_counter() - start
