import math
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings, strategies as st
from tests.layers import check_form, inputs, output_error, random, statistics_of
from torch import Tensor

from sparsepass.graph.support.errors import SparsepassError
from sparsepass.passes.criteria import proxsparse as proxsparse_module
from sparsepass.passes.criteria.magnitude import magnitude
from sparsepass.passes.criteria.proxsparse import proxsparse, symmetric_prox
from sparsepass.passes.criteria.table import CriterionOptions
from sparsepass.passes.criteria.wanda import wanda
from sparsepass.passes.maths.pattern import NMPattern
from sparsepass.passes.maths.statistics import InputStatistics

pytestmark = pytest.mark.numerics

P24 = NMPattern(2, 4)
DEFAULT = CriterionOptions()


def regulariser(group: list[float], n: int) -> float:
    return sum(math.prod(abs(w) for w in chosen) for chosen in combinations(group, n + 1))


def loss(found: list[float], point: list[float], strength: float, n: int) -> float:
    return sum((u - y) ** 2 for u, y in zip(found, point, strict=True)) / 2 + strength * regulariser(found, n)


def slow_prox(point: list[float], strength: float, n: int, num_sweeps: int) -> list[float]:
    """One group: every number of nonzeros in turn, products by enumeration."""
    order = sorted(range(len(point)), key=lambda i: (-abs(point[i]), i))
    candidates = []
    for count in range(n, len(point) + 1):
        kept = sorted(order[:count])
        found = [abs(y) if i in kept else 0.0 for i, y in enumerate(point)]
        for _ in range(num_sweeps if count > n else 0):
            for i in kept:
                others = [found[j] for j in kept if j != i]
                found[i] = max(0.0, abs(point[i]) - strength * regulariser(others, n - 1))
        candidates.append(found)
    best = min(candidates, key=lambda found: loss(found, [abs(y) for y in point], strength, n))
    return [math.copysign(u, y) for u, y in zip(best, point, strict=True)]


def slow_proxsparse(weight_OI: Tensor, gram_II: Tensor, pattern: NMPattern, damping: float) -> Tensor:
    """The mask, one row after another."""
    size, m = weight_OI.shape[1], pattern.m
    a_II = gram_II.double().clone()
    dead = [i for i in range(size) if a_II[i, i] == 0]
    mean = float(a_II.diagonal().sum()) / (size - len(dead))
    for i in range(size):
        a_II[i, i] = 1 if i in dead else a_II[i, i] + damping * mean
    norm_I = a_II.diagonal().sqrt()
    a_II = a_II / torch.outer(norm_I, norm_I)
    step = 1 / float(torch.linalg.matrix_norm(a_II, 2))
    mask_OI = torch.zeros(weight_OI.shape, dtype=torch.bool)
    for row, dense_I in enumerate(weight_OI.double()):
        w_I = dense_I * norm_I
        w_I[dead] = 0
        w_I = w_I / w_I.square().mean().sqrt()
        u_I, ahead_I, t = w_I, w_I, 1.0
        for k in range(40):
            strength = 0.02 * 50 ** (k / 39)
            point_I = ahead_I - step * (a_II @ (ahead_I - w_I))
            groups = [slow_prox(group.tolist(), strength, pattern.n, 3) for group in point_I.view(-1, m)]
            new_I = torch.tensor(groups, dtype=torch.float64).flatten()
            t_next = (1 + math.sqrt(1 + 4 * t * t)) / 2
            u_I, ahead_I, t = new_I, new_I + (t - 1) / t_next * (new_I - u_I), t_next
        for left in range(0, size, m):
            best = sorted(range(left, left + m), key=lambda j: (-abs(float(u_I[j])), j))
            mask_OI[row, best[: pattern.n]] = True
    return mask_OI


