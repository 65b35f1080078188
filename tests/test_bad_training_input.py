"""What a user may get wrong, through the command line: an error that names it, or a decision that is counted and said.

Nothing half-written stays: no checkpoint but whole ones, no hidden rest.
"""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import folder_fixtures
import pytest
import torch
from folder_fixtures import chats

from gemwright.checkpoint import Checkpoint, write
from gemwright.cli import main
from gemwright.train.progress import LOG, records
from gemwright.train.state import STATE

QUESTION = '{"messages": [{"role": "user", "content": "Hi"}]}'


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad") / "base"
    folder_fixtures.gemma2(folder)
    return folder


def run(base: Path, data: Path, out: Path, *flags: str) -> int:
    line = ["--model_name", str(base), "--dataset_name", str(data), "--output_dir", str(out), "--max_steps", "2"]
    return main(["sft", *line, "--report_to", "none", "--device", "cpu", "--dtype", "float32", *flags])


def left(out: Path) -> list[str]:
    """What a run has left: no folder of a checkpoint or a cache that is not whole."""
    names = sorted(path.name for path in out.iterdir()) if out.exists() else []
    assert not [name for name in names if name.startswith(".")], names
    for checkpoint in out.glob("checkpoint-*"):
        assert json.loads((checkpoint / STATE).read_text())["step"] == int(checkpoint.name[11:])
    assert not [*out.glob("tokens/.*")]
    return names


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", r"rows.jsonl: there are no rows"),
        ("\n\n", r"rows.jsonl: there are no rows"),
        (f"\n{QUESTION}", r"rows.jsonl:2: messages has roles user; at least one turn must be assistant"),
        ('{"text": "a"}\n{"prompt": "a", "completion": "b"}', "rows.jsonl:2: the kind is prompt_completion, where the"),
        ('{"text": "a"}\n{"text": "b"', "rows.jsonl:2: not JSON"),
    ],
)
def test_rows(text: str, said: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text(text)
    assert run(base, data, tmp_path / "out") == 2
    assert said in capsys.readouterr().err
    assert left(tmp_path / "out") in ([], ["tokens"])
    assert not [*(tmp_path / "out").glob("tokens/*")]


def test_over_long_rows_are_counted(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Cut by default, left out on request; where nothing is left to learn from, that is an error."""
    data = chats(tmp_path / "rows.jsonl")
    assert run(base, data, tmp_path / "cut", "--max_seq_length", "16") == 0
    said = capsys.readouterr().err
    assert "12 documents, 10 longer than 17 tokens truncated (" in said
    assert "5 without loss after that left out" in said
    assert run(base, data, tmp_path / "dropped", "--max_seq_length", "30", "--overlong", "drop") == 0
    assert "longer than 31 tokens dropped (" in capsys.readouterr().err
    assert run(base, data, tmp_path / "none", "--max_seq_length", "4", "--overlong", "drop") == 2
    assert "no document to train on; 12 documents, 12 longer than 5 tokens dropped" in capsys.readouterr().err
    assert left(tmp_path / "none") == ["tokens"]


def test_other_settings_are_named_one_by_one(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = chats(tmp_path / "rows.jsonl"), tmp_path / "out"
    assert run(base, data, out) == 0
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert run(base, data, out) == 2
    assert "has checkpoints (the last of step 2); --resume goes on from it" in capsys.readouterr().err
    assert run(base, data, out, "--resume", "--learning_rate", "0.5", "--max_seq_length", "99") == 2
    said = capsys.readouterr().err
    assert "learning_rate: was 2e-05, is 0.5; max_seq_length: was 1024, is 99. They must be the same" in said
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """No file of this process can grow past `size`: what a full disk does, without one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("size", "flags"),
    [(20_000, ()), (200_000, ()), (600_000, ()), (20_000, ("--use_peft",)), (50_000, ("--use_peft",))],
    ids=["tokenizer", "weights", "moments", "picture or adapter", "adapter's moments"],
)
def test_a_full_disk(
    size: int, flags: tuple[str, ...], base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever file of a checkpoint does not fit; with room again the run begins or goes on."""
    data, out = chats(tmp_path / "rows.jsonl"), tmp_path / "out"
    with files_of_at_most(size):
        assert run(base, data, out, *flags) == 2
    said = capsys.readouterr().err
    assert f"output_dir: {out}: File too large; no checkpoint was made yet" in said
    assert "Traceback" not in said
    assert not [name for name in left(out) if name.startswith(("checkpoint", "config", "model", "adapter"))]
    assert run(base, data, out, "--resume", *flags) == 0


def test_a_disk_that_fills_later(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The checkpoint before is whole, the message names it, and the run goes on from it."""
    data, out = chats(tmp_path / "rows.jsonl"), tmp_path / "out"
    assert run(base, data, out, "--max_steps", "4", "--lr_scheduler_type", "constant", "--save_steps", "2") == 0
    shutil.rmtree(out / "checkpoint-4")
    flags = ("--max_steps", "4", "--lr_scheduler_type", "constant", "--save_steps", "2", "--resume")
    with files_of_at_most(200_000):
        assert run(base, data, out, *flags) == 2
    said = capsys.readouterr().err
    assert f"File too large; {out / 'checkpoint-2'} is whole, and --resume goes on from it" in said
    assert run(base, data, out, *flags) == 0
    assert "checkpoint-4" in left(out)


def test_numbers_that_are_not_finite(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A base whose weights overflow: every update is refused and reported, and the run ends without a checkpoint."""
    source, broken = Checkpoint(base), tmp_path / "broken"
    tensors = ((n, source.tensor(n) * (torch.nan if n.endswith("0.mlp.up_proj.weight") else 1)) for n in source.names())
    write(broken, tensors, config=source.config, generation_config=source.generation_config, copy_from=base)
    out = tmp_path / "out"
    data = chats(tmp_path / "rows.jsonl")
    assert run(broken, data, out, "--max_steps", "9", "--max_refused", "3") == 1
    said = capsys.readouterr().err
    assert "step 3: 3 updates in a row were refused (max_refused is 3), the last for loss nan" in said
    assert [line["step"] for line in records(out / LOG) if "refused" in line] == [1, 2, 3]
    assert not [name for name in left(out) if "checkpoint" in name]
