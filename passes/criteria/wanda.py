"""Wanda: keep the N largest |w| * ||x|| of every group.

Shape suffixes: O out, I in.
"""

import torch
from torch import Tensor

from sparsepass.passes.criteria.criterion import CriterionOptions, Pruned, check_statistics, keep_masked
from sparsepass.passes.maths import InputStatistics, NMPattern, nm_mask


def wanda(weight_OI: Tensor, statistics: InputStatistics | None, pattern: NMPattern, options: CriterionOptions) -> Pruned:
    """Prunes a weight by magnitude times the norm of the input feature; ties go to the lowest index.

    Shapes: ``[..., O, I]``.

    Args:
        weight_OI: The dense weight, any float dtype; scores are computed in fp32, or fp64 if it is.
        statistics: The inputs' norms.
        pattern: The pattern along the last axis.
        options: Not used.

    Returns:
        The weight with +0.0 for what is dropped, and the mask.

    Raises:
        SparsepassError: The weight holds NaN or Inf, I is not a multiple of M, or the statistics are missing or do
            not fit.

    Source: arXiv 2306.11695, equation 1; Exactness: kept weights bitwise equal.

    >>> statistics = InputStatistics(num_tokens=1, sum_squares_I=torch.tensor([100.0, 1.0, 1.0, 1.0]))
    >>> wanda(torch.tensor([[0.5, -3.0, 1.0, 1.0]]), statistics, NMPattern(2, 4), CriterionOptions()).weight_OI
    tensor([[ 0.5000, -3.0000,  0.0000,  0.0000]])
    """
    return keep_masked(weight_OI, nm_mask(wanda_score(weight_OI, statistics), pattern))


def wanda_score(weight_OI: Tensor, statistics: InputStatistics | None) -> Tensor:
    """The size of each weight times the norm of its input feature, in fp32 (fp64 for a weight in fp64).

    >>> wanda_score(torch.tensor([[0.5, -3.0]]), InputStatistics(num_tokens=1, sum_squares_I=torch.tensor([100.0, 1.0])))
    tensor([[5., 3.]])
    """
    known = check_statistics(weight_OI, statistics, criterion="wanda", gram=False)
    dtype = torch.promote_types(weight_OI.dtype, torch.float32)
    norms_I = known.sum_squares_I.to(device=weight_OI.device, dtype=dtype).sqrt()
    return weight_OI.detach().to(dtype).abs() * norms_I
