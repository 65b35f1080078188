"""AdamW (arXiv 1711.05101) over fp32 masters, and the learning rate of each update.

A bf16 parameter cannot hold an update smaller than 1/256 of itself, so each one that is trained has an fp32 master:
moments and update are fp32, and the parameter is the master's rounding. An fp32 parameter is its own master. Gradients
are summed over micro-batches as the losses are, undivided; one factor (1 / count, times clipping) is applied once.

AdamW works element by element, so a sharded parameter is updated through its local shard: the optimizer knows nothing
of ranks. torch's fused kernel is called through its functional form, on whole lists for fp32 parameters and on bounded
groups for bf16 ones, whose gradients are converted on the way: masters and moments cost 12 bytes a parameter, and
with accumulation an fp32 sum of gradients 4 more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.optim.adamw import adamw

GROUP_ELEMENTS: Final = 2**26
"""Elements whose gradients are converted to fp32 at a time."""
KINDS: Final = ("master", "exp_avg", "exp_avg_sq")
"""What the optimizer keeps of each parameter, as checkpoints name it."""


def local(tensor: Tensor) -> Tensor:
    """The part of a DTensor that lies on this rank, over the same memory; any other tensor is itself."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


@dataclass(eq=False)
class Slot:
    """One trained parameter and what is kept of it: local parts, fp32."""

    name: str
    parameter: torch.nn.Parameter
    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor
    """Updates so far; a tensor, as the kernel wants it."""
    decay: float
    sum: Tensor | None = None
    """The gradient of earlier micro-batches, where the parameter cannot hold their sum exactly."""

    @property
    def rounded(self) -> bool:
        """Whether the parameter is a rounding of the master."""
        return self.master.dtype != self.parameter.dtype

    def gradient(self) -> Tensor:
        """The local gradient, in the parameter's dtype or, summed over micro-batches, in fp32."""
        return self.fresh() if self.sum is None else self.sum

    def fresh(self) -> Tensor:
        """The local gradient that the last backward left."""
        assert self.parameter.grad is not None, f"{self.name} is trained and has no gradient"
        return local(self.parameter.grad)


