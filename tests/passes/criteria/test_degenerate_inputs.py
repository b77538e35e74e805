"""Inputs that leave a layer's best weights undetermined: what compensates must stay finite, and no worse than its start."""

import pytest
import torch
from hypothesis import given, settings, strategies as st
from tests.layers import check_form, inputs, output_error, random, statistics_of
from torch import Tensor

from sparsepass.passes.criteria.refinement import refine
from sparsepass.passes.criteria.sparsegpt import inverse_cholesky, sparsegpt
from sparsepass.passes.criteria.table import CRITERIA, CriterionOptions, Pruned
from sparsepass.passes.maths import NMPattern
from sparsepass.passes.maths.slorb import segment_sum, slorb_least_squares

pytestmark = pytest.mark.numerics

P24 = NMPattern(2, 4)
COMPENSATING = sorted(name for name, criterion in CRITERIA.items() if criterion.compensates)


def row_errors(missing_OI: Tensor, x_TI: Tensor) -> Tensor:
    """Each row's ``||(w - w') X||^2``, in float64."""
    return (x_TI.double() @ missing_OI.double().T).square().sum(0)


def check_no_worse(
    weight_OI: Tensor, found_OI: Tensor, start_OI: Tensor, x_TI: Tensor, *, factor: float = 1.001, resolution: float = 1e-6
) -> None:
    """Row by row. A Gram matrix in float32 does not resolve errors below a millionth of what the row's terms sum to."""
    assert bool(found_OI.isfinite().all())
    after_O, before_O = (row_errors(weight_OI - w_OI, x_TI) for w_OI in (found_OI, start_OI))
    unresolved_O = resolution * (weight_OI.double().square() @ x_TI.double().square().sum(0))
    assert bool((after_O <= factor * before_O + unresolved_O).all()), (after_O, before_O)


