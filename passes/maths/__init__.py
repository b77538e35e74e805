"""Tensor maths that know no graph: patterns, statistics, scales, low-rank branches, reconstruction."""

from sparsepass.passes.maths.awq import EXPONENTS, awq_factors, rounding_error
from sparsepass.passes.maths.clipping import clipped_scales
from sparsepass.passes.maths.pattern import (
    NMPattern,
    add_prior,
    canonical_zeros,
    first_logits,
    keep_largest,
    keep_largest_of_groups,
    nm_mask,
    num_violations,
)
from sparsepass.passes.maths.permutation import PermutationMethod, best_order, kept_score
from sparsepass.passes.maths.reconstruct import Trained, fit, token_error
from sparsepass.passes.maths.rotation import TurnedLayer, entropies, learn_rotations, rotation_from, salience_entropy
from sparsepass.passes.maths.slorb import fixed_projection, slorb_least_squares, slorb_mean_init
from sparsepass.passes.maths.statistics import InputStatistics, dampings, output_size, relative_error

__all__ = [
    "EXPONENTS",
    "InputStatistics",
    "NMPattern",
    "PermutationMethod",
    "Trained",
    "TurnedLayer",
    "add_prior",
    "awq_factors",
    "best_order",
    "canonical_zeros",
    "clipped_scales",
    "dampings",
    "entropies",
    "first_logits",
    "fit",
    "fixed_projection",
    "keep_largest",
    "keep_largest_of_groups",
    "kept_score",
    "learn_rotations",
    "nm_mask",
    "num_violations",
    "output_size",
    "relative_error",
    "rotation_from",
    "rounding_error",
    "salience_entropy",
    "slorb_least_squares",
    "slorb_mean_init",
    "token_error",
]
