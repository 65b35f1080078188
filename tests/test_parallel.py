"""Tensor parallelism: two gloo ranks, started by torchrun, compute what one rank computes.

The ranks run `parallel_worker.py` once; the tests read what they found.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import debug, distance, noise, weights
from parallel_worker import generated, logits, measure
from safetensors.torch import load_file
from torch import Tensor, nn

from gemwright.checkpoint import write
from gemwright.config import ModelConfig
from gemwright.loader import load_model
from gemwright.lora import LoraConfig, add_lora, save_adapter
from gemwright.model import Gemma2
from gemwright.parallel import ParallelLinear, TensorParallel, shard_config

ROOT = Path(__file__).resolve().parent.parent
WORLD = 2
TRAITS: dict[str, dict[str, object]] = {
    "plain": {},
    "attention_cap": {"attn_logit_softcapping": None},
    "final_cap": {"final_logit_softcapping": None},
    "window": {"sliding_window": 7},
    "query_scale": {"query_pre_attn_scalar": 16},
    "layer_order": {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
}


def adapter(folder: Path) -> None:
    model = Gemma2(debug())
    model.load_state_dict(weights(debug()) | {"lm_head.weight": weights(debug())["model.embed_tokens.weight"]})
    for name in add_lora(model, LoraConfig(rank=3, alpha=4)):
        nn.init.normal_(model.get_submodule(name).lora_B, std=0.3)  # type: ignore[arg-type]
    save_adapter(model, folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One model for each trait, on the same weights, and one in bf16."""
    root = tmp_path_factory.mktemp("parallel")
    for trait, changes in TRAITS.items():
        write(root / trait, weights(debug()).items(), config=debug(**changes).to_hf())
    adapter(root / "plain" / "adapter")
    halves = ((name, w.bfloat16()) for name, w in weights(debug()).items())
    write(root / "bf16", halves, config=debug(dtype="bfloat16").to_hf())
    return [root / name for name in (*TRAITS, "bf16")]


