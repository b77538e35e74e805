import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from sparsepass.graph.support.errors import SparsepassError
from sparsepass.passes.maths.pattern import NMPattern, canonical_zeros, is_nm, keep_largest, nm_mask, num_violations

pytestmark = pytest.mark.numerics

# Few distinct values, so that ties, zeros of both signs and infinities are common.
VALUES = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, 0.5, 1e-40, math.inf, -math.inf])
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])


@st.composite
def patterns(draw: st.DrawFn) -> NMPattern:
    m = draw(st.integers(2, 20))
    return NMPattern(draw(st.integers(1, m - 1)), m)


@st.composite
def scores(draw: st.DrawFn) -> tuple[Tensor, NMPattern]:
    pattern = draw(patterns())
    rows, groups = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    size = rows * groups * pattern.m
    values = draw(st.lists(VALUES, min_size=size, max_size=size))
    return torch.tensor(values, dtype=draw(DTYPES)).reshape(rows, groups * pattern.m), pattern


def slow_mask(score_OI: Tensor, pattern: NMPattern) -> Tensor:
    mask_OI = torch.zeros(score_OI.shape, dtype=torch.bool)
    for row, scores_I in enumerate(score_OI.tolist()):
        for start in range(0, len(scores_I), pattern.m):
            group = range(start, start + pattern.m)
            for column in sorted(group, key=lambda i: (-scores_I[i], i))[: pattern.n]:
                mask_OI[row, column] = True
    return mask_OI


def slow_violations(weight_OI: Tensor, pattern: NMPattern) -> int:
    count = 0
    for row in weight_OI.tolist():
        for start in range(0, len(row), pattern.m):
            count += sum(value != 0 for value in row[start : start + pattern.m]) > pattern.n
    return count


@settings(max_examples=150)
@given(scores())
def test_mask_equals_the_definition(case: tuple[Tensor, NMPattern]) -> None:
    score_OI, pattern = case
    mask_OI = nm_mask(score_OI, pattern)
    assert mask_OI.dtype == torch.bool
    assert mask_OI.is_contiguous()
    assert torch.equal(mask_OI, slow_mask(score_OI, pattern))
    kept = torch.unflatten(mask_OI, -1, (score_OI.shape[1] // pattern.m, pattern.m)).sum(-1)
    assert bool((kept == pattern.n).all())


@settings(max_examples=100)
@given(scores())
def test_violations_equal_the_definition(case: tuple[Tensor, NMPattern]) -> None:
    weight_OI, pattern = case
    expected = slow_violations(weight_OI, pattern)
    assert num_violations(weight_OI, pattern) == expected
    assert num_violations(weight_OI.T, pattern, axis=0) == expected
    assert is_nm(weight_OI, pattern) == (expected == 0)
    assert is_nm(weight_OI.masked_fill(~nm_mask(weight_OI, pattern), 0), pattern)


@settings(max_examples=50)
@given(st.lists(st.floats(allow_nan=True), max_size=20), DTYPES)
def test_canonical_zeros_changes_only_negative_zeros(values: list[float], dtype: torch.dtype) -> None:
    tensor = torch.tensor(values, dtype=torch.float64).to(dtype)
    canonical = canonical_zeros(tensor)
    assert canonical.dtype == dtype
    assert not bool((canonical.signbit() & (canonical == 0)).any())
    torch.testing.assert_close(canonical, tensor, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("m", [4, 16, 17, 64, 200])
def test_ties_go_to_the_lowest_index_at_every_size_of_group(m: int) -> None:
    pattern = NMPattern(m // 2, m)
    expected = (torch.arange(2 * m) % m < m // 2).expand(3, -1)
    assert torch.equal(nm_mask(torch.zeros(3, 2 * m), pattern), expected)
    assert num_violations(torch.ones(3, 2 * m), pattern) == 6
    assert torch.equal(keep_largest(torch.ones(m, 3), 1).sum(0), torch.ones(3, dtype=torch.long))


def test_masks_of_experts_and_of_strided_scores() -> None:
    score_EOI = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    pattern = NMPattern(2, 4)
    expected = torch.stack([slow_mask(score_OI, pattern) for score_OI in score_EOI])
    assert torch.equal(nm_mask(score_EOI, pattern), expected)
    strided = score_EOI.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    assert torch.equal(nm_mask(strided, pattern), expected)
    assert num_violations(expected.float().permute(0, 2, 1), pattern, axis=1) == 0
    assert num_violations(torch.ones(3, 8, 5), pattern, axis=-2) == 3 * 2 * 5


def test_nan_raises_and_is_a_nonzero() -> None:
    score = torch.ones(2, 8)
    score[1, 3] = math.nan
    with pytest.raises(SparsepassError, match="1 of 16 are NaN"):
        nm_mask(score, NMPattern(2, 4))
    assert num_violations(torch.full((1, 4), math.nan), NMPattern(2, 4)) == 1


def test_features_that_m_does_not_divide_are_named() -> None:
    pattern = NMPattern(2, 4)
    with pytest.raises(ValueError, match=r"30 features.*not a multiple of 4"):
        nm_mask(torch.ones(2, 30), pattern)
    with pytest.raises(ValueError, match=r"30 features along axis 0.*not a multiple of 4"):
        num_violations(torch.ones(30, 4), pattern, axis=0)
    with pytest.raises(ValueError, match="no axis 2"):
        is_nm(torch.ones(4, 4), pattern, axis=2)


@settings(max_examples=50)
@given(patterns())
def test_pattern_text_round_trips(pattern: NMPattern) -> None:
    assert NMPattern.parse(str(pattern)) == pattern
    assert NMPattern.parse(f" {pattern} ") == pattern


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("4:2", "did you mean 2:4"),
        ("0:4", "keep nothing"),
        ("4:4", "keep every weight"),
        ("0:0", "keep nothing"),
        ("2:4:8", "two whole numbers.*'2:4:8'"),
        ("abc", "two whole numbers.*'abc'"),
        ("", "two whole numbers"),
        ("-1:4", "two whole numbers"),
        ("2.0:4", "two whole numbers"),
        ("2:4\n2", "two whole numbers"),
        ("²:4", "two whole numbers"),
    ],
)
def test_bad_patterns_are_explained(text: str, message: str) -> None:
    with pytest.raises(SparsepassError, match=message):
        NMPattern.parse(text)


def test_pattern_takes_whole_numbers_only() -> None:
    for n, m in [(2.0, 4), (True, 4), ("2", 4)]:
        with pytest.raises(SparsepassError, match="whole numbers"):
            NMPattern(n, m)  # type: ignore[arg-type]
    with pytest.raises(SparsepassError, match="-2:4"):
        NMPattern(-2, 4)