@st.composite
def layers(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """A weight, and inputs with fewer tokens than features, copies, zeros, and channels of very different sizes."""
    in_features = draw(st.sampled_from([8, 16, 64]))
    tokens = draw(st.sampled_from([1, 2, in_features // 2, in_features - 1, 2 * in_features]))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    seed = draw(st.integers(0, 10**6))
    weight_OI = (random(3, in_features, seed=seed) * draw(st.sampled_from([1e-6, 1.0, 1e6]))).to(dtype)
    x_TI = inputs(tokens, in_features, seed=seed + 1)
    pick = torch.Generator().manual_seed(seed)
    what = draw(st.sampled_from(["nothing", "copies", "opposites", "zeros", "sizes"]))
    chosen_I = torch.rand(in_features, generator=pick) < 0.5
    if what in ("copies", "opposites"):
        x_TI[:, chosen_I] = x_TI[:, :1] * (1 if what == "copies" else -1)
    elif what == "zeros":
        x_TI[:, chosen_I] = 0
    elif what == "sizes":
        x_TI *= 10.0 ** (6 * torch.randint(-1, 2, (in_features,), generator=pick))
    return weight_OI, x_TI * draw(st.sampled_from([1e-6, 1.0, 1e6]))


def remade(weight_OI: Tensor, mask_OI: Tensor, upper_II: Tensor) -> Tensor:
    """What SparseGPT's compensation makes of the kept weights, column by column, once the mask is known. In float64."""
    left_OI = weight_OI.double().clone()
    for i in range(left_OI.shape[1]):
        error_O = torch.where(mask_OI[:, i], 0, left_OI[:, i] / upper_II[i, i])
        left_OI[:, i:] -= torch.outer(error_O, upper_II[i, i:])
    return left_OI * mask_OI


@settings(max_examples=100)
@given(layers(), st.sampled_from([0.0, 1e-4, 0.01]))
def test_sparsegpt_leaves_the_error_that_its_definition_leaves(layer: tuple[Tensor, Tensor], damping: float) -> None:
    # which, column by column, may be more than that of the mask alone, unlike ALPS's and refine's
    weight_OI, x_TI = layer
    statistics = statistics_of(x_TI)
    pruned = sparsegpt(weight_OI, statistics, P24, CriterionOptions(damping=damping))
    check_form(weight_OI, pruned, P24)
    assert statistics.gram_II is not None
    known_II = statistics.gram_II.to(torch.promote_types(weight_OI.dtype, torch.float32))
    *_, used = inverse_cholesky(known_II, statistics.num_tokens, damping)
    upper_II, dead_I, still_used = inverse_cholesky(statistics.gram_II.double(), statistics.num_tokens, used)
    assert still_used == used
    expected_OI = remade(weight_OI.masked_fill(dead_I, 0), pruned.mask_OI, upper_II)
    # each column divides by what the later ones leave of it, which with little damping is not much
    check_no_worse(weight_OI, pruned.weight_OI, expected_OI, x_TI, factor=2, resolution=1e-3)


@settings(max_examples=100)
@given(layers(), st.sampled_from(sorted(CRITERIA.keys() - {"sparsegpt"})), st.sampled_from([0.0, 1e-4, 0.01]))
def test_no_criterion_is_worse_than_its_mask_alone(layer: tuple[Tensor, Tensor], name: str, damping: float) -> None:
    weight_OI, x_TI = layer
    pruned = CRITERIA[name].function(weight_OI, statistics_of(x_TI), P24, CriterionOptions(damping=damping))
    check_form(weight_OI, pruned, P24)
    check_no_worse(weight_OI, pruned.weight_OI, weight_OI * pruned.mask_OI, x_TI)


@settings(max_examples=100)
@given(layers(), st.sampled_from(sorted(CRITERIA)), st.sampled_from([0.0, 0.01]), st.sampled_from([1, 10, 60]))
def test_refine_is_never_worse_than_its_start(layer: tuple[Tensor, Tensor], name: str, damping: float, num_steps: int) -> None:
    weight_OI, x_TI = layer
    statistics = statistics_of(x_TI)
    pruned = CRITERIA[name].function(weight_OI, statistics, P24, CriterionOptions(damping=damping))
    start = Pruned(weight_OI=weight_OI * pruned.mask_OI, mask_OI=pruned.mask_OI)
    refined = refine(weight_OI, start, statistics, damping=damping, num_steps=num_steps)
    check_form(weight_OI, refined, P24)
    check_no_worse(weight_OI, refined.weight_OI, start.weight_OI, x_TI)
    again = refine(weight_OI, pruned, statistics, damping=damping, num_steps=num_steps)
    check_no_worse(weight_OI, again.weight_OI, start.weight_OI, x_TI)


@settings(max_examples=100)
@given(layers(), st.sampled_from(sorted(CRITERIA)), st.sampled_from([0.0, 1e-4]), st.sampled_from([1, 2, 4, 8]))
def test_a_branch_is_never_worse_than_none(layer: tuple[Tensor, Tensor], name: str, damping: float, k: int) -> None:
    weight_OI, x_TI = layer
    statistics = statistics_of(x_TI)
    pruned = CRITERIA[name].function(weight_OI, statistics, P24, CriterionOptions())
    assert statistics.gram_II is not None
    fit = slorb_least_squares(weight_OI, pruned.weight_OI, statistics.gram_II, k=k, damping=damping)
    branch_OI = fit.slorb_weight_OR.double().repeat_interleave(k, dim=1)
    check_no_worse(weight_OI.double(), pruned.weight_OI.double() + branch_OI, pruned.weight_OI.double(), x_TI)


@pytest.mark.parametrize("name", COMPENSATING)
@pytest.mark.parametrize("damping", [0.0, 0.01])
@pytest.mark.parametrize("num_steps", [0, 10, 60])
def test_one_token_is_matched_by_what_is_kept(name: str, damping: float, num_steps: int) -> None:
    for seed in range(20):
        weight_OI, x_TI = random(4, 16, seed=seed).float(), inputs(1, 16, seed=seed + 1)
        statistics = statistics_of(x_TI)
        pruned = CRITERIA[name].function(weight_OI, statistics, P24, CriterionOptions(damping=damping))
        if num_steps:
            pruned = refine(weight_OI, pruned, statistics, damping=damping, num_steps=num_steps)
        assert output_error(weight_OI, pruned.weight_OI, x_TI) < 0.05 * output_error(weight_OI, 0 * weight_OI, x_TI)
        assert float(pruned.weight_OI.abs().max()) < 100 * float(weight_OI.abs().max())


def test_a_segment_whose_inputs_cancel_gets_no_branch() -> None:
    x_TI = inputs(50, 4)
    x_TI = torch.stack([x_TI, -x_TI * (1 + 1e-7)], dim=2).flatten(1)
    weight_OI, statistics = random(3, 8).float(), statistics_of(x_TI)
    pruned = CRITERIA["wanda"].function(weight_OI, statistics, P24, CriterionOptions())
    assert statistics.gram_II is not None
    fit = slorb_least_squares(weight_OI, pruned.weight_OI, statistics.gram_II, k=2, damping=0.0)
    assert not bool(segment_sum(fit.slorb_weight_OR, 1).any())
