"""The model card that a run leaves beside its weights: base model, data, settings, results, licence; and the upload."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gemwright import __version__
from gemwright.train.progress import LOG, records

GEMMA_NOTICE = (
    "Gemma is provided under and subject to the Gemma Terms of Use found at https://ai.google.dev/gemma/terms. "
    "This model is a derivative of it: the terms and its prohibited-use policy pass on to whoever receives it."
)


def write_card(
    out: Path, *, base: str | None, data: Sequence[str], method: str, settings: Mapping[str, Any], adapter: bool = False
) -> Path:
    """Write OUT/README.md; its path.

    Args:
        out: folder of the run, with its log.jsonl.
        base: folder or hub name of the base model; None for one trained from fresh weights.
        data: names of the data.
        method: what was done, in words.
        settings: the options of the run.
        adapter: whether the folder holds a PEFT adapter instead of a whole model.
    """
    gemma = base is not None and "gemma" in Path(base).name.lower()
    head = {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["gemma2", "gemwright"],
        **({"base_model": base} if base else {}),
        **({"license": "gemma"} if gemma else {}),
    }
    licence = GEMMA_NOTICE if gemma else "The licence is that of the base model and of the data; see there."
    lines = [
        "---",
        *(f"{key}: {json.dumps(value)}" for key, value in head.items()),
        "---",
        f"# {out.name}",
        "",
        f"{method}. Trained with Gemwright {__version__}.",
        "",
        f"- Base model: {base or 'none, fresh weights'}",
        f"- Data: {', '.join(data)}",
        *_results(out),
        "",
        "## Settings",
        "",
        "```json",
        json.dumps(dict(settings), indent=1, sort_keys=True),
        "```",
        "",
        "## Licence",
        "",
        licence if base else "The licence is that of the data; see there.",
        "",
    ]
    path = out / "README.md"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def _results(out: Path) -> list[str]:
    """The last losses that were logged."""
    lines = records(out / LOG)
    found = []
    for key, what in {"loss": "Training loss", "eval_loss": "Evaluation loss"}.items():
        last = next((line for line in reversed(lines) if key in line), None)
        if last is not None:
            found.append(f"- {what} at update {last['step']}: {last[key]:.4f} nats a target")
    tokens = next((line["tokens"] for line in reversed(lines) if "tokens" in line), None)
    return [*found, *([f"- Tokens read: {tokens:,}"] if tokens is not None else [])]


def push(out: Path, name: str | None, *, private: bool) -> str:
    """Upload model or adapter, card and picture; the address."""
    from huggingface_hub import HfApi

    api = HfApi()
    repository = api.create_repo(name or out.resolve().name, private=private, exist_ok=True).repo_id
    allowed = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "README.md", "loss.png", "log.jsonl"]
    done = api.upload_folder(
        repo_id=repository, folder_path=out, allow_patterns=allowed, ignore_patterns=["*/*"],
        commit_message="Trained with Gemwright",
    )  # fmt: skip
    print(f"uploaded to {done.repo_url}", file=sys.stderr)
    return repository
