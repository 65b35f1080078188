"""Teachers of any architecture, whether their ids are the student's, and the cache of what they say."""

from __future__ import annotations

import itertools
import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import distill_fixtures as fixtures
import numpy as np
import pytest
import tokenizer_fixtures
import torch
from distill_fixtures import cache, distill, folders, rows, theirs
from safetensors.torch import load_file
from test_trainer import losses

from gemwright.data.batch import Batch
from gemwright.data.loader import Batching, Loader
from gemwright.data.rows import Document
from gemwright.data.store import in_memory
from gemwright.ops.divergence import divergence, sparse_kl
from gemwright.ops.head import Head
from gemwright.tokenizer import Tokenizer
from gemwright.train.drawn import Sampling, drawn
from gemwright.train.teacher import Teacher, _foreign, load_teacher
from gemwright.train.teacher_cache import plan
from gemwright.train.token_ids import SameIds, same_ids

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return folders(tmp_path_factory.mktemp("pair"))


def packed(vocab: int) -> Batch:
    """Two rows of several documents and some padding, half of the targets with loss."""
    draw = random.Random(0)
    documents = [
        Document(
            [draw.randrange(1, vocab) for _ in range(size)], [0, *(draw.randint(0, 1) for _ in range(size - 2)), 1]
        )
        for size in (9, 4, 17, 2, 6, 12)
    ]
    return next(Loader(in_memory(documents), Batching(length=25, rows=2, shuffle=False)))


def said(teacher: Teacher, batch: Batch) -> torch.Tensor:
    """Log-probabilities [X, V] of a teacher at the places of a batch."""
    logits_XV = teacher.hidden(batch).float() @ teacher.head.weight_VD.float().T
    cap = teacher.head.softcap
    return (logits_XV if cap is None else cap * torch.tanh(logits_XV / cap)).log_softmax(-1)


def expected(model: Any, batch: Batch) -> torch.Tensor:
    """The same by transformers, document by document."""
    found = []
    for b in range(len(batch.tokens_BT)):
        for doc in batch.doc_BT[b].unique_consecutive():  # type: ignore[no-untyped-call]
            here = (batch.doc_BT[b] == doc) & (batch.pos_BT[b] >= 0)
            logits = fixtures.logits(model, batch.tokens_BT[b, here][None])[0]
            found.append(logits[batch.weights_BT[b, here] > 0])
    return torch.cat(found).detach().log_softmax(-1)


@pytest.mark.parametrize("kind", ["Gemma2", "Gemma2 by transformers", "Llama", "Qwen2"])
def test_a_teacher_says_what_transformers_says(pair: tuple[Path, Path], tmp_path: Path, kind: str) -> None:
    """Packed rows; the cap of a Gemma 2 on the way through transformers too."""
    width = Tokenizer.load(pair[1]).vocab_size
    folder = pair[1]
    if kind in ("Llama", "Qwen2"):
        folder = fixtures.llama(
            tmp_path / "model", pair[1], width=width, kind=kind, tie_word_embeddings=kind != "Llama"
        )
    batch = packed(width)
    teacher = _foreign(folder, CPU, "float32") if kind.endswith("transformers") else load_teacher(folder, device=CPU)
    want = expected(theirs(folder), batch)
    assert len(want) == batch.count > 20
    torch.testing.assert_close(said(teacher, batch), want, rtol=0, atol=2e-5)
    uncapped = said(Teacher(teacher.forward, Head(teacher.head.weight_VD, 1.0), ""), batch)
    assert float((uncapped - want).abs().max()) > 0.1


def test_heads_that_are_not_understood_are_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    width = Tokenizer.load(pair[1]).vocab_size
    scaled = fixtures.llama(tmp_path / "scaled", pair[1], width=width, kind="Granite", logits_scaling=8.0)
    with pytest.raises(ValueError, match="are not its head's product with a soft cap of None"):
        load_teacher(scaled, device=CPU)
    biased = fixtures.llama(tmp_path / "biased", pair[1], width=width, kind="Phi")
    with pytest.raises(ValueError, match="is with a bias, allowed is a linear without one"):
        load_teacher(biased, device=CPU)


