import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from sparsepass.graph.support.errors import SparsepassError
from sparsepass.passes.maths.statistics import InputStatistics

pytestmark = pytest.mark.numerics


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("in_features", [1, 7, 192, 193, 400, 576])
def test_block_triangular_gram_equals_the_plain_product(in_features: int) -> None:
    batches = [random(300, in_features, seed=seed) for seed in range(3)]
    statistics = InputStatistics.zeros(in_features, gram=True)
    for batch in batches:
        statistics.update(batch)
    x_TI = torch.cat(batches).double()
    gram_II = statistics.gram_II
    assert gram_II is not None
    assert gram_II.dtype == torch.float32
    assert torch.equal(gram_II, gram_II.T)
    # fp32 sums of 900 products of about 1 each: 1e-6 of the largest entry
    expected = x_TI.T @ x_TI
    torch.testing.assert_close(gram_II.double(), expected, rtol=0, atol=1e-6 * float(expected.abs().max()))
    torch.testing.assert_close(statistics.mean_gram().double(), expected / 900, rtol=0, atol=1e-6 * float(expected.max() / 900))
    torch.testing.assert_close(statistics.norms().double(), x_TI.norm(dim=0), rtol=1e-5, atol=0)
    assert statistics.num_tokens == 900


def test_reading_between_updates_changes_nothing() -> None:
    batches = [random(50, 400, seed=seed) for seed in range(3)]
    often, once = (InputStatistics.zeros(400, gram=True) for _ in range(2))
    for batch in batches:
        often.update(batch)
        once.update(batch)
        assert often.gram_II is not None
    first_II, second_II = often.gram_II, once.gram_II
    assert first_II is not None
    assert second_II is not None
    assert torch.equal(first_II, second_II)


@pytest.mark.parametrize("read", [(0,), (1,), (0, 1), ()])
def test_merging_mirrors_again_whichever_side_was_read(read: tuple[int, ...]) -> None:
    x_TI = random(60, 400)
    parts = [InputStatistics.zeros(400, gram=True) for _ in range(2)]
    for part, rows in zip(parts, (x_TI[:30], x_TI[30:]), strict=True):
        part.update(rows)
    for index in read:
        assert parts[index].gram_II is not None
    parts[0].extend(parts[1])
    gram_II = parts[0].gram_II
    assert gram_II is not None
    torch.testing.assert_close(gram_II, x_TI.T @ x_TI, rtol=1e-5, atol=1e-4)


@settings(max_examples=40)
@given(
    st.lists(st.integers(0, 9), max_size=4),
    st.integers(1, 9),
    st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
)
def test_sums_do_not_depend_on_the_batches(sizes: list[int], in_features: int, gram: bool, dtype: torch.dtype) -> None:
    batches = [random(size, in_features, seed=i).to(dtype) for i, size in enumerate(sizes)]
    statistics = InputStatistics.zeros(in_features, gram=gram)
    halves = [InputStatistics.zeros(in_features, gram=gram) for _ in range(2)]
    for i, batch in enumerate(batches):
        statistics.update(batch.unsqueeze(0))
        halves[i % 2].update(batch)
        halves[0].gram_II  # noqa: B018 -- mirrors, which a merge must survive
    halves[0].extend(halves[1])
    sums = [[sum(float(row[j]) ** 2 for batch in batches for row in batch) for j in range(in_features)]]
    for seen in (statistics, halves[0]):
        assert seen.num_tokens == sum(sizes)
        torch.testing.assert_close(seen.sum_squares_I, torch.tensor(sums[0], dtype=torch.float32))
        if gram:
            assert seen.gram_II is not None
            assert torch.equal(seen.gram_II, seen.gram_II.T)
            x_TI = torch.cat([torch.zeros(0, in_features, dtype=dtype), *batches]).double()
            torch.testing.assert_close(seen.gram_II.double(), x_TI.T @ x_TI, rtol=1e-5, atol=1e-5)


def test_low_precision_inputs_are_summed_in_fp32_in_pieces() -> None:
    x_TI = random(30000, 200).bfloat16()  # 20971 tokens a piece for the Gram matrix, 1310 for the norms
    # 200 features: strips of 192 would leave a narrow one, which MKL sums inaccurately
    exact_I = x_TI.double().square().sum(0)
    for gram in (True, False):
        statistics = InputStatistics.zeros(200, gram=gram)
        statistics.update(x_TI)
        assert statistics.num_tokens == 30000
        torch.testing.assert_close(statistics.sum_squares_I.double(), exact_I, rtol=2e-6, atol=0)


@pytest.mark.parametrize("gram", [True, False])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_raise_and_name_the_features(gram: bool, bad: float) -> None:
    x_TI = random(20, 300)
    x_TI[3, 7] = x_TI[4, 7] = x_TI[5, 299] = bad
    with pytest.raises(SparsepassError, match=r"3 of 6000 calibration activations are NaN or Inf, in features 7, 299;"):
        InputStatistics.zeros(300, gram=gram).update(x_TI.bfloat16())


def test_many_bad_features_are_counted_and_overflow_is_told_apart() -> None:
    with pytest.raises(SparsepassError, match=r"features 0, 1, 2, 3, 4, 5, 6, 7 and 12 more"):
        InputStatistics.zeros(20, gram=True).update(torch.full((2, 20), math.nan))
    with pytest.raises(SparsepassError, match="overflow fp32, in feature 0;"):
        InputStatistics.zeros(1, gram=True).update(torch.full((2, 1), 1e25))


def test_wrong_inputs_are_explained() -> None:
    statistics = InputStatistics.zeros(8, gram=False)
    with pytest.raises(SparsepassError, match=r"8 features got activations of shape \(3, 9\)"):
        statistics.update(torch.ones(3, 9))
    with pytest.raises(SparsepassError, match="int64"):
        statistics.update(torch.ones(3, 8, dtype=torch.long))
    with pytest.raises(SparsepassError, match="norms only"):
        statistics.mean_gram()
    with pytest.raises(SparsepassError, match="no tokens"):
        InputStatistics.zeros(8, gram=True).mean_gram()
    for other in (InputStatistics.zeros(9, gram=False), InputStatistics.zeros(8, gram=True)):
        with pytest.raises(SparsepassError, match="cannot merge input statistics of 8 features with norms only"):
            statistics.extend(other)
    for bad in (
        {},
        {"sum_squares_I": torch.ones(2), "gram_II": torch.eye(2)},
        {"sum_squares_I": torch.eye(2)},
        {"gram_II": torch.ones(2)},
    ):
        with pytest.raises(SparsepassError):
            InputStatistics(num_tokens=1, **bad)


def test_statistics_do_not_keep_the_graph_of_their_inputs() -> None:
    x_TI = random(4, 8).requires_grad_()
    for gram in (True, False):
        statistics = InputStatistics.zeros(8, gram=gram)
        statistics.update(x_TI * 2)
        assert not statistics.sum_squares_I.requires_grad
