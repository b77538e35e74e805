import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from tests.layers import check_form, inputs, output_error, random, statistics_of
from torch import Tensor

from sparsepass.graph.support.errors import SparsepassError
from sparsepass.passes.criteria.sparsegpt import inverse_cholesky
from sparsepass.passes.criteria.table import CRITERIA, CriterionOptions
from sparsepass.passes.maths.pattern import NMPattern
from sparsepass.passes.maths.statistics import InputStatistics

pytestmark = pytest.mark.numerics

P24 = NMPattern(2, 4)
DEFAULT = CriterionOptions()


def largest(score_OI: Tensor, pattern: NMPattern) -> Tensor:
    """The N largest of each group of M, ties to the first; by sorting, one group at a time."""
    mask_OI = torch.zeros(score_OI.shape, dtype=torch.bool)
    for row, scores in enumerate(score_OI.tolist()):
        for start in range(0, len(scores), pattern.m):
            ranked = sorted(range(start, start + pattern.m), key=lambda i: (-scores[i], i))
            mask_OI[row, ranked[: pattern.n]] = True
    return mask_OI


@st.composite
def weights(draw: st.DrawFn) -> tuple[Tensor, NMPattern]:
    m = draw(st.integers(2, 8))
    pattern = NMPattern(draw(st.integers(1, m - 1)), m)
    rows, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    size = rows * groups * m
    values = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.25, -3.0, 7.0])
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    weight_OI = torch.tensor(draw(st.lists(values, min_size=size, max_size=size)), dtype=dtype)
    return weight_OI.reshape(rows, groups * m), pattern


@settings(max_examples=60)
@given(weights(), st.sampled_from(sorted(CRITERIA)), st.integers(0, 3))
def test_every_criterion_keeps_the_pattern_and_its_promise(case: tuple[Tensor, NMPattern], name: str, seed: int) -> None:
    weight_OI, pattern = case
    before = weight_OI.clone()
    x_TI = inputs(5 * weight_OI.shape[1], weight_OI.shape[1], seed=seed)
    x_TI[:, seed % weight_OI.shape[1]] = 0  # a dead feature
    criterion = CRITERIA[name]
    pruned = criterion.function(weight_OI, statistics_of(x_TI), pattern, DEFAULT)
    check_form(weight_OI, pruned, pattern)
    assert torch.equal(weight_OI, before)
    assert torch.equal(weight_OI.signbit(), before.signbit())
    if not criterion.compensates:
        assert torch.equal(pruned.weight_OI[pruned.mask_OI], weight_OI[pruned.mask_OI])


@settings(max_examples=60)
@given(weights())
def test_magnitude_and_wanda_equal_their_definitions(case: tuple[Tensor, NMPattern]) -> None:
    weight_OI, pattern = case
    pruned = CRITERIA["magnitude"].function(weight_OI, None, pattern, DEFAULT)
    assert torch.equal(pruned.mask_OI, largest(weight_OI.abs(), pattern))
    # powers of two: the scores are exact, so ties are ties in every dtype
    norms_I = 2.0 ** (torch.arange(weight_OI.shape[1]) % 3)
    statistics = InputStatistics(num_tokens=3, sum_squares_I=norms_I.square())
    pruned = CRITERIA["wanda"].function(weight_OI, statistics, pattern, DEFAULT)
    score_OI = torch.empty(weight_OI.shape, dtype=torch.float64)
    for row in range(weight_OI.shape[0]):
        for column in range(weight_OI.shape[1]):
            score_OI[row, column] = abs(float(weight_OI[row, column])) * float(norms_I[column])
    assert torch.equal(pruned.mask_OI, largest(score_OI, pattern))


def slow_ria(weight_OI: Tensor, norms_I: Tensor) -> Tensor:
    """The score by its definition, one weight at a time."""
    size = [[abs(float(w)) for w in row] for row in weight_OI]
    score_OI = torch.zeros(weight_OI.shape, dtype=torch.float64)
    for i, row in enumerate(size):
        for j, w in enumerate(row):
            if w > 0:
                score_OI[i, j] = (w / sum(other[j] for other in size) + w / sum(row)) * float(norms_I[j]) ** 0.5
    return score_OI


