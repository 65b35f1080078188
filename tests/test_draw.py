"""Noise and selection on rows: against plain definitions in Python integers, and against full sorts."""

from __future__ import annotations

import math

import pytest
import torch

from gemwright.ops import native
from gemwright.ops.draw import derived, draw, draw_row, gumbel, largest, likeliest, unpack

ROWS = torch.tensor([[3], [-7], [2**63 - 1]])
POSITIONS = torch.tensor([[0], [1], [8191]])


def splitmix(x: int) -> int:
    """SplitMix64's output function on unsigned integers."""
    mask = 2**64 - 1
    x = (x + 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


def slow_gumbel(seed: int, position: int, i: int) -> float:
    bits = splitmix(splitmix(splitmix(seed % 2**64) + position) + i) >> 12
    return -math.log(-math.log((bits + 0.5) / 2**52))


def test_noise_is_the_hash_in_plain_integers() -> None:
    ids = torch.tensor([0, 1, 255_999])
    got = gumbel(ROWS, POSITIONS, ids)
    for row in range(3):
        for column, i in enumerate(ids.tolist()):
            want = slow_gumbel(int(ROWS[row]), int(POSITIONS[row]), i)
            assert float(got[row, column]) == pytest.approx(want, rel=1e-12)


def test_noise_is_gumbel_and_its_streams_are_unrelated() -> None:
    ids = torch.arange(200_000)
    zero = torch.tensor(0)
    noise = gumbel(zero, zero, ids)
    assert abs(float(noise.mean()) - 0.5772) < 0.02  # Euler's constant
    assert abs(float(noise.var()) - math.pi**2 / 6) < 0.05
    for other in (
        gumbel(zero + 1, zero, ids), gumbel(zero, zero + 1, ids), gumbel(torch.tensor(derived(0, 1)), zero, ids)
    ):  # fmt: skip
        assert abs(float(torch.corrcoef(torch.stack([noise, other]))[0, 1])) < 0.01
    # neighbours must not be the same stream shifted: (seed, position + 1, id) is not (seed, position, id + 1)
    assert not torch.allclose(gumbel(zero, zero + 1, ids)[:-1], noise[1:])


def test_derived_seeds_are_as_many_as_their_indices() -> None:
    assert len({derived(seed, index) for seed in (0, 1, -5) for index in range(1, 128)}) == 3 * 127


@pytest.mark.parametrize("V", [1, 700, 768, 49152])
def test_likeliest_and_largest_are_those_of_a_sort(V: int) -> None:
    """768 and 49152 are cut in blocks; coarse values make ties, of which `likeliest` takes the first."""
    values = torch.randn(3, V)
    coarse = (values * 2).round()
    want = [row.index(max(row)) for row in coarse.tolist()]
    assert likeliest(coarse).tolist() == want
    for k in {1, min(V, 5), min(V, 128)}:
        found, ids = largest(values, k)
        assert torch.equal(found, values.sort(descending=True).values[:, :k])
        assert torch.equal(values.gather(1, ids), found)
        tied, ids = largest(coarse, k)
        assert torch.equal(coarse.gather(1, ids), tied)
        assert all(len(set(row)) == k for row in ids.tolist())


@pytest.mark.parametrize("room", [None, 8, 100], ids=["torch", "native", "native without room"])
@pytest.mark.parametrize("spread", [0.0, 0.1, 3.0, 30.0])
@pytest.mark.parametrize("V", [64, 65, 1000, 16384])
def test_a_row_is_drawn_from_as_by_the_definition(
    V: int, spread: float, room: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flat rows, where noise alone decides, and peaked ones, where almost none of it is looked at."""
    if room is None:
        monkeypatch.setattr(native, "library", lambda: None)
    elif native.library() is None:
        pytest.skip("needs the native kernels")
    monkeypatch.setattr("gemwright.ops.draw.ROOM", room)
    scaled = torch.randn(24, V) * spread
    seeds, positions = torch.arange(24)[:, None], torch.arange(24)[:, None] * 3
    want = draw(scaled, torch.arange(V).expand(24, V), seeds, positions)
    assert torch.equal(draw_row(scaled, seeds, positions), want)
    assert spread == 30.0 or len(set(want.tolist())) > 12


@pytest.mark.skipif(native.library() is None, reason="needs the native kernels")
def test_noise_that_may_win_is_found_by_the_kernel() -> None:
    keys, least = torch.tensor([5, -(2**63), 2**63 - 1]), torch.tensor([0, 2**51, 2**52])
    ids, counts = native.noisy_ids(keys, least, 1300, room=700)
    for key, bits, row, count in zip(keys, least, ids, counts.tolist(), strict=True):
        want = [v for v in range(1300) if splitmix((int(key) + v) % 2**64) >> 12 >= int(bits)]
        assert count == len(want)
        assert row.tolist()[: min(count, 700)] == want[:700]


def test_a_row_with_few_finite_values_is_drawn_from() -> None:
    scaled = torch.full((50, 1024), -torch.inf)
    scaled[:, [3, 900]] = 1.0
    drawn = draw_row(scaled, torch.arange(50)[:, None], torch.zeros(50, 1, dtype=torch.int64)).tolist()
    assert set(drawn) == {3, 900}


def test_unpack_reads_bit_by_bit() -> None:
    words = torch.tensor([[1, -(2**31)], [6, -1]], dtype=torch.int32)
    assert unpack(words, 40).nonzero().tolist() == [[0, 0], [1, 1], [1, 2], *([1, v] for v in range(32, 40))]
    assert unpack(words, 64).nonzero().tolist()[:2] == [[0, 0], [0, 63]]
