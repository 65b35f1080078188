"""The student: the adopted model, the numbers that are trained, and the weights that follow from them.

Trained are all norms, the rows that `linearise` put into the last linear of each sub-layer, and an update of every
linear: low-rank factors, or in a full run a matrix of its own size. The model itself holds bf16 weights, rounded as
the shipped model's are; `write` makes them from the trained numbers, and `collect` carries their gradients back to the
trained numbers by the same formula. So a step costs a few small products, whatever the parametrisation, and the model
runs at the speed of plain linears.

Every number is stored relative to its usual size (a post-norm's gain may be 3000, a factor's entry 0.01), so one rate
fits all of a kind.

Legend: O out, I in, r rank, D model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from gemwright.adopt import Llama, adopted_tensor, calibrate
from gemwright.bundled import delta_metadata
from gemwright.delta import DIMENSION, compress, healed
from gemwright.gguf import Gguf
from gemwright.linearise import Linearised, linearise
from gemwright.model import Gemma2


class Loaded:
    """A file's tensors, dequantised once, on a device: a `Source`."""

    def __init__(self, source: Gguf, device: torch.device) -> None:
        self.tensors = {name: source.tensor(name).to(device) for name in source.names()}

    def tensor(self, name: str, rows: slice | None = None) -> Tensor:
        return self.tensors[name] if rows is None else self.tensors[name][rows]


def adopted(source: Loaded, llama: Llama, calibration_BT: Tensor) -> tuple[dict[str, Tensor], Linearised | None]:
    """The plain adopted weights, as `gemwright adopt` makes them, by name."""
    weights = calibrate(llama, calibration_BT)
    for name in llama.config.parameter_shapes():
        if name not in weights:
            weights[name] = adopted_tensor(source, name)
    return weights, None


def linearised(source: Loaded, llama: Llama, calibration_BT: Tensor) -> tuple[dict[str, Tensor], Linearised]:
    """The adopted weights before rows and shift are put in, and these."""
    found = linearise(llama, calibration_BT)
    weights = {
        name: found.norms[name] if name in found.norms else adopted_tensor(source, name)
        for name in llama.config.parameter_shapes()
    }
    return weights, found


