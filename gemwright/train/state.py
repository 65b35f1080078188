"""Checkpoints of a run: complete, atomic, and resumed bit for bit.

    OUT/checkpoint-200/
      config.json model.safetensors tokenizer.json ...    what `gemwright.load` and transformers load (or PEFT's files)
      state/*.safetensors                                 fp32 masters and moments of every trained parameter
      rng-00000.safetensors                               random states, a file a rank
      trainer_state.json                                  step, place in the data, settings, what was not yet logged

A checkpoint is written as `.checkpoint-200.partial`, flushed to the disk and renamed, so whatever bears the name is
whole, also after SIGKILL. One that is removed is renamed first. What a killed run left under hidden names goes when the
next run starts in the folder.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from gemwright.train.distributed import World
from gemwright.train.export import Export
from gemwright.train.optimizer import AdamW
from gemwright.weights import CheckpointError, read_json, save_tensors

STATE: Final = "trainer_state.json"
VERSION: Final = 1
"""Of the layout above."""
_NAME: Final = re.compile(r"checkpoint-(\d+)")
_OWN: Final = re.compile(r"state|rng-\d+\.safetensors|trainer_state\.json")
"""Files of a checkpoint that only a resumed run reads."""
_ENTRY: Final = ("config.json", "adapter_config.json")
"""Files without which a folder is no model: they appear last and go first."""


class Checkpoints:
    """The checkpoints in the folder of a run."""

    def __init__(self, out: Path, world: World, *, keep: int | None = None) -> None:
        self.out, self.world, self.keep = out, world, keep

    def steps(self) -> list[int]:
        """Steps with a checkpoint, ascending."""
        found = (_NAME.fullmatch(path.name) for path in self.out.iterdir()) if self.out.is_dir() else ()
        return sorted(int(match[1]) for match in found if match)

    def path(self, step: int) -> Path:
        return self.out / f"checkpoint-{step}"

    def clean(self) -> None:
        """Remove what a killed run left unfinished."""
        if self.world.leads:
            self.out.mkdir(parents=True, exist_ok=True)
            for pattern in (".checkpoint-*", "..checkpoint-*"):  # the latter are checkpoint.write's own
                for path in self.out.glob(pattern):
                    shutil.rmtree(path)
        self.world.wait()

    def empty(self) -> None:
        """Remove every checkpoint."""
        if self.world.leads:
            for step in self.steps():
                _remove(self.path(step))
        self.world.wait()

    def save(
        self, step: int, *, model: nn.Module, export: Export, optimizer: AdamW, progress: Mapping[str, Any]
    ) -> Path:
        """Write the checkpoint of a step; every rank must call it. OSError on a full disk, and nothing is left."""
        world, final = self.world, self.path(step)
        partial = self.out / f".{final.name}.partial"
        try:
            export.run(model, world, partial)
            world.wait()
            world.save(optimizer.state(), partial / "state")
            save_tensors(_rng(world.device), partial / f"rng-{world.rank:05d}.safetensors")
            world.wait()
            if world.leads:
                record = {"version": VERSION, "step": step, "updates": optimizer.updates, **progress}
                (partial / STATE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
                _flush(partial)
                if final.exists():  # the same step of the same run, evaluated or stopped after it was saved
                    _remove(final)
                partial.rename(final)
                _sync(self.out)
        finally:
            if world.leads:
                shutil.rmtree(partial, ignore_errors=True)
        world.wait()
        return final

    def unwritten(self, error: OSError) -> OSError:
        """What to say where a run could not write: what it leaves, and how to go on."""
        steps = self.steps()
        left = (
            f"{self.path(steps[-1])} is whole, and --resume goes on from it" if steps else "no checkpoint was made yet"
        )
        return OSError(error.errno, f"output_dir: {self.out}: {error.strerror}; {left}")

    def prune(self, best: int | None) -> None:
        """Remove all but the last `keep` checkpoints and the best."""
        if self.keep is None or not self.world.leads:
            return
        for step in self.steps()[: -self.keep]:
            if step != best:
                _remove(self.path(step))

    def read(self, step: int) -> dict[str, Any]:
        """The progress that a checkpoint holds; CheckpointError where it is of another layout."""
        record = read_json(self.path(step) / STATE)
        if record.get("version") != VERSION:
            raise CheckpointError(f"{self.path(step) / STATE}: version {record.get('version')!r}, due is {VERSION}")
        return record

    def load(self, step: int, *, optimizer: AdamW, updates: int) -> None:
        """Masters and moments into the optimizer and the model, and this rank's random states."""
        folder = self.path(step)
        self.world.load(optimizer.state(), folder / "state")
        optimizer.restored(updates)
        rng = folder / f"rng-{self.world.rank:05d}.safetensors"
        if not rng.is_file():  # more ranks than before: each goes on from its own seed
            return
        states = load_file(rng)
        torch.set_rng_state(states["cpu"])
        if "cuda" in states and self.world.device.type == "cuda":
            torch.cuda.set_rng_state(states["cuda"], self.world.device)

    def publish(self, step: int) -> None:
        """Put the model of a checkpoint into the folder of the run itself, by hard links where the disk has them."""
        if not self.world.leads:
            return
        source = self.path(step)
        for name in _ENTRY:
            (self.out / name).unlink(missing_ok=True)
        for old in (*self.out.glob("model*.safetensors*"), *self.out.glob("adapter_model.safetensors")):
            old.unlink()
        names = sorted((p.name for p in source.iterdir() if not _OWN.fullmatch(p.name)), key=lambda n: (n in _ENTRY, n))
        for name in names:
            (self.out / name).unlink(missing_ok=True)
            try:
                os.link(source / name, self.out / name)
            except OSError:
                shutil.copyfile(source / name, self.out / name)
        _sync(self.out)


def differences(saved: Mapping[str, Any], now: Mapping[str, Any], *, free: Sequence[str]) -> None:
    """Raise one ValueError that names every setting in which a resumed run departs from the one that was saved."""
    saved = json.loads(json.dumps(saved))
    now = json.loads(json.dumps(now))  # tuples are lists in a file
    named = [
        f"{name}: was {saved.get(name)!r}, is {now.get(name)!r}"
        for name in sorted({*saved, *now} - set(free))
        if saved.get(name) != now.get(name)
    ]
    if named:
        raise ValueError(
            f"resume: the settings differ from those of the checkpoint: {'; '.join(named)}. They must be the same; "
            f"these may change: {', '.join(free)}"
        )


def _rng(device: torch.device) -> dict[str, Tensor]:
    """The states that torch draws from, uint8."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _remove(folder: Path) -> None:
    """Take away a checkpoint; at no moment does half of one bear its name."""
    hidden = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(hidden, ignore_errors=True)
    folder.rename(hidden)
    shutil.rmtree(hidden)


def _flush(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
