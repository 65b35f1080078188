"""Fine-tuning and pre-training from the command line: what goes in, what comes out, and PEFT as an oracle."""

from __future__ import annotations

import json
import math
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import folder_fixtures
import oracle
import pytest
import torch
import train_fixtures as fixtures
import transformers
import yaml
from folder_fixtures import WORDS, chats
from safetensors.torch import load_file
from test_trainer import last_step, losses, plain_loss, same_bits, weights

from gemwright.adapter import LoraConfig, load_adapter
from gemwright.cli import fuse as fuse_cli
from gemwright.cli import pretrain as pretrain_cli
from gemwright.cli import sft as sft_cli
from gemwright.cli.yaml_flags import expand
from gemwright.config import ModelConfig
from gemwright.data.loader import Batching, Loader
from gemwright.loader import load_model
from gemwright.lora import LoRALinear, add_lora
from gemwright.tokenizer import Tokenizer
from gemwright.train.card import push
from gemwright.train.progress import LOG, records
from gemwright.train.sft import sft
from gemwright.train.state import STATE

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parent.parent
RELEASE = (
    '--dataset_text_field="text" --per_device_train_batch_size 1 --per_device_eval_batch_size 1 '
    "--gradient_accumulation_steps 4 --learning_rate 2e-4 --report_to none --bf16 --max_seq_length 1024 --lora_r 16 "
    "--lora_alpha 32 --lora_target_modules q_proj k_proj v_proj o_proj --load_in_4bit --use_peft "
    '--attn_implementation "eager" --logging_steps=10 --gradient_checkpointing'
)
"""The command line of Gemma 2's release post, without model, data and output."""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder_fixtures.gemma2(tmp_path / "base")
    return tmp_path / "base"


def run_sft(base: Path, data: Path, out: Path, flags: str) -> int:
    line = ["--model_name", str(base), "--dataset_name", str(data), "--output_dir", str(out), *shlex.split(flags)]
    return sft_cli.run(sft_cli.parse(line))


def test_the_lora_loss_curve_is_pefts(tmp_path: Path) -> None:
    """transformers in eager mode with peft's LoRA from the same first factors, torch's AdamW and a linear schedule."""
    peft = pytest.importorskip("peft")
    config = fixtures.debug()
    lora = LoraConfig(rank=4, alpha=12, targets="attention")
    made = fixtures.model(lora)
    first = {n: m.lora_A.detach().clone() for n, m in made.named_modules() if isinstance(m, LoRALinear)}
    options = fixtures.options(
        tmp_path / "run", logging_steps=1, lr_scheduler_type="linear", max_grad_norm=0.5, learning_rate=1e-2
    )
    fixtures.run(options, made=made, lora=lora, packing=False)
    theirs: Any = oracle.oracle(config, fixtures.weights(config))
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=4, lora_alpha=12, target_modules=targets))
    for name, factor in first.items():
        theirs.get_submodule(f"base_model.model.{name}").lora_A["default"].weight.data.copy_(factor)
    trained = [p for p in theirs.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1, eps=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: t / 2 if t < 2 else (6 - t) / 4)
    loader = Loader(fixtures.documents(), Batching(length=fixtures.LENGTH, rows=2, seed=3, packing=False), epochs=None)
    expected = []
    for _ in range(6):
        batch = next(loader)
        loss = plain_loss(theirs, batch) / batch.weights_BT.sum()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained, 0.5)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        expected.append(float(loss.detach()))
    torch.testing.assert_close(losses(tmp_path / "run"), expected, rtol=0, atol=1e-4)
    saved = load_file(tmp_path / "run" / "adapter_model.safetensors")
    for name, tensor in peft.get_peft_model_state_dict(theirs).items():
        torch.testing.assert_close(saved[name], tensor, rtol=0, atol=1e-5)


