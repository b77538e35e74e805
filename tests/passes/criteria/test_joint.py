"""Rounding column by column against the definition, in float64."""

import pytest
import torch
from torch import Tensor

from sparsepass.graph import SparsepassError
from sparsepass.graph.rounding import RoundingGrid, fit_scales, round_to_nearest
from sparsepass.passes.criteria import CriterionOptions, InverseHessian, round_jointly
from sparsepass.passes.criteria.sparsegpt import sparsegpt
from sparsepass.passes.maths import InputStatistics, NMPattern, clipped_scales, nm_mask

pytestmark = pytest.mark.numerics
ROWS, COLUMNS, TOKENS = 6, 40, 200
TWO_FOUR = NMPattern(2, 4)


def _problem(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(ROWS, COLUMNS, generator=generator, dtype=torch.float64)
    inputs = torch.randn(TOKENS, COLUMNS, generator=generator, dtype=torch.float64)
    inputs = inputs @ torch.randn(COLUMNS, COLUMNS, generator=generator, dtype=torch.float64)
    return weight, inputs.T @ inputs


def _slow(
    weight: Tensor, upper: Tensor, grid: RoundingGrid, mask: Tensor | None, pattern: NMPattern | None
) -> tuple[Tensor, Tensor]:
    """One row after the other, one column after the other, every update at once."""
    size = grid.group_size or COLUMNS
    whole = RoundingGrid(bits=grid.bits, group_size=0, symmetric=grid.symmetric)
    result, kept = torch.zeros_like(weight), torch.ones_like(weight, dtype=torch.bool) if mask is None else mask.clone()
    for row in range(len(weight)):
        w = weight[row].clone()
        scales = zeros = torch.zeros(1)
        for column in range(COLUMNS):
            if column % size == 0:
                last = min(column + size, COLUMNS)
                seen = kept[row, column:last]
                if pattern is not None:
                    seen = nm_mask((w / upper.diagonal()).abs()[column:last], pattern)
                scales, found = fit_scales((w[column:last] * seen)[None], whole)
                zeros = torch.zeros(1, 1) if found is None else found
            if pattern is not None and column % pattern.m == 0:
                part = slice(column, column + pattern.m)
                kept[row, part] = nm_mask((w[part] / upper.diagonal()[part]).abs(), pattern)
            if kept[row, column]:
                least, most = grid.ends
                number = (w[column] / float(scales) + 0).round() + float(zeros)
                result[row, column] = (number.clamp(least, most) - float(zeros)) * float(scales)
            error = (w[column] - result[row, column]) / upper[column, column]
            w[column + 1 :] -= error * upper[column, column + 1 :]
    return result, kept


@pytest.mark.parametrize("block_size", [1, 32, 128])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [0, 16])
@pytest.mark.parametrize("how", ["choose", "keep", "dense"])
def test_it_equals_the_definition(how: str, group_size: int, symmetric: bool, block_size: int) -> None:
    weight, gram = _problem()
    options = CriterionOptions(block_size=block_size)
    hessian = InverseHessian.of(gram, TOKENS, options)
    grid = RoundingGrid(group_size=group_size, symmetric=symmetric)
    mask = {"choose": None, "keep": nm_mask(weight.abs(), TWO_FOUR), "dense": torch.ones_like(weight, dtype=torch.bool)}[how]
    start = weight if mask is None else weight * mask
    kept = TWO_FOUR if mask is None else mask
    found = round_jointly(start, hessian, grid, kept=kept, options=options)
    expected, expected_mask = _slow(start, hessian.upper_II, grid, mask, TWO_FOUR if mask is None else None)
    assert torch.equal(found.mask_OI, expected_mask)
    torch.testing.assert_close(found.weight_OI, expected, rtol=1e-6, atol=1e-9)
    assert found.scales_OG.shape == (ROWS, 3 if group_size else 1)
    assert (found.zeros_OG is None) == symmetric


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("grid", [RoundingGrid(), RoundingGrid(bits=8), RoundingGrid(group_size=16, symmetric=False)])
def test_what_it_gives_lies_on_its_grid_and_no_zero_is_lost(grid: RoundingGrid, dtype: torch.dtype) -> None:
    weight, gram = _problem(1)
    hessian = InverseHessian.of(gram.float(), TOKENS, CriterionOptions())
    found = round_jointly(weight.to(dtype), hessian, grid, kept=TWO_FOUR)
    again = round_to_nearest(found.weight_OI, grid, found.scales_OG, found.zeros_OG).weight_OI
    assert found.weight_OI.dtype == dtype
    assert torch.equal(again.to(dtype), found.weight_OI)
    assert not bool(found.weight_OI[~found.mask_OI].any())
    assert torch.equal(found.mask_OI.unflatten(1, (-1, 4)).sum(-1), torch.full((ROWS, COLUMNS // 4), 2))
    assert not bool((found.weight_OI.signbit() & (found.weight_OI == 0)).any())


def _error(weight: Tensor, found: Tensor, gram: Tensor) -> float:
    missing = found.double() - weight
    return float(((missing @ gram) * missing).sum())


def test_one_loop_loses_less_than_two_steps() -> None:
    weight, gram = _problem(2)
    grid = RoundingGrid(group_size=16)
    statistics = InputStatistics(num_tokens=TOKENS, gram_II=gram.float())
    hessian = InverseHessian.of(gram, TOKENS, CriterionOptions())
    pruned = sparsegpt(weight, statistics, TWO_FOUR, CriterionOptions())
    errors = {
        "rtn": _error(weight, round_to_nearest(pruned.weight_OI, grid).weight_OI, gram),
        "keep": _error(weight, round_jointly(pruned.weight_OI, hessian, grid, kept=pruned.mask_OI).weight_OI, gram),
        "choose": _error(weight, round_jointly(weight, hessian, grid, kept=TWO_FOUR).weight_OI, gram),
    }
    assert errors["keep"] < errors["rtn"]
    assert errors["choose"] < errors["rtn"]


def test_clipping_by_the_weights_and_by_the_outputs() -> None:
    weight, gram = _problem(4)
    hessian = InverseHessian.of(gram, TOKENS, CriterionOptions())
    grid = RoundingGrid(group_size=16)
    plain, by_weights, by_outputs = (
        round_jointly(weight**3, hessian, grid, kept=TWO_FOUR, clip=clip, gram_II=gram) for clip in (None, "weights", "outputs")
    )
    first = (weight**3)[:, :16]
    mask = nm_mask((first / hessian.upper_II.diagonal()[:16]).abs(), TWO_FOUR)
    whole = RoundingGrid(group_size=0)
    assert torch.equal(plain.scales_OG[:, :1], fit_scales(first * mask, whole)[0])
    assert torch.equal(by_weights.scales_OG[:, :1], clipped_scales(first * mask, whole)[0])
    assert torch.equal(by_outputs.scales_OG[:, :1], clipped_scales(first * mask, whole, gram[:16, :16])[0])


def test_patterns_that_do_not_fit_a_group_are_refused() -> None:
    hessian = InverseHessian.of(torch.eye(30), 30, CriterionOptions())
    with pytest.raises(SparsepassError, match="16 columns holds no whole groups of 3"):
        round_jointly(torch.ones(2, 30), hessian, RoundingGrid(group_size=16), kept=NMPattern(1, 3))
    whole = round_jointly(torch.ones(2, 30), hessian, RoundingGrid(group_size=0), kept=NMPattern(1, 3))
    assert int(whole.mask_OI.sum()) == 20


def test_inputs_that_were_never_active_get_zeros() -> None:
    gram = torch.eye(8)
    gram[3, 3] = 0
    hessian = InverseHessian.of(gram, 8, CriterionOptions())
    found = round_jointly(torch.ones(2, 8), hessian, RoundingGrid(), kept=torch.ones(2, 8, dtype=torch.bool))
    assert not bool(found.weight_OI[:, 3].any())
    assert bool(found.weight_OI[:, 2].all())
