"""The one training loop: batches through a loss into an update, on one device or many, until the last.

    loss(model, batch) -> sum, count, metrics

An update sums losses and gradients over `gradient_accumulation_steps` batches on every rank, undivided, and divides
once by the global count. The sums of loss, count, metrics, tokens and of the squares of the gradients travel in one
exchange; with them every rank takes the same decisions. A step whose loss or gradient is not finite is not applied but
reported, and counts as a step; `max_refused` of them in a row end the run.

Everything that the next step depends on is in a checkpoint: masters, moments, the place in the data, random states,
and the sums that were not yet logged. So a resumed run is the uninterrupted one, bit for bit, on the same machine and
number of ranks. On SIGTERM the current step is finished and saved, and the run ends; `train` says so.
"""

from __future__ import annotations

import dataclasses
import errno
import math
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from gemwright.model import Gemma2
from gemwright.ops.cpu import keep_memory
from gemwright.train.distributed import World
from gemwright.train.export import Export
from gemwright.train.optimizer import AdamW, Schedule
from gemwright.train.options import FREE, TrainConfig
from gemwright.train.progress import Progress, Stopwatch, memory
from gemwright.train.speed import (
    Measured,
    Work,
    check_recording,
    choose_precision,
    compile_blocks,
    pays_to_compile,
    peak_flops,
    recompute_blocks,
    record_passes,
)
from gemwright.train.state import Checkpoints, differences

