"""What every criterion is: one function signature, its options, its result, and the checks they share.

Shape suffixes: O out, I in.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from sparsepass.graph.support import SparsepassError
from sparsepass.passes.maths import InputStatistics, NMPattern, canonical_zeros, nm_mask

# The relative rounding of Gram matrices, which are summed in fp32 whatever the weights are in.
GRAM_EPSILON = torch.finfo(torch.float32).eps
# Rows are taken in pieces of about this many weights: they do not depend on each other, and eight such arrays are held.
PIECE_WEIGHTS = 1 << 22
DampingOf = Literal["mean", "own"]
GroupOrder = Literal["given", "energy"]


@dataclass(frozen=True, kw_only=True)
class CriterionOptions:
    """What a user may set of the criteria.

    Args:
        damping: Added to the Hessian's diagonal, as a fraction (SparseGPT, ALPS, ProxSparse).
        damping_of: What it is a fraction of: the ``mean`` of the diagonal, as in the papers, or the diagonal's ``own`` entry,
            so that columns with small inputs are damped no more than others.
        order: In which order SparseGPT visits the groups: as ``given``, or by ``energy``, those first whose weights move the
            output most, while all others can still make up for what is dropped.
        block_size: Columns whose updates are gathered before later columns see them (SparseGPT); for speed only.

    Raises:
        SparsepassError: A value is out of range.

    >>> CriterionOptions(damping=0.1).damping_of
    'mean'
    """

    damping: float = 0.01
    damping_of: DampingOf = "mean"
    order: GroupOrder = "given"
    block_size: int = 128

    def __post_init__(self) -> None:
        if not (math.isfinite(self.damping) and self.damping >= 0):
            raise SparsepassError(f"damping must be a finite fraction of at least 0, such as 0.01, got {self.damping}")
        for name, choices in (("damping_of", get_args(DampingOf)), ("order", get_args(GroupOrder))):
            if getattr(self, name) not in choices:
                raise SparsepassError(f"{name} expects one of {', '.join(choices)}, got {getattr(self, name)!r}")
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
ScoreFunction: TypeAlias = Callable[[Tensor, InputStatistics | None], Tensor]


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
        score: The score of every weight, of which the function keeps the N largest in each group; None for a criterion that
            has no such score.
    """

    name: str
    function: CriterionFunction
    needs: Literal["nothing", "norms", "gram"]
    compensates: bool
    rows_are_independent: bool
    score: ScoreFunction | None = None


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


def unit_gram(
    statistics: InputStatistics, weight_OI: Tensor, damping: float, damping_of: DampingOf = "mean"
) -> tuple[Tensor, Tensor, Tensor]:
    """The damped Gram matrix in the scale in which its diagonal is one.

    Features that were never active ("dead") take no part in the mean that damping is a fraction of, and stand alone
    with a scale of one.

    Shapes: ``[I, I]``, ``[I]`` and ``[I]``.

    Args:
        statistics: With a Gram matrix.
        weight_OI: The weight, on whose device the matrix is wanted, in fp32 (fp64 for a weight in fp64).
        damping: Added to the diagonal, as a fraction.
        damping_of: What it is a fraction of; see `CriterionOptions`.

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
    diag_I += damping * (diag_I.clone() if damping_of == "own" else diag_I.sum() / (~dead_I).sum().clamp(min=1))
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
