"""Let the source model answer the prompts, in its own ChatML with its default system text, and store the chats.

    python recipes/mini/answer.py --data DIR [--cells 900000] [--seconds 60] [--device cuda]

reads DIR/prompts.jsonl and writes DIR/tokens/{train,heldout}-chats-NNN.bin (`pairs.py` has the layout), a file a batch.
A batch whose file is there is skipped, so a run that was interrupted goes on; `--seconds` ends a run between batches.
Held-out prompts come first. A batch has prompts of like length and as many turns, and as many rows as its cache has
room for. Temperatures are 0.7 for seven conversations in ten, 1 and 0.2 for the others. An answer that met the limit
while it repeated itself is dropped.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data import SPLITS, rows, tokenizer, write_tokens
from pairs import Turns
from sample import Clock, degenerate, sample

from gemwright.adopt import adopted_config
from gemwright.bundled import base_path
from gemwright.gguf import Gguf
from gemwright.llama import Llama
from gemwright.ops.attention_blocked import blocked

NEW_TOKENS = 256
LONGEST = 512


def heat(index: int) -> float:
    """The temperature of a conversation."""
    draw = random.Random(index).random()
    return 0.7 if draw < 0.7 else 1.0 if draw < 0.85 else 0.2


def converse(
    llama: Llama, turns: Turns, asked: list[dict[str, Any]], generator: torch.Generator, clock: Clock
) -> list[list[int]]:
    """Answer a batch of conversations turn by turn; the documents, as the student reads them."""
    going = [(row, [0]) for row in asked]
    done = []
    for turn in range(max(len(row["turns"]) for row in asked)):
        for row, document in going:
            document += turns.question(row["turns"][turn])
        going = [(row, document) for row, document in going if len(document) < LONGEST]
        if not going:
            break
        read = [turns.pair(np.array(document, np.uint16)).teacher.tolist() for _, document in going]
        answers = sample(
            llama, lambda h: h @ llama.head.T, llama.config, read,
            [heat(row["id"]) for row, _ in going], new_tokens=NEW_TOKENS, generator=generator, dtype=llama.head.dtype,
        )  # fmt: skip
        clock.tokens += sum(map(len, answers))
        on = []
        for (row, document), answer in zip(going, answers, strict=True):
            if degenerate(answer):
                continue
            document += answer
            if answer[-1] == 2 and turn + 1 < len(row["turns"]):
                document += turns.newline
                on.append((row, document))
            else:
                done.append(document)
        going = on
    return done


def batches(asked: list[dict[str, Any]], cells: int) -> list[list[dict[str, Any]]]:
    """Conversations by number of turns and length of the first, cut where rows times positions exceed `cells`."""
    found: list[list[dict[str, Any]]] = []
    for row in sorted(asked, key=lambda row: (len(row["turns"]), len(row["turns"][0]))):
        positions = min(LONGEST, 64 + len(row["turns"][0]) // 3) + NEW_TOKENS  # nearly always enough
        turns = len(row["turns"])
        if not found or len(found[-1][0]["turns"]) != turns or (len(found[-1]) + 1) * positions * turns > cells:
            found.append([])
        found[-1].append(row)
    return found


def teacher(device: torch.device, dtype: torch.dtype) -> Llama:
    """The source with a cache-reading attention."""
    source = Gguf(base_path())
    return Llama(source, adopted_config(source.hf_config()), dtype, device, blocked)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cells", type=int, default=900_000, help="positions that a batch's cache holds")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    llama = teacher(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    turns, clock = Turns(tokenizer()), Clock()
    asked = rows(args.data / "prompts.jsonl")
    for split in reversed(SPLITS):
        groups = batches([row for row in asked if row["split"] == split], args.cells)
        order = list(range(len(groups)))
        random.Random(1).shuffle(order)
        order.sort(key=lambda number: len(groups[number][0]["turns"]))  # those of one turn first: they are quickest
        for number in order:
            out = args.data / "tokens" / f"{split}-chats-{number:03d}.bin"
            if out.exists():
                continue
            generator = torch.Generator(device).manual_seed(number)
            write_tokens(out, converse(llama, turns, groups[number], generator, clock))
            print(f"{split} {number}: {len(groups[number])} conversations; {clock}", flush=True)
            if clock.seconds > args.seconds and split == "train":
                return


if __name__ == "__main__":
    main()
