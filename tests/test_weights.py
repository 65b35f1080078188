"""Weights: memory is that of the tensors held, and every damaged file is one error that names file and tensor.

Damaged files are built by hand from a header and data, so that each test states the one thing that is wrong.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from gemwright.checkpoint import INDEX, WEIGHTS, Checkpoint, CheckpointError


def folder_of(path: Path, tensors: dict[str, Tensor]) -> Path:
    path.mkdir()
    (path / "config.json").write_text("{}")
    save_file(tensors, path / WEIGHTS, {"format": "pt"})
    return path


def test_writing_into_a_tensor_leaves_the_file(tmp_path: Path) -> None:
    found = Checkpoint(folder_of(tmp_path / "a", {"x": torch.ones(4), "y": torch.ones(4)}))
    tensor = found.tensor("x")
    tensor.zero_()
    assert load_file(found.folder / WEIGHTS)["x"].sum() == found.tensor("x").sum() == found.tensor("y").sum() == 4
    (found.folder / WEIGHTS).unlink()
    assert tensor.sum() == 0


MEASURE = """
import sys, re, torch
from gemwright.checkpoint import Checkpoint
def rss():
    return int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
found = Checkpoint(sys.argv[1])
touch = lambda name: found.tensor(name).view(torch.int16).max()
found.tensor("0", slice(0, 1)).view(torch.int16).max()
base, peak = rss(), 0
for name in found.names():
    tensor = found.tensor(name)
    tensor.view(torch.int16).max()
    peak = max(peak, rss() - base)
del tensor
held = []
for name in found.names():
    held.append(found.tensor(name))
    held[-1].view(torch.int16).max()
everything = rss() - base
del held[::2]
print(peak, everything, rss() - base)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_is_that_of_the_tensors_held(tmp_path: Path) -> None:
    count, each = 16, 25 << 20
    data = torch.randint(-(2**15), 2**15, (each // 2,), dtype=torch.int16).view(torch.bfloat16).view(-1, 1024)
    folder = folder_of(tmp_path / "a", {str(i): data + 0 for i in range(count)})
    try:
        done = subprocess.run([sys.executable, "-c", MEASURE, folder], capture_output=True, text=True, check=True)
    finally:
        (folder / WEIGHTS).unlink()
    peak, everything, half = (int(word) for word in done.stdout.split())
    assert 0.9 * each < peak < 2.5 * each
    assert 0.98 * count * each < everything < 1.05 * count * each
    assert half < 0.6 * count * each


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def raw_file(path: Path, header: Any, data: bytes = bytes(8), length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


DAMAGED: dict[str, tuple[Any, bytes, int | None, str]] = {
    "header longer than the file": ({"x": entry()}, bytes(8), 10**4, "truncated"),
    "absurd header": ({"x": entry()}, bytes(8), 2**63, "truncated"),
    "header cut short": ({"x": entry()}, bytes(8), 20, "cannot be read as JSON"),
    "header not JSON": (b"no", bytes(8), None, "cannot be read as JSON"),
    "header not text": (b"\xff\xfe\x00", bytes(8), None, "cannot be read as JSON"),
    "header not an object": ([1], bytes(8), None, "object is due, got list"),
    "header nested without end": (b"[" * 10**5, bytes(8), None, "cannot be read as JSON"),
    "name twice": (b'{"x":' + json.dumps(entry()).encode() + b',"x":1}', bytes(8), None, "the name 'x' occurs twice"),
    "entry not an object": ({"x": 3}, bytes(8), None, "tensor 'x': .* exactly dtype"),
    "entry lacks offsets": ({"x": {"dtype": "F32", "shape": [2]}}, bytes(8), None, "tensor 'x': .* exactly dtype"),
    "8-bit float": ({"x": entry("F8_E4M3", [8])}, bytes(8), None, "tensor 'x': dtype 'F8_E4M3', allowed are BF16"),
    "integer": ({"x": entry("I32")}, bytes(8), None, "tensor 'x': dtype 'I32'"),
    "double": ({"x": entry("F64", [1])}, bytes(8), None, "tensor 'x': dtype 'F64'"),
    "dtype not a word": ({"x": entry(["F32"])}, bytes(8), None, "tensor 'x': dtype"),
    "negative size": ({"x": entry(shape=[-2])}, bytes(8), None, "tensor 'x': shape"),
    "no element": ({"x": entry(shape=[0, 2**70], offsets=[0, 0])}, b"", None, "tensor 'x': shape"),
    "fractional size": ({"x": entry(shape=[2.0])}, bytes(8), None, "tensor 'x': shape"),
    "truth as size": ({"x": entry(shape=[True, 2])}, bytes(8), None, "tensor 'x': shape"),
    "shape not a list": ({"x": entry(shape="2")}, bytes(8), None, "tensor 'x': shape"),
    "shape against bytes": ({"x": entry(shape=[3])}, bytes(8), None, r"tensor 'x': shape \[3\] of F32 takes 12 bytes"),
    "shape past 64 bits": ({"x": entry(shape=[2**40, 2**40])}, bytes(8), None, "tensor 'x': shape .* takes"),
    "negative offset": ({"x": entry(offsets=[-8, 0])}, bytes(8), None, "tensor 'x': data_offsets"),
    "offsets swapped": ({"x": entry(offsets=[8, 0])}, bytes(8), None, "tensor 'x': shape"),
    "three offsets": ({"x": entry(offsets=[0, 4, 8])}, bytes(8), None, "tensor 'x': data_offsets"),
    "out of range": ({"x": entry(offsets=[8, 16])}, bytes(8), None, "tensor 'x' ends at byte"),
    "far out of range": ({"x": entry(offsets=[2**63, 2**63 + 8])}, bytes(8), None, "tensor 'x' ends at byte"),
    "overlap": ({"x": entry(), "y": entry(offsets=[4, 12])}, bytes(12), None, "tensor 'y' begins .* an overlap"),
    "same bytes twice": ({"x": entry(), "y": entry()}, bytes(8), None, "tensor 'y' begins .* an overlap"),
    "hole": ({"x": entry(), "y": entry(offsets=[12, 20])}, bytes(20), None, "tensor 'y' begins .* or a hole"),
    "hole in front": ({"x": entry(offsets=[4, 12])}, bytes(12), None, "tensor 'x' begins"),
    "truncated data": ({"x": entry(), "y": entry(offsets=[8, 16])}, bytes(15), None, "tensor 'y' ends at byte"),
    "bytes left over": ({"x": entry()}, bytes(9), None, "1 bytes after the last tensor"),
}


@pytest.mark.parametrize("damage", DAMAGED)
@pytest.mark.parametrize("sharded", [False, True], ids=["single", "shard"])
def test_damaged_weights(tmp_path: Path, damage: str, sharded: bool) -> None:
    header, data, length, message = DAMAGED[damage]
    (tmp_path / "config.json").write_text("{}")
    path = tmp_path / ("model-00001-of-00001.safetensors" if sharded else WEIGHTS)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"x": path.name, "y": path.name}}))
    raw_file(path, header, data, length)
    with pytest.raises(CheckpointError, match=re.escape(str(path)) + ".*" + message):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"\x02\0\0", b"PK\x03\x04" + bytes(100), b"version https://git-lfs.github.com/"]
)
def test_not_a_safetensors_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / WEIGHTS).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{WEIGHTS}: (truncated|cannot)"):
        Checkpoint(tmp_path)


