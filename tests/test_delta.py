"""A delta's outer products of vectors in 8 and 4 bits: the update they stand for, and the weight they make."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gemwright.delta import LEADING, PARTS, compress, healed, on_grid, packed


def error(got: Tensor, want: Tensor) -> float:
    return float((got - want).square().sum() / want.square().sum())


def test_a_delta_is_nearly_the_best_low_rank_update() -> None:
    """Rounding costs some percent of the square; a smaller rank costs what the other singular values hold, too."""
    generator = torch.Generator().manual_seed(4)
    update_OI = torch.randn(400, 60, generator=generator) @ torch.randn(60, 300, generator=generator)
    weight_OI = torch.randn(400, 300, generator=generator)
    parts = compress(update_OI, 60)
    shapes = {"lead_A": (12, 300), "lead_B": (12, 400), "lora_A": (48, 150), "lora_B": (48, 200), "scale": (60,)}
    assert {part: tuple(parts[part].shape) for part in PARTS} == shapes
    assert {parts[part].dtype for part in PARTS} == {torch.int8, torch.uint8, torch.float32}
    assert error(healed(weight_OI, parts) - weight_OI, update_OI) < 0.03
    left = float(torch.linalg.svdvals(update_OI)[40:].square().sum() / update_OI.square().sum())
    assert left < error(healed(weight_OI, compress(update_OI, 40)) - weight_OI, update_OI) < left + 0.03


def test_what_was_trained_on_the_grid_is_shipped_as_it_was() -> None:
    generator = torch.Generator().manual_seed(5)
    r = LEADING + 6
    a_rI, b_rO = (torch.randn(r, n, generator=generator) * torch.rand(r, 1, generator=generator) for n in (30, 40))
    a_rI[0] = 0  # a vector that was never trained has no grid
    parts = packed(a_rI, b_rO)
    torch.testing.assert_close(healed(torch.zeros(40, 30), parts), on_grid(b_rO).mT @ on_grid(a_rI))


def test_the_gradient_passes_the_grid() -> None:
    """Of four bits small numbers beside a large one are nothing; of eight they are there."""
    x_rn = torch.tensor([[0.1, -0.2, 9.0, 0.3]]).repeat(LEADING + 1, 1).requires_grad_()
    rounded_rn = on_grid(x_rn)
    assert [int((row == 0).sum()) for row in rounded_rn[-2:]] == [0, 3]
    wanted = torch.arange(4.0 * len(x_rn)).view(-1, 4)
    (grad,) = torch.autograd.grad(rounded_rn, x_rn, wanted)
    assert torch.equal(grad, wanted)


def test_an_odd_number_of_features_is_refused() -> None:
    with pytest.raises(ValueError, match="out: got 3 features"):
        packed(torch.ones(1, 2), torch.ones(1, 3))
