"""Documents on disk, memory-mapped: shards of tokens, for pre-training and as the cache of a tokenised source.

A shard is a file of tokens with a sidecar beside it:

    NAME.bin or NAME.npy    tokens of all documents, one after the other: uint16 or uint32, little-endian
    NAME.json               {"dtype": "uint16", "bos_id": 2, ...}
    NAME.starts.bin         int64, optional: where each document starts, and the end of the last
    NAME.weights.bin        uint8, optional: the weight of each token as a target; without it 1, as for plain text

Without starts, a document begins at every `bos_id`, or after every `eos_id` where only that is named: a file of tokens
from elsewhere needs no more than a sidecar of two keys. What is written here has starts, and its sidecar adds "tokens",
"documents", "vocab_size", "tokenizer" (a digest of the tokenizer's files) and "sha256" of the content. A folder of
shards is one data set, in the order of the names; it is written hidden and appears by one rename, so it is whole or
absent. Pages that are read are dropped again by the operating system: memory stays bounded by the starts, 8 bytes a
document.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import secrets
import shutil
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from gemwright.data.rows import Document
from gemwright.tokenizer import FILES, Tokenizer

SHARD_TOKENS: Final = 2**28
_DTYPES: Final = ("uint16", "uint32")
_SCAN: Final = 2**24

Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class Shard:
    """Tokens of some documents; document i is tokens[starts[i] : starts[i + 1]]."""

    tokens: NDArray[Any]
    starts: Int64
    weights: NDArray[np.uint8] | None = None


@dataclass(frozen=True)
class Documents:
    """A data set: documents by number, over any number of shards."""

    shards: Sequence[Shard]
    fingerprint: str
    """Digest of the content: other documents, another digest."""
    vocab_size: int | None = None
    """Every token id is below it."""
    info: Mapping[str, int] = field(default_factory=dict)
    """Counts from the making: rows read, and rows left out because nothing is to be learned from them."""

    @property
    def lengths(self) -> Int64:
        """Tokens of each document."""
        return np.concatenate([np.diff(shard.starts) for shard in self.shards])

    def piece(self, document: int, start: int, stop: int) -> tuple[Int64, NDArray[np.float32]]:
        """Tokens and weights [start, stop) of a document.

        Raises:
            ValueError: a token id that the vocabulary does not have: a damaged file, or another tokenizer's.
        """
        shard, number = self._find(document)
        part = slice(int(shard.starts[number]) + start, int(shard.starts[number]) + stop)
        tokens = shard.tokens[part].astype(np.int64)
        if self.vocab_size is not None and tokens.max(initial=0) >= self.vocab_size:
            raise ValueError(f"document {document}: token id {tokens.max()}; the vocabulary has {self.vocab_size}")
        weights = np.ones(len(tokens), np.float32) if shard.weights is None else shard.weights[part].astype(np.float32)
        return tokens, weights

    def _find(self, document: int) -> tuple[Shard, int]:
        for shard in self.shards:
            if document < len(shard.starts) - 1:
                return shard, document
            document -= len(shard.starts) - 1
        raise IndexError(document)


def in_memory(documents: Iterable[Document], info: Mapping[str, int] | None = None) -> Documents:
    """A data set that is held in memory."""
    tokens, weights, starts = array("I"), array("B"), array("q", [0])
    for document in documents:
        tokens.extend(document.tokens)
        weights.extend(document.weights)
        starts.append(len(tokens))
    held = Shard(np.array(tokens, np.uint32), np.array(starts, np.int64), np.array(weights, np.uint8))
    digest = hashlib.sha256()
    for part in (tokens, weights, starts):
        digest.update(part)
    return Documents([held], digest.hexdigest(), info=info or {})


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """Digest of everything that decides how text becomes tokens."""
    files = ((name, tokenizer.folder / name) for name in FILES)
    parts = [f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()}" for name, path in files if path.is_file()]
    return hashlib.sha256("\n".join([*parts, tokenizer.chat_template or ""]).encode()).hexdigest()


def write_shards(
    folder: Path,
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    *,
    shard_tokens: int = SHARD_TOKENS,
    count: Callable[[], Mapping[str, int]] = dict,
) -> None:
    """Write documents as a folder of shards of about `shard_tokens` tokens, or leave no trace.

    Tokens are uint16 where the vocabulary allows it. `count()` is called at the end of each shard and adds counts to
    its sidecar.

    Raises:
        ValueError: no documents. OSError: a full disk.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.partial")
    partial.mkdir()
    rest = iter(documents)
    try:
        for number in itertools.count():
            first = next(rest, None)
            if first is None:
                break
            stem = partial / f"shard-{number:05d}"
            sidecar = {**_write_shard(stem, itertools.chain([first], rest), tokenizer, shard_tokens), **count()}
            stem.with_suffix(".json").write_text(json.dumps(sidecar, indent=1), encoding="utf-8")
        if number == 0:
            raise ValueError("data: there is nothing to learn from: no rows, or only empty ones")
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():  # another process was first
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_shard(stem: Path, documents: Iterable[Document], tokenizer: Tokenizer, limit: int) -> dict[str, Any]:
    """Takes documents until the limit is passed; their sidecar."""
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    digest, starts, plain = hashlib.sha256(), array("q", [0]), True
    with (
        stem.with_suffix(".bin").open("wb") as tokens_file,
        stem.with_suffix(".weights.bin").open("wb") as weights_file,
    ):
        for document in documents:
            tokens, weights = np.asarray(document.tokens, dtype), np.asarray(document.weights, np.uint8)
            assert len(tokens) == len(weights) > 0, (len(tokens), len(weights))
            starts.append(starts[-1] + len(tokens))
            for part in (np.int64(len(tokens)), tokens.astype("<u4"), weights):
                digest.update(part.tobytes())
            tokens_file.write(tokens.tobytes())
            weights_file.write(weights.tobytes())
            plain = plain and bool(weights[1:].all())
            if starts[-1] >= limit:
                break
        for file in (tokens_file, weights_file):
            _flush(file)
    if plain:
        stem.with_suffix(".weights.bin").unlink()
    with stem.with_suffix(".starts.bin").open("wb") as file:
        file.write(np.array(starts, "<i8").tobytes())
        _flush(file)
    return {
        "dtype": "uint16" if dtype.itemsize == 2 else "uint32",
        "tokens": starts[-1],
        "documents": len(starts) - 1,
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer": tokenizer_digest(tokenizer),
        "sha256": digest.hexdigest(),
    }


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def open_shards(data: Path | Sequence[Path], tokenizer: Tokenizer) -> Documents:
    """Documents of a folder of shards, or of the token files given.

    Raises:
        FileNotFoundError: no shards, or no sidecar.
        ValueError: a damaged shard, or one of another tokenizer; names the file.
    """
    paths = sorted(Path(data).iterdir()) if isinstance(data, Path) and data.is_dir() else []
    paths = paths or ([data] if isinstance(data, Path) else list(data))
    files = [p for p in paths if p.suffix in (".bin", ".npy") and not p.name.endswith((".starts.bin", ".weights.bin"))]
    if not files:
        raise FileNotFoundError(f"data: {data}: no token files (.bin or .npy)")
    digest, counts = hashlib.sha256(), {"left_out": 0}
    shards = []
    for path in files:
        sidecar = _sidecar(path, tokenizer)
        shards.append(_open_shard(path, sidecar))
        content = sidecar.get("sha256") or f"{sidecar} {path.stat().st_size} {hashlib.sha256(_head(path)).hexdigest()}"
        digest.update(f"{content}\n".encode())
        counts["left_out"] = int(sidecar.get("left_out", 0))  # each shard's count includes those before it
    return Documents(shards, digest.hexdigest(), tokenizer.vocab_size, counts)