@pytest.mark.parametrize("pattern", [P24, NMPattern(1, 4), NMPattern(3, 4), NMPattern(2, 3)])
def test_proxsparse_equals_the_row_by_row_definition(pattern: NMPattern) -> None:
    weight_OI, x_TI = random(3, 12), inputs(60, 12)
    x_TI[:, 5] = 0
    statistics = statistics_of(x_TI)
    assert statistics.gram_II is not None
    pruned = proxsparse(weight_OI, statistics, pattern, CriterionOptions(damping=0.05))
    assert torch.equal(pruned.mask_OI, slow_proxsparse(weight_OI, statistics.gram_II, pattern, 0.05))
    check_form(weight_OI, pruned, pattern)
    assert torch.equal(pruned.weight_OI[pruned.mask_OI], weight_OI[pruned.mask_OI])


@settings(max_examples=40)
@given(
    st.integers(2, 6).flatmap(lambda m: st.tuples(st.integers(1, m - 1), st.lists(st.floats(-3, 3), min_size=m, max_size=m))),
    st.floats(0, 4),
    st.integers(1, 4),
)
def test_the_proximal_operator_equals_its_definition(case: tuple[int, list[float]], strength: float, num_sweeps: int) -> None:
    n, point = case
    found_M = symmetric_prox(torch.tensor(point, dtype=torch.float64).unsqueeze(1), strength, n, num_sweeps=num_sweeps)
    found, expected = found_M.flatten().tolist(), slow_prox(point, strength, n, num_sweeps)
    # losses, since rounding may decide between two candidates
    assert math.isclose(loss(found, point, strength, n), loss(expected, point, strength, n), rel_tol=1e-9, abs_tol=1e-12)
    assert loss(found, point, strength, n) <= loss(point, point, strength, n) + 1e-12
    assert all(u * y >= 0 and abs(u) <= abs(y) for u, y in zip(found, point, strict=True))


@pytest.mark.parametrize("strength", [0.05, 0.3, 0.8, 2.0])
def test_no_point_beats_the_proximal_operator_of_two_in_four(strength: float) -> None:
    point_MX = random(4, 50, seed=int(100 * strength))
    found_MX = symmetric_prox(point_MX, strength, 2, num_sweeps=300)

    def losses(u_MXS: Tensor) -> Tensor:
        a, b, c, d = u_MXS.abs()
        products: Tensor = a * b * c + b * c * d + c * d * a + d * a * b
        distance = (u_MXS - point_MX.unsqueeze(2)).square().sum(0)
        return distance / 2 + strength * products

    found_X = losses(found_MX.unsqueeze(2)).squeeze(1)
    # points all over the box that the minimum lies in, with and without zeros, and points near by
    generator = torch.Generator().manual_seed(0)
    shares_MXS = torch.rand(4, 50, 4000, generator=generator, dtype=torch.float64)
    keep_MXS = torch.rand(4, 50, 4000, generator=generator, dtype=torch.float64) < 0.7
    anywhere_MXS = point_MX.unsqueeze(2) * shares_MXS * keep_MXS
    near_MXS = found_MX.unsqueeze(2) + 1e-3 * (shares_MXS - 0.5)
    assert bool((losses(anywhere_MXS).amin(1) >= found_X).all())
    assert bool((losses(near_MXS).amin(1) >= found_X - 1e-12).all())


def test_the_proximal_operator_of_no_strength_changes_nothing_and_of_much_keeps_n() -> None:
    point_MX = random(4, 30)
    assert torch.equal(symmetric_prox(point_MX, 0.0, 2, num_sweeps=3), point_MX)
    hard_MX = symmetric_prox(point_MX, 1e6, 2, num_sweeps=3)
    assert torch.equal((hard_MX != 0).sum(0), torch.full((30,), 2))
    assert torch.equal(hard_MX[hard_MX != 0], point_MX[hard_MX != 0])
    assert not bool(symmetric_prox(torch.zeros(4, 3), 0.5, 2, num_sweeps=3).any())


