"""The student: the adopted model, the numbers that are trained, and the weights that follow from them.

Trained are all norms and an update of every linear: low-rank factors, or in a full run a matrix of its own size. The
model itself holds weights in bf16, rounded as the shipped model's are; `write` makes them from the trained numbers, and
`collect` carries their gradients back to the trained numbers by the same formula. So a step costs a few small products,
whatever the parametrisation, and the model runs at the speed of plain linears.

Every number is stored relative to its usual size (a post-norm's gain may be 500, a factor's entry 0.01), so one rate
fits all of a kind (SPEEDS).

Legend: L layers, O out, I in, r rank, D model, B rows, T tokens.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gemwright.adopt import adopted_tensors, calibrate
from gemwright.ballast import Ballast
from gemwright.bundled import delta_metadata
from gemwright.delta import compress, healed, leading, on_grid, packed, parts, steps
from gemwright.gguf import Gguf
from gemwright.llama import EMBEDDING, Llama
from gemwright.lowering import Lowering
from gemwright.model import Gemma2

SPEEDS = {"weight": 2.0, "lora_A": 5.0, "lora_B": 1.0, "update": 4.0}
"""How fast each kind of number learns, as a factor of the rate. lora_B starts at 0 and has no size of its own: at rate
1e-3 and rank 52 a step may change an output by 4 % of its input, which is as much as it bears."""
FACTOR_SPEED = 2.0
"""Of both factors of an update that was learned whole: they have their size."""
DAMPING = 1e-2
"""Of the mean second moment, added to each: the moments are those of a few steps."""


class Loaded:
    """A file's tensors, dequantised once, on a device: a `Source`."""

    def __init__(self, source: Gguf, device: torch.device) -> None:
        self.tensors = {name: source.tensor(name).to(device) for name in source.names()}

    def tensor(self, name: str, rows: slice | None = None) -> Tensor:
        return self.tensors[name] if rows is None else self.tensors[name][rows]


def adopted(source: Loaded, llama: Llama, calibration_BT: Tensor) -> dict[str, Tensor]:
    """The adopted weights by name, as `gemwright adopt` makes them, but for its steps that come after."""
    return dict(adopted_tensors(source, llama.config, calibrate(llama, calibration_BT)))


