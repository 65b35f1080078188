"""How trained weights become files that others load: a Hugging Face folder, or PEFT's adapter files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gemwright.adapter import LoraConfig
from gemwright.checkpoint import write
from gemwright.lora import LoRALinear, add_lora, save_adapter
from gemwright.model import Gemma2
from gemwright.train.distributed import World


@dataclass(frozen=True)
class Export:
    """How the trained weights become files that others load."""

    names: Sequence[str]
    """Parameters that are written."""
    write: Callable[[Path, Iterator[tuple[str, Tensor]]], object]
    """Writes them, whole and on any device, drawn one by one in the order of `names`, into a new folder."""

    def run(self, model: nn.Module, world: World, folder: Path) -> None:
        """Gather each parameter on every rank, write on the first."""
        parameters = dict(model.named_parameters())
        gathered = ((name, world.whole(parameters[name].detach())) for name in self.names)
        if world.leads:
            self.write(folder, gathered)
        for _ in gathered:  # on the other ranks, whose shards the first one waits for
            pass


def whole_model(
    model: Gemma2,
    *,
    config: Mapping[str, Any],
    dtype: torch.dtype,
    generation_config: Mapping[str, Any] | None = None,
    copy_from: Path | None = None,
) -> Export:
    """All weights, rounded to `dtype`, with a `config.json` that says so, and the tokenizer files of a folder."""

    def save(folder: Path, tensors: Iterator[tuple[str, Tensor]]) -> None:
        write(
            folder,
            ((name, tensor.to(dtype)) for name, tensor in tensors),
            config=config,
            generation_config=generation_config,
            copy_from=copy_from,
        )

    return Export(list(model.config.parameter_shapes()), save)


def adapter(model: Gemma2, config: LoraConfig, *, base: str) -> Export:
    """The adapter alone; `base` is the name that PEFT will load the base model by."""
    names = [name for name, p in model.named_parameters() if p.requires_grad]

    def save(folder: Path, tensors: Iterator[tuple[str, Tensor]]) -> None:
        with torch.device("meta"):  # a model of the same names, to hold what the ranks have put together
            shell = Gemma2(model.config)
        add_lora(shell, config)
        for name, tensor in tensors:
            layer, _, factor = name.rpartition(".")
            module = shell.get_submodule(layer)
            assert isinstance(module, LoRALinear), name
            setattr(module, factor, nn.Parameter(tensor.cpu(), requires_grad=False))
        save_adapter(shell, folder, base_model=base)

    return Export(names, save)
