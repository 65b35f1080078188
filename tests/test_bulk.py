"""Bulk generation: the file's answers are the LM's own, bad lines harm no other, a killed run goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from folder_fixtures import gemma2

import gemwright
from gemwright.bulk import bulk
from gemwright.lm import LM

ROWS: list[dict[str, Any]] = [
    {"id": "a", "prompt": "The capital of France"},
    {"messages": [{"role": "user", "content": "Hello there"}]},
    {"messages": [{"role": "model", "content": "out of order"}]},
    {"prompt": "Hello", "sampling": {"max_new_tokens": 3, "temperature": 1.0, "seed": 4, "n": 2}},
    {"prompt": "Hello", "sampling": {"temperature": -1}},
    {"prompt": "x" * 2000},
    {"prompt": 5},
]


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> LM:
    folder = tmp_path_factory.mktemp("bulk") / "model"
    gemma2(folder)
    return gemwright.load(folder, device="cpu")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n")
    return path


def test_answers_stand_beside_their_lines(lm: LM, tmp_path: Path) -> None:
    source, target = write(tmp_path / "in.jsonl", ROWS), tmp_path / "out.jsonl"
    sampling: dict[str, Any] = {"max_new_tokens": 9, "temperature": 0}
    done = bulk(lm, source, target, sampling=sampling, progress=False)
    rows = lines(target)
    assert [{key: row[key] for key in given} for given, row in zip(ROWS, rows, strict=True)] == ROWS
    for row, prompt in zip(rows, (ROWS[0]["prompt"], ROWS[1]["messages"]), strict=False):
        wanted = lm.generate(prompt, **sampling)
        assert (row["answer"], row["finish_reason"]) == (wanted.text, wanted.finish_reason)
        assert (row["prompt_tokens"], row["new_tokens"]) == (wanted.prompt_tokens, len(wanted.tokens))
    assert rows[3]["answers"] == [
        c.text for c in lm.generate(["Hello"], max_new_tokens=3, temperature=1.0, seed=4, n=2)
    ]
    for row, message in zip(
        [rows[2], *rows[4:]], ("role is 'model'", "temperature", "the context holds", "prompt"), strict=True
    ):
        assert message in row["error"], row
    assert (done.answered, done.failed, done.found) == (3, 4, 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_a_run_goes_on_where_it_was(lm: LM, tmp_path: Path) -> None:
    """What an earlier run had answered is taken as it is; a torn last line is made again."""
    source, target = write(tmp_path / "in.jsonl", ROWS[:2]), tmp_path / "out.jsonl"
    bulk(lm, source, target, sampling={"max_new_tokens": 4, "temperature": 0}, progress=False)
    whole = lines(target)
    target.rename(tmp_path / "earlier")
    from gemwright.bulk import _digest

    part = tmp_path / "out.jsonl.part"
    part.write_text(json.dumps([0, _digest(ROWS[0]), {**ROWS[0], "answer": "kept"}]) + "\n" + '[1, "torn')
    done = bulk(lm, source, target, sampling={"max_new_tokens": 4, "temperature": 0}, progress=False)
    assert (done.found, done.answered) == (1, 1)
    assert [row["answer"] for row in lines(target)] == ["kept", whole[1]["answer"]]
    target.unlink()
    part.write_text(json.dumps([0, "0" * 16, {}]) + "\n")
    with pytest.raises(ValueError, match=r"made from another input \(line 1 differs\)"):
        bulk(lm, source, target, progress=False)


def test_a_killed_process_loses_nothing(lm: LM, tmp_path: Path) -> None:
    """SIGKILL while answers are being written, then the same command again: every line once, as in one run."""
    source = write(tmp_path / "in.jsonl", [{"prompt": f"Hello {i}"} for i in range(16)])
    command = [
        sys.executable, "-m", "gemwright", "generate", str(lm.folder), "--input", str(source), "--output",
        str(tmp_path / "out.jsonl"), "--rows", "2", "--max-new-tokens", "12", "--temperature", "0", "--device", "cpu",
    ]  # fmt: skip
    part = tmp_path / "out.jsonl.part"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and (not part.exists() or part.read_text().count("\n") < 3):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    found = part.read_text().count("\n")
    assert 3 <= found < 16
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert f"{found} found from an earlier run" in again.stdout
    prompts = [f"Hello {i}" for i in range(16)]
    wanted = [one.text for one in lm.generate(prompts, max_new_tokens=12, temperature=0)]
    assert [row["answer"] for row in lines(tmp_path / "out.jsonl")] == wanted


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no prompts in it"),
        ('{"prompt": "a"}\n[1]\n', r'in.jsonl:2: allowed is an object with either "prompt" or "messages"'),
        ('{"prompt": "a", "messages": []}\n', r"in.jsonl:1: allowed"),
        ("{nonsense\n", r"in.jsonl:1: not JSON"),
    ],
)
def test_a_bad_file_is_refused_before_anything_runs(lm: LM, tmp_path: Path, text: str, message: str) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(text)
    with pytest.raises(ValueError, match=message):
        bulk(lm, source, tmp_path / "out.jsonl", progress=False)
    (tmp_path / "taken").touch()
    with pytest.raises(ValueError, match="taken exists"):
        bulk(lm, write(source, ROWS), tmp_path / "taken", progress=False)