def test_the_release_posts_command_line_runs(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As it stands; the adapter loads, and `fuse` gives a model of the same logits as the adapter applied."""
    out = tmp_path / "out"
    assert run_sft(base, chats(tmp_path / "chats.jsonl"), out, f"{RELEASE} --max_steps 2 --logging_steps 1") == 0
    assert "attn_implementation: eager, computed exactly" in capsys.readouterr().err
    adapter = load_adapter(out)
    assert adapter.config.rank == 16 and adapter.config.alpha == 32
    assert {name.rpartition(".")[2] for name in adapter.factors} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert any(b.abs().max() > 0 for _, b in adapter.factors.values())
    card = (out / "README.md").read_text()
    assert 'library_name: "peft"' in card and f'base_model: "{base}"' in card and "chats.jsonl" in card
    fused = tmp_path / "fused"
    assert fuse_cli.run(fuse_cli.Options(base=str(base), adapter=str(out), out=str(fused))) == 0
    with_adapter = load_model(base, device=CPU, pack=False)
    add_lora(with_adapter, adapter)
    with_adapter.eval()  # fresh modules are in training mode, with dropout
    tokens_BT = oracle.tokens(with_adapter.config, 2, 12)
    applied, folded = (oracle.forward(m, tokens_BT) for m in (with_adapter, load_model(fused, device=CPU, pack=False)))
    plain = oracle.forward(load_model(base, device=CPU, pack=False), tokens_BT)
    assert oracle.relative(folded, applied) < 1e-4 < oracle.relative(plain, applied)


def test_qlora_learns_resumes_and_fuses(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Over a base in NF4: the loss falls, a resumed run is the uninterrupted one, and the adapter is PEFT's.

    Folded into the full base it gives another model than over the quantized one, but one that has learnt the same.
    """
    peft = pytest.importorskip("peft")
    flags = (
        "--use_peft --load_in_4bit --lora_r 8 --lora_dropout 0.1 --learning_rate 1e-2 --max_steps 24 --logging_steps 4 "
        "--save_steps 12 --per_device_train_batch_size 4 --dtype float32 --packing --max_seq_length 64 --resume"
    )
    data = chats(tmp_path / "chats.jsonl")
    assert run_sft(base, data, tmp_path / "whole", flags) == 0
    course = losses(tmp_path / "whole")
    assert course[-1] < 0.6 * course[0], course
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoint-24")
    assert run_sft(base, data, tmp_path / "again", flags) == 0
    same_bits(tmp_path / "again" / "checkpoint-24", tmp_path / "whole" / "checkpoint-24")
    theirs: Any = peft.PeftModel.from_pretrained(
        transformers.Gemma2ForCausalLM.from_pretrained(base, attn_implementation="eager"), tmp_path / "whole"
    )
    fused = tmp_path / "fused"
    assert fuse_cli.run(fuse_cli.Options(base=str(base), adapter=str(tmp_path / "whole"), out=str(fused))) == 0
    folded = load_model(fused, device=CPU, pack=False)
    tokens_BT = oracle.tokens(folded.config, 2, 12)
    want = oracle.oracle_logits(theirs.eval(), tokens_BT)
    assert oracle.distance(oracle.forward(folded, tokens_BT), want) < 1e-3
    with pytest.raises(SystemExit):
        run_sft(base, data, tmp_path / "out", "--load_in_4bit")
    assert "load_in_4bit: given without use_peft" in capsys.readouterr().err


def test_a_terminated_run_has_its_own_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for outcome, code in (("done", 0), ("terminated", 143)):
        monkeypatch.setattr("gemwright.train.sft.sft", lambda config, outcome=outcome: outcome)
        assert run_sft(tmp_path, tmp_path, tmp_path, "") == code


def test_full_fine_tuning_learns_its_data_and_keeps_the_head_tied(base: Path, tmp_path: Path) -> None:
    """Packed chats, evaluated on themselves; the delivered folder is a chat model with the base's configs."""
    data = chats(tmp_path / "chats.jsonl")
    flags = (
        f"--eval_dataset_name {data} --num_train_epochs 25 --packing --max_seq_length 96 --learning_rate 3e-3 "
        "--per_device_train_batch_size 2 --lr_scheduler_type wsd --warmup_ratio 0.1 --save_steps 1000 --logging_steps 5"
    )
    assert run_sft(base, data, tmp_path / "out", flags) == 0
    lines = records(tmp_path / "out" / LOG)
    assert lines[0]["loss"] > 6.0
    assert next(line["eval_loss"] for line in lines if "eval_loss" in line) < 2.5
    assert "lm_head.weight" not in weights(tmp_path / "out")
    moved = [name for name, tensor in weights(tmp_path / "out").items() if not torch.equal(tensor, weights(base)[name])]
    assert set(moved) == set(weights(base))  # the embedding too, which is the head
    assert (tmp_path / "out" / "config.json").read_text() == (base / "config.json").read_text()
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == [1, 107]


def test_bad_input_is_refused_before_anything_is_trained(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = chats(tmp_path / "bad.jsonl", 1)
    data.write_text(data.read_text() + '\n{"text": "x"}')
    with pytest.raises(ValueError, match=r"bad.jsonl:2: .*mixed columns"):
        run_sft(base, data, tmp_path / "out", "")
    for flags, message in {
        "--max_seq_length 0": "max_seq_length: got 0",
        "--gradient_accumulation_steps 0": "gradient_accumulation_steps: got 0",
        "--warmup_ratio 1.5": "warmup_ratio: got 1.5",
    }.items():
        with pytest.raises(SystemExit):
            run_sft(base, data, tmp_path / "out", flags)
        assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"lm_head"):
        run_sft(base, chats(data), tmp_path / "out", "--use_peft --lora_target_modules lm_head")
    assert not list((tmp_path / "out").glob("checkpoint-*")) and not (tmp_path / "out" / "config.json").exists()


def test_a_file_of_options_and_flags_are_one(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    options = {
        "model_name_or_path": "base", "dataset_name": "rows.jsonl", "output_dir": "out", "learning_rate": 1e-4,
        "bf16": True, "packing": False, "lora_target_modules": ["q_proj", "v_proj"], "max_steps": None,
    }  # fmt: skip
    file.write_text(yaml.safe_dump(options))
    # 2e-5 is the default: given after the file it wins all the same
    config = sft_cli.parse(["--config", str(file), "--learning_rate", "2e-5", "--max_length", "64"])
    assert (config.model_name, config.learning_rate, config.bf16, config.packing) == ("base", 2e-5, True, False)
    assert (config.lora_target_modules, config.max_seq_length, config.max_steps) == (("q_proj", "v_proj"), 64, None)
    assert sft_cli.parse([f"--config={file}"]).learning_rate == 1e-4
    for text, message in {
        "- a\n": "holds list, allowed is one object",
        "a: {b: c}": "a is {'b': 'c'}, allowed is",
        "a: [": "not YAML",
    }.items():
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            expand(["--config", str(file)])
    with pytest.raises(ValueError, match="--config: got no file"):
        expand(["--config"])


@pytest.mark.parametrize("streaming", [True, False], ids=["streamed", "tokenised"])
def test_pretraining_from_a_shape_and_its_resumption(base: Path, tmp_path: Path, streaming: bool) -> None:
    """Fresh weights start at the uniform loss; a run resumed from its first checkpoint ends in the same bits."""
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": " ".join(WORDS[i % 7 :])}) for i in range(30)))
    shape = tmp_path / "shape.yaml"
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape.write_text(yaml.safe_dump({**small, "num_key_value_heads": 1, "head_dim": 16, "dtype": "float32"}))
    line = (
        f"--model_config {shape} --tokenizer {base} --dataset_name {text} --output_dir {{}} --max_seq_length 32 "
        "--per_device_train_batch_size 2 --max_steps 6 --save_steps 3 --logging_steps 1 --learning_rate 1e-3 --resume"
    ) + " --streaming" * streaming

    def run(out: Path) -> int:
        return pretrain_cli.run(pretrain_cli.parse(shlex.split(line.format(out))))

    assert run(tmp_path / "whole") == 0
    size = Tokenizer.load(base).vocab_size
    assert losses(tmp_path / "whole")[0] == pytest.approx(math.log(size), abs=0.1)
    gains = {name: t for name, t in weights(tmp_path / "whole" / "checkpoint-3").items() if t.ndim == 1}
    assert all(0 < t.abs().max() < 0.01 for t in gains.values())  # from the identity, 3 updates of at most 1e-3
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoint-6")
    assert run(tmp_path / "again") == 0
    same_bits(tmp_path / "again" / "checkpoint-6", tmp_path / "whole" / "checkpoint-6")
    assert load_model(tmp_path / "whole", device=CPU, pack=False).config.vocab_size == size
    if not streaming:
        (tmp_path / "text.jsonl").write_text(json.dumps({"text": "other words"}))
        with pytest.raises(ValueError, match=r"data was .*, is "):
            run(tmp_path / "again")


def test_a_shape_must_have_room_for_the_tokens(base: Path, tmp_path: Path) -> None:
    from gemwright.train.pretrain import read_config

    tokenizer = Tokenizer.load(base)
    assert read_config("debug", tokenizer).vocab_size == tokenizer.vocab_size
    raw = {**ModelConfig.preset("debug").to_hf(), "vocab_size": 300}
    (tmp_path / "shape.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=f"vocab_size: got 300, the tokenizer has {tokenizer.vocab_size}"):
        read_config(str(tmp_path / "shape.json"), tokenizer)
    with pytest.raises(ValueError, match="preset: got 'huge'"):
        read_config("huge", tokenizer)


def test_what_is_pushed_to_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, tokenizer and card; neither checkpoints nor their state nor the tokenised data."""
    import huggingface_hub
    from huggingface_hub.utils._paths import filter_repo_objects

    files = "README.md model.safetensors config.json log.jsonl checkpoint-3/model.safetensors".split()
    files += "checkpoint-3/state/model-00001-of-00001.safetensors tokens/a/shard-0.bin tokens/a/shard-0.json".split()
    called: dict[str, Any] = {}

    class Api:
        def create_repo(self, name: str, **options: Any) -> Any:
            called["repo"] = (name, options)
            return type("Url", (), {"repo_id": f"me/{name}"})()

        def upload_folder(self, **options: Any) -> Any:
            allow, ignore = options["allow_patterns"], options["ignore_patterns"]
            called["files"] = list(filter_repo_objects(files, allow_patterns=allow, ignore_patterns=ignore))
            return type("Info", (), {"repo_url": "https://hub/me"})()

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert push(tmp_path / "poet", None, private=True) == "me/poet"
    assert called["repo"] == ("poet", {"private": True, "exist_ok": True})
    assert called["files"] == files[:4]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_launchers_start_ranks_that_agree_with_one(base: Path, tmp_path: Path, launcher: str) -> None:
    """`torchrun -m gemwright sft` and `accelerate launch -m gemwright sft`, two processes against one."""
    data = chats(tmp_path / "chats.jsonl")
    shared = [
        "--model_name", str(base), "--dataset_name", str(data), "--max_steps", "3", "--logging_steps", "1",
        "--learning_rate", "1e-3", "--adam_epsilon", "1e-4", "--dtype", "float32", "--device", "cpu",
    ]  # fmt: skip
    one = [*shared, "--output_dir", str(tmp_path / "one"), "--per_device_train_batch_size", "4"]
    assert sft(sft_cli.parse(one)) == "done"
    start = {
        "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
        "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
                       "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"],
    }[launcher]  # fmt: skip
    two = [*shared, "--output_dir", str(tmp_path / "two"), "--per_device_train_batch_size", "2"]
    done = subprocess.run(
        [sys.executable, "-m", *start, "-m", "gemwright", "sft", *two],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert last_step(tmp_path / "two") == 3
    assert json.loads((tmp_path / "two" / "checkpoint-3" / STATE).read_text())["world"] == 2
    torch.testing.assert_close(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "flags",
    ["", "--cuda_graphs", "--use_peft", "--use_peft --load_in_4bit"],
    ids=["full", "recorded", "lora", "qlora"],
)
def test_a_run_on_a_gpu(base: Path, tmp_path: Path, flags: str) -> None:
    """Compiled blocks, FlexAttention and bf16: the loss falls, and a resumed run ends in the same bits."""
    data = chats(tmp_path / "chats.jsonl")
    flags += (
        " --device cuda --dtype bfloat16 --compile on --packing --max_seq_length 64 --max_steps 24 --save_steps 12 "
        "--per_device_train_batch_size 2 --learning_rate 5e-3 --logging_steps 4 --resume"
    )
    assert run_sft(base, data, tmp_path / "whole", flags) == 0
    course = losses(tmp_path / "whole")
    assert course[-1] < 0.8 * course[0], course
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoint-24")
    assert run_sft(base, data, tmp_path / "again", flags) == 0
    same_bits(tmp_path / "again" / "checkpoint-24", tmp_path / "whole" / "checkpoint-24")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4, alpha=12, targets="attention")], ids=["full", "lora"])
def test_the_loss_curve_is_trls(base: Path, tmp_path: Path, lora: LoraConfig | None) -> None:
    """TRL's SFTTrainer over transformers in eager mode, on the same rows in the same order, some tokens masked."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    made = fixtures.model(lora)
    first = {n: m.lora_A.detach().clone() for n, m in made.named_modules() if isinstance(m, LoRALinear)}
    options = fixtures.options(tmp_path / "run", logging_steps=1, lr_scheduler_type="linear", max_grad_norm=1.0)
    fixtures.run(options, made=made, lora=lora, packing=False)
    loader = Loader(fixtures.documents(), Batching(length=fixtures.LENGTH, rows=2, seed=3, packing=False), epochs=None)
    rows = []
    for _ in range(6):
        batch = next(loader)
        for row in range(2):
            size = int((batch.pos_BT[row] >= 0).sum())
            ids = [*batch.tokens_BT[row, :size].tolist(), int(batch.targets_BT[row, size - 1])]
            rows.append({"input_ids": ids, "completion_mask": [0, *batch.weights_BT[row, :size].int().tolist()]})
    theirs: Any = oracle.oracle(fixtures.debug(), fixtures.weights(fixtures.debug())).requires_grad_(True)
    theirs.config.pad_token_id = 0
    if lora is not None:
        peft = pytest.importorskip("peft")
        targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
        theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=4, lora_alpha=12, target_modules=targets))
        for name, factor in first.items():
            theirs.get_submodule(f"base_model.model.{name}").lora_A["default"].weight.data.copy_(factor)

    class InOrder(trl.SFTTrainer):  # type: ignore[misc, name-defined]
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(rows)

    arguments = trl.SFTConfig(
        output_dir=str(tmp_path / "peer"), max_steps=6, per_device_train_batch_size=2, learning_rate=3e-3,
        lr_scheduler_type="linear", warmup_steps=2, weight_decay=0.1, adam_epsilon=1e-4, max_grad_norm=1.0,
        logging_steps=1, report_to="none", save_strategy="no", use_cpu=True, bf16=False, gradient_checkpointing=False,
        max_length=None, packing=False, completion_only_loss=True, disable_tqdm=True,
    )  # fmt: skip
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    peer = InOrder(theirs, args=arguments, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer)
    peer.train()
    expected = [line["loss"] for line in peer.state.log_history if "loss" in line]
    torch.testing.assert_close(losses(tmp_path / "run"), expected, rtol=0, atol=1e-4)
