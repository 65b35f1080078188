"""Sources: every kind of file gives the same rows, in order, each with its place; faults name the file and the line."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from gemwright.data.sources import open_source

ROWS: list[dict[str, Any]] = [
    {"prompt": 'a, b\n"c"', "completion": "é"},
    {"prompt": "", "completion": "x" * 200_000},
    {"prompt": "🙂", "completion": "null"},
]


def jsonl(path: Path) -> Path:
    path.write_text("\n\n".join(json.dumps(row) for row in ROWS), encoding="utf-8")
    return path


def comma(path: Path) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, list(ROWS[0]))
        table.writeheader()
        table.writerows(ROWS)
    return path


def columns(path: Path) -> Path:
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=2)
    return path


def saved(path: Path) -> Path:
    datasets.Dataset.from_list(ROWS).save_to_disk(path)
    return path


@pytest.mark.parametrize(
    ("make", "name", "places"),
    [
        (jsonl, "d.jsonl", [":1", ":3", ":5"]),
        (comma, "d.csv", [", row 1", ", row 2", ", row 3"]),
        (columns, "d.parquet", [", row 1", ", row 2", ", row 3"]),
        (saved, "d", ["[train], row 1", "[train], row 2", "[train], row 3"]),
    ],
)
def test_rows_and_places(make: Callable[[Path], Path], name: str, places: list[str], tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    path = make(tmp_path / name)
    source = open_source(path)
    for _ in range(2):  # from the first again
        found = list(source.rows())
        assert [dict(row.data) for row in found] == ROWS
        assert [row.where for row in found] == [f"{path}{place}" for place in places]
    assert csv.field_size_limit() == limit


def test_reading_is_a_stream(tmp_path: Path) -> None:
    """The first row is there before the damage behind it is met."""
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "a"}\n{"text": \n', encoding="utf-8")
    rows = open_source(path).rows()
    assert next(rows).data == {"text": "a"}
    with pytest.raises(ValueError, match=r"d\.jsonl:2: not JSON: .*; allowed: one JSON object a line$"):
        next(rows)


def test_several_files_and_globs(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name}), encoding="utf-8")
    found = [row.data["text"] for row in open_source([tmp_path / "c.jsonl", tmp_path / "[ab].jsonl"]).rows()]
    assert found == ["c", "a", "b"]


def test_csv_messages_are_json(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = tmp_path / "d.csv"
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows([["messages"], [json.dumps(turns)], ["[oops"]])
    rows = open_source(path).rows()
    assert next(rows).data == {"messages": turns}
    with pytest.raises(ValueError, match=r"d\.csv, row 2: messages: not JSON"):
        next(rows)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("d.jsonl", b'{"text": "a"}\n"b"\n', ":2: a JSON str; allowed: one JSON object a line"),
        ("d.jsonl", b'{"text": "\xff"}\n', ":1: not JSON: 'utf-8' codec"),
        ("d.json", b'[\n{"text": "a"}]', ":1: not JSON: .*; an array over many lines is not read"),
        ("d.csv", b"a,b\n1,2\n1\n", r", row 2 \(line 3\): more or fewer cells than the 2 named"),
        ("d.csv", b"a,b\n1,2,3\n", r", row 1 \(line 2\): more or fewer cells"),
        ("d.csv", b"a,a\n1,2\n", r": the header names \['a'\] twice"),
        ("d.csv", b'a,b\n"1,2\n', ": not CSV in UTF-8: unexpected end of data"),
        ("d.csv", b"a\n\xff\n", ": not CSV in UTF-8: 'utf-8' codec"),
        ("d.parquet", b"PAR1 no more", ": damaged, or not Parquet, after row 0"),
    ],
)
def test_damaged_files_are_named(name: str, content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}{said}"):
        list(open_source(tmp_path / name).rows())


def test_splits_of_a_saved_dataset(tmp_path: Path) -> None:
    table = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict(train=table, test=table.select([2])).save_to_disk(tmp_path / "d")
    assert [row.where for row in open_source(tmp_path / "d", split="test").rows()] == [f"{tmp_path / 'd'}[test], row 1"]
    assert open_source(tmp_path / "d").total() == 3
    with pytest.raises(ValueError, match=r"split: 'dev'; .* has train, test"):
        open_source(tmp_path / "d", split="dev")
    with pytest.raises(ValueError, match="config and streaming apply to datasets on the hub"):
        open_source(tmp_path / "d", streaming=True)


def test_what_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.jsonl: no such file"):
        open_source(tmp_path / "absent.jsonl")
    with pytest.raises(FileNotFoundError, match="absent/data: no such file or folder, and not a dataset's name"):
        open_source(tmp_path / "absent/data")
    with pytest.raises(
        ValueError, match=r"a folder without dataset_dict.json or dataset_info.json; allowed: .*\*.jsonl"
    ):
        open_source(tmp_path)
    (tmp_path / "d.tsv").touch()
    with pytest.raises(ValueError, match=r"d.tsv: a .tsv file; allowed: .jsonl, .ndjson, .json, .csv, .parquet"):
        open_source(tmp_path / "d.tsv")
    with pytest.raises(ValueError, match="split: 'test' with files; it applies to datasets"):
        open_source(jsonl(tmp_path / "d.jsonl"), split="test")
    with pytest.raises(ValueError, match="data: an empty list"):
        open_source([])


def test_missing_libraries_name_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs datasets: pip install 'gemwright\[train\]'"):
        open_source("owner/name")
    (tmp_path / "d.parquet").touch()
    with pytest.raises(ModuleNotFoundError, match=r"needs pyarrow: pip install 'gemwright\[train\]'"):
        next(open_source(tmp_path / "d.parquet").rows())


def test_a_name_goes_to_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is not asked here: what `load_dataset` is called with, and what becomes of its answers."""
    asked: list[Any] = []

    def load(*args: Any, **options: Any) -> datasets.Dataset:
        asked.append((args, options))
        if args[0] == "no/where":
            raise datasets.exceptions.DatasetNotFoundError("it does not exist")
        return datasets.Dataset.from_list(ROWS, split=datasets.Split.TRAIN)

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = open_source("owner/name", config="en", split="train[:90%]", streaming=True)
    assert asked == [(("owner/name", "en"), {"split": "train[:90%]", "streaming": True})]
    assert next(source.rows()).where == "owner/name[train], row 1"
    with pytest.raises(FileNotFoundError, match="no/where: no such file or folder here, and no dataset: it does not"):
        open_source("no/where")


def test_identity_follows_the_content(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "d.jsonl")
    before = open_source(path).identity()
    assert before == open_source(path).identity()
    path.write_text("{}", encoding="utf-8")
    assert before != open_source(path).identity()
    one, two = saved(tmp_path / "one"), tmp_path / "two"
    datasets.Dataset.from_list(ROWS[:2]).save_to_disk(two)
    assert open_source(one).identity() != open_source(two).identity()


def test_streamed_data_has_no_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    table = datasets.Dataset.from_list(ROWS).to_iterable_dataset()
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: table)
    source = open_source("owner/name", split="train", streaming=True)
    assert [dict(row.data) for row in source.rows()] == ROWS
    assert source.total() is None
    with pytest.raises(ValueError, match=r"streaming: owner/name\[train\] is read anew each time"):
        source.identity()
