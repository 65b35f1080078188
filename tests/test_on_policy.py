"""On-policy distillation: what is generated, counted and learned, and that a resumed run generates the same."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import distill_fixtures as fixtures
import folder_fixtures
import pytest
import torch
from distill_fixtures import dense, distill, folders, on_a_rank, rows, theirs
from test_trainer import losses, same_bits
from train_fixtures import together

from gemwright.cli import distill as distill_cli
from gemwright.data.batch import Batch
from gemwright.data.loader import Batching, Loader
from gemwright.data.prepare import tokenize
from gemwright.data.rows import Format
from gemwright.data.sources import open_source
from gemwright.engine.engine import Engine
from gemwright.loader import load_model
from gemwright.tokenizer import Tokenizer
from gemwright.train import room
from gemwright.train.distributed import World
from gemwright.train.lessons import Lessons
from gemwright.train.on_policy import OnPolicy, Speaker, prompts
from gemwright.train.progress import LOG, records
from gemwright.train.room import Memory, Room
from gemwright.train.trainer import Diverged

CPU = torch.device("cpu")
STOPS = frozenset({1, 107})


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return folders(tmp_path)


def generator(
    student: Path,
    data: Path,
    here: Path,
    flags: str = "",
    *,
    rank: int = 0,
    world: int = 1,
    device: torch.device = CPU,
) -> OnPolicy:
    """On-policy batches over a student's folder, as a run of SHORT makes them."""
    line = f"--model_name {student} --teacher t --dataset_name d --output_dir o {fixtures.SHORT} --lmbda 1 {flags}"
    config = distill_cli.parse(shlex.split(line))
    documents = tokenize(open_source(str(data)), Tokenizer.load(student), Format(), cache=here / "own-tokens")
    batching = Batching(
        length=config.max_seq_length, rows=config.per_device_train_batch_size, seed=config.seed,
        packing=config.packing, rank=rank, world=world,
    )  # fmt: skip
    alone = World(rank, world, device)
    speaker = Speaker(
        load_model(student, device=device, dtype=torch.float32, pack=False), alone, learns=True, dtype=torch.float32
    )
    lessons = Lessons(Loader(documents, batching, epochs=None), None)
    return OnPolicy(lessons, config, alone, student=speaker, teacher=None, stop_ids=STOPS)


def dense_kl(student: Any, teacher: Any, batch: Batch) -> float:
    """Sum of the forward KL over the targets, document by document, by transformers."""
    total = 0.0
    with torch.no_grad():
        for b in range(len(batch.tokens_BT)):
            for doc in batch.doc_BT[b].unique_consecutive():  # type: ignore[no-untyped-call]
                here = (batch.doc_BT[b] == doc) & (batch.pos_BT[b] >= 0)
                p, q = (fixtures.logits(model, batch.tokens_BT[b, here][None])[0] for model in (teacher, student))
                learned = batch.weights_BT[b, here] > 0
                total += float(dense("forward_kl", p[learned], q[learned]).sum())
    return total


@pytest.mark.parametrize("packing", [False, True], ids=["rows", "packed"])
def test_what_is_generated_is_learned_and_counted(tmp_path: Path, pair: tuple[Path, Path], packing: bool) -> None:
    """Prompts as they stand in the data, answers with the id that ended them, weight 1 on the answers alone; the loss
    that a run logs is the dense divergence of exactly these, over their number."""
    student, teacher = pair
    data = rows(tmp_path / "rows.jsonl")
    flags = "--max_new_tokens 9" + " --packing" * packing
    source = generator(student, data, tmp_path, flags)
    plain = Loader(source.lessons.loader.documents, source.lessons.loader.batching, epochs=None)
    expected = []
    for _ in range(3):
        asked = list(prompts(next(plain), 32))
        batch = next(source).batch
        documents = []
        for b in range(len(batch.tokens_BT)):
            for doc in batch.doc_BT[b, batch.pos_BT[b] >= 0].unique_consecutive():  # type: ignore[no-untyped-call]
                here = (batch.doc_BT[b] == doc) & (batch.pos_BT[b] >= 0)
                tokens, targets = batch.tokens_BT[b, here].tolist(), batch.targets_BT[b, here].tolist()
                answer = int(batch.weights_BT[b, here].sum())
                whole = [*tokens, targets[-1]]
                prompt = whole[: len(whole) - answer]
                assert prompt in asked and tokens[1:] == targets[:-1]
                assert batch.weights_BT[b, here].tolist() == [0] * (len(tokens) - answer) + [1] * answer
                new = whole[len(prompt) :]
                assert 1 <= answer <= 9 and all(token not in STOPS for token in new[:-1])
                assert answer == 9 or new[-1] in STOPS or len(whole) == 41
                documents.append(whole)
        assert len({tuple(d) for d in documents}) == len(documents)
        assert source.counts.tokens == batch.count
        expected.append(dense_kl(theirs(student), theirs(teacher), batch) / batch.count)
        source.notes()
    line = f"--model_name {student} --teacher {teacher} --lmbda 1 {flags} --learning_rate 0 --max_steps 3"
    assert distill(data, tmp_path / "out", line) == 0
    torch.testing.assert_close(losses(tmp_path / "out"), expected, rtol=1e-4, atol=0)
    notes = [line for line in records(tmp_path / "out" / LOG) if "answers" in line]
    assert all(0 < line["generating_share"] < 1 and line["generated_tokens_per_second"] > 0 for line in notes)
    assert not packing or any(line["answers"] > 2 for line in notes)


