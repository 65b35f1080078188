"""Checkpoints: reads what transformers writes, writes the same bytes, refuses folders that contradict themselves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM, GenerationConfig

from gemwright import checkpoint
from gemwright.checkpoint import EMBEDDING, HEAD, INDEX, WEIGHTS, Checkpoint, CheckpointError, write

ROWS, HIDDEN = 48, 16
SHARD = 2400  # bytes: several shards, and in fp32 tensors above the limit, which get one of their own


def hf_model(dtype: torch.dtype) -> Any:
    config = Gemma2Config(
        vocab_size=ROWS,
        hidden_size=HIDDEN,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        query_pre_attn_scalar=5,
        sliding_window=4,
    )
    torch.manual_seed(0)
    model: Any = Gemma2ForCausalLM(config)  # its types are too loose to check against
    for parameter in model.parameters():  # norms too: zeros would hide a swap
        torch.nn.init.normal_(parameter)
    model.generation_config = GenerationConfig.from_dict({"bos_token_id": 2, "eos_token_id": [1, 7]})
    return model.to(dtype).eval()


def weights_of(model: Any) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if name != HEAD}


def shapes_of(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def same_bytes(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def folder_of(path: Path, tensors: dict[str, Tensor]) -> Path:
    path.mkdir()
    (path / "config.json").write_text("{}")
    save_file(tensors, path / WEIGHTS, {"format": "pt"})
    return path


@pytest.mark.parametrize("shard", [10**9, SHARD], ids=["single", "sharded"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_reads_what_transformers_writes(tmp_path: Path, dtype: torch.dtype, shard: int) -> None:
    model = hf_model(dtype)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / INDEX).exists() == (shard == SHARD)
    found, truth = Checkpoint(tmp_path), weights_of(model)
    found.check(shapes_of(truth))
    assert sorted(found.names()) == sorted(truth)
    for name, tensor in truth.items():
        assert same_bytes(found.tensor(name), tensor)
        assert same_bytes(found.tensor(name, slice(1, 5)), tensor[1:5])
        assert (found.shape(name), found.dtype(name)) == (tuple(tensor.shape), dtype)
    assert found.config == json.loads((tmp_path / "config.json").read_text())
    assert found.generation_config["eos_token_id"] == [1, 7]


@pytest.mark.parametrize("shard", [10**9, SHARD], ids=["single", "sharded"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_writes_what_transformers_writes_and_loads(tmp_path: Path, dtype: torch.dtype, shard: int) -> None:
    model = hf_model(dtype)
    model.save_pretrained(tmp_path / "theirs", max_shard_size=shard)
    source = Checkpoint(tmp_path / "theirs")
    ours = write(
        tmp_path / "ours",
        weights_of(model).items(),
        config=source.config,
        generation_config=source.generation_config,
        max_shard_bytes=shard,
    )
    assert sorted(os.listdir(ours)) == sorted(os.listdir(source.folder))
    for path in source.folder.iterdir():
        assert (ours / path.name).read_bytes() == path.read_bytes(), path.name
        assert (ours / path.name).stat().st_mode == path.stat().st_mode, path.name
    reader: Any = Gemma2ForCausalLM
    loaded, info = reader.from_pretrained(ours, output_loading_info=True)
    assert not any(info.values()), info
    assert loaded.config.to_diff_dict() == model.config.to_diff_dict()
    assert loaded.generation_config.eos_token_id == [1, 7]
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    for name, tensor in model.state_dict().items():
        assert same_bytes(loaded.state_dict()[name], tensor), name


def test_mixed_dtypes_scalars_strides_and_metadata_round_trip(tmp_path: Path) -> None:
    tensors = {
        "half": torch.randn(3, dtype=torch.float16),
        "brain": torch.randn(5, 3).bfloat16().T,
        "single": torch.randn(2, 2, requires_grad=True),
        "scalar": torch.tensor(-0.0),
        "nan": torch.tensor([float("nan"), float("inf")]),
    }
    found = Checkpoint(write(tmp_path / "out", tensors.items(), config={"a": 1}, metadata={"made_by": "test"}))
    for name, tensor in tensors.items():
        got = found.tensor(name)
        assert got.dtype == tensor.dtype
        assert torch.equal(torch.signbit(got), torch.signbit(tensor))
        torch.testing.assert_close(got, tensor.detach(), rtol=0, atol=0, equal_nan=True)
    length = int.from_bytes((found.folder / WEIGHTS).read_bytes()[:8], "little")
    header = json.loads((found.folder / WEIGHTS).read_bytes()[8 : 8 + length])
    assert header["__metadata__"] == {"format": "pt", "made_by": "test"}


def test_check_names_all_faults_in_one_error(tmp_path: Path) -> None:
    found = Checkpoint(
        folder_of(tmp_path / "a", {"x": torch.ones(2, 3), "extra": torch.ones(1), "fine": torch.ones(2)})
    )
    with pytest.raises(CheckpointError) as caught:
        found.check({"x": (3, 2), "lost": (1,), "gone": (2,), "fine": (2,)})
    for part in ("missing lost", "missing gone", "surplus extra", "misshapen x (2, 3), due (3, 2)", str(found.folder)):
        assert part in str(caught.value)
    assert "fine" not in str(caught.value)


PADDED = torch.randn(ROWS + 128, HIDDEN).bfloat16()


@pytest.mark.parametrize(
    ("head", "fault"),
    [
        (PADDED[:ROWS].clone(), None),
        (PADDED.clone(), None),
        (PADDED[:ROWS] + 1, "differs"),
        (PADDED[:ROWS].float(), "differs"),
        (PADDED[: ROWS - 1].clone(), "misshapen lm_head.weight"),
    ],
    ids=["cropped", "padded", "other", "fp32", "short"],
)
def test_head_must_repeat_the_embedding(
    tmp_path: Path, head: Tensor, fault: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "_COMPARED_ROWS", 7)
    found = Checkpoint(folder_of(tmp_path / "a", {EMBEDDING: PADDED, HEAD: head}))
    if fault is None:
        found.check({EMBEDDING: (ROWS, HIDDEN)})
    else:
        with pytest.raises(CheckpointError, match=fault):
            found.check({EMBEDDING: (ROWS, HIDDEN)})
    assert same_bytes(found.tensor(EMBEDDING, slice(0, ROWS)), PADDED[:ROWS])


def test_last_row_of_the_head_and_sign_of_zero_count(tmp_path: Path) -> None:
    head = torch.zeros(ROWS, HIDDEN)
    head[-1, -1] = -0.0
    found = Checkpoint(folder_of(tmp_path / "a", {EMBEDDING: torch.zeros(ROWS, HIDDEN), HEAD: head}))
    with pytest.raises(CheckpointError, match="differs"):
        found.check({EMBEDDING: (ROWS, HIDDEN)})


def test_head_without_embedding_and_rows_too_few_are_faults(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"missing {EMBEDDING}; surplus {HEAD}"):
        Checkpoint(folder_of(tmp_path / "a", {HEAD: PADDED})).check({EMBEDDING: (ROWS, HIDDEN)})
    with pytest.raises(CheckpointError, match="misshapen"):
        Checkpoint(folder_of(tmp_path / "b", {EMBEDDING: PADDED})).check({EMBEDDING: (ROWS + 129, HIDDEN)})
    with pytest.raises(CheckpointError, match=r"misshapen model.norm.weight \(9,\)"):
        Checkpoint(folder_of(tmp_path / "c", {"model.norm.weight": torch.ones(9)})).check({"model.norm.weight": (8,)})


@pytest.mark.parametrize("rows", [slice(0, 4), slice(2, 2), slice(-1, 2), slice(1, None), slice(0, 3, 2)], ids=str)
def test_rows_out_of_range_are_refused(tmp_path: Path, rows: slice) -> None:
    found = Checkpoint(folder_of(tmp_path / "a", {"x": torch.ones(3, 2), "scalar": torch.tensor(1.0)}))
    with pytest.raises(ValueError, match="rows of x"):
        found.tensor("x", rows)
    with pytest.raises(ValueError, match="rows of scalar"):
        found.tensor("scalar", slice(0, 1))
    with pytest.raises(CheckpointError, match="no tensor 'y'"):
        found.tensor("y")


def sharded_folder(path: Path, weight_map: Any) -> Path:
    path.mkdir()
    (path / "config.json").write_text("{}")
    for number, name in enumerate("xy", 1):
        save_file({name: torch.full((2,), float(number))}, path / f"model-0000{number}-of-00002.safetensors")
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"x": ONE, "y": "model-00003.safetensors"}, "model-00003.safetensors: missing; .* tensor 'y'"),
        ({"x": "../" + ONE, "y": TWO}, "tensor 'x' in '../"),
        ({"x": "/etc/passwd", "y": TWO}, "tensor 'x' in '/etc/passwd'"),
        ({"x": "..\\" + ONE, "y": TWO}, "tensor 'x' in"),
        ({"x": ONE, "y": "pytorch_model.bin"}, "tensor 'y' in 'pytorch_model.bin'"),
        ({"x": ONE, "y": 2}, "tensor 'y' in 2"),
        ({"x": ONE, "y": TWO, "z": TWO}, f"{TWO}: lacks tensor 'z'"),
        ({"x": ONE, "z": TWO}, f"{TWO}: holds tensor 'y', which .* puts in no shard"),
        ({"x": TWO, "y": TWO}, f"{TWO}: lacks tensor 'x'"),
        ({"x": TWO, "y": ONE}, f"{ONE}: holds tensor 'x', which .* puts in {TWO}"),
        ([ONE, TWO], "weight_map must be an object"),
        (None, "weight_map must be an object"),
    ],
)
def test_index_and_shards_disagree(tmp_path: Path, weight_map: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(sharded_folder(tmp_path / "a", weight_map))


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    folder = sharded_folder(tmp_path / "a", {"x": ONE, "y": TWO})
    assert Checkpoint(folder).tensor("y").tolist() == [2, 2]
    save_file({"x": torch.zeros(2), "y": torch.ones(2)}, folder / TWO)
    with pytest.raises(CheckpointError, match=f"{TWO}: holds tensor 'x', which .* puts in {ONE}"):
        Checkpoint(folder)


def test_links_to_files_are_followed_and_nothing_else(tmp_path: Path) -> None:
    folder = sharded_folder(tmp_path / "a", {"x": ONE, "y": TWO})
    shard = folder / TWO
    shard.rename(tmp_path / "blob")
    shard.symlink_to("../blob")
    assert Checkpoint(folder).tensor("y").tolist() == [2, 2]
    games: list[tuple[Callable[[], None], str]] = [
        (lambda: shard.symlink_to(shard), "missing; .* tensor 'y'"),
        (lambda: shard.symlink_to(tmp_path), "not a regular file"),
        (lambda: shard.symlink_to("/dev/zero"), "not a regular file"),
        (lambda: os.mkfifo(shard), "not a regular file"),
    ]
    for make, message in games:
        shard.unlink()
        make()
        with pytest.raises(CheckpointError, match=f"{TWO}: {message}"):
            Checkpoint(folder)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("pytorch_model.bin", r"only pickle weights \(pytorch_model.bin\)"),
        ("consolidated.pt", "only pickle weights"),
        (ONE, f"no {INDEX} for {ONE}"),
        ("notes.txt", "no weights"),
    ],
)
def test_folders_without_usable_weights(tmp_path: Path, file: str, message: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / file).write_bytes(b"\x80\x02.")
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        Checkpoint(tmp_path / "absent")


# Writing.


def one(value: float) -> list[tuple[str, Tensor]]:
    return [("x", torch.full((4,), float(value)))]


def value_in(folder: Path) -> float:
    return float(Checkpoint(folder).tensor("x")[0])


def broken_stream() -> Iterator[tuple[str, Tensor]]:
    yield from one(2)
    yield "y", torch.ones(4)
    raise RuntimeError("source failed")


def test_nothing_is_visible_before_the_end_and_nothing_is_left_over(tmp_path: Path) -> None:
    seen = []

    def stream() -> Iterator[tuple[str, Tensor]]:
        yield from one(1)
        seen.append((tmp_path / "out").exists())

    out = write(tmp_path / "deep" / ".." / "out", stream(), config={})
    assert seen == [False]
    assert out == tmp_path / "out"
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert set(os.listdir(out)) == {"config.json", WEIGHTS}


@pytest.mark.parametrize("existing", [False, True])
def test_a_failing_source_leaves_what_was_there(tmp_path: Path, existing: bool) -> None:
    if existing:
        write(tmp_path / "out", one(1), config={})
    with pytest.raises(RuntimeError, match="source failed"):
        write(tmp_path / "out", broken_stream(), config={}, max_shard_bytes=16, overwrite=True)
    assert os.listdir(tmp_path) == (["out"] if existing else [])
    assert not existing or value_in(tmp_path / "out") == 1


FILL = """
import resource, sys, torch
from gemwright.checkpoint import write
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    write(sys.argv[1], [("x", torch.ones(5000))], config={}, extra_files={"tokenizer.model": bytes(40000)})
except OSError as error:
    print("OSError", error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no resource limits")
@pytest.mark.parametrize("room", [10_000, 30_000], ids=["in the weights", "in another file"])
def test_a_full_disk_leaves_nothing(tmp_path: Path, room: int) -> None:
    command = [sys.executable, "-c", FILL, str(tmp_path / "out"), str(room)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("OSError")
    assert os.listdir(tmp_path) == []


def test_an_existing_folder_is_replaced_only_when_told(tmp_path: Path) -> None:
    out = write(tmp_path / "out", one(1), config={}, extra_files={"old.txt": b""})
    with pytest.raises(FileExistsError, match="overwrite=True"):
        write(out, one(2), config={})
    assert value_in(out) == 1
    write(out, one(2), config={}, overwrite=True)
    assert value_in(out) == 2
    assert not (out / "old.txt").exists()
    assert os.listdir(tmp_path) == ["out"]


def test_only_a_checkpoint_or_an_empty_folder_gives_way(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years")
    (tmp_path / "file").write_text("text")
    for name in ("home", "file"):
        with pytest.raises(FileExistsError, match="no checkpoint"):
            write(tmp_path / name, one(1), config={}, overwrite=True)
    (tmp_path / "empty").mkdir()
    assert value_in(write(tmp_path / "empty", one(3), config={})) == 3


def test_a_folder_may_be_written_from_itself(tmp_path: Path) -> None:
    out = write(tmp_path / "out", one(1), config={}, extra_files={"tokenizer.model": b"tok"})
    source = Checkpoint(out)
    doubled = ((name, source.tensor(name).mul_(2)) for name in source.names())
    write(out, doubled, config=source.config, copy_from=out, overwrite=True)
    assert value_in(out) == 2
    assert (out / "tokenizer.model").read_bytes() == b"tok"


def test_a_link_to_a_folder_is_kept(tmp_path: Path) -> None:
    write(tmp_path / "real", one(1), config={})
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link", one(2), config={}, overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert value_in(tmp_path / "real") == 2


def test_a_failing_swap_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = write(tmp_path / "out", one(1), config={})
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.suffix == ".partial":
            assert not out.exists()
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="no"):
        write(out, one(2), config={}, overwrite=True)
    assert value_in(out) == 1
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("at", ["first rename", "second rename"])
def test_a_crash_in_the_swap_leaves_both_whole(tmp_path: Path, at: str) -> None:
    """The process dies at a rename: no handler runs, and each checkpoint on the disk is complete."""
    out = write(tmp_path / "out", one(1), config={})
    script = f"""
import os, pathlib, torch
from gemwright.checkpoint import write
rename = pathlib.Path.rename
def dying(self, target):
    if self.suffix == {".partial" if at == "second rename" else ""!r} and self.name != "1":
        os._exit(9)
    return rename(self, target)
pathlib.Path.rename = dying
write({str(out)!r}, [("x", torch.full((4,), 2.0))], config={{}}, overwrite=True)
"""
    assert subprocess.run([sys.executable, "-c", script]).returncode == 9
    values = {path.suffix: value_in(path) for path in tmp_path.iterdir()}
    assert values == ({"": 1, ".partial": 2} if at == "first rename" else {".old": 1, ".partial": 2})


def test_every_file_is_flushed_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[tuple[str, str]] = []
    fsync, rename = os.fsync, Path.rename

    def recorded_fsync(descriptor: int) -> None:
        events.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    def recorded_rename(self: Path, target: Path) -> Path:
        events.append(("rename", Path(target).name))
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(Path, "rename", recorded_rename)
    tensors = [("x", torch.ones(4)), ("y", torch.ones(4))]
    write(tmp_path / "out", tensors, config={}, generation_config={}, extra_files={"t.txt": b""}, max_shard_bytes=16)
    published = events.index(("rename", "out"))
    before = {name for kind, name in events[:published] if kind == "sync"}
    assert {"1", "2", INDEX, "config.json", "generation_config.json", "t.txt"} <= before
    assert any(name.endswith(".partial") for name in before)
    assert events[published + 1 :] == [("sync", tmp_path.name)]


def test_at_most_one_shard_is_held(tmp_path: Path) -> None:
    alive, most = 0, 0

    def died() -> None:
        nonlocal alive
        alive -= 1

    def stream() -> Iterator[tuple[str, Tensor]]:
        nonlocal alive, most
        for number in range(20):
            array = np.full(4, number, dtype=np.float32)
            weakref.finalize(array, died)
            alive += 1
            most = max(most, alive)
            tensor = torch.from_numpy(array)
            del array
            yield str(number), tensor

    out = write(tmp_path / "out", stream(), config={}, max_shard_bytes=4 * 16)
    assert len(list(out.glob("model-*-of-00005.safetensors"))) == 5
    assert [int(Checkpoint(out).tensor(str(i))[0]) for i in range(20)] == list(range(20))
    assert most <= 4 + 2  # a shard, the tensor that the source made last, the one that did not fit


def test_tokenizer_files_are_copied_and_extras_win(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("tokenizer.json", "tokenizer.model", "chat_template.jinja", "notes.txt", WEIGHTS):
        (source / name).write_bytes(name.encode())
    out = write(
        tmp_path / "out",
        one(1),
        config={},
        copy_from=source,
        extra_files={"tokenizer.json": b"mine", "README.md": b"card"},
    )
    names = {"config.json", WEIGHTS, "tokenizer.json", "tokenizer.model", "chat_template.jinja", "README.md"}
    assert set(os.listdir(out)) == names
    assert (out / "tokenizer.json").read_bytes() == b"mine"
    assert (out / "tokenizer.model").read_bytes() == b"tokenizer.model"
    assert value_in(out) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda out: write(out, [], config={}), "tensors: got none"),
        (lambda out: write(out, one(1) + one(2), config={}), "'x' comes twice"),
        (lambda out: write(out, one(1) + one(2), config={}, max_shard_bytes=1), "'x' comes twice"),
        (lambda out: write(out, [("x", torch.ones(2).int())], config={}), "'x' is torch.int32, allowed"),
        (lambda out: write(out, [("x", torch.ones(0))], config={}), "'x' is empty"),
        (lambda out: write(out, one(1), config={"a": float("nan")}), "not JSON compliant"),
        (lambda out: write(out, one(1), config={}, max_shard_bytes=0), "max_shard_bytes"),
        (lambda out: write(out, one(1), config={}, extra_files={"../x": b""}), "extra_files: got '../x'"),
        (lambda out: write(out, one(1), config={}, extra_files={"..": b""}), "extra_files"),
        (lambda out: write(out, one(1), config={}, extra_files={"config.json": b""}), "extra_files"),
        (lambda out: write(out, one(1), config={}, extra_files={WEIGHTS: b""}), "extra_files"),
    ],
)
def test_wrong_arguments_leave_nothing(tmp_path: Path, call: Callable[[Path], Path], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(tmp_path / "out")
    assert os.listdir(tmp_path) == []
