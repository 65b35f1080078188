"""gemwright bench: measure the engine."""

from __future__ import annotations

from typing import Annotated

import tyro

from gemwright.cli import bench_engine

Options = Annotated[bench_engine.Options, tyro.conf.subcommand("engine", prefix_name=False)]


def run(options: bench_engine.Options) -> int:
    """Run the chosen benchmark."""
    return bench_engine.run(options)
