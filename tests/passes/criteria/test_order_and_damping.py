"""The order in which SparseGPT visits groups, and what damping is a fraction of."""

from typing import Literal

import pytest
import torch
from torch import Tensor

from sparsepass.graph.support import SparsepassError
from sparsepass.passes.criteria import CriterionOptions, keep_masked, refine
from sparsepass.passes.criteria.sparsegpt import sparsegpt
from sparsepass.passes.maths import InputStatistics, NMPattern

pytestmark = pytest.mark.numerics
PATTERN = NMPattern(2, 4)


def _spread(columns: int = 16) -> tuple[Tensor, InputStatistics]:
    """A weight whose inputs differ in size by orders of magnitude."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(200, columns, generator=generator, dtype=torch.float64)
    inputs = inputs @ torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    inputs *= torch.logspace(-2, 2, columns, dtype=torch.float64)
    weight = torch.randn(6, columns, generator=generator, dtype=torch.float64)
    return weight, InputStatistics(num_tokens=200, gram_II=inputs.T @ inputs)


def test_sparsegpt_by_energy_is_sparsegpt_of_groups_in_another_order() -> None:
    weight, statistics = _spread()
    assert statistics.gram_II is not None
    energy = (weight.square() * statistics.gram_II.diagonal()).sum(0).reshape(-1, 4).sum(1)
    groups = sorted(range(4), key=lambda group: -float(energy[group]))
    order = torch.tensor([4 * group + place for group in groups for place in range(4)])
    moved = InputStatistics(num_tokens=200, gram_II=statistics.gram_II[order][:, order])
    expected = sparsegpt(weight[:, order], moved, PATTERN, CriterionOptions())
    found = sparsegpt(weight, statistics, PATTERN, CriterionOptions(order="energy"))
    assert torch.equal(found.mask_OI[:, order], expected.mask_OI)
    assert torch.allclose(found.weight_OI[:, order], expected.weight_OI, rtol=1e-9, atol=1e-12)
    assert not torch.equal(found.mask_OI, sparsegpt(weight, statistics, PATTERN, CriterionOptions()).mask_OI)


def _near(first: Tensor, second: Tensor) -> bool:
    """Equal but for the rounding of statistics, which are kept in float32."""
    return bool((first - second).abs().max() < 1e-6 * first.abs().max())


@pytest.mark.parametrize("damping_of", ["own", "mean"])
def test_damping_of_its_own_entry_does_not_depend_on_the_scale_of_columns(damping_of: Literal["own", "mean"]) -> None:
    weight, statistics = _spread()
    assert statistics.gram_II is not None
    scale = torch.logspace(1, -1, 16, dtype=torch.float64)
    scaled = InputStatistics(num_tokens=200, gram_II=statistics.gram_II * scale * scale[:, None])
    options = CriterionOptions(damping=0.05, damping_of=damping_of)
    found = sparsegpt(weight, statistics, PATTERN, options)
    other = sparsegpt(weight / scale, scaled, PATTERN, options)
    assert _near(found.weight_OI, other.weight_OI * scale) == (damping_of == "own")
    refined = [
        refine(start, keep_masked(start, found.mask_OI), known, damping=0.05, damping_of=damping_of, num_steps=5).weight_OI
        for start, known in ((weight, statistics), (weight / scale, scaled))
    ]
    assert _near(refined[0], refined[1] * scale) == (damping_of == "own")


@pytest.mark.parametrize("options", [{"damping_of": "median"}, {"order": "random"}])
def test_unknown_ways_are_refused(options: dict[str, str]) -> None:
    with pytest.raises(SparsepassError, match="expects one of"):
        CriterionOptions(**options)  # type: ignore[arg-type]
