"""gemwright sft: fine-tune on conversations, completions or text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import tyro

from gemwright.cli.yaml_flags import expand
from gemwright.train.options import SftConfig

Options = SftConfig
DESCRIPTION: Final = """Fine-tune a Gemma 2 model: all weights, LoRA (--use_peft) or QLoRA (--load_in_4bit).

Options are named as in TRL; --config FILE.yaml reads them from a file, and flags after it override it. Several devices:
torchrun --nproc-per-node N -m gemwright sft ... For example:

  gemwright sft --model_name google/gemma-2-2b --dataset_name chats.jsonl --output_dir OUT --use_peft --packing
"""


def parse(arguments: Sequence[str]) -> SftConfig:
    """The options on a command line."""
    return tyro.cli(
        SftConfig,
        prog="gemwright sft",
        description=DESCRIPTION,
        args=expand(arguments),
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def run(options: SftConfig) -> int:
    """Fine-tune; 0, or 143 after SIGTERM."""
    from gemwright.train.sft import sft
    from gemwright.train.trainer import TERMINATED

    return TERMINATED if sft(options) == "terminated" else 0
