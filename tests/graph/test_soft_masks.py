"""Soft masks against what one would write down in float64, group by group; and the noise."""

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from sparsepass.graph import SparsepassError, soft_masks
from sparsepass.graph.soft_masks import (
    Draw,
    candidate_masks,
    gumbel_noise,
    hard_mask,
    kept_norm,
    largest_probabilities,
    noise_key,
    num_candidates,
    soft_weight,
    soft_weight_gradient,
)

pytestmark = pytest.mark.numerics

PATTERNS = [(2, 4), (1, 4), (1, 3), (4, 8), (3, 5)]
CPU = torch.device("cpu")


def candidates(n: int, m: int) -> list[list[int]]:
    """All rows of M bits with N ones, the ones that keep early entries first."""
    rows = [list(bits) for bits in itertools.product((0, 1), repeat=m) if sum(bits) == n]
    return sorted(rows, reverse=True)


def slow_noise(row: int, place: int, num_words: int, key: int) -> float:
    """The noise of one place, with Python's integers."""

    def splitmix(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
        return x ^ (x >> 31)

    offset, stride = splitmix(key) % 2**32, splitmix(key + 2**60) % 2**32 | 1
    x = ((row * num_words + place // 2) * stride + offset) % 2**32
    x = ((x ^ (x >> 16)) * 0x7FEB352D) % 2**32
    x = ((x ^ (x >> 15)) * 0x846CA68B) % 2**32
    x ^= x >> 16
    half = (x >> 16 if place % 2 else x) % 2**16
    signed = half - 2**16 if half >= 2**15 else half
    return -math.log(-math.log((signed + 2**15 + 0.5) / 2**16))


def slow_soft(weight: Tensor, logits: Tensor, n: int, m: int, draw: Draw) -> Tensor:
    """The soft weight by the formula; differentiable."""
    rows = weight.reshape(-1, weight.shape[-1])
    pi = logits.reshape(-1, *logits.shape[-2:])
    num_groups, num_masks = pi.shape[-1], pi.shape[-2]
    table = torch.tensor(candidates(n, m), dtype=torch.float64)
    out = []
    for r, row in enumerate(rows):
        for group in range(num_groups):
            noise = [
                slow_noise(r + draw.first_row, c * num_groups + group, -(-num_masks * num_groups // 2), draw.key)
                for c in range(num_masks)
            ]
            z = (draw.scale * pi[r, :, group].double() + torch.tensor(noise, dtype=torch.float64)) / draw.temperature
            y = (z - z.max()).exp()
            out.append(row[m * group : m * group + m].double() * ((y / y.sum()) @ table))
    return torch.cat(out).reshape(weight.shape)


def case(n: int, m: int, rows: tuple[int, ...] = (3,), num_groups: int = 3, dtype: torch.dtype = torch.float64) -> Any:
    generator = torch.Generator().manual_seed(n * m)
    weight = torch.randn(*rows, num_groups * m, generator=generator).to(dtype)
    return weight, torch.randn(*rows, num_candidates(n, m), num_groups, generator=generator).to(dtype)


def test_candidates_are_all_masks_in_order() -> None:
    for n, m in PATTERNS:
        assert candidate_masks(n, m).int().tolist() == candidates(n, m)


@pytest.mark.parametrize(("n", "m"), [(4, 12), (8, 16), (2, 17)])
def test_too_many_candidates_are_refused_with_numbers(n: int, m: int) -> None:
    with pytest.raises(SparsepassError, match=rf"{n}:{m} has {math.comb(m, n)} candidate masks.* at most 128 candidates"):
        num_candidates(n, m)
    assert num_candidates(2, 16) == 120


@pytest.mark.parametrize(("n", "m"), PATTERNS)
@pytest.mark.parametrize("rows", [(3,), (2, 3), (1,)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_soft_weights_equal_the_formula(
    n: int, m: int, rows: tuple[int, ...], dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, logits = case(n, m, rows, dtype=dtype)
    draw = Draw(scale=1.5, temperature=0.7, key=11)
    expected = slow_soft(weight, logits, n, m, draw)
    found = soft_weight(weight, logits, n, m, draw)
    assert found.dtype == dtype
    # The noise is float32 everywhere.
    assert torch.allclose(found.double(), expected, rtol=tolerance, atol=tolerance)
    monkeypatch.setattr(soft_masks, "_CPU_PIECE", 1)  # row by row
    assert torch.equal(soft_weight(weight, logits, n, m, draw), found)


@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_gradients_equal_the_formulas(n: int, m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, logits = case(n, m, (2, 2))
    draw = Draw(scale=2.0, temperature=0.9, key=5, first_row=7)
    grad = torch.randn(weight.shape, dtype=torch.float64)
    leaf = logits.clone().requires_grad_()
    (expected,) = torch.autograd.grad(slow_soft(weight, leaf, n, m, draw), leaf, grad)
    assert torch.allclose(soft_weight_gradient(grad, weight, logits, n, m, draw), expected, rtol=1e-6, atol=1e-7)
    norm = slow_soft(weight, leaf, n, m, draw).square().sum()
    (of_norm,) = torch.autograd.grad(norm, leaf)
    for piece in (1 << 16, 1):
        monkeypatch.setattr(soft_masks, "_CPU_PIECE", piece)
        gradient = torch.ones_like(logits)
        assert kept_norm(weight, logits, n, m, draw, gradient, -0.5) == pytest.approx(float(norm.detach()), rel=1e-6)
        assert torch.allclose(gradient, 1 - 0.5 * of_norm, rtol=1e-6, atol=1e-7)
    assert kept_norm(weight, logits, n, m, draw, None, 0.0) == pytest.approx(float(norm.detach()), rel=1e-6)


@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_at_no_temperature_it_is_the_argmax(n: int, m: int) -> None:
    weight, logits = case(n, m)
    noise = gumbel_noise(3, logits.shape[1], 3, 9, first_row=0, device=CPU)
    for scale in (1.0, 50.0):
        found = soft_weight(weight, logits, n, m, Draw(scale=scale, temperature=1e-6, key=9))
        expected = torch.where(hard_mask(scale * logits + noise, n, m), weight, 0.0)
        assert torch.allclose(found, expected, atol=1e-9)
    # Where the scale drowns the noise it is the argmax of the logits.
    found = soft_weight(weight, logits, n, m, Draw(scale=1e9, temperature=1.0, key=9))
    assert torch.equal(found, torch.where(hard_mask(logits, n, m), weight, 0.0))


@given(st.lists(st.integers(0, 2), min_size=12, max_size=12))
def test_hard_masks_are_the_argmax_and_ties_go_to_the_lowest(values: list[int]) -> None:
    logits = torch.tensor(values, dtype=torch.float32).view(1, 6, 2)
    mask = hard_mask(logits, 2, 4).view(2, 4)
    for group in range(2):
        column = values[group::2]
        assert mask[group].int().tolist() == candidates(2, 4)[column.index(max(column))]


def test_probabilities_are_those_of_the_choice() -> None:
    _, logits = case(2, 4, (5,), 7)
    for scale in (1.0, 4.0, 20.0):
        p = torch.softmax(scale * logits, 1).amax(1)
        assert largest_probabilities(logits, scale, 0.9) == (int((p > 0.9).sum()), 35)
    assert largest_probabilities(torch.zeros(0, 6, 2), 1.0, 0.9) == (0, 0)


def test_the_noise_is_that_of_its_place_alone() -> None:
    whole = gumbel_noise(40, 3, 3, 123, first_row=0, device=CPU)  # nine to a row: half a word is left over
    for row, c, group in itertools.product((0, 1, 17, 39), range(3), range(3)):
        assert float(whole[row, c, group]) == pytest.approx(slow_noise(row, 3 * c + group, 5, 123), rel=1e-6)
    far = gumbel_noise(2, 3, 3, 123, first_row=2**31, device=CPU)
    assert float(far[1, 2, 2]) == pytest.approx(slow_noise(2**31 + 1, 8, 5, 123), rel=1e-6)


def test_the_noise_is_gumbel_and_keys_are_independent() -> None:
    draws = torch.stack(
        [
            gumbel_noise(64, 6, 64, noise_key(0, step, name), first_row=0, device=CPU).flatten()
            for step in range(4)
            for name in (3, 4)
        ]
    ).double()
    num = draws.shape[1]
    assert float(draws.mean()) == pytest.approx(0.5772, abs=0.01)
    assert float(draws.var()) == pytest.approx(math.pi**2 / 6, rel=0.02)
    for level in (-1.0, 0.0, 1.0, 3.0, 6.0):
        expected = math.exp(-math.exp(-level))
        assert float((draws <= level).double().mean()) == pytest.approx(
            expected, abs=5 * (expected * (1 - expected) / draws.numel()) ** 0.5 + 1e-5
        )
    # No two keys, and no neighbours within one, have to do with each other: five standard deviations of a correlation.
    correlations = torch.corrcoef(draws) - torch.eye(len(draws), dtype=torch.float64)
    assert float(correlations.abs().max()) < 5 / num**0.5
    for lag in (1, 2, 3, 64, 384):
        pair = torch.stack([draws[0, :-lag], draws[0, lag:]])
        assert abs(float(torch.corrcoef(pair)[0, 1])) < 5 / num**0.5


def test_keys_differ_by_seed_step_and_place() -> None:
    keys = {noise_key(seed, step, name) for seed in (-1, 0, 1) for step in range(50) for name in range(50)}
    assert len(keys) == 3 * 50 * 50
    assert all(0 <= key < 2**53 and float(key) == key for key in keys)
