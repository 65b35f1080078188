"""The student: the adopted model, the numbers that are trained, and the weights that follow from them.

Trained are all norms and an update of every linear: low-rank factors, or in a full run a matrix of its own size. The
model itself holds weights in bf16, rounded as the shipped model's are; `write` makes them from the trained numbers, and
`collect` carries their gradients back to the trained numbers by the same formula. So a step costs a few small products,
whatever the parametrisation, and the model runs at the speed of plain linears.

Every number is stored relative to its usual size (a post-norm's gain may be 500, a factor's entry 0.01), so one rate
fits all of a kind (SPEEDS).

Legend: O out, I in, r rank, D model, B rows, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gemwright.adopt import Llama, adopted_tensors, calibrate
from gemwright.bundled import delta_metadata
from gemwright.delta import PARTS, compress, healed
from gemwright.gguf import Gguf
from gemwright.model import Gemma2

SPEEDS = {"weight": 2.0, "lora_A": 5.0, "lora_B": 1.0, "update": 4.0}
"""How fast each kind of number learns, as a factor of the rate. lora_B starts at 0 and has no size of its own: at rate
1e-3 and rank 52 a step may change an output by 4 % of its input, which is as much as it bears."""


class Loaded:
    """A file's tensors, dequantised once, on a device: a `Source`."""

    def __init__(self, source: Gguf, device: torch.device) -> None:
        self.tensors = {name: source.tensor(name).to(device) for name in source.names()}

    def tensor(self, name: str, rows: slice | None = None) -> Tensor:
        return self.tensors[name] if rows is None else self.tensors[name][rows]


def adopted(source: Loaded, llama: Llama, calibration_BT: Tensor) -> dict[str, Tensor]:
    """The adopted weights, as `gemwright adopt` makes them, by name."""
    return dict(adopted_tensors(source, llama.config, calibrate(llama, calibration_BT)))


class Student:
    """A model and its trained numbers.

    Args:
        model: bf16 or fp32, on its device; its weights are written here.
        weights: the adopted model's, fp32.
        rank: of the updates; None for a full run.
    """

    def __init__(self, model: Gemma2, weights: dict[str, Tensor], rank: int | None) -> None:
        self.model, self.base, self.rank = model, weights, rank
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
        elif self.rank is None:
            self._train(f"{stem}.update", torch.zeros_like(weight), weight.square().mean().sqrt())
        else:
            low_rI = torch.randn(self.rank, weight.shape[1], device=weight.device)
            self._train(f"{stem}.lora_A", low_rI, weight.new_tensor(1 / math.sqrt(weight.shape[1])))
            self._train(f"{stem}.lora_B", weight.new_zeros(weight.shape[0], self.rank), weight.new_tensor(1.0))

    def _train(self, name: str, value: Tensor, size: Tensor) -> None:
        self.trained[name], self.sizes[name] = nn.Parameter(value.clone()), size

    def _value(self, name: str) -> Tensor:
        return self.trained[name] * self.sizes[name]

    def _update(self, name: str) -> Tensor:
        """A linear's update, fp32, differentiable."""
        stem = name.removesuffix(".weight")
        if self.rank is None:
            return self._value(f"{stem}.update")
        return self._value(f"{stem}.lora_B") @ self._value(f"{stem}.lora_A")

    def _weight(self, name: str) -> Tensor:
        return self._value(name) - 1 if name in self.trained else self.base[name] + self._update(name)

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

    def groups(self) -> list[dict[str, Any]]:
        """Parameters for the optimizer by kind, each with its speed: a factor of the rate."""
        kinds: dict[str, list[nn.Parameter]] = {}
        for name, parameter in self.trained.items():
            kinds.setdefault(name.rpartition(".")[2], []).append(parameter)
        return [{"params": found, "speed": SPEEDS[kind]} for kind, found in kinds.items()]

    @torch.no_grad()
    def delta(self, rank: int) -> dict[str, Tensor]:
        """What is shipped (`gemwright/delta.py`): norms, and updates of a rank in int8."""
        state: dict[str, Tensor] = {}
        for name, leaf in self.leaves.items():
            if leaf.dim() == 1:
                state[name] = self._weight(name)
            else:
                found = compress(self._update(name), rank)
                state |= {f"{name.removesuffix('.weight')}.{part}": value for part, value in found.items()}
        return {name: value.cpu().contiguous() for name, value in state.items()}

    @torch.no_grad()
    def load(self, delta: Mapping[str, Tensor]) -> None:
        """Put a shipped delta into the model, as the bundled model is built; the trained numbers stay as they are."""
        for name, leaf in self.leaves.items():
            if name in delta:
                leaf.copy_(delta[name])
            else:
                parts = {part: delta[f"{name.removesuffix('.weight')}.{part}"].to(leaf.device) for part in PARTS}
                leaf.copy_(healed(self.base[name], parts))


def save_delta(path: Path, delta: dict[str, Tensor], rank: int) -> None:
    """Write a delta, visible at once when whole."""
    save_file(delta, path.with_suffix(".new"), metadata=delta_metadata(rank))
    path.with_suffix(".new").replace(path)


def load_delta(path: Path) -> dict[str, Tensor]:
    """The tensors of a delta."""
    return load_file(path)
