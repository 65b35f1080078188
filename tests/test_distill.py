"""Distillation from the command line: its numbers against a dense loop over transformers, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import distill_fixtures as fixtures
import pytest
import torch
from distill_fixtures import cache, dense, distill, folders, on_a_rank, rows, theirs
from test_trainer import losses, same_bits, weights
from torch.nn import functional as F
from train_fixtures import together

from gemwright.cli import main
from gemwright.data.batch import Batch
from gemwright.data.loader import Batching, Loader
from gemwright.data.prepare import tokenize
from gemwright.data.rows import Format
from gemwright.data.sources import open_source
from gemwright.lora import load_adapter
from gemwright.tokenizer import Tokenizer
from gemwright.train.progress import LOG, records


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return folders(tmp_path)


def batches(student: Path, data: Path, here: Path, *, rows: int = 2, shuffle: bool = True) -> Loader:
    """The batches of a run with SHORT's options, one document a row."""
    documents = tokenize(open_source(str(data)), Tokenizer.load(student), Format(), cache=here / "own-tokens")
    batching = Batching(length=40, rows=rows, seed=3, packing=False, shuffle=shuffle)
    return Loader(documents, batching, epochs=None if shuffle else 1)


def plain_loss(
    student: Any, teacher: Any, batch: Batch, *, kind: str, beta: float, temperature: float, ce_weight: float
) -> torch.Tensor:
    """Sum over targets from whole logits; padding stands at the end, and is seen by nobody before it."""
    learned = batch.weights_BT > 0
    with torch.no_grad():
        p_XV = fixtures.logits(teacher, batch.tokens_BT)[learned]
    q_XV = fixtures.logits(student, batch.tokens_BT)[learned]
    divergence = dense(kind, p_XV / temperature, q_XV / temperature, beta).sum()
    cross = F.cross_entropy(q_XV, batch.targets_BT[learned], reduction="sum")
    return (1 - ce_weight) * divergence + ce_weight * cross