@settings(max_examples=60)
@given(weights())
def test_ria_keeps_the_largest_scores_of_its_definition(case: tuple[Tensor, NMPattern]) -> None:
    weight_OI, pattern = case
    norms_I = torch.exp(random(weight_OI.shape[1], seed=weight_OI.shape[1])).float()
    pruned = CRITERIA["ria"].function(
        weight_OI, InputStatistics(num_tokens=3, sum_squares_I=norms_I.square()), pattern, DEFAULT
    )
    score_OI = slow_ria(weight_OI, norms_I.double())
    best_OG, kept_OG = (
        (score_OI * mask_OI).unflatten(1, (-1, pattern.m)).sum(2) for mask_OI in (largest(score_OI, pattern), pruned.mask_OI)
    )
    torch.testing.assert_close(kept_OG, best_OG, rtol=1e-6, atol=1e-6)  # rounding may turn a tie


def test_ria_equals_its_definition_on_real_sizes() -> None:
    weight_OI, statistics = random(24, 32, dtype=torch.float64), statistics_of(inputs(100, 32))
    pruned = CRITERIA["ria"].function(weight_OI, statistics, P24, DEFAULT)
    assert torch.equal(pruned.mask_OI, largest(slow_ria(weight_OI, statistics.norms().double()), P24))


def test_ria_breaks_ties_by_index_and_gives_dead_channels_nothing() -> None:
    ones = InputStatistics(num_tokens=1, sum_squares_I=torch.ones(8))
    pruned = CRITERIA["ria"].function(torch.full((4, 8), -0.5), ones, P24, DEFAULT)
    assert torch.equal(pruned.mask_OI, torch.tensor([True, True, False, False]).repeat(4, 2))
    # a dead feature, a column of zeros and a row of zeros
    norms_I = torch.ones(8)
    norms_I[0] = 0
    weight_OI = random(4, 8).abs() + 0.1
    weight_OI[:, 5], weight_OI[2] = 0, 0
    pruned = CRITERIA["ria"].function(weight_OI, InputStatistics(num_tokens=1, sum_squares_I=norms_I), P24, DEFAULT)
    check_form(weight_OI, pruned, P24)
    assert not bool(pruned.mask_OI[[0, 1, 3]][:, [0, 5]].any())
    assert torch.equal(pruned.mask_OI[2].nonzero().flatten(), torch.tensor([0, 1, 4, 5]))


def test_ria_spares_channels_of_small_weights() -> None:
    # Column 0 is small throughout: magnitude drops all of it, its own share of the column keeps its largest weight.
    weight_OI = torch.tensor([[0.3, 1.0, 1.0, 1.0], [0.01, 1.0, 1.0, 1.0], [0.01, 1.0, 1.0, 1.0]])
    statistics = InputStatistics(num_tokens=1, sum_squares_I=torch.ones(4))
    assert not bool(CRITERIA["magnitude"].function(weight_OI, statistics, P24, DEFAULT).mask_OI[:, 0].any())
    assert CRITERIA["ria"].function(weight_OI, statistics, P24, DEFAULT).mask_OI[:, 0].tolist() == [True, False, False]


def test_ria_refuses_a_vector() -> None:
    with pytest.raises(SparsepassError, match=r"rows of an \[out, in\] matrix, got shape \(8,\)"):
        CRITERIA["ria"].function(random(8), statistics_of(inputs(40, 8)), P24, DEFAULT)


def test_scores_without_a_gram_matrix_take_experts() -> None:
    weight_EOI = random(3, 4, 8)
    statistics = statistics_of(inputs(40, 8))
    for name in (name for name, criterion in CRITERIA.items() if criterion.needs != "gram"):
        whole = CRITERIA[name].function(weight_EOI, statistics, P24, DEFAULT)
        for expert, weight_OI in enumerate(weight_EOI):
            one = CRITERIA[name].function(weight_OI, statistics, P24, DEFAULT)
            assert torch.equal(whole.weight_OI[expert], one.weight_OI)


