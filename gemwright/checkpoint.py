"""Checkpoint: a folder in Hugging Face layout, the only currency between the verbs.

Layout. `config.json`; `generation_config.json` and tokenizer files where the model has them; the weights in one
`model.safetensors`, or in shards `model-00001-of-0000N.safetensors` with `model.safetensors.index.json`, whose
`weight_map` sends tensor names to shards. As in transformers, the single file wins where both are there.

Reading. Every header is checked when the folder is opened; tensors are mapped one by one (`weights.py`), so a folder of
any size opens at once and costs memory only for what is held. Pickle is never read: it can run code.

Writing. Everything goes to a hidden sibling folder, is flushed to disk, and becomes visible by one rename.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from gemwright.weights import DTYPES, Entry, read_header, read_json, save_tensors
from gemwright.weights import CheckpointError as CheckpointError

CONFIG: Final = "config.json"
GENERATION_CONFIG: Final = "generation_config.json"
WEIGHTS: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
EMBEDDING: Final = "model.embed_tokens.weight"
HEAD: Final = "lm_head.weight"
TOKENIZER_FILES: Final = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
_COMPARED_ROWS: Final = 8192


class Checkpoint:
    """A checkpoint folder, opened: its configs, and its tensors by name, read lazily.

    Raises FileNotFoundError where the folder does not exist, CheckpointError where what is in it cannot be used.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder: Path = Path(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{self.folder}: no such folder")
        self.config: dict[str, Any] = read_json(self.folder / CONFIG)
        generation = self.folder / GENERATION_CONFIG
        self.generation_config: dict[str, Any] = read_json(generation) if generation.exists() else {}
        weights = self.folder / WEIGHTS
        self._entries = read_header(weights) if os.path.lexists(weights) else _read_shards(self.folder)

    def names(self) -> list[str]:
        """Names of all stored tensors, in the order of the files."""
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor; CheckpointError where the folder has none of that name."""
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Storage dtype of a tensor: bfloat16, float16 or float32."""
        return self._entry(name).dtype

    def tensor(self, name: str, rows: slice | None = None) -> Tensor:
        """One tensor, or a range of its rows, as a memory mapping that dies with it.

        Writing into it does not touch the file. `rows` is `slice(a, b)` with 0 <= a < b <= the first dimension.
        """
        entry = self._entry(name)
        if rows is not None:
            start, stop = rows.start or 0, rows.stop
            if rows.step not in (None, 1) or stop is None or not entry.shape or not 0 <= start < stop <= entry.shape[0]:
                raise ValueError(
                    f"rows of {name} {entry.shape}: got {rows}, allowed slice(a, b), 0 <= a < b <= shape[0]"
                )
            entry = entry.rows(start, stop)
        return entry.map()

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise one CheckpointError that names every tensor missing, surplus or misshapen against `shapes`.

        Two departures that published folders have are allowed: an `lm_head.weight` that repeats the embedding byte
        for byte, and rows of either table past the expected vocabulary (256128 for 256000; `rows=` crops them).
        """
        faults = [f"missing {name}" for name in shapes if name not in self._entries]
        for name, entry in self._entries.items():
            due = shapes.get(EMBEDDING if name == HEAD and HEAD not in shapes else name)
            if due is None:
                faults.append(f"surplus {name}")
            elif not _fits(name, entry.shape, due):
                faults.append(f"misshapen {name} {entry.shape}, due {due}")
            elif name == HEAD and HEAD not in shapes and not self._repeats_embedding(due):
                faults.append(f"surplus {HEAD}: the head is tied, and it differs from {EMBEDDING}")
        if faults:
            raise CheckpointError(f"{self.folder}: tensors do not fit the config: {'; '.join(faults)}")

    def _repeats_embedding(self, due: tuple[int, ...]) -> bool:
        """Whether head and embedding have the same bytes in the rows that are due; holds a few rows at a time."""
        stored = self._entries.get(EMBEDDING)
        if stored is None or not _fits(EMBEDDING, stored.shape, due) or stored.dtype != self.dtype(HEAD):
            return False
        for start in range(0, due[0], _COMPARED_ROWS):
            part = slice(start, min(start + _COMPARED_ROWS, due[0]))
            # Bytes, not numbers: NaN differs from itself and 0.0 equals -0.0.
            head, embedding = (self.tensor(name, part).view(torch.uint8) for name in (HEAD, EMBEDDING))
            if not torch.equal(head, embedding):
                return False
        return True

    def _entry(self, name: str) -> Entry:
        if name not in self._entries:
            raise CheckpointError(f"{self.folder}: no tensor {name!r}")
        return self._entries[name]


def _fits(name: str, shape: tuple[int, ...], due: tuple[int, ...]) -> bool:
    padded = name in (EMBEDDING, HEAD) and shape[1:] == due[1:] and shape[:1] > due[:1]
    return shape == due or padded


def _read_shards(folder: Path) -> dict[str, Entry]:
    """The tensors of all shards; index and shards must name each other's tensors, no more and no fewer."""
    index = folder / INDEX
    if not index.exists():
        raise CheckpointError(_no_weights(folder))
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index}: weight_map must be an object of tensor names and shard names")
    for name, shard in weight_map.items():
        # A plain name only: a path could lead out of the folder.
        if not isinstance(shard, str) or not re.fullmatch(r"[\w.-]+\.safetensors", shard):
            raise CheckpointError(f"{index}: tensor {name!r} in {shard!r}, allowed is the name of a .safetensors file")
        if not (folder / shard).exists():
            raise CheckpointError(f"{folder / shard}: missing; {INDEX} puts tensor {name!r} there")
    entries: dict[str, Entry] = {}
    for shard in sorted(set(weight_map.values())):
        for name, entry in read_header(folder / shard).items():
            if weight_map.get(name) != shard:
                raise CheckpointError(
                    f"{folder / shard}: holds tensor {name!r}, which {INDEX} puts in {weight_map.get(name, 'no shard')}"
                )
            entries[name] = entry
    for name, shard in weight_map.items():
        if name not in entries:
            raise CheckpointError(f"{folder / shard}: lacks tensor {name!r}, which {INDEX} puts there")
    return entries