class Student:
    """A model and its trained numbers.

    Args:
        model: bf16 or fp32, on its device; its weights are written here.
        weights: the adopted model's, fp32.
        start: what `linearise` found, or None.
        rank: of the updates; None for a full run.
    """

    def __init__(self, model: Gemma2, weights: dict[str, Tensor], start: Linearised | None, rank: int | None) -> None:
        self.model, self.base, self.start, self.rank = model, weights, start, rank
        self.leaves = {n: p for n, p in model.named_parameters() if n != "lm_head.weight" and "embed_tokens" not in n}
        with torch.no_grad():
            model.model.embed_tokens.weight.copy_(weights["model.embed_tokens.weight"])
        model.model.embed_tokens.weight.requires_grad_(False)
        self.sizes: dict[str, Tensor] = {}
        self.trained: dict[str, nn.Parameter] = {}
        for name in self.leaves:
            self._prepare(name)
        self.made: dict[str, Tensor] = {}

    def _prepare(self, name: str) -> None:
        weight, stem = self.base[name], name.removesuffix(".weight")
        if weight.dim() == 1:
            gain_D = 1 + weight
            self._train(name, gain_D / gain_D.abs().mean(), gain_D.abs().mean())
            return
        if self.rank is None:
            self._train(f"{stem}.update", torch.zeros_like(weight), weight.square().mean().sqrt())
        else:
            low_rI = torch.randn(self.rank, weight.shape[1], device=weight.device)
            self._train(f"{stem}.lora_A", low_rI, weight.new_tensor(1 / math.sqrt(weight.shape[1])))
            self._train(f"{stem}.lora_B", weight.new_zeros(weight.shape[0], self.rank), weight.new_tensor(1.0))
        if self.start is not None and stem in self.start.rows:
            row_I = self.start.rows[stem]
            self._train(f"{stem}.row", row_I / row_I.square().mean().sqrt(), row_I.square().mean().sqrt())
        if self.start is not None and self.start.shift[0] == stem:
            _, column_O, row_I = self.start.shift
            self.base[name] = weight + torch.outer(column_O, row_I)

    def _train(self, name: str, value: Tensor, size: Tensor) -> None:
        self.trained[name], self.sizes[name] = nn.Parameter(value.clone()), size

    def _value(self, name: str) -> Tensor:
        return self.trained[name] * self.sizes[name]

    def _weight(self, name: str) -> Tensor:
        """One weight of the model from the trained numbers, fp32, differentiable."""
        stem = name.removesuffix(".weight")
        if name in self.trained:
            return self._value(name) - 1
        weight_OI = self.base[name]
        if self.rank is None:
            weight_OI = weight_OI + self._value(f"{stem}.update")
        else:
            weight_OI = weight_OI + self._value(f"{stem}.lora_B") @ self._value(f"{stem}.lora_A")
        if f"{stem}.row" in self.trained:
            assert self.start is not None
            at = torch.tensor([self.start.dimension], device=weight_OI.device)
            weight_OI = weight_OI.index_copy(0, at, self._value(f"{stem}.row")[None])
        return weight_OI

    def write(self) -> None:
        """Make the model's weights from the trained numbers."""
        self.made = {name: self._weight(name) for name in self.leaves}
        with torch.no_grad():
            for name, leaf in self.leaves.items():
                leaf.copy_(self.made[name])
                leaf.grad = None

    def collect(self) -> None:
        """Carry the gradients of the model's weights back to the trained numbers."""
        made, grads = [], []
        for name, leaf in self.leaves.items():
            assert leaf.grad is not None, name
            made.append(self.made[name])
            grads.append(leaf.grad.float())
        torch.autograd.backward(made, grads)
        self.made = {}
        if self.start is not None:  # the dimension that was given up stays so: what is written there goes nowhere
            for name, parameter in self.trained.items():
                if name.endswith(("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")):
                    assert parameter.grad is not None, name
                    parameter.grad[self.start.dimension] = 0

    def groups(self, rate: float) -> list[dict[str, object]]:
        """Parameters for the optimizer with their rates; norms and rows are relative, and learn at the same rate."""
        return [{"params": list(self.trained.values()), "rate": rate}]

    @torch.no_grad()
    def delta(self, rank: int) -> dict[str, Tensor]:
        """What is shipped (`gemwright/delta.py`): norms, rows, and updates of a rank in int8."""
        state: dict[str, Tensor] = {}
        for name, leaf in self.leaves.items():
            stem = name.removesuffix(".weight")
            if leaf.dim() == 1:
                state[name] = self._weight(name)
                continue
            update_OI = self._weight(name) - self.base[name]
            if self.start is not None and self.start.shift[0] == stem:
                update_OI += torch.outer(*self.start.shift[1:])
            if f"{stem}.row" in self.trained:
                assert self.start is not None
                state[f"{stem}.row"] = self._value(f"{stem}.row")
                update_OI[self.start.dimension] = 0
            state |= {f"{stem}.{part}": value for part, value in compress(update_OI, rank).items()}
        return {name: value.cpu().contiguous() for name, value in state.items()}

    @torch.no_grad()
    def load(self, delta: Mapping[str, Tensor], dimension: int) -> None:
        """Put a shipped delta into the model, as the bundled model is built; the trained numbers stay as they are."""
        parts = ("lora_A", "lora_B", "scale", "row")
        for name, leaf in self.leaves.items():
            stem = name.removesuffix(".weight")
            base = self.base[name]
            if self.start is not None and self.start.shift[0] == stem:
                base = base - torch.outer(*self.start.shift[1:])
            found = {p: delta[f"{stem}.{p}"].to(leaf.device) for p in parts if f"{stem}.{p}" in delta}
            leaf.copy_(delta[name] if name in delta else healed(base, found, dimension))


def save_delta(path: Path, delta: dict[str, Tensor], rank: int, dimension: int) -> None:
    """Write a delta, visible at once when whole."""
    save_file(delta, path.with_suffix(".new"), metadata=delta_metadata(rank, dimension))
    path.with_suffix(".new").replace(path)


def load_delta(path: Path) -> tuple[dict[str, Tensor], int]:
    """A delta and its dimension."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, int(file.metadata()[DIMENSION])  # noqa: SIM118
