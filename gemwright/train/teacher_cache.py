"""The teacher's cache: what it says at every place that carries loss, computed once, stored in shards.

    DIR/head.safetensors                 the teacher's output head, in the student's ids
    DIR/train/key.json                   what the cache was made from, and where its shards begin
    DIR/train/shard-00000.safetensors    hidden [n, D], in the teacher's dtype
    DIR/eval/...                         the same for the data of the evaluation

Exact: the last hidden states. Times the head they are the teacher, for any divergence, cap and temperature; 7.2 kB a
token for a 9B in bf16, where logits would be 512 kB. Sampled (arXiv 2503.16870): `draws` ids a token, drawn with the
teacher's probability, with how often each came and its log-probability. Their mean loss is the KL itself, without bias,
and so is the gradient; only KL(P || Q) can be had from them.

    ends [n] int32    where each token's ids end      ids, counts, log_p [N] int32, int16, fp32

Places are those of the data's pieces, in their order, so shuffling and packing may change, the pieces may not. A shard
holds whole pieces, appears by a rename, and carries a digest: a killed run goes on, a damaged shard is named and made
again, with the same noise.

Legend: X places that carry loss, D the teacher's width, V vocabulary, K stored ids a token, N all ids of a shard.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from gemwright.data.batch import Batch, collate
from gemwright.data.loader import Loader
from gemwright.data.pack import Int64, best_fit
from gemwright.ops.head import Head
from gemwright.train.drawn import Samples, Sampling, drawn, padded
from gemwright.train.teacher import Teacher
from gemwright.weights import CheckpointError, read_json

VERSION: Final = 1
SHARD_BYTES: Final = 2**27
"""About so many bytes of hidden states are a shard ..."""
SHARD_TOKENS: Final = 2**16
"""... or so many tokens of drawn ids."""
HEAD: Final = "head.safetensors"


@dataclass(frozen=True)
class Hidden:
    """The teacher's last hidden states."""

    hidden_XD: Tensor

    def to(self, device: torch.device | str) -> Hidden:
        """The same on another device."""
        return Hidden(self.hidden_XD.to(device, non_blocking=True))


Targets = Hidden | Samples


# --- where things lie ------------------------------------------------------------------------------------------------


def carried(loader: Loader) -> Int64:
    """How many places of each piece carry loss."""
    documents, pieces = loader.documents, loader.pieces
    if all(shard.weights is None for shard in documents.shards):
        return pieces.sizes(np.arange(len(pieces)))
    counts = ((documents.piece(*pieces[i])[1][1:] > 0).sum() for i in range(len(pieces)))
    return np.fromiter(counts, np.int64, len(pieces))


def plan(counts: Int64, limit: int) -> list[int]:
    """The first piece of each shard, of about `limit` places, and one past the last piece."""
    firsts, held = [0], 0
    for piece, count in enumerate(counts.tolist()):
        if held >= limit:
            firsts, held = [*firsts, piece], 0
        held += count
    return [*firsts, len(counts)]


def in_order(batch: Batch) -> Iterator[tuple[int, slice]]:
    """The pieces of a batch, and which of its places that carry loss, counted through the batch, are theirs."""
    doc_X = batch.doc_BT[batch.weights_BT > 0].numpy()
    edges = [0, *(np.flatnonzero(np.diff(doc_X)) + 1).tolist(), len(doc_X)]
    for start, stop in itertools.pairwise(edges):
        if stop > start:
            yield int(doc_X[start]), slice(start, stop)


# --- making ----------------------------------------------------------------------------------------------------------


@dataclass
class Report:
    """What making a cache did."""

    tokens: int = 0
    """Places that carry loss, in the whole cache."""
    bytes: int = 0
    shards: int = 0
    found: int = 0
    """Shards that an earlier run had made."""
    made_tokens: int = 0
    seconds: float = 0.0
    damaged: tuple[str, ...] = ()
    """Shards that were damaged, and were made again."""

    def summary(self) -> dict[str, Any]:
        """Plain JSON, with bytes a token and tokens a second."""
        rates = {
            "bytes_per_token": round(self.bytes / max(1, self.tokens), 1),
            "tokens_per_second": round(self.made_tokens / self.seconds, 1) if self.made_tokens else None,
        }
        return {**vars(self), **rates, "seconds": round(self.seconds, 2), "damaged": list(self.damaged)}


def key_of(loader: Loader, teacher: Teacher, tokenizer: str, sampling: Sampling | None) -> dict[str, Any]:
    """What a cache hangs on; plain JSON."""
    kind = {"version": VERSION, "kind": "hidden" if sampling is None else "samples"}
    return {
        **kind,
        **data_key(loader, tokenizer),
        **teacher_key(teacher),
        **({} if sampling is None else vars(sampling)),
    }


