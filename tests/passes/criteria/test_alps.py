import math

import pytest
import torch
from tests.layers import check_form, inputs, output_error, random, statistics_of
from torch import Tensor

from sparsepass.graph.support.errors import SparsepassError
from sparsepass.passes.criteria import alps as alps_module, criterion as criterion_module
from sparsepass.passes.criteria.alps import alps
from sparsepass.passes.criteria.sparsegpt import sparsegpt
from sparsepass.passes.criteria.table import CriterionOptions
from sparsepass.passes.maths.pattern import NMPattern
from sparsepass.passes.maths.statistics import InputStatistics

pytestmark = pytest.mark.numerics

P24 = NMPattern(2, 4)
DEFAULT = CriterionOptions()


def slow_alps(weight_OI: Tensor, gram_II: Tensor, pattern: NMPattern, damping: float) -> tuple[Tensor, Tensor, list[int]]:
    """One row after another, with an explicit inverse at every step and loops over groups. Also says the iterations."""
    size, kept = weight_OI.shape[1], weight_OI.shape[1] // pattern.m * pattern.n
    a_II = gram_II.double().clone()
    dead = [i for i in range(size) if a_II[i, i] == 0]
    mean = float(a_II.diagonal().sum()) / max(size - len(dead), 1)
    for i in range(size):
        a_II[i, i] = 1 if i in dead else a_II[i, i] + damping * mean
    norm_I = a_II.diagonal().sqrt()
    a_II = a_II / torch.outer(norm_I, norm_I)

    def support_of(row_I: Tensor) -> Tensor:
        mask_I = torch.zeros(size, dtype=torch.bool)
        for left in range(0, size, pattern.m):
            group = sorted(range(left, left + pattern.m), key=lambda j: (-abs(float(row_I[j])), j))
            mask_I[group[: pattern.n]] = True
        return mask_I

    rows, masks, counts = [], [], []
    for dense_I in weight_OI.double():
        w_I = dense_I * norm_I
        w_I[dead] = 0
        last_I = support_of(w_I)
        d_I, v_I, rho = w_I * last_I, torch.zeros_like(w_I), 0.1
        for iteration in range(1, 301):
            b_I = torch.linalg.inv(a_II + rho * torch.eye(size, dtype=torch.float64)) @ (a_II @ w_I - v_I + rho * d_I)
            mask_I = support_of(b_I + v_I / rho)
            d_I = (b_I + v_I / rho) * mask_I
            v_I = v_I + rho * (b_I - d_I)
            if iteration % 3 == 0:
                moved = int((mask_I != last_I).sum())
                last_I = mask_I
                rho *= 1.3 if moved > 0.1 * kept else 1.2 if moved > 0.005 * kept else 1.1 if moved else 1
                if moved == 0 and iteration >= 30:
                    break
        counts.append(iteration)
        residual_I = (a_II @ w_I - a_II @ d_I) * mask_I
        direction_I = residual_I.clone()
        for _ in range(10):
            if float(residual_I @ residual_I) == 0:
                break
            step = (residual_I @ residual_I) / (direction_I @ a_II @ direction_I)
            d_I = d_I + step * direction_I
            after_I = residual_I - step * (a_II @ direction_I) * mask_I
            direction_I = after_I + (after_I @ after_I) / (residual_I @ residual_I) * direction_I
            residual_I = after_I
        rows.append(d_I / norm_I)
        masks.append(mask_I)
    return torch.stack(rows), torch.stack(masks), counts


@pytest.mark.parametrize(
    "pattern", [P24, NMPattern(1, 4), NMPattern(3, 5), NMPattern(4, 8), NMPattern(1, 20), NMPattern(19, 20)]
)
def test_alps_equals_the_row_by_row_definition(pattern: NMPattern) -> None:
    weight_OI, x_TI = random(6, 40), inputs(200, 40)
    x_TI[:, [3, 17]] = 0
    statistics = statistics_of(x_TI)
    assert statistics.gram_II is not None
    pruned = alps(weight_OI, statistics, pattern, CriterionOptions(damping=0.05))
    expected_OI, mask_OI, counts = slow_alps(weight_OI, statistics.gram_II, pattern, 0.05)
    assert torch.equal(pruned.mask_OI, mask_OI)
    torch.testing.assert_close(pruned.weight_OI, expected_OI, rtol=1e-7, atol=1e-9)
    assert min(counts) >= 30
    check_form(weight_OI, pruned, pattern)


def test_rows_end_at_different_iterations_and_at_the_last_one_anyhow(monkeypatch: pytest.MonkeyPatch) -> None:
    weight_OI, statistics = random(12, 64), statistics_of(inputs(80, 64))
    assert statistics.gram_II is not None
    expected_OI, _, counts = slow_alps(weight_OI, statistics.gram_II, P24, 0.01)
    assert len(set(counts)) > 1
    torch.testing.assert_close(alps(weight_OI, statistics, P24, DEFAULT).weight_OI, expected_OI, rtol=1e-7, atol=1e-9)
    monkeypatch.setattr(alps_module, "_MOST_ITERATIONS", 6)
    check_form(weight_OI, alps(weight_OI, statistics, P24, DEFAULT), P24)


