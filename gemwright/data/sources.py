"""Sources: files and Hugging Face datasets to rows, read as a stream, each row with the place it came from.

Files: JSON lines (.jsonl, .ndjson, .json), CSV with a header (.csv), Parquet (.parquet); several files and globs are
read in the order given, a glob's files by name. At most one line, or one batch of a Parquet file, is in memory.
Anything else is a dataset of the `datasets` library: a folder that its `save_to_disk` wrote, or a name on the hub.
`pyarrow` and `datasets` are imported when they are needed.
"""

from __future__ import annotations

import csv
import glob
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

EXTRA: Final = "pip install 'gemwright[train]'"
_PARQUET_ROWS: Final = 256
_DATASET_MARKS: Final = ("dataset_dict.json", "dataset_info.json")


class Row(NamedTuple):
    """One row and where it came from: `FILE:LINE` (1-based) of JSON lines, else `NAME, row N` (1-based)."""

    where: str
    data: Mapping[str, Any]


class Source(Protocol):
    """Rows in a fixed order; every call of `rows` starts at the first."""

    @property
    def name(self) -> str:
        """As messages call it."""

    def rows(self) -> Iterator[Row]: ...
    def identity(self) -> str:
        """Changes whenever the rows may have changed: the key of what is derived from them.

        ValueError for a dataset that is streamed: nobody knows when it changes.
        """

    def total(self) -> int | None:
        """Number of rows, where that is known without reading them."""


def open_source(
    data: str | Path | Sequence[str | Path],
    *,
    config: str | None = None,
    split: str | None = None,
    streaming: bool = False,
) -> Source:
    """A source of rows.

    Args:
        data: files and globs, one or several, or a single dataset: a folder saved to disk or a name on the hub.
        config: configuration of a hub dataset that has several.
        split: split of a dataset, with the slices that `datasets` knows ("train[:90%]"); the default is "train", or
            the only one.
        streaming: read a hub dataset over the network as it is used.

    Raises:
        FileNotFoundError: no such file, a glob without a match, or no such dataset.
        ValueError: a file of another kind, or an option that the data has no use for.
        ModuleNotFoundError: `datasets` or `pyarrow` is missing; the message has the command that installs them.
    """
    names = [str(data)] if isinstance(data, (str, Path)) else [str(name) for name in data]
    if not names:
        raise ValueError("data: an empty list; allowed: files, globs, or one dataset")
    if len(names) == 1 and not _is_file(names[0]):
        return _Dataset(names[0], config, split, streaming)
    for option, value in {"config": config, "split": split, "streaming": streaming or None}.items():
        if value is not None and value != "train":
            raise ValueError(f"{option}: {value!r} with files; it applies to datasets, and files are chosen by name")
    return _Files([path for name in names for path in _matches(name)])


def _is_file(name: str) -> bool:
    return Path(name).is_file() or Path(name).suffix in _READERS or glob.has_magic(name)


def _matches(name: str) -> list[Path]:
    """The files that a name or a glob stands for, each of a known kind."""
    paths = [Path(name)] if Path(name).is_file() else [Path(path) for path in sorted(glob.glob(name, recursive=True))]
    paths = [path for path in paths if path.is_file()]
    if not paths:
        raise FileNotFoundError(f"data: {name}: no such file")
    for path in paths:
        if path.suffix not in _READERS:
            raise ValueError(f"data: {path}: a {path.suffix or 'nameless'} file; allowed: {', '.join(_READERS)}")
    return paths


class _Files:
    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self.name = ", ".join(map(str, paths))

    def rows(self) -> Iterator[Row]:
        for path in self._paths:
            yield from _READERS[path.suffix](path)

    def identity(self) -> str:
        stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in self._paths]
        return json.dumps(stats)

    def total(self) -> int | None:
        return None


