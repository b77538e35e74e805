"""Synthetic layers for the tests of criteria: weights, activations, and what a pruned weight must look like."""

import math

import torch
from torch import Tensor

from sparsepass.passes.criteria.table import Pruned
from sparsepass.passes.maths.pattern import NMPattern, is_nm
from sparsepass.passes.maths.statistics import InputStatistics


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def inputs(tokens: int, in_features: int, seed: int = 1) -> Tensor:
    """Correlated activations of very different sizes, as in a real layer."""
    mix_II = random(in_features, in_features, seed=seed) / math.sqrt(in_features) + torch.eye(in_features)
    scale_I = torch.exp(random(in_features, seed=seed + 1))
    return (random(tokens, in_features, seed=seed + 2) @ mix_II * scale_I).float()


def statistics_of(x_TI: Tensor) -> InputStatistics:
    statistics = InputStatistics.zeros(x_TI.shape[1], gram=True)
    statistics.update(x_TI)
    return statistics


def output_error(weight_OI: Tensor, pruned_OI: Tensor, x_TI: Tensor) -> float:
    return float((x_TI.double() @ (weight_OI.double() - pruned_OI.double()).T).square().sum())


def check_form(weight_OI: Tensor, pruned: Pruned, pattern: NMPattern) -> None:
    assert pruned.weight_OI.dtype == weight_OI.dtype
    assert pruned.weight_OI.shape == pruned.mask_OI.shape == weight_OI.shape
    assert pruned.weight_OI.is_contiguous()
    assert pruned.mask_OI.is_contiguous()
    assert pruned.mask_OI.dtype == torch.bool
    groups = weight_OI.shape[-1] // pattern.m
    assert bool((torch.unflatten(pruned.mask_OI, -1, (groups, pattern.m)).sum(-1) == pattern.n).all())
    assert is_nm(pruned.weight_OI, pattern)
    assert not bool(pruned.weight_OI[~pruned.mask_OI].any())
    assert not bool((pruned.weight_OI.signbit() & (pruned.weight_OI == 0)).any())
    assert bool(pruned.weight_OI.isfinite().all())