def slow_sparsegpt(
    weight_OI: Tensor, gram_II: Tensor, num_tokens: int, pattern: NMPattern, damping: float
) -> tuple[Tensor, Tensor]:
    """Optimal brain surgeon, column by column: inverts the Hessian of the remaining columns afresh for each."""
    weight_OI, size = weight_OI.clone(), weight_OI.shape[1]
    hessian_II = 2 / num_tokens * gram_II.double()
    dead = [i for i in range(size) if hessian_II[i, i] == 0]
    live = [float(hessian_II[i, i]) for i in range(size) if i not in dead]
    for i in dead:
        hessian_II[i, i] = 1
        weight_OI[:, i] = 0
    hessian_II += damping * sum(live) / max(len(live), 1) * torch.eye(size, dtype=torch.float64)
    inverses = [torch.linalg.inv(hessian_II[i:, i:]) for i in range(size)]
    mask_OI = torch.zeros(weight_OI.shape, dtype=torch.bool)
    for row in range(weight_OI.shape[0]):
        for i in range(size):
            if i % pattern.m == 0:
                group = range(i, i + pattern.m)
                score = {j: float(weight_OI[row, j] ** 2 / inverses[j][0, 0]) for j in group}
                for j in sorted(group, key=lambda j: (-score[j], j))[: pattern.n]:
                    mask_OI[row, j] = True
            if not mask_OI[row, i]:
                error = weight_OI[row, i] / inverses[i][0, 0]
                weight_OI[row, i:] -= error * inverses[i][0]
                weight_OI[row, i] = 0
    return weight_OI, mask_OI


@pytest.mark.parametrize(
    "pattern", [P24, NMPattern(1, 4), NMPattern(3, 5), NMPattern(4, 8), NMPattern(1, 20), NMPattern(19, 20)]
)
@pytest.mark.parametrize("block_size", [1, 6, 16, 128])
def test_sparsegpt_equals_the_column_by_column_definition(pattern: NMPattern, block_size: int) -> None:
    weight_OI, x_TI = random(6, 40), inputs(200, 40)
    x_TI[:, [3, 17]] = 0
    statistics = statistics_of(x_TI)
    options = CriterionOptions(damping=0.05, block_size=block_size)
    pruned = CRITERIA["sparsegpt"].function(weight_OI, statistics, pattern, options)
    assert statistics.gram_II is not None
    expected_OI, mask_OI = slow_sparsegpt(weight_OI, statistics.gram_II, 200, pattern, 0.05)
    assert torch.equal(pruned.mask_OI, mask_OI)
    torch.testing.assert_close(pruned.weight_OI, expected_OI, rtol=1e-9, atol=1e-9)
    assert pruned.note is None
    check_form(weight_OI, pruned, pattern)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sparsegpt_in_low_precision_stays_near_fp64(dtype: torch.dtype) -> None:
    weight_OI, statistics = random(32, 256).to(dtype), statistics_of(inputs(2000, 256))
    low = CRITERIA["sparsegpt"].function(weight_OI, statistics, P24, DEFAULT)
    high = CRITERIA["sparsegpt"].function(weight_OI.double(), statistics, P24, DEFAULT)
    # fp32 rounding may turn a choice between two nearly equal scores; each turn changes its row only
    same_O = (low.mask_OI == high.mask_OI).all(1)
    assert int(same_O.sum()) >= 30
    atol, rtol = (1e-4, 1e-4) if dtype == torch.float32 else (1e-3, 2**-8)
    torch.testing.assert_close(low.weight_OI[same_O].double(), high.weight_OI[same_O], atol=atol, rtol=rtol)