def _json_lines(path: Path) -> Iterator[Row]:
    """One object a line; blank lines are passed over."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                array = "; an array over many lines is not read" if number == 1 and line.lstrip()[:1] == b"[" else ""
                raise ValueError(f"{where}: not JSON: {error}; allowed: one JSON object a line{array}") from error
            if not isinstance(value, dict):
                raise ValueError(f"{where}: a JSON {type(value).__name__}; allowed: one JSON object a line")
            yield Row(where, value)


def _csv(path: Path) -> Iterator[Row]:
    """Cells are text; a `messages` cell holds JSON."""
    before = csv.field_size_limit(sys.maxsize)  # of the whole process: the default refuses texts of 128 kB
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            table = csv.DictReader(file, strict=True)
            header = table.fieldnames or []
            if twice := {name for name in header if header.count(name) > 1}:
                raise ValueError(f"{path}: the header names {sorted(twice)} twice")
            for number, row in enumerate(table, 1):
                where = f"{path}, row {number}"
                if None in row or None in row.values():
                    raise ValueError(
                        f"{where} (line {table.line_num}): more or fewer cells than the {len(header)} named"
                    )
                yield Row(where, _with_messages(row, where))
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not CSV in UTF-8: {error}") from error
    finally:
        csv.field_size_limit(before)


def _with_messages(row: dict[str, str], where: str) -> Mapping[str, Any]:
    if "messages" not in row:
        return row
    try:
        return {**row, "messages": json.loads(row["messages"])}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: messages: not JSON: {error}") from error


def _parquet(path: Path) -> Iterator[Row]:
    try:
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{path}: reading Parquet needs pyarrow: {EXTRA}") from error
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield Row(f"{path}, row {number}", row)
    except (ValueError, OSError) as error:  # pyarrow's own errors are these
        raise ValueError(f"{path}: damaged, or not Parquet, after row {number}: {error}") from error


_READERS: Final[Mapping[str, Callable[[Path], Iterator[Row]]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_lines,
    ".csv": _csv,
    ".parquet": _parquet,
}


class _Dataset:
    """A folder saved by `datasets`, or a name on the hub."""

    def __init__(self, name: str, config: str | None, split: str | None, streaming: bool) -> None:
        self.name = name
        folder = Path(name)
        if folder.is_dir() and not any((folder / mark).is_file() for mark in _DATASET_MARKS):
            allowed = f"a folder that datasets.save_to_disk wrote; for files give a glob such as '{folder}/*.jsonl'"
            raise ValueError(f"data: {name}: a folder without {' or '.join(_DATASET_MARKS)}; allowed: {allowed}")
        if not folder.is_dir() and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
            raise FileNotFoundError(f"data: {name}: no such file or folder, and not a dataset's name")
        try:
            import datasets
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f"data: {name}: reading a dataset needs datasets: {EXTRA}") from error
        if not folder.is_dir():
            try:
                self._table: Any = datasets.load_dataset(name, config, split=split or "train", streaming=streaming)
            except (FileNotFoundError, ConnectionError) as error:
                raise FileNotFoundError(
                    f"data: {name}: no such file or folder here, and no dataset: {error}"
                ) from error
        elif config is not None or streaming:
            raise ValueError(f"data: {name}: config and streaming apply to datasets on the hub; this one is a folder")
        else:
            self._table = _split(datasets.load_from_disk(name), name, split)
        self._where = f"{name}[{self._table.split or split or 'train'}]"

    def rows(self) -> Iterator[Row]:
        for number, row in enumerate(self._table, 1):
            yield Row(f"{self._where}, row {number}", row)

    def identity(self) -> str:
        if not hasattr(self._table, "_fingerprint"):
            raise ValueError(
                f"streaming: {self._where} is read anew each time; tokenising it beforehand needs the data here"
            )
        return f"{self._where} {self._table._fingerprint}"  # what `datasets` keys its own caches with

    def total(self) -> int | None:
        return getattr(self._table, "num_rows", None)


def _split(table: Any, name: str, split: str | None) -> Any:
    """One split of what was saved; a folder holds one table, or one for each split."""
    if not isinstance(table, dict):
        if split not in (None, str(table.split)):
            raise ValueError(f"split: {split!r}; {name} holds one split, {table.split}")
        return table
    chosen = split or (next(iter(table)) if len(table) == 1 else "train")
    if chosen not in table:
        raise ValueError(f"split: {split!r}; {name} has {', '.join(table)}")
    return table[chosen]