class Student:
    """A model and its trained numbers, which stand in one tensor for all layers of a kind.

    Args:
        model: bf16 or fp32, on its device; its weights are written here.
        weights: the adopted model's, fp32.
        rank: of the updates; None for a full run.
    """

    def __init__(self, model: Gemma2, weights: dict[str, Tensor], rank: int | None) -> None:
        self.model, self.rank, self.speeds = model, rank, SPEEDS
        self.weights, self.device = weights, model.lm_head.weight.device
        model.model.embed_tokens.weight.requires_grad_(False)
        self.kinds: dict[str, list[str]] = {}
        for name, _ in model.named_parameters():
            if name != "lm_head.weight" and "embed_tokens" not in name:
                self.kinds.setdefault(kind_of(name), []).append(name)
        self.sizes: dict[str, Tensor] = {}
        self.trained: dict[str, nn.Parameter] = {}
        self.begin()
        self.written: dict[str, Tensor] = {}
        self.leaves: dict[str, list[nn.Parameter]] = {}
        for kind in self.kinds:
            self._share(kind)
            self._prepare(kind)
        self.made: dict[str, Tensor] = {}
        self.moments: dict[str, tuple[Tensor, Tensor]] = {}

    def _share(self, kind: str) -> None:
        """Lay a kind's weights side by side: one copy writes all of them."""
        self.written[kind] = torch.empty_like(self.base[kind], dtype=self.model.lm_head.weight.dtype)
        self.leaves[kind] = []
        for name, weight in zip(self.kinds[kind], self.written[kind], strict=True):
            parent, _, leaf = name.rpartition(".")
            parameter = nn.Parameter(weight)
            setattr(self.model.get_submodule(parent), leaf, parameter)
            self.leaves[kind].append(parameter)

    def _prepare(self, kind: str) -> None:
        base, stem = self.base[kind], kind.removesuffix(".weight")
        if base.dim() == 2:
            self._train(kind, *relative(1 + base))
            return
        L, O, I = base.shape  # noqa: E741
        if self.rank is None:
            self._train(f"{stem}.update", torch.zeros_like(base), base.square().mean((1, 2), keepdim=True).sqrt())
        else:
            low_LrI = torch.randn(L, self.rank, I, device=base.device)
            self._train(f"{stem}.lora_A", low_LrI, base.new_tensor(1 / math.sqrt(I)))
            self._train(f"{stem}.lora_B", base.new_zeros(L, O, self.rank), base.new_tensor(1.0))

    @torch.no_grad()
    def begin(self, *steps: Lowering | Ballast) -> None:
        """Take the adopted weights through steps of adoption; updates are relative to what comes of them."""
        self.steps = steps
        touched = through(self.weights, self.steps)
        self.model.model.embed_tokens.weight.copy_(touched[EMBEDDING])
        self.base = {kind: torch.stack([touched[name] for name in names]) for kind, names in self.kinds.items()}
        for kind in self.trained.keys() & self.base.keys():
            value, self.sizes[kind] = relative(1 + self.base[kind])
            self.trained[kind].copy_(value)

    @torch.no_grad()
    def start(self, delta: Mapping[str, Tensor]) -> None:
        """Begin a full run from a delta that was trained before."""
        assert self.rank is None
        delta = {name: tensor.to(self.device) for name, tensor in delta.items()}
        self.begin(*steps(delta, self.model.config))
        for kind, names in self.kinds.items():
            base, stem = self.base[kind], kind.removesuffix(".weight")
            if base.dim() == 2:
                value, self.sizes[kind] = relative(1 + torch.stack([delta[name] for name in names]))
                self.trained[kind].copy_(value)
            else:
                updates = [healed(torch.zeros(()), parts(delta, name)) for name in names]
                self.trained[f"{stem}.update"].copy_(torch.stack(updates) / self.sizes[f"{stem}.update"])

    @torch.no_grad()
    def put(self, weights: Mapping[str, Tensor]) -> None:
        """Let updates, whole as yet, make weights what they are here, by the model's names."""
        for name, weight in weights.items():
            kind = kind_of(name)
            layer, update = self.kinds[kind].index(name), f"{kind.removesuffix('.weight')}.update"
            self.trained[update][layer].copy_((weight - self.base[kind][layer]) / self.sizes[update][layer])

    def _train(self, name: str, value: Tensor, size: Tensor) -> None:
        self.trained[name], self.sizes[name] = nn.Parameter(value.clone(memory_format=torch.contiguous_format)), size

    def watch(self) -> None:
        """From here on `collect` adds up the second moments of the linears' gradients by outputs and by inputs."""
        for kind, base in self.base.items():
            if base.dim() == 3 and kind not in self.moments:
                L, O, I = base.shape  # noqa: E741
                self.moments[kind] = base.new_zeros(L, O, O), base.new_zeros(L, I, I)

    @torch.no_grad()
    def factor(self, rank: int) -> None:
        """From here on train low-rank factors, the best ones of the updates that were learned whole.

        A full update learns faster, and its best factors are further than factors trained from the start: after a
        million tokens each, held-out KL 0.34 in full, 0.37 factored, 0.44 to 0.49 trained as factors (rank 52).

        Where gradients were watched, what is lost is weighed by them: the Fisher information of a linear is nearly the
        product of its gradients' moments by outputs and by inputs (Kronecker factors, arXiv 1503.05671).
        """
        for kind, base in self.base.items():
            if base.dim() == 2:
                continue
            stem, update = kind.removesuffix(".weight"), self._update(kind)
            del self.trained[f"{stem}.update"], self.sizes[f"{stem}.update"]
            b_LOr, a_LrI = weighed(update, rank, *self.moments.pop(kind, ()))
            for name, factor in (("lora_A", a_LrI), ("lora_B", b_LOr)):
                size_L11 = factor.square().mean((1, 2), keepdim=True).sqrt().clamp(min=1e-12)
                self._train(f"{stem}.{name}", factor / size_L11, size_L11)
        self.rank, self.speeds = rank, {**SPEEDS, "lora_A": FACTOR_SPEED, "lora_B": FACTOR_SPEED}

    def _value(self, name: str) -> Tensor:
        return self.trained[name] * self.sizes[name]

    def _update(self, kind: str) -> Tensor:
        """The updates of a kind of linears [L, O, I], fp32, differentiable."""
        stem = kind.removesuffix(".weight")
        if self.rank is None:
            return self._value(f"{stem}.update")
        a_LrI, b_LrO = self._factors(stem)
        return on_grid(b_LrO).mT @ on_grid(a_LrI)

    def _factors(self, stem: str) -> tuple[Tensor, Tensor]:
        """The factors of a kind's updates, by vector."""
        return self._value(f"{stem}.lora_A"), self._value(f"{stem}.lora_B").mT

    def _weight(self, kind: str) -> Tensor:
        return self._value(kind) - 1 if kind in self.trained else self.base[kind] + self._update(kind)

    def write(self) -> None:
        """Make the model's weights from the trained numbers."""
        self.made = {kind: self._weight(kind) for kind in self.kinds}
        with torch.no_grad():
            for kind, made in self.made.items():
                self.written[kind].copy_(made)
                for leaf in self.leaves[kind]:
                    leaf.grad = None

    def collect(self) -> None:
        """Carry the gradients of the model's weights back to the trained numbers."""
        made, grads = [], []
        for kind, leaves in self.leaves.items():
            assert all(leaf.grad is not None for leaf in leaves), kind
            made.append(self.made[kind])
            grads.append(torch.stack([leaf.grad for leaf in leaves if leaf.grad is not None]).float())
            for moment, grad in zip(self.moments.get(kind, ()), (grads[-1], grads[-1].mT), strict=False):
                moment.baddbmm_(grad, grad.mT)
        torch.autograd.backward(made, grads)
        self.made = {}

    def groups(self) -> list[dict[str, Any]]:
        """Parameters for the optimizer by kind, each with its speed: a factor of the rate."""
        kinds: dict[str, list[nn.Parameter]] = {}
        for name, parameter in self.trained.items():
            kinds.setdefault(name.rpartition(".")[2], []).append(parameter)
        return [{"params": found, "speed": self.speeds[kind]} for kind, found in kinds.items()]

    def beginning(self) -> dict[str, Tensor]:
        """The steps of adoption by name, as a file holds them."""
        return {name: tensor for step in self.steps for name, tensor in step.state().items()}

    @torch.no_grad()
    def delta(self, rank: int) -> dict[str, Tensor]:
        """What is shipped (`gemwright/delta.py`): norms, and updates of a rank, as trained where factored."""
        state = self.beginning()
        for kind, names in self.kinds.items():
            if self.base[kind].dim() == 2:
                state |= dict(zip(names, self._weight(kind), strict=True))
                continue
            if self.rank is None:
                updates = [compress(update, rank) for update in self._update(kind)]
            else:
                updates = [packed(a, b) for a, b in zip(*self._factors(kind.removesuffix(".weight")), strict=True)]
            for name, found in zip(names, updates, strict=True):
                state |= {f"{name.removesuffix('.weight')}.{part}": value for part, value in found.items()}
        return {name: value.cpu().contiguous() for name, value in state.items()}

    @torch.no_grad()
    def load(self, delta: Mapping[str, Tensor]) -> None:
        """Put a shipped delta into the model, as the bundled model is built, to measure it: training does not go on."""
        delta = {name: tensor.to(self.device) for name, tensor in delta.items()}
        self.begin(*steps(delta, self.model.config))
        for kind, names in self.kinds.items():
            for name, base, leaf in zip(names, self.base[kind], self.leaves[kind], strict=True):
                if name in delta:
                    leaf.copy_(delta[name])
                else:
                    leaf.copy_(healed(base, parts(delta, name)))


