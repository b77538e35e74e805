import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from sparsepass.graph.support.errors import SparsepassError
from sparsepass.passes.criteria.table import CRITERIA, CriterionOptions
from sparsepass.passes.maths.pattern import NMPattern, nm_mask
from sparsepass.passes.maths.slorb import fixed_projection, segment_sum, slorb_least_squares, slorb_mean_init
from sparsepass.passes.maths.statistics import InputStatistics

pytestmark = pytest.mark.numerics


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer(out_features: int, in_features: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """A dense weight, its 2:4 magnitude-pruned form, and correlated inputs."""
    original_OI = random(out_features, in_features)
    masked_OI = original_OI * nm_mask(original_OI.abs(), NMPattern(2, 4))
    x_TI = random(tokens, in_features, seed=1) @ random(in_features, in_features, seed=2) + 1
    return original_OI, masked_OI, x_TI


@settings(max_examples=50)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 3))
def test_segment_sum_and_projection_equal_the_definition(rank: int, k: int, tokens: int) -> None:
    x_TI = random(tokens, rank * k)
    expected = torch.tensor(
        [[sum(float(row[i * k + j]) for j in range(k)) for i in range(rank)] for row in x_TI], dtype=torch.float64
    ).reshape(tokens, rank)
    torch.testing.assert_close(segment_sum(x_TI, k), expected)
    projection_RI = fixed_projection(rank * k, k, dtype=torch.float64)
    for i in range(rank):
        for j in range(rank * k):
            assert projection_RI[i, j] == float(i * k <= j < (i + 1) * k)
    torch.testing.assert_close(x_TI @ projection_RI.T, expected)


@settings(max_examples=50)
@given(
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 5),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_mean_init_equals_the_definition(out_features: int, rank: int, k: int, dtype: torch.dtype) -> None:
    weight_OI = random(out_features, rank * k).to(dtype)
    mask_OI = random(out_features, rank * k, seed=3) > 0
    for reduction, factor in (("mean", 1 / k), ("sum", 1.0)):
        start_OR = slorb_mean_init(weight_OI, mask_OI, k, reduction)  # type: ignore[arg-type]
        assert start_OR.dtype == dtype
        for row in range(out_features):
            for i in range(rank):
                dropped = (float(weight_OI[row, j]) for j in range(i * k, (i + 1) * k) if not mask_OI[row, j])
                expected = torch.tensor(factor * sum(dropped), dtype=torch.float64).to(dtype)
                torch.testing.assert_close(
                    start_OR[row, i], expected, rtol=4e-3 if dtype == torch.bfloat16 else 1e-6, atol=1e-6
                )


def test_mean_init_keeps_the_mean_of_every_segment() -> None:
    original_OI, masked_OI, _ = layer(5, 32, 1)
    start_OR = slorb_mean_init(original_OI, masked_OI != 0, 8)
    restored_OI = masked_OI + start_OR @ fixed_projection(32, 8, dtype=torch.float64)
    torch.testing.assert_close(segment_sum(restored_OI, 8), segment_sum(original_OI, 8))


@pytest.mark.parametrize("k", [1, 2, 8, 32])
def test_least_squares_is_optimal_and_equals_lstsq(k: int) -> None:
    original_OI, masked_OI, x_TI = layer(6, 32, 500)
    fit = slorb_least_squares(original_OI, masked_OI, x_TI.T @ x_TI, k=k, damping=0.0)
    assert (fit.damping, fit.note) == (0.0, None)
    projected_TR = x_TI @ fixed_projection(32, k, dtype=torch.float64).T
    missing_TO = x_TI @ (original_OI - masked_OI).T
    expected_OR = torch.linalg.lstsq(projected_TR, missing_TO).solution.T
    torch.testing.assert_close(fit.slorb_weight_OR, expected_OR, rtol=1e-7, atol=1e-9)

    branch_OR = fit.slorb_weight_OR.clone().requires_grad_()
    error = (projected_TR @ branch_OR.T - missing_TO).square().sum()
    (gradient_OR,) = torch.autograd.grad(error, branch_OR)
    assert float(gradient_OR.abs().max()) < 1e-9 * float((projected_TR.T @ missing_TO).abs().max())


