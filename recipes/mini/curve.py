"""Draw a healing run: held-out KL against tokens, and the batches' own.

python recipes/mini/curve.py DIR/run/log.jsonl docs/mini-curve.png
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

NAMES = {"prose": "prose, held out", "answers": "answers, held out"}


def main() -> None:
    rows = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]
    rows = [row for row in rows if "seen" in row]
    figure, axes = plt.subplots(figsize=(7, 3.6))
    batches = [(row["seen"] / 1e6, row["kl"]) for row in rows if "norm" in row]
    axes.plot(*zip(*batches, strict=True), color="0.75", linewidth=0.8, label="batches")
    for name, label in NAMES.items():
        points = [(row["seen"] / 1e6, row["kl"]) for row in rows if row.get("heldout") == name]
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
    for row in rows:
        if "rollout" in row or "factored" in row:
            style = ":" if "rollout" in row else "--"
            axes.axvline(row["seen"] / 1e6, color="0.6", linestyle=style, linewidth=1)
    axes.axhline(0.1, color="0.4", linestyle="--", linewidth=0.8)
    axes.set(
        xlabel="million tokens (dashed: updates become factors; dotted: the student's own answers)",
        ylabel="KL to the source, nats",
        yscale="log",
    )
    axes.legend()
    figure.tight_layout()
    figure.savefig(sys.argv[2], dpi=110)


if __name__ == "__main__":
    main()
