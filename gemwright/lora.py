"""LoRA (arXiv 2106.09685): y = x W^T + s (x A^T) B^T with W frozen, A [r, in], B [out, r], and s = alpha / r.

Training: `add_lora` puts a LoRALinear in the place of named linears. A starts as the paper's Gaussian and B at zero, so
a fresh adapter is the identity. Factors are fp32 whatever the base: an optimizer's small steps vanish in bf16. Products
with them are bf16 where the input is and the device multiplies it natively.

Serving: `AdapterSlots` holds several adapters over one model and lets each row of a batch choose. Rows are grouped by
adapter, so the arithmetic is that of the adapted rows alone, and a row never meets another one's factors. Gathering
factors per row for one batched product costs 5 to 10 times as much (32 rows of one token, rank 16, on CPU), since
it copies them; stacking all factors in one product and masking costs twice as much from 16 adapters on. Where no row
has an adapter, a linear costs one more Python call (4 us).

Files are PEFT's (`adapter.py`).

Legend: B rows, T tokens, X any leading dimensions, D in, F out, r rank.
"""

from __future__ import annotations

import json
import math
import secrets
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gemwright.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, linear_shapes, lora_scale
from gemwright.adapter import Adapter as Adapter
from gemwright.adapter import LoraConfig as LoraConfig
from gemwright.adapter import load_adapter as load_adapter
from gemwright.checkpoint import EMBEDDING, Checkpoint, write
from gemwright.config import ModelConfig
from gemwright.model import Gemma2
from gemwright.ops.cpu import has_fast_bf16
from gemwright.swap import put
from gemwright.weights import save_tensors


class LoRALinear(nn.Module):
    """A frozen linear (any module with in_features and out_features) with a trainable low-rank update."""

    def __init__(
        self,
        base: nn.Module,
        rank: int,
        *,
        alpha: float,
        dropout: float = 0.0,
        use_rslora: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.in_features, self.out_features = _features(base)
        self.rank, self.alpha, self.dropout, self.use_rslora = rank, alpha, dropout, use_rslora
        self.scale = lora_scale(rank, alpha, use_rslora)
        self.fast_bf16 = has_fast_bf16()  # asked here: the compiler cannot
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, device=device))
        nn.init.normal_(self.lora_A, std=1 / math.sqrt(self.in_features))

    def forward(self, x_XD: Tensor) -> Tensor:
        y_XF: Tensor = self.base(x_XD)
        narrow = x_XD.dtype == torch.bfloat16 and (x_XD.is_cuda or self.fast_bf16)
        dtype = torch.bfloat16 if narrow else self.lora_A.dtype
        if self.dropout and self.training:
            x_XD = F.dropout(x_XD, self.dropout)
        low_Xr = F.linear(x_XD.to(dtype), self.lora_A.to(dtype))
        return torch.add(y_XF, F.linear(low_Xr, self.lora_B.to(dtype)), alpha=self.scale).to(y_XF.dtype)


def _features(module: nn.Module) -> tuple[int, int]:
    """In and out features of a linear of any kind: plain, packed, quantized."""
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if not (isinstance(sizes[0], int) and isinstance(sizes[1], int)):
        raise ValueError(f"adapters: a {type(module).__name__} has no in_features and out_features, so it is no linear")
    return sizes[0], sizes[1]


def add_lora(model: Gemma2, source: LoraConfig | Adapter) -> list[str]:
    """Put LoRALinears into a model, fresh ones or those of an adapter that was read; the names of the linears.

    The linears may be packed or quantized, as long as a gradient passes through them. Raises ValueError, before
    anything changes, for targets that the model lacks, linears without a gradient and linears adapted before.
    """
    config = source.config if isinstance(source, Adapter) else source
    if isinstance(source, Adapter):
        source.check(model.config)
    names = config.select(linear_shapes(model.config))
    tried: set[type[nn.Module]] = {nn.Linear}
    for name in names:
        base = model.get_submodule(name)
        if isinstance(base, LoRALinear | AdaptedLinear | Sliced):
            raise ValueError(f"add_lora: {name} is a {type(base).__name__}; allowed is a linear without an adapter")
        if type(base) not in tried:
            tried.add(type(base))
            _try_gradient(name, base, model.model.embed_tokens.weight)
    for name in names:
        layer = LoRALinear(
            model.get_submodule(name),
            config.rank_of(name),
            alpha=config.alpha_of(name),
            dropout=config.dropout,
            use_rslora=config.use_rslora,
            device=model.model.embed_tokens.weight.device,
        )
        if isinstance(source, Adapter):
            with torch.no_grad():
                layer.lora_A.copy_(source.factors[name][0])
                layer.lora_B.copy_(source.factors[name][1])
        put(model, name, layer)
    return names