def _sidecar(path: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    file = path.with_suffix(".json")
    if not file.is_file():
        raise FileNotFoundError(f"{path}: its sidecar {file.name} is missing")
    try:
        sidecar = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not JSON: {error}") from error
    if not isinstance(sidecar, dict) or sidecar.get("dtype") not in _DTYPES:
        raise ValueError(f"{file}: {sidecar!r:.80}; allowed: an object with dtype {' or '.join(_DTYPES)}")
    for key, own in {
        "bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id, "tokenizer": tokenizer_digest(tokenizer)
    }.items():  # fmt: skip
        if sidecar.get(key, own) not in (own, None):
            raise ValueError(
                f"{file}: {key} is {sidecar[key]!r}, the tokenizer's is {own!r}: another tokenizer's tokens"
            )
    return sidecar


def _open_shard(path: Path, sidecar: Mapping[str, Any]) -> Shard:
    dtype = np.dtype(sidecar["dtype"]).newbyteorder("<")
    try:
        tokens: NDArray[Any] = (
            np.load(path, mmap_mode="r", allow_pickle=False) if path.suffix == ".npy" else np.memmap(path, dtype, "r")
        )
    except ValueError as error:
        raise ValueError(f"{path}: not tokens of dtype {sidecar['dtype']}: {error}") from error
    if tokens.dtype != dtype or tokens.ndim != 1 or len(tokens) != sidecar.get("tokens", len(tokens)):
        due = f"{sidecar.get('tokens', 'any number')} of {sidecar['dtype']}"
        raise ValueError(f"{path}: {tokens.dtype} of shape {tokens.shape}; due: {due}")
    if path.with_suffix(".starts.bin").is_file():
        starts = np.fromfile(path.with_suffix(".starts.bin"), "<i8").astype(np.int64)
    else:
        starts = _scan(path, tokens, sidecar)
    weights_file = path.with_suffix(".weights.bin")
    weights = np.memmap(weights_file, np.uint8, "r") if weights_file.is_file() else None
    whole = len(starts) > 1 and starts[0] == 0 and starts[-1] == len(tokens) and bool((np.diff(starts) > 0).all())
    if not whole or (weights is not None and len(weights) != len(tokens)):
        raise ValueError(f"{path}: its starts or weights do not fit its {len(tokens)} tokens: a damaged shard")
    return Shard(tokens, starts, weights)


def _scan(path: Path, tokens: NDArray[Any], sidecar: Mapping[str, Any]) -> Int64:
    """Where documents start, by their BOS, or after an EOS."""
    bos, eos = sidecar.get("bos_id"), sidecar.get("eos_id")
    if bos is None and eos is None:
        raise ValueError(f"{path.with_suffix('.json')}: without starts, bos_id or eos_id must tell documents apart")
    mark, shift = (eos, 1) if bos is None else (bos, 0)
    parts = [np.flatnonzero(tokens[at : at + _SCAN] == mark) + at + shift for at in range(0, len(tokens), _SCAN)]
    return np.unique(np.concatenate([np.zeros(1, np.int64), *parts, np.array([len(tokens)])])).astype(np.int64)


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(2**20)
