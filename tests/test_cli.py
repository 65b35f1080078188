"""The command line: output, exit codes and errors of every verb, and the chat by its commands and its keys."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import folder_fixtures
import pytest
import tokenizer_fixtures
import torch

import gemwright
from gemwright import cli
from gemwright.adopt import adopt, adopted_config, carried, text_rows
from gemwright.checkpoint import Checkpoint, write
from gemwright.cli import info
from gemwright.cli.options import Loading, Sampling
from gemwright.config import ModelConfig
from gemwright.llama import Llama
from gemwright.lm import LM
from gemwright.sampling import SamplingParams
from gemwright.tokenizer import Tokenizer

Run = Callable[..., tuple[int, str, str]]
USER = {"role": "user", "content": "Hello there"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "tiny"
    folder_fixtures.gemma2(path)
    return path


@pytest.fixture(scope="module")
def lm(folder: Path) -> LM:
    return gemwright.load(folder)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    def call(*arguments: str | Path, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code = cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return call


# --- the command itself ---


def test_help_comes_without_torch_and_at_once() -> None:
    code = (
        "import sys; from gemwright.cli import main; main(['--help']); assert not {'torch', 'tyro'} & set(sys.modules)"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert time.perf_counter() - start < 1.5  # 0.06 s on an idle machine
    assert all(f"  {verb} " in done.stdout for verb in cli.VERBS)


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_explains_itself(run: Run, verb: str) -> None:
    code, out, _ = run(verb, "--help")
    assert code == 0
    assert "For example:" in out
    assert f"  gemwright {verb}" in out
    assert "--json" in out or verb in ("sft", "pretrain", "distill", "fuse")  # training writes log.jsonl


def test_help_of_a_verb_does_not_import_torch() -> None:
    code = f"import sys\nfrom gemwright.cli import main\nfor verb in {list(cli.VERBS)}: main([verb, '--help'])\n"
    code += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)


def test_wrong_usage_is_2(run: Run, folder: Path, tmp_path: Path) -> None:
    code, _, err = run("chta")
    assert (code, "did you mean chat?" in err) == (2, True)
    code, _, err = run("generate", "--temprature", "1")
    assert (code, "--temperature" in err) == (2, True)
    for arguments, message in [
        (("generate", tmp_path / "none", "--prompt", "x"), "no such folder"),
        (("generate", folder, "--prompt", "x", "--temperature", "-1"), "temperature: got -1"),
        (("generate", folder, "--prompt", "x", "--messages", "y"), "allowed is one"),
        (("generate", folder, "--prompt", "x", "--system", "y"), "allowed with --messages"),
        (("generate", folder, "--prompt", "x", "--logprobs", "1"), "allowed with --json"),
        (("generate", folder, "--prompt", "x", "--max-new-tokens", "999"), "the context holds 256"),
        (("generate", folder, "--prompt", "x", "--dtype", "int8"), "dtype: got 'int8'"),
        (("info", tmp_path), "config.json: missing"),
        (("doctor", tmp_path / "none"), "no such folder"),
    ]:
        code, out, err = run(*arguments)
        assert (code, out) == (2, ""), arguments
        assert message in err, (arguments, err)
        assert err.startswith(f"gemwright {arguments[0]}: ")
        assert err.count("\n") == 1


def test_version(run: Run) -> None:
    assert run("--version") == (0, f"gemwright {gemwright.__version__}\n", "")


def test_sampling_flags_are_the_sampling_controls() -> None:
    """A control that is new in SamplingParams must appear here, or be named as having a flag of its own or none."""
    elsewhere = {"stop_ids", "logprobs", "prompt_logprobs", "n", "logit_bias"}
    assert set(Sampling.__dataclass_fields__) == set(SamplingParams.__dataclass_fields__) - elsewhere
    assert Sampling(temperature=0.0, stop=("a",), seed=0).given() == {"temperature": 0.0, "stop": ("a",), "seed": 0}


# --- generate ---


def test_generate_streams_what_the_library_generates(run: Run, folder: Path, lm: LM) -> None:
    options = ("--max-new-tokens", "12", "--seed", "3", "--temperature", "0.9")
    expected = lm.generate("Hello", max_new_tokens=12, seed=3, temperature=0.9)
    code, out, err = run("generate", folder, "--prompt", "Hello", *options)
    assert (code, out) == (0, expected.text + "\n")
    assert ("ended after 12 tokens" in err) == (expected.finish_reason == "length")
    assert run("generate", folder, *options, stdin="Hello\n")[1] == out


def test_generate_json_has_tokens_counts_and_logprobs(run: Run, folder: Path, lm: LM) -> None:
    expected = lm.generate("Hello", max_new_tokens=4, temperature=0, logprobs=2, prompt_logprobs=0)
    arguments = ("--max-new-tokens", "4", "--temperature", "0", "--logprobs", "2", "--prompt-logprobs", "0", "--json")
    code, out, _ = run("generate", folder, "--prompt", "Hello", *arguments)
    found = json.loads(out)
    assert code == 0
    assert found["text"] == expected.text
    assert found["tokens"] == expected.tokens
    assert found["prompt_tokens"] == expected.prompt_tokens
    assert found["finish_reason"] == expected.finish_reason
    assert expected.logprobs is not None
    assert [entry["logprob"] for entry in found["logprobs"]] == [entry.logprob for entry in expected.logprobs]
    assert len(found["logprobs"][0]["top"]) == 2
    assert len(found["prompt_logprobs"]) == expected.prompt_tokens - 1


@pytest.mark.parametrize("wrap", [False, True])
def test_generate_reads_messages(run: Run, folder: Path, lm: LM, tmp_path: Path, wrap: bool) -> None:
    file = tmp_path / "messages.json"
    file.write_text(json.dumps({"messages": [USER]} if wrap else [USER]))
    expected = lm.generate([USER], system="Be brief.", max_new_tokens=5, temperature=0)
    arguments = ("--system", "Be brief.", "--max-new-tokens", "5", "--temperature", "0", "--json")
    assert json.loads(run("generate", folder, "--messages", file, *arguments)[1])["tokens"] == expected.tokens
    found = run("generate", folder, "--messages", "-", *arguments, stdin=file.read_text())[1]
    assert json.loads(found)["tokens"] == expected.tokens


def test_generate_names_what_is_wrong_with_a_messages_file(run: Run, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "messages.json"
    for text, message in [("{", "not JSON"), ("[1]", "allowed is a list"), ('[{"role": "model"}]', "messages[0]")]:
        file.write_text(text)
        code, _, err = run("generate", folder, "--messages", file)
        assert code == 2
        assert message in err


# --- info ---

PUBLISHED = [
    ("gemma-2-2b", 2_614_341_888, 104, 832, 624),
    ("gemma-2-9b", 9_241_705_984, 336, 2688, 2016),
    ("gemma-2-27b", 27_227_128_320, 368, 2944, 2208),
]


@pytest.mark.parametrize(("size", "parameters", "kib", "full", "kept"), PUBLISHED)
def test_info_gives_the_published_numbers(run: Run, size: str, parameters: int, kib: int, full: int, kept: int) -> None:
    """Parameters: the technical report's tables; key-value bytes: layers x 2 x kv heads x head size x 2 bytes."""
    facts = json.loads(run("info", size, "--json")[1])
    assert facts["parameters"] == parameters
    assert facts["weight_bytes"] == {"bfloat16": 2 * parameters, "float32": 4 * parameters}
    assert facts["kv_bytes_per_token"] == kib * 2**10
    assert facts["kv_bytes_8192_full"] == full * 2**20
    assert facts["kv_bytes_8192"] == kept * 2**20
    _, page, _ = run("info", size)
    assert f"{parameters:,}" in page
    assert f"{kib} KiB a token" in page
    assert f"{full} MiB if every layer kept everything, {kept} MiB as kept here" in page


