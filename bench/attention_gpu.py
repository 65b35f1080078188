"""Attention on one GPU at the shapes that training has: the triton backend beside flex, and the search for its tiles.

Each choice of tiles of each kernel is compiled in a process of its own and checked there, alone, against fp32 truth on
a small packed case in bf16 (documents, a window, padding, an odd length; keys far enough to bend the scores); then the
right ones are timed one after the other. The fastest of each kernel make the table that `attention_triton.KERNELS`
should be, which is timed whole, forward and forward with backward, beside flex.

    python bench/attention_gpu.py [--sizes 256 128 64] [--seconds 60]
    TRITON_INTERPRET=1 python bench/attention_gpu.py --device cpu --sizes 16      # a trial of the bench itself
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from gemwright.ops import attention_triton
from gemwright.ops.attention import PADDING, Attend, Visibility, reference, softcap
from gemwright.ops.attention_triton import Call, Piece, Stored, Tile, Tiles

CAP: Final = 50.0
KINDS: Final = ("forward", "queries", "keys", "keys alone", "values alone", "pairs", "columns", "lines")
WORK: Final = dict(zip(KINDS, (2, 3, 4, 3, 2, 2, 1, 1), strict=True))
"""Products of all queries and keys that a kernel makes; forward has 2, backward needs 5."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model's attention in training: one row of documents of one length."""

    heads: int
    kv_heads: int
    length: int
    window: int
    document: int


SHAPES: Final = {
    256: Shape(8, 4, 8192, 4096, 8192),
    128: Shape(32, 16, 8192, 4096, 8192),
    64: Shape(9, 3, 16384, 4096, 1024),
    16: Shape(4, 2, 96, 32, 48),
}
"""By head size: 2B, 27B, a small model with many documents, and one to try the bench with."""


def triples(*rows: str) -> list[tuple[int, ...]]:
    """Rows of numbers."""
    return [tuple(map(int, row.split())) for row in rows]


# queries, keys, warps, stages of a kernel; for the products by way of memory queries, keys, depth, warps, stages
CANDIDATES: Final[dict[int, dict[str, list[tuple[int, ...]]]]] = {
    256: {
        "forward": triples(
            "128 64 8 2", "128 32 8 3", "128 64 8 1", "64 64 4 2", "64 32 4 2"
        ),
        "pairs": triples(
            "128 128 64 8 3", "128 128 64 8 2", "128 128 32 8 4", "128 64 64 8 2", "128 64 32 8 3", "64 128 64 8 2",
            "64 64 64 4 2", "64 64 64 4 3", "128 64 64 8 3",
        ),
        "columns": triples(
            "128 128 64 8 3", "128 128 64 8 4", "128 128 32 8 4", "128 128 64 8 2", "128 64 64 4 2", "128 64 64 4 3",
            "64 128 64 8 3", "64 64 64 4 2",
        ),
        "lines": triples(
            "128 128 64 8 3", "128 128 64 8 4", "128 128 32 8 4", "128 128 64 8 2", "64 128 64 4 2", "64 64 64 4 2",
            "128 64 64 8 3",
        ),
        "queries": triples("128 32 8 2", "128 32 8 3", "128 64 8 1", "64 32 4 1", "64 32 4 2", "64 64 8 2"),
        "keys": triples("64 64 8 2", "32 64 8 3", "64 64 8 1"),
        "keys alone": triples("32 128 8 2", "32 128 8 3", "64 128 8 1", "32 64 4 1", "64 64 8 2"),
        "values alone": triples("64 128 8 2", "32 128 8 3", "64 64 4 1", "64 64 4 2"),
    },
    128: {
        "forward": triples("128 64 8 3", "128 128 8 2", "64 64 4 3"),
        "pairs": triples("128 128 64 8 3", "128 64 64 8 2", "128 128 64 8 2", "64 64 64 4 2", "128 64 64 8 3"),
        "columns": triples("128 128 64 8 3", "128 128 64 8 4", "128 64 64 4 3", "64 64 64 4 3"),
        "lines": triples("128 128 64 8 3", "128 128 64 8 4", "64 64 64 4 3"),
        "queries": triples("128 64 8 2", "128 64 8 3", "64 64 4 2"),
        "keys": triples("64 128 8 2", "32 128 8 3", "64 64 8 2", "32 64 4 3"),
        "keys alone": triples("64 128 8 2", "64 64 4 2"),
        "values alone": triples("64 128 8 3", "64 64 4 3"),
    },
    64: {
        "forward": triples("64 64 4 3", "128 64 8 3", "128 128 8 3", "64 64 4 2"),
        "queries": triples("64 64 4 3", "128 64 8 3", "64 64 4 2", "64 32 4 3"),
        "keys": triples("64 64 4 2", "64 128 8 3", "64 64 4 3", "32 64 4 3"),
    },
    16: {
        "forward": triples("32 16 4 1"), "queries": triples("32 16 4 1"), "keys": triples("16 32 4 1"),
        "keys alone": triples("16 32 4 1"), "values alone": triples("16 32 4 1"), "pairs": triples("32 16 16 4 1"),
        "columns": triples("32 16 16 4 1"), "lines": triples("32 16 16 4 1"),
    },
}  # fmt: skip


