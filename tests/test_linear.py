"""Which linear a processor gets, and the native one against fp64 on both sides of its limit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gemwright.ops import linear, native
from gemwright.ops.linear import NativeLinear, UpcastLinear, cpu_linear


def plain(D: int, out: int, dtype: torch.dtype) -> nn.Linear:
    return nn.Linear(D, out, bias=False).to(dtype).requires_grad_(False)


@pytest.mark.skipif(native.library() is None, reason="needs a C compiler")
@pytest.mark.parametrize("rows", [1, 40, linear.MANY_ROWS, linear.MANY_ROWS + 1])
def test_native_linear(rows: int) -> None:
    module = plain(95, 201, torch.bfloat16)
    swapped = NativeLinear(module)
    assert swapped.weight is module.weight  # shared with a tied embedding, not copied
    x = torch.randn(2, rows, 95).bfloat16()[1:]
    truth = x.double() @ module.weight.double().T
    got, naive = swapped(x), F.linear(x, module.weight)
    assert got.dtype == torch.bfloat16
    assert got.shape == truth.shape
    assert (got.double() - truth).norm() <= (naive.double() - truth).norm() + 1e-6 * truth.norm()


def test_the_native_kernel_serves_up_to_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    served = []

    def linear_of(x: Tensor, w: Tensor) -> Tensor:
        served.append(x.shape)
        return F.linear(x, w)

    monkeypatch.setattr(native, "linear", linear_of)
    module = NativeLinear(plain(8, 4, torch.bfloat16))
    for shape in ((1, 8), (2, linear.MANY_ROWS // 2, 8), (2, linear.MANY_ROWS // 2 + 1, 8)):
        module(torch.ones(shape).bfloat16())
    assert served == [(1, 8), (2, linear.MANY_ROWS // 2, 8)]


class Packed(nn.Module):
    """Stands for PackedLinear, which a processor without its instructions cannot make."""

    def __init__(self, _: nn.Linear, *, keep: bool) -> None:
        super().__init__()


@pytest.mark.parametrize(
    ("fast_bf16", "compiler", "dtype", "want"),
    [
        (True, True, torch.bfloat16, Packed),
        (True, False, torch.float32, Packed),
        (False, True, torch.bfloat16, NativeLinear),
        (False, False, torch.bfloat16, UpcastLinear),
        (False, True, torch.float32, nn.Linear),
    ],
)
def test_the_choice(
    monkeypatch: pytest.MonkeyPatch, fast_bf16: bool, compiler: bool, dtype: torch.dtype, want: type[nn.Module]
) -> None:
    monkeypatch.setattr(linear, "has_fast_bf16", lambda: fast_bf16)
    monkeypatch.setattr(linear, "PackedLinear", Packed)
    monkeypatch.setattr(native, "library", lambda: object() if compiler else None)
    assert type(cpu_linear(plain(8, 4, dtype))) is want