def test_the_kl_to_the_teacher_falls_on_policy(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """Nothing but the student's own answers to learn from; the KL on held-out data falls, too."""
    student, teacher = pair
    data = rows(tmp_path / "rows.jsonl")
    held_out = rows(tmp_path / "held-out.jsonl", 17)
    line = (
        f"--model_name {student} --teacher {teacher} --lmbda 1 --max_new_tokens 12 --max_steps 40 --learning_rate 5e-3 "
        f"--eval_dataset_name {held_out} --eval_steps 5 --packing --divergence jsd --beta 0.5"
    )
    assert distill(data, tmp_path / "out", line) == 0
    evaluated = [line["eval_kl"] for line in records(tmp_path / "out" / LOG) if "eval_kl" in line]
    assert evaluated == sorted(evaluated, reverse=True) and evaluated[-1] < 0.6 * evaluated[0], evaluated


@pytest.mark.slow
def test_compiled_blocks_generate_and_learn_as_eager_ones(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """The engine's twin leaves the compiled blocks to training; answers and losses are those of an eager run."""
    student, teacher = pair
    data = rows(tmp_path / "rows.jsonl")
    line = f"--model_name {student} --teacher {teacher} --lmbda 0.6 --max_new_tokens 6 --gradient_checkpointing"
    for name in ("off", "on"):
        assert distill(data, tmp_path / name, f"{line} --compile {name}") == 0
    torch.testing.assert_close(losses(tmp_path / "on"), losses(tmp_path / "off"), rtol=1e-3, atol=0)
    made = [[line.get("generated_tokens") for line in records(tmp_path / name / LOG)] for name in ("on", "off")]
    assert made[0] == made[1] and any(made[0])


@pytest.mark.parametrize("flags", ["", "--use_peft --lora_r 4 --packing --seq_kd --lmbda 0.5 --gradient_checkpointing"])
def test_a_resumed_run_generates_the_same(tmp_path: Path, pair: tuple[Path, Path], flags: str) -> None:
    """Bit for bit; a share of batches from the data or the teacher, and answers from the student."""
    student, teacher = pair
    data = rows(tmp_path / "rows.jsonl")
    line = f"--model_name {student} --teacher {teacher} --lmbda 0.6 --max_new_tokens 6 --save_steps 3 {flags}"
    distill(data, tmp_path / "whole", line)
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "checkpoint-6")
    torch.manual_seed(99)
    assert distill(data, tmp_path / "parts", line + " --resume") == 0
    same_bits(tmp_path / "parts" / "checkpoint-6", tmp_path / "whole" / "checkpoint-6")
    answered = [line["answers"] for line in records(tmp_path / "whole" / LOG) if "answers" in line]
    assert any(answered) and (flags or not all(answered)), answered


def test_each_rank_answers_its_own_prompts(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """Two ranks over a sharded student: the loss is that of both ranks' answers, over their global count."""
    student, teacher = pair
    data = rows(tmp_path / "rows.jsonl")
    sources = [generator(student, data, tmp_path, "--max_new_tokens 7", rank=rank, world=2) for rank in (0, 1)]
    expected = []
    for _ in range(2):
        batches = [next(source).batch for source in sources]
        total = sum(dense_kl(theirs(student), theirs(teacher), batch) for batch in batches)
        expected.append(total / sum(batch.count for batch in batches))
    line = f"--model_name {student} --teacher {teacher} --lmbda 1 --max_new_tokens 7 --learning_rate 0 --max_steps 2"
    names = {"full": "", "lora": "--use_peft --lora_r 4"}
    for name, flags in names.items():
        # processes of its own for each run: who meets again at the same port may find the store of the run before
        together(on_a_rank, str(data), str(tmp_path / name), f"{line} {flags}")
        torch.testing.assert_close(losses(tmp_path / name), expected, rtol=1e-4, atol=0)


def test_there_is_room_beside_the_largest_step_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand, for a limit of 1000: never the first time, then beside the peak of the updates, and never again once the
    peak with the engine's memory in it is too high. A CPU has none to record."""
    told = Memory(0, 0, 1000)
    monkeypatch.setattr(room, "cuda_memory", lambda device: told)
    place = Room(torch.device("cuda"))
    stayed = []
    for before, after, peak in ((100, 250, 260), (100, 250, 690), (250, 250, 700), (250, 260, 860), (100, 250, 860)):
        told = Memory(before, 0, 1000)
        place.enter()
        told = Memory(after, peak, 1000)
        stayed.append(place.leave())
    assert stayed == [False, True, True, False, False]
    told = Memory(250, 710, 1000)  # 150 held: 860 of 850
    other = Room(torch.device("cuda"))
    assert not other.leave() and not other.leave()
    assert not Room(CPU).leave()


@pytest.mark.parametrize("place", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_what_stays_answers_as_what_is_made_again(
    tmp_path: Path, pair: tuple[Path, Path], place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights change in place between batches. On CUDA the recorded passes are the same objects from the second use
    on, and nothing is recorded twice."""
    device = torch.device(place)
    data = rows(tmp_path / "rows.jsonl")
    kept, remade = (generator(pair[0], data, tmp_path, "--max_new_tokens 9", device=device) for _ in range(2))
    monkeypatch.setattr(remade.student._room, "leave", lambda: False)
    if place == "cpu":
        monkeypatch.setattr(kept.student._room, "leave", lambda: True)
    caches, steps = [], []
    for _ in range(4):
        one, other = next(kept).batch, next(remade).batch
        assert torch.equal(one.tokens_BT, other.tokens_BT) and torch.equal(one.weights_BT, other.weights_BT)
        engine = kept.student._engine
        assert engine is not None
        caches.append(engine._cache)
        steps.append(engine._steps)
        with torch.no_grad():
            for parameter in (*kept.student.model.parameters(), *remade.student.model.parameters()):
                parameter.mul_(1.05)
    assert caches[1] is caches[2] is caches[3] is not None
    if place == "cuda":
        assert steps[0] is None and steps[1] is steps[2] is steps[3] is not None


def test_a_student_that_generates_nothing_is_counted(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """Every id ends an answer: each is one token long, learned and counted as empty."""
    student, teacher = pair
    path = student / "generation_config.json"
    size = Tokenizer.load(student).vocab_size
    path.write_text(json.dumps({"eos_token_id": list(range(size))}))
    data = rows(tmp_path / "rows.jsonl")
    assert distill(data, tmp_path / "out", f"--model_name {student} --teacher {teacher} --lmbda 1 --max_steps 2") == 0
    for line in (line for line in records(tmp_path / "out" / LOG) if "answers" in line):
        assert line["empty_answers"] == line["answers"] == line["generated_tokens"] == 2


def test_prompts_that_fill_the_context_are_counted(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """Left out and counted, while the others are answered; a run of nothing else ends with the reason."""
    _, teacher = pair
    folder_fixtures.gemma2(tmp_path / "short", max_position_embeddings=20)
    data = fixtures.texts(tmp_path / "texts.jsonl")
    line = f"--model_name {tmp_path / 'short'} --teacher {teacher} --lmbda 1 --max_new_tokens 5 --max_steps 7"
    assert distill(data, tmp_path / "out", line) == 0
    notes = [line for line in records(tmp_path / "out" / LOG) if "answers" in line]
    assert 0 < sum(line["prompts_left_out"] for line in notes) < 14
    assert sum(line["answers"] + line["prompts_left_out"] for line in notes) == 14
    only = tmp_path / "only.jsonl"
    only.write_text("\n".join(json.dumps({"text": " ".join(folder_fixtures.WORDS * 3)}) for _ in range(4)))
    with pytest.raises(Diverged, match="no target in any batch"):
        distill(only, tmp_path / "none", line)


def test_the_teacher_answers_with_seq_kd(tmp_path: Path, pair: tuple[Path, Path], capsys: Any) -> None:
    """At a temperature near 0 every answer is the teacher's likeliest; one that cannot generate is refused."""
    student, teacher = pair
    data = rows(tmp_path / "rows.jsonl")
    seen: list[list[int]] = []
    stream = Engine.stream

    def watched(self: Engine, requests: Any) -> Any:
        assert self.config.hidden_size == 64
        for event in stream(self, requests):
            seen.append([event.token or 0])
            yield event

    line = f"--model_name {student} --teacher {teacher} --seq_kd --max_new_tokens 5 --max_steps 2 --top_p 0.5"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "stream", watched)
        assert distill(data, tmp_path / "out", line) == 0
    assert len(seen) > 4
    assert "top_p: at 0.5 answers are not the student's own distribution" in capsys.readouterr().err
    foreign = fixtures.llama(tmp_path / "llama", student, width=Tokenizer.load(student).vocab_size)
    with pytest.raises(ValueError, match="seq_kd: the teacher is no Gemma 2"):
        distill(data, tmp_path / "other", line.replace(str(teacher), str(foreign)))
