"""The best values of the weights that a mask keeps, by conjugate gradients: after any criterion, and as the last step of ALPS.

Shape suffixes: O out, I in.
"""

from dataclasses import replace

import torch
from torch import Tensor

from sparsepass.graph.support import SparsepassError
from sparsepass.passes.criteria.criterion import GRAM_EPSILON, DampingOf, Pruned, check_statistics, finished, pieces, unit_gram
from sparsepass.passes.maths import InputStatistics


@torch.no_grad()
def refine(
    weight_OI: Tensor,
    pruned: Pruned,
    statistics: InputStatistics | None,
    *,
    damping: float,
    damping_of: DampingOf = "mean",
    num_steps: int,
) -> Pruned:
    """Move the kept weights towards those that leave the least output error, by conjugate gradients on the mask.

    A criterion that goes column by column (SparseGPT) cannot take back what an earlier column has settled; here all kept
    weights of a row move at once. With ``A`` the damped Gram matrix, each row minimises ``(v - w) A (v - w)`` over the values
    v on its mask, w the dense row. In the scale in which A has ones on its diagonal, that diagonal is no preconditioner any
    more, and a few steps go most of the way. Steps beyond that, on few calibration tokens, fit those tokens too well.
    Where the inputs leave the best values open (fewer tokens than features, say), the weights move no more than they must.
    No row ends with more error than it starts with, nor with more than the dense row behind its mask.

    Cost: 2 O I^2 operations a step, and two more steps' (four after a criterion that compensates).

    Shapes: ``[O, I]``.

    Args:
        weight_OI: The dense weight.
        pruned: What a criterion made of it. Its values are where the steps start from, its mask stays.
        statistics: The inputs' Gram matrix.
        damping: Added to that matrix' diagonal, as a fraction.
        damping_of: What it is a fraction of; see `CriterionOptions`.
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
    known = check_statistics(weight_OI, statistics, criterion="refine", gram=True)
    gram_II, scale_I, dead_I = unit_gram(known, weight_OI, damping, damping_of)
    refined_OI = torch.empty_like(weight_OI, memory_format=torch.contiguous_format)
    for rows in pieces(weight_OI):
        both = (w[rows].to(gram_II.dtype).masked_fill(dead_I, 0) * scale_I for w in (weight_OI, pruned.weight_OI))
        dense_IO, kept_IO, mask_IO = (t.T.contiguous() for t in (*both, pruned.mask_OI[rows]))
        kept_IO = solve_rows(dense_IO, kept_IO, mask_IO, gram_II, num_steps=num_steps)
        refined_OI[rows] = (kept_IO.T / scale_I).to(weight_OI.dtype)
    return replace(pruned, weight_OI=finished(refined_OI, "the refined weights", damping=damping))


def solve_rows(dense_IO: Tensor, kept_IO: Tensor, support_IO: Tensor, gram_II: Tensor, *, num_steps: int) -> Tensor:
    """Move each row's kept weights towards those that minimise ``(v - w) A (v - w)``, w the dense row.

    Shapes: ``[I, O]``, ``[I, O]``, ``[I, O]``, ``[I, I]`` to ``[I, O]``.

    Args:
        dense_IO: The dense weight.
        kept_IO: Where to start, zero outside the support.
        support_IO: Bool, the entries that may change.
        gram_II: A, symmetric, not negative.
        num_steps: Steps of conjugate gradients.

    Returns:
        The improved weight, zero outside the support. A row with more error than it started with is returned as it was, and
        one with more error than the dense row behind its mask as that.

    >>> dense, kept, support = torch.tensor([[1.0], [1.0]]), torch.tensor([[7.0], [0.0]]), torch.tensor([[True], [False]])
    >>> solve_rows(dense, kept, support, torch.tensor([[1.0, 0.5], [0.5, 1.0]]), num_steps=0)
    tensor([[1.],
            [0.]])
    """
    residual_IO = gram_II @ (dense_IO - kept_IO)
    solved_IO = solve_on_support(kept_IO, support_IO, residual_IO, gram_II, num_steps=num_steps)
    moved_IO = solved_IO - kept_IO
    image_IO = gram_II @ moved_IO
    is_better_O = (image_IO / 2 - residual_IO).mul_(moved_IO).sum(0) <= 0  # false for NaN
    solved_IO = torch.where(is_better_O, solved_IO, kept_IO)
    masked_IO = dense_IO * support_IO
    if torch.equal(kept_IO, masked_IO):
        return solved_IO
    error_O, masked_error_O = (
        (missing_IO * (gram_II @ missing_IO)).sum(0) for missing_IO in (dense_IO - solved_IO, dense_IO - masked_IO)
    )
    return torch.where(error_O <= masked_error_O, solved_IO, masked_IO)


def solve_on_support(weight_IO: Tensor, support_IO: Tensor, residual_IO: Tensor, gram_II: Tensor, *, num_steps: int) -> Tensor:
    """Conjugate gradients for ``A w = goal`` on each row's support, all rows at once.

    A may be singular: it determines some directions only up to its rounding, and a step along one of them could have any
    length. So a row ends as soon as its residual, or the curvature along its direction, could be rounding alone.

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
    norm = torch.linalg.matrix_norm(gram_II)
    least_curvature = GRAM_EPSILON * norm
    least_residual = torch.finfo(gram_II.dtype).eps * norm
    for _ in range(num_steps):
        image_IO = gram_II @ direction_IO
        curvature_O = (direction_IO * image_IO).sum(0)
        goes_on_O = curvature_O > least_curvature * direction_IO.square().sum(0)
        goes_on_O &= size_O > least_residual.square() * weight_IO.square().sum(0)
        step_O = torch.where(goes_on_O, size_O / curvature_O, 0)
        weight_IO.addcmul_(direction_IO, step_O)
        residual_IO.addcmul_(image_IO.mul_(support_IO), step_O, value=-1)
        before_O, size_O = size_O, residual_IO.square().sum(0)
        # A row that has ended gets no direction any more, and so no curvature either.
        direction_IO.mul_(size_O / before_O).add_(residual_IO).masked_fill_(~goes_on_O, 0)
    return weight_IO
