"""The best values of the weights that a mask keeps, whichever criterion chose it.

Shape suffixes: O out, I in.
"""

from dataclasses import replace

import torch
from torch import Tensor

from sparsepass.graph.support import SparsepassError
from sparsepass.passes.criteria.criterion import Pruned, all_finite, check_statistics, unit_gram, working_dtype
from sparsepass.passes.maths import InputStatistics, canonical_zeros

# Rows are taken in pieces of about this many weights: they do not depend on each other, and six such arrays are held.
PIECE_WEIGHTS = 1 << 22


@torch.no_grad()
def refine(weight_OI: Tensor, pruned: Pruned, statistics: InputStatistics | None, *, damping: float, num_steps: int) -> Pruned:
    """Move the kept weights towards those that leave the least output error, by conjugate gradients on the mask.

    A criterion that goes column by column (SparseGPT) cannot take back what an earlier column has settled; here all kept
    weights of a row move at once. With ``A`` the damped Gram matrix, each row minimises ``(v - w) A (v - w)`` over the values
    v on its mask, w the dense row. In the scale in which A has ones on its diagonal, that diagonal is no preconditioner any
    more, and a few steps go most of the way. Steps beyond that, on few calibration tokens, fit those tokens too well.

    Cost: 2 O I^2 operations a step, and one more step's.

    Shapes: ``[O, I]``.

    Args:
        weight_OI: The dense weight.
        pruned: What a criterion made of it. Its values are where the steps start from, its mask stays.
        statistics: The inputs' Gram matrix.
        damping: Added to that matrix' diagonal, as a fraction of its mean.
        num_steps: Steps to take.

    Returns:
        The improved weight in the dense one's dtype, and mask and note as they were.

    Raises:
        SparsepassError: The weight is not 2-D, the statistics are missing or do not fit or hold NaN or Inf, or the result
            does not fit the weight's dtype.

    Source: the last step of ALPS, arXiv 2406.07831, section 3.3, taken behind any mask.

    >>> statistics = InputStatistics(num_tokens=4, gram_II=torch.eye(4) + 1.0)
    >>> mask = torch.tensor([[False, False, True, True]])
    >>> start = Pruned(weight_OI=torch.tensor([[0.0, 0.0, 3.0, 4.0]]), mask_OI=mask)
    >>> refine(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), start, statistics, damping=0.0, num_steps=4).weight_OI.round(decimals=4)
    tensor([[0., 0., 4., 5.]])
    """
    if weight_OI.dim() != 2:
        raise SparsepassError(f"one [out, in] matrix is refined at a time, got shape {tuple(weight_OI.shape)}")
    known = check_statistics(statistics, weight_OI.shape[1], criterion="refine", gram=True)
    dtype = working_dtype(weight_OI)
    gram_II, scale_I, dead_I = unit_gram(known, damping, dtype=dtype, device=weight_OI.device)
    refined_OI = torch.empty_like(weight_OI, memory_format=torch.contiguous_format)
    piece = max(1, PIECE_WEIGHTS // max(weight_OI.shape[1], 1))
    for start in range(0, len(weight_OI), piece):
        rows = slice(start, start + piece)
        dense_OI, kept_OI = (w[rows].to(dtype).masked_fill(dead_I, 0) * scale_I for w in (weight_OI, pruned.weight_OI))
        kept_IO, mask_IO = kept_OI.T.contiguous(), pruned.mask_OI[rows].T.contiguous()
        residual_IO = gram_II @ (dense_OI - kept_OI).T
        kept_IO = solve_on_support(kept_IO, mask_IO, residual_IO, gram_II, num_steps=num_steps)
        refined_OI[rows] = (kept_IO.T / scale_I).to(weight_OI.dtype)
    if not all_finite(refined_OI):
        raise SparsepassError(
            f"the refined weights do not fit {weight_OI.dtype} (damping {damping:g}); raise the damping, give more "
            "calibration data, or prune in a dtype with more range"
        )
    return replace(pruned, weight_OI=canonical_zeros(refined_OI))


def solve_on_support(weight_IO: Tensor, support_IO: Tensor, residual_IO: Tensor, gram_II: Tensor, *, num_steps: int) -> Tensor:
    """Conjugate gradients for ``A w = goal`` on each row's support, all rows at once.

    Shapes: ``[I, O]``, ``[I, O]``, ``[I, O]``, ``[I, I]`` to ``[I, O]``.

    Args:
        weight_IO: Where to start, zero outside the support.
        support_IO: Bool, the entries that may change.
        residual_IO: ``goal - A w`` at the start; what lies outside the support does not count.
        gram_II: A, symmetric, not negative.
        num_steps: Steps to take; as many as a support has entries solve its row exactly, but for rounding.

    Returns:
        The improved weight: of each step, the one that minimises ``w A w / 2 - goal w`` along its direction.

    Source: arXiv 2406.07831, the last step; methods.md section 1.

    >>> gram, goal = torch.tensor([[2.0, 1.0], [1.0, 2.0]]), torch.tensor([[3.0], [3.0]])
    >>> solve_on_support(torch.zeros(2, 1), torch.tensor([[True], [True]]), goal, gram, num_steps=2).round()
    tensor([[1.],
            [1.]])
    """
    weight_IO = weight_IO.clone()
    residual_IO = residual_IO * support_IO
    direction_IO = residual_IO.clone()
    size_O = residual_IO.square().sum(0)
    for _ in range(num_steps):
        image_IO = gram_II @ direction_IO
        step_O = _divide(size_O, (direction_IO * image_IO).sum(0))
        weight_IO.addcmul_(direction_IO, step_O)
        residual_IO.addcmul_(image_IO.mul_(support_IO), step_O, value=-1)
        before_O, size_O = size_O, residual_IO.square().sum(0)
        direction_IO.mul_(_divide(size_O, before_O)).add_(residual_IO)
    return weight_IO


def _divide(above_O: Tensor, below_O: Tensor) -> Tensor:
    """The quotient, or zero where a row is done: there is nothing left to divide by."""
    return torch.where(below_O > 0, above_O / below_O, 0)