@pytest.fixture(scope="module")
def two(
    folders: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> list[tuple[dict[str, Tensor], dict[str, Any]]]:
    """What each of two ranks found."""
    out = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(WORLD)]
    worker = [str(ROOT / "tests/parallel_worker.py"), str(out), *map(str, folders)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command + worker, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [
        (load_file(out / f"{rank}.safetensors"), json.loads((out / f"{rank}.json").read_text()))
        for rank in range(WORLD)
    ]


@pytest.fixture(scope="module")
def one(folders: list[Path]) -> dict[str, Tensor]:
    """What one process finds."""
    torch.set_num_threads(1)
    return {name: t for folder in folders for name, t in measure(folder, None).items()}


def test_two_ranks_equal_one(two: list[tuple[dict[str, Tensor], Any]], one: dict[str, Tensor]) -> None:
    """Past the window and both caps, whole, in chunks and token by token, packed and not, with an adapter."""
    for name, want in one.items():
        if not name.startswith("bf16"):
            assert distance(two[0][0][name], want) < 1e-5, name


def test_bf16_partial_sums_round_no_worse(
    two: list[tuple[dict[str, Tensor], Any]], one: dict[str, Tensor], folders: list[Path]
) -> None:
    model = load_model(folders[-1], device=torch.device("cpu"), dtype="float32", pack=False)
    truth = logits(model, 1, None)
    for name, alone in one.items():
        if name.startswith("bf16"):
            assert noise(two[0][0][name], truth) < 1.5 * noise(alone, truth), name


def test_every_trait_moves_two_ranks(two: list[tuple[dict[str, Tensor], Any]]) -> None:
    plain = two[0][0]
    for trait in TRAITS.keys() - {"plain"}:
        for way in ("pack=False chunk=None", "pack=True chunk=5", "pack=True chunk=1"):
            assert distance(plain[f"{trait} {way}"], plain[f"plain {way}"]) > 2e-3, (trait, way)
    assert distance(plain["plain adapter"][1], plain["plain unloaded"][1]) > 1e-2
    assert torch.equal(plain["plain adapter"][0], plain["plain unloaded"][0])


def test_ranks_have_the_same_bits(two: list[tuple[dict[str, Tensor], Any]]) -> None:
    """They sample alone, and must draw the same tokens."""
    for name in two[0][0]:
        if not name.startswith("weight"):
            assert torch.equal(two[0][0][name], two[1][0][name]), name


def test_a_rank_holds_its_slices(two: list[tuple[dict[str, Tensor], dict[str, Any]]]) -> None:
    config, state = debug(), weights(debug())
    for rank, (_, facts) in enumerate(two):
        assert facts["rank"] == [rank, WORLD]
        assert facts["heads"] == config.num_key_value_heads  # the model's config is the whole model's
        shapes = {name.replace(".linear.", "."): tuple(s) for name, s in facts["shapes"].items()}
        due = shard_config(config, WORLD).parameter_shapes()
        assert {name: shapes[name] for name in due} == due
    for name in (n for n in state if n.startswith("model.layers.0.") and n.endswith("_proj.weight")):
        dim = 1 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0
        held = "weight " + name.replace("_proj.", "_proj.linear.")
        assert torch.equal(torch.cat([tensors[held] for tensors, _ in two], dim), state[name]), name


def test_the_engine_over_two_ranks_yields_what_it_yields_alone(
    two: list[tuple[Any, dict[str, Any]]], folders: list[Path]
) -> None:
    first = two[0][1]
    assert generated(load_model(folders[0], device=torch.device("cpu"), pack=False), None) == first["generated"]
    assert [facts["generated"] for _, facts in two] == [first["generated"]] * 2
    assert len(first["unseeded"]) == 12, "rank 0 draws the seed for all"
    assert [facts["unseeded"] for _, facts in two] == [first["unseeded"]] * 2


def test_ranks_repeat_what_rank_0_calls(two: list[tuple[Any, dict[str, Any]]]) -> None:
    leader, follower = (facts["mirrored"] for _, facts in two)
    assert follower == [[1, "\u00e4\U0001f600" * 1000], 6, [2, ""]]
    assert leader == [follower[0], "refused here, unknown there", *follower[1:]]
    assert [facts["broadcast"] for _, facts in two] == [{"none": None, "half": 0.5}] * 2


@pytest.mark.parametrize(
    ("config", "world", "message"),
    [
        (ModelConfig.preset("gemma-2-2b"), 8, "num_key_value_heads: got 4, which 8 ranks do not divide.* 1, 2, 4$"),
        (ModelConfig.preset("gemma-2-9b"), 3, "num_key_value_heads: got 8, which 3 ranks do not divide.* 1, 2, 4, 8$"),
        (debug(intermediate_size=97), 2, "intermediate_size: got 97, which 2 ranks do not divide.* are 1$"),
    ],
)
def test_what_does_not_divide_is_refused(config: ModelConfig, world: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shard_config(config, world)


def test_27b_over_eight_ranks() -> None:
    """Head size and hidden size are not cut: 32 x 128 is not 4608."""
    part = shard_config(ModelConfig.preset("gemma-2-27b"), 8)
    assert (part.num_attention_heads, part.num_key_value_heads, part.intermediate_size) == (4, 2, 4608)
    assert (part.hidden_size, part.head_dim, part.scale) == (4608, 128, 1 / 12)


def test_join_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="RANK: not set; tensor parallelism starts with: torchrun"):
        TensorParallel.join().__enter__()
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="device: got 'tpu', allowed under torchrun are auto, cpu, cuda"):
        TensorParallel.join("tpu").__enter__()
    monkeypatch.setenv("LOCAL_RANK", "64")
    with pytest.raises(ValueError, match="device: process 64 of this machine has no GPU of its own"):
        TensorParallel.join("cuda").__enter__()


def test_training_a_part_is_refused() -> None:
    model = Gemma2(debug())
    attention = model.model.layers[0].self_attn
    attention.q_proj = ParallelLinear(attention.q_proj, 0, slice(0, 64))  # type: ignore[union-attr, arg-type]
    with pytest.raises(ValueError, match=r"q_proj is a ParallelLinear; allowed is a linear without"):
        add_lora(model, LoraConfig())
