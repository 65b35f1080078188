"""gemwright distill: a student learns a teacher's distribution over the whole vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import tyro

from gemwright.cli.yaml_flags import expand
from gemwright.train.distill_options import DistillConfig

Options = DistillConfig
DESCRIPTION: Final = """Distil a teacher into a Gemma 2 student: all weights, or LoRA (--use_peft).

The teacher is a Gemma 2 or any causal model that transformers loads with the same token ids. It runs beside the
student, or is read from a cache (gemwright cache-teacher). --lmbda mixes in answers that the student generates.
--config FILE.yaml reads options from a file, and flags after it override it. Several devices:
torchrun --nproc-per-node N -m gemwright distill ... For example:

  gemwright distill --model_name google/gemma-2-2b --teacher google/gemma-2-9b --dataset_name chats.jsonl --output_dir O
"""


def parse(arguments: Sequence[str]) -> DistillConfig:
    """The options on a command line."""
    return tyro.cli(
        DistillConfig,
        prog="gemwright distill",
        description=DESCRIPTION,
        args=expand(arguments),
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def run(options: DistillConfig) -> int:
    """Distil; 0, or 143 after SIGTERM."""
    from gemwright.train.distill import distill
    from gemwright.train.trainer import TERMINATED

    return TERMINATED if distill(options) == "terminated" else 0
