"""gemwright download: a checkpoint from the hub into the cache that every tool of huggingface_hub shares."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, arg

from gemwright.cli.options import File, Flag, Text


@dataclass(frozen=True)
class Options:
    """Fetch a model from the Hugging Face hub and print its folder.

    Only what a checkpoint consists of is fetched: safetensors, configs, tokenizer. Gemma's repositories are gated:
    accept the licence on the hub's page first, then `hf auth login` once, or pass --token.

    For example:

      gemwright download google/gemma-2-2b-it

      gemwright doctor $(gemwright download google/gemma-2-9b-it --revision main)
    """

    name: Annotated[Positional[str], arg(metavar="NAME", help_behavior_hint="")]
    """OWNER/NAME on the hub."""
    revision: Text = None
    """Branch, tag or commit."""
    token: Text = None
    """Hub token; default: the stored one."""
    cache_dir: File = None
    """Folder of the cache; default: the one that huggingface_hub uses."""
    offline: Flag = False
    """Look in the cache only."""
    json: Flag = False
    """Print a JSON object: folder, files with their bytes."""


def run(options: Options) -> int:
    """Download; 0."""
    from gemwright.hub import resolve

    folder = resolve(
        options.name,
        revision=options.revision,
        token=options.token,
        cache_dir=options.cache_dir,
        offline=options.offline,
    )
    if options.json:
        files = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
        print(json.dumps({"folder": str(folder), "files": files, "bytes": sum(files.values())}))
    else:
        print(folder)
    return 0
