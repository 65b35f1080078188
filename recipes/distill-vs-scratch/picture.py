"""Results as a picture and as the table of README.md, with what may be claimed.

python recipes/distill-vs-scratch/picture.py DIR/runs/results.jsonl recipes/distill-vs-scratch
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
REPORT = {"200M": (23, 21), "400M": (19, 17), "1B": (17, 15)}
"""Validation perplexity from scratch and distilled (arXiv 2408.00118, table 7)."""
Row = dict[str, Any]


def picture(rows: list[Row], out: Path) -> None:
    figure, (axes, bars) = plt.subplots(1, 2, figsize=(9, 3.6), width_ratios=(3, 2))
    for way, colour in COLOURS.items():
        for number, row in enumerate(row for row in rows if row["way"] == way):
            points = [(point["tokens"] / 1e6, math.exp(point["ce"])) for point in row["curve"]]
            style = "--" if way == "cached" else "-"  # it lies upon local
            label = way if number == 0 else None
            axes.plot(*zip(*points, strict=True), style, color=colour, label=label, linewidth=1, marker=".")
    axes.set(xlabel="million tokens", ylabel="held-out perplexity", yscale="log")
    axes.legend()
    gaps = {f"report, {size}": (math.log(old / new), 0.0, "tab:green") for size, (old, new) in REPORT.items()}
    gaps |= {way: (*of, COLOURS[way]) for way in COLOURS if (of := gap(rows, way)) is not None}
    values, errors, colours = zip(*gaps.values(), strict=True)
    bars.barh(list(gaps), values, xerr=[2 * error for error in errors], color=colours)
    bars.set(xlabel="nats below scratch, two standard errors")
    figure.tight_layout()
    figure.savefig(out, dpi=110)


def gap(rows: list[Row], way: str) -> tuple[float, float] | None:
    """How far a way ends below scratch, nats a token: mean over seeds of the paired difference, standard error."""
    ends = {name: {row["seed"]: row["ce"] for row in rows if row["way"] == name} for name in ("scratch", way)}
    pairs = [ends["scratch"][seed] - ce for seed, ce in ends[way].items() if seed in ends["scratch"]]
    if way == "scratch" or len(pairs) < 2:
        return None
    return fmean(pairs), stdev(pairs) / math.sqrt(len(pairs))


def claim(of: tuple[float, float] | None) -> str:
    """Better or worse only beyond two standard errors."""
    if of is None:
        return ""
    mean, error = of
    return ("better" if mean > 0 else "worse") if abs(mean) > 2 * error else "nothing is claimed"


def table(rows: list[Row]) -> str:
    """Perplexities, and each way's paired difference from scratch."""
    lines = [
        "| way | tokens | multiplications | perplexity, each seed | nats below scratch | standard errors | |",
        "|---|---|---|---|---|---|---|",
    ]
    for way in COLOURS:
        found = sorted((row for row in rows if row["way"] == way), key=lambda row: int(row["seed"]))
        if not found:
            continue
        of = gap(rows, way)
        cells = f"{of[0]:.3f} ± {of[1]:.3f} | {of[0] / of[1]:.0f}" if of is not None else "|"
        tokens = fmean(row["tokens"] for row in found) / 1e6
        perplexities = ", ".join(f"{row['ppl']:.1f}" for row in found)
        lines.append(f"| {way} | {tokens:.1f} M | {found[0]['work']:.1f} | {perplexities} | {cells} | {claim(of)} |")
    for size, (old, new) in REPORT.items():
        lines.append(f"| report, {size} | | | {old} and {new} | {math.log(old / new):.3f} | | |")
    return "\n".join(lines)


def main() -> None:
    rows = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]
    for row in rows:
        if row["way"] == "teacher":
            print(f"teacher: perplexity {row['ppl']:.1f} after {row['tokens'] / 1e6:.1f} M tokens\n")
    picture(rows, Path(sys.argv[2]) / "perplexity.png")
    print(table(rows))


if __name__ == "__main__":
    main()