LOSSES = {
    "forward": dict(kind="forward_kl", beta=0.5, temperature=1.0, ce_weight=0.0),
    "reverse, warm": dict(kind="reverse_kl", beta=0.5, temperature=2.0, ce_weight=0.0),
    "jsd and cross-entropy": dict(kind="jsd", beta=0.3, temperature=1.5, ce_weight=0.4),
    "soft": dict(kind="soft_cross_entropy", beta=0.5, temperature=1.0, ce_weight=0.25),
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_curve_is_that_of_a_dense_loop(tmp_path: Path, pair: tuple[Path, Path], name: str) -> None:
    """Both models by transformers, eager, fp32; whole logits; torch's AdamW by hand."""
    student, teacher = pair
    data = rows(tmp_path / "rows.jsonl")
    options: Any = LOSSES[name]
    flags = " ".join(f"--{'divergence' if key == 'kind' else key} {value}" for key, value in options.items())
    flags += f" --model_name {student} --teacher {teacher} --eval_dataset_name {data}"
    assert distill(data, tmp_path / "out", flags) == 0
    ours, other = theirs(student).train(), theirs(teacher)
    optimizer = torch.optim.AdamW(ours.parameters(), lr=3e-3, eps=1e-4, weight_decay=0)
    expected = []
    loader = batches(student, data, tmp_path)
    for _ in range(6):
        batch = next(loader)
        loss = plain_loss(ours, other, batch, **options) / batch.count
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(ours.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(float(loss.detach()))
    torch.testing.assert_close(losses(tmp_path / "out"), expected, rtol=0, atol=1e-4)
    held_out = list(batches(student, data, tmp_path, shuffle=False))
    count = sum(batch.count for batch in held_out)
    asked = {"eval_loss": options}
    asked["eval_kl"] = LOSSES["forward"]
    asked["eval_cross_entropy"] = {**options, "ce_weight": 1.0}
    record = next(line for line in records(tmp_path / "out" / LOG) if "eval_loss" in line)
    for key, what in asked.items():
        with torch.no_grad():
            mean = sum(float(plain_loss(ours, other, batch, **what)) for batch in held_out) / count
        assert record[key] == pytest.approx(mean, abs=2e-4), key


def test_a_cached_run_is_the_run_beside_the_teacher(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """Packed and shuffled as it is, with and without the teacher's folder; and with other divergences."""
    student, teacher = pair
    data = rows(tmp_path / "rows.jsonl")
    assert cache(teacher, data, tmp_path / "cache", f"--eval_dataset_name {data} --batch_size 3") == 0
    for name, flags in {"a": "--packing", "b": "--divergence jsd --temperature 2 --ce_weight 0.2"}.items():
        flags += f" --model_name {student} --eval_dataset_name {data}"
        distill(data, tmp_path / f"local-{name}", f"{flags} --teacher {teacher}")
        distill(data, tmp_path / f"cached-{name}", f"{flags} --teacher_cache {tmp_path / 'cache'}")
        both = f"{flags} --teacher_cache {tmp_path / 'cache'} --teacher {teacher}"
        distill(data, tmp_path / f"both-{name}", both)
        for other in (f"cached-{name}", f"both-{name}"):
            torch.testing.assert_close(
                losses(tmp_path / other), losses(tmp_path / f"local-{name}"), rtol=1e-6, atol=1e-6
            )
            for key, tensor in weights(tmp_path / f"local-{name}").items():
                torch.testing.assert_close(weights(tmp_path / other)[key], tensor, rtol=0, atol=2e-5)
            evaluated = [
                [{k: v for k, v in line.items() if k.startswith("eval")} for line in records(tmp_path / run / LOG)][-1]
                for run in (other, f"local-{name}")
            ]
            assert evaluated[0] == pytest.approx(evaluated[1], rel=1e-5) and "eval_kl" in evaluated[0]
    first = losses(tmp_path / "local-a")
    assert len(set(first)) == 6 and losses(tmp_path / "local-b") != first


@pytest.mark.parametrize("flags", ["", "--use_peft --lora_r 4 --learning_rate 1e-2", "--teacher_cache"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, pair: tuple[Path, Path], flags: str) -> None:
    student, teacher = pair
    data = rows(tmp_path / "rows.jsonl")
    where = f"--teacher {teacher}"
    if flags == "--teacher_cache":
        cache(teacher, data, tmp_path / "cache")
        where, flags = f"--teacher_cache {tmp_path / 'cache'}", "--packing"
    line = f"--model_name {student} {where} --save_steps 3 {flags}"
    distill(data, tmp_path / "whole", line)
    distill(data, tmp_path / "parts", line)
    shutil.rmtree(tmp_path / "parts" / "checkpoint-6")
    torch.manual_seed(99)
    assert distill(data, tmp_path / "parts", line + " --resume") == 0
    same_bits(tmp_path / "parts" / "checkpoint-6", tmp_path / "whole" / "checkpoint-6")
    if "peft" in flags:
        assert any(b.abs().max() > 0 for _, b in load_adapter(tmp_path / "whole").factors.values())
    other = fixtures.changed(teacher, tmp_path / "other", "model.norm.weight", 0.1)
    shutil.rmtree(tmp_path / "parts" / "checkpoint-6")
    with pytest.raises(ValueError, match=r"taught: was .*, is "):  # another teacher is another run
        distill(data, tmp_path / "parts", line.replace(where, f"--teacher {other}") + " --resume")


def test_two_ranks_are_one(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """FSDP2 over the student; the teacher on every rank, or its cache. fp32, within rounding."""
    student, teacher = pair
    data = rows(tmp_path / "rows.jsonl")
    cache(teacher, data, tmp_path / "cache")
    jobs = {
        "full": f"--teacher {teacher} --packing",
        "lora": f"--teacher_cache {tmp_path / 'cache'} --use_peft --lora_r 4 --lora_dropout 0 --learning_rate 1e-2",
    }
    for name, flags in jobs.items():
        distill(data, tmp_path / f"one-{name}", f"--model_name {student} {flags} --per_device_train_batch_size 4")
    for name, flags in jobs.items():
        together(on_a_rank, str(data), str(tmp_path / f"two-{name}"), f"--model_name {student} {flags}")
        torch.testing.assert_close(
            losses(tmp_path / f"two-{name}"), losses(tmp_path / f"one-{name}"), rtol=1e-5, atol=1e-5
        )


def test_a_fresh_student_learns_from_a_cache_alone(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """A shape in a file, the teacher's tokenizer; the model that is delivered has it, and its loss fell."""
    student, teacher = pair
    data = rows(tmp_path / "rows.jsonl", 4)
    shape = tmp_path / "shape.json"
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape.write_text(json.dumps({**small, "num_key_value_heads": 1, "head_dim": 16, "dtype": "float32"}))
    cache(teacher, data, tmp_path / "cache")
    line = f"--model_name {shape} --teacher_cache {tmp_path / 'cache'} --max_steps 60 --learning_rate 2e-2 --packing"
    with pytest.raises(ValueError, match="tokenizer: not given; a fresh student"):
        distill(data, tmp_path / "out", line)
    assert distill(data, tmp_path / "out", f"{line} --tokenizer {teacher}") == 0
    curve = losses(tmp_path / "out")
    assert curve[-1] < 0.6 * curve[0], curve
    assert Tokenizer.load(tmp_path / "out").encode("Paris") == Tokenizer.load(teacher).encode("Paris")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Distillation (forward_kl) from the cache" in card and "fresh weights" in card
    with pytest.raises(ValueError, match="use_peft: given for a student of fresh weights"):
        distill(data, tmp_path / "other", f"{line} --tokenizer {teacher} --use_peft")


def test_options_that_contradict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags, message in {
        "": "teacher: not given",
        "--teacher_cache c --lmbda 0.5": "teacher: not given",
        "--teacher t --beta 2": "beta: got 2.0, allowed are 0.0 to 1.0",
        "--teacher t --ce_weight -0.1": "ce_weight: got -0.1",
        "--teacher t --temperature 0": "temperature: got 0.0, allowed is more than 0",
        "--teacher t --max_new_tokens 0": "max_new_tokens: got 0",
        "--teacher t --max_seq_length 0": "max_seq_length: got 0",
    }.items():
        with pytest.raises(SystemExit):
            distill(tmp_path, tmp_path, f"--model_name s {flags}")
        assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_bad_input_ends_in_one_line(
    tmp_path: Path, pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole command line: exit code 2, the fault by its name, no traceback, and no model in the folder."""
    student, teacher = pair
    data, other = rows(tmp_path / "rows.jsonl"), rows(tmp_path / "other.jsonl", 9)
    assert cache(teacher, data, tmp_path / "cache") == 0
    shutil.copytree(tmp_path / "cache", tmp_path / "bent")
    shard = tmp_path / "bent" / "train" / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-2] + b"\x01\x02")
    shutil.copytree(teacher, tmp_path / "capped")
    config = json.loads((teacher / "config.json").read_text())
    (tmp_path / "capped" / "config.json").write_text(json.dumps({**config, "final_logit_softcapping": 30.0}))
    shutil.copytree(teacher, tmp_path / "renamed")
    file = tmp_path / "renamed" / "tokenizer.json"
    file.write_text(file.read_text().replace("<start_of_turn>", "<|im_start|>"))
    for flags, rest, message in (
        (f"--teacher {tmp_path / 'renamed'}", data, "'<start_of_turn>' has id 106 for the student and None"),
        (f"--teacher_cache {tmp_path / 'cache'}", other, "was made from something else: data was"),
        (f"--teacher {tmp_path / 'capped'} --teacher_cache {tmp_path / 'cache'}", data, "softcap was 5.0, is 30.0"),
        (f"--teacher_cache {tmp_path / 'bent'}", data, f"{shard} is damaged"),
        (f"--teacher_cache {tmp_path / 'none'}", data, "has no key.json; `gemwright cache-teacher` makes a cache"),
        (f"--teacher {tmp_path / 'none'}", data, str(tmp_path / "none")),
    ):
        line = f"distill --model_name {student} --dataset_name {rest} --output_dir {tmp_path / 'out'} {fixtures.SHORT}"
        capsys.readouterr()
        assert main([*line.split(), *flags.split(), "--overwrite_output_dir"]) == 2
        said = capsys.readouterr().err
        assert message in said and "Traceback" not in said
        assert not (tmp_path / "out" / "model.safetensors").exists()
    # the damaged shard is made again by the same command, and the run goes through
    assert cache(teacher, data, tmp_path / "bent") == 0
    assert distill(data, tmp_path / "out", f"--model_name {student} --teacher_cache {tmp_path / 'bent'}") == 0
