"""Results as a picture and as the table of README.md.

python recipes/distill-vs-scratch/picture.py DIR/versus/results.jsonl recipes/distill-vs-scratch
"""

import json
import math
import sys
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

COLOURS = {"scratch": "tab:gray", "compute": "tab:brown", "local": "tab:blue", "cached": "tab:cyan"}


def picture(rows: list[dict[str, Any]], out: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 3.6))
    for way, colour in COLOURS.items():
        for number, row in enumerate(row for row in rows if row["way"] == way):
            points = [(point["tokens"] / 1e6, math.exp(point["ce"])) for point in row["curve"]]
            label = way if number == 0 else None
            axes.plot(*zip(*points, strict=True), color=colour, label=label, linewidth=1, marker=".", markersize=3)
    axes.set(xlabel="million tokens", ylabel="held-out perplexity", yscale="log")
    axes.legend()
    figure.tight_layout()
    figure.savefig(out, dpi=110)


def table(rows: list[dict[str, Any]]) -> str:
    """Perplexities, and each way's paired difference from scratch in cross-entropy with its standard error."""
    ends = {way: {row["seed"]: row for row in rows if row["way"] == way} for way in COLOURS}
    lines = [
        "| way | tokens | seconds | perplexity, each seed | nats below scratch | standard errors |",
        "|---|---|---|---|---|---|",
    ]
    for way, found in ends.items():
        if not found:
            continue
        seeds = sorted(found)
        gaps = [ends["scratch"][seed]["ce"] - found[seed]["ce"] for seed in seeds if seed in ends["scratch"]]
        gap = f"{fmean(gaps):.3f} |" if way != "scratch" and gaps else "|"  # of one pair: no error is known
        if way != "scratch" and len(gaps) > 1:
            error = stdev(gaps) / math.sqrt(len(gaps))
            gap = f"{fmean(gaps):.3f} ± {error:.3f} | {fmean(gaps) / error:.0f}"
        perplexities = ", ".join(f"{found[seed]['ppl']:.1f}" for seed in seeds)
        tokens, seconds = (fmean(row[key] for row in found.values()) for key in ("tokens", "seconds"))
        lines.append(f"| {way} | {tokens / 1e6:.1f} M | {seconds:.0f} | {perplexities} | {gap} |")
    return "\n".join(lines)


def main() -> None:
    rows = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]
    picture(rows, Path(sys.argv[2]) / "perplexity.png")
    print(table(rows))


if __name__ == "__main__":
    main()
