"""What a run tells while it goes: a bar, a line a record in log.jsonl, trackers on request, a picture of the losses.

log.jsonl has one JSON object a line: every `logging_steps` updates `step, loss, learning_rate, grad_norm, tokens,
tokens_per_second, mfu, memory, seconds`; after an evaluation `step, eval_loss, perplexity`; and every update that was
refused, with the reason. `loss` is in nats a target, the mean over the targets since the line before. A resumed run
takes out the lines past its checkpoint, which it is about to write again.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

import psutil
import torch
from tqdm import tqdm

LOG: Final = "log.jsonl"
PICTURE: Final = "loss.png"
TRACKERS: Final = ("tensorboard", "wandb")
EXTRA: Final = "pip install 'gemwright[train]'"

log = logging.getLogger(__name__)


class Tracker(Protocol):
    """Where records go besides log.jsonl."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


class TensorBoard:
    """Event files in OUT/runs."""

    def __init__(self, out: Path, name: str | None, settings: Mapping[str, Any]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ModuleNotFoundError("report_to: tensorboard is not installed: pip install tensorboard") from error
        self._writer: Any = SummaryWriter(str(out / "runs" / name if name else out / "runs"))
        self._writer.add_text("settings", f"```\n{json.dumps(dict(settings), indent=1)}\n```")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """Weights & Biases; offline where WANDB_MODE says so (its own variable)."""

    def __init__(self, out: Path, name: str | None, settings: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ModuleNotFoundError("report_to: wandb is not installed: pip install wandb") from error
        self._run: Any = wandb.init(project="gemwright", name=name, dir=str(out), config=dict(settings))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


_TRACKERS: Final[dict[str, type[TensorBoard] | type[Wandb]]] = {"tensorboard": TensorBoard, "wandb": Wandb}


def chosen_trackers(report_to: Sequence[str]) -> list[str]:
    """The trackers that `report_to` asks for: none, all, or names."""
    names = [name for name in report_to if name != "none"]
    names = list(TRACKERS) if names == ["all"] else names
    if unknown := sorted(set(names) - set(TRACKERS)):
        raise ValueError(f"report_to: got {', '.join(unknown)}, allowed are none, all, {', '.join(TRACKERS)}")
    return names


class Progress:
    """The reports of one process; one that does not lead is silent."""

    def __init__(
        self,
        out: Path,
        *,
        total: int,
        step: int,
        leads: bool,
        report_to: Sequence[str] = (),
        run_name: str | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.out, self.leads = out, leads
        self._trackers: list[Tracker] = []
        names = chosen_trackers(report_to)
        if leads:
            out.mkdir(parents=True, exist_ok=True)
            _cut(out / LOG, step)
            self._trackers = [_TRACKERS[name](out, run_name, settings or {}) for name in names]
        # None: no bar where nobody watches; lines are written there instead
        self._bar: Any = tqdm(
            total=total, initial=step, unit="step", file=sys.stderr, disable=None if leads else True, dynamic_ncols=True
        )
        self._lines = leads and self._bar.disable

    def step(self) -> None:
        """One update is over."""
        self._bar.update()

    def record(self, values: Mapping[str, Any]) -> None:
        """Log one record; `values` has `step`, and is plain JSON."""
        if not self.leads:
            return
        with (self.out / LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps(dict(values)) + "\n")
        text = ", ".join(f"{name} {_short(name, value)}" for name, value in values.items() if name != "step")
        if self._lines:
            print(f"step {values['step']}: {text}", file=sys.stderr, flush=True)
        elif "loss" in values:
            self._bar.set_postfix_str(
                ", ".join(f"{n} {_short(n, values[n])}" for n in ("loss", "tokens_per_second", "mfu", "memory"))
            )
        else:
            self._bar.write(f"step {values['step']}: {text}", file=sys.stderr)
        numbers = {n: float(v) for n, v in values.items() if n != "step" and isinstance(v, int | float)}
        for tracker in self._trackers:
            tracker.log(int(values["step"]), numbers)

    def say(self, text: str) -> None:
        """One line for whoever watches."""
        if self.leads:
            self._bar.write(text, file=sys.stderr)

    def close(self) -> None:
        """Draw the picture and close what is open."""
        self._bar.close()
        for tracker in self._trackers:
            tracker.close()
        if self.leads and not draw(self.out):
            print(f"{PICTURE}: not drawn, matplotlib is not installed: {EXTRA}", file=sys.stderr)


def _cut(path: Path, step: int) -> None:
    """Leave the records up to a step; a line that a kill cut in two goes too."""
    if not path.is_file():
        return
    kept = [json.dumps(record) + "\n" for record in records(path) if record["step"] <= step]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(kept), encoding="utf-8")
    partial.replace(path)


def records(path: Path) -> list[dict[str, Any]]:
    """The records of a log.jsonl, without a last line that a kill has cut."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"{path}:{number}: not JSON: {error}") from error
    return found


def _short(name: str, value: object) -> str:
    if name == "memory" and isinstance(value, int):
        return f"{value / 2**30:.2f} GiB"
    if name == "mfu" and isinstance(value, float):
        return f"{100 * value:.1f} %"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value)


def memory(device: torch.device) -> int:
    """Bytes: the peak that torch has allocated on a CUDA device, else what is resident of this process now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


class Stopwatch:
    """Tokens and arithmetic since the last record, over the seconds they took."""

    def __init__(self, peak: float) -> None:
        self.peak, self.started = peak, time.perf_counter()
        self.reset()

    def reset(self) -> None:
        self._since, self._tokens, self._flops = time.perf_counter(), 0.0, 0.0

    def add(self, tokens: float, flops: float) -> None:
        self._tokens, self._flops = self._tokens + tokens, self._flops + flops

    def read(self) -> dict[str, float]:
        """Tokens per second and MFU since `reset`, and seconds since the run began."""
        now = time.perf_counter()
        seconds = now - self._since
        return {
            "tokens_per_second": round(self._tokens / seconds, 1),
            "mfu": round(self._flops / seconds / self.peak, 4),
            "seconds": round(now - self.started, 2),
        }


def draw(out: Path) -> bool:
    """Draw the losses of log.jsonl into loss.png; whether matplotlib is there to do it."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    lines = records(out / LOG)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for key, style in (("loss", "-"), ("eval_loss", "o-")):
        points = [(line["step"], line[key]) for line in lines if math.isfinite(line.get(key, math.nan))]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=key.replace("_", " "), linewidth=1.2, markersize=4)
    axes.set_xlabel("update")
    axes.set_ylabel("loss, nats a target")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    partial = out / f".{PICTURE}.partial"
    try:
        figure.savefig(partial, dpi=120, format="png")
        partial.replace(out / PICTURE)
    finally:
        partial.unlink(missing_ok=True)
    return True
