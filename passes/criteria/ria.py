"""RIA: keep the N largest by a weight's share of its row and of its column, times the root of the input feature's norm.

Shape suffixes: O out, I in.
"""

import torch
from torch import Tensor

from sparsepass.graph.support import SparsepassError
from sparsepass.passes.criteria.criterion import CriterionOptions, Pruned, check_statistics, keep_masked
from sparsepass.passes.maths import InputStatistics, NMPattern, nm_mask


@torch.no_grad()
def ria(weight_OI: Tensor, statistics: InputStatistics | None, pattern: NMPattern, options: CriterionOptions) -> Pruned:
    """Prunes a weight by relative importance and activations; ties go to the lowest index.

    The score is ``(|w| / column sum of |w| + |w| / row sum of |w|) * sqrt(||x||)``, so that no whole input or output
    channel of small weights is pruned away. Column sums run over the rows of one layer: siblings are not stacked.

    Shapes: ``[..., O, I]``; with leading axes, every matrix has sums of its own.

    Args:
        weight_OI: The dense weight, any float dtype; scores are computed in fp32 (fp64 for a weight in fp64).
        statistics: The inputs' norms.
        pattern: The pattern along the last axis.
        options: Not used.

    Returns:
        The weight with +0.0 for what is dropped, and the mask.

    Raises:
        SparsepassError: The weight holds NaN or Inf or has one axis only, I is not a multiple of M, or the statistics
            are missing or do not fit.

    Source: RIA (ICLR 2024), the score with exponent 0.5; methods.md section 1. Its channel permutation is the pass
    `permute_channels`.

    Exactness: kept weights bitwise equal.

    >>> statistics = InputStatistics(num_tokens=1, sum_squares_I=torch.ones(4))
    >>> weight = torch.tensor([[9.0, 2.0, 3.0, 4.0], [9.0, 0.5, 8.0, 8.0]])
    >>> ria(weight, statistics, NMPattern(2, 4), CriterionOptions()).weight_OI
    tensor([[9., 2., 0., 0.],
            [0., 0., 8., 8.]])
    """
    return keep_masked(weight_OI, nm_mask(ria_score(weight_OI, statistics), pattern))


@torch.no_grad()
def ria_score(weight_OI: Tensor, statistics: InputStatistics | None) -> Tensor:
    """Each weight's share of its column and of its row, times the root of its input feature's norm.

    >>> ria_score(torch.tensor([[3.0, -1.0]]), InputStatistics(num_tokens=1, sum_squares_I=torch.tensor([16.0, 1.0])))
    tensor([[3.5000, 1.2500]])
    """
    if weight_OI.dim() < 2:
        raise SparsepassError(f"RIA compares the rows of an [out, in] matrix, got shape {tuple(weight_OI.shape)}")
    known = check_statistics(weight_OI, statistics, criterion="ria", gram=False)
    dtype = torch.promote_types(weight_OI.dtype, torch.float32)
    size_OI = weight_OI.detach().to(dtype).abs()
    share_OI = size_OI / _nonzero(size_OI.sum(-2, keepdim=True)) + size_OI / _nonzero(size_OI.sum(-1, keepdim=True))
    root_norms_I = known.sum_squares_I.to(device=weight_OI.device, dtype=dtype).sqrt().sqrt()
    return share_OI * root_norms_I


def _nonzero(sum_X: Tensor) -> Tensor:
    """Divisors for rows or columns of nothing but zeros, whose shares are zero."""
    return sum_X.masked_fill(sum_X == 0, 1)