def teacher_key(teacher: Teacher) -> dict[str, Any]:
    """The part of the key that the teacher decides."""
    head, ids_V = teacher.head, teacher.ids_V
    return {
        "teacher": teacher.fingerprint,
        "softcap": head.softcap,
        "dtype": str(head.weight_VD.dtype).removeprefix("torch."),
        "head": list(head.weight_VD.shape),
        "moved_ids": None if ids_V is None else hashlib.sha256(str(ids_V.tolist()).encode()).hexdigest(),
    }


def data_key(loader: Loader, tokenizer: str) -> dict[str, Any]:
    """The part of the key that the data decides."""
    batching = loader.batching
    return {
        "data": loader.documents.fingerprint, "length": batching.length, "overlong": batching.overlong,
        "tokenizer": tokenizer,
    }  # fmt: skip


def make(
    folder: Path, loader: Loader, teacher: Teacher, key: Mapping[str, Any], *, sampling: Sampling | None = None,
    rows: int = 8, rank: int = 0, world: int = 1, progress: bool = True,
) -> Report:  # fmt: skip
    """Make the shards of one data set that are not there, or damaged; those of `rank` among `world`.

    Raises ValueError where the folder holds a cache of something else (every difference is named).
    """
    counts = carried(loader)
    width = teacher.head.weight_VD
    limit = SHARD_TOKENS if sampling else max(1, SHARD_BYTES // (width.shape[1] * width.itemsize))
    firsts = plan(counts, limit)
    folder.mkdir(parents=True, exist_ok=True)
    _begin(folder, {**key, "shards": firsts}, rank)
    report = Report(tokens=int(counts.sum()), shards=len(firsts) - 1)
    started = time.perf_counter()
    mine = range(rank, len(firsts) - 1, world)
    bar = tqdm(total=sum(int(counts[firsts[n] : firsts[n + 1]].sum()) for n in mine), unit="token", unit_scale=True,
               desc=folder.name, file=sys.stderr, disable=None if progress else True)  # fmt: skip
    with bar:
        for number in mine:
            path = shard_path(folder, number)
            total = int(counts[firsts[number] : firsts[number + 1]].sum())
            fault = check(path, total) if path.exists() else "missing"
            if fault is None:
                report.found += 1
            else:
                if fault != "missing":
                    bar.write(f"{path}: {fault}; it is made again", file=sys.stderr)
                    report.damaged += (path.name,)
                _write(
                    path, _shard(loader, teacher, counts, (firsts[number], firsts[number + 1]), rows, sampling, number)
                )
                report.made_tokens += total
            bar.update(total)
            report.bytes += path.stat().st_size
    report.seconds = time.perf_counter() - started
    return report


def _begin(folder: Path, key: Mapping[str, Any], rank: int) -> None:
    """Write the key of a new cache, or compare that of an old one."""
    path = folder / "key.json"
    if path.exists():
        if named := differing(read_json(path), key):
            raise ValueError(f"output: {folder} is a cache of something else: {named}; choose another folder")
    elif rank == 0:
        partial = folder / ".key.json.partial"
        partial.write_text(json.dumps(dict(key)) + "\n", encoding="utf-8")
        partial.replace(path)


def differing(saved: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Every field in which two keys differ, in words; empty where none does."""
    fields = [name for name in now if saved.get(name) != now[name]]
    return "; ".join(f"{name} was {_short(saved.get(name))}, is {_short(now[name])}" for name in fields)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:36]}...'"


def shard_path(folder: Path, number: int) -> Path:
    """The file of a shard."""
    return folder / f"shard-{number:05d}.safetensors"


def _shard(
    loader: Loader, teacher: Teacher, counts: Int64, span: tuple[int, int], rows: int, sampling: Sampling | None,
    number: int,
) -> dict[str, Tensor]:  # fmt: skip
    """The tensors of the pieces of a span, on CPU."""
    device, width = teacher.head.weight_VD.device, teacher.head.weight_VD
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts[span[0] : span[1]])])
    hidden_XD = torch.empty(int(starts[-1]), width.shape[1], dtype=width.dtype)
    wanted = np.arange(*span)[counts[span[0] : span[1]] > 0]
    packed = best_fit(wanted, loader.pieces.sizes(wanted), loader.batching.length)
    for first in range(0, len(packed), rows):
        chosen = [packed[row] for row in range(first, min(first + rows, len(packed)))]
        batch = collate(loader.documents, loader.pieces, chosen, None)
        found_XD = teacher.hidden(batch.to(device)).to("cpu", width.dtype)
        for piece, part in in_order(batch):
            start = int(starts[piece - span[0]])
            hidden_XD[start : start + part.stop - part.start] = found_XD[part]
    if sampling is None:
        return {"hidden": hidden_XD}
    generator = torch.Generator().manual_seed(sampling.seed + 1_000_003 * number)
    return drawn(teacher.head, hidden_XD.to(device), sampling, generator)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    partial = path.with_name(f".{path.name}.partial")
    save_file(tensors, partial, {"sha256": _digest(tensors)})
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def check(path: Path, tokens: int) -> str | None:
    """What is wrong with a shard; None where it is whole."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        return f"damaged: {error}"
    if metadata.get("sha256") != _digest(tensors):
        return "damaged: its digest is another one"
    held = len(tensors.get("hidden", tensors.get("ends", ())))
    return None if held == tokens else f"damaged: it holds {held} tokens, due are {tokens}"


def save_head(folder: Path, head: Head) -> None:
    """Write the head beside the caches that need it."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / HEAD).exists():
        _write(folder / HEAD, {"weight": head.weight_VD.cpu().contiguous()})


# --- reading ---------------------------------------------------------------------------------------------------------


class TeacherCache:
    """What a teacher says of one data set. Shards are opened, and their digests compared, when first needed."""

    def __init__(self, folder: Path, loader: Loader, now: Mapping[str, Any]) -> None:
        """
        Args:
            folder: DIR/train or DIR/eval.
            loader: of the data.
            now: what the run has of the key; every field must be the cache's.
        Raises:
            FileNotFoundError: no cache, or shards that were never made. ValueError: another key, naming what differs.
        """
        if not (folder / "key.json").is_file():
            raise FileNotFoundError(f"teacher_cache: {folder} has no key.json; `gemwright cache-teacher` makes a cache")
        self.folder, self.key = folder, read_json(folder / "key.json")
        if named := differing(self.key, {"version": VERSION, **now}):
            raise ValueError(f"teacher_cache: {folder} was made from something else: {named}")
        counts = carried(loader)
        self.starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
        self.firsts = np.array(self.key["shards"], np.int64)
        missing = [p.name for p in map(self._path, range(len(self.firsts) - 1)) if not p.exists()]
        if missing:
            raise FileNotFoundError(f"teacher_cache: {folder} lacks {missing[0]} {_MEND}")
        self._open: dict[int, Any] = {}
        self._ends: dict[int, Tensor] = {}

    def _path(self, number: int) -> Path:
        return shard_path(self.folder, number)

    @property
    def sampled(self) -> bool:
        """Whether ids were drawn, instead of hidden states kept."""
        return bool(self.key["kind"] == "samples")

    def read(self, batch: Batch) -> Targets:
        """What the teacher says at the places of a batch that carry loss. CheckpointError names a damaged shard."""
        pieces = [piece for piece, _ in in_order(batch)]
        if not self.sampled:
            rows = [self._rows(piece, "hidden") for piece in pieces]
            width = self.key["head"][1]
            return Hidden(torch.cat(rows) if rows else torch.zeros(0, width, dtype=getattr(torch, self.key["dtype"])))
        return padded([token for piece in pieces for token in self._tokens(piece)])

    def _rows(self, piece: int, name: str) -> Tensor:
        number, start, stop = self._place(piece)
        rows: Tensor = self._shard(number).get_slice(name)[start:stop]
        return rows

    def _tokens(self, piece: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Ids, counts and log-probabilities of each token of a piece."""
        number, start, stop = self._place(piece)
        file = self._shard(number)
        ends = self._ends.setdefault(number, file.get_tensor("ends"))
        edges = [int(ends[start - 1]) if start else 0, *ends[start:stop].tolist()]
        held = [file.get_slice(name)[edges[0] : edges[-1]] for name in ("ids", "counts", "log_p")]
        sizes = [b - a for a, b in itertools.pairwise(edges)]
        yield from zip(*(x.split(sizes) for x in held), strict=True)

    def _place(self, piece: int) -> tuple[int, int, int]:
        """The shard of a piece, and its places there."""
        number = int(np.searchsorted(self.firsts, piece, side="right")) - 1
        base = self.starts[self.firsts[number]]
        return number, int(self.starts[piece] - base), int(self.starts[piece + 1] - base)

    def _shard(self, number: int) -> Any:
        if number not in self._open:
            path = self._path(number)
            tokens = int(self.starts[self.firsts[number + 1]] - self.starts[self.firsts[number]])
            if fault := check(path, tokens):
                raise CheckpointError(f"teacher_cache: {path} is {fault} {_MEND}")
            self._open[number] = safe_open(path, "pt")
        return self._open[number]

    def head(self, device: torch.device) -> Head:
        """The teacher's head, from the cache's own folder."""
        path = self.folder.parent / HEAD
        weight_VD = load_file(path)["weight"].to(device) if path.is_file() else None
        if weight_VD is None or list(weight_VD.shape) != self.key["head"]:
            raise CheckpointError(f"teacher_cache: {path} is missing or of another shape {_MEND}")
        return Head(weight_VD, self.key["softcap"])


_MEND: Final = "(`gemwright cache-teacher` with the same options makes it)"
