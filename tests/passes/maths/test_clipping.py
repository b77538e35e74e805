"""Clipping against a search group by group, written from the definition."""

import pytest
import torch
from torch import Tensor

from sparsepass.graph.rounding import RoundingGrid, fit_scales, round_to_nearest
from sparsepass.passes.maths import clipped_scales

pytestmark = pytest.mark.numerics


def _slow(weight: Tensor, grid: RoundingGrid, gram: Tensor | None) -> Tensor:
    """The least error of each group, of the ten ranges."""
    size = grid.group_size or weight.shape[1]
    rows = []
    for row in weight:
        errors = []
        for first in range(0, len(row), size):
            group = row[None, first : first + size]
            part = torch.eye(group.shape[1]) if gram is None else gram[first : first + size, first : first + size]
            tried = []
            for step in range(10):
                whole = RoundingGrid(bits=grid.bits, group_size=0, symmetric=grid.symmetric)
                missing = round_to_nearest(group, whole, *fit_scales(group, whole, 1 - step / 20)).weight_OI - group
                tried.append(float((missing @ part @ missing.T).item()))
            errors.append(min(tried))
        rows.append(errors)
    return torch.tensor(rows)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [0, 16])
@pytest.mark.parametrize("by_outputs", [True, False])
def test_each_group_has_the_least_error(by_outputs: bool, group_size: int, symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 40, generator=generator) ** 3  # heavy tails: some groups gain by clipping
    weight[:, ::2] = 0
    inputs = torch.randn(64, 40, generator=generator)
    gram = inputs.T @ inputs if by_outputs else None
    grid = RoundingGrid(group_size=group_size, symmetric=symmetric)
    rounded = round_to_nearest(weight, grid, *clipped_scales(weight, grid, gram))
    missing = rounded.weight_OI - weight
    size = group_size or 40
    found = torch.stack(
        [
            ((part @ (torch.eye(part.shape[1]) if gram is None else gram[i : i + size, i : i + size])) * part).sum(-1)
            for i in range(0, 40, size)
            for part in [missing[:, i : i + size]]
        ],
        dim=-1,
    )
    torch.testing.assert_close(found, _slow(weight, grid, gram), rtol=1e-4, atol=1e-5)
    assert not bool(rounded.weight_OI[weight == 0].any())
    assert bool((rounded.scales_OG < fit_scales(weight, grid)[0]).any())


def test_nothing_is_clipped_where_that_gains_nothing() -> None:
    weight = torch.tensor([[7.0, -7.0, 3.0, 0.0]])
    assert torch.equal(clipped_scales(weight, RoundingGrid())[0], fit_scales(weight, RoundingGrid())[0])
