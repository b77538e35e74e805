"""What every criterion is: one function signature, its options, its result, and what they share: checks, and refinement.

Refinement finds the best values of the weights that a mask keeps, whichever criterion chose it.

Shape suffixes: O out, I in.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from sparsepass.graph.support import SparsepassError
from sparsepass.passes.maths import InputStatistics, NMPattern, canonical_zeros, nm_mask

# The relative rounding of Gram matrices, which are summed in fp32 whatever the weights are in.
GRAM_EPSILON = torch.finfo(torch.float32).eps
# Rows are taken in pieces of about this many weights: they do not depend on each other, and eight such arrays are held.
PIECE_WEIGHTS = 1 << 22


@dataclass(frozen=True, kw_only=True)
class CriterionOptions:
    """What a user may set of the criteria.

    Args:
        damping: Added to the Hessian's diagonal, as a fraction of its mean (SparseGPT, ALPS, ProxSparse).
        block_size: Columns whose updates are gathered before later columns see them (SparseGPT); for speed only.

    Raises:
        SparsepassError: A value is out of range.

    >>> CriterionOptions(damping=0.1)
    CriterionOptions(damping=0.1, block_size=128)
    """

    damping: float = 0.01
    block_size: int = 128

    def __post_init__(self) -> None:
        if not (math.isfinite(self.damping) and self.damping >= 0):
            raise SparsepassError(f"damping must be a finite fraction of at least 0, such as 0.01, got {self.damping}")
        if self.block_size < 1:
            raise SparsepassError(f"block_size must be at least 1 column, got {self.block_size}")


@dataclass(frozen=True, kw_only=True, eq=False)
class Pruned:
    """What a criterion makes of one weight.

    Args:
        weight_OI: The pruned weight in the input's dtype: +0.0 wherever the mask is false, and no -0.0 anywhere.
        mask_OI: Bool, exactly N true in every group of M.
        note: What the user should know, such as a raised damping.
    """

    weight_OI: Tensor  # noqa: N815
    mask_OI: Tensor  # noqa: N815
    note: str | None = None


CriterionFunction: TypeAlias = Callable[[Tensor, InputStatistics | None, NMPattern, CriterionOptions], Pruned]


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """One row of the table of criteria.

    Args:
        name: The word users write.
        function: The pure function that prunes one weight.
        needs: What it must know of the inputs: nothing, their feature norms, or their Gram matrix.
        compensates: Whether the kept weights are changed to make up for the dropped ones.
        rows_are_independent: Whether each row is pruned as if it were alone, so that layers that read the same input
            can be stacked and share what is computed from it.
    """

    name: str
    function: CriterionFunction
    needs: Literal["nothing", "norms", "gram"]
    compensates: bool
    rows_are_independent: bool


def check_weight(weight_OI: Tensor) -> None:
    """Makes sure that a weight can be pruned at all.

    Shapes: ``[..., O, I]``.

    Args:
        weight_OI: The weight, N:M along its last axis.

    Raises:
        SparsepassError: It is not of a float dtype with at least one axis, or holds NaN or Inf.

    >>> check_weight(torch.ones(4, 8))
    """
    if not weight_OI.is_floating_point() or weight_OI.dim() == 0:
        raise SparsepassError(
            f"only floating-point weights of at least one axis can be pruned, got {weight_OI.dtype} of shape "
            f"{tuple(weight_OI.shape)}; a quantized model must be pruned before it is quantized"
        )
    if not all_finite(weight_OI):
        bad_OI = ~weight_OI.isfinite()
        num_bad = int(bad_OI.sum())
        first = tuple(bad_OI.nonzero()[0].tolist())
        raise SparsepassError(
            f"{num_bad} of {weight_OI.numel()} weights are NaN or Inf, the first at {first}; the checkpoint is broken"
        )


def all_finite(tensor: Tensor) -> bool:
    """Says whether no entry is NaN or Inf, in one pass over the tensor (``isfinite().all()`` takes five).

    Shapes: any.

    Args:
        tensor: Any float dtype.

    Returns:
        True if every entry is finite.

    >>> all_finite(torch.tensor([1.0, float("nan")]))
    False
    """
    if tensor.numel() == 0:
        return True
    smallest, largest = torch.aminmax(tensor)
    return bool(smallest.isfinite() & largest.isfinite())


def check_statistics(weight_OI: Tensor, statistics: InputStatistics | None, *, criterion: str, gram: bool) -> InputStatistics:
    """Makes sure that a weight can be pruned, and that a criterion has the statistics it needs.

    Args:
        weight_OI: See `check_weight`.
        statistics: What calibration gathered, if anything.
        criterion: The criterion's name, for the message.
        gram: Whether the Gram matrix is needed.

    Returns:
        The statistics.

    Raises:
        SparsepassError: The weight cannot be pruned, or the statistics are missing, empty, of another width, or without the
            Gram matrix.

    >>> check_statistics(torch.ones(4, 8), None, criterion="wanda", gram=False)
    Traceback (most recent call last):
    sparsepass.SparsepassError: the criterion 'wanda' needs calibration data, got none; ...
    """
    check_weight(weight_OI)
    if statistics is None:
        raise SparsepassError(
            f"the criterion {criterion!r} needs calibration data, got none; pass calibration=..., or choose 'magnitude'"
        )
    if statistics.in_features != weight_OI.shape[-1]:
        raise SparsepassError(
            f"the criterion {criterion!r} got a weight of {weight_OI.shape[-1]} input features "
            f"but statistics of {statistics.in_features}"
        )
    if statistics.num_tokens == 0:
        raise SparsepassError(
            f"no calibration token reached this layer, and the criterion {criterion!r} needs some; "
            "give more or other calibration data, or choose 'magnitude' here"
        )
    if gram and not statistics.has_gram:
        raise SparsepassError(f"the criterion {criterion!r} needs the inputs' Gram matrix, but only norms were gathered")
    return statistics


def check_matrix(weight_OI: Tensor, statistics: InputStatistics | None, pattern: NMPattern, *, method: str) -> InputStatistics:
    """Makes sure of all that a method needs which prunes one matrix by its inputs' Gram matrix.

    Args:
        weight_OI: The weight.
        statistics: What calibration gathered, if anything.
        pattern: The pattern along the last axis.
        method: The method's name, for the message; in small letters it is the criterion's.

    Returns:
        The statistics.

    Raises:
        SparsepassError: The weight is not 2-D, M does not divide its width, or see `check_statistics`.

    >>> check_matrix(torch.ones(8), None, NMPattern(2, 4), method="ALPS")
    Traceback (most recent call last):
    sparsepass.SparsepassError: ALPS prunes one [out, in] matrix at a time, got shape (8,)
    """
    if weight_OI.dim() != 2:
        raise SparsepassError(f"{method} prunes one [out, in] matrix at a time, got shape {tuple(weight_OI.shape)}")
    known = check_statistics(weight_OI, statistics, criterion=method.lower(), gram=True)
    nm_mask(weight_OI[:0], pattern)  # complains of a width that M does not divide before any work is done
    return known


def unit_gram(statistics: InputStatistics, weight_OI: Tensor, damping: float) -> tuple[Tensor, Tensor, Tensor]:
    """The damped Gram matrix in the scale in which its diagonal is one.

    Features that were never active ("dead") take no part in the mean that damping is a fraction of, and stand alone
    with a scale of one.

    Shapes: ``[I, I]``, ``[I]`` and ``[I]``.

    Args:
        statistics: With a Gram matrix.
        weight_OI: The weight, on whose device the matrix is wanted, in fp32 (fp64 for a weight in fp64).
        damping: Added to the diagonal, as a fraction of its mean.

    Returns:
        The matrix; the scales, which weights are multiplied with to match; and the dead features.

    Raises:
        SparsepassError: The Gram matrix holds NaN or Inf.

    >>> statistics = InputStatistics(num_tokens=1, gram_II=torch.tensor([[4.0, 1.0], [1.0, 1.0]]))
    >>> unit_gram(statistics, torch.ones(1, 2), 0.0)[:2]
    (tensor([[1.0000, 0.5000],
            [0.5000, 1.0000]]), tensor([2., 1.]))
    """
    gram_II = statistics.gram_II
    assert gram_II is not None
    if not all_finite(gram_II):
        raise SparsepassError("the inputs' Gram matrix holds NaN or Inf; look for the calibration batch that brings them in")
    dtype = torch.promote_types(weight_OI.dtype, torch.float32)
    gram_II = gram_II.to(device=weight_OI.device, dtype=dtype, copy=True)
    diag_I = gram_II.diagonal()
    dead_I = diag_I == 0
    diag_I += damping * diag_I.sum() / (~dead_I).sum().clamp(min=1)
    diag_I.masked_fill_(dead_I, 1)
    scale_I = diag_I.sqrt()
    gram_II /= scale_I
    gram_II /= scale_I.unsqueeze(1)
    gram_II.fill_diagonal_(1)
    return gram_II, scale_I, dead_I


def keep_masked(weight_OI: Tensor, mask_OI: Tensor) -> Pruned:
    """The result of a criterion that leaves the kept weights as they are.

    Shapes: both ``[..., O, I]``.

    Args:
        weight_OI: The dense weight.
        mask_OI: What to keep.

    Returns:
        The weight with +0.0 where the mask is false.

    Exactness: kept weights are bitwise equal, except that -0.0 becomes +0.0.

    >>> keep_masked(torch.tensor([[1.0, -2.0]]), torch.tensor([[True, False]])).weight_OI
    tensor([[1., 0.]])
    """
    return Pruned(weight_OI=canonical_zeros(weight_OI.detach().masked_fill(~mask_OI, 0)), mask_OI=mask_OI)


def pieces(weight_OI: Tensor, num_weights: int | None = None) -> list[slice]:
    """Rows that are computed together, a piece at a time, so that what they take does not grow with the weight.

    Args:
        weight_OI: The weight, whose rows do not depend on each other.
        num_weights: How many weights a piece has, more or less; by default `PIECE_WEIGHTS`.

    >>> pieces(torch.ones(3, 8), 16)
    [slice(0, 2, None), slice(2, 4, None)]
    """
    num_rows = max(1, (num_weights or PIECE_WEIGHTS) // max(weight_OI.shape[1], 1))
    return [slice(start, start + num_rows) for start in range(0, len(weight_OI), num_rows)]


def finished(weight_OI: Tensor, what: str, *, damping: float) -> Tensor:
    """Weights that were computed, with +0.0 for every -0.0.

    Args:
        weight_OI: The weights, +0.0 or -0.0 where they are dropped.
        what: What they are, for the message.
        damping: The damping that was used, for the message.

    Raises:
        SparsepassError: They do not fit their dtype.

    >>> finished(torch.tensor([[-0.0, 2.0]]), "the weights", damping=0.01)
    tensor([[0., 2.]])
    """
    if not all_finite(weight_OI):
        raise SparsepassError(
            f"{what} do not fit {weight_OI.dtype} (damping {damping:g}); raise the damping, give more calibration data, or "
            "prune in a dtype with more range"
        )
    return canonical_zeros(weight_OI)


@torch.no_grad()
def refine(weight_OI: Tensor, pruned: Pruned, statistics: InputStatistics | None, *, damping: float, num_steps: int) -> Pruned:
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
    known = check_statistics(weight_OI, statistics, criterion="refine", gram=True)
    gram_II, scale_I, dead_I = unit_gram(known, weight_OI, damping)
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
