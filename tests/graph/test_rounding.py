"""The grid that weights are rounded to, against the definition."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from sparsepass.graph import SparsepassError
from sparsepass.graph.packed import pack, unpack
from sparsepass.graph.rounding import RoundingGrid, as_rows, fit_scales, from_rows, nearest_numbers, round_to_nearest


def slow(weight: Tensor, grid: RoundingGrid) -> Tensor:
    """One group after the other, one weight after the other."""
    size = grid.group_size or weight.shape[1]
    result = torch.zeros(weight.shape)
    for row in range(weight.shape[0]):
        for first in range(0, weight.shape[1], size):
            group = [float(value) for value in weight[row, first : first + size]]
            least, most = grid.ends
            low, high = min(0.0, *group), max(0.0, *group)
            width = (high - low) / most if not grid.symmetric else max(high, -low) / most
            scale = torch.tensor(width, dtype=torch.float32).to(torch.bfloat16)
            if float(scale) < float(torch.tensor(width, dtype=torch.float32)):
                scale = torch.nextafter(scale, torch.tensor(math.inf, dtype=torch.bfloat16))
            step = float(scale) or 1.0
            zero = 0 if grid.symmetric else max(least, min(most, round(-low / step)))
            for column, value in enumerate(group):
                nearest = nearest_fp8 if grid.format == "fp8" else round
                number = max(least, min(most, nearest(float(torch.tensor(value) / step)) + zero))
                result[row, first + column] = (number - zero) * float(scale)
    return result


def nearest_fp8(value: float) -> float:
    """By the definition of e4m3: 8 steps to each power of two from 2**-6 on, below that those of 2**-6; halves go to even."""
    exponent = max(-6, math.floor(math.log2(abs(value)))) if value else -6
    step = 2.0 ** (exponent - 3)
    return round(value / step) * step


SIZES = st.sampled_from([0, 4, 8, 64])
INTEGERS = st.builds(RoundingGrid, bits=st.sampled_from([4, 8]), group_size=SIZES, symmetric=st.booleans())
GRIDS = INTEGERS | st.builds(RoundingGrid, bits=st.just(8), group_size=SIZES, format=st.just("fp8"))


@settings(max_examples=60, derandomize=True)
@given(GRIDS, st.integers(1, 3), st.integers(1, 21), st.integers(0, 1000), st.sampled_from([0.0, 1.0, -1.0]))
def test_it_equals_the_definition(grid: RoundingGrid, rows: int, columns: int, seed: int, shift: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) + shift
    weight[torch.rand(rows, columns, generator=generator) < 0.4] = 0
    rounded = round_to_nearest(weight, grid)
    torch.testing.assert_close(rounded.weight_OI, slow(weight, grid), rtol=1e-6, atol=0)
    assert not bool(rounded.weight_OI[weight == 0].any()), "zeros are kept"
    assert rounded.numbers_OI.shape == weight.shape
    least, most = grid.ends
    numbers = rounded.numbers_OI.float()
    assert least <= float(numbers.min()) <= float(numbers.max()) <= most
    assert rounded.numbers_OI.dtype == grid.dtype


@settings(max_examples=30, derandomize=True)
@given(INTEGERS, st.integers(0, 1000))
def test_no_weight_moves_by_more_than_a_step(grid: RoundingGrid, seed: int) -> None:
    weight = torch.randn(3, 16, generator=torch.Generator().manual_seed(seed))
    rounded = round_to_nearest(weight, grid)
    steps = rounded.scales_OG.float().repeat_interleave(grid.group_size or 16, dim=1)[:, :16]
    assert bool(((rounded.weight_OI - weight).abs() <= steps * (0.5 if grid.symmetric else 1.0) * (1 + 1e-5)).all())


@settings(max_examples=60, derandomize=True)
@given(GRIDS, st.integers(0, 1000), st.sampled_from([torch.bfloat16, torch.float16, torch.float32]), st.floats(0.3, 1))
def test_what_is_on_the_grid_comes_back_bit_for_bit(grid: RoundingGrid, seed: int, dtype: torch.dtype, share: float) -> None:
    if grid.bits == 8 and not grid.symmetric and dtype == torch.bfloat16:
        return  # up to 255 steps are more than bfloat16 tells apart
    weight = torch.randn(3, 21, generator=torch.Generator().manual_seed(seed))
    scales, zeros = fit_scales(weight, grid, share)
    once = round_to_nearest(weight, grid, scales, zeros)
    again = round_to_nearest(once.weight_OI.to(dtype), grid, scales, zeros)
    assert torch.equal(once.numbers_OI.view(torch.uint8), again.numbers_OI.view(torch.uint8))
    assert not bool((once.weight_OI.signbit() & (once.weight_OI == 0)).any()), "there is no -0.0"
    assert not bool((once.numbers_OI.view(torch.uint8) == 128).any() and grid.format == "fp8"), "nor among the numbers"


@pytest.mark.parametrize(
    ("shape", "axis", "rows"),
    [((6, 8), 1, (6, 8)), ((8, 6), 0, (6, 8)), ((6, 8, 3), 1, (6, 24)), ((2, 6, 8), 2, (2, 6, 8)), ((2, 8, 6), 1, (2, 6, 8))],
)
def test_rows_of_every_layout_and_back(shape: tuple[int, ...], axis: int, rows: tuple[int, ...]) -> None:
    weight = torch.randn(shape)
    found = as_rows(weight, axis, len(rows))
    assert found.shape == rows
    assert torch.equal(from_rows(found, axis, weight), weight)


def test_axes_before_the_rows_are_rows() -> None:
    weight = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0))
    whole = round_to_nearest(weight, RoundingGrid(group_size=8)).weight_OI
    assert all(torch.equal(whole[i], round_to_nearest(weight[i], RoundingGrid(group_size=8)).weight_OI) for i in range(2))


@pytest.mark.parametrize("values", ["int4", "int8"])
def test_the_packed_form_has_the_same_values(values: str) -> None:
    """Zeros decide nothing, so a 2:4 weight is rounded alike with and without them."""
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    weight.view(4, 16, 4)[..., 2:] = 0
    grid = RoundingGrid(bits=4 if values == "int4" else 8, group_size=32)
    assert torch.equal(
        unpack(pack(weight, values=values, group_size=32)),  # type: ignore[arg-type]
        round_to_nearest(weight, grid).weight_OI,
    )


def test_scales_that_are_given() -> None:
    rounded = round_to_nearest(torch.tensor([[1.0, 0.4]]), RoundingGrid(group_size=2), torch.tensor([[0.5]]))
    assert rounded.weight_OI.tolist() == [[1.0, 0.5]]


def test_every_number_of_fp8_is_kept_and_none_is_beyond_it() -> None:
    bits = torch.arange(256, dtype=torch.int16).to(torch.uint8)
    values = bits.view(torch.float8_e4m3fn).float()
    values = values[values.isfinite()][None]
    grid = RoundingGrid(bits=8, group_size=0, format="fp8")
    assert torch.equal(round_to_nearest(values, grid).weight_OI, values)
    beyond = nearest_numbers(torch.tensor([1e9, -1e9, 449.0, -1e-9]), grid, torch.tensor(1.0), None)
    assert beyond.tolist() == [448.0, -448.0, 448.0, 0.0]
    assert not bool(beyond[-1].signbit())


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"bits": 8, "format": "fp4"}, "int or fp8, not to 'fp4'"),
        ({"bits": 4, "format": "fp8"}, "format=fp8 has 8 bits, not 4; leave bits out"),
        ({"bits": 8, "format": "fp8", "symmetric": False}, "no zero points, so symmetric=false is for integers"),
    ],
)
def test_there_are_no_other_grids(given: dict[str, Any], told: str) -> None:
    with pytest.raises(SparsepassError, match=told):
        RoundingGrid(**given)


def test_what_is_not_finite_is_refused() -> None:
    with pytest.raises(SparsepassError, match="not finite"):
        round_to_nearest(torch.tensor([[math.inf, 1.0]]), RoundingGrid())


def test_a_group_of_zeros() -> None:
    assert not bool(round_to_nearest(torch.zeros(2, 8), RoundingGrid()).weight_OI.any())
    assert not bool(round_to_nearest(torch.zeros(2, 8), RoundingGrid(symmetric=False)).weight_OI.any())