def _try_gradient(name: str, base: nn.Module, like: Tensor) -> None:
    """Packed kernels exist for inference alone; some lose the gradient with a warning only."""
    x_1D = like.new_ones(1, _features(base)[0]).requires_grad_()
    try:
        torch.autograd.grad(base(x_1D).sum(), x_1D)
    except RuntimeError as error:
        raise ValueError(
            f"add_lora: no gradient passes {name}, a {type(base).__name__}; load with pack=False"
        ) from error


def fuse(weight: Tensor, lora_a: Tensor, lora_b: Tensor, *, scale: float = 1.0) -> Tensor:
    """W + s B A, computed in fp32 and rounded once to the dtype of W."""
    return (weight.float() + scale * (lora_b.float() @ lora_a.float())).to(weight.dtype)


def fuse_checkpoint(
    base_folder: str | Path, adapter_folder: str | Path, out_folder: str | Path, *, overwrite: bool = False
) -> Path:
    """Write the checkpoint that has the adapter in its weights, tensor by tensor; the absolute folder.

    Equals the applied adapter up to the one rounding of each weight. Raises CheckpointError where base or adapter
    cannot be used or do not fit each other, FileExistsError as `checkpoint.write` does.
    """
    base, adapter = Checkpoint(base_folder), load_adapter(adapter_folder)
    config = ModelConfig.from_hf(base.config)
    base.check(config.parameter_shapes())
    adapter.check(config)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in config.parameter_shapes():
            tensor = base.tensor(name, slice(0, config.vocab_size) if name == EMBEDDING else None)
            linear = name.removesuffix(".weight")
            if linear in adapter.factors:
                tensor = fuse(tensor, *adapter.factors[linear], scale=adapter.config.scale_of(linear))
            yield name, tensor

    generation = base.generation_config or None
    return write(
        out_folder,
        tensors(),
        config=base.config,
        generation_config=generation,
        copy_from=base.folder,
        overwrite=overwrite,
    )


def save_adapter(model: Gemma2, folder: str | Path, *, base_model: str | None = None) -> Path:
    """Write the LoRALinears of a model as PEFT files; the absolute folder, which must be new or empty.

    Args:
        base_model: folder or hub name of the base, which PEFT loads the base from.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    if not layers:
        raise ValueError("save_adapter: the model has no LoRALinear; add_lora puts them in")
    target = Path(folder).expanduser().resolve()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise FileExistsError(f"{target}: exists")
    tensors = {}
    for name, layer in layers.items():
        for side, factor in (("A", layer.lora_A), ("B", layer.lora_B)):
            tensors[f"base_model.model.{name}.lora_{side}.weight"] = factor.detach().cpu().contiguous()
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    partial.mkdir()
    try:
        save_tensors(tensors, partial / ADAPTER_WEIGHTS, {"format": "pt"})
        text = json.dumps(_peft_config(model, layers, base_model), indent=2, sort_keys=True)
        (partial / ADAPTER_CONFIG).write_text(text + "\n")
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _peft_config(model: Gemma2, layers: Mapping[str, LoRALinear], base_model: str | None) -> dict[str, Any]:
    rank, alpha = (Counter(getattr(m, key) for m in layers.values()).most_common(1)[0][0] for key in ("rank", "alpha"))
    (use_rslora,) = {m.use_rslora for m in layers.values()}
    (dropout,) = {m.dropout for m in layers.values()}
    leaves = sorted({name.rpartition(".")[2] for name in layers})
    whole = set(layers) == {n for n in linear_shapes(model.config) if n.rpartition(".")[2] in leaves}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "use_rslora": use_rslora,
        "target_modules": leaves if whole else sorted(layers),
        "rank_pattern": {name: m.rank for name, m in layers.items() if m.rank != rank},
        "alpha_pattern": {name: m.alpha for name, m in layers.items() if m.alpha != alpha},
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }


# --- adapters chosen per row -----------------------------------------------------------------------------------------


@runtime_checkable
class Sliced(Protocol):
    """A linear that computes a part of a larger one (`parallel.py`): an adapter goes inside, cut as the weight is."""

    linear: nn.Module
    dim: int
    """The dimension of the weight [out, in] that is cut."""
    span: slice


class Selection:
    """The adapter of each row of the next pass; one object, shared by the adapted linears of a model."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.set(())

    def set(self, names: Sequence[str | None]) -> None:
        """Take the rows' names in; no names at all means no adapter, for any number of rows."""
        self.rows = len(names)
        self.groups: list[tuple[str, Tensor | None]] = []
        """Each adapter in the pass with the rows that have it; None where all have."""
        for name in {name: None for name in names if name is not None}:
            rows = [row for row, other in enumerate(names) if other == name]
            self.groups.append((name, None if len(rows) == self.rows else torch.tensor(rows, device=self.device)))


