"""What every criterion is: one function signature, its options, its result, and the checks they share.

Shape suffixes: O out, I in.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from sparsepass.graph.support import SparsepassError
from sparsepass.passes.maths import InputStatistics, NMPattern, canonical_zeros


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


# The relative rounding of Gram matrices, which are summed in fp32 whatever the weights are in.
GRAM_EPSILON = torch.finfo(torch.float32).eps

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


def check_statistics(statistics: InputStatistics | None, in_features: int, *, criterion: str, gram: bool) -> InputStatistics:
    """Makes sure that a criterion has the statistics it needs.

    Args:
        statistics: What calibration gathered, if anything.
        in_features: Input features of the weight.
        criterion: The criterion's name, for the message.
        gram: Whether the Gram matrix is needed.

    Returns:
        The statistics.

    Raises:
        SparsepassError: They are missing, empty, of another width, or without the Gram matrix.

    >>> check_statistics(None, 8, criterion="wanda", gram=False)
    Traceback (most recent call last):
    sparsepass.SparsepassError: the criterion 'wanda' needs calibration data, got none; ...
    """
    if statistics is None:
        raise SparsepassError(
            f"the criterion {criterion!r} needs calibration data, got none; pass calibration=..., or choose 'magnitude'"
        )
    if statistics.in_features != in_features:
        raise SparsepassError(
            f"the criterion {criterion!r} got a weight of {in_features} input features "
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


def unit_gram(
    statistics: InputStatistics, damping: float, *, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """The damped Gram matrix in the scale in which its diagonal is one.

    Features that were never active ("dead") take no part in the mean that damping is a fraction of, and stand alone
    with a scale of one.

    Shapes: ``[I, I]``, ``[I]`` and ``[I]``.

    Args:
        statistics: With a Gram matrix.
        damping: Added to the diagonal, as a fraction of its mean.
        dtype: To compute in.
        device: To compute on.

    Returns:
        The matrix; the scales, which weights are multiplied with to match; and the dead features.

    Raises:
        SparsepassError: The Gram matrix holds NaN or Inf.

    >>> statistics = InputStatistics(num_tokens=1, gram_II=torch.tensor([[4.0, 1.0], [1.0, 1.0]]))
    >>> unit_gram(statistics, 0.0, dtype=torch.float32, device=torch.device("cpu"))[:2]
    (tensor([[1.0000, 0.5000],
            [0.5000, 1.0000]]), tensor([2., 1.]))
    """
    gram_II = statistics.gram_II
    assert gram_II is not None
    if not all_finite(gram_II):
        raise SparsepassError("the inputs' Gram matrix holds NaN or Inf; look for the calibration batch that brings them in")
    gram_II = gram_II.to(device=device, dtype=dtype, copy=True)
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


def working_dtype(weight_OI: Tensor) -> torch.dtype:
    """The dtype that criteria compute in: fp32, or fp64 for a weight in fp64.

    Args:
        weight_OI: The weight.

    Returns:
        The dtype.

    >>> working_dtype(torch.ones(1, dtype=torch.bfloat16))
    torch.float32
    """
    return torch.promote_types(weight_OI.dtype, torch.float32)
