"""Small teachers and students for the tests of distillation, and dense references of the losses.

Legend: B rows, T places, V vocabulary, X places that carry loss.
"""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import folder_fixtures
import torch
import transformers
from folder_fixtures import WORDS
from safetensors.torch import load_file, save_file
from torch import Tensor

from gemwright.cli import cache_teacher as cache_cli
from gemwright.cli import distill as distill_cli

SHORT = (
    "--per_device_train_batch_size 2 --max_steps 6 --logging_steps 1 --learning_rate 3e-3 --adam_epsilon 1e-4 "
    "--dtype float32 --lr_scheduler_type constant --max_seq_length 40 --seed 3 --device cpu"
)


def folders(here: Path) -> tuple[Path, Path]:
    """A student and a wider teacher over one tokenizer; logits of the latter pass their cap."""
    folder_fixtures.gemma2(here / "student")
    folder_fixtures.gemma2(here / "teacher", hidden_size=64, final_logit_softcapping=5.0)
    return here / "student", here / "teacher"


def rows(path: Path, count: int = 14) -> Path:
    """Conversations enough for every test of distillation."""
    return folder_fixtures.chats(path, count)


def on_a_rank(data: str, out: str, flags: str) -> None:
    """`distill` as one of several processes; AssertionError where it does not end well."""
    torch.set_num_threads(1)
    assert distill(Path(data), Path(out), flags) == 0


def texts(path: Path, count: int = 14) -> Path:
    """Plain texts of different lengths."""
    path.write_text("\n".join(json.dumps({"text": " ".join((WORDS * 3)[i : i + 3 + 2 * i])}) for i in range(count)))
    return path


def distill(data: Path, out: Path, flags: str) -> int:
    """`gemwright distill` with the options of SHORT, which `flags` override."""
    line = f"--dataset_name {data} --output_dir {out} {SHORT} {flags}"
    return distill_cli.run(distill_cli.parse(shlex.split(line)))


def cache(teacher: Path, data: Path, out: Path, flags: str = "") -> int:
    """`gemwright cache-teacher` for the rows of SHORT."""
    line = f"--teacher {teacher} --dataset_name {data} --output {out} --max_seq_length 40 --device cpu {flags}"
    return cache_cli.run(cache_cli.parse(shlex.split(line)))


def theirs(folder: Path) -> Any:
    """transformers' own model of a folder, eager, fp32."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32", attn_implementation="eager")


def logits(model: Any, tokens_BT: Tensor) -> Tensor:
    """Logits [B, T, V] of whole rows, padded on the right."""
    out: Tensor = model(tokens_BT, use_cache=False).logits
    return out


def dense(kind: str, teacher_XV: Tensor, student_XV: Tensor, beta: float = 0.5) -> Tensor:
    """Divergences [X] by their definitions, from logits."""
    log_p, log_q = teacher_XV.log_softmax(-1), student_XV.log_softmax(-1)

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a.exp() * (a - b)).sum(-1)

    if kind == "jsd":
        log_m = (beta * log_p.exp() + (1 - beta) * log_q.exp()).log()
        return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)
    return {
        "forward_kl": kl(log_p, log_q),
        "reverse_kl": kl(log_q, log_p),
        "soft_cross_entropy": -(log_p.exp() * log_q).sum(-1),
    }[kind]


def changed(folder: Path, target: Path, name: str, change: float) -> Path:
    """A copy of a folder in which one weight is another."""
    shutil.copytree(folder, target)
    path = target / "model.safetensors"
    tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
    tensors[name] += change
    save_file(tensors, path, {"format": "pt"})
    return target


def llama(folder: Path, tokenizer: Path, *, width: int, kind: str = "Llama", **changes: Any) -> Path:
    """A tiny model of another architecture with a Gemma tokenizer's files."""
    torch.manual_seed(1)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=width, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3, max_position_embeddings=128, **changes,
    )  # fmt: skip
    getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer / name, folder / name)
    return folder