class AdamW:
    """AdamW with decoupled weight decay on matrices; vectors (norm gains) are not decayed."""

    def __init__(
        self,
        named: Iterable[tuple[str, torch.nn.Parameter]],
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        self.betas, self.eps = betas, eps
        self.slots = [self._slot(name, p, weight_decay) for name, p in named if p.requires_grad]
        if not self.slots:
            raise ValueError("model: no parameter requires a gradient; there is nothing to train")

    @staticmethod
    def _slot(name: str, parameter: torch.nn.Parameter, weight_decay: float) -> Slot:
        part = local(parameter.detach())
        master = part if part.dtype == torch.float32 else part.float()
        step = torch.zeros((), dtype=torch.float32, device=part.device)
        decay = weight_decay if parameter.ndim > 1 else 0.0
        return Slot(name, parameter, master, torch.zeros_like(master), torch.zeros_like(master), step, decay)

    def collect(self) -> None:
        """After each of several micro-batches: move gradients of rounded parameters into their fp32 sums."""
        for slot in self.slots:
            if slot.rounded:
                slot.sum = slot.fresh().float() if slot.sum is None else slot.sum.add_(slot.fresh())
                slot.parameter.grad = None

    def squares(self) -> Tensor:
        """Sum of the squares of this rank's gradients, fp32."""
        norms = torch._foreach_norm([slot.gradient() for slot in self.slots], dtype=torch.float32)
        return torch.stack([norm.to(norms[0].device) for norm in norms]).square().sum()

    def update(self, rate: float, factor: float) -> None:
        """One update with the learning rate `rate` and gradients times `factor`; the gradients are gone after it."""
        for group in self._groups():
            # after a resume as before it: the same lists in the same order, so the same bits
            adamw(
                [slot.master for slot in group],
                [slot.gradient().float() for slot in group],
                [slot.exp_avg for slot in group],
                [slot.exp_avg_sq for slot in group],
                [],
                [slot.step for slot in group],
                fused=True,
                grad_scale=torch.tensor(1 / factor, dtype=torch.float32, device=group[0].master.device),
                amsgrad=False,
                beta1=self.betas[0],
                beta2=self.betas[1],
                lr=rate,
                weight_decay=group[0].decay,
                eps=self.eps,
                maximize=False,
            )
            self._round(group)
            for slot in group:
                slot.parameter.grad = slot.sum = None

    def clear(self) -> None:
        """Forget the gradients."""
        for slot in self.slots:
            slot.parameter.grad = slot.sum = None

    def _groups(self) -> Iterator[list[Slot]]:
        """Slots of one decay, those that need conversion at most GROUP_ELEMENTS at a time."""
        for decay in sorted({slot.decay for slot in self.slots}):
            group: list[Slot] = []
            held = 0
            for slot in self.slots:
                if slot.decay != decay:
                    continue
                size = slot.master.numel() * slot.rounded
                if group and held + size > GROUP_ELEMENTS:
                    yield group
                    group, held = [], 0
                group.append(slot)
                held += size
            yield group

    def state(self) -> dict[str, tuple[torch.nn.Parameter, Tensor]]:
        """What a checkpoint keeps: `KIND.NAME` -> the parameter whose shape it has, and this rank's part of it."""
        return {f"{kind}.{slot.name}": (slot.parameter, getattr(slot, kind)) for kind in KINDS for slot in self.slots}

    def restored(self, updates: int) -> None:
        """To be called when the tensors of `state` have been read into place."""
        for slot in self.slots:
            slot.step.fill_(updates)
        self._round(self.slots)

    @staticmethod
    def _round(slots: list[Slot]) -> None:
        """Parameters become the roundings of their masters, in few launches."""
        rounded = [slot for slot in slots if slot.rounded]
        if rounded:
            torch._foreach_copy_([local(s.parameter.detach()) for s in rounded], [s.master for s in rounded])

    @property
    def updates(self) -> int:
        """Updates applied so far."""
        return int(self.slots[0].step)


def _linear(t: float, decay: float) -> float:
    return 1 - t


def _cosine(t: float, decay: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * t))


def _constant(t: float, decay: float) -> float:
    return 1.0


def _wsd(t: float, decay: float) -> float:
    return 1.0 if t <= 1 - decay else (1 - t) / decay


SCHEDULES: Final[dict[str, Callable[[float, float], float]]] = {
    "linear": _linear,
    "cosine": _cosine,
    "constant": _constant,
    "constant_with_warmup": _constant,
    "wsd": _wsd,
    "warmup_stable_decay": _wsd,
}
"""Share of the peak rate, from the share of the updates after warm-up that are done; `wsd` (arXiv 2404.06395) keeps the
peak and falls in a straight line over the last part, `decay`."""


@dataclass(frozen=True)
class Schedule:
    """The learning rate of each update: up in a straight line from 0, then as SCHEDULES says, down to a floor."""

    kind: str
    peak: float
    total: int
    warmup: int = 0
    floor: float = 0.0
    """Share of the peak that the rate does not fall below."""
    decay: float = 0.2
    """Share of the updates after warm-up that `wsd` falls over."""

    def __post_init__(self) -> None:
        if self.kind not in SCHEDULES:
            raise ValueError(f"lr_scheduler_type: got {self.kind!r}, allowed are {', '.join(SCHEDULES)}")
        if not 0 <= self.warmup <= self.total:
            raise ValueError(f"warmup_steps: got {self.warmup}, allowed are 0 to {self.total}, the updates of the run")

    def rate(self, update: int) -> float:
        """Learning rate of an update, counted from 0; as transformers counts, the first of a warm-up has rate 0."""
        if update < self.warmup:
            return self.peak * update / self.warmup
        share = SCHEDULES[self.kind]((update - self.warmup) / max(1, self.total - self.warmup), self.decay)
        return self.peak * (self.floor + (1 - self.floor) * share)
