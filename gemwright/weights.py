"""Weights: one safetensors file, its header checked and its tensors mapped.

A safetensors file is `uint64 L (little-endian) | L bytes of JSON | data`. The JSON maps each name to
`{"dtype", "shape", "data_offsets": [begin, end]}`, offsets counted from the first byte of data; the tensors cover the
data without hole or overlap (https://huggingface.co/docs/safetensors). All of it is checked before a weight is read.

Each tensor is a private, copy-on-write mapping of its own byte range, unmapped when the tensor dies: reading costs no
copy, a model held unpacked costs its file once, and one that packs its weights gives the pages back tensor by tensor.
`safetensors.safe_open` does not serve here (measured, 0.8.0): one handle keeps every page touched while it or any of
its tensors lives, and a handle per tensor maps the whole file, which Linux refuses for a file larger than memory.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

DTYPES: Final = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
HEADER_LIMIT: Final = 100_000_000
"""Bytes; the bound of the safetensors library."""
JSON_LIMIT: Final = 16 << 20
"""Bytes of a config or an index; the index of 27B has 40 kB."""


class CheckpointError(ValueError):
    """A damaged, hostile or incomplete folder; the message names the file and, where one is at fault, the tensor."""


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: its file, its first byte counted from the start of that file, dtype and shape."""

    file: Path
    begin: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def end(self) -> int:
        return self.begin + math.prod(self.shape) * self.dtype.itemsize

    def rows(self, start: int, stop: int) -> Entry:
        """The part of a tensor that rows `start : stop` of its first dimension take; 0 <= start < stop <= shape[0]."""
        assert 0 <= start < stop <= self.shape[0], (start, stop, self.shape)
        skipped = start * math.prod(self.shape[1:]) * self.dtype.itemsize
        return Entry(self.file, self.begin + skipped, self.dtype, (stop - start, *self.shape[1:]))

    def map(self) -> Tensor:
        """The tensor over a private mapping that it owns: writing into it does not touch the file.

        Before Python 3.13 a live mapping also holds a file descriptor.
        """
        base = self.begin - self.begin % mmap.ALLOCATIONGRANULARITY
        with self.file.open("rb") as file:
            if os.fstat(file.fileno()).st_size < self.end:
                raise CheckpointError(f"{self.file}: shrank after it was opened")
            if sys.version_info >= (3, 13):
                mapped = mmap.mmap(file.fileno(), self.end - base, access=mmap.ACCESS_COPY, offset=base, trackfd=False)
            else:
                mapped = mmap.mmap(file.fileno(), self.end - base, access=mmap.ACCESS_COPY, offset=base)
        raw = torch.frombuffer(mapped, dtype=torch.uint8, count=self.end - self.begin, offset=self.begin - base)
        if self.begin % self.dtype.itemsize:
            # The format allows it, and writers that do not pad their header make it: no tensor lies over odd bytes.
            raw = raw.clone()
        return raw.view(self.dtype).view(self.shape)


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file. OSError, with its number, where that cannot be done, such as on a full disk."""
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise OSError(f"{path}: cannot be written: {error}") from error
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def _size(path: Path) -> int:
    """Bytes of a regular file, links followed (the hub's cache is made of links); a pipe or a device is refused."""
    if not path.is_file():
        raise CheckpointError(f"{path}: {'not a regular file' if path.exists() else 'missing'}")
    return path.stat().st_size


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of at most JSON_LIMIT bytes; a name that occurs twice is refused."""
    size = _size(path)
    if size > JSON_LIMIT:
        raise CheckpointError(f"{path}: {size} bytes of JSON, at most {JSON_LIMIT} are allowed")
    return _parse_json(path.read_bytes(), path)


def _parse_json(text: bytes, path: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table: dict[str, Any] = {}
        for name, value in pairs:
            if name in table:
                raise ValueError(f"the name {name!r} occurs twice")
            table[name] = value
        return table

    try:
        value = json.loads(text.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: a JSON object is due, got {type(value).__name__}")
    return value


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of one safetensors file in the order of their bytes, checked against the size of the file."""
    size = _size(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, HEADER_LIMIT):
            raise CheckpointError(
                f"{path}: truncated or not a safetensors file: the header claims {length} bytes, the file has {size}, "
                f"a header at most {HEADER_LIMIT}"
            )
        header = _parse_json(file.read(length), path)
    header.pop("__metadata__", None)
    start = end = 8 + length
    entries = [(name, _parse_entry(path, name, fields, start)) for name, fields in header.items()]
    entries.sort(key=lambda item: item[1].begin)
    for name, entry in entries:
        if entry.end > size:
            raise CheckpointError(f"{path}: tensor {name!r} ends at byte {entry.end} of a file that has {size}")
        if entry.begin != end:
            raise CheckpointError(
                f"{path}: tensor {name!r} begins at byte {entry.begin} where {end} is due: an overlap or a hole"
            )
        end = entry.end
    if end != size:
        raise CheckpointError(f"{path}: {size - end} bytes after the last tensor belong to none")
    return dict(entries)


def _parse_entry(path: Path, name: str, fields: Any, start: int) -> Entry:
    where = f"{path}: tensor {name!r}"
    if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: its header must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{where}: dtype {dtype!r}, allowed are {', '.join(DTYPES)}")
    if not isinstance(shape, list) or not all(type(n) is int and n > 0 for n in shape):
        raise CheckpointError(f"{where}: shape {shape!r}, allowed is a list of positive integers")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int and n >= 0 for n in offsets):
        raise CheckpointError(f"{where}: data_offsets {offsets!r}, allowed are two integers >= 0")
    entry = Entry(path, start + offsets[0], DTYPES[dtype], tuple(shape))
    if entry.end != start + offsets[1]:
        raise CheckpointError(
            f"{where}: shape {shape} of {dtype} takes {entry.end - entry.begin} bytes, its data_offsets {offsets} "
            f"give {offsets[1] - offsets[0]}"
        )
    return entry