@pytest.mark.parametrize("name", sorted(CRITERIA))
def test_stacked_siblings_are_pruned_as_if_alone_if_the_table_says_so(name: str) -> None:
    q_OI, k_OI, statistics = random(8, 64), 2 * random(4, 64, seed=5), statistics_of(inputs(300, 64))
    stacked = CRITERIA[name].function(torch.cat([q_OI, k_OI]), statistics, P24, DEFAULT)
    alone = [CRITERIA[name].function(part, statistics, P24, DEFAULT) for part in (q_OI, k_OI)]
    if CRITERIA[name].rows_are_independent:
        torch.testing.assert_close(stacked.weight_OI, torch.cat([a.weight_OI for a in alone]), rtol=1e-10, atol=1e-12)
    else:
        assert not torch.equal(stacked.mask_OI, torch.cat([a.mask_OI for a in alone]))


@pytest.mark.parametrize("seed", range(3))
def test_criteria_rank_by_output_error(seed: int) -> None:
    weight_OI, x_TI = random(64, 96, seed=seed).float(), inputs(1000, 96, seed=seed)
    error = {
        name: output_error(weight_OI, criterion.function(weight_OI, statistics_of(x_TI), P24, DEFAULT).weight_OI, x_TI)
        for name, criterion in CRITERIA.items()
    }
    assert error["alps"] < 0.8 * error["sparsegpt"]
    assert error["sparsegpt"] < 0.9 * error["wanda"]
    assert error["proxsparse"] < 0.99 * error["wanda"]
    assert error["wanda"] < error["magnitude"]
    assert error["sparsegpt"] < 0.9 * error["ria"]
    assert error["ria"] < error["magnitude"]


def test_sparsegpt_does_not_depend_on_the_scale_of_the_inputs() -> None:
    weight_OI, x_TI = random(8, 32), inputs(200, 32)
    x_TI[:, [0, 5]] = 0
    small, large = (
        CRITERIA["sparsegpt"].function(weight_OI, statistics_of(x_TI * scale), P24, DEFAULT) for scale in (2**-7, 2**7)
    )
    assert torch.equal(small.mask_OI, large.mask_OI)
    torch.testing.assert_close(small.weight_OI, large.weight_OI)


def test_dead_features_are_zeroed_and_all_dead_is_magnitude() -> None:
    weight_OI, x_TI = random(8, 32), inputs(200, 32)
    x_TI[:, 9] = 0
    assert not bool(CRITERIA["sparsegpt"].function(weight_OI, statistics_of(x_TI), P24, DEFAULT).weight_OI[:, 9].any())
    silent = CRITERIA["sparsegpt"].function(weight_OI, statistics_of(x_TI * 0), P24, DEFAULT)
    assert not bool(silent.weight_OI.any())
    check_form(weight_OI, silent, P24)


@pytest.mark.parametrize("size", [1, 5, 128, 129, 300])
def test_inverse_cholesky_factors_the_inverse(size: int) -> None:
    gram_II = statistics_of(inputs(1000, size)).gram_II
    assert gram_II is not None
    upper_II, dead_I, used = inverse_cholesky(gram_II.double(), 1000, 0.01)
    hessian_II = gram_II.double() / 500
    hessian_II += 0.01 * hessian_II.diagonal().mean() * torch.eye(size, dtype=torch.float64)
    assert torch.equal(upper_II, upper_II.triu())
    assert not bool(dead_I.any())
    assert used == 0.01
    torch.testing.assert_close(upper_II, torch.linalg.cholesky(torch.linalg.inv(hessian_II), upper=True), rtol=1e-8, atol=1e-10)


def test_damping_is_raised_and_said_and_finally_given_up() -> None:
    weight_OI = random(4, 8)
    # one token: rank 1, singular without damping; a negative eigenvalue of -5% needs 0.1
    singular = InputStatistics(num_tokens=1, gram_II=torch.ones(8, 8))
    pruned = CRITERIA["sparsegpt"].function(weight_OI, singular, P24, CriterionOptions(damping=0.0))
    assert pruned.note is not None
    assert "not positive definite with damping 0, so 0.01 was used" in pruned.note
    indefinite = torch.eye(8) * 1.0
    indefinite[0, 1] = indefinite[1, 0] = 1.05
    pruned = CRITERIA["sparsegpt"].function(weight_OI, InputStatistics(num_tokens=1, gram_II=indefinite), P24, DEFAULT)
    assert pruned.note is not None
    assert "not positive definite with damping 0.01, so 0.1 was used" in pruned.note
    check_form(weight_OI, pruned, P24)
    indefinite[0, 1] = indefinite[1, 0] = 5
    with pytest.raises(SparsepassError, match=r"not positive definite, with damping 0\.03, 0\.3, 1; use more calibration"):
        CRITERIA["sparsegpt"].function(
            weight_OI, InputStatistics(num_tokens=1, gram_II=indefinite), P24, CriterionOptions(damping=0.03)
        )


