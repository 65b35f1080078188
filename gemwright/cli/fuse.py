"""gemwright fuse: a base and an adapter become one checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, arg

from gemwright.cli.options import Flag


@dataclass(frozen=True)
class Options:
    """Fold a LoRA adapter (PEFT files) into its base: W + scale B A in fp32, rounded once to the base's dtype.

    For example:

      gemwright fuse google/gemma-2-2b OUT/adapter OUT/fused
    """

    base: Annotated[Positional[str], arg(metavar="BASE", help_behavior_hint="")]
    """Folder or hub name of the base."""
    adapter: Annotated[Positional[str], arg(metavar="ADAPTER", help_behavior_hint="")]
    """Folder of the adapter."""
    out: Annotated[Positional[str], arg(metavar="OUT", help_behavior_hint="")]
    """Folder to write."""
    offline: Flag = False
    """Take hub names from the cache only."""
    overwrite: Flag = False
    """Replace the checkpoint that is at OUT."""


def run(options: Options) -> int:
    """Fuse; 0."""
    from gemwright.hub import resolve
    from gemwright.lora import fuse_checkpoint

    base = resolve(options.base, offline=options.offline)
    print(fuse_checkpoint(base, options.adapter, options.out, overwrite=options.overwrite))
    return 0