TERMINATED: Final = 143
"""Exit code after SIGTERM: 128 + 15, as a shell says of a process that the signal ended; the state is saved."""
FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Numbers of an OSError that say that a disk, a quota or a file is full."""
Outcome = Literal["done", "terminated"]


class Batch(Measured, Protocol):
    """What the loop asks of a batch; the rest is between the data and the loss."""

    def to(self, device: torch.device | str) -> Any: ...


B_co = TypeVar("B_co", bound=Batch, covariant=True)
B_contra = TypeVar("B_contra", contravariant=True)


class Data(Protocol[B_co]):
    """Batches in a fixed order, each rank its own, and the place among them: `data.Loader`, `data.Stream`."""

    def __next__(self) -> B_co: ...
    def rewind(self) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Loss(Protocol[B_contra]):
    """An algorithm: sum over targets (0-d, differentiable), their count, and further sums to be divided by it."""

    def __call__(self, model: Gemma2, batch: B_contra, /) -> tuple[Tensor, Tensor, Mapping[str, Tensor]]: ...


class Diverged(RuntimeError):
    """Too many updates in a row were not finite."""


@dataclass
class Sums:
    """What an update, or all since the last record, adds up to over the ranks."""

    loss: float = 0.0
    count: float = 0.0
    tokens: float = 0.0
    flops: float = 0.0
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)

    def add(self, other: Sums) -> None:
        for name in ("loss", "count", "tokens", "flops"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.metrics = {name: self.metrics.get(name, 0.0) + value for name, value in other.metrics.items()}

    def means(self, prefix: str = "") -> dict[str, float]:
        """Loss and metrics a target."""
        sums = {"loss": self.loss, **self.metrics}
        return {f"{prefix}{name}": value / self.count for name, value in sums.items()}


class Trainer:
    """A run: made once, trained once.

    Args:
        model: on the world's device, or on any where parameters will be sharded; what is trained requires a gradient.
        loss: the algorithm.
        data: batches of this rank. Ends early where they do.
        total: updates of the run.
        world: the processes that train together.
        export: how checkpoints become models that others load.
        eval_data: batches of the evaluation, as many on every rank.
        settings: further facts that a resumed run must share (the options are compared anyway).
        free: names of options, besides FREE, that it need not share.
        notes: further numbers for each record, since the one before it; those of the first rank.
    """

    def __init__(
        self,
        model: Gemma2,
        loss: Loss[Any],
        data: Data[Any],
        config: TrainConfig,
        *,
        total: int,
        world: World,
        export: Export,
        eval_data: Data[Any] | None = None,
        settings: Mapping[str, Any] | None = None,
        free: Sequence[str] = (),
        notes: Callable[[], Mapping[str, float]] = dict,
    ) -> None:
        self.notes = notes
        self.wide = torch.float32 if world.device.type == "mps" else torch.float64
        """Of sums over tokens: fp32 counts to 2^24."""
        self.model, self.loss, self.data, self.config, self.world = model, loss, data, config, world
        self.total, self.export, self.eval_data = total, export, eval_data
        self.precision = choose_precision(config, world.device)
        compiled = pays_to_compile(config.compile, world.device, total)
        rows = config.per_device_train_batch_size * config.gradient_accumulation_steps * world.size
        decided = {"rows of an update": rows, "precision": self.precision, "total": total, "compile": compiled}
        self.settings = {**dataclasses.asdict(config), **decided, **(settings or {})}
        self.free = (*FREE, *free)
        self.work = Work.of(model)
        if compiled:
            compile_blocks(model)
        if config.gradient_checkpointing:
            recompute_blocks(model)
        if config.cuda_graphs:
            adapted = not all(parameter.requires_grad for parameter in model.parameters())
            check_recording(config, world.device, self.precision, sharded=world.mesh is not None, adapted=adapted)
            record_passes(model)
        world.shard(model, dtype=torch.bfloat16 if self.precision == "bfloat16" else torch.float32)
        self.optimizer = AdamW(
            model.named_parameters(),
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
        )
        warmup = config.warmup_steps or math.ceil(config.warmup_ratio * total)
        self.schedule = Schedule(
            config.lr_scheduler_type, config.learning_rate, total, warmup, config.min_lr_ratio, config.decay_ratio
        )
        self.checkpoints = Checkpoints(Path(config.output_dir).expanduser(), world, keep=config.save_total_limit)
        self.done, self.refused, self.tokens, self.stopped = 0, 0, 0.0, False
        self.norm, self.rate = math.nan, math.nan
        self.window = Sums()
        self.evaluated: dict[str, float] = {"step": 0, "loss": 0.0}
        self.best: dict[str, float] | None = None
        """Of the checkpoint with the lowest loss, as `evaluated`."""

    def train(self) -> Outcome:
        """Run to the last update, or to SIGTERM; the model is in output_dir after the former."""
        config = self.config
        if self.world.device.type == "cpu":
            keep_memory()
        self._start()
        progress = Progress(
            self.checkpoints.out,
            total=self.total,
            step=self.done,
            leads=self.world.leads,
            report_to=config.report_to,
            run_name=config.run_name,
            settings=self.settings,
        )
        with _sigterm() as stop:
            try:
                try:
                    outcome = self._loop(progress, stop)
                finally:
                    progress.close()
                if outcome == "done":
                    step = int(self.best["step"]) if config.load_best_model_at_end and self.best else self.done
                    self.checkpoints.publish(step)
            except OSError as error:
                if error.errno not in FULL:
                    raise
                raise self.checkpoints.unwritten(error) from error
        self.world.wait()
        return outcome

    def _loop(self, progress: Progress, stop: list[int]) -> Outcome:
        config = self.config
        dtype = torch.float32 if self.precision == "float32" else torch.bfloat16
        peak, origin = peak_flops(self.world.device, dtype)
        progress.say(f"MFU is a share of {self.world.size * peak / 1e12:.3g} TFLOP/s: {origin}")
        watch = Stopwatch(peak * self.world.size)
        saved = self.done
        while True:
            ended = self.done >= self.total or not self._step(progress, watch, stop)
            last = ended or self.stopped or self.done == self.total
            if self.window.count and self._due(config.logging_steps, last):
                self._record(progress, watch)
            due = self._due(config.eval_steps or config.save_steps, last and not self.stopped)
            if self.eval_data and due and self.evaluated["step"] < self.done:
                self._evaluate(progress)
                watch.reset()
            if saved < self.done and self._due(config.save_steps, last):
                self._save()
                saved = self.done
                watch.reset()
            if self.stopped:
                progress.say(f"SIGTERM: saved {self.checkpoints.path(self.done)}; --resume goes on from it")
                return "terminated"
            if last:
                return "done"

    def _due(self, every: int, last: bool) -> bool:
        return last or (self.done > 0 and self.done % every == 0)

    def _step(self, progress: Progress, watch: Stopwatch, stop: list[int]) -> bool:
        """One update; False where the data has ended instead."""
        world = self.world
        total = Sums()
        sums: dict[str, Tensor] = {}
        self.model.train()
        for index in range(self.config.gradient_accumulation_steps):
            try:
                batch = next(self.data)
            except StopIteration:
                assert index == 0, "the data ended in the middle of an update"
                progress.say(f"the data ended after {self.done} of {self.total} updates")
                return False
            self._forward(batch, sums).backward()  # type: ignore[no-untyped-call]
            if self.config.gradient_accumulation_steps > 1:
                self.optimizer.collect()
            total.add(Sums(tokens=batch.tokens, flops=self.work.flops(batch)))
        sums["squares"] = self.optimizer.squares().to(world.device)
        local = torch.tensor([total.tokens, total.flops, stop[0]], dtype=self.wide, device=world.device)
        values = world.sum(torch.cat([local, torch.stack([value.to(self.wide) for value in sums.values()])])).tolist()
        tokens, flops, told = values[:3]
        named = dict(zip(sums, values[3:], strict=True))
        done = Sums(named.pop("loss"), named.pop("count"), tokens, flops)
        squares = named.pop("squares")
        done.metrics = named
        self.stopped = told > 0  # every rank stops with the first that was told to
        rate = self.schedule.rate(self.done)
        self.done += 1
        self._apply(done, math.sqrt(squares) / done.count if squares >= 0 and done.count else math.nan, rate, progress)
        self.tokens += tokens
        watch.add(tokens, flops)
        progress.step()
        return True

    def _forward(self, batch: Batch, sums: dict[str, Tensor]) -> Tensor:
        """The loss of a batch; its numbers are added to `sums`: loss, count and the metrics, in this order."""
        device = self.world.device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "autocast"):
            loss, count, metrics = self.loss(self.model, batch.to(device))
        for name, value in {"loss": loss, "count": count, **metrics}.items():
            value = value.detach().to(self.wide)
            sums[name] = sums[name] + value if name in sums else value
        return loss

    def _apply(self, done: Sums, norm: float, rate: float, progress: Progress) -> None:
        """Update the parameters, or refuse to."""
        if math.isfinite(done.loss) and math.isfinite(norm):
            limit = self.config.max_grad_norm
            clip = min(1.0, limit / (norm + 1e-6)) if limit else 1.0
            self.optimizer.update(rate, clip / done.count)
            self.window.add(done)
            self.norm, self.rate, self.refused = norm, rate, 0
            return
        self.optimizer.clear()
        self.refused += 1
        reason = f"loss {done.loss / done.count}, gradient norm {norm}" if done.count else "no target in any batch"
        progress.record({"step": self.done, "refused": reason})
        if self.refused >= self.config.max_refused:
            raise Diverged(
                f"step {self.done}: {self.refused} updates in a row were refused (max_refused is "
                f"{self.config.max_refused}), the last for {reason}; the parameters are as they were before"
            )

    def _record(self, progress: Progress, watch: Stopwatch) -> None:
        numbers = {
            **self.window.means(),
            "learning_rate": self.rate,
            "grad_norm": self.norm,
            "tokens": int(self.tokens),
        }
        progress.record(
            {"step": self.done, **numbers, **self.notes(), **watch.read(), "memory": memory(self.world.device)}
        )
        self.window = Sums()
        watch.reset()

    def _evaluate(self, progress: Progress) -> None:
        """Loss and perplexity over the evaluation's data; nothing random is drawn."""
        assert self.eval_data is not None
        self.eval_data.rewind()
        self.model.eval()
        sums: dict[str, Tensor] = {}
        with torch.no_grad():
            for batch in _rest(self.eval_data):
                self._forward(batch, sums)
        self.world.reshard(self.model)
        values = self.world.sum(torch.stack([*sums.values()])).tolist()
        done = Sums(values[0], values[1], metrics=dict(zip([*sums][2:], values[2:], strict=True)))
        means = done.means("eval_")
        self.evaluated = {"step": self.done, "loss": means["eval_loss"]}
        nats = means.get("eval_cross_entropy", means["eval_loss"])
        perplexity = math.exp(nats) if nats < 700 else math.inf
        progress.record({"step": self.done, **means, "perplexity": perplexity})

    def _save(self) -> None:
        now = self.evaluated
        least = math.inf if self.best is None else self.best["loss"]
        if now["step"] == self.done and now["loss"] < least:  # a NaN is below nothing
            self.best = now
        progress = {
            "settings": self.settings,
            "world": self.world.size,
            "data": self.data.state_dict(),
            "window": dataclasses.asdict(self.window),
            "tokens": self.tokens,
            "refused": self.refused,
            "evaluated": self.evaluated,
            "best": self.best,
        }
        self.checkpoints.save(
            self.done, model=self.model, export=self.export, optimizer=self.optimizer, progress=progress
        )
        self.checkpoints.prune(None if self.best is None else int(self.best["step"]))

    def _start(self) -> None:
        """Seed, or go on from the last checkpoint."""
        config, checkpoints = self.config, self.checkpoints
        torch.manual_seed(config.seed + self.world.rank)
        checkpoints.clean()
        steps = checkpoints.steps()
        if not steps:
            return
        if not config.resume:
            if not config.overwrite_output_dir:
                raise FileExistsError(
                    f"output_dir: {checkpoints.out} has checkpoints (the last of step {steps[-1]}); --resume goes on "
                    "from it, --overwrite_output_dir removes them"
                )
            self.world.wait()
            checkpoints.empty()
            return
        record = checkpoints.read(steps[-1])
        differences(record["settings"], self.settings, free=self.free)
        checkpoints.load(steps[-1], optimizer=self.optimizer, updates=record["updates"])
        self.data.load_state_dict(record["data"])
        self.done, self.tokens, self.refused = record["step"], record["tokens"], record["refused"]
        self.best, self.evaluated = record["best"], record["evaluated"]
        self.window = Sums(**record["window"])


def _rest(data: Data[Any]) -> Iterator[Any]:
    """The batches that are left."""
    while True:
        try:
            batch = next(data)
        except StopIteration:
            return
        yield batch


@contextmanager
def _sigterm() -> Iterator[list[int]]:
    """A list of one number, 1 as soon as SIGTERM has come."""
    told = [0]

    def tell(number: int, frame: object) -> None:
        told[0] = 1

    before = signal.signal(signal.SIGTERM, tell)
    try:
        yield told
    finally:
        signal.signal(signal.SIGTERM, before)