@pytest.mark.parametrize("name", sorted(CRITERIA))
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_weights_raise(name: str, bad: float) -> None:
    weight_OI = random(3, 8)
    weight_OI[1, 5] = bad
    with pytest.raises(SparsepassError, match=r"1 of 24 weights are NaN or Inf, the first at \(1, 5\)"):
        CRITERIA[name].function(weight_OI, statistics_of(inputs(40, 8)), P24, DEFAULT)


@pytest.mark.parametrize("name", sorted(CRITERIA))
def test_wrong_weights_raise(name: str) -> None:
    function = CRITERIA[name].function
    with pytest.raises(SparsepassError, match=r"30 features.*not a multiple of 4"):
        function(random(3, 30), statistics_of(inputs(40, 30)), P24, DEFAULT)
    with pytest.raises(SparsepassError, match="int8"):
        function(torch.ones(3, 8, dtype=torch.int8), statistics_of(inputs(40, 8)), P24, DEFAULT)


@pytest.mark.parametrize("name", [name for name, criterion in CRITERIA.items() if criterion.needs != "nothing"])
def test_missing_statistics_raise(name: str) -> None:
    function, weight_OI = CRITERIA[name].function, random(3, 8)
    with pytest.raises(SparsepassError, match=f"'{name}' needs calibration data, got none"):
        function(weight_OI, None, P24, DEFAULT)
    with pytest.raises(SparsepassError, match="no calibration token reached"):
        function(weight_OI, InputStatistics.zeros(8, gram=True), P24, DEFAULT)
    with pytest.raises(SparsepassError, match="8 input features but statistics of 12"):
        function(weight_OI, statistics_of(inputs(40, 12)), P24, DEFAULT)


def test_sparsegpt_refuses_what_it_cannot_do() -> None:
    function, statistics = CRITERIA["sparsegpt"].function, statistics_of(inputs(40, 8))
    with pytest.raises(SparsepassError, match=r"one \[out, in\] matrix at a time"):
        function(random(2, 3, 8), statistics, P24, DEFAULT)
    with pytest.raises(SparsepassError, match="only norms were gathered"):
        function(random(3, 8), InputStatistics(num_tokens=1, sum_squares_I=torch.ones(8)), P24, DEFAULT)
    with pytest.raises(SparsepassError, match="NaN or Inf"):
        function(random(3, 8), InputStatistics(num_tokens=1, gram_II=torch.full((8, 8), math.nan)), P24, DEFAULT)
    with pytest.raises(SparsepassError, match="no tokens"):
        inverse_cholesky(torch.eye(4), 0, 0.01)
    # the second half of the features copies the first, so what it drops piles up on what is kept
    weight_OI = torch.full((1, 4), 6e4, dtype=torch.float16)
    copies = InputStatistics(num_tokens=1, gram_II=torch.ones(4, 4))
    with pytest.raises(SparsepassError, match=r"do not fit torch\.float16"):
        function(weight_OI, copies, NMPattern(1, 4), DEFAULT)


@pytest.mark.parametrize("options", [{"damping": -0.1}, {"damping": math.nan}, {"damping": math.inf}, {"block_size": 0}])
def test_bad_options_raise(options: dict[str, Any]) -> None:
    with pytest.raises(SparsepassError, match=next(iter(options))):
        CriterionOptions(**options)


def test_the_table_names_its_functions() -> None:
    for name, criterion in CRITERIA.items():
        assert criterion.name == name == criterion.function.__name__