class AdaptedLinear(nn.Module):
    """A linear of any kind with the updates of several adapters, of which each row of [B, T, D] takes its own.

    Factors are fp32 with the scale in B: a CPU without bf16 units multiplies them faster so (`ops/linear.py`), and the
    sum is rounded once.
    """

    def __init__(self, base: nn.Module, selection: Selection) -> None:
        super().__init__()
        self.base, self.selection = base, selection
        self.in_features, self.out_features = _features(base)
        self.factors: dict[str, tuple[Tensor, Tensor]] = {}

    def forward(self, x_BTD: Tensor) -> Tensor:
        y_BTF: Tensor = self.base(x_BTD)
        for name, rows in self.selection.groups:
            assert len(x_BTD) == self.selection.rows, f"select() named {self.selection.rows} rows, {len(x_BTD)} came"
            if name not in self.factors:
                continue
            a_rD, b_Fr = self.factors[name]
            x, y = (x_BTD, y_BTF) if rows is None else (x_BTD[rows], y_BTF[rows])
            y = (F.linear(F.linear(x.float(), a_rD), b_Fr) + y).to(y.dtype)
            y_BTF = y if rows is None else y_BTF.index_copy_(0, rows, y)
        return y_BTF


class AdapterSlots:
    """Adapters over one model, loaded and unloaded between passes, each row of a pass choosing its own.

    A linear is adapted only while a loaded adapter targets it; when the last one goes, the model has its own module
    back. Not thread-safe. Works over packed, quantized and tensor-parallel models.
    """

    def __init__(self, model: Gemma2) -> None:
        self.model = model
        self.selection = Selection(model.model.embed_tokens.weight.device)
        self._loads = 0
        self._loaded: dict[str, tuple[int, dict[str, AdaptedLinear]]] = {}
        """By adapter: the number of its load, and its linears by their place in the model."""

    @property
    def names(self) -> list[str]:
        """Loaded adapters in the order of loading."""
        return list(self._loaded)

    def generation(self, name: str | None) -> int:
        """A number that no other load has; 0 for the base. What was computed under a name is valid for one of them."""
        return 0 if name is None else self._loaded[name][0]

    def load(self, name: str, folder: str | Path) -> None:
        """Load a PEFT folder under a name.

        Raises, before anything changes, ValueError for a name that is taken or empty, FileNotFoundError, and
        CheckpointError where the folder cannot be used or does not fit this model.
        """
        if not name or name in self._loaded:
            raise ValueError(f"adapter: got {name!r}, allowed is a name that is not loaded ({self._list()})")
        adapter = load_adapter(folder)
        adapter.check(self.model.config)
        bases = {linear: self._base(linear) for linear in adapter.factors}
        for _, base, _ in bases.values():
            _features(base)
        self._loads += 1
        linears = {}
        for linear, (place, base, cut) in bases.items():
            a_rD, b_Fr = adapter.factors[linear]
            if cut is not None and cut.dim == 0:
                b_Fr = b_Fr[cut.span]
            elif cut is not None:
                a_rD = a_rD[:, cut.span]
            if not isinstance(base, AdaptedLinear):
                base = AdaptedLinear(base, self.selection)
                put(self.model, place, base)
            device = self.selection.device
            scale = adapter.config.scale_of(linear)
            base.factors[name] = (a_rD.to(device, torch.float32), b_Fr.to(device, torch.float32) * scale)
            linears[place] = base
        self._loaded[name] = (self._loads, linears)

    def _base(self, linear: str) -> tuple[str, nn.Module, Sliced | None]:
        """Place and module that an update is added to, and the slice that it belongs to."""
        module = self.model.get_submodule(linear)
        if isinstance(module, Sliced):
            return f"{linear}.linear", module.linear, module
        return linear, module, None

    def unload(self, name: str) -> None:
        """Forget an adapter; ValueError where none of this name is loaded. The selection is emptied."""
        if name not in self._loaded:
            raise ValueError(f"adapter: got {name!r}, loaded are {self._list()}")
        for place, linear in self._loaded.pop(name)[1].items():
            del linear.factors[name]
            if not linear.factors:
                put(self.model, place, linear.base)
        self.selection.set(())

    def select(self, names_per_row: Sequence[str | None]) -> None:
        """Name the adapter of each row of the next forward passes, None for the base alone."""
        for name in names_per_row:
            if name is not None and name not in self._loaded:
                raise ValueError(f"adapter: got {name!r}, loaded are {self._list()}")
        self.selection.set(names_per_row)

    def _list(self) -> str:
        return ", ".join(self._loaded) or "none"