def _no_weights(folder: Path) -> str:
    found = sorted(path.name for path in folder.iterdir())
    pickles = [name for name in found if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    shards = [name for name in found if name.endswith(".safetensors")]
    if shards:
        return f"{folder}: no {WEIGHTS}, and no {INDEX} for {', '.join(shards)}"
    if pickles:
        return f"{folder}: only pickle weights ({', '.join(pickles)}), which can run code; convert them to {WEIGHTS}"
    return f"{folder}: no weights: neither {WEIGHTS} nor {INDEX}"


def write(
    folder: str | Path,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    config: Mapping[str, Any],
    generation_config: Mapping[str, Any] | None = None,
    copy_from: Path | None = None,
    extra_files: Mapping[str, bytes] | None = None,
    max_shard_bytes: int = 5_000_000_000,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a checkpoint that transformers loads unchanged; returns the absolute folder.

    `tensors` are float tensors of any device and layout, drawn lazily: at most one shard of `max_shard_bytes` is held,
    and a tensor must not change while write() runs. Names and shards follow transformers: the tied head
    is left out by the caller. Tokenizer files that `copy_from` has are copied; `extra_files` adds whole files and wins
    over a copied one; `metadata` adds to the weights' own `{"format": "pt"}`.

    An error, a full disk included, leaves no trace. An existing folder that is not empty is refused
    (FileExistsError); with `overwrite` a checkpoint is replaced: renamed away, the new one renamed in, then
    removed. It may be the folder that `tensors` come from. A crash between those two renames leaves both whole
    beside the name, as `.NAME.XXXXXXXX.old` and `.NAME.XXXXXXXX.partial`.
    """
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes: got {max_shard_bytes}, allowed >= 1")
    target = Path(folder).expanduser().resolve()
    refuse(target, overwrite)
    files = _side_files(config, generation_config, copy_from, extra_files or {})
    target.parent.mkdir(parents=True, exist_ok=True)
    hidden = f".{target.name}.{secrets.token_hex(4)}"
    partial = target.with_name(f"{hidden}.partial")
    partial.mkdir()
    try:
        _write_weights(partial, tensors, max_shard_bytes, {"format": "pt", **(metadata or {})})
        for name, content in files.items():
            (partial / name).write_bytes(content)
            _sync(partial / name)
        _sync(partial)
        _publish(partial, target, old=target.with_name(f"{hidden}.old"), overwrite=overwrite)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def refuse(target: Path, overwrite: bool) -> None:
    """Raise FileExistsError where writing would destroy something: anything but a checkpoint named for overwriting."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not overwrite:
        raise FileExistsError(f"{target}: exists; overwrite=True replaces it")
    if not (target / CONFIG).is_file():
        raise FileExistsError(f"{target}: holds no {CONFIG}, so it is no checkpoint and overwrite=True keeps it")


def _side_files(
    config: Mapping[str, Any],
    generation_config: Mapping[str, Any] | None,
    copy_from: Path | None,
    extra_files: Mapping[str, bytes],
) -> dict[str, bytes]:
    """Every file but the weights, made before the first byte is written."""
    configs = {CONFIG: config} | ({} if generation_config is None else {GENERATION_CONFIG: generation_config})
    if copy_from is not None and not copy_from.is_dir():
        raise FileNotFoundError(f"copy_from: {copy_from}: no such folder")
    for name in extra_files:
        if not re.fullmatch(r"[\w-][\w.-]*", name) or name in configs or name.endswith((".safetensors", INDEX)):
            raise ValueError(f"extra_files: got {name!r}, allowed is a plain file name, neither weights nor a config")
    copied = [] if copy_from is None else [path for name in TOKENIZER_FILES if (path := copy_from / name).is_file()]
    return {
        **{path.name: path.read_bytes() for path in copied},
        **extra_files,
        **{name: _to_json(table) for name, table in configs.items()},
    }


def _to_json(table: Mapping[str, Any]) -> bytes:
    return (json.dumps(dict(table), indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def _write_weights(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int, metadata: dict[str, str]
) -> None:
    """Write the shards, then give them their final names: how many there are is known only at the end."""
    weight_map: dict[str, int] = {}
    parameters = size = count = 0
    for count, shard in enumerate(_shards(tensors, max_shard_bytes), 1):
        for name, tensor in shard.items():
            if name in weight_map:
                raise ValueError(f"tensors: {name!r} comes twice")
            weight_map[name] = count
            parameters += tensor.numel()
            size += tensor.nbytes
        _write_shard(folder / str(count), shard, metadata)
        shard.clear()  # else it would live on while the next one fills
    if not count:
        raise ValueError("tensors: got none")
    final = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)] if count > 1 else [WEIGHTS]
    for number, name in enumerate(final, 1):
        (folder / str(number)).rename(folder / name)
    if count > 1:
        index = {
            "metadata": {"total_parameters": parameters, "total_size": size},
            "weight_map": {name: final[number - 1] for name, number in weight_map.items()},
        }
        (folder / INDEX).write_bytes(_to_json(index))
        _sync(folder / INDEX)


def _shards(tensors: Iterable[tuple[str, Tensor]], max_bytes: int) -> Iterator[dict[str, Tensor]]:
    """Group tensors as transformers does: a tensor above the limit is a shard of its own, the others fill shards."""
    shard: dict[str, Tensor] = {}
    held = 0
    for name, tensor in tensors:
        if tensor.dtype not in DTYPES.values():
            raise ValueError(f"tensors: {name!r} is {tensor.dtype}, allowed are bfloat16, float16 and float32")
        if not tensor.numel():
            raise ValueError(f"tensors: {name!r} is empty: {tuple(tensor.shape)}")
        if name in shard:
            raise ValueError(f"tensors: {name!r} comes twice")
        plain = tensor.detach().cpu().contiguous()
        if plain.nbytes > max_bytes:
            yield {name: plain}
            continue
        if held + plain.nbytes > max_bytes:
            yield shard
            shard, held = {}, 0
        shard[name] = plain
        held += plain.nbytes
    if shard:
        yield shard


def _write_shard(path: Path, shard: dict[str, Tensor], metadata: dict[str, str]) -> None:
    save_tensors(shard, path, metadata)
    _sync(path)


def _publish(partial: Path, target: Path, *, old: Path, overwrite: bool) -> None:
    replaced = overwrite and target.exists()
    if replaced:
        target.rename(old)
    try:
        # Over an empty folder this succeeds; over one that another process filled meanwhile it fails.
        partial.rename(target)
    except BaseException:
        if replaced:
            old.rename(target)
        raise
    _sync(target.parent)
    if replaced:
        shutil.rmtree(old)


def _sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk: a rename must not outrun the data it makes visible."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
