"""The maths of SLoRB, the low-rank branch that stands beside a masked weight: ``y = (M .* W) x + S (X x) + b``.

X sums every k consecutive input features, S is small and dense.

Shape suffixes: O out, I in, R rank = in / k, T tokens.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sparsepass.graph.support import SparsepassError
from sparsepass.passes.maths.statistics import dampings

_RETRY_DAMPING = 1e-4


@dataclass(frozen=True, kw_only=True, eq=False)
class BranchFit:
    """The branch that fits best, and how it was found.

    Args:
        slorb_weight_OR: S, in the dtype of the weights.
        damping: The damping that was used.
        note: What the user should know, such as a raised damping.
    """

    slorb_weight_OR: Tensor  # noqa: N815
    damping: float
    note: str | None = None


def segment_sum(x: Tensor, k: int) -> Tensor:
    """Sums every k consecutive features: the fixed projection ``X x``.

    Shapes: ``[..., I]`` to ``[..., R]``.

    Args:
        x: Any dtype that can be summed.
        k: Features of one segment.

    Returns:
        The sums, in the dtype of ``x``.

    Raises:
        SparsepassError: k does not divide I.

    Source: arXiv 2407.20584, equation 5.

    >>> segment_sum(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), 2)
    tensor([[3., 7.]])
    """
    rank = _rank(x.shape[-1], k)
    return torch.unflatten(x, -1, (rank, k)).sum(-1)


def fixed_projection(
    in_features: int, k: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Tensor:
    """The fixed projection X as a dense matrix: ones where ``i * k <= j < (i + 1) * k``.

    Shapes: ``[R, I]``.

    Args:
        in_features: Input features of the layer.
        k: Features of one segment.
        dtype: Of the result.
        device: Of the result.

    Returns:
        X, so that ``x @ X.T`` is `segment_sum` of x.

    Raises:
        SparsepassError: k does not divide ``in_features``.

    Source: arXiv 2407.20584, equation 5; Exactness: bitwise.

    >>> fixed_projection(4, 2)
    tensor([[1., 1., 0., 0.],
            [0., 0., 1., 1.]])
    """
    rank = _rank(in_features, k)
    return torch.eye(rank, dtype=dtype, device=device).repeat_interleave(k, dim=1)


def slorb_mean_init(weight_OI: Tensor, mask_OI: Tensor, k: int, reduction: Literal["mean", "sum"] = "mean") -> Tensor:
    """The paper's start of S: what the mask drops of every segment, averaged, so that each segment keeps its mean.

    Right after a criterion that leaves the kept weights alone; after one that compensates (SparseGPT) it counts twice
    what the kept weights have already taken over: use `slorb_least_squares` there.

    Shapes: ``[O, I]`` to ``[O, R]``.

    Args:
        weight_OI: The dense weight, any float dtype; summed in fp32 (fp64 for a weight in fp64).
        mask_OI: Bool, true for what is kept.
        k: Features of one segment.
        reduction: ``mean`` as in the paper, or ``sum`` without the factor 1/k.

    Returns:
        S, in the dtype of the weight.

    Raises:
        SparsepassError: k does not divide I, the shapes differ, or the reduction is unknown.

    Source: arXiv 2407.20584, equation 6.

    >>> slorb_mean_init(torch.tensor([[4.0, 1.0, 2.0, 3.0]]), torch.tensor([[True, False, False, True]]), 2)
    tensor([[0.5000, 1.0000]])
    """
    if reduction not in ("mean", "sum"):
        raise SparsepassError(f"the reduction of SLoRB's start must be 'mean' or 'sum', got {reduction!r}")
    _check_same_shape(weight_OI, mask_OI, "mask")
    rank = _rank(weight_OI.shape[-1], k)
    dtype = torch.promote_types(weight_OI.dtype, torch.float32)
    dropped_ORk = torch.unflatten(weight_OI.detach().to(dtype).masked_fill(mask_OI.bool(), 0), -1, (rank, k))
    start_OR = dropped_ORk.mean(-1) if reduction == "mean" else dropped_ORk.sum(-1)
    return start_OR.to(weight_OI.dtype)


@torch.no_grad()
def slorb_least_squares(original_OI: Tensor, masked_OI: Tensor, gram_II: Tensor, *, k: int, damping: float = 1e-4) -> BranchFit:
    """The best S for a fixed projection: it minimises the output error ``||((W0 - W) - S X) A||_F`` over the inputs A.

    With ``H = A A^T``, ``S = (W0 - W) H X^T (X H X^T + damping)^-1``. Right after any criterion, compensating or not.
    Computed in fp64; the matrix to factorize is only ``[R, R]``.

    Shapes: ``[O, I]``, ``[O, I]``, ``[I, I]`` to ``[O, R]``.

    Args:
        original_OI: W0, the dense weight, any float dtype.
        masked_OI: W, the weight that is left: masked, and compensated if the criterion does that.
        gram_II: H, the sum or mean over tokens of ``x x^T`` (its scale does not matter).
        k: Features of one segment.
        damping: Added to the diagonal of ``X H X^T``, as a fraction of its mean; raised tenfold up to 1 while the
            matrix is not positive definite, or is so by no more than the rounding of H where it is not damped.

    Returns:
        S in the dtype of ``original_OI``, zero in rows that it would not help; the damping that was used; and a note if it
        had to be raised.

    Raises:
        SparsepassError: k does not divide I, shapes differ, something is NaN or Inf, or no damping makes the matrix
            positive definite.

    Source: methods.md section 2.

    Exactness: with damping 0 the gradient of the error is zero to fp64 rounding, before S is rounded to its dtype.

    >>> dense, masked = torch.tensor([[2.0, 1.0]]), torch.tensor([[2.0, 0.0]])
    >>> slorb_least_squares(dense, masked, torch.eye(2), k=2, damping=0.0).slorb_weight_OR
    tensor([[0.5000]])
    """
    _check_same_shape(original_OI, masked_OI, "masked weight")
    in_features = original_OI.shape[-1]
    rank = _rank(in_features, k)
    if original_OI.dim() != 2 or gram_II.shape != (in_features, in_features):
        raise SparsepassError(
            f"SLoRB's least squares takes one [out, in] matrix and its [in, in] Gram matrix, got shapes "
            f"{tuple(original_OI.shape)} and {tuple(gram_II.shape)}"
        )
    if not (math.isfinite(damping) and damping >= 0):
        raise SparsepassError(f"SLoRB's damping must be a finite fraction of at least 0, such as 1e-4, got {damping}")
    gram_RI = torch.unflatten(gram_II, 0, (rank, k)).sum(1, dtype=torch.float64).to(original_OI.device)
    gram_RR = segment_sum(gram_RI, k)
    missing_OI = original_OI.to(torch.float64) - masked_OI.to(torch.float64)
    target_OR = missing_OI @ gram_RI.T
    if not bool(target_OR.isfinite().all() & gram_RR.isfinite().all()):
        raise SparsepassError("SLoRB's least squares got NaN or Inf in a weight or in the inputs' Gram matrix")

    diag_R = gram_RR.diagonal()
    # What the rounding of H makes of each sum over a segment: its squares bound the rest of what is summed.
    rounding_R = segment_sum(gram_II.diagonal().to(diag_R), k) * (k * torch.finfo(gram_II.dtype).eps)
    dead_R = diag_R <= rounding_R  # its inputs never add up to anything: any S does, so it gets 0
    mean = diag_R.clamp(min=0).sum() / (~dead_R).sum().clamp(min=1)
    gram_RR[dead_R] = 0
    gram_RR[:, dead_R] = 0
    target_OR[:, dead_R] = 0
    undamped_R = diag_R + dead_R
    tried = dampings(damping, retry=_RETRY_DAMPING)
    for used in tried:
        diag_R.copy_(undamped_R + used * mean)
        lower_RR, info = torch.linalg.cholesky_ex(gram_RR)
        if int(info) == 0 and (used > 0 or bool((lower_RR.diagonal().square() > rounding_R).all())):
            break
    else:
        raise SparsepassError(
            f"the Gram matrix of SLoRB's {rank} segments is not positive definite, with damping "
            f"{', '.join(f'{each:g}' for each in tried)}; use more calibration tokens, or SLoRB's mean initialisation"
        )
    branch_OR = torch.cholesky_solve(target_OR.T, lower_RR).T.to(original_OI.dtype).contiguous()
    diag_R.copy_(undamped_R)  # the error itself is not damped
    known_OR = branch_OR.to(torch.float64)
    change_O = ((known_OR @ gram_RR - 2 * target_OR) * known_OR).sum(1)
    branch_OR.masked_fill_((change_O > 0).unsqueeze(1), 0)
    note = None
    if used != damping:
        note = (
            f"the Gram matrix of SLoRB's segments was not positive definite with damping {damping:g}, so {used:g} was "
            "used; the calibration tokens may be too few"
        )
    return BranchFit(slorb_weight_OR=branch_OR, damping=used, note=note)


def _rank(in_features: int, k: int) -> int:
    if k < 1 or in_features % k:
        raise SparsepassError(
            f"SLoRB's k = {k} does not divide {in_features} input features; choose a k that does, or leave this layer alone"
        )
    return in_features // k


def _check_same_shape(weight_OI: Tensor, other_OI: Tensor, name: str) -> None:
    if weight_OI.shape != other_OI.shape:
        raise SparsepassError(f"the {name} must have the weight's shape {tuple(weight_OI.shape)}, got {tuple(other_OI.shape)}")