def test_odd_bytes_are_read(tmp_path: Path) -> None:
    truth = torch.randn(5, 3)
    (tmp_path / "config.json").write_text("{}")
    for pad in range(8):
        text = json.dumps({"x": entry("F32", [5, 3], [0, 60])}).encode() + b" " * pad
        raw_file(tmp_path / WEIGHTS, text, truth.numpy().tobytes())
        found = Checkpoint(tmp_path)
        assert torch.equal(found.tensor("x"), truth)
        assert torch.equal(found.tensor("x", slice(1, 3)), truth[1:3])
        assert found.tensor("x").data_ptr() % 4 == 0


def test_a_file_that_shrinks_after_opening(tmp_path: Path) -> None:
    found = Checkpoint(folder_of(tmp_path / "a", {"x": torch.ones(4)}))
    os.truncate(found.folder / WEIGHTS, 90)
    with pytest.raises(CheckpointError, match="shrank"):
        found.tensor("x")


@pytest.fixture(scope="module")
def good_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    folder = folder_of(tmp_path_factory.mktemp("fuzz") / "a", {"x": torch.ones(4), "y": torch.ones(2, 3).bfloat16()})
    return folder, (folder / WEIGHTS).read_bytes()


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 250), byte=st.integers(0, 255), keep=st.integers(0, 300))
def test_any_byte_changed_is_an_error_or_a_readable_file(
    good_file: tuple[Path, bytes], at: int, byte: int, keep: int
) -> None:
    folder, content = good_file
    at %= len(content)
    (folder / WEIGHTS).write_bytes((content[:at] + bytes([byte]) + content[at + 1 :])[: keep + 100])
    try:
        found = Checkpoint(folder)
    except CheckpointError:
        return
    for name in found.names():
        assert tuple(found.tensor(name).shape) == found.shape(name)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, "config.json: missing"),
        ("config.json", b"{", "config.json: cannot be read as JSON"),
        ("config.json", b"[1]", "config.json: a JSON object is due, got list"),
        ("config.json", b"\xff", "config.json: cannot be read as JSON"),
        ("config.json", b'{"a": 1, "a": 2}', "config.json: .* the name 'a' occurs twice"),
        ("config.json", b'{"a": ' + b"[" * 10**5, "config.json: cannot be read as JSON"),
        ("config.json", b'{"a": 1}' + b" " * (16 << 20), "config.json: .* at most"),
        ("generation_config.json", b"nil", "generation_config.json: cannot be read as JSON"),
    ],
)
def test_bad_configs(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    folder = folder_of(tmp_path / "a", {"x": torch.ones(1)})
    assert Checkpoint(folder).generation_config == {}
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(folder)