def test_pieces_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight_OI, statistics = random(7, 32), statistics_of(inputs(200, 32))
    whole = proxsparse(weight_OI, statistics, P24, DEFAULT)
    monkeypatch.setattr(proxsparse_module, "_PIECE_WEIGHTS", 100)
    assert torch.equal(whole.mask_OI, proxsparse(weight_OI, statistics, P24, DEFAULT).mask_OI)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_proxsparse_in_low_precision_is_as_good_as_in_fp64(dtype: torch.dtype) -> None:
    weight_OI, x_TI = random(32, 128).to(dtype), inputs(600, 128)
    low, high = (proxsparse(w_OI, statistics_of(x_TI), P24, DEFAULT) for w_OI in (weight_OI, weight_OI.double()))
    assert float((low.mask_OI == high.mask_OI).float().mean()) > 0.98
    errors = [output_error(weight_OI, pruned.weight_OI, x_TI) for pruned in (low, high)]
    assert errors[0] < 1.03 * errors[1]


@pytest.mark.parametrize("pattern", [P24, NMPattern(1, 4), NMPattern(4, 8)])
@pytest.mark.parametrize("seed", range(2))
def test_proxsparse_finds_better_masks_than_wanda(pattern: NMPattern, seed: int) -> None:
    # as in real layers, a few directions that all features share carry much of the activations
    weight_OI, x_TI = random(48, 96, seed=seed).float(), inputs(1000, 96, seed=seed)
    x_TI += (random(1000, 6, seed=seed + 50) @ random(6, 96, seed=seed + 60)).float() * x_TI.std(0)
    statistics, unseen_TI = statistics_of(x_TI[:600]), x_TI[600:]
    for known_TI in (x_TI[:600], unseen_TI):
        error = {
            function.__name__: output_error(weight_OI, function(weight_OI, statistics, pattern, DEFAULT).weight_OI, known_TI)
            for function in (proxsparse, wanda, magnitude)
        }
        assert error["proxsparse"] < 0.9 * error["wanda"]
        assert error["wanda"] < error["magnitude"]


def test_proxsparse_does_not_depend_on_the_scale_of_inputs_and_rows() -> None:
    weight_OI, x_TI = random(8, 32), inputs(200, 32)
    x_TI[:, [0, 5]] = 0
    masks = [
        proxsparse(weight_OI * rows, statistics_of(x_TI * scale), P24, DEFAULT).mask_OI
        for rows, scale in ((1, 2**-6), (1, 2**6), (4, 1))
    ]
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[0], masks[2])


def test_ties_go_to_the_lowest_index_and_dead_features_rank_last() -> None:
    alone = InputStatistics(num_tokens=4, gram_II=torch.eye(8))
    pruned = proxsparse(torch.full((3, 8), -0.5), alone, P24, DEFAULT)
    assert torch.equal(pruned.mask_OI, torch.tensor([True, True, False, False]).repeat(3, 2))
    weight_OI, x_TI = random(8, 32), inputs(200, 32)
    x_TI[:, 9] = 0
    assert not bool(proxsparse(weight_OI, statistics_of(x_TI), P24, DEFAULT).mask_OI[:, 9].any())
    silent = proxsparse(weight_OI, statistics_of(x_TI * 0), P24, DEFAULT)
    assert torch.equal(silent.mask_OI, torch.tensor([True, True, False, False]).repeat(8, 8))
    check_form(weight_OI, silent, P24)


def test_proxsparse_refuses_what_it_cannot_do() -> None:
    statistics = statistics_of(inputs(40, 8))
    with pytest.raises(SparsepassError, match=r"ProxSparse prunes one \[out, in\] matrix at a time"):
        proxsparse(random(2, 3, 8), statistics, P24, DEFAULT)
    with pytest.raises(SparsepassError, match=r"every 9 of 16 weights, too many for 8:16; choose a pattern with M up to 8"):
        proxsparse(random(2, 32), statistics_of(inputs(40, 32)), NMPattern(8, 16), DEFAULT)
    with pytest.raises(SparsepassError, match="only norms were gathered"):
        proxsparse(random(3, 8), InputStatistics(num_tokens=1, sum_squares_I=torch.ones(8)), P24, DEFAULT)
    with pytest.raises(SparsepassError, match="NaN or Inf"):
        proxsparse(random(3, 8), InputStatistics(num_tokens=1, gram_II=torch.full((8, 8), math.nan)), P24, DEFAULT)
