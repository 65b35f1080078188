"""gemwright doctor: the report of `gemwright.doctor` as a table, or as JSON."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Final

from tyro.conf import arg

from gemwright.cli.options import Flag, Model

if TYPE_CHECKING:
    from gemwright.doctor import Check

COLOURS: Final = {"ok": "32", "warn": "33", "FAIL": "31;1", "skipped": "2"}
NAME, STATUS = 17, 9
"""Columns of a check's name and of its status."""


@dataclass(frozen=True)
class Options:
    """Check a checkpoint, and this machine's arithmetic on its weights, trait by trait.

    Every check is named after a trait of Gemma 2 that tools have been known to break: soft-caps, the window, BOS, the
    norms' + 1, and so on. Facts of the files are read; arithmetic is probed on a few layers of the real weights, with
    inputs scaled so that caps and window bite. Memory stays bounded by those layers.

    Exit code: 0 if no check failed, 1 if one did, 2 if the folder is not there.

    For example:

      gemwright doctor FOLDER

      gemwright doctor google/gemma-2-9b-it --dtype bfloat16 --json

      gemwright doctor FOLDER --attention flex --device cuda
    """

    model: Model = None
    """Folder or hub name."""
    device: str = "auto"
    """auto (CUDA where there is one, else CPU), cpu, cuda, cuda:N or mps."""
    dtype: str = "auto"
    """auto (as stored), bfloat16, float32 or float16."""
    attention: str = "auto"
    """Attention backend to check: auto, reference, blocked, flex or triton."""
    layers: Annotated[int, arg(metavar="N")] = 2
    """Layers to run with their weights, from the first; one local and one global are always among them."""
    offline: Flag = False
    """Take a hub name from the cache only."""
    json: Flag = False
    """Print one JSON object: folder, ok, checks."""


def run(options: Options) -> int:
    """Examine; 0 if no check failed, else 1."""
    from gemwright import bundled, hub
    from gemwright.doctor import Subject, examine

    folder = bundled.folder() if options.model is None else hub.resolve(options.model, offline=options.offline)
    subject = Subject(
        folder, device=options.device, dtype=options.dtype, attention=options.attention, layers=options.layers
    )
    checks = []
    if not options.json:
        print(f"{folder}, on {subject.device}")
    for check in examine(subject):
        checks.append(check)
        if not options.json:
            print(row(check), flush=True)
    failed = [check for check in checks if check.status == "FAIL"]
    if options.json:
        record = {"folder": str(folder), "ok": not failed, "checks": [dataclasses.asdict(check) for check in checks]}
        print(json.dumps(record, ensure_ascii=False))
    else:
        print(summary(checks))
    return 1 if failed else 0


def row(check: Check) -> str:
    """A check as a line of the table, its detail wrapped to the terminal."""
    status = f"{check.status:<{STATUS}}"
    if sys.stdout.isatty() and "NO_COLOR" not in os.environ:
        status = f"\x1b[{COLOURS[check.status]}m{status}\x1b[0m"
    detail = check.detail + (f". To do: {check.remedy}" if check.remedy else "")
    width = max(40, shutil.get_terminal_size((120, 24)).columns - NAME - STATUS)
    lines = textwrap.wrap(detail, width, break_on_hyphens=False) or [""]
    return f"{check.name:<{NAME}}{status}" + f"\n{'':<{NAME + STATUS}}".join(lines)


def summary(checks: list[Check]) -> str:
    """What fired, in plain words."""
    by_status = {status: [check for check in checks if check.status == status] for status in COLOURS}
    counts = ", ".join(f"{len(found)} {status}" for status, found in by_status.items() if found)
    fired = [f"{check.name}: {check.trap}." for check in by_status["FAIL"]]
    return "\n".join([f"\n{counts}", *fired])