def test_least_squares_beats_the_mean_start_and_no_branch_after_every_criterion() -> None:
    original_OI, _, x_TI = layer(24, 64, 800)
    statistics = InputStatistics.zeros(64, gram=True)
    statistics.update(x_TI)
    assert statistics.gram_II is not None
    for criterion in CRITERIA.values():
        pruned = criterion.function(original_OI.float(), statistics, NMPattern(2, 4), CriterionOptions())
        fit = slorb_least_squares(original_OI.float(), pruned.weight_OI, statistics.gram_II, k=16)
        assert fit.slorb_weight_OR.dtype == torch.float32
        assert fit.slorb_weight_OR.shape == (24, 4)
        mean_OR = slorb_mean_init(original_OI.float(), pruned.mask_OI, 16)
        missing_TO = x_TI @ (original_OI - pruned.weight_OI).T
        best, mean, none = (
            float((segment_sum(x_TI, 16) @ branch_OR.double().T - missing_TO).square().sum())
            for branch_OR in (fit.slorb_weight_OR, mean_OR, torch.zeros(24, 4))
        )
        assert best < mean
        assert best < none


def test_least_squares_does_not_depend_on_the_scale_of_the_gram_matrix() -> None:
    original_OI, masked_OI, x_TI = layer(6, 32, 500)
    total, mean = (slorb_least_squares(original_OI, masked_OI, x_TI.T @ x_TI / n, k=4) for n in (1, 500))
    torch.testing.assert_close(total.slorb_weight_OR, mean.slorb_weight_OR)


def test_silent_segments_get_zeros() -> None:
    original_OI, masked_OI, x_TI = layer(6, 32, 500)
    x_TI[:, 8:16] = 0
    fit = slorb_least_squares(original_OI, masked_OI, x_TI.T @ x_TI, k=8, damping=0.0)
    assert not bool(fit.slorb_weight_OR[:, 1].any())
    live = [0, 2, 3]
    expected_OR = torch.linalg.lstsq(segment_sum(x_TI, 8)[:, live], x_TI @ (original_OI - masked_OI).T).solution.T
    torch.testing.assert_close(fit.slorb_weight_OR[:, live], expected_OR, rtol=1e-7, atol=1e-9)
    silent = slorb_least_squares(original_OI, masked_OI, torch.zeros(32, 32), k=8)
    assert not bool(silent.slorb_weight_OR.any())


def test_damping_is_raised_and_said_and_finally_given_up() -> None:
    original_OI, masked_OI, _ = layer(2, 4, 1)
    gram_II = torch.eye(4)
    gram_II[0, 1] = gram_II[1, 0] = 1.0005
    fit = slorb_least_squares(original_OI, masked_OI, gram_II, k=1)
    assert fit.damping == pytest.approx(1e-3)
    assert fit.note is not None
    assert "damping 0.0001, so 0.001 was used" in fit.note
    gram_II[0, 1] = gram_II[1, 0] = 3
    with pytest.raises(SparsepassError, match=r"not positive definite, with damping 0, 0\.0001, 0\.001, 0\.01, 0\.1, 1;"):
        slorb_least_squares(original_OI, masked_OI, gram_II, k=1, damping=0.0)


def test_bad_input_is_explained() -> None:
    weight_OI, mask_OI = torch.ones(2, 30), torch.ones(2, 30, dtype=torch.bool)
    for k in (16, 0, -3):
        for call in (
            lambda k: segment_sum(weight_OI, k),
            lambda k: fixed_projection(30, k),
            lambda k: slorb_mean_init(weight_OI, mask_OI, k),
            lambda k: slorb_least_squares(weight_OI, weight_OI, torch.eye(30), k=k),
        ):
            with pytest.raises(ValueError, match=f"k = {k} does not divide 30"):
                call(k)
    with pytest.raises(SparsepassError, match="'median'"):
        slorb_mean_init(weight_OI, mask_OI, 2, "median")  # type: ignore[arg-type]
    with pytest.raises(SparsepassError, match=r"weight's shape \(2, 30\), got \(2, 15\)"):
        slorb_mean_init(weight_OI, mask_OI[:, :15], 2)
    with pytest.raises(SparsepassError, match=r"\[in, in\] Gram matrix"):
        slorb_least_squares(weight_OI, weight_OI, torch.eye(15), k=2)
    for bad in (math.nan, math.inf):
        with pytest.raises(SparsepassError, match="NaN or Inf"):
            slorb_least_squares(weight_OI * bad, weight_OI, torch.eye(30), k=2)
        with pytest.raises(SparsepassError, match="NaN or Inf"):
            slorb_least_squares(weight_OI, weight_OI, torch.eye(30) * bad, k=2)
    with pytest.raises(SparsepassError, match="damping"):
        slorb_least_squares(weight_OI, weight_OI, torch.eye(30), k=2, damping=-1.0)
