"""NF4: levels and layout against the paper's construction and bitsandbytes, the linear against the dense one.

Legend: X rows, D in, F out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import folder_fixtures
import pytest
import torch
from head_fixtures import Meter
from oracle import forward, relative, tokens
from torch import Tensor, nn
from torch.nn import functional as F

from gemwright.loader import load_model
from gemwright.lora import LoraConfig, LoRALinear, add_lora
from gemwright.ops import native
from gemwright.quant import nf4
from gemwright.quant.nf4 import BLOCK, LEVELS, Nf4Linear, dequantize, quantize

CPU = torch.device("cpu")
SHAPES = [(64, 64), (7, 48), (5, 300), (1, 1), (200, 640)]


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (0.02 * torch.randn(*shape)).to(dtype)


def test_levels_are_the_quantiles_of_a_normal_distribution() -> None:
    """Appendix E of the paper: 8 quantiles below zero and 9 above that share it, over the largest."""
    edge = 0.5 * (1 / 32 + 1 / 30)
    below = torch.special.ndtri(torch.linspace(edge, 0.5, 8, dtype=torch.float64))
    above = torch.special.ndtri(torch.linspace(0.5, 1 - edge, 9, dtype=torch.float64))
    want = torch.cat((below, above[1:])) / above[-1]
    torch.testing.assert_close(torch.tensor(LEVELS, dtype=torch.float64), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_weight_becomes_its_nearest_level(shape: tuple[int, int]) -> None:
    """By brute force over the 16 levels; scales within half a step of the true ones."""
    weight = normal(*shape)
    held = quantize(weight)
    got = dequantize(held, torch.float32)
    blocks = F.pad(weight.flatten(), (0, -weight.numel() % BLOCK)).view(-1, BLOCK)
    absmax = blocks.abs().amax(-1)
    kept = (held.offset + held.steps[:, None] * held.scales).flatten()[: len(absmax)]
    assert (kept - absmax).abs().max() <= held.steps.max() / 2 * 1.001
    levels = torch.tensor(LEVELS)
    nearest = (blocks[..., None] / absmax[:, None, None] - levels).abs().argmin(-1)
    want = (levels[nearest] * kept[:, None]).flatten()[: weight.numel()].view(shape)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    assert held.packed_P.nbytes + held.scales.nbytes <= weight.numel() * (4 + 8 / 64) / 8 + 32 + 256


def test_bytes_of_a_2b_layer() -> None:
    """4.13 bits a weight: the buffers of gate_proj are 10.96 MB, where bf16 has 42.5."""
    layer = Nf4Linear(quantize(normal(9216, 2304)))
    held = sum(buffer.nbytes for buffer in layer.buffers())
    assert held * 8 / (9216 * 2304) == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-3)


def test_what_is_zero_or_not_finite() -> None:
    """A block of zeros, and zeros among others, stay exactly zero; a weight that is not finite is refused."""
    weight = normal(4, 64)
    weight[1] = 0
    weight[2, 5] = 0
    got = dequantize(quantize(weight), torch.float32)
    assert got[2, 5] == 0 and not dequantize(quantize(torch.zeros(3, 64)), torch.float32).any()
    assert got[1].abs().max() <= quantize(weight).steps.max()
    for bad in (torch.nan, torch.inf):
        weight[0, 0] = bad
        with pytest.raises(ValueError, match="not finite"):
            quantize(weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_native_kernel_has_the_same_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    if native.library() is None:
        pytest.skip("no C compiler")
    for shape in SHAPES:
        held = quantize(normal(*shape))
        fast = dequantize(held, dtype)
        with monkeypatch.context() as patch:
            patch.setattr(native, "library", lambda: None)
            assert torch.equal(dequantize(held, dtype), fast)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_good_as_bitsandbytes(dtype: torch.dtype) -> None:
    """The same levels for the same scales; the error of a double-quantized weight is theirs within 1 %."""
    functional: Any = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    weight = normal(96, 320, dtype=dtype)
    packed, state = functional.quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4", compress_statistics=True)
    theirs = functional.dequantize_4bit(packed, state).float()
    ours = dequantize(quantize(weight), torch.float32)
    errors = [float((x - weight.float()).norm() / weight.float().norm()) for x in (ours, theirs)]
    assert errors[0] < 1.01 * errors[1]
    assert float((ours - theirs).norm() / theirs.norm()) < 0.02  # scales differ in their last bits
    assert (quantize(weight).packed_P == packed.flatten()).float().mean() > 0.999


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_linear_is_the_dense_one_over_the_dequantized_weight(dtype: torch.dtype) -> None:
    """Output and gradient of the input, bit for bit; nothing of the weight is kept between forward and backward."""
    linear = nn.Linear(640, 200, bias=False, dtype=dtype)
    layer = nf4.make("any", linear)
    assert isinstance(layer, Nf4Linear)
    weight = dequantize(layer.quantized(), dtype)
    x = torch.randn(3, 5, 640, dtype=dtype, requires_grad=True)
    outer = torch.randn(3, 5, 200, dtype=dtype)
    with Meter() as meter:
        got = layer(x)
        assert meter.now <= got.nbytes + 512
        (mine,) = torch.autograd.grad(got, x, outer)
    want = F.linear(x, weight)
    assert torch.equal(got, want)
    assert torch.equal(mine, torch.autograd.grad(want, x, outer)[0])
    assert not list(layer.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


def test_a_model_is_quantized_while_it_is_read(tmp_path: Path) -> None:
    """Every projection, one after the other, from the file; the model computes with the dequantized weights."""
    folder_fixtures.gemma2(tmp_path / "base")
    seen: list[int] = []

    def watched(name: str, linear: nn.Linear) -> nn.Module:
        full = [m for m in made.modules() if isinstance(m, nn.Linear) and not m.weight.is_meta] if seen else []
        seen.append(len(full))
        return nf4.make(name, linear)

    made = load_model(tmp_path / "base", device=CPU, pack=False)
    dense = load_model(tmp_path / "base", device=CPU, pack=False)
    model = load_model(tmp_path / "base", device=CPU, dtype=torch.float32, swaps={r".*_proj": watched})
    names = [name for name, module in model.named_modules() if isinstance(module, Nf4Linear)]
    assert len(seen) == len(names) == 7 * model.config.num_hidden_layers
    text = tokens(model.config, 2, 12)
    got = forward(model, text)
    assert relative(got, forward(dense, text)) > 1e-3
    for name in names:
        layer = model.get_submodule(name)
        assert isinstance(layer, Nf4Linear)
        dense.get_submodule(name).weight.data = dequantize(layer.quantized(), torch.float32)
    assert relative(got, forward(dense, text)) < 1e-6
    assert add_lora(model, LoraConfig(rank=2))
    assert relative(forward(model, text), got) < 1e-6
    assert isinstance(model.get_submodule(names[0]), LoRALinear)
    with pytest.raises(ValueError, match=r"swaps: no projection matches \['other'\]"):
        load_model(tmp_path / "base", device=CPU, swaps={"other": nf4.make})


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(dtype: torch.dtype) -> None:
    weight = normal(200, 640)
    held, there = quantize(weight), quantize(weight.cuda())
    assert torch.equal(held.packed_P, there.packed_P.cpu())
    torch.testing.assert_close(dequantize(there, dtype).cpu(), dequantize(held, dtype), rtol=2**-7, atol=0)
