"""load_model: dtypes, devices, strictness, and the CPU linears it puts in place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from folder_fixtures import gemma2
from oracle import positions, relative, tokens
from torch import nn

from gemwright.checkpoint import Checkpoint, CheckpointError
from gemwright.config import ConfigError
from gemwright.loader import choose_device, load_model
from gemwright.ops import linear
from gemwright.ops.linear import NativeLinear, PackedLinear, UpcastLinear

CPU = torch.device("cpu")


def tiny(folder: Path, **options: Any) -> Path:
    gemma2(folder, **options)
    return folder


def edit(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_arrive_bit_for_bit(tmp_path: Path, stored: torch.dtype) -> None:
    folder = tiny(tmp_path / "m", dtype=stored)
    model = load_model(folder, device=CPU, pack=False)
    checkpoint = Checkpoint(folder)
    want = torch.float32 if stored == torch.float16 else stored  # a CPU does not compute in fp16
    for name, parameter in model.named_parameters():
        assert parameter.dtype == want
        assert torch.equal(parameter, checkpoint.tensor(name).to(want)), name
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not any(p.requires_grad or p.is_meta for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packing_changes_no_result(tmp_path: Path, dtype: torch.dtype) -> None:
    """The packed model against the plain one: fp32 within rounding, bf16 within its own rounding against fp32."""
    folder = tiny(tmp_path / "m", dtype=dtype)
    plain, packed = (load_model(folder, device=CPU, dtype=dtype, pack=pack) for pack in (False, True))
    truth = load_model(folder, device=CPU, dtype=torch.float32, pack=False)
    ids = tokens(plain.config, 1, 20)
    with torch.no_grad():
        want, a, b = (m.logits(m(ids, positions(1, 20))) for m in (truth, plain, packed))
    assert relative(b, want) <= 1.5 * relative(a, want) + 1e-5


def test_bf16_linears_are_replaced_on_cpu(tmp_path: Path) -> None:
    model = load_model(tiny(tmp_path / "m", dtype=torch.bfloat16), device=CPU)
    kinds = {type(m) for n, m in model.named_modules() if n.endswith("_proj") or n == "lm_head"}
    assert kinds <= {PackedLinear, NativeLinear, UpcastLinear}
    if kinds != {PackedLinear}:
        assert model.lm_head.weight is model.model.embed_tokens.weight  # no second copy of the head


@pytest.mark.parametrize("rows", [1, linear.FEW_ROWS, linear.FEW_ROWS + 1, 70])
def test_upcast_linear_is_at_least_as_exact_as_bf16(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Odd sizes, several tiles with a ragged last one; against fp64."""
    monkeypatch.setattr(linear, "TILE_BYTES", 1)  # tiles of 64 rows
    plain = nn.Linear(95, 201, bias=False).bfloat16().requires_grad_(False)
    x = torch.randn(rows, 95).bfloat16()
    truth = x.double() @ plain.weight.double().T
    upcast = UpcastLinear(plain)(x)
    assert upcast.dtype == torch.bfloat16
    assert relative(upcast, truth) <= relative(plain(x), truth) + 1e-6
    assert torch.equal(UpcastLinear(plain)(x[None]), upcast[None])


def test_packed_linear_in_fp32() -> None:
    plain = nn.Linear(96, 200, bias=False).requires_grad_(False)
    for rows in (1, 33):
        x = torch.randn(rows, 96)
        assert relative(PackedLinear(plain)(x), plain(x)) < 1e-5


def test_fp16_is_refused_where_activations_overflow(tmp_path: Path) -> None:
    folder = tiny(tmp_path / "m", hidden_size=4608, num_hidden_layers=1, intermediate_size=8)
    with pytest.raises(ValueError, match=r"dtype: got float16 .*65504.*bfloat16"):
        load_model(folder, device=CPU, dtype="float16")
    load_model(folder, device=CPU, dtype="bfloat16")


@pytest.mark.parametrize("dtype", ["int8", "float64", "half", 3])
def test_other_dtypes_are_refused(tmp_path: Path, dtype: object) -> None:
    with pytest.raises(ValueError, match="dtype: got"):
        load_model(tiny(tmp_path / "m"), device=CPU, dtype=dtype)  # type: ignore[arg-type]


def test_devices() -> None:
    assert choose_device("cpu") == CPU
    assert choose_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ValueError, match="device: got 'tpu-of-mine'"):
        choose_device("tpu-of-mine")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no CUDA device"):
            choose_device("cuda")


def test_padded_vocabulary_is_cropped(tmp_path: Path) -> None:
    """A table of 256128 rows for 256000 tokens, in small: the surplus rows are not part of the model."""
    folder = tiny(tmp_path / "m")
    vocab = Checkpoint(folder).config["vocab_size"]
    edit(folder, vocab_size=vocab - 16)
    model = load_model(folder, device=CPU, pack=False)
    assert model.model.embed_tokens.weight.shape[0] == vocab - 16
    assert model.logits(torch.randn(1, 48)).shape[1] == vocab - 16


def test_what_does_not_fit_is_one_error(tmp_path: Path) -> None:
    folder = tiny(tmp_path / "m")
    edit(folder, num_hidden_layers=4, layer_types=None)
    with pytest.raises(CheckpointError, match=r"model\.layers\.3\."):
        load_model(folder, device=CPU)
    edit(folder, num_hidden_layers=3, attention_bias=True)
    with pytest.raises(ConfigError, match="attention_bias: got True"):
        load_model(folder, device=CPU)


def test_an_attention_that_cannot_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="attention: got 'flash'"):
        load_model(tiny(tmp_path / "m"), device=CPU, attention="flash")
