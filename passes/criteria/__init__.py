"""One-shot pruning criteria, one file each, all behind one function signature."""

from sparsepass.passes.criteria.criterion import (
    Criterion,
    CriterionOptions,
    DampingOf,
    GroupOrder,
    Pruned,
    check_weight,
    keep_masked,
)
from sparsepass.passes.criteria.joint import Clip, RoundedWeight, round_jointly
from sparsepass.passes.criteria.refinement import refine
from sparsepass.passes.criteria.sparsegpt import InverseHessian
from sparsepass.passes.criteria.table import CRITERIA, criteria_table

__all__ = [
    "CRITERIA",
    "Clip",
    "Criterion",
    "CriterionOptions",
    "DampingOf",
    "GroupOrder",
    "InverseHessian",
    "Pruned",
    "RoundedWeight",
    "check_weight",
    "criteria_table",
    "keep_masked",
    "refine",
    "round_jointly",
]