def test_pieces_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight_OI, statistics = random(7, 32), statistics_of(inputs(200, 32))
    whole = alps(weight_OI, statistics, P24, DEFAULT)
    monkeypatch.setattr(criterion_module, "PIECE_WEIGHTS", 100)
    pieces = alps(weight_OI, statistics, P24, DEFAULT)
    assert torch.equal(whole.mask_OI, pieces.mask_OI)
    torch.testing.assert_close(whole.weight_OI, pieces.weight_OI, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_alps_in_low_precision_is_as_good_as_in_fp64(dtype: torch.dtype) -> None:
    # Rounding turns choices, and a turned choice the rest of its row; the error it leaves is what must not change.
    weight_OI, x_TI = random(32, 128).to(dtype), inputs(600, 128)
    statistics = statistics_of(x_TI)
    low, high = (alps(w_OI, statistics, P24, DEFAULT) for w_OI in (weight_OI, weight_OI.double()))
    assert float((low.mask_OI == high.mask_OI).float().mean()) > 0.95
    errors = [output_error(weight_OI, pruned.weight_OI, x_TI) for pruned in (low, high)]
    assert errors[0] < 1.03 * errors[1]


@pytest.mark.parametrize("pattern", [P24, NMPattern(1, 4), NMPattern(4, 8)])
@pytest.mark.parametrize("seed", range(2))
def test_alps_is_far_better_than_sparsegpt(pattern: NMPattern, seed: int) -> None:
    weight_OI, x_TI = random(48, 96, seed=seed).float(), inputs(1000, 96, seed=seed)
    error = {
        function.__name__: output_error(weight_OI, function(weight_OI, statistics_of(x_TI), pattern, DEFAULT).weight_OI, x_TI)
        for function in (alps, sparsegpt)
    }
    assert error["alps"] < 0.8 * error["sparsegpt"]


def test_alps_holds_up_on_tokens_it_has_not_seen() -> None:
    weight_OI, x_TI = random(48, 96).float(), inputs(1200, 96)
    statistics, unseen_TI = statistics_of(x_TI[:600]), x_TI[600:]
    errors = [output_error(weight_OI, f(weight_OI, statistics, P24, DEFAULT).weight_OI, unseen_TI) for f in (alps, sparsegpt)]
    assert errors[0] < 0.8 * errors[1]


def test_alps_does_not_depend_on_the_scale_of_the_inputs() -> None:
    weight_OI, x_TI = random(8, 32), inputs(200, 32)
    x_TI[:, [0, 5]] = 0
    small, large = (alps(weight_OI, statistics_of(x_TI * scale), P24, DEFAULT) for scale in (2**-6, 2**6))
    assert torch.equal(small.mask_OI, large.mask_OI)
    torch.testing.assert_close(small.weight_OI, large.weight_OI, rtol=1e-9, atol=1e-12)


def test_ties_go_to_the_lowest_index_and_dead_features_get_no_weight() -> None:
    alone = InputStatistics(num_tokens=4, gram_II=torch.eye(8))
    pruned = alps(torch.full((3, 8), -0.5), alone, P24, DEFAULT)
    assert torch.equal(pruned.mask_OI, torch.tensor([True, True, False, False]).repeat(3, 2))
    torch.testing.assert_close(pruned.weight_OI[pruned.mask_OI], torch.full((12,), -0.5))
    weight_OI, x_TI = random(8, 32), inputs(200, 32)
    x_TI[:, 9] = 0
    dead = alps(weight_OI, statistics_of(x_TI), P24, DEFAULT)
    assert not bool(dead.weight_OI[:, 9].any())
    assert not bool(dead.mask_OI[:, 9].any())
    silent = alps(weight_OI, statistics_of(x_TI * 0), P24, DEFAULT)
    assert not bool(silent.weight_OI.any())
    check_form(weight_OI, silent, P24)


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_a_single_token_is_enough_to_end_well(damping: float) -> None:
    # rank 1: without damping, the matrix is singular
    weight_OI, x_TI = random(4, 16).float(), inputs(1, 16)
    pruned = alps(weight_OI, statistics_of(x_TI), P24, CriterionOptions(damping=damping))
    check_form(weight_OI, pruned, P24)
    assert output_error(weight_OI, pruned.weight_OI, x_TI) < 0.05 * output_error(weight_OI, 0 * weight_OI, x_TI)


def test_alps_refuses_what_it_cannot_do() -> None:
    statistics = statistics_of(inputs(40, 8))
    with pytest.raises(SparsepassError, match=r"ALPS prunes one \[out, in\] matrix at a time"):
        alps(random(2, 3, 8), statistics, P24, DEFAULT)
    with pytest.raises(SparsepassError, match="only norms were gathered"):
        alps(random(3, 8), InputStatistics(num_tokens=1, sum_squares_I=torch.ones(8)), P24, DEFAULT)
    with pytest.raises(SparsepassError, match="NaN or Inf"):
        alps(random(3, 8), InputStatistics(num_tokens=1, gram_II=torch.full((8, 8), math.nan)), P24, DEFAULT)
    copies = InputStatistics(num_tokens=1, gram_II=torch.ones(4, 4))
    with pytest.raises(SparsepassError, match=r"do not fit torch\.float16"):
        alps(torch.full((1, 4), 6e4, dtype=torch.float16), copies, NMPattern(1, 4), DEFAULT)