def kind_of(name: str) -> str:
    """The name of a parameter without its layer."""
    return re.sub(r"layers\.\d+\.", "", name)


def through(weights: dict[str, Tensor], steps: Sequence[Lowering | Ballast]) -> dict[str, Tensor]:
    """Weights after steps of adoption."""
    for step in steps:
        weights = {name: step.apply(name, weight) for name, weight in weights.items()}
    return weights


def relative(gain_LD: Tensor) -> tuple[Tensor, Tensor]:
    """Gains over their usual size, and the size; a gain of 0, which a ballast needs, has none and stays."""
    size_LD = gain_LD.abs().mean(-1, keepdim=True) * (gain_LD != 0)
    return torch.where(gain_LD == 0, 0, gain_LD / size_LD), size_LD


def weighed(update_LOI: Tensor, rank: int, *moments: Tensor) -> tuple[Tensor, Tensor]:
    """The factors [L, O, r] and [L, r, I] of updates whose difference costs least by moments [L, O, O] and [L, I, I];
    without moments every number counts alike."""
    roots = [root(moment) for moment in moments]
    if roots:
        update_LOI = roots[0].mT @ update_LOI @ roots[1]
    u_LOr, s_Lr, v_LIr = leading(update_LOI, rank)
    b_LOr, a_LIr = u_LOr * s_Lr[:, None].sqrt(), v_LIr * s_Lr[:, None].sqrt()
    if roots:
        b_LOr, a_LIr = (
            torch.linalg.solve_triangular(r.mT, x, upper=True) for r, x in zip(roots, (b_LOr, a_LIr), strict=True)
        )
    return b_LOr, a_LIr.mT


def root(moment_LXX: Tensor) -> Tensor:
    """The lower triangular root of second moments, to whose diagonal a share of its mean is added."""
    share_L = DAMPING * moment_LXX.diagonal(dim1=-2, dim2=-1).mean(-1)
    root_LXX: Tensor = torch.linalg.cholesky(
        moment_LXX + torch.diag_embed(share_L[:, None].expand(moment_LXX.shape[:-1]))
    )
    return root_LXX


def save_delta(path: Path, delta: dict[str, Tensor], rank: int) -> None:
    """Write a delta, visible at once when whole."""
    save_file(delta, path.with_suffix(".new"), metadata=delta_metadata(rank))
    path.with_suffix(".new").replace(path)


def load_delta(path: Path) -> dict[str, Tensor]:
    """The tensors of a delta."""
    return load_file(path)