def place(kind: str, numbers: tuple[int, ...], base: Tiles) -> Tiles:
    """The tiles `base` with those of one kernel replaced."""
    if kind in ("pairs", "columns", "lines"):
        piece = Piece(*numbers[2:])
        stored = Stored(numbers[0], numbers[1], piece, piece, piece)
        if base.stored is not None and base.stored[:2] == numbers[:2]:
            stored = Stored(
                *base.stored[:2], *(piece if name == kind else getattr(base.stored, name) for name in KINDS[5:])
            )
        return dataclasses.replace(base, stored=stored)
    fields: dict[str, Any] = {{"keys alone": "keys", "values alone": "values"}.get(kind, kind): Tile(*numbers)}
    return dataclasses.replace(base, **fields)


def after(run: Callable[[], object], **made: Tensor) -> Callable[[], dict[str, Tensor]]:
    """A function that runs, and tells what was written."""

    def call() -> dict[str, Tensor]:
        run()
        return made

    return call


class Problem:
    """Inputs, and how each kernel is run on them alone."""

    def __init__(self, shape: Shape, size: int, device: str, rows: int = 1, pad: int = 0) -> None:
        """Rows of `shape.length` positions in documents of one length; the last row ends in padding."""
        torch.manual_seed(0)
        self.shape, self.rows = shape, rows
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        B, T, N, K, H = rows, shape.length, shape.heads, shape.kv_heads, size
        draw = partial(torch.randn, device=device)
        self.q, self.dout = (factor * draw(B, T, N, H).to(dtype) for factor in (3, 1))
        self.k, self.v = (factor * draw(B, T, K, H).to(dtype) for factor in (3, 1))
        self.scale = H**-0.5
        index = torch.arange(T, device=device).repeat(B, 1)
        pos, doc = index % shape.document, index // shape.document
        if pad:
            pos[-1, -pad:] = PADDING
        self.sees = {"local": Visibility(pos, pos, doc, doc, shape.window), "global": Visibility(pos, pos, doc, doc)}

    def call(self, layer: str, tiles: Tiles) -> Call:
        return Call.of(self.q, self.k, self.v, self.sees[layer], self.scale, CAP, tiles)

    @cached_property
    def blank(self) -> dict[str, Tensor]:
        """What kernels read and write where only their time counts; lse so large that weights are small."""
        lse = torch.full(self.q.shape[:3], 40.0, device=self.q.device).transpose(1, 2).contiguous()
        return dict(out=self.dout, lse=lse, inner=torch.zeros_like(lse))

    def run(self, kind: str, call: Call, given: dict[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
        """A kernel as a function of nothing; what it wrote, by name."""
        if kind == "forward":
            return lambda: dict(zip(("out", "lse"), call.forward(), strict=True))
        dq, dk, dv = (x.new_zeros(x.shape) for x in (self.q, self.k, self.v))
        tiles = call.tiles
        if kind == "queries":
            inner = torch.zeros_like(given["lse"])
            return after(partial(call.query_side, given["out"], given["lse"], self.dout, inner, dq), dq=dq, inner=inner)
        if kind in ("keys", "keys alone", "values alone"):
            tile = tiles.values if kind == "values alone" else tiles.keys
            assert tile is not None
            ends = dict(dk=None if kind == "values alone" else dk, dv=None if kind == "keys alone" else dv)
            made = {name: tensor for name, tensor in ends.items() if tensor is not None}
            return after(partial(call.key_side, tile, given["lse"], self.dout, given["inner"], *ends.values()), **made)
        how = tiles.stored
        assert how is not None
        T = self.shape.length
        size = (self.shape.heads * self.rows, -(-T // how.queries) * how.queries, -(-T // how.keys) * how.keys)
        weights, dscores = (self.q.new_zeros(size) for _ in range(2))
        some = range(self.rows * self.shape.kv_heads)
        if kind == "pairs":
            run = partial(call.pairs, how, some, given["out"], given["lse"], self.dout, weights, dscores)
            return after(run, weights=weights[:, :T, :T], dscores=dscores[:, :T, :T])
        for name, pairs in (("weights", weights), ("dscores", dscores)):
            if name in given:
                pairs[:, :T, :T] = given[name]
            else:
                pairs.normal_()
        if kind == "lines":
            return after(partial(call.lines, how, some, dscores, dq), dq=dq)
        values = partial(call.columns, how, some, weights, self.dout, 1.0, dv)
        keys = partial(call.columns, how, some, dscores, self.q, self.scale, dk)
        return after(lambda: (values(), keys()), dk=dk, dv=dv)

    def truth(self, layer: str) -> dict[str, Tensor]:
        """Every result in fp32, by the plain definition; lse over log 2."""
        q, k, v, dout = (x.float() for x in (self.q, self.k, self.v, self.dout))
        G = q.shape[2] // k.shape[2]
        k, v = (x.repeat_interleave(G, dim=2) for x in (k, v))
        raw = torch.einsum("btnh,bsnh->bnts", q, k) * self.scale
        scores = softcap(raw, CAP)
        slope = 1 - (scores / CAP) ** 2
        scores = scores.masked_fill(~self.sees[layer].mask()[:, None], -torch.inf)
        lse = scores.logsumexp(-1)
        lse = lse.masked_fill(lse == -torch.inf, torch.inf)
        weights = torch.exp(scores - lse[..., None])
        out = torch.einsum("bnts,bsnh->btnh", weights, v)
        inner = (dout * out).sum(-1).transpose(1, 2)
        dscores = weights * (torch.einsum("btnh,bsnh->bnts", dout, v) - inner[..., None]) * slope
        dk = torch.einsum("bnts,btnh->bsnh", dscores, q) * self.scale
        dv = torch.einsum("bnts,btnh->bsnh", weights, dout)
        dk, dv = (x.unflatten(2, (-1, G)).sum(3) for x in (dk, dv))
        made = dict(
            out=out, lse=lse / torch.log(torch.tensor(2.0)), inner=inner, weights=weights.flatten(0, 1),
            dscores=dscores.flatten(0, 1), dk=dk, dv=dv,
            dq=torch.einsum("bnts,bsnh->btnh", dscores, k) * self.scale,
        )  # fmt: skip
        return {name: x.contiguous() for name, x in made.items()}


def error(got: Tensor, truth: Tensor) -> float:
    """Relative, where the truth is a number."""
    known = truth.isfinite()
    got, truth = got.float()[known], truth[known]
    return float((got - truth).norm() / truth.norm())


def small(size: int, device: str) -> Problem:
    """A packed case with everything in it."""
    shape = SHAPES[size]
    length = 700 if device == "cuda" else 70
    return Problem(
        dataclasses.replace(shape, length=length - 1, window=length // 4, document=length // 2), size, device, 2, 5
    )


def check(task: tuple[int, str, tuple[int, ...], str]) -> tuple[int, str, tuple[int, ...], dict[str, float] | str]:
    """Compile one choice, and compare it with the truth: the relative errors, or why it does not run."""
    size, kind, numbers, device = task
    try:
        problem = small(size, device)
        truth = problem.truth("local")
        given = {name: x if x.dtype == torch.float32 and name in ("lse", "inner") else x.to(problem.q.dtype)
                 for name, x in truth.items()}  # fmt: skip
        call = problem.call("local", place(kind, numbers, attention_triton.KERNELS[max(64, size)]))
        made = problem.run(kind, call, given)()
        return size, kind, numbers, {name: error(x, truth[name]) for name, x in made.items()}
    except Exception as fault:  # a choice that does not fit the chip is a result
        return size, kind, numbers, f"{type(fault).__name__}: {str(fault)[-200:]}"


def written(tiles: Tiles) -> dict[str, Any]:
    """Tiles as JSON has them."""
    made: dict[str, Any] = {name: getattr(tiles, name) for name in ("forward", "queries", "keys", "values")}
    how = tiles.stored
    return dict(made, stored=how and dict(blocks=how[:2], pieces=how[2:]))


def take(path: Path) -> None:
    """Put tiles that were found into the backend's table."""
    for size, study in json.loads(path.read_text()).items():
        if isinstance(study, dict) and "tiles" in study:
            found, how = study["tiles"], study["tiles"]["stored"]
            named = {name: found[name] and Tile(*found[name]) for name in ("forward", "queries", "keys", "values")}
            stored = how and Stored(*how["blocks"], *(Piece(*piece) for piece in how["pieces"]))
            attention_triton.KERNELS[int(size)] = Tiles(**named, stored=stored)


def milliseconds(call: Callable[[], object], device: str, repeats: int = 7) -> float:
    """Median of some calls after two."""
    spent = []
    for _ in range(repeats + 2):
        if device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            call()
            end.record()
            torch.cuda.synchronize()
            spent.append(begin.elapsed_time(end))
        else:
            start = time.perf_counter()
            call()
            spent.append(1e3 * (time.perf_counter() - start))
    return float(statistics.median(spent[2:]))


def seen(problem: Problem, layer: str) -> float:
    """Multiply-adds twice, of one product of all queries and the keys they see."""
    shape = problem.shape
    window = shape.window if layer == "local" else shape.length
    keys = float(sum(min(1 + i % shape.document, window) for i in range(shape.length)))
    return 2 * keys * problem.rows * shape.heads * int(problem.q.shape[3])


def best(found: dict[str, dict[tuple[int, ...], float]], base: Tiles) -> Tiles:
    """The fastest tiles: of each kernel, of dK with dV or each alone, and of the three products by way of memory on
    one size of blocks."""
    for kind in ("forward", "queries"):
        if found.get(kind):
            base = place(kind, min(found[kind], key=found[kind].__getitem__), base)
    apart = [min(found.get(kind, {}).items(), key=lambda item: item[1], default=None) for kind in KINDS[3:5]]
    both = min(found.get("keys", {}).items(), key=lambda item: item[1], default=None)
    if both is not None:
        base = dataclasses.replace(place("keys", both[0], base), values=None)
    if apart[0] and apart[1] and (both is None or apart[0][1] + apart[1][1] < both[1]):
        base = place("values alone", apart[1][0], place("keys", apart[0][0], base))
    kinds = KINDS[5:]
    sums: dict[tuple[int, ...], tuple[float, Stored]] = {}
    for blocks in {numbers[:2] for numbers in found.get("pairs", {})}:
        chosen = [{n: ms for n, ms in found.get(kind, {}).items() if n[:2] == blocks} for kind in kinds]
        if all(chosen):
            fastest = [min(each, key=each.__getitem__) for each in chosen]
            total = sum(each[numbers] for each, numbers in zip(chosen, fastest, strict=True))
            sums[blocks] = total, Stored(blocks[0], blocks[1], *(Piece(*numbers[2:]) for numbers in fastest))
    stored = min(sums.values(), default=None)
    straight = sum(min(found[kind].values()) for kind in ("queries", "keys") if found.get(kind))
    if apart[0] and apart[1]:
        straight = min(straight, min(found["queries"].values()) + apart[0][1] + apart[1][1])
    return dataclasses.replace(base, stored=stored[1] if stored and stored[0] < straight else None)


def whole(problem: Problem, attend: Attend, layer: str, device: str) -> dict[str, float]:
    """Milliseconds forward, and of backward in what both take together."""
    q, k, v = inputs = [x.detach().requires_grad_() for x in (problem.q, problem.k, problem.v)]
    see = problem.sees[layer]

    def forward() -> Tensor:
        return attend(q, k, v, see, scale=problem.scale, cap=CAP)

    with torch.no_grad():
        alone = milliseconds(forward, device)
    both = milliseconds(lambda: torch.autograd.grad(forward(), inputs, problem.dout), device)
    return dict(forward=alone, backward=both - alone)


def errors(problem: Problem, attend: Attend, layer: str) -> dict[str, float]:
    """Relative errors of a backend on a small case."""
    q, k, v = inputs = [x.detach().requires_grad_() for x in (problem.q, problem.k, problem.v)]
    out = attend(q, k, v, problem.sees[layer], scale=problem.scale, cap=CAP)
    made = dict(zip(("dq", "dk", "dv"), torch.autograd.grad(out, inputs, problem.dout), strict=True), out=out)
    truth = problem.truth(layer)
    return {name: error(x, truth[name]) for name, x in made.items()}


def attends(tiles: Tiles, device: str, *, flex: bool) -> dict[str, Attend]:
    """The backends side by side."""
    found: dict[str, Attend] = {
        "triton": partial(attention_triton.attend, tiles=tiles),
        "triton, straight": partial(attention_triton.attend, tiles=dataclasses.replace(tiles, stored=None)),
    }
    if tiles.stored is None:
        del found["triton, straight"]
    if flex and device == "cuda":
        from gemwright.ops import attention_flex

        found["flex"] = attention_flex.flex
    if device == "cpu":
        found["reference"] = reference
    return found


def search(options: argparse.Namespace) -> dict[int, dict[str, list[tuple[int, ...]]]]:
    """The choices that compile and are right, while the time lasts; the others are told."""
    tasks = [
        (size, kind, numbers, options.device)
        for size in options.sizes
        for kind in KINDS
        for numbers in CANDIDATES[size].get(kind, ())
    ]
    right: dict[int, dict[str, list[tuple[int, ...]]]] = {size: {} for size in options.sizes}
    worst: dict[tuple[int, str], dict[str, float]] = {}
    pool = multiprocessing.get_context("spawn").Pool(options.processes)
    deadline = time.monotonic() + options.seconds
    results = pool.imap_unordered(check, tasks)
    done = 0
    try:
        while done < len(tasks):
            size, kind, numbers, outcome = results.next(timeout=max(0.1, deadline - time.monotonic()))
            done += 1
            good = isinstance(outcome, dict) and max(outcome.values()) < 0.02
            if isinstance(outcome, dict) and good:
                right[size].setdefault(kind, []).append(numbers)
                least = worst.setdefault((size, kind), {})
                least.update({name: max(value, least.get(name, 0.0)) for name, value in outcome.items()})
            else:
                print(f"  {size} {kind} {numbers}: {outcome}", flush=True)
    except multiprocessing.TimeoutError:
        print(f"  stopped after {options.seconds} s with {done} of {len(tasks)} choices")
    pool.terminate()
    for (size, kind), each in sorted(worst.items()):
        print(f"  {size} {kind}: {len(right[size][kind])} right, errors up to "
              + ", ".join(f"{name} {value:.1e}" for name, value in each.items()))  # fmt: skip
    return right


def study(size: int, right: dict[str, list[tuple[int, ...]]], device: str, *, flex: bool) -> dict[str, Any]:
    """Time the choices of one head size, then the best of them beside the others."""
    problem = Problem(SHAPES[size], size, device)
    base = attention_triton.KERNELS[max(64, size)]
    found: dict[str, dict[tuple[int, ...], float]] = {}
    table: list[dict[str, Any]] = []
    print(f"\nhead size {size}, {SHAPES[size]}\n  kernel, tiles: ms (TFLOP/s) of a local, of a global layer")
    for kind, choices in right.items():
        for numbers in choices:
            spent: dict[str, float] = {}
            for layer in problem.sees:
                run = problem.run(kind, problem.call(layer, place(kind, numbers, base)), problem.blank)
                spent[layer] = milliseconds(run, device)
            work = WORK[kind] * (2 if kind == "columns" else 1)
            rates = {layer: work * seen(problem, layer) / ms / 1e9 for layer, ms in spent.items()}
            cells = ", ".join(f"{spent[layer]:.2f} ({rates[layer]:.0f})" for layer in spent)
            print(f"  {kind} {numbers}: {cells}", flush=True)
            found.setdefault(kind, {})[numbers] = sum(spent.values())
            table.append(dict(kind=kind, tiles=numbers, ms=spent, rate=rates))
    tiles = best(found, base)
    print(f"  best: {tiles}")
    report: dict[str, Any] = {"kernels": table, "tiles": written(tiles), "whole": {}, "errors": {}}
    few = small(size, device)
    for name, attend in attends(tiles, device, flex=flex).items():
        try:
            wrong = {layer: errors(few, attend, layer) for layer in few.sees}
            timed = {layer: whole(problem, attend, layer, device) for layer in problem.sees}
        except Exception as fault:  # one of several that are compared
            print(f"  {name}: {type(fault).__name__}: {str(fault)[:200]}")
            continue
        worst = {key: max(each[key] for each in wrong.values()) for key in ("out", "dq", "dk", "dv")}
        print(f"  {name}: errors " + ", ".join(f"{key} {value:.1e}" for key, value in worst.items()))
        for way, products in (("forward", 2), ("backward", 5)):
            parts = (
                f"{layer} {each[way]:.2f} ms ({products * seen(problem, layer) / each[way] / 1e9:.0f} TFLOP/s)"
                for layer, each in timed.items()
            )
            print(f"    {way}: {', '.join(parts)}; together {sum(each[way] for each in timed.values()):.2f} ms")
        report["whole"][name], report["errors"][name] = timed, worst
    return report


def main() -> None:
    """Search, time, print; JSON under $OUT."""
    parser = argparse.ArgumentParser(description="Attention on one GPU, and its tiles")
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 128, 64], choices=list(CANDIDATES))
    parser.add_argument("--flex", type=int, nargs="*", default=[256], help="sizes at which flex is timed too")
    parser.add_argument("--seconds", type=float, default=60, help="of compiling and checking")
    parser.add_argument("--processes", type=int, default=min(15, os.cpu_count() or 1))
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    start = time.monotonic()
    name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}", flush=True)
    right = search(options)
    print(f"compiled and checked in {time.monotonic() - start:.0f} s", flush=True)
    report = {}
    for size in options.sizes:
        report[size] = study(size, right[size], options.device, flex=size in options.flex)
        if out := os.environ.get("OUT"):
            (Path(out) / "attention_gpu.json").write_text(json.dumps({"device": name, **report}))
    print(f"{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
