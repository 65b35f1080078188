"""gemwright pretrain: train from fresh weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import tyro

from gemwright.cli.yaml_flags import expand
from gemwright.train.options import PretrainConfig

Options = PretrainConfig
DESCRIPTION: Final = """Train a Gemma 2 model from fresh weights, on text or on tokenised shards.

--config FILE.yaml reads options from a file, and flags after it override it. Several devices: torchrun
--nproc-per-node N -m gemwright pretrain ... For example:

  gemwright pretrain --model_config shape.yaml --tokenizer google/gemma-2-2b --dataset_name prose.jsonl --output_dir OUT
"""


def parse(arguments: Sequence[str]) -> PretrainConfig:
    """The options on a command line."""
    return tyro.cli(
        PretrainConfig,
        prog="gemwright pretrain",
        description=DESCRIPTION,
        args=expand(arguments),
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def run(options: PretrainConfig) -> int:
    """Train; 0, or 143 after SIGTERM."""
    from gemwright.train.pretrain import pretrain
    from gemwright.train.trainer import TERMINATED

    return TERMINATED if pretrain(options) == "terminated" else 0
