"""gemwright cache-teacher: store what a teacher says of a data set, for distillation without it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Final

import tyro

from gemwright.cli.yaml_flags import expand
from gemwright.train.distill_options import CacheTeacherConfig

Options = CacheTeacherConfig
DESCRIPTION: Final = """Store a teacher's last hidden states over a data set, or (--samples N) ids drawn from it.

gemwright distill --teacher_cache OUTPUT with the same data options then needs no teacher. A killed run goes on with the
same command; a damaged shard is named and made again. Several devices: torchrun, each makes its share. For example:

  gemwright cache-teacher --teacher google/gemma-2-9b --dataset_name chats.jsonl --output CACHE
"""


def parse(arguments: Sequence[str]) -> CacheTeacherConfig:
    """The options on a command line."""
    return tyro.cli(
        CacheTeacherConfig,
        prog="gemwright cache-teacher",
        description=DESCRIPTION,
        args=expand(arguments),
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def run(options: CacheTeacherConfig) -> int:
    """Make the cache; prints what was made."""
    from gemwright.train.cache_teacher import cache_teacher

    done = cache_teacher(options)
    if options.json:
        print(json.dumps(done))
        return 0
    for part, numbers in done.items():
        rate = f", {numbers['tokens_per_second']} tokens/s" if numbers["tokens_per_second"] else ""
        print(
            f"{part}: {numbers['tokens']} tokens in {numbers['shards']} shards ({numbers['found']} were there), "
            f"{numbers['bytes_per_token']} bytes a token{rate}"
        )
    return 0
