import itertools
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from sparsepass.export.pattern import bits as pattern_bits
from sparsepass.export.pattern.bits import count_groups, is_conforming, unpack_bits, view_bits

FLOATS = [np.float32, np.float16, np.float64, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]


def slow_count(values: Any, n: int, m: int, axis: int) -> tuple[int, int, tuple[int, ...] | None]:
    """Groups, violations and the first of them, element by element, from the definition."""
    shape = values.shape
    num_groups = num_violations = 0
    first = None
    ranges = [range(0, size, m) if a == axis else range(size) for a, size in enumerate(shape)]
    for start in itertools.product(*ranges):
        group = [values[(*start[:axis], start[axis] + j, *start[axis + 1 :])] for j in range(m)]
        num_groups += 1
        if sum(float(v) != 0.0 for v in group) > n:
            num_violations += 1
            first = first or start
    return num_groups, num_violations, first


@settings(max_examples=60)
@given(data=st.data())
def test_counts_agree_with_the_definition(data: st.DataObject) -> None:
    n, m = data.draw(st.sampled_from([(2, 4), (1, 4), (4, 8), (1, 2), (2, 3), (3, 5), (8, 16)]))
    dtype = data.draw(st.sampled_from(FLOATS))
    rank = data.draw(st.integers(1, 3))
    axis = data.draw(st.integers(0, rank - 1))
    shape = tuple(m * data.draw(st.integers(1, 3)) if a == axis else data.draw(st.integers(1, 5)) for a in range(rank))
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    values = rng.standard_normal(shape) * (rng.random(shape) < n / m)
    values[rng.random(shape) < 0.1] = -0.0
    values = values.astype(dtype)

    count = count_groups(view_bits(values, has_sign=True), n, m, axis)

    assert (count.num_groups, count.num_violations, count.first_violation) == slow_count(values, n, m, axis)
    as_double = values.astype(np.float64)
    assert count.num_nonzeros == np.count_nonzero(as_double)
    assert count.num_negative_zeros == np.count_nonzero((as_double == 0) & np.signbit(as_double))
    assert is_conforming(view_bits(values, has_sign=True), n, m, axis) == (count.num_violations == 0)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_pieces_do_not_change_the_counts(axis: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    view = view_bits((rng.random((8, 12, 4)) < 0.55).astype(np.float16), has_sign=True)
    whole = count_groups(view, 2, 4, axis)
    monkeypatch.setattr(pattern_bits, "_STEP_ELEMENTS", 20)
    assert whole.num_violations > 0
    assert count_groups(view, 2, 4, axis) == whole


def test_smallest_subnormals_and_nan_are_not_zero() -> None:
    for dtype in FLOATS:
        info = ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]
        values = np.array([info.smallest_subnormal, -info.smallest_subnormal, np.nan, 0.0], dtype)
        assert count_groups(view_bits(values, has_sign=True), 2, 4, 0).num_violations == 1


def test_groups_wider_than_a_byte_counts() -> None:
    values = np.ones((600, 1), np.float32)
    assert count_groups(view_bits(values, has_sign=True), 299, 300, 0).num_violations == 2
    assert count_groups(view_bits(values, has_sign=True), 300, 300, 0).num_violations == 0


def test_empty_and_transposed_arrays() -> None:
    assert count_groups(view_bits(np.zeros((0, 4), np.float32), has_sign=True), 2, 4, 1).num_groups == 0
    weight_IO = np.array([[1, 0], [0, 0], [0, 3], [2, 4]], np.float32)
    assert count_groups(view_bits(weight_IO.T, has_sign=True), 2, 4, 1).num_violations == 0


@pytest.mark.parametrize("num_bits", [2, 4, 8])
def test_unpacking_is_lowest_bits_first(num_bits: int) -> None:
    packed = np.array([[0b11100100]], np.uint8)
    expected = {2: [0, 1, 2, 3], 4: [4, 14], 8: [228]}[num_bits]
    assert unpack_bits(packed, num_bits).tolist() == [expected]
