"""Orders of channels: never worse than the given one, and beside all orders that there are.

Shape suffixes: C channels, R rows.
"""

import itertools

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from sparsepass.graph import SparsepassError
from sparsepass.passes.maths import NMPattern, PermutationMethod, best_order, kept_score

METHODS: tuple[PermutationMethod, ...] = ("assignment", "greedy")
PATTERNS = (NMPattern(2, 4), NMPattern(1, 4), NMPattern(3, 4))


def kept_by_definition(score_CR: Tensor, pattern: NMPattern) -> float:
    """Group by group, row by row."""
    groups = score_CR.double().split(pattern.m)
    return sum(sum(sorted(row.tolist())[-pattern.n :]) for group in groups for row in group.T)


def scores(seed: int, channels: int, rows: int, *, ties: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(channels, rows, generator=generator).abs()
    found = found * torch.randn(channels, 1, generator=generator).exp()
    return found.round() if ties else found


@settings(max_examples=60, derandomize=True)
@given(
    st.integers(0, 10_000),
    st.integers(1, 6),
    st.integers(1, 9),
    st.sampled_from(PATTERNS),
    st.sampled_from(METHODS),
    st.booleans(),
)
def test_no_order_keeps_less_than_the_given_one(
    seed: int, groups: int, rows: int, pattern: NMPattern, method: PermutationMethod, ties: bool
) -> None:
    score_CR = scores(seed, 4 * groups, rows, ties=ties)
    order_C = best_order(score_CR, pattern, method)
    assert sorted(order_C.tolist()) == list(range(4 * groups))
    before, after = (kept_by_definition(found, pattern) for found in (score_CR, score_CR[order_C]))
    assert after >= before
    assert kept_score(score_CR, pattern) == pytest.approx(before)


@settings(max_examples=40, derandomize=True)
@given(st.integers(0, 10_000), st.integers(1, 6), st.sampled_from(PATTERNS))
def test_beside_all_orders_of_eight_channels(seed: int, rows: int, pattern: NMPattern) -> None:
    score_CR = scores(seed, 8, rows)
    best = max(
        kept_by_definition(score_CR[[0, *others, *(c for c in range(1, 8) if c not in others)]], pattern)
        for others in itertools.combinations(range(1, 8), 3)
    )
    given_ = kept_by_definition(score_CR, pattern)
    for method in METHODS:
        found = kept_by_definition(score_CR[best_order(score_CR, pattern, method)], pattern)
        assert given_ <= found <= best * (1 + 1e-9)


@pytest.mark.parametrize("rows", [1, 4, 32])
def test_most_of_what_eight_channels_can_gain_is_gained(rows: int) -> None:
    """A guard against a search that finds little."""
    gained = dict.fromkeys(METHODS, 0.0)
    possible = 0.0
    for seed in range(30):
        score_CR, pattern = scores(seed, 8, rows), NMPattern(2, 4)
        given_ = kept_score(score_CR, pattern)
        possible -= given_ - max(
            kept_score(score_CR[[0, *others, *(c for c in range(1, 8) if c not in others)]], pattern)
            for others in itertools.combinations(range(1, 8), 3)
        )
        for method in METHODS:
            gained[method] += kept_score(score_CR[best_order(score_CR, pattern, method)], pattern) - given_
    assert gained["assignment"] > 0.9 * possible
    assert gained["greedy"] > 0.6 * possible


def test_refinement_finds_more_than_greedy_on_many_channels() -> None:
    score_CR, pattern = scores(0, 64, 50), NMPattern(2, 4)
    greedy, refined = (
        kept_score(score_CR[best_order(score_CR, pattern, method)], pattern) for method in ("greedy", "assignment")
    )
    assert refined > greedy > kept_score(score_CR, pattern)


def test_the_best_order_stays() -> None:
    """What is dealt out keeps less here, and the same order is found again from the one that was found."""
    score_CR, pattern = torch.eye(8)[:, [0, 1, 2, 3, 4, 5, 6, 7]] + 1, NMPattern(2, 4)
    assert best_order(score_CR, pattern).tolist() == list(range(8))


def test_channels_that_make_no_groups_are_refused() -> None:
    with pytest.raises(SparsepassError, match="6 channels do not make groups of 4"):
        best_order(torch.ones(6, 2), NMPattern(2, 4))
