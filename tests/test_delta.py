"""A delta's int8 outer products: the update they stand for, and the weight they make."""

from __future__ import annotations

import torch

from gemwright.delta import PARTS, compress, healed


def test_a_delta_is_the_best_low_rank_update_within_int8() -> None:
    generator = torch.Generator().manual_seed(4)
    update_OI = torch.randn(40, 6, generator=generator) @ torch.randn(6, 30, generator=generator)
    weight_OI = torch.randn(40, 30, generator=generator)
    parts = compress(update_OI, 6)
    assert [parts[part].dtype for part in PARTS] == [torch.int8, torch.int8, torch.float32]
    got_OI = healed(weight_OI, parts)
    assert float((got_OI - weight_OI - update_OI).norm() / update_OI.norm()) < 0.01
    # of a smaller rank: the largest outer products are kept, so the error is that of the singular values left out
    left = torch.linalg.svdvals(update_OI)[4:].square().sum().sqrt()
    error = (healed(weight_OI, compress(update_OI, 4)) - weight_OI - update_OI).norm()
    assert abs(float(error / left) - 1) < 0.01
