"""Magnitude: keep the N largest |w| of every group.

Shape suffixes: O out, I in.
"""

from torch import Tensor

from sparsepass.passes.criteria.criterion import CriterionOptions, Pruned, check_weight, keep_masked
from sparsepass.passes.maths import InputStatistics, NMPattern, nm_mask


def magnitude(weight_OI: Tensor, statistics: InputStatistics | None, pattern: NMPattern, options: CriterionOptions) -> Pruned:
    """Prunes a weight by magnitude; ties go to the lowest index.

    Shapes: ``[..., O, I]``.

    Args:
        weight_OI: The dense weight, any float dtype.
        statistics: Not used.
        pattern: The pattern along the last axis.
        options: Not used.

    Returns:
        The weight with +0.0 for what is dropped, and the mask.

    Raises:
        SparsepassError: The weight holds NaN or Inf, or I is not a multiple of M.

    Source: methods.md section 1; Exactness: kept weights bitwise equal.

    >>> import torch
    >>> magnitude(torch.tensor([[0.5, -3.0, 1.0, 1.0]]), None, NMPattern(2, 4), CriterionOptions()).weight_OI
    tensor([[ 0., -3.,  1.,  0.]])
    """
    return keep_masked(weight_OI, nm_mask(magnitude_score(weight_OI, statistics), pattern))


def magnitude_score(weight_OI: Tensor, statistics: InputStatistics | None) -> Tensor:
    """The size of each weight.

    >>> import torch
    >>> magnitude_score(torch.tensor([[0.5, -3.0]]), None)
    tensor([[0.5000, 3.0000]])
    """
    del statistics
    check_weight(weight_OI)
    return weight_OI.detach().abs()