def test_ids_are_compared(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Another vocabulary, renamed and moved control tokens, and tables with padding."""
    own = Tokenizer.load(pair[0])
    size = own.vocab_size
    assert same_ids(own, own, (size, size + 128)) == SameIds(size, {})
    with pytest.raises(ValueError, match=f"tokenizer has {size} ids, the heads have {size - 1} rows"):
        same_ids(own, own, (size - 1, size))
    other = Tokenizer.load(tokenizer_fixtures.byte_level(tmp_path / "other"))
    with pytest.raises(ValueError, match=r"teacher: (control token|other token ids)"):
        same_ids(own, other, (size, size))
    text = (pair[0] / "tokenizer.json").read_text().replace("<start_of_turn>", "<|im_start|>")
    renamed = tmp_path / "renamed"
    shutil.copytree(pair[0], renamed)
    (renamed / "tokenizer.json").write_text(text)
    theirs = Tokenizer.load(renamed)
    with pytest.raises(ValueError, match="'<start_of_turn>' has id 106 for the student and None for the teacher"):
        same_ids(own, theirs, (size, size))
    assert same_ids(own, theirs, (size, size), {"<start_of_turn>": "<|im_start|>"}).moved == {}
    with pytest.raises(ValueError, match="token_map: '<start_of_turn>' is '<nothing>', allowed is a token"):
        same_ids(own, theirs, (size, size), {"<start_of_turn>": "<nothing>"})
    with pytest.raises(ValueError, match="token_map: '<oops>' is no token of the student"):
        same_ids(own, theirs, (size, size), {"<oops>": 4})
    with pytest.raises(ValueError, match="stands on one side only"):
        same_ids(own, theirs, (size, size), {"<start_of_turn>": 4})
    swapped = {"<unused0>": "<unused1>", "<unused1>": "<unused0>"}
    assert same_ids(own, own, (size, size), swapped).moved == {4: 5, 5: 4}


def test_a_teacher_with_moved_ids_speaks_the_students(pair: tuple[Path, Path]) -> None:
    teacher, batch = load_teacher(pair[1], device=CPU), packed(300)
    size = len(teacher.head.weight_VD)
    moved = {10: 11, 11: 12, 12: 10}
    spoken = teacher.speak(SameIds(size, moved))
    ids = torch.tensor([moved.get(i, i) for i in range(size)])
    other = Batch(ids[batch.tokens_BT], batch.targets_BT, batch.weights_BT, batch.pos_BT, batch.doc_BT)
    torch.testing.assert_close(said(spoken, batch), said(teacher, other)[:, ids])
    assert not torch.allclose(said(spoken, batch), said(teacher, batch))


def test_drawn_ids_estimate_the_kl_and_its_gradient_without_bias() -> None:
    """The mean over many draws lies within four standard errors of the dense value; so does each gradient's."""
    torch.manual_seed(0)
    student, teacher = Head(torch.randn(50, 12), 8.0, 1.5), Head(torch.randn(50, 9), 6.0, 1.5)
    teacher_XD = torch.randn(3, 9)
    hidden = torch.randn(3, 12, requires_grad=True)
    want, _ = divergence("forward_kl", hidden, student, teacher_XD, teacher)
    (slope,) = torch.autograd.grad(want, hidden)
    found, slopes = [], []
    generator = torch.Generator().manual_seed(5)
    for _ in range(400):
        got = drawn(Head(teacher.weight_VD, 6.0), teacher_XD, Sampling(draws=16, temperature=1.5), generator)
        sizes = torch.diff(got["ends"], prepend=torch.zeros(1, dtype=torch.int32)).tolist()
        parts = (torch.split(part, sizes) for part in (got["ids"].long(), got["counts"].float(), got["log_p"]))
        ids, counts, log_p = (torch.nn.utils.rnn.pad_sequence(list(part), batch_first=True) for part in parts)
        assert counts.sum(-1).tolist() == [16, 16, 16]
        value, _ = sparse_kl(hidden, student, ids, counts / 16, log_p_XK=log_p)
        found.append(value.detach())
        slopes.append(torch.autograd.grad(value, hidden)[0])
    for one, exact in ((torch.stack(found), want.detach()), (torch.stack(slopes), slope)):
        error = one.std(0) / len(one) ** 0.5
        assert bool(((one.mean(0) - exact).abs() < 4.5 * error).all()), (one.mean(0), exact, error)
    assert float((torch.stack(found).mean() - want.detach()).abs() / want.detach()) < 0.05


def test_shards_hold_whole_pieces() -> None:
    counts = np.array([3, 0, 4, 5, 1, 0, 9, 2])
    firsts = plan(counts, 6)
    sums = [int(counts[a:b].sum()) for a, b in itertools.pairwise(firsts)]
    assert firsts[0] == 0 and firsts[-1] == len(counts)
    assert sums == [7, 6, 9, 2]


# --- the cache -------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of a few tokens."""
    monkeypatch.setattr("gemwright.train.teacher_cache.SHARD_BYTES", 64 * 4 * 20)
    monkeypatch.setattr("gemwright.train.teacher_cache.SHARD_TOKENS", 20)


def shards(folder: Path) -> dict[str, Any]:
    return {path.name: load_file(path) for path in sorted(folder.glob("shard-*.safetensors"))}


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("flags", ["", "--samples 8"])
def test_an_interrupted_cache_goes_on_and_damage_is_named(
    pair: tuple[Path, Path], tmp_path: Path, flags: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Shards that are there stay; one that is cut, and one with a changed byte, are named and made again, the same."""
    data = rows(tmp_path / "rows.jsonl")
    assert cache(pair[1], data, tmp_path / "whole", flags) == 0
    first = shards(tmp_path / "whole" / "train")
    assert len(first) > 4
    train = tmp_path / "again" / "train"
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    (train / "shard-00001.safetensors").unlink()
    cut, bent = train / "shard-00002.safetensors", train / "shard-00003.safetensors"
    cut.write_bytes(cut.read_bytes()[:-5])
    bent.write_bytes(bent.read_bytes()[:-2] + b"\x01\x02")
    line = f"--model_name {pair[0]} --teacher_cache {tmp_path / 'again'} --max_steps 9"
    with pytest.raises(FileNotFoundError, match=r"train lacks shard-00001.safetensors \(`gemwright cache-teacher`"):
        distill(data, tmp_path / "out", line)
    shutil.copyfile(tmp_path / "whole" / "train" / "shard-00001.safetensors", train / "shard-00001.safetensors")
    with pytest.raises(ValueError, match=r"shard-0000[23].safetensors is damaged.*cache-teacher"):
        distill(data, tmp_path / "out", line)
    capsys.readouterr()
    assert cache(pair[1], data, tmp_path / "again", f"{flags} --json") == 0
    done = capsys.readouterr()
    report = json.loads(done.out)["train"]
    assert report["damaged"] == [cut.name, bent.name] and report["found"] == len(first) - 2
    assert f"{cut}: damaged" in done.err and "it is made again" in done.err
    for name, tensors in shards(train).items():
        assert all(torch.equal(tensor, first[name][key]) for key, tensor in tensors.items()), name


@pytest.mark.usefixtures("small")
def test_a_cache_of_something_else_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Every difference is named: data, length, teacher, cap; on making as on reading."""
    student, teacher = pair
    data = rows(tmp_path / "rows.jsonl")
    cache(teacher, data, tmp_path / "cache")
    line = f"--model_name {student} --teacher_cache {tmp_path / 'cache'}"
    with pytest.raises(ValueError, match=r"was made from something else: data was '.*', is '"):
        distill(rows(tmp_path / "other.jsonl", 9), tmp_path / "out", line)
    with pytest.raises(ValueError, match=r"length was 40, is 30"):
        distill(data, tmp_path / "out", f"{line} --max_seq_length 30")
    capped = tmp_path / "capped"
    shutil.copytree(teacher, capped)
    config = json.loads((capped / "config.json").read_text())
    (capped / "config.json").write_text(json.dumps({**config, "final_logit_softcapping": 30.0}))
    with pytest.raises(ValueError, match=r"teacher was '.*', is '.*'; softcap was 5.0, is 30.0"):
        distill(data, tmp_path / "out", f"{line} --teacher {capped}")
    tuned = fixtures.changed(teacher, tmp_path / "tuned", "model.norm.weight", 0.01)
    with pytest.raises(ValueError, match=r"output: .*train is a cache of something else: teacher was"):
        cache(tuned, data, tmp_path / "cache")
    with pytest.raises(ValueError, match=r"kind was 'hidden', is 'samples'"):
        cache(teacher, data, tmp_path / "cache", "--samples 4")
    with pytest.raises(FileNotFoundError, match=r"eval has no key.json; `gemwright cache-teacher`"):
        distill(data, tmp_path / "out", f"{line} --eval_dataset_name {data}")
    assert not (tmp_path / "out" / "log.jsonl").exists()


def test_drawn_ids_teach_as_hidden_states_do(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """With 4000 draws the curve is the exact one within a few per cent; what drawn ids cannot do is refused."""
    student, teacher = pair
    data = rows(tmp_path / "rows.jsonl")
    cache(teacher, data, tmp_path / "drawn", "--samples 4000 --temperature 1.5")
    line = f"--model_name {student} --eval_dataset_name {data} --temperature 1.5"
    cache(teacher, data, tmp_path / "drawn-eval", f"--samples 4000 --temperature 1.5 --eval_dataset_name {data}")
    distill(data, tmp_path / "exact", f"{line} --teacher {teacher}")
    distill(data, tmp_path / "sampled", f"{line} --teacher_cache {tmp_path / 'drawn-eval'}")
    torch.testing.assert_close(losses(tmp_path / "sampled"), losses(tmp_path / "exact"), rtol=0.05, atol=0)
    assert losses(tmp_path / "sampled") != losses(tmp_path / "exact")
    base = f"--model_name {student} --teacher_cache {tmp_path / 'drawn'}"
    with pytest.raises(ValueError, match="divergence: got jsd, but teacher_cache holds drawn ids"):
        distill(data, tmp_path / "out", f"{base} --temperature 1.5 --divergence jsd")
    with pytest.raises(ValueError, match=r"temperature: got 1.0, but the ids of teacher_cache were drawn at 1.5"):
        distill(data, tmp_path / "out", base)


def test_a_foreign_teacher_through_the_cache(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """A Llama whose control tokens have other names, whose table is padded: beside the student as from its cache."""
    student = pair[0]
    data = rows(tmp_path / "rows.jsonl")
    width = Tokenizer.load(student).vocab_size
    teacher = fixtures.llama(tmp_path / "llama", student, width=width + 27)
    names = {"<start_of_turn>": "<|im_start|>", "<end_of_turn>": "<|im_end|>"}
    for file in ("tokenizer.json", "tokenizer_config.json"):
        text = (teacher / file).read_text()
        for ours, other in names.items():
            text = text.replace(ours, other)
        (teacher / file).write_text(text)
    with pytest.raises(ValueError, match="control token '<start_of_turn>' has id 106 for the student and None"):
        distill(data, tmp_path / "out", f"--model_name {student} --teacher {teacher}")
    (tmp_path / "map.json").write_text(json.dumps(names))
    told = f"--token_map {tmp_path / 'map.json'}"
    cache(teacher, data, tmp_path / "cache", f"{told} --tokenizer {student}")
    line = f"--model_name {student} --packing --divergence reverse_kl"
    distill(data, tmp_path / "local", f"{line} --teacher {teacher} {told}")
    distill(data, tmp_path / "cached", f"{line} --teacher_cache {tmp_path / 'cache'}")
    torch.testing.assert_close(losses(tmp_path / "cached"), losses(tmp_path / "local"), rtol=1e-6, atol=2e-6)


@pytest.mark.slow
def test_sigkill_while_caching_loses_nothing(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Killed again and again at short random delays; the shards at the end are those of an undisturbed run."""
    data = rows(tmp_path / "rows.jsonl", 200)
    code = (
        "import sys, gemwright.train.teacher_cache as c\nc.SHARD_BYTES = 64 * 4 * 20\n"
        "from gemwright.cli import main\nprint('ready', flush=True)\nsys.exit(main(sys.argv[1:]))"
    )
    line = f"cache-teacher --teacher {pair[1]} --dataset_name {data} --max_seq_length 40 --device cpu --output"
    subprocess.run([sys.executable, "-c", code, *line.split(), str(tmp_path / "whole")], check=True)
    draw, killed = random.Random(0), 0
    for _ in range(40):
        process = subprocess.Popen(
            [sys.executable, "-c", code, *line.split(), str(tmp_path / "killed")], stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(draw.uniform(1.0, 4.0))
        if process.poll() is not None:
            assert process.returncode == 0
            break
        process.kill()
        process.wait()
        killed += 1
    assert killed > 0 and process.returncode == 0, killed
    first, again = (shards(tmp_path / name / "train") for name in ("whole", "killed"))
    assert len(first) > 20 and first.keys() == again.keys()
    assert all(torch.equal(first[name]["hidden"], again[name]["hidden"]) for name in first)