def test_info_of_a_folder_with_and_without_weights(run: Run, folder: Path, tmp_path: Path) -> None:
    facts = json.loads(run("info", folder, "--json")[1])
    stored = sum(tensor.nbytes for _, tensor in folder_fixtures.weights(ModelConfig.from_hf(Checkpoint(folder).config)))
    assert facts["stored_bytes"] == stored
    assert facts["shapes"]["model.layers.0-2.self_attn.q_proj.weight"] == [64, 48]
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    bare = json.loads(run("info", tmp_path, "--json")[1])
    assert bare["stored_bytes"] is None
    assert bare["parameters"] == facts["parameters"]
    assert "no weights" in run("info", tmp_path)[1]


def test_info_finds_the_longest_context_that_fits() -> None:
    config = ModelConfig.preset("gemma-2-2b")
    weights = config.num_parameters() * 2
    free = int((weights + config.kv_bytes(5000)) / info.USABLE) + 8
    fits = info._fit(config, "cpu", "test", free, free)["context_that_fits"]
    assert fits == {"bfloat16": 5000, "float32": 0}
    assert info._fit(config, "cpu", "test", 10 * free, 10 * free)["context_that_fits"]["bfloat16"] == 8192


# --- doctor ---


def test_doctor_exits_by_its_findings(run: Run, folder: Path, tmp_path: Path) -> None:
    code, out, _ = run("doctor", folder)
    assert code == 0
    assert "21 ok" in out
    config = json.loads((folder / "config.json").read_text())
    sick = tmp_path / "sick"
    folder_fixtures.gemma2(sick)
    (sick / "config.json").write_text(json.dumps({**config, "bos_token_id": 3}))
    code, out, _ = run("doctor", sick)
    assert code == 1
    assert "BOS              FAIL" in out
    assert "trap 7: the text starts with no <bos>, or with two" in out
    assert "To do: set bos_token_id to 2 in config.json" in " ".join(out.split())
    code, out, _ = run("doctor", sick, "--json")
    report = json.loads(out)
    assert (code, report["ok"]) == (1, False)
    assert [check["name"] for check in report["checks"] if check["status"] == "FAIL"] == ["BOS"]


