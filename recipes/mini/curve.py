"""Draw a healing run: held-out KL against tokens, and the batches' own.

python recipes/mini/curve.py DIR/run/log.jsonl docs/mini-curve.png

Of several logs each goes on where the one before ended: a run that started from another's delta.
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

NAMES = {"prose": "prose, held out", "answers": "answers, held out", "long": "prose past position 4096, held out"}


def main() -> None:
    *logs, picture = map(Path, sys.argv[1:])
    figure, axes = plt.subplots(figsize=(7, 3.6))
    labels = {**NAMES, "batches": "batches"}
    before = 0.0
    for log in logs:
        rows = [json.loads(line) for line in log.read_text().splitlines()]
        rows = [row | {"at": before + row["seen"] / 1e6} for row in rows if "seen" in row]
        batches = [(row["at"], row["kl"]) for row in rows if "norm" in row]
        axes.plot(*zip(*batches, strict=True), color="0.75", linewidth=0.8, label=labels.pop("batches", None))
        for name, color in zip(NAMES, ("C0", "C1", "C2"), strict=True):
            if points := [(row["at"], row["kl"]) for row in rows if row.get("heldout") == name]:
                label = labels.pop(name, None)
                axes.plot(*zip(*points, strict=True), color=color, marker="o", markersize=3, label=label)
        for row in rows:
            if "rollout" in row or "factored" in row:
                axes.axvline(row["at"], color="0.6", linestyle=":" if "rollout" in row else "--", linewidth=1)
        before = rows[-1]["at"]
        if log != logs[-1]:
            axes.axvline(before, color="0.3", linewidth=1)
    axes.axhline(0.1, color="0.4", linestyle="--", linewidth=0.8)
    axes.set(
        xlabel="million tokens\n(dashed: factors from here on; dotted: own answers come in; solid: another run)",
        ylabel="KL to the source, nats",
        yscale="log",
    )
    axes.legend()
    figure.tight_layout()
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    main()
