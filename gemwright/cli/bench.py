"""gemwright bench: measure the engine, or a server."""

from __future__ import annotations

from typing import Annotated

import tyro

from gemwright.cli import bench_engine, bench_serve

Options = (
    Annotated[bench_engine.Options, tyro.conf.subcommand("engine", prefix_name=False)]
    | Annotated[bench_serve.Options, tyro.conf.subcommand("serve", prefix_name=False)]
)


def run(options: bench_engine.Options | bench_serve.Options) -> int:
    """Run the chosen benchmark."""
    return bench_serve.run(options) if isinstance(options, bench_serve.Options) else bench_engine.run(options)