# --- download ---


def test_download_prints_the_folder(run: Run, folder: Path) -> None:
    assert run("download", folder) == (0, f"{folder}\n", "")
    found = json.loads(run("download", folder, "--json")[1])
    assert found["files"]["model.safetensors"] == (folder / "model.safetensors").stat().st_size
    code, _, err = run("download", "nobody/nothing", "--offline")
    assert (code, "nobody/nothing" in err) == (2, True)


# --- adopt ---


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    config = {
        "model_type": "llama", "vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-5, "rope_theta": 5000.0,
        "max_position_embeddings": 128, "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2,
        "hidden_act": "silu",
    }  # fmt: skip
    tokens = tokenizer_fixtures.byte_level(tmp_path / "tokens")
    config["vocab_size"] = Tokenizer.load(tokens).vocab_size
    generator = torch.Generator().manual_seed(0)
    shapes = adopted_config(config).parameter_shapes()
    kept = {
        n: s
        for n, s in shapes.items()
        if not n.endswith(("pre_feedforward_layernorm.weight", "post_feedforward_layernorm.weight"))
    }
    tensors = (
        (name, torch.randn(shape, generator=generator) * 0.1 + (len(shape) == 1)) for name, shape in kept.items()
    )
    return write(tmp_path / "llama", tensors, config=config, copy_from=tokens)


def test_adopt_writes_what_the_functions_make(run: Run, llama: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(tokenizer_fixtures.CORPUS))
    code, out, _ = run("adopt", llama, tmp_path / "out", "--calibration", text, "--json")
    assert code == 0
    config = ModelConfig.from_hf(Checkpoint(tmp_path / "out").config)
    assert config.sliding_window == config.max_position_embeddings
    source, found = Checkpoint(llama), Checkpoint(tmp_path / "out")
    found.check(config.parameter_shapes())
    ids = Tokenizer.load(tmp_path / "out").encode(text.read_text(), bos=False)
    model, kl = carried(source, Llama(source, config), text_rows(ids, 0))
    for name, weight in model.named_parameters():
        assert torch.equal(found.tensor(name), weight.bfloat16())
    want = {"folder": str(tmp_path / "out"), "parameters": config.num_parameters(), "kl": kl}
    assert json.loads(out) == want


def test_an_adopted_model_speaks_gemma_turns(run: Run, llama: Path, tmp_path: Path) -> None:
    """ChatML's <|endoftext|>, 0, becomes <bos>; the source's own bos_token_id, 1, is <start_of_turn> here."""
    config = adopt(llama, tmp_path / "out", progress=False).config
    assert (config.bos_token_id, config.eos_token_id) == (0, 2)
    assert gemwright.load(tmp_path / "out").encode([USER])[:2] == [0, 1]
    assert run("doctor", tmp_path / "out")[0] == 0
    code, _, err = run("adopt", llama, tmp_path / "out")
    assert (code, "overwrite" in err) == (2, True)
    assert run("adopt", llama, tmp_path / "out", "--overwrite", "--window", "16")[0] == 0
    assert Checkpoint(tmp_path / "out").config["sliding_window"] == 16
    code, _, err = run("adopt", llama, tmp_path / "out", "--overwrite", "--window", "0")
    assert (code, "window: got 0, allowed is 1 or more" in err) == (2, True)


def test_adopt_refuses_what_gemma_2_cannot_hold(run: Run, folder: Path, llama: Path, tmp_path: Path) -> None:
    code, _, err = run("adopt", folder, tmp_path / "out")
    assert (code, "model_type: got 'gemma2', allowed is 'llama'" in err) == (2, True)
    config = json.loads((llama / "config.json").read_text())
    del config["tie_word_embeddings"]  # false, then, in transformers
    (llama / "config.json").write_text(json.dumps(config))
    code, _, err = run("adopt", llama, tmp_path / "out")
    assert (code, "tie_word_embeddings: got False" in err) == (2, True)
    assert not (tmp_path / "out").exists()


def test_loading_options_are_those_of_load(folder: Path) -> None:
    lm = Loading(dtype="bfloat16", device="cpu", attention="reference").load(str(folder))
    assert lm.dtype == torch.bfloat16
    assert lm.model.attention.prefill == "reference"
